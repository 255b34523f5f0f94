"""The fastest mixture of integers and float on this machine: cut, build, measure, correct the costs, cut again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.base import Context, Skip
from graphopt.cost import shapes
from graphopt.errors import RuntimeFailure
from graphopt.graph import label
from graphopt.model import clone, fingerprint, to_proto, weight_bytes
from graphopt.passes._placement import place
from graphopt.search.budget import first_that, quantize_without
from graphopt.search.costs import UINT8, CostTable, Pricing, cached, keep, read_table, this_machine
from graphopt.search.placement import Mixture, Unit, cut, hull, price, units
from graphopt.search.racing import Candidate, Measured, best, clearly, flips, race
from graphopt.search.sensitivity import LayerDamage, damage_of, exactly, sensitivity
from graphopt.session import Session
from graphopt.target import get_target

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.passes.quantize_static import QuantizeStatic
    from graphopt.search.limits import Limit
    from graphopt.session import Feeds

_ROUNDS = 3
_PROFILE_SECONDS = 0.5
_CLOSER = 6
"""Mixtures from the hull that are built where accuracy is the objective."""
_FLIPS = 4
"""Regions that are tried on the other side at a time."""
_FLIP_TIME = 4.0
"""Times the time for timing, after which no further flips are tried."""
_MARGIN = 0.1
"""What a region has to gain for the cautious cut, of its time in float."""

_GENEROUS = (0.1, 0.2, 0.3)
"""Shares of what regions take in integers that a generous cut leaves out."""

_WORTH = 0.03
"""Of the time of all regions, what the cheapest placement has to save by the table for a look to become a search: costs
of single regions are a few percent off, and a search takes tens of seconds."""

RULES = "rules"

WAYS = {"latency": "faster", "size": "smaller and not slower", "accuracy": "closer to the original and not slower"}
"""What a mixture is for, in words."""


@dataclass
class Search:
    """What a search for the fastest mixture needs to know.

    ``rules``: the quantized model that the rules made, and the budget, which left the layers ``left`` in float.
    ``holds``: whether a quantized model keeps to the budget; None: there is none. ``feeds``: what is run. ``look``:
    take the rules where the table of costs, or a race with its cut, says that nothing is faster. ``objective`` and
    ``min_speedup``: as :func:`graphopt.search.racing.best` takes them.
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
    objective: str = "latency"
    min_speedup: float | None = None
    look: bool = False
    left: frozenset[str] = frozenset()
    units: list[Unit] = field(default_factory=list)
    narrow: frozenset[str] = frozenset()
    """Layers that get 7-bit weights where they will do, and might have uint8 ones."""
    stuck: frozenset[str] = frozenset()
    """What the budget left in float in a branch or the body of a loop: no region, and in float in every mixture."""

    def run(self) -> Measured:
        """Search; with a cost table that exists already nothing is measured, so that it decides alone."""
        started = time.perf_counter()
        given = self.table is not None and self.table.exists()
        pricing = self.pricing(given=given)
        found = self._decided(pricing) if given else self._search(pricing)
        if not given:
            keep(pricing.table)
            found.table = pricing.own()
            if self.table is not None:
                found.table.write(self.table)
        found.objective, found.stuck = self.objective, self.stuck
        found.source = str(self.table) if given else "measured"
        found.seconds = time.perf_counter() - started
        return found

    def mixtures(self, damages: Mapping[str, float]) -> list[frozenset[str]]:
        """Regions to leave in float, as the cut says for ``damages`` that weigh nothing up to everything; none of them
        timed as a whole."""
        pricing = self.pricing(given=False)
        candidates = self._cuts(pricing)
        candidates += self._cautious(candidates, pricing)
        keep(pricing.table)
        points = hull(self.units, pricing.prices(), damages)
        found = dict.fromkeys([*(c.floats for c in candidates), *(point.floats for point in points)])
        layers = {unit.name for unit in self.units if unit.layer}
        return [floats for floats in found if floats and not floats >= layers]

    def pricing(self, *, given: bool) -> Pricing:
        """The regions of the model, and their prices as far as they are known."""
        target = get_target(self.context.target)
        placement = place(self.exact, target, exclude=self.step.exclude, include=self.step.include)
        # What stands in a branch is not profiled by itself: it is as the rules say, and timed as part of the whole.
        self.units = [unit for unit in units(placement, target) if unit.nodes[0].graph is self.exact.graph]
        layers = {label(layer.node) for layer in placement.layers if self.step.seven_bits(layer, self.context)}
        names = {unit.name for unit in self.units}
        self.narrow, self.stuck, self.left = frozenset(layers & names), self.left - names, self.left & names
        threads = self.context.threads or 1
        sizes = {name: array.shape for name, array in self.feeds[0].items()}
        known = shapes(to_proto(self.exact), sizes)
        table = read_table(self.table) if given and self.table is not None else cached(this_machine(threads))
        kind = f"{self.step.weights}{' this cpu' if self.context.this_cpu else ''}"
        kind += f" and uint8 {','.join(self.step.uint8)}" if self.step.uint8 else ""
        return Pricing(table, self.exact, self.units, known, kind, threads)

    def _decided(self, pricing: Pricing) -> Measured:
        """What the table says: the best of the whole models it remembers of this one, else its cut."""
        kept = self._remembered(pricing.table)
        mixture = Mixture(cut(self.units, pricing.prices())) if kept is None else kept
        rules = Candidate(RULES, self.left, self.rules, None)
        made = self._build("cost table", mixture) if mixture != rules.mixture else None
        if made is not None and self.holds is not None:
            made.holds = self.holds(made.model)
            made = made if made.holds else None
        tried = [rules] if made is None else [rules, made]
        return Measured(tried[-1], tried, None, pricing.table, mixture.floats, len(self.units))

    def _remembered(self, table: CostTable) -> Mixture | None:
        """The best of the whole models that the table remembers of this one; None: it remembers none."""
        known = table.wholes.get(self._fingerprint(), [])
        tries = [
            Candidate(
                "",
                frozenset(one["float"]),
                self.exact,
                None,
                (one["ratio"], one.get("low", one["ratio"]), one.get("high", one["ratio"])),
                uint8=frozenset(one.get("uint8", ())),
            )
            for one in sorted(known, key=lambda one: (list(one["float"]), list(one.get("uint8", ()))))
        ]
        found = best(tries)
        return None if found is None else found.mixture

    def _search(self, pricing: Pricing) -> Measured:
        """Cut, build, profile and cut again; then time what was built as a whole."""
        if self.look:
            found = self._looked(pricing)
            if found is not None:
                return found
        candidates = self._cuts(pricing)
        candidates += self._cautious(candidates, pricing)
        if self.holds is not None:
            candidates += self._along_the_hull(candidates, pricing)
        if self.objective == "accuracy":
            candidates += self._closer(candidates, pricing)
        all_float = self._race(candidates)
        if self.objective == "latency":
            candidates += self._flipped(candidates, pricing)
        pricing.table.wholes[self._fingerprint()] = [
            {"float": sorted(c.floats)}
            | ({"uint8": sorted(c.uint8)} if c.uint8 else {})
            | {key: round(r, 4) for key, r in zip(("ratio", "low", "high"), c.ratio, strict=True)}
            for c in candidates
            if c.ratio is not None and c.holds is not False
        ]
        chosen = self._best(candidates, pricing.table) or candidates[0]
        floats = cut(self.units, pricing.prices())
        return Measured(chosen, candidates, all_float, pricing.table, floats, len(self.units))

    def _looked(self, pricing: Pricing) -> Measured | None:
        """The rules, where the cut saves too little by the table, or is not clearly faster as a whole; None: search."""
        self._observe(pricing)
        prices = pricing.prices()
        floats = cut(self.units, prices)
        now = price(self.units, prices, frozenset())
        predicted = price(self.units, prices, floats) / now if now else 1.0
        raced = None
        if predicted <= 1 - _WORTH:
            made = self._build("cut 1", Mixture(floats))
            if made is None:
                return None  # all of it is cheaper in float
            self.context.progress(0, None, "timing a mixture")
            models = {RULES: self.rules, made.name: made.model}
            sessions = {n: Session(m, threads=self.context.threads or 1, timed=True) for n, m in models.items()}
            raced = race(sessions, self.feeds, seconds=max(self.time, 1.0) / 2)[made.name]
            if raced[2] < 1:
                return None
        rules = Candidate(RULES, self.left, self.rules, None)
        return Measured(rules, [rules], None, pricing.table, floats, len(self.units), predicted, raced, True)

    def _observe(self, pricing: Pricing) -> None:
        """Measure the regions on both sides, and conversions, as far as the table does not know them."""
        if not pricing.complete():
            self.context.progress(0, None, "measuring regions")
            pricing.observe([self.rules], self.feeds, _PROFILE_SECONDS * 2)
        pricing.estimate_conversions()

    def _cuts(self, pricing: Pricing) -> list[Candidate]:
        """The rules, and what cutting, building, profiling and cutting again makes of them."""
        progress, candidates = self.context.progress, [Candidate(RULES, self.left, self.rules, None)]
        self._observe(pricing)
        for index in range(_ROUNDS):
            progress(index, _ROUNDS, "measuring mixtures")
            floats = cut(self.units, pricing.prices())
            if floats in {candidate.floats for candidate in candidates}:
                break
            name = f"cut {index + 1}"
            made = self._build(name, Mixture(floats)) or self._generous(f"generous {name}", pricing)
            if made is None or made.floats in {candidate.floats for candidate in candidates}:
                break
            candidates.append(made)
            pricing.observe([made.model], self.feeds, _PROFILE_SECONDS)
        return candidates

    def _generous(self, name: str, pricing: Pricing) -> Candidate | None:
        """Where the cut leaves nothing in integers: what it leaves if they are thought cheaper than the table says. On
        rapidocr-cls mixtures of that kind were faster than either side when they ran."""
        prices = pricing.prices()
        for share in _GENEROUS:
            floats = cut(self.units, prices, {name: -round(share * ns) for name, ns in prices.in_integers.items()})
            made = self._build(name, Mixture(floats))
            if made is not None:
                return made
        return None

    def _cautious(self, candidates: Sequence[Candidate], pricing: Pricing) -> list[Candidate]:
        """The cut once more, for regions that gain a good deal only: small gains are the first to be noise."""
        prices = pricing.prices()
        floats = cut(self.units, prices, {name: round(_MARGIN * ns) for name, ns in prices.in_float.items()})
        made = None if floats in {c.floats for c in candidates} else self._build("cautious cut", Mixture(floats))
        return [] if made is None else [made]

    def _build(self, name: str, mixture: Mixture) -> Candidate | None:
        """The exact model with everything in integers but what ``mixture`` leaves in float; None where nothing is."""
        floats = mixture.floats
        if floats >= {unit.name for unit in self.units if unit.layer}:
            return None
        model = clone(self.exact)
        result = quantize_without(model, self.step, self.context, sorted(floats | self.stuck), sorted(mixture.uint8))
        if not result.changes:
            return None
        why = f"left in float: measured here, the model is {WAYS[self.objective]} that way"
        operators = {label(unit.nodes[0]): unit.nodes[0].op_type for unit in self.units}
        result.skipped = [
            Skip(s.site, f"{operators[s.site]}: {why}") if s.site in floats else s for s in result.skipped
        ]
        return Candidate(name, floats, model, result, uint8=mixture.uint8)

    def _along_the_hull(self, candidates: list[Candidate], pricing: Pricing) -> list[Candidate]:
        """Marks which candidates keep to the limit; more from the hull, among them the fastest there that does."""
        assert self.holds is not None
        limit = self.holds
        for candidate in candidates:
            candidate.holds = self.holds(candidate.model)
        if all(candidate.holds for candidate in candidates):
            return []
        points = self._hull(pricing, self.holds.damages)
        more: list[Candidate] = []

        def holds(index: int) -> bool:
            """Whether a placement on the hull keeps to it; what was tried before is known."""
            made = next((c for c in candidates + more if c.mixture == points[index]), None)
            if made is None:
                made = self._build(f"hull {len(more) + 1}", points[index])
                if made is None:
                    return True  # nothing is left in integers: no candidate, and no damage
                made.holds = limit(made.model)
                more.append(made)
            return bool(made.holds)

        first_that(len(points), holds)  # the further along the hull, the less damage
        return more

    def _closer(self, candidates: Sequence[Candidate], pricing: Pricing) -> list[Candidate]:
        """Mixtures from the hull, where damage counts for more and more."""
        points = self._hull(pricing, lambda model, step: sensitivity(model, step, self.context))
        seen = {candidate.mixture for candidate in candidates}
        more: list[Candidate] = []
        for index, mixture in enumerate([point for point in points if point not in seen][:_CLOSER]):
            made = self._build(f"hull {index + 1}", mixture)
            if made is not None:
                made.holds = None if self.holds is None else self.holds(made.model)
                more.append(made)
        return more

    def _hull(
        self, pricing: Pricing, damages: Callable[[ir.Model, QuantizeStatic], list[LayerDamage]]
    ) -> list[Mixture]:
        """The hull of what each layer costs and does, with 7-bit int8 weights or with uint8 ones where both are to be
        had."""
        prices, other = pricing.prices(), replace(self.step, weights=UINT8)
        done = {d.layer: d.damage for d in damages(self.exact, self.step)}
        done_in_uint8: dict[str, float] = {}
        if self.narrow:
            self.context.progress(0, None, "measuring uint8 weights")
            second = pricing.of(UINT8)
            if not second.complete():
                model = clone(self.exact)
                other.run(model, self.context)
                second.observe([model], self.feeds, _PROFILE_SECONDS)
            spent = second.prices().in_integers
            prices.in_uint8 = {name: spent[name] for name in sorted(self.narrow)}
            step = replace(other, include=exactly(prices.in_uint8))
            done_in_uint8 = {d.layer: d.damage for d in damages(self.exact, step)}
        return hull(self.units, prices, done, done_in_uint8)

    def _best(self, candidates: Sequence[Candidate], table: CostTable) -> Candidate | None:
        """The one that the objective means; what it asks for besides time is measured here."""
        timed = [c for c in candidates if c.ratio is not None]
        if self.objective == "latency":  # as the table will say it, rounded, so that it decides the same next time
            kept = self._remembered(table)
            return next((c for c in timed if c.mixture == kept and c.holds is not False), None)
        if self.objective == "size":
            for candidate in timed:
                candidate.bytes = weight_bytes(candidate.model)
        if self.objective == "accuracy" and timed:
            reference = Session(self.exact, threads=self.context.threads)
            expected = [reference.run(feed) for feed in self.feeds]
            for candidate in timed:
                session = Session(candidate.model, threads=self.context.threads)
                candidate.damage = damage_of(session, self.feeds, expected)[0]
        return best(candidates, self.objective, self.min_speedup)

    def _flipped(self, candidates: Sequence[Candidate], pricing: Pricing) -> list[Candidate]:
        """Single regions of the best put on the other side, while a race can tell that this is faster."""
        champion = best(candidates)
        tried = {candidate.floats for candidate in candidates}
        until = time.perf_counter() + _FLIP_TIME * max(self.time, 1.0)
        kept: list[Candidate] = []
        while champion is not None and time.perf_counter() < until:
            near = flips(self.units, pricing.prices(), champion.floats, _FLIPS, tried)
            tried |= set(near)
            made = [
                self._build(f"flip {len(tried)}.{index}", Mixture(floats, champion.uint8 - floats))
                for index, floats in enumerate(near)
            ]
            challengers = [candidate for candidate in made if candidate is not None]
            for candidate in challengers:
                candidate.holds = None if self.holds is None else self.holds(candidate.model)
            again = replace(champion, ratio=None)
            self._race([again, *challengers])
            better = [candidate for candidate in challengers if clearly(candidate, again)]
            if not better:
                break
            champion = min(better, key=lambda c: c.ratio or (1.0, 1.0, 1.0))
            kept.append(champion)
        return kept

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
        ratios = race(sessions, self.feeds, seconds=max(self.time, 1.0) * len(sessions) / 2)
        for candidate in racing:
            candidate.ratio = ratios[candidate.name]
        return ratios["float"]

    def _fingerprint(self) -> str:
        return f"{fingerprint(self.exact)[:16]} {self.step.options()}{' this cpu' if self.context.this_cpu else ''}"
