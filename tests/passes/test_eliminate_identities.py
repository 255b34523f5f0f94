"""eliminate-identities: nothing that does something, bit for bit, goes; names of outputs stay."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import apply, build, node, ops, reasons, run

from graphopt.passes.eliminate_identities import EliminateIdentities

INFO = helper.make_tensor_value_info
SPECIAL = np.array([[0.0, -0.0, np.nan], [np.inf, -np.inf, 1e-42]], np.float32)


def between(*middle: onnx.NodeProto, weights: dict[str, Any] | None = None, **options: Any) -> onnx.ModelProto:
    """x -> Abs -> a -> ``middle`` (reads a, makes b) -> Neg -> y."""
    shape = options.pop("shape", [2, 3])
    nodes = [node("Neg", ["x"], "a"), *middle, node("Abs", ["b"], "y")]
    return build(nodes, {"x": shape}, ["y"], weights, **options)


def same_bits(before: onnx.ModelProto, after: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> None:
    other = run(after, feeds)
    for name, array in run(before, feeds).items():
        assert array.tobytes() == other[name].tobytes(), name


I64 = np.int64
GONE: dict[str, tuple[onnx.NodeProto, dict[str, Any], dict[str, Any]]] = {
    "Identity": (node("Identity", ["a"], "b"), {}, {}),
    "Dropout 7": (node("Dropout", ["a"], "b", ratio=0.5), {}, {"opset": 7}),
    "Dropout 6": (node("Dropout", ["a"], "b", is_test=1), {}, {"opset": 6, "ir_version": 3}),
    "Dropout 13": (node("Dropout", ["a", "r", "t"], "b"), {"r": np.float32(0.5), "t": np.bool_(False)}, {}),
    "Cast": (node("Cast", ["a"], "b", to=TensorProto.FLOAT), {}, {}),
    "CastLike": (node("CastLike", ["a", "x"], "b"), {}, {}),
    "Transpose": (node("Transpose", ["a"], "b", perm=[0, 1]), {}, {}),
    "Reshape": (node("Reshape", ["a", "s"], "b"), {"s": np.array([2, 3], I64)}, {}),
    "Reshape -1": (node("Reshape", ["a", "s"], "b"), {"s": np.array([0, -1], I64)}, {"shape": ["N", "M"]}),
    "Reshape 0": (node("Reshape", ["a", "s"], "b"), {"s": np.array([-1, 3], I64)}, {"shape": ["N", 3]}),
    "Flatten": (node("Flatten", ["a"], "b"), {}, {"shape": ["N", 3]}),
    "Expand": (node("Expand", ["a", "s"], "b"), {"s": np.array([1, 3], I64)}, {"shape": ["N", 3]}),
    "Squeeze": (node("Squeeze", ["a"], "b"), {}, {}),
    "Slice 9": (node("Slice", ["a"], "b", starts=[0], ends=[2**31 - 1], axes=[1]), {}, {"opset": 9}),
    "Slice": (
        node("Slice", ["a", "f", "t", "ax"], "b"),
        {"f": np.array([0], I64), "t": np.array([3], I64), "ax": np.array([-1], I64)},
        {},
    ),
    "Pad": (node("Pad", ["a", "p"], "b"), {"p": np.zeros(4, I64)}, {}),
    "Pad 2": (node("Pad", ["a"], "b", pads=[0, 0, 0, 0], mode="reflect"), {}, {"opset": 10}),
    "Tile": (node("Tile", ["a", "p"], "b"), {"p": np.ones(2, I64)}, {}),
    "Concat": (node("Concat", ["a"], "b", axis=0), {}, {}),
    "Sum": (node("Sum", ["a"], "b"), {}, {}),
    "Max": (node("Max", ["a"], "b"), {}, {}),
    "Sub 0": (node("Sub", ["a", "c"], "b"), {"c": np.float32(0)}, {}),
    "Add -0": (node("Add", ["a", "c"], "b"), {"c": np.float32(-0.0)}, {}),
    "Mul 1": (node("Mul", ["c", "a"], "b"), {"c": np.ones(1, np.float32)}, {}),
    "Mul ones": (node("Mul", ["a", "c"], "b"), {"c": np.ones((1, 3), np.float32)}, {"shape": ["N", 3]}),
    "Div 1": (node("Div", ["a", "c"], "b"), {"c": np.float32(1)}, {}),
    "Mul 6": (node("Mul", ["a", "c"], "b", broadcast=1), {"c": np.ones(1, np.float32)}, {"opset": 6}),
}


@pytest.mark.parametrize("name", GONE)
def test_what_does_nothing_goes(name: str) -> None:
    middle, weights, options = GONE[name]
    if options.get("ir_version") == 3 or options.get("opset") == 6:
        made = [node("Constant", [], k, value=numpy_helper.from_array(np.asarray(a))) for k, a in weights.items()]
        proto = between(*made, middle, **(options | {"ir_version": 3}))
    else:
        proto = between(middle, weights=weights, **options)
    after, entry = apply(proto, EliminateIdentities())
    assert ops(after) == ["Neg", "Abs"], entry.skipped
    assert not after.graph.initializer
    if options.get("opset", 7) >= 7:  # the runtime has no older Mul and Dropout
        same_bits(proto, after, {"x": SPECIAL})
    again, entry = apply(after, EliminateIdentities())
    assert again == after
    assert "no node does nothing" in reasons(entry)["(graph)"]


KEPT: dict[str, tuple[onnx.NodeProto, dict[str, Any], dict[str, Any], str | None]] = {
    "Pow 1": (node("Pow", ["a", "c"], "b"), {"c": np.float32(1)}, {}, "the sign of NaN"),
    "Add 0": (node("Add", ["a", "c"], "b"), {"c": np.float32(0)}, {}, "-0.0"),
    "Sub -0": (node("Sub", ["a", "c"], "b"), {"c": np.float32(-0.0)}, {}, "-0.0"),
    "0 - x": (node("Sub", ["c", "a"], "b"), {"c": np.float32(0)}, {}, None),
    "1 / x": (node("Div", ["c", "a"], "b"), {"c": np.float32(1)}, {}, None),
    "wider": (node("Mul", ["a", "c"], "b"), {"c": np.ones((4, 1, 1), np.float32)}, {}, "broadcasting"),
    "grows": (node("Mul", ["a", "c"], "b"), {"c": np.ones(3, np.float32)}, {"shape": [2, 1]}, "broadcasting"),
    "batch 1 only": (node("Mul", ["a", "c"], "b"), {"c": np.ones((2, 1), np.float32)}, {"shape": ["N", 3]}, "broadc"),
    "almost ones": (node("Mul", ["a", "c"], "b"), {"c": np.array([1, 1, 2], np.float32)}, {}, None),
    "perm": (node("Transpose", ["a"], "b", perm=[1, 0]), {}, {}, None),
    "no perm": (node("Transpose", ["a"], "b"), {}, {}, None),
    "backwards": (
        node("Slice", ["a", "f", "t", "ax", "st"], "b"),
        {"f": np.array([-1], I64), "t": np.array([-9], I64), "ax": np.array([1], I64), "st": np.array([-1], I64)},
        {},
        None,
    ),
    "unknown end": (
        node("Slice", ["a", "f", "t"], "b"),
        {"f": np.array([0], I64), "t": np.array([5], I64)},
        {"shape": ["N", 3]},
        "not known",
    ),
    "crop": (node("Pad", ["a", "p"], "b"), {"p": np.array([0, 0, 0, -1], I64)}, {}, None),
    "training": (node("Dropout", ["a", "r", "t"], "b"), {"r": np.float32(0), "t": np.bool_(True)}, {}, "training"),
    "Dropout 6": (node("Dropout", ["a"], "b", ratio=0.0), {}, {"opset": 6}, "training"),
    "other shape": (node("Reshape", ["a", "s"], "b"), {"s": np.array([3, 2], I64)}, {}, None),
    "two unknown": (
        node("Reshape", ["a", "s"], "b"),
        {"s": np.array([2, -1], I64)},
        {"shape": ["N", "M"]},
        "not known",
    ),
    "same symbol": (node("Expand", ["a", "s"], "b"), {"s": np.array([2, 3], I64)}, {"shape": ["N", "N"]}, "not known"),
    "squeezed": (node("Squeeze", ["a"], "b"), {}, {"shape": [2, 1]}, None),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_does_something_stays(name: str) -> None:
    middle, weights, options, expected = KEPT[name]
    proto = between(middle, weights=weights, **options)
    after, entry = apply(proto, EliminateIdentities(), verify="off")
    assert ops(after) == ops(proto)
    assert not entry.changes
    assert (expected or "no node does nothing") in " ".join(reasons(entry).values())


def test_powers_of_integers_stay() -> None:
    proto = between(node("Pow", ["a", "c"], "b"), weights={"c": np.int64(1)}, dtype=TensorProto.INT64)
    _, entry = apply(proto, EliminateIdentities())
    assert "floating point" in reasons(entry)["n_b"]


@pytest.mark.parametrize(("op", "dtype"), [("Neg", TensorProto.FLOAT), ("Not", TensorProto.BOOL)])
def test_two_that_cancel(op: str, dtype: int) -> None:
    nodes = [
        node(op, ["x"], "a"),
        node(op, ["a"], "b"),
        node(op, ["b"], "c"),
        node(op, ["c"], "d"),
        node(op, ["d"], "y"),
    ]
    proto = build(nodes, {"x": [2, 3]}, ["y"], dtype=dtype)
    after, entry = apply(proto, EliminateIdentities())
    assert ops(after) == [op]
    assert len(entry.changes) == 2
    same_bits(proto, after, {"x": SPECIAL if dtype == TensorProto.FLOAT else SPECIAL > 0})


def test_declared_shapes_are_not_believed() -> None:
    """value_info and outputs say [2, 3] of what is [3, 2]."""
    nodes = [node("Transpose", ["x"], "a", perm=[1, 0]), node("Reshape", ["a", "s"], "b"), node("Abs", ["b"], "y")]
    proto = build(nodes, {"x": ["N", "M"]}, ["y"], {"s": np.array([2, 3], I64)})
    proto.graph.value_info.append(INFO("a", TensorProto.FLOAT, [2, 3]))
    after, entry = apply(proto, EliminateIdentities())
    assert ops(after) == ["Transpose", "Reshape", "Abs"]
    assert "not known" in reasons(entry)["n_b"]
    same_bits(proto, after, {"x": SPECIAL})


def test_two_inputs_with_one_symbol_may_differ() -> None:
    nodes = [node("Shape", ["z"], "s"), node("Expand", ["x", "s"], "e"), node("Abs", ["e"], "y")]
    proto = build(nodes, {"x": ["N", 3], "z": ["N", 3]}, ["y"])
    after, _ = apply(proto, EliminateIdentities())
    assert "Expand" in ops(after)
    one = build(
        [node("Shape", ["x"], "s"), node("Expand", ["x", "s"], "e"), node("Abs", ["e"], "y")], {"x": ["N", 3]}, ["y"]
    )
    assert "Expand" not in ops(apply(one, EliminateIdentities())[0])


def test_names_of_outputs_survive() -> None:
    nodes = [
        node("Abs", ["x"], "a"),
        node("Identity", ["a"], "y"),
        node("Neg", ["a"], "z"),
        node("Identity", ["y"], "w"),
    ]
    proto = build(nodes, {"x": [2]}, ["y", "z", "w"])
    after, entry = apply(proto, EliminateIdentities())
    assert ops(after) == ["Abs", "Neg", "Identity"]
    assert [o.name for o in after.graph.output] == ["y", "z", "w"]
    assert "two names" in reasons(entry)["n_w"]
    same_bits(proto, after, {"x": np.array([1, -2], np.float32)})


def test_an_input_handed_out_keeps_its_identity() -> None:
    proto = build(
        [node("Identity", ["x"], "y"), node("Identity", ["w"], "z")],
        {"x": [2]},
        ["y", "z"],
        {"w": np.ones(2, np.float32)},
    )
    after, entry = apply(proto, EliminateIdentities())
    assert ops(after) == ["Identity", "Identity"]
    assert len(entry.skipped) == 2


def test_a_mask_that_is_read_keeps_the_dropout() -> None:
    nodes = [
        node("Neg", ["x"], "a"),
        node("Dropout", ["a"], ["b", "m"]),
        node("Abs", ["b"], "y"),
        node("Cast", ["m"], "z", to=1),
    ]
    proto = build(nodes, {"x": [2]}, ["y", "z"])
    after, entry = apply(proto, EliminateIdentities())
    assert ops(after) == ops(proto)
    assert "second result" in reasons(entry)["n_b"]


def test_bodies_hand_out_only_what_they_make() -> None:
    """An Identity of an outer value, of a body input and of an initializer stays; one of an inner value goes."""
    branches = []
    for i, source in enumerate(("x", "t")):
        inner = [node("Identity", [source], "o")] if i == 0 else [node("Abs", ["x"], "t"), node("Identity", ["t"], "o")]
        branches.append(helper.make_graph(inner, f"b{i}", [], [INFO("o", TensorProto.FLOAT, None)]))
    body = helper.make_graph(
        [
            node("Identity", ["go"], "on"),
            node("Identity", ["s"], "s2"),
            node("Identity", ["s"], "in"),
            node("Abs", ["in"], "scan"),
        ],
        "loop",
        [INFO("i", TensorProto.INT64, []), INFO("go", TensorProto.BOOL, []), INFO("s", TensorProto.FLOAT, None)],
        [INFO("on", TensorProto.BOOL, []), INFO("s2", TensorProto.FLOAT, None), INFO("scan", TensorProto.FLOAT, None)],
    )
    nodes = [
        node("ReduceMax", ["x"], "m", keepdims=0),
        node("Greater", ["m", "half"], "c"),
        node("If", ["c"], "f", then_branch=branches[0], else_branch=branches[1]),
        node("Loop", ["n", "", "f"], ["y", "z"], body=body),
    ]
    proto = build(nodes, {"x": [2]}, ["y", "z"], {"half": np.float32(0.5), "n": np.int64(3)})
    after, entry = apply(proto, EliminateIdentities())
    assert {c.site for c in entry.changes} == {"n_o", "n_in"}
    graphs = {a.name: a.g for n in after.graph.node for a in n.attribute if a.HasField("g")}
    assert [n.op_type for n in graphs["then_branch"].node] == ["Identity"]
    assert [n.op_type for n in graphs["else_branch"].node] == ["Abs"]
    assert [n.op_type for n in graphs["body"].node] == ["Identity", "Identity", "Abs"]
    for x in ([1, 2], [-1, -2]):
        same_bits(proto, after, {"x": np.array(x, np.float32)})


def test_a_name_that_a_body_uses_too_does_not_move() -> None:
    inner = [
        helper.make_graph([node("Abs", ["a"], "y")], f"b{i}", [], [INFO("y", TensorProto.FLOAT, None)]) for i in (0, 1)
    ]
    nodes = [
        node("Neg", ["x"], "a"),
        node("If", ["c"], "f", then_branch=inner[0], else_branch=inner[1]),
        node("Identity", ["a"], "y"),
        node("Neg", ["f"], "z"),
    ]
    proto = build(nodes, {"x": [2]}, ["y", "z"])
    proto.graph.input.append(INFO("c", TensorProto.BOOL, []))
    after, entry = apply(proto, EliminateIdentities(), verify="off")
    assert ops(after) == ops(proto)
    assert "same name" in reasons(entry)["n_y"]


def test_switched_off_by_site() -> None:
    proto = between(node("Identity", ["a"], "i"), node("Identity", ["i"], "b"))
    after, entry = apply(proto, EliminateIdentities(), disabled={("eliminate-identities", "n_i")})
    assert ops(after) == ["Neg", "Identity", "Abs"]
    assert "switched off" in reasons(entry)["n_i"]


def test_five_thousand_take_a_moment() -> None:
    names = ["x", *(f"v{i}" for i in range(5000))]
    nodes = [node("Identity" if i % 2 else "Abs", [a], b) for i, (a, b) in enumerate(pairwise(names))]
    proto = build(nodes, {"x": [2]}, [names[-1]])
    after, entry = apply(proto, EliminateIdentities(), verify="off")
    assert len(after.graph.node) == 2500
    assert entry.seconds < 8


@pytest.mark.parametrize("order", [("Reshape", "Identity"), ("Identity", "Reshape")])
def test_of_two_outputs_the_one_listed_first_takes_the_value(order: tuple[str, str]) -> None:
    """Not the one whose node stands first (found by tools/fuzz.py, graph 6060)."""
    made = {"Reshape": node("Reshape", ["a", "s"], "b"), "Identity": node("Identity", ["a"], "c")}
    nodes = [node("Neg", ["x"], "a"), *(made[op] for op in order)]
    after, _ = apply(build(nodes, {"x": [4]}, ["c", "b"], {"s": np.array([4], np.int64)}), EliminateIdentities())
    assert [(n.op_type, list(n.output)) for n in after.graph.node] == [("Neg", ["c"]), ("Reshape", ["b"])]
    assert [o.name for o in after.graph.output] == ["c", "b"]


READERS: dict[str, tuple[list[onnx.NodeProto], bool]] = {
    "an output": ([node("Transpose", ["b"], "y")], False),
    "a quotient": ([node("Reciprocal", ["b"], "y")], False),
    "a product that is an output": ([node("MatMul", ["b", "w"], "y")], False),
    "a product and a bias": ([node("MatMul", ["b", "w"], "m"), node("Add", ["m", "bias"], "y")], True),
    "a bias with a zero in it": ([node("MatMul", ["b", "w"], "m"), node("Add", ["m", "hole"], "y")], False),
    "Gemm": ([node("Gemm", ["b", "w", "bias"], "y")], True),
    "Gemm without its bias": ([node("Gemm", ["b", "w", "bias"], "y", beta=0.0)], False),
    "attention": ([node("MatMul", ["w", "b"], "m"), node("Softmax", ["m"], "y")], True),
    "two readers": ([node("Softmax", ["b"], "s"), node("Reciprocal", ["b"], "y")], False),
}


@pytest.mark.parametrize("name", READERS)
def test_adding_zero_goes_where_nobody_can_tell(name: str) -> None:
    readers, gone = READERS[name]
    hole = np.array([1, 0, 2], np.float32)
    weights = {
        "zero": np.float32(0),
        "w": np.ones((3, 3), np.float32),
        "bias": np.ones(3, np.float32),
        "hole": hole,
    }
    used = {n for r in readers for n in r.input}
    proto = build(
        [node("Neg", ["x"], "a"), node("Add", ["a", "zero"], "b"), *readers],
        {"x": [3, 3]},
        ["y"],
        {k: v for k, v in weights.items() if k in used | {"zero"}},
    )
    made, entry = apply(proto, EliminateIdentities())
    assert bool(entry.changes) is gone
    for x in (np.zeros((3, 3), np.float32), -np.zeros((3, 3), np.float32), hole * np.ones((3, 1), np.float32)):
        same_bits(proto, made, {"x": x})
