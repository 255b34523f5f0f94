"""fuse-batchnorm: the same numbers with fewer nodes, and a reason for every one it leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import MODELS, apply, build, fixture_feeds, initializers, node, ops, reasons, run

from graphopt.passes.fuse_batchnorm import FuseBatchnorm

RNG = np.random.default_rng(1)


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.normal(size=shape).astype(dtype)


def statistics(channels: int, dtype: Any = np.float32, prefix: str = "") -> dict[str, np.ndarray]:
    return {
        f"{prefix}gamma": normal(channels, dtype=dtype),
        f"{prefix}beta": normal(channels, dtype=dtype),
        f"{prefix}mean": normal(channels, dtype=dtype),
        f"{prefix}var": (0.1 + RNG.random(channels)).astype(dtype),
    }


def batchnorm(source: str, output: str, prefix: str = "", **attributes: Any) -> onnx.NodeProto:
    inputs = [source, *(f"{prefix}{n}" for n in ("gamma", "beta", "mean", "var"))]
    return node("BatchNormalization", inputs, output, **attributes)


def close(before: onnx.ModelProto, after: onnx.ModelProto, feeds: dict[str, np.ndarray], tolerance: float) -> None:
    for name, array in run(before, feeds).items():
        np.testing.assert_allclose(run(after, feeds)[name], array, rtol=tolerance, atol=tolerance)


def layer(op_type: str, rank: int, group: int, bias: bool, dtype: Any = np.float32) -> tuple[Any, ...]:
    channels, out = 4, 8
    weights = statistics(out, dtype)
    shape = [channels, out // group] if op_type == "ConvTranspose" else [out, channels // group]
    weights["w"] = normal(*shape, *[3] * rank, dtype=dtype)
    inputs = ["x", "w"]
    if bias:
        weights["b"] = normal(out, dtype=dtype)
        inputs.append("b")
    return [node(op_type, inputs, "c", group=group), batchnorm("c", "y")], [1, channels, *[6] * rank], weights


CASES = [
    *[("Conv", rank, group, bias) for rank in (1, 2, 3) for group, bias in ((1, True), (1, False), (2, True))],
    ("Conv", 2, 4, True),
    ("Conv", 2, 4, False),
    *[("ConvTranspose", rank, group, bias) for rank in (1, 2) for group in (1, 2, 4) for bias in (True, False)],
]


@pytest.mark.parametrize(("op_type", "rank", "group", "bias"), CASES)
def test_convolutions_of_every_form(op_type: str, rank: int, group: int, bias: bool) -> None:
    nodes, shape, weights = layer(op_type, rank, group, bias)
    proto = build(nodes, {"x": shape}, ["y"], weights)
    fused, entry = apply(proto, FuseBatchnorm())
    assert ops(fused) == [op_type]
    assert [o.name for o in fused.graph.output] == ["y"]
    assert [c.site for c in entry.changes] == ["n_y"]
    assert set(initializers(fused)) == {"w_fused", "w_fused_bias"}
    close(proto, fused, {"x": normal(*shape)}, 1e-4)


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", [None, (5,), (1, 5), ()])
def test_gemm(trans_b: int, bias: tuple[int, ...] | None) -> None:
    weights = statistics(5) | {"w": normal(5, 7) if trans_b else normal(7, 5)}
    inputs = ["x", "w"]
    if bias is not None:
        weights["b"] = normal(*bias) if bias else np.float32(0.3)
        inputs.append("b")
    proto = build([node("Gemm", inputs, "g", transB=trans_b), batchnorm("g", "y")], {"x": [3, 7]}, ["y"], weights)
    fused, _ = apply(proto, FuseBatchnorm())
    assert ops(fused) == ["Gemm"]
    close(proto, fused, {"x": normal(3, 7)}, 1e-4)


@pytest.mark.parametrize("opset", [7, 8, 9, 14, 15, 21])
def test_every_opset_form(opset: int) -> None:
    nodes, shape, weights = layer("Conv", 2, 1, True)
    proto = build(nodes, {"x": shape}, ["y"], weights, opset=opset, ir_version=8 if opset < 21 else 10)
    fused, _ = apply(proto, FuseBatchnorm())
    assert ops(fused) == ["Conv"]
    close(proto, fused, {"x": normal(*shape)}, 1e-4)


def test_half_precision_with_single_precision_statistics() -> None:
    nodes, shape, weights = layer("Conv", 2, 1, True, np.float16)
    weights |= statistics(8) | {k: weights[k] for k in ("gamma", "beta")}
    proto = build(nodes, {"x": shape}, ["y"], weights, opset=15, dtype=TensorProto.FLOAT16)
    fused, _ = apply(proto, FuseBatchnorm())
    assert ops(fused) == ["Conv"]
    assert {a.dtype for a in initializers(fused).values()} == {np.dtype(np.float16)}
    close(proto, fused, {"x": normal(*shape, dtype=np.float16)}, 0.05)


def test_weights_that_would_overflow_half_precision_are_left() -> None:
    nodes, shape, weights = layer("Conv", 2, 1, False, np.float16)
    weights["gamma"][:] = 60000
    weights["w"][0] = 100
    proto = build(nodes, {"x": shape}, ["y"], weights, dtype=TensorProto.FLOAT16)
    kept, entry = apply(proto, FuseBatchnorm(), verify="off")
    assert ops(kept) == ["Conv", "BatchNormalization"]
    assert "finite in float16" in reasons(entry)["n_y"]


def test_shared_weights_are_forked() -> None:
    weights = statistics(4) | {"w": normal(4, 4, 1, 1)}
    proto = build(
        [node("Conv", ["x", "w"], "a"), batchnorm("a", "y"), node("Conv", ["x", "w"], "z")],
        {"x": [1, 4, 3, 3]},
        ["y", "z"],
        weights,
    )
    fused, _ = apply(proto, FuseBatchnorm())
    assert ops(fused) == ["Conv", "Conv"]
    np.testing.assert_array_equal(initializers(fused)["w"], weights["w"])
    close(proto, fused, {"x": normal(1, 4, 3, 3)}, 1e-4)


def test_constants_in_nodes_at_ir3() -> None:
    nodes, shape, weights = layer("Conv", 2, 1, True)
    made = [node("Constant", [], k, value=onnx.numpy_helper.from_array(a)) for k, a in weights.items()]
    proto = build([*made, *nodes], {"x": shape}, ["y"], opset=8, ir_version=3)
    fused, _ = apply(proto, FuseBatchnorm())
    assert sorted(ops(fused)) == ["Constant", "Constant", "Conv"]
    assert not fused.graph.initializer
    close(proto, fused, {"x": normal(*shape)}, 1e-4)


def test_inside_both_branches_of_an_if() -> None:
    weights = {"w": normal(4, 4, 1, 1), "half": np.float32(0.5)} | statistics(4)
    info = helper.make_tensor_value_info
    bodies = [
        helper.make_graph(
            [node("Conv", ["x", "w"], f"c{i}"), batchnorm(f"c{i}", f"o{i}")],
            f"branch{i}",
            [],
            [info(f"o{i}", TensorProto.FLOAT, None)],
        )
        for i in (0, 1)
    ]
    proto = build(
        [
            node("ReduceMean", ["x"], "m", keepdims=0),
            node("Greater", ["m", "half"], "go"),
            node("If", ["go"], "y", then_branch=bodies[0], else_branch=bodies[1]),
        ],
        {"x": [1, 4, 3, 3]},
        ["y"],
        weights,
    )
    fused, entry = apply(proto, FuseBatchnorm())
    assert len(entry.changes) == 2
    branch = next(a.g for n in fused.graph.node if n.op_type == "If" for a in n.attribute)
    assert [n.op_type for n in branch.node] == ["Conv"]
    for shift in (-2, 2):
        close(proto, fused, {"x": normal(1, 4, 3, 3) + np.float32(shift)}, 1e-4)


def test_a_convolution_outside_the_body_is_left() -> None:
    info = helper.make_tensor_value_info
    weights = {"w": normal(4, 4, 1, 1), "half": np.float32(0.5)} | statistics(4)
    then = helper.make_graph([batchnorm("c", "t")], "t", [], [info("t", TensorProto.FLOAT, None)])
    other = helper.make_graph([node("Neg", ["x"], "e")], "e", [], [info("e", TensorProto.FLOAT, None)])
    proto = build(
        [
            node("Conv", ["x", "w"], "c"),
            node("ReduceMean", ["x"], "m", keepdims=0),
            node("Greater", ["m", "half"], "go"),
            node("If", ["go"], "y", then_branch=then, else_branch=other),
        ],
        {"x": [1, 4, 3, 3]},
        ["y"],
        weights,
    )
    _, entry = apply(proto, FuseBatchnorm())
    assert not entry.changes
    assert "outside the body" in reasons(entry)["n_t"]


def _refused(change: str) -> tuple[onnx.ModelProto, str]:
    nodes, shape, weights = layer("Conv", 2, 1, True)
    options: dict[str, Any] = {}
    outputs, inputs = ["y"], {"x": shape}
    if change == "read twice":
        nodes.append(node("Neg", ["c"], "z"))
        outputs.append("z")
        expected = "read elsewhere"
    elif change == "an output itself":
        outputs.append("c")
        expected = "read elsewhere"
    elif change == "computed statistics":
        del weights["mean"]
        nodes.insert(1, node("ReduceMean", ["c"], "mean", axes=[0, 2, 3], keepdims=0))
        expected = "read elsewhere|not constants"
    elif change == "overridable":
        options = {"inputs_too": True, "ir_version": 3, "opset": 8}
        expected = "nobody can override|not constants"
    elif change == "after a Relu":
        nodes = [node("Relu", ["x"], "c"), batchnorm("c", "y")]
        weights = statistics(4)
        expected = "follows a Relu"
    elif change == "spatial":
        nodes[1] = batchnorm("c", "y", spatial=0)
        weights |= {k: np.tile(weights[k].reshape(-1, 1, 1), (1, 4, 4)) for k in ("gamma", "beta", "mean", "var")}
        options = {"opset": 8}
        expected = "spatial"
    elif change == "training":
        nodes[1] = node("BatchNormalization", list(nodes[1].input), ["y", "m2", "v2"], training_mode=1, name="n_y")
        expected = "training mode"
    elif change == "scaled Gemm":
        nodes = [node("Gemm", ["x", "w"], "c", alpha=0.5), batchnorm("c", "y")]
        weights, inputs = statistics(4) | {"w": normal(4, 4)}, {"x": [2, 4]}
        expected = "alpha"
    else:
        options = {"opset": 6, "ir_version": 3}
        nodes = [batchnorm("x", "y", is_test=1)]
        weights = {}
        inputs |= {k: [4] for k in ("gamma", "beta", "mean", "var")}
        expected = "upgrade-opset"
    return build(nodes, inputs, outputs, weights, **options), expected


@pytest.mark.parametrize(
    "change",
    [
        "read twice",
        "an output itself",
        "computed statistics",
        "overridable",
        "after a Relu",
        "spatial",
        "training",
        "scaled Gemm",
        "opset 6",
    ],
)
def test_what_is_not_fused_says_why(change: str) -> None:
    proto, expected = _refused(change)
    kept, entry = apply(proto, FuseBatchnorm(), verify="off")
    assert not entry.changes
    assert any(word in reasons(entry)["n_y"] for word in expected.split("|"))
    assert ops(kept) == ops(proto)


@pytest.mark.parametrize("name", ["shared", "convtranspose", "half", "metadata"])
def test_fixtures(name: str) -> None:
    proto = onnx.load(MODELS / f"{name}.onnx")
    fused, entry = apply(proto, FuseBatchnorm())
    assert "BatchNormalization" not in ops(fused) or entry.skipped
    assert list(fused.graph.output) == list(proto.graph.output)
    close(proto, fused, fixture_feeds(name, 1)[0], 2e-2 if name == "half" else 1e-4)


def test_without_any_that_is_said() -> None:
    proto = build([node("Neg", ["x"], "y")], {"x": [1]}, ["y"])
    _, entry = apply(proto, FuseBatchnorm())
    assert "no BatchNormalization" in reasons(entry)["(graph)"]
