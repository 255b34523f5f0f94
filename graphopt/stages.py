"""A pipeline run from end to end, and the searches that keep to a budget: of the whole, or of single passes.

A pass may have a budget of its own (``max-drop``, ``min-sqnr`` among its options in a recipe). The pipeline is then run
in stages that each end with such a pass: a stage is held to its budget against the model that it was given, by the same
searches that hold a whole run to its gates, before the next stage starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graphopt.base import Gates, Pass, Repeat
from graphopt.errors import InputError
from graphopt.judge import judge
from graphopt.ledger import told_or_forgotten
from graphopt.manager import PassManager
from graphopt.search.budget import Kept, keep_to_budget
from graphopt.search.pruning import prune_to_budget, prune_to_latency

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.base import Context, Pipeline
    from graphopt.gates import GateResult, Metric
    from graphopt.ledger import RunResult


def budget_of(step: Pass | Repeat) -> Gates | None:
    """What a pass has to keep to by itself; None: nothing of its own.

    Raises:
        InputError: the pass is part of a repeat.
    """
    if isinstance(step, Repeat):
        inner = next((p for p in step.passes if budget_of(p) is not None), None)
        if inner is not None:
            raise InputError(f"{inner.name} has a budget of its own and is repeated; take it out of the repeat")
        return None
    drop, sqnr = getattr(step, "max_drop", ""), getattr(step, "min_sqnr", 0.0)
    return Gates(max_drop=str(drop) if drop != "" else None, min_sqnr=sqnr or None) if drop != "" or sqnr else None


@dataclass
class Stages:
    """A pipeline about to be run. ``pipeline`` becomes what makes the result again, ``gates`` how its passes' own
    budgets came out."""

    pipeline: Pipeline
    gates: Gates
    metric: Metric | None
    verify: str
    must: Collection[str]
    search: bool
    seconds: float
    own: list[GateResult] = field(default_factory=list)
    _last: Pipeline = ()
    _start: ir.Model | None = None

    def check(self, context: Context) -> None:
        """Raise InputError where a budget of a single pass cannot be judged."""
        for step in self.pipeline:
            budget = budget_of(step)
            if budget is None or isinstance(step, Repeat):
                continue
            if context.data is None and context.eval_data is None:
                raise InputError(f"{step.name} has a budget of its own, which is judged on data; give --data")
            if budget.max_drop is not None and self.metric is None:
                raise InputError(
                    f"max-drop of {step.name} needs a metric to measure the drop of; give --metric accuracy or "
                    "--metric file.py:function"
                )

    def run(self, model: ir.Model, context: Context) -> RunResult:
        """Run the passes; stages with budgets of their own are held to them.

        Raises:
            InputError: as :meth:`check`.
            PreconditionError: as :meth:`graphopt.manager.PassManager.run`.
        """
        self._start, self._last = model, self.pipeline
        budgets = [budget_of(step) for step in self.pipeline] if self.search else []
        if not any(budgets):
            return self._part(self.pipeline, model, context)
        self.check(context)
        steps, begin = list(self.pipeline), 0
        done: list[Pass | Repeat] = []
        before: RunResult | None = None
        for number, budget in enumerate(budgets, 1):
            if budget is None and number < len(steps):
                continue
            part, begin = steps[begin:number], number
            self._start, self._last = model, part
            with told_or_forgotten(before.ledger if before is not None else ()):
                result = self._part(part, model, context)
            if budget is not None:
                self._hold(result, part, model, context, budget)
                done += result.as_ran(part)
                result.adopted = None
            else:
                done += part
            model = result.model
            before = result if before is None else _joined(before, result)
        assert before is not None
        self.pipeline = done
        return before

    def keep(self, result: RunResult, context: Context) -> Kept | None:
        """The searches that hold what came last, where it has no budget of its own, to the gates of the whole."""
        if not self.search or self._start is None or (self._last and budget_of(self._last[-1]) is not None):
            return None
        original = context.original if self.own else self._start
        prune_to_latency(result, self._last, original, context, self.seconds)
        prune_to_budget(result, self._last, original, context, self.gates, self.metric)
        return keep_to_budget(result, self._last, original, context, self.gates, self.metric)

    def _part(self, part: Pipeline, model: ir.Model, context: Context) -> RunResult:
        names = {step.name for entry in part for step in (entry.passes if isinstance(entry, Repeat) else (entry,))}
        must = [name for name in self.must if name in names]
        return PassManager(part, verify=self.verify, raise_preconditions=must).run(model, context)

    def _hold(self, result: RunResult, part: Pipeline, before: ir.Model, context: Context, budget: Gates) -> None:
        """Search inside a pass's own budget, then judge it on all samples that judge."""
        step: Any = part[-1]
        prune_to_latency(result, part, before, context, self.seconds)
        prune_to_budget(result, part, before, context, budget, self.metric)
        keep_to_budget(result, part, before, context, budget, self.metric)
        verdict = judge(
            before, result.model, context, budget, metric=self.metric, sizes=(0, 0), seconds=0, approximate=False
        )
        for gate in verdict.gates:
            self.own.append(dataclasses.replace(gate, gate=f"{gate.gate} of {step.name}"))


def _joined(first: RunResult, then: RunResult) -> RunResult:
    """Two stages as one run: the second's model, both ledgers."""
    ledger, notes = [*first.ledger, *then.ledger], list(dict.fromkeys([*first.notes, *then.notes]))
    return dataclasses.replace(then, ledger=ledger, notes=notes, exact=then.exact or first.exact, comparison=None)
