"""Types and shapes that hold whatever the file declares: inferred from the operators and the graph's own inputs."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from graphopt import propagation
from graphopt.graph import STANDARD_DOMAINS, attribute, is_op, nodes, opset
from graphopt.model import clone
from graphopt.passes._dims import OPEN, PREFIX, Data, Dim, Shape, product, quotient, sliced, symbol, unknown, weak
from graphopt.traversal import ir_graphs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_Known = tuple[ir.DataType | None, Shape | None]

_ROUNDS = 3
"""How often inference is run again with what the sizes computed in the graph say about shapes."""
_UNKNOWN = "unk__"
_SMALL = 1024
"""Bytes up to which a constant's values are shown to shape inference."""


class Facts:
    """What onnx's inference finds once everything declared is taken away.

    ``value_info``, declared outputs and the types of body inputs can lie and are not looked at. Shapes of graph inputs
    are facts, since the runtime refuses others; but two inputs may well differ in a dim of the same name. Initializers
    that a caller may override have no value. Where onnx does not follow the arithmetic on sizes, we do (``_dims.py``).
    Made on first use; where inference fails nothing is known.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model

    def shape(self, value: ir.Value | None) -> Shape | None:
        """The value's shape, or None."""
        return self._shape_in(self._known)(value)

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
    def data(self) -> Data:
        """Integer vectors and scalars: what is known of their values."""
        return self._found[1]

    @property
    def _known(self) -> dict[ir.Value, _Known]:
        return self._found[0]

    @cached_property
    def _found(self) -> tuple[dict[ir.Value, _Known], Data]:
        version = opset(self._model)
        light = _undeclared(self._model)
        pairs = list(zip(nodes(self._model), nodes(light), strict=True))
        # Onnx has one name for a dim of all elements of a sequence, which may well differ in it.
        listed = any("Sequence" in node.op_type or "Optional" in node.op_type for node, _ in pairs)
        known: dict[ir.Value, _Known] = {}
        data = Data(self._shape_in(known), version)
        for round_ in range(_ROUNDS):
            try:
                inferred = propagation.inferred(ir.to_proto(light))
                known = dict(_pair(self._model.graph, inferred.graph, None if listed else round_))
            except Exception:  # inference is a hint, never a requirement
                break
            data = Data(self._shape_in(known), version)
            if not [None for node, twin in pairs if _follow(node, twin, data, known)]:
                break
        return known, data

    def _shape_in(self, known: dict[ir.Value, _Known]) -> Callable[[ir.Value | None], Shape | None]:
        def shape(value: ir.Value | None) -> Shape | None:
            if value is None:
                return None
            if value.is_initializer() and not value.is_graph_input() and value.const_value is not None:
                return tuple(int(d) for d in value.const_value.shape.numpy())
            return known.get(value, (None, None))[1]

        return shape


def _follow(node: ir.Node, twin: ir.Node, data: Data, known: dict[ir.Value, _Known]) -> bool:
    """Take a node's numbers down; True where they say more of its result's shape, which its twin then declares."""
    if node.domain not in STANDARD_DOMAINS or not node.outputs:
        return False
    data.visit(node)
    rule = _SHAPED.get(node.op_type)
    dtype, shape = known.get(node.outputs[0], (None, None))
    if rule is None or dtype is None or (shape is not None and not any(map(weak, shape))):
        return False
    try:
        found = rule(node, data)
    except (IndexError, ValueError, TypeError):  # a node that cannot run
        return False
    if found is None or (shape is not None and len(shape) != len(found)):
        return False
    if shape is None:
        merged = found
    else:
        merged = tuple(f if weak(s) and f is not None else s for s, f in zip(shape, found, strict=True))
    if merged == shape:
        return False
    known[node.outputs[0]] = (dtype, merged)
    twin.outputs[0].type, twin.outputs[0].shape = ir.TensorType(dtype), ir.Shape(merged)
    return True


def _reshaped(node: ir.Node, data: Data) -> Shape | None:
    source, target = data.shape(node.inputs[0]), data.of(node.inputs[1]) if len(node.inputs) > 1 else None
    if target is None or target.ndim != 1:
        return None
    dims: list[Dim] = target.tolist()
    if not attribute(node, "allowzero", 0):
        copied = (None,) * len(dims) if source is None else (*source, *[None] * len(dims))
        dims = [copied[i] if d == 0 else d for i, d in enumerate(dims)]
    if -1 in target:
        open_ = target.tolist().index(-1)
        rest = product(*(d for i, d in enumerate(dims) if i != open_))
        dims[open_] = None if source is None else quotient(product(*source), rest)
    return tuple(None if isinstance(d, int) and d < 0 else d for d in dims)


def _expanded(node: ir.Node, data: Data) -> Shape | None:
    source, target = data.shape(node.inputs[0]), data.of(node.inputs[1])
    if source is None or target is None or target.ndim != 1:
        return None
    rank = max(len(source), target.size)
    one: Dim = 1
    a = (one,) * (rank - len(source)) + source
    b = (one,) * (rank - target.size) + tuple(target.tolist())
    return tuple(_broadcast(p, q) for p, q in zip(a, b, strict=True))


def _broadcast(a: Dim, b: Dim) -> Dim:
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    return next((d for d in (a, b) if isinstance(d, int) and d > 1), None)


def _cut(node: ir.Node, data: Data) -> Shape | None:
    source, cuts = data.shape(node.inputs[0]), sliced(data, node)
    if source is None or cuts is None:
        return None
    dims = list(source)
    for axis, start, end, step in cuts:
        dim = source[axis]
        if step == 1 and start == 0 and dim is not None and (end == dim or (isinstance(end, int) and end >= OPEN)):
            continue
        if isinstance(dim, int) and isinstance(start, int) and isinstance(end, int) and step > 0:
            dims[axis] = len(range(dim)[start:end:step])
        else:
            dims[axis] = None
    return tuple(dims)


def _tiled(node: ir.Node, data: Data) -> Shape | None:
    source, repeats = data.shape(node.inputs[0]), data.of(node.inputs[1]) if data.version >= 6 else None
    if source is None or repeats is None or repeats.shape != (len(source),):
        return None
    return tuple(product(d, r) for d, r in zip(source, repeats.tolist(), strict=True))


def _resized(node: ir.Node, data: Data) -> Shape | None:
    if attribute(node, "axes", None) is not None or attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        return None
    sizes = data.of(node.inputs[3]) if len(node.inputs) > 3 else None
    return tuple(sizes.tolist()) if sizes is not None and sizes.ndim == 1 else None


def _listed(node: ir.Node, data: Data) -> Shape | None:
    shape = data.of(node.inputs[0])
    return tuple(shape.tolist()) if shape is not None and shape.ndim == 1 else None


_SHAPED: dict[str, Callable[[ir.Node, Data], Shape | None]] = {
    "Reshape": _reshaped,
    "Expand": _expanded,
    "Slice": _cut,
    "Tile": _tiled,
    "Resize": _resized,
    "ConstantOfShape": _listed,
}
"""Operators whose result's shape hangs on data."""


def _undeclared(model: ir.Model) -> ir.Model:
    """A copy without weights and without declarations."""
    light = clone(model)
    top = light.graph
    for position, value in enumerate(top.inputs):
        if value.name and value.name in top.initializers:
            del top.initializers[value.name]
        if value.shape is not None:
            dims = [d if isinstance(d, int) and d > 0 else symbol(position, i) for i, d in enumerate(value.shape)]
            value.shape = ir.Shape(dims)
    for graph in ir_graphs(light):
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


def _pair(graph: ir.Graph, proto: onnx.GraphProto, round_: int | None) -> Iterator[tuple[ir.Value, _Known]]:
    known = {v.name: v for v in (*graph.inputs, *(v for node in graph for v in node.outputs)) if v.name}
    for info in (*proto.input, *proto.value_info, *proto.output):
        tensor = info.type.tensor_type
        if info.name in known and info.type.HasField("tensor_type"):
            shape = tuple(_dim(d, round_) for d in tensor.shape.dim) if tensor.HasField("shape") else None
            yield known[info.name], (ir.DataType(tensor.elem_type) if tensor.elem_type else None, shape)
    for node, copy in zip(graph, proto.node, strict=True):
        for item in copy.attribute:
            if item.HasField("g"):
                yield from _pair(node.attributes[item.name].as_graph(), item.g, round_)
            for body, other in zip(
                node.attributes[item.name].as_graphs() if item.graphs else (), item.graphs, strict=True
            ):
                yield from _pair(body, other, round_)


def _dim(dim: onnx.TensorShapeProto.Dimension, round_: int | None) -> Dim:
    """onnx gives a dim that it cannot tell a name, and hands the name on: what bears it has one size."""
    if dim.HasField("dim_value") and dim.dim_value >= 0:
        return int(dim.dim_value)
    if dim.dim_param.startswith(_UNKNOWN) and round_ is not None:
        return unknown(f"{round_}.{dim.dim_param.removeprefix(_UNKNOWN)}")
    return str(dim.dim_param) if dim.dim_param.startswith(PREFIX) else None
