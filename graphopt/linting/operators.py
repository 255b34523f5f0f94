"""Rules about the operators that Q/DQ pairs stand around."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from graphopt.graph import attribute, is_op, static_shape
from graphopt.linting.findings import Finding, Rule, error, warning
from graphopt.qdq import PAIR, Parameters, dequantizer, integers_of, is_dq, is_q, is_stored, parameters, quantizers
from graphopt.target import Target

_OFTEN_INTEGERS = ("Shape", "Size", "ArgMax", "NonZero", "Cast", "Gather", "Concat")
"""Where a type is not declared, what these make is not taken for a float."""

_BIAS_TOLERANCE = 1e-4  # relative; scales are float32 products, rounded once or twice


def layer(node: ir.Node, target: Target) -> bool:
    """Whether it multiplies an activation by stored weights."""
    return (
        is_op(node, *target.heavy)
        and len(node.inputs) > 1
        and is_stored(node.inputs[1])
        and not is_stored(node.inputs[0])
    )


def unsupported(node: ir.Node, target: Target) -> Iterator[Finding]:
    """No operator that the target's importer or integer path does not take."""
    why = target.unsupported.get(node.op_type)
    if why is not None:
        yield error(
            "unsupported", node, f"{node.op_type}: {why}", "write Q/DQ pairs instead: graphopt quantize --mode static"
        )


def half_quantized(node: ir.Node, target: Target) -> Iterator[Finding]:
    """Data and weights of a layer are both integers, or neither."""
    if not layer(node, target):
        return
    data, weight = dequantizer(node.inputs[0]), _weight_pair(node)
    if data is not None and weight is None:
        problem = f"{node.op_type}: its data is quantized and its weights are not, so it runs in float after a detour"
        yield warning("half-quantized", node, problem, "quantize its weights too, or leave the pair before it out")
    elif data is None and weight is not None:
        kind = parameters(weight)
        if kind is not None and kind.kind in ("int8", "uint8") and target.weight["only"] != "allowed":
            problem = f"{node.op_type}: its weights are quantized and its data is not"
            yield warning("half-quantized", node, problem, "quantize its data too; weights alone only save space")


def weight_axis(node: ir.Node, target: Target) -> Iterator[Finding]:
    """Scales per channel lie on the axis of the output channels."""
    if not layer(node, target) or (pair := _weight_pair(node)) is None:
        return
    found, shape = parameters(pair), static_shape(pair.inputs[0]) or static_shape(node.inputs[1])
    if found is None or not found.per_axis or found.block or shape is None:
        return
    axis, wanted = found.axis % len(shape), _output_axis(node, len(shape))
    if axis != wanted:
        problem = f"{node.op_type}: scales of its weights lie on axis {axis}; its output channels are axis {wanted}"
        yield error("weight-axis", node, problem, f"quantize the weights along axis {wanted}")


def bias(node: ir.Node, target: Target) -> Iterator[Finding]:
    """The bias has the form the target adds to its accumulator."""
    if not is_op(node, "Conv", "ConvTranspose", "Gemm") or len(node.inputs) < 3 or not layer(node, target):
        return
    pair, data, weight = dequantizer(node.inputs[2]), dequantizer(node.inputs[0]), _weight_pair(node)
    found = parameters(pair) if pair is not None else None
    if target.bias == "float32":
        if found is not None:
            problem = f"{node.op_type}: its bias is quantized; {target.name} adds biases in float"
            yield error("bias", node, problem, "keep the bias a float initializer")
        return
    if found is None or data is None or weight is None or target.bias == "any":
        return
    inner, outer = parameters(data), parameters(weight)
    if found.kind != "int32":
        yield error(
            "bias", node, f"{node.op_type}: its bias is {found.kind}, not int32", "int32 with scale data x weight"
        )
    elif found.zero.any():
        yield error("bias", node, f"{node.op_type}: its bias has a zero point", "zero point 0")
    elif inner is not None and outer is not None and not _product(found, inner, outer):
        problem = f"{node.op_type}: the scale of its bias is not that of its data times that of its weights"
        yield error("bias", node, problem, "the kernel takes the product whatever the file says: use the product")


def _product(found: Parameters, data: Parameters, weight: Parameters) -> bool:
    expected = data.scale.astype(np.float64).reshape(-1)[:1] * weight.scale.astype(np.float64).reshape(-1)
    given = found.scale.astype(np.float64).reshape(-1)
    if given.size not in (1, expected.size) and expected.size != 1:
        return False
    return bool(np.allclose(given, expected, rtol=_BIAS_TOLERANCE, atol=0))


def between(node: ir.Node, target: Target) -> Iterator[Finding]:
    """No rounding stands between a layer and the activation that is fused into it."""
    if not layer(node, target):
        return
    for q in quantizers(node.outputs[0]):
        for dq in (use.node for use in q.outputs[0].uses() if is_dq(use.node)):
            for use in dq.outputs[0].uses():
                if is_op(use.node, *target.absorbed):
                    problem = f"{node.op_type}: rounded before its {use.node.op_type}, which costs range and accuracy"
                    yield warning(
                        "pair-before-activation", node, problem, f"move the pair behind the {use.node.op_type}"
                    )


def output(node: ir.Node, target: Target) -> Iterator[Finding]:
    """A layer whose integer kernel writes integers has its output quantized."""
    if not is_op(node, *target.needs_integer_output) or not layer(node, target):
        return
    if dequantizer(node.inputs[0]) is None or _weight_pair(node) is None:
        return
    value = node.outputs[0]
    users = list(value.uses())
    if len(users) == 1 and is_op(users[0].node, *target.absorbed):
        value = users[0].node.outputs[0]
    if not quantizers(value):
        problem = f"{node.op_type}: its result '{value.name}' is not quantized, so there is no integer kernel for it"
        yield warning("output-in-float", node, problem, "put a pair behind it, or leave the layer in float")


def shared_scale(node: ir.Node, target: Target) -> Iterator[Finding]:
    """Operators that only move values have the same scale before and after."""
    if not is_op(node, *target.shared_scale) or is_stored(node.inputs[0]):
        return
    after = [found for q in quantizers(node.outputs[0]) if (found := parameters(q)) is not None]
    moved = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    before = [found for v in moved if (dq := dequantizer(v)) is not None and (found := parameters(dq)) is not None]
    if after and before and any(not found.same(after[0]) for found in before):
        problem = f"{node.op_type}: its input and output have different scales, so it is rounded twice or runs in float"
        yield warning("shared-scale", node, problem, "use the parameters of the output for its inputs, too")


def detour(node: ir.Node, target: Target) -> Iterator[Finding]:
    """No pair around an operator that has no integer kernel there: the conversions only cost."""
    if node.op_type in (*PAIR, "Constant") or not node.outputs or is_stored(node.outputs[0]):
        return
    integer = (*target.heavy, *target.bridging, *target.shared_scale, *target.absorbed, *target.integer)
    if is_op(node, *integer) or "*" in target.integer:
        return
    inputs = [v for v in node.inputs if v is not None and not is_stored(v)]
    if inputs and all(dequantizer(v) is not None for v in inputs) and any(quantizers(v) for v in node.outputs):
        problem = f"{node.op_type} has no integer kernel in {target.name}: pairs around it only convert to and fro"
        yield warning("detour", node, problem, "leave out the pairs around it")


def residual(node: ir.Node, target: Target) -> Iterator[Finding]:
    """An Add behind a layer gets its other operand in integers, so that the two are fused."""
    if target.residual != "quantized" or not is_op(node, "Add"):
        return
    pairs = [dequantizer(v) is not None for v in node.inputs if not is_stored(v)]
    made = [v.producer() for v in node.inputs if v is not None]
    behind = any(p is not None and is_op(p, "Conv") and layer(p, target) and dequantizer(p.inputs[0]) for p in made)
    if behind and len(pairs) == 2 and not any(pairs):
        problem = "Add: its residual operand is float, so the layer before it cannot write integers"
        yield warning("residual", node, problem, "put a pair on the operand that does not come from the layer")


def saturation(node: ir.Node, target: Target) -> Iterator[Finding]:
    """Full 8-bit signed weights overflow where the runtime adds pairs of u8 x s8 products in 16 bits."""
    if not target.saturates or not layer(node, target):
        return
    weights, data = integers_of(node.inputs[1]), dequantizer(node.inputs[0])
    found = parameters(data) if data is not None else None
    if weights is None or str(weights.dtype) != "int8" or found is None or found.kind != "uint8":
        return
    if node.op_type == "Conv" and weights.shape[1] == 1 and attribute(node, "group", 1) == weights.shape[0]:
        return  # the depthwise kernel widens first (tools/bench/saturation.py)
    axis = _output_axis(node, weights.ndim)
    rows = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1).astype(np.int32)
    if node.op_type == "Conv":  # the kernel walks the channels last
        rows = np.moveaxis(weights, 1, -1).reshape(weights.shape[0], -1).astype(np.int32)
    even = rows[:, : rows.shape[1] // 2 * 2].reshape(rows.shape[0], -1, 2)
    worst = np.abs(np.where(np.sign(even[..., 0]) == np.sign(even[..., 1]), even.sum(-1), 0))
    share = float((worst * 255 > 32767).mean()) if worst.size else 0.0
    if share > 0:
        problem = f"{node.op_type}: {share:.1%} of its pairs of weights can overflow int16 on x86 without VNNI"
        yield warning("saturation", node, problem, "7-bit or uint8 weights: graphopt quantize --weights auto")


def in_float(node: ir.Node, target: Target) -> Iterator[Finding]:
    """On a target without float arithmetic, everything between inputs and outputs is in integers."""
    if not target.whole or is_q(node) or is_dq(node) or is_op(node, "Constant", "Shape"):
        return
    floats = [v for v in node.inputs if v is not None and not is_stored(v) and _is_float(v)]
    if floats and not any(dequantizer(v) is not None for v in floats):
        problem = f"{node.op_type}: it reads '{floats[0].name}' in float, which {target.name} cannot compute"
        yield error("float-island", node, problem, "quantize what it reads and makes, or it runs on the CPU")


def _is_float(value: ir.Value) -> bool:
    if isinstance(value.type, ir.TensorType):
        return value.type.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    producer = value.producer()
    return producer is not None and not is_op(
        producer, "Shape", "Size", "ArgMax", "NonZero", "Cast", "Gather", "Concat"
    )


def _weight_pair(node: ir.Node) -> ir.Node | None:
    """The DQ behind the weights; a Transpose or Reshape may stand between."""
    value = node.inputs[1]
    producer = value.producer() if value is not None else None
    if producer is not None and is_op(producer, "Transpose", "Reshape", "Identity"):
        value = producer.inputs[0]
    return dequantizer(value)


def _output_axis(node: ir.Node, rank: int) -> int:
    value = node.inputs[1]
    producer = value.producer() if value is not None else None
    turned = producer is not None and is_op(producer, "Transpose")
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    last = not (node.op_type == "Gemm" and attribute(node, "transB", 0))
    axis = rank - 1 if last else 0
    return rank - 1 - axis if turned else axis


RULES: tuple[Rule, ...] = (
    unsupported,
    half_quantized,
    weight_axis,
    bias,
    between,
    output,
    shared_scale,
    detour,
    residual,
    saturation,
    in_float,
)
