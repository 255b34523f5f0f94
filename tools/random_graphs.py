"""Random ONNX graphs that are valid by construction: every operator is given values of fitting type and shape.

Here is what grows; ``growing.py`` and ``growing_layers.py`` know the operators. Dims are fixed, or ``N`` and ``T``, or
made of those; each is known at both of :data:`SIZES`, so that every model runs at both.

A value is *loose* where a fusing pass may move it by rounding. What would turn rounding into another result (arg max,
casts to integers, comparisons) is made of the others only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

SIZES = ({"N": 2, "T": 3}, {"N": 1, "T": 5})
"""What the symbolic dims are in the two runs."""

FLOATS = ("float32", "float64", "float16")
OTHERS = ("int64", "int32", "int16", "int8", "uint8", "bool")
MOST = 600
"""Elements of a value."""


@dataclass(frozen=True)
class Dim:
    """One axis: its sizes in the two runs, and its name where it has one."""

    sizes: tuple[int, int]
    name: str | None = None

    @property
    def fixed(self) -> int | None:
        """Its size, where it is the same however long the inputs are."""
        return self.sizes[0] if self.name is None else None


def dim(size: int) -> Dim:
    """A fixed axis."""
    return Dim((size, size))


@dataclass(frozen=True)
class Value:
    """A tensor in the graph under construction."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]
    loose: bool = False

    @property
    def rank(self) -> int:
        """How many axes."""
        return len(self.dims)

    @property
    def is_float(self) -> bool:
        """Whether it holds floats."""
        return self.dtype in FLOATS

    @property
    def elements(self) -> int:
        """In the larger of the two runs."""
        return max(int(np.prod([d.sizes[i] for d in self.dims])) for i in (0, 1))


@dataclass
class Graph:
    """A graph that grows: nodes, weights, and the values that a next node may read."""

    rnd: random.Random
    opset: int
    growers: Sequence[Callable[[Graph], None]]
    prefix: str = ""
    depth: int = 0
    values: list[Value] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    def pick(self, options: Sequence[Any]) -> Any:
        """One of them."""
        return options[self.rnd.randrange(len(options))]

    def maybe(self, share: float) -> bool:
        """True so often."""
        return self.rnd.random() < share

    def any(self, accepts: Callable[[Value], bool] = lambda _: True) -> Value | None:
        """A value that is accepted; late ones are preferred, so that graphs grow deep."""
        found = [v for v in self.values if accepts(v)]
        return found[max(self.rnd.randrange(len(found)), self.rnd.randrange(len(found)))] if found else None

    def fresh(self, base: str = "v") -> str:
        """A name that is new in this graph; bodies beside each other use the same ones."""
        return f"{self.prefix}{base}{len(self.nodes)}_{len(self.weights)}"

    def constant(self, array: Any) -> str:
        """A weight or a Constant node; at times with a twin that holds the same."""
        array = np.asarray(array)
        name = self.fresh("c")
        if self.maybe(0.6):
            self.weights[name] = array
            if self.maybe(0.15):
                self.weights[f"{name}_twin"] = array.copy()
                return f"{name}_twin"
        else:
            self.nodes.append(helper.make_node("Constant", [], [name], name, value=numpy_helper.from_array(array)))
        return name

    def numbers(self, dtype: str, shape: Sequence[int]) -> np.ndarray:
        """Weights: small, with some that invite a simplification."""
        if self.maybe(0.3):
            made = np.full(shape, self.pick([0, 1, 1, 2]))
        else:
            made = np.asarray([self.rnd.choice([-2, -1, 0.5, 1, 2, 3]) for _ in range(int(np.prod(shape)))])
        made = np.abs(made) if dtype in ("uint8", "bool") else made
        return made.reshape(tuple(shape)).astype(dtype)

    def add(
        self, op: str, inputs: Sequence[str], dtype: str, dims: Sequence[Dim], loose: bool, **attributes: Any
    ) -> Value:
        """A node with one output."""
        name = self.fresh()
        self.nodes.append(helper.make_node(op, list(inputs), [name], f"{self.prefix}n{len(self.nodes)}", **attributes))
        value = Value(name, dtype, tuple(dims), loose)
        self.values.append(value)
        return value

    def add_many(self, op: str, inputs: Sequence[str], made: Sequence[Value], **attributes: Any) -> None:
        """A node with several outputs, named already."""
        names = [v.name for v in made]
        self.nodes.append(helper.make_node(op, list(inputs), names, f"{self.prefix}n{len(self.nodes)}", **attributes))
        self.values += made

    def grow(self) -> None:
        """One more operator, if there is a value for it; at times an earlier node once more."""
        before = len(self.nodes)
        for _ in range(20):
            if self.nodes and self.maybe(0.06):
                self._again()
            else:
                self.pick(self.growers)(self)
            self.values = [v for v in self.values if v.elements <= MOST and all(min(d.sizes) for d in v.dims)]
            if len(self.nodes) > before:
                return

    def _again(self) -> None:
        old = self.pick(self.nodes)
        known = {v.name: v for v in self.values}
        if old.op_type in ("If", "Loop", "Constant") or len(old.output) > 1:
            return  # of equal nodes with several outputs, which one makes which output depends on their order
        if not all(n in known for n in old.output):
            return
        copy = onnx.NodeProto()
        copy.CopyFrom(old)
        copy.name = f"{self.prefix}n{len(self.nodes)}"
        copy.output[:] = [f"{n}_again{len(self.nodes)}" for n in old.output]
        self.nodes.append(copy)
        for name, other in zip(copy.output, old.output, strict=True):
            value = known[other]
            self.values.append(Value(name, value.dtype, value.dims, value.loose))

    def body(self, prefix: str, inputs: Sequence[Value] = ()) -> Graph:
        """An empty body that sees all of this graph's values."""
        return Graph(
            self.rnd, self.opset, self.growers, f"{self.prefix}{prefix}", self.depth + 1, [*self.values, *inputs]
        )

    def proto(
        self, name: str, inputs: Sequence[Value], outputs: Sequence[Value], overridable: Sequence[str] = ()
    ) -> onnx.GraphProto:
        """As ONNX; bodies declare no shapes of their outputs."""
        top = self.depth == 0
        given = [info(v) for v in inputs]
        given += [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in self.weights.items()
            if n in overridable
        ]
        tensors = [numpy_helper.from_array(a, n) for n, a in self.weights.items()]
        return helper.make_graph(self.nodes, name, given, [info(v, shape=top) for v in outputs], tensors)


def info(value: Value, *, shape: bool = True) -> onnx.ValueInfoProto:
    """Its declaration; dims made of symbols have no name."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype))
    named = [d.fixed if d.name is None else d.name if d.name in SIZES[0] else None for d in value.dims]
    return helper.make_tensor_value_info(value.name, kind, named if shape else None)
