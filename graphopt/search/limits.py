"""What a quantized model has to keep to, asked for or not, and the samples that tell."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.data import feeds as to_feeds
from graphopt.data import labels as to_labels
from graphopt.gates import MetricResult, drop_gate, evaluate, measure
from graphopt.judge import sqnr_gate
from graphopt.model import interface
from graphopt.search.sensitivity import LayerDamage, sensitivity
from graphopt.session import Session
from graphopt.sweeps import hold_back
from graphopt.validation import Comparison, OutputDifference, unstable

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.base import Context, Gates
    from graphopt.data import Dataset
    from graphopt.gates import Metric
    from graphopt.passes.quantize_static import QuantizeStatic

FLOOR = 15.0
"""dB of SQNR that every float output keeps where nobody says what has to be kept. Of nine real models quantized whole,
those that keep their task metric lie at 17 to 33 dB, the one that collapses at 7."""

LEAST = 40
"""With fewer evaluation samples than twice this, a search uses all that judge; else every other one."""

_FLOOR_SAMPLES = 64  # calibration samples of which a quarter is held back, the one rounding is confirmed on
_RANKING_SAMPLES = 4  # a layer's damage is an energy: four samples rank as sixteen do, and what counts is the whole
_KEPT_BYTES = 256 << 20  # of the original's outputs; more of them are computed again for every try


@dataclass
class Limit:
    """Holds a candidate to ``gates.max_drop`` and ``gates.min_sqnr``, or to the floor where neither is asked.

    ``samples``: those that tell. A search chooses by it; the verdict is another one's (``judge.py``).
    """

    original: ir.Model
    samples: Dataset
    context: Context
    gates: Gates
    metric: Metric | None = None
    floor: float | None = None
    sqnr: float = math.nan
    """Of the last candidate, in dB: its worst output that counts."""
    unjudged: dict[str, str] = field(default_factory=dict)
    """Outputs that the floor says nothing about, each with the reason."""
    _moving: set[str] | None = None
    _session: Session | None = None
    _expected: list[dict[str, Any]] | None = None
    _before: float | None = None
    _damages: dict[QuantizeStatic, list[LayerDamage]] = field(default_factory=dict)

    @property
    def told(self) -> str:
        """What it is, in a sentence."""
        return "the budget" if self.floor is None else f"the floor of {self.floor:g} dB"

    @property
    def least(self) -> float:
        """dB that a search aims for before it has asked anybody."""
        return self.floor if self.floor is not None else FLOOR if self.gates.min_sqnr is None else self.gates.min_sqnr

    def __call__(self, candidate: ir.Model) -> bool:
        """Whether ``candidate`` keeps to it.

        Raises:
            RuntimeFailure: one of the two models does not run.
            InputError: the metric cannot be evaluated.
        """
        differences, found = self._run(candidate, keep=self.gates.max_drop is not None)
        comparison = Comparison(list(differences.values()), len(self.samples))
        self.sqnr = comparison.sqnr
        if self.floor is not None:
            return self._above_floor(comparison)
        if self.gates.min_sqnr is not None and not sqnr_gate(self.gates.min_sqnr, comparison).passed:
            return False
        return self.gates.max_drop is None or self._drops_little(found)

    def damages(self, model: ir.Model, step: QuantizeStatic) -> list[LayerDamage]:
        """The damage alone of every layer that ``step`` quantizes, worst first, on a few of the samples; measured
        once."""
        if step not in self._damages:
            judging = replace(self.context, eval_data=self.samples)
            self._damages[step] = sensitivity(model, step, judging, samples=_RANKING_SAMPLES, without=self.unjudged)
        return self._damages[step]

    def _above_floor(self, comparison: Comparison) -> bool:
        judged = [output for output in comparison.outputs if self._counts(output)]
        self.sqnr = min((output.sqnr for output in judged), default=math.nan)
        assert self.floor is not None
        return not judged or self.sqnr >= self.floor

    def _counts(self, output: OutputDifference) -> bool:
        """An index or a count says nothing by its distance; an output that was zero throughout has no signal."""
        if output.nondeterministic:
            self.unjudged[output.name] = "it is non-deterministic in the original"
        elif output.mismatch is not None:
            self.unjudged[output.name] = output.mismatch
        elif output.scale == 0:
            self.unjudged[output.name] = "it is zero throughout"
        return output.name not in self.unjudged

    def _drops_little(self, outputs: Sequence[dict[str, Any]]) -> bool:
        assert self.metric is not None
        assert self.gates.max_drop is not None
        inputs, _ = interface(self.original)
        before = [dict(expected) for _, expected in self._reference()]
        labelled = [{**to_feeds(s, inputs), **to_labels(s, inputs)} for s in self.samples]
        if self.gates.certify:
            result = measure(self.metric, before, outputs, labelled, seed=self.context.seed)
        else:  # the estimate alone decides, and an interval takes hundreds of evaluations
            if self._before is None:
                self._before = evaluate(self.metric, before, labelled)
            after = evaluate(self.metric, outputs, labelled)
            result = MetricResult(self.metric.name, self._before, after, math.nan, math.nan, len(labelled), 0)
        return drop_gate(self.gates.max_drop, result, certify=self.gates.certify).passed

    def _run(self, candidate: ir.Model, *, keep: bool) -> tuple[dict[str, OutputDifference], list[dict[str, Any]]]:
        """(how each output differs, the candidate's outputs if they are to be kept)."""
        session = Session(candidate, threads=self.context.threads)
        differences: dict[str, OutputDifference] = {}
        kept = []
        for feed, expected in self._reference():
            if not differences:
                differences = {name: OutputDifference(name) for name in expected}
                if self._moving is None and self._session is not None:
                    self._moving = unstable(self._session, feed)
                for name in self._moving or ():
                    differences[name].nondeterministic = True
                for name, value in expected.items():
                    if self.floor is not None and getattr(value, "dtype", np.dtype(bool)).kind != "f":
                        self.unjudged[name] = "it holds no floats"
            found = session.run(feed)
            for name, value in found.items():
                differences[name].add(expected[name], value)
            if keep:
                kept.append(found)
        return differences, kept

    def _reference(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """(feeds, the original's outputs) of each sample; the outputs are kept while they are small."""
        inputs, _ = interface(self.context.original)
        self._session = self._session or Session(self.original, threads=self.context.threads)
        kept: list[dict[str, Any]] = []
        size = 0
        for index, sample in enumerate(self.samples):
            feed = to_feeds(sample, inputs)
            if self._expected is not None:
                yield feed, self._expected[index]
                continue
            found = self._session.run(feed)
            size += sum(int(getattr(value, "nbytes", 0)) for value in found.values())
            if size <= _KEPT_BYTES:
                kept.append(found)
            yield feed, found
        if self._expected is None and len(kept) == len(self.samples):
            self._expected = kept


def limit_of(original: ir.Model, context: Context, gates: Gates, metric: Metric | None) -> Limit | None:
    """What a quantized model has to keep to here; None where there are no samples to tell by."""
    judging = context.eval_data or context.data
    if gates.max_drop is not None or gates.min_sqnr is not None:
        if judging is None or (gates.max_drop is not None and metric is None):
            return None
        chosen = judging if len(judging) < 2 * LEAST else judging.subset(range(0, len(judging), 2))
        return Limit(original, chosen, context, gates, metric)
    if context.data is None:
        return None
    _, held = hold_back(context.data.take(_FLOOR_SAMPLES), interface(context.original)[0])
    return Limit(original, held, context, gates, floor=FLOOR)
