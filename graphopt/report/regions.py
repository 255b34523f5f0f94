"""What the HTML report draws of a changed graph: the places where nodes came, went or changed, and what is around.

Both main graphs are laid over each other by :mod:`graphopt.align`. Nodes that came or went belong to the node that
reads their result; places that look alike are one region that says how often it is there, so that a page shows the few
things that were done and not the hundreds of places where they were done.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.align import Pairing, pair_main, sides
from graphopt.difference import Wiring, attribute_edits, label, operator
from graphopt.errors import GraphoptError
from graphopt.model import ModelLike, load, weight_bytes
from graphopt.numbering import EXACT, View, opsets
from graphopt.report.drawing import Box, draw
from graphopt.tensors import type_name

NODES = 30_000
"""Main graphs with more nodes than this are not aligned for a picture."""

WEIGHTS = 1 << 30
"""Bytes: nor are models with more weights inside the file, since alignment reads them."""

_SHOWN = 6  # regions on a page
_CORE = 10  # nodes that came, went or changed in one picture
_AROUND = 5  # nodes beside them
_NAMED = 4  # places of one kind that are named

Key = tuple[str, int | str]
"""``=`` with A's index, ``-`` with A's, ``+`` with B's; ``<`` and ``>`` with the name of an input or output."""


def changed_regions(a: ModelLike, b: ModelLike, *, external_roots: Sequence[str | Path] = ()) -> dict[str, Any]:
    """The regions to draw between A and B, as :func:`graphopt.report.html.render` takes them; nothing is changed.

    Returns:
        ``added``, ``removed`` and ``changed``: how many nodes; ``regions``: the pictures; ``left_out``: how many more
        kinds of place there are; ``why``: why nothing is drawn, else None.
    """
    nothing = {"added": 0, "removed": 0, "changed": 0, "regions": [], "left_out": 0, "why": None}
    if any(_weighs(model) > WEIGHTS for model in (a, b)):
        return {**nothing, "why": "too many weights to be read for a picture"}
    try:
        first, second = sides(a, b, external_roots)
    except GraphoptError as error:  # the picture is an extra: what the verb was asked for stands without it
        return {**nothing, "why": str(error)}
    largest = max(len(side.proto.graph.node) for side in (first, second))
    if largest > NODES:
        return {**nothing, "why": f"{largest} nodes are too many to be aligned for a picture"}
    views = View(first, first.proto.graph, opsets(first.proto)), View(second, second.proto.graph, opsets(second.proto))
    return _Overlay(pair_main(*views)).as_dict()


def _weighs(model: ModelLike) -> int:
    """Bytes to be read: all of a model in memory, of a file only what is not in data files beside it."""
    if isinstance(model, (str, Path)):
        return Path(model).stat().st_size if Path(model).is_file() else 0
    return weight_bytes(load(model))


@dataclass
class _Group:
    """One place: what came, went or changed, and the node it leads to."""

    anchor: Key
    core: list[Key] = field(default_factory=list)


class _Overlay:
    """Two aligned graphs as one."""

    def __init__(self, pairing: Pairing) -> None:
        self.pairing = pairing
        self.edges: dict[tuple[Key, Key], str] = {}
        self._connect()
        self.before: dict[Key, list[Key]] = {}
        self.after: dict[Key, list[Key]] = {}
        for x, y in self.edges:
            self.before.setdefault(y, []).append(x)
            self.after.setdefault(x, []).append(y)
        self.details = dict(self._changed())

    def as_dict(self) -> dict[str, Any]:
        """The whole, ready for JSON."""
        alike: dict[Any, list[_Group]] = {}
        for group in self._groups():
            alike.setdefault(self._pattern(group), []).append(group)
        ranked = sorted(alike.values(), key=lambda found: -sum(min(len(group.core), _CORE) for group in found))
        p = self.pairing
        return {
            "added": len(p.b.nodes) - len(p.nodes),
            "removed": len(p.a.nodes) - len(p.nodes),
            "changed": len(self.details),
            "regions": [self._region(found) for found in ranked[:_SHOWN]],
            "left_out": max(0, len(ranked) - _SHOWN),
            "why": None,
        }

    def _key(self, view: View, index: int) -> Key:
        p = self.pairing
        if view is p.a:
            return ("=", index) if index in p.nodes else ("-", index)
        return ("=", p.back[index]) if index in p.back else ("+", index)

    def _connect(self) -> None:
        """Who reads whom: in both, in B only (added), or in A only where one of the two was removed."""
        p = self.pairing
        mine, theirs = set(self._wires(p.a)), set(self._wires(p.b))
        for edge in mine | theirs:
            if edge in theirs:
                self.edges[edge] = "same" if edge in mine else "added"
            elif "-" in (edge[0][0], edge[1][0]):
                self.edges[edge] = "removed"
        self.edges = dict(sorted(self.edges.items(), key=lambda item: [self._order(key) for key in item[0]]))

    def _wires(self, view: View) -> Iterator[tuple[Key, Key]]:
        p = self.pairing
        names = dict(p.inputs) if view is p.a else {}
        known = set(view.inputs)
        for index, node in enumerate(view.nodes):
            for name in (*node.input, *view.captures(index).values()):
                if name in view.producer:
                    yield self._key(view, view.producer[name][0]), self._key(view, index)
                elif name in known:
                    yield ("<", names.get(name, name)), self._key(view, index)
        names = dict(p.outputs) if view is p.a else {}
        for name in view.outputs:
            if name in view.producer:
                yield self._key(view, view.producer[name][0]), (">", names.get(name, name))

    def _order(self, key: Key) -> tuple[int, int, str]:
        """Where a node stands in its graph: B's as far as it is there."""
        kind, where = key
        if isinstance(where, str):
            return (-1 if kind == "<" else 1 << 40), 0, where
        return (self.pairing.nodes[where], 0, "") if kind == "=" else (where, 1 if kind == "+" else 2, "")

    def _changed(self) -> Iterator[tuple[Key, str]]:
        """Nodes in both that are no longer the same, and what is other."""
        p, wiring = self.pairing, Wiring(self.pairing)
        for i, j in sorted(p.nodes.items()):
            mine, theirs = p.a.nodes[i], p.b.nodes[j]
            found: list[str] = []
            if p.a.operator(i) != p.b.operator(j):
                found.append(f"was {operator(mine)}")
            elif p.a.signatures[i][EXACT] != p.b.signatures[j][EXACT]:
                edits = attribute_edits(p.a, mine, p.b, theirs)
                found += [f"{what}: {was or 'none'} → {now or 'none'}" for what, was, now in edits]
            for slot in range(max(len(mine.input), len(theirs.input))):
                x, y = (node.input[slot] if slot < len(node.input) else "" for node in (mine, theirs))
                if x in p.a.weights and y in p.b.weights and p.weights.get(x) == y:
                    found += self._weight(x, y)
                elif not wiring.same(x, y) and not wiring.implied(x, y):
                    found.append(self._rewired(x, y))
            if found:
                yield ("=", i), "; ".join(dict.fromkeys(found))

    def _rewired(self, x: str, y: str) -> str:
        if not x or not y:
            return "+1 input" if y else "−1 input"
        return "new weights" if x in self.pairing.a.weights else f"reads {y}, not {x}"

    def _weight(self, x: str, y: str) -> list[str]:
        a, b = self.pairing.a, self.pairing.b
        if a.side.weight(a.weights[x]) == b.side.weight(b.weights[y]):
            return []
        before, after = type_name(a.weights[x].tensor), type_name(b.weights[y].tensor)
        return ["new weights" if before == after else f"weights {before} → {after}"]

    def _groups(self) -> list[_Group]:
        """Every place that changed, in order."""
        p = self.pairing
        new: list[Key] = [("-", i) for i in range(len(p.a.nodes)) if i not in p.nodes]
        new += [("+", j) for j in range(len(p.b.nodes)) if j not in p.back]
        groups: dict[Key, _Group] = {}
        owner: dict[Key, _Group] = {}
        for part in self._components(set(new), sorted(new, key=self._order)):
            inside = set(part)
            readers = [y for x in part for y in self.after.get(x, ()) if y not in inside]
            anchor = min(readers, key=self._order) if readers else part[-1]
            group = groups.setdefault(anchor, _Group(anchor))
            group.core += part
            owner.update(dict.fromkeys(part, group))
        for key in self.details:
            near = [owner[k] for k in (*self.before.get(key, ()), *self.after.get(key, ())) if k in owner]
            group = groups[key] if key in groups else near[0] if near else groups.setdefault(key, _Group(key))
            group.core.append(key)
        return sorted(groups.values(), key=lambda group: self._order(group.anchor))

    def _components(self, members: set[Key], order: Iterable[Key]) -> Iterator[list[Key]]:
        done: set[Key] = set()
        for start in order:
            if start not in done:
                yield sorted(self._spread([start], members, done), key=self._order)

    def _spread(self, starts: Sequence[Key], members: set[Key], done: set[Key]) -> Iterator[Key]:
        """``members`` reached from ``starts``, the nearest first; ``done`` grows."""
        waiting = deque(starts)
        done.update(starts)
        while waiting:
            key = waiting.popleft()
            if key in members:
                yield key
            for other in (*self.before.get(key, ()), *self.after.get(key, ())):
                if other in members and other not in done:
                    done.add(other)
                    waiting.append(other)

    def _kind(self, key: Key) -> str:
        return {"+": "added", "-": "removed"}.get(key[0], "changed" if key in self.details else "same")

    def _operator(self, key: Key) -> str:
        kind, where = key
        if isinstance(where, str):
            return "input" if kind == "<" else "output"
        if kind == "=":
            return operator(self.pairing.b.nodes[self.pairing.nodes[where]])
        return operator((self.pairing.a if kind == "-" else self.pairing.b).nodes[where])

    def _name(self, key: Key) -> str:
        kind, where = key
        if isinstance(where, str):
            return where
        return label((self.pairing.b if kind == "+" else self.pairing.a).nodes[where])

    def _pattern(self, group: _Group) -> Any:
        """What two places have in common that look alike."""
        inside = {*group.core, group.anchor}
        what = {key: (self._kind(key), self._operator(key)) for key in inside}
        wires = Counter((what[x], what[y]) for y in inside for x in self.before.get(y, ()) if x in inside)
        return what[group.anchor], frozenset(Counter(what.values()).items()), frozenset(wires.items())

    def _region(self, alike: list[_Group]) -> dict[str, Any]:
        """One picture for places that look alike: the first of them."""
        group = alike[0]
        members = set(group.core)
        core = list(self._spread([group.anchor], members | {group.anchor}, set()))[: _CORE + 1]
        core = [key for key in core if key in members]
        shown = dict.fromkeys(core)
        beside = [k for key in core for k in (*self.before.get(key, ()), *self.after.get(key, ())) if k not in members]
        beside = [group.anchor, *sorted(dict.fromkeys(beside), key=self._order)]
        shown.update(dict.fromkeys([key for key in dict.fromkeys(beside) if key not in members][:_AROUND]))
        edges = [(x, y, self.edges[x, y]) for y in shown for x in self.before.get(y, ()) if x in shown]
        boxes = {k: Box(self._kind(k), self._operator(k), self._name(k), self.details.get(k, "")) for k in shown}
        return {
            "operator": self._operator(group.anchor),
            "places": len(alike),
            "names": [self._name(one.anchor) for one in alike[:_NAMED]],
            "hidden": len(members) - len(core),
            **draw(boxes, edges, self._order),
        }
