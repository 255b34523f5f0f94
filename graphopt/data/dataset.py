"""A re-iterable, lazy set of samples, and how one is split into a calibrating and a judging part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from graphopt.errors import InputError

Array: TypeAlias = npt.NDArray[Any]
Sample: TypeAlias = dict[str, Array]
"""Input name -> array, batch dimension included; every other key is a label."""


class Reader(Protocol):
    """Where samples come from: random access by index, nothing kept between two passes."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What an error message calls the sample."""
        ...

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        """The samples in the order asked for; ascending order is the cheap one. Raises DataError."""
        ...


class Dataset:
    """Samples that can be read again and again, one at a time.

    ``source`` names it in a report, ``synthetic`` says that the numbers were made up, ``notes`` are lines
    the report has to show (an ignored array, positional names).
    """

    def __init__(
        self,
        reader: Reader,
        *,
        source: str,
        synthetic: bool = False,
        notes: Sequence[str] = (),
        indices: Sequence[int] | None = None,
    ) -> None:
        self.source = source
        self.synthetic = synthetic
        self.notes = tuple(notes)
        self._reader = reader
        self._indices: Sequence[int] = range(len(reader)) if indices is None else indices
        self._digest: str | None = None

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Sample]:
        """Yield every sample once; raises DataError naming the sample that cannot be read."""
        return self._reader.read(self._indices)

    def __repr__(self) -> str:
        return f"<Dataset {self.source}: {len(self)} samples>"

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over names, dtypes, shapes and bytes in order; one pass, then remembered.

        Keys are taken in sorted order and numbers as little-endian, so the same samples have the same
        digest whichever way they were given.
        """
        if self._digest is None:
            total = hashlib.sha256()
            for sample in self:
                total.update(b"sample")
                for name in sorted(sample):
                    _hash_array(total, name, sample[name])
            self._digest = total.hexdigest()
        return self._digest

    def take(self, n: int) -> Dataset:
        """The first ``n`` samples (all of them if there are fewer). Raises InputError below 0."""
        if n < 0:
            raise InputError(f"cannot take {n} samples (of {self.source}); ask for 0 or more")
        return self._with(self._indices[:n])

    def subset(self, indices: Sequence[int]) -> Dataset:
        """The samples at ``indices``, in that order, repeats allowed. Raises InputError out of range."""
        for index in indices:
            if not 0 <= index < len(self):
                raise InputError(f"no sample {index} (in {self.source}); it has samples 0 to {len(self) - 1}")
        return self._with([self._indices[index] for index in indices])

    def sample_name(self, index: int) -> str:
        """What to call sample ``index`` in a message, such as ``calib.npz[17]`` or ``calib/a.npz``."""
        return self._reader.name(self._indices[index])

    def _with(self, indices: Sequence[int]) -> Dataset:
        return Dataset(self._reader, source=self.source, synthetic=self.synthetic, notes=self.notes, indices=indices)


def _hash_array(total: Any, name: str, array: Array) -> None:
    """Add one array to a hashlib object, streaming nothing larger than the array itself."""
    text = array.dtype.kind in "OSU"
    total.update(f"{name!r} {'str' if text else array.dtype.name} {array.shape}".encode())
    if text:
        for item in array.ravel().tolist():
            raw = item if isinstance(item, bytes) else str(item).encode("utf-8", "surrogatepass")
            total.update(len(raw).to_bytes(8, "little") + raw)
    else:
        little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
        total.update(little.reshape(-1).view(np.uint8).data if little.size else b"")


def split(dataset: Dataset, share: float = 0.2, seed: int = 0, least: int = 40) -> tuple[Dataset, Dataset, str]:
    """Hold back a seeded ``share`` of the samples: (calibration, held back, one line for the report).

    Below ``least`` samples nothing is held back: both parts are the whole. Raises InputError unless
    ``0 < share < 1``.
    """
    if not 0 < share < 1:
        raise InputError(f"cannot hold back a share of {share} (of {dataset.source}); give one between 0 and 1")
    n = len(dataset)
    if n < max(least, 2):
        note = f"nothing held back: {n} samples are fewer than {least}, so the calibration samples judge too"
        return dataset, dataset, note
    count = min(max(round(n * share), 1), n - 1)
    order = np.random.default_rng(seed).permutation(n).tolist()
    # Sorted, because compressed sources are read forward only.
    held, rest = sorted(order[:count]), sorted(order[count:])
    note = f"{count} of {n} samples held back for judging (seed {seed}); {n - count} calibrate"
    return dataset.subset(rest), dataset.subset(held), note
