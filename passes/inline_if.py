"""Replace an If whose condition is constant by the branch that it takes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.graph import bodies, constant_array, fresh, is_op, label, nodes
from graphopt.passes._rewire import OFF, name_counts
from graphopt.passes._weights import add_constant_node, drop_unread
from graphopt.structure import MAX_NESTING


@dataclass(frozen=True)
class InlineIf(Pass):
    """The branch's nodes and weights move up, under fresh names where theirs are taken; the other branch goes.

    The results keep the names that the If gave them. Ifs in what moved up are looked at as well.
    """

    name: ClassVar[str] = "inline-if"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        inliner: _Inliner | None = None
        for _ in range(MAX_NESTING):
            found = [node for node in nodes(model) if is_op(node, "If")]
            result.skipped = []
            made = False
            for node in found:
                if node.graph is None:
                    continue  # it went with a branch that is never taken
                reason = self._reason(node, context)
                if reason is not None:
                    result.skipped.append(Skip(label(node), reason))
                    continue
                inliner = inliner or _Inliner(model)
                taken = bool(constant_array(node.inputs[0]).any())  # type: ignore[union-attr]
                result.changes.append(Change("inline", label(node), "then_branch" if taken else "else_branch"))
                inliner.inline(node, "then_branch" if taken else "else_branch")
                made = True
            if not made:
                break
        if not result.changes and not result.skipped:
            result.skipped.append(Skip("(graph)", "there is no If"))
        return result

    def _reason(self, node: ir.Node, context: Context) -> str | None:
        condition = constant_array(node.inputs[0]) if node.inputs else None
        if condition is None:
            return "its condition is not constant"
        if condition.size != 1:
            return "its condition is not one value"
        return None if context.allows(self.name, label(node)) else OFF


class _Inliner:
    """Moves branches up; knows all names, so that a moved one shadows nothing."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.values = name_counts(model)
        self.taken = set(self.values)
        self.nodes = Counter(node.name for node in nodes(model) if node.name)
        self.node_names = set(self.nodes)

    def inline(self, node: ir.Node, branch: str) -> None:
        """Replace ``node`` by this branch of it."""
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        body = node.attributes[branch].as_graph()
        results = list(body.outputs)
        body.outputs.clear()
        moved = list(body)
        for inner in moved:
            for value in inner.outputs:
                self._rename(value)
            if inner.name and self.nodes[inner.name] > 1:
                self.nodes[inner.name] -= 1
                inner.name = fresh(inner.name, self.node_names)
                self.nodes[inner.name] = 1
        body.remove(moved)
        graph.insert_before(node, moved)
        self._move_weights(body, graph, moved[0] if moved else node)
        own = set(moved)
        for old, new in zip(node.outputs, results, strict=True):
            if old.name:
                self._hand_over(old, new, own, node)
        condition = node.inputs[0]
        _detach(node)
        graph.remove([node], safe=True)
        drop_unread(condition)

    def _rename(self, value: ir.Value) -> None:
        if value.name and self.values[value.name] > 1:
            self.values[value.name] -= 1
            value.name = fresh(value.name, self.taken)
            self.values[value.name] = 1

    def _move_weights(self, body: ir.Graph, graph: ir.Graph, before: ir.Node) -> None:
        for name, value in list(body.initializers.items()):
            del body.initializers[name]
            self._rename(value)
            tensor = value.const_value
            if self.model.ir_version >= 4:
                graph.register_initializer(value)
            elif tensor is not None and value.name:
                made_name, value.name = value.name, None
                made = add_constant_node(graph, made_name, tensor, before)
                value.replace_all_uses_with(made)

    def _hand_over(self, old: ir.Value, new: ir.Value, own: set[ir.Node], node: ir.Node) -> None:
        """``new`` under the name of ``old``; an Identity where ``new`` has to keep its own."""
        assert old.name is not None
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        name = old.name
        free = new.producer() in own and not new.is_graph_output() and self.values[name] == 1
        if not free and old.is_graph_output():
            copy = ir.node("Identity", [new])
            graph.insert_before(node, [copy])
            new, free = copy.outputs[0], True
        if free:
            old.name = None
            self.values[new.name or ""] -= 1
            new.name = name
            new.doc_string = old.doc_string or new.doc_string
            new.metadata_props.update(old.metadata_props)
        if old.is_graph_output():
            new.type, new.shape = old.type or new.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)


def _detach(node: ir.Node) -> None:
    """Let nothing in the bodies left over count as a reader of the graph around them."""
    for body in bodies(node):
        body.outputs.clear()
        for inner in body:
            _detach(inner)
            for index in range(len(inner.inputs)):
                inner.replace_input_with(index, None)
        body.remove(list(body))
