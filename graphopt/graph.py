"""Read-only questions about a graph that several parts ask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.traversal import bodies as bodies
from graphopt.traversal import ir_graphs as ir_graphs
from graphopt.traversal import nodes as nodes

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "output_datatype", "softmax_precision")
"""Whole numbers that name an element type (Cast, the random ones, EyeLike, QuantizeLinear, windows, Attention)."""

STANDARD_DOMAINS = frozenset({"", "ai.onnx"})

EQUALIZED = "_equalized"
"""In the names of values whose channels were scaled between two layers: they are no numbers of the original's."""


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether ``node`` is one of these operators of the standard domain."""
    return node is not None and node.op_type in op_types and node.domain in STANDARD_DOMAINS


def label(node: ir.Node) -> str:
    """What to call a node in a report: its name, or its first output where it has none."""
    return node.name or next((v.name for v in node.outputs if v.name), None) or f"unnamed {node.op_type}"


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind a value that cannot change: an initializer nobody can override, or a Constant node."""
    if value is None:
        return None
    if value.is_initializer():
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    if is_op(node, "Constant"):
        assert node is not None
        attribute = node.attributes.get("value")
        if attribute is not None and attribute.type == ir.AttributeType.TENSOR:
            tensor: ir.TensorProtocol = attribute.as_tensor()
            return tensor
        for name in ("value_float", "value_floats", "value_int", "value_ints"):
            if name in node.attributes:
                kind = np.float32 if "float" in name else np.int64
                return ir.tensor(np.asarray(node.attributes[name].value, kind))
    return None


def constant_array(value: ir.Value | None) -> NDArray[Any] | None:
    """:func:`constant` as a numpy array (a view of the weights; never write to it)."""
    tensor = constant(value)
    return None if tensor is None else tensor.numpy()


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The attribute's plain Python value, or ``default``."""
    found = node.attributes.get(name)
    return default if found is None or found.value is None else found.value


def data_type(number: object) -> ir.DataType | None:
    """The type that a ``to`` or ``output_dtype`` means; None where it means none."""
    try:
        return ir.DataType(number)  # type: ignore[arg-type]
    except ValueError:
        return None


def tells_half(node: ir.Node) -> bool:
    """Whether something about the node says float16: a value's type or its own attributes."""
    values = (v for v in (*node.inputs, *node.outputs) if v is not None)
    return any(v.dtype == ir.DataType.FLOAT16 for v in values) or any(says_half(a) for a in node.attributes.values())


def says_half(attribute: ir.Attr) -> bool:
    """Whether the attribute is a float16 tensor, or names that type."""
    if attribute.is_ref():
        return False
    if attribute.type == ir.AttributeType.TENSOR:
        return bool(attribute.as_tensor().dtype == ir.DataType.FLOAT16)
    named = attribute.type == ir.AttributeType.INT and attribute.name in _TYPE_ATTRIBUTES
    return named and attribute.as_int() == int(ir.DataType.FLOAT16)


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape, if every dim is a known number."""
    if value is None or value.shape is None:
        return None
    dims = [d for d in value.shape if isinstance(d, int) and d >= 0]
    return tuple(dims) if len(dims) == len(value.shape) else None


def value_names(model: ir.Model) -> set[str]:
    """All value names anywhere, so that a fresh one shadows nothing."""
    names: set[str] = set()
    for graph in ir_graphs(model):
        names.update(v.name for v in graph.inputs if v.name)
        names.update(graph.initializers)
        names.update(v.name for node in graph for v in node.outputs if v.name)
    return names


def fresh(base: str, taken: set[str]) -> str:
    """``base``, or ``base_1``, ...; the name returned is added to ``taken``."""
    name, count = base, 0
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    taken.add(name)
    return name


def opset(model: ir.Model) -> int:
    """The standard operator set's version (0 where the model imports none)."""
    imports = model.opset_imports
    return int(imports.get("", imports.get("ai.onnx", 0)) or 0)
