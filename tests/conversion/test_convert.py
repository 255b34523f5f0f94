"""The road of a conversion, with a framework made for it: what is compared, refused, and never written."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import Ran, run_cli, run_process
from test_schema import check

import graphopt
from graphopt.conversion import child, road
from graphopt.conversion.front_ends import FRONT_ENDS, FrontEnd
from graphopt.conversion.shapes import parse

Watch = Callable[[Path], AbstractContextManager[None]]


@pytest.fixture
def toy(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """``graphopt convert`` on a toy that does what it is told."""
    script = str(Path(__file__).with_name("toy_front_end.py"))
    monkeypatch.setitem(FRONT_ENDS, "toy", FrontEnd("toy", script, "toy", "toy toy2onnx"))

    def convert(what: str, *words: str) -> Ran:
        Path("toy.json").write_text(json.dumps({"toy": what}))
        return run_cli("convert", "toy.json", "--from", "toy", "-o", "m.onnx", *words)

    return convert


def test_a_right_one_is_written(toy: Callable[..., Ran]) -> None:
    ran = toy("right")
    assert ran.code == 0, ran.err
    assert ran.err == ""
    assert "toy 1.0, toy2onnx 0.1" in ran.out
    assert "against toy 1.0 on 2 samples" in ran.out
    model = onnx.load("m.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version >= 8
    session = onnxruntime.InferenceSession("m.onnx")
    y, label = session.run(None, {"x": np.ones((5, 4), np.float32)})
    assert y.shape == (5, 3)
    assert label.tolist() == [2] * 5
    assert session.get_inputs()[0].shape == ["batch", 4]  # not s77
    assert session.get_outputs()[0].shape == ["batch", 3]  # not unk__7: it was as large in every sample


def test_the_report(toy: Callable[..., Ran]) -> None:
    report = toy("right", "--json").json
    check(report, "converted")
    assert report["source"]["kind"] == "toy"
    assert report["output"]["path"] == "m.onnx"
    assert report["input"]["bytes"] == Path("toy.json").stat().st_size
    assert report["comparison"]["samples"] == 2
    refused = toy("wrong", "--json")
    check(refused.json, "converted")
    assert refused.json["exit_code"] == 1


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("wrong", 1, ["does not compute what toy 1.0 does", "output 'y': max abs diff 0.01", "--max-abs"]),
        ("label", 1, ["output 'label': max abs diff 1, allowed is 0"]),
        ("shape", 1, ["output 'y': float32[1, 3] instead of float32[1, 2]"]),
        ("random", 1, ["other values each time"]),
        ("missing", 2, ["needs no_such_framework", "pip install 'graphopt[toy]'", "--python PATH"]),
        ("refused", 2, ["the toy is broken; buy another"]),
        ("raises", 2, ["ValueError: no converter for", "-v shows where"]),
        ("dies", 2, ["died (exit 3)", "a native library says goodbye"]),
        ("nothing", 2, ["toy2onnx 0.1 said that it was done and wrote nothing"]),
        ("garbage", 2, ["toy2onnx 0.1 wrote an invalid model"]),
        ("invalid", 2, ["wrote an invalid model", "No Op registered for Frobnicate"]),
        ("too-many", 2, ["3 outputs and the converted model 2"]),
    ],
)
def test_anything_else_is_one_line_and_nothing_is_written(
    what: str, code: int, words: list[str], toy: Callable[..., Ran], untouched: Watch, workplace: Path
) -> None:
    Path("m.onnx").write_bytes(b"what was there before")
    ran = toy(what, "-q")
    assert ran.code == code, ran.err
    assert all(word in ran.error for word in words), ran.error
    assert Path("m.onnx").read_bytes() == b"what was there before"
    assert sorted(p.name for p in workplace.iterdir()) == ["m.onnx", "toy.json"]


def test_how_near_is_near_enough(toy: Callable[..., Ran]) -> None:
    assert toy("near").code == 0
    assert toy("near", "--max-abs", "1e-6").code == 1
    assert toy("wrong", "--max-abs", "0.1").code == 0
    assert toy("right", "--max-abs", "-1").code == 2


def test_frameworks_may_compute_in_double(toy: Callable[..., Ran]) -> None:
    assert toy("double").code == 0


@pytest.mark.parametrize(
    ("what", "note"),
    [
        ("twice", "imported twice"),
        ("old", "opset 11 -> 17"),
        ("declared", "output 'label' was declared [1]"),
        ("unsaid", "opset 15 is assumed"),
    ],
)
def test_what_converters_leave_undone_is_put_right(what: str, note: str, toy: Callable[..., Ran]) -> None:
    ran = toy(what)
    assert ran.code == 0, ran.err
    assert note in ran.out
    model = onnx.load("m.onnx")
    assert [(o.domain, o.version >= 17) for o in model.opset_import] == [("", True)]
    onnxruntime.InferenceSession("m.onnx").run(None, {"x": np.ones((7, 4), np.float32)})


def test_erfc_becomes_what_there_is(toy: Callable[..., Ran]) -> None:
    ran = toy("erfc", "--max-abs", "10")
    assert "1 Erfc, which ONNX has not" in ran.out
    x = np.linspace(-1, 1, 4, dtype=np.float32).reshape(1, 4)
    weight = np.arange(12, dtype=np.float32).reshape(4, 3) / 10
    found = onnxruntime.InferenceSession("m.onnx").run(["y"], {"x": x})[0]
    scipy_special = pytest.importorskip("scipy.special")
    assert np.allclose(found, scipy_special.erfc(x @ weight), atol=1e-6)


def test_opset(toy: Callable[..., Ran]) -> None:
    assert toy("opset", "--opset", "20").code == 0
    assert onnx.load("m.onnx").opset_import[0].version == 20
    assert toy("right", "--opset", "21").code == 0  # what the converter cannot is raised afterwards
    assert onnx.load("m.onnx").opset_import[0].version == 21


def test_it_takes_no_longer_than_it_may(toy: Callable[..., Ran]) -> None:
    started = time.monotonic()
    ran = toy("hangs", "--timeout", "1.5")
    assert ran.code == 2
    assert "longer than 1.5 s" in ran.error
    assert time.monotonic() - started < 20


def test_another_interpreter(toy: Callable[..., Ran]) -> None:
    assert toy("right", "--python", sys.executable).code == 0
    ran = toy("missing", "--python", sys.executable)
    assert f"{sys.executable} has no no_such_framework" in ran.error
    assert "-m pip install toy toy2onnx" in ran.error
    assert "no interpreter at nope" in toy("right", "--python", "nope").error


def test_streams(toy: Callable[..., Ran], workplace: Path) -> None:
    Path("toy.json").write_text('{"toy": "right"}')
    ran = run_cli("convert", "toy.json", "--from", "toy", "-o", "-")
    assert ran.code == 0
    assert "toy 1.0" in ran.err  # the report goes where the model does not
    assert run_cli("convert", "toy.json", "--from", "toy", "-o", "-", "--json").code == 2


def test_python(toy: Callable[..., Ran]) -> None:
    Path("toy.json").write_text('{"toy": "right"}')
    result = graphopt.convert("toy.json", framework="toy")
    assert graphopt.inspect(result.model)["inputs"][0]["name"] == "x"
    smaller = graphopt.optimize(result.ir_model, time=0)
    assert smaller.report["output"]["nodes"] <= result.report["output"]["nodes"]
    Path("toy.json").write_text('{"toy": "wrong"}')
    with pytest.raises(graphopt.GateFailed) as caught:
        graphopt.convert("toy.json", framework="toy")
    assert caught.value.report is not None
    assert caught.value.report["comparison"]["outputs"][0]["max_abs"] == pytest.approx(0.01, rel=1e-3)


def test_markdown_and_the_page(toy: Callable[..., Ran]) -> None:
    assert "| output |" in toy("right", "--markdown").out
    assert toy("right", "--report", "page.html", "-q").code == 0
    assert "toy.json" in Path("page.html").read_text("utf-8")


def test_a_folder_named_as_a_framework_where_the_user_stands(toy: Callable[..., Ran]) -> None:
    Path("onnx").mkdir()
    Path("onnx/__init__.py").write_text("raise SystemExit('not me')")
    Path("toy.json").write_text('{"toy": "right"}')
    assert toy("right").code == 0


def test_the_scratch_folder_goes_with_the_model(toy: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("toy.json").write_text('{"toy": "right"}')
    result = graphopt.convert("toy.json", framework="toy")
    folder = result.ir_model.meta[road._SCRATCH].path
    assert folder.is_dir()
    del result
    import gc

    gc.collect()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x:1,3,224,224", ("x", [1, 3, 224, 224], "float32")),
        ("x:N,3,8,8", ("x", ["N", 3, 8, 8], "float32")),
        ("ids:N,16:int64", ("ids", ["N", 16], "int64")),
        ("1x3x8x8", ("", [1, 3, 8, 8], "float32")),
        ("input_1:0:[1,8]", ("input_1:0", [1, 8], "float32")),
    ],
)
def test_shapes(text: str, found: tuple[str, list[int | str], str]) -> None:
    assert tuple(parse([text])[0].values()) == found


@pytest.mark.parametrize("text", ["x:1,-2", "x:1,?", "x:0,3", "x:1,2,float"])
def test_shapes_that_cannot_be_read(text: str) -> None:
    if text == "x:1,2,float":
        assert parse([text])[0]["shape"][-1] == "float"  # a name like any other
        return
    with pytest.raises(graphopt.InputError, match="is no size"):
        parse([text])


def test_one_input_given_twice() -> None:
    with pytest.raises(graphopt.InputError, match="twice"):
        parse(["x:1", "x:2"])


def test_interrupting_ends_the_converter(toy: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    started: list[int] = []
    original = child.subprocess.Popen

    def popen(*words: object, **options: object) -> object:
        process = original(*words, **options)  # type: ignore[call-overload]
        started.append(process)
        return process

    monkeypatch.setattr(child.subprocess, "Popen", popen)
    monkeypatch.setattr(child, "_wait", interrupted)
    ran = toy("hangs")
    assert ran.code == 130
    assert started[0].poll() is not None  # type: ignore[attr-defined]


def test_bad_input_in_a_process_of_its_own(workplace: Path) -> None:
    ran = run_process("convert", "nope.pt2", "-o", "m.onnx")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "error: no such file or folder: nope.pt2; check the path\n"
