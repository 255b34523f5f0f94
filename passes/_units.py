"""Which units go: the cheapest loss per MAC (or byte, or channel) first, over all groups, until enough is gone."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from graphopt.channels.atoms import live
from graphopt.graph import constant

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from graphopt.channels import Channels, Group

LEAST = 0.1
"""The share of a group's units that always stays: a layer of two channels is an end, not an economy."""


SLACK = 0.02
"""How far beyond what was asked for a step may go while there are shorter ones."""


@dataclass(frozen=True)
class Path:
    """The free units of ``group`` in the order in which they go; ``loss[n]``: what is lost when the first n are gone,
    rising, as a share of what the layers that read them put out."""

    group: Group
    order: NDArray[np.int64]
    loss: NDArray[np.float64]


class Ledger:
    """MACs, bytes and channels that are left while units go, by axis: an axis enters with how many indices it has."""

    def __init__(self, channels: Channels) -> None:
        self.count = channels.count
        self._axes: dict[bytes, int] = {}
        self._lengths: list[float] = []
        self._members: dict[int, dict[int, int]] = {}
        self._channels = channels
        macs = channels.node_macs()
        self.macs = [
            (weight * share, self._ids(vectors))
            for weight, product in zip(macs, channels.products, strict=True)
            for share, vectors in product.terms
        ]
        self.bytes: list[tuple[float, list[int]]] = []
        for value, axes in channels.constants.items():
            tensor = constant(value)
            if tensor is not None:
                self.bytes.append((float(tensor.nbytes), self._ids(axes)))
        self._full = list(self._lengths)
        self.left = list(self._lengths)
        self._macs_of = self._touching(self.macs)
        self._bytes_of = self._touching(self.bytes)

    def _ids(self, vectors: Sequence[NDArray[np.int64]]) -> list[int]:
        found = []
        for vector in vectors:
            if not live(vector):
                continue
            units = self._channels.units_of(vector)
            key = units.tobytes()
            if key not in self._axes:
                number = self._axes[key] = len(self._lengths)
                self._lengths.append(float(len(units)))
                for unit, times in zip(*np.unique(units[units >= 0], return_counts=True), strict=True):
                    self._members.setdefault(int(unit), {})[number] = int(times)
            found.append(self._axes[key])
        return found

    @staticmethod
    def _touching(terms: list[tuple[float, list[int]]]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for number, (_, axes) in enumerate(terms):
            for axis in set(axes):
                found.setdefault(axis, []).append(number)
        return found

    def lost(self, units: Sequence[int]) -> dict[int, int]:
        """How many indices of each axis go with these units."""
        found: dict[int, int] = {}
        for unit in units:
            for axis, times in self._members.get(unit, {}).items():
                found[axis] = found.get(axis, 0) + times
        return found

    def _term(self, term: tuple[float, list[int]], gone: dict[int, int]) -> float:
        value = term[0]
        for axis in term[1]:
            value *= (self.left[axis] - gone.get(axis, 0)) / self._full[axis]
        return value

    def total(self, what: str) -> float:
        """MACs or bytes that are left."""
        return sum(self._term(term, {}) for term in (self.macs if what == "macs" else self.bytes))

    def saved(self, gone: dict[int, int], what: str) -> float:
        """What goes with these indices, as things stand."""
        terms, of = (self.macs, self._macs_of) if what == "macs" else (self.bytes, self._bytes_of)
        touched = {number for axis in gone for number in of.get(axis, ())}
        return sum(self._term(terms[n], {}) - self._term(terms[n], gone) for n in touched)

    def allows(self, gone: dict[int, int]) -> bool:
        """Whether something is left of every axis."""
        return all(self.left[axis] - times >= 1 for axis, times in gone.items())

    def take(self, gone: dict[int, int]) -> None:
        """These indices are gone."""
        for axis, times in gone.items():
            self.left[axis] -= times


@dataclass(frozen=True)
class Amount:
    """How much goes. ``macs``, ``bytes``: the share that is left; ``ratio``: the share of free channels that goes."""

    what: str
    share: float

    @property
    def saving(self) -> str:
        """What a removal is worth by."""
        return "bytes" if self.what == "size" else "macs"


def choose(channels: Channels, paths: Sequence[Path], amount: Amount, multiple: int) -> NDArray[np.bool_]:
    """Per unit, whether it stays.

    ``multiple``: what is left of a layer's output channels is a multiple of it, where it was one before.
    """
    ledger = Ledger(channels)
    keep = np.ones(channels.count, np.bool_)
    state = [0] * len(paths)
    steps = [_steps(channels, path, multiple) for path in paths]
    start = ledger.total(amount.saving)
    everything = sum(len(path.order) for path in paths)
    removed = 0
    heap: list[tuple[float, int, int]] = []

    def price(number: int) -> float | None:
        path, at = paths[number], state[number]
        following = [s for s in steps[number] if s > at]
        if not following:
            return None
        units = path.order[at : following[0]].tolist()
        gone = ledger.lost(units)
        if not ledger.allows(gone):
            return None
        worth = ledger.saved(gone, amount.saving) if amount.what != "ratio" else float(len(units))
        return float(path.loss[following[0]] - path.loss[at]) / worth if worth > 0 else None

    def push(number: int) -> None:
        found = price(number)
        if found is not None:
            heapq.heappush(heap, (found, number, state[number]))

    def short(units: NDArray[np.int64]) -> float:
        """By how much the removal of these would miss what is asked for, on the far side."""
        if amount.what == "ratio":
            return (removed + len(units)) / everything - amount.share
        gone = ledger.lost(units.tolist())
        return amount.share - (ledger.total(amount.saving) - ledger.saved(gone, amount.saving)) / start

    def take(number: int, upto: int) -> int:
        units = paths[number].order[state[number] : upto]
        ledger.take(ledger.lost(units.tolist()))
        keep[units] = False
        state[number] = upto
        return len(units)

    for number in range(len(paths)):
        push(number)
    too_far: list[tuple[float, int, int]] = []
    while heap and not _enough(amount, ledger, start, removed, everything):
        cost, number, at = heapq.heappop(heap)
        now = price(number)
        if now is None:
            continue
        if heap and now > cost * (1 + 1e-9) and now > heap[0][0]:  # others have shrunk since: it is worth less now
            heapq.heappush(heap, (now, number, at))
            continue
        upto = next(s for s in steps[number] if s > at)
        beyond = short(paths[number].order[at:upto])
        if beyond > SLACK:
            too_far.append((beyond, number, upto))
            continue
        removed += take(number, upto)
        push(number)
    if too_far and not _enough(amount, ledger, start, removed, everything):
        _, number, upto = min(too_far)
        take(number, upto)
    return keep


def _enough(amount: Amount, ledger: Ledger, start: float, removed: int, everything: int) -> bool:
    if amount.what == "ratio":
        return removed >= amount.share * everything
    return ledger.total(amount.saving) <= amount.share * start


def _steps(channels: Channels, path: Path, multiple: int) -> list[int]:
    """How many units may be gone: at those numbers what is left of the layers' outputs is round."""
    least = max(1, math.ceil(LEAST * len(path.group.units)))
    most = min(len(path.order), len(path.group.units) - least)
    made = [p.made for p in channels.products if p.node in path.group.layers]
    lengths = {len(vector): channels.units_of(vector) for vector in made}
    counts = [
        (length, np.cumsum([0, *(int((units == unit).sum()) for unit in path.order[:most])]))
        for length, units in lengths.items()
    ]
    found = []
    for gone in range(1, most + 1):
        left = [int(length - count[gone]) for length, count in counts]
        if all(size % multiple == 0 or length % multiple for size, (length, _) in zip(left, counts, strict=True)):
            found.append(gone)
    return found
