"""Fold an inference-mode BatchNormalization into the Conv, ConvTranspose or Gemm before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.graph import attribute, constant_array, is_op, label, nodes, opset, value_names
from graphopt.passes._weights import add_constant, drop_unread

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class FuseBatchnorm(Pass):
    """``BN(W x + b) = (s W) x + s (b - mean) + beta`` with ``s = gamma / sqrt(var + epsilon)``, computed in float64.

    Needs constant weights and statistics, and the layer's output read by the BatchNormalization alone. Shared weights
    are forked, never changed for the other reader.
    """

    name: ClassVar[str] = "fuse-batchnorm"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        taken = value_names(model)
        found = [node for node in nodes(model) if is_op(node, "BatchNormalization")]
        for node in found:
            site = label(node)
            reason = self._reason(node, opset(model))
            if reason is None and not context.allows(self.name, site):
                reason = "switched off after a failed verification"
            if reason is None:
                layer = node.inputs[0].producer() if node.inputs[0] is not None else None
                assert layer is not None
                weight, bias = _fused(layer, node)
                if np.isfinite(weight).all() and np.isfinite(bias).all():
                    result.changes.append(Change("fuse", site, f"into {layer.op_type} {label(layer)}"))
                    _replace(model, layer, node, weight, bias, taken)
                    continue
                reason = f"the fused weights would not be finite in {weight.dtype}"
            result.skipped.append(Skip(site, reason))
        if not found:
            result.skipped.append(Skip("(graph)", "there is no BatchNormalization"))
        return result

    def _reason(self, node: ir.Node, version: int) -> str | None:
        """Why this BatchNormalization stays, or None."""
        if version < 7:
            return f"its meaning at opset {version} is another; run upgrade-opset first"
        if attribute(node, "training_mode", 0) or len([v for v in node.outputs if v.name]) > 1:
            return "it is in training mode"
        if attribute(node, "spatial", 1) != 1:
            return "it normalizes every position by itself (spatial=0)"
        layer = node.inputs[0].producer() if node.inputs[0] is not None else None
        if not is_op(layer, "Conv", "ConvTranspose", "Gemm"):
            before = f"a {layer.op_type}" if layer is not None else "a graph input"
            return f"it follows {before}, not a Conv, ConvTranspose or Gemm"
        assert layer is not None
        if layer.graph is not node.graph:
            return f"{label(layer)} stands outside the body that it is in, and may run where the body does not"
        output = layer.outputs[0]
        if output.is_graph_output() or len(list(output.uses())) != 1:
            return f"the output of {label(layer)} is read elsewhere too"
        if any(constant_array(v) is None for v in node.inputs[1:5]):
            return "its statistics are not constants"
        weights = layer.inputs[1:3]
        if any(v is not None and constant_array(v) is None for v in weights):
            return f"the weights of {label(layer)} are not constants that nobody can override"
        if layer.op_type == "Gemm" and not _plain_gemm(layer):
            return f"{label(layer)} scales or broadcasts its bias (alpha, beta, or a bias that is no row)"
        return None


def _plain_gemm(node: ir.Node) -> bool:
    bias = constant_array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    row = bias is None or bias.ndim <= 1 or (bias.ndim == 2 and bias.shape[0] == 1)
    return row and attribute(node, "alpha", 1.0) == 1.0 and (bias is None or attribute(node, "beta", 1.0) == 1.0)


def _fused(layer: ir.Node, batchnorm: ir.Node) -> tuple[NDArray[Any], NDArray[Any]]:
    """(weight, bias) of the two in one, in the layer's own type."""
    gamma, beta, mean, variance = (_float64(v) for v in batchnorm.inputs[1:5])
    with np.errstate(all="ignore"):  # what is not finite is refused by the caller
        scale = gamma / np.sqrt(variance + attribute(batchnorm, "epsilon", 1e-5))
        stored = constant_array(layer.inputs[1])
        assert stored is not None
        weight = stored.astype(np.float64)
        has_bias = len(layer.inputs) > 2 and layer.inputs[2] is not None
        bias = _float64(layer.inputs[2]).reshape(-1) if has_bias else np.zeros_like(scale)
        if layer.op_type == "Conv":
            weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        elif layer.op_type == "ConvTranspose":
            weight = _scale_transposed(weight, scale, attribute(layer, "group", 1))
        else:
            weight = weight * (scale.reshape(-1, 1) if attribute(layer, "transB", 0) else scale.reshape(1, -1))
        bias = (bias - mean) * scale + beta
        return weight.astype(stored.dtype), bias.astype(stored.dtype)


def _replace(
    model: ir.Model, layer: ir.Node, batchnorm: ir.Node, weight: NDArray[Any], bias: NDArray[Any], taken: set[str]
) -> None:
    """Give the layer weights of its own and the BatchNormalization's output, and drop what nobody reads any more."""
    graph = layer.graph
    assert isinstance(graph, ir.Graph)
    read = [*layer.inputs[1:], *batchnorm.inputs[1:]]
    base = layer.inputs[1].name if layer.inputs[1] is not None else None
    layer.replace_input_with(1, add_constant(model, graph, f"{base}_fused", weight, taken, layer))
    if len(layer.inputs) < 3:
        layer.resize_inputs(3)
    layer.replace_input_with(2, add_constant(model, graph, f"{base}_fused_bias", bias, taken, layer))
    old, new = batchnorm.outputs[0], layer.outputs[0]
    new.type, new.shape = old.type or new.type, old.shape if old.shape is not None else new.shape
    new.doc_string = old.doc_string or new.doc_string
    new.metadata_props.update(old.metadata_props)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    name = old.name
    graph.remove([batchnorm], safe=True)
    new.name = name
    drop_unread(*read)


def _scale_transposed(weight: NDArray[np.float64], scale: NDArray[np.float64], group: int) -> NDArray[np.float64]:
    """ConvTranspose weights are [C_in, C_out / group, k...]; group g holds input channels g*C_in/group onwards."""
    per_group = weight.reshape(group, weight.shape[0] // group, *weight.shape[1:])
    factors = scale.reshape(group, 1, weight.shape[1], *[1] * (weight.ndim - 2))
    return (per_group * factors).reshape(weight.shape)


def _float64(value: ir.Value | None) -> NDArray[Any]:
    array = constant_array(value)
    assert array is not None
    return array.astype(np.float64)
