"""The promise that quantizing hands over nothing slower than what came in, where this machine can tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import InputError, RuntimeFailure, command
from graphopt.judge import SLOWER, Verdict, fits_timing, time_both, timed_feeds
from graphopt.report.units import plural, seconds
from graphopt.search.budget import adopt, static_step, without
from graphopt.search.costs import read_table
from graphopt.search.frontier import OBJECTIVES
from graphopt.search.limits import limit_of
from graphopt.search.measured import WAYS, Search
from graphopt.target import get_target

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.base import Context, Gates, Pipeline
    from graphopt.gates import Metric
    from graphopt.ledger import LedgerEntry, RunResult
    from graphopt.passes.quantize_static import QuantizeStatic
    from graphopt.search.budget import Kept

_AGAIN = 3.0
"""A model that looks slower is timed again, for this many times as long, before it is refused: machines are busy."""


PLACEMENTS = ("auto", "rules", "measured")


@dataclass(frozen=True)
class Promise:
    """``allow_slower``: the user does not want it kept. ``placement``: who decides what runs in integers: the target's
    ``rules``, what is ``measured`` here, or ``auto``: measured, wherever it can be and the table of costs says that
    there is something to gain. ``cost_table``: a file that measuring writes, or that decides in its place.
    ``objective``: what a mixture is chosen for, of those that are fast enough."""

    allow_slower: bool = False
    placement: str = "auto"
    cost_table: str | Path | None = None
    objective: str = "latency"

    def check(self, mode: str, target: str, time: float) -> None:
        """Raise InputError where what is asked for cannot be had."""
        if self.placement not in PLACEMENTS:
            raise InputError(f"unknown placement '{self.placement}'; use {', '.join(PLACEMENTS)}")
        table = Path(self.cost_table) if self.cost_table is not None else None
        if table is not None and self.placement == "rules":
            raise InputError("--cost-table is what measuring reads or writes; leave out --placement rules")
        self._check_objective(mode, target, time)
        if not self.asked:
            return
        asked = "--placement measured" if self.placement == "measured" else "--cost-table"
        if mode != "static":
            raise InputError(f"{asked} places Q/DQ pairs and --mode {mode} has none; leave one out")
        if not get_target(target).here:
            raise InputError(f"{asked} measures this machine, and {target} is another; leave one out")
        if table is not None and table.exists():
            read_table(table)
        elif table is not None and not table.absolute().parent.is_dir():
            raise InputError(
                f"the folder of {table} does not exist; make it first: {command('mkdir', '-p', table.parent)}"
            )
        if time == 0 and not (table is not None and table.exists()):
            some = "one that exists" if table is not None else "a --cost-table"
            raise InputError(f"{asked} has to time models, and --time 0 forbids it; give {some}")

    @property
    def asked(self) -> bool:
        """Whether somebody asked for measuring, so that it must not be left out."""
        return self.placement == "measured" or (self.placement == "auto" and self.cost_table is not None)

    def _check_objective(self, mode: str, target: str, time: float) -> None:
        if self.objective not in OBJECTIVES:
            raise InputError(f"unknown objective '{self.objective}'; use {', '.join(OBJECTIVES)}")
        if self.objective == "latency":
            return
        asked = f"--objective {self.objective}"
        if mode != "static":
            raise InputError(f"{asked} chooses among mixtures, and --mode {mode} has none; leave one out")
        if self.placement == "rules":
            raise InputError(f"{asked} chooses among measured mixtures, and --placement rules has none; leave one out")
        if self.cost_table is not None:
            raise InputError(f"{asked} looks at more than a cost table holds; leave one out")
        if time == 0 or not get_target(target).here:
            why = "--time 0 forbids it" if time == 0 else f"{target} is another machine"
            raise InputError(f"{asked} has to time mixtures, and {why}; leave one out")

    def measures(self, target: str, time: float) -> bool:
        """Whether to measure, before anything is judged: as soon as somebody cares how fast it is, and can tell."""
        if self.asked or self.objective == "accuracy":
            return True
        return self.placement == "auto" and not self.allow_slower and time > 0 and get_target(target).here

    def again(self, verdict: Verdict, kept: dict[str, Any] | None, found: dict[str, Any] | None) -> bool:
        """Whether to measure because of what judging found, where the table of costs said that there is no need."""
        missed = any(gate.gate == "min-speedup" for gate in verdict.failed)
        slower = kept is not None and kept["holds"] is False
        return self.placement == "auto" and (missed or slower) and (found is None or found["looked_only"])

    def search(
        self,
        result: RunResult,
        pipeline: Pipeline,
        original: ir.Model,
        context: Context,
        gates: Gates,
        metric: Metric | None,
        time: float,
        *,
        kept: Kept | None,
        look: bool,
    ) -> dict[str, Any] | None:
        """Give ``result`` the fastest mixture; what was found, as the report has it. None: nothing to place.

        ``kept``: what a budget made of it. ``look``: as :class:`~graphopt.search.measured.Search` has it.
        """
        step, entry = static_step(pipeline, result)
        if step is None or entry is None or result.exact is None or not get_target(context.target).here:
            return None
        if not _free(step, entry, result) or not (self.asked or fits_timing(original, result.model)):
            return None
        holds = kept.limit if kept is not None else limit_of(original, context, gates, metric)
        # What a budget left in float was not chosen by its time: others in its place may be faster. And where nothing
        # kept to it, other weights may.
        free = kept is None or (not kept.left and kept.holds is not False)
        search = Search(
            original,
            result.exact,
            result.model,
            step,
            context,
            timed_feeds(original, context),
            holds,
            time,
            table=Path(self.cost_table) if self.cost_table is not None else None,
            objective=self.objective,
            min_speedup=gates.min_speedup,
            look=look and free and not self.asked and self.objective == "latency",
            left=frozenset(kept.left if kept is not None else ()),
        )
        try:
            found = search.run()
        except RuntimeFailure:
            if self.asked:
                raise
            return None  # nobody asked for it, and what the rules made is judged all the same
        chosen = found.chosen
        if chosen.result is not None:
            made_by = without(step, sorted(chosen.floats | search.stuck), sorted(chosen.uint8))
            adopt(result, entry, chosen.model, chosen.result, made_by)
        return found.as_dict()

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


def _free(step: QuantizeStatic, entry: LedgerEntry, result: RunResult) -> bool:
    """Whether another quantized model may take its place: a pass behind it may have built on it, and a budget of its
    own was kept to against what it was given."""
    later = any(other.changes for other in result.ledger[result.ledger.index(entry) + 1 :])
    return not later and step.max_drop == "" and not step.min_sqnr


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


def told(found: dict[str, Any]) -> str:
    """One line on what measuring found."""
    by_name = {one["name"]: one for one in found["candidates"]}
    chosen, rules = by_name[found["chosen"]], by_name["rules"]
    if found["regions"] == 0:
        return "placement: all layers stand in branches or bodies of loops, which are timed with the whole model only"
    if found["looked_only"]:
        gain = f"{100 * (1 - found['predicted']):.0f} % faster" if found["predicted"] < 0.995 else "no faster"
        text = f"placement: by the rules; the best mixture with float is {gain} by what its parts take here"
        whole = f", but as a whole it takes {found['raced']['median']:.3f}x their time" if found["raced"] else ""
        return text + whole
    if found["cheapest_in_float"] == found["regions"] and chosen is rules:
        return f"placement: measured here, each of {plural(found['regions'], 'region')} is cheaper in float"
    if chosen is rules:
        return f"placement: nothing of {plural(len(by_name), 'mixture')} measured here is better than the rules alone"
    way = WAYS[found["objective"]]
    parts = [f"{plural(chosen['in_float'], 'region')} left in float"] if chosen["in_float"] else []
    parts += [f"uint8 weights in {plural(chosen['uint8_weights'], 'layer')}"] if chosen["uint8_weights"] else []
    text = f"placement: {' and '.join(parts) or 'everything in integers'}, because the model is {way} that way"
    if chosen["ratio"] is None or rules["ratio"] is None:
        return f"{text}, says {found['cost_table']['source']}"
    return (
        f"{text}: {chosen['ratio']['median']:.3f}x the original's time, "
        f"{'by the rules and the budget' if rules['in_float'] else 'everything in integers'} "
        f"{rules['ratio']['median']:.3f}x, the simplified float model {found['all_float']['median']:.3f}x"
    )
