"""onnx-graphsurgeon as an editing view, and the only place that imports it.

graphsurgeon drops what it does not model; :func:`edit` puts it back, or refuses models it cannot carry and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import onnx

from graphopt.errors import InputError, PreconditionError
from graphopt.external import shown
from graphopt.model import graphs, is_external, load, register_loader, replace, to_proto, weight_bytes

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    import onnx_ir as ir

_INLINE_ONLY = 1 << 30
_KINDS = onnx.AttributeProto
_LOST = (
    _KINDS.SPARSE_TENSOR,
    _KINDS.SPARSE_TENSORS,
    _KINDS.TENSORS,
    _KINDS.GRAPHS,
    _KINDS.TYPE_PROTO,
    _KINDS.TYPE_PROTOS,
)
_Constants = dict[str, onnx.TensorProto]
_Owners = dict[str, _Constants]
_SUB_BYTE = tuple(
    getattr(onnx.TensorProto, name)
    for name in ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2", "FLOAT6E2M3", "FLOAT6E3M2")
    if hasattr(onnx.TensorProto, name)
)


def edit(model: ir.Model, function: Callable[[gs.Graph], Any]) -> None:
    """Let ``function`` edit ``model`` as a ``gs.Graph`` (in place, or by returning another graph).

    Where it raises, ``model`` is as before.

    Raises:
        PreconditionError: the model holds something graphsurgeon would lose.
        InputError: ``function`` returned something that is no graph.
        ModelError: it left a graph that is not valid.
    """
    import onnx_graphsurgeon as gs

    original = to_proto(model)
    refuse(model, original)
    graph = gs.import_onnx(original)
    result = function(graph)
    if result is not None and not isinstance(result, (gs.Graph, bool)):
        raise InputError(
            f"a graphsurgeon pass returned a {type(result).__name__}; edit the graph in place, or return a gs.Graph"
        )
    edited = gs.export_onnx(result if isinstance(result, gs.Graph) else graph)
    replace(model, load(_restored(edited, original)))


def refuse(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Raise PreconditionError for models graphsurgeon cannot carry; the message names what it would lose."""
    reason: str | None = None
    if is_external(model) or weight_bytes(model) > _INLINE_ONLY:
        reason = "weights in a data file, which it would load whole"
    elif proto.training_info:
        reason = "training information"
    elif proto.configuration:
        reason = "device configurations"
    elif any(f.overload or f.metadata_props or f.value_info for f in proto.functions):
        reason = "functions with overloads, metadata or types"
    for graph in graphs(proto):
        reason = reason or _unbearable(graph)
    if reason is not None:
        raise PreconditionError(
            f"onnx-graphsurgeon cannot carry this model: {reason}; use an onnx_ir or ModelProto pass"
        )


def _unbearable(graph: onnx.GraphProto) -> str | None:
    """What graphsurgeon would lose of this graph for good."""
    if graph.sparse_initializer:
        return f"sparse initializers ('{shown(graph.sparse_initializer[0].values.name)}')"
    if graph.quantization_annotation:
        return f"quantization annotations ('{shown(graph.quantization_annotation[0].tensor_name)}')"
    for info in (*graph.input, *graph.output, *graph.value_info):
        kind = info.type.WhichOneof("value")
        if kind not in (None, "tensor_type", "sequence_type"):
            return f"a value of {kind} ('{shown(info.name)}')"
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type in _LOST:
                name = onnx.AttributeProto.AttributeType.Name(attribute.type)
                return f"an attribute of type {name} ('{shown(attribute.name)}' of '{shown(node.name)}')"
    tensors = [*graph.initializer, *(a.t for node in graph.node for a in node.attribute if a.HasField("t"))]
    small = next((t for t in tensors if t.data_type in _SUB_BYTE), None)
    return None if small is None else f"tensors of less than a byte per element ('{shown(small.name)}')"


def _restored(edited: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """Put back what graphsurgeon dropped, where the thing it belongs to is still there."""
    for field in ("producer_name", "producer_version", "domain", "model_version", "ir_version"):
        if original.HasField(field):
            setattr(edited, field, getattr(original, field))
        else:
            edited.ClearField(field)
    _copy_notes(edited, original)
    _restore_graph(edited.graph, original.graph, {})
    functions = {(f.domain, f.name): f for f in original.functions}
    for function in edited.functions:
        before = functions.get((function.domain, function.name))
        if before is not None:
            _copy_notes(function, before)
            _restore_nodes(function.node, before.node, {})
    return edited


def _restore_graph(edited: onnx.GraphProto, original: onnx.GraphProto, outer: _Owners) -> None:
    """``outer`` says which graph around this one owned a constant: graphsurgeon moves those a body reads into it, and
    into each body that does."""
    _copy_notes(edited, original)
    order = {t.name: index for index, t in enumerate(original.initializer)}
    for index in reversed(range(len(edited.initializer))):
        tensor = edited.initializer[index]
        owner = outer.get(tensor.name)
        if owner is None or tensor.name in order:
            continue
        if owner.setdefault(tensor.name, tensor) is tensor or _equal(owner[tensor.name], tensor):
            del edited.initializer[index]
    own: _Constants = {t.name: t for t in edited.initializer}
    _restore_nodes(edited.node, original.node, {**outer, **dict.fromkeys(order, own)})
    listed = {t.name for t in edited.initializer}
    edited.initializer.extend(tensor for name, tensor in own.items() if name not in listed)
    known = [order.get(t.name, len(order)) for t in edited.initializer]
    if known != sorted(known):
        edited.initializer.sort(key=lambda t: order.get(t.name, len(order)))
    _restore_inputs(edited, original)
    infos = {i.name: i for i in (*original.input, *original.output, *original.value_info)}
    for info in (*edited.input, *edited.output, *edited.value_info):
        before = infos.get(info.name)
        if before is not None:
            _copy_notes(info, before)
            _restore_type(info.type, before.type)
    tensors = {t.name: t for t in original.initializer}
    for tensor in edited.initializer:
        if tensor.name in tensors:
            _copy_notes(tensor, tensors[tensor.name])


def _equal(one: onnx.TensorProto, other: onnx.TensorProto) -> bool:
    return bool(one.SerializeToString(deterministic=True) == other.SerializeToString(deterministic=True))


def _restore_inputs(edited: onnx.GraphProto, original: onnx.GraphProto) -> None:
    """Inputs with a default value: graphsurgeon makes constants of them, so that nobody could feed them any more."""
    listed, constant = {v.name for v in edited.input}, {t.name for t in edited.initializer}
    if all(v.name in listed or v.name not in constant for v in original.input):
        return
    known = {v.name: v for v in edited.input}
    inputs = [known.pop(v.name, v) for v in original.input if v.name in listed or v.name in constant]
    inputs = [*(onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in (*inputs, *known.values()))]
    del edited.input[:]
    edited.input.extend(inputs)


def _restore_type(edited: onnx.TypeProto, original: onnx.TypeProto) -> None:
    """The shape inside a sequence, and denotations, where the type is otherwise the one it was."""
    if original.denotation and edited.WhichOneof("value") == original.WhichOneof("value"):
        edited.denotation = original.denotation
    if edited.HasField("sequence_type") and original.HasField("sequence_type"):
        edited.CopyFrom(original)
    elif edited.HasField("tensor_type") and original.HasField("tensor_type"):
        dims, before = edited.tensor_type.shape.dim, original.tensor_type.shape.dim
        for dim, old in zip(dims, before, strict=False):
            if old.denotation and len(dims) == len(before):
                dim.denotation = old.denotation


def _restore_nodes(edited: Sequence[onnx.NodeProto], original: Sequence[onnx.NodeProto], outer: _Owners) -> None:
    """Nodes are the same where operator and outputs are; a renamed one keeps what belongs to it."""
    known = {(node.op_type, *node.output): node for node in original}
    for node in edited:
        before = known.get((node.op_type, *node.output))
        if before is None:
            continue
        _copy_notes(node, before)
        if before.overload:
            node.overload = before.overload
        attributes = {a.name: a for a in before.attribute}
        for attribute in node.attribute:
            old = attributes.get(attribute.name)
            if old is None or old.type != attribute.type:
                continue
            if old.doc_string:
                attribute.doc_string = old.doc_string
            bodies, olds = ([a.g] if a.HasField("g") else list(a.graphs) for a in (attribute, old))
            for body, old_body in zip(bodies, olds, strict=False):
                _restore_graph(body, old_body, outer)


def _copy_notes(edited: Any, original: Any) -> None:
    """Doc string and metadata, the same in every message that has them."""
    if original.doc_string:
        edited.doc_string = original.doc_string
    else:
        edited.ClearField("doc_string")
    del edited.metadata_props[:]
    edited.metadata_props.extend(original.metadata_props)


def to_model_proto(graph: gs.Graph) -> onnx.ModelProto:
    """What :func:`graphopt.model.load` does with a ``gs.Graph``: exported without touching the caller's graph."""
    import onnx_graphsurgeon as gs

    proto: onnx.ModelProto = gs.export_onnx(graph.copy())
    return proto


register_loader("onnx_graphsurgeon", to_model_proto)
