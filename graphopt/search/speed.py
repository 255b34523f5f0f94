"""The promise that quantizing hands over nothing slower than what came in, where this machine can tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphopt.judge import SLOWER, Verdict, time_both
from graphopt.report.units import seconds
from graphopt.target import get_target

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.base import Context, Gates

_AGAIN = 3.0
"""A model that looks slower is timed again, for this many times as long, before it is refused: machines are busy."""


@dataclass(frozen=True)
class Promise:
    """``allow_slower``: the user does not want it kept."""

    allow_slower: bool = False

    def unchecked(self, gates: Gates, target: str, time: float) -> str | None:
        """Why it cannot be, or need not be, checked; None: it is."""
        if self.allow_slower:
            return "--allow-slower"
        if gates.min_speedup is not None:
            return "--min-speedup says how fast it has to be"
        if time == 0:
            return "nothing was timed (--time 0)"
        if not get_target(target).here:
            return f"{target} is not this machine"
        return None

    def keep(
        self, verdict: Verdict, original: ir.Model, candidate: ir.Model, context: Context, gates: Gates, time: float
    ) -> dict[str, Any]:
        """Whether ``verdict``'s timing keeps it, as the report has it; one that seems not to is timed again."""
        why = self.unchecked(gates, context.target, time)
        if why is None and verdict.speed is None:
            why = "the original does not run here"
        if why is not None:
            return {"limit": SLOWER, "checked": False, "holds": None, "why": why}
        if verdict.slower:
            time_both(verdict, original, candidate, context, seconds=_AGAIN * time)
        return {"limit": SLOWER, "checked": True, "holds": not verdict.slower, "why": measured(verdict)}


def untold(kept: dict[str, Any] | None) -> list[str]:
    """A note where nobody looked whether the result is slower, though nobody said that it may be."""
    if kept is None or kept["checked"] or kept["why"].startswith("--") or "does not run" in kept["why"]:
        return []
    return [f"whether it is slower than the original was not checked: {kept['why']}"]


def measured(verdict: Verdict) -> str:
    """Both medians, and the ratio with its interval."""
    assert verdict.speed is not None
    ratio, low, high = verdict.speed
    before, after = (seconds(verdict.timing[name].median) for name in ("original", "candidate"))
    return f"{after} a run, the original {before} ({ratio:.3f}x, 90 %: {low:.3f} to {high:.3f})"
