"""Numbers for what a graph computes: two values with one number are computed alike, whatever anything is called.

This is value numbering over two models at once. Nothing is hashed but weights: equal keys get equal numbers from one
table, so that no two different computations can collide.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from graphopt.errors import GraphoptError, ModelError
from graphopt.external import ExternalFiles, shown
from graphopt.inline import check_inline
from graphopt.pages import hashed

if TYPE_CHECKING:
    import onnx_ir as ir

EXACT, SHAPE, LOOSE = range(3)
"""How much a number tells apart: everything; all but the bytes of weights; only operators and the wiring of values."""

Place = tuple[str, str, str, str]
"""Where the bytes of an external tensor lie: folder, location, offset, length."""


class Numbers:
    """Equal keys, equal numbers."""

    def __init__(self) -> None:
        self._table: dict[Hashable, int] = {}

    def __call__(self, *key: Hashable) -> int:
        return self._table.setdefault(key, len(self._table))


@dataclass(frozen=True)
class Weight:
    """A tensor that a graph holds: an initializer, or what a Constant node makes."""

    name: str
    tensor: onnx.TensorProto | onnx.SparseTensorProto
    stored: str = "initializer"
    node: int | None = None
    """Position of the Constant node in its graph."""


@dataclass(eq=False)
class Side:
    """One of the two models, and the way to the bytes of its weights."""

    proto: onnx.ModelProto
    number: Numbers
    folder: Path | None = None
    roots: tuple[Path, ...] = ()
    common: frozenset[Place] = frozenset()
    """Places that both models name: their bytes are equal and need no reading."""
    _numbers: dict[tuple[int, int], int] = field(default_factory=dict)
    _defaults: dict[tuple[str, str, int], dict[str, onnx.AttributeProto]] = field(default_factory=dict)
    _weights: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate = ExternalFiles(self.folder, self.roots)
        self.functions = {(domain(f.domain), f.name, f.overload): f for f in self.proto.functions}

    def place(self, tensor: onnx.TensorProto) -> Place | None:
        """Where the tensor's bytes lie, as the model says; None: inside it."""
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return None
        entries = {e.key: e.value for e in tensor.external_data}
        folder = os.path.realpath(self.folder) if self.folder else ""
        return folder, entries.get("location", ""), entries.get("offset", "0"), entries.get("length", "")

    def read(self, tensor: onnx.TensorProto) -> ir.TensorProtocol:
        """The tensor, mapped through the gate where it is external.

        Raises:
            ModelError: its bytes are missing, lie outside, or do not fit its shape.
        """
        import onnx_ir as ir

        try:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                check_inline(tensor)
                return ir.serde.deserialize_tensor(tensor)
            checked = onnx.TensorProto()
            checked.CopyFrom(tensor)  # the gate rewrites it, and the model may be the caller's
            self.gate.check(checked)
            loaded = ir.serde.deserialize_tensor(checked)
            assert isinstance(loaded, ir.ExternalTensor)
            return self.gate.map(loaded)
        except GraphoptError:
            raise
        except Exception as error:
            raise ModelError(
                f"tensor '{shown(tensor.name)}' cannot be read ({error}); export the model again"
            ) from error

    def tensor(self, tensor: onnx.TensorProto, level: int = EXACT) -> int:
        """A number for type, shape and, at the level EXACT, bytes."""
        if level == LOOSE:
            return self.number("weight")
        known = self._numbers.get((id(tensor), level))
        if known is not None:
            return known
        key: tuple[Hashable, ...] = ("tensor", tensor.data_type, tuple(tensor.dims))
        if level == EXACT:
            place = self.place(tensor)
            key = (*key, place if place in self.common else self._digest(tensor))
        self._weights.append(tensor)  # kept alive, since its id is the key
        return self._numbers.setdefault((id(tensor), level), self.number(*key))

    def _digest(self, tensor: onnx.TensorProto) -> bytes:
        if tensor.HasField("raw_data") and tensor.data_location != onnx.TensorProto.EXTERNAL:
            check_inline(tensor)
            return hashed(tensor.raw_data)
        if tensor.data_type == onnx.TensorProto.STRING:
            return hashed(repr(list(tensor.string_data)).encode())
        from graphopt.model import tensor_buffer

        loaded = self.read(tensor)
        try:
            return hashed(tensor_buffer(loaded))
        except Exception as error:  # onnx-ir raises whatever it met
            raise ModelError(
                f"tensor '{shown(tensor.name)}' holds other data than its type and shape say; export the model again"
            ) from error

    def weight(self, weight: Weight, level: int = EXACT) -> int:
        """The same for any form of weight."""
        return self.sparse(weight.tensor, level)

    def sparse(self, tensor: Any, level: int) -> int:
        if isinstance(tensor, onnx.TensorProto):
            return self.tensor(tensor, level)
        if level == LOOSE:
            return self.number("weight")
        parts = (self.tensor(tensor.values, level), self.tensor(tensor.indices, level))
        return self.number("sparse", tuple(tensor.dims), *parts)

    def attributes(self, node: onnx.NodeProto, opsets: Mapping[str, int]) -> dict[str, onnx.AttributeProto]:
        """The node's attributes, with those it leaves to their defaults."""
        return {**self._default(node, opsets), **{a.name: a for a in node.attribute}}

    def _default(self, node: onnx.NodeProto, opsets: Mapping[str, int]) -> dict[str, onnx.AttributeProto]:
        where = domain(node.domain)
        function = self.functions.get((where, node.op_type, node.overload))
        if function is not None:
            return {a.name: a for a in function.attribute_proto}
        key = (where, node.op_type, opsets.get(where, 1))
        if key not in self._defaults:
            try:
                schema = onnx.defs.get_schema(node.op_type, key[2], where)
                found = {n: a.default_value for n, a in schema.attributes.items() if a.default_value.name}
            except (onnx.defs.SchemaError, OverflowError, TypeError):  # nobody's operator, or a made-up version
                found = {}
            self._defaults[key] = found
        return self._defaults[key]

    def content(self, attribute: onnx.AttributeProto, level: int = EXACT) -> Hashable:
        """An attribute's value as a key; bodies are left out, they are numbered with what they capture."""
        kinds = onnx.AttributeProto
        kind = attribute.type or kind_inside(attribute)
        if attribute.ref_attr_name:
            return "reference", attribute.ref_attr_name
        if kind in (kinds.GRAPH, kinds.GRAPHS):
            return kind, len(attribute.graphs)
        if kind in (kinds.FLOAT, kinds.FLOATS):  # by bits: NaN equals itself
            many = attribute.floats if kind == kinds.FLOATS else (attribute.f,)
            return kind, struct.pack(f"{len(many)}f", *many)
        if kind in (kinds.TENSOR, kinds.TENSORS, kinds.SPARSE_TENSOR, kinds.SPARSE_TENSORS):
            return kind, tuple(self.sparse(t, min(level, SHAPE)) for t in tensors_of(attribute))
        if kind in (kinds.TYPE_PROTO, kinds.TYPE_PROTOS):
            types = attribute.type_protos if kind == kinds.TYPE_PROTOS else (attribute.tp,)
            return kind, tuple(t.SerializeToString(deterministic=True) for t in types)
        if kind in (kinds.INT, kinds.STRING):
            return kind, attribute.i if kind == kinds.INT else attribute.s
        return kind, tuple(attribute.ints if kind == kinds.INTS else attribute.strings)


def domain(name: str) -> str:
    """The standard domain has two spellings."""
    return "" if name == "ai.onnx" else name


def opsets(message: onnx.ModelProto | onnx.FunctionProto) -> dict[str, int]:
    """domain -> version."""
    return {domain(o.domain): o.version for o in message.opset_import}


def tensors_of(attribute: onnx.AttributeProto) -> Iterator[Any]:
    """The tensors an attribute holds, dense and sparse."""
    if attribute.HasField("t"):
        yield attribute.t
    if attribute.HasField("sparse_tensor"):
        yield attribute.sparse_tensor
    yield from attribute.tensors
    yield from attribute.sparse_tensors


def kind_inside(attribute: onnx.AttributeProto) -> onnx.AttributeProto.AttributeType:
    """The type of an attribute that only its content tells (IR version 1)."""
    kinds = onnx.AttributeProto
    single = {"f": kinds.FLOAT, "i": kinds.INT, "s": kinds.STRING, "t": kinds.TENSOR, "g": kinds.GRAPH}
    for name, kind in single.items():
        if attribute.HasField(name):
            return kind
    for name, kind in (("floats", kinds.FLOATS), ("ints", kinds.INTS), ("tensors", kinds.TENSORS)):
        if getattr(attribute, name):
            return kind
    return kinds.STRINGS


class View:
    """One graph (or body, or function), indexed; Constant nodes are weights, not nodes."""

    def __init__(self, side: Side, graph: Any, versions: Mapping[str, int], depth: int = 0) -> None:
        self.side, self.graph, self.opsets, self.depth = side, graph, versions, depth
        self.nodes: list[onnx.NodeProto] = []
        self.positions: list[int] = []
        self.weights: dict[str, Weight] = {}
        if isinstance(graph, onnx.FunctionProto):
            self.inputs, self.outputs = list(graph.input), list(graph.output)
        else:
            self.weights = {t.name: Weight(t.name, t) for t in graph.initializer}
            for sparse in graph.sparse_initializer:
                name = sparse.values.name
                self.weights[name] = Weight(name, sparse, "sparse initializer")
            self.inputs = [v.name for v in graph.input if v.name not in self.weights]
            self.outputs = [v.name for v in graph.output]
        for position, node in enumerate(graph.node):
            weight = _constant(node, position)
            if weight is not None:
                self.weights[weight.name] = weight
            else:
                self.nodes.append(node)
                self.positions.append(position)
        self._index()

    def _index(self) -> None:
        self.bodies = [_bodies(self, node) for node in self.nodes]
        self.producer = {n: (i, k) for i, node in enumerate(self.nodes) for k, n in enumerate(node.output) if n}
        self.uses: dict[str, list[tuple[int, tuple[int, int]]]] = {}
        self.free: list[str] = []
        """Values of the graphs around it that it reads."""
        self.signatures = [self._signature(node) for node in self.nodes]
        own = {*self.inputs, *self.weights, *self.producer}
        free: dict[str, None] = {}
        for index, node in enumerate(self.nodes):
            for slot, name in enumerate(node.input):
                if name:
                    self.uses.setdefault(name, []).append((index, (0, slot)))
                    if name not in own:
                        free[name] = None
            for path, body in self.bodies[index]:
                for slot, name in _captures(path, body):
                    self.uses.setdefault(name, []).append((index, (1, slot)))
                    if name not in own:
                        free[name] = None
        self.free = list(free)
        self.node_downs = [0] * len(self.nodes)
        self.value_downs: dict[str, int] = {}
        if self.depth:
            self.number_downs({name: k for k, name in enumerate(self.outputs)})

    def captures(self, index: int) -> dict[int, str]:
        """What the node's bodies read from outside, by what they do with it."""
        return {slot: name for path, body in self.bodies[index] for slot, name in _captures(path, body)}

    def operator(self, index: int) -> tuple[str, str, str]:
        node = self.nodes[index]
        return domain(node.domain), node.op_type, node.overload

    def _signature(self, node: onnx.NodeProto) -> tuple[int, int, int]:
        """The node without its inputs, one number a level."""
        operator = (domain(node.domain), node.op_type, node.overload)
        attributes = self.side.attributes(node, self.opsets).items()
        outputs = tuple(bool(name) for name in node.output)
        full = [
            self.side.number(
                "node", operator, outputs, frozenset((n, self.side.content(a, level)) for n, a in attributes)
            )
            for level in (EXACT, SHAPE)
        ]
        return full[0], full[1], self.side.number("operator", operator)

    def number_downs(self, outputs: Mapping[str, int]) -> None:
        """Number nodes and values by what is made of them on the way to ``outputs`` (name -> which output it is).

        Attributes and weights are left out: what is upstream tells them apart, and here they would only blur a change.
        Of two nodes that both reach an output, no two have one number: a slot has one producer.
        """
        number = self.side.number
        downs: dict[str, int] = {}
        self.value_downs = downs

        def down(name: str) -> int:
            uses = sorted((self.node_downs[user], slot) for user, slot in self.uses.get(name, ()))
            downs[name] = number("uses", tuple(uses), outputs.get(name)) if uses or name in outputs else 0
            return downs[name]

        for index in reversed(range(len(self.nodes))):
            made = [down(name) if name else 0 for name in self.nodes[index].output]
            while made and not made[-1]:
                made.pop()
            self.node_downs[index] = number("down", self.signatures[index][LOOSE], tuple(made))
        for name in (*self.inputs, *self.free, *self.weights):
            down(name)

    def ups(self, level: int, seeds: Mapping[str, int]) -> tuple[list[int], dict[str, int]]:
        """Number nodes and values by what they are made of; ``seeds`` are the numbers of inputs and captured values."""
        number = self.side.number
        values = dict(seeds)
        for name, weight in self.weights.items():
            values[name] = self.side.weight(weight, level)
        values[""] = number("absent")
        hidden = number("hidden")  # a name that the body gives to a value of its own after it has read the outer one
        made: list[int] = []
        for index, node in enumerate(self.nodes):
            reads: tuple[Any, ...]
            if level == LOOSE:  # a bias more or less does not make it another computation
                reads = tuple(
                    (k, values.get(n, hidden)) for k, n in enumerate(node.input) if n and n not in self.weights
                )
            else:
                reads = tuple(values.get(n, hidden) for n in stripped(node.input))
            bodies = tuple((path, body.whole(level, values)) for path, body in self.bodies[index])
            up = number("up", self.signatures[index][level], reads, bodies)
            made.append(up)
            for slot, name in enumerate(node.output):
                if name:
                    values[name] = number("value", up, slot) if slot else up
        return made, values

    def whole(self, level: int, outer: Mapping[str, int]) -> int:
        """One number for the graph, given those of the values around it."""
        seeds = {name: self.side.number("input", self.depth, k) for k, name in enumerate(self.inputs)}
        nodes, values = self.ups(level, {**{name: outer[name] for name in self.free}, **seeds})
        return self.side.number(
            "body", len(self.inputs), tuple(values[name] for name in self.outputs), tuple(sorted(nodes))
        )


def stripped(names: Any) -> list[str]:
    """Inputs without the absent ones at the end."""
    found = list(names)
    while found and not found[-1]:
        found.pop()
    return found


def _bodies(view: View, node: onnx.NodeProto) -> list[tuple[str, View]]:
    found = []
    for attribute in node.attribute:
        if attribute.HasField("g"):
            found.append((attribute.name, View(view.side, attribute.g, view.opsets, view.depth + 1)))
        for index, graph in enumerate(attribute.graphs):
            found.append((f"{attribute.name}[{index}]", View(view.side, graph, view.opsets, view.depth + 1)))
    return sorted(found, key=lambda item: item[0])


def _captures(path: str, body: View) -> Iterator[tuple[int, str]]:
    for name in body.free:
        yield body.side.number("capture", path, body.value_downs.get(name, 0)), name


def _constant(node: onnx.NodeProto, position: int) -> Weight | None:
    """The weight that a Constant node is; None for other nodes, and where a function's caller gives the value."""
    if node.op_type != "Constant" or domain(node.domain) or len(node.attribute) != 1 or len(node.output) != 1:
        return None
    attribute, name = node.attribute[0], node.output[0]
    if attribute.ref_attr_name or not name or node.input:
        return None
    if attribute.name in ("value", "sparse_value"):
        held = next(tensors_of(attribute), None)
        form = "" if attribute.name == "value" else " (sparse_value)"
        return None if held is None else Weight(name, held, f"Constant{form}", position)
    kinds = onnx.TensorProto
    forms: dict[str, tuple[int, Any]] = {
        "value_float": (kinds.FLOAT, [attribute.f]),
        "value_floats": (kinds.FLOAT, attribute.floats),
        "value_int": (kinds.INT64, [attribute.i]),
        "value_ints": (kinds.INT64, attribute.ints),
        "value_string": (kinds.STRING, [attribute.s]),
        "value_strings": (kinds.STRING, attribute.strings),
    }
    if attribute.name not in forms:
        return None
    kind, data = forms[attribute.name]
    dims = [len(data)] if attribute.name.endswith("s") else []
    return Weight(name, onnx.helper.make_tensor(name, kind, dims, data), f"Constant ({attribute.name})", position)
