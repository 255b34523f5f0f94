"""Conv and ConvTranspose, in any number of dims.

The gradient of the input is a ConvTranspose (and the other way round). That of the weight is a product per place of the
kernel, of a strided slice of the input with the output's gradient: ONNX Runtime multiplies matrices much faster than it
convolves with a kernel as large as a picture, and depthwise even a plain product and a sum is faster.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from graphopt.autodiff.emit import Emitter, Shape
from graphopt.autodiff.rules import Call, rule

_PLACES = 64
"""Kernels with more places than this get their gradient from one convolution (long filters of audio models)."""


@dataclass(frozen=True)
class Window:
    """How a kernel moves: one number per spatial dim each; ``before`` and ``after`` are the padding."""

    kernel: Shape
    stride: Shape
    dilation: Shape
    before: Shape
    after: Shape


def window(c: Call, kernel: Shape, big: Shape, small: Shape) -> Window:
    """The window of a node that slides over ``big`` (spatial dims) and stops ``small`` times.

    The amount of padding at the end is whatever the stops need: that covers ``auto_pad`` and ``ceil_mode`` too.
    """
    dims = len(kernel)
    stride = tuple(c.attribute("strides", [1] * dims))
    dilation = tuple(c.attribute("dilations", [1] * dims))
    pads = list(c.attribute("pads", [0] * 2 * dims))
    auto = c.attribute("auto_pad", "NOTSET")
    reach = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(small, stride, kernel, dilation, strict=True)]
    before = pads[:dims]
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [max(0, r - b) for r, b in zip(reach, big, strict=True)]
        before = [t // 2 if auto == "SAME_UPPER" else t - t // 2 for t in total]
    elif auto == "VALID":
        before = [0] * dims
    after = tuple(r - b - p for r, b, p in zip(reach, big, before, strict=True))
    return Window(kernel, stride, dilation, tuple(before), after)


def padded(e: Emitter, value: str, w: Window, value_outside: float = 0.0) -> str:
    """``value`` [N, C, spatial] with the window's padding; where that is negative the rest is never looked at."""
    return e.pad(value, [0, 0, *(max(p, 0) for p in w.before)], [0, 0, *(max(p, 0) for p in w.after)], value_outside)


def view(e: Emitter, value: str, w: Window, place: Shape, small: Shape) -> str:
    """What the kernel's ``place`` meets, [N, C, small]: a strided slice of the padded input."""
    starts = [k * d for k, d in zip(place, w.dilation, strict=True)]
    ends = [s + (n - 1) * t + 1 for s, n, t in zip(starts, small, w.stride, strict=True)]
    return e.slice(value, range(2, 2 + len(place)), starts, ends, w.stride)


def spread_back(e: Emitter, gradient: str, weight: str, w: Window, big: Shape, small: Shape, group: int) -> str:
    """The transposed convolution that gives [N, C, big] back from [N, O, small]."""
    extra = [max(-p, 0) for p in w.after]
    pads = [*w.before, *(max(p, 0) for p in w.after)]
    attributes: dict[str, Any] = {"strides": w.stride, "dilations": w.dilation, "pads": pads, "group": group}
    fitting = all(x < max(s, d) for x, s, d in zip(extra, w.stride, w.dilation, strict=True))
    if any(extra) and fitting:
        attributes["output_padding"] = extra
    found = e("ConvTranspose", gradient, weight, kernel_shape=w.kernel, **attributes)
    return found if fitting else e.pad(found, [0] * (2 + len(big)), [0, 0, *extra])


def correlate(e: Emitter, big_value: str, small_value: str, w: Window, big: Shape, small: Shape, group: int) -> str:
    """The weight's gradient [O, C / group, kernel]: of ``small`` [N, O, ...] with what each place met of ``big``."""
    batch, channels, outputs = big[0], big[1], small[1]
    inner, outer = channels // group, outputs // group
    spots = math.prod(small[2:])
    source = padded(e, big_value, w)
    if math.prod(w.kernel) > _PLACES and group == 1:
        return _by_convolution(e, source, small_value, w, big, small)
    if inner == 1 and outer == 1:
        return _depthwise(e, source, small_value, w, small)
    g = e.reshape(small_value, (batch, group, outer, spots))
    parts = []
    whole = all(k == 1 for k in w.kernel) and all(s == 1 for s in w.stride) and source == big_value
    for place in itertools.product(*(range(k) for k in w.kernel)):
        seen = source if whole and big[2:] == small[2:] else view(e, source, w, place, small[2:])
        columns = e.transpose(e.reshape(seen, (batch, group, inner, spots)), [0, 1, 3, 2])
        product = e("MatMul", g, columns)  # [batch, group, outer, inner]
        summed = e.sum(product, [0], keep=False) if batch != 1 else product
        parts.append(e.reshape(summed, (1, outputs, inner)))
    return e.reshape(e.transpose(e.concat(parts, 0), [1, 2, 0]), (outputs, inner, *w.kernel))


def _depthwise(e: Emitter, source: str, small_value: str, w: Window, small: Shape) -> str:
    axes = [0, *range(2, len(small))]
    parts = []
    for place in itertools.product(*(range(k) for k in w.kernel)):
        product = e("Mul", small_value, view(e, source, w, place, small[2:]))
        parts.append(e.reshape(e.sum(product, axes, keep=False), (1, small[1])))
    return e.reshape(e.transpose(e.concat(parts, 0), [1, 0]), (small[1], 1, *w.kernel))


def _by_convolution(e: Emitter, source: str, small_value: str, w: Window, big: Shape, small: Shape) -> str:
    """Batch and channels exchanged, stride and dilation too; cut to the kernel's size."""
    turn = [1, 0, *range(2, len(small))]
    found = e(
        "Conv",
        e.transpose(source, turn),
        e.transpose(small_value, turn),
        kernel_shape=list(small[2:]),
        strides=w.dilation,
        dilations=w.stride,
    )
    cut = e.slice(found, range(2, len(small)), [0] * len(w.kernel), w.kernel, [1] * len(w.kernel))
    return e.transpose(cut, turn)


@rule("Conv")
def _conv(c: Call) -> None:
    e = c.e
    big, small, weight = c.shape(c.x[0]), c.shape(c.y[0]), c.shape(c.x[1])
    group = int(c.attribute("group", 1))
    w = window(c, weight[2:], big[2:], small[2:])
    if c.wants(0):
        c.give(0, spread_back(e, c.grad, c.x[1], w, big[2:], small[2:], group))
    if c.wants(1):
        c.give(1, correlate(e, c.x[0], c.grad, w, big, small, group))
    if c.wants(2):
        c.give(2, e.sum(c.grad, [0, *range(2, len(small))], keep=False))


@rule("ConvTranspose")
def _conv_transpose(c: Call) -> None:
    e = c.e
    small, big, weight = c.shape(c.x[0]), c.shape(c.y[0]), c.shape(c.x[1])
    group = int(c.attribute("group", 1))
    w = _transposed_window(c, weight[2:], big[2:], small[2:])
    if c.wants(0) or c.wants(1):
        source = padded(e, c.grad, w)
        over = [max(-p, 0) for p in w.after]
        if any(over):  # places of the output that no kernel reached
            ends = [b + max(p, 0) - o for b, p, o in zip(big[2:], w.before, over, strict=True)]
            source = e.slice(source, range(2, len(big)), [0] * len(ends), ends, [1] * len(ends))
    if c.wants(0):
        c.give(
            0,
            e("Conv", source, c.x[1], kernel_shape=w.kernel, strides=w.stride, dilations=w.dilation, group=group),
        )
    if c.wants(1):
        none = Window(w.kernel, w.stride, w.dilation, (0,) * len(w.kernel), (0,) * len(w.kernel))
        c.give(1, correlate(e, source, c.x[0], none, big, small, group))
    if c.wants(2):
        c.give(2, e.sum(c.grad, [0, *range(2, len(big))], keep=False))


def _transposed_window(c: Call, kernel: Shape, big: Shape, small: Shape) -> Window:
    """As :func:`window`; the padding at the start follows ONNX's rule where the output's size is given."""
    found = window(c, kernel, big, small)
    auto = c.attribute("auto_pad", "NOTSET")
    shape = c.attribute("output_shape", None)
    if auto not in ("SAME_UPPER", "SAME_LOWER") and shape is None:
        return found
    extra = c.attribute("output_padding", [0] * len(kernel))
    before, after = [], []
    for n, s, k, d, b, x in zip(small, found.stride, kernel, found.dilation, big, extra, strict=True):
        reach = (n - 1) * s + (k - 1) * d + 1
        total = max(0, reach + x - b)
        before.append(total // 2 if auto == "SAME_UPPER" else total - total // 2)
        after.append(reach - b - before[-1])
    return Window(kernel, found.stride, found.dilation, tuple(before), tuple(after))
