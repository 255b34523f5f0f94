"""Compute in float32 what computes in float16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.errors import PreconditionError
from graphopt.graph import fresh, is_op, label, nodes, says_half, tells_half, value_names
from graphopt.passes._rewire import OFF
from graphopt.traversal import ir_graphs

_HALF, _FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
_KNOWN = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")


@dataclass(frozen=True)
class ComputeFp32(Pass):
    """The whole model computes in float32, its float16 weights stored so; inputs and outputs keep their types, and
    tables that only Gather reads their storage.

    What quantization begins with: integers are decoded into float32, and ONNX Runtime's CPU has few float16 kernels,
    so that it puts Casts around most operators. It is all or nothing: a value has one type for all its readers.
    """

    name: ClassVar[str] = "compute-fp32"
    contract: ClassVar[Contract] = "approximate"

    def check(self, model: ir.Model) -> None:
        """Raise where a float16 value cannot be followed."""
        if any(tells_half(node) for function in model.functions.values() for node in function.all_nodes()):
            raise PreconditionError("float16 stands in a function; run inline-functions first")
        for node in nodes(model):
            touched = [v for v in (*node.inputs, *node.outputs) if v is not None]
            if node.domain not in _KNOWN and any(v.dtype == _HALF for v in touched):
                raise PreconditionError(f"{label(node)} is a {node.domain}::{node.op_type}, which may ask for float16")
            if is_op(node, "BitCast") and touched[0].dtype == _HALF:
                raise PreconditionError(f"{label(node)} reads the bits of a float16 value")
            if any(v.type is not None and not isinstance(v.type, ir.TensorType) and v.dtype == _HALF for v in touched):
                raise PreconditionError(f"{label(node)} makes or reads a sequence or optional of float16")

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        for node in nodes(model):
            if tells_half(node):
                result.changes.append(Change("widen", label(node), f"{node.op_type} computes in float32"))
        if not result.changes or not context.allows(self.name, "(graph)"):
            result.skipped.append(Skip("(graph)", OFF if result.changes else "nothing computes in float16"))
            result.changes.clear()
            return result
        taken = value_names(model)
        tables = _tables(model)
        rows = list(dict.fromkeys(reader.outputs[0] for table in tables for reader, _ in table.uses()))
        arriving = _arriving(model)
        outside = {*model.graph.inputs, *arriving, *tables, *rows}
        added = [_before(model, index, taken) for index in _leaving(model, outside)]
        for value in (*arriving, *rows):
            value.type = ir.TensorType(_HALF)
            added += _after(model, value, taken)
        outside |= {v for node in added for v in (*node.inputs, *node.outputs) if v is not None and v.dtype == _HALF}
        tensors: dict[int, ir.TensorProtocol] = {}
        for graph in ir_graphs(model):
            for value in (*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)):
                if value.dtype == _HALF and value not in outside:
                    _widen(value, tensors)
            for node in graph:
                if node not in added:
                    _rewrite_attributes(node)
        result.metrics = {"nodes_in_float32": len(result.changes), "casts": len(added)}
        return result


def _arriving(model: ir.Model) -> list[ir.Value]:
    """What keeps its type because callers feed it, or see it as it is stored."""
    outputs = set(model.graph.outputs)
    stored = [v for v in model.graph.initializers.values() if v in outputs and v not in model.graph.inputs]
    return [v for v in (*model.graph.inputs, *stored) if v.dtype == _HALF]


def _tables(model: ir.Model) -> list[ir.Value]:
    """Weights of which rows are looked up: cast, the rows cost next to nothing, and the table is stored as before."""
    stored = (v for graph in ir_graphs(model) for v in graph.initializers.values())
    found = (v for v in stored if v.dtype == _HALF and not v.is_graph_input() and not v.is_graph_output() and v.uses())
    return [v for v in found if all(index == 0 and _looks_up(node, model.graph) for node, index in v.uses())]


def _looks_up(node: ir.Node, main: ir.Graph) -> bool:
    """Whether it is a Gather, and no body hands on what it makes: that has one type with what other branches make."""
    return is_op(node, "Gather") and (node.graph is main or not node.outputs[0].is_graph_output())


def _leaving(model: ir.Model, outside: set[ir.Value]) -> list[int]:
    """Positions of the outputs that nodes make, and make in float32 from now on."""
    outputs = enumerate(model.graph.outputs)
    return [i for i, v in outputs if v.dtype == _HALF and v.producer() is not None and v not in outside]


def _cast(value: ir.Value, to: ir.DataType, taken: set[str]) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": int(to)})
    node.name = fresh(f"{value.name}_to_{to.name.lower()}", taken)
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(to), value.shape
    return node


def _after(model: ir.Model, value: ir.Value, taken: set[str]) -> list[ir.Node]:
    """Everybody reads ``value`` in float32: the node that sees to it, if anybody does read it."""
    readers, producer = list(value.uses()), value.producer()
    if not readers:
        return []
    node = _cast(value, _FLOAT, taken)
    node.outputs[0].name = fresh(f"{value.name}_fp32", taken)
    for reader, index in readers:
        reader.replace_input_with(index, node.outputs[0])
    graph = model.graph if producer is None else producer.graph
    assert graph is not None
    if producer is None:
        graph.insert_before(graph[0], [node])
    else:
        graph.insert_after(producer, [node])
    return [node]


def _before(model: ir.Model, index: int, taken: set[str]) -> ir.Node:
    """The output at ``index`` is made from what will be float32; the nodes inside go on reading that."""
    value = model.graph.outputs[index]
    node = _cast(value, _HALF, taken)
    found = node.outputs[0]
    found.name, found.doc_string = value.name, value.doc_string
    found.metadata_props.update(value.metadata_props)
    model.graph.outputs[index] = found
    value.name = fresh(f"{found.name}_fp32", taken)
    value.type = ir.TensorType(_FLOAT)
    model.graph.append(node)
    return node


def _widen(value: ir.Value, tensors: dict[int, ir.TensorProtocol]) -> None:
    value.type = ir.TensorType(_FLOAT)
    tensor = value.const_value
    if value.is_initializer() and tensor is not None:
        if id(tensor) not in tensors:
            tensors[id(tensor)] = ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)
        value.const_value = tensors[id(tensor)]


def _rewrite_attributes(node: ir.Node) -> None:
    for attribute in [a for a in node.attributes.values() if says_half(a)]:
        if attribute.type == ir.AttributeType.TENSOR:
            wide = ir.tensor(attribute.as_tensor().numpy().astype(np.float32), name=attribute.as_tensor().name)
            node.attributes.add(ir.AttrTensor(attribute.name, wide))
        else:
            node.attributes.add(ir.AttrInt64(attribute.name, int(_FLOAT)))
