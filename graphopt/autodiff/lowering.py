"""Operators without a rule, written with operators that have one: recurrent layers step by step, and whatever ONNX
itself defines as a function of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx
from onnx import helper

from graphopt.autodiff import recurrent  # noqa: F401  # registers its lowerings
from graphopt.autodiff.families import RULES
from graphopt.autodiff.rules import CONSTANT, DOMAINS, LOWERINGS, Call

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from graphopt.autodiff.emit import Emitter, Shape


def lower(
    graph: onnx.GraphProto,
    emitter: Emitter,
    shapes: dict[str, Shape],
    kinds: dict[str, int],
    constants: dict[str, NDArray[Any]],
) -> bool:
    """Rewrite what has to be in ``graph``; True where something was."""
    changed = False
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        written = None
        if node.domain in DOMAINS and node.op_type not in RULES and node.op_type not in CONSTANT:
            call = Call(emitter, node, shapes, kinds, constants, [], lambda _: True, {})
            written = _written(call)
        if written is None:
            kept.append(node)
            continue
        changed = True
        kept += written
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(emitter.initializers)
    return changed


def _written(call: Call) -> list[onnx.NodeProto] | None:
    node, emitter = call.node, call.e
    if node.op_type in LOWERINGS:
        start = len(emitter.nodes)
        try:
            results = LOWERINGS[node.op_type](call)
        except NotImplementedError:  # it stays, and stops a gradient that has to pass it
            del emitter.nodes[start:]
            return None
        found = emitter.nodes[start:]
        pairs = zip(results, node.output, strict=False)
        return [*found, *(helper.make_node("Identity", [a], [b]) for a, b in pairs if b)]
    return _function_body(call)


def _function_body(call: Call) -> list[onnx.NodeProto] | None:
    """The operator as the standard itself spells it out, inlined; None where it is no function."""
    node, opset = call.node, call.e.opset
    try:
        schema: Any = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return None
    text = b""
    versions = [v for v in schema.function_opset_versions if v <= opset]
    dependent = [v for v in schema.context_dependent_function_opset_versions if v <= opset]
    if versions:
        text = schema.get_function_with_opset_version(max(versions))
    elif dependent:
        types = []
        for name in node.input:
            known = name and helper.make_tensor_type_proto(call.kinds.get(name, 1), list(call.shapes[name]))
            types.append((known or onnx.TypeProto()).SerializeToString())
        text = schema.get_context_dependent_function_with_opset_version(max(dependent), node.SerializeToString(), types)
    defaults = {name: a.default_value for name, a in schema.attributes.items() if a.default_value.name}
    return _inlined(call, onnx.FunctionProto.FromString(text), defaults) if text else None


def _inlined(call: Call, body: onnx.FunctionProto, defaults: dict[str, onnx.AttributeProto]) -> list[onnx.NodeProto]:
    node, e = call.node, call.e
    names = dict(zip(body.input, node.input, strict=False)) | dict(zip(body.output, node.output, strict=False))
    given = defaults | {a.name: a for a in node.attribute}
    found = []
    for inner in body.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(inner)
        copy.input[:] = [names.get(n, "") if n in body.input else names.get(n, n) for n in inner.input]
        for name in inner.output:
            if name and (name not in names or not names[name]):
                names[name] = e.fresh(name)
        copy.output[:] = [names.get(n, n) for n in inner.output]
        attributes = []
        for item in inner.attribute:
            if not item.ref_attr_name:
                attributes.append(item)
            elif (source := given.get(item.ref_attr_name)) is not None:
                named = onnx.AttributeProto()
                named.CopyFrom(source)
                named.name = item.name
                attributes.append(named)
        del copy.attribute[:]
        copy.attribute.extend(attributes)
        found.append(copy)
    return found
