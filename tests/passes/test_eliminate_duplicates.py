"""eliminate-duplicates and deduplicate-weights: computed once, stored once, and never what is random or overridable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import MODELS, apply, build, initializers, node, ops, reasons, run, size

from graphopt.model import load, to_proto
from graphopt.passes.deduplicate_weights import DeduplicateWeights
from graphopt.passes.eliminate_duplicates import EliminateDuplicates
from graphopt.storage import save

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


def weighted(weights: dict[str, np.ndarray], **options: Any) -> onnx.ModelProto:
    """y = x + all weights."""
    names = ["x", *(f"v{i}" for i in range(len(weights) - 1)), "y"]
    nodes = [node("Add", [names[i], w], names[i + 1]) for i, w in enumerate(weights)]
    return build(nodes, {"x": [2, 2]}, ["y"], weights, **options)


def test_equal_weights_are_stored_once() -> None:
    large = np.arange(4, dtype=np.float32).reshape(2, 2)
    proto = weighted({"a": large, "b": large.copy(), "c": large.reshape(1, 2, 2)[0] + 1, "d": large.copy()})
    after, entry = apply(proto, DeduplicateWeights())
    assert set(initializers(after)) == {"a", "c"}
    assert {c.site for c in entry.changes} == {"b", "d"}
    assert size(after) < size(proto)
    same_bits(proto, after, X)
    again, entry = apply(after, DeduplicateWeights())
    assert again == after
    assert "no two weights" in reasons(entry)["(graph)"]


@pytest.mark.parametrize(
    "other",
    [np.array([-0.0, 1], np.float32), np.array([[0, 1]], np.float32), np.array([0, 2], np.float32)],
    ids=["sign of zero", "shape", "value"],
)
def test_weights_that_differ_stay(other: np.ndarray) -> None:
    proto = weighted({"a": np.array([0, 1], np.float32), "b": other})
    after, entry = apply(proto, DeduplicateWeights())
    assert after == proto
    assert not entry.changes


def test_equal_bytes_of_two_types_stay() -> None:
    weights = {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.int32)}
    nodes = [node("Cast", ["b"], "c", to=1), node("Add", ["a", "c"], "d"), node("Add", ["x", "d"], "y")]
    after, _ = apply(build(nodes, {"x": [2, 2]}, ["y"], weights), DeduplicateWeights())
    assert set(initializers(after)) == {"a", "b"}


def test_not_a_number_and_texts() -> None:
    weights = {"a": np.full(2, np.nan, np.float32), "b": np.full(2, np.nan, np.float32)}
    after, _ = apply(weighted(weights), DeduplicateWeights(), verify="off")
    assert set(initializers(after)) == {"a"}
    texts = {"a": np.array(["p", "q"], object), "b": np.array(["p", "q"], object), "c": np.array(["pq", ""], object)}
    nodes = [node("Concat", ["a", "b", "c"], "y", axis=0)]
    proto = build(nodes, {}, ["y"], texts, out_dtype=TensorProto.STRING)
    after, _ = apply(proto, DeduplicateWeights(), verify="off")
    assert set(initializers(after)) == {"a", "c"}
    assert list(run(after, {})["y"]) == ["p", "q", "p", "q", "pq", ""]


def test_overridable_weights_stay() -> None:
    same = np.ones((2, 2), np.float32)
    proto = weighted({"a": same, "b": same}, inputs_too=True)
    after, entry = apply(proto, DeduplicateWeights())
    assert after == proto
    assert "may replace them" in reasons(entry)["(graph)"]


def test_a_weight_that_is_an_output_stays() -> None:
    same = np.ones((2, 2), np.float32)
    proto = weighted({"a": same, "b": same})
    proto.graph.output.append(INFO("b", TensorProto.FLOAT, [2, 2]))
    after, entry = apply(proto, DeduplicateWeights())
    assert set(initializers(after)) == {"a", "b"}
    assert "output" in reasons(entry)["b"]


def test_bodies_read_the_outer_weight_but_not_each_others() -> None:
    same = np.ones((2, 2), np.float32)
    bodies = []
    for i in (0, 1):
        body = helper.make_graph(
            [node("Add", ["x", "own"], "p"), node("Mul", ["p", "private"], "o")],
            f"b{i}",
            [],
            [INFO("o", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(same, "own"), numpy_helper.from_array(same * 3, "private")],
        )
        bodies.append(body)
    nodes = [node("If", ["c"], "f", then_branch=bodies[0], else_branch=bodies[1]), node("Add", ["f", "outer"], "y")]
    proto = build(nodes, {"x": [2, 2]}, ["y"], {"outer": same})
    proto.graph.input.append(INFO("c", TensorProto.BOOL, []))
    after, entry = apply(proto, DeduplicateWeights())
    assert [c.site for c in entry.changes] == ["own", "own"]
    for go in (True, False):
        same_bits(proto, after, X | {"c": np.array(go)})


def test_weights_in_a_data_file(tmp_path: Path) -> None:
    large = np.arange(4096, dtype=np.float32)
    proto = build(
        [node("Add", ["a", "b"], "s"), node("Add", ["x", "s"], "y")], {"x": [1]}, ["y"], {"a": large, "b": large}
    )
    save(load(proto), tmp_path / "m.onnx", external=True)
    after, _ = apply(load(tmp_path / "m.onnx"), DeduplicateWeights())
    assert set(initializers(after)) == {"a"}


@pytest.mark.parametrize("name", ["encoder", "lstm", "shared"])
def test_fixtures_only_shrink(name: str) -> None:
    proto = to_proto(load(MODELS / f"{name}.onnx"))
    for pass_ in (EliminateDuplicates(), DeduplicateWeights()):
        after, _ = apply(proto, pass_)
        assert size(after) <= size(proto)
        assert list(after.graph.output) == list(proto.graph.output)
