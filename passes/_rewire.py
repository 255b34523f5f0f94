"""Letting one value stand for another: names of outputs survive, and no body hands out what it did not make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from graphopt.graph import bodies
from graphopt.passes._weights import drop_unread
from graphopt.traversal import ir_graphs

if TYPE_CHECKING:
    import onnx_ir as ir

TWO_NAMES = "its result and what it would be replaced by are outputs under two names"
_WIDE = 64

OFF = "switched off after a failed verification"


def name_counts(model: ir.Model) -> Counter[str]:
    """How often each value name is defined; bodies beside each other may use the same."""
    found: Counter[str] = Counter()
    for graph in ir_graphs(model):
        found.update(v.name for v in graph.inputs if v.name)
        found.update(name for name, v in graph.initializers.items() if not v.is_graph_input())
        found.update(v.name for node in graph for v in node.outputs if v.name)
    return found


class Names:
    """Which graphs define a name, and how graphs are nested: whether a name may move up to an earlier node."""

    def __init__(self, model: ir.Model) -> None:
        self._parents: dict[ir.Graph, ir.Graph] = {}
        self._graphs: dict[str, list[ir.Graph]] = {}
        for graph in ir_graphs(model):
            self._parents |= {body: graph for node in graph for body in bodies(node)}
            values = (*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs))
            for name in dict.fromkeys(v.name for v in values if v.name):
                self._graphs.setdefault(name, []).append(graph)

    def shadowed(self, value: ir.Value) -> bool:
        """Whether a body below the value's graph has a value of the same name, which hides it where it comes first."""
        return any(self._below(graph, value.graph) for graph in self._graphs.get(value.name or "", ()))

    def _below(self, graph: ir.Graph, outer: ir.Graph | ir.Function | None) -> bool:
        above = self._parents.get(graph)
        while above is not None and above is not outer:
            above = self._parents.get(above)
        return above is not None


def stuck(old: ir.Value, new: ir.Value, names: Names) -> str | None:
    """Why nobody can read ``new`` in place of ``old``, or None."""
    if not old.is_graph_output():
        return None
    producer = new.producer()
    if producer is None or producer.graph is not old.graph:
        return "its result is an output, and what it would be replaced by is no result of a node in the same graph"
    if new.is_graph_output():
        return TWO_NAMES
    if names.shadowed(old):
        return f"a body has a value of the same name, '{old.name}', so that the output's name cannot move"
    return None


def substitute(old: ir.Value, new: ir.Value) -> None:
    """Let everybody read ``new``; where ``old`` is an output, ``new`` takes over its name and declaration."""
    if old.is_graph_output():
        name, old.name = old.name, None
        new.name = name
        new.type, new.shape = old.type or new.type, old.shape
        new.doc_string = old.doc_string or new.doc_string
        new.metadata_props.update(old.metadata_props)
    if any(len(use.node.inputs) > _WIDE for use in old.uses()):
        _reread(old, new)
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _reread(old: ir.Value, new: ir.Value) -> None:
    """What ``replace_all_uses_with`` does for nodes of many inputs, whose list it rebuilds in Python for each of them:
    a Concat of 20,000 takes 10 s that way, 0.2 s this way."""
    for node, index in old.uses():
        inputs = list(node.inputs)
        if len(inputs) > _WIDE and hasattr(node, "_inputs"):
            inputs[index] = new
            node._inputs = tuple(inputs)
            old._remove_usage(node, index)
            new._add_usage(node, index)


def remove(dead: Iterable[ir.Node]) -> None:
    """Take out nodes whose results nobody reads any more, and the constants that only they read."""
    read: dict[ir.Value, None] = {}
    for node in dead:
        read.update(dict.fromkeys(v for v in node.inputs if v is not None))
        if node.graph is not None:
            node.graph.remove([node], safe=True)
    drop_unread(*read)


def detach(node: ir.Node) -> None:
    """Let a node that is gone read nothing any more: its bodies too, which onnx-ir leaves registered as readers."""
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)
    for body in bodies(node):
        for inner in body:
            detach(inner)
        body.outputs.clear()


def unread(value: ir.Value) -> bool:
    """Whether nothing reads the value and it is no output."""
    return not value.is_graph_output() and not value.uses()
