"""A Mul by a factor per channel runs in integers between integer layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support import apply, build, node, ops, optimized, run, sqnr

from graphopt.passes.quantize_static import QuantizeStatic

CHANNELS = 8


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def net(*gate: onnx.NodeProto, **more: Any) -> onnx.ModelProto:
    """Conv, a gate of it called ``s``, Mul, Conv."""
    weights = {
        "w": rng(1).standard_normal((CHANNELS, 3, 3, 3)).astype(np.float32),
        "u": rng(2).standard_normal((CHANNELS, CHANNELS, 1, 1)).astype(np.float32),
        "v": rng(3).standard_normal((CHANNELS, CHANNELS, 3, 3)).astype(np.float32),
        **more,
    }
    nodes = [node("Conv", ["x", "w"], "c"), *gate, node("Mul", ["c", "s"], "g"), node("Conv", ["g", "v"], "y")]
    return build(nodes, {"x": (1, 3, 12, 12)}, ["y"], weights)


def samples(count: int = 12) -> list[dict[str, np.ndarray]]:
    return [{"x": rng(i).standard_normal((1, 3, 12, 12)).astype(np.float32)} for i in range(count)]


def squeeze(activation: str) -> list[onnx.NodeProto]:
    return [node("GlobalAveragePool", ["c"], "p"), node("Conv", ["p", "u"], "q"), node(activation, ["q"], "s")]


@pytest.mark.parametrize("activation", ["Sigmoid", "HardSigmoid"])
def test_squeeze_and_excite_is_integer(activation: str, tmp_path: Path) -> None:
    proto = net(*squeeze(activation))
    made, _ = apply(proto, QuantizeStatic(), data=samples())
    assert ops(optimized(made, tmp_path)).count("QLinearMul") == 1
    for feed in samples(3):
        assert sqnr(run(proto, feed)["y"], run(made, feed, optimize=True)["y"]) > 25


def test_a_gate_as_large_as_the_value_stays_in_float(tmp_path: Path) -> None:
    made, _ = apply(net(node("Sigmoid", ["c"], "s")), QuantizeStatic(), data=samples())
    assert "QLinearMul" not in ops(optimized(made, tmp_path))


def test_a_factor_of_any_size_stays_in_float(tmp_path: Path) -> None:
    proto = net(node("GlobalAveragePool", ["c"], "p"), node("Exp", ["p"], "s"))
    assert "QLinearMul" not in ops(optimized(apply(proto, QuantizeStatic(), data=samples())[0], tmp_path))
