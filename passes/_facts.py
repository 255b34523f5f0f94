"""Types and shapes that hold whatever the file declares: inferred from the operators and the graph's own inputs."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from graphopt.graph import is_op, nodes
from graphopt.model import clone

if TYPE_CHECKING:
    from collections.abc import Iterator

Dim = int | str | None
"""A number, the name of one dim of one graph input, or unknown."""
Shape = tuple[Dim, ...]

_Known = tuple[ir.DataType | None, Shape | None]

_DIM = "graphopt.dim:"
_SMALL = 1024
"""Bytes up to which a constant's values are shown to shape inference."""


class Facts:
    """What onnx's inference finds once everything declared is taken away.

    ``value_info``, declared outputs and the types of body inputs can lie and are not looked at. Shapes of graph inputs
    are facts, since the runtime refuses others; but two inputs may well differ in a dim of the same name. Initializers
    that a caller may override have no value. Made on first use; where inference fails nothing is known.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model

    def shape(self, value: ir.Value | None) -> Shape | None:
        """The value's shape, or None."""
        if value is None:
            return None
        if value.is_initializer() and not value.is_graph_input() and value.const_value is not None:
            return tuple(int(d) for d in value.const_value.shape.numpy())
        return self._known.get(value, (None, None))[1]

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """The value's element type, or None."""
        if value is None:
            return None
        if value.is_initializer() and value.const_value is not None:
            return value.const_value.dtype
        return self._known.get(value, (None, None))[0]

    def rank(self, value: ir.Value | None) -> int | None:
        """The number of its dims, or None."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def same_shape(self, a: ir.Value | None, b: ir.Value | None) -> bool | None:
        """Whether the two have one shape on every input; None: it cannot be said."""
        first, second = self.shape(a), self.shape(b)
        if first is None or second is None:
            return None
        if len(first) != len(second):
            return False
        if any(isinstance(p, int) and isinstance(q, int) and p != q for p, q in zip(first, second, strict=True)):
            return False
        return True if all(p is not None and p == q for p, q in zip(first, second, strict=True)) else None

    @cached_property
    def _known(self) -> dict[ir.Value, _Known]:
        try:
            inferred = onnx.shape_inference.infer_shapes(ir.to_proto(_undeclared(self._model)), data_prop=True)
        except Exception:  # inference is a hint, never a requirement
            return {}
        return dict(_pair(self._model.graph, inferred.graph))


def _undeclared(model: ir.Model) -> ir.Model:
    """A copy without weights and without declarations."""
    light = clone(model)
    top = light.graph
    for value in top.inputs:
        if value.name and value.name in top.initializers:
            del top.initializers[value.name]
        if value.shape is not None:
            dims = [d if isinstance(d, int) and d > 0 else f"{_DIM}{value.name}:{i}" for i, d in enumerate(value.shape)]
            value.shape = ir.Shape(dims)
    for graph in light.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = _stub(value.const_value, value.name or "")
        for value in graph.inputs if graph is not top else ():
            value.type = value.shape = None
    for node in nodes(light):
        for value in node.outputs:
            value.type = value.shape = None
        tensor = node.attributes["value"].value if is_op(node, "Constant") and "value" in node.attributes else None
        if isinstance(tensor, ir.TensorProtocol):
            node.attributes["value"] = ir.AttrTensor("value", _stub(tensor, ""))
    return light


def _stub(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    if tensor.dtype.is_string() or tensor.nbytes <= _SMALL:
        return tensor
    return ir.ExternalTensor("x", 0, 0, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)


def _pair(graph: ir.Graph, proto: onnx.GraphProto) -> Iterator[tuple[ir.Value, _Known]]:
    known = {v.name: v for v in (*graph.inputs, *(v for node in graph for v in node.outputs)) if v.name}
    for info in (*proto.input, *proto.value_info, *proto.output):
        tensor = info.type.tensor_type
        if info.name in known and info.type.HasField("tensor_type"):
            shape = tuple(_dim(d) for d in tensor.shape.dim) if tensor.HasField("shape") else None
            yield known[info.name], (ir.DataType(tensor.elem_type) if tensor.elem_type else None, shape)
    for node, copy in zip(graph, proto.node, strict=True):
        for attribute in copy.attribute:
            if attribute.HasField("g"):
                yield from _pair(node.attributes[attribute.name].as_graph(), attribute.g)
            for body, other in zip(
                node.attributes[attribute.name].as_graphs() if attribute.graphs else (), attribute.graphs, strict=True
            ):
                yield from _pair(body, other)


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    if dim.HasField("dim_value") and dim.dim_value >= 0:
        return int(dim.dim_value)
    return str(dim.dim_param) if dim.dim_param.startswith(_DIM) else None
