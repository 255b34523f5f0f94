"""The largest quantized part that stays inside a budget: layers go back to float, worst first, until the gates hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from graphopt.base import Context, Gates, PassResult, Pipeline, Skip, flatten
from graphopt.errors import RuntimeFailure
from graphopt.graph import nodes
from graphopt.judge import judge
from graphopt.ledger import LedgerEntry, RunResult
from graphopt.model import clone, weight_bytes
from graphopt.passes.quantize_static import QuantizeStatic
from graphopt.search.sensitivity import CachedSweep, LayerDamage, escaped, sensitivity

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.data import Dataset
    from graphopt.gates import Metric

LEAST = 40
"""With fewer evaluation samples than twice this, the search uses all that judge; else every other one."""

Holds = Callable[["ir.Model"], bool]


@dataclass
class Budgeted:
    """``model`` keeps to the budget with ``excluded`` layers in float; None where not even one quantized layer does."""

    model: ir.Model | None
    excluded: list[LayerDamage]
    result: PassResult | None
    tried: list[tuple[int, bool]] = field(default_factory=list)
    damages: list[LayerDamage] = field(default_factory=list)


def within_budget(model: ir.Model, step: QuantizeStatic, context: Context, holds: Holds) -> Budgeted:
    """Leave as few layers in float as ``holds`` allows.

    Layers are ranked by the damage each does alone; the number to leave is found by doubling, then halving, each try
    judged on the whole model. (Damages add up only to first order, so the ranking proposes and ``holds`` decides.)

    Args:
        model: the float model, simplified; not touched.
        step: how to quantize; what it excludes already stays excluded.
        holds: whether a quantized model keeps to the budget.
    """
    once = CachedSweep(context).shared()
    damages = sensitivity(model, step, once)
    found = Budgeted(None, [], None, damages=damages)

    def attempt(count: int) -> bool:
        candidate = clone(model)
        result = quantize_without(candidate, step, once, [d.layer for d in damages[:count]])
        kept = bool(result.changes) and holds(candidate)
        found.tried.append((count, kept))
        if kept and (found.model is None or count < len(found.excluded)):
            found.model, found.excluded, found.result = candidate, damages[:count], result
        return kept

    low, count = 0, 1  # zero has been tried: the caller would not be here
    while count < len(damages) and not attempt(count):
        low, count = count, count * 2
    high = min(count, len(damages))  # all of them in float would be no quantization, so that is never tried
    while high - low > 1:
        middle = (low + high) // 2
        if attempt(middle):
            high = middle
        else:
            low = middle
    if found.result is not None:
        why = "left in float to keep to the budget: alone it brings the worst output to {:.1f} dB SQNR"
        by_name = {d.layer: d for d in found.excluded}
        found.result.skipped = [
            Skip(s.site, f"{by_name[s.site].op_type}: " + why.format(by_name[s.site].sqnr)) if s.site in by_name else s
            for s in found.result.skipped
        ]
    return found


def without(step: QuantizeStatic, excluded: Sequence[str]) -> QuantizeStatic:
    """``step`` with these layers left in float too."""
    names = tuple(f"re:^{escaped(name)}$" for name in excluded)
    return replace(step, exclude=(*step.exclude, *names))


def quantize_without(model: ir.Model, step: QuantizeStatic, context: Context, excluded: Sequence[str]) -> PassResult:
    """Quantize ``model`` in place by ``step``, with these layers left in float too."""
    return without(step, excluded).run(model, context)


def keep_to_budget(
    result: RunResult, pipeline: Pipeline, original: ir.Model, context: Context, gates: Gates, metric: Metric | None
) -> list[dict[str, Any]] | None:
    """Where static quantization misses ``max_drop`` or ``min_sqnr``, leave the layers that hurt most in float.

    Changes ``result`` where a set of layers keeps to the budget; returns every layer's damage, or None where nothing
    had to be searched.
    """
    step, entry = static_step(pipeline, result)
    holds, chosen_on = budget(original, context, gates, metric)
    judging = context.eval_data or context.data
    if step is None or entry is None or result.exact is None or judging is None or holds is None:
        return None
    searching = replace(context, eval_data=chosen_on)
    try:
        if holds(result.model):
            return None
        found = within_budget(result.exact, step, searching, holds)
    except RuntimeFailure:  # a model that does not run here is judged, and refused, by the gates themselves
        return None
    if found.model is None or found.result is None:
        result.notes.append(
            "no quantized part keeps to the budget: layers went back to float worst first, until one was left"
        )
    else:
        adopt(result, entry, found.model, found.result, without(step, [d.layer for d in found.excluded]))
        result.notes.append(
            f"{len(found.excluded)} of {len(found.damages)} layers were left in float to keep to the budget; they were "
            f"chosen on {len(chosen_on or ())} of the {len(judging)} samples that judge"
        )
    return [damage.as_dict() for damage in found.damages]


def adopt(result: RunResult, entry: LedgerEntry, model: ir.Model, done: PassResult, step: QuantizeStatic) -> None:
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


def budget(
    original: ir.Model, context: Context, gates: Gates, metric: Metric | None
) -> tuple[Holds | None, Dataset | None]:
    """Whether a quantized model keeps to ``max_drop`` and ``min_sqnr``, and the samples that tell; None: no budget."""
    asked = Gates(max_drop=gates.max_drop, min_sqnr=gates.min_sqnr, certify=gates.certify)
    judging = context.eval_data or context.data
    if judging is None or not asked.asked():
        return None, judging
    chosen_on = judging if len(judging) < 2 * LEAST else judging.subset(range(0, len(judging), 2))
    searching = replace(context, eval_data=chosen_on)

    def holds(candidate: ir.Model) -> bool:
        verdict = judge(
            original, candidate, searching, asked, metric=metric, sizes=(1, 1), seconds=0, approximate=False
        )
        return not verdict.failed

    return holds, chosen_on
