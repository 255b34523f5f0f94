"""Normalizations and softmaxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from graphopt.autodiff.emit import Shape
from graphopt.autodiff.rules import Call, rule


@rule("BatchNormalization")
def _batch(c: Call) -> None:
    """Mean and variance are those stored: frozen."""
    e = c.e
    shape = c.shape(c.x[0])
    if c.attribute("training_mode", 0) or c.wants(3) or c.wants(4):
        raise NotImplementedError("it takes its mean and variance from the batch, or they are trained")
    line = (1, shape[1], *[1] * (len(shape) - 2))
    axes = [0, *range(2, len(shape))]
    spread = e("Sqrt", e("Add", c.x[4], e.number(c.attribute("epsilon", 1e-5))))
    if c.wants(0):
        c.give(0, e("Mul", c.grad, e.reshape(e("Div", c.x[1], spread), line)))
    if c.wants(1):
        centred = e("Sub", c.x[0], e.reshape(c.x[3], line))
        c.give(1, e("Div", e.sum(e("Mul", c.grad, centred), axes, keep=False), spread))
    if c.wants(2):
        c.give(2, e.sum(c.grad, axes, keep=False))


def _standardized(c: Call, x: str, axes: Sequence[int], epsilon: float) -> tuple[str, str]:
    """(x with mean 0 and variance 1 over ``axes``, what it was multiplied by)."""
    e = c.e
    centred = e("Sub", x, e.reduce("ReduceMean", x, axes))
    variance = e.reduce("ReduceMean", e("Mul", centred, centred), axes)
    inverse = e("Reciprocal", e("Sqrt", e("Add", variance, e.number(epsilon))))
    return e("Mul", centred, inverse), inverse


def _through(c: Call, g: str, normal: str, inverse: str, axes: Sequence[int]) -> str:
    """The gradient of what was standardized, from that of the result."""
    e = c.e
    along = e("Mul", normal, e.reduce("ReduceMean", e("Mul", g, normal), axes))
    return e("Mul", inverse, e("Sub", e("Sub", g, e.reduce("ReduceMean", g, axes)), along))


@rule("LayerNormalization")
def _layer(c: Call) -> None:
    e = c.e
    if any(g is not None for g in c.g[1:]):
        raise NotImplementedError("its mean or deviation is read")
    shape = c.shape(c.x[0])
    axis = int(c.attribute("axis", -1)) % len(shape)
    axes = list(range(axis, len(shape)))
    normal, inverse = _standardized(c, c.x[0], axes, c.attribute("epsilon", 1e-5))
    if c.wants(0):
        c.give(0, _through(c, e("Mul", c.grad, c.x[1]), normal, inverse, axes))
    if c.wants(1):
        c.give(1, e.sum_to(e("Mul", c.grad, normal), shape, c.shape(c.x[1])))
    if c.wants(2):
        c.give(2, e.sum_to(c.grad, shape, c.shape(c.x[2])))


@rule("InstanceNormalization")
def _instance(c: Call) -> None:
    _per_group(c, c.shape(c.x[0])[1])


@rule("GroupNormalization")
def _group(c: Call) -> None:
    _per_group(c, int(c.attribute("num_groups", 1)))


def _per_group(c: Call, groups: int) -> None:
    e = c.e
    shape = c.shape(c.x[0])
    inner = (shape[0], groups, shape[1] // groups * math.prod(shape[2:]))
    normal, inverse = _standardized(c, e.reshape(c.x[0], inner), [2], c.attribute("epsilon", 1e-5))
    line: Shape = (1, shape[1], *[1] * (len(shape) - 2))
    axes = [0, *range(2, len(shape))]
    per_channel = c.shape(c.x[1]) == (shape[1],)  # GroupNormalization 18 had one per group

    def summed(name: str) -> str:
        found = e.sum(name, axes, keep=False)
        return found if per_channel else e.sum(e.reshape(found, (groups, shape[1] // groups)), [1], keep=False)

    if c.wants(0):
        scale = c.x[1]
        if not per_channel:
            scale = e("Expand", e.reshape(scale, (groups, 1)), e.integers((groups, shape[1] // groups)))
        g = e.reshape(e("Mul", c.grad, e.reshape(scale, line)), inner)
        c.give(0, e.reshape(_through(c, g, normal, inverse, [2]), shape))
    if c.wants(1):
        c.give(1, summed(e("Mul", c.grad, e.reshape(normal, shape))))
    if c.wants(2):
        c.give(2, summed(c.grad))


def _softmax_frame(c: Call) -> tuple[Shape | None, int]:
    """(the shape it is computed in where that is another one, the axis): below opset 13 everything from ``axis`` on."""
    shape = c.shape(c.x[0])
    if c.e.opset >= 13:
        return None, int(c.attribute("axis", -1)) % len(shape)
    axis = int(c.attribute("axis", 1)) % len(shape)
    return (math.prod(shape[:axis]), math.prod(shape[axis:])), 1


@rule("Softmax")
def _softmax(c: Call) -> None:
    e = c.e
    frame, axis = _softmax_frame(c)
    g, y = (c.grad, c.y[0]) if frame is None else (e.reshape(c.grad, frame), e.reshape(c.y[0], frame))
    product = e("Mul", g, y)
    found = e("Sub", product, e("Mul", y, e.sum(product, [axis], keep=True)))
    c.give(0, found if frame is None else e.reshape(found, c.shape(c.x[0])))


@rule("LogSoftmax")
def _log_softmax(c: Call) -> None:
    e = c.e
    frame, axis = _softmax_frame(c)
    g, y = (c.grad, c.y[0]) if frame is None else (e.reshape(c.grad, frame), e.reshape(c.y[0], frame))
    found = e("Sub", g, e("Mul", e("Exp", y), e.sum(g, [axis], keep=True)))
    c.give(0, found if frame is None else e.reshape(found, c.shape(c.x[0])))


@rule("LpNormalization")
def _lp(c: Call) -> None:
    e = c.e
    axis = int(c.attribute("axis", -1)) % len(c.shape(c.x[0]))
    dot = e.sum(e("Mul", c.grad, c.y[0]), [axis], keep=True)
    if int(c.attribute("p", 2)) == 1:
        norm = e.sum(e("Abs", c.x[0]), [axis], keep=True)
        along = e("Mul", e("Sign", c.x[0]), dot)
    else:
        norm = e("Sqrt", e.sum(e("Mul", c.x[0], c.x[0]), [axis], keep=True))
        along = e("Mul", c.y[0], dot)
    c.give(0, e("Div", e("Sub", c.grad, along), norm))
