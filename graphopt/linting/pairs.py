"""Rules about a single QuantizeLinear or DequantizeLinear."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from graphopt.aborts import WAY_ROUND, moved_into_bodies
from graphopt.graph import constant_array, static_shape
from graphopt.linting.findings import Finding, Rule, error, warning
from graphopt.qdq import Parameters, dequantizer, is_dq, is_q, is_stored, parameters, quantizers
from graphopt.target import Target

_SINCE = {"int4": 21, "uint4": 21, "int16": 21, "uint16": 21, "float8_e4m3fn": 19, "float8_e5m2": 19}
"""The first opset whose Q and DQ take the type (ONNX operator changelog)."""

_MIDDLE = {"int8": 0, "uint8": 128, "int4": 0, "uint4": 8, "int16": 0, "uint16": 32768}


def applies(node: ir.Node) -> bool:
    """Whether the rules here are about this node."""
    return is_q(node) or is_dq(node)


def known_parameters(node: ir.Node, target: Target) -> Iterator[Finding]:
    """Scale and zero point are constants."""
    del target
    if parameters(node) is None:
        yield error(
            "parameters",
            node,
            "its scale or zero point is missing or computed at run time",
            "make them initializers; graphopt optimize folds what follows from constants",
        )


def scale(node: ir.Node, target: Target) -> Iterator[Finding]:
    """Scales are positive, finite and not so small that 1/scale overflows."""
    del target
    found = parameters(node)
    if found is None:
        return
    values = found.scale.astype(np.float64)
    bad = int((~np.isfinite(values) | (values <= 0)).sum())
    if bad:
        fix = "calibrate again with finite data; a value that is always zero gets scale 1"
        yield error("scale", node, f"{bad} of {values.size} scales are zero, negative or not finite", fix)
    elif (values < np.finfo(np.float32).tiny).any():
        yield error(
            "scale", node, "a scale is denormal, so its inverse is infinite", "use scale 1 for what is always zero"
        )


def scales_fit(node: ir.Node, target: Target) -> Iterator[Finding]:
    """As many scales as the axis has places."""
    del target
    found = parameters(node)
    shape = static_shape(node.inputs[0]) if found is not None else None
    if found is None or shape is None or not found.per_axis or found.block:
        return
    axis = found.axis + len(shape) if found.axis < 0 else found.axis
    if not 0 <= axis < len(shape) or found.scale.ndim != 1 or shape[axis] != found.scale.size:
        has = shape[axis] if 0 <= axis < len(shape) else "no"
        problem = f"{found.scale.size} scales on axis {found.axis}, where its input has {has} places"
        yield error("scales-fit", node, problem, "one scale per place of the axis, or a single one")


def since(node: ir.Node, have: int) -> Iterator[Finding]:
    """The model's opset knows the integers' type and the form of the scales."""
    found = parameters(node)
    if found is None or node.domain == "com.microsoft":
        return
    needed = max(_SINCE.get(found.kind, 10), 13 if found.per_axis else 10, 21 if found.block else 10)
    if have < needed:
        what = f"{found.kind}{' in blocks' if found.block else ' per axis' if found.per_axis else ''}"
        fix = f"graphopt optimize --passes upgrade-opset, or export with opset {needed}"
        yield error("opset", node, f"{what} needs opset {needed} and the model has {have}", fix)


def activation_type(node: ir.Node, target: Target) -> Iterator[Finding]:
    """Activations have a type the target computes with, around the zero point it wants."""
    found = parameters(node)
    if found is None or not is_q(node) or is_stored(node.inputs[0]):
        return
    if found.kind not in target.activation["types"]:
        wanted = " or ".join(target.activation["types"])
        yield error(
            "activation-type", node, f"the activation is {found.kind}; {target.name} wants {wanted}", _again(target)
        )
    elif target.activation["symmetric"] and found.zero.any():
        problem = f"the zero point is {int(found.zero.reshape(-1)[0])}; {target.name} wants 0 (symmetric)"
        yield error("activation-zero-point", node, problem, _again(target))
    if found.per_axis and not found.block:
        yield error("activation-per-axis", node, "an activation has a scale per channel", _again(target))


def weight_type(node: ir.Node, target: Target) -> Iterator[Finding]:
    """Weights have a type the target computes with, symmetric where it wants that."""
    found = parameters(node)
    if found is None or not is_dq(node) or not is_stored(node.inputs[0]) or found.kind == "int32":
        return
    types = target.weight["types"]
    if found.kind not in types:
        problem = f"the weight is {found.kind}; {target.name} wants {' or '.join(types)}"
        yield error("weight-type", node, problem, _again(target))
        return
    middle = _MIDDLE.get(found.kind, 0)
    if target.weight["symmetric"] and (found.zero != middle).any():
        problem = f"weights are not symmetric (a zero point is not {middle})"
        yield error("weight-zero-point", node, problem, _again(target))
    elif found.per_axis and np.unique(found.zero).size > 1:
        problem = "zero points differ between channels; the integer kernel takes one"
        yield error("weight-zero-point", node, problem, _again(target))


def float_weight(node: ir.Node, target: Target) -> Iterator[Finding]:
    """A weight is stored as integers, not as floats that are quantized at every load."""
    if not is_q(node) or target.weight["stored"] != "integer":
        return
    stored = constant_array(node.inputs[0])
    if stored is not None and stored.size > 1:
        waste = f"{stored.nbytes} bytes of floats are stored where a quarter would do"
        yield warning("float-weight", node, waste, "graphopt optimize --passes fold-qdq-weights (bit-equal)")


def twice(node: ir.Node, target: Target) -> Iterator[Finding]:
    """No value is rounded to one grid and then to another."""
    del target
    if not is_q(node):
        return
    before = dequantizer(node.inputs[0])
    mine, theirs = parameters(node), parameters(before) if before is not None else None
    if before is None or mine is None or theirs is None or mine.same(theirs):
        return
    problem = "it rounds again what was just dequantized, with another scale or zero point"
    yield warning("rounded-twice", node, problem, "give both pairs the same parameters, or drop one of them")


def several(node: ir.Node, target: Target) -> Iterator[Finding]:
    """A value is quantized once, not anew for each reader."""
    del target
    value = node.inputs[0]
    if not is_q(node) or value is None:
        return
    readers = quantizers(value)
    if node is readers[0] and len({_key(parameters(q)) for q in readers}) > 1:
        problem = f"'{value.name}' is quantized {len(readers)} times with different parameters"
        yield warning("several-scales", node, problem, "one pair per value, read by everybody")


def deadly(node: ir.Node, target: Target) -> Iterator[Finding]:
    """ONNX Runtime lives through loading it."""
    movers = moved_into_bodies(node) if is_dq(node) and target.name.startswith("ort") else []
    if movers:
        problem = f"{movers[0][0].op_type} moves what it makes to a body, of which ONNX Runtime dies while loading"
        yield error("ends-the-process", node, problem, WAY_ROUND)


def _key(found: Parameters | None) -> object:
    return None if found is None else (found.kind, found.scale.tobytes(), found.zero.tobytes())


def _again(target: Target) -> str:
    return f"quantize the float model for it: graphopt quantize IN -o OUT --data D --target {target.name}"


RULES: tuple[Rule, ...] = (
    known_parameters,
    scale,
    scales_fit,
    activation_type,
    weight_type,
    float_weight,
    twice,
    several,
    deadly,
)
