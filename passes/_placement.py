"""Where Q/DQ pairs stand: which layers, which values, which light operators between them. No weight is touched here."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from graphopt.base import Skip
from graphopt.graph import attribute, constant_array, is_op, label, nodes
from graphopt.target import Target


@dataclass(frozen=True)
class Layer:
    """A node that multiplies its data by constant weights. ``axis``: the weight's output-channel axis."""

    node: ir.Node
    axis: int
    grouped: bool

    @property
    def data(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def weight(self) -> ir.Value:
        value = self.node.inputs[1]
        assert value is not None
        return value

    @property
    def bias(self) -> ir.Value | None:
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None


@dataclass
class Placement:
    """``quantized``: values that get a Q/DQ pair, each with the value whose range it uses. ``integer``: those among
    them that an integer kernel produces, so that every reader may as well read the dequantized one."""

    layers: list[Layer] = field(default_factory=list)
    light: list[ir.Node] = field(default_factory=list)
    quantized: dict[ir.Value, ir.Value] = field(default_factory=dict)
    integer: set[ir.Value] = field(default_factory=set)
    skipped: list[Skip] = field(default_factory=list)


def place(model: ir.Model, target: Target, *, exclude: Sequence[str] = (), include: Sequence[str] = ()) -> Placement:
    """Apply the rules of ``target``. ``exclude`` and ``include``: node names, globs, ``re:...``, operator types."""
    placement = Placement()
    in_main = set(model.graph)
    for node in nodes(model):
        if not is_op(node, *target.heavy, *target.reasons):
            continue
        reason = _reason(node, target, node in in_main, exclude, include)
        if reason is not None:
            placement.skipped.append(Skip(label(node), f"{node.op_type}: {reason}"))
            continue
        grouped = node.op_type == "Conv" and attribute(node, "group", 1) > 1
        placement.layers.append(Layer(node, _channel_axis(node), grouped))
    _values(model, placement, target)
    return placement


def matches(node: ir.Node, patterns: Iterable[str]) -> bool:
    """Whether a name, glob, ``re:`` expression or operator type among ``patterns`` means this node."""
    name = label(node)
    return any(
        re.search(p[3:], name) is not None if p.startswith("re:") else p == node.op_type or fnmatch.fnmatchcase(name, p)
        for p in patterns
    )


def _reason(node: ir.Node, target: Target, in_main: bool, exclude: Sequence[str], include: Sequence[str]) -> str | None:
    """Why this node stays in float, or None."""
    if node.op_type in target.reasons:
        return target.reasons[node.op_type]
    if matches(node, exclude):
        return "excluded by the user"
    if include and not matches(node, include):
        return "not among the nodes to quantize"
    if not in_main:
        return "it is in the body of an If, Loop or Scan, where values cannot be calibrated yet"
    data, weight = node.inputs[0], node.inputs[1]
    if data is None or weight is None:
        return "it has no data or no weight input"
    stored = constant_array(weight)
    if stored is None:
        if constant_array(data) is not None:
            return "its constant is the left operand; the runtime's integer kernel wants it on the right"
        if weight.is_initializer():
            return "its weight is also a graph input, so a caller may replace it (see fold-overridable)"
        return "both operands are computed; there are no weights to store"
    if is_op(weight.producer(), "DequantizeLinear") or is_op(data.producer(), "DequantizeLinear"):
        return "it is quantized already"
    if stored.dtype != "float32":
        return f"its weights are {stored.dtype}; only float32 layers are quantized"
    if constant_array(data) is not None:
        return "both operands are constant; fold-constants removes it"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and constant_array(bias) is None:
        return "its bias is computed"
    return _shape_reason(node, stored.ndim)


def _shape_reason(node: ir.Node, rank: int) -> str | None:
    if node.op_type == "MatMul" and rank != 2:
        return f"its weight has {rank} dims; the integer kernel takes matrices"
    if node.op_type == "Gemm":
        bias = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
        if attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
            return "it transposes its data or scales its result (transA, alpha, beta)"
        if bias is not None and bias.ndim > 1 and bias.size != bias.shape[-1]:
            return "its bias is a matrix"
    if node.op_type == "Conv" and rank not in (3, 4, 5):
        return f"its weight has {rank} dims"
    return None


def _channel_axis(node: ir.Node) -> int:
    if node.op_type == "Conv":
        return 0
    return 0 if node.op_type == "Gemm" and attribute(node, "transB", 0) else 1


def after_absorbed(node: ir.Node, target: Target) -> ir.Value:
    """The value to round: past a Relu or Clip that alone reads the node's output (rounding in between costs accuracy:
    on efficientnet-lite0, KL 0.71 between Conv and Clip against 0.05 after the Clip)."""
    output = node.outputs[0]
    users = list(output.uses())
    if len(users) != 1 or output.is_graph_output():
        return output
    user = users[0].node
    if not is_op(user, *target.absorbed) or user.graph is not node.graph:
        return output
    if user.op_type == "Clip" and any(v is not None and constant_array(v) is None for v in user.inputs[1:]):
        return output
    return user.outputs[0]


def _values(model: ir.Model, placement: Placement, target: Target) -> None:
    """Values around the layers first, then the light operators that lie between two of them."""
    read = {layer.data for layer in placement.layers}
    made = {
        after_absorbed(layer.node, target)
        for layer in placement.layers
        if layer.node.op_type in target.needs_integer_output
    }
    light = _light_nodes(model, read, made, target)
    placement.light = light
    for layer in placement.layers:
        placement.quantized[layer.data] = layer.data
    for value in made:
        placement.quantized[value] = value
    for node in light:
        output = after_absorbed(node, target) if node.op_type in target.bridging else node.outputs[0]
        made.add(output)
        source = node.inputs[0]
        assert source is not None
        shared = node.op_type in target.shared_scale
        for value in _data_inputs(node):
            placement.quantized.setdefault(value, value)
        placement.quantized[output] = placement.quantized[source] if shared else output
    placement.integer = made


def _light_nodes(model: ir.Model, read: set[ir.Value], made: set[ir.Value], target: Target) -> list[ir.Node]:
    """Light operators whose inputs are integer anyway and whose output an integer operator reads: rounding them costs
    no accuracy that is not already paid. Shrunk until it holds for all of them together."""
    chosen = [n for n in model.graph if is_op(n, *target.shared_scale, *target.bridging)]
    while True:
        wanted = read | {value for node in chosen for value in _data_inputs(node)}
        available = set(made)
        kept: list[ir.Node] = []
        for node in chosen:
            inputs = _data_inputs(node)
            bridging = node.op_type in target.bridging
            output = after_absorbed(node, target) if bridging else node.outputs[0]
            present = [v in available or (bridging and v in read) for v in inputs]
            if inputs and all(present) and any(v in available for v in inputs) and output in wanted and _fits(node):
                available.add(output)
                kept.append(node)
        if len(kept) == len(chosen):
            return kept
        chosen = kept


def _fits(node: ir.Node) -> bool:
    """Whether the runtime's integer kernel computes just this node."""
    if node.op_type == "Add":
        return all(v is not None and constant_array(v) is None for v in node.inputs)
    if node.op_type == "MaxPool":
        return len([v for v in node.outputs if v.name]) == 1
    if node.op_type == "Concat":
        return all(v is not None and constant_array(v) is None for v in node.inputs)
    return all(v is None or constant_array(v) is not None for v in node.inputs[1:])


def _data_inputs(node: ir.Node) -> list[ir.Value]:
    many = node.op_type in ("Add", "Concat")
    return [v for v in (node.inputs if many else node.inputs[:1]) if v is not None]
