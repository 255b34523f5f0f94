"""A node that keeps ONNX Runtime alive where a body reads a dequantized value."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.aborts import moved_into_bodies
from graphopt.base import Change
from graphopt.graph import fresh, is_op, label, nodes, value_names


def shield(model: ir.Model) -> list[Change]:
    """Put a Mean of one input, which copies, behind every DequantizeLinear whose value is moved and then read by a body
    from outside: of that ONNX Runtime dies (:mod:`graphopt.aborts`)."""
    taken: set[str] = set()
    changes: list[Change] = []
    for node in list(nodes(model)):
        movers = moved_into_bodies(node) if is_op(node, "DequantizeLinear") else []
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
        changes.append(Change("shield", label(node), "copied before it is moved and read by a body"))
    return changes
