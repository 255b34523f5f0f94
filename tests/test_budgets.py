"""What a model may ask for: known before it runs, watched while it runs, and said otherwise by whoever trusts it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import builders
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import value, weight
from conftest import MODELS, ROOT, run_cli, run_process
from onnx import TensorProto, helper

import graphopt
from graphopt import budgets, costing
from graphopt.base import Context, Contract, Pass, PassResult
from graphopt.costing import estimate
from graphopt.errors import OverBudget
from graphopt.manager import PassManager
from graphopt.model import clone, load
from graphopt.propagation import inferred
from graphopt.registry import create
from graphopt.session import Session

node = helper.make_node


def filled(*dims: int) -> onnx.ModelProto:
    """x + the sum of so many zeros."""
    nodes = [
        node("ConstantOfShape", ["shape"], ["z"], name="fill"),
        node("ReduceSum", ["z"], ["s"], keepdims=0),
        node("Add", ["x", "s"], ["y"]),
    ]
    return builders.model(nodes, [value("x")], [value("y")], [weight("shape", dims, np.int64)])


def counting(trips: int | None) -> onnx.ModelProto:
    """Adds 1 in a loop: ``trips`` times, or for ever."""
    inputs = [value("i", (), TensorProto.INT64), value("c", (), TensorProto.BOOL), value("s")]
    outputs = [value("c2", (), TensorProto.BOOL), value("s2")]
    steps = [node("Identity", ["c"], ["c2"]), node("Add", ["s", "one"], ["s2"])]
    body = helper.make_graph(steps, "body", inputs, outputs)
    weights = [weight("true", True, np.bool_), weight("one", [1, 1])]
    weights += [] if trips is None else [weight("trips", trips, np.int64)]
    loop = node("Loop", ["" if trips is None else "trips", "true", "x"], ["y"], body=body)
    return builders.model([loop], [value("x")], [value("y")], weights)


def unforeseen(elements: int) -> onnx.ModelProto:
    """At least ``elements`` zeros, which only running it tells: the number is the larger of that and an input."""
    nodes = [
        node("Max", ["n", "least"], ["shape"]),
        node("ConstantOfShape", ["shape"], ["z"]),
        node("ReduceSum", ["z"], ["y"], keepdims=0),
    ]
    least = weight("least", [elements], np.int64)
    return builders.model(nodes, [value("n", (1,), TensorProto.INT64)], [value("y", ())], [least])


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.onnx")), ids=lambda path: path.stem)
def test_no_real_model_is_refused(path: Path) -> None:
    assert estimate(onnx.load(path)).problem is None


def test_the_largest_value_is_named_with_its_size_and_the_way_out() -> None:
    with pytest.raises(OverBudget, match=r"at least 40 GB \(node 'fill' \(ConstantOfShape\)\).*raise --max-memory"):
        Session(load(filled(100_000, 100_000)))


def test_whoever_trusts_it_says_so() -> None:
    model = load(filled(100, 100))
    with graphopt.limits(memory="10kB"), pytest.raises(OverBudget, match="40 kB"):
        Session(model)
    with graphopt.limits(memory="1MB"):
        assert Session(model).run({"x": np.ones(2, np.float32)})["y"].tolist() == [1, 1]
    assert budgets.current() == budgets.Budgets()


def test_the_command_line_says_so_too(workplace: Path) -> None:
    onnx.save(filled(1000, 1000), "m.onnx")
    command = ["optimize", "m.onnx", "-o", "o.onnx", "--time", "0", "--passes", "remove-unused"]
    ran = run_cli(*command, "--max-memory", "1MB")
    assert ran.code == 2
    assert "--max-memory" in ran.error
    assert not Path("o.onnx").exists()
    assert run_cli(*command).code == 0, "what one command was told ends with it"


def test_loops_are_counted_before_they_run() -> None:
    with pytest.raises(OverBudget, match=r"loops run over 1e18 nodes.*--max-seconds"):
        Session(load(counting(2**60)))
    assert Session(load(counting(1000))).run({"x": np.zeros(2, np.float32)})["y"].tolist() == [1000, 1000]


def test_a_loop_without_end_is_stopped() -> None:
    started = time.monotonic()
    with graphopt.limits(seconds=0.2), pytest.raises(OverBudget, match=r"longer than 0\.2 s"):
        Session(load(counting(None))).run({"x": np.zeros(2, np.float32)})
    assert time.monotonic() - started < 10


@pytest.mark.skipif(sys.platform != "linux", reason="no such limit there")
def test_what_only_running_tells_is_capped(workplace: Path) -> None:
    onnx.save(unforeseen(250_000_000), "m.onnx")
    ran = run_process("optimize", "m.onnx", "-o", "o.onnx", "--time", "0", "--passes", "remove-unused")
    assert ran.code == 2, ran.out
    assert "not known beforehand" in ran.error
    assert not Path("o.onnx").exists()


def test_found_once_for_a_model_and_its_clones(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(builders.mlp())
    Session(clone(model))
    monkeypatch.setattr(costing, "estimate", lambda _: pytest.fail("estimated again"))
    Session(clone(model))


@dataclass(frozen=True)
class Runs(Pass):
    """Runs the model, as passes may."""

    name: ClassVar[str] = "runs"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        Session(model)
        return PassResult()


def test_a_pass_that_meets_the_limit_is_not_to_blame() -> None:
    model = load(filled(100_000, 100_000))
    with pytest.raises(OverBudget):
        PassManager([Runs()], verify="off").run(model, Context(original=model))


def test_onnxsim_is_not_given_what_may_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.passes.simplify.in_child", lambda *_, **__: pytest.fail("it was started"))
    model = load(filled(100_000, 100_000))
    with pytest.raises(OverBudget):
        create("simplify", {}).run(model, Context(original=model))


@pytest.mark.skipif(sys.platform == "win32", reason="other folders there")
def test_the_runtime_reports_to_nobody(tmp_path: Path) -> None:
    """ONNX Runtime 1.32 leaves a session file and an identifier where its telemetry is on."""
    home, scratch = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    scratch.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "CI")}
    environment |= {"HOME": str(home), "TMPDIR": str(scratch), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    code = "import builders; from graphopt.model import load; from graphopt.session import Session\n"
    code += "Session(load(builders.relu()))"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    assert [*home.rglob("*"), *scratch.rglob("*")] == []


DEEP = {
    "recipe": ("r.toml", "a = " + "[" * 20_000, ["run", "r.toml"]),
    "layers": ("s.json", "[" * 200_000, ["quantize", "m.onnx", "-o", "o.onnx", "--exclude-from", "s.json"]),
    "costs": ("t.json", "[" * 200_000, ["quantize", "m.onnx", "-o", "o.onnx", "--placement", "measured"]),
}


@pytest.mark.parametrize("name", DEEP)
def test_files_nested_without_end_are_no_internal_error(name: str, workplace: Path) -> None:
    file, text, command = DEEP[name]
    onnx.save(builders.mlp(4), "m.onnx")
    Path(file).write_text(text)
    more = ["--data", "random", "--cost-table", file] if name == "costs" else []
    ran = run_cli(*command, *more, *(["--data", "random"] if name == "layers" else []))
    assert ran.code == 2, ran.err
    assert file in ran.error


@pytest.mark.parametrize("size", ["10000000000000", "99999999999999999999999"])
def test_a_dim_that_no_input_can_have_is_no_internal_error(size: str, workplace: Path) -> None:
    onnx.save(builders.mlp(4), "m.onnx")
    ran = run_cli(
        "optimize", "m.onnx", "-o", "o.onnx", "--dim", f"batch={size}", "--time", "0", "--passes", "remove-unused"
    )
    assert ran.code in (0, 2), ran.err
    assert "Traceback" not in ran.err


def test_a_long_list_is_not_written_out_by_shape_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnx propagates the numbers of an integer list, and takes its length from its type: 8 GB and 20 s for these."""
    infer, propagated = onnx.shape_inference.infer_shapes, []

    def recording(proto: onnx.ModelProto, *, data_prop: bool = False) -> onnx.ModelProto:
        propagated.append(data_prop)
        return infer(proto)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", recording)
    given, result = value("x", (2**30,), TensorProto.INT64), value("y", None)
    made = builders.model([node("Add", ["x", "x"], ["t"]), node("Cast", ["t"], ["y"], to=1)], [given], [result])
    shapes = {v.name: v.type.tensor_type.shape.dim[0].dim_value for v in inferred(made).graph.value_info}
    assert shapes["t"] == 2**30
    assert propagated == [False]
