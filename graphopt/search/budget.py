"""The largest quantized part that keeps to a limit: layers go back to float, worst first, until it holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from graphopt.base import Context, Gates, Pass, PassResult, Pipeline, Skip, flatten
from graphopt.errors import RuntimeFailure
from graphopt.graph import label, nodes
from graphopt.ledger import LedgerEntry, RunResult
from graphopt.model import clone, weight_bytes
from graphopt.passes._coverage import Coverage
from graphopt.passes._placement import place
from graphopt.passes.quantize_static import QuantizeStatic
from graphopt.search.limits import Limit, limit_of
from graphopt.search.sensitivity import LayerDamage, exactly
from graphopt.target import get_target

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.gates import Metric
    from graphopt.validation import Comparison


@dataclass
class Budgeted:
    """``model`` keeps to the limit with ``excluded`` layers in float, its worst output at ``sqnr`` dB; None where not
    even one quantized layer does. ``tried``: (layers in float, whether it held)."""

    model: ir.Model | None
    excluded: list[LayerDamage]
    result: PassResult | None
    tried: list[tuple[int, bool]] = field(default_factory=list)
    damages: list[LayerDamage] = field(default_factory=list)
    sqnr: float = math.nan


def within_budget(model: ir.Model, step: QuantizeStatic, context: Context, limit: Limit) -> Budgeted:
    """Leave as few layers in float as ``limit`` allows.

    Layers are ranked by the damage each does alone, for what it computes (see :func:`ranked`); how many have to go is
    foretold by adding damages up, which is right to first order, and found by galloping and halving from there, each
    try judged on the whole model.

    Args:
        model: the float model, simplified; not touched.
        step: how to quantize; what it excludes already stays excluded.
        limit: what a quantized model has to keep to.
    """
    damages = limit.damages(model, step)
    order = ranked(damages, _shares(model, step, context))
    found = Budgeted(None, [], None, damages=damages)

    def attempt(count: int) -> bool:
        candidate = clone(model)
        result = quantize_without(candidate, step, context, [d.layer for d in order[:count]])
        kept = bool(result.changes) and limit(candidate)
        found.tried.append((count, kept))
        context.progress(len(found.tried), None, "looking for the layers that have to stay in float")
        if kept and (found.model is None or count < len(found.excluded)):
            found.model, found.excluded, found.result, found.sqnr = candidate, order[:count], result, limit.sqnr
        return kept

    fewest(len(order), foretold(order, limit.least), attempt)
    if found.result is not None:
        why = f"left in float to keep to {limit.told}: alone it brings the worst output to {{:.1f}} dB SQNR"
        by_name = {d.layer: d for d in found.excluded}
        found.result.skipped = [
            Skip(s.site, f"{by_name[s.site].op_type}: " + why.format(by_name[s.site].sqnr)) if s.site in by_name else s
            for s in found.result.skipped
        ]
    return found


def ranked(damages: Sequence[LayerDamage], shares: Mapping[str, float]) -> list[LayerDamage]:
    """Which layers go first: those that do most damage for what they compute. ``shares``: of the MACs, 0 to 1; a layer
    costs something by itself too, or else tiny harmless ones would go first."""
    least = 1 / max(len(damages), 1)
    return sorted(damages, key=lambda d: (-d.damage / (shares.get(d.layer, 0.0) + least), d.layer))


def foretold(order: Sequence[LayerDamage], least: float) -> int:
    """How many of ``order`` have to go, from the front, until the rest together leaves ``least`` dB at every output:
    noise of different layers is independent, so that its energy adds up."""
    left: dict[str, float] = {}
    allowed = 10 ** (-least / 10)
    for count, damage in reversed(list(enumerate(order, 1))):
        for output, noise in damage.noise.items():
            left[output] = left.get(output, 0.0) + noise
        if not damage.noise or max(left.values()) > allowed:
            return count
    return 0


def fewest(total: int, guess: int, attempt: Callable[[int], bool]) -> None:
    """Ask ``attempt`` for the smallest number between 1 and ``total - 1`` that it grants, from ``guess`` outwards.

    (None was tried before; all of them in float would be no quantization.)
    """
    if total < 2:
        return
    low, high = 0, total  # refused, granted (or never asked)
    count, step = min(max(guess, 1), total - 1), 1
    while low < count < high:
        if attempt(count):
            high = count
            count = max(high - step, low + 1) if low == 0 and step < high else (low + high) // 2
        else:
            low = count
            count = min(low + step, total - 1) if high == total else (low + high) // 2
        step *= 2


def first_that(total: int, holds: Callable[[int], bool]) -> int:
    """The smallest index below ``total`` for which it holds, where it goes on to hold behind it; else ``total``."""
    low, high = 0, total
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _shares(model: ir.Model, step: QuantizeStatic, context: Context) -> dict[str, float]:
    """Of the model's MACs, each layer's; empty where they are not known."""
    macs = Coverage(model, context).macs
    total = sum(found for found in macs.values() if found)
    if not total:
        return {}
    placement = place(model, get_target(context.target), exclude=step.exclude, include=step.include)
    outputs = {label(layer.node): tuple(v.name or "" for v in layer.node.outputs) for layer in placement.layers}
    return {name: (macs.get(output) or 0) / total for name, output in outputs.items()}


def without(step: QuantizeStatic, excluded: Iterable[str], uint8: Iterable[str] = ()) -> QuantizeStatic:
    """``step`` with these layers left in float too, and the weights of those in uint8."""
    return replace(step, exclude=(*step.exclude, *exactly(excluded)), uint8=(*step.uint8, *exactly(uint8)))


def quantize_without(
    model: ir.Model, step: QuantizeStatic, context: Context, excluded: Iterable[str], uint8: Iterable[str] = ()
) -> PassResult:
    """Quantize ``model`` in place by ``step``, with these layers left in float too, and the weights of those in
    uint8."""
    return without(step, excluded, uint8).run(model, context)


@dataclass
class Kept:
    """What keeping to a limit took. ``before`` and ``after``: dB of the worst output that counts, on the samples that
    chose, with everything in integers that can be and as it is now; ``holds`` None: nobody could tell."""

    limit: Limit
    before: float
    after: float
    holds: bool | None
    damages: list[LayerDamage] | None = None
    left: list[str] = field(default_factory=list)
    note: str = ""

    def floor(self) -> dict[str, Any] | None:
        """As the report has it; None where the user said what to keep to."""
        if self.limit.floor is None:
            return None
        return {
            "limit_db": self.limit.floor,
            "holds": self.holds,
            "samples": len(self.limit.samples),
            "everything_db": self.before if math.isfinite(self.before) else None,
            "result_db": self.after if math.isfinite(self.after) else None,
            "left_in_float": self.left,
            "outputs_not_judged": dict(sorted(self.limit.unjudged.items())),
        }

    def again(self, model: ir.Model, left: list[str]) -> None:
        """Measure what ``model``, made of it by somebody else with ``left`` in float, keeps to."""
        self.left = left
        if self.limit.floor is not None and self.holds is not None:
            self.holds = self.limit(model)
            self.after = self.limit.sqnr

    def warn(self, comparison: Comparison | None, notes: list[str]) -> None:
        """Where the samples that judge say less than those that chose."""
        if self.limit.floor is None or self.holds is not True or comparison is None:
            return
        judged = [o for o in comparison.outputs if o.name not in self.limit.unjudged and o.mismatch is None]
        worst = min(judged, key=lambda output: output.sqnr, default=None)
        if worst is not None and worst.sqnr < self.limit.floor:
            notes.append(
                f"WARNING: output '{worst.name}' has {worst.sqnr:.1f} dB SQNR on the samples that judge, below "
                f"{self.limit.told} that held on {len(self.limit.samples)} calibration samples held back"
            )


def damages(kept: Kept | None) -> list[dict[str, Any]] | None:
    """Every layer's damage, as the report has it; None where nothing had to be searched."""
    return None if kept is None or kept.damages is None else [damage.as_dict() for damage in kept.damages]


def keep_to_budget(
    result: RunResult, pipeline: Pipeline, original: ir.Model, context: Context, gates: Gates, metric: Metric | None
) -> Kept | None:
    """Where static quantization misses ``max_drop`` or ``min_sqnr``, or the floor where neither is asked, leave the
    layers that hurt most in float.

    Changes ``result`` where a set of layers keeps to it. None: there is nothing to keep to, or to tell by.
    """
    step, entry = static_step(pipeline, result)
    if step is None or entry is None or result.exact is None:
        return None
    limit = limit_of(original, context, gates, metric)
    if limit is None:
        return None
    try:
        if limit(result.model):
            return Kept(limit, limit.sqnr, limit.sqnr, None if math.isnan(limit.sqnr) else True)
        before = limit.sqnr
        found = within_budget(result.exact, step, context, limit)
    except RuntimeFailure:  # a model that does not run here is judged, and refused, by the gates themselves
        return None
    kept = Kept(limit, before, found.sqnr, found.model is not None, found.damages)
    if found.model is None or found.result is None:
        how = "layers went back to float worst first, until one was left"
        kept.note = f"no quantized part keeps to {limit.told}: {how}"
        result.notes.append(kept.note)
        kept.after = before
        return kept
    adopt(result, entry, found.model, found.result, without(step, [d.layer for d in found.excluded]))
    kept.left = [damage.layer for damage in found.excluded]
    many = f"{len(found.excluded)} of {len(found.damages)} layers were left in float to keep to {limit.told}"
    if limit.floor is None:
        judging = context.eval_data or context.data
        many += f"; they were chosen on {len(limit.samples)} of the {len(judging or ())} samples that judge"
    else:
        many += (
            f": the worst output had {before:.1f} dB on {len(limit.samples)} calibration samples held back, now it has "
            f"{found.sqnr:.1f}; --min-sqnr sets another floor"
        )
    kept.note = many
    result.notes.append(many)
    return kept


def adopt(result: RunResult, entry: LedgerEntry, model: ir.Model, done: PassResult, step: Pass) -> None:
    """Let ``result`` be ``model``, which ``step`` made in place of the pass of ``entry``."""
    result.model, result.adopted = model, step
    entry.changes, entry.skipped, entry.metrics = done.changes, done.skipped, done.metrics
    entry.nodes = (entry.nodes[0], sum(1 for _ in nodes(model)))
    entry.weight_bytes = (entry.weight_bytes[0], weight_bytes(model))


def static_step(pipeline: Pipeline, result: RunResult) -> tuple[QuantizeStatic | None, LedgerEntry | None]:
    """The static quantization in a pipeline, and what became of it; (None, None) where there is none."""
    step = next((p for p in flatten(pipeline) if isinstance(p, QuantizeStatic)), None)
    entry = next((e for e in result.ledger if step is not None and e.name == step.name), None)
    return step, entry
