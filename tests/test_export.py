"""``graphopt export``: run in the other runtime, compared, and only then written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import DEMO, MODELS, python, run_cli
from test_schema import check

import graphopt
from graphopt import exporting

Watch = Callable[[Path], AbstractContextManager[None]]
DIGITS = DEMO / "digits.onnx"


def test_ort_form_runs_and_is_the_same(workplace: Path) -> None:
    ran = run_cli("export", DIGITS, "-o", "m.ort", "--to", "ort")
    assert ran.code == 0, ran.err
    assert Path("m.ort").read_bytes()[4:8] == b"ORTM"
    images = np.load(DEMO / "evaluation.npz")["image"][:8]
    a, b = (onnxruntime.InferenceSession(str(p)).run(None, {"image": images})[0] for p in (DIGITS, "m.ort"))
    assert np.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.onnx")), ids=lambda p: p.stem)
def test_every_fixture_or_one_line(path: Path, workplace: Path) -> None:
    ran = run_cli("export", path, "-o", "m.ort", "--to", "ort", "-q")
    assert ran.code in (0, 2), ran.err
    assert Path("m.ort").exists() == (ran.code == 0)
    if ran.code:
        assert ran.error


def test_report(workplace: Path) -> None:
    report = run_cli("export", DIGITS, "-o", "m.ort", "--to", "ort", "--data", DEMO / "calibration.npz", "--json").json
    check(report, "converted")
    assert report["output"]["bytes"] == Path("m.ort").stat().st_size
    assert report["comparison"]["samples"] == 4
    assert graphopt.export(DIGITS, "n.ort", to="ort")["exit_code"] == 0


def test_a_runtime_that_computes_something_else_is_not_handed_a_file(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, untouched: Watch
) -> None:
    def wrong(model: object, path: Path) -> object:
        from graphopt.model import load, to_proto
        from graphopt.session import ort_form

        proto = to_proto(model)  # type: ignore[arg-type]
        last = max(proto.graph.initializer, key=lambda t: len(t.raw_data))
        last.raw_data = bytes(len(last.raw_data))
        return ort_form(load(proto), path)

    monkeypatch.setattr(exporting, "ort_form", wrong)
    Path("m.ort").write_bytes(b"before")
    with untouched(workplace):
        ran = run_cli("export", DIGITS, "-o", "m.ort", "--to", "ort", "-q")
    assert ran.code == 1
    assert "does not compute what ONNX Runtime does" in ran.error
    assert run_cli("export", DIGITS, "-o", "m.ort", "--to", "ort", "-q", "--min-sqnr", "500").code == 1
    assert run_cli("export", DIGITS, "-o", "m.ort", "--to", "ort", "-q", "--max-abs", "1000").code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m.ort", "--to", "orf"], "'orf' is not one of"),
        (["m.onnx", "--to", "ort"], "is called *.ort; name it so"),
        (["m.ort", "--to", "openvino"], "is called *.xml; name it so"),
        (["no/m.ort", "--to", "ort"], "the folder of no/m.ort does not exist"),
    ],
)
def test_usage(words: list[str], message: str, workplace: Path, untouched: Watch) -> None:
    with untouched(workplace):
        ran = run_cli("export", DIGITS, "-o", *words)
    assert ran.code == 2
    assert message in ran.error


def test_without_the_runtime_the_command_that_installs_it(workplace: Path) -> None:
    try:
        import openvino  # noqa: F401
    except ImportError:
        ran = run_cli("export", DIGITS, "-o", "m.xml", "--to", "openvino")
        assert ran.code == 2
        assert "pip install 'graphopt[openvino]'" in ran.error
        assert not Path("m.xml").exists()


@pytest.mark.framework
@pytest.mark.parametrize(("to", "name"), [("openvino", "m.xml"), ("tflite", "m.tflite")])
def test_the_other_runtimes(to: str, name: str, workplace: Path) -> None:
    words = ("-o", name, "--to", to, "--python", python(to), "--data", DEMO / "calibration.npz")
    report = run_cli("export", DIGITS, *words, "--json").json
    check(report, "converted")
    assert report["exit_code"] == 0
    assert report["output"]["bytes"] == sum(p.stat().st_size for p in workplace.iterdir())
    assert report["comparison"]["outputs"][0]["sqnr_db"] > 80


@pytest.mark.framework
def test_what_onnx2tf_gets_wrong_is_not_written(workplace: Path) -> None:
    data = ("--data", DEMO / "calibration.npz")
    assert run_cli("quantize", DIGITS, "-o", "q.onnx", *data, "--time", "0", "--allow-slower", "-q").code == 0
    ran = run_cli("export", "q.onnx", "-o", "q.tflite", "--to", "tflite", "--python", python("tflite"), *data, "-q")
    assert ran.code == 1
    assert "does not compute what ONNX Runtime does" in ran.error
    assert [p.name for p in workplace.iterdir()] == ["q.onnx"]


def test_tflite_wants_an_environment_of_its_own(workplace: Path) -> None:
    ran = run_cli("export", DIGITS, "-o", "m.tflite", "--to", "tflite")
    assert ran.code == 2
    assert "env/bin/pip install onnx2tf" in ran.error
    assert "--python env/bin/python" in ran.error
    assert list(workplace.iterdir()) == []
