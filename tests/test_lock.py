"""--lock and run --locked: the same bytes again, or one line that says what differs."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import DEMO, MODELS, run_cli

import graphopt
from graphopt import locking
from graphopt.locking import read_lock
from graphopt.search.costs import Pricing
from graphopt.search.measured import Search

Watch = Callable[[Path], AbstractContextManager[None]]
QUANTIZE = ["quantize", "digits.onnx", "-o", "q.onnx", "--data", "calibration.npz", "--eval-data", "evaluation.npz"]
FAST = ["--time", "0", "--lock", "graphopt.lock"]


RECIPE = """\
model = "digits.onnx"
output = "q.onnx"
data = "calibration.npz"
eval-data = "evaluation.npz"

[[pass]]
use = "fuse-batchnorm"

[[pass]]
use = "quantize-static"
"""


@pytest.fixture
def digits(workplace: Path) -> Path:
    shutil.copy(DEMO / "digits.onnx", "digits.onnx")
    for name in ("calibration.npz", "evaluation.npz"):
        with np.load(DEMO / name) as held:
            np.savez(name, **{key: held[key][:16] for key in held.files})
    Path("r.toml").write_text(RECIPE)
    return workplace


@pytest.fixture
def locked(digits: Path) -> bytes:
    """The bytes of a quantized model that ``graphopt.lock`` is the lock of; the model itself is gone."""
    ran = run_cli("run", "r.toml", *FAST)
    assert ran.code == 0, ran.err
    made = Path("q.onnx").read_bytes()
    Path("q.onnx").unlink()
    return made


def again(*arguments: str) -> bytes:
    ran = run_cli("run", "--locked", "graphopt.lock", *arguments)
    assert ran.code == 0, ran.err
    return Path("q.onnx").read_bytes()


def test_the_same_bytes_again(locked: bytes, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tomllib.loads(Path("graphopt.lock").read_text())
    assert again() == locked
    assert {"graphopt", "onnx", "onnxruntime", "numpy"} <= table["locked"]["versions"].keys()
    assert table["locked"]["data"]["samples"] == 16
    # The folder may move, and it does not matter where one stands.
    shutil.move(workplace, workplace.with_name("moved"))
    monkeypatch.chdir(workplace.parent)
    ran = run_cli("run", "--locked", "moved/graphopt.lock", "-o", "elsewhere.onnx", "--json")
    assert ran.code == 0, ran.err
    assert Path("elsewhere.onnx").read_bytes() == locked
    assert ran.json["gates"] == []
    assert ran.json["latency"] == {}


def test_what_a_budget_chose_is_written_out(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_cli("run", "r.toml", "--time", "0", "--json").json["comparison"]["outputs"][0]["sqnr_db"]
    ran = run_cli(*QUANTIZE, "--min-sqnr", str(whole + 3), "--time", "0", "--lock", "graphopt.lock")
    assert ran.code == 0, ran.err
    first = Path("q.onnx").read_bytes()
    assert "exclude" in Path("graphopt.lock").read_text()
    monkeypatch.setattr("graphopt.stages.keep_to_budget", lambda *_: pytest.fail("nothing is searched again"))
    assert again() == first


def test_what_was_measured_is_written_out(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table under which one region is dear in integers; the lock holds table and placement, and needs no timing."""

    def observe(self: Pricing, *_: Any) -> None:
        for unit in self.units:
            self.table.entries[self.unit_key(unit, integer=False)] = 1000
            self.table.entries[self.unit_key(unit, integer=True)] = 9999 if unit.name == "/stem/Conv" else 1

    monkeypatch.setattr(Pricing, "observe", observe)
    monkeypatch.setattr(Pricing, "estimate_conversions", lambda self: None)
    monkeypatch.setattr(Search, "_race", lambda *_: None)
    command = [*QUANTIZE, "--allow-slower", "--placement", "measured", "--cost-table", "t.json"]
    assert run_cli(*command, "--time", "0.01").code == 0
    ran = run_cli(*command, "--time", "0", "--lock", "graphopt.lock", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["placement"]["left_in_float"] == ["/stem/Conv"]
    held = read_lock("graphopt.lock").table["cost-table"]
    assert held["entries"] == ran.json["placement"]["cost_table"]["entries"]
    assert held["sha256"] == ran.json["placement"]["cost_table"]["sha256"]
    first = Path("q.onnx").read_bytes()
    Path("t.json").unlink()
    assert again() == first


def test_optimize_and_a_recipe(digits: Path) -> None:
    (digits / "mine").mkdir()
    code = "def same(proto):\n    proto.graph.doc_string = 'mine'\n    return proto\n"
    Path("mine/code.py").write_text(code)
    Path("mine/r.toml").write_text(
        'model = "../digits.onnx"\noutput = "../q.onnx"\n\n[[pass]]\nuse = "code.py:same"\n\n'
        '[[pass]]\nrepeat = 2\n[[pass.pass]]\nuse = "fuse-batchnorm"\n'
    )
    for command in (["optimize", "digits.onnx", "-o", "q.onnx"], ["run", "mine/r.toml"]):
        ran = run_cli(*command, "--time", "0", "--lock", "graphopt.lock")
        assert ran.code == 0, ran.err
        first = Path("q.onnx").read_bytes()
        Path("q.onnx").unlink()
        assert again() == first
    Path("mine/code.py").write_text(code.replace("mine", "yours"))
    assert "is not the code that" in run_cli("run", "--locked", "graphopt.lock").error


def test_weights_in_another_file(digits: Path, untouched: Watch) -> None:
    onnx.save(onnx.load("digits.onnx"), "big.onnx", save_as_external_data=True, location="big.data", size_threshold=64)
    ran = run_cli("optimize", "big.onnx", "-o", "q.onnx", "--time", "0", "--lock", "graphopt.lock")
    assert ran.code == 0, ran.err
    first = Path("q.onnx").read_bytes()
    assert again() == first
    with untouched(digits):
        assert "name it" in run_cli("run", "--locked", "graphopt.lock", "-o", "other.onnx").error
    weights = bytearray(Path("big.data").read_bytes())
    weights[5] ^= 1
    Path("big.data").write_bytes(weights)
    with untouched(digits):
        assert "the weights of the model are not those" in run_cli("run", "--locked", "graphopt.lock").error


def other_model() -> None:
    shutil.copy(MODELS / "shared.onnx", "digits.onnx")


def other_data() -> None:
    with np.load("calibration.npz") as held:
        arrays = {name: held[name] for name in held.files}
    image = arrays["image"].copy()
    image[0] += 1
    np.savez("calibration.npz", **{**arrays, "image": image})


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (other_model, "the model is not the one of graphopt.lock"),
        (other_data, "the data is not that of graphopt.lock"),
        (lambda: Path("calibration.npz").unlink(), "no file or folder"),
    ],
)
def test_other_inputs_are_one_line(
    change: Callable[[], None], fragment: str, locked: bytes, workplace: Path, untouched: Watch
) -> None:
    change()
    with untouched(workplace):
        ran = run_cli("run", "--locked", "graphopt.lock")
    assert ran.code == 2
    assert fragment in ran.error


def test_other_bytes_are_one_line_that_says_what_differs(locked: bytes, workplace: Path, untouched: Watch) -> None:
    text = Path("graphopt.lock").read_text()
    digest = tomllib.loads(text)["locked"]["output"]["sha256"]
    numpy = np.__version__
    Path("graphopt.lock").write_text(text.replace(digest, "0" * 64).replace(f'numpy = "{numpy}"', 'numpy = "1.0"'))
    with untouched(workplace):
        ran = run_cli("run", "--locked", "graphopt.lock", "-q")
    assert ran.code == 1
    assert ran.error == (
        f"error: other bytes than graphopt.lock locked; what differs: numpy is {numpy}, locked was 1.0; "
        "nothing was written"
    )


def test_other_versions_with_the_same_bytes_are_fine(locked: bytes) -> None:
    text = Path("graphopt.lock").read_text()
    Path("graphopt.lock").write_text(text.replace(f'numpy = "{np.__version__}"', 'numpy = "1.0"'))
    assert again() == locked


BAD: dict[str, tuple[list[str], str]] = {
    "neither": (["run"], "give a recipe, or a lock"),
    "both": (["run", "r.toml", "--locked", "graphopt.lock"], "one of them"),
    "missing": (["run", "--locked", "no.lock"], "no such lock"),
    "a-recipe": (["run", "--locked", "r.toml"], "is no lock"),
    "a-lock-as-recipe": (["run", "graphopt.lock"], "run --locked"),
    "no-toml": (["run", "--locked", "digits.onnx"], "cannot read the lock"),
    "version": (["run", "--locked", "old.lock"], "version 0"),
    "not-whole": (["run", "--locked", "part.lock"], "is no whole lock"),
    "slower": (["run", "--locked", "graphopt.lock", "--allow-slower"], "leave it out"),
    "nowhere": ([*QUANTIZE, "--lock", "no/graphopt.lock"], "does not exist"),
    "itself": ([*QUANTIZE, "--lock", "./q.onnx"], "is the output itself"),
    "dry-run": ([*QUANTIZE, "--dry-run", "--lock", "graphopt.lock"], "leave --lock out"),
    "package": (["compress", "digits.onnx", "-o", "p", "--package", "--lock", "graphopt.lock"], "not a package"),
    "stdout": (["optimize", "digits.onnx", "-o", "-", "--lock", "graphopt.lock"], "write it to a file"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_locked_is_one_line(name: str, digits: Path, untouched: Watch) -> None:
    Path("graphopt.lock").write_text('model = "digits.onnx"\n[locked]\nversion = 1\n')
    Path("old.lock").write_text("[locked]\nversion = 0\n")
    Path("part.lock").write_text("[locked]\nversion = 1\n")
    arguments, fragment = BAD[name]
    with untouched(digits):
        ran = run_cli(*arguments)
    assert ran.code == 2, ran.err
    assert fragment in ran.error


def test_python(digits: Path) -> None:
    result = graphopt.optimize("digits.onnx", time=0)
    with pytest.raises(graphopt.InputError, match="save it first"):
        graphopt.lock(result, "graphopt.lock")
    result.save("q.onnx")
    graphopt.lock(result, "graphopt.lock")
    first = Path("q.onnx").read_bytes()
    Path("q.onnx").unlink()
    assert graphopt.run(locked="graphopt.lock").report["exit_code"] == 0
    assert Path("q.onnx").read_bytes() == first
    samples = {"image": np.zeros((8, 1, 8, 8), np.float32)}
    result = graphopt.quantize("digits.onnx", data=samples, time=0, allow_slower=True)
    result.save("q.onnx")
    with pytest.raises(graphopt.InputError, match="data that exists in Python only"):
        graphopt.lock(result, "graphopt.lock")


def test_every_difference_is_told(locked: bytes) -> None:
    held = read_lock("graphopt.lock")
    report: dict[str, Any] = {"versions": dict(held.table["versions"]), "machine": dict(held.table["machine"])}
    del report["machine"]["cpus"]
    assert locking.differences(held, report) == []
    report["versions"]["onnx"] = "9"
    report["machine"]["cpu"] = "another"
    told = locking.differences(held, report)
    assert [text.split(" is ")[0] for text in told] == ["onnx", "cpu"]


@pytest.mark.parametrize(
    "command",
    [
        ["compress", "digits.onnx", "--weights", "int8"],
        ["compress", "digits.onnx", "--weights", "int8", "--memory", "100kB"],
        ["prune", "digits.onnx", "--macs", "0.7", "--data", "calibration.npz"],
    ],
    ids=["compress", "compress-in-parts", "prune"],
)
def test_other_verbs_that_make_a_model(command: list[str], digits: Path) -> None:
    ran = run_cli(*command, "-o", "q.onnx", "--time", "0", "--verify", "off", "--lock", "graphopt.lock")
    assert ran.code == 0, ran.err
    first = Path("q.onnx").read_bytes()
    Path("q.onnx").unlink()
    assert again() == first


def test_dynamic_needs_no_data(workplace: Path) -> None:
    command = ["quantize", MODELS / "encoder.onnx", "-o", "q.onnx", "--mode", "dynamic", "--time", "0"]
    assert run_cli(*command, "--lock", "graphopt.lock").code == 0
    assert again() == Path("q.onnx").read_bytes()
