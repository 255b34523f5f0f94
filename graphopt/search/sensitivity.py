"""Which layers hurt: each is quantized alone, and the damage is read at the model's outputs.

Statistics are collected once; a layer costs one more load and a few inferences. Quantizing one at a time on unlabelled
samples ranks layers as the truth does (Spearman 0.95 and more); sums of single damages are only first order, so a
budget is always checked on the whole (see ``budget.py``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from graphopt.base import Context
from graphopt.data import feeds as to_feeds
from graphopt.graph import label
from graphopt.model import clone, interface
from graphopt.passes._placement import place
from graphopt.session import Session
from graphopt.statistics import Statistics
from graphopt.target import get_target
from graphopt.validation import OutputDifference

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from graphopt.gram import Seen
    from graphopt.linear import Form
    from graphopt.passes.quantize_static import QuantizeStatic

SAMPLES = 16
"""Samples that judge each layer. Ranking needs few; the budget is checked on all."""


@dataclass(frozen=True)
class LayerDamage:
    """``damage``: noise energy over signal energy at the outputs, summed over outputs, with this layer alone in
    integers; ``sqnr`` is the worst output's, in dB."""

    layer: str
    op_type: str
    damage: float
    sqnr: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "op_type": self.op_type,
            "damage": self.damage,
            "sqnr_db": self.sqnr if math.isfinite(self.sqnr) else None,
        }


@dataclass
class CachedSweep:
    """Statistics of a float model, collected once for every way of quantizing it."""

    context: Context
    known: Statistics | None = None
    means: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    inputs: dict[Form, Seen] = field(default_factory=dict)

    def __call__(self, model: ir.Model, names: Sequence[str], histograms: bool) -> Statistics:
        del histograms  # the widest answer serves all
        if self.known is None or any(name not in self.known.values for name in names):
            assert self.context.collect is not None
            wanted = dict.fromkeys([*(self.known.values if self.known else ()), *names])
            self.known = self.context.collect(model, list(wanted), True)
        return self.known

    def channel_means(self, model: ir.Model, axes: Mapping[str, int]) -> dict[str, NDArray[np.float64]]:
        """The same for means per channel."""
        missing = {name: axis for name, axis in axes.items() if name not in self.means}
        if missing and self.context.channel_means is not None:
            self.means |= self.context.channel_means(model, missing)
        return {name: self.means[name] for name in axes if name in self.means}

    def layer_inputs(self, model: ir.Model, forms: Sequence[Form]) -> dict[Form, Seen]:
        """The same for second moments."""
        missing = [form for form in forms if form not in self.inputs]
        if missing and self.context.layer_inputs is not None:
            self.inputs |= self.context.layer_inputs(model, missing)
        return {form: self.inputs[form] for form in forms if form in self.inputs}

    def shared(self) -> Context:
        """The context, with this in place of its own sweeps."""
        return replace(self.context, collect=self, channel_means=self.channel_means, layer_inputs=self.layer_inputs)


def layers(model: ir.Model, step: QuantizeStatic, target: str) -> list[tuple[str, str]]:
    """(name, operator) of every layer that ``step`` would quantize."""
    placement = place(model, get_target(target), exclude=step.exclude, include=step.include)
    return [(label(layer.node), layer.node.op_type) for layer in placement.layers]


def _quantized_only(model: ir.Model, step: QuantizeStatic, context: Context, name: str) -> ir.Model:
    copy = clone(model)
    replace(step, include=(f"re:^{escaped(name)}$",)).run(copy, context)
    return copy


def escaped(name: str) -> str:
    """A node name as the inside of a ``re:^...$`` pattern."""
    return re.escape(name)


def sensitivity(
    model: ir.Model, step: QuantizeStatic, context: Context, *, samples: int = SAMPLES
) -> list[LayerDamage]:
    """Every layer's damage, worst first.

    ``model`` is the float model as it will be quantized (simplified); ``context`` has calibration data, and evaluation
    data that judges where there is any.

    Raises:
        PreconditionError: no data, or the model cannot be quantized.
        RuntimeFailure: it does not run.
    """
    step.check(model)
    found = layers(model, step, context.target)
    inputs, _ = interface(model)
    dataset = context.eval_data or context.data
    assert dataset is not None
    judged = [to_feeds(sample, inputs) for sample in dataset.take(samples)]
    reference = Session(model, threads=context.threads)
    expected = [reference.run(feed) for feed in judged]
    sweep = context.collect if isinstance(context.collect, CachedSweep) else CachedSweep(context)
    once = sweep.shared()
    wanted = place(model, get_target(context.target), exclude=step.exclude, include=step.include)
    sweep(model, [v.name or "" for v in dict.fromkeys(wanted.quantized.values())], True)
    step.collect_inputs(model, wanted, once)
    step.collect_means(model, wanted, once)
    damages = []
    for index, (name, op_type) in enumerate(found):
        session = Session(_quantized_only(model, step, once, name), threads=context.threads)
        damage, sqnr = output_damage(session, judged, expected)
        damages.append(LayerDamage(name, op_type, damage, sqnr))
        context.progress(index + 1, len(found), "quantizing one layer at a time")
    return sorted(damages, key=lambda d: (-d.damage, d.layer))


def output_damage(
    session: Session, judged: Sequence[dict[str, NDArray[Any]]], expected: Sequence[dict[str, NDArray[Any]]]
) -> tuple[float, float]:
    """(noise over signal energy, summed over outputs; SQNR of the worst one in dB) of a model against what was expected
    on the inputs ``judged``."""
    differences = {name: OutputDifference(name) for name in session.output_names}
    for feed, wanted in zip(judged, expected, strict=True):
        for name, value in session.run(feed).items():
            differences[name].add(wanted[name], value)
    ratios = [10 ** (-d.sqnr / 10) if math.isfinite(d.sqnr) else 0.0 for d in differences.values() if not d.mismatch]
    worst = min((d.sqnr for d in differences.values()), default=math.inf)
    if any(d.mismatch for d in differences.values()):
        return math.inf, -math.inf
    return sum(ratios), worst
