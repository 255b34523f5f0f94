"""Static quantization: QDQ with calibrated uint8 activations and integer weights per channel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.errors import PreconditionError, did_you_mean
from graphopt.graph import constant_array, label, opset, value_names
from graphopt.observers import OBSERVERS, observe, quantization_sqnr
from graphopt.passes._coverage import Coverage
from graphopt.passes._integer_weights import (
    IntegerWeight,
    WeightKind,
    bias_floor,
    output_shift,
    round_bias,
    round_weight,
)
from graphopt.passes._patterns import check_patterns
from graphopt.passes._placement import Layer, Placement, clip_bounds, place, refuse_quantized
from graphopt.passes._qdq import Affine, Writer, affine, redirect, symmetric
from graphopt.passes._ranges import chosen_ranges
from graphopt.passes._weights import drop_unread
from graphopt.target import Target, get_target, this_cpu

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from graphopt.statistics import Statistics

WEIGHTS = ("auto", "s8", "s7", "u8")


@dataclass(frozen=True)
class QuantizeStatic(Pass):
    """Quantize every layer the target runs in integers, from one statistics sweep.

    ``observer``: how a value's range is chosen (``min-max``, ``percentile``, ``entropy``, ``mse``). ``weights``: ``s8``
    (saturates on x86 without VNNI), ``s7`` (7-bit int8, exact everywhere, 6 dB coarser), ``u8`` (zero point 128, exact
    everywhere, slower) or ``auto``, per layer. ``bias_correction`` takes back what rounding the weights does to the
    mean of each output channel. ``exclude`` and ``include``: node names, globs, ``re:`` expressions or operator types.
    """

    observer: str = "mse"
    percentile: float = 99.999
    weights: str = "auto"
    bias_correction: bool = True
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    name: ClassVar[str] = "quantize-static"
    contract: ClassVar[Contract] = "approximate"

    def __post_init__(self) -> None:
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
        wanted = "int8" if self.weights in ("s8", "s7") else "uint8"
        if self.weights != "auto" and wanted not in target.weight["types"]:
            raise PreconditionError(
                f"{target.name} takes {' or '.join(target.weight['types'])} weights and --weights is {self.weights}; "
                "leave it out"
            )

    def _nothing(self, placement: Placement, target: Target, gone: list[Skip]) -> PassResult:
        return PassResult(skipped=gone + placement.skipped or [Skip("(graph)", f"it has no {', '.join(target.heavy)}")])

    def _write(
        self, model: ir.Model, placement: Placement, statistics: Statistics, result: PassResult, context: Context
    ) -> None:
        """The integer weights of all layers, then the pairs around activations."""
        target = get_target(context.target)
        ranges: dict[ir.Value, Affine] = {}
        for value in dict.fromkeys(placement.quantized.values()):
            low, high = observe(statistics.values[value.name or ""], self.observer, percentile=self.percentile)
            if target.activation["symmetric"]:
                ranges[value] = symmetric(low, high)
            else:
                ranges[value] = affine(low, high, clip_bounds(value) or (-math.inf, math.inf))
        result.metrics |= chosen_ranges(ranges, statistics)
        means = self.collect_means(model, placement, context)
        writer = Writer(model, value_names(model))
        kinds: dict[str, int] = {}
        for layer in placement.layers:
            mean = means.get(layer.data.name or "")
            change, kind = self._quantize_layer(layer, placement, ranges, statistics, writer, context, mean)
            result.changes.append(change)
            kinds[kind] = kinds.get(kind, 0) + 1
        self._quantize_values(placement, ranges, writer, result)
        result.metrics["weight_kinds"] = kinds
        result.metrics["light_operators"] = len(placement.light)

    def collect_means(self, model: ir.Model, placement: Placement, context: Context) -> dict[str, NDArray[np.float64]]:
        """The mean of each layer's input per input channel, where a bias can take back what they cause."""
        if not self.bias_correction or context.channel_means is None:
            return {}
        layers = [layer for layer in placement.layers if layer.bias_site is not None]
        axes = {layer.data.name or "": 1 if layer.node.op_type.startswith("Conv") else -1 for layer in layers}
        return context.channel_means(model, axes)

    def _quantize_layer(
        self,
        layer: Layer,
        placement: Placement,
        ranges: dict[ir.Value, Affine],
        statistics: Statistics,
        writer: Writer,
        context: Context,
        mean: NDArray[np.float64] | None,
    ) -> tuple[Change, str]:
        """Integer weights and bias of one layer, written."""
        source = placement.quantized[layer.data]
        data = ranges[source]
        stored = constant_array(layer.weight)
        assert stored is not None
        site = layer.bias_site
        old_weight, old_bias = layer.weight, site[0].inputs[site[1]] if site is not None else None
        bias = constant_array(old_bias)
        floor = bias_floor(bias.reshape(-1), data.scale) if bias is not None else None
        input_sqnr = quantization_sqnr(statistics.values[source.name or ""], data.low, data.high)
        weight = self._weight(layer, stored, floor, input_sqnr, context)
        layer.node.replace_input_with(1, writer.weight(old_weight, weight, layer.node))
        if site is not None and old_bias is not None and bias is not None:
            shift = output_shift(weight, stored, mean) if mean is not None else 0.0
            corrected = bias.reshape(-1) - shift
            if get_target(context.target).bias == "float32":
                new_bias = writer.float_bias(old_bias, corrected.reshape(bias.shape).astype(bias.dtype))
            else:
                integers, scale = round_bias(corrected, data.scale, weight.scale)
                new_bias = writer.bias(old_bias, integers, scale, layer.node)
            site[0].replace_input_with(site[1], new_bias)
        drop_unread(old_weight, old_bias)
        detail = (
            f"{layer.node.op_type}: {weight.kind} weights ({_db(weight.sqnr)}), input range "
            f"[{data.low:.4g}, {data.high:.4g}] ({_db(input_sqnr)})"
        )
        return Change("quantize", label(layer.node), detail), weight.kind

    def _weight(self, layer: Layer, stored: Any, floor: Any, input_sqnr: float, context: Context) -> IntegerWeight:
        """The weights in the form this layer can afford; see :data:`WEIGHTS`."""
        if self.weights != "auto":
            kind: WeightKind = self.weights  # type: ignore[assignment]
            return round_weight(stored, layer.axis, kind, least_scale=floor)
        saturates = get_target(context.target).saturates
        if layer.depthwise or not saturates or (context.this_cpu and not this_cpu().saturates):
            # The depthwise kernel widens to 16 bits before it multiplies: exact everywhere (tools/bench/saturation.py).
            return round_weight(stored, layer.axis, "s8", least_scale=floor)
        narrow = round_weight(stored, layer.axis, "s7", least_scale=floor)
        if narrow.sqnr >= input_sqnr:
            return narrow  # the rounding of its input already costs more than the eighth bit would save
        return round_weight(stored, layer.axis, "u8", least_scale=floor)

    def _quantize_values(
        self, placement: Placement, ranges: dict[ir.Value, Affine], writer: Writer, result: PassResult
    ) -> None:
        """The activation pairs, and who reads them."""
        integer_nodes = {layer.node for layer in placement.layers} | set(placement.light) | set(placement.residual)
        for value, source in placement.quantized.items():
            pair = writer.activation(value, ranges[source])
            redirect(value, pair, None if value in placement.integer else integer_nodes)
        for node in placement.light:
            result.changes.append(Change("quantize", label(node), f"{node.op_type}: integer between integer layers"))


def _db(value: float) -> str:
    return "exact" if math.isinf(value) else f"{value:.1f} dB"
