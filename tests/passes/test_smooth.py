"""smooth: the same bits in float, a better model in integers, and no Mul where it would not be worth it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from support import build, initializers, node, ops, reasons, run, sqnr

from graphopt.base import Context
from graphopt.data import load_data
from graphopt.errors import PreconditionError
from graphopt.manager import LedgerEntry, PassManager
from graphopt.model import interface, load, to_proto
from graphopt.passes.quantize_static import QuantizeStatic
from graphopt.passes.smooth import Smooth
from graphopt.sweeps import attach, hold_back

WIDTH = 48
LOUD = (3, 17)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def feeds(*, loud: bool = True, count: int = 24) -> list[dict[str, np.ndarray]]:
    """Rows [16, WIDTH], two channels of which are sixty times as loud as the rest."""
    data = rng().standard_normal((count, 16, WIDTH)).astype(np.float32)
    if loud:
        data[:, :, LOUD] *= 60
    return [{"x": row[None]} for row in data]


def weights(**more: Any) -> dict[str, Any]:
    made = rng().standard_normal((WIDTH, 32)).astype(np.float32)
    made[list(LOUD)] /= 60  # what is loud means no more than the rest
    return {"w": made, **more}


def matmul(**more: Any) -> onnx.ModelProto:
    return build([node("MatMul", ["x", "w"], "y")], {"x": (1, 16, WIDTH)}, ["y"], weights(**more))


def smoothed(
    proto: onnx.ModelProto, data: list[dict[str, np.ndarray]], *passes: Any, first: Smooth | None = None
) -> tuple[onnx.ModelProto, LedgerEntry]:
    """Smooth and ``passes`` on a context with its sweeps; the outcome and what Smooth entered."""
    model = load(proto)
    context = Context(original=model, threads=1, data=load_data(data, interface(model)[0]))
    attach(context)
    result = PassManager([first or Smooth(), *passes], raise_preconditions=True).run(model, context)
    assert result.reverted == []
    return to_proto(result.model), result.ledger[0]


def same_bits(a: onnx.ModelProto, b: onnx.ModelProto, data: list[dict[str, np.ndarray]]) -> None:
    for feed in data[:4]:
        for name, expected in run(a, feed).items():
            np.testing.assert_array_equal(run(b, feed)[name], expected)


def test_not_one_bit_changes_and_the_channels_are_even() -> None:
    proto, data = matmul(), feeds()
    result, entry = smoothed(proto, data)
    assert len(entry.changes) == 1
    assert ops(result) == ["Mul", "MatMul"]
    same_bits(proto, result, data)
    factor = next(a for n, a in initializers(result).items() if "smoothing" in n)
    assert np.array_equal(np.exp2(np.rint(np.log2(factor))), factor)  # powers of two
    assert factor[list(LOUD)].max() < np.delete(factor, LOUD).min() / 8


def test_the_integer_model_is_better_for_it() -> None:
    proto, data = matmul(), feeds(count=40)
    model = load(proto)
    context = Context(original=model, threads=1, data=load_data(data[:24], interface(model)[0]))
    attach(context)
    step = QuantizeStatic()
    without = to_proto(PassManager([step]).run(model, context).model)
    with_it, _ = smoothed(proto, data[:24], step)
    found = [
        sqnr(*(np.stack([run(m, feed)["y"] for feed in data[24:]]) for m in (proto, quantized)))
        for quantized in (without, with_it)
    ]
    assert found[1] > found[0] + 10


def test_even_channels_are_left_alone_and_listed() -> None:
    even = build(
        [node("MatMul", ["x", "w"], "y")],
        {"x": (1, 16, WIDTH)},
        ["y"],
        {"w": rng().standard_normal((WIDTH, 32), np.float32)},
    )
    result, entry = smoothed(even, feeds(loud=False))
    assert ops(result) == ["MatMul"]
    assert reasons(entry) == {"n_y": "MatMul: its input's channels are even enough"}


def normed(*, residual: bool) -> onnx.ModelProto:
    """LayerNormalization with two loud channels, read by two MatMuls and, where ``residual``, by an Add."""
    gamma = np.ones(WIDTH, np.float32)
    gamma[list(LOUD)] = 60
    nodes = [
        node("LayerNormalization", ["x", "gamma", "beta"], "n"),
        node("MatMul", ["n", "w"], "a"),
        node("MatMul", ["n", "w2"], "b"),
    ]
    if residual:
        nodes.append(node("Add", ["n", "x"], "y"))
    arrays = weights(gamma=gamma, beta=np.ones(WIDTH, np.float32), w2=weights()["w"][:, :8].copy())
    return build(nodes, {"x": (1, 16, WIDTH)}, ["a", "b", "y"] if residual else ["a", "b"], arrays)


def test_the_norm_in_front_takes_the_scale_where_nobody_else_reads_it() -> None:
    proto, data = normed(residual=False), feeds(loud=False)
    result, entry = smoothed(proto, data)
    assert ops(result) == ops(proto)
    assert "LayerNormalization" in entry.changes[0].detail
    same_bits(proto, result, data)


def test_a_mul_where_a_residual_reads_it_too() -> None:
    proto, data = normed(residual=True), feeds(loud=False)
    result, entry = smoothed(proto, data)
    assert ops(result).count("Mul") == 1
    assert "2 layers, by a Mul in front" in entry.changes[0].detail
    same_bits(proto, result, data)


def test_a_gemm_that_transposes_its_weight() -> None:
    stored = weights()["w"].T.copy()
    proto = build([node("Gemm", ["x", "w"], "y", transB=1)], {"x": (16, WIDTH)}, ["y"], {"w": stored})
    data = [{"x": feed["x"][0]} for feed in feeds()]
    result, entry = smoothed(proto, data)
    assert len(entry.changes) == 1
    same_bits(proto, result, data)


def test_a_shared_weight_is_left_alone() -> None:
    nodes = [node("MatMul", ["x", "w"], "y"), node("Relu", ["x"], "r"), node("MatMul", ["r", "w"], "z")]
    proto = build(nodes, {"x": (1, 16, WIDTH)}, ["y", "z"], weights())
    result, entry = smoothed(proto, feeds())
    assert entry.changes == []
    assert ops(result) == ops(proto)


def test_without_data_it_says_so() -> None:
    model = load(matmul())
    with pytest.raises(PreconditionError, match="needs calibration data; give --data"):
        PassManager([Smooth()], raise_preconditions=True).run(model, Context(original=model, threads=1))


def test_what_is_held_back_does_not_depend_on_the_order() -> None:
    data = feeds(count=12)
    inputs = interface(load(matmul()))[0]
    parts = [hold_back(load_data(order, inputs), inputs) for order in (data, data[::-1])]
    held = [{sample["x"].tobytes() for sample in held} for _, held in parts]
    assert held[0] == held[1]
    assert len(held[0]) == 3
    assert not held[0] & {sample["x"].tobytes() for sample in parts[0][0]}


def test_an_excluded_layer_is_left_alone() -> None:
    proto, data = matmul(), feeds()
    result, entry = smoothed(proto, data, first=Smooth(exclude=("MatMul",)))
    assert entry.changes == []
    assert ops(result) == ["MatMul"]


def test_layers_that_make_only_zeros_are_left_alone() -> None:
    """No error to begin with is none to halve."""
    proto = matmul(w=np.zeros((WIDTH, 32), np.float32))
    after, entry = smoothed(proto, feeds())
    assert ops(after) == ["MatMul"]
    assert "even enough" in reasons(entry)["n_y"]
