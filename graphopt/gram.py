"""Second moments of what each layer reads: H = E[x x^T], in one streaming sweep, in bounded memory.

Every output of a layer is ``W x + b`` for some ``x`` of its input (a convolution's through im2col), so its squared
error after a change of weights is a quadratic: ``E|W x - W' x~|^2 = tr(W H W^T) - 2 tr(W C W'^T) + tr(W' H~ W'^T)``,
with ``C = E[x x~^T]`` and ``H~ = E[x~ x~^T]`` in the changed model. Rounding, clipping, bias correction and
reconstruction need nothing else (GPTQ, Frantar 2022; AdaRound, Nagel 2020; He 2017), whatever the number of samples.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.linear import Form
from graphopt.session import Session
from graphopt.statistics import samples_in
from graphopt.taps import TAP_CHUNK_BYTES, tap_chunks

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    Feeds = Iterable[Mapping[str, NDArray[Any]]]

PER_COLUMN = 4
LEAST_ROWS = 1024
"""Rows over all samples are about the larger of :data:`LEAST_ROWS` and :data:`PER_COLUMN` times K: positions of a
convolution, tokens of a MatMul. Neighbours tell little that is new, and the products are what a sweep costs."""

_AT_LEAST = 16  # rows per sample, however many samples there are

MEMORY_MB = 512
"""What the matrices of one sweep may hold together; beyond it they are collected in turns and kept in files."""

_BLOCK = 1024  # rows that wait for one product in float32, which is then added in float64


@dataclass
class LayerInput:
    """What was seen of a layer's input, summed over ``count`` rows of each group.

    ``gram``: float64[groups, K, K], the sum of x x^T; ``total``: float64[groups, K], the sum of x. NaN and infinity
    count as zero.
    """

    gram: NDArray[np.float64]
    total: NDArray[np.float64]
    count: int = 0
    _waiting: list[NDArray[Any]] = field(default_factory=list, repr=False)

    @classmethod
    def empty(cls, groups: int, width: int) -> LayerInput:
        """Nothing seen yet."""
        return cls(np.zeros((groups, width, width)), np.zeros((groups, width)))

    @property
    def second_moment(self) -> NDArray[np.float64]:
        """H = E[x x^T], float64[groups, K, K]."""
        return self.gram / max(self.count, 1)

    @property
    def mean(self) -> NDArray[np.float64]:
        """E[x], float64[groups, K]."""
        return self.total / max(self.count, 1)

    def add(self, columns: NDArray[np.float32]) -> None:
        """Add inputs, float32[groups, K, n]; they wait until a block is full, or for :meth:`flush`."""
        self._waiting.append(columns)
        if sum(part.shape[2] for part in self._waiting) >= _BLOCK:
            self.flush()

    def flush(self) -> None:
        """Count what still waits."""
        if not self._waiting:
            return
        columns = np.concatenate(self._waiting, axis=2)
        self._waiting = []
        columns, product = _product(columns)
        if self.count:
            self.gram += product
        else:  # the zeros of an empty one have no page of memory yet, and need none
            self.gram = product.astype(np.float64)
        self.total += columns.sum(axis=2)
        self.count += columns.shape[2]

    def merge(self, other: LayerInput) -> None:
        """Add what ``other`` saw of the same layer on other samples."""
        self.flush()
        other.flush()
        self.gram = self.gram + other.gram
        self.total = self.total + other.total
        self.count += other.count


@dataclass(frozen=True)
class Seen:
    """What a pass is told of a layer's input: its ``moments`` on some samples, and inputs of others to confirm on.

    ``held``: float32[groups, K, n]. ``memo`` is the passes' own: what they worked out of this once already.
    """

    moments: LayerInput
    held: NDArray[np.float32]
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)


def _product(a: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(a, a a^T: [groups, K, K]), both in float32 unless that overflows; NaN and infinity become zero.

    They are looked for in the product, which is smaller than the factor.
    """
    with np.errstate(all="ignore"):
        # Of one group, BLAS multiplies a matrix by its own transpose at half the cost.
        found: NDArray[Any] = (a[0] @ a[0].T)[None] if len(a) == 1 else np.matmul(a, a.transpose(0, 2, 1))
    if np.isfinite(found).all():
        return a, found
    clean = np.nan_to_num(a.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    return clean, np.matmul(clean, clean.transpose(0, 2, 1))


def squared_error(error: NDArray[np.float64], gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """e H e^T of each output: ``error`` [groups, outputs, K], ``gram`` [groups, K, K] -> float64[groups, outputs]."""
    result: NDArray[np.float64] = np.sum(np.matmul(error, gram) * error, axis=2)
    return result


def collect_inputs(
    model: ir.Model,
    forms: Sequence[Form],
    feeds: Feeds,
    *,
    memory_mb: float = MEMORY_MB,
    rows: int | None = None,
    samples: int | None = None,
    cap: int = TAP_CHUNK_BYTES,
    threads: int | None = None,
    scratch: Path | None = None,
) -> dict[Form, LayerInput]:
    """The moments of each form's input over ``feeds`` (re-iterable).

    ``rows`` per sample at most; None: as many as :data:`PER_COLUMN` asks for, given the number of ``samples`` in
    ``feeds`` (None: they are counted first).

    Which rows is decided by the position in the sample alone, so order and batch size change nothing but rounding.
    Forms whose matrices exceed ``memory_mb`` together are collected in as many sweeps as it takes and then lie in
    files under ``scratch`` (or a temporary folder that goes with the last of them); one that exceeds it by itself, or
    is never an array of floats, is left out.

    Raises:
        RuntimeFailure: the model does not load or run.
    """
    first = next(iter(feeds), None)
    if first is None or not forms:
        return {}
    if rows is None and samples is None:
        samples = sum(samples_in(feed) for feed in feeds)
    limit = int(memory_mb * 2**20)

    def per_sample(form: Form) -> int:
        return rows or _rows_for(form, samples or 1)

    turns = _turns([f for f in dict.fromkeys(forms) if f.gram_bytes <= limit], limit)
    folder = _Folder(scratch) if len(turns) > 1 else None
    found: dict[Form, LayerInput] = {}
    for turn in turns:
        seen: dict[Form, LayerInput] = {}
        for form, picked in each_input(
            model, turn, feeds, first, lambda f: rows or _rows_for(f, samples or 1), cap, threads
        ):
            if form not in seen:
                seen[form] = LayerInput.empty(form.groups, form.width)
            seen[form].add(picked)
        for form, value in seen.items():
            value.flush()
            if folder is not None:
                value.gram = folder.keep(value.gram, len(found))
            found[form] = value
    return found


def sample_inputs(
    model: ir.Model,
    forms: Sequence[Form],
    feeds: Feeds,
    *,
    most: int,
    samples: int | None = None,
    cap: int = TAP_CHUNK_BYTES,
    threads: int | None = None,
) -> dict[Form, NDArray[np.float32]]:
    """Inputs themselves, float32[groups, K, up to ``most``], spread over ``feeds``: to confirm on what H did not see.

    Raises:
        RuntimeFailure: the model does not load or run.
    """
    first = next(iter(feeds), None)
    if first is None or not forms:
        return {}
    count = sum(samples_in(feed) for feed in feeds) if samples is None else samples
    each = max(-(-most // max(count, 1)), 1)
    found: dict[Form, list[NDArray[np.float32]]] = {}
    for form, picked in each_input(model, list(dict.fromkeys(forms)), feeds, first, lambda _: each, cap, threads):
        found.setdefault(form, []).append(picked)
    return {form: np.concatenate(parts, axis=2)[:, :, :most] for form, parts in found.items()}


def _rows_for(form: Form, samples: int) -> int:
    """Rows per sample."""
    return max(-(-max(PER_COLUMN * form.width, LEAST_ROWS) // samples), _AT_LEAST)


def _turns(forms: Sequence[Form], limit: int) -> list[list[Form]]:
    turns: list[list[Form]] = []
    held = 0
    for form in forms:
        if not turns or held + form.gram_bytes > limit:
            turns.append([])
            held = 0
        turns[-1].append(form)
        held += form.gram_bytes
    return turns


class _Folder:
    """A temporary folder that goes with the last array that uses it."""

    def __init__(self, parent: Path | None) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="graphopt-gram-", dir=parent))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def keep(self, array: NDArray[np.float64], number: int) -> NDArray[np.float64]:
        """``array`` as a read-only view of a file here."""
        path = self.path / f"{number}.f64"
        array.tofile(path)
        mapped: Any = np.memmap(path, np.float64, "r", shape=array.shape)
        mapped.folder = self
        return mapped  # type: ignore[no-any-return]


def each_input(
    model: ir.Model,
    forms: Sequence[Form],
    feeds: Feeds,
    first: Mapping[str, NDArray[Any]],
    rows: Callable[[Form], int],
    cap: int,
    threads: int | None,
) -> Iterator[tuple[Form, NDArray[np.float32]]]:
    """(form, its inputs) of every feed, values tapped together while they fit ``cap`` bytes."""
    inner = list(dict.fromkeys(f.value for f in forms if f.value not in first))
    for number, chunk in enumerate(tap_chunks(model, inner, first, cap=cap, threads=threads) or [[]]):
        mine = [f for f in forms if f.value in chunk or (number == 0 and f.value in first)]
        session = Session(model, taps=chunk, threads=threads, outputs=False) if chunk else None
        for feed in feeds:
            arrays = {**feed, **(session.run(feed, chunk) if session is not None else {})}
            for form in mine:
                array = arrays[form.value]
                if isinstance(array, np.ndarray) and array.dtype.kind == "f" and array.size:
                    yield form, form.columns(array, samples_in(feed), rows(form))


def mean_diagonal(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of each group's diagonal, by which damping is measured, float64[groups]; 1 where it is 0."""
    found = np.diagonal(gram, axis1=1, axis2=2).mean(axis=1)
    return np.where(found > 0, found, 1.0)
