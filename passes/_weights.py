"""Adding initializers to a graph, in the way its IR version allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphopt.graph import fresh

if TYPE_CHECKING:
    from numpy.typing import NDArray


def add_constant(
    model: ir.Model, graph: ir.Graph, base: str, array: NDArray[Any], taken: set[str], before: ir.Node | None = None
) -> ir.Value:
    """A new constant in ``graph`` under a fresh name: an initializer, or a Constant node (in front of ``before``) where
    IR 3 would force an initializer to be an input too."""
    name = fresh(base, taken)
    tensor = ir.tensor(array, name=name)
    if model.ir_version >= 4:
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        graph.register_initializer(value)
        return value
    node = ir.node("Constant", [], attributes={"value": tensor})
    node.outputs[0].name = name
    node.outputs[0].shape = ir.Shape(array.shape)
    node.outputs[0].type = ir.TensorType(tensor.dtype)
    if before is not None:
        graph.insert_before(before, [node])
    else:
        graph.insert_before(graph[0], [node])
    return node.outputs[0]
