"""A model in two: what the first half of its nodes makes is given to the second, each a model of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import onnx
from onnx import helper

from graphopt.session import Session


def halves(model: onnx.ModelProto, rnd: random.Random) -> tuple[onnx.ModelProto, onnx.ModelProto] | None:
    """Cut at a random node; None where there is nothing to do on one side, or what crosses has no known type."""
    model = _stored(model)
    graph = onnx.shape_inference.infer_shapes(model).graph
    if len(graph.node) < 2:
        return None
    at = rnd.randrange(1, len(graph.node))
    parts = graph.node[:at], graph.node[at:]
    made = {name for node in parts[0] for name in node.output}
    wanted = {o.name for o in graph.output}
    crossing = sorted(made & set(_read(parts[1])) - {""})
    types = {v.name: v for v in (*graph.value_info, *graph.output, *graph.input)}
    if any(name not in types or not types[name].type.tensor_type.elem_type for name in crossing):
        return None
    ends = [types[name] for name in crossing]
    later = {name for node in parts[1] for name in node.output}
    first = [*ends, *(o for o in graph.output if o.name in made and o.name not in crossing)]
    second = [o for o in graph.output if o.name in later]
    given = {v.name for v in graph.input}
    first += [o for o in graph.output if o.name in given]  # an input that is an output too
    if not first or not second:
        return None
    assert wanted <= {v.name for v in (*first, *second)}
    return _model(model, parts[0], [], first), _model(model, parts[1], ends, second)


def _stored(model: onnx.ModelProto) -> onnx.ModelProto:
    """Constants as weights, which both halves can have: a weight that crosses the cut would be none any more."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    ends = {o.name for o in copy.graph.output}
    for node in list(copy.graph.node):
        if node.op_type == "Constant" and node.attribute[0].name == "value" and node.output[0] not in ends:
            tensor = copy.graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            copy.graph.node.remove(node)
    return copy


def _read(nodes: Iterable[onnx.NodeProto]) -> Iterable[str]:
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _read(attribute.g.node)
                yield from (o.name for o in attribute.g.output)


def _model(
    whole: onnx.ModelProto, nodes: Any, more: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
) -> onnx.ModelProto:
    read = {*_read(nodes), *(o.name for o in outputs)}
    inputs = [v for v in whole.graph.input if v.name in read] + more
    weights = [t for t in whole.graph.initializer if t.name in read]
    graph = helper.make_graph(list(nodes), "half", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=list(whole.opset_import), ir_version=whole.ir_version)


def run(parts: Iterable[onnx.ModelProto], feed: dict[str, Any], session: Callable[..., Session]) -> dict[str, Any]:
    """The outputs of one after the other."""
    known = dict(feed)
    for part in parts:
        inputs = {v.name for v in part.graph.input}
        known |= session(part, optimize=False, threads=1).run({k: v for k, v in known.items() if k in inputs})
    return known
