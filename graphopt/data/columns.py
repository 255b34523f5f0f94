"""Arrays that hold many samples (or lists of arrays that hold one each), cut into samples.

Shared by .npz, .npy, folders of either and dicts of arrays in memory, so that the same numbers give the same
samples whichever way they come.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from graphopt.data.check import missing_input
from graphopt.data.dataset import Array, Reader, Sample
from graphopt.data.stored import Rows, Scratch, Stored, reading
from graphopt.errors import DataError

if TYPE_CHECKING:
    from graphopt.model import ValueSpec

Origin: TypeAlias = Stored | Array
Getter: TypeAlias = Callable[[int], Array]
_INDEXED = re.compile(r"(.+)/(\d+)")
_POSITIONAL = re.compile(r"arr_(\d+)")


@dataclass(frozen=True)
class Stacked:
    """Samples along the leading axis of one array: ``step`` rows each; ``drop`` takes a row without the axis."""

    origin: Origin
    step: int = 1
    drop: bool = False

    @property
    def count(self) -> int:
        return self.origin.shape[0] // self.step


@dataclass(frozen=True)
class Listed:
    """One array per sample, batch dimension included unless ``add`` puts it there."""

    origins: tuple[Origin, ...]
    add: bool = False

    @property
    def count(self) -> int:
        return len(self.origins)


Column: TypeAlias = Stacked | Listed


def cut(shape: tuple[int, ...], spec: ValueSpec) -> tuple[int, bool] | None:
    """(rows per sample, drop the leading axis?) for a stacked array; None where no axis of samples is there.

    A model with a fixed first axis of B takes B rows per sample. An array with one axis more than the
    input has one sample per row, batch dimension included.
    """
    if not shape:
        return None
    if spec.shape is None:
        return 1, False
    if len(shape) == len(spec.shape) + 1:
        return 1, True
    if len(shape) < len(spec.shape):
        return None
    first = spec.shape[0] if spec.shape else None
    return (first if isinstance(first, int) and first > 1 else 1), False


class ColumnReader:
    """Samples put together from columns of equal length; files are open during a pass only."""

    def __init__(self, columns: Mapping[str, Column], name: Callable[[int], str], scratch: Scratch) -> None:
        self._columns = columns
        self._name = name
        self._scratch = scratch
        self._count = min(column.count for column in columns.values())

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return self._name(index)

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        with ExitStack() as stack:
            archives: dict[Path, zipfile.ZipFile] = {}
            getters = {key: self._getter(col, stack, archives) for key, col in self._columns.items()}
            for index in indices:
                yield {key: get(index) for key, get in getters.items()}

    def _archive(
        self, stored: Stored, stack: ExitStack, archives: dict[Path, zipfile.ZipFile]
    ) -> zipfile.ZipFile | None:
        if stored.member is None:
            return None
        if stored.path not in archives:
            with reading(stored.path.name):
                archives[stored.path] = stack.enter_context(zipfile.ZipFile(stored.path))
        return archives[stored.path]

    def _getter(self, column: Column, stack: ExitStack, archives: dict[Path, zipfile.ZipFile]) -> Getter:
        if isinstance(column, Listed):
            listed = column

            def one(index: int) -> Array:
                origin = listed.origins[index]
                if isinstance(origin, Stored):
                    with Rows(origin, self._archive(origin, stack, archives), self._scratch) as rows:
                        array = rows.whole()
                else:
                    array = origin
                return array[np.newaxis] if listed.add else array

            return one
        origin, step, drop = column.origin, column.step, column.drop
        if isinstance(origin, Stored):
            get = stack.enter_context(Rows(origin, self._archive(origin, stack, archives), self._scratch)).get
        else:
            array = origin

            def get(start: int, count: int) -> Array:
                return np.asarray(array[start : start + count], order="C")

        return lambda index: get(index, 1)[0, ...] if drop else get(index * step, step)


class ChainReader:
    """Several readers one after the other, such as a folder of .npz files."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self._readers = readers
        self._where = [(at, i) for at, reader in enumerate(readers) for i in range(len(reader))]

    def __len__(self) -> int:
        return len(self._where)

    def name(self, index: int) -> str:
        at, local = self._where[index]
        return self._readers[at].name(local)

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        run: list[int] = []
        current = -1
        for index in indices:
            at, local = self._where[index]
            if at != current and run:
                yield from self._readers[current].read(run)
                run = []
            current = at
            run.append(local)
        if run:
            yield from self._readers[current].read(run)


def columns(
    arrays: Mapping[str, Origin],
    lists: Mapping[str, Sequence[Origin]],
    inputs: Sequence[ValueSpec],
    where: str,
    *,
    per_file: bool = False,
) -> tuple[dict[str, Column], list[str]]:
    """The columns of ``where`` and notes on what was left out.

    ``arrays`` may also hold keys ``<name>/<index>``. With ``per_file`` the file may be one sample, which it
    is where the inputs' leading axes do not agree. Raises DataError naming the input.
    """
    arrays, lists = _gather(arrays, lists, {spec.name for spec in inputs}, where)
    arrays, notes = _positional(arrays, lists, inputs, where)
    for spec in inputs:
        if spec.name not in arrays and spec.name not in lists:
            raise missing_input(spec, [*arrays, *lists], where, [s.name for s in inputs])
    whole = per_file and not lists and _is_one(arrays, inputs)
    found: dict[str, Column] = {}
    for spec in inputs:
        if spec.name in lists:
            found[spec.name] = Listed(tuple(lists[spec.name]))
        elif whole:
            origin = arrays[spec.name]
            found[spec.name] = Listed((origin,), spec.shape is not None and len(origin.shape) < len(spec.shape))
        else:
            found[spec.name] = _stack(arrays[spec.name], spec, where)
    count = _agree(found, where)
    names = set(found)
    for key in [*arrays, *lists]:
        if key not in names:
            label = _label(key, arrays, lists, count, found[inputs[0].name], whole)
            if label is None:
                notes.append(f"'{key}' of {where} is left out: it is no input and does not have {count} samples")
            else:
                found[key] = label
    return found, notes


def _gather(
    arrays: Mapping[str, Origin], lists: Mapping[str, Sequence[Origin]], names: set[str], where: str
) -> tuple[dict[str, Origin], dict[str, Sequence[Origin]]]:
    """Move ``<name>/<index>`` keys to lists; a key that is an input's own name stays what it is."""
    plain: dict[str, Origin] = {}
    indexed: dict[str, dict[int, Origin]] = {}
    for key, origin in arrays.items():
        match = None if key in names else _INDEXED.fullmatch(key)
        if match:
            indexed.setdefault(match[1], {})[int(match[2])] = origin
        else:
            plain[key] = origin
    for key, members in indexed.items():
        if key in plain or key in lists:
            raise DataError(f"{where} holds '{key}' twice, whole and as '{key}/<index>'; keep one of them")
        gaps = [index for index in range(len(members)) if index not in members]
        if gaps:
            raise DataError(
                f"{where} has no '{key}/{gaps[0]}' among its {len(members)} members '{key}/<index>'; "
                "number the samples from 0 without gaps"
            )
    gathered = {key: [members[i] for i in range(len(members))] for key, members in indexed.items()}
    return plain, {**lists, **gathered}


def _positional(
    arrays: dict[str, Origin],
    lists: Mapping[str, Sequence[Origin]],
    inputs: Sequence[ValueSpec],
    where: str,
) -> tuple[dict[str, Origin], list[str]]:
    """What numpy.savez(file, a, b) calls arr_0, arr_1 goes to the inputs in their order, with a note."""
    indices = [int(match[1]) for key in arrays if (match := _POSITIONAL.fullmatch(key))]
    if lists or len(indices) != len(arrays) or len(arrays) < len(inputs):
        return arrays, []
    if any(spec.name in arrays for spec in inputs):
        return arrays, []
    renamed: dict[str, Origin] = {}
    for index in sorted(indices):
        extra = index - len(inputs)
        name = inputs[index].name if extra < 0 else "label" if extra == 0 else f"label_{extra}"
        renamed[name] = arrays[f"arr_{index}"]
    order = ", ".join(f"'{spec.name}'" for spec in inputs)
    return renamed, [f"{where} has unnamed arrays (arr_0, ...), taken as {order} in this order"]


def _is_one(arrays: Mapping[str, Origin], inputs: Sequence[ValueSpec]) -> bool:
    """Whether a file of a folder is a single sample rather than a stack."""
    counts = set()
    for spec in inputs:
        shape = arrays[spec.name].shape
        how = cut(shape, spec)
        if how is None or shape[0] % how[0]:
            return True
        counts.add(shape[0] // how[0])
    return len(counts) != 1 or counts == {0}


def _stack(origin: Origin, spec: ValueSpec, where: str) -> Stacked:
    how = cut(origin.shape, spec)
    if how is None:
        raise DataError(
            f"{where} has shape {list(origin.shape)} for input '{spec.name}', the model wants {spec}; "
            "the leading axis must count the samples, add it"
        )
    step, drop = how
    if origin.shape[0] % step:
        raise DataError(
            f"{where} has {origin.shape[0]} rows for input '{spec.name}', the model takes {step} at a time "
            f"({spec}); give a multiple of {step}"
        )
    return Stacked(origin, step, drop)


def _agree(found: Mapping[str, Column], where: str) -> int:
    counts = {name: column.count for name, column in found.items()}
    if len(set(counts.values())) > 1:
        listing = ", ".join(f"{count} of '{name}'" for name, count in counts.items())
        raise DataError(f"{where} does not hold the same number of samples of every input ({listing}); even them out")
    return next(iter(counts.values()))


def _label(
    key: str,
    arrays: Mapping[str, Origin],
    lists: Mapping[str, Sequence[Origin]],
    count: int,
    like: Column,
    whole: bool,
) -> Column | None:
    """The column of a key that is no input, or None where it cannot be cut into ``count`` samples."""
    if key in lists:
        return Listed(tuple(lists[key])) if len(lists[key]) == count else None
    origin = arrays[key]
    if whole or (count == 1 and not origin.shape):
        return Listed((origin,))
    step = like.step if isinstance(like, Stacked) else 1
    rows = origin.shape[0] if origin.shape else 0
    if rows == count:
        return Stacked(origin)
    return Stacked(origin, step) if rows == count * step else None
