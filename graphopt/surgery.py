"""onnx-graphsurgeon as an editing view, and the only place that imports it.

graphsurgeon drops what it does not model; :func:`edit` puts it back, or refuses models it cannot carry and says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import onnx

from graphopt.errors import PreconditionError
from graphopt.model import graphs, is_external, load, register_loader, replace, to_proto, weight_bytes

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    import onnx_ir as ir

_INLINE_ONLY = 1 << 30


def edit(model: ir.Model, function: Callable[[gs.Graph], Any]) -> None:
    """Let ``function`` edit ``model`` as a ``gs.Graph`` (in place, or by returning another graph).

    Raises:
        PreconditionError: the model holds something graphsurgeon would lose.
    """
    import onnx_graphsurgeon as gs

    original = to_proto(model)
    refuse(model, original)
    graph = gs.import_onnx(original)
    result = function(graph)
    replace(model, load(_restored(gs.export_onnx(result if isinstance(result, gs.Graph) else graph), original)))


def refuse(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Raise PreconditionError for models graphsurgeon cannot carry; the message names what it would lose."""
    reason: str | None = None
    if is_external(model) or weight_bytes(model) > _INLINE_ONLY:
        reason = "weights in a data file, which it would load whole"
    for graph in graphs(proto):
        if graph.sparse_initializer:
            reason = "sparse initializers"
        if graph.quantization_annotation:
            reason = "quantization annotations"
        for info in (*graph.input, *graph.output, *graph.value_info):
            if info.type.WhichOneof("value") not in (None, "tensor_type", "sequence_type"):
                reason = f"a {info.type.WhichOneof('value')} ('{info.name}')"
        for tensor in graph.initializer:
            if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1):
                reason = f"4-bit tensors ('{tensor.name}')"
    if reason is not None:
        raise PreconditionError(
            f"onnx-graphsurgeon cannot carry this model: {reason}; use an onnx_ir or ModelProto pass"
        )


def _restored(edited: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string", "ir_version"):
        setattr(edited, field, getattr(original, field))
    del edited.metadata_props[:]
    edited.metadata_props.extend(original.metadata_props)
    edited.graph.doc_string = original.graph.doc_string
    del edited.graph.metadata_props[:]
    edited.graph.metadata_props.extend(original.graph.metadata_props)
    known = {node.name: node for node in original.graph.node if node.name}
    for node in edited.graph.node:
        before = known.get(node.name)
        if before is not None and before.op_type == node.op_type:
            node.doc_string = before.doc_string
            del node.metadata_props[:]
            node.metadata_props.extend(before.metadata_props)
    docs = {i.name: i for i in (*original.graph.input, *original.graph.output, *original.graph.value_info)}
    for info in (*edited.graph.input, *edited.graph.output, *edited.graph.value_info):
        if info.name in docs:
            info.doc_string = docs[info.name].doc_string
            del info.metadata_props[:]
            info.metadata_props.extend(docs[info.name].metadata_props)
    return edited


def to_model_proto(graph: gs.Graph) -> onnx.ModelProto:
    """What :func:`graphopt.model.load` does with a ``gs.Graph``: exported without touching the caller's graph."""
    import onnx_graphsurgeon as gs

    proto: onnx.ModelProto = gs.export_onnx(graph.copy())
    return proto


register_loader("onnx_graphsurgeon", to_model_proto)
