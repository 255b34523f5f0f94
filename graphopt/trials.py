"""Making and measuring configurations of :mod:`graphopt.search.space`: what one try of ``tune`` does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from graphopt.base import Context, Gates, Pass, Pipeline, Repeat
from graphopt.errors import GraphoptError, InputError, NothingDone, RuntimeFailure
from graphopt.graph import opset
from graphopt.judge import judge, timed_feeds
from graphopt.ledger import forget_reproducers
from graphopt.manager import PassManager
from graphopt.model import fingerprint
from graphopt.passes.quantize_static import QuantizeStatic
from graphopt.presets import asked, exact_passes, prepare
from graphopt.report.document import about
from graphopt.search.frontier import Candidate
from graphopt.search.measured import Search
from graphopt.search.sensitivity import sensitivity
from graphopt.search.space import FLOAT, STATIC, Config, Space, first, key
from graphopt.sweeps import attach
from graphopt.target import get_target

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.gates import Metric

_MIXTURES = 6
"""Measured mixtures that are tried, at most."""


@dataclass
class Trials:
    """Makes and measures configurations of one model, each from what it shares with others.

    ``begin``: passes that come before all (what was asked of the interface). ``seconds`` of timing each.
    """

    original: ir.Model
    context: Context
    gates: Gates
    metric: Metric | None
    seconds: float
    verify: str = "end"
    begin: Sequence[Pass] = ()
    space: Space = field(default_factory=Space)
    done: list[Candidate] = field(default_factory=list)
    _heads: dict[str, tuple[ir.Model, Context]] = field(default_factory=dict)

    def pipeline(self, config: Config) -> Pipeline:
        """All passes of a configuration, in order."""
        return [*self._exact(config), *self.space.before(config), *self.space.after(config)]

    def _exact(self, config: Config) -> Pipeline:
        if config["arithmetic"] == FLOAT:
            least = max((int(getattr(step, "least_opset", 1)) for step in self.space.after(config)), default=1)
            upgrade = asked(self.original, to_opset=least) if 0 < opset(self.original) < least else []
            return [*self.begin, *upgrade, *exact_passes()]
        return [*self.begin, *prepare(self.original, self.context.target)]

    def original_candidate(self, size: int) -> Candidate:
        """The model as it came, of ``size`` bytes, measured against itself: same time, same outputs.

        Raises:
            InputError: it does not run here, so nothing can be measured.
        """
        verdict = judge(
            self.original,
            self.original,
            self.context,
            Gates(),
            metric=self.metric,
            sizes=(1, 1),
            seconds=0,
            approximate=False,
        )
        if verdict.comparison is None:
            why = ", ".join(verdict.notes)
            raise InputError(f"tune has to run the model and cannot: {why}; try graphopt optimize, or another runtime")
        score = verdict.metric.original if verdict.metric is not None else math.inf
        return Candidate(
            "original", {}, (1.0, 1.0, 1.0), score, bytes=size, holds=True, digest=fingerprint(self.original)
        )

    def build(self, config: Config) -> ir.Model:
        """The model of a configuration.

        Raises:
            NothingDone: it changes nothing that the exact passes do not.
            GraphoptError: it cannot be made.
        """
        model, context = self._head(config)
        last = self.space.after(config)
        if not last:
            return model
        result = PassManager(last, verify="off").run(model, context)
        forget_reproducers(result.ledger)
        entry = result.ledger[-1]
        if not entry.changes:
            reasons = list(dict.fromkeys(s.reason for s in entry.skipped)) or [entry.reason or "nothing to do"]
            raise NothingDone(f"{entry.name} changed nothing: {reasons[0]}")
        return result.model

    def _head(self, config: Config) -> tuple[ir.Model, Context]:
        """The model before the last pass, and a context whose sweeps over it are made once."""
        before = self.space.before(config)
        names = [" ".join(map(str, _flat(self._exact(config)))), *map(str, before)]
        for count in range(1, len(names) + 1):
            name = "; ".join(names[:count])
            if name in self._heads:
                continue
            if count == 1:
                result = PassManager(self._exact(config), verify=self.verify).run(self.original, self.context)
            else:
                start, _ = self._heads["; ".join(names[: count - 1])]
                # Its own sweeps: a pass that looks again at what it has changed must not be told of before.
                result = PassManager([before[count - 2]], verify="off").run(start, self.context)
            forget_reproducers(result.ledger)  # the candidate that is chosen is made again, and tells of its own
            own = replace(self.context)  # what is seen of each head is remembered beside the others
            attach(own)
            self._heads[name] = result.model, own
        return self._heads["; ".join(names)]

    def measure(self, config: Config, original: Candidate) -> Candidate:
        """Make it and judge it; what cannot be made or run is a candidate with an error. It joins :attr:`done`."""
        found = Candidate(self.space.describe(config), dict(config))
        try:
            model = self.build(config)
            found.digest = fingerprint(model)
            same = next((c for c in self.done if c.digest == found.digest and c.ratio is not None), None)
            if same is not None:
                found = replace(same, name=found.name, config=found.config)
            else:
                self._judge(found, model, original)
        except (GraphoptError, MemoryError) as error:
            found.error = " ".join(str(error).split()) or type(error).__name__
        self.done.append(found)
        return found

    def _judge(self, found: Candidate, model: ir.Model, original: Candidate) -> None:
        found.bytes = int(about(model, None)["bytes"])
        verdict = judge(
            self.original,
            model,
            self.context,
            self.gates,
            metric=self.metric,
            sizes=(original.bytes, found.bytes),
            seconds=self.seconds,
            approximate=False,
        )
        if verdict.comparison is None or verdict.speed is None:
            raise RuntimeFailure("it was not compared or timed")
        worst = verdict.comparison.worst
        if worst is not None and worst.mismatch is not None:
            raise RuntimeFailure(f"output '{worst.name}': {worst.mismatch}")
        found.ratio, found.slower = verdict.speed, verdict.slower
        found.holds = not verdict.failed
        found.sqnr = math.inf if worst is None else worst.sqnr
        found.score = verdict.metric.candidate if verdict.metric is not None else found.sqnr

    def explore(self) -> None:
        """Measure which layers hurt and which regions are faster in float, and make them choices of :attr:`space`."""
        config = self.space.complete({"arithmetic": STATIC})
        model, context = self._head(config)
        step = next((p for p in self.space.after(config) if isinstance(p, QuantizeStatic)), None)
        known = any(c.config.get("arithmetic") == STATIC and c.ratio is not None for c in self.done)
        if step is None or not known:
            return
        damages = sensitivity(model, step, context)
        mixtures: list[frozenset[str]] = []
        if get_target(context.target).here:
            feeds = timed_feeds(self.original, self.context)
            search = Search(self.original, model, self.build(config), step, context, feeds, time=self.seconds)
            mixtures = search.mixtures({d.layer: d.damage for d in damages})
        self.enter(Space([d.layer for d in damages], [[], *map(sorted, mixtures[:_MIXTURES])]))

    def enter(self, space: Space) -> None:
        """Go on in ``space``; what is done is one of its configurations too."""
        self.space = space
        for candidate in self.done:
            candidate.config = space.complete(candidate.config)

    def beginnings(self) -> list[Config]:
        """What to try first, of what was not tried yet."""
        tried = {key(c.config) for c in self.done}
        return [config for config in first(self.space) if key(config) not in tried]


def _flat(pipeline: Pipeline) -> list[str]:
    return [f"{s.times} x ({_flat(s.passes)})" if isinstance(s, Repeat) else str(s) for s in pipeline]
