"""Adding constants to a graph in the way its IR version allows, and dropping those that nothing reads any more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphopt.graph import fresh, is_op

if TYPE_CHECKING:
    from numpy.typing import NDArray


def add_constant(
    model: ir.Model, graph: ir.Graph, base: str, array: NDArray[Any], taken: set[str], before: ir.Node | None = None
) -> ir.Value:
    """A new constant in ``graph`` under a fresh name: an initializer, or a Constant node (in front of ``before``) where
    IR 3 would force an initializer to be an input too."""
    return add_tensor(model, graph, base, ir.tensor(array), taken, before)


def add_tensor(
    model: ir.Model,
    graph: ir.Graph,
    base: str,
    tensor: ir.TensorProtocol,
    taken: set[str],
    before: ir.Node | None = None,
) -> ir.Value:
    """:func:`add_constant` of a tensor that is one already; naming the value names it."""
    name = fresh(base, taken)
    tensor.name = name
    if model.ir_version >= 4:
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        graph.register_initializer(value)
        return value
    return add_constant_node(graph, name, tensor, before if before is not None else graph[0])


def add_constant_node(graph: ir.Graph, name: str, tensor: ir.TensorProtocol, before: ir.Node) -> ir.Value:
    """A Constant node that makes ``name``, in front of ``before``."""
    node = ir.node("Constant", [], attributes={"value": tensor})
    value = node.outputs[0]
    value.name = name
    value.shape = ir.Shape(tensor.shape.numpy())
    value.type = ir.TensorType(tensor.dtype)
    graph.insert_before(before, [node])
    return value


def drop_unread(*values: ir.Value | None) -> None:
    """Remove those of these constants that nothing reads any more; inputs, outputs and computed values stay."""
    for value in values:
        if value is None or value.is_graph_output() or next(iter(value.uses()), None) is not None:
            continue
        if value.is_initializer() and not value.is_graph_input():
            graph = value.graph
            if isinstance(graph, ir.Graph) and value.name and value.name in graph.initializers:
                del graph.initializers[value.name]
        elif is_op(value.producer(), "Constant"):
            producer = value.producer()
            assert producer is not None
            if producer.graph is not None:
                producer.graph.remove([producer], safe=True)


def node_bytes(node: ir.Node) -> int:
    """What a node takes in the file, but for names: which constants pay for themselves must not depend on what things
    are called, and what takes a value's place takes over its name. Attributes are counted too: a value in one is gone
    with the node."""
    proto = ir.to_proto(node)
    proto.name = ""
    proto.input[:] = [""] * len(proto.input)
    proto.output[:] = [""] * len(proto.output)
    size = int(proto.ByteSize())
    return size + 1 + varint(size)


def tensor_bytes(array: NDArray[Any]) -> int:
    """What an initializer takes in the file, but for its name: protobuf's tags and lengths, dims, type and data."""
    content = sum(1 + varint(dim) for dim in array.shape) + 4
    content += 1 + varint(array.nbytes) + array.nbytes
    return content + 1 + varint(content)


def varint(number: int) -> int:
    """Bytes that protobuf writes a number in."""
    return max(1, -(-number.bit_length() // 7))
