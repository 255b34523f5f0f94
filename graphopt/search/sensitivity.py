"""Which layers hurt: each is quantized alone, and the damage is read at the model's outputs.

Statistics are collected once; a layer costs one more load and a few inferences. Quantizing one at a time on unlabelled
samples ranks layers as the truth does (Spearman 0.95 and more); sums of single damages are only first order, so a
budget is always checked on the whole (see ``budget.py``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from graphopt.base import Context
from graphopt.data import feeds as to_feeds
from graphopt.graph import label
from graphopt.model import clone, interface
from graphopt.passes._placement import place
from graphopt.session import Session
from graphopt.target import get_target
from graphopt.validation import OutputDifference

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from graphopt.passes.quantize_static import QuantizeStatic

SAMPLES = 16
"""Samples that judge each layer. Ranking needs few; the budget is checked on all."""


@dataclass(frozen=True)
class LayerDamage:
    """``damage``: noise energy over signal energy at the outputs, summed over outputs, with this layer alone in
    integers; ``sqnr`` is the worst output's, in dB. ``noise``: the damage at each output."""

    layer: str
    op_type: str
    damage: float
    sqnr: float
    noise: Mapping[str, float] = field(default_factory=dict, compare=False)

    def as_dict(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "op_type": self.op_type,
            "damage": self.damage,
            "sqnr_db": self.sqnr if math.isfinite(self.sqnr) else None,
        }


def layers(model: ir.Model, step: QuantizeStatic, target: str) -> list[tuple[str, str]]:
    """(name, operator) of every layer that ``step`` would quantize."""
    placement = place(model, get_target(target), exclude=step.exclude, include=step.include)
    return [(label(layer.node), layer.node.op_type) for layer in placement.layers]


def _quantized_only(model: ir.Model, step: QuantizeStatic, context: Context, name: str) -> ir.Model:
    copy = clone(model)
    replace(step, include=exactly([name])).run(copy, context)
    return copy


def exactly(names: Iterable[str]) -> tuple[str, ...]:
    """Patterns that mean the nodes of these names and no others."""
    return tuple(f"re:^{re.escape(name)}$" for name in names)


def sensitivity(
    model: ir.Model,
    step: QuantizeStatic,
    context: Context,
    *,
    samples: int = SAMPLES,
    without: Collection[str] = (),
) -> list[LayerDamage]:
    """Every layer's damage, worst first.

    ``model`` is the float model as it will be quantized (simplified); ``context`` has calibration data, and evaluation
    data that judges where there is any. Outputs in ``without`` do not count.

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
    wanted = place(model, get_target(context.target), exclude=step.exclude, include=step.include)
    # Everything in one sweep first; what each layer asks for is then known.
    context.statistics(model, [v.name or "" for v in dict.fromkeys(wanted.quantized.values())], histograms=True)
    step.collect_inputs(model, wanted, context)
    step.collect_means(model, wanted, context)
    damages = []
    for index, (name, op_type) in enumerate(found):
        session = Session(_quantized_only(model, step, context, name), threads=context.threads)
        damages.append(LayerDamage(name, op_type, *damage_of(session, judged, expected, without)))
        context.progress(index + 1, len(found), "quantizing one layer at a time")
    return sorted(damages, key=lambda d: (-d.damage, d.layer))


def damage_of(
    session: Session,
    judged: Sequence[Mapping[str, NDArray[Any]]],
    expected: Sequence[Mapping[str, NDArray[Any]]],
    without: Collection[str] = (),
) -> tuple[float, float, dict[str, float]]:
    """Noise energy over signal energy of a model's outputs, summed over outputs, the worst output's SQNR in dB, and the
    noise of each output."""
    counted = [output for output in session.output_names if output not in without]
    differences = {output: OutputDifference(output) for output in counted}
    for feed, wanted in zip(judged, expected, strict=True):
        for output, value in session.run(feed, counted).items():
            differences[output].add(wanted[output], value)
    if any(d.mismatch for d in differences.values()):
        return math.inf, -math.inf, {}
    noise = {d.name: 10 ** (-d.sqnr / 10) if math.isfinite(d.sqnr) else 0.0 for d in differences.values()}
    worst = min((d.sqnr for d in differences.values()), default=math.inf)
    return sum(noise.values()), worst, noise
