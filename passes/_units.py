"""Which units go: the cheapest loss per MAC (or byte, or channel) first, over all groups, until enough is gone."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from graphopt.channels.atoms import live
from graphopt.graph import constant, label

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from graphopt.channels import Channels, Group

LEAST = 0.1
"""The share of a group's units that always stays: a layer of two channels is an end, not an economy."""


AMOUNTS = ("macs", "size", "channels", "latency")

_SAVING = {"macs": "macs", "channels": "macs", "size": "bytes", "latency": "seconds"}

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
    """MACs, bytes, seconds and channels that are left while units go, by axis: an axis enters with how many indices it
    has. ``seconds``: what each node takes, by its label; a node is held to take time as what it makes is long, and one
    that multiplies matrices as its MACs are many."""

    def __init__(self, channels: Channels, seconds: Mapping[str, float] | None = None) -> None:
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
        terms = {"macs": self.macs, "bytes": self.bytes, "seconds": self._times(seconds or {})}
        self._full = list(self._lengths)
        self.left = list(self._lengths)
        self._terms = {what: (mine, self._touching(mine)) for what, mine in terms.items()}

    def _times(self, seconds: Mapping[str, float]) -> list[tuple[float, list[int]]]:
        found: list[tuple[float, list[int]]] = []
        known = dict(seconds)
        for product in self._channels.products:
            spent = known.pop(label(product.node), 0.0)
            found += [(spent * share, self._ids(vectors)) for share, vectors in product.terms]
        makers = {producer: axes for value, axes in self._channels.trace.axes.items() if (producer := value.producer())}
        for node, axes in makers.items():
            found.append((known.pop(label(node), 0.0), self._ids(axes)))
        return [*found, (sum(known.values()), [])]

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
        """MACs, bytes or seconds that are left."""
        return sum(self._term(term, {}) for term in self._terms[what][0])

    def saved(self, gone: dict[int, int], what: str) -> float:
        """What goes with these indices, as things stand."""
        terms, of = self._terms[what]
        touched = {number for axis in gone for number in of.get(axis, ())}
        return sum(self._term(terms[n], {}) - self._term(terms[n], gone) for n in touched)

    def allows(self, gone: dict[int, int]) -> bool:
        """Whether something is left of every axis."""
        return all(self.left[axis] - times >= 1 for axis, times in gone.items())

    def take(self, gone: dict[int, int]) -> None:
        """These indices are gone."""
        for axis, times in gone.items():
            self.left[axis] -= times


def choose(
    channels: Channels,
    paths: Sequence[Path],
    of: str,
    left: float,
    multiple: int,
    seconds: Mapping[str, float] | None = None,
) -> NDArray[np.bool_]:
    """Per unit, whether it stays.

    ``left``: the share of ``of`` (one of :data:`AMOUNTS`) that is left; of ``latency``, of what ``seconds`` (by node)
    say. ``multiple``: what is left of a layer's output channels is a multiple of it, where it was one before.
    """
    choice = _Choice(channels, paths, of, left, multiple, seconds)
    choice.run()
    return choice.keep


class _Choice:
    """The state of choosing: how far each path has been gone, and what is left."""

    def __init__(
        self,
        channels: Channels,
        paths: Sequence[Path],
        of: str,
        left: float,
        multiple: int,
        seconds: Mapping[str, float] | None,
    ) -> None:
        self.paths, self.of, self.share = paths, of, left
        self.saving = _SAVING[of]
        self.ledger = Ledger(channels, seconds)
        self.keep = np.ones(channels.count, np.bool_)
        self.at = [0] * len(paths)
        self.steps = [_steps(channels, path, multiple) for path in paths]
        self.start = self.ledger.total(self.saving)
        self.everything = sum(len(path.order) for path in paths)
        self.removed = 0
        self.heap: list[tuple[float, int]] = []

    def run(self) -> None:
        """Take the cheapest step until enough is gone; what would go too far waits until nothing else is left."""
        for number in range(len(self.paths)):
            self._push(number)
        too_far: list[tuple[float, float, int]] = []
        while self.heap and not self._enough():
            cost, number = heapq.heappop(self.heap)
            now = self._price(number)
            if now is None:
                continue
            if self.heap and now > cost * (1 + 1e-9) and now > self.heap[0][0]:
                heapq.heappush(self.heap, (now, number))  # others have shrunk since: it saves less now
                continue
            beyond = self.share - self._left(self._next(number))
            if beyond > SLACK:
                too_far.append((round(beyond, 9), cost, number))  # as far as each other: the cheaper
                continue
            self._take(number)
            self._push(number)
        if too_far and not self._enough():
            self._take(min(too_far)[2])

    def _next(self, number: int) -> NDArray[np.int64]:
        """The units of the next step of a path; none at its end."""
        upto = next((s for s in self.steps[number] if s > self.at[number]), self.at[number])
        return self.paths[number].order[self.at[number] : upto]

    def _price(self, number: int) -> float | None:
        """What the next step loses for what it saves; None where it cannot be made."""
        units, path, at = self._next(number), self.paths[number], self.at[number]
        gone = self.ledger.lost(units.tolist())
        if not len(units) or not self.ledger.allows(gone):
            return None
        saved = float(len(units)) if self.of == "channels" else self.ledger.saved(gone, self.saving)
        return float(path.loss[at + len(units)] - path.loss[at]) / saved if saved > 0 else None

    def _push(self, number: int) -> None:
        found = self._price(number)
        if found is not None:
            heapq.heappush(self.heap, (found, number))

    def _left(self, units: NDArray[np.int64]) -> float:
        """The share that is left when these are gone too."""
        if self.of == "channels":
            return 1 - (self.removed + len(units)) / max(self.everything, 1)
        saved = self.ledger.saved(self.ledger.lost(units.tolist()), self.saving)
        return (self.ledger.total(self.saving) - saved) / (self.start or 1.0)

    def _take(self, number: int) -> None:
        units = self._next(number)
        self.ledger.take(self.ledger.lost(units.tolist()))
        self.keep[units] = False
        self.at[number] += len(units)
        self.removed += len(units)

    def _enough(self) -> bool:
        return self._left(np.zeros(0, np.int64)) <= self.share


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
