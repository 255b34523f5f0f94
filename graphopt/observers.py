"""From statistics to ranges: min-max, percentile, entropy, MSE. Each takes a histogram and answers (low, high).

Every range includes 0, because padding and ReLU need an exact zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from graphopt.statistics import ValueStatistics, bin_edges

if TYPE_CHECKING:
    from numpy.typing import NDArray

OBSERVERS = ("min-max", "percentile", "entropy", "mse")

_MASK = 1e30
"""Magnitudes from here on are attention masks (-3.4e38, -1e32, ...), no signal: clipping saturates them anyway."""

_INNER, _OUTER = bin_edges()
_MIDDLE = (_INNER + _OUTER) / 2
_ORDER = np.argsort(_MIDDLE, kind="stable")


def observe(statistics: ValueStatistics, observer: str, *, percentile: float = 99.999) -> tuple[float, float]:
    """The range to quantize a value to.

    Args:
        statistics: with a histogram, unless ``observer`` is ``min-max``.
        observer: one of :data:`OBSERVERS`.
        percentile: share of the elements, in percent, inside the range (``percentile`` only).

    Returns:
        (low, high) with low <= 0 <= high; (0.0, 0.0) for a value that was always zero or never seen.

    Raises:
        ValueError: unknown observer, or no histogram to read.
    """
    if statistics.count == 0:
        return 0.0, 0.0
    low, high = _exact(statistics)
    if observer == "min-max" or low == high:
        return low, high
    if statistics.histogram is None:
        raise ValueError(f"observer {observer!r} needs a histogram; collect(..., histograms=True)")
    statistics.flush()
    counts = np.where(np.abs(_MIDDLE) < _MASK, statistics.histogram, 0).astype(np.float64)
    if observer == "percentile":
        found = _percentile(counts, percentile)
    elif observer == "entropy":
        found = _entropy(counts, low, high)
    elif observer == "mse":
        found = _mse(counts, low, high)
    else:
        raise ValueError(f"unknown observer {observer!r}; one of {', '.join(OBSERVERS)}")
    # Bins are 3 % wide: never claim a range that no element reached.
    return max(min(found[0], 0.0), low), min(max(found[1], 0.0), high)


def _exact(statistics: ValueStatistics) -> tuple[float, float]:
    low, high = min(statistics.minimum, 0.0), max(statistics.maximum, 0.0)
    if statistics.histogram is not None and max(-low, high) >= _MASK:
        statistics.flush()
        seen = (statistics.histogram > 0) & (np.abs(_MIDDLE) < _MASK)
        low = float(min(_OUTER[seen].min(initial=0.0), 0.0)) if low <= -_MASK else low
        high = float(max(_OUTER[seen].max(initial=0.0), 0.0)) if high >= _MASK else high
    return low, high


def _percentile(counts: NDArray[np.float64], percentile: float) -> tuple[float, float]:
    """Two-sided: the tails outside hold (100 - percentile) % of the elements, half on each side.

    A side that no element reaches gives its half to the other (values after a ReLU).
    """
    ordered = counts[_ORDER]
    total = ordered.sum()
    if total == 0:
        return 0.0, 0.0
    cumulative = np.cumsum(ordered)
    outside = total * (1 - percentile / 100)
    sides = (counts[_MIDDLE < 0].sum() > 0) + (counts[_MIDDLE > 0].sum() > 0)
    tail = outside / max(sides, 1)
    low_edge = np.minimum(_INNER, _OUTER)[_ORDER]
    high_edge = np.maximum(_INNER, _OUTER)[_ORDER]
    return (
        _cut(cumulative, ordered, low_edge, high_edge, tail),
        _cut(cumulative, ordered, low_edge, high_edge, total - tail),
    )


def _cut(
    cumulative: NDArray[np.float64],
    ordered: NDArray[np.float64],
    low_edge: NDArray[np.float64],
    high_edge: NDArray[np.float64],
    mass: float,
) -> float:
    """The value below which ``mass`` lies, linear within its bin."""
    index = int(np.searchsorted(cumulative, mass, side="left"))
    index = min(index, len(ordered) - 1)
    if ordered[index] == 0:
        return float(low_edge[index])
    inside = (mass - (cumulative[index] - ordered[index])) / ordered[index]
    return float(low_edge[index] + (high_edge[index] - low_edge[index]) * min(max(inside, 0.0), 1.0))


def _expected_error(
    weight: NDArray[np.float64], value: NDArray[np.float64], low: float, high: float, levels: int
) -> float:
    """Sum of (x - Q(x))^2. Three cases: clipped outside; rounded to zero when |x| < step/2, which is exact for the
    zeros a ReLU makes; step^2/12 elsewhere."""
    step = (high - low) / levels
    if step == 0:
        return float(np.sum(weight * value**2))
    inside = np.where(np.abs(value) < step / 2, value**2, step**2 / 12)
    clipped = np.where(value < low, (value - low) ** 2, np.where(value > high, (value - high) ** 2, 0.0))
    return float(np.sum(weight * np.maximum(clipped, inside)))


def _mse(counts: NDArray[np.float64], low: float, high: float, levels: int = 255) -> tuple[float, float]:
    """The clipping that minimises E[(x - Q(x))^2] (Choukroun et al. 2019), from the histogram alone.

    Both ends are searched in turn.
    """
    used = counts > 0
    weight, value = counts[used], _MIDDLE[used]

    def error(lo: float, hi: float) -> float:
        return _expected_error(weight, value, lo, hi, levels)

    # Fine near 1, where most answers lie, down to 2 % of the full range.
    shares = np.unique(np.concatenate([np.linspace(0.5, 1.0, 51), np.geomspace(0.02, 0.5, 30)]))[::-1]
    best_low, best_high = low, high
    for _ in range(2):
        if high > 0:
            best_high = min((high * s for s in shares), key=lambda hi: error(best_low, hi))
        if low < 0:
            best_low = min((low * s for s in shares), key=lambda lo: error(lo, best_high))
    return best_low, best_high


def _entropy(
    counts: NDArray[np.float64], low: float, high: float, bins: int = 2048, levels: int = 128
) -> tuple[float, float]:
    """TensorRT's calibrator (Migacz, GTC 2017): the symmetric threshold that minimises KL(P || Q).

    P is the histogram of |x| cut at the threshold with the tail added to its last bin; Q is P re-binned to ``levels``
    and spread back over the non-empty bins.
    """
    limit = max(-low, high)
    edges = np.linspace(0.0, limit, bins + 1)
    half = len(counts) // 2
    magnitude = counts[:half] + counts[half:]
    # Uniform within a bin: interpolate the cumulative count at the linear edges.
    cumulative = np.concatenate([[0.0], np.cumsum(magnitude)])
    log_edges = np.concatenate([_INNER[:half], _OUTER[half - 1 : half]])
    keep = np.concatenate([[True], np.diff(log_edges) > 0])
    histogram = np.diff(np.interp(edges, log_edges[keep], cumulative[keep]))
    histogram[0] = max(histogram[0], 0.0)
    total = histogram.sum()
    if total == 0:
        return low, high
    best, best_divergence = bins, np.inf
    for stop in range(levels, bins + 1, 16):
        divergence = _divergence(histogram, stop, levels)
        if divergence < best_divergence:
            best, best_divergence = stop, divergence
    threshold = float(edges[best])
    return max(low, -threshold), min(high, threshold)


def _divergence(histogram: NDArray[np.float64], stop: int, levels: int) -> float:
    reference = histogram[:stop].copy()
    reference[-1] += histogram[stop:].sum()
    occupied = histogram[:stop] > 0
    group = np.minimum(np.arange(stop) * levels // stop, levels - 1)
    mass = np.bincount(group, histogram[:stop], levels)
    filled = np.bincount(group, occupied, levels)
    spread = np.where(occupied, mass[group] / np.maximum(filled[group], 1), 0.0)
    if spread.sum() == 0:
        return float("inf")
    p = reference / reference.sum()
    q = spread / spread.sum()
    both = p > 0
    # An element that Q cannot represent is infinitely surprising; a small floor keeps the search smooth.
    return float(np.sum(p[both] * np.log(p[both] / np.maximum(q[both], 1e-12))))


def quantization_sqnr(statistics: ValueStatistics, low: float, high: float, levels: int = 255) -> float:
    """Expected signal-to-noise ratio, in dB, of rounding the value to ``levels`` steps of [low, high]."""
    if statistics.histogram is None or statistics.count == 0 or high <= low:
        return float("inf")
    statistics.flush()
    counts = np.where(np.abs(_MIDDLE) < _MASK, statistics.histogram, 0).astype(np.float64)
    used = counts > 0
    weight, value = counts[used], _MIDDLE[used]
    signal = float(np.sum(weight * value**2))
    noise = _expected_error(weight, value, low, high, levels)
    return float("inf") if noise == 0 else 10 * float(np.log10(signal / noise)) if signal > 0 else 0.0
