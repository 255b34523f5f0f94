"""A model whose weights lie in a large file, run a piece at a time, so that memory holds the weights of one piece only.

The nodes are cut, in an order in which they can run, where the weights read so far reach :data:`PIECE`. Each piece is a
model of its own that refers to its weights where they lie; what later pieces read of it is handed on. The numbers are
those of the whole, but where the runtime would have fused nodes across a cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

PIECE = 1 << 26
"""Bytes of weights that one piece reads, or one weight where that is larger."""

Open = Callable[[bytes], Any]
"""Makes the runtime's session of a model."""


def in_files(proto: onnx.ModelProto) -> int:
    """Bytes of the main graph's initializers that ``proto`` leaves in files."""
    return sum(_size(t) for t in proto.graph.initializer if t.data_location == t.EXTERNAL)


def _size(tensor: onnx.TensorProto) -> int:
    if tensor.data_location == tensor.EXTERNAL:
        return next((int(e.value) for e in tensor.external_data if e.key == "length"), 0)
    return len(tensor.raw_data)


@dataclass(frozen=True)
class _Piece:
    """Some nodes, by position, with the weights they read and the values they hand on."""

    nodes: tuple[int, ...]
    weights: tuple[int, ...]
    reads: tuple[str, ...]
    gives: tuple[str, ...]


class Pieces:
    """Takes the place of the runtime's session; what comes in and goes out is the whole model's.

    Args:
        proto: the model, with references to its weights; not touched.
        opened: makes a session of a piece.
        inputs, outputs: as the runtime's session of the whole tells them.
    """

    def __init__(self, proto: onnx.ModelProto, opened: Open, piece: int = PIECE) -> None:
        self._proto, self._open = proto, opened
        stored = {t.name for t in proto.graph.initializer} | {t.values.name for t in proto.graph.sparse_initializer}
        self._declared = {v.name: v for v in (*proto.graph.input, *proto.graph.output)}
        self._inputs = [Port(v.name) for v in proto.graph.input if v.name not in stored]
        self._outputs = [Port(v.name) for v in proto.graph.output]
        self._pieces = _cut(proto, piece)

    def get_inputs(self) -> list[Port]:
        """The model's inputs."""
        return self._inputs

    def get_outputs(self) -> list[Port]:
        """The model's outputs."""
        return self._outputs

    def __len__(self) -> int:
        return len(self._pieces)

    def run(self, names: Sequence[str], feeds: Mapping[str, Any], options: Any = None) -> list[Any]:
        """As the runtime's own ``run``; each piece is opened, run and let go."""
        held = dict(feeds)
        for index, piece in enumerate(self._pieces):
            later = {name for other in self._pieces[index + 1 :] for name in other.reads}
            wanted = [name for name in piece.gives if name in later or name in names]
            given = {name: held[name] for name in piece.reads}
            found = self._open(self._model(piece, given, wanted)).run(wanted, given, options)
            held.update(zip(wanted, found, strict=True))
            held = {name: value for name, value in held.items() if name in later or name in names}
        stored = [name for name in names if name not in held]
        if stored:  # outputs that are weights
            model = self._model(_Piece((), tuple(self._positions(stored)), (), tuple(stored)), {}, stored)
            held.update(zip(stored, self._open(model).run(stored, {}, options), strict=True))
        return [held[name] for name in names]

    def _positions(self, names: Sequence[str]) -> Iterator[int]:
        wanted = set(names)
        return (i for i, tensor in enumerate(self._proto.graph.initializer) if tensor.name in wanted)

    def _model(self, piece: _Piece, given: Mapping[str, Any], wanted: Sequence[str]) -> bytes:
        import onnx

        whole = self._proto
        model = onnx.ModelProto(ir_version=whole.ir_version, opset_import=whole.opset_import, functions=whole.functions)
        graph = model.graph
        graph.name = whole.graph.name
        graph.node.extend(whole.graph.node[i] for i in piece.nodes)
        graph.initializer.extend(whole.graph.initializer[i] for i in piece.weights)
        graph.sparse_initializer.extend(whole.graph.sparse_initializer)
        for name in piece.reads:
            graph.input.append(self._declared.get(name) or _typed(name, given[name]))
        for name in wanted:  # types are left for the runtime to infer
            graph.output.append(self._declared.get(name) or onnx.ValueInfoProto(name=name))
        data: bytes = model.SerializeToString()
        return data


@dataclass(frozen=True)
class Port:
    """An input or output, as far as anybody asks."""

    name: str


def _typed(name: str, value: Any) -> onnx.ValueInfoProto:
    """A value that came out of another piece, its sizes left open."""
    import onnx

    if not hasattr(value, "dtype"):
        raise ValueError(f"'{name}' is no tensor, so the model cannot be run in pieces")
    kind = onnx.TensorProto.STRING if value.dtype.kind in "OSU" else onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, [None] * value.ndim)


def _cut(proto: onnx.ModelProto, most: int) -> list[_Piece]:
    graph = proto.graph
    sizes = {tensor.name: _size(tensor) for tensor in graph.initializer}
    positions = {tensor.name: i for i, tensor in enumerate(graph.initializer)}
    sparse = {t.values.name for t in graph.sparse_initializer}
    reads = [_read(node) for node in graph.node]
    made = {name for node in graph.node for name in node.output if name} | {v.name for v in graph.input}
    found: list[_Piece] = []
    nodes: list[int] = []
    weights: set[str] = set()

    def close() -> None:
        own = {name for i in nodes for name in graph.node[i].output if name}
        outside = {name: None for i in nodes for name in reads[i] if name not in own and name not in weights}
        into = tuple(name for name in outside if name in made and name not in sparse)
        found.append(_Piece(tuple(nodes), tuple(sorted(positions[w] for w in weights)), into, tuple(sorted(own))))
        nodes.clear()
        weights.clear()

    for index in _order(graph, reads, positions):
        mine = {name for name in reads[index] if name in positions}
        if nodes and sum(sizes.get(name, 0) for name in weights | mine) > most:
            close()
        nodes.append(index)
        weights |= mine
    if nodes:
        close()
    return found


def _read(node: onnx.NodeProto) -> list[str]:
    """The names that a node and its bodies read; those that a body makes itself may be among them."""
    found = [name for name in node.input if name]
    for attribute in node.attribute:
        for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            inner = {v.name for v in body.input} | {t.name for t in body.initializer}
            inner |= {name for other in body.node for name in other.output}
            found += [v.name for v in body.output if v.name not in inner]
            found += [name for other in body.node for name in _read(other) if name not in inner]
    return list(dict.fromkeys(found))


def _order(graph: onnx.GraphProto, reads: Sequence[Sequence[str]], stored: Mapping[str, int]) -> list[int]:
    """The nodes' order, but what hangs on weights alone (a DequantizeLinear, a Cast) comes right before what reads it:
    a cut between them would hand the weight on as it is decoded."""
    inputs = {v.name for v in graph.input}
    producer = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    free: set[int] = set()
    for index, names in enumerate(reads):
        if all((n in stored and n not in inputs) or producer.get(n) in free for n in names):
            free.add(index)
    found: dict[int, None] = {}
    for index in [*(i for i in range(len(reads)) if i not in free), *sorted(free)]:
        waiting = [index]
        while waiting:
            top = waiting[-1]
            before = [producer[n] for n in reads[top] if n in producer and producer[n] in free]
            before = [i for i in before if i not in found]
            if before:
                waiting += before
            else:
                found[waiting.pop()] = None
    return list(found)
