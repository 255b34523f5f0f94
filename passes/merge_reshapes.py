"""Two reshapes, transposes, squeezes or casts in a row become one, or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.graph import attribute, constant_array, data_type, is_op, label, nodes, opset
from graphopt.passes._facts import Facts
from graphopt.passes._rewire import OFF, Names, remove, stuck, substitute, unread

_SHAPERS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_OPPOSITE = {"Squeeze": "Unsqueeze", "Unsqueeze": "Squeeze"}

_D = ir.DataType
_WHOLE = {
    _D.BOOL: (0, 1),
    **{getattr(_D, f"INT{b}"): (-(2 ** (b - 1)), 2 ** (b - 1) - 1) for b in (8, 16, 32, 64)},
    **{getattr(_D, f"UINT{b}"): (0, 2**b - 1) for b in (8, 16, 32, 64)},
}
"""Integer types and the numbers they hold."""
_REAL = {_D.FLOAT16: (11, 5), _D.BFLOAT16: (8, 8), _D.FLOAT: (24, 8), _D.DOUBLE: (53, 11)}
"""Floating-point types: bits of precision, bits of exponent."""


@dataclass
class _Merge:
    """What becomes of a node: it reads ``source`` with these attributes set, or (``gone``) is replaced by it."""

    source: ir.Value
    gone: bool = False
    attributes: tuple[ir.Attr, ...] = ()


@dataclass(frozen=True)
class MergeReshapes(Pass):
    """Of two nodes that only rearrange, the first is dropped and the second does the work of both.

    Reshape after Reshape, Flatten, Squeeze or Unsqueeze; Transpose after Transpose; Squeeze after Unsqueeze of the same
    axes and the other way round; Cast after a Cast that loses nothing.
    """

    name: ClassVar[str] = "merge-reshapes"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        names = Names(model)
        planner = _Planner(Facts(model), opset(model))
        for node in list(nodes(model)):
            if node.graph is None:
                continue
            first = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
            plan = planner.plan(node, first) if first is not None else None
            if first is None or plan is None:
                continue
            site = label(node)
            if isinstance(plan, _Merge) and plan.attributes and stuck(node.outputs[0], plan.source, names):
                plan.gone = False  # a Transpose that does nothing, under the output's name
            reason = plan if isinstance(plan, str) else self._reason(node, first, plan, names, context)
            if reason is not None or isinstance(plan, str):
                result.skipped.append(Skip(site, f"{node.op_type} after {first.op_type}: {reason}"))
                continue
            outcome = "both gone" if plan.gone else "one instead of two"
            result.changes.append(Change("merge", site, f"{node.op_type} after {first.op_type}: {outcome}"))
            _apply(node, first, plan)
        if not result.changes and not result.skipped:
            result.skipped.append(Skip("(graph)", "no two reshapes, transposes, squeezes or casts follow each other"))
        return result

    def _reason(self, node: ir.Node, first: ir.Node, plan: _Merge, names: Names, context: Context) -> str | None:
        if plan.gone:
            why = stuck(node.outputs[0], plan.source, names)
            if why is not None:
                return why
        elif first.outputs[0].is_graph_output() or len(first.outputs[0].uses()) > 1:
            return f"the result of {label(first)} is read elsewhere too, so that it would stay"
        elif first.graph is not node.graph:
            return f"{label(first)} stands outside the body that it is in, and may run less often"
        return None if context.allows(self.name, label(node)) else OFF


def _apply(node: ir.Node, first: ir.Node, plan: _Merge) -> None:
    if plan.gone:
        substitute(node.outputs[0], plan.source)
        remove([node])
    else:
        for item in plan.attributes:
            node.attributes[item.name] = item
        node.replace_input_with(0, plan.source)
    if unread(first.outputs[0]):
        remove([first])


class _Planner:
    """Decides what two nodes in a row amount to."""

    def __init__(self, facts: Facts, version: int) -> None:
        self.facts = facts
        self.version = version

    def plan(self, node: ir.Node, first: ir.Node) -> _Merge | str | None:
        """The merge, why there is none, or None where the two are no such pair."""
        source = first.inputs[0] if first.inputs else None
        if source is None or not is_op(first, first.op_type):
            return None
        if is_op(node, "Transpose") and is_op(first, "Transpose"):
            return self._transposes(node, first, source)
        if is_op(node, "Cast") and is_op(first, "Cast"):
            return self._casts(node, first, source)
        if is_op(node, "Squeeze", "Unsqueeze") and is_op(first, _OPPOSITE[node.op_type]):
            return self._squeezes(node, first, source)
        if is_op(node, "Reshape") and is_op(first, *_SHAPERS):
            return self._reshape(node, first, source)
        return None

    def _transposes(self, node: ir.Node, first: ir.Node, source: ir.Value) -> _Merge | str:
        inner, outer = attribute(first, "perm", None), attribute(node, "perm", None)
        if inner is None and outer is None:
            return _Merge(source, gone=True)  # reversed twice
        rank = len(inner if inner is not None else outer)
        inner = list(inner) if inner is not None else list(reversed(range(rank)))
        outer = list(outer) if outer is not None else list(reversed(range(rank)))
        if len(inner) != len(outer):
            return "their perms do not fit each other"
        both = [inner[axis] for axis in outer]
        return _Merge(source, both == list(range(rank)), (ir.AttrInt64s("perm", both),))

    def _squeezes(self, node: ir.Node, first: ir.Node, source: ir.Value) -> _Merge | str:
        inner, outer = self._axes(first), self._axes(node)
        if inner is None or outer is None:
            return "their axes are not constant"
        wide = node.outputs[0] if node.op_type == "Unsqueeze" else first.outputs[0]
        rank = self.facts.rank(wide)
        if inner != outer and rank is not None and rank > 0:
            inner, outer = sorted(a % rank for a in inner), sorted(a % rank for a in outer)
        return _Merge(source, gone=True) if inner == outer else "their axes are not (or not known to be) the same"

    def _axes(self, node: ir.Node) -> list[int] | None:
        if self.version < 13:
            axes = attribute(node, "axes", None)
            return None if axes is None else sorted(axes)
        array = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
        return None if array is None or not array.size else sorted(array.reshape(-1).tolist())

    def _reshape(self, node: ir.Node, first: ir.Node, source: ir.Value) -> _Merge | str:
        target: Any = attribute(node, "shape", None) if self.version < 5 else None
        if self.version >= 5 and len(node.inputs) > 1:
            array = constant_array(node.inputs[1])
            target = None if array is None else array.tolist()
        if attribute(node, "allowzero", 0):
            return _Merge(source)
        if target is None:
            return "its target is not constant and may have zeros, which copy dims of what is between"
        zeros = [axis for axis, dim in enumerate(target) if dim == 0]
        if zeros:
            before, between = self.facts.shape(source), self.facts.shape(first.outputs[0])
            if (
                before is None
                or between is None
                or any(
                    axis >= min(len(before), len(between)) or before[axis] is None or before[axis] != between[axis]
                    for axis in zeros
                )
            ):
                return "its target has zeros, which copy dims of what is between"
        return _Merge(source)

    def _casts(self, node: ir.Node, first: ir.Node, source: ir.Value) -> _Merge | str:
        start = self.facts.dtype(source)
        middle, end = attribute(first, "to", None), attribute(node, "to", None)
        through, to = data_type(middle), data_type(end)
        if start is None or through is None or to is None:
            return "the types are not known"
        if not _holds(start, through):
            return f"{through.name.lower()} does not hold every {start.name.lower()}"
        if to == start:
            return _Merge(source, gone=True)
        if to not in _WHOLE and to not in _REAL:
            return f"a cast to {to.name.lower()} depends on the type it comes from"
        if {start, through} & _REAL.keys() and to in _WHOLE and to != _D.BOOL and not _holds(start, to):
            return "what becomes of a number too large for an integer depends on the type it comes from"
        return _Merge(source)


def _holds(narrow: ir.DataType, wide: ir.DataType) -> bool:
    """Whether every value of one type has its exact form in the other."""
    if narrow == wide and (narrow in _WHOLE or narrow in _REAL):
        return True
    if narrow in _WHOLE:
        low, high = _WHOLE[narrow]
        if wide in _WHOLE:
            return wide != _D.BOOL and _WHOLE[wide][0] <= low and high <= _WHOLE[wide][1]
        return wide in _REAL and max(-low, high) <= 2 ** _REAL[wide][0]
    return (
        narrow in _REAL and wide in _REAL and _REAL[narrow][0] <= _REAL[wide][0] and _REAL[narrow][1] <= _REAL[wide][1]
    )
