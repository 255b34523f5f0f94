"""Dequantized values that reach a body, and a node that keeps ONNX Runtime alive there."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.aborts import MOVES
from graphopt.graph import fresh, is_op, nodes, value_names


def shield(model: ir.Model) -> None:
    """Put a Mean of one input, which copies, behind every DequantizeLinear whose value is moved and then read by a body
    from outside: of that ONNX Runtime dies (:mod:`graphopt.aborts`). It sees through Identity, but not through this.
    """
    taken: set[str] = set()
    for node in list(nodes(model)):
        if not is_op(node, "DequantizeLinear"):
            continue
        movers = [(user, index) for user, index in node.outputs[0].uses() if _moved_into_a_body(user, node.graph)]
        if not movers:
            continue
        taken = taken or value_names(model)
        value, graph = node.outputs[0], node.graph
        assert isinstance(graph, ir.Graph)
        copy = ir.node("Mean", [value])
        copy.name, copy.outputs[0].name = fresh(f"{node.name}_copy", taken), fresh(f"{value.name}_copy", taken)
        copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
        graph.insert_after(node, [copy])
        for user, index in movers:
            user.replace_input_with(index, copy.outputs[0])


def _moved_into_a_body(node: ir.Node, graph: object) -> bool:
    """Whether ``node`` hands what it is given on, moved, to a body below ``graph``."""
    if node.graph is not graph or not is_op(node, *MOVES):
        return False
    uses = [user for value in node.outputs for user, _ in value.uses()]
    return any(user.graph is not graph or _moved_into_a_body(user, graph) for user in uses)
