"""deduplicate-weights: stored once, and never what a caller may override."""

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
from graphopt.storage import save

INFO = helper.make_tensor_value_info
X = {"x": np.array([[1, -2], [3, 4]], np.float32)}


def same_bits(before: onnx.ModelProto, after: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> None:
    other = run(after, feeds)
    for name, array in run(before, feeds).items():
        assert array.tobytes() == other[name].tobytes(), name


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
    after, _ = apply(proto, DeduplicateWeights())
    assert size(after) <= size(proto)
    assert list(after.graph.output) == list(proto.graph.output)


def test_a_constant_node_that_holds_what_an_initializer_holds_goes() -> None:
    """Else the order of nodes decides which of the two is kept, or both are (found by tools/fuzz.py, graph 5000)."""
    array = np.asarray([1, 2], np.float32)
    held = {"k": array, "z": -array}
    constants = [node("Constant", [], n, value=numpy_helper.from_array(a)) for n, a in held.items()]
    proto = build(
        [*constants, node("Add", ["x", "w"], "a"), node("Mul", ["a", "k"], "b"), node("Sub", ["b", "z"], "y")],
        {"x": [3, 2]},
        ["y"],
        {"w": array},
    )
    made, entry = apply(proto, DeduplicateWeights())
    assert ops(made) == ["Constant", "Add", "Mul", "Sub"]
    assert list(made.graph.node[2].input) == ["a", "w"]
    assert [(c.site, c.detail) for c in entry.changes] == [("n_k", "Constant equal to 'w'")]
    feeds = {"x": np.ones((3, 2), np.float32)}
    assert run(made, feeds)["y"].tobytes() == run(proto, feeds)["y"].tobytes()


def test_an_initializer_that_holds_what_an_output_is_goes() -> None:
    """Else which of two equal readers comes first decides whether both are kept (tools/fuzz.py, graph 8017)."""
    array = np.asarray([1, 2], np.float32)
    made = node("Constant", [], "out", value=numpy_helper.from_array(array))
    proto = build([node("Add", ["x", "w"], "y"), made], {"x": [3, 2]}, ["y", "out"], {"w": array})
    after, entry = apply(proto, DeduplicateWeights())
    assert ops(after) == ["Constant", "Add"]
    assert initializers(after) == {}
    assert list(after.graph.node[1].input) == ["x", "out"]
    assert [(c.site, c.detail) for c in entry.changes] == [("w", "equal to the output 'out'")]
    same_bits(proto, after, {"x": np.ones((3, 2), np.float32)})
