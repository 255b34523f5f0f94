"""QuantizeLinear and DequantizeLinear by straight-through estimation, with learned scales.

Rounding counts as the identity, and what is outside the range gets nothing (Bengio et al. 2013). The gradient of a
scale is that of LSQ (Esser et al. 2020, eq. 3): ``round(x / s) - x / s`` inside the range, its bound outside. Both
operators of a pair follow at once: ``sum(g (y - x inside)) / s``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from graphopt.autodiff.emit import Shape
from graphopt.autodiff.rules import Call, rule

_LIMITS = {2: (0, 255), 3: (-128, 127), 4: (0, 65535), 5: (-32768, 32767), 21: (0, 15), 22: (-8, 7)}
"""ONNX's number of an integer type -> its range."""


def _line(c: Call, name: str, shape: Shape, axis: int) -> str:
    """A scale or zero point so that it broadcasts against ``shape``."""
    size = c.shape(name)
    if math.prod(size) == 1 or not size:
        return c.e.reshape(name, ()) if size else name
    if len(size) > 1:
        raise NotImplementedError("scales per block")
    return c.e.reshape(name, [size[0] if i == axis else 1 for i in range(len(shape))])


@rule("DequantizeLinear")
def _dequantize(c: Call) -> None:
    e = c.e
    before = c.producers.get(c.x[0])
    if before is None or before.op_type != "QuantizeLinear":
        if c.wants(0):
            raise NotImplementedError("what it reads is no QuantizeLinear")
        _integer_scale(c)
        return
    if list(before.input[1:3]) != c.x[1:3]:
        raise NotImplementedError("it does not take the scale and zero point of the QuantizeLinear before it")
    x, shape = before.input[0], c.shape(c.y[0])
    axis = int(c.attribute("axis", 1)) % max(len(shape), 1)
    low, high = _LIMITS[c.kinds[c.x[0]]]
    zero: Any = c.constants.get(c.x[2]) if c.has(2) else np.float32(0)
    if zero is None:
        raise NotImplementedError("its zero point is computed")
    scale = _line(c, c.x[1], shape, axis)
    offset = np.asarray(zero, np.float32)
    if offset.size == 1:
        offset = offset.reshape(())
    else:
        offset = offset.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    # Half a step beyond the last integer still rounds to it.
    lowest = e("Mul", scale, e.constant(np.float32(low - 0.5) - offset))
    highest = e("Mul", scale, e.constant(np.float32(high + 0.5) - offset))
    inside = e("And", e("Greater", x, lowest), e("Less", x, highest))
    passed = e.mask(inside, c.grad)
    if c.active(x):
        c.give_value(x, passed)
    if c.wants(1):
        size = c.shape(c.x[1])
        if math.prod(size) == 1:  # two dot products: no tensor of their terms is ever written
            there = _dot(c, c.grad, c.y[0], shape)
            found = e("Div", e("Sub", there, _dot(c, passed, x, shape)), e.reshape(c.x[1], (1, 1)))
            c.give(1, e.reshape(found, size))
        else:
            terms = e("Sub", e("Mul", c.grad, c.y[0]), e("Mul", passed, x))
            summed = e.sum(terms, [i for i in range(len(shape)) if i != axis], keep=False)
            c.give(1, e("Div", summed, c.x[1]))


def _dot(c: Call, a: str, b: str, shape: Shape) -> str:
    count = math.prod(shape)
    return c.e("MatMul", c.e.reshape(a, (1, count)), c.e.reshape(b, (count, 1)))


def _integer_scale(c: Call) -> None:
    """Stored integers: only the scale can learn."""
    e, shape = c.e, c.shape(c.y[0])
    axis = int(c.attribute("axis", 1)) % max(len(shape), 1)
    if not c.wants(1):
        return
    size = c.shape(c.x[1])
    others = [i for i in range(len(shape)) if i != axis or math.prod(size) == 1]
    summed = e.sum(e("Mul", c.grad, c.y[0]), others, keep=False)
    c.give(1, e("Div", e.reshape(summed, size), c.x[1]))


@rule("QuantizeLinear")
def _quantize(c: Call) -> None:
    """Nothing arrives here: the DequantizeLinear behind has given it all back already."""
    raise NotImplementedError("its integers are read by something else than a DequantizeLinear")
