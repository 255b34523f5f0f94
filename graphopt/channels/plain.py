"""Rules of operators that leave every index where it is, mix some axes wholly, or tell sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphopt.channels.atoms import live
from graphopt.channels.trace import Unfit
from graphopt.graph import attribute

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.channels.trace import Axes, Rule, Trace

UNARY = [
    "Abs",
    "Acos",
    "Acosh",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "BitwiseNot",
    "Cast",
    "CastLike",
    "Ceil",
    "Celu",
    "Clip",
    "Cos",
    "Cosh",
    "Dropout",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "IsInf",
    "IsNaN",
    "LeakyRelu",
    "Log",
    "Mish",
    "Neg",
    "Not",
    "Reciprocal",
    "Relu",
    "Round",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Swish",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
]
BROADCAST = [
    "Add",
    "And",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "Div",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Or",
    "PRelu",
    "Pow",
    "Sub",
    "Sum",
    "Where",
    "Xor",
]
REDUCING = [
    "ArgMax",
    "ArgMin",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
]
POOLS = ["AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool"]


def unary(trace: Trace, node: ir.Node) -> list[Axes]:
    """Every output lies as the first input does."""
    value = node.inputs[0]
    axes = trace.of(value)
    if value in trace.sizes:
        if node.op_type not in ("Cast", "Identity"):
            raise Unfit("computes with a size")
        trace.sizes[node.outputs[0]] = trace.sizes[value]
    return [axes for _ in node.outputs]


def broadcast(trace: Trace, node: ir.Node) -> list[Axes]:
    """Indices that meet are united."""
    _no_sizes(trace, node)
    given = [value for value in node.inputs if value is not None]
    shapes = [trace.shape(value) for value in given]
    return [trace.together(shapes, [trace.of(value) for value in given], trace.shape(node.outputs[0]))]


def _no_sizes(trace: Trace, node: ir.Node) -> None:
    for value in node.inputs:
        if value is not None and any(size is not None and live(size) for size in trace.sizes.get(value, ())):
            raise Unfit("computes with a size")


def per_channel(trace: Trace, node: ir.Node) -> list[Axes]:
    """BatchNormalization and InstanceNormalization: parameters lie along axis 1, and no channel sees another."""
    axes = trace.of(node.inputs[0])
    if len(axes) < 2:
        raise Unfit("has no channel axis")
    for parameter in node.inputs[1:]:
        if parameter is not None:
            trace.atoms.unite(axes[1], trace.of(parameter)[0])
    out = (axes[0], axes[1], *axes[2:])
    if node.op_type == "InstanceNormalization":
        out = (*axes[:2], *(trace.stays(node, v, "takes a mean over it") for v in axes[2:]))
    return [out] + [trace.of(p) for p in node.inputs[3 : 2 + len(node.outputs)]]


def normalization(trace: Trace, node: ir.Node) -> list[Axes]:
    """A channel's result depends on all others along the axes: those stay."""
    axes = list(trace.of(node.inputs[0]))
    if node.op_type == "LayerNormalization":
        mixed = range(int(attribute(node, "axis", -1)) % len(axes), len(axes))
    elif node.op_type == "LpNormalization":
        mixed = range(int(attribute(node, "axis", -1)) % len(axes), int(attribute(node, "axis", -1)) % len(axes) + 1)
    elif node.op_type == "MeanVarianceNormalization":
        mixed = range(len(axes))
    else:  # GroupNormalization, LRN
        mixed = range(1, 2)
    for axis in mixed:
        axes[axis] = trace.stays(node, axes[axis], "normalizes along it")
    for parameter in node.inputs[1:]:
        if parameter is not None:
            trace.of(parameter)
            trace.freeze(parameter, f"{node.op_type} normalizes along it")
    first = trace.shape(node.inputs[0])
    out = tuple(axes)
    return [out] + [
        tuple(
            out[i] if d == first[i] else trace.atoms.fixed(d, "one index only")
            for i, d in enumerate(trace.shape(output))
        )
        for output in node.outputs[1:]
        if output.name
    ]


def softmax(trace: Trace, node: ir.Node) -> list[Axes]:
    """The axis it sums over stays (before opset 13, all from there on)."""
    axes = list(trace.of(node.inputs[0]))
    start = int(attribute(node, "axis", -1 if trace.opset >= 13 else 1)) % max(len(axes), 1)
    end = start + 1 if trace.opset >= 13 else len(axes)
    for axis in range(start, end):
        axes[axis] = trace.stays(node, axes[axis], "sums over it")
    return [tuple(axes)]


def reduce(trace: Trace, node: ir.Node) -> list[Axes]:
    """What is reduced stays: taking one index out would change a mean, a maximum, a norm for everybody."""
    _no_sizes(trace, node)
    value = node.inputs[0]
    axes = trace.of(value)
    if node.op_type.startswith("Arg"):
        chosen: list[int] | None = [int(attribute(node, "axis", 0))]
    else:
        chosen = list(attribute(node, "axes", ())) or None
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            chosen = trace.ints(node.inputs[1])
            if chosen is None:
                raise Unfit("reduces axes that are computed")
    if not chosen:
        chosen = [] if attribute(node, "noop_with_empty_axes", 0) else list(range(len(axes)))
    reduced = {axis % max(len(axes), 1) for axis in chosen}
    kept: list[Axes] = []
    for axis, vector in enumerate(axes):
        if axis in reduced:
            trace.stays(node, vector, "reduces it")
            if attribute(node, "keepdims", 1):
                kept.append((trace.atoms.fixed(1, "one index only"),))
        else:
            kept.append((vector,))
    return [tuple(v for one in kept for v in one)]


def along(trace: Trace, node: ir.Node) -> list[Axes]:
    """CumSum: the axis it runs along stays."""
    axes = list(trace.of(node.inputs[0]))
    chosen = trace.ints(node.inputs[1])
    if chosen is None:
        raise Unfit("runs along an axis that is computed")
    axes[chosen[0]] = trace.stays(node, axes[chosen[0]], "runs along it")
    return [tuple(axes)]


def pool(trace: Trace, node: ir.Node) -> list[Axes]:
    """Channels pass; a window mixes the other axes."""
    axes = trace.of(node.inputs[0])
    for vector in axes[2:]:
        trace.stays(node, vector, "has its window along it")
    out = trace.shape(node.outputs[0])
    made: Axes = (*axes[:2], *(trace.atoms.fixed(d, "a place in an image") for d in out[2:]))
    return [made for output in node.outputs if output.name]


def resize(trace: Trace, node: ir.Node) -> list[Axes]:
    """Axes that keep their length pass; the target size of such an axis is looked after."""
    value, before, out = node.inputs[0], trace.shape(node.inputs[0]), trace.shape(node.outputs[0])
    axes = list(trace.of(value))
    named = attribute(node, "axes", None)
    for axis, vector in enumerate(axes):
        if out[axis] != before[axis]:
            trace.stays(node, vector, "resizes it")
            axes[axis] = trace.atoms.fixed(out[axis], "a place in an image")
    sizes = node.inputs[3] if len(node.inputs) > 3 else None
    if sizes is not None:
        told = trace.sizes.get(sizes)
        constant = trace.ints(sizes) is not None
        for position, axis in enumerate(named if named is not None else range(len(axes))):
            vector, size = axes[axis], told[position] if told is not None else None
            if size is not None and len(size) == len(vector):
                trace.atoms.unite(size, vector)
            elif size is not None and live(size):
                raise Unfit("resizes to the size of another axis")
            elif live(vector) and not constant:
                axes[axis] = trace.stays(node, vector, "is told its size at run time")
    return [tuple(axes)]


def quantize(trace: Trace, node: ir.Node) -> list[Axes]:
    """QuantizeLinear and DequantizeLinear: a scale per channel lies along the axis."""
    axes = trace.of(node.inputs[0])
    for parameter in node.inputs[1:]:
        shape = trace.shape(parameter) if parameter is not None else ()
        if len(shape) > 1:
            raise Unfit("has a scale per block")
        if shape and shape[0] > 1:
            trace.atoms.unite(axes[int(attribute(node, "axis", 1)) % len(axes)], trace.of(parameter)[0])
    return [axes]


def shape_of(trace: Trace, node: ir.Node) -> list[Axes]:
    """Shape: what reads it learns how many indices an axis has."""
    axes = trace.of(node.inputs[0])
    end = attribute(node, "end", None)
    told = list(axes[int(attribute(node, "start", 0)) : None if end is None else int(end)])
    trace.sizes[node.outputs[0]] = [vector if live(vector) else None for vector in told]
    return [trace.fixed((len(told),), "a size")]


def from_sizes(trace: Trace, node: ir.Node) -> list[Axes]:
    """Random numbers: other ones where less is drawn, so nothing may shrink."""
    _no_sizes(trace, node)
    for value in node.inputs:
        trace.freeze(value, f"{node.op_type} reads it")
    return [trace.fixed(trace.shape(output), f"{node.op_type} makes it") for output in node.outputs]


RULES: dict[str, Rule] = {
    **dict.fromkeys(UNARY, unary),
    **dict.fromkeys(BROADCAST, broadcast),
    **dict.fromkeys(REDUCING, reduce),
    **dict.fromkeys(POOLS, pool),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), per_channel),
    **dict.fromkeys(
        ("LayerNormalization", "GroupNormalization", "LRN", "LpNormalization", "MeanVarianceNormalization"),
        normalization,
    ),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), softmax),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), quantize),
    **dict.fromkeys(("RandomNormalLike", "RandomUniformLike"), from_sizes),
    "CumSum": along,
    **dict.fromkeys(("Resize", "Upsample"), resize),
    "Shape": shape_of,
}
