"""What ONNX Runtime fuses in float stays fused behind a dequantized value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support import build, node, ops, optimized, run, sqnr

import graphopt

CHANNELS = 8


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def net(*between: onnx.NodeProto, outputs: tuple[str, ...] = ("y",), **more: Any) -> onnx.ModelProto:
    """Conv to c, ``between`` from c to g, Conv."""
    weights = {
        "w": rng(1).standard_normal((CHANNELS, 3, 3, 3)).astype(np.float32),
        "v": rng(2).standard_normal((CHANNELS, CHANNELS, 3, 3)).astype(np.float32),
        **more,
    }
    nodes = [node("Conv", ["x", "w"], "c"), *between, node("Conv", ["g", "v"], "y")]
    return build(nodes, {"x": (1, 3, 12, 12)}, list(outputs), weights)


def gelu(source: str = "c", target: str = "g") -> list[onnx.NodeProto]:
    return [
        node("Div", [source, "root"], "d"),
        node("Erf", ["d"], "e"),
        node("Add", ["e", "one"], "p"),
        node("Mul", [source, "p"], "m"),
        node("Mul", ["m", "half"], target),
    ]


GELU = {"root": np.float32(np.sqrt(2)), "one": np.float32(1), "half": np.float32(0.5)}


def samples(count: int = 48) -> list[dict[str, np.ndarray]]:
    return [{"x": rng(i).standard_normal((1, 3, 12, 12)).astype(np.float32)} for i in range(count)]


def quantized(proto: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
    made: onnx.ModelProto = graphopt.quantize(
        proto, data=samples(), time=0, threads=1, allow_slower=True, min_sqnr=1, **options
    ).model
    return made


def test_a_gelu_stays_one(tmp_path: Path) -> None:
    proto = net(*gelu(), **GELU)
    made = quantized(proto)
    assert ops(made).count("Mean") == 1
    ran = ops(optimized(made, tmp_path))
    assert ran.count("Gelu") == 1
    assert "Erf" not in ran
    for feed in samples(3):
        assert sqnr(run(proto, feed)["y"], run(made, feed, optimize=True)["y"]) > 20


@pytest.mark.parametrize(
    ("between", "more"),
    [
        ([node("Sin", ["c"], "a"), node("Tanh", ["c"], "b"), node("Mul", ["a", "b"], "g")], {}),  # nothing fuses these
        ([node("Tanh", ["c"], "g")], {}),  # one reader
    ],
)
def test_what_is_not_fused_is_not_copied(between: list[onnx.NodeProto], more: dict[str, Any]) -> None:
    assert "Mean" not in ops(quantized(net(*between, **more)))


def test_an_integer_reader_beside_it_reads_no_copy(tmp_path: Path) -> None:
    proto = net(*gelu(), node("Conv", ["c", "v"], "z"), outputs=("y", "z"), **GELU)
    made = quantized(proto)
    assert ops(made).count("Mean") == 1
    ran = ops(optimized(made, tmp_path))
    assert (ran.count("Gelu"), ran.count("QLinearConv")) == (1, 3)


def test_other_runtimes_get_none() -> None:
    assert "Mean" not in ops(quantized(net(*gelu(), **GELU), target="openvino"))
