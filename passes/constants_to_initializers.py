"""Make initializers out of Constant nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.graph import constant, is_op, label, nodes
from graphopt.passes._rewire import OFF


@dataclass(frozen=True)
class ConstantsToInitializers(Pass):
    """Under the same names, in the graph where they stand; what a graph hands out stays a node.

    Before IR 4 an initializer had to be a graph input, which a caller may override: nothing is done there.
    """

    name: ClassVar[str] = "constants-to-initializers"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        if model.ir_version < 4:
            reason = f"at IR version {model.ir_version} initializers must be inputs, which a caller may override"
            return PassResult(skipped=[Skip("(graph)", reason)])
        result = PassResult()
        for node in list(nodes(model)):
            if not is_op(node, "Constant"):
                continue
            site = label(node)
            why = _reason(node)
            if why is None and not context.allows(self.name, site):
                why = OFF
            if why is not None:
                result.skipped.append(Skip(site, why))
                continue
            result.changes.append(Change("move", site, "Constant node -> initializer"))
            _move(node)
        if not result.changes and not result.skipped:
            result.skipped.append(Skip("(graph)", "there is no Constant node"))
        return result


def _reason(node: ir.Node) -> str | None:
    """Why this Constant stays."""
    if node.outputs[0].is_graph_output():
        return "it makes an output of its graph"
    if not node.outputs[0].name:
        return "its result has no name, so nothing can read it"
    tensor = constant(node.outputs[0])
    if tensor is None:
        return f"it holds no dense tensor ({', '.join(node.attributes) or 'nothing'})"
    if node.doc_string or node.metadata_props:
        return "it is documented, and an initializer's tensor would lose that"
    return None


def _move(node: ir.Node) -> None:
    graph, old = node.graph, node.outputs[0]
    tensor = constant(old)
    assert isinstance(graph, ir.Graph)
    assert tensor is not None
    name, old.name = old.name, None
    if tensor.dtype.is_string():
        fresh: ir.TensorProtocol = ir.StringTensor(tensor.numpy(), shape=ir.Shape(tensor.shape.numpy()), name=name)
    else:  # a tensor of its own: naming a value names its tensor, which clones of the model share
        fresh = ir.Tensor(tensor, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)
    shape = ir.Shape(tensor.shape.numpy())
    new = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=fresh)
    new.doc_string = old.doc_string
    new.metadata_props.update(old.metadata_props)
    old.replace_all_uses_with(new)
    graph.remove([node], safe=True)
    graph.register_initializer(new)
