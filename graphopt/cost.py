"""Multiply-accumulates per node, from shapes. Unknown is None, never an end and never a guess."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import onnx

from graphopt import propagation
from graphopt.model import graphs

Shape = tuple[int, ...]


def macs(
    op_type: str, inputs: Sequence[Shape | None], output: Shape | None, attributes: Mapping[str, Any]
) -> int | None:
    """MACs of one node: 0 for operators that multiply no matrices, None where a shape is missing.

    ``inputs`` and ``output`` are concrete shapes; of the ``attributes`` only Gemm's ``transA`` is looked at.
    """
    count = _COUNTERS.get(op_type)
    if count is None:
        return 0
    first, second = (*inputs[:2], None, None)[:2]
    if first is None or second is None or (output is None and op_type not in _RECURRENT):
        return None
    try:
        return int(count(first, second, output or (), attributes))
    except (IndexError, ValueError, ZeroDivisionError):  # shapes that do not fit the operator: a broken model
        return None


def _conv(x: Shape, w: Shape, y: Shape, attributes: Mapping[str, Any]) -> int:
    return math.prod(y) * math.prod(w[1:])  # w is [C_out, C_in / group, k...]


def _conv_transpose(x: Shape, w: Shape, y: Shape, attributes: Mapping[str, Any]) -> int:
    return math.prod(x) * math.prod(w[1:])  # w is [C_in, C_out / group, k...]: each input element meets all of w[c]


def _matmul(a: Shape, b: Shape, y: Shape, attributes: Mapping[str, Any]) -> int:
    return math.prod(y) * (a[-1] if a else 1)


def _gemm(a: Shape, b: Shape, y: Shape, attributes: Mapping[str, Any]) -> int:
    return math.prod(y) * a[0 if attributes.get("transA", 0) else 1]


def _recurrent(gates: int) -> Any:
    def count(x: Shape, w: Shape, y: Shape, attributes: Mapping[str, Any]) -> int:
        directions, rows, width = w  # w is [directions, gates * hidden, input]
        hidden = rows // gates
        return x[0] * x[1] * directions * rows * (width + hidden)

    return count


_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
"""Their first output, the whole sequence, is often left out, and not needed to count."""

_COUNTERS: dict[str, Any] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "ConvInteger": _conv,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "Gemm": _gemm,
    "LSTM": _recurrent(4),
    "GRU": _recurrent(3),
    "RNN": _recurrent(1),
}


def shapes(proto: onnx.ModelProto, feeds: Mapping[str, Shape] | None = None) -> dict[str, Shape]:
    """Concrete shapes by value name: inferred by onnx with the inputs fixed to ``feeds`` (symbolic dims count as 1).

    Values whose shape depends on data are missing. Never raises: inference is a hint.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    known: dict[str, Shape] = {t.name: tuple(t.dims) for g in graphs(fixed) for t in g.initializer}
    for value in fixed.graph.input:
        tensor = value.type.tensor_type
        given = (feeds or {}).get(value.name)
        for index, dim in enumerate(tensor.shape.dim):
            if given is not None and index < len(given):
                dim.dim_value = given[index]
            elif not dim.HasField("dim_value") or dim.dim_value < 0:
                dim.dim_value = 1
    del fixed.graph.value_info[:]  # shapes declared for symbolic inputs would stand in the way
    for output in fixed.graph.output:
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")
    try:
        inferred = propagation.inferred(fixed)
    except Exception:  # see above
        inferred = fixed
    for graph in graphs(inferred):
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            if value.type.HasField("tensor_type") and tensor.HasField("shape"):
                dims = [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim]
                if all(d >= 0 for d in dims):
                    known[value.name] = tuple(dims)
    return known


def node_macs(node: onnx.NodeProto, known: Mapping[str, Shape]) -> int | None:
    """:func:`macs` of a node, its shapes looked up by name."""
    attributes = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
    output = known.get(node.output[0]) if node.output else None
    return macs(node.op_type, [known.get(name) for name in node.input], output, attributes)
