"""Dynamic quantization: integer weights, activations rounded at run time from the range they have just then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.errors import PreconditionError, did_you_mean
from graphopt.graph import constant_array, fresh, label, opset, value_names
from graphopt.passes._integer_weights import WeightKind, round_weight
from graphopt.passes._patterns import check_patterns
from graphopt.passes._placement import Layer, place, refuse_quantized
from graphopt.passes._weights import add_constant, drop_unread
from graphopt.target import get_target, this_cpu

WEIGHTS = ("auto", "s8", "s7", "u8")


@dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """MatMul and Gemm by constant weights become DynamicQuantizeLinear + MatMulInteger + scaling, which ONNX Runtime
    fuses into one kernel. No data needed.

    Convolutions stay in float: the runtime's ConvInteger is several times slower than its float Conv (onnxruntime
    issue 12854). ``weights``: as in quantize-static; ``auto`` is ``u8`` (exact everywhere), or ``s8`` with
    ``--this-cpu`` where nothing saturates.
    """

    weights: str = "auto"
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    name: ClassVar[str] = "quantize-dynamic"
    contract: ClassVar[Contract] = "approximate"

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ValueError(
                f"weights is '{self.weights}'; "
                + did_you_mean(str(self.weights), WEIGHTS, f"one of {', '.join(WEIGHTS)}")
            )

    def check(self, model: ir.Model) -> None:
        if opset(model) < 11:
            raise PreconditionError(
                f"DynamicQuantizeLinear needs opset 11 and the model has {opset(model)}; run upgrade-opset first"
            )
        refuse_quantized(model)

    def run(self, model: ir.Model, context: Context) -> PassResult:
        gone = check_patterns(model, context.original, self.exclude, "exclude")
        gone += check_patterns(model, context.original, self.include, "include")
        placement = place(model, get_target(context.target), exclude=self.exclude, include=self.include)
        result = PassResult(skipped=gone + placement.skipped)
        kind = self._kind(context)
        writer = _Writer(model, kind)
        for layer in placement.layers:
            if layer.node.op_type == "Conv":
                why = "Conv: ONNX Runtime's ConvInteger is slower than its float Conv; use quantize-static"
                result.skipped.append(Skip(label(layer.node), why))
                continue
            detail = f"{layer.node.op_type}: {kind} weights, input rounded at run time"
            result.changes.append(Change("quantize", label(layer.node), detail))
            writer.rewrite(layer)
        if not result.changes and not result.skipped:
            result.skipped.append(Skip("(graph)", "it has no MatMul or Gemm with constant weights"))
        return result

    def _kind(self, context: Context) -> WeightKind:
        if self.weights != "auto":
            return self.weights  # type: ignore[return-value]
        return "s8" if context.this_cpu and not this_cpu().saturates else "u8"


class _Writer:
    """Replaces layers one by one; what two layers have in common is written once."""

    def __init__(self, model: ir.Model, kind: WeightKind) -> None:
        self.model = model
        self.kind = kind
        self.taken = value_names(model)
        self.rounded: dict[ir.Value, list[ir.Value]] = {}  # input -> its integers, scale, zero point
        self.weights: dict[tuple[ir.Value, int], list[ir.Value]] = {}  # (weight, axis) -> the same three

    def rewrite(self, layer: Layer) -> None:
        """``layer`` as DynamicQuantizeLinear, MatMulInteger, Cast, Mul (and Add for a bias)."""
        node, steps = layer.node, _Steps(layer.node, self.taken)
        if layer.data not in self.rounded:  # q, k and v of an attention read one input: it is rounded once
            self.rounded[layer.data] = list(steps.add("DynamicQuantizeLinear", [layer.data], "input", 3).outputs)
        value, value_scale, value_zero = self.rounded[layer.data]
        data, scale, zero = self._weight(layer)
        product = steps.add("MatMulInteger", [value, data, value_zero, zero], "integer").outputs[0]
        real = steps.add("Cast", [product], "cast", to=int(ir.DataType.FLOAT)).outputs[0]
        factor = steps.add("Mul", [value_scale, scale], "factor").outputs[0]
        result = steps.add("Mul", [real, factor], "scaled").outputs[0]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            result = steps.add("Add", [result, bias], "bias").outputs[0]
        self.model.graph.insert_before(node, steps.made)
        old, old_weight = node.outputs[0], layer.weight
        result.type, result.shape, result.doc_string = old.type, old.shape, old.doc_string
        result.metadata_props.update(old.metadata_props)
        name = old.name
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        self.model.graph.remove([node], safe=True)
        result.name = name
        drop_unread(old_weight)

    def _weight(self, layer: Layer) -> list[ir.Value]:
        """Integers [K, N], scale [N] and zero point, stored once per weight and orientation."""
        key = (layer.weight, layer.axis)
        if key not in self.weights:
            stored = constant_array(layer.weight)
            assert stored is not None
            # MatMulInteger has no transposition: Gemm's [N, K] weights are stored as [K, N].
            matrix = stored.T if layer.axis == 0 else stored
            weight = round_weight(np.ascontiguousarray(matrix), 1, self.kind)
            base = layer.weight.name or "weight"
            zero = np.asarray(weight.zero_point.flat[0])  # one for all: the fused kernel takes no other
            parts = {"quantized": weight.data, "scale": weight.scale, "zero_point": zero}
            self.weights[key] = [
                add_constant(self.model, self.model.graph, f"{base}_{suffix}", array, self.taken)
                for suffix, array in parts.items()
            ]
        return self.weights[key]


class _Steps:
    """New nodes in place of one, named after it."""

    def __init__(self, node: ir.Node, taken: set[str]) -> None:
        self.base = label(node)
        self.taken = taken
        self.made: list[ir.Node] = []

    def add(self, op_type: str, inputs: list[ir.Value], suffix: str, outputs: int = 1, **attributes: int) -> ir.Node:
        made = ir.node(op_type, inputs, attributes=attributes or None, num_outputs=outputs)
        made.name = fresh(f"{self.base}_{suffix}", self.taken)
        for index, value in enumerate(made.outputs):
            value.name = fresh(f"{self.base}_{suffix}_{index}", self.taken)
        self.made.append(made)
        return made
