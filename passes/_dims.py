"""Integers about shapes, followed through the arithmetic that exporters write around Reshape, dims kept symbolic.

Vectors and scalars only (rank <= 1). A dim is a number, a product of sizes of graph inputs (``graphopt.dim:8*0:1`` is
eight times input 0's dim 1; ``graphopt.dim:?7:`` some size that appears nowhere in the inputs), or unknown.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.graph import attribute, constant, is_op

if TYPE_CHECKING:
    from numpy.typing import NDArray

Dim = int | str | None
Shape = tuple[Dim, ...]
PREFIX = "graphopt.dim:"
OPEN = 2**31 - 1
"""An end from which on a slice goes to the end of any axis, and what no followed number may reach."""

_LONGEST = 64
_WHOLE = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


def symbol(position: int, axis: int) -> str:
    """The size of one dim of one graph input."""
    return f"{PREFIX}{position}:{axis}"


def unknown(name: str) -> str:
    """A size of which no more is known than that it is one size."""
    return f"{PREFIX}?{name}:"


def weak(dim: Dim) -> bool:
    """Whether there may be more to say of a dim than is said."""
    return dim is None or (isinstance(dim, str) and "?" in dim)


def product(*dims: Dim) -> Dim:
    """The dims multiplied; unknown where one is, but for a zero."""
    if 0 in dims:
        return 0
    number, symbols = 1, Counter[str]()
    for dim in dims:
        if dim is None:
            return None
        coefficient, factors = _factors(dim)
        number, symbols = number * coefficient, symbols + factors
    return _named(number, symbols)


def quotient(dim: Dim, by: Dim) -> Dim:
    """``dim / by`` where that is a whole number whatever the symbols are; ``by`` is taken to be no zero."""
    if dim is None or by is None or by == 0:
        return None
    (number, symbols), (divisor, factors) = _factors(dim), _factors(by)
    if number % divisor or any(symbols[name] < count for name, count in factors.items()):
        return None
    return _named(number // divisor, symbols - factors)


def _factors(dim: int | str) -> tuple[int, Counter[str]]:
    if isinstance(dim, int):
        return dim, Counter()
    parts = dim.removeprefix(PREFIX).split("*")
    number = int(parts.pop(0)) if ":" not in parts[0] else 1
    return number, Counter(parts)


def _named(number: int, symbols: Counter[str]) -> Dim:
    if not symbols or number == 0:
        return number if abs(number) < OPEN else None
    names = sorted(symbols.elements())
    return PREFIX + "*".join([str(number), *names] if number != 1 else names)


class Data:
    """What is known of the values of integer vectors and scalars, node by node in order; booleans are 0 and 1."""

    def __init__(self, shape: Callable[[ir.Value | None], Shape | None], version: int) -> None:
        self.shape = shape
        self.version = version
        self.known: dict[ir.Value, NDArray[np.object_]] = {}

    def of(self, value: ir.Value | None) -> NDArray[np.object_] | None:
        """The entries, or None where not even their number is known."""
        if value is None:
            return None
        if value not in self.known:
            found = self._stored(value)
            if found is None:
                return None
            self.known[value] = found
        return self.known[value]

    def _stored(self, value: ir.Value) -> NDArray[np.object_] | None:
        tensor = constant(value)
        if tensor is not None and tensor.dtype in _WHOLE and len(tensor.shape) <= 1 and tensor.size <= _LONGEST:
            return _objects(tensor.numpy().astype(np.int64).tolist())
        shape = self.shape(value) if tensor is None else None
        if shape is None or len(shape) > 1 or not all(isinstance(d, int) and d <= _LONGEST for d in shape):
            return None
        return np.full([d for d in shape if isinstance(d, int)], None, object)

    def numbers(self, value: ir.Value | None) -> list[int] | None:
        """The entries, where every one is a number."""
        found = self.of(value)
        if found is None or not all(isinstance(d, int) for d in found.reshape(-1)):
            return None
        return [int(d) for d in found.reshape(-1)]

    def visit(self, node: ir.Node) -> None:
        """Follow a node of the standard operators; what is not understood stays unknown."""
        rule = _RULES.get(node.op_type)
        if rule is None or not node.outputs:
            return
        try:
            found = rule(self, node)
        except (IndexError, ValueError, TypeError):  # a node that cannot run
            return
        if found is not None and found.ndim <= 1 and found.size <= _LONGEST:
            self.known[node.outputs[0]] = _objects([_small(d) for d in found.reshape(-1)], found.shape)


def _objects(entries: Any, shape: tuple[int, ...] | None = None) -> NDArray[np.object_]:
    made = np.empty(np.shape(entries) if shape is None else shape, object)
    flat = [entries] if not isinstance(entries, list) else entries
    made.reshape(-1)[:] = flat
    return made


def _small(dim: Any) -> Dim:
    if dim is None or isinstance(dim, str):
        return dim
    return int(dim) if abs(int(dim)) < OPEN else None


Found = Any  # NDArray[np.object_] | None
Rule = Callable[[Data, ir.Node], Found]


def _shape(data: Data, node: ir.Node) -> Found:
    shape = data.shape(node.inputs[0])
    if shape is None:
        return None
    return _objects(list(shape[attribute(node, "start", 0) : attribute(node, "end", None)]))


def _size(data: Data, node: ir.Node) -> Found:
    shape = data.shape(node.inputs[0])
    return None if shape is None else _objects([product(*shape)], ())


def _same(data: Data, node: ir.Node) -> Found:
    return data.of(node.inputs[0])


def _cast(data: Data, node: ir.Node) -> Found:
    to = attribute(node, "to", None)
    found = data.of(node.inputs[0])
    return found if to in (int(ir.DataType.INT64), int(ir.DataType.INT32)) else None


def _gather(data: Data, node: ir.Node) -> Found:
    source, chosen, where = data.of(node.inputs[0]), data.numbers(node.inputs[1]), data.of(node.inputs[1])
    if source is None or chosen is None or where is None:
        return None
    if source.ndim != 1 or attribute(node, "axis", 0) not in (0, -1):
        return None
    if any(not -len(source) <= index < len(source) for index in chosen):
        return None
    return _objects([source[index] for index in chosen], where.shape)


def sliced(data: Data, node: ir.Node) -> list[tuple[int, Dim, Dim, int]] | None:
    """(axis, start, end, step) of a Slice, each axis as it is written; None where an axis or step is not known."""
    if data.version < 10:
        starts, ends = attribute(node, "starts", None), attribute(node, "ends", None)
        axes, steps = attribute(node, "axes", None), None
    else:
        starts, ends = (None if (e := data.of(v)) is None else e.tolist() for v in node.inputs[1:3])
        given = [node.inputs[i] if len(node.inputs) > i else None for i in (3, 4)]
        axes, steps = (data.numbers(v) for v in given)
        if any(v is not None and known is None for v, known in zip(given, (axes, steps), strict=True)):
            return None
    if starts is None or ends is None:
        return None
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    return list(zip(axes, starts, ends, steps, strict=True))


def _slice(data: Data, node: ir.Node) -> Found:
    source, cuts = data.of(node.inputs[0]), sliced(data, node)
    if source is None or source.ndim != 1 or cuts is None or len(cuts) != 1 or cuts[0][0] not in (0, -1):
        return None
    _, start, end, step = cuts[0]
    if not isinstance(start, int) or not isinstance(end, int) or step == 0:
        return None
    last = None if step < 0 and end < -len(source) else end
    return source[slice(start, last, step)]


def _concat(data: Data, node: ir.Node) -> Found:
    parts = [data.of(value) for value in node.inputs]
    if any(part is None or part.ndim != 1 for part in parts) or attribute(node, "axis", 0) not in (0, -1):
        return None
    return np.concatenate([part for part in parts if part is not None])


def _axes(data: Data, node: ir.Node) -> list[int] | None:
    if data.version < 13:
        axes = attribute(node, "axes", None)
        return None if axes is None else list(axes)
    return data.numbers(node.inputs[1]) if len(node.inputs) > 1 else None


def _unsqueeze(data: Data, node: ir.Node) -> Found:
    source = data.of(node.inputs[0])
    return source.reshape(1) if source is not None and not source.ndim and _axes(data, node) in ([0], [-1]) else None


def _squeeze(data: Data, node: ir.Node) -> Found:
    source = data.of(node.inputs[0])
    return source.reshape(()) if source is not None and source.shape == (1,) else None


def _reshape(data: Data, node: ir.Node) -> Found:
    source, target = data.of(node.inputs[0]), data.numbers(node.inputs[1]) if len(node.inputs) > 1 else None
    if source is None or target is None or len(target) > 1 or (target and target[0] not in (-1, source.size)):
        return None
    return source.reshape(()) if not target and source.size == 1 else source.reshape(-1) if target else None


def _add(a: Dim, b: Dim) -> Dim:
    if a == 0 or b == 0:
        return b if a == 0 else a
    return a + b if isinstance(a, int) and isinstance(b, int) else None


def _subtract(a: Dim, b: Dim) -> Dim:
    if b == 0 or a is None:
        return a
    if a == b:
        return 0
    return a - b if isinstance(a, int) and isinstance(b, int) else None


def _divide(a: Dim, b: Dim) -> Dim:
    if not isinstance(b, int) or b <= 0:
        return None
    if isinstance(a, int):
        return a // b if a >= 0 else None  # the runtime rounds towards zero
    return quotient(a, b)


def _equal(a: Dim, b: Dim) -> Dim:
    if a is None or b is None:
        return None
    if a == b or (isinstance(a, int) and isinstance(b, int)):
        return int(a == b)
    (first, _), (second, _) = _factors(a), _factors(b)
    return 0 if first * second < 0 else None  # no dim is negative


def _where(chosen: Dim, a: Dim, b: Dim) -> Dim:
    if chosen is None:
        return a if a == b else None
    return a if chosen else b


def _least(a: Dim, b: Dim) -> Dim:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else a if a == b else None


def _most(a: Dim, b: Dim) -> Dim:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else a if a == b else None


def _each(function: Callable[..., Dim], arity: int) -> Rule:
    """Entry by entry, broadcast."""
    wide = np.frompyfunc(function, arity, 1)

    def rule(data: Data, node: ir.Node) -> Found:
        given = [data.of(value) for value in node.inputs]
        if data.version < 7 or len(given) != arity or any(one is None for one in given):
            return None
        found = wide(*given)
        return found if isinstance(found, np.ndarray) else _objects([found], ())

    return rule


def _reduce(data: Data, node: ir.Node) -> Found:
    source = data.of(node.inputs[0])
    given = len(node.inputs) > 1 and node.inputs[1] is not None
    axes = data.numbers(node.inputs[1]) if given else attribute(node, "axes", [0])
    if source is None or source.ndim != 1 or axes is None or list(axes) not in ([0], [-1]):
        return None
    return _objects([product(*source)], (1,) if attribute(node, "keepdims", 1) else ())


def _filled(data: Data, node: ir.Node) -> Found:
    shape = data.numbers(node.inputs[0])
    tensor = attribute(node, "value", None)
    if shape is None or len(shape) > 1 or tensor is None or tensor.dtype not in _WHOLE or math.prod(shape) > _LONGEST:
        return None
    return _objects([int(tensor.numpy().reshape(-1)[0])] * math.prod(shape), tuple(shape))


_RULES: dict[str, Rule] = {
    "Shape": _shape,
    "Size": _size,
    "Identity": _same,
    "Cast": _cast,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Add": _each(_add, 2),
    "Sub": _each(_subtract, 2),
    "Mul": _each(product, 2),
    "Div": _each(_divide, 2),
    "Equal": _each(_equal, 2),
    "Where": _each(_where, 3),
    "Min": _each(_least, 2),
    "Max": _each(_most, 2),
    "ReduceProd": _reduce,
    "ConstantOfShape": _filled,
}


def begins(node: ir.Node) -> bool:
    """Whether the node's result may be a known size although none of its inputs is: a quick look, without shapes.

    Not where it only passes its input on, nor where it computes with a constant that is no integer.
    """
    if not is_op(node, *_RULES) or is_op(node, "Identity", "Cast", "Unsqueeze", "Squeeze"):
        return False
    stored = (constant(value) for value in node.inputs if value is not None)
    return all(tensor is None or tensor.dtype in _WHOLE for tensor in stored)
