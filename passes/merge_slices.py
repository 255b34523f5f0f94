"""Two Slices, Squeezes or Unsqueezes in a row become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.graph import attribute, constant, constant_array, is_op, label, nodes, opset, value_names
from graphopt.passes._dims import sliced
from graphopt.passes._facts import Facts
from graphopt.passes._rewire import OFF, remove
from graphopt.passes._weights import add_constant, drop_unread, node_bytes, tensor_bytes

_LAST = 2**63 - 1
Cut = tuple[int, int, int]
"""(start, end, step)."""


@dataclass(frozen=True)
class MergeSlices(Pass):
    """Of two nodes that take or give axes, the first is dropped and the second does the work of both.

    Constant positions only; on one axis two Slices are merged where both go forward from a known place. Nothing is done
    where the new constants would take more of the file than what goes.
    """

    name: ClassVar[str] = "merge-slices"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        merger = _Merger(model, Facts(model))
        for node in list(nodes(model)):
            first = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
            if node.graph is None or first is None or first.op_type != node.op_type:
                continue
            if not is_op(node, "Slice", "Squeeze", "Unsqueeze") or not is_op(first, node.op_type):
                continue
            site = label(node)
            made = merger.plan(node, first)
            if not isinstance(made, str) and not context.allows(self.name, site):
                made = OFF
            if isinstance(made, str):
                result.skipped.append(Skip(site, f"{node.op_type} after {first.op_type}: {made}"))
                continue
            merger.apply(node, first, made)
            result.changes.append(Change("merge", site, f"{node.op_type} after {first.op_type}: one instead of two"))
        if not result.changes and not result.skipped:
            result.skipped.append(Skip("(graph)", "no two slices, squeezes or unsqueezes follow each other"))
        return result


Lists = dict[str, list[int]]
"""What the one node does, by the name of the attribute or input."""


class _Merger:
    """Plans and makes the rewrites of one model."""

    def __init__(self, model: ir.Model, facts: Facts) -> None:
        self.model = model
        self.facts = facts
        self.version = opset(model)
        self.taken = value_names(model)

    def plan(self, node: ir.Node, first: ir.Node) -> Lists | str:
        """What one node has to do, or why two stay."""
        between = first.outputs[0]
        if between.is_graph_output() or len(between.uses()) != 1:
            return f"the result of {label(first)} is read elsewhere too, so that it would stay"
        if first.graph is not node.graph:
            return f"{label(first)} stands outside the body that it is in, and may run less often"
        made = self._slices(node, first) if node.op_type == "Slice" else self._axes(node, first)
        if isinstance(made, str) or self._inputs(node) == 0:
            return made
        stored = sum(tensor_bytes(np.asarray(numbers)) for numbers in made.values())
        if stored > node_bytes(first) + self._freed(node, first):
            return "the new constants would take more of the file than what goes"
        return made

    def _inputs(self, node: ir.Node) -> int:
        """From which opset on the positions are inputs; 0: they are attributes here."""
        since = 10 if node.op_type == "Slice" else 13
        return since if self.version >= since else 0

    def _names(self, node: ir.Node, first: ir.Node, made: Lists) -> dict[str, str]:
        """What to call the new constants: as those before, most of which will be gone."""
        found: dict[str, str] = {}
        for index, key in enumerate(made, 1):
            given = [n.inputs[index] for n in (node, first) if index < len(n.inputs)]
            found[key] = next((v.name for v in given if v is not None and v.name), f"{label(node)}_{key}")
        return found

    def _freed(self, node: ir.Node, first: ir.Node) -> int:
        """Bytes of the constants that only these two read."""
        values = {v for v in (*node.inputs[1:], *first.inputs[1:]) if v is not None}
        return sum(
            tensor_bytes(array)
            for v in values
            if (array := constant_array(v)) is not None and all(use.node in (node, first) for use in v.uses())
        )

    def _slices(self, node: ir.Node, first: ir.Node) -> Lists | str:
        shape, between = self.facts.shape(first.inputs[0]), self.facts.shape(first.outputs[0])
        rank = len(shape) if shape is not None else len(between) if between is not None else None
        outer, inner = self._cuts(node, rank), self._cuts(first, rank)
        if isinstance(outer, str) or isinstance(inner, str):
            return outer if isinstance(outer, str) else str(inner)
        both: dict[int, Cut | None] = dict(inner)
        for axis, cut in outer.items():
            size = shape[axis] if shape is not None else None
            known = size if isinstance(size, int) else None
            both[axis] = _composed(inner[axis], cut, known) if axis in inner else cut
        if None in both.values():
            return "they count from the end of an axis of unknown size, or backwards"
        cuts = sorted((axis, cut) for axis, cut in both.items() if cut is not None)
        lists = {"starts": [c[0] for _, c in cuts], "ends": [c[1] for _, c in cuts], "axes": [axis for axis, _ in cuts]}
        steps = [c[2] for _, c in cuts]
        return lists | ({"steps": steps} if any(step != 1 for step in steps) else {})

    def _cuts(self, node: ir.Node, rank: int | None) -> dict[int, Cut] | str:
        if any(v is not None and constant(v) is None for v in node.inputs[1:]):
            return "where they begin and end is not constant"
        found: dict[int, Cut] = {}
        for axis, start, end, step in sliced(self.facts.data, node) or []:
            if not isinstance(start, int) or not isinstance(end, int) or (axis < 0 and rank is None):
                return "which axes they cut is not known"
            found[axis % rank if rank else axis] = (start, end, step)
        return found or "what they cut is not known"

    def _axes(self, node: ir.Node, first: ir.Node) -> Lists | str:
        squeezing = node.op_type == "Squeeze"
        wide = self.facts.rank(first.inputs[0] if squeezing else node.outputs[0])
        inner, outer = self._given(first), self._given(node)
        if inner is None or outer is None or wide is None:
            return "their axes are not constant, or the rank is not known"
        if squeezing:  # what the second takes is counted without what the first took
            gone = {axis % wide for axis in inner}
            left = [axis for axis in range(wide) if axis not in gone]
            return {"axes": sorted(gone | {left[axis % len(left)] for axis in outer})}
        new = {axis % wide for axis in outer}
        old = [axis for axis in range(wide) if axis not in new]
        return {"axes": sorted(new | {old[axis % len(old)] for axis in inner})}

    def _given(self, node: ir.Node) -> list[int] | None:
        if self.version < 13:
            axes = attribute(node, "axes", None)
            return None if axes is None else list(axes)
        array = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
        return None if array is None or not array.size else [int(a) for a in array.reshape(-1)]

    def apply(self, node: ir.Node, first: ir.Node, made: Lists) -> None:
        """Let the node do what both did."""
        read = [*node.inputs[1:], *first.inputs[1:]]
        node.replace_input_with(0, first.inputs[0])
        if self._inputs(node):
            graph = node.graph
            assert isinstance(graph, ir.Graph)
            names = self._names(node, first, made)
            node.resize_inputs(1 + len(made))
            for index, (key, numbers) in enumerate(made.items(), 1):
                array = np.asarray(numbers, np.int64)
                new = add_constant(self.model, graph, names[key], array, self.taken, node)
                node.replace_input_with(index, new)
        else:
            for key, numbers in made.items():
                node.attributes[key] = ir.AttrInt64s(key, numbers)
        remove([first])
        drop_unread(*read)


def _composed(inner: Cut, outer: Cut, size: int | None) -> Cut | None:
    """One slice that takes what ``outer`` takes of what ``inner`` takes; None where it hangs on the axis's size."""
    if inner[2] < 1 or outer[2] < 1:
        return None
    if size is not None:
        taken = range(size)[inner[0] : inner[1] : inner[2]]
        left = taken[outer[0] : outer[1] : outer[2]]
        return (left.start, left.stop, left.step) if len(left) else (0, 0, 1)
    if min(inner[:2] + outer[:2]) < 0:
        return None
    start, step = inner[0] + outer[0] * inner[2], inner[2] * outer[2]
    return min(start, _LAST), min(inner[1], inner[0] + outer[1] * inner[2], _LAST), min(step, _LAST)
