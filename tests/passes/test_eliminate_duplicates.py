"""eliminate-duplicates: computed once, and never what is random."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import MODELS, apply, build, node, ops, reasons, run, size

from graphopt.model import load, to_proto
from graphopt.passes.eliminate_duplicates import EliminateDuplicates

INFO = helper.make_tensor_value_info
X = {"x": np.array([[1, -2], [3, 4]], np.float32)}


def same_bits(before: onnx.ModelProto, after: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> None:
    other = run(after, feeds)
    for name, array in run(before, feeds).items():
        assert array.tobytes() == other[name].tobytes(), name


def twice(first: onnx.NodeProto, second: onnx.NodeProto, weights: dict[str, Any] | None = None) -> onnx.ModelProto:
    """Two nodes that make a and b, of which both are read."""
    return build([first, second, node("Sub", ["a", "b"], "y")], {"x": [2, 2]}, ["y"], weights)


SAME = {
    "plain": (node("Relu", ["x"], "a"), node("Relu", ["x"], "b"), {}),
    "attributes in another order": (
        node("Gemm", ["x", "x"], "a", alpha=0.5, transB=1),
        node("Gemm", ["x", "x"], "b", transB=1, alpha=0.5),
        {},
    ),
    "equal constants": (
        node("Add", ["x", "c"], "a"),
        node("Add", ["x", "d"], "b"),
        {"c": np.float32(0.5), "d": np.float32(0.5)},
    ),
    "absent and empty input": (node("Clip", ["x"], "a"), node("Clip", ["x", ""], "b"), {}),
}


@pytest.mark.parametrize("name", SAME)
def test_equal_nodes_become_one(name: str) -> None:
    first, second, weights = SAME[name]
    proto = twice(first, second, weights)
    after, entry = apply(proto, EliminateDuplicates())
    assert ops(after) == [first.op_type, "Sub"]
    assert [c.site for c in entry.changes] == ["n_b"]
    same_bits(proto, after, X)
    again, entry = apply(after, EliminateDuplicates())
    assert again == after
    assert "no two nodes" in reasons(entry)["(graph)"]


DIFFERENT = {
    "operator": (node("Relu", ["x"], "a"), node("Abs", ["x"], "b"), {}),
    "attribute": (node("LeakyRelu", ["x"], "a", alpha=0.1), node("LeakyRelu", ["x"], "b", alpha=0.2), {}),
    "attribute's sign": (node("LeakyRelu", ["x"], "a", alpha=0.0), node("LeakyRelu", ["x"], "b", alpha=-0.0), {}),
    "order of inputs": (node("Sub", ["x", "c"], "a"), node("Sub", ["c", "x"], "b"), {"c": np.float32(1)}),
    "constant": (
        node("Add", ["x", "c"], "a"),
        node("Add", ["x", "d"], "b"),
        {"c": np.float32(0), "d": np.float32(-0.0)},
    ),
    "constant's shape": (
        node("Add", ["x", "c"], "a"),
        node("Add", ["x", "d"], "b"),
        {"c": np.ones(1, np.float32), "d": np.ones((1, 1), np.float32)},
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_nodes_stay_two(name: str) -> None:
    proto = twice(*DIFFERENT[name])
    after, entry = apply(proto, EliminateDuplicates())
    assert after == proto
    assert not entry.changes


def test_a_chain_of_equals_goes_in_one_run() -> None:
    nodes = [node("Relu", ["x"], "a0"), node("Relu", ["x"], "b0")]
    for i in range(5):
        nodes += [node("Sigmoid", [f"a{i}"], f"a{i + 1}"), node("Sigmoid", [f"b{i}"], f"b{i + 1}")]
    proto = build([*nodes, node("Add", ["a5", "b5"], "y")], {"x": [2, 2]}, ["y"])
    after, entry = apply(proto, EliminateDuplicates())
    assert len(after.graph.node) == 7
    assert len(entry.changes) == 6
    same_bits(proto, after, X)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("RandomNormalLike", ["x"], {}),
        ("RandomUniform", [], {"shape": [2, 2]}),
        ("Bernoulli", ["p"], {}),
        ("Dropout", ["x", "r", "t"], {}),
    ],
)
def test_random_values_are_never_merged(op: str, inputs: list[str], attributes: dict[str, Any]) -> None:
    weights = {"p": np.full((2, 2), 0.5, np.float32), "r": np.float32(0.5), "t": np.bool_(True)}
    proto = twice(node(op, inputs, "a", **attributes), node(op, inputs, "b", **attributes), weights)
    after, entry = apply(proto, EliminateDuplicates(), verify="off")
    assert ops(after) == ops(proto)
    assert "random" in reasons(entry)["n_b"]


def test_operators_of_others_stay() -> None:
    first, second = node("Magic", ["x"], "a", domain="mine"), node("Magic", ["x"], "b", domain="mine")
    proto = build([first, second, node("Sub", ["a", "b"], "y")], {"x": [2]}, ["y"], domains=["mine"])
    _, entry = apply(proto, EliminateDuplicates(), verify="off")
    assert "may keep a state" in reasons(entry)["n_b"]


def test_outputs_keep_their_names() -> None:
    nodes = [node("Relu", ["x"], "a"), node("Relu", ["x"], "y"), node("Neg", ["a"], "z"), node("Relu", ["x"], "w")]
    proto = build(nodes, {"x": [2, 2]}, ["y", "z", "w"])
    after, entry = apply(proto, EliminateDuplicates())
    assert ops(after) == ["Relu", "Neg", "Relu"]
    assert "two names" in reasons(entry)["n_w"]
    same_bits(proto, after, X)


def test_one_result_named_and_one_not() -> None:
    nodes = [node("MaxPool", ["x"], "a", kernel_shape=[2]), node("MaxPool", ["x"], ["b", "i"], kernel_shape=[2])]
    nodes += [node("Sub", ["a", "b"], "y"), node("Cast", ["i"], "z", to=1)]
    proto = build(nodes, {"x": [1, 1, 4]}, ["y", "z"])
    after, _ = apply(proto, EliminateDuplicates())
    assert after == proto
    same_bits(proto, after, {"x": np.arange(4, dtype=np.float32).reshape(1, 1, 4)})


def test_bodies_are_looked_at_one_by_one() -> None:
    bodies = []
    for i in (0, 1):
        inner = [node("Abs", ["x"], "p"), node("Abs", ["x"], "q"), node(("Add", "Sub")[i], ["p", "q"], "o")]
        bodies.append(helper.make_graph(inner, f"b{i}", [], [INFO("o", TensorProto.FLOAT, None)]))
    nodes = [node("If", ["c"], "y", then_branch=bodies[0], else_branch=bodies[1])]
    proto = build(nodes, {"x": [2, 2]}, ["y"])
    proto.graph.input.append(INFO("c", TensorProto.BOOL, []))
    after, entry = apply(proto, EliminateDuplicates())
    assert len(entry.changes) == 2
    for go in (True, False):
        same_bits(proto, after, X | {"c": np.array(go)})


def test_doc_strings_of_survivors_stay() -> None:
    first = node("Relu", ["x"], "a")
    first.doc_string = "kept"
    after, _ = apply(twice(first, node("Relu", ["x"], "b")), EliminateDuplicates())
    assert after.graph.node[0].doc_string == "kept"


def test_five_thousand_take_a_moment() -> None:
    nodes = [node("Relu", ["x"], f"r{i}") for i in range(5000)]
    proto = build([*nodes, node("Sum", [f"r{i}" for i in range(5000)], "y")], {"x": [2]}, ["y"])
    after, entry = apply(proto, EliminateDuplicates(), verify="off")
    assert len(after.graph.node) == 2
    assert entry.seconds < 8


def test_a_constant_whose_only_reader_goes_may_have_equals() -> None:
    """The second node goes, and with it the last reader of k1; k2 equals k1 and is read on (found by fuzzing)."""
    made = [node("Constant", [], f"k{i}", value=numpy_helper.from_array(np.float32([2, 3, 3][i]))) for i in range(3)]
    nodes = [
        *made[:2],
        node("Add", ["x", "w"], "a"),
        node("Pow", ["x", "k1"], "p"),
        node("Pow", ["x", "k1"], "q"),
        made[2],
        node("Mul", ["p", "k2"], "r"),
        node("Sum", ["a", "q", "r", "k0"], "y"),
    ]
    proto = build(nodes, {"x": [2, 2]}, ["y"], {"w": np.float32(1)})
    after, _ = apply(proto, EliminateDuplicates())
    assert ops(after).count("Pow") == 1
    assert ops(after).count("Constant") == 2
    same_bits(proto, after, X)


def test_a_constant_read_by_the_second_of_two_equals_only() -> None:
    made = [node("Constant", [], f"k{i}", value=numpy_helper.from_array(np.float32(3))) for i in range(2)]
    nodes = [
        node("Pow", ["x", "w"], "p"),
        made[0],
        node("Pow", ["x", "k0"], "q"),
        made[1],
        node("Mul", ["p", "k1"], "r"),
    ]
    proto = build([*nodes, node("Add", ["q", "r"], "y")], {"x": [2, 2]}, ["y"], {"w": np.float32(3)})
    after, _ = apply(proto, EliminateDuplicates())
    assert ops(after) == ["Pow", "Constant", "Mul", "Add"]
    same_bits(proto, after, X)


@pytest.mark.parametrize("name", ["encoder", "lstm", "shared"])
def test_fixtures_only_shrink(name: str) -> None:
    proto = to_proto(load(MODELS / f"{name}.onnx"))
    after, _ = apply(proto, EliminateDuplicates())
    assert size(after) <= size(proto)
    assert list(after.graph.output) == list(proto.graph.output)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("listed", [("a", "b", "y"), ("y", "b", "a")])
def test_equal_outputs_share_their_readers_whatever_the_order(order: tuple[str, ...], listed: tuple[str, ...]) -> None:
    """Two outputs that are the same stay two; what is computed from both is found equal (tools/fuzz.py, graph 515)."""
    nodes = [node("Exp", ["x"], name) for name in order]
    nodes += [node("Relu", ["a"], "c"), node("Relu", ["b"], "d"), node("Mul", ["c", "d"], "y")]
    proto = build(nodes, {"x": [2, 2]}, listed)
    made, entry = apply(proto, EliminateDuplicates())
    same_bits(proto, made, X)
    assert sorted(ops(made)) == ["Exp", "Exp", "Mul", "Relu"]
    assert [o.name for o in made.graph.output] == list(listed)
    relu = next(n for n in made.graph.node if n.op_type == "Relu")
    assert list(relu.input) == [next(n for n in listed if n != "y")]  # the output that is listed first
    assert "share" in {c.action for c in entry.changes}
    assert apply(made, EliminateDuplicates())[1].status == "unchanged"


@pytest.mark.parametrize("swapped", [False, True])
def test_equal_nodes_of_several_outputs_do_not_depend_on_the_order(swapped: bool) -> None:
    """One of the two makes all that one can make (tools/fuzz.py, graph 35)."""
    nodes = [node("TopK", ["x", "k"], ["p", "q"]), node("TopK", ["x", "k"], ["r", "s"])]
    proto = build(nodes[::-1] if swapped else nodes, {"x": [2, 2]}, ["r", "q", "s"], {"k": np.asarray([1], np.int64)})
    for output, kind in zip(proto.graph.output, (1, 7, 7), strict=True):
        output.type.tensor_type.elem_type = kind
    made, _ = apply(proto, EliminateDuplicates())
    same_bits(proto, made, X)
    assert [list(n.output)[1] for n in made.graph.node] == ["q", "s"]
    assert made.graph.node[0].output[0] == "r"
    assert [o.name for o in made.graph.output] == ["r", "q", "s"]
    assert apply(made, EliminateDuplicates())[1].status == "unchanged"
