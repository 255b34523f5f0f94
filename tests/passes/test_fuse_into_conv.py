"""fuse-into-conv: arithmetic and padding disappear into the layer, and every refusal has its reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import apply, build, initializers, node, ops, reasons, run

from graphopt.passes.fuse_into_conv import FuseIntoConv

RNG = np.random.default_rng(5)


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.normal(size=shape).astype(dtype)


def close(before: onnx.ModelProto, after: onnx.ModelProto, feeds: dict[str, np.ndarray], tolerance: float) -> None:
    for name, array in run(before, feeds).items():
        np.testing.assert_allclose(run(after, feeds)[name], array, rtol=tolerance, atol=tolerance)


def layer(op_type: str, group: int = 1, bias: bool = True, rank: int = 2) -> tuple[onnx.NodeProto, dict[str, Any]]:
    """A layer of 4 -> 8 channels that makes c."""
    if op_type == "Gemm":
        weights = {"w": normal(4, 8), "b": normal(8)}
        attributes: dict[str, Any] = {}
    else:
        shape = (4, 8 // group) if op_type == "ConvTranspose" else (8, 4 // group)
        weights = {"w": normal(*shape, *[3] * rank), "b": normal(8)}
        attributes = {"group": group}
    if not bias:
        del weights["b"]
    return node(op_type, ["x", *weights], "c", **attributes), weights


FORMS = [
    *[("Conv", g, b, r) for g, b, r in ((1, True, 2), (2, False, 2), (4, True, 1), (1, False, 3))],
    *[("ConvTranspose", g, b, r) for g, b, r in ((1, True, 2), (2, False, 2), (4, True, 1))],
    ("Gemm", 1, True, 0),
    ("Gemm", 1, False, 0),
]


@pytest.mark.parametrize(("op_type", "group", "bias", "rank"), FORMS)
@pytest.mark.parametrize("operation", ["Add", "Sub", "Mul", "Div", "k - c", "scalar"])
def test_arithmetic(op_type: str, group: int, bias: bool, rank: int, operation: str) -> None:
    made, weights = layer(op_type, group, bias, rank)
    weights["k"] = normal(8, *[1] * rank) + np.float32(3)
    if operation == "scalar":
        weights["k"] = np.float32(1.5)
    op = {"k - c": "Sub", "scalar": "Mul"}.get(operation, operation)
    inputs = ["k", "c"] if operation in ("k - c", "scalar") else ["c", "k"]
    shape = [2, 4, *[5] * rank]
    proto = build([made, node(op, inputs, "y")], {"x": shape}, ["y"], weights)
    after, entry = apply(proto, FuseIntoConv())
    assert ops(after) == [op_type], entry.skipped
    assert [o.name for o in after.graph.output] == ["y"]
    assert "k" not in initializers(after)
    close(proto, after, {"x": normal(*shape)}, 1e-4)


def test_several_in_a_row_and_again() -> None:
    made, weights = layer("Conv")
    weights |= {"k": normal(8, 1, 1), "m": normal(1, 8, 1, 1)}
    proto = build(
        [made, node("Mul", ["c", "k"], "d"), node("Add", ["m", "d"], "y")], {"x": [1, 4, 5, 5]}, ["y"], weights
    )
    after, entry = apply(proto, FuseIntoConv())
    assert ops(after) == ["Conv"]
    assert len(entry.changes) == 2
    close(proto, after, {"x": normal(1, 4, 5, 5)}, 1e-4)
    again, entry = apply(after, FuseIntoConv())
    assert again == after
    assert "no constant arithmetic follows" in reasons(entry)["(graph)"]


def test_shared_weights_are_forked_and_an_addition_leaves_the_weight() -> None:
    made, weights = layer("Conv")
    weights["k"] = normal(8, 1, 1)
    other = node("Conv", ["x", "w", "b"], "z")
    proto = build([made, node("Add", ["c", "k"], "y"), other], {"x": [1, 4, 5, 5]}, ["y", "z"], weights)
    after, _ = apply(proto, FuseIntoConv())
    assert ops(after) == ["Conv", "Conv"]
    assert set(initializers(after)) == {"w", "b", "w_fused_bias"}
    close(proto, after, {"x": normal(1, 4, 5, 5)}, 1e-4)


def test_half_precision_and_ir3() -> None:
    made, weights = layer("Conv")
    weights["k"] = normal(8, 1, 1)
    arrays = {k: a.astype(np.float16) for k, a in weights.items()}
    proto = build([made, node("Mul", ["c", "k"], "y")], {"x": [1, 4, 5, 5]}, ["y"], arrays, dtype=TensorProto.FLOAT16)
    after, _ = apply(proto, FuseIntoConv())
    assert ops(after) == ["Conv"]
    close(proto, after, {"x": normal(1, 4, 5, 5, dtype=np.float16)}, 0.1)
    made_too = [node("Constant", [], k, value=numpy_helper.from_array(a)) for k, a in weights.items()]
    proto = build([*made_too, made, node("Mul", ["c", "k"], "y")], {"x": [1, 4, 5, 5]}, ["y"], opset=8, ir_version=3)
    after, _ = apply(proto, FuseIntoConv())
    assert not after.graph.initializer
    assert sorted(ops(after)) == ["Constant", "Constant", "Conv"]
    close(proto, after, {"x": normal(1, 4, 5, 5)}, 1e-4)


def test_inside_a_body() -> None:
    bodies = []
    for i in (0, 1):
        made, weights = layer("Conv")
        inner = [made, node(("Add", "Mul")[i], ["c", "k"], "o")]
        bodies.append(helper.make_graph(inner, f"b{i}", [], [helper.make_tensor_value_info("o", 1, None)]))
    weights["k"] = normal(8, 1, 1)
    proto = build(
        [node("If", ["g"], "y", then_branch=bodies[0], else_branch=bodies[1])], {"x": [1, 4, 5, 5]}, ["y"], weights
    )
    proto.graph.input.append(helper.make_tensor_value_info("g", TensorProto.BOOL, []))
    after, entry = apply(proto, FuseIntoConv())
    assert len(entry.changes) == 2
    for go in (True, False):
        close(proto, after, {"x": normal(1, 4, 5, 5), "g": np.array(go)}, 1e-4)


def _refused(change: str) -> tuple[onnx.ModelProto, str]:
    made, weights = layer("Conv")
    weights["k"] = normal(8, 1, 1)
    nodes, outputs, inputs, options = [made, node("Mul", ["c", "k"], "y")], ["y"], {"x": [1, 4, 10, 10]}, {}
    expected = "per output channel"
    if change == "wrong axis":
        weights["k"] = normal(8)  # the last axis, which happens to have 8 elements too
    elif change == "per sample":
        weights["k"] = normal(2, 1, 1, 1)
    elif change == "changes rank":
        weights["k"] = normal(1, 1, 8, 1, 1)
    elif change == "broadcast changes shape":
        weights |= {"w": normal(1, 4, 3, 3), "b": normal(1)}
    elif change == "read twice":
        nodes.append(node("Neg", ["c"], "z"))
        outputs, expected = ["y", "z"], "read elsewhere"
    elif change == "output":
        outputs, expected = ["y", "c"], "read elsewhere"
    elif change == "zero":
        weights["k"][0], expected = 0, "NaN"
    elif change == "overflow":
        weights["k"][0], weights["w"][0], expected = 3e38, 100, "finite"
    elif change == "division by":
        nodes[1], expected = node("Div", ["k", "c"], "y"), "divides by"
    elif change == "computed weights":
        nodes = [node("Neg", ["w0"], "w"), *nodes]
        weights["w0"], expected = weights.pop("w"), "not constants"
    elif change == "opset 6":
        nodes[1] = node("Mul", ["c", "k"], "y", broadcast=1, axis=1)
        weights["k"], options, expected = normal(8), {"opset": 6}, "upgrade-opset"
    elif change == "alpha":
        nodes[0] = node("Gemm", ["x", "w"], "c", alpha=0.5)
        weights, inputs, expected = {"w": normal(4, 8), "k": normal(8)}, {"x": [2, 4]}, "alpha"
    else:
        options, expected = {"inputs_too": True}, "overridden"
    return build(nodes, inputs, outputs, weights, **options), expected


@pytest.mark.parametrize(
    "change",
    [
        *("wrong axis", "per sample", "changes rank", "broadcast changes shape", "read twice", "output", "zero"),
        *("overflow", "division by", "computed weights", "opset 6", "alpha", "overridable"),
    ],
)
def test_what_is_left_says_why(change: str) -> None:
    proto, expected = _refused(change)
    kept, entry = apply(proto, FuseIntoConv(), verify="off")
    assert not entry.changes
    assert expected in reasons(entry)["n_y"]
    assert ops(kept) == ops(proto)


def padded(
    pads: list[int], *, opset: int = 17, conv: dict[str, Any] | None = None, **attributes: Any
) -> onnx.ModelProto:
    weights: dict[str, Any] = {"w": normal(8, 4, 3, 3)}
    inputs = ["x"]
    if opset < 11:
        attributes["pads"] = pads
    else:
        weights["p"] = np.array(pads, np.int64)
        inputs += ["p"]
        if "value" in attributes:
            weights["v"] = np.float32(attributes.pop("value"))
            inputs.append("v")
    nodes = [node("Pad", inputs, "a", **attributes), node("Conv", ["a", "w"], "y", **(conv or {}))]
    return build(nodes, {"x": ["N", 4, 6, 7]}, ["y"], weights, opset=opset)


@pytest.mark.parametrize("opset", [2, 10, 11, 18])
@pytest.mark.parametrize("conv", [{}, {"pads": [1, 0, 2, 1], "strides": [2, 1]}, {"auto_pad": "VALID"}])
def test_zero_padding(opset: int, conv: dict[str, Any]) -> None:
    proto = padded([0, 0, 1, 2, 0, 0, 3, 0], opset=opset, conv=conv)
    after, entry = apply(proto, FuseIntoConv())
    assert ops(after) == ["Conv"], entry.skipped
    for batch in (1, 3) if opset >= 10 else ():
        close(proto, after, {"x": normal(batch, 4, 6, 7)}, 1e-6)


def test_padding_of_chosen_axes() -> None:
    weights = {"w": normal(8, 4, 3, 3), "p": np.array([1, 2], np.int64), "ax": np.array([-1], np.int64)}
    nodes = [node("Pad", ["x", "p", "", "ax"], "a"), node("Conv", ["a", "w"], "y")]
    proto = build(nodes, {"x": [1, 4, 6, 7]}, ["y"], weights, opset=18)
    after, _ = apply(proto, FuseIntoConv())
    assert list(onnx.helper.get_node_attr_value(after.graph.node[0], "pads")) == [0, 1, 0, 2]
    close(proto, after, {"x": normal(1, 4, 6, 7)}, 1e-6)


@pytest.mark.parametrize(
    ("proto", "expected"),
    [
        (padded([0, 0, 1, 1, 0, 0, 1, 1], mode="reflect"), "other than zeros"),
        (padded([0, 0, 1, 1, 0, 0, 1, 1], value=0.5), "pads with 0.5"),
        (padded([0, 0, -1, 1, 0, 0, 1, 1]), "crops"),
        (padded([1, 0, 1, 1, 0, 0, 1, 1]), "batch or the channels"),
        (padded([0, 0, 1, 1, 0, 0, 1, 1], conv={"auto_pad": "SAME_UPPER"}), "pads by itself"),
    ],
    ids=["mode", "value", "negative", "batch", "auto_pad"],
)
def test_padding_that_stays(proto: onnx.ModelProto, expected: str) -> None:
    after, entry = apply(proto, FuseIntoConv())
    assert after == proto
    assert expected in reasons(entry)["n_a"]


def up(around: list[int], **attributes: Any) -> onnx.ModelProto:
    weights = {
        "w": normal(4, 3, 3, 3),
        "bias": normal(3),
        "p": np.array([0, 0, *around[:2], 0, 0, *around[2:]], np.int64),
    }
    nodes = [node("Pad", ["x", "p"], "a"), node("ConvTranspose", ["a", "w", "bias"], "y", **attributes)]
    return build(nodes, {"x": ["N", 4, 5, 6]}, ["y"], weights)


@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [2, 2, 2, 2]},
        {"pads": [3, 2, 2, 5], "strides": [2, 1], "output_padding": [1, 0]},
        {"pads": [4, 4, 4, 4], "strides": [2, 2], "dilations": [2, 1]},
    ],
)
def test_padding_before_an_upsampling_is_cropped_less(attributes: dict[str, Any]) -> None:
    proto = up([1, 2, 0, 1], **attributes)
    after, entry = apply(proto, FuseIntoConv())
    assert ops(after) == ["ConvTranspose"], entry.skipped
    for batch in (1, 3):
        close(proto, after, {"x": normal(batch, 4, 5, 6)}, 1e-6)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [({}, "crops less"), ({"pads": [9, 9, 9, 9], "output_shape": [4, 4]}, "output_shape")],
)
def test_padding_before_an_upsampling_that_stays(attributes: dict[str, Any], expected: str) -> None:
    proto = up([1, 2, 0, 1], **attributes)
    after, entry = apply(proto, FuseIntoConv())
    assert after == proto
    assert expected in reasons(entry)["n_a"]


def test_padding_before_a_pool_stays() -> None:
    nodes = [node("Pad", ["x", "p"], "a"), node("MaxPool", ["a"], "y", kernel_shape=[2, 2])]
    proto = build(nodes, {"x": [1, 4, 6, 7]}, ["y"], {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1])})
    after, _ = apply(proto, FuseIntoConv())
    assert after == proto
