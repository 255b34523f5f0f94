"""Rules of what multiplies matrices: one set of atoms ends, another starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from graphopt.channels.trace import Product, Unfit
from graphopt.graph import attribute

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from graphopt.channels.atoms import Vector
    from graphopt.channels.trace import Axes, Rule, Trace

_PLACE = "a place in an image"


def matmul(trace: Trace, node: ir.Node) -> list[Axes]:
    """The inner axis of one meets that of the other; axes before the last two broadcast."""
    first, second = trace.shape(node.inputs[0]), trace.shape(node.inputs[1])
    if len(first) < 2 or len(second) < 2:
        raise Unfit("multiplies a vector")
    a, b = trace.of(node.inputs[0]), trace.of(node.inputs[1])
    trace.atoms.unite(a[-1], b[-2])
    out = trace.shape(node.outputs[0])
    batch = trace.together([first[:-2], second[:-2]], [a[:-2], b[:-2]], out[:-2])
    trace.products.append(Product(node, ((1.0, (*batch, a[-2], a[-1], b[-1])),), a[-1], b[-1]))
    return [(*batch, a[-2], b[-1])]


def gemm(trace: Trace, node: ir.Node) -> list[Axes]:
    """As MatMul, with transposition, and a summand that broadcasts."""
    a, b = trace.of(node.inputs[0]), trace.of(node.inputs[1])
    rows, inner = a[::-1] if attribute(node, "transA", 0) else a
    other, columns = b[::-1] if attribute(node, "transB", 0) else b
    trace.atoms.unite(inner, other)
    made: Axes = (rows, columns)
    summand = node.inputs[2] if len(node.inputs) > 2 else None
    if summand is not None:
        out = trace.shape(node.outputs[0])
        trace.together([out, trace.shape(summand)], [made, trace.of(summand)], out)
    trace.products.append(Product(node, ((1.0, (rows, inner, columns)),), inner, columns))
    return [made]


def conv(trace: Trace, node: ir.Node) -> list[Axes]:
    """Channels in, channels out. Groups keep equal counts: the same places of all groups go together, and of a
    depthwise convolution whole groups go."""
    x, weight = trace.of(node.inputs[0]), trace.of(node.inputs[1])
    group, transposed = int(attribute(node, "group", 1)), node.op_type == "ConvTranspose"
    places = [*x[2:], *weight[2:]]
    for vector in places:
        trace.stays(node, vector, "has its window along it")
    shape = trace.shape(node.inputs[1])
    inner = (shape[0] // group) if transposed else shape[1]
    outer = shape[1] if transposed else shape[0] // group
    if group == 1:
        read, made = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
        trace.atoms.unite(x[1], read)
    elif inner == 1:
        read, made = x[1], _depthwise(trace, x[1], weight, outer, transposed)
    else:
        read, made = x[1], _grouped(trace, x[1], weight, group, transposed)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        trace.atoms.unite(made, trace.of(node.inputs[2])[0])
    # Of a depthwise convolution, what is made is what is read; of others in groups, both shrink within each group.
    proportional = (made,) if inner == 1 else (read, made)
    trace.products.append(Product(node, ((1.0, (x[0], *proportional)),), read, made))
    out = trace.shape(node.outputs[0])
    return [(x[0], made, *(trace.atoms.fixed(d, _PLACE) for d in out[2:]))]


def _depthwise(trace: Trace, x: Vector, weight: Axes, outer: int, transposed: bool) -> Vector:
    if transposed:
        trace.atoms.unite(x, weight[0])
        if outer > 1:  # all groups share the places of the second axis: those stay
            trace.atoms.freeze(weight[1], "a ConvTranspose in groups shares it among them")
        return np.repeat(x, outer)
    made = weight[0]
    trace.atoms.unite(np.repeat(x, outer), made)
    return made


def _grouped(trace: Trace, x: Vector, weight: Axes, group: int, transposed: bool) -> Vector:
    read = weight[0].reshape(group, -1) if transposed else np.tile(weight[1], (group, 1))
    rows = x.reshape(group, -1)
    for row, mine in zip(rows, read, strict=True):
        trace.atoms.unite(row, mine)
        trace.atoms.unite(rows[0], row)
        trace.atoms.unite(read[0], mine)
    if transposed:
        return np.tile(weight[1], group)
    made = weight[0].reshape(group, -1)
    for row in made[1:]:
        trace.atoms.unite(made[0], row)
    return weight[0]


_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent(trace: Trace, node: ir.Node) -> list[Axes]:
    """A hidden unit is one index of every gate, of the recurrence and of the states, in all directions."""
    if attribute(node, "layout", 0):
        raise Unfit("has layout 1")
    gates = _GATES[node.op_type]
    x, w, r = (trace.of(value) for value in node.inputs[:3])
    hidden = len(r[2])
    unit = r[2]
    trace.atoms.unite(x[2], w[2])
    for gate in range(gates):
        part = slice(gate * hidden, (gate + 1) * hidden)
        trace.atoms.unite(unit, w[1][part])
        trace.atoms.unite(unit, r[1][part])
    inputs: Sequence[ir.Value | None] = [*node.inputs, *[None] * (8 - len(node.inputs))]
    for value, axis in ((inputs[3], 1), (inputs[5], 2), (inputs[6], 2), (inputs[7], 1)):
        if value is not None:
            mine = trace.of(value)[axis]
            for start in range(0, len(mine), hidden):
                trace.atoms.unite(unit, mine[start : start + hidden])
    share = len(x[2]) / (len(x[2]) + hidden)
    terms = ((share, (unit, x[2])), (1 - share, (unit, unit)))
    trace.products.append(Product(node, terms, x[2], unit))
    fixed = trace.atoms.fixed(len(w[0]), "a direction")
    state: Axes = (fixed, x[1], unit)
    return [(x[0], fixed, x[1], unit), state, state][: len(node.outputs)]


def einsum(trace: Trace, node: ir.Node) -> list[Axes]:
    """Equal letters are one axis; a letter that the result lacks is summed over, as by a MatMul."""
    equation = str(attribute(node, "equation", "")).replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or any(len(set(t)) < len(t) for t in (*terms, right)):
        raise Unfit(f"computes '{equation}'")
    met: dict[str, Vector] = {}
    for letters, value in zip(terms, node.inputs, strict=True):
        for letter, vector in zip(letters, trace.of(value), strict=True):
            other = met.setdefault(letter, vector)
            if len(other) != len(vector):
                raise Unfit("broadcasts")
            trace.atoms.unite(other, vector)
    if len(terms) == 1:
        for letter in set(left) - set(right):
            trace.stays(node, met[letter], "sums over it")
    return [tuple(met[letter] for letter in right)]


RULES: dict[str, Rule] = {
    "MatMul": matmul,
    "Gemm": gemm,
    "Conv": conv,
    "ConvTranspose": conv,
    **dict.fromkeys(_GATES, recurrent),
    "Einsum": einsum,
}
