"""Where large constants are read, and as what: what decides the form in which they are stored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from graphopt.base import Skip
from graphopt.graph import attribute, constant, is_op, label
from graphopt.passes._patterns import matches

LEAST = 1024
"""Elements below which a weight is not worth the nodes that decode it."""

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_LAYOUT = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Cast", "Flatten")
_RECURRENT = ("LSTM", "GRU", "RNN")

Kind = Literal["matmul", "gather", "load"]


@dataclass(frozen=True)
class Use:
    """``node`` reads the weight as its input ``index``.

    ``kind``: ``matmul`` (the weight of MatMul or Gemm, [inputs, outputs]; ``flipped``: the other way round, by transB
    or through a Transpose of its own, ``via``), ``gather`` (rows are looked up) or ``load`` (anything else).
    """

    node: ir.Node
    index: int
    kind: Kind
    flipped: bool = False
    via: ir.Node | None = None


@dataclass
class Weight:
    """A constant of floats, by whom it is read, and the operator that gave it its form (``role``)."""

    value: ir.Value
    tensor: ir.TensorProtocol
    graph: ir.Graph
    uses: list[Use]
    role: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(d) for d in self.tensor.shape.numpy())

    @property
    def first(self) -> ir.Node:
        """The operator that computes with it first."""
        return self.uses[0].node


def find_weights(
    model: ir.Model, exclude: tuple[str, ...], include: tuple[str, ...]
) -> tuple[list[Weight], list[Skip]]:
    """The weights that can be stored otherwise, in the graphs' order, and why the others stay."""
    found: list[Weight] = []
    skipped: list[Skip] = []
    small = overridable = 0
    for graph, value, tensor in _constants(model):
        if tensor is None:
            overridable += 1
            continue
        if math.prod(tensor.shape.numpy()) < LEAST:
            small += 1
            continue
        name = value.name or "(unnamed)"
        weight, why = _weight(graph, value, tensor)
        if weight is None:
            skipped.append(Skip(name, why))
        elif any(matches(use.node, exclude) for use in weight.uses):
            skipped.append(Skip(name, f"{weight.role} {label(weight.first)} was excluded"))
        elif include and not any(matches(use.node, include) for use in weight.uses):
            skipped.append(Skip(name, f"{weight.role} {label(weight.first)} is not among those to include"))
        else:
            found.append(weight)
    if small:
        skipped.append(Skip("(small)", f"{small} weights have fewer than {LEAST:,} elements"))
    if overridable:
        why = f"{overridable} initializers are graph inputs too, so a caller may replace them"
        skipped.append(Skip("(inputs)", why))
    if model.functions:
        skipped.append(Skip("(functions)", "weights in functions are left alone; run inline-functions first"))
    return found, skipped


def _constants(model: ir.Model) -> Iterator[tuple[ir.Graph, ir.Value, ir.TensorProtocol | None]]:
    """(graph, value, tensor) of every constant of floats; tensor None: a caller may override it."""
    for graph in model.graphs():
        made = [node.outputs[0] for node in graph if is_op(node, "Constant")]
        for value in (*graph.initializers.values(), *made):
            if value.is_graph_input():
                if value.const_value is not None and value.const_value.dtype in FLOATS:
                    yield graph, value, None
                continue
            tensor = constant(value)
            if tensor is not None and tensor.dtype in FLOATS:
                yield graph, value, tensor


def _weight(graph: ir.Graph, value: ir.Value, tensor: ir.TensorProtocol) -> tuple[Weight | None, str]:
    if value.is_graph_output():
        return None, "it is an output of its graph"
    rank = len(tensor.shape)
    if rank > 1 and tensor.shape[-1] == 1 and any(is_op(node, "Gather") for node, _ in value.uses()):
        return None, "it is a scale for each row"
    uses: list[Use] = []
    roles: list[str] = []
    others: list[str] = []
    for node, index in value.uses():
        found, role = _uses(node, index, rank)
        uses += found
        if role is None:
            others.append(node.op_type)
        else:
            roles.append(role)
    if not uses:
        return None, "nothing reads it; remove-unused takes it away"
    if not roles:
        return None, f"read by {', '.join(dict.fromkeys(others))}, not by a layer or a lookup"
    if len({id(use.node.graph) for use in uses if use.kind != "load"} | {id(graph)}) > 1:
        # A lookup or product in a body reads what is decoded once, outside.
        uses = [Use(u.node, u.index, "load") if u.via is None else Use(u.via, 0, "load") for u in uses]
        uses = list(dict.fromkeys(uses))
    return Weight(value, tensor, graph, uses, roles[0]), ""


def _uses(node: ir.Node, index: int, rank: int) -> tuple[list[Use], str | None]:
    """How ``node`` uses the weight, and as what operator (None: none that we know)."""
    direct = _direct(node, index, rank)
    if direct is not None:
        return [direct], node.op_type
    if rank == 2 and is_op(node, "Transpose") and tuple(attribute(node, "perm", (1, 0))) == (1, 0):
        through = [(reader, _direct(reader, at, rank)) for reader, at in node.outputs[0].uses()]
        if through and all(u is not None and u.kind == "matmul" for _, u in through) and not _is_output(node):
            found = [Use(u.node, u.index, "matmul", not u.flipped, node) for _, u in through if u is not None]
            return found, found[0].node.op_type
    return [Use(node, index, "load")], _role(node, index, 0)


def _is_output(node: ir.Node) -> bool:
    return node.outputs[0].is_graph_output()


def _direct(node: ir.Node, index: int, rank: int) -> Use | None:
    if index == 1 and rank == 2 and is_op(node, "MatMul"):
        return Use(node, index, "matmul")
    if index == 1 and is_op(node, "Gemm"):
        return Use(node, index, "matmul", bool(attribute(node, "transB", 0)))
    if index == 0 and rank == 2 and is_op(node, "Gather") and attribute(node, "axis", 0) in (0, -2):
        return Use(node, index, "gather")
    return None


def _role(node: ir.Node, index: int, depth: int) -> str | None:
    """The layer that reads the weight, through operators that only arrange it; None: no layer does."""
    if is_op(node, "MatMul", "Gemm", "Conv", "ConvTranspose", *_RECURRENT):
        recurrent = node.op_type in _RECURRENT
        return node.op_type if index in ((1, 2) if recurrent else (0, 1)) else None
    if is_op(node, "Gather", "GatherElements", "GatherND"):
        return node.op_type if index == 0 else None
    if depth > 8 or not is_op(node, *_LAYOUT) or index != 0:
        return None
    for reader, at in node.outputs[0].uses():
        found = _role(reader, at, depth + 1)
        if found is not None:
            return found
    return None


def rows_of(weight: Weight) -> int:
    """How many rows of the weight, flattened, a scale each does justice to: its outputs where they come first."""
    shape = weight.shape
    if weight.role in _RECURRENT and len(shape) == 3:
        return shape[0] * shape[1]
    if weight.role == "MatMul" and len(shape) > 2:
        return math.prod(shape[:-1])
    return shape[0] if shape else 1
