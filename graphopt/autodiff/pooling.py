"""Pools. What a window gives back is spread by a depthwise ConvTranspose: no scatter, any operator set."""

from __future__ import annotations

import itertools
import math

import numpy as np

from graphopt.autodiff.convolution import Window, padded, spread_back, view, window
from graphopt.autodiff.rules import Call, rule

_LOWEST = float(np.finfo(np.float32).min)


def _window(c: Call) -> Window:
    big, small = c.shape(c.x[0])[2:], c.shape(c.y[0])[2:]
    return window(c, tuple(c.attribute("kernel_shape", [])), big, small)


@rule("AveragePool")
def _average(c: Call) -> None:
    e = c.e
    big, small = c.shape(c.x[0]), c.shape(c.y[0])
    w = _window(c)
    if all(n == 1 for n in small[2:]) and w.kernel == big[2:] and not any(w.before):
        c.give(0, _everywhere(c, 1 / math.prod(big[2:])))
        return
    counts = np.ones(small[2:], np.float64)
    for axis, size in enumerate(big[2:]):
        # with count_include_pad, what the pads attribute says counts; what ceil_mode adds does not
        include = bool(c.attribute("count_include_pad", 0))
        pads = list(c.attribute("pads", [0] * 2 * len(w.kernel)))
        stated = pads[len(w.kernel) + axis] if c.attribute("auto_pad", "NOTSET") == "NOTSET" else max(w.after[axis], 0)
        low, high = (-w.before[axis], size + stated) if include else (0, size)
        offsets = np.arange(w.kernel[axis]) * w.dilation[axis]
        where = np.arange(small[2 + axis])[:, None] * w.stride[axis] - w.before[axis] + offsets
        count = ((where >= low) & (where < high)).sum(axis=1)
        counts = counts * count.reshape([-1 if i == axis else 1 for i in range(len(w.kernel))])
    share = e("Mul", c.grad, e.constant((1 / counts).astype(np.float32)))
    ones = e.constant(np.ones((big[1], 1, *w.kernel), np.float32))
    c.give(0, spread_back(e, share, ones, w, big[2:], small[2:], big[1]))


@rule("MaxPool")
def _max(c: Call) -> None:
    """To the largest of each window, in equal parts where several are."""
    e = c.e
    big, small = c.shape(c.x[0]), c.shape(c.y[0])
    w = _window(c)
    source = padded(e, c.x[0], w, _LOWEST)
    places = list(itertools.product(*(range(k) for k in w.kernel)))
    hits = []
    for place in places:
        equal = e("Equal", view(e, source, w, place, small[2:]), c.y[0])
        hits.append(e("Cast", equal, to=1))
    share = e("Div", c.grad, e.total(hits))
    wide = (small[0], small[1], 1, *small[2:])
    parts = [e.reshape(e("Mul", share, hit), wide) for hit in hits]
    stacked = e.reshape(e.concat(parts, 2), (small[0], small[1] * len(places), *small[2:]))
    unit = np.eye(len(places), dtype=np.float32).reshape(len(places), 1, *w.kernel)
    kernel = e.constant(np.tile(unit, (big[1], *[1] * (unit.ndim - 1))))
    c.give(0, spread_back(e, stacked, kernel, w, big[2:], small[2:], big[1]))


def _everywhere(c: Call, factor: float) -> str:
    return c.e("Expand", c.e.times(c.grad, factor), c.e.integers(c.shape(c.x[0])))


@rule("GlobalAveragePool")
def _global_average(c: Call) -> None:
    c.give(0, _everywhere(c, 1 / math.prod(c.shape(c.x[0])[2:])))


@rule("GlobalMaxPool")
def _global_max(c: Call) -> None:
    e = c.e
    hits = e("Cast", e("Equal", c.x[0], c.y[0]), to=1)
    axes = list(range(2, len(c.shape(c.x[0]))))
    c.give(0, e("Mul", hits, e("Div", c.grad, e.sum(hits, axes, keep=True))))
