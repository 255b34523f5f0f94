"""Store a weight that is quantized at run time as the integers it is quantized to; the DequantizeLinear stays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.errors import RuntimeFailure
from graphopt.graph import attribute, constant, is_op, label, nodes, value_names
from graphopt.model import tensor_buffer
from graphopt.passes._rewire import OFF, substitute
from graphopt.passes._weights import add_constant, drop_unread
from graphopt.session import Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

_D = ir.DataType
_FED = frozenset({_D.FLOAT, _D.FLOAT16, _D.DOUBLE})
"""Types that numpy and the runtime share: such a weight is handed over without a copy."""
_BY_INTEGER = frozenset({_D.INT4, _D.UINT4})
_BY_FLOAT = frozenset({_D.FLOAT8E4M3FN, _D.FLOAT8E4M3FNUZ, _D.FLOAT8E5M2, _D.FLOAT8E5M2FNUZ, _D.FLOAT4E2M1})
_PLAIN = frozenset({_D.INT8, _D.UINT8, _D.INT16, _D.UINT16})


@dataclass(frozen=True)
class FoldQdqWeights(Pass):
    """float weight -> QuantizeLinear -> DequantizeLinear becomes integer weight -> DequantizeLinear, bit for bit.

    ONNX Runtime itself does the quantization, with its optimizations off, so nothing is rounded differently. A float
    weight that somebody else reads too would have to stay beside the integers: left alone, with the reason.
    """

    name: ClassVar[str] = "fold-qdq-weights"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        found = [n for n in nodes(model) if is_op(n, "QuantizeLinear") and constant(n.inputs[0]) is not None]
        if not found:
            result.skipped.append(Skip("(graph)", "no constant weight is quantized at run time"))
        folder = _Folder(model, value_names(model))
        waiting: dict[ir.Value, list[ir.Node]] = {}
        for node in found:
            reason = _reason(node)
            if reason is None and not context.allows(self.name, label(node)):
                reason = OFF
            if reason is None and node.inputs[0] is not None:
                waiting.setdefault(node.inputs[0], []).append(node)
            else:
                result.skipped.append(Skip(label(node), str(reason)))
        for weight, readers in waiting.items():
            self._fold(weight, readers, folder, result)
        return result

    def _fold(self, weight: ir.Value, readers: list[ir.Node], folder: _Folder, result: PassResult) -> None:
        """All readers of one weight together: the float is gone only when the last of them is."""
        known: dict[Any, NDArray[Any]] = {}
        ready: list[tuple[ir.Node, Any]] = []
        for node in readers:
            key = _key(node)
            made = known.get(key)
            answer = folder.quantized(node) if made is None else made
            if isinstance(answer, str):
                result.skipped.append(Skip(label(node), answer))
                continue
            known[key] = answer
            ready.append((node, key))
        reason = _growth(weight, [node for node, _ in ready], list(known.values()))
        for node, key in ready:
            if reason is not None:
                result.skipped.append(Skip(label(node), reason))
                continue
            before = constant(weight)
            assert before is not None
            kind = _name(ir.tensor(known[key]).dtype)
            result.changes.append(Change("fold", label(node), f"{weight.name}: {_name(before.dtype)} -> {kind}"))
            folder.replace(node, key, known[key])
        if reason is None:
            drop_unread(weight)


@dataclass
class _Folder:
    """Evaluates and replaces; weights made once are shared where weight, scale and zero point are the same."""

    model: ir.Model
    taken: set[str]
    made: dict[Any, ir.Value] = field(default_factory=dict)

    def quantized(self, node: ir.Node) -> NDArray[Any] | str:
        """What the runtime makes of the weight, or why there is nothing."""
        kind = _result_type(node)
        if kind not in _PLAIN | _BY_INTEGER | _BY_FLOAT:
            return f"it makes {_name(kind)}, which cannot be stored from here"
        piece, feeds = self._piece(node, kind)
        try:
            array = Session(piece, optimize=False, threads=1).run(feeds)["out"]
        except RuntimeFailure as error:
            return f"ONNX Runtime cannot quantize it ({error})"
        if kind in _PLAIN:
            return array
        with np.errstate(invalid="ignore"):
            stored: NDArray[Any] = array.astype(kind.numpy())
            exact = np.array_equal(stored.astype(array.dtype), array)
        return stored if exact else f"the runtime's {_name(kind)} values include NaN, which has more than one form"

    def _piece(self, node: ir.Node, kind: ir.DataType) -> tuple[ir.Model, dict[str, NDArray[Any]]]:
        made: list[ir.Value | None] = []
        feeds: dict[str, NDArray[Any]] = {}
        weights: list[ir.Value] = []
        inputs: list[ir.Value] = []
        for index, value in enumerate(node.inputs):
            tensor = constant(value)
            if tensor is None:
                made.append(None)
                continue
            shape = ir.Shape(tensor.shape.numpy())
            copy = ir.Value(name=f"in_{index}", type=ir.TensorType(tensor.dtype), shape=shape)
            made.append(copy)
            if index == 0 and tensor.dtype in _FED:
                inputs.append(copy)
                feeds[f"in_{index}"] = tensor.numpy()
            else:
                copy.const_value = ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=f"in_{index}")
                weights.append(copy)
        last = ir.Node("", node.op_type, made, list(node.attributes.values()), num_outputs=1)
        steps = [last]
        if kind not in _PLAIN:
            to = _D.INT8 if kind in _BY_INTEGER else _D.FLOAT
            last.outputs[0].name = "quantized"
            steps.append(ir.node("Cast", [last.outputs[0]], attributes={"to": int(to)}))
        out = steps[-1].outputs[0]
        out.name = "out"
        imports = dict(self.model.opset_imports)
        graph = ir.Graph(inputs, [out], nodes=steps, initializers=weights, name="piece", opset_imports=imports)
        return ir.Model(graph, ir_version=max(self.model.ir_version, 4)), feeds

    def replace(self, node: ir.Node, key: Any, array: NDArray[Any]) -> None:
        """Let everybody read the stored integers."""
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        old = node.outputs[0]
        new = self.made.get((graph, key))
        if new is None or new.graph is None:
            assert old.name is not None
            name, old.name = old.name, None
            self.taken.discard(name)
            new = add_constant(self.model, graph, name, array, self.taken, node)
            new.doc_string = old.doc_string
            new.metadata_props.update(old.metadata_props)
            if self.model.ir_version >= 4:  # a Constant node would stand in front of this reader, after others
                self.made[(graph, key)] = new
        substitute(old, new)
        read = [v for v in node.inputs[1:] if v is not None]
        graph.remove([node], safe=True)
        drop_unread(*read)


def _reason(node: ir.Node) -> str | None:
    """Why this QuantizeLinear stays, before anything is computed."""
    if any(v is not None and constant(v) is None for v in node.inputs[1:]):
        return "its scale or zero point is not constant, or may be overridden"
    output = node.outputs[0]
    if output.is_graph_output():
        return "its result is an output of the graph"
    if not any(is_op(use.node, "DequantizeLinear") and use.idx == 0 for use in output.uses()):
        return "no DequantizeLinear reads its result"
    return None


def _growth(weight: ir.Value, folded: list[ir.Node], stored: list[NDArray[Any]]) -> str | None:
    """Why storing the integers does not pay."""
    tensor = constant(weight)
    if tensor is None or not folded:
        return None
    gone = set(folded)
    if weight.is_graph_output() or any(use.node not in gone for use in weight.uses()):
        return "the float weight is read elsewhere too, so it would have to stay beside the integers"
    if sum(ir.tensor(array).nbytes for array in stored) > tensor.nbytes:
        return "it is quantized in so many ways that the integers would take more room than the weight"
    return None


def _key(node: ir.Node) -> Any:
    """Equal for readers that make the same integers out of one weight."""
    attributes = tuple(sorted((a.name, str(a.value)) for a in node.attributes.values()))
    tensors = [constant(v) for v in node.inputs[1:]]
    parameters = (None if t is None else (t.dtype, tuple(t.shape.numpy()), bytes(tensor_buffer(t))) for t in tensors)
    return (node.inputs[0], attributes, tuple(parameters))


def _result_type(node: ir.Node) -> ir.DataType:
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if zero is not None:
        return zero.dtype
    return _D(attribute(node, "output_dtype", 0) or _D.UINT8)


def _name(kind: ir.DataType) -> str:
    return kind.name.lower()
