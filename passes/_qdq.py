"""Writing Q/DQ pairs into a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.graph import fresh, is_op
from graphopt.passes._integer_weights import IntegerWeight
from graphopt.passes._weights import add_constant

if TYPE_CHECKING:
    from numpy.typing import NDArray


_LONG = 40


@dataclass(frozen=True)
class Affine:
    """``real = (integer - zero_point) * scale``; ``kind``: the integers' type."""

    scale: float
    zero_point: int
    low: float
    high: float
    kind: str = "uint8"


def affine(low: float, high: float, within: tuple[float, float] = (-np.inf, np.inf)) -> Affine:
    """Scale and zero point of uint8 for a range that includes 0, so that 0 is exact.

    Nothing outside ``within`` (which includes 0 too) becomes representable: rounding then does what a Clip to these
    bounds does, and only so does the runtime drop the Clip and compute the layer before it in integers.
    """
    scale = float(np.float32((high - low) / 255))
    if not np.isfinite(scale) or scale < float(np.finfo(np.float32).tiny):
        return Affine(1.0, 0, 0.0, 0.0)  # a value that was always zero
    zero_point = int(np.clip(np.rint(-low / scale), 0, 255))
    if zero_point > 0:
        scale = min(scale, -within[0] / zero_point)
    if zero_point < 255:
        scale = min(scale, within[1] / (255 - zero_point))
    stored = np.float32(scale)
    if float(stored) > scale:  # as doubles: numpy would compare float32s
        stored = np.nextafter(stored, np.float32(0))
    scale = float(stored)
    return Affine(scale, zero_point, -zero_point * scale, (255 - zero_point) * scale)


def symmetric(low: float, high: float) -> Affine:
    """int8 around zero point 0, for targets that multiply without zero points (NVIDIA TensorRT, "Working with Quantized
    Types")."""
    scale = float(np.float32(max(-low, high) / 127))
    if not np.isfinite(scale) or scale < float(np.finfo(np.float32).tiny):
        return Affine(1.0, 0, 0.0, 0.0, "int8")
    return Affine(scale, 0, -128 * scale, 127 * scale, "int8")


def _short(name: str) -> str:
    """Beginning and end of a long name: what is written for one value repeats it nine times, and exporters that join
    the names of all that they fused would make the file larger than int8 makes it smaller."""
    return name if len(name) <= _LONG else f"{name[: _LONG // 2]}..{name[-_LONG // 2 + 2 :]}"


class Writer:
    """Inserts pairs; scales and zero points that are equal are one initializer."""

    def __init__(self, model: ir.Model, taken: set[str]) -> None:
        self.model = model
        self.taken = taken
        self._first = next(node for node in model.graph if not is_op(node, "Constant"))
        self._parameters: dict[tuple[ir.Graph, float, int, str], tuple[ir.Value, ir.Value]] = {}
        self._weights: dict[tuple[ir.Graph, ir.Value, int, str, bytes], ir.Value] = {}

    def activation(self, value: ir.Value, parameters: Affine) -> ir.Value:
        """``value`` -> QuantizeLinear -> DequantizeLinear; returns what readers shall read instead."""
        producer = value.producer()
        graph = _home(producer) if producer is not None else value.graph
        assert isinstance(graph, ir.Graph)
        base = _short(value.name or "value")
        scale, zero = self._pair(graph, base, parameters)
        quantize = ir.node("QuantizeLinear", [value, scale, zero])
        quantize.name = fresh(f"{base}_quantize", self.taken)
        quantize.outputs[0].name = fresh(f"{base}_quantized", self.taken)
        dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero])
        dequantize.name = fresh(f"{base}_dequantize", self.taken)
        result = dequantize.outputs[0]
        result.name = fresh(f"{base}_dequantized", self.taken)
        result.type, result.shape = value.type, value.shape
        if producer is not None:
            graph.insert_after(producer, [quantize, dequantize])
        else:
            graph.insert_before(self._first if graph is self.model.graph else graph[0], [quantize, dequantize])
        return result

    def _pair(self, graph: ir.Graph, base: str, parameters: Affine) -> tuple[ir.Value, ir.Value]:
        key = (graph, parameters.scale, parameters.zero_point, parameters.kind)
        if key not in self._parameters:
            self._parameters[key] = (
                self._constant(graph, f"{base}_scale", np.asarray(parameters.scale, np.float32)),
                self._constant(graph, f"{base}_zero_point", np.asarray(parameters.zero_point, parameters.kind)),
            )
        return self._parameters[key]

    def weight(self, value: ir.Value, weight: IntegerWeight, reader: ir.Node) -> ir.Value:
        """Integer initializer -> DequantizeLinear; layers that share a weight and its scales share this too."""
        graph = _home(reader)
        key = (graph, value, weight.axis, weight.kind, weight.scale.tobytes())
        if key not in self._weights:
            base = _short(value.name or "weight")
            data = self._constant(graph, f"{base}_quantized", weight.data)
            scale = self._constant(graph, f"{base}_scale", weight.scale)
            zero = self._constant(graph, f"{base}_zero_point", weight.zero_point)
            self._weights[key] = self._dequantize(base, [data, scale, zero], weight.axis, reader)
        return self._weights[key]

    def bias(self, value: ir.Value, data: NDArray[np.int32], scale: NDArray[np.float32], reader: ir.Node) -> ir.Value:
        """int32 initializer -> DequantizeLinear with zero point 0."""
        base = _short(value.name or "bias")
        graph = _home(reader)
        parts = [
            self._constant(graph, f"{base}_quantized", data),
            self._constant(graph, f"{base}_scale", scale),
            self._constant(graph, f"{base}_zero_point", np.zeros(scale.shape, np.int32)),
        ]
        return self._dequantize(base, parts, 0, reader)

    def float_bias(self, value: ir.Value, data: NDArray[np.float32], reader: ir.Node) -> ir.Value:
        """A bias of its own for one layer, where the target adds biases in float."""
        return self._constant(_home(reader), _short(value.name or "bias"), data)

    def _constant(self, graph: ir.Graph, base: str, array: NDArray[Any]) -> ir.Value:
        return add_constant(self.model, graph, base, array, self.taken)

    def _dequantize(self, base: str, inputs: list[ir.Value], axis: int, reader: ir.Node) -> ir.Value:
        node = ir.node("DequantizeLinear", inputs, attributes={"axis": axis})
        node.name = fresh(f"{base}_dequantize", self.taken)
        node.outputs[0].name = fresh(f"{base}_dequantized", self.taken)
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = inputs[0].shape
        _home(reader).insert_before(reader, [node])
        return node.outputs[0]


def _home(node: ir.Node) -> ir.Graph:
    """The graph a node stands in, where all that is written for it has to stand: the runtime makes one kernel only of
    nodes and constants of one graph."""
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def redirect(old: ir.Value, new: ir.Value, readers: set[ir.Node] | None) -> None:
    """Let ``readers`` (None: everybody, graph outputs included) read ``new`` instead of ``old``.

    ``new`` comes from ``old`` by a Q/DQ pair, which goes on reading ``old``.
    """
    producer = new.producer()
    assert producer is not None
    pair = {producer, producer.inputs[0].producer() if producer.inputs[0] is not None else None}
    for user, index in list(old.uses()):
        if user not in pair and (readers is None or user in readers):
            user.replace_input_with(index, new)
    graph = old.graph
    if readers is None and old.is_graph_output() and isinstance(graph, ir.Graph):
        name, inner = old.name, new.name
        for position, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[position] = new
        new.doc_string, old.name, new.name = old.doc_string, inner, name
        new.metadata_props.update(old.metadata_props)
        new.type, new.shape = old.type, old.shape
