"""The sweep: what every pass needs to know of a model's values, collected once, streaming, mergeable, in fixed memory.

Per value: minimum and maximum over all elements, mean, and a histogram whose edges never move. A float32's sign,
exponent and five mantissa bits name its bin, so counting is a shift and a ``bincount``, merging is adding, and one mask
of -3.4e38 spoils nothing. Observers (``observers.py``) turn that into ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.session import TAP_CHUNK_BYTES, Session, tap_chunks

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

MANTISSA_BITS = 5
BIN_COUNT = 1 << (1 + 8 + MANTISSA_BITS)
SAMPLED = 1 << 16
"""Elements per sample that reach the histogram; a larger tensor is thinned by a fixed stride."""

_FLUSH = 1 << 16


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
        """Add one array; ``samples`` is how many samples its leading axis stacks (1: the whole is one sample)."""
        if array.size == 0:
            return
        if array.dtype != np.float32:
            array = array.astype(np.float32)
        low, high = float(array.min()), float(array.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            finite = array[np.isfinite(array)]
            self.nonfinite += array.size - finite.size
            if finite.size == 0:
                return
            # Thinning by position would no longer mean the same elements, so such a sample is counted whole.
            self._add(finite, float(finite.min()), float(finite.max()), finite)
            return
        self._add(array, low, high, _thinned(array, samples))

    def _add(self, array: NDArray[Any], low: float, high: float, thinned: NDArray[Any]) -> None:
        self.count += array.size
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self.total += float(array.sum(dtype=np.float64 if array.size < 4096 else np.float32))
        if self.histogram is None:
            return
        if thinned.dtype.byteorder not in "=<|":
            thinned = thinned.astype("<f4")
        codes = np.ascontiguousarray(thinned).reshape(-1).view(np.uint16)[1::2]
        if codes.size >= _FLUSH // 4:
            self._count(codes)
            return
        # Small tensors wait for each other: a bincount pays for all its bins however few elements come.
        if self._codes is None:
            self._codes = np.empty(_FLUSH // 2, np.uint16)
        if self._filled + codes.size > self._codes.size:
            self.flush()
        self._codes[self._filled : self._filled + codes.size] = codes
        self._filled += codes.size

    def flush(self) -> None:
        """Count what still waits."""
        if self._codes is not None and self._filled:
            self._count(self._codes[: self._filled])
            self._filled = 0

    def _count(self, codes: NDArray[np.uint16]) -> None:
        assert self.histogram is not None
        self.histogram += np.bincount(codes >> (7 - MANTISSA_BITS), minlength=BIN_COUNT)

    def merge(self, other: ValueStatistics) -> None:
        """Add what ``other`` saw; the result equals one sweep over both."""
        self.flush()
        other.flush()
        self.count += other.count
        self.nonfinite += other.nonfinite
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.total += other.total
        if self.histogram is not None and other.histogram is not None:
            self.histogram = self.histogram + other.histogram


def _thinned(array: NDArray[Any], samples: int) -> NDArray[Any]:
    """At most about :data:`SAMPLED` elements of each sample, by element index within the sample.

    So batch size and order of samples do not matter.
    """
    if samples > 1 and array.ndim and array.shape[0] % samples == 0:
        rows = array.reshape(samples, -1)
    else:
        rows = array.reshape(1, -1)
    stride = -(-rows.shape[1] // SAMPLED)
    return rows if stride == 1 else rows[:, :: stride | 1]  # an odd stride: an even one could always hit one channel


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
    if first is None or not names:
        return result
    chunks = tap_chunks(model, names, first, cap=cap, threads=threads)
    for number, chunk in enumerate(chunks):
        session = Session(model, taps=chunk, threads=threads, outputs=False)
        source: Iterator[Mapping[str, NDArray[Any]]] = chain([first], iterator) if number == 0 else iter(feeds)
        for index, feed in enumerate(source):
            outputs = session.run(feed, chunk)
            batch = _batch(feed)
            for name in chunk:
                array = outputs[name]
                if isinstance(array, np.ndarray) and array.dtype.kind == "f":
                    result.values[name].update(array, batch if array.ndim and array.shape[0] == batch else 1)
            result.runs += 1
            if number == 0:
                result.samples += batch
            if progress is not None:
                progress(number * (index + 1) // len(chunks) if len(chunks) > 1 else index + 1)
    for value in result.values.values():
        value.flush()
    return result


def _batch(feed: Mapping[str, NDArray[Any]]) -> int:
    """The samples stacked in one feed: the leading dim, where all inputs agree on it."""
    leading = {a.shape[0] if a.ndim else 1 for a in feed.values()}
    return leading.pop() if len(leading) == 1 else 1
