"""Which weight in which format: the least damage for a size, or the least size for a budget.

Each weight has a ladder of formats. Its damage at the outputs is measured once, in the coarsest of them alone, and
scaled by the error that each format leaves in the weight itself (both are noise energies, and small noise adds up).
Steps down the lower convex hulls of (bytes, damage), the cheapest damage per byte first, are the optimum of the
knapsack's relaxation (Shoham and Gersho 1988); where on that way to stop is judged on the whole model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from graphopt.base import Context
from graphopt.data import feeds as to_feeds
from graphopt.errors import InputError, RuntimeFailure
from graphopt.graph import opset
from graphopt.model import clone, interface
from graphopt.passes._encode import Encoder, Unfit
from graphopt.passes._formats import FORMATS
from graphopt.passes._weight_uses import Weight, find_weights
from graphopt.passes.compress_weights import CompressWeights, layout_of, no_gain
from graphopt.search.sensitivity import SAMPLES, damage_of
from graphopt.session import Session
from graphopt.spill import Spill
from graphopt.validation import runnable_feeds

if TYPE_CHECKING:
    import onnx_ir as ir

LADDER = ("fp16", "int8", "uint4")
"""The formats that are chosen from; each is smaller than the one before."""


@dataclass(frozen=True)
class Move:
    """Store ``weight`` as ``form`` from here on: so many bytes less, so much more damage."""

    weight: str
    form: str
    saved: int
    damage: float


def moves(model: ir.Model, step: CompressWeights, context: Context) -> list[Move]:
    """Every step that is worth taking, in the order in which to take them.

    Args:
        model: as it will be compressed (opset raised, constants folded); not touched.
        step: how to round, and what it leaves out.
        context: with data that judges, where there is some; else random inputs do.
    """
    weights, _ = find_weights(model, step.exclude, step.include)
    damages = _damages(model, step, context, [w.value.name or "" for w in weights])
    found: list[Move] = []
    for weight in weights:
        points = _points(weight, step, model, context)
        coarse = points[-1][2] if points else 0.0
        scale = damages.get(weight.value.name or "", coarse) / coarse if coarse else 0.0
        found += _hull(weight, [(form, size, error * scale) for form, size, error in points])
    return sorted(found, key=lambda m: (m.damage / m.saved, m.weight))


def _ladder(model: ir.Model) -> list[str]:
    """The formats that the model's operator set can decode."""
    return [name for name in LADDER if FORMATS[name].opset <= opset(model)]


def _points(weight: Weight, step: CompressWeights, model: ir.Model, context: Context) -> list[tuple[str, int, float]]:
    """(format, bytes, relative error of the weight) of those that make it smaller."""
    encoder = Encoder(lambda: Spill(context.scratch), lambda _: None, context.threads)
    found = []
    for name in _ladder(model):
        layout = layout_of(weight, FORMATS[name], step.block, opset(model))
        if no_gain(weight, layout) is not None:
            continue
        try:
            stored = encoder.encode(weight.tensor, layout, fitted=layout.form.bits == 4)
        except Unfit:
            continue
        found.append((name, layout.stored_bytes, stored.error / stored.signal if stored.signal else 0.0))
    return found


def _hull(weight: Weight, points: Sequence[tuple[str, int, float]]) -> list[Move]:
    """Steps along the lower convex hull from the weight as it is."""
    hull: list[tuple[str, int, float]] = [("float", weight.tensor.nbytes, 0.0)]
    for point in points:  # smaller and smaller
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        if point[1] < hull[-1][1]:
            hull.append(point)
    name = weight.value.name or ""
    return [Move(name, b[0], a[1] - b[1], max(b[2] - a[2], 0.0)) for a, b in itertools.pairwise(hull)]


def _slope(a: tuple[str, int, float], b: tuple[str, int, float]) -> float:
    return (b[2] - a[2]) / (a[1] - b[1]) if a[1] > b[1] else math.inf


def _damages(model: ir.Model, step: CompressWeights, context: Context, names: Sequence[str]) -> dict[str, float]:
    """Noise over signal at the outputs with one weight alone in the coarsest format; nothing where none can be run."""
    dataset = context.eval_data or context.data
    try:
        reference = Session(model, threads=context.threads)
        if dataset is None:
            judged = runnable_feeds(context.original, reference, 2, seed=context.seed)
        else:
            judged = [to_feeds(sample, interface(model)[0]) for sample in dataset.take(SAMPLES)]
        expected = [reference.run(feed) for feed in judged]
    except (RuntimeFailure, InputError):
        return {}
    found = {}
    for index, name in enumerate(names):
        context.progress(index, len(names), "compressing one weight at a time")
        one = clone(model)
        alone = replace(step, format="float", assign=(f"{name}={_ladder(model)[-1]}",), round_to="fitted")
        if alone.run(one, replace(context, data=None, progress=lambda *_: None)).changes:
            found[name] = damage_of(Session(one, threads=context.threads), judged, expected)[0]
    return found


def assigned(taken: Sequence[Move]) -> tuple[str, ...]:
    """The pass's ``assign`` after these steps."""
    return tuple(f"{weight}={form}" for weight, form in {move.weight: move.form for move in taken}.items())


def for_size(found: Sequence[Move], size: int, wanted: int) -> Sequence[Move] | None:
    """The first steps that bring ``size`` bytes down to ``wanted``; None where all of them do not."""
    for count in range(len(found) + 1):
        if size <= wanted:
            return found[:count]
        size -= found[count].saved if count < len(found) else 0
    return None


def for_budget(found: Sequence[Move], holds: Callable[[Sequence[Move]], bool]) -> Sequence[Move]:
    """As many steps as ``holds`` allows, by halving: damage grows from step to step."""
    if not found or holds(found):
        return found
    low, high = 0, len(found)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(found[:middle]) else (low, middle)
    return found[:low]
