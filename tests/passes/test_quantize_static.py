"""quantize-static: integers in the file and in the runtime, the accuracy kept, everything left out explained."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import (
    DATA,
    DEMO,
    MODELS,
    ROOT,
    apply,
    build,
    fixture_feeds,
    initializers,
    node,
    ops,
    optimized,
    reasons,
    run,
    size,
    sqnr,
)

import graphopt
from graphopt.errors import NothingDone, PreconditionError
from graphopt.observers import OBSERVERS
from graphopt.passes._integer_weights import round_weight
from graphopt.passes.quantize_static import QuantizeStatic

RNG = np.random.default_rng(0)


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * RNG.normal(size=shape)).astype(np.float32)


def images(*shape: int, count: int = 6, name: str = "x") -> list[dict[str, np.ndarray]]:
    return [{name: normal(*shape)} for _ in range(count)]


def worst(proto: onnx.ModelProto, other: onnx.ModelProto, feeds: list[dict[str, np.ndarray]], *, on: bool) -> float:
    """SQNR over all outputs and samples, dB, the worst output."""
    pairs = [(run(proto, f), run(other, f, optimize=on)) for f in feeds]
    names = list(pairs[0][0])
    return min(sqnr(np.stack([a[n] for a, _ in pairs]), np.stack([b[n] for _, b in pairs])) for n in names)


def float_constants_behind_quantize(proto: onnx.ModelProto) -> list[str]:
    constants = {t.name for t in proto.graph.initializer}
    constants |= {o for n in proto.graph.node if n.op_type == "Constant" for o in n.output}
    return [n.input[0] for n in proto.graph.node if n.op_type == "QuantizeLinear" and n.input[0] in constants]


# -- digits --


@pytest.fixture(scope="module")
def digits() -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]], np.ndarray, np.ndarray, float]:
    """(optimized float model, calibration, held-out images, labels, float accuracy)."""
    model = graphopt.optimize(str(DEMO / "digits.onnx"), verify="off").model
    with np.load(DEMO / "calibration.npz") as stored:
        calibration = [{"image": row[None]} for row in stored["image"][:100]]
    with np.load(DEMO / "evaluation.npz") as stored:
        held, labels = stored["image"], stored["label"].reshape(-1)
    return model, calibration, held, labels, accuracy(model, held, labels)


def accuracy(proto: onnx.ModelProto, held: np.ndarray, labels: np.ndarray, *, optimize: bool = True) -> float:
    (logits,) = run(proto, {"image": held}, optimize=optimize).values()
    return float((logits.argmax(1) == labels).mean())


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("weights", ["auto", "s7", "u8"])
def test_every_observer_and_weight_form_keeps_digits_accuracy(digits: Any, observer: str, weights: str) -> None:
    model, calibration, held, labels, before = digits
    made, entry = apply(model, QuantizeStatic(observer=observer, weights=weights), data=calibration)
    assert not entry.skipped
    for optimize in (False, True):
        assert accuracy(made, held, labels, optimize=optimize) >= before - 0.01
    assert size(made) <= 0.30 * size(model)


def test_digits_runs_in_integers_alone(digits: Any, tmp_path: Path) -> None:
    model, calibration, held, _, _ = digits
    made, entry = apply(model, QuantizeStatic(), data=calibration)
    executed = ops(optimized(made, tmp_path))
    assert not {"Conv", "FusedConv", "Gemm", "Add", "GlobalAveragePool", "DequantizeLinear"} & set(executed)
    assert executed.count("QLinearConv") == 9
    assert executed.count("QLinearAdd") == 3
    assert executed.count("QGemm") == 1
    assert entry.metrics["macs_percent"] == pytest.approx(100)
    assert entry.metrics["macs_complete"]
    assert entry.metrics["weight_bytes_percent"] > 95
    assert entry.metrics["samples"] == len(calibration)
    off, on = (next(iter(run(made, {"image": held}, optimize=o).values())) for o in (False, True))
    assert sqnr(off, on) > 30


def test_no_float_weight_is_left_and_zero_points_are_explicit(digits: Any) -> None:
    model, calibration, _, _, _ = digits
    made, _ = apply(model, QuantizeStatic(), data=calibration)
    stored = initializers(made)
    assert not [n for n, a in stored.items() if a.dtype == np.float32 and a.ndim > 1]
    assert not float_constants_behind_quantize(made)
    for item in made.graph.node:
        if item.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert len(item.input) == 3
            assert item.input[2] in stored
    onnx.checker.check_model(made, full_check=True)


def test_two_runs_of_two_hash_seeds_write_the_same_bytes() -> None:
    script = (
        "import hashlib, graphopt\n"
        f"r = graphopt.quantize({str(DEMO / 'digits.onnx')!r}, data={str(DEMO / 'calibration.npz')!r},"
        " samples=40, threads=1, time=0, verify='off')\n"
        "print(hashlib.sha256(r.model.SerializeToString(deterministic=True)).hexdigest())\n"
    )
    found = set()
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT, check=True
        )
        found.add(done.stdout.strip().splitlines()[-1])
    assert len(found) == 1
    assert len(found.pop()) == len(hashlib.sha256().hexdigest())


# -- topologies: what the runtime really executes --


def conv(rank: int, *, group: int = 1, depthwise: bool = False, bias: bool = True) -> tuple[Any, list[int]]:
    channels = 8
    group = channels if depthwise else group
    space = [6] * rank
    weights = {"w": normal(channels, channels // group, *[3] * rank, scale=0.2)}
    inputs = ["x", "w"]
    if bias:
        weights["b"] = normal(channels)
        inputs.append("b")
    made = [node("Conv", inputs, "c", group=group, pads=[1] * 2 * rank), node("Relu", ["c"], "y")]
    return build(made, {"x": [1, channels, *space]}, ["y"], weights), [1, channels, *space]


def gemm(trans_b: int, bias: tuple[int, ...] | None) -> tuple[Any, list[int]]:
    weights = {"w": normal(*((12, 16) if trans_b else (16, 12)))}
    inputs = ["x", "w"]
    if bias is not None:
        weights["b"] = normal(*bias)
        inputs.append("b")
    return build([node("Gemm", inputs, "y", transB=trans_b)], {"x": [4, 16]}, ["y"], weights), [4, 16]


def matmul(rank: int, bias: bool) -> tuple[Any, list[int]]:
    shape = [4, 16] if rank == 2 else [2, 4, 16]
    made = [node("MatMul", ["x", "w"], "p" if bias else "y")]
    weights = {"w": normal(16, 12)}
    if bias:
        made.append(node("Add", ["b", "p"] if rank == 2 else ["p", "b"], "y"))
        weights["b"] = normal(12)
    return build(made, {"x": shape}, ["y"], weights), shape


def clip(low: float, high: float) -> tuple[Any, list[int]]:
    made = [node("Conv", ["x", "w"], "c"), node("Clip", ["c", "lo", "hi"], "y")]
    weights = {"w": normal(8, 4, 1, 1), "lo": np.float32(low), "hi": np.float32(high)}
    return build(made, {"x": [1, 4, 5, 5]}, ["y"], weights), [1, 4, 5, 5]


def network(middle: list[onnx.NodeProto], last: str) -> tuple[Any, list[int]]:
    """Two convolutions on one image, something between them, one more convolution."""
    made = [
        node("Conv", ["x", "w1"], "a"),
        node("Relu", ["a"], "ar"),
        node("Conv", ["ar", "w2"], "b"),
        *middle,
        node("Conv", [last, "w3"], "y"),
    ]
    width = 16 if any(n.op_type == "Concat" for n in middle) else 8
    weights = {"w1": normal(8, 4, 1, 1), "w2": normal(8, 8, 1, 1), "w3": normal(6, width, 1, 1)}
    return build(made, {"x": [1, 4, 8, 8]}, ["y"], weights), [1, 4, 8, 8]


TOPOLOGIES: dict[str, tuple[Callable[[], tuple[Any, list[int]]], dict[str, int]]] = {
    "conv 1d": (lambda: conv(1), {"QLinearConv": 1}),
    "conv 2d": (lambda: conv(2), {"QLinearConv": 1}),
    "conv 2d no bias": (lambda: conv(2, bias=False), {"QLinearConv": 1}),
    "conv 3d": (lambda: conv(3), {"QLinearConv": 1}),
    "conv grouped": (lambda: conv(2, group=2), {"QLinearConv": 1}),
    "conv depthwise": (lambda: conv(2, depthwise=True), {"QLinearConv": 1}),
    "gemm transB": (lambda: gemm(1, (12,)), {"QGemm": 1}),
    "gemm": (lambda: gemm(0, (1, 12)), {"QGemm": 1}),
    "gemm no bias": (lambda: gemm(1, None), {"QGemm": 1}),
    "matmul 2d": (lambda: matmul(2, False), {"MatMulIntegerToFloat": 1}),
    "matmul 3d": (lambda: matmul(3, False), {"MatMulIntegerToFloat": 1}),
    "matmul 2d and bias": (lambda: matmul(2, True), {"QGemm": 1}),
    "matmul 3d and bias": (lambda: matmul(3, True), {"QGemm": 1}),
    "relu6": (lambda: clip(0, 6), {"QLinearConv": 1}),
    "relu1": (lambda: clip(0, 1), {"QLinearConv": 1}),
    "hard tanh": (lambda: clip(-1, 1), {"QLinearConv": 1}),
    "odd clip": (lambda: clip(-0.7, 5.1), {"QLinearConv": 1}),
    "residual": (
        lambda: network([node("Add", ["b", "ar"], "s"), node("Relu", ["s"], "sr")], "sr"),
        {"QLinearConv": 3, "QLinearAdd": 1},
    ),
    "concat": (
        lambda: network([node("Concat", ["b", "ar"], "s", axis=1)], "s"),
        {"QLinearConv": 3, "QLinearConcat": 1},
    ),
    "max pool": (
        lambda: network([node("MaxPool", ["b"], "s", kernel_shape=[2, 2])], "s"),
        {"QLinearConv": 3, "NhwcMaxPool": 1},
    ),
    "average pool": (
        lambda: network([node("AveragePool", ["b"], "s", kernel_shape=[2, 2])], "s"),
        {"QLinearConv": 3, "QLinearAveragePool": 1},
    ),
    "global pool": (
        lambda: network([node("GlobalAveragePool", ["b"], "s")], "s"),
        {"QLinearConv": 3, "QLinearGlobalAveragePool": 1},
    ),
}

FLOAT_KERNELS = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Add", "Concat", "Clip"} | {
    "AveragePool",
    "GlobalAveragePool",
}


@pytest.mark.parametrize("weights", ["auto", "s7", "u8", "s8"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_runtime_executes_integers_and_agrees_with_the_reference(name: str, weights: str, tmp_path: Path) -> None:
    make, expected = TOPOLOGIES[name]
    proto, shape = make()
    feeds = images(*shape)
    made, entry = apply(proto, QuantizeStatic(observer="min-max", weights=weights), data=feeds)
    assert entry.changes
    executed = ops(optimized(made, tmp_path))
    for op_type, count in expected.items():
        assert executed.count(op_type) == count, executed
    assert not FLOAT_KERNELS & set(executed), executed
    assert not float_constants_behind_quantize(made)
    quality = [worst(proto, made, feeds, on=on) for on in (False, True)]
    assert quality[0] > 24
    if weights != "s8":  # s8 may saturate on this machine
        assert quality[1] > quality[0] - 1.0


def test_clip_with_computed_bounds_is_not_absorbed() -> None:
    proto = build(
        [node("Conv", ["x", "w"], "c"), node("ReduceMax", ["x"], "hi", keepdims=0), node("Clip", ["c", "", "hi"], "y")],
        {"x": [1, 4, 5, 5]},
        ["y"],
        {"w": normal(8, 4, 1, 1)},
    )
    feeds = images(1, 4, 5, 5)
    made, _ = apply(proto, QuantizeStatic(observer="min-max"), data=feeds)
    position = {o: i for i, n in enumerate(made.graph.node) for o in n.output}
    clips = next(n for n in made.graph.node if n.op_type == "Clip")
    before = made.graph.node[position[clips.input[0]]]
    assert before.op_type == "DequantizeLinear"  # the Conv's own result is rounded
    assert worst(proto, made, feeds, on=True) > 24


def test_clip_away_from_zero_stays_behind_an_integer_convolution(tmp_path: Path) -> None:
    """Rounding has to represent 0, so it cannot stand in for Clip(0.5, 6)."""
    proto, shape = clip(0.5, 6)
    feeds = images(*shape)
    made, _ = apply(proto, QuantizeStatic(observer="min-max"), data=feeds)
    executed = ops(optimized(made, tmp_path))
    assert "QLinearConv" in executed
    assert "Clip" in executed
    assert worst(proto, made, feeds, on=True) > 24


@pytest.mark.parametrize("within", [(-1.0, 1.0), (0.0, 6.0), (-3.0, 6.0), (-0.1, 7.3), (-np.inf, 0.5)])
def test_no_representable_value_is_outside_the_bounds(within: tuple[float, float]) -> None:
    from graphopt.passes._qdq import affine

    low, high = max(within[0], -2.0), min(within[1], 2.0)
    found = affine(low, high, within)
    assert within[0] <= found.low <= 0 <= found.high <= within[1]
    assert found.low <= low + 2 * found.scale
    assert found.high >= high - 2 * found.scale


def test_excluding_what_an_earlier_pass_fused_is_noted() -> None:
    weights = {"w": normal(4, 4, 1, 1)} | {k: np.ones(4, np.float32) for k in ("g", "b", "m", "v")}
    proto = build(
        [node("Conv", ["x", "w"], "c"), node("BatchNormalization", ["c", "g", "b", "m", "v"], "y")],
        {"x": [1, 4, 6, 6]},
        {"y": [1, 4, 6, 6]},
        weights,
    )
    result = graphopt.quantize(proto, data=images(1, 4, 6, 6, count=12), exclude=("n_y",), time=0, threads=1)
    skipped = result.report["ledger"][-1]["skipped"]
    assert any(s["site"] == "n_y" and "no effect" in s["reason"] for s in skipped)


# -- what stays in float --


def test_what_stays_float_is_listed_with_the_reason() -> None:
    loop_free = helper.make_graph(
        [node("MatMul", ["x", "w"], "t_out")], "t", [], [helper.make_tensor_value_info("t_out", 1, [4, 8])]
    )
    other = helper.make_graph(
        [node("MatMul", ["x", "w"], "e_out")], "e", [], [helper.make_tensor_value_info("e_out", 1, [4, 8])]
    )
    proto = build(
        [
            node("MatMul", ["x", "w"], "plain"),
            node("MatMul", ["x", "plain"], "computed"),
            node("MatMul", ["w", "x8"], "left"),
            node("ReduceMax", ["x"], "top", keepdims=0),
            node("Greater", ["top", "zero"], "go"),
            node("If", ["go"], "branch", then_branch=loop_free, else_branch=other),
            node("Gemm", ["x", "w", "x"], "biased"),
            node("Gemm", ["x", "w"], "scaled", alpha=2.0),
            node("MatMul", ["x", "stack"], "stacked"),
            node("MatMul", ["x", "broken"], "nan"),
            node("GRU", ["x3", "gw", "gr"], ["", "last"], hidden_size=4),
            node("ConvTranspose", ["x4", "tw"], "up"),
        ],
        {"x": [8, 8], "x8": [8, 8], "x3": [2, 1, 3], "x4": [1, 2, 4, 4]},
        ["computed", "left", "branch", "biased", "scaled", "stacked", "nan", "last", "up"],
        {
            "w": normal(8, 8),
            "zero": np.float32(0),
            "stack": normal(2, 8, 8),
            "broken": np.full((8, 8), np.nan, np.float32),
            "gw": normal(1, 12, 3),
            "gr": normal(1, 12, 4),
            "tw": normal(2, 2, 3, 3),
        },
    )
    feeds = [{"x": normal(8, 8), "x8": normal(8, 8), "x3": normal(2, 1, 3), "x4": normal(1, 2, 4, 4)}]
    made, entry = apply(proto, QuantizeStatic(), data=feeds)
    why = reasons(entry)
    assert [c.site for c in entry.changes] == ["n_plain"]
    assert "both operands are computed" in why["n_computed"]
    assert "left operand" in why["n_left"]
    assert "reads a value from outside" in why["n_t_out"]
    assert "reads a value from outside" in why["n_e_out"]
    assert "bias is computed" in why["n_biased"]
    assert "alpha" in why["n_scaled"]
    assert "3 dims" in why["n_stacked"]
    assert "NaN" in why["n_nan"]
    assert "GRU" in why["n_"]
    assert "ConvTranspose" in why["n_up"]
    assert entry.metrics["macs_percent"] < 50
    run(made, feeds[0], optimize=True)


def test_half_precision_by_itself_and_custom_models_say_why() -> None:
    half = onnx.load(MODELS / "half.onnx")
    _, entry = apply(half, QuantizeStatic(), data=fixture_feeds("half"))
    assert not entry.changes
    assert "its weights are float16; only float32 layers are quantized: run compute-fp32 first" in str(entry.skipped)
    proto = build([node("Relu", ["x"], "y")], {"x": [1, 2]}, ["y"])
    with pytest.raises(NothingDone, match="no Conv, MatMul, Gemm"):
        graphopt.quantize(proto, data=images(1, 2), time=0)


def test_quantizing_twice_is_refused(digits: Any) -> None:
    model, calibration, _, _, _ = digits
    made, _ = apply(model, QuantizeStatic(), data=calibration[:4])
    with pytest.raises(PreconditionError, match="quantized already"):
        apply(made, QuantizeStatic(), data=calibration[:4])


def test_an_older_opset_is_refused_by_the_pass_and_raised_by_the_verb() -> None:
    feeds = fixture_feeds("opset11", 8)
    with pytest.raises(PreconditionError, match="upgrade-opset"):
        apply(onnx.load(MODELS / "opset11.onnx"), QuantizeStatic(), data=feeds)
    result = graphopt.quantize(str(MODELS / "opset11.onnx"), data=str(DATA / "opset11.npz"), threads=1, time=0)
    assert result.report["output"]["opset"] == 13
    assert worst(onnx.load(MODELS / "opset11.onnx"), result.model, feeds, on=True) > 25


# -- choosing nodes --


def _three() -> onnx.ModelProto:
    return build(
        [
            node("Conv", ["x", "w1"], "a", name="stem/conv[0]"),
            node("Conv", ["a", "w2"], "b", name="block/conv"),
            node("MatMul", ["b", "w3"], "y", name="head"),
        ],
        {"x": [1, 4, 6, 6]},
        ["y"],
        {"w1": normal(4, 4, 1, 1), "w2": normal(4, 4, 1, 1), "w3": normal(6, 6)},
    )


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (("head",), {"head"}),
        (("stem/conv[0]",), {"stem/conv[0]"}),
        (("block/*",), {"block/conv"}),
        (("re:^(stem|head)",), {"stem/conv[0]", "head"}),
        (("Conv",), {"stem/conv[0]", "block/conv"}),
    ],
)
def test_nodes_are_excluded_by_name_glob_expression_and_type(exclude: tuple[str, ...], left: set[str]) -> None:
    _, entry = apply(_three(), QuantizeStatic(exclude=exclude), data=images(1, 4, 6, 6))
    assert {s for s, why in reasons(entry).items() if "excluded by the user" in why} == left
    assert {c.site for c in entry.changes} == {"stem/conv[0]", "block/conv", "head"} - left
    _, entry = apply(_three(), QuantizeStatic(include=exclude), data=images(1, 4, 6, 6))
    assert {c.site for c in entry.changes if "weights" in c.detail} == left


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ("hed",)}, "exclude 'hed' matches no node; did you mean 'head'"),
        ({"include": ("re:nothing",)}, "include 're:nothing' matches no node"),
        ({"exclude": ("re:(",)}, "no regular expression"),
    ],
)
def test_a_pattern_that_means_nothing_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PreconditionError, match=message.replace("(", r"\(")):
        apply(_three(), QuantizeStatic(**options), data=images(1, 4, 6, 6))


def test_bad_options_are_refused_at_once() -> None:
    for options in ({"observer": "best"}, {"weights": "int4"}, {"percentile": 20.0}):
        with pytest.raises(ValueError, match="is"):
            QuantizeStatic(**options)


# -- hard weights and values --


def test_shared_weights_and_biases_load_and_stay_accurate() -> None:
    proto = onnx.load(MODELS / "shared.onnx")
    feeds = fixture_feeds("shared")
    result = graphopt.quantize(str(MODELS / "shared.onnx"), data=str(DATA / "shared.npz"), threads=1, time=0)
    before = np.concatenate([run(proto, feed)["features"] for feed in feeds])
    for on in (False, True):
        after = np.concatenate([run(result.model, feed, optimize=on)["features"] for feed in feeds])
        assert np.abs(before - after).max() < 0.02 * np.ptp(before)  # 2 % of the range the output has on this data


@pytest.mark.parametrize("weights", ["s7", "s8", "u8"])
@pytest.mark.parametrize("tiny", [1e-9, 0.0])
def test_a_dead_channel_spoils_nobody(weights: str, tiny: float) -> None:
    """One channel of weights near zero with an ordinary bias: its int32 bias must not overflow."""
    w = normal(8, 4, 3, 3)
    w[3] = tiny
    b = normal(8)
    b[3] = 0.7
    b[5] = 0.0
    proto = build([node("Conv", ["x", "w", "b"], "y")], {"x": [1, 4, 8, 8]}, ["y"], {"w": w, "b": b})
    feeds = images(1, 4, 8, 8, count=12)
    made, _ = apply(proto, QuantizeStatic(observer="min-max", weights=weights), data=feeds)
    (scale,) = {n.input[1] for n in made.graph.node if n.op_type == "DequantizeLinear" and n.output[0] == "y"}
    step = float(initializers(made)[scale])
    for on in (False, True):
        difference = np.abs(run(proto, feeds[0])["y"] - run(made, feeds[0], optimize=on)["y"])
        assert difference[:, 3].max() <= step
        if weights != "s8":  # s8 may saturate on this machine
            assert difference.max() <= 8 * step


def test_zero_activations_and_zero_weights_work() -> None:
    proto = build(
        [node("Conv", ["x", "w"], "c"), node("Relu", ["c"], "r"), node("Conv", ["r", "v", "b"], "y")],
        {"x": [1, 2, 4, 4]},
        ["y"],
        {"w": -np.ones((2, 2, 1, 1), np.float32), "v": np.zeros((2, 2, 1, 1), np.float32), "b": normal(2)},
    )
    feeds = [{"x": np.abs(normal(1, 2, 4, 4))} for _ in range(4)]  # the Relu never lets anything through
    made, _ = apply(proto, QuantizeStatic(), data=feeds)
    for on in (False, True):
        got = run(made, feeds[0], optimize=on)["y"]
        np.testing.assert_allclose(got, run(proto, feeds[0])["y"], atol=0.01)


def test_a_value_that_is_also_an_output_keeps_name_and_type() -> None:
    proto = build(
        [node("Conv", ["x", "w"], "middle"), node("Conv", ["middle", "v"], "y")],
        {"x": [1, 4, 6, 6]},
        {"y": [1, 4, 6, 6], "middle": [1, 4, 6, 6]},
        {"w": normal(4, 4, 1, 1), "v": normal(4, 4, 1, 1)},
    )
    proto.graph.output[1].doc_string = "the middle"
    feeds = images(1, 4, 6, 6)
    made, _ = apply(proto, QuantizeStatic(), data=feeds)
    assert list(made.graph.output) == list(proto.graph.output)
    assert worst(proto, made, feeds, on=True) > 25


def test_values_with_nan_are_ignored_with_a_count_and_unseen_ones_stay_float() -> None:
    proto = build(
        [
            node("Conv", ["x", "w"], "a"),
            node("Log", ["minus"], "bad"),
            node("Conv", ["bad", "v"], "b"),
            node("Add", ["a", "b"], "y"),
        ],
        {"x": [1, 4, 6, 6], "minus": [1, 4, 6, 6]},
        ["y"],
        {"w": normal(4, 4, 1, 1), "v": normal(4, 4, 1, 1)},
    )
    feeds = [{"x": normal(1, 4, 6, 6), "minus": -np.ones((1, 4, 6, 6), np.float32)} for _ in range(3)]
    feeds[0]["x"][0, 0, 0, 0] = np.nan
    _, entry = apply(proto, QuantizeStatic(), data=feeds)
    assert [c.site for c in entry.changes] == ["n_a"]
    assert "finite" in reasons(entry)["n_b"]
    assert entry.metrics["nonfinite_elements_ignored"]["x"] == 1


def test_weights_in_constant_nodes_become_integers_too() -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [8, 8], normal(8, 8).reshape(-1))
    proto = build([node("Constant", [], "w", value=weight), node("MatMul", ["x", "w"], "y")], {"x": [1, 8]}, ["y"])
    made, _ = apply(proto, QuantizeStatic(), data=images(1, 8))
    assert "Constant" not in ops(made)
    assert not [n for n, a in initializers(made).items() if a.dtype == np.float32 and a.ndim > 1]


def test_ir3_models_get_constant_nodes() -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [8, 8], normal(8, 8).reshape(-1))
    proto = build(
        [node("Constant", [], "w", value=weight), node("MatMul", ["x", "w"], "y")],
        {"x": [1, 8]},
        ["y"],
        ir_version=3,
        opset=13,
    )
    feeds = images(1, 8)
    made, _ = apply(proto, QuantizeStatic(), data=feeds)
    assert not made.graph.initializer
    assert worst(proto, made, feeds, on=True) > 25


# -- saturation (u8 x s8 on x86 without VNNI) --


def pmaddubsw(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """u8[k] . s8[k, n] as that instruction adds it: neighbouring products together in saturating int16."""
    products = activations.astype(np.int64)[:, None] * weights.astype(np.int64)
    pairs = products.reshape(-1, 2, weights.shape[1]).sum(axis=1)
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=0)


def test_seven_bits_never_saturate_and_eight_do() -> None:
    """Large neighbouring weights of one sign under saturated activations: the worst case there is."""
    weight = np.abs(normal(64, 16)) + 1
    weight[:, ::2] *= -1
    data = np.full(64, 255, np.uint8)
    exact = data.astype(np.int64) @ round_weight(weight, 1, "s8").data.astype(np.int64)
    assert (pmaddubsw(data, round_weight(weight, 1, "s8").data) != exact).any()
    narrow = round_weight(weight, 1, "s7").data
    np.testing.assert_array_equal(pmaddubsw(data, narrow), data.astype(np.int64) @ narrow.astype(np.int64))
    extreme = np.where(np.arange(64)[:, None] % 3 == 0, -64, 64).astype(np.int8) * np.ones((1, 4), np.int8)
    np.testing.assert_array_equal(pmaddubsw(data, extreme), data.astype(np.int64) @ extreme.astype(np.int64))
    assert np.abs(narrow).max() <= 64


def test_automatic_weights_are_safe_on_every_machine(digits: Any) -> None:
    model, calibration, _, _, _ = digits
    made, entry = apply(model, QuantizeStatic(), data=calibration[:20])
    wide = [c for c in entry.changes if ": s8 weights" in c.detail]
    assert len(wide) == entry.metrics["weight_kinds"].get("s8", 0)
    for array in initializers(made).values():
        if array.dtype == np.int8 and np.abs(array.astype(int)).max(initial=0) > 64:
            # Only a depthwise kernel, [C, 1, k, k], is exact with all eight bits (tools/bench/saturation.py).
            assert array.ndim == 4
            assert array.shape[1] == 1


def test_this_cpu_narrows_to_eight_bits_only_where_nothing_saturates(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.passes import quantize_static
    from graphopt.target import Cpu

    proto, shape = conv(2)
    for saturates in (False, True):
        monkeypatch.setattr(quantize_static, "this_cpu", lambda saturates=saturates: Cpu("c", not saturates, saturates))
        _, entry = apply(proto, QuantizeStatic(), data=images(*shape), this_cpu=True)
        assert ("s8" in entry.metrics["weight_kinds"]) is not saturates
