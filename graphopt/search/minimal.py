"""The smallest piece of a model on which a pass still goes wrong, and where it goes wrong first.

Cones behind a diverging value are tried from small to large; the first that will do is thinned out node by node (delta
debugging, Zeller and Hildebrandt 2002, with single nodes as the steps). Every try runs the pass on a piece, fed with
what the whole model computes there, and compares.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.base import Context
from graphopt.divergence import Layer, Tolerances, first_past
from graphopt.errors import GraphoptError, PreconditionError
from graphopt.extraction import cut_out, reads
from graphopt.layerwise import Tapped, compare_layers, match_values
from graphopt.ledger import Guilt
from graphopt.manager import run_pass
from graphopt.model import clone
from graphopt.user_code import one_line
from graphopt.validation import RANDOM_OPS
from graphopt.verify import Verifier, Violation

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.verify import Feed

MOST_TRIES = 80
"""Pieces tried before the smallest so far has to do."""

_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 1 << 30)
_DOWN = 4  # levels behind the diverging value that a piece may end at: what surrounds a rewrite may decide about it


@dataclass
class Piece:
    """A piece, the inputs on which the pass goes wrong there (None: none are needed), and how."""

    model: ir.Model
    feed: Feed | None
    violation: Violation


class Suspect:
    """One guilty pass, with only the rewrites in use that are to blame."""

    def __init__(self, guilt: Guilt, context: Context) -> None:
        self.guilt = guilt
        self.context = context
        self._off: frozenset[tuple[str, str]] = frozenset()
        name = str(getattr(guilt.pass_, "use", guilt.pass_.name))
        others = frozenset((name, s) for s in guilt.rewrites if guilt.sites and s not in guilt.sites)
        for off in (others, self._off):  # where the guilty ones are harmless alone, all together
            self._off = off
            if self.wrong(guilt.before, guilt.feed) is not None:
                break

    def after(self, model: ir.Model) -> ir.Model:
        """What the pass makes of ``model``.

        Raises:
            Exception: whatever the pass raises, or InternalError where it leaves a broken graph.
        """
        changed, pass_ = clone(model), self.guilt.pass_
        pass_.check(changed)
        disabled = frozenset((*self.context.disabled, *self._off))
        run_pass(pass_, changed, replace(self.context, original=clone(model), disabled=disabled), pass_.name)
        return changed

    def wrong(self, model: ir.Model, feed: Feed | None) -> Violation | None:
        """How the pass goes wrong on ``model``: numbers on ``feed``, or without one a crash or a broken graph."""
        try:
            after = self.after(model)
        except PreconditionError:
            return None
        except Exception as error:
            return Violation(one_line(error)) if feed is None else None
        if feed is None:
            return None
        verifier = Verifier(model, self.context, feeds=[feed])
        return None if verifier.unable is not None else verifier.violation(after)


# Where it starts


def first_divergence(suspect: Suspect, feed: Feed) -> dict[str, Any] | None:
    """The first value, in order of execution, that the guilty rewrites change by more than rounding, with numbers.

    Where none differs by more than rounding, the first that differs at all; None where no inner value can be compared
    (the result does not run, has another interface, or differs with the runtime's optimizations only).
    """
    before = suspect.guilt.before
    try:
        after = suspect.after(before)
        matches, _ = match_values(before, after)
        layers = compare_layers(before, after, lambda: [feed], matches, threads=suspect.context.threads)
        found = first_past(layers, Tolerances())
        layer = found[0] if found else next((one for one in layers if _moved(one)), None)
        if layer is None:
            return None
        names = layer.match.a, layer.match.b
        pair = [
            Tapped(model, [name], which, suspect.context.threads).run(feed)[name]
            for model, name, which in ((before, names[0], "before"), (after, names[1], "after"))
        ]
    except GraphoptError:
        return None
    why = found[1] if found else f"max abs diff {layer.largest:.3g}, no more than rounding"
    return {
        "value": names[0],
        "in_b": names[1],
        "node": layer.match.node,
        "op_type": layer.match.op_type,
        "why": why,
        "max_abs": layer.largest,
        **_elements(*pair),
    }


def _moved(layer: Layer) -> bool:
    return layer.judged and (layer.largest > 0 or layer.mismatch is not None)


def _elements(a: Any, b: Any) -> dict[str, Any]:
    """Type and shape, how many elements differ, and the first and the worst that do; ``None`` where none can."""
    shown: dict[str, Any] = dict.fromkeys(("dtype", "shape", "elements", "differ", "first", "worst"))
    if not isinstance(a, np.ndarray):
        return shown
    shown |= {"dtype": str(a.dtype), "shape": list(a.shape), "elements": a.size}
    if not isinstance(b, np.ndarray) or a.shape != b.shape or a.dtype != b.dtype or a.dtype.kind not in "fiub":
        return shown
    same = (a == b) | ((a != a) & (b != b))
    where = np.flatnonzero(~same)
    if where.size == 0:
        return shown
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(a.reshape(-1)[where].astype(np.float64) - b.reshape(-1)[where].astype(np.float64))
    worst = int(where[np.nan_to_num(apart, nan=np.inf).argmax()])

    def at(flat: int) -> dict[str, Any]:
        index = [int(i) for i in np.unravel_index(flat, a.shape)]
        return {"index": index, "before": str(a.reshape(-1)[flat]), "after": str(b.reshape(-1)[flat])}

    return shown | {"differ": int(where.size), "first": at(int(where[0])), "worst": at(worst)}


# The piece


def smallest(suspect: Suspect, value: str | None) -> Piece:
    """The smallest piece found on which the pass still goes wrong, around ``value`` (or any output); else the whole."""
    guilt = suspect.guilt
    whole = Piece(guilt.before, guilt.feed, guilt.violation)
    if guilt.feed is None:
        return whole
    cutter = _Cutter(suspect, guilt.feed)
    for last in cutter.ends(value):
        size = -1
        for depth in _DEPTHS:
            nodes = cutter.cone(last, depth)
            if len(nodes) == size:
                break
            size = len(nodes)
            piece = cutter.tried(nodes, last)
            if piece is not None:
                return cutter.thinned(piece, nodes, last)
    return whole


class _Cutter:
    """Cuts pieces out of the model before the pass, at values that depend on what is fed; weights come along."""

    def __init__(self, suspect: Suspect, feed: Feed) -> None:
        self._suspect = suspect
        self._model = suspect.guilt.before
        self._feed = feed
        self._left = MOST_TRIES
        self._live: set[ir.Value] = {v for v in self._model.graph.inputs if not v.is_initializer()}
        self._order: dict[ir.Node, int] = {}
        for index, node in enumerate(self._model.graph):
            if any(v in self._live for v in reads(node)) or node.op_type in RANDOM_OPS:
                self._live.update(node.outputs)
                self._order[node] = index

    def ends(self, value: str | None) -> Iterator[list[ir.Value]]:
        """What a piece may end with: the diverging value, what is made of it, each output, all of them."""
        made = {v.name: v for node in self._order for v in node.outputs}
        level = [made[value]] if value in made else []
        for _ in range(_DOWN):
            if level:
                yield level
            readers = dict.fromkeys(n for v in level for n, _ in v.uses() if n in self._order)
            level = [v for node in readers for v in node.outputs if v.uses() or v.is_graph_output()]
        outputs = [v for v in self._model.graph.outputs if v.producer() in self._order]
        yield from ([v] for v in outputs)
        yield outputs

    def cone(self, last: Iterable[ir.Value], depth: int) -> list[ir.Node]:
        """The live nodes up to ``depth`` levels behind ``last``, in order."""
        found: set[ir.Node] = set()
        level = {n for v in last if (n := v.producer()) in self._order and n is not None}
        while level and depth > 0:
            found |= level
            behind = {v.producer() for node in level for v in reads(node) if v in self._live}
            level = {n for n in behind if n is not None and n in self._order} - found
            depth -= 1
        return sorted(found, key=self._order.__getitem__)

    def tried(self, nodes: Sequence[ir.Node], last: Sequence[ir.Value]) -> Piece | None:
        """The piece of these nodes, if the pass goes wrong on it."""
        made = {v for node in nodes for v in node.outputs}
        first = dict.fromkeys(v.name or "" for n in nodes for v in reads(n) if v in self._live and v not in made)
        if self._left <= 0 or not first or not made.issuperset(last):
            return None
        self._left -= 1
        try:
            piece, _ = cut_out(self._model, list(first), [v.name or "" for v in last])
            tapped = Tapped(self._model, first, "before", self._suspect.context.threads).run(self._feed)
            feed = {name: tapped[name] for name in first}
            violation = self._suspect.wrong(piece, feed)
        except GraphoptError:  # a value of unknown type, or of one that numpy has not
            return None
        return Piece(piece, feed, violation) if violation is not None else None

    def thinned(self, piece: Piece, nodes: Sequence[ir.Node], last: Sequence[ir.Value]) -> Piece:
        """Without the nodes that are not needed for it."""
        kept = list(nodes)
        for node in nodes:
            if node in kept and len(kept) > 1:
                rest = self._needed([n for n in kept if n is not node], last)
                smaller = self.tried(rest, last)
                if smaller is not None:
                    piece, kept = smaller, rest
        return piece

    def _needed(self, nodes: Sequence[ir.Node], last: Sequence[ir.Value]) -> list[ir.Node]:
        """Those of ``nodes`` that still lead to ``last``."""
        inside, found = set(nodes), set[Any]()
        stack = [v.producer() for v in last]
        while stack:
            node = stack.pop()
            if node in inside and node not in found:
                found.add(node)
                stack.extend(v.producer() for v in reads(node))
        return [n for n in nodes if n in found]
