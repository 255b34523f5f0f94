"""One walk over the main graph at concrete shapes: which atoms lie at which index of each axis of each value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from graphopt.channels.atoms import Atoms, live
from graphopt.graph import STANDARD_DOMAINS, attribute, bodies, constant, constant_array, label

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.channels.atoms import Vector

    Axes = tuple[Vector, ...]
    Rule = Callable[["Trace", ir.Node], Sequence[Axes]]

Shape = tuple[int, ...]


class Unfit(Exception):
    """A rule cannot follow this node; the message says why, and everything it reads stays."""


@dataclass(frozen=True)
class Product:
    """A node that multiplies matrices: it ends one set of atoms (``read``) and starts another (``made``).

    ``terms``: (its share of the node's MACs, the axes these are proportional to).
    """

    node: ir.Node
    terms: tuple[tuple[float, tuple[Vector, ...]], ...]
    read: Vector
    made: Vector

    @property
    def depthwise(self) -> bool:
        """Whether it is a convolution of one channel a group: it makes what it reads, and ends nothing."""
        group = int(attribute(self.node, "group", 1)) if self.node.op_type.startswith("Conv") else 1
        return group > 1 and group == len(self.read)


@dataclass
class Trace:
    """The state of the walk. ``axes``: the atoms of every value of the main graph that has a known shape.

    ``sizes``: of integer values made from Shape, per element, the axis whose length it is (None: none that may shrink).
    """

    atoms: Atoms
    shapes: Mapping[str, Shape]
    opset: int
    constants: dict[ir.Value, Axes]
    axes: dict[ir.Value, Axes] = field(default_factory=dict)
    sizes: dict[ir.Value, list[Vector | None]] = field(default_factory=dict)
    same: Set[tuple[str | None, int]] = frozenset()
    """(value name, axis) of what is as long at every size."""
    copied: dict[ir.Node, set[int]] = field(default_factory=dict)
    """Of Reshapes whose target is computed: the axes that came as they are, at every size."""
    products: list[Product] = field(default_factory=list)

    def shape(self, value: ir.Value | None) -> Shape:
        """Raises Unfit where it is unknown."""
        if value is None:
            raise Unfit("an input is missing")
        tensor = constant(value)
        if tensor is not None:
            return tuple(int(d) for d in tensor.shape.numpy())
        found = self.shapes.get(value.name or "")
        if found is None:
            raise Unfit(f"the shape of '{value.name}' is unknown")
        return found

    def of(self, value: ir.Value | None) -> Axes:
        """The atoms of a value; a constant of floats gets its own the first time it is read."""
        assert value is not None
        if value in self.axes:
            return self.axes[value]
        shape = self.shape(value)
        if constant(value) is None:
            return tuple(self.atoms.fixed(d, f"the size of '{value.name}' is not known to follow") for d in shape)
        if value not in self.constants:
            self.constants[value] = self._constant(value, shape)
        return self.constants[value]

    def _constant(self, value: ir.Value, shape: Shape) -> Axes:
        if value.dtype is not None and not value.dtype.is_floating_point():
            return tuple(self.atoms.fixed(d, f"'{value.name}' holds integers") for d in shape)
        found = tuple(self.atoms.new(d) if d > 1 else self.atoms.fixed(d, "one index only") for d in shape)
        if value.is_graph_output():
            for vector in found:
                self.atoms.freeze(vector, f"'{value.name}' is a graph output")
        return found

    def fresh(self, value: ir.Value, shape: Shape) -> Axes:
        """The axes of a value whose elements are the same along them: what shrinks is cut off behind it."""
        if value not in self.constants:
            self.constants[value] = tuple(
                self.atoms.new(d) if d > 1 and (value.name, i) in self.same else np.zeros(0, np.int64)
                for i, d in enumerate(shape)
            )
        kept = self.constants[value]
        return tuple(
            v if len(v) else self.atoms.fixed(d, "as long as the input is") for v, d in zip(kept, shape, strict=True)
        )

    def fixed(self, shape: Shape, reason: str) -> Axes:
        """A value that stays as it is."""
        return tuple(self.atoms.fixed(d, reason) for d in shape)

    def freeze(self, value: ir.Value | None, reason: str) -> None:
        """All axes of it, and the axes it tells the sizes of."""
        if value is None:
            return
        if value in self.axes or value in self.constants:
            for vector in self.of(value):
                self.atoms.freeze(vector, reason)
        for size in self.sizes.get(value, ()):
            if size is not None:
                self.atoms.freeze(size, reason)

    def stays(self, node: ir.Node, vector: Vector, why: str) -> Vector:
        """``vector`` frozen, because ``node`` does ``why`` along it; what to put in its place."""
        if not live(vector):
            return vector
        reason = f"{node.op_type} '{label(node)}' {why}"
        self.atoms.freeze(vector, reason)
        return self.atoms.fixed(len(vector), reason)

    def together(self, shapes: Sequence[Shape], axes: Sequence[Axes], out: Shape) -> Axes:
        """Broadcasting: indices that meet are united; an axis of length 1 meets nobody."""
        found: list[Vector] = []
        for position, size in enumerate(out):
            met: list[Vector] = []
            for shape, mine in zip(shapes, axes, strict=True):
                axis = position - (len(out) - len(shape))
                if axis >= 0 and shape[axis] == size:
                    met.append(mine[axis])
            for other in met[1:]:
                self.atoms.unite(met[0], other)
            if not met:
                raise Unfit("shapes do not broadcast")
            found.append(met[0])
        return tuple(found)

    def ints(self, value: ir.Value | None) -> list[int] | None:
        """A constant's integers; None where it is not constant or absent."""
        array = constant_array(value) if value is not None else None
        return None if array is None else [int(i) for i in array.reshape(-1)]


def walk(graph: ir.Graph, rules: Mapping[str, Rule], trace: Trace) -> None:
    """Follow every node of ``graph``; what has no rule, or one that gives up, freezes what it reads."""
    for value in graph.inputs:
        shape = trace.shapes.get(value.name or "")
        if shape is not None:
            trace.axes[value] = trace.fixed(shape, f"'{value.name}' is a graph input")
    for node in graph:
        if node.op_type == "Constant":
            continue
        made: Sequence[Axes | None]
        try:
            made = _follow(trace, node, rules)
        except Unfit as unfit:
            made = _opaque(trace, node, str(unfit))
        for output, axes in zip(node.outputs, made, strict=False):
            if axes is not None:
                trace.axes[output] = axes
    for output in graph.outputs:
        trace.freeze(output, f"'{output.name}' is a graph output")


def _follow(trace: Trace, node: ir.Node, rules: Mapping[str, Rule]) -> Sequence[Axes]:
    rule = rules.get(node.op_type) if node.domain in STANDARD_DOMAINS else None
    if rule is None or bodies(node):
        raise Unfit("has no rule")
    made = rule(trace, node)
    for output, axes in zip(node.outputs, made, strict=False):
        if output.name and tuple(len(v) for v in axes) != trace.shape(output):
            raise Unfit("does not have the shape its rule says")
    return made


def _opaque(trace: Trace, node: ir.Node, why: str) -> list[Axes | None]:
    reason = f"{node.op_type} '{label(node)}' {why}"
    captured = [v for body in bodies(node) for inner in _inside(body) for v in inner.inputs]
    for value in (*node.inputs, *captured, *(v for body in bodies(node) for v in body.outputs)):
        if constant(value) is not None:
            trace.of(value)
        trace.freeze(value, reason)
    known = [trace.shapes.get(output.name or "") for output in node.outputs]
    return [trace.fixed(shape, reason) if shape is not None else None for shape in known]


def _inside(body: ir.Graph) -> Sequence[ir.Node]:
    found = []
    for node in body:
        found.append(node)
        for deeper in bodies(node):
            found.extend(_inside(deeper))
    return found
