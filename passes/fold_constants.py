"""Evaluate what does not depend on the inputs, in ONNX Runtime, where the file does not grow by it."""

from __future__ import annotations

import hashlib
import heapq
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir

from graphopt import propagation
from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.errors import RuntimeFailure
from graphopt.graph import STANDARD_DOMAINS, bodies, constant, label, value_names
from graphopt.model import to_proto
from graphopt.passes._weights import (
    add_constant,
    add_constant_node,
    drop_unread,
    node_bytes,
    tensor_bytes,
    varint,
)
from graphopt.session import Session
from graphopt.traversal import ir_graphs
from graphopt.validation import RANDOM_OPS

if TYPE_CHECKING:
    from numpy.typing import NDArray

_KEPT = {
    "DequantizeLinear": "folding it would store the weight as float again",
    "Dropout": "in training mode it differs from run to run; remove it with simplify if it is for inference",
    **dict.fromkeys(RANDOM_OPS, "it makes random values, which differ from run to run"),
}
"""Operators that stay whatever their inputs are, and why."""

_GENERATORS = frozenset(
    {"Expand", "Tile", "Range", "ConstantOfShape", "OneHot", "Resize", "Upsample", "Pad", "EyeLike", "CenterCropPad"}
    | {"GridSample", "AffineGrid", "HannWindow", "HammingWindow", "BlackmanWindow", "MelWeightMatrix", "DFT", "STFT"}
)
"""Operators whose result may be far larger than their inputs: computed only where its size is known beforehand."""

_TRUSTED = 2**16
"""Bytes of input below which the result of other operators is small enough to be computed without knowing its size."""

_HELD = 8
"""Times ``max_result`` that all results together may take in memory while the pass decides."""


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Constant folding with a cost rule on the whole model.

    A node is folded when all its inputs are constants, its result is computed by the runtime that will run the model,
    and what is stored is no larger than the weights and nodes that disappear. ``allow_growth`` lifts the rule up to
    ``max_result`` bytes per value; nothing larger is ever computed.
    """

    allow_growth: bool = False
    max_result: int = 64 * 2**20
    name: ClassVar[str] = "fold-constants"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        taken = value_names(model)
        for graph in ir_graphs(model):
            _GraphFolder(self, model, graph, context, result, taken).run()
        overridable = [v.name for v in model.graph.inputs if v.name in model.graph.initializers]
        if overridable:
            reason = (
                f"{len(overridable)} initializers are graph inputs too ({', '.join(map(str, overridable[:3]))}...), so "
                "a caller may replace them: nothing that reads them is constant"
            )
            result.skipped.append(Skip("(graph)", reason))
        if not result.changes and not result.skipped:
            result.skipped.append(Skip("(graph)", "no node has constant inputs only"))
        return result


@dataclass
class _GraphFolder:
    """Folds one graph (bodies are graphs of their own; constants of outer graphs are seen)."""

    options: FoldConstants
    model: ir.Model
    graph: ir.Graph
    context: Context
    result: PassResult
    taken: set[str]
    values: dict[ir.Value, NDArray[Any]] = field(default_factory=dict)
    held: int = 0

    def run(self) -> None:
        folded = self._evaluate()
        if not self.options.allow_growth:
            folded, refused = _Budget(folded, self.values, self.model.ir_version).settle()
            for node, size in refused.items():
                why = f"folding it would make the file larger (its result has {size} bytes); allow-growth permits it"
                self._skip(node, why)
        inside = set(folded)
        for node in folded:
            self.result.changes.append(Change("fold", label(node), node.op_type))
            for value in node.outputs:
                if value.name and _read_outside(value, inside):
                    self._replace(node, value)
        read = list(dict.fromkeys(value for node in folded for value in node.inputs))
        self.graph.remove(folded, safe=True)
        drop_unread(*read)

    def _skip(self, node: ir.Node, reason: str) -> None:
        self.result.skipped.append(Skip(label(node), f"{node.op_type}: {reason}"))

    def _evaluate(self) -> list[ir.Node]:
        """Compute node by node, in order; values of refused nodes stop what follows them."""
        foldable: list[ir.Node] = []
        for node in self.graph:
            if not self._constant_inputs(node):
                continue
            reason = self._forbidden(node) or self._compute(node)
            if reason is None:
                foldable.append(node)
            else:
                self._skip(node, reason)
        return foldable

    def _constant_inputs(self, node: ir.Node) -> bool:
        present = [v for v in node.inputs if v is not None]
        return bool(present) and all(v in self.values or constant(v) is not None for v in present)

    def _forbidden(self, node: ir.Node) -> str | None:
        """Why a node of constant inputs stays, whatever its result."""
        if node.domain not in STANDARD_DOMAINS:
            return f"it is no standard operator (domain {node.domain}), so what it computes may not be constant"
        if bodies(node):
            return "it runs a body; nodes inside the body are folded, not the whole"
        if node.op_type in _KEPT:
            return _KEPT[node.op_type]
        if not self.context.allows(self.options.name, label(node)):
            return "switched off after a failed verification"
        return None

    def _compute(self, node: ir.Node) -> str | None:
        """Evaluate one node into ``values``; the reason where that is not done."""
        piece = self._piece(node)
        proto = to_proto(piece)
        size, kinds = _expected(proto)
        if size is None and (node.op_type in _GENERATORS or _input_bytes(proto) > _TRUSTED):
            return "the size of its result is not known before it runs, and it may be huge"
        if size is not None and size > self.options.max_result:
            return f"its result would take {size} bytes; raise max-result to fold it"
        if self.held + (size or 0) > _HELD * self.options.max_result:
            return "the results found before it already take all the memory set aside; raise max-result to fold it"
        try:
            outputs = Session(proto, optimize=False, threads=1).run({})
        except RuntimeFailure as error:
            return f"ONNX Runtime cannot evaluate it ({error})"
        found: dict[ir.Value, NDArray[Any]] = {}
        for index, value in enumerate(node.outputs):
            if not value.name:
                continue
            array = outputs[f"out_{index}"]
            if not isinstance(array, np.ndarray) or array.dtype == object:
                return "its result is no numeric tensor"
            if kinds[f"out_{index}"] not in (0, int(ir.DataType.from_numpy(array.dtype))):
                return f"ONNX Runtime hands its result out in another type ({array.dtype})"
            found[value] = array
        self.values |= found
        self.held += sum(array.nbytes for array in found.values())
        return None

    def _piece(self, node: ir.Node) -> ir.Model:
        """The node alone, its inputs as initializers, its outputs as graph outputs."""
        made: dict[ir.Value, ir.Value] = {}
        for index, value in enumerate(node.inputs):
            if value is not None and value not in made:
                tensor = self._tensor(value)
                kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
                made[value] = ir.Value(name=f"in_{index}", type=kind, shape=shape, const_value=tensor)
        inputs = [None if value is None else made[value] for value in node.inputs]
        copy = ir.Node("", node.op_type, inputs, list(node.attributes.values()), num_outputs=len(node.outputs))
        for index, (mine, theirs) in enumerate(zip(copy.outputs, node.outputs, strict=True)):
            mine.name = f"out_{index}" if theirs.name else ""
        graph = ir.Graph(
            [],
            [v for v in copy.outputs if v.name],
            nodes=[copy],
            initializers=list(made.values()),
            name="piece",
            opset_imports=dict(self.model.opset_imports),
        )
        return ir.Model(graph, ir_version=max(self.model.ir_version, 4))

    def _tensor(self, value: ir.Value) -> ir.TensorProtocol:
        """The constant in a tensor of its own: naming a value names its tensor, which clones of the model share."""
        if value in self.values:
            return ir.tensor(self.values[value])
        stored = constant(value)
        assert stored is not None
        if stored.dtype == ir.DataType.STRING:
            return ir.StringTensor(stored.numpy(), shape=ir.Shape(stored.shape.numpy()))
        return ir.tensor(stored.numpy(), dtype=stored.dtype)

    def _replace(self, node: ir.Node, value: ir.Value) -> None:
        """Let everybody read the stored result, under the same name. What makes a graph output stays a node."""
        assert value.name is not None
        name = value.name
        value.name = None
        self.taken.discard(name)
        if value.is_graph_output():
            new = add_constant_node(self.graph, name, ir.tensor(self.values[value], name=name), node)
            self.taken.add(name)
        else:
            new = add_constant(self.model, self.graph, name, self.values[value], self.taken, node)
        if not new.is_initializer():
            new.type, new.shape = value.type, value.shape  # what the file declares, no more
            producer = new.producer()
            assert producer is not None
            producer.name = node.name
        new.doc_string = value.doc_string
        new.metadata_props.update(value.metadata_props)
        value.replace_all_uses_with(new, replace_graph_outputs=True)


class _Budget:
    """The largest set of folds found for which the file does not grow.

    Starts with all of them and gives up the fold that costs most, net of what it frees, until the sum fits. Giving one
    up may mean that what it reads has to be stored after all, and that a weight it reads has to stay.
    """

    def __init__(self, foldable: list[ir.Node], values: dict[ir.Value, NDArray[Any]], ir_version: int) -> None:
        self.ir_version = ir_version
        self.order = foldable
        self.chosen = set(foldable)
        self.values = values
        self.payers: dict[ir.Value, ir.Node | None] = {}
        self.rank = {node: rank for rank, node in enumerate(sorted(foldable, key=self._key))}
        self.net = {node: self._stored(node) - self._freed(node) - node_bytes(node) for node in foldable}
        self.growth = sum(self.net.values())

    def settle(self) -> tuple[list[ir.Node], dict[ir.Node, int]]:
        """The folds kept, in order, and those given up with the bytes that each would have stored."""
        refused: dict[ir.Node, int] = {}
        ranked = list(self.rank)
        heap = [(-self.net[node], self.rank[node]) for node in self.order]
        heapq.heapify(heap)
        while self.growth > 0 and heap:
            cost, rank = heapq.heappop(heap)
            node = ranked[rank]
            if node not in self.chosen or -cost != self.net[node]:
                continue  # an entry from before its neighbour was given up
            refused[node] = sum(self.values[v].nbytes for v in node.outputs if v.name)
            self.chosen.discard(node)
            self.growth -= self.net[node]
            for neighbour in self._neighbours(node):
                fresh_net = self._stored(neighbour) - self._freed(neighbour) - node_bytes(neighbour)
                self.growth += fresh_net - self.net[neighbour]
                self.net[neighbour] = fresh_net
                heapq.heappush(heap, (-fresh_net, self.rank[neighbour]))
        return [node for node in self.order if node in self.chosen], refused

    def _key(self, node: ir.Node) -> Any:
        """What tells folds of the same cost apart, whatever they are called and in whichever order they stand."""
        made = [v for v in node.outputs if v.name]
        content = hashlib.sha256(b"".join(self.values[v].tobytes() for v in made)).digest()
        outputs = node.graph.outputs if any(v.is_graph_output() for v in made) and node.graph is not None else []
        return node.op_type, content, [i for i, v in enumerate(outputs) if v.producer() is node], len(node.inputs)

    def _neighbours(self, node: ir.Node) -> list[ir.Node]:
        """Chosen nodes whose cost depends on whether ``node`` is chosen."""
        found: dict[ir.Node, None] = {}
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer in self.chosen:
                found[producer] = None
            first = self._payer(value)
            if first in self.chosen:
                found[first] = None
        return list(found)

    def _stored(self, node: ir.Node) -> int:
        """Bytes of the results that somebody else reads, with their names and headers."""
        total = 0
        for value in node.outputs:
            if value.name and _read_outside(value, self.chosen):
                total += tensor_bytes(self.values[value])
                if value.is_graph_output() or self.ir_version < 4:
                    total += 36  # a Constant node
        return total

    def _freed(self, node: ir.Node) -> int:
        """Bytes of the constants that only folded nodes read (each counted once)."""
        return sum(
            _constant_bytes(value)
            for value in dict.fromkeys(node.inputs)
            if value is not None
            and not value.is_graph_output()
            and self._payer(value) is node
            and not _read_outside(value, self.chosen)
        )

    def _payer(self, value: ir.Value | None) -> ir.Node | None:
        """The node to which a constant's bytes are counted: the first fold that reads it."""
        if value is None or value in self.values or constant(value) is None:
            return None
        if value not in self.payers:
            folds = (use.node for use in value.uses() if use.node in self.rank)
            self.payers[value] = min(folds, key=self.rank.__getitem__, default=None)
        return self.payers[value]


def _read_outside(value: ir.Value, inside: set[ir.Node]) -> bool:
    return value.is_graph_output() or any(use.node not in inside for use in value.uses())


def _constant_bytes(value: ir.Value) -> int:
    """What a constant takes in the file, at least."""
    producer = value.producer()
    if producer is not None:
        return node_bytes(producer)
    tensor = value.const_value
    if isinstance(tensor, ir.TensorProtoTensor):  # integers may be stored in fewer bytes than they have
        size = int(tensor.raw.ByteSize()) - len(tensor.raw.name.encode())
        return size + 1 + varint(size)
    if isinstance(tensor, ir.ExternalTensor) or tensor is None:
        return int(tensor.nbytes) if tensor is not None else 0
    return tensor_bytes(tensor.numpy())  # as it will be written: a second run must count the same


def _expected(piece: onnx.ModelProto) -> tuple[int | None, dict[str, int]]:
    """Bytes of all results (None: unknown) and their element types, inferred: three bytes of Expand can ask for
    gigabytes."""
    try:
        inferred = propagation.inferred(piece)
    except Exception:  # inference is a hint, never a requirement
        inferred = piece
    size: int | None = 0
    kinds: dict[str, int] = {}
    for output in inferred.graph.output:
        tensor = output.type.tensor_type
        kinds[output.name] = tensor.elem_type
        dims = [d.dim_value for d in tensor.shape.dim if d.HasField("dim_value")]
        if size is None or not tensor.HasField("shape") or len(dims) < len(tensor.shape.dim):
            size = None
            continue
        bits = ir.DataType(tensor.elem_type).bitwidth if tensor.elem_type not in (0, onnx.TensorProto.STRING) else 32
        size += math.prod(dims) * bits // 8
    return size, kinds


def _input_bytes(piece: onnx.ModelProto) -> int:
    return sum(tensor.ByteSize() for tensor in piece.graph.initializer)
