"""Which parts run in integers, as a minimum cut.

Every region that could is on one of two sides. On its side it pays what it takes there; a value that crosses pays a
conversion. The cheapest assignment is a minimum s-t cut (Greig, Porteous and Seheult 1989), found exactly, because all
of that is a sum of terms of one or two regions:

* float to integer: one QuantizeLinear serves all integer readers, so one auxiliary node per value stands for them;
* integer to float: ONNX Runtime copies the DequantizeLinear for every reader (its profile shows them), so each pays.

Damage to the outputs, weighted with lambda, joins what a region pays in integers; lambda from 0 up gives the placements
on the convex hull of damage against time. A layer that may have uint8 weights in place of 7-bit int8 ones, for which
there is another kernel, pays the less of the two at each lambda: both read the same integers, so two sides are enough.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from graphopt.graph import label
from graphopt.passes._placement import after_absorbed

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.passes._placement import Placement
    from graphopt.target import Target

_INTEGER, _FLOAT = "integer side", "float side"
_POINTS = 16
"""Placements on the hull, at most."""


@dataclass(frozen=True)
class Unit:
    """A region that the runtime computes as one, on either side: a layer or light operator with what it absorbs.

    ``integer_output``: whether its integer kernel makes integers (a MatMul's makes floats).
    """

    name: str
    layer: bool
    nodes: tuple[ir.Node, ...]
    reads: tuple[ir.Value, ...]
    makes: ir.Value
    integer_output: bool


@dataclass
class Prices:
    """Nanoseconds: of each unit on each side, by name, and of those that may have uint8 weights with these; of
    quantizing a value once; of dequantizing it for one reader (the unit's name, or ``""`` for what only runs in
    float)."""

    in_float: dict[str, int] = field(default_factory=dict)
    in_integers: dict[str, int] = field(default_factory=dict)
    in_uint8: dict[str, int] = field(default_factory=dict)
    quantize: dict[ir.Value, int] = field(default_factory=dict)
    dequantize: dict[tuple[ir.Value, str], int] = field(default_factory=dict)


@dataclass(frozen=True)
class Mixture:
    """By name, the units left in float, and those in integers whose weights are uint8 in place of 7-bit int8."""

    floats: frozenset[str] = frozenset()
    uint8: frozenset[str] = frozenset()


def units(placement: Placement, target: Target) -> list[Unit]:
    """The regions of a placement that has everything in integers that can be."""
    found = []
    for layer in placement.layers:
        node, inner = layer.node, layer.adder
        whole = node.op_type in target.needs_integer_output
        makes = after_absorbed(node, target) if whole else (inner or node).outputs[0]
        found.append(_unit(node, makes, (layer.data,), layer=True, integer_output=whole, inner=inner))
    for node in placement.light:
        makes = after_absorbed(node, target) if node.op_type in target.bridging else node.outputs[0]
        reads = tuple(dict.fromkeys(v for v in node.inputs if v is not None and v in placement.quantized))
        found.append(_unit(node, makes, reads, layer=False, integer_output=True))
    return found


def _unit(
    node: ir.Node,
    makes: ir.Value,
    reads: tuple[ir.Value, ...],
    *,
    layer: bool,
    integer_output: bool,
    inner: ir.Node | None = None,
) -> Unit:
    last = makes.producer()
    chain = dict.fromkeys(n for n in (node, inner, last) if n is not None)
    return Unit(label(node), layer, tuple(chain), reads, makes, integer_output)


@dataclass(frozen=True)
class Border:
    """A value that may have to be converted: who makes it in integers (None: nobody), which units read it as integers
    if they are, and how many others read it as floats."""

    value: ir.Value
    maker: Unit | None
    readers: tuple[Unit, ...]
    others: tuple[ir.Node | None, ...]


def borders(found: Sequence[Unit]) -> list[Border]:
    """Every value between units, or between a unit and the rest."""
    makers = {unit.makes: unit for unit in found if unit.integer_output}
    readers: dict[ir.Value, list[Unit]] = {}
    for unit in found:
        for value in unit.reads:
            readers.setdefault(value, []).append(unit)
    result = []
    for value in dict.fromkeys([*makers, *readers]):
        mine = {unit.nodes[0] for unit in readers.get(value, ())}
        others: list[ir.Node | None] = [use.node for use in value.uses() if use.node not in mine]
        others += [None] if value.is_graph_output() else []
        result.append(Border(value, makers.get(value), tuple(readers.get(value, ())), tuple(others)))
    return result


def cut(found: Sequence[Unit], prices: Prices, penalty: Mapping[str, int] | None = None) -> frozenset[str]:
    """The units that are cheapest left in float, by name.

    ``penalty``: nanoseconds that a unit pays in integers on top (lambda times its damage). Where both sides cost the
    same, integers win: they are smaller.
    """
    import networkx as nx

    graph: nx.DiGraph[Any] = nx.DiGraph()
    graph.add_nodes_from([_INTEGER, _FLOAT])

    def pay(a: Any, b: Any, price: int) -> None:
        """``price`` where ``a`` is on the integer side and ``b`` is not."""
        if a == b:
            return
        known = graph.get_edge_data(a, b, {"capacity": 0})["capacity"]
        graph.add_edge(a, b, capacity=known + price)

    for unit in found:
        pay(_INTEGER, unit.name, prices.in_float[unit.name])
        pay(unit.name, _FLOAT, prices.in_integers[unit.name] + (penalty or {}).get(unit.name, 0))
    for index, border in enumerate(borders(found)):
        maker = border.maker.name if border.maker is not None else _FLOAT
        if border.readers and border.value in prices.quantize:
            pay(("quantized", index), maker, prices.quantize[border.value])
            for reader in border.readers:
                graph.add_edge(reader.name, ("quantized", index))  # no capacity: they cannot part
        if border.maker is not None:
            for reader in border.readers:
                pay(maker, reader.name, prices.dequantize.get((border.value, reader.name), 0))
            pay(maker, _FLOAT, len(border.others) * prices.dequantize.get((border.value, ""), 0))
    _, (integer, _) = nx.minimum_cut(graph, _INTEGER, _FLOAT)
    return frozenset(unit.name for unit in found if unit.name not in integer)


def price(found: Sequence[Unit], prices: Prices, floats: frozenset[str], uint8: Collection[str] = ()) -> int:
    """Nanoseconds of a placement: its units and conversions, not what runs in float anyway."""
    inside = {**prices.in_integers, **{name: prices.in_uint8[name] for name in uint8}}
    total = sum((prices.in_float if unit.name in floats else inside)[unit.name] for unit in found)
    for border in borders(found):
        integer = border.maker is not None and border.maker.name not in floats
        if integer:
            left = [r.name for r in border.readers if r.name in floats]
            total += sum(prices.dequantize.get((border.value, name), 0) for name in left)
            total += len(border.others) * prices.dequantize.get((border.value, ""), 0)
        elif any(reader.name not in floats for reader in border.readers):
            total += prices.quantize.get(border.value, 0)
    return total


def hull(
    found: Sequence[Unit], prices: Prices, damages: Mapping[str, float], in_uint8: Mapping[str, float] | None = None
) -> list[Mixture]:
    """The mixtures on the convex hull of time against summed damage, the fastest first, all-float last.

    ``in_uint8``: what units that may have uint8 weights damage with these.
    """
    # A layer alone may ruin an output (its shape changes): that outweighs whatever the others do together.
    finite = [d for each in (damages, in_uint8 or {}) for d in each.values() if math.isfinite(d)]
    ruin = 2 * sum(finite) + 1
    damages = {name: d if math.isfinite(d) else ruin for name, d in damages.items()}
    wide = {n: d if math.isfinite(d) else ruin for n, d in (in_uint8 or {}).items() if n in prices.in_uint8}
    everything = Mixture(frozenset(unit.name for unit in found))

    def spent(mixture: Mixture) -> float:
        inside = everything.floats - mixture.floats
        return sum((wide if name in mixture.uint8 else damages).get(name, 0.0) for name in inside)

    def time(mixture: Mixture) -> int:
        return price(found, prices, mixture.floats, mixture.uint8)

    def at(weight: float) -> Mixture:
        """The best where a unit of damage costs ``weight`` nanoseconds (lambda)."""
        inside = {name: ns + round(weight * damages.get(name, 0.0)) for name, ns in prices.in_integers.items()}
        other = {name: prices.in_uint8[name] + round(weight * d) for name, d in wide.items()}
        better = {name for name, ns in other.items() if ns < inside[name]}
        floats = cut(found, replace(prices, in_integers={**inside, **{name: other[name] for name in better}}))
        return Mixture(floats, frozenset(better - floats))

    fastest = at(0.0)
    points = {fastest, everything}
    todo = [(fastest, everything)] if len(points) > 1 else []
    while todo and len(points) < _POINTS:
        fast, good = todo.pop(0)
        gain = spent(fast) - spent(good)
        if gain <= 0:
            continue
        between = at((time(good) - time(fast)) / gain)
        if between not in points:
            points.add(between)
            todo += [(fast, between), (between, good)]
    return sorted(points, key=lambda p: (time(p), spent(p), sorted(p.floats), sorted(p.uint8)))
