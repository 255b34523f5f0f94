"""Samples from Python objects, and the spool that lets a one-shot iterator be read again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.data.check import missing_input
from graphopt.data.dataset import Array, Sample
from graphopt.data.stored import Scratch, one_line, reading
from graphopt.errors import DataError

if TYPE_CHECKING:
    from graphopt.model import ValueSpec


def to_array(value: object, where: str) -> Array:
    """Anything array-like (numpy, a torch or TensorFlow tensor, an OrtValue, numbers) as an array.

    Raises DataError for ragged lists and for objects other than strings.
    """
    try:
        with_detach: Any = value
        if hasattr(value, "detach"):
            value = with_detach.detach().cpu().numpy()
        elif hasattr(value, "numpy") and not isinstance(value, np.ndarray):
            value = with_detach.numpy()
        array: Array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise DataError(
            f"{where} is no array ({one_line(error)}); give a numpy array of one shape and one number type"
        ) from error
    if array.dtype.hasobject and not all(isinstance(item, str | bytes) for item in array.ravel().tolist()):
        raise DataError(f"{where} holds Python objects; give a numpy array of one shape and one number type")
    return array


def as_sample(item: object, inputs: Sequence[ValueSpec], where: str) -> Sample:
    """One item of an iterable as a sample: a dict, a tuple or list in input order, or a lone array.

    What follows the inputs in a tuple is ``label``, ``label_1``, ... An item without the batch dimension (every
    input one axis short) gets it. Raises DataError naming the sample.
    """
    if isinstance(item, Mapping):
        sample = {str(key): to_array(value, f"'{key}' of {where}") for key, value in item.items()}
    elif isinstance(item, tuple | list) and not _is_numbers(item, inputs):
        sample = _positional(item, inputs, where)
    elif len(inputs) == 1:
        sample = {inputs[0].name: to_array(item, where)}
    else:
        names = ", ".join(f"'{spec.name}'" for spec in inputs)
        raise DataError(f"{where} is one array but the model has the inputs {names}; give a dict with these keys")
    for spec in inputs:
        if spec.name not in sample:
            raise missing_input(spec, sample, where, [other.name for other in inputs])
    if all(_is_short(sample[spec.name], spec) for spec in inputs):
        return {key: array[np.newaxis] for key, array in sample.items()}
    return sample


def _is_numbers(item: Sequence[object], inputs: Sequence[ValueSpec]) -> bool:
    """Whether a list is the one input's own numbers rather than a list of arrays."""
    return len(inputs) == 1 and bool(item) and all(isinstance(value, int | float | str) for value in item)


def _is_short(array: Array, spec: ValueSpec) -> bool:
    if not spec.shape:
        return False
    first = spec.shape[0]
    return array.ndim == len(spec.shape) - 1 and (first == 1 or not isinstance(first, int))


def _positional(item: Sequence[Any], inputs: Sequence[ValueSpec], where: str) -> Sample:
    sample: dict[str, Any] = {}
    rest = list(item)
    if rest and isinstance(rest[0], Mapping):  # ({"x": ...}, y), as many training loops have it
        sample.update((str(key), value) for key, value in rest.pop(0).items())
    else:
        if rest and isinstance(rest[0], tuple | list) and len(rest[0]) == len(inputs) > 1:  # ((a, b), y)
            rest = [*rest[0], *rest[1:]]
        if len(rest) < len(inputs):
            raise DataError(
                f"{where} has {len(rest)} arrays, the model has {len(inputs)} inputs "
                f"({', '.join(spec.name for spec in inputs)}); give one for each, or a dict"
            )
        sample.update((spec.name, rest.pop(0)) for spec in inputs)
    sample.update((f"label_{i}" if i else "label", value) for i, value in enumerate(rest))
    return {key: to_array(value, f"'{key}' of {where}") for key, value in sample.items()}


class ListReader:
    """A list or tuple already in memory; each item becomes a sample when it is read."""

    def __init__(self, items: Sequence[object], inputs: Sequence[ValueSpec], source: str) -> None:
        self._items = items
        self._inputs = inputs
        self._source = source

    def __len__(self) -> int:
        return len(self._items)

    def name(self, index: int) -> str:
        return f"{self._source}[{index}]"

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        for index in indices:
            yield as_sample(self._items[index], self._inputs, f"sample '{self.name(index)}'")


@dataclass(frozen=True)
class _Kept:
    """Where in the spool file an array lies."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int


class SpoolReader:
    """Samples written once to one temporary file, of which only the index stays in memory."""

    def __init__(self, scratch: Scratch, path: Path, source: str, index: list[dict[str, _Kept]]) -> None:
        self._scratch = scratch  # keeps the folder alive exactly as long as its reader
        self._path = path
        self._source = source
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def name(self, index: int) -> str:
        return f"{self._source}[{index}]"

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        if not indices:
            return
        with reading(self._source, "the temporary spool is gone, load the data again"):
            stream = self._path.open("rb")
        with stream:
            for index in indices:
                sample: Sample = {}
                for key, kept in self._index[index].items():
                    with reading(self.name(index), "the temporary spool is damaged, load the data again"):
                        stream.seek(kept.offset)
                        raw = bytearray(stream.read(math.prod(kept.shape) * kept.dtype.itemsize))
                        array = np.frombuffer(raw, kept.dtype) if raw else np.empty(0, kept.dtype)
                        sample[key] = array.reshape(kept.shape)
                yield sample


def spool(
    items: Iterator[object],
    inputs: Sequence[ValueSpec],
    source: str,
    scratch: Scratch,
    *,
    limit: int | None = None,
) -> SpoolReader:
    """Pull at most ``limit`` items and write them to ``scratch``.

    Raises DataError past the cap, for an item that is no sample, and for whatever the iterator itself raises.
    """
    index: list[dict[str, _Kept]] = []
    offset = 0
    path = scratch.folder() / "samples.bin"
    try:
        with path.open("wb") as target:
            while limit is None or len(index) < limit:
                item = _pull(items, source, len(index))
                if item is _END:
                    break
                kept: dict[str, _Kept] = {}
                for key, array in as_sample(item, inputs, f"sample '{source}[{len(index)}]'").items():
                    flat = _flat(array)
                    kept[key] = _Kept(flat.dtype, flat.shape, offset)
                    scratch.charge(flat.nbytes, source)
                    target.write(flat.tobytes())
                    offset += flat.nbytes
                index.append(kept)
    except OSError as error:
        scratch.close()
        raise DataError(
            f"cannot spool '{source}' to {scratch.folder()} ({one_line(error)}); free some space or give spool_dir"
        ) from error
    except BaseException:
        scratch.close()
        raise
    finally:
        close = getattr(items, "close", None)
        if callable(close):
            close()
    return SpoolReader(scratch, path, source, index)


_END = object()


def _pull(items: Iterator[object], source: str, index: int) -> object:
    """The next item; the user's own exception becomes one line that says where it was raised."""
    try:
        return next(items, _END)
    except DataError:
        raise
    except (Exception, SystemExit) as error:
        raise raised(source, error, f"at sample {index}") from error


def raised(source: str, error: BaseException, when: str) -> DataError:
    """A user's exception as a DataError, with the file and line it came from."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    line = "" if trace is None else f", {Path(trace.tb_frame.f_code.co_filename).name} line {trace.tb_lineno}"
    return DataError(f"'{source}' raised {type(error).__name__}: {one_line(error)} ({when}{line}); correct it there")


def _flat(array: Array) -> Array:
    """What can be written as plain bytes: strings as fixed width, numbers as they are."""
    return np.asarray(array.astype(str) if array.dtype.hasobject else array, order="C")
