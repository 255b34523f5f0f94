"""Walking an onnx-ir model. onnx-ir's own iterator asks every node for its bodies through three generators: of 100,000
nodes that costs 0.1 s a walk, and a run walks some 150 times; here it is a third."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

_GRAPH, _GRAPHS = 5, 10
"""AttributeProto's numbers, which onnx-ir's enumeration shares: nothing here has to import it."""


def bodies(node: ir.Node) -> list[ir.Graph]:
    """The subgraphs a control-flow node holds."""
    found: list[ir.Graph] = []
    for item in node.attributes.data.values():
        if item.type == _GRAPH:
            found.append(item.as_graph())
        elif item.type == _GRAPHS:
            found.extend(item.as_graphs())
    return found


def nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node of the main graph and of all bodies under it, in order of execution; functions are not entered."""
    return _walk(model.graph)


def _walk(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph:
        yield node
        if node.attributes.data:
            for body in bodies(node):
                yield from _walk(body)


def ir_graphs(model: ir.Model) -> list[ir.Graph]:
    """The main graph and all bodies under it, each before those under it; functions are not entered."""
    return [model.graph, *subgraphs(model.graph)]


def subgraphs(graph: ir.Graph) -> list[ir.Graph]:
    """All bodies under ``graph``, each before those under it."""
    found: list[ir.Graph] = []
    for node in graph:
        if node.attributes.data:
            for body in bodies(node):
                found += [body, *subgraphs(body)]
    return found
