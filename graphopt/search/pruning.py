"""Pruning inside a budget, and the promise that it is worth it: smaller *and* faster here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from graphopt.base import Context, Gates, PassResult, Pipeline, flatten
from graphopt.errors import RuntimeFailure
from graphopt.judge import Verdict, time_both, timed_feeds
from graphopt.model import clone
from graphopt.passes.prune import Prune
from graphopt.search.budget import adopt
from graphopt.search.limits import Limit, limit_of
from graphopt.search.speed import Promise, measured
from graphopt.session import Session
from graphopt.timing import time_models

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.gates import Metric
    from graphopt.ledger import RunResult

FASTER = 0.99
"""Latency has fallen where the median of the candidate's time over the original's is at most this."""

_TRIES = 4  # of how much may go, after the first: each halves what is unknown

_MORE = 3  # while none keeps to it

_AGAIN = 3.0

_WASTED = 0.04
"""A model that is further below the latency asked for than this has lost more than it had to."""


class Faster(Promise):
    """That what was pruned is faster here than what came in. (There is nothing to place: it has no static step.)"""

    def keep(
        self, verdict: Verdict, original: ir.Model, candidate: ir.Model, context: Context, gates: Gates, time: float
    ) -> dict[str, Any]:
        """Whether latency fell, as the report has it; where it seems not to have, both are timed again."""
        why = self.unchecked(gates, context.target, time)
        if why is None and verdict.speed is None:
            why = "the original does not run here"
        if why is not None:
            return {"limit": FASTER, "checked": False, "holds": None, "why": why}
        if verdict.speed is not None and verdict.speed[2] >= 1:
            time_both(verdict, original, candidate, context, seconds=_AGAIN * time)
        assert verdict.speed is not None
        return {"limit": FASTER, "checked": True, "holds": verdict.speed[0] <= FASTER, "why": measured(verdict)}


def prune_to_budget(
    result: RunResult, pipeline: Pipeline, original: ir.Model, context: Context, gates: Gates, metric: Metric | None
) -> None:
    """Where a pruning that may ``search`` misses ``max_drop`` or ``min_sqnr``: remove as much as keeps to them.

    What is left lies between what the pass was told and everything, and is found by halving; every try is repaired and
    judged whole. ``result`` becomes the smallest that holds, and the mildest that was tried where none does.
    """
    step = next(
        (p for p in flatten(pipeline) if isinstance(p, Prune) and (p.search or p.max_drop != "" or p.min_sqnr)), None
    )
    entry = next((e for e in result.ledger if step is not None and e.name == step.name), None)
    asked = gates.max_drop is not None or gates.min_sqnr is not None
    holds = limit_of(original, context, gates, metric) if asked else None
    others = any(e.changes and e.contract == "approximate" for e in result.ledger if e is not entry)
    if step is None or entry is None or not entry.changes or result.exact is None or holds is None or others:
        return
    judging = context.eval_data or context.data
    assert judging is not None
    everybody = Limit(original, judging, context, gates, metric)

    def keeps(candidate: ir.Model) -> bool:
        """On the samples that a search chooses by, and then on all that the gates will ask."""
        return holds(candidate) and (len(holds.samples) == len(judging) or everybody(candidate))

    try:
        if keeps(result.model):
            return
        tried = _halve(step, result.exact, replace(context, eval_data=holds.samples), keeps)
    except RuntimeFailure:  # a model that does not run here is judged, and refused, by the gates themselves
        return
    if not tried:
        return
    good = [(share, model, done) for share, model, done, kept in tried if kept]
    chosen = min(good, key=lambda one: one[0]) if good else max(((s, m, d) for s, m, d, _ in tried), key=lambda o: o[0])
    adopt(result, entry, chosen[1], chosen[2], replace(step, left=chosen[0]))
    shares = ", ".join(f"{100 * share:.0f} % {'holds' if kept else 'does not'}" for share, _, _, kept in tried)
    told = f"of the {step.of} left, {shares}; judged on {len(holds.samples)} of the {len(judging)} samples"
    told += ", then on all" if len(holds.samples) < len(judging) else ""
    result.notes.append(f"{'as much as keeps to the budget was removed' if good else 'no try keeps to it'}: {told}")


_Try = tuple[float, "ir.Model", PassResult, bool]


def _halve(step: Prune, model: ir.Model, context: Context, holds: Callable[[ir.Model], bool]) -> list[_Try]:
    low, high = step.left, 1.0
    tried: list[_Try] = []
    for number in range(_TRIES + _MORE):
        if number >= _TRIES and any(kept for *_, kept in tried):
            break
        middle = (low + high) / 2
        candidate = clone(model)
        done = replace(step, left=middle).run(candidate, context)
        if not done.changes:
            high = middle
            continue
        kept = holds(candidate)
        tried.append((middle, candidate, done, kept))
        low, high = (low, middle) if kept else (middle, high)
    return tried


def prune_to_latency(
    result: RunResult, pipeline: Pipeline, original: ir.Model, context: Context, seconds: float
) -> None:
    """Where a pruning by latency is not as fast as asked, or faster by far: find the share of the profile's time that
    makes the whole model so, by halving, on models that are not repaired; then repair that one.

    ``seconds``: for timing each; with 0 nothing is done. ``result`` becomes the mildest that is fast enough, or the
    fastest that was tried where none is.
    """
    step = next((p for p in flatten(pipeline) if isinstance(p, Prune) and p.of == "latency"), None)
    entry = next((e for e in result.ledger if step is not None and e.name == step.name), None)
    others = any(e.changes and e.contract == "approximate" for e in result.ledger if e is not entry)
    if step is None or entry is None or not entry.changes or result.exact is None or seconds == 0 or others:
        return
    feeds = timed_feeds(original, context)

    def ratio(candidate: ir.Model) -> float:
        threads = context.threads or 1
        sessions = {
            name: Session(model, threads=threads, timed=True)
            for name, model in (("original", original), ("candidate", candidate))
        }
        return time_models(sessions, feeds, seconds=seconds)[1]["candidate"][0]

    try:
        tried = [(step.left, ratio(result.model))]
        low, high = 0.0, 1.0
        while len(tried) <= _TRIES and not step.left - _WASTED <= tried[-1][1] <= step.left:
            share, found = tried[-1]
            low, high = (low, share) if found > step.left else (share, high)
            middle = min(max(share * step.left / found, low + 0.1 * (high - low)), high - 0.1 * (high - low))
            candidate = clone(result.exact)
            done = replace(step, left=middle, repair="none").run(candidate, context)
            if not done.changes:
                high = middle
                tried.append((middle, 1.0))
                continue
            tried.append((middle, ratio(candidate)))
        good = [one for one in tried if one[1] <= step.left]
        share, found = max(good) if good else min(tried, key=lambda one: one[1])
        if share != step.left:
            model = clone(result.exact)
            chosen = replace(step, left=share)
            adopt(result, entry, model, chosen.run(model, context), chosen)
    except RuntimeFailure:  # a model that does not run here is judged, and refused, by the gates themselves
        return
    shown = ", ".join(f"{100 * s:.0f} % of the profile's time left: {r:.2f}x" for s, r in tried)
    told = "as fast as asked" if good else f"not as fast as asked ({100 * step.left:.0f} %)"
    result.notes.append(f"{told}, {found:.2f}x of the original's time; {shown}")
