"""onnxsim, in a child process, its result taken whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.budgets import current
from graphopt.costing import check_runnable
from graphopt.errors import ModelError, PreconditionError, RuntimeFailure
from graphopt.graph import nodes
from graphopt.isolation import in_child
from graphopt.model import graphs, interface, is_external, load, replace, to_proto, weight_bytes
from graphopt.passes._weights import add_constant_node
from graphopt.session import fused_nodes
from graphopt.traversal import ir_graphs

_CHILD = 4 << 30
"""Bytes of address space that an interpreter with onnxsim in it takes by itself, generously."""

_INLINE_ONLY = 1 << 30
"""Bytes by which the file may grow for fewer nodes: longer names."""


@dataclass(frozen=True)
class Simplify(Pass):
    """Deep simplification by onnxsim.

    Its answer is one rewrite: kept where it has fewer nodes than our own passes left, a file that does not grow, the
    same interface, and breaks nothing that ONNX Runtime would have fused; dropped, with the reason, otherwise. onnxsim
    gets bytes, never a path, and runs where it can crash or hang (``timeout`` seconds) without harm. Above ``max_size``
    nodes and weights it is not asked: its time grows faster than the graph.
    """

    timeout: float = 300.0
    max_size: int = 20_000
    name: ClassVar[str] = "simplify"
    contract: ClassVar[Contract] = "exact"

    def check(self, model: ir.Model) -> None:
        if is_external(model) or weight_bytes(model) > _INLINE_ONLY:
            raise PreconditionError(
                "onnxsim would copy the weights several times; models in a data file are left to our own passes"
            )

        size = _count(model) + sum(len(graph.initializers) for graph in ir_graphs(model))
        if size > self.max_size:
            raise PreconditionError(
                f"{size} nodes and weights are more than max-size ({self.max_size}): onnxsim would take too long"
            )

    def run(self, model: ir.Model, context: Context) -> PassResult:
        if not context.allows(self.name, "(graph)"):
            return PassResult(skipped=[Skip("(graph)", "switched off after a failed verification")])
        original = to_proto(model)
        check_runnable(model, original)  # it folds constants by running them
        memory = _CHILD + 4 * current().allowed(weight_bytes(model))
        try:
            answer = in_child(simplified, original.SerializeToString(), timeout=self.timeout, memory=memory)
        except RuntimeFailure as error:
            return PassResult(skipped=[Skip("(graph)", f"onnxsim failed: {error}")])
        proto = onnx.ModelProto.FromString(answer)
        _restore(proto, original)
        try:
            candidate = load(proto)
        except ModelError as error:
            return PassResult(skipped=[Skip("(graph)", f"onnxsim's result was dropped: {error}")])
        if candidate.ir_version < 4:
            _constants_in_nodes(candidate)
        reason = _worse(model, candidate)
        if reason is not None:
            return PassResult(skipped=[Skip("(graph)", f"onnxsim's result was dropped: {reason}")])
        before, after = _count(model), _count(candidate)
        replace(model, candidate)
        return PassResult(changes=[Change("simplify", "(graph)", f"{before} -> {after} nodes")])


def simplified(data: bytes) -> bytes:
    """onnxsim's answer; runs in the child."""
    import onnxsim

    model, _ = onnxsim.simplify(onnx.ModelProto.FromString(data), check_n=0)
    return bytes(model.SerializeToString())


def _constants_in_nodes(model: ir.Model) -> None:
    """Before IR 4 an initializer had to be an input too, and onnxsim turns Constant nodes into initializers."""
    for graph in ir_graphs(model):
        for name, value in list(graph.initializers.items()):
            if value.is_graph_input() or value.const_value is None or len(graph) == 0:
                continue
            made = add_constant_node(graph, name, value.const_value, graph[0])
            value.replace_all_uses_with(made, replace_graph_outputs=True)
            del graph.initializers[name]


def _count(model: ir.Model) -> int:
    return sum(1 for _ in nodes(model))


def _worse(model: ir.Model, candidate: ir.Model) -> str | None:
    before, after = _count(model), _count(candidate)
    if after >= before:
        return f"it removes nothing more ({before} nodes before, {after} after)"
    smaller, larger = to_proto(model).ByteSize(), to_proto(candidate).ByteSize()  # weights may stand in nodes too
    if larger > smaller:
        return f"the file would grow from {smaller} to {larger} bytes"
    if interface(candidate) != interface(model):
        return "it changed the inputs or outputs"
    if dict(candidate.opset_imports) != dict(model.opset_imports):
        return "it changed the opset"
    if _overridable(candidate) != _overridable(model):
        return "it dropped initializers that can be overridden, or took them out of the inputs"
    return _slower(model, candidate)


def _slower(model: ir.Model, candidate: ir.Model) -> str | None:
    """Fewer nodes may be more for the runtime: with the last Mul of a Gelu folded into the Conv behind it, none of
    the five that are left is fused any more, which cost PP-OCR's text detector 6 % of its speed."""
    try:
        before, after = fused_nodes(model), fused_nodes(candidate)
    except RuntimeFailure:  # operators of somebody else's, say: nothing to compare
        return None
    if after > before:
        return f"ONNX Runtime would fuse less of it: {after} nodes left to run, {before} without it"
    return None


def _overridable(model: ir.Model) -> set[str | None]:
    return {v.name for v in model.graph.inputs if v.name in model.graph.initializers}


def _restore(proto: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """What onnxsim drops or adds around the graph, as it was."""
    for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(proto, field, getattr(original, field))
    del proto.metadata_props[:]
    proto.metadata_props.extend(original.metadata_props)
    proto.graph.name, proto.graph.doc_string = original.graph.name, original.graph.doc_string
    del proto.graph.metadata_props[:]
    proto.graph.metadata_props.extend(original.graph.metadata_props)
    for side in ("input", "output"):
        if [v.name for v in getattr(proto.graph, side)] == [v.name for v in getattr(original.graph, side)]:
            del getattr(proto.graph, side)[:]
            getattr(proto.graph, side).extend(getattr(original.graph, side))
    known = {output: node for graph in graphs(original) for node in graph.node for output in node.output if output}
    for graph in graphs(proto):
        for node in graph.node:
            before = known.get(node.output[0]) if node.output else None
            if before is not None and before.op_type == node.op_type:
                node.doc_string = before.doc_string
                del node.metadata_props[:]
                node.metadata_props.extend(before.metadata_props)
        # Sizes onnxsim saw at one shape are no facts about another; the runtime infers what it needs.
        kept = {v.name for g in graphs(original) for v in g.value_info}
        infos = [v for v in graph.value_info if v.name in kept]
        del graph.value_info[:]
        graph.value_info.extend(infos)
