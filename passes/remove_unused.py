"""Remove nodes and initializers that no output depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.graph import bodies, label, nodes
from graphopt.passes._rewire import detach
from graphopt.traversal import ir_graphs


@dataclass(frozen=True)
class RemoveUnused(Pass):
    """Dead code elimination, bodies of If, Loop and Scan included (onnx-ir's, with what it removed put on record).

    Initializers that are also graph inputs stay: somebody may feed them.
    """

    name: ClassVar[str] = "remove-unused"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        before_nodes = {id(node): (node, label(node), [v.name for v in node.outputs]) for node in nodes(model)}
        inputs = list(model.graph.inputs)
        overridable = {v.name: v for v in inputs if v.name in model.graph.initializers}
        before_weights = {(id(g), n) for g in ir_graphs(model) for n in g.initializers}
        left = [node for node, _, _ in before_nodes.values()]
        while True:
            RemoveUnusedNodesPass()(model)
            kept_nodes = {id(node) for node in nodes(model)}
            gone_bodies = [node for node in left if id(node) not in kept_nodes and bodies(node)]
            if not gone_bodies:
                break
            left = [node for node in left if id(node) in kept_nodes]
            for node in gone_bodies:  # they still count as readers of what they captured
                detach(node)
        for value in overridable.values():
            if value.name and value.name not in model.graph.initializers:
                model.graph.register_initializer(value)
        after = {id(node) for node in nodes(model)}
        result = PassResult()
        for key, (node, name, outputs) in before_nodes.items():
            if key not in after:
                result.changes.append(Change("eliminate", name, f"{node.op_type}: nothing reads it"))
                continue
            # An optional output that nothing reads is left out, so that the runtime need not compute it.
            kept = {v.name for v in node.outputs if v.name}
            gone = [output for output in outputs if output and output not in kept]
            result.changes.extend(
                Change("eliminate", name, f"{node.op_type}: nothing reads '{output}'") for output in gone
            )
        after_weights = {(id(g), n) for g in ir_graphs(model) for n in g.initializers}
        result.changes.extend(
            Change("eliminate", name, "initializer: nothing reads it")
            for _, name in sorted(before_weights - after_weights, key=lambda item: item[1])
        )
        if not result.changes:
            result.skipped.append(Skip("(graph)", "every node and initializer is used"))
        return result
