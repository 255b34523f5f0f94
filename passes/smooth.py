"""Moving the spread of activations into weights (SmoothQuant, Xiao et al. 2022), exactly.

A MatMul whose input has a few loud channels wastes the integer range on them. ``x W = (x / s) (diag(s) W)`` for any
positive scale per channel; here every ``s`` is a power of two, so that not one bit of the result changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.errors import PreconditionError
from graphopt.graph import attribute, constant_array, fresh, is_op, label, value_names
from graphopt.linear import form_of, to_matrix
from graphopt.passes._evenness import rounded_input, rounded_weight
from graphopt.passes._patterns import matches
from graphopt.passes._weights import add_constant, drop_unread

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from graphopt.gram import Seen

_STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""How much of the spread goes to the weights: s = rms(x)^a / rms(w)^(1 - a)."""

_WORTH = 0.5
"""Of the error before: what is left after must be less, or the Mul is not worth its time."""


@dataclass(frozen=True)
class Smooth(Pass):
    """Even out the channels that MatMul and Gemm layers read, where quantizing them then costs less on held-out inputs.

    The scale goes into the LayerNormalization in front where nobody else reads it, else into a Mul. ``exclude``: layers
    to leave as they are, named as for ``quantize-static``.
    """

    exclude: tuple[str, ...] = ()
    name: ClassVar[str] = "smooth"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        sites = _sites(model, self.exclude)
        if not sites:
            return result
        if context.data is None or context.layer_inputs is None:
            raise PreconditionError("smooth looks at what layers read and needs calibration data; give --data FILE")
        forms = {value: form for value, nodes in sites.items() if (form := form_of(nodes[0])) is not None}
        seen = context.layer_inputs(model, list(forms.values()))
        taken = value_names(model)
        for value, nodes in sites.items():
            site = label(nodes[0])
            if value not in forms or forms[value] not in seen or not context.allows(self.name, site):
                continue
            scale, before, after = _best(nodes, seen[forms[value]])
            if after >= _WORTH * before:  # also where there is no error to begin with
                result.skipped.append(Skip(site, f"{nodes[0].op_type}: its input's channels are even enough"))
                continue
            where = _apply(model, value, nodes, scale, taken)
            gain = 10 * np.log10(before / max(after, before * 1e-12))
            result.changes.append(
                Change("smooth", site, f"{len(nodes)} layers, by {where}; 8 bits cost {gain:.1f} dB less held-out")
            )
        return result


def _sites(model: ir.Model, exclude: Sequence[str]) -> dict[ir.Value, list[ir.Node]]:
    """Values that MatMul and Gemm layers of the main graph read, each with those layers; a layer whose weight others
    share too, or is a graph input, cannot be scaled."""
    found: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        if not is_op(node, "MatMul", "Gemm") or matches(node, exclude):
            continue
        data, form = node.inputs[0], form_of(node)
        stored = constant_array(node.inputs[1])
        if data is None or form is None or form.kind != "gemm" or form.batch or stored is None:
            continue
        assert node.inputs[1] is not None
        if stored.dtype == np.float32 and np.isfinite(stored).all() and len(list(node.inputs[1].uses())) == 1:
            found.setdefault(data, []).append(node)
    return found


def _best(nodes: list[ir.Node], seen: Seen) -> tuple[NDArray[np.float64], float, float]:
    """(the best scale per channel, the layers' error without it, with it), on held-out inputs."""
    matrices = [to_matrix(node, stored)[0] for node in nodes if (stored := constant_array(node.inputs[1])) is not None]
    weight = np.concatenate(matrices)
    held = seen.held[0].astype(np.float64)
    wanted = weight @ held
    inputs = np.sqrt(np.diagonal(seen.moments.second_moment[0]))
    outputs = np.sqrt(np.square(weight).mean(axis=0))

    def error(scale: NDArray[np.float64]) -> float:
        scaled = held / scale[:, None]
        found = rounded_weight(weight * scale) @ rounded_input(scaled)
        return float(np.square(found - wanted).mean())

    plain = np.ones(len(inputs))
    before = error(plain)
    best, lowest = plain, before
    usable = (inputs > 0) & (outputs > 0)
    if not usable.any():
        return plain, before, before
    for strength in _STRENGTHS:
        exponent = np.zeros(len(inputs))
        exponent[usable] = strength * np.log2(inputs[usable]) - (1 - strength) * np.log2(outputs[usable])
        exponent[usable] -= exponent[usable].mean()
        scale = np.exp2(np.clip(np.rint(exponent), -20, 20))
        found = error(scale)
        if found < lowest:
            best, lowest = scale, found
    return best, before, lowest


def _apply(model: ir.Model, value: ir.Value, nodes: list[ir.Node], scale: NDArray[np.float64], taken: set[str]) -> str:
    """Write the scale into the weights, and its inverse in front; the name of what it went into."""

    def scaled(old: ir.Value, factor: NDArray[np.float64], before: ir.Node) -> ir.Value:
        stored = constant_array(old)
        assert stored is not None
        name = f"{old.name}_smoothed"
        return add_constant(model, model.graph, name, (stored * factor).astype(np.float32), taken, before)

    for node in nodes:
        old = node.inputs[1]
        assert old is not None
        stored = constant_array(old)
        assert stored is not None
        by_column = node.op_type == "Gemm" and attribute(node, "transB", 0)
        node.replace_input_with(1, scaled(old, scale if by_column else scale[:, None], node))
        drop_unread(old)
    producer = value.producer()
    alone = not value.is_graph_output() and all(use.node in nodes and use.idx == 0 for use in value.uses())
    if alone and producer is not None and _affine_norm(producer, len(scale)):
        for index, parameter in enumerate(producer.inputs[1:], 1):
            if parameter is not None:
                producer.replace_input_with(index, scaled(parameter, 1 / scale, producer))
                drop_unread(parameter)
        return "the LayerNormalization in front"
    _insert_mul(model, value, nodes, scale, taken)
    return "a Mul in front"


def _affine_norm(node: ir.Node, width: int) -> bool:
    """A LayerNormalization over the last axis whose scale and bias nobody else can change."""
    if not is_op(node, "LayerNormalization") or attribute(node, "axis", -1) != -1:
        return False
    if any(output.name and next(iter(output.uses()), None) is not None for output in node.outputs[1:]):
        return False
    arrays = [constant_array(parameter) for parameter in node.inputs[1:] if parameter is not None]
    return all(array is not None and array.dtype == np.float32 and array.shape == (width,) for array in arrays)


def _insert_mul(
    model: ir.Model, value: ir.Value, nodes: list[ir.Node], scale: NDArray[np.float64], taken: set[str]
) -> None:
    factor = add_constant(
        model, model.graph, f"{value.name}_smoothing", (1 / scale).astype(np.float32), taken, nodes[0]
    )
    mul = ir.node("Mul", [value, factor])
    mul.name = fresh(f"{value.name}_smooth", taken)
    mul.outputs[0].name = fresh(f"{value.name}_smoothed", taken)
    mul.outputs[0].type, mul.outputs[0].shape = value.type, value.shape
    model.graph.insert_before(nodes[0], [mul])
    for node in nodes:
        node.replace_input_with(0, mul.outputs[0])
