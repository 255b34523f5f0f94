"""Copies of dequantized values, where ONNX Runtime would otherwise die, or not fuse what it fuses in float."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir

from graphopt.aborts import moved_into_bodies
from graphopt.base import Change
from graphopt.graph import fresh, is_op, label, nodes, value_names


def shield(model: ir.Model) -> list[Change]:
    """Copy every dequantized value that is moved and then read by a body from outside: of that ONNX Runtime dies
    (:mod:`graphopt.aborts`)."""
    taken: set[str] = set()
    changes: list[Change] = []
    for node in list(nodes(model)):
        movers = moved_into_bodies(node) if is_op(node, "DequantizeLinear") else []
        if not movers:
            continue
        taken = taken or value_names(model)
        changes.append(_copy(node, movers, taken, "before it is moved and read by a body"))
    return changes


def keep_fused(
    pairs: Mapping[ir.Value, ir.Value],
    before: Mapping[ir.Value, int],
    after: Mapping[str, int],
    integer: Collection[ir.Node],
    taken: set[str],
) -> list[Change]:
    """Copy those dequantized values (``pairs``: of what) whose readers the runtime fuses in the float model, for all
    that stay in float.

    Each reader gets a DequantizeLinear of its own before anything is fused, and what reads another node's output is no
    Gelu any more: five passes over the value in place of one, against which the copy is cheap. ``before`` and
    ``after``: how many nodes read each value in the float model, as it is and as the runtime fuses it.
    """
    changes: list[Change] = []
    for value, pair in pairs.items():
        node, users = pair.producer(), [(n, i) for n, i in pair.uses() if n not in integer]
        if node is None or not value.name or after.get(value.name, before[value]) >= before[value]:
            continue
        if len({n for n, _ in users}) > 1 and all(n.graph is node.graph for n, _ in users):
            changes.append(_copy(node, users, taken, "so that what reads it is fused as in float"))
    return changes


def _copy(node: ir.Node, users: Sequence[tuple[ir.Node, int]], taken: set[str], why: str) -> Change:
    """``users`` read what ``node`` makes through a Mean of one input: the runtime sees through an Identity."""
    value, graph = node.outputs[0], node.graph
    assert isinstance(graph, ir.Graph)
    copy = ir.node("Mean", [value])
    copy.name, copy.outputs[0].name = fresh(f"{node.name}_copy", taken), fresh(f"{value.name}_copy", taken)
    copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
    graph.insert_after(node, [copy])
    for user, index in users:
        user.replace_input_with(index, copy.outputs[0])
    return Change("copy", label(node), f"copied, {why}")
