"""Remove nodes that hand on what they get: Identity, Dropout for inference, and whatever provably does nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.graph import attribute, constant_array, data_type, is_op, label, nodes, opset
from graphopt.passes._facts import Facts
from graphopt.passes._rewire import OFF, Names, remove, stuck, substitute, unread
from graphopt.passes._signed_zero import sign_of_zero_is_lost
from graphopt.traversal import ir_graphs

_ROUNDS = 4
_OPEN = 2**31 - 1
"""An end from which on a slice goes to the end of any axis."""

Verdict = ir.Value | str | None
"""What may stand for the node's result; or why nothing may; or None: the node does something."""


@dataclass(frozen=True)
class EliminateIdentities(Pass):
    """Bit for bit the same, so ``x + 0`` stays (it turns -0.0 into 0.0), unless nobody can tell, while ``x - 0`` goes.

    What a node does is judged by inferred facts only, never by declared shapes. Outputs keep their names, and a body
    never hands out a value of the graph around it.
    """

    name: ClassVar[str] = "eliminate-identities"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        for _ in range(_ROUNDS):
            made, result.skipped = self._round(model, context)
            result.changes += made
            if not made or not any("known" in skip.reason for skip in result.skipped):
                break  # otherwise inference may know more without them
        if not result.changes and not result.skipped:
            result.skipped.append(Skip("(graph)", "no node does nothing"))
        return result

    def _round(self, model: ir.Model, context: Context) -> tuple[list[Change], list[Skip]]:
        judge = _Judge(Facts(model), opset(model))
        names = Names(model)
        changes: list[Change] = []
        skipped: list[Skip] = []
        dead: list[ir.Node] = []
        # A value can take the name of one output only: of the one listed first, not of the node that comes first.
        places = {v: i for graph in ir_graphs(model) for i, v in reversed(list(enumerate(graph.outputs)))}
        for node in sorted(nodes(model), key=lambda node: max((places.get(v, -1) for v in node.outputs), default=-1)):
            verdict = judge.verdict(node)
            if verdict is None:
                continue
            site = label(node)
            reason = self._reason(node, verdict, names, context)
            if reason is not None:
                skipped.append(Skip(site, f"{node.op_type}: {reason}"))
                continue
            assert isinstance(verdict, ir.Value)
            changes.append(Change("eliminate", site, f"{node.op_type}: it does nothing"))
            substitute(node.outputs[0], verdict)
            dead.append(node)
        twice = [d.inputs[0] for d in dead if d.op_type in _INVOLUTIONS]
        inner = [n for value in twice if value is not None and (n := value.producer()) is not None]
        remove(dead)
        remove(n for n in dict.fromkeys(inner) if n.graph is not None and unread(n.outputs[0]))
        return changes, skipped

    def _reason(self, node: ir.Node, verdict: ir.Value | str, names: Names, context: Context) -> str | None:
        if isinstance(verdict, str):
            return verdict
        if any(v.name and not unread(v) for v in node.outputs[1:]):
            return "its second result is read"
        if not context.allows(self.name, label(node)):
            return OFF
        return stuck(node.outputs[0], verdict, names)


_INVOLUTIONS = ("Neg", "Not")


class _Judge:
    """Decides what a node does, operator by operator."""

    def __init__(self, facts: Facts, version: int) -> None:
        self.facts = facts
        self.version = version
        same: Callable[[ir.Node], Verdict] = self._by_shape
        arithmetic: Callable[[ir.Node], Verdict] = self._arithmetic
        self.rules: dict[str, Callable[[ir.Node], Verdict]] = {
            "Identity": lambda node: node.inputs[0],
            "Dropout": self._dropout,
            "Cast": self._cast,
            "CastLike": self._cast_like,
            "Transpose": self._transpose,
            "Slice": self._slice,
            "Pad": self._pad,
            "Tile": self._tile,
            **dict.fromkeys(("Resize", "Upsample"), self._resize),
            **dict.fromkeys(("Concat", "Sum", "Max", "Min"), self._single),
            **dict.fromkeys(("Reshape", "Flatten", "Expand"), same),
            **dict.fromkeys(("Squeeze", "Unsqueeze"), self._by_rank),
            **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow"), arithmetic),
            **dict.fromkeys(_INVOLUTIONS, self._twice),
        }

    def verdict(self, node: ir.Node) -> Verdict:
        """See :data:`Verdict`."""
        rule = self.rules.get(node.op_type)
        if rule is None or not is_op(node, node.op_type) or not node.inputs or node.inputs[0] is None:
            return None
        return rule(node)

    def _dropout(self, node: ir.Node) -> Verdict:
        if self.version < 7:
            training = not attribute(node, "is_test", 0)
        elif self.version < 12:
            training = False
        else:
            mode = node.inputs[2] if len(node.inputs) > 2 else None
            given = constant_array(mode)
            if mode is not None and given is None:
                return "whether it is in training mode is decided at run time"
            training = given is not None and bool(given.any())
        return "it is in training mode, where it drops values at random" if training else node.inputs[0]

    def _cast(self, node: ir.Node) -> Verdict:
        to = attribute(node, "to", None)
        if not isinstance(to, int):
            return None  # opset 5 and before: a text
        return self._by_type(node, data_type(to))

    def _cast_like(self, node: ir.Node) -> Verdict:
        return self._by_type(node, self.facts.dtype(node.inputs[1] if len(node.inputs) > 1 else None))

    def _by_type(self, node: ir.Node, to: ir.DataType | None) -> Verdict:
        source = self.facts.dtype(node.inputs[0])
        if source is None or to is None:
            return "the type of what it casts is not known"
        return node.inputs[0] if source == to else None

    def _transpose(self, node: ir.Node) -> Verdict:
        perm = attribute(node, "perm", None)
        if perm is not None:
            return node.inputs[0] if list(perm) == list(range(len(perm))) else None
        rank = self.facts.rank(node.inputs[0])
        if rank is None:
            return "its rank is not known"
        return node.inputs[0] if rank < 2 else None

    def _by_shape(self, node: ir.Node) -> Verdict:
        same = self.facts.same_shape(node.inputs[0], node.outputs[0])
        if same is None and node.op_type == "Reshape" and self._all_but_one(node):
            same = True
        if same is None:
            return "its shapes are not known well enough to see whether it does anything"
        return node.inputs[0] if same else None

    def _all_but_one(self, node: ir.Node) -> bool:
        """A reshape with a -1 that keeps every other dim keeps that one as well."""
        target = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
        before, after = self.facts.shape(node.inputs[0]), self.facts.shape(node.outputs[0])
        if target is None or before is None or after is None or len(before) != len(after) or -1 not in target:
            return False
        other = [(p, q) for p, q, t in zip(before, after, target.tolist(), strict=True) if t != -1]
        copied = [t for t in target.tolist() if t == 0]
        if copied and attribute(node, "allowzero", 0):
            return False
        return all(p is not None and p == q and p != 0 for p, q in other)

    def _by_rank(self, node: ir.Node) -> Verdict:
        before, after = self.facts.rank(node.inputs[0]), self.facts.rank(node.outputs[0])
        if before is None or after is None:
            return "its rank is not known, so that it may add or remove an axis"
        return node.inputs[0] if before == after else None

    def _slice(self, node: ir.Node) -> Verdict:
        steps: Any = [1]
        if self.version < 10:
            starts, ends = attribute(node, "starts", None), attribute(node, "ends", None)
        else:
            given = [constant_array(v) for v in (*node.inputs[1:], None, None, None, None)[:4]]
            starts, ends = given[0], given[1]
            if len(node.inputs) > 4 and node.inputs[4] is not None:
                steps = given[3]
        if steps is None:
            return "its steps are not constant"
        if any(step != 1 for step in steps):
            return None
        if starts is not None and ends is not None and all(s == 0 for s in starts) and all(e >= _OPEN for e in ends):
            return node.inputs[0]
        return self._by_shape(node)

    def _pad(self, node: ir.Node) -> Verdict:
        if self.version < 11:
            pads = attribute(node, "pads" if self.version > 1 else "paddings", None)
        else:
            pads = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
        if pads is None:
            return "how much it pads is not constant"
        return node.inputs[0] if not any(pads) else None

    def _tile(self, node: ir.Node) -> Verdict:
        if self.version < 6:
            return None
        repeats = constant_array(node.inputs[1])
        if repeats is None:
            return self._by_shape(node)
        return node.inputs[0] if (repeats == 1).all() else None

    def _resize(self, node: ir.Node) -> Verdict:
        """Nothing moves where every scale is 1: positions and weights are whole numbers then."""
        if self.version < 7 or attribute(node, "antialias", 0):
            return None
        if attribute(node, "coordinate_transformation_mode", b"") in ("tf_crop_and_resize", b"tf_crop_and_resize"):
            return None
        if node.op_type == "Upsample" and self.version < 9:
            scales: Any = attribute(node, "scales", [0])
        else:
            at = 1 if node.op_type == "Upsample" or self.version < 11 else 2
            if len(node.inputs) > 3 and node.inputs[3] is not None:
                return self._by_shape(node)
            scales = constant_array(node.inputs[at]) if len(node.inputs) > at else None
        if scales is None:
            return "its scales are not constant"
        return node.inputs[0] if len(scales) and all(scale == 1 for scale in scales) else None

    def _single(self, node: ir.Node) -> Verdict:
        return node.inputs[0] if len(node.inputs) == 1 else None

    def _twice(self, node: ir.Node) -> Verdict:
        inner = node.inputs[0].producer() if node.inputs[0] is not None else None
        return inner.inputs[0] if inner is not None and is_op(inner, node.op_type) else None

    def _arithmetic(self, node: ir.Node) -> Verdict:
        neutral = 0 if node.op_type in ("Add", "Sub") else 1
        sides = [1, 0] if node.op_type in ("Add", "Mul") and self.version >= 7 else [1]
        for side in sides:
            array = constant_array(node.inputs[side]) if len(node.inputs) == 2 else None
            kept = node.inputs[1 - side]
            if array is None or kept is None or array.dtype.kind not in "fiuV" or not array.size:
                continue
            if array.reshape(-1)[0] != neutral or not (array == neutral).all():
                continue
            if node.op_type == "Pow":
                return "a power is computed in floating point, which rounds large integers and loses the sign of NaN"
            negative = np.signbit(array.astype(np.float64))
            turned = node.op_type == "Add" and array.dtype.kind in "fV" and not negative.all()
            if turned and not sign_of_zero_is_lost(node.outputs[0]):
                return "adding 0.0 turns -0.0 into 0.0, which somebody may see"
            if node.op_type == "Sub" and array.dtype.kind in "fV" and negative.any():
                return "subtracting -0.0 turns -0.0 into 0.0"
            return kept if self._fits(array.shape, kept) else "broadcasting may change the shape, as far as it is known"
        return None

    def _fits(self, shape: tuple[int, ...], kept: ir.Value) -> bool:
        """Whether a constant of this shape leaves the other side's shape alone."""
        if not shape or self.version < 7:  # before opset 7 the second input never broadens the first
            return True
        known = self.facts.shape(kept)
        if known is None or len(shape) > len(known):
            return False
        return all(d == 1 or d == k for d, k in zip(shape[::-1], known[::-1], strict=False))
