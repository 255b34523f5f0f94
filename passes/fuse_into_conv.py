"""Fold per-channel arithmetic after a Conv, ConvTranspose or Gemm into its weights, and zero padding before a Conv."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.graph import attribute, constant_array, is_op, label, nodes, opset, value_names
from graphopt.passes._rewire import OFF, Names, remove
from graphopt.passes._weights import add_constant, drop_unread

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LAYERS = ("Conv", "ConvTranspose", "Gemm")
_ARITHMETIC = ("Add", "Sub", "Mul", "Div")


@dataclass(frozen=True)
class FuseIntoConv(Pass):
    """``s * (W x + b) + t = (s W) x + (s b + t)``, computed in float64, and ``Conv(Pad(x))`` with the pads in the Conv
    (a ConvTranspose crops that much less).

    ``s`` and ``t`` are constants, one number or one per output channel. Needs constant weights and the layer's output
    read by the arithmetic alone; shared weights are forked, never changed for the other reader.
    """

    name: ClassVar[str] = "fuse-into-conv"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        fuser = _Fuser(model)
        for node in list(nodes(model)):
            if is_op(node, "Pad"):
                plan: _Plan | _Padding | str | None = _padding(node, fuser.version)
            elif is_op(node, *_ARITHMETIC):
                plan = fuser.plan(node)
            else:
                continue
            if plan is None:
                continue
            site = label(node)
            if not isinstance(plan, str) and not context.allows(self.name, site):
                plan = OFF
            if isinstance(plan, str):
                result.skipped.append(Skip(site, f"{node.op_type}: {plan}"))
                continue
            result.changes.append(Change("fuse", site, f"{node.op_type} into {plan.layer.op_type} {label(plan.layer)}"))
            if isinstance(plan, _Padding):
                plan.apply(node)
            else:
                fuser.apply(node, plan)
        if not result.changes and not result.skipped:
            result.skipped.append(Skip("(graph)", "no constant arithmetic follows a layer, no Pad stands before one"))
        return result


@dataclass
class _Plan:
    """A layer, and what its weight (None: stays) and its bias (None: there is none) become."""

    layer: ir.Node
    weight: NDArray[Any] | None
    bias: NDArray[Any] | None


class _Fuser:
    """Plans and makes the rewrites of one model."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.version = opset(model)
        self.taken = value_names(model)
        self.names = Names(model)

    def plan(self, node: ir.Node) -> _Plan | str | None:
        """What to do, or why nothing is done; None: no arithmetic with a layer's output and a constant."""
        side = next((i for i, v in enumerate(node.inputs) if v is not None and is_op(v.producer(), *_LAYERS)), None)
        if side is None or len(node.inputs) != 2:
            return None
        value, other = node.inputs[side], node.inputs[1 - side]
        layer = value.producer() if value is not None else None
        operand = constant_array(other)
        assert layer is not None
        if operand is None:
            overridable = other is not None and other.is_initializer()
            return "its constant may be overridden by a caller" if overridable else None
        return self._reason(node, layer, side, operand) or self._computed(node, layer, side, operand)

    def _reason(self, node: ir.Node, layer: ir.Node, side: int, operand: NDArray[Any]) -> str | None:
        if self.version < 7:
            return f"broadcasting at opset {self.version} is another; run upgrade-opset first"
        if node.op_type == "Div" and side == 1:
            return "it divides by the layer's output"
        if layer.graph is not node.graph:
            return f"{label(layer)} stands outside the body that it is in, and may run where the body does not"
        output = layer.outputs[0]
        if output.is_graph_output() or len(output.uses()) != 1:
            return f"the output of {label(layer)} is read elsewhere too"
        weight = constant_array(layer.inputs[1])
        bias = layer.inputs[2] if len(layer.inputs) > 2 else None
        if weight is None or (bias is not None and constant_array(bias) is None):
            return f"the weights of {label(layer)} are not constants that nobody can override"
        if weight.dtype.kind not in "fV":
            return "the layer does not compute in floating point"
        if layer.op_type == "Gemm" and not _plain_gemm(layer):
            return f"{label(layer)} scales or broadcasts its bias (alpha, beta, or a bias that is no row)"
        if _per_channel(operand, layer, weight) is None:
            return f"its constant of shape {list(operand.shape)} is not one number per output channel"
        if node.op_type in ("Mul", "Div") and not np.all(operand.astype(np.float64)):
            return "a factor is 0, which would hide NaN and Inf"
        if self.names.shadowed(node.outputs[0]):
            return "a body has a value of the same name, so that the name of its result cannot move"
        return None

    def _computed(self, node: ir.Node, layer: ir.Node, side: int, operand: NDArray[Any]) -> _Plan | str:
        stored = constant_array(layer.inputs[1])
        assert stored is not None
        channels = _per_channel(operand, layer, stored)
        assert channels is not None
        given = constant_array(layer.inputs[2]) if len(layer.inputs) > 2 else None
        weight: NDArray[Any] | None = None
        bias = None if given is None else np.broadcast_to(given.astype(np.float64).reshape(-1), channels.shape)
        with np.errstate(all="ignore"):  # what is not finite is refused below
            if node.op_type in ("Mul", "Div"):
                weight = _scaled(stored.astype(np.float64), channels, layer, divide=node.op_type == "Div")
                if bias is not None:
                    bias = bias * channels if node.op_type == "Mul" else bias / channels
            else:
                negated = node.op_type == "Sub" and side == 1
                if negated:
                    weight = -stored.astype(np.float64)
                    bias = None if bias is None else -bias
                term = -channels if node.op_type == "Sub" and side == 0 else channels
                bias = term if bias is None else bias + term
            new_weight = None if weight is None else weight.astype(stored.dtype)
            new_bias = None if bias is None else bias.astype(stored.dtype)
        for made in (new_weight, new_bias):
            if made is not None and not np.isfinite(made.astype(np.float64)).all():
                return f"the fused weights would not be finite in {stored.dtype}"
        return _Plan(layer, new_weight, new_bias)

    def apply(self, node: ir.Node, plan: _Plan) -> None:
        """Give the layer weights of its own and the arithmetic's output."""
        layer = plan.layer
        graph = layer.graph
        assert isinstance(graph, ir.Graph)
        read = list(layer.inputs[1:])
        base = layer.inputs[1].name if layer.inputs[1] is not None else None
        if plan.weight is not None:
            new = add_constant(self.model, graph, f"{base}_fused", plan.weight, self.taken, layer)
            layer.replace_input_with(1, new)
        if plan.bias is not None:
            if len(layer.inputs) < 3:
                layer.resize_inputs(3)
            new = add_constant(self.model, graph, f"{base}_fused_bias", plan.bias, self.taken, layer)
            layer.replace_input_with(2, new)
        old, output = node.outputs[0], layer.outputs[0]
        name = old.name
        output.type, output.shape = old.type or output.type, old.shape if old.shape is not None else output.shape
        output.doc_string = old.doc_string or output.doc_string
        output.metadata_props.update(old.metadata_props)
        old.replace_all_uses_with(output, replace_graph_outputs=True)
        remove([node])
        output.name = name
        drop_unread(*read)


def _plain_gemm(node: ir.Node) -> bool:
    bias = constant_array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    row = bias is None or bias.ndim <= 1 or (bias.ndim == 2 and bias.shape[0] == 1)
    return row and attribute(node, "alpha", 1.0) == 1.0 and (bias is None or attribute(node, "beta", 1.0) == 1.0)


def _per_channel(operand: NDArray[Any], layer: ir.Node, weight: NDArray[Any]) -> NDArray[np.float64] | None:
    """The constant as one number per output channel, or None where it is something else."""
    if layer.op_type == "Gemm":
        channels, rank, axis = weight.shape[0 if attribute(layer, "transB", 0) else 1], 2, -1
    elif layer.op_type == "Conv":
        channels, rank, axis = weight.shape[0], weight.ndim, 1 - weight.ndim
    else:
        channels, rank, axis = weight.shape[1] * attribute(layer, "group", 1), weight.ndim, 1 - weight.ndim
    if operand.ndim > rank:
        return None
    wanted = [1] * operand.ndim
    if operand.ndim >= -axis:
        wanted[axis] = channels
    if any(d not in (1, w) for d, w in zip(operand.shape, wanted, strict=True)):
        return None
    return np.broadcast_to(operand.astype(np.float64).reshape(-1), (channels,))


def _scaled(
    weight: NDArray[np.float64], channels: NDArray[np.float64], layer: ir.Node, *, divide: bool
) -> NDArray[np.float64]:
    """The weight with every output channel multiplied (or divided) by its number."""
    tail = [1] * (weight.ndim - 2)
    if layer.op_type == "Gemm":
        factors = channels.reshape((-1, 1) if attribute(layer, "transB", 0) else (1, -1))
    elif layer.op_type == "Conv":
        factors = channels.reshape(-1, 1, *tail)
    else:  # [C_in, C_out / group, k...]; group g holds input channels g*C_in/group onwards
        group = attribute(layer, "group", 1)
        rows = np.repeat(channels.reshape(group, weight.shape[1]), weight.shape[0] // group, axis=0)
        factors = rows.reshape(*weight.shape[:2], *tail)
    return weight / factors if divide else weight * factors


@dataclass
class _Padding:
    """A Conv or ConvTranspose and the pads that it gets."""

    layer: ir.Node
    pads: list[int]

    def apply(self, node: ir.Node) -> None:
        """Let the Conv read what the Pad reads."""
        source = node.inputs[0]
        assert source is not None
        self.layer.attributes["pads"] = ir.AttrInt64s("pads", self.pads)
        self.layer.attributes.pop("auto_pad", None)
        self.layer.replace_input_with(0, source)
        remove([node])


def _padding(node: ir.Node, version: int) -> _Padding | str | None:
    """What to do with a Pad; None where no Conv or ConvTranspose reads it."""
    output = node.outputs[0]
    uses = output.uses()
    layers = (use.node for use in uses if use.idx == 0 and use.node.op_type in ("Conv", "ConvTranspose"))
    layer = next((layer for layer in layers if is_op(layer, layer.op_type)), None)
    if layer is None:
        return None
    if output.is_graph_output() or len(uses) != 1:
        return "its result is read elsewhere too"
    if layer.graph is not node.graph:
        return f"{label(layer)} stands in a body, and may run more than once"
    mode = attribute(node, "mode", "constant")
    if mode != "constant":
        return f"it pads with other than zeros (mode {mode})"
    if version < 11:
        pads, value = attribute(node, "pads" if version > 1 else "paddings", None), attribute(node, "value", 0.0)
    else:
        given = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
        pads = None if given is None else given.tolist()
        fill = node.inputs[2] if len(node.inputs) > 2 else None
        array = constant_array(fill)
        value = 0.0 if fill is None else None if array is None or not array.size else array.reshape(-1)[0]
    if pads is None or value is None:
        return "how much and with what it pads is not constant"
    if value != 0:
        return f"it pads with {value}, not with zeros"
    return _into(node, layer, pads)


def _into(node: ir.Node, layer: ir.Node, pads: list[int]) -> _Padding | str:
    """The pads of both together, or why they do not add up."""
    weight = constant_array(layer.inputs[1])
    kernel = attribute(layer, "kernel_shape", None)
    if weight is None and kernel is None:
        return f"the rank of {label(layer)} is not known"
    rank = weight.ndim if weight is not None else len(kernel) + 2
    axes = list(range(rank))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        chosen = constant_array(node.inputs[3])
        if chosen is None:
            return "the axes it pads are not constant"
        axes = [int(a) % rank for a in chosen]
    if len(pads) != 2 * len(axes):
        return "its pads do not fit the layer's rank"
    begin, end = [0] * rank, [0] * rank
    for axis, first, last in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        begin[axis], end[axis] = int(first), int(last)
    if any(p < 0 for p in (*begin, *end)):
        return "it crops (negative pads)"
    if any((*begin[:2], *end[:2])):
        return "it pads the batch or the channels"
    auto = attribute(layer, "auto_pad", "NOTSET")
    if auto not in ("NOTSET", "VALID"):
        return f"{label(layer)} pads by itself (auto_pad {auto})"
    own = attribute(layer, "pads", None) if auto == "NOTSET" else None
    own = list(own) if own is not None else [0] * (2 * (rank - 2))
    added = (*begin[2:], *end[2:])
    if layer.op_type == "ConvTranspose":
        return _cropped(layer, own, added)
    return _Padding(layer, [a + b for a, b in zip(added, own, strict=True)])


def _cropped(layer: ir.Node, own: list[int], added: tuple[int, ...]) -> _Padding | str:
    """What a ConvTranspose, whose pads crop, has to crop less where its input is not padded by zeros: a stride each."""
    if attribute(layer, "output_shape", None) is not None:
        return f"{label(layer)} pads by itself (output_shape)"
    strides = attribute(layer, "strides", None) or [1] * (len(own) // 2)
    pads = [a - b * stride for a, b, stride in zip(own, added, (*strides, *strides), strict=True)]
    if min(pads) < 0:
        return f"{label(layer)} crops less than the padding makes"
    return _Padding(layer, pads)
