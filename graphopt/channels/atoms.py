"""Atoms: one for each index of each axis of each constant, and which of them can only go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vector = NDArray[np.int64]
    """The atoms of one axis of a value; a negative number says that this index stays, and stands for the reason."""


class Atoms:
    """A union-find whose unions are collected and worked out once, at the end (scipy's connected components).

    An atom that is *frozen* stays, and with it all that were united with it; the first reason is kept.
    """

    def __init__(self) -> None:
        self.count = 0
        self.frozen: dict[int, str] = {}
        self._reasons: list[str] = []
        self._codes: dict[str, int] = {}
        self._edges: list[tuple[Vector, Vector]] = []

    def new(self, size: int) -> Vector:
        """Fresh atoms for an axis of ``size`` indices."""
        self.count += size
        return np.arange(self.count - size, self.count)

    def fixed(self, size: int, reason: str) -> Vector:
        """An axis that stays as it is, for ``reason``."""
        code = self._codes.get(reason)
        if code is None:
            self._reasons.append(reason)
            code = self._codes[reason] = -len(self._reasons)
        return np.full(size, code, np.int64)

    def reason(self, vector: Vector) -> str | None:
        """Why an axis stays whose every index does; None where one may go."""
        return None if live(vector) or not len(vector) else self._reasons[-int(vector[0]) - 1]

    def freeze(self, vector: Vector, reason: str) -> None:
        """These stay."""
        for atom in np.unique(vector[vector >= 0]).tolist():
            self.frozen.setdefault(atom, reason)

    def unite(self, a: Vector, b: Vector) -> None:
        """Index by index; what meets a fixed index is frozen for the same reason."""
        both = (a >= 0) & (b >= 0) & (a != b)
        if both.any():
            self._edges.append((a[both], b[both]))
        for one, other in ((a, b), (b, a)):
            for code in np.unique(one[(one < 0) & (other >= 0)]).tolist():
                self.freeze(other[one == code], self._reasons[-code - 1])

    def classes(self) -> tuple[Vector, dict[int, str]]:
        """(the class of each atom, the reasons of the classes that stay)."""
        empty = np.zeros(0, np.int64)
        left = np.concatenate([e[0] for e in self._edges] or [empty])
        right = np.concatenate([e[1] for e in self._edges] or [empty])
        graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(self.count, self.count))
        found: Vector = connected_components(graph, directed=False)[1].astype(np.int64)
        frozen: dict[int, str] = {}
        for atom, reason in self.frozen.items():
            frozen.setdefault(int(found[atom]), reason)
        return found, frozen


def live(vector: Vector) -> bool:
    """Whether any index of this axis may go."""
    return bool((vector >= 0).any())
