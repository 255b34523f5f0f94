"""What each node computes and holds: multiply-accumulates, parameters, bytes of weights. Unknown is None."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from graphopt.cost import macs
from graphopt.model import graphs
from graphopt.values import Scope, Values
from graphopt.weights import Weight, text

_STANDARD = ("", "ai.onnx")
_NOT_COUNTED = frozenset({"Attention", "DeformConv", "LinearAttention", "MoE", "QMoE"})
_INTEGER = {"QLinearConv": "Conv", "QLinearMatMul": "MatMul", "QGemm": "MatMul"}
"""Those with (value, scale, zero point) for each operand: what they compute."""

_MICROSOFT = {"DynamicQuantizeMatMul": "MatMul", "MatMulIntegerToFloat": "MatMul", "FusedConv": "Conv"}
_MICROSOFT_LIGHT = ("QLinear", "Quantize", "Dequantize", "BiasGelu", "FastGelu", "Gelu", "QuickGelu", "Skip", "Embed")
_THROUGH = frozenset({"DequantizeLinear", "Cast", "Identity", "Transpose"})
"""What a weight may pass on the way to the operator that it belongs to."""


@dataclass
class Work:
    """One node, in the ``graph``-th graph of its model."""

    node: onnx.NodeProto
    graph: int
    macs: int | None
    parameters: int = 0
    weight_bytes: int = 0


def operator(node: onnx.NodeProto) -> str:
    """``Conv``; of other domains ``com.microsoft::Attention``."""
    domain = "" if node.domain in _STANDARD else f"{text(node.domain)}::"
    return domain + text(node.op_type)


def label(node: onnx.NodeProto) -> str:
    """A node's name, or its first output where it has none."""
    return text(node.name or next((name for name in node.output if name), "")) or f"unnamed {operator(node)}"


def works(values: Values, weights: Sequence[Weight]) -> list[Work]:
    """Every node of the main graph and of all bodies; a weight belongs to the first node that reads it."""
    found = [
        Work(node, index, node_macs(node, values.scopes[index]))
        for index, graph in enumerate(graphs(values.proto))
        for node in graph.node
    ]
    reader: dict[str, int] = {}
    maker: dict[str, int] = {}
    for index, work in enumerate(found):
        for name in work.node.input:
            if name:
                reader.setdefault(text(name), index)
        for name in work.node.output:
            maker.setdefault(text(name), index)
    for weight in weights:
        name = weight.name.removesuffix(" (indices)")
        owner = maker.get(name.rpartition(".")[0]) if weight.where == "attribute" else reader.get(name, maker.get(name))
        for _ in range(4):
            if owner is None or found[owner].node.op_type not in _THROUGH or not found[owner].node.output:
                break
            owner = reader.get(text(found[owner].node.output[0]), owner)
        if owner is not None:
            found[owner].parameters += weight.count
            found[owner].weight_bytes += weight.bytes or 0
    return found


def node_macs(node: onnx.NodeProto, scope: Scope) -> int | None:
    """MACs of one node: 0 for operators that multiply no matrices, None where a shape or the operator is unknown."""
    sizes = [value.sizes if (value := scope.get(text(name))) is not None else None for name in node.input]
    output = scope.get(text(node.output[0])) if node.output else None
    made = output.sizes if output is not None else None
    integers = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
    op_type = node.op_type
    if node.domain in (*_STANDARD, "com.microsoft") and op_type in _INTEGER:
        a, b = (*sizes, None, None, None, None)[0:4:3]
        return macs(_INTEGER[op_type], [a, b], made, integers)
    if node.domain in _STANDARD:
        if op_type in _NOT_COUNTED:
            return None
        return _einsum(node, sizes) if op_type == "Einsum" else macs(op_type, sizes, made, integers)
    if node.domain == "ai.onnx.ml":
        return None if op_type.startswith(("Linear", "SVM")) else 0
    if node.domain == "com.microsoft":
        if op_type in ("FusedMatMul", "TransposeMatMul"):
            first = sizes[0] if sizes else None
            return None if made is None or not first else math.prod(made) * first[-2 if integers.get("transA") else -1]
        if op_type in _MICROSOFT:
            return macs(_MICROSOFT[op_type], sizes, made, integers)
        return 0 if op_type.startswith(_MICROSOFT_LIGHT) else None
    return None


def _einsum(node: onnx.NodeProto, sizes: Sequence[tuple[int, ...] | None]) -> int | None:
    """The product of all its indices' sizes, for two operands written out."""
    equation = next((a.s.decode("utf-8", "replace") for a in node.attribute if a.name == "equation"), "")
    terms = equation.replace(" ", "").split("->")[0].split(",")
    if len(terms) == 1 and "." not in equation:
        return 0
    if len(terms) != 2 or "." in equation or len(sizes) != 2:
        return None
    found: dict[str, int] = {}
    for term, shape in zip(terms, sizes, strict=True):
        if shape is None or len(shape) != len(term):
            return None
        found.update({letter: size for letter, size in zip(term, shape, strict=True) if size > found.get(letter, 0)})
    return math.prod(found.get(letter, 0) for letter in set("".join(terms)))


def table(found: Sequence[Work]) -> list[dict[str, Any]]:
    """Per operator: nodes, MACs, how many nodes' MACs are unknown, parameters and bytes of weights; heaviest first."""
    rows: dict[str, dict[str, Any]] = {}
    for work in found:
        name = operator(work.node)
        empty = {
            "operator": name,
            "nodes": 0,
            "macs": None,
            "macs_unknown_nodes": 0,
            "parameters": 0,
            "weight_bytes": 0,
        }
        row = rows.setdefault(name, empty)
        row["nodes"] += 1
        row["parameters"] += work.parameters
        row["weight_bytes"] += work.weight_bytes
        row["macs_unknown_nodes"] += work.macs is None
        if work.macs is not None:
            row["macs"] = (row["macs"] or 0) + work.macs
    return sorted(rows.values(), key=lambda r: (-(r["macs"] or 0), -r["weight_bytes"], -r["nodes"], r["operator"]))


def listed(found: Sequence[Work], values: Values) -> list[dict[str, Any]]:
    """Every node in the file's order: what it makes (dims counted as numbers), MACs, parameters, bytes of weights."""
    rows: list[dict[str, Any]] = []
    for work in found:
        made = [values.scopes[work.graph].get(text(name)) for name in work.node.output if name]
        makes = [
            {"type": "?" if v is None else v.kind, "shape": None if v is None or v.sizes is None else list(v.sizes)}
            for v in made
        ]
        row = {"name": label(work.node), "operator": operator(work.node), "graph": work.graph, "makes": makes}
        numbers = {"macs": work.macs, "parameters": work.parameters, "weight_bytes": work.weight_bytes}
        rows.append({**row, **numbers})
    return rows


def inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model without functions of its own, so that what they compute is counted; itself, where that cannot be."""
    if not proto.functions:
        return proto
    try:
        import onnx.inliner

        return onnx.inliner.inline_local_functions(proto)
    except Exception:  # calls to it then count as unknown
        return proto
