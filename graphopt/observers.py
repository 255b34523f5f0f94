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
_QUARTERS = np.array([0.125, 0.375, 0.625, 0.875])


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
    counts = _signal(statistics)
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


def _signal(statistics: ValueStatistics) -> NDArray[np.float64]:
    """The counts per bin without masks, and with -0.0 where 0.0 is."""
    assert statistics.histogram is not None
    statistics.flush()
    counts = np.where(np.abs(_MIDDLE) < _MASK, statistics.histogram, 0).astype(np.float64)
    half = len(counts) // 2
    counts[0] += counts[half]
    counts[half] = 0
    return counts


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
    sides = int(counts[_MIDDLE < 0].any()) + int(counts[_MIDDLE > 0].any())
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


class _Side:
    """The magnitudes on one side of zero, ascending, with running sums from zero up (``below``) and from the far end
    down (``beyond``): two directions, so that an outlier's square never swallows the sum of the small ones."""

    def __init__(self, weight: NDArray[np.float64], magnitude: NDArray[np.float64]) -> None:
        self.magnitude = magnitude
        moments = np.stack([weight, weight * magnitude, weight * magnitude**2])
        self.below = np.concatenate([np.zeros((3, 1)), np.cumsum(moments, axis=1)], axis=1)
        self.beyond = np.concatenate([np.cumsum(moments[:, ::-1], axis=1)[:, ::-1], np.zeros((3, 1))], axis=1)

    def error(self, end: NDArray[np.float64], step: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum of (x - Q(x))^2: x^2 up to step/2, which rounds to zero (exact for the zeros a ReLU makes), the distance
        from ``end`` past it, step^2/12 in between."""
        near = np.searchsorted(self.magnitude, step / 2)
        far = np.searchsorted(self.magnitude, np.maximum(end, step / 2))
        clipped = self.beyond[2][far] - 2 * end * self.beyond[1][far] + end**2 * self.beyond[0][far]
        total: NDArray[np.float64] = (
            self.below[2][near] + (self.below[0][far] - self.below[0][near]) * step**2 / 12 + clipped
        )
        return total


def _sides(counts: NDArray[np.float64], low: float, high: float) -> tuple[_Side, _Side]:
    """(negative, positive); each bin as four points, none of them past the exact ``low`` and ``high``."""
    half = len(counts) // 2
    found = []
    for part, end in ((counts[half:], -low), (counts[:half], high)):
        used = np.flatnonzero(part)
        inner, outer = _INNER[used], np.minimum(_OUTER[used], end)
        points = inner[:, None] + (outer - inner)[:, None] * _QUARTERS
        found.append(_Side(np.repeat(part[used] / 4, 4), points.ravel()))
    return found[0], found[1]


def _mse(counts: NDArray[np.float64], low: float, high: float, levels: int = 255) -> tuple[float, float]:
    """The clipping that minimises E[(x - Q(x))^2] (Choukroun et al. 2019), from the histogram alone: every pair of
    ends on a coarse grid, then on a fine one around the best."""
    negative, positive = _sides(counts, low, high)

    def best(lows: NDArray[np.float64], highs: NDArray[np.float64]) -> tuple[float, float]:
        lo, hi = (e.ravel() for e in np.meshgrid(np.unique(lows * -low), np.unique(highs * high), indexing="ij"))
        step = (lo + hi) / levels
        found = len(lo) - 1 - int(np.argmin((negative.error(lo, step) + positive.error(hi, step))[::-1]))  # widest wins
        return float(lo[found]), float(hi[found])

    ratio, count = 1.2, 50  # from the whole range down to 1/9000 of it
    coarse = ratio ** -np.arange(count, dtype=np.float64)
    lo, hi = best(coarse, coarse)
    fine = np.geomspace(1 / ratio, ratio, 41)
    lo, hi = best(
        np.minimum(fine * (lo / -low if low else 1.0), 1.0), np.minimum(fine * (hi / high if high else 1.0), 1.0)
    )
    return -lo, hi


def _entropy(
    counts: NDArray[np.float64], low: float, high: float, bins: int = 2048, levels: int = 128
) -> tuple[float, float]:
    """TensorRT's calibrator (Migacz, GTC 2017): the symmetric threshold that minimises KL(P || Q).

    P is the histogram of magnitudes in ``bins`` linear bins, cut at the threshold, the tail added to its last bin; Q is
    P without the tail, re-binned to ``levels`` and spread back over the non-empty bins. Every 16th bin is tried. Exact
    zeros are left out: any range represents them, and after a ReLU they would outweigh everything else.
    """
    half = len(counts) // 2
    magnitude = counts[:half] + counts[half:]
    magnitude[0] = 0
    limit = max(-low, high)
    last = int(np.searchsorted(_INNER[:half], limit))  # bins that begin below the limit, at which they all end
    edges = np.append(_INNER[:last], limit)
    cumulative = np.concatenate([[0.0], np.cumsum(magnitude[:last])])
    cumulative[-1] = magnitude.sum()
    linear = np.linspace(0.0, limit, bins + 1)
    histogram = np.diff(np.interp(linear, edges, cumulative))  # uniform within a bin
    best = min(range(bins, levels - 1, -16), key=lambda stop: _divergence(histogram, stop, levels))
    return max(low, -float(linear[best])), min(high, float(linear[best]))


def _divergence(histogram: NDArray[np.float64], stop: int, levels: int) -> float:
    kept = histogram[:stop]
    reference = kept.copy()
    reference[-1] += histogram[stop:].sum()
    occupied = kept > 0
    group = np.arange(stop) * levels // stop
    mass = np.bincount(group, kept, levels)
    filled = np.bincount(group, occupied, levels)
    spread = np.where(occupied, (mass / np.maximum(filled, 1))[group], 0.0)
    total = spread.sum()
    if total == 0:
        return float("inf")
    p = reference / reference.sum()
    both = p > 0
    # What Q cannot represent is infinitely surprising; a small floor keeps the search smooth.
    return float(np.sum(p[both] * np.log(p[both] / np.maximum(spread[both] / total, 1e-12))))


def linear_histogram(statistics: ValueStatistics, bins: int = 48) -> tuple[float, float, list[int]]:
    """The histogram as a person draws it: (low, high, elements in each of ``bins`` equal steps between them).

    ``low`` and ``high`` are the smallest and largest element, masks apart. Counts are of the elements that the sweep
    sampled, spread evenly within each of its bins and rounded up: a lone outlier is seen. Empty: there are none.
    """
    points, cumulative = _cumulative(statistics)
    if not len(points):
        return 0.0, 0.0, []
    low, high = float(points[0]), float(points[-1])
    edges = np.linspace(low, high, bins + 1 if high > low else 2)
    reached = np.interp(edges, points, cumulative)
    reached[0], reached[-1] = 0.0, cumulative[-1]  # also where all is one point
    return low, high, [int(n) for n in np.ceil(np.diff(reached) - 1e-6)]


def clipped_share(statistics: ValueStatistics, low: float, high: float) -> float:
    """Share, 0 to 1, of the elements outside [low, high] by the sweep's histogram; masks apart."""
    points, cumulative = _cumulative(statistics)
    if not len(points) or (low <= points[0] and high >= points[-1]):
        return 0.0
    inside = np.interp([low, high], points, cumulative, left=0.0, right=cumulative[-1])
    return float(1 - (inside[1] - inside[0]) / cumulative[-1])


def _cumulative(statistics: ValueStatistics) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ascending points and how many elements lie below each; between two points they are spread evenly."""
    if statistics.histogram is None or statistics.count == 0:
        return np.zeros(0), np.zeros(0)
    counts = _signal(statistics)[_ORDER]
    used = np.flatnonzero(counts)
    if not len(used):  # masks alone
        return np.zeros(0), np.zeros(0)
    counts = counts[used]
    ends = np.sort(np.stack([_INNER[_ORDER][used], _OUTER[_ORDER][used]]), axis=0)
    above = np.cumsum(counts)
    points = np.stack([ends[0], ends[1]], axis=1).ravel()
    reached = np.stack([above - counts, above], axis=1).ravel()
    # The two ends are known exactly, from all elements, unless a mask lies there.
    low = statistics.minimum if abs(statistics.minimum) < _MASK else points[0]
    high = statistics.maximum if abs(statistics.maximum) < _MASK else points[-1]
    points = np.concatenate([[low], np.clip(points, low, high), [high]])
    return points, np.concatenate([[0.0], reached, [reached[-1]]])


def quantization_sqnr(statistics: ValueStatistics, low: float, high: float, levels: int = 255) -> float:
    """Expected signal-to-noise ratio, in dB, of rounding the value to ``levels`` steps of [low, high].

    Infinite where there is no noise or nothing to judge by (no histogram, never seen).
    """
    if statistics.histogram is None or statistics.count == 0 or high <= low:
        return float("inf")
    negative, positive = _sides(_signal(statistics), *_exact(statistics))
    signal = float(negative.below[2][-1] + positive.below[2][-1])
    step = np.asarray((high - low) / levels)
    noise = float(negative.error(np.asarray(-low), step) + positive.error(np.asarray(high), step))
    return float("inf") if noise <= 0 else 10 * float(np.log10(signal / noise)) if signal > 0 else 0.0
