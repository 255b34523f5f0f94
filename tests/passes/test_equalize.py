"""equalize: the same bits in float, a better model in integers, and nothing scaled that somebody would notice."""

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
from graphopt.passes.equalize import Equalize
from graphopt.passes.quantize_static import QuantizeStatic
from graphopt.sweeps import attach

CHANNELS = 16
LOUD = 60.0


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def uneven(*shape: int, axis: int = 0) -> np.ndarray:
    """Weights whose outputs are up to sixty times as loud as others."""
    made = rng(shape[axis]).standard_normal(shape).astype(np.float32)
    loud = np.geomspace(1, LOUD, shape[axis]).astype(np.float32)
    return made * loud.reshape([-1 if a == axis else 1 for a in range(len(shape))])


def heard(*shape: int, axis: int = 1) -> np.ndarray:
    """Weights that make up for it: every channel means as much as the others to what reads it."""
    made = rng(shape[axis] + 1).standard_normal(shape).astype(np.float32)
    loud = np.geomspace(1, LOUD, shape[axis]).astype(np.float32)
    return made / loud.reshape([-1 if a == axis else 1 for a in range(len(shape))])


def feeds(shape: tuple[int, ...], count: int = 24) -> list[dict[str, np.ndarray]]:
    return [{"x": rng(i).standard_normal(shape).astype(np.float32)} for i in range(count)]


IMAGE = (1, 4, 9, 9)
ROW = (1, 6, 8)
BIAS = rng(9).standard_normal(CHANNELS).astype(np.float32)
FIRST = {"w": uneven(CHANNELS, 4, 3, 3), "b": BIAS}


def convs(*between: onnx.NodeProto, last: onnx.NodeProto, second: np.ndarray, **more: Any) -> onnx.ModelProto:
    """Conv, ``between`` from h to g, then a layer that reads g with ``second``."""
    return build(
        [node("Conv", ["x", "w", "b"], "h"), *between, last], {"x": IMAGE}, ["y"], {**FIRST, "v": second, **more}
    )


def equalized(
    proto: onnx.ModelProto, *passes: Any, first: Equalize | None = None, count: int = 24
) -> tuple[onnx.ModelProto, LedgerEntry]:
    """Equalize and ``passes`` on a context with its sweeps; the outcome and what Equalize entered."""
    model = load(proto)
    inputs = interface(model)[0]
    data = feeds(tuple(int(d) for d in inputs[0].shape), count)
    context = Context(original=model, threads=1, data=load_data(data, inputs))
    attach(context)
    result = PassManager([first or Equalize(), *passes], raise_preconditions=True).run(model, context)
    assert result.reverted == []
    return to_proto(result.model), result.ledger[0]


def relu(source: str = "h", target: str = "g") -> onnx.NodeProto:
    return node("Relu", [source], target)


DENSE = heard(5, CHANNELS, 1, 1)
WORTH = {
    "dense": convs(relu(), last=node("Conv", ["g", "v"], "y"), second=DENSE),
    "nothing between": convs(last=node("Conv", ["h", "v"], "y"), second=DENSE),
    "leaky": convs(node("LeakyRelu", ["h"], "g", alpha=0.1), last=node("Conv", ["g", "v"], "y"), second=DENSE),
    "prelu": convs(
        node("PRelu", ["h", "s"], "g"),
        last=node("Conv", ["g", "v"], "y"),
        second=DENSE,
        s=np.linspace(0.1, 0.4, CHANNELS, dtype=np.float32).reshape(CHANNELS, 1, 1),
    ),
    "depthwise": convs(
        relu(),
        last=node("Conv", ["g", "v"], "y", group=CHANNELS),
        second=heard(CHANNELS, 1, 3, 3, axis=0),
    ),
    "grouped": convs(
        relu(),
        last=node("Conv", ["g", "v"], "y", group=4),
        second=np.concatenate([heard(2, CHANNELS, 3, 3)[:, 4 * g : 4 * g + 4] for g in range(4)]),
    ),
    "transposed": convs(relu(), last=node("ConvTranspose", ["g", "v"], "y"), second=heard(CHANNELS, 3, 2, 2, axis=0)),
    "transposed, grouped": convs(
        relu(), last=node("ConvTranspose", ["g", "v"], "y", group=2), second=heard(CHANNELS, 3, 2, 2, axis=0)
    ),
    "pooled": convs(
        relu("h", "r"),
        node("MaxPool", ["r"], "m", kernel_shape=[2, 2]),
        node("AveragePool", ["m"], "g", kernel_shape=[2, 2]),
        last=node("Conv", ["g", "v"], "y"),
        second=DENSE,
    ),
    "gemm": build(
        [node("Gemm", ["x", "w", "b"], "h", transB=1, alpha=0.5, beta=2.0), relu(), node("Gemm", ["g", "v"], "y")],
        {"x": (6, 8)},
        ["y"],
        {"w": uneven(CHANNELS, 8), "b": BIAS, "v": heard(CHANNELS, 5, axis=0)},
    ),
    "matmul": build(
        [
            node("MatMul", ["x", "w"], "p"),
            node("Add", ["b", "p"], "h"),
            relu(),
            node("MatMul", ["g", "v"], "y"),
        ],
        {"x": ROW},
        ["y"],
        {"w": uneven(8, CHANNELS, axis=1), "b": BIAS, "v": heard(CHANNELS, 5, axis=0)},
    ),
}


@pytest.mark.parametrize("kind", WORTH)
def test_not_one_bit_changes_and_the_channels_are_even(kind: str) -> None:
    proto = WORTH[kind]
    result, entry = equalized(proto)
    assert len(entry.changes) == 1
    assert ops(result) == ops(proto)
    for feed in feeds(tuple(d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim), 4):
        np.testing.assert_array_equal(run(result, feed)["y"], run(proto, feed)["y"])
    was = initializers(proto)["w"]
    factor = next(a for n, a in initializers(result).items() if n.startswith("w")) / was
    assert np.array_equal(np.exp2(np.rint(np.log2(factor))), factor)  # powers of two
    assert factor.max() >= 8 * factor.min()


@pytest.mark.parametrize("kind", WORTH)
def test_the_integer_model_is_better_for_it(kind: str) -> None:
    proto = WORTH[kind]
    shape = tuple(d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim)
    found = {}
    for way, first in (("plain", Equalize(exclude=("*",))), ("equalized", Equalize())):
        result, _ = equalized(proto, QuantizeStatic(weights="s8"), first=first)
        unseen = feeds(shape, 60)[50:]
        axis = 2 if len(shape) == 4 else -1
        wanted, got = (np.moveaxis([run(m, f)["y"] for f in unseen], axis, 0) for m in (proto, result))
        found[way] = np.mean([sqnr(a, b) for a, b in zip(wanted, got, strict=True)])  # whoever reads it hears all
    assert found["equalized"] > found["plain"] + 1


def test_every_reader_takes_part() -> None:
    proto = build(
        [
            node("Conv", ["x", "w", "b"], "h"),
            relu(),
            node("Conv", ["g", "v"], "y"),
            node("Conv", ["g", "u"], "z", group=CHANNELS),
        ],
        {"x": IMAGE},
        ["y", "z"],
        {**FIRST, "v": DENSE, "u": heard(CHANNELS, 1, 3, 3, axis=0)},
    )
    result, entry = equalized(proto)
    assert "2 readers" in entry.changes[0].detail
    for feed in feeds(IMAGE, 4):
        for name, expected in run(proto, feed).items():
            np.testing.assert_array_equal(run(result, feed)[name], expected)


NOTICED = {
    "an output": build(
        [node("Conv", ["x", "w", "b"], "h"), relu(), node("Conv", ["g", "v"], "y")],
        {"x": IMAGE},
        ["y", "g"],
        {**FIRST, "v": DENSE},
    ),
    "hard-swish": convs(node("HardSwish", ["h"], "g"), last=node("Conv", ["g", "v"], "y"), second=DENSE),
    "clip": convs(
        node("Clip", ["h", "", "six"], "g"),
        last=node("Conv", ["g", "v"], "y"),
        second=DENSE,
        six=np.float32(6),
    ),
    "another operand": convs(
        node("Add", ["h", "c"], "g"), last=node("Conv", ["g", "v"], "y"), second=DENSE, c=np.float32(1)
    ),
    "shared weight": build(
        [
            node("Conv", ["x", "w", "b"], "h"),
            relu(),
            node("Conv", ["g", "v"], "y"),
            node("Conv", ["g", "v"], "z"),
        ],
        {"x": IMAGE},
        ["y", "z"],
        {**FIRST, "v": DENSE},
    ),
    "nothing of it": build(
        [node("Gemm", ["x", "w"], "h"), node("Gemm", ["h", "v"], "y", alpha=0.0)],
        {"x": (6, 8)},
        ["y"],
        {"w": uneven(8, CHANNELS, axis=1), "v": heard(CHANNELS, 5, axis=0)},
    ),
    "not all of it": convs(
        node("Flatten", ["h"], "f"), last=node("Gemm", ["f", "v"], "y"), second=heard(CHANNELS * 49, 5, axis=0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOTICED)
def test_what_would_be_noticed_is_left_alone(kind: str) -> None:
    _, entry = equalized(NOTICED[kind])
    assert entry.changes == []


def test_even_channels_are_left_alone_with_the_reason() -> None:
    even = rng(3).standard_normal((CHANNELS, 4, 3, 3)).astype(np.float32)
    proto = build(
        [node("Conv", ["x", "w"], "h"), relu(), node("Conv", ["g", "v"], "y")],
        {"x": IMAGE},
        ["y"],
        {"w": even, "v": rng(4).standard_normal((5, CHANNELS, 1, 1)).astype(np.float32)},
    )
    _, entry = equalized(proto)
    assert entry.changes == []
    assert reasons(entry) == {"n_h": "its output's channels are even enough"}


def test_channels_that_never_speak_stay_as_they_are() -> None:
    quiet = FIRST["w"].copy()
    quiet[-3:] = 0
    proto = build(
        [node("Conv", ["x", "w", "b"], "h"), relu(), node("Conv", ["g", "v"], "y")],
        {"x": IMAGE},
        ["y"],
        {"w": quiet, "b": np.where(np.arange(CHANNELS) < CHANNELS - 3, BIAS, 0).astype(np.float32), "v": DENSE},
    )
    result, entry = equalized(proto)
    assert len(entry.changes) == 1
    for feed in feeds(IMAGE, 4):
        np.testing.assert_array_equal(run(result, feed)["y"], run(proto, feed)["y"])


def test_layers_to_exclude_are_left_alone() -> None:
    proto = WORTH["dense"]
    assert equalized(proto, first=Equalize(exclude=("Conv",)))[1].changes == []


def test_it_needs_data() -> None:
    model = load(WORTH["dense"])
    with pytest.raises(PreconditionError, match="needs calibration data; give --data FILE"):
        PassManager([Equalize()], raise_preconditions=True).run(model, Context(original=model))
