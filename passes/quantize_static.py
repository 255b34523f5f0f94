"""Static quantization: QDQ with calibrated uint8 activations and integer weights per channel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.errors import PreconditionError, did_you_mean
from graphopt.gates import parse_drop
from graphopt.graph import constant_array, label, opset, value_names
from graphopt.linear import form_of
from graphopt.observers import OBSERVERS, observe, quantization_sqnr
from graphopt.passes._copies import keep_fused, shield
from graphopt.passes._coverage import Coverage
from graphopt.passes._integer_weights import (
    IntegerWeight,
    WeightKind,
    bias_floor,
    output_shift,
    round_bias,
    round_weight,
)
from graphopt.passes._patterns import check_patterns, matches
from graphopt.passes._placement import Layer, Placement, clip_bounds, place, refuse_quantized
from graphopt.passes._qdq import Affine, Writer, affine, redirect, symmetric
from graphopt.passes._ranges import chosen_ranges
from graphopt.passes._rounding import input_noise, rounded_for_output
from graphopt.passes._weights import drop_unread
from graphopt.target import Target, get_target, this_cpu

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from graphopt.gram import Seen
    from graphopt.linear import Form
    from graphopt.statistics import Statistics

WEIGHTS = ("auto", "s8", "s7", "u8")

_ENOUGH = 10.0
"""Seven bits will do while rounding the weights costs a layer at most this many times what rounding its input costs.
The kernel for uint8 weights takes up to twice the time of the one for int8, where float is often faster: with 1 in
place of 10 efficientnet-lite0 takes 0.62 of float's time, not 0.47, and MiniLM 0.61, not 0.50, at the same metric."""


@dataclass(frozen=True)
class _Rounding:
    """A layer's integer weights, what they add to its outputs' mean, whether they are better than to nearest."""

    weight: IntegerWeight
    shift: NDArray[np.float64] | float
    refined: bool
    input_sqnr: float


@dataclass(frozen=True)
class QuantizeStatic(Pass):
    """Quantize every layer the target runs in integers, from one statistics sweep.

    ``observer``: how a value's range is chosen (``min-max``, ``percentile``, ``entropy``, ``mse``). ``weights``: ``s8``
    (saturates on x86 without VNNI), ``s7`` (7-bit int8, exact everywhere, 6 dB coarser), ``u8`` (zero point 128, exact
    everywhere, slower) or ``auto``, per layer; ``uint8`` names layers that get ``u8`` whatever it says. ``rounding``:
    weights are rounded to what the layer's output asks for, not to nearest, where that is better on held-out inputs.
    ``bias_correction`` takes back what rounding the weights does to the mean of each output channel. ``exclude`` and
    ``include``: node names, globs, ``re:`` expressions or operator types. ``max_drop``, ``min_sqnr``: a budget of this
    pass alone, in a recipe with others.
    """

    observer: str = "mse"
    percentile: float = 99.999
    weights: str = "auto"
    uint8: tuple[str, ...] = ()
    rounding: bool = True
    bias_correction: bool = True
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    max_drop: str | float = ""
    min_sqnr: float = 0.0
    name: ClassVar[str] = "quantize-static"
    contract: ClassVar[Contract] = "approximate"

    def __post_init__(self) -> None:
        for name in ("exclude", "include", "uint8"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise ValueError(f"{name} is one string; give a list of patterns: [{given!r}]")
            object.__setattr__(self, name, tuple(given))  # searches remember by step, so that it has to be hashable
        if self.max_drop != "":
            parse_drop(str(self.max_drop), 1.0)
        if self.observer not in OBSERVERS:
            raise ValueError(
                f"observer is '{self.observer}'; "
                + did_you_mean(str(self.observer), OBSERVERS, f"one of {', '.join(OBSERVERS)}")
            )
        if self.weights not in WEIGHTS:
            raise ValueError(
                f"weights is '{self.weights}'; "
                + did_you_mean(str(self.weights), WEIGHTS, f"one of {', '.join(WEIGHTS)}")
            )
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}; it must lie between 50 and 100")

    def check(self, model: ir.Model) -> None:
        if opset(model) < 13:
            raise PreconditionError(
                f"per-channel QDQ needs opset 13 and the model has {opset(model)}; run upgrade-opset first "
                "(graphopt quantize does so by itself)"
            )
        refuse_quantized(model)

    def run(self, model: ir.Model, context: Context) -> PassResult:
        target = get_target(context.target)
        self._check_target(target)
        gone = check_patterns(model, context.original, self.exclude, "exclude")
        gone += check_patterns(model, context.original, self.include, "include")
        gone += check_patterns(model, context.original, self.uint8, "uint8")
        coverage: Coverage | None = None
        unseen: set[str] = set()
        while True:  # once, unless calibration never showed some value: then again without the layers around it
            placement = place(model, target, exclude=self.exclude, include=self.include, unseen=unseen)
            if not placement.layers:
                return self._nothing(placement, target, gone)
            coverage = coverage or Coverage(model, context)
            sources = [v.name or "" for v in dict.fromkeys(placement.quantized.values())]
            statistics = context.statistics(model, sources, histograms=True)
            found = {name for name in sources if statistics.values[name].count == 0} - unseen
            if not found:
                break
            unseen |= found
        result = PassResult(skipped=gone + placement.skipped + placement.skipped_light)
        result.metrics = coverage.of(placement.layers)
        result.metrics["samples"] = statistics.samples
        result.metrics["sweeps"] = statistics.runs / max(statistics.samples, 1)
        bad = {name: seen.nonfinite for name in sources if (seen := statistics.values[name]).nonfinite}
        if bad:
            result.metrics["nonfinite_elements_ignored"] = bad
        self._write(model, placement, statistics, result, context)
        return result

    def _check_target(self, target: Target) -> None:
        """Raise PreconditionError where the target cannot be written for, or not with these weights."""
        if target.whole:
            raise PreconditionError(
                f"{target.name} wants every operator in integers, which quantize does not write yet; use the vendor's "
                f"tool and have its file judged: graphopt lint M --target {target.name}"
            )
        asked = [(self.weights, f"--weights is {self.weights}")] if self.weights != "auto" else []
        asked += [("u8", "uint8 names layers that get others")] if self.uint8 else []
        for kind, told in asked:
            if ("uint8" if kind == "u8" else "int8") not in target.weight["types"]:
                takes = " or ".join(target.weight["types"])
                raise PreconditionError(f"{target.name} takes {takes} weights and {told}; leave it out")

    def _nothing(self, placement: Placement, target: Target, gone: list[Skip]) -> PassResult:
        return PassResult(skipped=gone + placement.skipped or [Skip("(graph)", f"it has no {', '.join(target.heavy)}")])

    def _write(
        self, model: ir.Model, placement: Placement, statistics: Statistics, result: PassResult, context: Context
    ) -> None:
        """The integer weights of all layers, then the pairs around activations."""
        target = get_target(context.target)
        fused = self._fused_readers(model, target, context)
        readers = {value: len({use.node for use in value.uses()}) for value in placement.integer}
        ranges: dict[ir.Value, Affine] = {}
        for value in dict.fromkeys(placement.quantized.values()):
            low, high = observe(statistics.values[value.name or ""], self.observer, percentile=self.percentile)
            if target.activation["symmetric"]:
                ranges[value] = symmetric(low, high)
            else:
                ranges[value] = affine(low, high, clip_bounds(value) or (-math.inf, math.inf))
        result.metrics |= chosen_ranges(ranges, statistics)
        inputs = self.collect_inputs(model, placement, context)
        means = self.collect_means(model, placement, context)
        writer = Writer(model, value_names(model))
        kinds: dict[str, int] = {}
        refined = 0
        for layer in placement.layers:
            data = ranges[placement.quantized[layer.data]]
            source = statistics.values[placement.quantized[layer.data].name or ""]
            rounding = self._round(layer, data, quantization_sqnr(source, data.low, data.high), inputs, means, context)
            result.changes.append(self._quantize_layer(layer, data, rounding, writer, target))
            kinds[rounding.weight.kind] = kinds.get(rounding.weight.kind, 0) + 1
            refined += rounding.refined
        pairs, integer = self._quantize_values(placement, ranges, writer, result)
        own = {value: pair for value, pair in pairs.items() if value in placement.integer}
        result.changes += keep_fused(own, readers, fused, integer, writer.taken)
        result.changes += shield(model)
        result.metrics["weight_kinds"] = kinds
        result.metrics["layers_rounded_for_output"] = refined
        result.metrics["light_operators"] = len(placement.light)

    def collect_inputs(self, model: ir.Model, placement: Placement, context: Context) -> dict[ir.Node, Seen]:
        """Second moments of what each layer reads. A weight that several layers share is rounded to nearest: each of
        them would ask for another one."""
        if not self.rounding or context.layer_inputs is None:
            return {}
        forms: dict[ir.Node, Form] = {}
        for layer in placement.layers:
            form = form_of(layer.node)
            if form is not None and len(list(layer.weight.uses())) == 1:
                forms[layer.node] = form
        seen = context.layer_inputs(model, list(dict.fromkeys(forms.values())))
        return {node: seen[form] for node, form in forms.items() if form in seen}

    def collect_means(self, model: ir.Model, placement: Placement, context: Context) -> dict[str, NDArray[np.float64]]:
        """The mean of each layer's input per input channel, where a bias can take back what they cause."""
        if not self.bias_correction or context.channel_means is None:
            return {}
        layers = [layer for layer in placement.layers if layer.bias_site is not None]
        axes = {layer.data.name or "": 1 if layer.node.op_type.startswith("Conv") else -1 for layer in layers}
        return context.channel_means(model, axes)

    def _quantize_layer(
        self, layer: Layer, data: Affine, rounding: _Rounding, writer: Writer, target: Target
    ) -> Change:
        """Integer weights and bias of one layer, written."""
        site, weight = layer.bias_site, rounding.weight
        old_weight, old_bias = layer.weight, site[0].inputs[site[1]] if site is not None else None
        layer.node.replace_input_with(1, writer.weight(old_weight, weight, layer.node))
        bias = constant_array(old_bias)
        if site is not None and old_bias is not None and bias is not None:
            corrected = bias.reshape(-1) - rounding.shift
            if target.bias == "float32":
                new_bias = writer.float_bias(old_bias, corrected.reshape(bias.shape).astype(bias.dtype), layer.node)
            else:
                integers, scale = round_bias(corrected, data.scale, weight.scale)
                new_bias = writer.bias(old_bias, integers, scale, layer.node)
            site[0].replace_input_with(site[1], new_bias)
        drop_unread(old_weight, old_bias)
        detail = (
            f"{layer.node.op_type}: {weight.kind} weights ({_db(weight.sqnr)}), input range "
            f"[{data.low:.4g}, {data.high:.4g}] ({_db(rounding.input_sqnr)})"
        )
        return Change("quantize", label(layer.node), detail)

    def _round(
        self,
        layer: Layer,
        data: Affine,
        input_sqnr: float,
        inputs: dict[ir.Node, Seen],
        means: dict[str, NDArray[np.float64]],
        context: Context,
    ) -> _Rounding:
        """The weights in the form this layer can afford; see :data:`WEIGHTS`."""
        stored = constant_array(layer.weight)
        assert stored is not None
        site = layer.bias_site
        bias = constant_array(site[0].inputs[site[1]]) if site is not None else None
        floor = bias_floor(bias.reshape(-1), data.scale) if bias is not None else None
        seen, mean = inputs.get(layer.node), means.get(layer.data.name or "")

        def tried(kind: WeightKind) -> tuple[_Rounding, bool]:
            """One form, and whether the rounding of the layer's input costs more than it does."""
            if seen is None:
                weight = round_weight(stored, layer.axis, kind, least_scale=floor)
                shift = output_shift(weight, stored, mean) if bias is not None and mean is not None else 0.0
                enough = weight.sqnr >= input_sqnr - 10 * math.log10(_ENOUGH)
                return _Rounding(weight, shift, False, input_sqnr), enough
            centred = bias is not None and self.bias_correction
            found = rounded_for_output(layer.node, stored, layer.axis, kind, seen, centred=centred, least=floor)
            shift = found.shift if centred else 0.0
            rounding = _Rounding(found.weight, shift, found.refined, input_sqnr)
            return rounding, found.noise <= _ENOUGH * input_noise(layer.node, stored, seen, input_sqnr)

        if self.uint8 and matches(layer.node, self.uint8):
            return tried("u8")[0]
        if self.weights != "auto":
            return tried(self.weights)[0]  # type: ignore[arg-type]
        if not self.seven_bits(layer, context):
            return tried("s8")[0]
        narrow, enough = tried("s7")
        return narrow if enough else tried("u8")[0]

    def seven_bits(self, layer: Layer, context: Context) -> bool:
        """Whether this layer gets 7-bit weights where they will do, because products with 8-bit ones saturate."""
        saturates = get_target(context.target).saturates and not (context.this_cpu and not this_cpu().saturates)
        # The depthwise kernel widens to 16 bits before it multiplies: exact everywhere (tools/bench/saturation.py).
        free = self.weights == "auto" and not (self.uint8 and matches(layer.node, self.uint8))
        return free and saturates and not layer.depthwise

    def _fused_readers(self, model: ir.Model, target: Target, context: Context) -> Mapping[str, int]:
        """See :attr:`Context.fused_readers`; empty where it changes nothing for the target."""
        return context.fused_readers(model) if target.duplicates and context.fused_readers is not None else {}

    def _quantize_values(
        self, placement: Placement, ranges: dict[ir.Value, Affine], writer: Writer, result: PassResult
    ) -> tuple[dict[ir.Value, ir.Value], set[ir.Node]]:
        """The activation pairs, and who reads them: what stands for each value, and the nodes that read integers."""
        pairs: dict[ir.Value, ir.Value] = {}
        integer_nodes = {layer.node for layer in placement.layers} | set(placement.light) | set(placement.residual)
        for value, source in placement.quantized.items():
            pair = pairs[value] = writer.activation(value, ranges[source])
            redirect(value, pair, None if value in placement.integer else integer_nodes)
        for node in placement.light:
            result.changes.append(Change("quantize", label(node), f"{node.op_type}: integer between integer layers"))
        return pairs, integer_nodes


def _db(value: float) -> str:
    return "exact" if math.isinf(value) else f"{value:.1f} dB"
