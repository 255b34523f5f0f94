"""Rules of operators that move elements about: run on the atoms themselves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from graphopt.channels.atoms import live
from graphopt.channels.trace import Unfit
from graphopt.graph import attribute

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.channels.atoms import Vector
    from graphopt.channels.trace import Axes, Rule, Shape, Trace


_NUMBERED = "is told places along it by number, and its length varies"


def transpose(trace: Trace, node: ir.Node) -> list[Axes]:
    """Axes in another order."""
    axes = trace.of(node.inputs[0])
    order = attribute(node, "perm", None) or range(len(axes) - 1, -1, -1)
    return [tuple(axes[i] for i in order)]


def concat(trace: Trace, node: ir.Node) -> list[Axes]:
    """One after the other along the axis; the other axes meet."""
    given = [value for value in node.inputs if value is not None]
    if any(value in trace.sizes for value in given):
        told: list[Vector | None] = []
        for value in given:
            told += trace.sizes.get(value) or [None] * math.prod(trace.shape(value))
        trace.sizes[node.outputs[0]] = told
    axes = [trace.of(value) for value in given]
    rank = len(axes[0])
    axis = int(attribute(node, "axis", 0)) % rank
    made: list[Vector] = []
    for position in range(rank):
        if position == axis:
            made.append(np.concatenate([mine[axis] for mine in axes]))
            continue
        for mine in axes[1:]:
            trace.atoms.unite(axes[0][position], mine[position])
        made.append(axes[0][position])
    return [tuple(made)]


def split(trace: Trace, node: ir.Node) -> list[Axes]:
    """The axis in pieces."""
    axes = trace.of(node.inputs[0])
    axis = int(attribute(node, "axis", 0)) % len(axes)
    if len(node.inputs) > 1 and node.inputs[1] is not None and trace.ints(node.inputs[1]) is None:
        raise Unfit("splits into sizes that are computed")
    if node.inputs[0] in trace.sizes:
        raise Unfit("splits sizes")
    if not trace.steady(node.inputs[0], axis):
        trace.stays(node, axes[axis], _NUMBERED)
    made, start = [], 0
    for output in node.outputs:
        end = start + trace.shape(output)[axis]
        made.append((*axes[:axis], axes[axis][start:end], *axes[axis + 1 :]))
        start = end
    return made


def slice_(trace: Trace, node: ir.Node) -> list[Axes]:
    """Part of some axes."""
    value, before, out = node.inputs[0], trace.shape(node.inputs[0]), trace.shape(node.outputs[0])
    axes = list(trace.of(value))
    parts = slice_parts(trace, node, before)
    for axis, vector in enumerate(axes):
        part = parts.get(axis) if parts is not None else None
        if part is None and before[axis] != out[axis]:
            trace.stays(node, vector, "cuts it at computed places")
            axes[axis] = trace.atoms.fixed(out[axis], "cut at computed places")
        elif part is not None and len(vector[part]) < len(vector) and not trace.steady(value, axis):
            axes[axis] = trace.stays(node, vector, _NUMBERED)[part]
        elif part is not None and part.step not in (1, None) and live(vector):
            axes[axis] = trace.stays(node, vector, "takes some of it in steps")[part]
        elif part is not None:
            axes[axis] = vector[part]
    if value in trace.sizes:
        if parts is None:
            raise Unfit("cuts sizes at computed places")
        trace.sizes[node.outputs[0]] = trace.sizes[value][parts.get(0, slice(None))]
    return [tuple(axes)]


def slice_parts(trace: Trace, node: ir.Node, before: Shape) -> dict[int, slice] | None:
    """What of each axis is taken; None where that is computed."""
    if len(node.inputs) > 1:
        starts, ends = trace.ints(node.inputs[1]), trace.ints(node.inputs[2])
        axes, steps = (
            trace.ints(node.inputs[i]) if len(node.inputs) > i and node.inputs[i] is not None else None for i in (3, 4)
        )
        if starts is None or ends is None:
            return None
        if any(
            len(node.inputs) > i and node.inputs[i] is not None and trace.ints(node.inputs[i]) is None for i in (3, 4)
        ):
            return None
    else:
        starts, ends = list(attribute(node, "starts", ())), list(attribute(node, "ends", ()))
        axes, steps = list(attribute(node, "axes", ())) or None, None
    chosen = [a % len(before) for a in (axes or range(len(starts)))]
    steps = steps or [1] * len(starts)
    found: dict[int, slice] = {}
    for axis, start, end, step in zip(chosen, starts, ends, steps, strict=True):
        if step < 0 and end < -before[axis]:
            found[axis] = slice(start, None, step)
        else:
            found[axis] = slice(start, end, step)
    return found


def gather(trace: Trace, node: ir.Node) -> list[Axes]:
    """Chosen indices of one axis; of computed ones (an embedding) the axis stays and the others pass."""
    value, axes = node.inputs[0], trace.of(node.inputs[0])
    axis = int(attribute(node, "axis", 0)) % len(axes)
    indices, shape = trace.ints(node.inputs[1]), trace.shape(node.inputs[1])
    told = trace.sizes.get(value)  # type: ignore[arg-type]
    if told is not None:
        if indices is None:
            raise Unfit("picks sizes at run time")
        trace.sizes[node.outputs[0]] = [told[i] for i in indices]
    vector = axes[axis]
    picked: Axes
    if indices is None or len(shape) != 1:
        trace.stays(node, vector, "looks up single indices of it")
        picked = trace.fixed(shape, "indices that are looked up")
    else:
        picked = (vector[np.asarray(indices, np.int64)],) if indices else (vector[:0],)
        if len({i % len(vector) for i in indices}) < len(indices):
            trace.stays(node, vector, "repeats indices of it")
        if not trace.steady(value, axis):
            trace.stays(node, vector, _NUMBERED)
    trace.of(node.inputs[1])
    return [(*axes[:axis], *picked, *axes[axis + 1 :])]


def expand(trace: Trace, node: ir.Node) -> list[Axes]:
    """Axes that keep their length pass (the target then says 1 there); repeated ones are new."""
    before, out = trace.shape(node.inputs[0]), trace.shape(node.outputs[0])
    axes, target = trace.of(node.inputs[0]), node.inputs[1]
    assert target is not None
    computed = trace.ints(target) is None
    told = [None] * (len(out) - trace.shape(target)[0]) + list(trace.sizes.get(target, [None] * trace.shape(target)[0]))
    fresh = trace.fresh(node.outputs[0], out)
    made: list[Vector] = []
    for position, size in enumerate(out):
        axis, needed = position - (len(out) - len(before)), told[position]
        passes = axis >= 0 and before[axis] == size
        vector = axes[axis] if passes else fresh[position]
        if needed is not None and len(needed) == len(vector):
            trace.atoms.unite(needed, vector)
        elif needed is not None:
            raise Unfit("repeats something as often as an axis is long")
        elif passes and computed:
            vector = trace.stays(node, vector, "is told its size at run time")
        made.append(vector)
    return [tuple(made)]


def filled(trace: Trace, node: ir.Node) -> list[Axes]:
    """ConstantOfShape: all elements are equal, so it may shrink as what it meets does."""
    if any(size is not None for size in trace.sizes.get(node.inputs[0], ())):  # type: ignore[arg-type]
        raise Unfit("makes something as long as an axis is")
    return [trace.fresh(node.outputs[0], trace.shape(node.outputs[0]))]


def tile(trace: Trace, node: ir.Node) -> list[Axes]:
    """Repeated axes: the copies go together."""
    before, out = trace.shape(node.inputs[0]), trace.shape(node.outputs[0])
    if any(size is not None and live(size) for size in trace.sizes.get(node.inputs[1], ())):  # type: ignore[arg-type]
        raise Unfit("repeats something as often as an axis is long")
    axes = trace.of(node.inputs[0])
    return [
        tuple(
            np.tile(v, o // d) if d > 1 else trace.atoms.fixed(o, "repeated by Tile")
            for v, d, o in zip(axes, before, out, strict=True)
        )
    ]


def depth_to_space(trace: Trace, node: ir.Node) -> list[Axes]:
    """Channels of one place spread over a block of places: they go together."""
    axes, size = trace.of(node.inputs[0]), int(attribute(node, "blocksize", 1))
    out = trace.shape(node.outputs[0])
    if attribute(node, "mode", "DCR") == "DCR":
        rows = axes[1].reshape(size * size, -1)
    else:
        rows = axes[1].reshape(-1, size * size).T
    for row in rows[1:]:
        trace.atoms.unite(rows[0], row)
    return [(axes[0], rows[0], *_places(trace, node, axes, out))]


def space_to_depth(trace: Trace, node: ir.Node) -> list[Axes]:
    """A block of places becomes channels of one."""
    axes, size = trace.of(node.inputs[0]), int(attribute(node, "blocksize", 1))
    return [(axes[0], np.tile(axes[1], size * size), *_places(trace, node, axes, trace.shape(node.outputs[0])))]


def _places(trace: Trace, node: ir.Node, axes: Axes, out: Shape) -> Axes:
    for vector in axes[2:]:
        trace.stays(node, vector, "cuts it into blocks")
    return tuple(trace.atoms.fixed(d, "a place in an image") for d in out[2:])


def pad(trace: Trace, node: ir.Node) -> list[Axes]:
    """Axes that are padded stay."""
    before, out = trace.shape(node.inputs[0]), trace.shape(node.outputs[0])
    axes = list(trace.of(node.inputs[0]))
    amounts = trace.ints(node.inputs[1]) if len(node.inputs) > 1 else list(attribute(node, "pads", ()))
    chosen: list[int] | None = list(range(len(axes)))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        chosen = trace.ints(node.inputs[3])
    padded = set(range(len(axes)))
    if amounts is not None and chosen is not None:
        count = len(chosen)
        padded = {a % len(axes) for i, a in enumerate(chosen) if amounts[i] or amounts[i + count]}
    for axis, vector in enumerate(axes):
        if axis in padded or before[axis] != out[axis]:
            trace.stays(node, vector, "pads it")
            axes[axis] = trace.atoms.fixed(out[axis], "padded")
    return [tuple(axes)]


RULES: dict[str, Rule] = {
    "Transpose": transpose,
    "Concat": concat,
    "Split": split,
    "Slice": slice_,
    "Gather": gather,
    "Expand": expand,
    "ConstantOfShape": filled,
    "Tile": tile,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
    "Pad": pad,
}
