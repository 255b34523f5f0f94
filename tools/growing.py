"""How each operator is added to a random graph (see ``random_graphs.py``): inputs that fit, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import helper
from random_graphs import Dim, Graph, Value
from random_graphs import dim as fixed

TAME = ("Relu", "Neg", "Abs", "Identity", "Tanh", "Sigmoid", "LeakyRelu", "Dropout")
"""On what may be rounded otherwise: nothing that blows a last bit up."""
WILD = ("Exp", "Sqrt", "Floor", "Ceil", "Round", "Sign", "Reciprocal", "Erf", "Softplus", "Elu", "HardSigmoid")
WIDE = ("float32", "float64", "int32", "int64")
"""What ONNX Runtime has arithmetic for; the others are moved about and cast."""


def derived(sizes: tuple[int, ...], *parts: Dim) -> Dim:
    """An axis made of others: fixed where they are."""
    return Dim((sizes[0], sizes[1]), None if all(p.name is None for p in parts) else f"?{sizes}")


def total(dims: Any) -> Dim:
    """All of them in one."""
    sizes = tuple(int(np.prod([d.sizes[i] for d in dims])) for i in (0, 1))
    return derived(sizes, *dims)


def ints(graph: Graph, *numbers: int) -> str:
    """A constant list of int64."""
    return graph.constant(np.asarray(numbers, np.int64))


def unary(g: Graph) -> None:
    """One in, the same shape out."""
    v = g.any(lambda v: v.dtype != "float16" or g.maybe(0.3))
    if v is None:
        return
    if v.dtype == "bool":
        g.add(g.pick(["Not", "Identity"]), [v.name], "bool", v.dims, v.loose)
    elif v.is_float:
        ops = TAME if v.loose else TAME + WILD
        g.add(g.pick(ops), [v.name], v.dtype, v.dims, v.loose)
    elif v.dtype in WIDE or v.dtype == "int8":
        g.add(g.pick(["Neg", "Abs", "Identity", "Sign"]), [v.name], v.dtype, v.dims, v.loose)
    else:
        g.add("Identity", [v.name], v.dtype, v.dims, v.loose)


def clip(g: Graph) -> None:
    """Between constants, one of which may be absent."""
    v = g.any(lambda v: v.dtype in WIDE)
    if v is not None:
        low = g.constant(np.asarray(-1, v.dtype)) if g.maybe(0.7) else ""
        high = [g.constant(np.asarray(g.pick([1, 6]), v.dtype))] if g.maybe(0.7) or not low else []
        g.add("Clip", [v.name, low, *high], v.dtype, v.dims, v.loose)


def with_constant(g: Graph) -> None:
    """Arithmetic with a weight, which may be neutral."""
    v = g.any(lambda v: v.dtype in WIDE)
    if v is None:
        return
    op = g.pick(
        ["Add", "Sub", "Mul", "Div", "Max", "Min", "Pow"] if v.is_float and not v.loose else ["Add", "Mul", "Div"]
    )
    last = v.dims[-1].fixed if v.dims else None
    shape = g.pick([(), (1,), (1,) * (v.rank + 1)] + ([(last,)] if last else []))
    array = g.numbers(v.dtype, shape)
    if op == "Div":
        array = np.where(array == 0, np.ones_like(array), array)
    dims = v.dims if len(shape) <= v.rank else (fixed(1), *v.dims)
    names = [v.name, g.constant(array)]
    if op in ("Add", "Mul", "Sub", "Max", "Min") and g.maybe(0.3):
        names.reverse()
    if len(dims) <= 5:
        g.add(op, names, v.dtype, dims, v.loose)


def broadcast(a: Value, b: Value) -> tuple[Dim, ...] | None:
    """The axes of both together, or None where they do not go together whatever the symbols are."""
    dims = []
    for i in range(1, max(a.rank, b.rank) + 1):
        x, y = (v.dims[-i] if i <= v.rank else fixed(1) for v in (a, b))
        if x == y or y.fixed == 1:
            dims.append(x)
        elif x.fixed == 1:
            dims.append(y)
        else:
            return None
    return tuple(reversed(dims))


def _pair(g: Graph, accepts: Callable[[Value], bool]) -> tuple[Value, Value, tuple[Dim, ...]] | None:
    a = g.any(accepts)
    b = a and g.any(lambda v: v.dtype == a.dtype and accepts(v) and broadcast(a, v) is not None)
    if a is None or b is None:
        return None
    dims = broadcast(a, b)
    return None if dims is None else (a, b, dims)


def binary(g: Graph) -> None:
    """Arithmetic, logic or a comparison of two values."""
    found = _pair(g, lambda v: v.dtype in WIDE or v.dtype == "bool")
    if found is None:
        return
    a, b, dims = found
    loose = a.loose or b.loose
    if a.dtype == "bool":
        g.add(g.pick(["And", "Or", "Xor"]), [a.name, b.name], "bool", dims, loose)
    elif g.maybe(0.3) and not loose:
        ops = ["Equal", "Less", "Greater"] + (["LessOrEqual", "GreaterOrEqual"] if g.opset > 13 else [])
        g.add(g.pick(ops), [a.name, b.name], "bool", dims, False)
    else:
        ops = ["Add", "Sub", "Mul", *(["Max", "Min", "Sum", "Mean"] if a.dtype in ("float32", "float64") else [])]
        g.add(g.pick(ops), [a.name, b.name], a.dtype, dims, loose)


def where(g: Graph) -> None:
    """One or the other."""
    found = _pair(g, lambda v: v.dtype in ("float32", "float64", "int64", "int32", "uint8"))
    if found is None:
        return
    a, b, dims = found
    c = g.any(lambda v: v.dtype == "bool" and v.rank <= len(dims) and v.dims == dims[len(dims) - v.rank :])
    name = c.name if c is not None else g.constant(np.asarray(g.maybe(0.5)))
    g.add("Where", [name, a.name, b.name], a.dtype, dims, a.loose or b.loose or (c is not None and c.loose))


def cast(g: Graph) -> None:
    """To another type, at times and back."""
    v = g.any()
    if v is None:
        return
    narrow = [] if v.is_float else ["int16", "int8", "uint8", "bool"]  # out of range is undefined
    to = g.pick(["float32", "float64", "float16"] if v.loose else ["float32", "float64", "int64", "int32", *narrow])
    if v.is_float and to in ("int64", "int32"):
        v = g.add("Clip", [v.name, g.constant(np.asarray(-9, v.dtype)), g.constant(np.asarray(9, v.dtype))],
                  v.dtype, v.dims, v.loose)  # fmt: skip
        isnan = g.add("IsNaN", [v.name], "bool", v.dims, False)
        v = g.add("Where", [isnan.name, g.constant(np.asarray(0, v.dtype)), v.name], v.dtype, v.dims, v.loose)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(to))
    g.add("Cast", [v.name], to, v.dims, v.loose or to == "float16", to=kind)


def transpose(g: Graph) -> None:
    """Any order of the axes, spelled out or left to its default."""
    v = g.any(lambda v: v.rank > 1)
    if v is not None:
        perm = list(range(v.rank))
        g.rnd.shuffle(perm)
        plain = perm == perm[::-1] or (perm == sorted(perm, reverse=True) and g.maybe(0.5))
        attributes: dict[str, Any] = {} if plain and perm == sorted(perm, reverse=True) else {"perm": perm}
        g.add("Transpose", [v.name], v.dtype, [v.dims[a] for a in perm], v.loose, **attributes)


def reshape(g: Graph) -> None:
    """By a constant with 0 and -1, or by a shape that is computed."""
    v = g.any(lambda v: v.rank > 0)
    if v is None:
        return
    kind = g.rnd.randrange(4)
    if kind == 0:
        g.add("Reshape", [v.name, ints(g, -1)], v.dtype, [total(v.dims)], v.loose)
    elif kind == 1 and v.rank > 1:
        at = g.rnd.randrange(1, v.rank)
        g.add("Reshape", [v.name, ints(g, *([0] * at), -1)], v.dtype, [*v.dims[:at], total(v.dims[at:])], v.loose)
    elif kind == 2 and v.rank < 5:
        given = [0 if d.fixed is None or g.maybe(0.5) else d.fixed for d in v.dims]
        g.add("Reshape", [v.name, ints(g, *given, 1)], v.dtype, [*v.dims, fixed(1)], v.loose)
    else:
        shape = g.add("Shape", [v.name], "int64", [fixed(v.rank)], False)
        head = g.add("Gather", [shape.name, ints(g, 0)], "int64", [fixed(1)], False)
        target = g.add("Concat", [head.name, ints(g, -1)], "int64", [fixed(2)], False, axis=0)
        g.add("Reshape", [v.name, target.name], v.dtype, [v.dims[0], total(v.dims[1:])], v.loose)


def flatten(g: Graph) -> None:
    """Two axes of all."""
    v = g.any(lambda v: v.rank > 0)
    if v is not None:
        at = g.rnd.randrange(v.rank + 1)
        g.add("Flatten", [v.name], v.dtype, [total(v.dims[:at]), total(v.dims[at:])], v.loose, axis=at)


def squeeze(g: Graph) -> None:
    """Without an axis of one, counted from either end."""
    v = g.any(lambda v: any(d.fixed == 1 for d in v.dims))
    if v is not None:
        axis = g.pick([a for a, d in enumerate(v.dims) if d.fixed == 1])
        left = [d for a, d in enumerate(v.dims) if a != axis]
        g.add("Squeeze", [v.name, ints(g, g.pick([axis, axis - v.rank]))], v.dtype, left, v.loose)


def unsqueeze(g: Graph) -> None:
    """With one more axis."""
    v = g.any(lambda v: v.rank < 4)
    if v is not None:
        axis = g.rnd.randrange(v.rank + 1)
        dims = [*v.dims[:axis], fixed(1), *v.dims[axis:]]
        g.add("Unsqueeze", [v.name, ints(g, g.pick([axis, axis - len(dims)]))], v.dtype, dims, v.loose)


def slice_(g: Graph) -> None:
    """A part, all, or everything backwards."""
    v = g.any(lambda v: v.rank > 0)
    if v is None:
        return
    axis = g.rnd.randrange(v.rank)
    d = v.dims[axis]
    start, end, step = g.pick([(0, 2**40, 1), (1, 2**40, 1), (0, -1, 1), (-1, -(2**40), -1), (0, 2, 1), (0, 2**40, 2)])
    sizes = tuple(len(range(*slice(start, end, step).indices(s))) for s in d.sizes)
    if min(sizes) > 0:
        whole = sizes == d.sizes and step == 1 and end != 2
        after = d if whole or (step == -1) else derived(sizes, d)
        dims = [after if a == axis else old for a, old in enumerate(v.dims)]
        bounds = [ints(g, n) for n in (start, end, g.pick([axis, axis - v.rank]), step)]
        g.add("Slice", [v.name, *bounds], v.dtype, dims, v.loose)


def concat(g: Graph) -> None:
    """Two or three values along an axis that may differ."""
    a = g.any(lambda v: v.rank > 0)
    if a is None:
        return
    axis = g.rnd.randrange(a.rank)

    def fits(v: Value) -> bool:
        return v.dtype == a.dtype and v.rank == a.rank and all(
            x == y for i, (x, y) in enumerate(zip(v.dims, a.dims, strict=True)) if i != axis)  # fmt: skip

    parts = [a, *(v for v in (g.any(fits) for _ in range(g.rnd.randrange(1, 3))) if v is not None)]
    sizes = tuple(sum(v.dims[axis].sizes[i] for v in parts) for i in (0, 1))
    after = derived(sizes, *(v.dims[axis] for v in parts))
    dims = [after if i == axis else d for i, d in enumerate(a.dims)]
    g.add("Concat", [v.name for v in parts], a.dtype, dims, any(v.loose for v in parts), axis=axis)


def split(g: Graph) -> None:
    """Two parts, of which one may be left unused."""
    v = g.any(lambda v: any((d.fixed or 0) > 1 for d in v.dims))
    if v is not None:
        axis = g.pick([a for a, d in enumerate(v.dims) if (d.fixed or 0) > 1])
        size = v.dims[axis].sizes[0]
        first = g.rnd.randrange(1, size)
        names = [g.fresh("s"), g.fresh("t")]
        parts = [[fixed(n) if a == axis else d for a, d in enumerate(v.dims)] for n in (first, size - first)]
        made = [Value(n, v.dtype, tuple(p), v.loose) for n, p in zip(names, parts, strict=True)]
        lengths = ints(g, first, size - first)
        g.add_many("Split", [v.name, lengths], made, axis=axis)


def pad(g: Graph) -> None:
    """By zero, one or two, with a value, reflected or repeated; by less than nothing too."""
    v = g.any(lambda v: v.dtype in ("float32", "float64", "int64") and 0 < v.rank < 5)
    if v is None:
        return
    mode = g.pick(["constant", "constant", "reflect", "edge"])
    pads = [g.pick([0, 0, 1]) if min(d.sizes) > 1 else 0 for _ in (0, 1) for d in v.dims]
    sizes = [tuple(s + pads[a] + pads[a + v.rank] for s in d.sizes) for a, d in enumerate(v.dims)]
    dims = [d if s == d.sizes else derived(s, d) for d, s in zip(v.dims, sizes, strict=True)]
    value = [g.constant(np.asarray(g.pick([0, 1]), v.dtype))] if mode == "constant" and g.maybe(0.5) else []
    g.add("Pad", [v.name, ints(g, *pads), *value], v.dtype, dims, v.loose, mode=mode)


def gather(g: Graph) -> None:
    """By constant indices, some from the end."""
    v = g.any(lambda v: v.rank > 0 and v.dtype != "int16")
    if v is not None:
        axis = g.rnd.randrange(v.rank)
        low = min(v.dims[axis].sizes)
        shape = g.pick([(), (1,), (2,), (2, 1)])
        if v.rank + len(shape) <= 5:
            picked = np.asarray([g.rnd.randrange(-low, low) for _ in range(int(np.prod(shape)))], np.int64)
            inner = [fixed(n) for n in shape]
            dims = [*v.dims[:axis], *inner, *v.dims[axis + 1 :]]
            g.add("Gather", [v.name, g.constant(picked.reshape(shape))], v.dtype, dims, v.loose, axis=axis)


def expand(g: Graph) -> None:
    """To the shape of another value, which is computed; or to what it is."""
    v = g.any(lambda v: v.dtype in ("float32", "int64", "bool", "int32", "uint8"))
    if v is None:
        return
    like = g.any(lambda o: o.rank >= v.rank and broadcast(v, o) == o.dims)
    if like is not None and g.maybe(0.6):
        shape = g.add("Shape", [like.name], "int64", [fixed(like.rank)], False)
        g.add("Expand", [v.name, shape.name], v.dtype, like.dims, v.loose)
    else:
        g.add("Expand", [v.name, ints(g, *([1] * v.rank))], v.dtype, v.dims, v.loose)


def tile(g: Graph) -> None:
    """Once or twice along each axis."""
    v = g.any(lambda v: 0 < v.rank < 5 and v.dtype in ("float32", "float64", "int64", "bool"))
    if v is not None:
        times = [g.pick([1, 1, 2]) for _ in v.dims]
        dims = [
            d if n == 1 else derived((d.sizes[0] * n, d.sizes[1] * n), d) for d, n in zip(v.dims, times, strict=True)
        ]
        g.add("Tile", [v.name, ints(g, *times)], v.dtype, dims, v.loose)


def reduce(g: Graph) -> None:
    """Over one axis, several or all, kept or not; axes as attribute or input, as the opset has it."""
    v = g.any(lambda v: v.dtype in ("float32", "float64", "int32", "int64") and v.rank > 0)
    if v is None:
        return
    ops = ["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2"]
    op = g.pick(ops[:4] if v.loose or not v.is_float else ops)
    axes = sorted(g.rnd.sample(range(v.rank), g.rnd.randrange(1, v.rank + 1)))
    keep = g.rnd.randrange(2)
    spelled = [a - v.rank if g.maybe(0.3) else a for a in axes]
    dims = [fixed(1) if a in axes else d for a, d in enumerate(v.dims) if keep or a not in axes]
    if op == "ReduceSum" or g.opset >= 18:
        g.add(op, [v.name, ints(g, *spelled)], v.dtype, dims, v.loose, keepdims=keep)
    else:
        g.add(op, [v.name], v.dtype, dims, v.loose, axes=spelled, keepdims=keep)


def arg(g: Graph) -> None:
    """The place of the largest or smallest."""
    v = g.any(lambda v: v.dtype in ("float32", "int32") and v.rank > 0 and not v.loose)
    if v is not None:
        axis, keep = g.rnd.randrange(v.rank), g.rnd.randrange(2)
        dims = [fixed(1) if a == axis else d for a, d in enumerate(v.dims) if keep or a != axis]
        g.add(g.pick(["ArgMax", "ArgMin"]), [v.name], "int64", dims, False, axis=axis, keepdims=keep)


def softmax(g: Graph) -> None:
    """Along any axis."""
    v = g.any(lambda v: v.dtype in ("float32", "float64") and v.rank > 0)
    if v is not None:
        axis = g.rnd.randrange(-v.rank, v.rank)
        g.add(
            g.pick(["Softmax", "LogSoftmax"] if not v.loose else ["Softmax"]),
            [v.name],
            v.dtype,
            v.dims,
            v.loose,
            axis=axis,
        )
