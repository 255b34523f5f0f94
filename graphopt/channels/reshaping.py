"""Reshape, Flatten, Squeeze and Unsqueeze: the atoms spread over all elements, in the new shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from graphopt.channels.atoms import live
from graphopt.channels.trace import Unfit
from graphopt.graph import attribute, is_op

if TYPE_CHECKING:
    from collections.abc import Set

    import onnx_ir as ir

    from graphopt.channels.atoms import Vector
    from graphopt.channels.trace import Axes, Rule, Shape, Trace

_FAR = 12  # nodes that are looked ahead to see what an axis is for
_CARRIES = frozenset(
    [
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Cast",
        "Identity",
        "Where",
        "Clip",
        "Relu",
        "Softmax",
        "Slice",
        "Split",
        "Pad",
        "Dropout",
        "Neg",
    ]
)


def reshape(trace: Trace, node: ir.Node) -> list[Axes]:
    """Reshape, Flatten, Squeeze, Unsqueeze: the atoms of each axis, spread over all elements, in the new shape."""
    value, out = node.inputs[0], trace.shape(node.outputs[0])
    if value in trace.sizes:
        trace.sizes[node.outputs[0]] = trace.sizes[value]
    made = _moved(trace, node, trace.of(value), trace.shape(value), out)
    if node.op_type == "Reshape":
        numbers = trace.ints(node.inputs[1])
        if numbers is None:
            _target(trace, node, trace.shape(value), made)
        else:
            made = _copies(trace, node, numbers, made)
    return [made]


def _moved(trace: Trace, node: ir.Node, axes: Axes, before: Shape, out: Shape) -> Axes:
    why = next((v[0] for v in axes if len(v) > 1 and v[0] < 0), None)
    made: list[Vector] = [
        np.full(d, why, np.int64) if d > 1 and why is not None else trace.atoms.fixed(d, "one index only") for d in out
    ]
    for axis, vector in enumerate(axes):
        if len(vector) < 2:
            continue
        lead, tail = _same_lead(before, out, axis), _same_tail(before, out, axis)
        # Axes before and after that both shapes share only repeat the pattern: one index of each is enough.
        old, new = before[lead : len(before) - tail], out[lead : len(out) - tail]
        spread = np.broadcast_to(
            vector.reshape([len(vector) if i + lead == axis else 1 for i in range(len(old))]), old
        ).reshape(new)
        _place(trace, node, spread, lead, made)
    return tuple(made)


def _same_lead(before: Shape, out: Shape, axis: int) -> int:
    count = 0
    while count < min(axis, len(out)) and before[count] == out[count]:
        count += 1
    return count


def _same_tail(before: Shape, out: Shape, axis: int) -> int:
    count = 0
    while count < min(len(before) - axis - 1, len(out)) and before[-1 - count] == out[-1 - count]:
        count += 1
    return count


def _place(trace: Trace, node: ir.Node, spread: Vector, lead: int, made: list[Vector]) -> None:
    """Find the axis of the result along which the atoms of ``spread`` lie; where they lie along several, one of them
    is chosen and what then shares an index is united."""
    varying = [a for a in range(spread.ndim) if spread.shape[a] > 1 and (spread != spread.take([0], a)).any()]
    if not varying:
        return
    start = tuple(slice(None) if a in varying else 0 for a in range(spread.ndim))
    grid = spread[start]
    chosen = varying[0]
    if len(varying) > 1 and live(grid.reshape(-1)):
        chosen = _chosen_axis(node, [a + lead for a in varying], made) - lead
    rows = np.moveaxis(grid, varying.index(chosen), 0).reshape(spread.shape[chosen], -1)
    for column in rows.T[1:]:
        trace.atoms.unite(rows[:, 0], column)
    mine = rows[:, 0].copy()
    if not live(mine):
        if not live(made[chosen + lead]):
            made[chosen + lead] = mine
        return
    other = made[chosen + lead]
    if live(other):
        trace.stays(node, other, "merges two axes that could both shrink")
        made[chosen + lead] = trace.stays(node, mine, "merges two axes that could both shrink")
    else:
        made[chosen + lead] = mine


def _chosen_axis(node: ir.Node, varying: list[int], made: list[Vector]) -> int:
    """The axis that a MatMul keeps apart (attention heads), else the longest, the last of equals."""
    heads = [axis for axis in varying if _is_batch(node.outputs[0], axis, len(made), _FAR)]
    if heads:
        return heads[-1]
    return max(varying, key=lambda axis: (len(made[axis]), axis))


def _is_batch(value: ir.Value, axis: int, rank: int, far: int) -> bool:
    """Whether a MatMul of two computed values reads ``value`` with ``axis`` before its last two."""
    for node, index in value.uses() if far else ():
        moved, wide = axis, rank
        if is_op(node, "MatMul"):
            if axis < rank - 2 and not any(v is not None and v.is_initializer() for v in node.inputs):
                return True
            continue
        if is_op(node, "Transpose") and index == 0:
            order = list(attribute(node, "perm", None) or range(rank - 1, -1, -1))
            if len(order) != rank:
                continue
            moved = order.index(axis)
        elif is_op(node, "Gather") and index == 0:
            taken = int(attribute(node, "axis", 0)) % rank
            indices = node.inputs[1]
            if taken == axis or indices is None or indices.shape is None or len(indices.shape) != 0:
                continue
            moved, wide = axis - (taken < axis), rank - 1
        elif is_op(node, "Squeeze"):
            told = node.outputs[0].shape
            if told is None or len(told) != rank - 1:
                continue
            gone = attribute(node, "axes", None)
            if gone is None and len(node.inputs) > 1 and node.inputs[1] is not None:
                known = node.inputs[1].const_value
                gone = None if known is None else known.numpy().reshape(-1).tolist()
            if gone is None or int(gone[0]) % rank == axis:
                continue
            moved, wide = axis - (int(gone[0]) % rank < axis), rank - 1
        elif node.op_type not in _CARRIES:
            continue
        if any(_is_batch(output, moved, wide, far - 1) for output in node.outputs):
            return True
    return False


def _copies(trace: Trace, node: ir.Node, numbers: list[int], made: Axes) -> Axes:
    """An axis whose length is copied (0) from the input has to shrink as that one does."""
    given = trace.of(node.inputs[0])
    found = list(made)
    for axis, number in enumerate(numbers):
        if number == 0 and live(made[axis]) and not (axis < len(given) and np.array_equal(given[axis], made[axis])):
            found[axis] = trace.stays(node, made[axis], "copies its length from another axis")
    return tuple(found)


def _target(trace: Trace, node: ir.Node, before: Shape, made: Axes) -> None:
    """A Reshape that is told its shape at run time. Where an axis may shrink, all of the shape must be known well
    enough to be written down (:func:`retargeted`), or be the size of that same axis."""
    out = tuple(len(vector) for vector in made)
    copied = {i for i in range(min(len(before), len(out))) if before[: i + 1] == out[: i + 1]}
    trace.copied[node] = trace.copied.get(node, copied) & copied
    told = trace.sizes.get(node.inputs[1]) if node.inputs[1] is not None else None
    rewritten = retargeted(node, made, trace.copied[node], trace.same) is not None
    for axis, vector in enumerate(made):
        size = told[axis] if told is not None and axis < len(told) else None
        if size is not None and len(size) == len(vector) and live(vector):
            trace.atoms.unite(size, vector)
        elif size is not None and not rewritten:
            raise Unfit("reshapes to the size of another axis")
        elif size is None and live(vector) and not rewritten:
            raise Unfit("reshapes to a shape that is computed")


def retargeted(node: ir.Node, made: Axes, copied: set[int], same: Set[tuple[str | None, int]]) -> list[int] | None:
    """The target of a Reshape as constants: sizes that are always the same, 0 for those that are copied, -1 for one
    more; None where that does not tell the shape."""
    found = [
        len(vector) if (node.outputs[0].name, axis) in same else 0 if axis in copied else -1
        for axis, vector in enumerate(made)
    ]
    return found if found.count(-1) < 2 else None


RULES: dict[str, Rule] = dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), reshape)
