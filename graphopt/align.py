"""Which node and value of A is which of B: by what they compute and what is made of them, not by names or order.

Certain matches come first (same computation, same use), then those that one change hides (same computation or same
use), then the neighbours of what is matched; what is left over was added or removed. Every stage is linear in the size
of the models but for sorting.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from graphopt.errors import InputError, ModelError
from graphopt.external import shown
from graphopt.model import ModelLike, gather, load, read_proto, to_proto
from graphopt.numbering import EXACT, LOOSE, SHAPE, Numbers, Place, Side, View, opsets
from graphopt.remote import place
from graphopt.residue import dense_tensors, graphs
from graphopt.structure import check_proto

Pairs = Sequence[tuple[str, str]]

_REACH = 4
"""So many nodes in a row may have come or gone between two that correspond (Q and DQ, a fused BatchNormalization)."""


@dataclass
class Alignment:
    """What corresponds in the main graphs of two models.

    ``values`` goes from A's value names to B's. Two values of A may share one of B: of two equal computations one was
    dropped, or a node was folded into its neighbour (Conv and BatchNormalization into Conv: both their outputs go to
    the new Conv's). ``how`` says for each value what speaks for it: "same" (computed alike, from equal weights),
    "structure" (alike but for the bytes of weights), "node" (made by nodes that correspond, something before them or in
    them differs) or "use" (only what reads it corresponds).
    """

    a: onnx.ModelProto
    b: onnx.ModelProto
    """The models as they were aligned: nodes that were out of order are in order here."""
    nodes: dict[int, int]
    """Positions in ``a.graph.node`` -> positions in ``b.graph.node``."""
    values: dict[str, str]
    how: dict[str, str]


def align(a: ModelLike, b: ModelLike, *, external_roots: Sequence[str | Path] = ()) -> Alignment:
    """Align two models by structure; neither is changed, nothing is run.

    Raises:
        InputError: a file cannot be read.
        ModelError: it is no ONNX model, or weights that have to be compared are missing.
    """
    first, second = sides(a, b, external_roots)
    views = View(first, first.proto.graph, opsets(first.proto)), View(second, second.proto.graph, opsets(second.proto))
    pairing = pair_main(*views)
    values, how = pairing.all_values()
    nodes = {views[0].positions[i]: views[1].positions[j] for i, j in pairing.nodes.items()}
    for x, y in pairing.weights.items():
        constants = views[0].weights[x].node, views[1].weights[y].node
        if constants[0] is not None and constants[1] is not None:
            nodes[constants[0]] = constants[1]
    return Alignment(first.proto, second.proto, dict(sorted(nodes.items())), values, how)


def sides(a: ModelLike, b: ModelLike, roots: Sequence[str | Path] = ()) -> tuple[Side, Side]:
    """Both models read and checked, ready to be numbered together."""
    # A model is not to be turned into text to see whether it is "-": that took 10 s for 45 MB of weights.
    if all(isinstance(source, (str, Path)) and str(source) == "-" for source in (a, b)):
        raise InputError("A and B are both '-'; only one model can come from standard input")
    number, folders = Numbers(), tuple(Path(root) for root in roots)
    found = [Side(*_proto(source), number, *_folder(source), folders) for source in (a, b)]
    places: list[set[Place | None]] = [{side.place(t) for t in dense_tensors(side.proto)} for side in found]
    common = frozenset(place for place in places[0] & places[1] if place is not None)
    for side in found:
        side.common = common
    return found[0], found[1]


def _folder(source: ModelLike) -> tuple[Path | None]:
    path = isinstance(source, (str, Path)) and str(source) != "-"
    return (Path.cwd() / place(source).parent if path else None,)


def _proto(source: ModelLike) -> tuple[onnx.ModelProto]:
    if isinstance(source, (str, Path)):
        where = "standard input" if str(source) == "-" else shown(str(source))
        proto = read_proto(source)
        gather(source, proto)
    elif isinstance(source, onnx.ModelProto):
        where, proto = "the ModelProto given", onnx.ModelProto()
        proto.CopyFrom(source)  # its nodes may have to be put in order
    else:
        where, proto = f"the {type(source).__name__} given", to_proto(load(source))
    check_proto(proto, where)
    if not all(isinstance(text, str) for text in _texts(proto)):
        raise ModelError(f"{where} has names that are no text (UTF-8); export it again")
    return (proto,)


def _texts(proto: onnx.ModelProto) -> Iterator[Any]:
    """What is sorted and printed here and was not looked at before; protobuf gives bytes where it is no text."""
    for graph in (*graphs(proto), *proto.functions):
        ports = () if isinstance(graph, onnx.FunctionProto) else (*graph.input, *graph.output)
        for value in (*ports, *graph.value_info):
            yield value.name
            yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
        for node in graph.node:
            yield from (text for a in node.attribute for text in (a.name, a.ref_attr_name))


def pair_names(a: Sequence[str], b: Sequence[str]) -> list[tuple[str, str]]:
    """What goes in or out: by name, the rest by position."""
    known = set(b)
    pairs = [(name, name) for name in a if name in known]
    done = {name for name, _ in pairs}
    rest = [[name for name in names if name not in done] for names in (a, b)]
    return pairs + list(zip(*rest, strict=False))


def pair_main(a: View, b: View) -> Pairing:
    """Two main graphs."""
    return Pairing(a, b, pair_names(a.inputs, b.inputs), pair_names(a.outputs, b.outputs))


def pair_body(a: View, b: View, captured: Mapping[str, str] | None = None) -> Pairing:
    """Two bodies or functions: inputs and outputs go by position; ``captured`` aligns the values outside."""
    outside = [(name, captured[name]) for name in a.free if captured and name in captured]
    return Pairing(
        a, b, list(zip(a.inputs, b.inputs, strict=False)), list(zip(a.outputs, b.outputs, strict=False)), outside
    )


@dataclass(eq=False)
class Pairing:
    """Two graphs aligned. Nodes are known by their index in the views."""

    a: View
    b: View
    inputs: Pairs
    outputs: Pairs
    captured: Pairs = ()
    nodes: dict[int, int] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    """One to one: inputs, captured values, outputs of matched nodes, weights."""
    weights: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.back: dict[int, int] = {}
        self._order: list[int] = []
        self.values.update([*self.inputs, *self.captured])
        self._number()
        self._match()
        self._pair_weights()
        self.taken = {y: x for x, y in self.values.items()}

    def _number(self) -> None:
        number = self.a.side.number
        for view, column in ((self.a, 0), (self.b, 1)):
            view.number_downs({pair[column]: k for k, pair in enumerate(self.outputs)})
        seeds: list[dict[str, int]] = []
        for view, column in ((self.a, 0), (self.b, 1)):
            ids = {n: number("alone", column, n) for n in (*view.inputs, *view.free)}
            ids.update({pair[column]: number("captured", pair[1]) for pair in self.captured})
            ids.update({pair[column]: number("input", view.depth, k) for k, pair in enumerate(self.inputs)})
            seeds.append(ids)
        self.ups_a, self.ups_b = (
            [view.ups(level, ids) for level in (EXACT, SHAPE, LOOSE)]
            for view, ids in zip((self.a, self.b), seeds, strict=True)
        )

    def _match(self) -> None:
        down_a, down_b = self.a.node_downs, self.b.node_downs
        for level in (EXACT, None, SHAPE, LOOSE):
            if level is None:  # whatever became of its result
                self._by_key(self.ups_a[EXACT][0], self.ups_b[EXACT][0])
            else:
                up_a, up_b = self.ups_a[level][0], self.ups_b[level][0]
                self._by_key(list(zip(up_a, down_a, strict=True)), list(zip(up_b, down_b, strict=True)))
        if self._done():
            return
        self._by_key(*(_weights_of(view) for view in (self.a, self.b)), unique=True)
        self._propagate(strict=True, reach=0)
        self._by_key(self.ups_a[SHAPE][0], self.ups_b[SHAPE][0])
        self._by_key(down_a, down_b)
        self._by_key(self.ups_a[LOOSE][0], self.ups_b[LOOSE][0])
        self._propagate(strict=True)
        self._propagate(strict=False)
        self._by_key(self._places(self.a, True), self._places(self.b, False), unique=True)  # another operator instead
        kept = [
            list(zip((s[EXACT] for s in v.signatures), _weights_of(v, small=True), strict=True))
            for v in (self.a, self.b)
        ]
        self._by_key(*kept, unique=True)  # the same node elsewhere
        self._propagate(strict=False)

    def _done(self) -> bool:
        return len(self.nodes) in (len(self.a.nodes), len(self.b.nodes))

    def _add(self, i: int, j: int) -> None:
        self.nodes[i], self.back[j] = j, i
        self._order.append(i)
        for x, y in zip(self.a.nodes[i].output, self.b.nodes[j].output, strict=False):
            if x and y:
                self.values[x] = y

    def _wiring(self, view: View, index: int) -> tuple[Hashable, ...]:
        """What the node reads, in B's names; weights by their content, since they are paired last."""
        ups = self.ups_a if view is self.a else self.ups_b
        names = view.nodes[index].input
        return tuple(
            ups[EXACT][1][n] if not n or n in view.weights else self.values.get(n) if view is self.a else n
            for n in names
        )

    def _by_key(self, keys_a: Sequence[Hashable], keys_b: Sequence[Hashable], *, unique: bool = False) -> None:
        """Match nodes of equal keys (None never matches): those whose inputs correspond as well, then in order."""
        pools: dict[Hashable, dict[tuple[Hashable, ...], deque[int]]] = {}
        sizes: dict[Hashable, int] = {}
        for j, key in enumerate(keys_b):
            if j not in self.back and key is not None:
                sizes[key] = sizes.get(key, 0) + 1
                pools.setdefault(key, {}).setdefault(self._wiring(self.b, j), deque()).append(j)
        waiting: dict[Hashable, int] = {}
        for i, key in enumerate(keys_a):
            if i not in self.nodes and key in pools:
                waiting[key] = waiting.get(key, 0) + 1
        for i, key in enumerate(keys_a):
            pool = pools.get(key)
            if i in self.nodes or not pool or (unique and (waiting[key], sizes[key]) != (1, 1)):
                continue
            wiring = self._wiring(self.a, i)
            if wiring not in pool:
                wiring = next(iter(pool))
            self._add(i, pool[wiring].popleft())
            if not pool[wiring]:
                del pool[wiring]

    def _propagate(self, *, strict: bool, reach: int = _REACH) -> None:
        """Match the producers and consumers of what is matched, as far as that leads.

        Strict: only where there is one candidate on each side.
        """
        if self._done():
            return
        for x, y in self.outputs:
            self._producers(x, y, reach)
        for x, y in (*self.inputs, *self.captured):
            self._consumers(x, y, strict)
        at = 0
        while at < len(self._order):  # it grows on the way
            i = self._order[at]
            at, j = at + 1, self.nodes[i]
            mine, theirs = self.a.nodes[i], self.b.nodes[j]
            for x, y in zip(mine.input, theirs.input, strict=False):
                self._producers(x, y, reach)
            for x, y in zip(mine.output, theirs.output, strict=False):
                self._consumers(x, y, strict)

    def _producers(self, x: str, y: str, reach: int) -> None:
        """Match the nearest nodes of one operator on the way up, past at most ``reach`` that were added or removed."""
        mine, theirs = self._upwards(self.a, x, self.nodes, reach), self._upwards(self.b, y, self.back, reach)
        steps = ((i, total - i) for total in range(len(mine) + len(theirs) - 1) for i in range(total + 1))
        for i, j in steps:
            if i < len(mine) and j < len(theirs) and mine[i][1] == theirs[j][1]:
                p, q = mine[i][0], theirs[j][0]
                if self.a.signatures[p][LOOSE] == self.b.signatures[q][LOOSE]:
                    return self._add(p, q)
        return None

    def _upwards(self, view: View, name: str, done: Mapping[int, int], reach: int) -> list[tuple[int, int]]:
        """Unmatched nodes above a value, and which output leads to it; as far as there is one way only."""
        found: list[tuple[int, int]] = []
        while name in view.producer and len(found) <= reach:
            index, slot = view.producer[name]
            if index in done:
                break
            found.append((index, slot))
            above = [n for n in view.nodes[index].input if n and n not in view.weights]
            if len(above) != 1:
                break
            name = above[0]
        return found

    def _consumers(self, x: str, y: str, strict: bool) -> None:
        groups: tuple[dict[Hashable, list[int]], dict[Hashable, list[int]]] = ({}, {})
        if not x or not y:
            return
        for view, name, done, found in ((self.a, x, self.nodes, groups[0]), (self.b, y, self.back, groups[1])):
            for index, slot in view.uses.get(name, ()):
                if index not in done:
                    found.setdefault((view.signatures[index][LOOSE], slot), []).append(index)
        for key, mine in groups[0].items():
            theirs = groups[1].get(key, [])
            if strict and (len(mine), len(theirs)) != (1, 1):
                continue
            for i, j in zip(mine, theirs, strict=False):
                if i not in self.nodes and j not in self.back:
                    self._add(i, j)

    def _places(self, view: View, mine: bool) -> list[Hashable]:
        """For each node where it stands: between which matched nodes. None where a neighbour has no counterpart."""
        outputs = {pair[0 if mine else 1]: k for k, pair in enumerate(self.outputs)}
        done = self.nodes if mine else self.back
        keys: list[Hashable] = []
        for index, node in enumerate(view.nodes):
            made = [name for name in node.output if name]
            users = [(user, slot) for name in made for user, slot in view.uses.get(name, ())]
            reads = [name for name in node.input if name and name not in view.weights]
            known = all(view.producer[n][0] in done for n in reads if n in view.producer)
            known = known and all(user in done for user, _ in users)
            if index in done or not known or not (users or any(n in outputs for n in made)):
                keys.append(None)
            else:
                names = tuple(self.values.get(n) if mine else n for n in reads)
                places = sorted((self.nodes[u] if mine else u, slot) for u, slot in users)
                keys.append((names, tuple(places), tuple(outputs.get(n) for n in made)))
        return keys

    def _pair_weights(self) -> None:
        """One to one: by who reads them (equal ones first, of these those of one name), by content, by name."""
        exact = self.ups_a[EXACT][1], self.ups_b[EXACT][1]
        found = [pair for i, j in self.nodes.items() for pair in self._read_alike(i, j)]
        pairs = dict.fromkeys([*found, *self.outputs])
        votes = [(x, y) for x, y in pairs if x in self.a.weights and y in self.b.weights]
        equal = [(x, y) for x, y in votes if exact[0][x] == exact[1][y]]
        add = partial(_pair_once, self.weights, set(self.weights.values()))
        for x, y in [*((x, y) for x, y in equal if x == y), *equal]:
            add(x, y)
        for x, y in votes:
            add(x, y)
        pool: dict[int, deque[str]] = {}
        taken = set(self.weights.values())
        for y in self.b.weights:
            if y not in taken:
                pool.setdefault(exact[1][y], deque()).append(y)
        for x in self.a.weights:
            if x not in self.weights and pool.get(exact[0][x]):
                add(x, pool[exact[0][x]].popleft())
        for x in self.a.weights:
            if x in self.b.weights:
                add(x, x)
        self.values.update(self.weights)

    def _read_alike(self, i: int, j: int) -> Iterator[tuple[str, str]]:
        """What two matched nodes read in one place; their bodies, too."""
        yield from zip(self.a.nodes[i].input, self.b.nodes[j].input, strict=False)
        if self.a.bodies[i]:
            slots = self.b.captures(j)
            yield from ((x, slots[slot]) for slot, x in self.a.captures(i).items() if slot in slots)

    def all_values(self) -> tuple[dict[str, str], dict[str, str]]:
        """:attr:`Alignment.values` and :attr:`Alignment.how`."""
        values, how = dict(self.values), dict[str, str]()
        for level in (EXACT, SHAPE):
            numbered: dict[int, list[str]] = {}
            for y, number in self.ups_b[level][1].items():
                numbered.setdefault(number, []).append(y)
            for x, number in self.ups_a[level][1].items():
                found = numbered.get(number, [])
                if x and x not in values and (found if level == EXACT else len(found) == 1):
                    values[x] = found[0]
        for i, j in self.nodes.items():
            for x, y in zip(self.a.nodes[i].input, self.b.nodes[j].input, strict=False):
                if x and y and x not in values and x not in self.a.weights and y not in self.b.weights:
                    values[x], how[x] = y, "use"
        for x, y in values.items():
            if x not in how:
                same = [self.ups_a[level][1].get(x) == self.ups_b[level][1].get(y) for level in (EXACT, SHAPE)]
                how[x] = "same" if same[0] else "structure" if same[1] else "node"
        return values, how


def _pair_once(pairs: dict[str, str], taken: set[str], x: str, y: str) -> None:
    if x not in pairs and y not in taken:
        pairs[x] = y
        taken.add(y)


def _weights_of(view: View, *, small: bool = False) -> list[Any]:
    """For each node its operator and the weights it reads, where there are any worth the name (or ``small`` ones)."""
    keys: list[Any] = []
    for index, node in enumerate(view.nodes):
        read = [(k, view.weights[n]) for k, n in enumerate(node.input) if n in view.weights]
        large = small or any(isinstance(w.tensor, onnx.SparseTensorProto) or _count(w.tensor) >= 4 for _, w in read)
        content = tuple((k, view.side.weight(w)) for k, w in read)
        keys.append((view.operator(index), content) if large else None)
    return keys


def _count(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims)
