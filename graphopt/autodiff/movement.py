"""Operators that only move elements."""

from __future__ import annotations

import math

import numpy as np

from graphopt.autodiff.rules import Call, rule


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(c: Call) -> None:
    c.give(0, c.e.reshape(c.grad, c.shape(c.x[0])))


@rule("Transpose")
def _transpose(c: Call) -> None:
    rank = len(c.shape(c.x[0]))
    perm = list(c.attribute("perm", range(rank)[::-1]))
    c.give(0, c.e.transpose(c.grad, np.argsort(perm).tolist()))


@rule("Concat")
def _concat(c: Call) -> None:
    axis = int(c.attribute("axis", 0)) % len(c.shape(c.y[0]))
    start = 0
    for index, name in enumerate(c.x):
        size = c.shape(name)[axis]
        if c.wants(index):
            c.give(index, c.e.slice(c.grad, [axis], [start], [start + size], [1]))
        start += size


@rule("Split")
def _split(c: Call) -> None:
    axis = int(c.attribute("axis", 0)) % len(c.shape(c.x[0]))
    parts = [c.e.zeros(c.shape(name)) if g is None else g for name, g in zip(c.y, c.g, strict=True) if name]
    c.give(0, c.e.concat(parts, axis))


@rule("Slice")
def _slice(c: Call) -> None:
    e = c.e
    shape, inner = c.shape(c.x[0]), c.shape(c.y[0])
    starts, ends = c.number(1).reshape(-1).tolist(), c.number(2).reshape(-1).tolist()
    axes = c.number(3).reshape(-1).tolist() if c.has(3) else list(range(len(starts)))
    steps = c.number(4).reshape(-1).tolist() if c.has(4) else [1] * len(starts)
    g, now = c.grad, list(inner)
    before, after = [0] * len(shape), [0] * len(shape)
    for start, end, raw, step in zip(starts, ends, axes, steps, strict=True):
        axis = raw % len(shape)
        taken = range(*slice(start, end if end > -(2**31) else None, step).indices(shape[axis]))
        if now[axis] == 0:
            before[axis] = shape[axis]
            continue
        if step < 0:
            g = e.slice(g, [axis], [-1], [-(2**31)], [-1])
        g = e.spread(g, tuple(now), axis, abs(step))
        now[axis] = (now[axis] - 1) * abs(step) + 1
        before[axis] = min(taken)
        after[axis] = shape[axis] - before[axis] - now[axis]
    c.give(0, e.pad(g, before, after))


@rule("Pad")
def _pad(c: Call) -> None:
    """The middle comes back as it is; what was copied to the border is added to where it was copied from."""
    e = c.e
    mode = c.attribute("mode", "constant")
    if c.has(2) and c.wants(2):
        raise NotImplementedError("the value it pads with is trained")
    shape = c.shape(c.x[0])
    axes = [int(a) % len(shape) for a in c.number(3).reshape(-1)] if c.has(3) else list(range(len(shape)))
    amounts = c.number(1).reshape(-1).tolist()
    g, now = c.grad, list(c.shape(c.y[0]))
    for axis, before, after in zip(axes, amounts[: len(axes)], amounts[len(axes) :], strict=True):
        size = shape[axis]
        if not before and not after:
            continue
        start = max(before, 0)
        middle = e.slice(g, [axis], [start], [now[axis] - max(after, 0)], [1])
        low, high = max(-before, 0), max(-after, 0)  # what a negative amount cut off
        lead, trail = [0] * len(shape), [0] * len(shape)
        lead[axis], trail[axis] = low, high
        parts = [e.pad(middle, lead, trail)]
        if mode != "constant":
            source = np.pad(np.arange(size), (max(before, 0), max(after, 0)), mode=mode)
            for first, indices in ((0, source[: max(before, 0)]), (start + size, source[start + size :])):
                if len(indices):
                    now_shape = (*now[:axis], len(indices), *now[axis + 1 :])
                    piece = e.slice(g, [axis], [first], [first + len(indices)], [1])
                    parts.append(_returned(c, piece, now_shape, axis, indices, size))
        g = e.total(parts)
        now[axis] = size
    c.give(0, g)


def _returned(c: Call, piece: str, shape: tuple[int, ...], axis: int, indices: np.ndarray, size: int) -> str:
    """A copied border, at the places it was copied from and zero elsewhere."""
    least, most = int(indices.min()), int(indices.max())
    matrix = np.zeros((len(indices), most - least + 1))
    matrix[np.arange(len(indices)), indices - least] = 1
    found = c.e.along(piece, shape, axis, matrix)
    before, after = [0] * len(shape), [0] * len(shape)
    before[axis], after[axis] = least, size - 1 - most
    return c.e.pad(found, before, after)


@rule("Expand")
def _expand(c: Call) -> None:
    c.give(0, c.e.sum_to(c.grad, c.shape(c.y[0]), c.shape(c.x[0])))


@rule("Tile")
def _tile(c: Call) -> None:
    shape, repeats = c.shape(c.x[0]), c.number(1).reshape(-1).tolist()
    split = [n for pair in zip(repeats, shape, strict=True) for n in pair]
    summed = c.e.sum(c.e.reshape(c.grad, split), list(range(0, len(split), 2)), keep=False)
    c.give(0, c.e.reshape(summed, shape))


@rule("Gather")
def _gather(c: Call) -> None:
    """Added up at the rows that were taken: by padding where it was one, else by a scatter or a 0/1 product."""
    e = c.e
    shape, indices = c.shape(c.x[0]), c.shape(c.x[1])
    axis = int(c.attribute("axis", 0)) % len(shape)
    known = c.constants.get(c.x[1])
    if known is not None and known.size == 1:
        row = int(known.reshape(-1)[0]) % shape[axis]
        before, after = [0] * len(shape), [0] * len(shape)
        before[axis], after[axis] = row, shape[axis] - 1 - row
        c.give(0, e.pad(e.reshape(c.grad, (*shape[:axis], 1, *shape[axis + 1 :])), before, after))
        return
    count, rest = math.prod(indices), (*shape[:axis], *shape[axis + 1 :])
    flat = e.reshape(c.grad, (*shape[:axis], count, *shape[axis + 1 :]))
    order = [axis, *(i for i in range(len(shape)) if i != axis)]
    rows = e.reshape(e.transpose(flat, order), (count, math.prod(rest)))
    where = e.reshape(_positive_indices(c, c.x[1], shape[axis]), (count, 1))
    if e.opset >= 16:
        found = e("ScatterND", e.zeros((shape[axis], math.prod(rest))), where, rows, reduction="add")
    else:
        values = e.constant(np.asarray([0, 1], np.float32))
        picked = e("OneHot", e.reshape(where, (count,)), e.integers([shape[axis]]), values, axis=0)
        found = e("MatMul", picked, rows)
    back = np.argsort(order).tolist()
    c.give(0, e.transpose(e.reshape(found, (shape[axis], *rest)), back))


def _positive_indices(c: Call, name: str, size: int) -> str:
    """Indices as int64 from 0 on."""
    e = c.e
    whole = name if c.kinds[name] == 7 else e("Cast", name, to=7)
    below = e("Cast", e("Less", whole, e.constant(np.int64(0))), to=7)
    return e("Add", whole, e("Mul", below, e.constant(np.int64(size))))


@rule("GatherElements")
def _gather_elements(c: Call) -> None:
    e = c.e
    if e.opset < 16:
        raise NotImplementedError("it needs opset 16 (ScatterElements that adds); run upgrade-opset first")
    shape = c.shape(c.x[0])
    axis = int(c.attribute("axis", 0)) % len(shape)
    where = _positive_indices(c, c.x[1], shape[axis])
    c.give(0, e("ScatterElements", e.zeros(shape), where, c.grad, axis=axis, reduction="add"))


@rule("GatherND")
def _gather_nd(c: Call) -> None:
    e = c.e
    if e.opset < 16 or c.attribute("batch_dims", 0):
        raise NotImplementedError("it needs opset 16 (ScatterND that adds) and no batch_dims")
    c.give(0, e("ScatterND", e.zeros(c.shape(c.x[0])), c.x[1], c.grad, reduction="add"))


@rule("ScatterND", "ScatterElements")
def _scatter(c: Call) -> None:
    """Without a reduction: what was overwritten gets nothing, what overwrote it gets it all."""
    e = c.e
    if c.attribute("reduction", "none") not in ("none", "add"):
        raise NotImplementedError(f"its reduction '{c.attribute('reduction', 'none')}'")
    elements = c.node.op_type == "ScatterElements"
    if c.wants(0):
        if c.attribute("reduction", "none") == "add":
            c.give(0, c.grad)
        else:
            extra = {"axis": c.attribute("axis", 0)} if elements else {}
            c.give(0, e(c.node.op_type, c.grad, c.x[1], e.zeros(c.shape(c.x[2])), **extra))
    if c.wants(2):
        if elements:
            c.give(2, e("GatherElements", c.grad, c.x[1], axis=c.attribute("axis", 0)))
        else:
            c.give(2, e("GatherND", c.grad, c.x[1]))


@rule("DepthToSpace")
def _depth_to_space(c: Call) -> None:
    e = c.e
    n, depth, h, w = c.shape(c.x[0])
    b = int(c.attribute("blocksize", 1))
    wide = e.reshape(c.grad, (n, depth // (b * b), h, b, w, b))
    order = [0, 3, 5, 1, 2, 4] if c.attribute("mode", "DCR") == "DCR" else [0, 1, 3, 5, 2, 4]
    c.give(0, e.reshape(e.transpose(wide, order), (n, depth, h, w)))


@rule("SpaceToDepth")
def _space_to_depth(c: Call) -> None:
    c.give(0, c.e("DepthToSpace", c.grad, blocksize=int(c.attribute("blocksize", 1)), mode=c.attribute("mode", "DCR")))


@rule("Trilu")
def _trilu(c: Call) -> None:
    c.give(0, c.e("Trilu", c.grad, *c.x[1:], upper=int(c.attribute("upper", 1))))


@rule("ReverseSequence")
def _reverse_sequence(c: Call) -> None:
    time, batch = int(c.attribute("time_axis", 0)), int(c.attribute("batch_axis", 1))
    c.give(0, c.e("ReverseSequence", c.grad, c.x[1], time_axis=time, batch_axis=batch))
