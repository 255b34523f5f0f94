"""Rounding weights to what the layer's output asks for, not to the nearest: GPTQ, then coordinate descent, on H.

With ``E = W~ - W`` a layer's squared error is ``tr(E H E^T)``, and each output channel is a row of its own. The start
is GPTQ (Frantar et al. 2022: columns in order of ``diag H``, each one's error spread over those still open by the
Cholesky factor of the inverse); the polish moves single integers as long as that lowers the quadratic; the scale that
is best for given integers, ``(q H w) / (q H q)``, alternates with it in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.linalg import solve_triangular

from graphopt.gram import Seen, mean_diagonal, squared_error
from graphopt.graph import label
from graphopt.linear import from_matrix, to_matrix
from graphopt.passes._integer_weights import LARGEST, IntegerWeight, WeightKind, packed, round_weight, weight_error

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: H comes from samples, and inverting it would believe all of their noise."""

_BLOCK = 64  # columns whose effect on the others is applied together
_SWEEPS = 3

_SPARSE = 0.1
"""The share of zeros above which a weight has them for a reason (see ``sparsify``)."""


@dataclass(frozen=True)
class Rounded:
    """Integer ``weight`` of a layer; ``noise``: what it adds to the output's energy on held-out inputs, summed over
    channels; ``shift``: what it adds to each output's mean, float64[channels]; ``refined``: rounded on H, since that
    left less noise than rounding to nearest."""

    weight: IntegerWeight
    noise: float
    shift: NDArray[np.float64]
    refined: bool


def rounded_for_output(
    node: ir.Node,
    stored: NDArray[Any],
    axis: int,
    kind: WeightKind,
    seen: Seen,
    *,
    centred: bool,
    least: NDArray[np.float64] | None = None,
) -> Rounded:
    """The weight rounded on H, or to nearest where that is better on the inputs held back.

    ``centred``: a bias takes back what happens to the mean, so that only the rest counts. ``least``: a floor of the
    scale per output channel.
    """
    key = (label(node), kind, centred, None if least is None else least.tobytes())
    if key not in seen.memo:
        seen.memo[key] = _rounded(node, stored, axis, kind, seen, centred, least)
    found: Rounded = seen.memo[key]
    return found


def input_noise(node: ir.Node, stored: NDArray[Any], seen: Seen, sqnr: float) -> float:
    """What rounding the layer's input, at ``sqnr`` dB, adds to the energy of its output, summed over channels: noise
    that is as large in every element and independent of it."""
    matrix = to_matrix(node, stored)
    power = np.diagonal(seen.moments.second_moment, axis1=1, axis2=2).mean()
    return float(np.square(matrix).sum() * power / 10 ** (sqnr / 10))


def _rounded(
    node: ir.Node,
    stored: NDArray[Any],
    axis: int,
    kind: WeightKind,
    seen: Seen,
    centred: bool,
    least: NDArray[np.float64] | None,
) -> Rounded:
    matrix, mean = to_matrix(node, stored), seen.moments.mean
    gram = seen.moments.second_moment
    held = seen.held.astype(np.float64)
    if centred:
        gram = gram - mean[:, :, None] * mean[:, None, :]
        held = held - mean[:, :, None]
    nearest = round_weight(stored, axis, kind, least_scale=least)
    floor = None if least is None else np.maximum(least, np.finfo(np.float32).tiny).reshape(matrix.shape[:2])
    integers, scale = round_on_gram(
        matrix, gram, nearest.scale.astype(np.float64).reshape(matrix.shape[:2]), LARGEST[kind], floor
    )
    laid_out = from_matrix(node, integers, stored.shape)
    candidate = packed(laid_out, scale.astype(np.float32).reshape(-1), stored, axis, kind)

    def judged(weight: IntegerWeight) -> tuple[float, NDArray[np.float64]]:
        error = to_matrix(node, weight_error(weight, stored))
        noise = float(np.square(np.matmul(error, held)).sum()) / max(held.shape[2], 1)
        return noise, np.matmul(error, mean[:, :, None]).reshape(-1)

    (plain, plain_shift), (noise, shift) = judged(nearest), judged(candidate)
    if noise < plain:
        return Rounded(candidate, noise, shift, True)
    return Rounded(nearest, plain, plain_shift, False)


def round_on_gram(
    matrix: NDArray[np.float64],
    gram: NDArray[np.float64],
    scale: NDArray[np.float64],
    largest: int,
    least: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(integers as float64[groups, outputs, K], scale [groups, outputs]) that bring ``e H e^T`` down.

    Args:
        matrix: W, [groups, outputs, K].
        gram: H, [groups, K, K].
        scale: where to start, [groups, outputs].
        largest: the largest integer's magnitude.
        least: a floor of the scale, [groups, outputs].
    """
    damped = _damped(gram)
    bounds = _bounds(matrix, largest)
    integers = _start(matrix, damped, scale[..., None], bounds)
    for sweep in range(_SWEEPS):
        if sweep:
            scale = _fitted(integers, matrix, damped, scale, least)
        integers = _polish(integers, matrix, damped, scale[..., None], bounds)
    return integers, scale


def round_steps_on_gram(
    matrix: NDArray[np.float64],
    gram: NDArray[np.float64],
    steps: NDArray[np.float64],
    low: NDArray[Any],
    high: NDArray[Any],
) -> NDArray[np.float64]:
    """:func:`round_on_gram` for given steps, and bounds of the integers, of each element: [groups, outputs, K] all."""
    damped, bounds = _damped(gram), _Bounds(low, high)
    integers = _start(matrix, damped, steps, bounds)
    for _ in range(_SWEEPS):
        integers = _polish(integers, matrix, damped, steps, bounds)
    return integers


@dataclass(frozen=True)
class _Bounds:
    """The smallest and largest integer, each [1 or groups, 1 or outputs, 1 or K]."""

    low: NDArray[Any]
    high: NDArray[Any]

    def clip(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.clip(values, self.low, self.high)

    def over(self, shape: tuple[int, ...]) -> tuple[NDArray[Any], NDArray[Any]]:
        return np.broadcast_to(self.low, shape), np.broadcast_to(self.high, shape)


def _bounds(matrix: NDArray[np.float64], largest: int) -> _Bounds:
    """Every integer that there is; of a weight that had zeros put in, a zero stays one."""
    zero = matrix == 0
    high = np.where(zero, 0, largest) if zero.mean() > _SPARSE else np.full((1, 1, 1), largest)
    return _Bounds(-high, high)


def _damped(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    damped: NDArray[np.float64] = gram + DAMPING * mean_diagonal(gram)[:, None, None] * np.eye(gram.shape[1])
    return damped


def _start(
    matrix: NDArray[np.float64], damped: NDArray[np.float64], steps: NDArray[np.float64], bounds: _Bounds
) -> NDArray[np.float64]:
    """To nearest, or GPTQ's integers for the outputs that those leave less error of."""
    integers = bounds.clip(np.rint(matrix / steps))
    start = _gptq(matrix, damped, steps, bounds)
    before, after = (squared_error(q * steps - matrix, damped) for q in (integers, start))
    return np.where((after < before)[..., None], start, integers)


def _fitted(
    q: NDArray[np.float64],
    w: NDArray[np.float64],
    h: NDArray[np.float64],
    scale: NDArray[np.float64],
    least: NDArray[np.float64] | None,
) -> NDArray[np.float64]:
    """The best scale for these integers, as the float32 that is stored; the old one where that is out of bounds."""
    weighted = np.matmul(q, h)
    above, below = np.sum(weighted * w, axis=2), np.sum(weighted * q, axis=2)
    usable = (below > 0) & (above > 0)
    found = np.where(usable, above / np.where(usable, below, 1.0), scale).astype(np.float32).astype(np.float64)
    return found if least is None else np.where(found >= least, found, scale)


def _gptq(
    w: NDArray[np.float64], h: NDArray[np.float64], steps: NDArray[np.float64], bounds: _Bounds
) -> NDArray[np.float64]:
    """GPTQ's integers; those to nearest where H cannot be factored."""
    order = np.argsort(-np.diagonal(h, axis1=1, axis2=2), axis=1, kind="stable")
    try:
        ordered = np.take_along_axis(np.take_along_axis(h, order[:, :, None], 1), order[:, None, :], 2)
        upper = inverse_factor(ordered)
    except np.linalg.LinAlgError:
        return bounds.clip(np.rint(w / steps))
    left, step, low, high = (
        np.take_along_axis(part, order[:, None, :], 2)
        for part in (w, np.broadcast_to(steps, w.shape), *bounds.over(w.shape))
    )
    q = np.empty_like(left)
    for begin in range(0, left.shape[2], _BLOCK):
        end = min(begin + _BLOCK, left.shape[2])
        errors = np.empty((*w.shape[:2], end - begin))
        for j in range(begin, end):
            q[..., j] = np.clip(np.rint(left[..., j] / step[..., j]), low[..., j], high[..., j])
            error = (left[..., j] - q[..., j] * step[..., j]) / upper[:, j, j, None]
            left[..., j + 1 : end] -= error[..., None] * upper[:, None, j, j + 1 : end]
            errors[..., j - begin] = error
        left[..., end:] -= np.matmul(errors, upper[:, begin:end, end:])
    return np.take_along_axis(q, np.argsort(order, axis=1)[:, None, :], 2)


def inverse_factor(h: NDArray[np.float64]) -> NDArray[np.float64]:
    """U, upper, with U^T U = H^-1: H = F F^T with F upper, by factoring it turned around, and U = F^-1."""
    factor = np.linalg.cholesky(h[:, ::-1, ::-1])[:, ::-1, ::-1]
    if len(h) > 1:
        many: NDArray[np.float64] = np.linalg.inv(factor)
        return many
    single: NDArray[np.float64] = solve_triangular(factor[0], np.eye(h.shape[1]), lower=False, check_finite=False)
    return single[None]


def _polish(
    q: NDArray[np.float64],
    w: NDArray[np.float64],
    h: NDArray[np.float64],
    steps: NDArray[np.float64],
    bounds: _Bounds,
) -> NDArray[np.float64]:
    """One sweep of coordinate descent over the columns, all outputs at once; never raises any one's error."""
    q = q.copy()
    slope = np.matmul(q * steps - w, h)
    scale = np.broadcast_to(steps, w.shape)
    low, high = bounds.over(w.shape)
    inverse = 1 / np.diagonal(h, axis1=1, axis2=2)
    for begin in range(0, w.shape[2], _BLOCK):
        end = min(begin + _BLOCK, w.shape[2])
        near = slope[..., begin:end].copy()
        moved = np.zeros_like(near)
        for j in range(begin, end):
            wanted = np.rint(q[..., j] - near[..., j - begin] / scale[..., j] * inverse[:, j, None])
            step = np.clip(wanted, low[..., j], high[..., j]) - q[..., j]
            if step.any():
                q[..., j] += step
                moved[..., j - begin] = step = step * scale[..., j]
                near += step[..., None] * h[:, None, j, begin:end]
        if end < w.shape[2]:  # what lies behind is never looked at again
            slope[..., end:] += np.matmul(moved, h[:, begin:end, end:])
    return q
