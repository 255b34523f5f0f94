"""Which nodes calibration sees the values of: those of the main graph, in branches of an If and in bodies of loops."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from graphopt.graph import bodies, constant, is_op, nodes


class Within:
    """Which graphs calibration sees into, and which names it can tell apart."""

    def __init__(self, model: ir.Model) -> None:
        self._main = model.graph
        self._branches: dict[ir.Graph, ir.Node] = {b: n for n in nodes(model) for b in bodies(n)}
        names = [v.name for node in nodes(model) for v in node.outputs]
        names += [v.name for body in self._branches for v in body.inputs]
        self._shared = {name for name, count in Counter(names).items() if count > 1}

    def reason(self, node: ir.Node, other: ir.Value) -> str | None:
        """Why calibration cannot see what a node reads and makes, and the ``other`` value that is rounded with it; or
        None."""
        graph = node.graph
        if graph is self._main:
            return None
        data = [v for v in (*node.inputs, other) if v is not None and not v.is_initializer() and constant(v) is None]
        if any(v.graph is not graph for v in data):
            return "it is in a body and reads a value from outside, where the runtime would not make one kernel of them"
        if self._shared & {v.name for v in (*data, *node.outputs)}:
            return "it is in a body, and another body has values of the same names"
        branch = False
        while graph is not self._main:
            holder = self._branches.get(graph) if isinstance(graph, ir.Graph) else None
            if holder is None or not is_op(holder, "If", "Loop", "Scan"):
                return "it is in the body of an operator that calibration cannot see into"
            if branch and holder.op_type != "If":
                return "it is in a branch that not every turn of a loop takes, where values cannot be calibrated"
            branch = branch or holder.op_type == "If"
            graph = holder.graph
        return None
