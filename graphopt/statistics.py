"""The sweep: what every pass needs to know of a model's values, collected once, streaming, mergeable, in fixed memory.

Per value: minimum and maximum over all elements, mean, and a histogram whose edges never move. A float32's sign,
exponent and five mantissa bits name its bin, so counting is a shift and a ``bincount``, merging is adding, and one mask
of -3.4e38 spoils nothing. Observers (``observers.py``) turn that into ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.session import Session
from graphopt.taps import TAP_CHUNK_BYTES, tap_chunks

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

MANTISSA_BITS = 5
BIN_COUNT = 1 << (1 + 8 + MANTISSA_BITS)
SAMPLED = 1 << 14
"""Elements per sample that reach the histogram; a larger tensor is thinned, see :func:`_thinned`."""

_RUN = 16  # elements taken in a row: one cache line, of which a single element would cost as much
_WAITING = 2 * SAMPLED
_SMALL = SAMPLED // 4
_FLOAT32 = np.dtype("<f4")
_INFINITE = 255 << MANTISSA_BITS


def bin_edges() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(inner, outer) edge of each of the :data:`BIN_COUNT` bins, signed: ``inner`` is the one nearer to zero.

    The bins of infinities and NaNs have edges too, but nothing is ever counted there.
    """
    codes = np.arange(BIN_COUNT // 2, dtype=np.uint32)
    shift = 23 - MANTISSA_BITS
    with np.errstate(all="ignore"):
        inner = (codes << shift).view(np.float32).astype(np.float64)
        outer = ((codes + 1) << shift).view(np.float32).astype(np.float64)
    inner, outer = (np.nan_to_num(e, nan=0.0, posinf=float(np.finfo(np.float32).max)) for e in (inner, outer))
    return np.concatenate([inner, -inner]), np.concatenate([outer, -outer])


@dataclass
class ValueStatistics:
    """What was seen of one value. ``histogram`` is int64[:data:`BIN_COUNT`], or None where only ranges were asked."""

    histogram: NDArray[np.int64] | None = None
    count: int = 0
    nonfinite: int = 0
    minimum: float = float("inf")
    maximum: float = float("-inf")
    total: float = 0.0
    _codes: NDArray[np.uint16] | None = field(default=None, repr=False)
    _filled: int = field(default=0, repr=False)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def update(self, array: NDArray[Any], samples: int = 1) -> None:
        """Add one array of floats; ``samples`` is how many samples its leading axis stacks (1: the whole is one)."""
        if array.size == 0:
            return
        low, high = float(array.min()), float(array.max())  # a NaN anywhere makes both NaN
        if np.isfinite(low) and np.isfinite(high):
            self.count += array.size
        else:
            finite = array[np.isfinite(array)]
            self.nonfinite += array.size - finite.size
            self.count += finite.size
            low, high = float(finite.min(initial=np.inf)), float(finite.max(initial=-np.inf))
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        if array.dtype.itemsize > 4:
            # The histogram holds what a float32 can; beyond that lie masks, which any end of the scale serves.
            limit = np.finfo(np.float32).max
            array = np.where(np.isfinite(array), np.clip(array, -limit, limit), array)
        array = array.astype(_FLOAT32, copy=False)
        self.total += _sum(array)
        if self.histogram is not None:
            self._wait(_thinned(array, samples))

    def _wait(self, thinned: NDArray[Any]) -> None:
        """Small arrays wait for each other: a bincount pays for all its bins however few elements come."""
        codes = thinned.view(np.uint16)[..., 1::2]  # the upper half: sign, exponent, seven bits of the mantissa
        if self._codes is None:
            self._codes = np.empty(_WAITING, np.uint16)
        if self._filled + codes.size > _WAITING:
            self.flush()
        if codes.size > _WAITING:  # many samples at once
            self._count(codes.reshape(-1))
            return
        self._codes[self._filled : self._filled + codes.size].reshape(codes.shape)[...] = codes
        self._filled += codes.size

    def flush(self) -> None:
        """Count what still waits."""
        if self._codes is not None and self._filled:
            self._count(self._codes[: self._filled])
            self._filled = 0

    def _count(self, codes: NDArray[np.uint16]) -> None:
        assert self.histogram is not None
        counts = np.bincount(codes >> (7 - MANTISSA_BITS), minlength=BIN_COUNT)
        counts.reshape(2, -1)[:, _INFINITE:] = 0  # infinities and NaNs, known by their exponent, are skipped
        self.histogram += counts

    def merge(self, other: ValueStatistics) -> None:
        """Add what ``other`` saw; the result equals one sweep over both.

        Raises:
            ValueError: only one of the two has a histogram.
        """
        if (self.histogram is None) != (other.histogram is None):
            raise ValueError("only one of the two sweeps has histograms; collect both alike")
        self.flush()
        other.flush()
        self.count += other.count
        self.nonfinite += other.nonfinite
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.total += other.total
        if self.histogram is not None and other.histogram is not None:
            self.histogram = self.histogram + other.histogram


def _sum(array: NDArray[np.float32]) -> float:
    """In float32, whose pairwise summation is close enough and three times faster; in float64 where that overflows or
    meets a NaN."""
    with np.errstate(all="ignore"):
        total = float(array.sum(dtype=np.float64 if array.size < 4096 else np.float32))
    return total if np.isfinite(total) else float(array.sum(dtype=np.float64, where=np.isfinite(array)))


def _thinned(array: NDArray[np.float32], samples: int) -> NDArray[np.float32]:
    """[samples, runs, 16] (or the whole, where that is not more than :data:`SAMPLED` elements per sample).

    Chosen by element index within the sample alone, so batch size and order of samples do not matter.
    """
    rows = np.ascontiguousarray(array).reshape(samples, -1)
    if rows.shape[1] <= SAMPLED:
        return rows
    step = _RUN * _stride(rows.shape[1])
    runs = rows.shape[1] // step
    return rows[:, : runs * step].reshape(samples, runs, step)[:, :, :_RUN]


@cache
def _stride(size: int) -> int:
    """The smallest stride that leaves :data:`SAMPLED` elements or fewer and has no divisor in common with any dim, or
    else it would keep hitting the same channels or columns."""
    stride = -(-size // SAMPLED)
    while gcd(stride, size) > 1:
        stride += 1
    return stride


@dataclass
class Statistics:
    """Per-value statistics of one model on ``samples`` samples; ``runs`` counts inferences, for the report."""

    values: dict[str, ValueStatistics]
    samples: int = 0
    runs: int = 0

    def merge(self, other: Statistics) -> None:
        """Add another sweep of the same model over other samples."""
        for name, value in other.values.items():
            if name in self.values:
                self.values[name].merge(value)
            else:
                self.values[name] = value
        self.samples += other.samples
        self.runs += other.runs


def collect(
    model: ir.Model,
    names: Sequence[str],
    feeds: Iterable[Mapping[str, NDArray[Any]]],
    *,
    histograms: bool = True,
    cap: int = TAP_CHUNK_BYTES,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """One sweep of ``feeds`` (re-iterable: dicts of input name to array with its batch axis) through ``model``.

    Values are tapped together while they fit ``cap`` bytes, else in as many sweeps as it takes. The model runs with the
    runtime's optimizations on: what is seen is what the deployed float model computes.

    Raises:
        RuntimeFailure: the model does not load or run.
    """
    result = Statistics({n: ValueStatistics(np.zeros(BIN_COUNT, np.int64) if histograms else None) for n in names})
    iterator = iter(feeds)
    first = next(iterator, None)
    if first is None or not result.values:
        return result
    held = _Held(result.values)
    given = [n for n in result.values if n in first]
    inner = [n for n in result.values if n not in first]
    chunks = tap_chunks(model, inner, first, cap=cap, threads=threads) or [[]]
    for number, chunk in enumerate(chunks):
        session = Session(model, taps=chunk, threads=threads, outputs=False, permuted=True) if chunk else None
        source: Iterator[Mapping[str, NDArray[Any]]] = chain([first], iterator) if number == 0 else iter(feeds)
        done = 0
        for feed in source:
            batch = samples_in(feed)
            if number == 0:
                held.add(given, feed, batch)
            if session is not None:
                held.add(chunk, session.run(feed, chunk), batch)
                result.runs += 1
            done += batch
            if progress is not None:
                progress((number * result.samples + done) // len(chunks))
        result.samples = done
    held.flush()
    for value in result.values.values():
        value.flush()
    return result


class _Held:
    """Passes arrays on to their statistics, small ones many at a time: for a few elements the calls are the cost."""

    def __init__(self, values: Mapping[str, ValueStatistics]) -> None:
        self.values = values
        self.waiting: dict[str, list[NDArray[Any]]] = {name: [] for name in values}
        self.filled = dict.fromkeys(values, 0)

    def add(self, names: Sequence[str], arrays: Mapping[str, NDArray[Any]], batch: int) -> None:
        """One run's arrays. They are let go before the next run needs their memory, all but the small ones."""
        for name in names:
            array = arrays[name]
            if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or not array.size:
                continue  # no numbers, or in a branch that was not taken
            if array.size > _SMALL:
                self.values[name].update(array, batch if array.ndim and array.shape[0] == batch else 1)
                continue
            if self.filled[name] + array.size > SAMPLED:
                self._pass_on(name)
            self.waiting[name].append(array.flatten())  # a copy: whoever feeds us may fill the same array again
            self.filled[name] += array.size

    def _pass_on(self, name: str) -> None:
        if self.waiting[name]:
            # Together no more than is counted whole anyway, so that they may pass for one sample.
            self.values[name].update(np.concatenate(self.waiting[name]))
            self.waiting[name], self.filled[name] = [], 0

    def flush(self) -> None:
        """Pass on what still waits."""
        for name in self.values:
            self._pass_on(name)


def samples_in(feed: Mapping[str, NDArray[Any]]) -> int:
    """The samples stacked in one feed: the leading dim, where all inputs agree on it."""
    leading = {a.shape[0] if a.ndim else 1 for a in feed.values()}
    return max(leading.pop(), 1) if len(leading) == 1 else 1


def channel_means(
    model: ir.Model,
    axes: Mapping[str, int],
    feeds: Iterable[Mapping[str, NDArray[Any]]],
    *,
    cap: int = TAP_CHUNK_BYTES,
    threads: int | None = None,
) -> dict[str, NDArray[np.float64]]:
    """The mean of each value per index of its channel axis, over all samples and positions: float64[channels].

    ``axes``: value name -> axis (negative counts from the end). NaN and Inf are left out. A sweep apart from
    :func:`collect`, whose taps come in the runtime's own layout; a mean needs few samples.

    Raises:
        RuntimeFailure: the model does not load or run.
    """
    first = next(iter(feeds), None)
    if first is None or not axes:
        return {}
    totals: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, NDArray[np.float64]] = {}
    inner = [n for n in axes if n not in first]
    for number, chunk in enumerate(tap_chunks(model, inner, first, cap=cap, threads=threads) or [[]]):
        session = Session(model, taps=chunk, threads=threads, outputs=False) if chunk else None
        for feed in feeds:
            arrays = session.run(feed, chunk) if session is not None else {}
            if number == 0:
                arrays |= {n: feed[n] for n in axes if n in feed}
            for name, array in arrays.items():
                if not array.size:
                    continue  # in a branch that was not taken
                rest = tuple(i for i in range(array.ndim) if i != axes[name] % array.ndim)
                finite = np.isfinite(array)
                total = np.sum(array, axis=rest, dtype=np.float64, where=finite)
                zero = np.zeros_like(total)
                totals[name] = totals.get(name, zero) + total
                counts[name] = counts.get(name, zero) + np.sum(finite, axis=rest, dtype=np.float64)
    return {name: total / np.maximum(counts[name], 1) for name, total in totals.items()}
