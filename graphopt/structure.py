"""Is this a well-formed graph? Names defined before use, once; outputs produced; nesting bounded.

Cheap enough to run after every pass, and independent of operator schemas, so custom operators are no problem.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphopt.errors import InternalError, ModelError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

MAX_NESTING = 50
"""Graphs in graphs. Real models nest two or three deep; the readers below recurse."""


def check_proto(proto: onnx.ModelProto, where: str) -> None:
    """Refuse what no reader could make sense of.

    Raises:
        ModelError: with the first problem found, naming the value or node.
    """
    if not proto.opset_import and not proto.functions and proto.ir_version >= 3:
        raise ModelError(f"{where} declares no opset; export it again")
    sparse = {t.values.name for t in proto.graph.sparse_initializer}
    problem = _graph_problem(proto.graph, sparse, 0)
    if problem:
        raise ModelError(f"{where} is not a valid ONNX model: {problem}; export it again")


def _graph_problem(graph: onnx.GraphProto, outer: set[str], depth: int) -> str | None:
    if depth > MAX_NESTING:
        return f"subgraphs are nested more than {MAX_NESTING} deep"
    inputs = [v.name for v in graph.input]
    if len(set(inputs)) != len(inputs):
        return f"input '{next(n for n in inputs if inputs.count(n) > 1)}' is listed twice"
    initializers = [t.name for t in graph.initializer]
    if len(set(initializers)) != len(initializers):
        seen: set[str] = set()
        twice = next(n for n in initializers if n in seen or seen.add(n))  # type: ignore[func-returns-value]
        return f"initializer '{twice}' is defined twice"
    local = set(inputs) | set(initializers) | {t.values.name for t in graph.sparse_initializer}
    produced_later = {name for node in graph.node for name in node.output if name}
    for index, node in enumerate(graph.node):
        label = f"node '{node.name or index}' ({node.op_type})"
        if not node.op_type:
            return f"node {index} has no operator type"
        for name in node.input:
            if name and name not in local and name not in outer:
                hint = "which a later node makes" if name in produced_later else "which nothing makes"
                return f"{label} reads '{name}', {hint}"
        for attribute in node.attribute:
            for body in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                problem = _graph_problem(body, outer | local, depth + 1)
                if problem:
                    return f"{problem} (in a body of {label})"
        for name in node.output:
            if name and name in local:
                return f"{label} makes '{name}' a second time"
            local.add(name)
    for value in graph.output:
        if value.name not in local and value.name not in outer:
            return f"output '{value.name}' is made by nothing"
    return None


def check_model(model: ir.Model, after: str) -> None:
    """The same after a pass, on the working copy.

    Raises:
        InternalError: the pass ``after`` broke the graph.
    """
    problem = _ir_problem(model.graph, set())
    if problem:
        raise InternalError(f"pass '{after}' left a broken graph: {problem}")


def _ir_problem(graph: ir.Graph, outer: set[ir.Value]) -> str | None:
    import onnx_ir as ir

    known = set(graph.inputs) | set(graph.initializers.values())
    names: dict[str, ir.Value] = {v.name: v for v in known if v.name}
    for name, value in graph.initializers.items():
        if value.const_value is None and value not in set(graph.inputs):
            return f"initializer '{name}' has no data"
    for node in graph:
        for read in node.inputs:
            if read is not None and read not in known and read not in outer:
                return f"node '{node.name}' ({node.op_type}) reads '{read.name}' before it is made"
        for attribute in node.attributes.values():
            bodies = (
                [attribute.value]
                if attribute.type == ir.AttributeType.GRAPH
                else attribute.value
                if attribute.type == ir.AttributeType.GRAPHS
                else []
            )
            for body in bodies:
                problem = _ir_problem(body, outer | known)
                if problem:
                    return f"{problem} (in a body of '{node.name}')"
        for value in node.outputs:
            if value.name and names.setdefault(value.name, value) is not value:
                return f"two values are named '{value.name}'"
            known.add(value)
    for value in graph.outputs:
        if value not in known and value not in outer:
            return f"output '{value.name}' is made by nothing"
    return None
