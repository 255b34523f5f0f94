"""A slice of tools/conformance: the default pipeline and every exact pass over onnx.backend.test's models."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from graphopt.base import Change, Context, Contract, Pass, PassResult
from graphopt.errors import RuntimeFailure
from graphopt.graph import nodes
from tools.conformance import contestants
from tools.conformance.__main__ import HEAD, Tally, judge, main, run_case
from tools.conformance.cases import VARIANTS, make, sources
from tools.conformance.contestants import OnePass, Pipeline, Rival, contestant, exact_passes
from tools.conformance.judging import COLUMNS, Reference
from tools.conformance.rivals import PACKAGES
from tools.conformance.worker import TookTooLong, Worker


def reference(name: str = "test_add", variant: str = "plain") -> Reference:
    made = make(next(s for s in sources() if s.name == name), variant)
    assert made is not None
    return Reference(*made)


def test_a_slice_of_all_cases_in_all_variants() -> None:
    """`python -m tools.conformance` runs them all."""
    tally = Tally()
    passes = [contestant(name, None) for name in exact_passes()]
    slow = [p for p in passes if p.name == "simplify"]
    slices = {120: [Pipeline(), *slow], 60: [p for p in passes if p not in slow]}
    for every, who in slices.items():
        for source in sources()[every // 2 :: every]:
            run_case(source, who, tuple(VARIANTS), tally)
    assert not [line for line in tally.lines if not line.startswith("undone")]
    assert tally.counts["pipeline", "models"] > 80
    assert tally.counts["pipeline", "changed"] > 20
    assert sum(tally.counts[p.name, "changed"] for p in passes) > 40


@dataclass(frozen=True)
class Spoil(Pass):
    """Does ``what`` to the model, all of it wrong."""

    what: str = "operator"
    name: ClassVar[str] = "spoil"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        SPOIL[self.what](model, next(iter(nodes(model))))
        return PassResult([Change("spoil", "(graph)")])


def _crash(model: ir.Model, node: ir.Node) -> None:
    raise RuntimeError("on purpose")


def _hang(model: ir.Model, node: ir.Node) -> None:
    while True:
        node.name = "busy"


def _attribute(model: ir.Model, node: ir.Node) -> None:
    node.attributes["nonsense"] = ir.AttrInt64("nonsense", 1)


def _grow(model: ir.Model, node: ir.Node) -> None:
    weight = ir.tensor(np.zeros(4096, np.float32), name="dead")
    model.graph.register_initializer(ir.Value(name="dead", const_value=weight))


def _freeze(model: ir.Model, node: ir.Node) -> None:
    value = next(v for v in model.graph.inputs if v.name in model.graph.initializers)
    model.graph.inputs.remove(value)


def _share(model: ir.Model, node: ir.Node) -> None:
    """A clone's weights are the caller's."""
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.TensorProtoTensor)
    tensor.raw.doc_string = "spoiled"


SPOIL: dict[str, Callable[[ir.Model, ir.Node], None]] = {
    "crashed": _crash,
    "hang": _hang,
    "invalid": _attribute,
    "unloadable": lambda model, node: setattr(node, "domain", "com.nobody"),
    "wrong": lambda model, node: setattr(node, "op_type", "Sub"),
    "interface": lambda model, node: setattr(model.graph.outputs[0], "name", "other"),
    "dims": lambda model, node: setattr(model.graph.outputs[0], "shape", ir.Shape(["m", 3])),
    "metadata": lambda model, node: setattr(node, "doc_string", None),
    "versions": lambda model, node: setattr(model, "ir_version", model.ir_version + 1),
    "overridable": _freeze,
    "grown": _grow,
    "mutated": _share,
}


def overridable() -> Reference:
    """y = x + w, where a caller may feed another w."""
    x, w, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["n", 3]), ("w", [3]), ("y", ["n", 3]))
    )
    node = helper.make_node("Add", ["x", "w"], ["y"], name="add", doc_string="sum")
    weight = numpy_helper.from_array(np.ones(3, np.float32), "w")
    graph = helper.make_graph([node], "g", [x, w], [y], [weight])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return Reference(proto, {"x": numpy_helper.from_array(np.ones((2, 3), np.float32))})


@pytest.mark.parametrize("column", COLUMNS)
def test_what_is_wrong_is_seen(column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestants, "LIMIT", 0.5)
    before = overridable()
    assert before.ran is not None
    found = judge(before, OnePass(Spoil(column)))[1]
    assert column in [name for name, _ in found], found


def test_what_is_the_same_is_not_wrong() -> None:
    before = overridable()
    assert before.findings(before.proto) == []
    assert not before.changed(before.proto)


def test_a_filled_in_shape_has_to_be_true() -> None:
    before = reference()
    open_, filled, lie = (onnx.ModelProto.FromString(before.data) for _ in range(3))
    open_.graph.output[0].type.tensor_type.ClearField("shape")
    del lie.graph.output[0].type.tensor_type.shape.dim[1:]
    undeclared = Reference(open_, before._feeds)
    assert undeclared.findings(filled) == []
    assert [column for column, _ in undeclared.findings(lie)] == ["interface"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variants_are_models_that_run(variant: str) -> None:
    made = reference(variant=variant)
    assert made.valid
    assert made.ran is not None
    assert made.proto.metadata_props
    assert all(node.doc_string and node.metadata_props for node in made.proto.graph.node)


def test_a_child_is_replaced_when_it_dies_or_hangs() -> None:
    worker = Worker(sys.executable)
    try:
        assert worker.call("version", "onnxsim")
        with pytest.raises(RuntimeFailure, match=r"died \(exit 3\)"):
            worker.call("os:_exit", 3)
        with pytest.raises(TookTooLong):
            worker.call("builtins:sum", range(10**12), limit=1.0)
        with pytest.raises(TookTooLong):
            worker.call("time:sleep", 60, limit=0.1)
        with pytest.raises(RuntimeFailure, match="ZeroDivisionError"):
            worker.call("operator:truediv", 1, 0)
        assert worker.call("operator:add", 1, 2) == 3
    finally:
        worker.close()


def test_a_rival_is_judged_and_a_missing_one_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    worker = Worker(sys.executable)
    try:
        _, found, undone = judge(reference(), Rival("onnxsim", worker))
        assert {column for column, _ in found} <= {"metadata"}
        assert undone == ""
    finally:
        worker.close()
    missing = [name for name in PACKAGES if name in ("onnxslim", "polygraphy") and not importlib.util.find_spec(name)]
    arguments = ["eliminate-identities", *missing, "--variant", "plain", "--every", "3", "--kind", "simple"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"{name}: not installed" in out for name in missing)


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["eliminate-identities", "--variant", "plain", "--every", "5", "--kind", "simple"]
    assert main([*arguments, "--failures", str(tmp_path / "failures")]) == 0
    _, _, head, _, row, *_ = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in head.split("|")[2:-1]] == list(HEAD)
    assert row.split("|")[1].strip() == "eliminate-identities"
    assert (tmp_path / "failures").read_text() == ""
