"""Which of many candidates are worth a look, and which one an objective means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

OBJECTIVES = ("latency", "size", "accuracy")

_SAME = 300.0
"""What counts as the score of equal outputs (dB) where a number is needed."""


@dataclass
class Candidate:
    """A configuration and what came of it.

    ``ratio``: its time over the original's (median, 90 % interval). ``score``: the metric, or where none was asked for
    the SQNR of the worst output in dB; higher is better, and ``inf`` is the same outputs. ``sqnr``: that in any case.
    ``bytes``: of the file.
    ``holds``: whether it keeps to the budget. ``slower``: than the original, beyond noise. ``error``: why there is no
    model.
    """

    name: str
    config: dict[str, Any]
    ratio: tuple[float, float, float] | None = None
    score: float = 0.0
    sqnr: float = math.inf
    bytes: int = 0
    holds: bool = False
    slower: bool = False
    error: str | None = None
    digest: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As it is stored."""
        return {**vars(self), "ratio": list(self.ratio) if self.ratio else None}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Candidate:
        """What :meth:`as_dict` stored."""
        ratio = stored["ratio"]
        return cls(**{**stored, "ratio": None if ratio is None else (ratio[0], ratio[1], ratio[2])})

    @property
    def values(self) -> tuple[float, float, float]:
        """What there is to minimize: time, loss, bytes."""
        assert self.ratio is not None
        return self.ratio[0], -min(self.score, _SAME), float(self.bytes)


def frontier(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in time, score and size at once (Pareto), the fastest first; equal ones once."""
    measured = [c for c in candidates if c.ratio is not None]
    found: list[Candidate] = []
    for one in sorted(measured, key=lambda c: (*c.values, c.name)):
        if not any(_beats(other.values, one.values) for other in measured) and all(
            one.values != other.values for other in found
        ):
            found.append(one)
    return found


def _beats(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def ranked(
    candidates: Sequence[Candidate], original: Candidate, objective: str, *, allow_slower: bool = False
) -> list[Candidate]:
    """Those that keep to the budget and are better than the original by ``objective``, the best first.

    Times within noise of the best (its 90 % interval) count as equal to it; then the more accurate wins, then the
    smaller, so that two searches on a busy machine rather agree.
    """
    good = [c for c in candidates if c.holds and c.ratio is not None and (allow_slower or not c.slower)]
    if objective == "latency":
        good = [c for c in good if allow_slower or (c.ratio is not None and c.ratio[2] < 1)]
        best = min((c.ratio for c in good if c.ratio is not None), default=(0.0, 0.0, 0.0))
        tied = [c for c in good if c.ratio is not None and c.ratio[1] <= best[2]]
        rest = [c for c in good if c not in tied]
        return sorted(tied, key=lambda c: (-c.score, -c.sqnr, c.bytes, c.values, c.name)) + sorted(rest, key=_by_time)
    if objective == "size":
        good = [c for c in good if c.bytes < original.bytes]
        return sorted(good, key=lambda c: (c.bytes, -c.score, c.values, c.name))
    return sorted(good, key=lambda c: (-c.score, -c.sqnr, c.values, c.name))


def _by_time(candidate: Candidate) -> tuple[Any, ...]:
    return (*candidate.values, candidate.name)
