"""Shapes that hang on data: follows small constants through the arithmetic exporters write around Reshape and the like.

onnx's own inference gives up on most of it. Here every input has a size, so that the data can simply be computed.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from graphopt.residue import graphs

Array = npt.NDArray[Any]
Types = dict[str, tuple[int, tuple[int, ...]]]
"""Value -> (element type, shape), of those that are known."""

_LARGEST = 128
"""Elements up to which a value is followed; data about shapes is shorter."""

_STANDARD = ("", "ai.onnx")


_LISTED = 2**20
"""Elements of a list that onnx's data propagation may write out; a message for each."""

_MAKE_LISTS = frozenset(
    {"Reshape", "ConstantOfShape", "Expand", "Tile", "Pad", "Range", "OneHot", "Resize", "Upsample"}
)


def inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
    """``onnx.shape_inference`` with data propagation; without, where a value of one axis is long: as long as its type
    says, onnx (1.23) writes it out, and a file of a hundred bytes can say 2**62.

    Raises:
        Exception: whatever inference raises.
    """
    found = list(graphs(proto))
    if any(_long(g) or any(_makes_lists(n) for n in g.node) for g in found):
        plain = onnx.shape_inference.infer_shapes(proto)
        if any(_long(graph) for graph in graphs(plain)):
            return plain
    return onnx.shape_inference.infer_shapes(proto, data_prop=True)


def _makes_lists(node: onnx.NodeProto) -> bool:
    """Whether it may make much of little: a sparse constant too is as long as it says."""
    return node.op_type in _MAKE_LISTS or any(a.HasField("sparse_tensor") for a in node.attribute)


def _long(graph: onnx.GraphProto) -> bool:
    shapes = (v.type.tensor_type.shape.dim for v in (*graph.input, *graph.value_info, *graph.output))
    sparse = any(len(t.dims) == 1 and t.dims[0] > _LISTED for t in graph.sparse_initializer)
    return sparse or any(len(dims) == 1 and dims[0].dim_value > _LISTED for dims in shapes)


def complete(proto: onnx.ModelProto, found: Sequence[onnx.GraphProto], types: Sequence[Types]) -> None:
    """Add to ``types``, one for each graph of ``found``, what follows for its values. Never raises: it is a hint."""
    _Follower(proto, {id(graph): one for graph, one in zip(found, types, strict=True)}).walk(proto.graph, [], [])


class _Follower:
    """Goes through the nodes in order, bodies where they are met."""

    def __init__(self, proto: onnx.ModelProto, types: Mapping[int, Types]) -> None:
        self._ir_version, self._opsets, self._types = proto.ir_version, list(proto.opset_import), types
        self._version = next((o.version for o in self._opsets if o.domain in _STANDARD), 1)

    def walk(self, graph: onnx.GraphProto, outer: list[Types], outer_data: list[dict[str, Array]]) -> None:
        """One graph; what is known of the graphs around it is seen."""
        if id(graph) not in self._types:
            return
        local = [self._types[id(graph)], *outer]
        known = [{t.name: array for t in graph.initializer if (array := small_array(t)) is not None}, *outer_data]
        types, data = ChainMap(*local), ChainMap(*known)
        for node in graph.node:
            if node.domain not in _STANDARD or not node.output:
                continue
            try:
                made = evaluate(node, data, types)
            except Exception:  # a broken model, or a form of the operator that is not known here
                made = None
            if made is not None and made.size <= _LARGEST:
                data[node.output[0]] = made
            bodies = [a.g for a in node.attribute if a.HasField("g")]
            for body in bodies:
                self.walk(body, local, known)
            if any(name and name not in types for name in node.output):
                if node.op_type == "If":
                    self._agreed(node, bodies, types)
                elif not bodies:
                    self._infer(node, data, types)

    def _agreed(self, node: onnx.NodeProto, bodies: list[onnx.GraphProto], types: Any) -> None:
        """What both branches of an If make alike."""
        for index, name in enumerate(node.output):
            found = {
                self._types.get(id(body), {}).get(body.output[index].name) if index < len(body.output) else None
                for body in bodies
            }
            if name and len(found) == 1 and None not in found:
                types[name] = found.pop()

    def _infer(self, node: onnx.NodeProto, data: Mapping[str, Array], types: Any) -> None:
        """One node by onnx's rules, with what is known of its inputs and their data."""
        inputs = [name for name in node.input if name]
        if any(name not in types for name in inputs):
            return
        try:
            found = onnx.shape_inference.infer_node_outputs(
                onnx.defs.get_schema(node.op_type, self._version, ""),
                node,
                {name: helper.make_tensor_type_proto(*types[name]) for name in inputs},
                {name: numpy_helper.from_array(data[name], name) for name in inputs if name in data},
                opset_imports=self._opsets,
                ir_version=self._ir_version,
            )
        except Exception:  # no such operator, or shapes that do not fit it
            return
        for name, kind in found.items():
            tensor = kind.tensor_type
            if kind.HasField("tensor_type") and tensor.HasField("shape") and name not in types:
                dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
                if all(d >= 0 for d in dims):
                    types[name] = (tensor.elem_type, dims)


def small_array(tensor: onnx.TensorProto) -> Array | None:
    """A tensor's numbers, where they are few and of a type that is about shapes."""
    if math.prod(tensor.dims) > _LARGEST or tensor.data_location == TensorProto.EXTERNAL:
        return None
    if tensor.data_type not in (TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT, TensorProto.BOOL):
        return None
    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except Exception:  # its data is missing or of another length
        return None


def evaluate(node: onnx.NodeProto, data: Mapping[str, Array], types: Mapping[str, Any]) -> Array | None:
    """What a node makes of ``data``; None where that is not known. Raises whatever a broken node makes numpy raise."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.ref_attr_name}
    if node.op_type == "Constant":
        return _constant(attributes)
    if node.op_type in ("Shape", "Size"):
        if node.input[0] not in types:
            return None
        shape = types[node.input[0]][1]
        if node.op_type == "Size":
            return np.asarray(math.prod(shape), np.int64)
        return np.asarray(shape[attributes.get("start", 0) : attributes.get("end")], np.int64)
    rule = _RULES.get(node.op_type)
    if rule is None or any(name and name not in data for name in node.input):
        return None
    with np.errstate(all="ignore"):
        return np.asarray(rule([data[name] if name else None for name in node.input], attributes))


def _constant(attributes: Mapping[str, Any]) -> Array | None:
    if "value" in attributes:
        return small_array(attributes["value"])
    for name, kind in (("value_int", np.int64), ("value_ints", np.int64), ("value_float", np.float32)):
        if name in attributes:
            return np.asarray(attributes[name], kind)
    return None


Rule = Callable[[list[Any], Mapping[str, Any]], Any]


def _axes(x: list[Any], a: Mapping[str, Any]) -> tuple[int, ...] | None:
    given = x[1] if len(x) > 1 and x[1] is not None else a.get("axes")
    return None if given is None else tuple(int(v) for v in np.ravel(given))


def _slice(x: list[Any], a: Mapping[str, Any]) -> Any:
    starts, ends = (x[1], x[2]) if len(x) > 2 else (a["starts"], a["ends"])
    axes = x[3] if len(x) > 3 and x[3] is not None else a.get("axes", range(len(starts)))
    steps = x[4] if len(x) > 4 and x[4] is not None else [1] * len(starts)
    cut = [slice(None)] * x[0].ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        last = None if step < 0 and end < -x[0].shape[int(axis)] else int(end)
        cut[int(axis)] = slice(int(start), last, int(step))
    return x[0][tuple(cut)]


def _divide(x: list[Any], a: Mapping[str, Any]) -> Any:
    if x[0].dtype.kind != "i":
        return x[0] / x[1]
    return (np.sign(x[0]) * np.sign(x[1]) * (np.abs(x[0]) // np.abs(x[1]))).astype(x[0].dtype)


def _filled(x: list[Any], a: Mapping[str, Any]) -> Any:
    value = numpy_helper.to_array(a["value"]) if "value" in a else np.zeros(1, np.float32)
    if math.prod(map(int, x[0])) > _LARGEST:
        raise ValueError("too large to be about shapes")
    return np.full(tuple(x[0]), value[0], value.dtype)


def _expand(x: list[Any], a: Mapping[str, Any]) -> Any:
    if math.prod(map(int, x[1])) > _LARGEST:
        raise ValueError("too large to be about shapes")
    return x[0] * np.ones(tuple(x[1]), x[0].dtype)


def _range(x: list[Any], a: Mapping[str, Any]) -> Any:
    if abs(x[1] - x[0]) > _LARGEST * abs(x[2]):
        raise ValueError("too long to be about shapes")
    return np.arange(x[0], x[1], x[2], dtype=x[0].dtype)


def _reshape(x: list[Any], a: Mapping[str, Any]) -> Any:
    return x[0].reshape([x[0].shape[i] if d == 0 else int(d) for i, d in enumerate(x[1])])


_RULES: dict[str, Rule] = {
    "Identity": lambda x, a: x[0],
    "Cast": lambda x, a: x[0].astype(helper.tensor_dtype_to_np_dtype(a["to"])),
    "Gather": lambda x, a: np.take(x[0], x[1], axis=a.get("axis", 0)),
    "Concat": lambda x, a: np.concatenate(x, axis=a["axis"]),
    "Unsqueeze": lambda x, a: np.expand_dims(x[0], _axes(x, a) or 0),
    "Squeeze": lambda x, a: np.squeeze(x[0], axis=_axes(x, a)),
    "Slice": _slice,
    "Reshape": _reshape,
    "Transpose": lambda x, a: np.transpose(x[0], a.get("perm")),
    "Add": lambda x, a: x[0] + x[1],
    "Sub": lambda x, a: x[0] - x[1],
    "Mul": lambda x, a: x[0] * x[1],
    "Div": _divide,
    "Pow": lambda x, a: np.power(x[0], x[1]).astype(x[0].dtype),
    "Mod": lambda x, a: np.fmod(x[0], x[1]) if a.get("fmod") else np.mod(x[0], x[1]),
    "Neg": lambda x, a: -x[0],
    "Floor": lambda x, a: np.floor(x[0]),
    "Ceil": lambda x, a: np.ceil(x[0]),
    "Sqrt": lambda x, a: np.sqrt(x[0]),
    "Min": lambda x, a: np.minimum.reduce(x),
    "Max": lambda x, a: np.maximum.reduce(x),
    "Equal": lambda x, a: np.equal(x[0], x[1]),
    "Less": lambda x, a: np.less(x[0], x[1]),
    "Greater": lambda x, a: np.greater(x[0], x[1]),
    "Not": lambda x, a: np.logical_not(x[0]),
    "Where": lambda x, a: np.where(x[0], x[1], x[2]),
    "ReduceProd": lambda x, a: np.prod(x[0], axis=_axes(x, a), keepdims=bool(a.get("keepdims", 1))),
    "ConstantOfShape": _filled,
    "Expand": _expand,
    "Range": _range,
}
