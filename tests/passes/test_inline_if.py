"""inline-if: the branch moves up whole, names fit, and the other branch holds nothing back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import apply, build, initializers, node, ops, reasons, run

from graphopt.passes.inline_if import InlineIf

X = {"x": np.array([1, -2], np.float32)}


def same_bits(before: onnx.ModelProto, after: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> None:
    other = run(after, feeds)
    for name, array in run(before, feeds).items():
        assert array.tobytes() == other[name].tobytes(), name


def branch(
    nodes: Sequence[onnx.NodeProto], outputs: Sequence[str] = ("o",), weights: dict[str, Any] | None = None
) -> onnx.GraphProto:
    infos = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
    tensors = [numpy_helper.from_array(np.asarray(a), n) for n, a in (weights or {}).items()]
    return helper.make_graph(list(nodes), "branch", [], infos, tensors)


def decide(
    then: onnx.GraphProto, other: onnx.GraphProto, outputs: Sequence[str] = ("y",), condition: str = "c"
) -> onnx.NodeProto:
    return node("If", [condition], list(outputs), then_branch=then, else_branch=other)


SIMPLE = branch([node("Add", ["x", "k"], "o")], weights={"k": np.float32(2)})
OTHER = branch([node("Mul", ["x", "far"], "o")])


@pytest.mark.parametrize("go", [True, False])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_branch_that_is_taken(go: bool, shape: tuple[int, ...]) -> None:
    weights = {"c": np.full(shape, go), "far": np.float32(3)}
    proto = build([decide(SIMPLE, OTHER)], {"x": [2]}, ["y"], weights)
    after, entry = apply(proto, InlineIf())
    assert ops(after) == ["Add" if go else "Mul"]
    assert [c.detail for c in entry.changes] == ["then_branch" if go else "else_branch"]
    assert "c" not in initializers(after)
    assert after.graph.output == proto.graph.output
    same_bits(proto, after, X)
    again, entry = apply(after, InlineIf())
    assert again == after
    assert "no If" in reasons(entry)["(graph)"]


def test_names_that_are_taken_are_made_fresh() -> None:
    """Both Ifs have a k and an o of their own; inner nodes have the same names too."""
    nodes = [
        decide(SIMPLE, OTHER, ["a"]),
        decide(branch([node("Mul", ["a", "k"], "o")], weights={"k": np.float32(5)}), OTHER, ["b"]),
    ]
    nodes += [node("Add", ["a", "b"], "y")]
    proto = build(nodes, {"x": [2]}, ["y"], {"c": np.bool_(True), "far": np.float32(3)})
    after, _ = apply(proto, InlineIf())
    assert ops(after) == ["Add", "Mul", "Add"]
    assert len({n.name for n in after.graph.node}) == 3
    assert sorted(float(a) for n, a in initializers(after).items() if n.startswith("k")) == [2, 5]
    same_bits(proto, after, X)


def test_ifs_in_ifs() -> None:
    inner = decide(branch([node("Neg", ["x"], "o")]), OTHER, ["i"])
    proto = build(
        [decide(branch([inner, node("Abs", ["i"], "p")], ["p"]), branch([decide(SIMPLE, OTHER, ["q"])], ["q"]))],
        {"x": [2]},
        ["y"],
        {"c": np.bool_(True), "far": np.float32(3)},
    )
    after, entry = apply(proto, InlineIf())
    assert ops(after) == ["Neg", "Abs"]
    assert len(entry.changes) == 2
    same_bits(proto, after, X)


def test_an_if_in_a_body_that_stays() -> None:
    run_time = decide(branch([decide(SIMPLE, OTHER, ["i"])], ["i"]), OTHER, condition="g")
    proto = build([run_time], {"x": [2]}, ["y"], {"c": np.bool_(True), "far": np.float32(3)})
    proto.graph.input.append(helper.make_tensor_value_info("g", TensorProto.BOOL, []))
    after, entry = apply(proto, InlineIf())
    assert ops(after) == ["If"]
    assert "not constant" in " ".join(reasons(entry).values())
    taken = next(a.g for a in after.graph.node[0].attribute if a.name == "then_branch")
    assert [n.op_type for n in taken.node] == ["Add"]
    for go in (True, False):
        same_bits(proto, after, X | {"g": np.array(go)})


def test_a_weight_handed_out_and_two_outputs_of_one_value() -> None:
    then = branch(
        [node("Neg", ["x"], "n"), node("Identity", ["n"], "m")], ["n", "m", "w"], {"w": np.ones(2, np.float32)}
    )
    other = branch([node("Neg", ["x"], p) for p in "pqr"], ["p", "q", "r"])
    proto = build([decide(then, other, ["y", "z", "v"])], {"x": [2]}, ["y", "z", "v"], {"c": np.bool_(True)})
    after, _ = apply(proto, InlineIf())
    assert [o.name for o in after.graph.output] == ["y", "z", "v"]
    assert "If" not in ops(after)
    same_bits(proto, after, X)


def test_results_nobody_named() -> None:
    then = branch([node("Neg", ["x"], "n"), node("Abs", ["x"], "m")], ["n", "m"])
    nodes = [decide(then, then, ["a", ""]), node("Neg", ["a"], "y")]
    proto = build(nodes, {"x": [2]}, ["y"], {"c": np.bool_(True)})
    after, _ = apply(proto, InlineIf(), verify="off")
    assert "If" not in ops(after)
    assert run(after, X)["y"].tolist() == [1, -2]


def test_ir3_gets_constant_nodes() -> None:
    made = [node("Constant", [], "c", value=numpy_helper.from_array(np.array(True)))]
    then = branch(
        [node("Constant", [], "k", value=numpy_helper.from_array(np.float32(2))), node("Add", ["x", "k"], "o")]
    )
    proto = build([*made, decide(then, then)], {"x": [2]}, ["y"], opset=8, ir_version=3)
    after, _ = apply(proto, InlineIf())
    assert ops(after) == ["Constant", "Add"]
    same_bits(proto, after, X)


@pytest.mark.parametrize("change", ["input", "overridable"])
def test_conditions_that_are_not_constant(change: str) -> None:
    weights: dict[str, Any] = {"far": np.float32(3)} | ({"c": np.bool_(True)} if change == "overridable" else {})
    proto = build([decide(SIMPLE, OTHER)], {"x": [2]}, ["y"], weights)
    proto.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    after, entry = apply(proto, InlineIf())
    assert after == proto
    assert "not constant" in reasons(entry)["n_y"]


def test_many_take_a_moment() -> None:
    values = ["x", *(f"v{i}" for i in range(700)), "y"]
    body = [branch([node("Add", [v, "far"], "o")]) for v in values]
    nodes = [decide(body[i], body[i], [values[i + 1]]) for i in range(len(values) - 1)]
    proto = build(nodes, {"x": [2]}, ["y"], {"c": np.bool_(True), "far": np.float32(3)})
    after, entry = apply(proto, InlineIf(), verify="off")
    assert ops(after) == ["Add"] * 701
    assert entry.seconds < 8
