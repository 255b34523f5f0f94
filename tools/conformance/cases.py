"""onnx.backend.test's models in six variants, metadata and doc strings added to each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test.case.node
from onnx import TensorProto, helper, numpy_helper

from graphopt.model import graphs

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator", "light")

Feeds = dict[str, Any]
Case = tuple[onnx.ModelProto, Feeds]


@dataclass(frozen=True)
class Source:
    """A model of onnx's and its first inputs, those that are tensors."""

    name: str
    read: Callable[[], Case]


@lru_cache
def sources(kinds: tuple[str, ...] = KINDS) -> list[Source]:
    """All cases, in order; those of single nodes are made by onnx in memory."""
    found: list[Source] = []
    if "node" in kinds:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            made = onnx.backend.test.case.node.collect_testcases(None)
        found += [Source(case.name, partial(_made, case)) for case in made]
    for kind in kinds:
        files = sorted((DATA / kind).glob("*/model.onnx")) or sorted((DATA / kind).glob("*.onnx"))
        found += [Source(str(file.relative_to(DATA)), partial(_stored, file)) for file in files]
    return found


def _made(case: Any) -> Case:
    proto = onnx.ModelProto()
    proto.CopyFrom(case.model)
    feeds: Feeds = {}
    for value, given in zip(proto.graph.input, case.data_sets[0][0] if case.data_sets else (), strict=False):
        if isinstance(given, TensorProto):
            feeds[value.name] = given
        elif isinstance(given, (np.ndarray, np.generic)):
            feeds[value.name] = numpy_helper.from_array(np.asarray(given))
    return proto, feeds


def _stored(file: Path) -> Case:
    proto = onnx.load(file)
    feeds: Feeds = {}
    weights = {t.name for t in proto.graph.initializer}
    for index, value in enumerate(v for v in proto.graph.input if v.name not in weights):
        path = file.parent / "test_data_set_0" / f"input_{index}.pb"
        if path.is_file() and value.type.HasField("tensor_type"):
            feeds[value.name] = TensorProto.FromString(path.read_bytes())
    return proto, feeds


def as_it_is(proto: onnx.ModelProto, feeds: Feeds) -> Case | None:
    """The model itself."""
    return proto, feeds


def _constant(proto: onnx.ModelProto, feeds: Feeds, keep: int) -> Case | None:
    names = [v.name for v in proto.graph.input]
    fixed = [n for n in names[keep:] if n in feeds]
    if not fixed or proto.ir_version < 4:
        return None
    for name in fixed:
        tensor = TensorProto()
        tensor.CopyFrom(feeds[name])
        tensor.name = name
        proto.graph.initializer.append(tensor)
    kept = [v for v in proto.graph.input if v.name not in fixed]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    return proto, {k: v for k, v in feeds.items() if k not in fixed}


def rest_constant(proto: onnx.ModelProto, feeds: Feeds) -> Case | None:
    """All inputs but the first made initializers."""
    return _constant(proto, feeds, 1)


def all_constant(proto: onnx.ModelProto, feeds: Feeds) -> Case | None:
    """All inputs made initializers."""
    return _constant(proto, feeds, 0)


def in_branches(proto: onnx.ModelProto, feeds: Feeds) -> Case | None:
    """The nodes in both branches of an If that is decided at run time."""
    graph = proto.graph
    outputs = [o.name for o in graph.output]
    if not set(outputs) <= {n for node in graph.node for n in node.output} or "go" in {v.name for v in graph.input}:
        return None
    branches = []
    for prefix in ("then_", "else_"):
        made = {n for node in graph.node for n in node.output if n}
        nodes = [_renamed(node, {n: prefix + n for n in made}) for node in graph.node]
        results = [_renamed_value(o, prefix + o.name) for o in graph.output]
        branches.append(helper.make_graph(nodes, f"{prefix}branch", [], results))
    node = helper.make_node("If", ["go"], outputs, then_branch=branches[0], else_branch=branches[1], name="decide")
    del graph.node[:], graph.value_info[:]
    graph.node.append(node)
    graph.input.append(helper.make_tensor_value_info("go", TensorProto.BOOL, []))
    return proto, feeds | {"go": numpy_helper.from_array(np.array(True))}


def _renamed(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    """A copy that reads and makes the new names, its bodies included (a body's own names are left)."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [names.get(n, n) for n in copy.input]
    copy.output[:] = [names.get(n, n) for n in copy.output]
    for attribute in copy.attribute:
        for body in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
            own = {v.name for v in body.input} | {t.name for t in body.initializer}
            own |= {n for inner in body.node for n in inner.output}
            outer = {k: v for k, v in names.items() if k not in own}
            inside = [_renamed(inner, outer) for inner in body.node]
            del body.node[:]
            body.node.extend(inside)
    return copy


def _renamed_value(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    return copy


def in_function(proto: onnx.ModelProto, feeds: Feeds) -> Case | None:
    """The nodes in a function of the model's own, which the graph calls."""
    graph = proto.graph
    made = {n for node in graph.node for n in node.output}
    if proto.ir_version < 4 or not {o.name for o in graph.output} <= made or proto.functions:
        return None
    proto.ir_version = max(proto.ir_version, 8)  # the first with functions
    inputs = list(dict.fromkeys([*(v.name for v in graph.input), *(t.name for t in graph.initializer)]))
    outputs = [o.name for o in graph.output]
    function = helper.make_function("mine", "Body", inputs, outputs, list(graph.node), list(proto.opset_import))
    del graph.node[:], graph.value_info[:]
    graph.node.append(helper.make_node("Body", inputs, outputs, domain="mine", name="call"))
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    return proto, feeds


def with_symbols(proto: onnx.ModelProto, feeds: Feeds) -> Case | None:
    """Every dim of inputs and outputs a symbol of its own, nothing declared of the rest."""
    del proto.graph.value_info[:]
    for value in (*proto.graph.input, *proto.graph.output):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            dim.dim_param = f"{value.name}_{axis}"
    return proto, feeds


VARIANTS: dict[str, Callable[[onnx.ModelProto, Feeds], Case | None]] = {
    "plain": as_it_is,
    "rest-constant": rest_constant,
    "all-constant": all_constant,
    "if": in_branches,
    "function": in_function,
    "symbols": with_symbols,
}


def make(source: Source, variant: str) -> Case | None:
    """The case in this variant, documented; None where the variant makes no sense of it."""
    made = VARIANTS[variant](*source.read())
    if made is not None:
        document(made[0])
    return made


def document(proto: onnx.ModelProto) -> None:
    """Say something of the model, its graph and each node, which whoever rewrites it has to keep."""
    proto.doc_string = proto.doc_string or "what the model is for"
    proto.metadata_props.add(key="author", value="conformance")
    proto.graph.doc_string = proto.graph.doc_string or "what the graph is for"
    for number, node in enumerate(all_nodes(proto)):
        node.doc_string = node.doc_string or f"what node {number} is for"
        node.metadata_props.add(key="number", value=str(number))


def all_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The nodes of all graphs and functions, bodies included."""
    for graph in (*graphs(proto), *proto.functions):
        yield from graph.node
