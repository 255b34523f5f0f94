"""Static quantization: QDQ with calibrated uint8 activations and integer weights per channel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.cost import node_macs, shapes
from graphopt.data import feeds as to_feeds
from graphopt.errors import PreconditionError, RuntimeFailure
from graphopt.graph import constant_array, is_op, label, nodes, opset, value_names
from graphopt.model import interface, to_proto, weight_bytes
from graphopt.observers import OBSERVERS, observe, quantization_sqnr
from graphopt.passes._integer_weights import IntegerWeight, WeightKind, bias_floor, round_bias, round_weight
from graphopt.passes._placement import Layer, Placement, place
from graphopt.passes._qdq import Affine, Writer, affine, drop_unread, redirect
from graphopt.session import Session
from graphopt.target import get_target, this_cpu

if TYPE_CHECKING:
    from graphopt.statistics import Statistics

WEIGHTS = ("auto", "s8", "s7", "u8")


@dataclass(frozen=True)
class QuantizeStatic(Pass):
    """Quantize every layer the target runs in integers, from one statistics sweep.

    ``observer``: how a value's range is chosen (``min-max``, ``percentile``, ``entropy``, ``mse``). ``weights``: ``s8``
    (saturates on x86 without VNNI), ``s7`` (7-bit int8, exact everywhere, 6 dB coarser), ``u8`` (zero point 128, exact
    everywhere, slow on depthwise convolutions) or ``auto``, per layer. ``exclude`` and ``include``: node names, globs,
    ``re:`` expressions or operator types.
    """

    observer: str = "mse"
    percentile: float = 99.999
    weights: str = "auto"
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    name: ClassVar[str] = "quantize-static"
    contract: ClassVar[Contract] = "approximate"

    def __post_init__(self) -> None:
        if self.observer not in OBSERVERS:
            raise ValueError(f"observer is '{self.observer}'; one of {', '.join(OBSERVERS)}")
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights is '{self.weights}'; one of {', '.join(WEIGHTS)}")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}; it must lie between 50 and 100")

    def check(self, model: ir.Model) -> None:
        if opset(model) < 13:
            raise PreconditionError(
                f"per-channel QDQ needs opset 13 and the model has {opset(model)}; run upgrade-opset first "
                "(graphopt quantize does so by itself)"
            )
        for node in nodes(model):
            if is_op(node, "QuantizeLinear", "DequantizeLinear"):
                raise PreconditionError(
                    f"the model is quantized already (node '{label(node)}'); start from the float model"
                )

    def run(self, model: ir.Model, context: Context) -> PassResult:
        target = get_target(context.target)
        placement = place(model, target, exclude=self.exclude, include=self.include)
        result = PassResult(skipped=placement.skipped)
        if not placement.layers:
            if not result.skipped:
                result.skipped.append(Skip("(graph)", f"it has no {', '.join(target.heavy)}"))
            return result
        coverage = _Coverage(model, context)
        sources = list(dict.fromkeys(placement.quantized.values()))
        statistics = context.statistics(model, [v.name or "" for v in sources], histograms=True)
        ranges = {
            v: affine(*observe(statistics.values[v.name or ""], self.observer, percentile=self.percentile))
            for v in sources
        }
        result.metrics = coverage.of(placement.layers)
        result.metrics["samples"] = statistics.samples
        result.metrics["sweeps"] = statistics.runs / max(statistics.samples, 1)
        taken = value_names(model)
        writer = Writer(model, taken)
        kinds: dict[str, int] = {}
        for layer in placement.layers:
            change, kind = self._quantize_layer(layer, placement, ranges, statistics, writer, context)
            result.changes.append(change)
            kinds[kind] = kinds.get(kind, 0) + 1
        self._quantize_values(placement, ranges, writer, result)
        result.metrics["weight_kinds"] = kinds
        result.metrics["light_operators"] = len(placement.light)
        return result

    def _quantize_layer(
        self,
        layer: Layer,
        placement: Placement,
        ranges: dict[ir.Value, Affine],
        statistics: Statistics,
        writer: Writer,
        context: Context,
    ) -> tuple[Change, str]:
        """Integer weights and bias of one layer, written."""
        source = placement.quantized[layer.data]
        data = ranges[source]
        stored = constant_array(layer.weight)
        assert stored is not None
        bias = constant_array(layer.bias)
        floor = bias_floor(bias.reshape(-1), data.scale) if bias is not None else None
        input_sqnr = quantization_sqnr(statistics.values[source.name or ""], data.low, data.high)
        weight = self._weight(layer, stored, floor, input_sqnr, context)
        old_weight, old_bias = layer.weight, layer.bias
        layer.node.replace_input_with(1, writer.weight(old_weight, weight, layer.node))
        if old_bias is not None and bias is not None:
            integers, scale = round_bias(bias.reshape(-1), data.scale, weight.scale)
            layer.node.replace_input_with(2, writer.bias(old_bias, integers, scale, layer.node))
        drop_unread(old_weight)
        drop_unread(old_bias)
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
        if context.this_cpu and not this_cpu().saturates:
            return round_weight(stored, layer.axis, "s8", least_scale=floor)
        narrow = round_weight(stored, layer.axis, "s7", least_scale=floor)
        if layer.grouped or narrow.sqnr >= input_sqnr:
            return narrow  # the rounding of its input already costs more than the eighth bit would save
        return round_weight(stored, layer.axis, "u8", least_scale=floor)

    def _quantize_values(
        self, placement: Placement, ranges: dict[ir.Value, Affine], writer: Writer, result: PassResult
    ) -> None:
        """The activation pairs, and who reads them."""
        integer_nodes = {layer.node for layer in placement.layers} | set(placement.light)
        for value, source in placement.quantized.items():
            pair = writer.activation(value, ranges[source])
            redirect(value, pair, None if value in placement.integer else integer_nodes)
        for node in placement.light:
            result.changes.append(Change("quantize", label(node), f"{node.op_type}: integer between integer layers"))


def _db(value: float) -> str:
    return "exact" if math.isinf(value) else f"{value:.1f} dB"


class _Coverage:
    """MACs and weight bytes of the float model, taken before it is changed."""

    def __init__(self, model: ir.Model, context: Context) -> None:
        proto = to_proto(model)
        inputs, _ = interface(model)
        first = next(iter(context.data), None) if context.data is not None else None
        feed = to_feeds(first, inputs) if first is not None else {}
        known = shapes(proto, {name: array.shape for name, array in feed.items()})
        missing = [n for n in proto.graph.node if node_macs(n, known) is None]
        if missing and feed:
            # Shapes that depend on data are looked up in one run.
            names = sorted({v for n in missing for v in (*n.input[:2], n.output[0]) if v and v not in known})
            try:
                seen = Session(model, taps=names, threads=context.threads).run(feed, names)
                known |= {name: array.shape for name, array in seen.items()}
            except RuntimeFailure:  # a value the runtime cannot hand out stays unknown
                pass
        self.macs = {tuple(node.output): node_macs(node, known) for node in proto.graph.node}
        constants = [constant_array(n.outputs[0]) for n in nodes(model) if is_op(n, "Constant")]
        self.bytes = weight_bytes(model) + sum(int(array.nbytes) for array in constants if array is not None)

    def of(self, layers: list[Layer]) -> dict[str, Any]:
        """Shares that the layers hold, in percent (None where a shape is unknown)."""
        mine = [self.macs.get(tuple(v.name or "" for v in layer.node.outputs)) for layer in layers]
        total = [m for m in self.macs.values() if m is not None]
        weights = {id(layer.weight): constant_array(layer.weight) for layer in layers}
        stored = sum(int(array.nbytes) for array in weights.values() if array is not None)
        known = all(m is not None for m in mine) and all(m is not None for m in self.macs.values())
        share = 100 * sum(m or 0 for m in mine) / sum(total) if sum(total) else None
        return {
            "layers_quantized": len(layers),
            "macs_percent": round(share, 2) if share is not None else None,
            "macs_complete": known,
            "weight_bytes_percent": round(100 * stored / self.bytes, 2) if self.bytes else None,
        }
