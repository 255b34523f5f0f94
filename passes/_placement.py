"""Where Q/DQ pairs stand: which layers, which values, which light operators between them. No weight is touched here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.base import Skip
from graphopt.errors import PreconditionError
from graphopt.graph import attribute, constant_array, is_op, label, nodes
from graphopt.passes._patterns import matches
from graphopt.passes._within import Within
from graphopt.target import Target


@dataclass(frozen=True)
class Layer:
    """A node that multiplies its data by constant weights. ``axis``: the weight's output-channel axis. ``adder``: the
    Add behind a MatMul that adds a constant row and is its only reader; the runtime makes one Gemm of the two."""

    node: ir.Node
    axis: int
    depthwise: bool = False
    adder: ir.Node | None = None

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
    def bias_site(self) -> tuple[ir.Node, int] | None:
        """The node and input that read the bias, if there is one."""
        if self.adder is not None:
            return self.adder, 1 if self.adder.inputs[0] is self.node.outputs[0] else 0
        return (self.node, 2) if len(self.node.inputs) > 2 and self.node.inputs[2] is not None else None


@dataclass
class Placement:
    """``residual``: Adds that read their skip connection in integers. ``quantized``: values that get a Q/DQ pair, each
    with the value whose range it uses. ``integer``: those among them that an integer kernel produces, so that every
    reader may as well read the dequantized one. ``skipped`` are layers, ``skipped_light`` the operators with an integer
    kernel that are not between layers, each with its reason."""

    layers: list[Layer] = field(default_factory=list)
    light: list[ir.Node] = field(default_factory=list)
    residual: list[ir.Node] = field(default_factory=list)
    quantized: dict[ir.Value, ir.Value] = field(default_factory=dict)
    integer: set[ir.Value] = field(default_factory=set)
    skipped: list[Skip] = field(default_factory=list)
    skipped_light: list[Skip] = field(default_factory=list)


def place(
    model: ir.Model,
    target: Target,
    *,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    unseen: Collection[str] = (),
) -> Placement:
    """Apply the rules of ``target``.

    ``exclude`` and ``include``: node names, globs, ``re:...``, operator types; ``exclude`` holds for the light
    operators too, ``include`` names layers and the light ones follow. ``unseen``: names of values whose range is not
    known, so that no layer may read or make them.
    """
    placement = Placement()
    within = Within(model)
    for node in nodes(model):
        if not is_op(node, *target.heavy, *target.reasons) or (node.op_type == "Gather" and not _table(node)):
            continue
        reason = _reason(node, target, within, exclude, include)
        if reason is None and _range_unknown(node, target, unseen):
            reason = "calibration never showed a finite value of what it reads or makes, so there is no range to use"
        if reason is not None:
            placement.skipped.append(Skip(label(node), f"{node.op_type}: {reason}"))
            continue
        placement.layers.append(Layer(node, _channel_axis(node), _depthwise(node), adder_of(node)))
    _values(model, placement, target, exclude, within)
    return placement


def _range_unknown(node: ir.Node, target: Target, unseen: Collection[str]) -> bool:
    data = node.inputs[0]
    needed = [data, after_absorbed(node, target)] if node.op_type in target.needs_integer_output else [data]
    return any(value is not None and value.name in unseen for value in needed)


def refuse_quantized(model: ir.Model) -> None:
    """Raise PreconditionError for a model that somebody quantized already: rounding twice only loses."""
    for node in nodes(model):
        if node.op_type in _INTEGER_OPS:
            raise PreconditionError(
                f"the model is quantized already (node '{label(node)}', {node.op_type}); start from the float model"
            )


def _reason(
    node: ir.Node, target: Target, within: Within, exclude: Sequence[str], include: Sequence[str]
) -> str | None:
    """Why this node stays in float, or None."""
    if node.op_type in target.reasons:
        return target.reasons[node.op_type]
    if matches(node, exclude):
        return "excluded by the user"
    if include and not matches(node, include):
        return "not among the nodes to quantize"
    unreached = within.reason(node, after_absorbed(node, target))
    if unreached is not None:
        return unreached
    data, weight = node.inputs[0], node.inputs[1]
    if data is None or weight is None:
        return "it has no data or no weight input"
    stored = constant_array(weight)
    if stored is None:
        if constant_array(data) is not None:
            return "its constant is the left operand; the runtime's integer kernel wants it on the right"
        if weight.is_initializer():
            return (
                "its weight is also a graph input, so a caller may replace it; --fold-overridable makes it a constant "
                "(at IR version 3 with --opset 17)"
            )
        return "both operands are computed; there are no weights to store"
    if is_op(weight.producer(), "DequantizeLinear") or is_op(data.producer(), "DequantizeLinear"):
        return "it is quantized already"
    if stored.dtype != "float32":
        more = "run compute-fp32 first" if stored.dtype == "float16" else "start from the float32 model"
        return f"its weights are {stored.dtype}; only float32 layers are quantized: {more}"
    if not np.isfinite(stored).all():
        return "its weights hold NaN or infinity"
    if constant_array(data) is not None:
        return "both operands are constant; fold-constants removes it"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        added = constant_array(bias)
        if added is None:
            return "its bias is computed, or a caller may replace it (--fold-overridable makes it a constant)"
        if not np.isfinite(added).all():
            return "its bias holds NaN or infinity"
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
    if node.op_type == "ConvTranspose" and attribute(node, "group", 1) != 1:
        return "its groups share the axis of the scales, so there is no scale per output channel"
    if node.op_type in ("Conv", "ConvTranspose") and rank not in (3, 4, 5):
        return f"its weight has {rank} dims"
    return None


def _table(node: ir.Node) -> bool:
    """Whether a Gather looks weights up (an embedding), not numbers that other nodes compute."""
    stored = constant_array(node.inputs[0])
    return stored is not None and stored.dtype.kind == "f" and stored.ndim > 1


def _depthwise(node: ir.Node) -> bool:
    """Whether each channel is convolved by itself, which the runtime does in a kernel of its own."""
    weight = constant_array(node.inputs[1])
    return node.op_type == "Conv" and weight is not None and weight.shape[:2] == (attribute(node, "group", 1), 1)


def _channel_axis(node: ir.Node) -> int:
    if node.op_type == "Conv":
        return 0
    return 0 if node.op_type == "Gemm" and attribute(node, "transB", 0) else 1


def adder_of(node: ir.Node) -> ir.Node | None:
    """See :class:`Layer`."""
    users = list(node.outputs[0].uses())
    if node.op_type != "MatMul" or len(users) != 1 or node.outputs[0].is_graph_output():
        return None
    add, index = users[0].node, users[0].idx
    if not is_op(add, "Add") or add.graph is not node.graph:
        return None
    bias, weight = constant_array(add.inputs[1 - index]), constant_array(node.inputs[1])
    row = bias is not None and weight is not None and bias.shape == weight.shape[1:] and np.isfinite(bias).all()
    return add if row else None


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
    if user.op_type == "Clip" and clip_bounds(user.outputs[0]) is None:
        return output
    return user.outputs[0]


def clip_bounds(value: ir.Value) -> tuple[float, float] | None:
    """The constant bounds that a Clip holds ``value`` to. None where it is no Clip's, or where 0 is outside: rounding
    has to represent 0 and cannot do what such a Clip does."""
    node = value.producer()
    if node is None or not is_op(node, "Clip"):
        return None
    bounds = [-np.inf, np.inf]
    for index, bound in enumerate(node.inputs[1:3]):
        array = constant_array(bound)
        if bound is not None and array is None:
            return None
        if array is not None:
            bounds[index] = float(array.reshape(-1)[0])
    return (bounds[0], bounds[1]) if bounds[0] <= 0 <= bounds[1] and bounds[0] < bounds[1] else None


def _values(model: ir.Model, placement: Placement, target: Target, exclude: Sequence[str], within: Within) -> None:
    """Values around the layers first, then the light operators that lie between two of them."""
    if not placement.layers:
        return
    read = {layer.data for layer in placement.layers}
    heavy = [layer.node for layer in placement.layers if layer.node.op_type in target.needs_integer_output]
    made = dict.fromkeys(after_absorbed(node, target) for node in heavy)  # ordered: the file must not depend on hashes
    light, left = _light_nodes(_light(model, target, within), read, set(made), target, exclude)
    adders = {layer.adder for layer in placement.layers}
    placement.light = light
    placement.skipped_light = [Skip(label(n), f"{n.op_type}: {why}") for n, why in left.items() if n not in adders]
    for layer in placement.layers:
        placement.quantized[layer.data] = layer.data
    for value in made:
        placement.quantized[value] = value
    placement.integer = set(made)
    for node in placement.light:
        output = _light_output(node, target)
        placement.integer.add(output)
        source = node.inputs[0]
        assert source is not None
        for value in _data_inputs(node):
            placement.quantized.setdefault(value, value)
        shared = node.op_type in target.shared_scale
        placement.quantized[output] = placement.quantized[source] if shared else output
    if target.residual == "quantized":
        _residuals(model, placement, within)


def _light(model: ir.Model, target: Target, within: Within) -> list[ir.Node]:
    """The operators that have an integer kernel of their own, where calibration sees them."""
    found = [n for n in nodes(model) if is_op(n, *target.shared_scale, *target.bridging, *target.gated)]
    return [n for n in found if within.reason(n, _light_output(n, target)) is None]


def _residuals(model: ir.Model, placement: Placement, within: Within) -> None:
    """The skip connection of an Add behind a layer, which fuses with the layer only if it comes in integers."""
    layers = {layer.node for layer in placement.layers}
    for node in nodes(model):
        if not is_op(node, "Add") or any(v is None or constant_array(v) is not None for v in node.inputs):
            continue
        mine = [v for v in node.inputs if v is not None and v.producer() in layers and len(list(v.uses())) == 1]
        others = [v for v in node.inputs if v is not None and v not in mine[:1]]
        if mine and len(others) == 1 and within.reason(node, others[0]) is None:
            placement.quantized.setdefault(others[0], others[0])
            placement.residual.append(node)


def _light_nodes(
    chosen: list[ir.Node], read: set[ir.Value], made: set[ir.Value], target: Target, exclude: Sequence[str]
) -> tuple[list[ir.Node], dict[ir.Node, str]]:
    """Light operators whose inputs are integer anyway and whose output an integer operator reads: rounding them costs
    no accuracy that is not already paid. Shrunk until it holds for all of them together.

    Also the bridging operators that were left out, with the reason.
    """
    left: dict[ir.Node, str] = {}
    while True:
        wanted = read | {value for node in chosen for value in _data_inputs(node)}
        available = set(made)
        kept: list[ir.Node] = []
        for node in chosen:
            reason = _light_reason(node, target, read, available, wanted, exclude)
            if reason is None:
                available.add(_light_output(node, target))
                kept.append(node)
            elif node.op_type in target.bridging and _floating(node):
                left[node] = reason
        if len(kept) == len(chosen):
            return kept, left
        chosen = kept


def _light_reason(
    node: ir.Node,
    target: Target,
    read: set[ir.Value],
    available: set[ir.Value],
    wanted: set[ir.Value],
    exclude: Sequence[str],
) -> str | None:
    """Why this light operator stays in float, or None."""
    if matches(node, exclude):
        return "excluded by the user"
    if not _fits(node):
        return "an operand of it is constant, or it has a form that the integer kernel does not take"
    inputs = _data_inputs(node)
    if node.op_type in target.gated:  # rounding one number per channel costs no time
        inputs = [v for v in inputs if not _gate(v)] if any(map(_gate, inputs)) else inputs
    rounded_anyway = read if node.op_type in target.bridging else set()
    if not any(v in available for v in inputs) or not all(v in available or v in rounded_anyway for v in inputs):
        return "not everything it reads comes from an integer kernel"
    if _light_output(node, target) not in wanted:
        return "nothing that runs in integers reads its result"
    return None


def _gate(value: ir.Value) -> bool:
    """A factor per channel between 0 and 1: out of a Sigmoid or HardSigmoid, all dims but the first two 1."""
    if not is_op(value.producer(), "Sigmoid", "HardSigmoid"):
        return False
    if value.shape is not None:
        return len(value.shape) > 2 and all(dim == 1 for dim in value.shape[2:])
    node = value.producer()
    for _ in range(8):  # dims are often not declared: then whether it is what a pool left
        if node is None or is_op(node, "GlobalAveragePool", "ReduceMean"):
            return node is not None
        node = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    return False


def _light_output(node: ir.Node, target: Target) -> ir.Value:
    return after_absorbed(node, target) if node.op_type in target.bridging else node.outputs[0]


_COUNTING = ("Shape", "Size", "NonZero", "ArgMax", "ArgMin")
_SAME_TYPE = ("Gather", "Slice", "Squeeze", "Unsqueeze", "Concat", "Add", "Sub", "Mul", "Div", "Identity", "ReduceProd")


def _floating(node: ir.Node) -> bool:
    """Not the arithmetic on shapes that exporters leave behind. Types are often not declared: then it is followed
    back a few steps to where its numbers are from."""
    value = node.inputs[0]
    for _ in range(8):
        if value is None:
            break
        if isinstance(value.type, ir.TensorType):
            return bool(value.type.dtype == ir.DataType.FLOAT)
        producer = value.producer()
        if is_op(producer, *_COUNTING):
            return False
        if producer is None or not is_op(producer, *_SAME_TYPE):
            break
        value = producer.inputs[0]
    return True


_INTEGER_OPS = frozenset({
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearConv",
    "QLinearMatMul", "MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm",
})  # fmt: skip


def _fits(node: ir.Node) -> bool:
    """Whether the runtime's integer kernel computes just this node."""
    if node.op_type in ("Add", "Concat", "Mul"):
        return all(v is not None and constant_array(v) is None for v in node.inputs)
    if node.op_type == "AveragePool":
        # The integer kernel knows no dilations, and counts what ceil_mode adds beyond the padding.
        overhang = attribute(node, "ceil_mode", 0) and attribute(node, "count_include_pad", 0)
        return not overhang and all(d == 1 for d in attribute(node, "dilations", ()))
    if node.op_type == "MaxPool":
        return len([v for v in node.outputs if v.name]) == 1
    return True  # their other inputs are shapes and axes, which the runtime's rules do not look at


def _data_inputs(node: ir.Node) -> list[ir.Value]:
    many = node.op_type in ("Add", "Concat", "Mul")
    return [v for v in (node.inputs if many else node.inputs[:1]) if v is not None]
