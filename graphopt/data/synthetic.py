"""Made-up but legal inputs: for `--data random`, when it is spelled so, and for validation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.budgets import total_memory
from graphopt.data.check import kind
from graphopt.data.dataset import Array, Dataset, Sample
from graphopt.errors import InputError

if TYPE_CHECKING:
    from graphopt.model import ValueSpec

_OTHER_DIM = 8
_IDS = 10
_DRAWN = 8
_WORDS = ("a", "b", "c")


def legal_random(
    inputs: Sequence[ValueSpec],
    seed: int = 0,
    n: int = 8,
    bounds: Mapping[str, tuple[float, float]] | None = None,
) -> Dataset:
    """``n`` seeded samples the model may be fed; sample ``i`` depends on ``seed`` and ``i`` only.

    Floats are N(0, 1), integers small and not negative (0 to 9; 0 or 1 for token types, 1 for masks), uint8
    the whole byte, bools random; ``bounds`` gives (low, high), both included, per input name. A symbolic dim
    is 1 where it leads any input, else 8. Raises InputError for an input of unknown rank or no tensor, and
    for bounds that name no input or are empty.
    """
    limits = dict(bounds or {})
    names = {spec.name for spec in inputs}
    for name, (low, high) in limits.items():
        if name not in names:
            raise InputError(f"no input '{name}' to bound (the model has {', '.join(sorted(names))}); name one")
        if not low <= high:
            raise InputError(f"the bounds ({low}, {high}) of input '{name}' are empty; give low <= high")
    if n < 1:
        raise InputError(f"cannot make {n} random samples; ask for 1 or more, as in random:8")
    return Dataset(_RandomReader(inputs, seed, n, limits), source=f"random:{n} (seed {seed})", synthetic=True)


class _RandomReader:
    def __init__(
        self, inputs: Sequence[ValueSpec], seed: int, n: int, bounds: Mapping[str, tuple[float, float]]
    ) -> None:
        self._shapes = _shapes(inputs)
        self._dtypes = {spec.name: spec.dtype for spec in inputs if spec.dtype is not None}
        for name, shape in self._shapes.items():
            if math.prod(shape) * _DRAWN > total_memory() // 2:  # drawn as float64, and then cast
                dims = ", ".join(map(str, shape))
                raise InputError(f"input '{name}' of shape [{dims}] does not fit into memory; give smaller dims")
        self._seed = seed
        self._n = n
        self._bounds = bounds

    def __len__(self) -> int:
        return self._n

    def name(self, index: int) -> str:
        return f"random[{index}]"

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        for index in indices:
            rng = np.random.default_rng([self._seed, index])
            yield {
                name: _draw(rng, name, self._dtypes[name], shape, self._bounds.get(name))
                for name, shape in self._shapes.items()
            }


def _shapes(inputs: Sequence[ValueSpec]) -> dict[str, tuple[int, ...]]:
    """A concrete shape per input, one size per symbol. Raises InputError."""
    for spec in inputs:
        if spec.dtype is None:
            raise InputError(f"input '{spec.name}' is no tensor, so no random data can be made; give real data")
        if spec.shape is None:
            raise InputError(
                f"input '{spec.name}' has no declared rank, so no random data can be made; "
                "declare its shape or give real data"
            )
    leading = {spec.shape[0] for spec in inputs if spec.shape}
    return {
        spec.name: tuple(
            dim if isinstance(dim, int) else 1 if axis == 0 or (dim and dim in leading) else _OTHER_DIM
            for axis, dim in enumerate(spec.shape or ())
        )
        for spec in inputs
    }


def _draw(
    rng: np.random.Generator,
    name: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    bounds: tuple[float, float] | None,
) -> Array:
    what = kind(dtype)
    if what == "s":
        return np.asarray(rng.choice(_WORDS, shape)).astype(object)
    if what == "b":
        return np.asarray(rng.integers(0, 2, shape)).astype(dtype)
    if what in "iu":
        low, high = _int_bounds(name, dtype, len(shape)) if bounds is None else bounds
        return np.asarray(rng.integers(int(np.ceil(low)), int(high), shape, endpoint=True)).astype(dtype)
    if what == "c":
        return np.asarray(rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(dtype)
    drawn = rng.standard_normal(shape) if bounds is None else rng.uniform(*bounds, shape)
    return np.asarray(drawn).astype(dtype)


def _int_bounds(name: str, dtype: np.dtype[Any], rank: int) -> tuple[int, int]:
    """Integers are mostly indices into a table of unknown size, so small ones are the legal ones."""
    if dtype == np.uint8 and rank >= 3:
        return 0, 255  # pixels
    lowered = name.casefold()
    if "mask" in lowered:
        return 1, 1
    if "type" in lowered or "segment" in lowered:
        return 0, 1
    return 0, 7 if dtype.name in ("int4", "uint4") else 1 if dtype.name in ("int2", "uint2") else _IDS - 1
