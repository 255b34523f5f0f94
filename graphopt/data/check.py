"""Does the data fit the model? Feeds in the model's own dtypes, labels, and the dry run over a dataset."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.data.dataset import Array, Dataset, Sample
from graphopt.errors import DataError

if TYPE_CHECKING:
    from graphopt.model import ValueSpec

_MOST_SHAPES = 64


@dataclass(frozen=True)
class InputSummary:
    """What one input is fed: the model's dtype, the data's, the shapes seen and the range (None: no numbers)."""

    name: str
    dtype: str
    given: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    minimum: float | None
    maximum: float | None


@dataclass(frozen=True)
class SkippedSample:
    """A sample that cannot be used, by index and name, with the input and the reason."""

    index: int
    sample: str
    input: str
    reason: str

    def __str__(self) -> str:
        return f"sample '{self.sample}' {self.reason} for input '{self.input}'"


@dataclass(frozen=True)
class DataSummary:
    """The dry run over a dataset; ``kept`` are the usable indices, for ``dataset.subset(summary.kept)``."""

    source: str
    synthetic: bool
    samples: int
    kept: tuple[int, ...]
    inputs: tuple[InputSummary, ...]
    labels: tuple[str, ...]
    skipped: tuple[SkippedSample, ...]
    notes: tuple[str, ...]


def kind(dtype: np.dtype[Any]) -> str:
    """One letter: b bool, i int, u unsigned, f float, c complex, s string, V raw bytes, ? anything else.

    By name where numpy's own kind does not know ml_dtypes (bfloat16, float8, int4).
    """
    if dtype.kind in "OSU":
        return "s"
    if dtype.kind in "biufc":
        return dtype.kind
    for start, letter in (("bfloat", "f"), ("float", "f"), ("uint", "u"), ("int", "i"), ("void", "V")):
        if dtype.name.startswith(start):
            return letter
    return "?"


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def missing_input(spec: ValueSpec, keys: Iterable[str], where: str, names: Iterable[str] = ()) -> DataError:
    """The error for an input without data, with the key that differs only by case, dots or dashes."""
    taken = set(names)
    others = [key for key in keys if key not in taken]
    for key in others:
        if _plain(key) == _plain(spec.name):
            return DataError(
                f"{where} has no input '{spec.name}' but has '{key}'; did you mean '{spec.name}'? rename '{key}' to it"
            )
    have = ", ".join(f"'{key}'" for key in others[:8]) or "nothing else"
    return DataError(
        f"{where} has no input '{spec.name}' (it has {have}); name one of its arrays '{spec.name}', {spec}"
    )


def feeds(sample: Sample, inputs: Sequence[ValueSpec], *, name: str = "") -> dict[str, Array]:
    """Exactly the model's inputs, C-contiguous and in the model's dtype; ``name`` is the sample's, for errors.

    Lossless casts are made (int32 to int64, float64 to float32). Raises DataError naming the input where one
    is missing, has another rank or fixed dimension, or would need a cast that changes the numbers.
    """
    where = f"sample '{name}'" if name else "the sample"
    result: dict[str, Array] = {}
    for spec in inputs:
        array = _given(sample, spec, inputs, where)
        check_shape(array, spec, where)
        result[spec.name] = np.asarray(cast(array, spec, where), order="C")
    return result


def labels(sample: Sample, inputs: Sequence[ValueSpec]) -> dict[str, Array]:
    """Everything in the sample that is no input, as given."""
    names = {spec.name for spec in inputs}
    return {key: array for key, array in sample.items() if key not in names}


def _given(sample: Sample, spec: ValueSpec, inputs: Sequence[ValueSpec], where: str) -> Array:
    if spec.dtype is None:
        raise DataError(
            f"input '{spec.name}' is no tensor, so {where} cannot feed it; extract the part of the model "
            "that takes tensors"
        )
    if spec.name not in sample:
        raise missing_input(spec, sample, where, [item.name for item in inputs])
    array = sample[spec.name]
    if kind(array.dtype) == "V" and spec.dtype.isbuiltin != 1 and array.dtype.itemsize == spec.dtype.itemsize:
        return array.view(spec.dtype)  # numpy.save keeps bfloat16 and the like as raw bytes
    return array


def check_shape(array: Array, spec: ValueSpec, where: str) -> None:
    """Rank and fixed dimensions. Raises DataError naming sample, input and axis."""
    if spec.shape is None:
        return
    wants = f"the model wants {spec}"
    if array.ndim != len(spec.shape):
        raise DataError(
            f"{where} has rank {array.ndim} ({_shape(array)}) for input '{spec.name}', {wants}; "
            "give the batch dimension and no other extra ones"
        )
    for axis, (have, want) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if isinstance(want, int) and have != want:
            what = "channels" if array.ndim == 4 and axis == 1 and want in (1, 3, 4) else f"size on axis {axis}"
            raise DataError(
                f"{where} has {have} {what} for input '{spec.name}', the model wants {want} "
                f"({spec}, given {_shape(array)}); {_shape_fix(array, spec)}"
            )


def _shape(array: Array) -> str:
    return f"[{','.join(map(str, array.shape))}]"


def _shape_fix(array: Array, spec: ValueSpec) -> str:
    """What would make the shape fit, tried on the two layouts of images."""
    wanted = spec.shape or ()
    for order, name in (((0, 3, 1, 2), "NHWC"), ((0, 2, 3, 1), "NCHW")):
        if array.ndim == 4 and all(
            not isinstance(want, int) or array.shape[axis] == want for axis, want in zip(order, wanted, strict=True)
        ):
            return f"the data looks {name}, use numpy.transpose(x, {order})"
    if isinstance(wanted[0], int) and array.shape[1:] == tuple(wanted[1:]):
        return f"give batches of {wanted[0]}, or make the model's batch dimension dynamic"
    return "prepare the data the way the model was trained"


def cast(array: Array, spec: ValueSpec, where: str) -> Array:
    """``array`` in the dtype the model wants, where no number changes its meaning. Raises DataError."""
    want = spec.dtype
    assert want is not None
    have = array.dtype
    if have == want:
        return array if have.isnative else array.astype(want)
    pair = kind(have) + kind(want)
    if pair == "ss":
        text = np.char.decode(array, "utf-8") if have.kind == "S" else array
        return text.astype(object)
    if pair in ("ff", "fc", "cc"):
        return _narrow(array, want, spec, where)
    if pair[0] in "biu" and pair[1] in "biu":
        return _exact(array, want, spec, where)
    if pair[0] in "biu" and pair[1] == "f":
        if have.itemsize == 1 and have.kind != "b":
            raise DataError(
                f"{where} is {have.name} for input '{spec.name}', the model wants {spec}; scale it as "
                f"in training, for instance x.astype('{want.name}') / 255"
            )
        return _exact(array, want, spec, where)
    raise DataError(
        f"{where} is {'string' if pair[0] == 's' else have.name} for input '{spec.name}', the model wants "
        f"{spec}; convert it yourself if that is meant, as the numbers would change"
    )


def _narrow(array: Array, want: np.dtype[Any], spec: ValueSpec, where: str) -> Array:
    """Float to float; refused where a finite number would become infinite."""
    with np.errstate(all="ignore"):
        out = array.astype(want)
    if want.itemsize <= array.dtype.itemsize and array.size:
        lost = ~np.isfinite(out.astype(np.complex128 if kind(want) == "c" else np.float64)) & np.isfinite(array)
        if lost.any():
            raise DataError(
                f"{where} has {array.dtype.name} values for input '{spec.name}' too large for {want.name}; "
                "scale them as in training"
            )
    return out


def _exact(array: Array, want: np.dtype[Any], spec: ValueSpec, where: str) -> Array:
    """Integer or bool to another type, refused where any value does not survive."""
    with np.errstate(all="ignore"):
        out = array.astype(want)
        back = out.astype(array.dtype)
    # Wrap-around survives the way back, but it flips the sign.
    flipped = kind(want) in "iu" and bool(np.any((_numbers(out) < 0) != (_numbers(array) < 0)))
    if flipped or not np.array_equal(back, array):
        raise DataError(
            f"{where} has {array.dtype.name} values for input '{spec.name}' that {want.name} cannot hold, the model "
            f"wants {spec}; check that this is the right array"
        )
    return out


@dataclass
class _Seen:
    """What the dry run gathers on one input."""

    given: dict[str, None] = field(default_factory=dict)
    shapes: dict[tuple[int, ...], None] = field(default_factory=dict)
    low: float | None = None
    high: float | None = None
    more: bool = False

    def add(self, array: Array, given: np.dtype[Any]) -> None:
        """Take one array in; bounded memory whatever the number of samples."""
        self.given["string" if kind(given) == "s" else given.name] = None
        if array.shape in self.shapes or len(self.shapes) < _MOST_SHAPES:
            self.shapes[array.shape] = None
        else:
            self.more = True
        bounds = _bounds(array)
        if bounds is not None:
            self.low = bounds[0] if self.low is None else min(self.low, bounds[0])
            self.high = bounds[1] if self.high is None else max(self.high, bounds[1])


def _numbers(array: Array) -> Array:
    """Something numpy can reduce: ml_dtypes go through float32."""
    return array if array.dtype.kind in "biufc" else array.astype(np.float32)


def _bounds(array: Array) -> tuple[float, float] | None:
    if kind(array.dtype) not in "biuf" or not array.size:
        return None
    numbers = _numbers(array)
    return float(numbers.min()), float(numbers.max())


def _unusable(array: Array) -> str | None:
    """Why no statistic may see this array, or None."""
    if not array.size:
        return f"is empty ({_shape(array)})"
    if kind(array.dtype) not in "fc":
        return None
    bad = int(np.count_nonzero(~np.isfinite(_numbers(array))))
    return f"has {bad} NaN or infinite of {array.size} values" if bad else None


def _check_symbols(given: dict[str, Array], inputs: Sequence[ValueSpec], where: str) -> None:
    """One symbolic dimension has one size within a sample. Raises DataError naming both inputs."""
    seen: dict[str, tuple[int, str]] = {}
    for spec in inputs:
        for size, dim in zip(given[spec.name].shape, spec.shape or (), strict=False):
            if isinstance(dim, str) and dim and seen.setdefault(dim, (size, spec.name))[0] != size:
                other, name = seen[dim]
                raise DataError(
                    f"{where} has {dim}={size} for input '{spec.name}' but {dim}={other} for input '{name}' "
                    f"({spec}); give both the same size"
                )


def summarize(dataset: Dataset, inputs: Sequence[ValueSpec], *, limit: int | None = None) -> DataSummary:
    """The dry run: one pass over (the first ``limit``) samples, every one checked against the model.

    Samples with an empty, NaN or infinite input are counted and skipped. Raises DataError, naming sample and
    input, for a missing input, a dtype, rank or dimension that does not fit, or when no sample is usable.
    """
    part = dataset if limit is None else dataset.take(limit)
    seen = {spec.name: _Seen() for spec in inputs}
    others: dict[str, None] = {}
    kept: list[int] = []
    skipped: list[SkippedSample] = []
    for index, sample in enumerate(part):
        name = part.sample_name(index)
        where = f"sample '{name}'"
        given = {spec.name: _given(sample, spec, inputs, where) for spec in inputs}
        others.update(dict.fromkeys(labels(sample, inputs)))
        reasons = ((key, _unusable(array)) for key, array in given.items())
        bad = next(((key, reason) for key, reason in reasons if reason), None)
        if bad is not None:
            skipped.append(SkippedSample(index, name, *bad))
            continue
        ready = feeds(sample, inputs, name=name)
        _check_symbols(ready, inputs, where)
        for key, array in ready.items():
            seen[key].add(array, given[key].dtype)
        kept.append(index)
    if not kept:
        raise _none_usable(dataset, skipped)
    return DataSummary(
        source=dataset.source,
        synthetic=dataset.synthetic,
        samples=len(part),
        kept=tuple(kept),
        inputs=tuple(_summary(spec, seen[spec.name]) for spec in inputs),
        labels=tuple(others),
        skipped=tuple(skipped),
        notes=(*dataset.notes, *_cast_notes(inputs, seen)),
    )


def _none_usable(dataset: Dataset, skipped: Sequence[SkippedSample]) -> DataError:
    if not skipped:
        return DataError(f"there are no samples (in {dataset.source}); give at least one")
    first = skipped[0]
    return DataError(
        f"none of the {len(skipped)} samples can be used: {first} (in {dataset.source}); check how the data was made"
    )


def _summary(spec: ValueSpec, seen: _Seen) -> InputSummary:
    assert spec.dtype is not None
    dtype = "string" if kind(spec.dtype) == "s" else spec.dtype.name
    return InputSummary(spec.name, dtype, tuple(seen.given), tuple(seen.shapes), seen.low, seen.high)


def _cast_notes(inputs: Sequence[ValueSpec], seen: dict[str, _Seen]) -> list[str]:
    notes = []
    for spec in inputs:
        wanted = _summary(spec, seen[spec.name]).dtype
        casts = [given for given in seen[spec.name].given if given != wanted]
        if casts:
            notes.append(f"input '{spec.name}': {', '.join(casts)} data is cast to {wanted}")
        if seen[spec.name].more:
            notes.append(f"input '{spec.name}': more than {_MOST_SHAPES} different shapes, the first are listed")
    return notes
