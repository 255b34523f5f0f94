"""Dynamic quantization: integer weights, activations rounded at run time from the range they have just then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.errors import PreconditionError
from graphopt.graph import constant_array, fresh, is_op, label, nodes, opset, value_names
from graphopt.passes._integer_weights import WeightKind, round_weight
from graphopt.passes._placement import Layer, place
from graphopt.passes._qdq import drop_unread
from graphopt.passes._weights import add_constant
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
            raise ValueError(f"weights is '{self.weights}'; one of {', '.join(WEIGHTS)}")

    def check(self, model: ir.Model) -> None:
        if opset(model) < 11:
            raise PreconditionError(
                f"DynamicQuantizeLinear needs opset 11 and the model has {opset(model)}; run upgrade-opset first"
            )
        for node in nodes(model):
            if is_op(node, "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"):
                raise PreconditionError(
                    f"the model is quantized already (node '{label(node)}'); start from the float model"
                )

    def run(self, model: ir.Model, context: Context) -> PassResult:
        placement = place(model, get_target(context.target), exclude=self.exclude, include=self.include)
        result = PassResult(skipped=placement.skipped)
        taken = value_names(model)
        rounded: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
        for layer in placement.layers:
            if layer.node.op_type == "Conv":
                why = "Conv: ONNX Runtime's ConvInteger is slower than its float Conv; use quantize-static"
                result.skipped.append(Skip(label(layer.node), why))
                continue
            kind = self._kind(context)
            detail = f"{layer.node.op_type}: {kind} weights, input rounded at run time"
            result.changes.append(Change("quantize", label(layer.node), detail))
            _rewrite(model, layer, kind, taken, rounded)
        if not result.changes and not result.skipped:
            result.skipped.append(Skip("(graph)", "it has no MatMul or Gemm with constant weights"))
        return result

    def _kind(self, context: Context) -> WeightKind:
        if self.weights != "auto":
            return self.weights  # type: ignore[return-value]
        return "s8" if context.this_cpu and not this_cpu().saturates else "u8"


def _rewrite(
    model: ir.Model,
    layer: Layer,
    kind: WeightKind,
    taken: set[str],
    rounded: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]],
) -> None:
    node, graph = layer.node, model.graph
    stored = constant_array(layer.weight)
    assert stored is not None
    # MatMulInteger has no transposition: Gemm's [N, K] weights are stored as [K, N].
    matrix = stored.T if layer.axis == 0 else stored
    weight = round_weight(np.ascontiguousarray(matrix), 1, kind)
    base = layer.weight.name or "weight"
    data = add_constant(model, graph, f"{base}_quantized", weight.data, taken)
    scale = add_constant(model, graph, f"{base}_scale", weight.scale, taken)
    zero = add_constant(model, graph, f"{base}_zero_point", np.asarray(weight.zero_point.flat[0]), taken)
    steps: list[ir.Node] = []

    def emit(op_type: str, inputs: list[ir.Value], suffix: str, outputs: int = 1, **attributes: int) -> ir.Node:
        made = ir.node(op_type, inputs, attributes=attributes or None, num_outputs=outputs)
        made.name = fresh(f"{label(node)}_{suffix}", taken)
        for index, value in enumerate(made.outputs):
            value.name = fresh(f"{label(node)}_{suffix}_{index}", taken)
        steps.append(made)
        return made

    if layer.data not in rounded:  # q, k and v of an attention read one input: it is rounded once
        dynamic = emit("DynamicQuantizeLinear", [layer.data], "input", 3)
        rounded[layer.data] = (dynamic.outputs[0], dynamic.outputs[1], dynamic.outputs[2])
    value, value_scale, value_zero = rounded[layer.data]
    product = emit("MatMulInteger", [value, data, value_zero, zero], "integer").outputs[0]
    real = emit("Cast", [product], "cast", to=int(ir.DataType.FLOAT)).outputs[0]
    factor = emit("Mul", [value_scale, scale], "factor").outputs[0]
    result = emit("Mul", [real, factor], "scaled").outputs[0]
    if layer.bias is not None:
        result = emit("Add", [result, layer.bias], "bias").outputs[0]
    graph.insert_before(node, steps)
    old = node.outputs[0]
    result.type, result.shape, result.doc_string = old.type, old.shape, old.doc_string
    name, old_weight = old.name, layer.weight
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove([node], safe=True)
    result.name = name
    drop_unread(old_weight)
