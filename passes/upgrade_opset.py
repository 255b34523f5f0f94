"""Raise the operator set, where a later pass needs operators the model's own does not have."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.errors import PreconditionError
from graphopt.graph import STANDARD_DOMAINS, fresh, is_op, nodes, opset
from graphopt.model import clone, fingerprint, graphs, load, replace, to_proto
from graphopt.session import one_line

_LARGE = 1 << 20
"""Bytes from which a weight is kept out of the conversion."""


@dataclass(frozen=True)
class UpgradeOpset(Pass):
    """onnx's version converter, with what it loses put back: node order, doc strings, metadata, and the IR version.

    ``to`` is the lowest opset wanted; a model that is there already is left alone. Compared numerically with the
    original like every exact pass. Functions of the model's own are not converted: inline them first.
    """

    to: int = 13
    name: ClassVar[str] = "upgrade-opset"
    contract: ClassVar[Contract] = "exact"

    def check(self, model: ir.Model) -> None:
        newest = onnx.defs.onnx_opset_version()
        if not 1 <= self.to <= newest:
            raise PreconditionError(f"opset {self.to} is not known to onnx {onnx.__version__}; the newest is {newest}")
        behind = [f for f in model.functions.values() if any(_version(f, d) < self.to for d in STANDARD_DOMAINS)]
        if behind and opset(model) < self.to:
            raise PreconditionError(
                f"onnx's converter does not convert functions, and {len(behind)} of the model's ({behind[0].name}, "
                "...) are for an earlier opset; run inline-functions first"
            )

    def run(self, model: ir.Model, context: Context) -> PassResult:
        now = opset(model)
        if now >= self.to or now == 0:
            why = "it imports no standard operators" if now == 0 else f"the model is at opset {now} already"
            return PassResult(skipped=[Skip("(graph)", why)])
        if not context.allows(self.name, "(graph)"):
            return PassResult(skipped=[Skip("(graph)", "switched off after a failed verification")])
        if now < 9 <= self.to and any(is_op(node, "Scan") for node in nodes(model)):
            raise PreconditionError(
                f"Scan had a batch dim before opset 9, and onnx's converter leaves it as it is at opset {now}; "
                "export the model again at opset 9 or later"
            )
        light, held = _without_weights(model)
        original = to_proto(light)
        before = fingerprint(light)
        try:
            converted = onnx.version_converter.convert_version(original, self.to)
        except Exception as error:  # the converter throws what its adapters throw
            raise PreconditionError(
                f"onnx cannot convert this model from opset {now} to {self.to} ({one_line(error)}); "
                f"export it again at opset {self.to} or later"
            ) from error
        _restore(converted, original)
        upgraded = load(converted)
        upgraded.graph.sort()
        same = fingerprint(upgraded) == before
        _put_back(upgraded, held)
        replace(model, upgraded)
        if same:
            return PassResult(skipped=[Skip("(graph)", "the converter changed nothing")])
        return PassResult(changes=[Change("upgrade", "(graph)", f"opset {now} -> {self.to}")])


def _without_weights(model: ir.Model) -> tuple[ir.Model, dict[str, ir.TensorProtocol]]:
    """A copy with the large weights of the main graph as inputs, so that they are neither copied nor need fit into a
    protobuf; no adapter looks at them. And these weights."""
    light = clone(model)
    held: dict[str, ir.TensorProtocol] = {}
    if model.ir_version < 4:  # initializers are inputs there
        return light, held
    for name, value in list(light.graph.initializers.items()):
        tensor = value.const_value
        plain = tensor is not None and not value.is_graph_input() and not value.is_graph_output()
        if plain and tensor is not None and tensor.nbytes >= _LARGE and not (value.doc_string or value.metadata_props):
            held[name] = tensor
            del light.graph.initializers[name]
            value.const_value = None
            value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
            light.graph.inputs.append(value)
    return light, held


def _put_back(model: ir.Model, held: dict[str, ir.TensorProtocol]) -> None:
    for value in [v for v in model.graph.inputs if v.name in held]:
        model.graph.inputs.remove(value)
        value.const_value = held[value.name or ""]
        model.graph.register_initializer(value)


def _version(function: ir.Function, domain: str) -> int:
    return function.opset_imports.get(domain, sys.maxsize)


def _restore(converted: onnx.ModelProto, original: onnx.ModelProto) -> None:
    # A later opset can need a later IR; the converter's choice is kept only where the old one is too old for it.
    needed = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
    version = next(o.version for o in converted.opset_import if o.domain in ("", "ai.onnx"))
    converted.ir_version = max(original.ir_version, needed.get(version, 3 if version < 9 else 4))
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(converted, field, getattr(original, field))
    del converted.metadata_props[:]
    converted.metadata_props.extend(original.metadata_props)
    converted.graph.name = original.graph.name
    converted.graph.doc_string = original.graph.doc_string
    if original.functions and not converted.functions:
        converted.functions.extend(original.functions)
    _restore_nodes(converted, original)
    for side in ("input", "output"):
        del getattr(converted.graph, side)[:]
        getattr(converted.graph, side).extend(getattr(original.graph, side))


def _restore_nodes(converted: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """Names, doc strings and metadata of nodes, and what was said of values.

    Where one node became several, the one with the old operator keeps the old name and the others get fresh ones: the
    runtime refuses two nodes of one name.
    """
    known = {name: node for graph in graphs(original) for node in graph.node for name in node.output if name}
    taken = {node.name for graph in graphs(original) for node in graph.node}
    for graph in graphs(converted):
        used: set[str] = set()  # the other branch may have a node of that name too
        for node in sorted(graph.node, key=lambda n: not _same_node(n, known)):
            before = next((known[name] for name in node.output if name in known), None)
            if before is not None and before.name not in used:
                node.name, node.doc_string = before.name, before.doc_string
                del node.metadata_props[:]
                node.metadata_props.extend(before.metadata_props)
            elif node.name in used or node.name in taken:
                node.name = fresh(f"{node.name}_{node.op_type}", taken)
            if node.name:
                used.add(node.name)
    said = {value.name: value for graph in graphs(original) for value in graph.value_info}
    for graph in graphs(converted):
        present = {value.name for value in graph.value_info}
        for value in graph.value_info:
            if value.name in said:
                value.CopyFrom(said[value.name])
        made = [name for node in graph.node for name in node.output]
        graph.value_info.extend(said[name] for name in made if name in said and name not in present)


def _same_node(node: onnx.NodeProto, known: dict[str, onnx.NodeProto]) -> bool:
    return any(name in known and known[name].op_type == node.op_type for name in node.output)
