"""Which channels, heads and hidden units of a graph can only go together, whatever framework it came from.

Every index of every axis of every constant carries an atom (``atoms``), and one walk over the graph at concrete shapes
(``trace``) follows them by rules per operator: elementwise operators unite what meets (``plain``), movement is run on
the atoms themselves (``movement``), and what multiplies matrices ends one set and starts another (``products``). No
pattern of layers is known anywhere. (DepGraph, Fang et al. 2023, arXiv 2301.12900, by provenance instead of patterns.)

A class of united atoms is a *unit*: what can be removed without touching the rest, or, where the walk met a reason,
what has to stay. Graph inputs and outputs never change. With dynamic dims the walk is made at two sizes, into the same
classes, so that what holds at one only is not held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np

from graphopt.channels import movement, plain, products, reshaping
from graphopt.channels.atoms import Atoms, live
from graphopt.channels.trace import Product, Shape, Trace, walk
from graphopt.cost import macs
from graphopt.graph import attribute, constant, label, opset, static_shape

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from graphopt.channels.atoms import Vector

RULES = {**plain.RULES, **movement.RULES, **reshaping.RULES, **products.RULES}

ONLY = "nothing would be left of an axis without it"


@dataclass(frozen=True)
class Group:
    """Units that lie along the same output axes and compete for places there.

    ``units``: their numbers, those that may go first; ``free``: how many may go. ``layers``: the nodes that make them.
    ``reason``: why the others stay.
    """

    name: str
    units: Vector
    free: int
    layers: tuple[ir.Node, ...]
    reason: str | None


@dataclass
class Channels:
    """What the walk found.

    ``unit``: per atom, the number of its unit; ``stays``: per unit that cannot go, why. ``constants``: the axes of each
    constant, ``axes``: of each value, as atoms (negative: stays).
    """

    unit: Vector
    count: int
    stays: dict[int, str]
    trace: Trace
    constants: dict[ir.Value, tuple[Vector, ...]]
    products: list[Product]
    groups: list[Group] = field(default_factory=list)

    def units_of(self, vector: Vector) -> Vector:
        """The unit at each index of an axis; -1 where the index stays."""
        return np.where(vector >= 0, self.unit[np.maximum(vector, 0)] if len(self.unit) else -1, -1)

    def kept(self, vector: Vector, keep: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which indices of an axis are left where the units of ``keep`` are."""
        found = self.units_of(vector)
        return np.where(found >= 0, keep[np.maximum(found, 0)] if len(keep) else True, True)

    def left(self, vector: Vector, keep: NDArray[np.bool_]) -> float:
        """The share of an axis that is left."""
        return float(self.kept(vector, keep).mean()) if len(vector) else 1.0

    def share(self, product: Product, keep: NDArray[np.bool_]) -> float:
        """The share of a node's MACs that is left."""
        total = 0.0
        for share, vectors in product.terms:
            for vector in vectors:
                if live(vector):
                    share *= self.left(vector, keep)
            total += share
        return total

    def node_macs(self) -> list[int]:
        """MACs of each of ``products``, in order, at the first sizes."""
        found = []
        for product in self.products:
            node = product.node
            shapes = [_known(self.trace, value) for value in node.inputs]
            out = _known(self.trace, node.outputs[0])
            transposed = {"transA": int(attribute(node, "transA", 0))}
            found.append(macs(node.op_type, shapes, out, transposed) or 0)
        return found


def _known(trace: Trace, value: ir.Value | None) -> Shape | None:
    if value is None:
        return None
    tensor = constant(value)
    return tuple(int(d) for d in tensor.shape.numpy()) if tensor is not None else trace.shapes.get(value.name or "")


def find_channels(
    model: ir.Model,
    sizes: Sequence[Mapping[str, Shape]],
    *,
    stays: Callable[[ir.Node], str | None] = lambda _: None,
) -> Channels:
    """Units and groups of the main graph.

    Args:
        model: functions inlined; bodies are not entered, and what they read stays.
        sizes: concrete shapes by value name, of one or two sizes of the dynamic dims; a value whose shape is missing
            stops everything that meets it.
        stays: a reason for a layer whose output channels are to stay, or None.
    """
    atoms = Atoms()
    constants: dict[ir.Value, tuple[Vector, ...]] = {}
    copied: dict[ir.Node, set[int]] = {}
    same = _same(model, sizes)
    traces = [Trace(atoms, shapes, opset(model), constants, same=same, copied=copied) for shapes in sizes]
    for trace in traces:
        walk(model.graph, RULES, trace)
        for product in trace.products:
            reason = stays(product.node)
            if reason is not None:
                atoms.freeze(product.made, reason)
    unit, frozen = atoms.classes()
    found = Channels(unit, int(unit.max(initial=-1)) + 1, frozen, traces[0], constants, traces[0].products)
    _keep_axes(found)
    found.groups = _groups(found)
    return found


def _same(model: ir.Model, sizes: Sequence[Mapping[str, Shape]]) -> set[tuple[str | None, int]]:
    """(value name, axis) of every axis that is as long whatever the inputs are."""
    free = len(sizes) > 1 or all(static_shape(value) is not None for value in model.graph.inputs)
    found: set[tuple[str | None, int]] = set()
    for node in model.graph:
        for value in node.outputs:
            shapes = [shapes[value.name or ""] for shapes in sizes if value.name in shapes]
            for axis in range(len(shapes[0]) if shapes else 0):
                declared = value.shape is not None and axis < len(value.shape) and isinstance(value.shape[axis], int)
                equal = all(len(s) == len(shapes[0]) and s[axis] == shapes[0][axis] for s in shapes)
                if equal and (declared or (free and len(shapes) == len(sizes))):
                    found.add((value.name, axis))
    return found


def _keep_axes(found: Channels) -> None:
    """A unit that is all there is of some axis stays."""
    values = {v.tobytes(): v for axes in found.trace.axes.values() for v in axes if live(v)}
    values |= {v.tobytes(): v for axes in found.constants.values() for v in axes if live(v)}
    for vector in values.values():
        units = np.unique(found.units_of(vector))
        if len(units) == 1 and units[0] >= 0:
            found.stays.setdefault(int(units[0]), ONLY)


def _groups(found: Channels) -> list[Group]:
    """Units that a layer makes side by side are one group; a depthwise convolution makes what it reads."""
    graph: nx.Graph[int] = nx.Graph()
    makers: dict[int, list[ir.Node]] = {}
    for product in found.products:
        units = np.unique(found.units_of(product.made))
        units = units[units >= 0]
        if not len(units) or product.depthwise:
            continue
        makers.setdefault(int(units[0]), []).append(product.node)
        nx.add_path(graph, units.tolist())
        if len(units) == 1:
            graph.add_node(int(units[0]))
    groups = []
    for members in nx.connected_components(graph):
        layers = [node for unit in members for node in makers.get(unit, ())]
        order = {id(product.node): i for i, product in enumerate(found.products)}
        layers.sort(key=lambda node: order[id(node)])
        numbers = np.array(sorted(members, key=lambda unit: (unit in found.stays, unit)), np.int64)
        free = int(sum(unit not in found.stays for unit in members))
        reasons = [found.stays[unit] for unit in numbers.tolist() if unit in found.stays]
        groups.append(Group(label(layers[0]), numbers, free, tuple(layers), reasons[0] if reasons else None))
    order = {id(product.node): i for i, product in enumerate(found.products)}
    return sorted(groups, key=lambda group: order[id(group.layers[0])])
