"""The fastest mixture of integers and float on this machine: cut, build, measure, correct the costs, cut again."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.base import Context, PassResult, Skip
from graphopt.cost import shapes
from graphopt.errors import RuntimeFailure
from graphopt.graph import label
from graphopt.model import clone, fingerprint, to_proto
from graphopt.passes._placement import place
from graphopt.search.budget import first_that, quantize_without
from graphopt.search.costs import CostTable, Pricing, cached, keep, read_table, this_machine
from graphopt.search.placement import Unit, cut, hull, units
from graphopt.session import Session
from graphopt.target import get_target
from graphopt.timing import time_models

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.passes.quantize_static import QuantizeStatic
    from graphopt.search.limits import Limit
    from graphopt.session import Feeds

_ROUNDS = 3
_PROFILE_SECONDS = 0.5
_MARGIN = 0.1
"""What a region has to gain for the cautious cut, of its time in float."""

RULES = "rules"


@dataclass
class Candidate:
    """A mixture: ``floats`` are the units it leaves in float; ``ratio`` is its time over the original's (median, 90 %
    interval); ``holds``: whether it keeps to the budget (None: there is none, or it was not asked)."""

    name: str
    floats: frozenset[str]
    model: ir.Model
    result: PassResult | None
    ratio: tuple[float, float, float] | None = None
    holds: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        ratio = None if self.ratio is None else dict(zip(("median", "low", "high"), self.ratio, strict=True))
        return {"name": self.name, "in_float": len(self.floats), "ratio": ratio, "holds": self.holds}


@dataclass
class Measured:
    """``chosen`` among ``candidates``; ``table`` says why. ``cheapest``: what the last cut leaves in float, of
    ``regions``."""

    chosen: Candidate
    candidates: list[Candidate]
    all_float: tuple[float, float, float] | None
    table: CostTable
    cheapest: frozenset[str]
    regions: int
    source: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """As the report has it."""
        simplified = self.all_float
        return {
            "chosen": self.chosen.name,
            "regions": self.regions,
            "cheapest_in_float": len(self.cheapest),
            "left_in_float": sorted(self.chosen.floats),
            "candidates": [candidate.as_dict() for candidate in self.candidates],
            "all_float": None if simplified is None else dict(zip(("median", "low", "high"), simplified, strict=True)),
            "cost_table": {"source": self.source, "sha256": self.table.sha256, **self.table.as_dict()},
            "seconds": self.seconds,
        }


@dataclass
class Search:
    """What a search for the fastest mixture needs to know.

    ``rules``: the quantized model that the rules (and the budget) made. ``holds``: whether a quantized model keeps
    to the budget; None: there is none. ``feeds``: what is run.
    """

    original: ir.Model
    exact: ir.Model
    rules: ir.Model
    step: QuantizeStatic
    context: Context
    feeds: Sequence[Feeds]
    holds: Limit | None = None
    time: float = 2.0
    table: Path | None = None
    units: list[Unit] = field(default_factory=list)

    def run(self) -> Measured:
        """Search; with a cost table that exists already nothing is measured, so that it decides alone."""
        started = time.perf_counter()
        given = self.table is not None and self.table.exists()
        pricing = self._pricing(given=given)
        found = self._decided(pricing) if given else self._search(pricing)
        if not given:
            keep(pricing.table)
            found.table = pricing.own()
            if self.table is not None:
                found.table.write(self.table)
        found.source = str(self.table) if given else "measured"
        found.seconds = time.perf_counter() - started
        return found

    def mixtures(self, damages: Mapping[str, float]) -> list[frozenset[str]]:
        """Regions to leave in float, as the cut says for ``damages`` that weigh nothing up to everything; none of them
        timed as a whole."""
        pricing = self._pricing(given=False)
        candidates = self._cuts(pricing)
        candidates += self._cautious(candidates, pricing)
        keep(pricing.table)
        found = dict.fromkeys([*(c.floats for c in candidates), *hull(self.units, pricing.prices(), damages)])
        layers = {unit.name for unit in self.units if unit.layer}
        return [floats for floats in found if floats and not floats >= layers]

    def _pricing(self, *, given: bool) -> Pricing:
        """The regions of the model, and their prices as far as they are known."""
        target = get_target(self.context.target)
        placement = place(self.exact, target, exclude=self.step.exclude, include=self.step.include)
        self.units = units(placement, target)
        threads = self.context.threads or 1
        sizes = {name: array.shape for name, array in self.feeds[0].items()}
        known = shapes(to_proto(self.exact), sizes)
        table = read_table(self.table) if given and self.table is not None else cached(this_machine(threads))
        kind = f"{self.step.weights}{' this cpu' if self.context.this_cpu else ''}"
        return Pricing(table, self.exact, self.units, known, kind, threads)

    def _decided(self, pricing: Pricing) -> Measured:
        """What the table says: the best of the whole models it remembers of this one, else its cut."""
        tries = pricing.table.wholes.get(self._fingerprint(), [])
        best = min(tries, key=lambda one: (one["ratio"], one["float"]), default=None)
        floats = cut(self.units, pricing.prices()) if best is None else frozenset(best["float"])
        rules = Candidate(RULES, frozenset(), self.rules, None)
        made = self._build("cost table", floats) if floats else None
        if made is not None and self.holds is not None:
            made.holds = self.holds(made.model)
            made = made if made.holds else None
        tried = [rules] if made is None else [rules, made]
        return Measured(tried[-1], tried, None, pricing.table, floats, len(self.units))

    def _search(self, pricing: Pricing) -> Measured:
        """Cut, build, profile and cut again; then time what was built as a whole."""
        candidates = self._cuts(pricing)
        candidates += self._cautious(candidates, pricing)
        if self.holds is not None:
            candidates += self._along_the_hull(candidates, pricing)
        all_float = self._race(candidates)
        pricing.table.wholes[self._fingerprint()] = [
            {"float": sorted(c.floats), "ratio": round(c.ratio[0], 4)}
            for c in candidates
            if c.ratio is not None and c.holds is not False
        ]
        usable = [c for c in candidates if c.holds is not False and c.ratio is not None]
        chosen = min(usable, key=lambda c: c.ratio[0] if c.ratio else 0.0, default=candidates[0])
        floats = cut(self.units, pricing.prices())
        return Measured(chosen, candidates, all_float, pricing.table, floats, len(self.units))

    def _cuts(self, pricing: Pricing) -> list[Candidate]:
        """The rules, and what cutting, building, profiling and cutting again makes of them."""
        progress, candidates = self.context.progress, [Candidate(RULES, frozenset(), self.rules, None)]
        if not pricing.complete():
            progress(0, None, "measuring regions")
            pricing.observe([self.rules], self.feeds, _PROFILE_SECONDS * 2)
        pricing.estimate_conversions()
        for index in range(_ROUNDS):
            progress(index, _ROUNDS, "measuring mixtures")
            floats = cut(self.units, pricing.prices())
            if floats in {candidate.floats for candidate in candidates}:
                break
            made = self._build(f"cut {index + 1}", floats)
            if made is None:
                break
            candidates.append(made)
            pricing.observe([made.model], self.feeds, _PROFILE_SECONDS)
        return candidates

    def _cautious(self, candidates: Sequence[Candidate], pricing: Pricing) -> list[Candidate]:
        """The cut once more, for regions that gain a good deal only: small gains are the first to be noise."""
        prices = pricing.prices()
        floats = cut(self.units, prices, {name: round(_MARGIN * ns) for name, ns in prices.in_float.items()})
        made = None if floats in {c.floats for c in candidates} else self._build("cautious cut", floats)
        return [] if made is None else [made]

    def _build(self, name: str, floats: frozenset[str]) -> Candidate | None:
        """The exact model with everything but ``floats`` in integers; None where nothing is left."""
        if floats >= {unit.name for unit in self.units if unit.layer}:
            return None
        model = clone(self.exact)
        result = quantize_without(model, self.step, self.context, sorted(floats))
        if not result.changes:
            return None
        why = "left in float: measured here, the model is faster that way"
        operators = {label(unit.nodes[0]): unit.nodes[0].op_type for unit in self.units}
        result.skipped = [
            Skip(s.site, f"{operators[s.site]}: {why}") if s.site in floats else s for s in result.skipped
        ]
        return Candidate(name, floats, model, result)

    def _along_the_hull(self, candidates: list[Candidate], pricing: Pricing) -> list[Candidate]:
        """Marks which candidates keep to the limit; more from the hull, among them the fastest there that does."""
        assert self.holds is not None
        limit = self.holds
        for candidate in candidates:
            candidate.holds = self.holds(candidate.model)
        if all(candidate.holds for candidate in candidates):
            return []
        damages = {d.layer: d.damage for d in self.holds.damages(self.exact, self.step)}
        points = hull(self.units, pricing.prices(), damages)
        more: list[Candidate] = []

        def holds(index: int) -> bool:
            """Whether a placement on the hull keeps to it; what was tried before is known."""
            made = next((c for c in candidates + more if c.floats == points[index]), None)
            if made is None:
                made = self._build(f"hull {len(more) + 1}", points[index])
                if made is None:
                    return True  # nothing is left in integers: no candidate, and no damage
                made.holds = limit(made.model)
                more.append(made)
            return bool(made.holds)

        first_that(len(points), holds)  # the further along the hull, the less damage
        return more

    def _race(self, candidates: list[Candidate]) -> tuple[float, float, float] | None:
        """Time all that keep to the budget against the original, and the simplified float model; its ratio."""
        self.context.progress(0, None, "timing mixtures")
        threads = self.context.threads or 1
        racing = [candidate for candidate in candidates if candidate.holds is not False]
        floats = {"original": self.original, "float": self.exact}
        sessions = {name: Session(model, threads=threads, timed=True) for name, model in floats.items()}
        for candidate in list(racing):
            try:
                sessions[candidate.name] = Session(candidate.model, threads=threads, timed=True)
            except RuntimeFailure:  # a mixture that the runtime refuses is no candidate
                racing.remove(candidate)
        _, ratios = time_models(sessions, self.feeds, seconds=max(self.time, 1.0) * len(sessions) / 2)
        for candidate in racing:
            candidate.ratio = ratios[candidate.name]
        return ratios["float"]

    def _fingerprint(self) -> str:
        return f"{fingerprint(self.exact)[:16]} {replace(self.step).options()}"
