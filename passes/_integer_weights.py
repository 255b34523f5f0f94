"""Rounding weights to integers: per channel, symmetric, three forms that ONNX Runtime multiplies differently."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

WeightKind = Literal["s8", "s7", "u8"]

LARGEST = {"s8": 127, "s7": 64, "u8": 127}
"""Largest magnitude: 64 * 255 * 2 = 32,640 is the most that a pair of products can reach without leaving int16."""


@dataclass(frozen=True)
class IntegerWeight:
    """``(data - zero_point) * scale`` along ``axis`` approximates the float weight.

    ``data``: int8, or uint8 around zero point 128; ``scale``: float32[channels]; ``sqnr``: dB over the whole tensor.
    """

    data: NDArray[Any]
    scale: NDArray[np.float32]
    zero_point: NDArray[Any]
    axis: int
    kind: WeightKind
    sqnr: float


def round_weight(
    weight: NDArray[Any], axis: int, kind: WeightKind, *, least_scale: NDArray[np.float64] | None = None
) -> IntegerWeight:
    """Round to nearest, per channel of ``axis``, the scale taking in the largest weight.

    ``least_scale`` [channels] is a floor (see :func:`bias_floor`). An all-zero channel gets scale 1.
    """
    values = np.moveaxis(weight.astype(np.float64), axis, 0)
    flat = values.reshape(values.shape[0], math.prod(values.shape[1:]))
    largest = np.abs(flat).max(axis=1) if flat.size else np.zeros(flat.shape[0])
    scale = largest / LARGEST[kind]
    if least_scale is not None:
        scale = np.maximum(scale, least_scale)
    # A scale must stay a normal float32: a denormal one is flushed to zero on some machines.
    normal = np.maximum(scale, float(np.finfo(np.float32).tiny))
    stored_scale: NDArray[np.float32] = np.where(scale > 0, normal, 1.0).astype(np.float32)
    shape = (-1, *[1] * (values.ndim - 1))
    rounded = np.clip(np.rint(values / stored_scale.astype(np.float64).reshape(shape)), -LARGEST[kind], LARGEST[kind])
    return packed(np.moveaxis(rounded, 0, axis), stored_scale, weight, axis, kind)


def packed(
    integers: NDArray[Any], scale: NDArray[np.float32], weight: NDArray[Any], axis: int, kind: WeightKind
) -> IntegerWeight:
    """``integers`` around zero, laid out as ``weight``, in the form that is stored."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    values = weight.astype(np.float64)
    error = float(np.square(integers * scale.astype(np.float64).reshape(shape) - values).sum())
    signal = float(np.square(values).sum())
    sqnr = math.inf if error == 0 else 10 * math.log10(signal / error) if signal else 0.0
    if kind == "u8":
        data: NDArray[Any] = (integers + 128).astype(np.uint8)
        zero = np.full(scale.shape, 128, np.uint8)
    else:
        data, zero = integers.astype(np.int8), np.zeros(scale.shape, np.int8)
    return IntegerWeight(np.ascontiguousarray(data), scale, zero, axis, kind, sqnr)


def weight_error(weight: IntegerWeight, stored: NDArray[Any]) -> NDArray[np.float64]:
    """``W~ - W``, laid out as ``stored``."""
    shape = [1] * stored.ndim
    shape[weight.axis] = -1
    integers = weight.data.astype(np.float64) - weight.zero_point.astype(np.float64).reshape(shape)
    error: NDArray[np.float64] = integers * weight.scale.astype(np.float64).reshape(shape) - stored
    return error


def output_shift(weight: IntegerWeight, stored: NDArray[Any], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """By how much rounding the weights moves the mean of each output channel: ``E[(W~ - W) x]``, float64[channels].

    ``mean`` is the input's, per input channel. The bias takes it back (bias correction, Nagel et al. 2019, section
    4.2); where a convolution pads with zeros the inputs' mean is a little lower at the border, which is left out.
    """
    error = np.moveaxis(weight_error(weight, stored), weight.axis, 0)
    per_input = error.reshape(error.shape[0], error.shape[1], -1).sum(axis=2)  # [outputs, inputs of one group]
    groups = len(mean) // per_input.shape[1]
    means = mean.reshape(groups, -1).repeat(per_input.shape[0] // groups, axis=0)
    shift: NDArray[np.float64] = np.sum(per_input * means, axis=1)
    return shift


def bias_floor(bias: NDArray[Any], input_scale: float) -> NDArray[np.float64]:
    """The least weight scale per channel with which the bias still fits int32 at scale ``input_scale * weight_scale``.

    Half the int32 range is left to the accumulated products.
    """
    return np.abs(bias.astype(np.float64)) / (input_scale * 2.0**30)


def round_bias(
    bias: NDArray[Any], input_scale: float, weight_scale: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """(int32 bias, its float32 scale per channel)."""
    scale = (np.float32(input_scale) * weight_scale).astype(np.float32)
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    limit = 2.0**31 - 1
    return np.clip(np.rint(bias.astype(np.float64) / scale), -limit, limit).astype(np.int32), scale
