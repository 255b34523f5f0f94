"""Evaluate what does not depend on the inputs, in ONNX Runtime, where the file does not grow by it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.errors import RuntimeFailure
from graphopt.graph import STANDARD_DOMAINS, bodies, constant, label, value_names
from graphopt.model import to_proto
from graphopt.passes._weights import add_constant
from graphopt.session import Session
from graphopt.validation import RANDOM_OPS

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Constant is its own value already; dequantizing would undo a compression; the rest differ from run to run, or hold
# state, or bodies.
_NEVER = RANDOM_OPS | {"Constant", "DequantizeLinear", "Dropout", "If", "Loop", "Scan", "SequenceMap", "Optional"}

_NODE_BYTES = 64
"""What a node takes in the file, roughly: its removal may pay for that many bytes of result."""


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Constant folding with a cost rule on the whole model.

    A node is folded when all its inputs are constants, its result is computed by the runtime that will run the model,
    and the sum of all results is no larger than the weights and nodes that disappear. ``allow_growth`` lifts the rule
    up to ``max_result`` bytes per value; nothing larger is ever computed.
    """

    allow_growth: bool = False
    max_result: int = 64 * 2**20
    name: ClassVar[str] = "fold-constants"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        taken = value_names(model)
        for graph in list(model.graphs()):
            _GraphFolder(self, model, graph, context, result, taken).run()
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
    refused: dict[ir.Node, str] = field(default_factory=dict)

    def run(self) -> None:
        foldable = self._evaluate()
        foldable = self._within_budget(foldable)
        for node in foldable:
            for value in node.outputs:
                if value.name and _read_outside(value, foldable):
                    self._replace(node, value)
        for node in reversed(foldable):
            self.result.changes.append(Change("fold", label(node), node.op_type))
        self.graph.remove(foldable, safe=True)
        self.result.skipped.extend(Skip(label(n), why) for n, why in self.refused.items())

    def _evaluate(self) -> list[ir.Node]:
        """Compute node by node, in order; values of refused nodes stop what follows them."""
        foldable: list[ir.Node] = []
        for node in self.graph:
            if not self._candidate(node):
                continue
            if not self.context.allows(self.options.name, label(node)):
                self.refused[node] = "switched off after a failed verification"
                continue
            if any(value.is_graph_output() for value in node.outputs):
                self.refused[node] = "it makes a graph output, which must keep its producer"
                continue
            reason = self._too_large(node) or self._compute(node)
            if reason is None:
                foldable.append(node)
            else:
                self.refused[node] = reason
        return foldable

    def _candidate(self, node: ir.Node) -> bool:
        if node.domain not in STANDARD_DOMAINS or node.op_type in _NEVER or bodies(node) or not node.inputs:
            # A generator without inputs is not in the standard set, except Constant and the random ones.
            return False
        return all(v is None or v in self.values or constant(v) is not None for v in node.inputs) and any(
            v is not None for v in node.inputs
        )

    def _array(self, value: ir.Value) -> ir.TensorProtocol:
        if value in self.values:
            return ir.tensor(self.values[value])
        tensor = constant(value)
        assert tensor is not None
        return tensor

    def _piece(self, node: ir.Node) -> ir.Model:
        """The node alone, its inputs as initializers."""
        inputs: list[ir.Value | None] = []
        made: dict[ir.Value, ir.Value] = {}
        for index, value in enumerate(node.inputs):
            if value is None:
                inputs.append(None)
                continue
            if value not in made:
                tensor = self._array(value)
                made[value] = ir.Value(
                    name=f"in_{index}",
                    type=ir.TensorType(tensor.dtype),
                    shape=ir.Shape(tensor.shape.numpy()),
                    const_value=tensor,
                )
            inputs.append(made[value])
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name="piece",
        )
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

    def _too_large(self, node: ir.Node) -> str | None:
        """Refuse before computing: three bytes of Expand can ask for gigabytes."""
        import onnx

        size = 0
        try:
            inferred = onnx.shape_inference.infer_shapes(to_proto(self._piece(node)), data_prop=True)
        except Exception:  # inference is a hint, never a requirement; small inputs are then trusted to stay small
            return None if _input_bytes(self, node) < 2**20 else "its result's size is unknown"
        for output in inferred.graph.output:
            shape = output.type.tensor_type.shape
            count = 1
            for dim in shape.dim:
                if not dim.HasField("dim_value"):
                    return None if _input_bytes(self, node) < 2**16 else "its result's size is unknown"
                count *= dim.dim_value
            size += count * 4
        if size > self.options.max_result:
            return f"its result would take {size} bytes; raise max-result to fold it"
        return None

    def _compute(self, node: ir.Node) -> str | None:
        try:
            outputs = Session(self._piece(node), optimize=False, threads=1).run({})
        except RuntimeFailure as error:
            return f"ONNX Runtime cannot evaluate it: {error}"
        for index, value in enumerate(node.outputs):
            if value.name:
                array = outputs[f"out_{index}"]
                if not hasattr(array, "nbytes") or array.dtype == object:
                    return "its result is no numeric tensor"
                self.values[value] = array
        return None

    def _within_budget(self, foldable: list[ir.Node]) -> list[ir.Node]:
        """Drop the folds that cost most until the whole does not grow."""
        while foldable and not self.options.allow_growth:
            chosen = set(foldable)
            cost = {
                n: sum(self.values[v].nbytes for v in n.outputs if v.name and _read_outside(v, foldable))
                for n in foldable
            }
            gain = sum(_freed(node, chosen) for node in foldable) + _NODE_BYTES * len(foldable)
            if sum(cost.values()) <= gain:
                break
            worst = max(foldable, key=lambda n: cost[n])
            self.refused[worst] = (
                f"folding it would make the file larger (its result has {cost[worst]} bytes); allow-growth permits it"
            )
            foldable = [n for n in foldable if n is not worst and not _depends(n, worst)]
        return foldable

    def _replace(self, node: ir.Node, value: ir.Value) -> None:
        assert value.name is not None
        name = value.name
        value.name = None
        self.taken.discard(name)
        new = add_constant(self.model, self.graph, name, self.values[value], self.taken, node)
        new.doc_string = value.doc_string
        new.metadata_props.update(value.metadata_props)
        value.replace_all_uses_with(new)


def _read_outside(value: ir.Value, foldable: list[ir.Node]) -> bool:
    inside = set(foldable)
    return any(user not in inside for user, _ in value.uses())


def _freed(node: ir.Node, chosen: set[ir.Node]) -> int:
    """Bytes of the constants that only folded nodes read (each counted at its first reader)."""
    freed = 0
    for value in dict.fromkeys(node.inputs):
        tensor = constant(value)
        if value is None or tensor is None or value.is_graph_output():
            continue
        users = [user for user, _ in value.uses()]
        if all(user in chosen for user in users) and users[0] is node:
            freed += int(tensor.nbytes)
    return freed


def _depends(node: ir.Node, on: ir.Node) -> bool:
    return any(value is not None and value.producer() is on for value in node.inputs)


def _input_bytes(folder: _GraphFolder, node: ir.Node) -> int:
    return sum(int(folder._array(v).nbytes) for v in node.inputs if v is not None)
