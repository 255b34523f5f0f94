"""Which of several mixtures is best, as well as timing on a shared machine can tell."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphopt.judge import SLOWER
from graphopt.search.placement import Mixture, Prices, Unit, price
from graphopt.timing import time_models

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.base import PassResult
    from graphopt.search.costs import CostTable
    from graphopt.session import Feeds, Session

Ratio = tuple[float, float, float]

_HEATS = 3
"""A race is run so many times over: what the machine does for a second meets one of them."""


def _by_name(ratio: Ratio | None) -> dict[str, float] | None:
    return None if ratio is None else dict(zip(("median", "low", "high"), ratio, strict=True))


@dataclass
class Candidate:
    """A mixture: ``floats`` are the units it leaves in float, ``uint8`` those in integers with such weights; ``ratio``
    is its time over the original's (median, 90 % interval); ``holds``: whether it keeps to the budget (None: there is
    none, or it was not asked). ``bytes`` of its weights and ``damage`` to the outputs are known where the objective
    asks for them."""

    name: str
    floats: frozenset[str]
    model: ir.Model
    result: PassResult | None
    ratio: Ratio | None = None
    holds: bool | None = None
    bytes: int = 0
    damage: float = 0.0
    uint8: frozenset[str] = frozenset()

    @property
    def mixture(self) -> Mixture:
        """What it is made of."""
        return Mixture(self.floats, self.uint8)

    def as_dict(self) -> dict[str, Any]:
        """As the report has it."""
        sides = {"in_float": len(self.floats), "uint8_weights": len(self.uint8)}
        return {"name": self.name, **sides, "ratio": _by_name(self.ratio), "holds": self.holds}


@dataclass
class Measured:
    """``chosen`` among ``candidates``; ``table`` says why. ``cheapest``: what the last cut leaves in float, of
    ``regions``; ``predicted``: the time of all regions that way over what they take by the rules, by the table.
    ``raced``: the time of that mixture as a whole over the rules' (median, 90 % interval), where it was raced alone.
    ``looked_only``: it saves too little, or was not faster, so that nothing else was tried. ``stuck``: what stays in
    float in every mixture."""

    chosen: Candidate
    candidates: list[Candidate]
    all_float: Ratio | None
    table: CostTable
    cheapest: frozenset[str]
    regions: int
    predicted: float | None = None
    raced: Ratio | None = None
    looked_only: bool = False
    stuck: frozenset[str] = frozenset()
    source: str = ""
    seconds: float = 0.0
    objective: str = "latency"

    def as_dict(self) -> dict[str, Any]:
        """As the report has it."""
        return {
            "chosen": self.chosen.name,
            "objective": self.objective,
            "regions": self.regions,
            "cheapest_in_float": len(self.cheapest),
            "predicted": self.predicted,
            "raced": _by_name(self.raced),
            "looked_only": self.looked_only,
            "left_in_float": sorted(self.chosen.floats | self.stuck),
            "uint8_weights": sorted(self.chosen.uint8),
            "candidates": [candidate.as_dict() for candidate in self.candidates],
            "all_float": _by_name(self.all_float),
            "cost_table": {"source": self.source, "sha256": self.table.sha256, **self.table.as_dict()},
            "seconds": self.seconds,
        }


def race(sessions: Mapping[str, Session], feeds: Sequence[Feeds], *, seconds: float) -> dict[str, Ratio]:
    """Each model's time over the first one's, from several heats: the median of their medians, and an interval that
    holds all of them besides the usual 90 % one, so that what drifts between heats counts as noise."""
    heats = [time_models(sessions, feeds, seconds=seconds / _HEATS)[1] for _ in range(_HEATS)]
    found = {}
    for name in heats[0]:
        medians, lows, highs = (sorted(heat[name][k] for heat in heats) for k in range(3))
        low, high = statistics.median(lows), statistics.median(highs)
        found[name] = (statistics.median(medians), min(low, medians[0]), max(high, medians[-1]))
    return found


def best(
    candidates: Sequence[Candidate], objective: str = "latency", min_speedup: float | None = None
) -> Candidate | None:
    """The one to keep; None: nothing was timed.

    ``latency``: the fastest; those whose interval overlaps its own are a tie, which the one with the least left in
    float wins: it is the simplest and the smallest. ``size`` and ``accuracy``: the smallest, or the one that damages
    the outputs least, of those that are fast enough; where none is, the fastest.
    """
    timed = [(c, c.ratio) for c in candidates if c.ratio is not None and c.holds is not False]
    if not timed:
        return None
    fastest = min((ratio for _, ratio in timed), key=lambda ratio: ratio[0])
    enough = [c for c, r in timed if (r[1] <= SLOWER if min_speedup is None else r[2] <= 1 / min_speedup)]
    if objective == "size" and enough:
        return min(enough, key=lambda c: (c.bytes, c.ratio))
    if objective == "accuracy" and enough:
        return min(enough, key=lambda c: (c.damage, c.ratio))
    tied = [(c, r) for c, r in timed if r[1] <= fastest[2]]
    return min(tied, key=lambda one: (len(one[0].floats), one[1]))[0]


def flips(
    found: Sequence[Unit], prices: Prices, floats: frozenset[str], most: int, tried: Collection[frozenset[str]] = ()
) -> list[frozenset[str]]:
    """The placements that differ from ``floats`` in one unit and are predicted to cost least: where the table is a
    little off, one of them is the better. Those ``tried`` are left out, and those without a layer in integers."""
    layers = {unit.name for unit in found if unit.layer}
    near = [floats ^ {unit.name} for unit in found]
    near.sort(key=lambda placement: (price(found, prices, placement), len(placement), sorted(placement)))
    return [placement for placement in near if placement not in tried and not placement >= layers][:most]


def clearly(challenger: Candidate, champion: Candidate) -> bool:
    """Whether a race told the two apart: the intervals do not overlap."""
    a, b = challenger.ratio, champion.ratio
    return a is not None and b is not None and challenger.holds is not False and a[2] < b[1]
