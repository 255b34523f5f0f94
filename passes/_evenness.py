"""What quantizing a layer to 8 bits costs its output when its input channels are scaled first, on given inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from graphopt.observers import observe
from graphopt.statistics import BIN_COUNT, ValueStatistics

if TYPE_CHECKING:
    from numpy.typing import NDArray


def rounding_error(
    weight: NDArray[np.float64],
    inputs: NDArray[np.float32],
    scale: NDArray[np.float64],
) -> float:
    """The mean square of ``Q(W / s) Q(s x) - W x`` over inputs, per square of ``W x``, and its mean over outputs: who
    reads them may hear the quiet ones as well.

    ``weight``: float64[groups, outputs, K]; ``inputs``: [groups, K, n]; ``scale``: [groups, K].
    """
    held = inputs.astype(np.float64)
    wanted = weight @ held
    power = np.square(wanted).mean(axis=-1)
    heard = power > 0
    if not heard.any():
        return 0.0
    found = rounded_weight(weight / scale[:, None, :]) @ rounded_input(held * scale[:, :, None])
    return float((np.square(found - wanted).mean(axis=-1)[heard] / power[heard]).mean())


def rounded_input(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """To 8 bits, in the range that the mse observer chooses."""
    seen = ValueStatistics(np.zeros(BIN_COUNT, np.int64))
    with np.errstate(over="ignore"):  # what is infinite then counts as that
        seen.update(np.ascontiguousarray(x, np.float32))
    seen.flush()
    low, high = observe(seen, "mse")
    step = (high - low) / 255 or 1.0
    zero = np.rint(-low / step)
    found: NDArray[np.float64] = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
    return found


def rounded_weight(weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """To 8 bits per output (the last axis is what it sums over), to nearest."""
    step = np.abs(weight).max(axis=-1, keepdims=True) / 127
    step = np.where(step > 0, step, 1.0)
    found: NDArray[np.float64] = np.rint(weight / step) * step
    return found
