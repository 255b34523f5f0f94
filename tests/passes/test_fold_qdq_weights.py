"""fold-qdq-weights: the integers of the runtime itself, bit for bit, and the float gone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import MODELS, apply, build, fixture_feeds, initializers, node, ops, reasons, run, size

from graphopt.passes.fold_qdq_weights import FoldQdqWeights

RNG = np.random.default_rng(3)


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.normal(size=shape).astype(dtype)


def fake_quantized(
    weight: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, *, opset: int = 21, **attributes: Any
) -> onnx.ModelProto:
    """y = x + DQ(Q(w))."""
    weights: dict[str, Any] = {"w": weight, "s": scale}
    if zero is not None:
        weights["z"] = zero
    tail = ["s"] if zero is None else ["s", "z"]
    other = {k: v for k, v in attributes.items() if k in ("axis", "block_size")}
    nodes = [
        node("QuantizeLinear", ["w", *tail], "q", **attributes),
        node("DequantizeLinear", ["q", *tail], "d", **other),
        node("Add", ["x", "d"], "y"),
    ]
    return build(nodes, {"x": weight.shape}, ["y"], weights, opset=opset, ir_version=10 if opset > 20 else 8)


def same_bits(before: onnx.ModelProto, after: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> None:
    other = run(after, feeds)
    for name, array in run(before, feeds).items():
        assert array.tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_integers_per_tensor_and_per_axis(kind: Any, axis: int | None) -> None:
    weight = normal(40, 30)
    count = 1 if axis is None else weight.shape[axis]
    scale = (0.001 + RNG.random(count)).astype(np.float32) / 50
    zero = RNG.integers(0, 20, count).astype(kind)
    proto = (
        fake_quantized(weight, scale[0], zero[0]) if axis is None else fake_quantized(weight, scale, zero, axis=axis)
    )
    folded, entry = apply(proto, FoldQdqWeights())
    assert ops(folded) == ["DequantizeLinear", "Add"]
    assert [c.site for c in entry.changes] == ["n_q"]
    assert initializers(folded)["q"].dtype == kind
    assert "w" not in initializers(folded)
    same_bits(proto, folded, {"x": normal(40, 30)})
    again, entry = apply(folded, FoldQdqWeights())
    assert again == folded
    assert "no constant weight" in reasons(entry)["(graph)"]


def test_blocks() -> None:
    weight, scale = normal(8, 6), (0.1 + RNG.random((4, 6))).astype(np.float32)
    proto = fake_quantized(weight, scale, np.zeros((4, 6), np.int8), axis=0, block_size=2)
    folded, _ = apply(proto, FoldQdqWeights())
    assert ops(folded) == ["DequantizeLinear", "Add"]
    same_bits(proto, folded, {"x": normal(8, 6)})


@pytest.mark.parametrize(
    "kind",
    [TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2, TensorProto.INT8],
)
def test_narrow_types(kind: int) -> None:
    proto = fake_quantized(normal(7, 5), np.float32(0.25), None, output_dtype=kind)
    folded, entry = apply(proto, FoldQdqWeights())
    assert ops(folded) == ["DequantizeLinear", "Add"], entry.skipped
    assert next(t for t in folded.graph.initializer if t.name == "q").data_type == kind
    same_bits(proto, folded, {"x": normal(7, 5)})


def test_ties_nan_and_infinity_round_as_the_runtime_does() -> None:
    weight = np.array([0.5, 1.5, 2.5, -0.5, -1.5, np.inf, -np.inf, np.nan, 300, -300, 0.0, -0.0], np.float32)
    proto = fake_quantized(weight, np.float32(1), np.int8(1))
    folded, _ = apply(proto, FoldQdqWeights(), verify="off")
    assert ops(folded) == ["DequantizeLinear", "Add"]
    same_bits(proto, folded, {"x": np.zeros(12, np.float32)})


def test_float8_nan_is_left() -> None:
    proto = fake_quantized(
        np.array([1, np.nan], np.float32), np.float32(1), None, output_dtype=TensorProto.FLOAT8E4M3FN
    )
    _, entry = apply(proto, FoldQdqWeights(), verify="off")
    assert "NaN" in reasons(entry)["n_q"]


def test_half_precision() -> None:
    weight, scale = normal(9, 4, dtype=np.float16), np.float16(0.05)
    proto = fake_quantized(weight, scale, np.int8(0))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    folded, _ = apply(proto, FoldQdqWeights())
    assert ops(folded) == ["DequantizeLinear", "Add"]
    stored = initializers(folded)["q"]
    proto.graph.output.append(helper.make_tensor_value_info("q", TensorProto.INT8, None))
    np.testing.assert_array_equal(run(proto, {"x": normal(9, 4, dtype=np.float16)})["q"], stored)
    # What follows may differ in the last bit: the runtime computes a half-precision node between single-precision ones
    # in single precision, and casts it inserts itself make the DequantizeLinear one as soon as nothing is before it.


@pytest.mark.parametrize("opset", [10, 12, 13, 19])
def test_old_operator_sets(opset: int) -> None:
    proto = fake_quantized(normal(9, 4), np.float32(0.05), np.uint8(3), opset=opset)
    folded, _ = apply(proto, FoldQdqWeights())
    assert ops(folded) == ["DequantizeLinear", "Add"]
    same_bits(proto, folded, {"x": normal(9, 4)})


def test_ir3_gets_a_constant_node() -> None:
    weights = {"w": normal(9, 4), "s": np.float32(0.05), "z": np.uint8(3)}
    made = [node("Constant", [], k, value=numpy_helper.from_array(np.asarray(a))) for k, a in weights.items()]
    nodes = [
        *made,
        node("QuantizeLinear", ["w", "s", "z"], "q"),
        node("DequantizeLinear", ["q", "s", "z"], "d"),
        node("Add", ["x", "d"], "y"),
    ]
    proto = build(nodes, {"x": [9, 4]}, ["y"], opset=10, ir_version=3)
    folded, _ = apply(proto, FoldQdqWeights())
    assert sorted(ops(folded)) == ["Add", "Constant", "Constant", "Constant", "DequantizeLinear"]
    assert not folded.graph.initializer
    same_bits(proto, folded, {"x": normal(9, 4)})


def quantized_twice(scales: tuple[float, float], *, float_too: bool = False) -> onnx.ModelProto:
    nodes = []
    for i in (0, 1):
        nodes += [
            node("QuantizeLinear", ["w", f"s{i}", "z"], f"q{i}"),
            node("DequantizeLinear", [f"q{i}", f"s{i}", "z"], f"d{i}"),
        ]
    nodes += [
        node("Add", ["d0", "d1"], "a"),
        node("Add", ["a", "w" if float_too else "x"], "b"),
        node("Add", ["b", "x"], "y"),
    ]
    weights = {"w": normal(30, 30), "s0": np.float32(scales[0]), "s1": np.float32(scales[1]), "z": np.int8(0)}
    return build(nodes, {"x": [30, 30]}, ["y"], weights)


@pytest.mark.parametrize(("scales", "stored"), [((0.02, 0.02), 1), ((0.02, 0.03), 2)])
def test_a_shared_weight_is_stored_once_per_way_of_quantizing(scales: tuple[float, float], stored: int) -> None:
    proto = quantized_twice(scales)
    folded, entry = apply(proto, FoldQdqWeights())
    assert len(entry.changes) == 2
    assert sum(a.dtype == np.int8 and a.size > 1 for a in initializers(folded).values()) == stored
    assert "w" not in initializers(folded)
    same_bits(proto, folded, {"x": normal(30, 30)})


def test_a_weight_that_is_read_as_float_too_is_left() -> None:
    proto = quantized_twice((0.02, 0.02), float_too=True)
    kept, entry = apply(proto, FoldQdqWeights())
    assert ops(kept) == ops(proto)
    assert "read elsewhere" in reasons(entry)["n_q0"]


def test_inside_both_branches_of_an_if() -> None:
    info = helper.make_tensor_value_info
    bodies = []
    for i in (0, 1):
        inner = [
            node("QuantizeLinear", ["w", "s", "z"], "q"),
            node("DequantizeLinear", ["q", "s", "z"], "d"),
            node(("Add", "Sub")[i], ["x", "d"], "o"),
        ]
        bodies.append(helper.make_graph(inner, f"b{i}", [], [info("o", TensorProto.FLOAT, None)]))
    nodes = [
        node("ReduceMax", ["x"], "m", keepdims=0),
        node("Greater", ["m", "half"], "go"),
        node("If", ["go"], "y", then_branch=bodies[0], else_branch=bodies[1]),
    ]
    weights = {"w": normal(20, 20), "s": np.float32(0.02), "z": np.int8(0), "half": np.float32(0.5)}
    proto = build(nodes, {"x": [20, 20]}, ["y"], weights)
    folded, entry = apply(proto, FoldQdqWeights())
    assert len(entry.changes) == 2
    assert "w" not in initializers(folded)
    for shift in (-9, 9):
        same_bits(proto, folded, {"x": normal(20, 20) + np.float32(shift)})


def _refused(change: str) -> tuple[onnx.ModelProto, str]:
    if change == "overridable weight":
        proto = fake_quantized(normal(4, 4), np.float32(1), np.int8(0), opset=13)
        proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 4]))
        return proto, "no constant weight"
    if change == "overridable scale":
        proto = fake_quantized(normal(4, 4), np.float32(1), np.int8(0), opset=13)
        proto.graph.input.append(helper.make_tensor_value_info("s", TensorProto.FLOAT, []))
        return proto, "overridden"
    if change == "output":
        proto = fake_quantized(normal(4, 4), np.float32(1), np.int8(0), opset=13)
        proto.graph.output.append(helper.make_tensor_value_info("q", TensorProto.INT8, None))
        return proto, "output of the graph"
    if change == "nobody dequantizes":
        nodes = [node("QuantizeLinear", ["w", "s"], "q"), node("MatMulInteger", ["x", "q"], "y")]
        weights = {"w": normal(4, 4), "s": np.float32(1)}
        proto = build(nodes, {"x": [2, 4]}, ["y"], weights, dtype=TensorProto.UINT8, out_dtype=TensorProto.INT32)
        return proto, "no DequantizeLinear"
    proto = fake_quantized(normal(4, 4), np.float32(1), None, output_dtype=TensorProto.FLOAT8E4M3FNUZ)
    proto.graph.node[0].input[1] = ""  # nothing that any runtime runs
    return proto, "not constant|cannot quantize"


@pytest.mark.parametrize("change", ["overridable weight", "overridable scale", "output", "nobody dequantizes"])
def test_what_is_left_says_why(change: str) -> None:
    proto, expected = _refused(change)
    kept, entry = apply(proto, FoldQdqWeights())
    assert not entry.changes
    assert ops(kept) == ops(proto)
    assert any(expected in reason for reason in reasons(entry).values())


def test_the_fake_quantized_fixture_shrinks() -> None:
    proto = onnx.load(MODELS / "fakequant.onnx")
    folded, entry = apply(proto, FoldQdqWeights())
    assert len(entry.changes) == 3
    stored = sum(a.nbytes for a in initializers(folded).values())
    assert stored < 0.35 * sum(a.nbytes for a in initializers(proto).values())
    assert size(folded) < size(proto)
    for feeds in fixture_feeds("fakequant", 4):
        same_bits(proto, folded, feeds)
