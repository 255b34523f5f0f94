"""Store equal weights once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.graph import bodies, constant, is_op, label, nodes
from graphopt.model import tensor_buffer
from graphopt.pages import hashed
from graphopt.passes._rewire import OFF, Names
from graphopt.traversal import ir_graphs


@dataclass(frozen=True)
class DeduplicateWeights(Pass):
    """Initializers with the same type, shape and bytes become one; a body reads that of the graph around it.

    A Constant node that holds the same as an initializer goes, too.

    Weights are hashed where they lie, a slice at a time, and only those that share type and shape with another.
    Initializers that a caller may override and those that are outputs stay as they are.
    """

    name: ClassVar[str] = "deduplicate-weights"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        counts: dict[Any, int] = {}
        free = [v for graph in ir_graphs(model) for v in graph.initializers.values() if _outline(v) is not None]
        made = [v for node in nodes(model) if (v := _made(node)) is not None]
        for value in [*free, *made]:
            counts[_outline(value)] = counts.get(_outline(value), 0) + 1
        names = Names(model) if any(v.is_graph_output() for v in made) else None
        for graph, visible in _scopes(model.graph, []):
            self._graph(graph, visible, counts, context, result)
            self._constants(graph, visible, counts, names, context, result)
        overridable = sum(v.is_graph_input() for v in model.graph.initializers.values())
        if overridable:
            why = f"{overridable} initializers are graph inputs too, so a caller may replace them one by one"
            result.skipped.append(Skip("(graph)", why))
        if not result.changes and not result.skipped:
            result.skipped.append(Skip("(graph)", "no two weights are equal"))
        return result

    def _graph(
        self,
        graph: ir.Graph,
        visible: list[dict[Any, ir.Value]],
        counts: dict[Any, int],
        context: Context,
        result: PassResult,
    ) -> None:
        for name, value in list(graph.initializers.items()):
            outline = _outline(value)
            if outline is None or counts[outline] < 2:
                continue
            key = (outline, _hash(value.const_value))
            first = next((known[key] for known in visible if key in known), None)
            if first is None:
                visible[-1][key] = value
                continue
            reason = None
            if value.is_graph_output():
                reason = "it is an output of its graph"
            elif not _plain(value):
                reason = "it is annotated or documented"
            elif not context.allows(self.name, name):
                reason = OFF
            if reason is not None:
                result.skipped.append(Skip(name, f"equal to '{first.name}', but {reason}"))
                continue
            result.changes.append(Change("eliminate", name, f"equal to '{first.name}'"))
            value.replace_all_uses_with(first)
            del graph.initializers[name]

    def _constants(
        self,
        graph: ir.Graph,
        visible: list[dict[Any, ir.Value]],
        counts: dict[Any, int],
        names: Names | None,
        context: Context,
        result: PassResult,
    ) -> None:
        """Constant nodes that hold what an initializer holds; those that equal each other are nodes like any others."""
        for node in list(graph):
            value = _made(node)
            if value is None or counts[_outline(value)] < 2:
                continue
            key = (_outline(value), _hash(constant(value)))
            first = next((known[key] for known in visible if key in known), None)
            if first is None or not context.allows(self.name, label(node)):
                continue
            if not value.is_graph_output():
                result.changes.append(Change("eliminate", label(node), f"Constant equal to '{first.name}'"))
                value.replace_all_uses_with(first)
                graph.remove([node], safe=True)
            elif _plain(first) and first.graph is graph and names is not None and not names.shadowed(value):
                # An output has to be a node's; so that everybody can read it, it becomes the first node.
                result.changes.append(Change("eliminate", str(first.name), f"equal to the output '{value.name}'"))
                del graph.initializers[str(first.name)]
                graph.remove([node])
                graph.insert_before(graph[0], [node]) if len(graph) else graph.append(node)
                first.replace_all_uses_with(value)
                visible[-1][key] = value


def _scopes(graph: ir.Graph, outer: list[dict[Any, ir.Value]]) -> Iterator[tuple[ir.Graph, list[dict[Any, ir.Value]]]]:
    """Every graph with the tables of weights seen from it, its own (empty at first) last."""
    visible = [*outer, {}]
    yield graph, visible
    for node in graph:
        for body in bodies(node):
            yield from _scopes(body, visible)


def _plain(value: ir.Value) -> bool:
    """Whether nothing is lost with the initializer but its bytes."""
    annotated = value.meta.get("quant_parameter_tensor_names") or value.doc_string or value.metadata_props
    return not (annotated or value.is_graph_output() or value.is_graph_input())


def _made(node: ir.Node) -> ir.Value | None:
    """What a Constant node makes, if it is a tensor."""
    return node.outputs[0] if is_op(node, "Constant") and constant(node.outputs[0]) is not None else None


def _outline(value: ir.Value) -> Any:
    """(type, shape) of a weight that nobody can override, or None."""
    tensor = constant(value)
    return None if value.is_graph_input() or tensor is None else (tensor.dtype, tuple(tensor.shape.numpy()))


def _hash(tensor: ir.TensorProtocol | None) -> Any:
    assert tensor is not None
    if tensor.dtype.is_string():
        return tuple(tensor.numpy().reshape(-1).tolist())
    return hashed(tensor_buffer(tensor))
