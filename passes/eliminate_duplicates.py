"""Common subexpressions: what is computed twice from the same values is computed once."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any, ClassVar

import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.graph import STANDARD_DOMAINS, bodies, constant, label
from graphopt.model import tensor_buffer
from graphopt.pages import hashed
from graphopt.passes._rewire import OFF, TWO_NAMES, Names, remove, stuck, substitute
from graphopt.traversal import ir_graphs
from graphopt.validation import RANDOM_OPS

_SMALL = 1024
"""Bytes up to which constants are compared by value; larger equal weights are deduplicate-weights' work."""

_DOMAINS = STANDARD_DOMAINS | {"ai.onnx.ml"}

_STATEFUL = RANDOM_OPS | {"Dropout"}


@dataclass(frozen=True)
class EliminateDuplicates(Pass):
    """Two nodes of one graph with the same operator, attributes and inputs become one.

    Never random operators (``x - y`` of two draws is not 0), never what runs a body, never operators that are not
    ONNX's own: nobody knows whether those keep a state.
    """

    name: ClassVar[str] = "eliminate-duplicates"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        names = Names(model)
        keys = _Keys()
        for graph in ir_graphs(model):
            self._graph(graph, keys, names, context, result)
        if not result.changes and not result.skipped:
            result.skipped.append(Skip("(graph)", "no two nodes compute the same"))
        return result

    def _graph(self, graph: ir.Graph, keys: _Keys, names: Names, context: Context, result: PassResult) -> None:
        seen: dict[Any, ir.Node] = {}
        dead: list[ir.Node] = []
        for node in list(graph):
            key = keys.of(node)
            first = seen.setdefault(key, node)
            if first is node:
                continue
            site = label(node)
            reason = _never(node) or _stuck(node, first, names)
            if reason is None and not context.allows(self.name, site):
                reason = OFF
            if reason is not None:
                result.skipped.append(Skip(site, f"{node.op_type}: the same as {label(first)}, but {reason}"))
                if reason == TWO_NAMES and context.allows(self.name, site) and _share(node, first, names):
                    detail = f"{node.op_type}: only the output is computed again, readers take {label(first)}'s"
                    result.changes.append(Change("share", site, detail))
                continue
            result.changes.append(Change("eliminate", site, f"{node.op_type}: the same as {label(first)}"))
            for old, new in zip(node.outputs, first.outputs, strict=True):
                if old.name:
                    substitute(old, new)
            dead.append(node)
        remove(dead)  # not before: a constant that only a dead node reads may be the first of its equals


def _never(node: ir.Node) -> str | None:
    if node.op_type in _STATEFUL:
        return "it draws random values, which differ from each other"
    if node.domain not in _DOMAINS:
        return f"an operator of {node.domain} may keep a state"
    if bodies(node):
        return "it runs a body"
    return None


def _stuck(node: ir.Node, first: ir.Node, names: Names) -> str | None:
    moved = [(old, new) for old, new in zip(node.outputs, first.outputs, strict=True) if old.name]
    return next((why for old, new in moved if (why := stuck(old, new, names)) is not None), None)


def _share(node: ir.Node, first: ir.Node, names: Names) -> bool:
    """Let everybody but the graph's outputs read ``first``, so that what they compute can be found equal in turn.

    Of two outputs that are the same, ``first`` makes the one listed first, and the only one where there is one: the
    result does not depend on the order of the nodes.
    """
    changed = False
    for index, given in enumerate(first.inputs[: len(node.inputs)]):
        if node.inputs[index] is not given:  # an equal constant
            node.replace_input_with(index, given)
            changed = True
    for old, new in zip(node.outputs, first.outputs, strict=True):
        if not old.name:
            continue
        if old.is_graph_output() and new.is_graph_output() and not names.shadowed(old):
            outputs = new.graph.outputs if isinstance(new.graph, ir.Graph) else []
            places = [[i for i, v in enumerate(outputs) if v is value] for value in (old, new)]
            if len(places[0]) == len(places[1]) == 1 and places[0] < places[1]:
                _swap(outputs, places[0][0], places[1][0])
                changed = True
        elif old.is_graph_output() and stuck(old, new, names) is None:
            spare = new.name
            substitute(old, new)
            old.name = spare  # nobody reads it, but it has to have one
            changed = True
        for user, index in list(old.uses()):
            user.replace_input_with(index, new)
            changed = True
    return changed


def _swap(outputs: Any, i: int, j: int) -> None:
    """Two outputs change the nodes that make them; names and declarations stay with the places."""
    one, other = outputs[i], outputs[j]
    names = one.name, other.name
    one.name = other.name = None
    other.name, one.name = names
    one.type, other.type = other.type, one.type
    one.shape, other.shape = other.shape, one.shape
    one.doc_string, other.doc_string = other.doc_string, one.doc_string
    texts = dict(one.metadata_props), dict(other.metadata_props)
    for value, own in ((one, texts[1]), (other, texts[0])):
        value.metadata_props.clear()
        value.metadata_props.update(own)
    outputs[i], outputs[j] = other, one


@dataclass
class _Keys:
    """What makes two nodes equal, hashable. Equal small constants are equal inputs, by their bytes."""

    inputs: dict[ir.Value, Any] = field(default_factory=dict)

    def of(self, node: ir.Node) -> Any:
        """The node's key: nodes with bodies have one of their own."""
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            return id(node)
        domain = "" if node.domain in STANDARD_DOMAINS else node.domain
        attributes = tuple(sorted((a.name, _attribute(a)) for a in node.attributes.values()))
        inputs = tuple(None if v is None else self._input(v) for v in node.inputs)
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        return (domain, node.op_type, node.overload, attributes, inputs, tuple(bool(v.name) for v in node.outputs))

    def _input(self, value: ir.Value) -> Any:
        known = self.inputs.get(value)
        if known is None:
            tensor = constant(value)
            small = tensor is not None and not tensor.dtype.is_string() and tensor.nbytes <= _SMALL
            known = _digest(tensor) if tensor is not None and small else value
            self.inputs[value] = known
        return known


def _digest(tensor: ir.TensorProtocol) -> Any:
    if tensor.dtype.is_string():
        return ("string", tuple(tensor.shape.numpy()), tuple(tensor.numpy().reshape(-1).tolist()))
    content = hashed(tensor_buffer(tensor))
    return (tensor.dtype.name, tuple(tensor.shape.numpy()), content)


def _attribute(attribute: ir.Attr) -> Any:
    """The value by its bits: 0.0 and -0.0 are two, and a NaN is itself."""
    kind = attribute.type
    if attribute.is_ref():
        return (kind.name, "ref", attribute.ref_attr_name)
    value = attribute.value
    if kind == ir.AttributeType.FLOAT:
        return (kind.name, struct.pack("<d", value))
    if kind == ir.AttributeType.FLOATS:
        return (kind.name, struct.pack(f"<{len(value)}d", *value))
    if kind in (ir.AttributeType.INT, ir.AttributeType.STRING):
        return (kind.name, value)
    if kind in (ir.AttributeType.INTS, ir.AttributeType.STRINGS):
        return (kind.name, tuple(value))
    if kind == ir.AttributeType.TENSOR:
        return (kind.name, _digest(value))
    return (kind.name, ir.to_proto(attribute).SerializeToString(deterministic=True))
