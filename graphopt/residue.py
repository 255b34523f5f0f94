"""What onnx-ir cannot hold, carried through it as text and put back on the way out.

Sparse initializers become opaque nodes, so that passes see the name they make; attributes and types become base64 text
under a reserved name *on the node or value itself*, so that they follow it through clones, renames and subgraphs.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

DOMAIN = "graphopt.residue"
"""Domain of the opaque nodes, and prefix of the reserved attribute and metadata names."""

_ATTRIBUTE = DOMAIN + ":"
_TYPE = DOMAIN + ".type"


def graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and every subgraph, outermost first; function bodies' subgraphs included."""
    yield from _under([proto.graph], [a for n in _function_nodes(proto) for a in n.attribute])


def _under(stack: list[onnx.GraphProto], attributes: list[onnx.AttributeProto]) -> Iterator[onnx.GraphProto]:
    while stack or attributes:
        for attribute in attributes:
            if attribute.HasField("g"):
                stack.append(attribute.g)
            stack.extend(attribute.graphs)
        attributes = []
        if stack:
            graph = stack.pop()
            yield graph
            attributes = [a for node in graph.node if node.attribute for a in node.attribute]


def _function_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for function in proto.functions:
        yield from function.node


def _attributes(proto: onnx.ModelProto, within: list[onnx.GraphProto]) -> Iterator[onnx.AttributeProto]:
    for graph in within:
        for node in graph.node:
            yield from node.attribute
    for node in _function_nodes(proto):
        yield from node.attribute
    for function in proto.functions:
        yield from function.attribute_proto


def _infos(proto: onnx.ModelProto, within: list[onnx.GraphProto]) -> Iterator[onnx.ValueInfoProto]:
    for graph in within:
        yield from graph.input
        yield from graph.output
        yield from graph.value_info
    for function in proto.functions:
        yield from function.value_info


def _sparse(proto: onnx.AttributeProto) -> Iterator[onnx.TensorProto]:
    for sparse in ([proto.sparse_tensor] if proto.HasField("sparse_tensor") else []) + list(proto.sparse_tensors):
        yield from (sparse.values, sparse.indices)


def dense_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that becomes an onnx-ir tensor: initializers and attributes, in functions too."""
    within = list(graphs(proto))
    for graph in within:
        yield from graph.initializer
    for attribute in _attributes(proto, within):
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


def opaque_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that travels as residue: the parts of sparse ones, and those of the training information."""
    within = list(graphs(proto))
    for graph in within:
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for attribute in _attributes(proto, within):
        yield from _sparse(attribute)
    for info in proto.training_info:
        for graph in _under([info.initialization, info.algorithm], []):
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            for node in graph.node:
                for attribute in node.attribute:
                    yield attribute.t
                    yield from (*attribute.tensors, *_sparse(attribute))


def take(proto: onnx.ModelProto) -> list[bytes]:
    """Hide in ``proto`` what onnx-ir cannot hold; returns the training information, which has no place in a graph."""
    import onnx

    within = list(graphs(proto))
    for info in _infos(proto, within):
        if not _plain(info.type):
            info.metadata_props.add(key=_TYPE, value=_text(info.type))
            info.ClearField("type")
    for attribute in _attributes(proto, within):
        if attribute.type == onnx.AttributeProto.UNDEFINED and not attribute.ref_attr_name:
            attribute.type = _kind(attribute)  # files of IR version 1 leave it out
        if _opaque(attribute):
            hidden = onnx.AttributeProto(name=_ATTRIBUTE + attribute.name, type=onnx.AttributeProto.STRING)
            hidden.s = _text(attribute).encode()
            attribute.CopyFrom(hidden)  # in its place: the order of attributes stays
    for graph in within:
        if graph.sparse_initializer:
            nodes = [_sparse_node(sparse) for sparse in graph.sparse_initializer] + list(graph.node)
            del graph.sparse_initializer[:], graph.node[:]
            graph.node.extend(nodes)
    training = [info.SerializeToString(deterministic=True) for info in proto.training_info]
    del proto.training_info[:]
    return training


def put_back(proto: onnx.ModelProto, training: list[bytes]) -> None:
    """Undo :func:`take`."""
    import onnx

    within = list(graphs(proto))
    for info in _infos(proto, within):
        for index, entry in enumerate(info.metadata_props):
            if entry.key == _TYPE:
                info.type.ParseFromString(base64.b64decode(entry.value))
                del info.metadata_props[index]
                break
    for attribute in _attributes(proto, within):
        if attribute.name.startswith(_ATTRIBUTE):
            attribute.ParseFromString(base64.b64decode(attribute.s))
    for graph in within:
        hidden = [node for node in graph.node if node.domain == DOMAIN]
        if not hidden:
            continue
        for node in hidden:
            sparse = onnx.SparseTensorProto.FromString(base64.b64decode(node.attribute[0].s))
            sparse.values.name = node.output[0]  # a pass may have renamed it
            graph.sparse_initializer.append(sparse)
        kept = [node for node in graph.node if node.domain != DOMAIN]
        del graph.node[:]
        graph.node.extend(kept)
    for blob in training:
        proto.training_info.append(onnx.TrainingInfoProto.FromString(blob))


def function_inputs(proto: onnx.ModelProto, model: ir.Model) -> None:
    """onnx-ir reads the ``value_info`` of a function's values, but not of its inputs."""
    import onnx_ir as ir

    for function in proto.functions:
        infos = {info.name: info for info in function.value_info}
        loaded = model.functions.get((function.domain, function.name, function.overload))
        for value in loaded.inputs if loaded is not None and infos else ():
            if value.name in infos:
                ir.serde.deserialize_value_info_proto(infos[value.name], value)


def tidy(proto: onnx.ModelProto) -> None:
    """Remove what onnx-ir writes twice: the metadata of tensors, the annotations of values that are also outputs, and
    a ``value_info`` for each initializer, which only repeats what the tensor says."""
    for tensor in dense_tensors(proto):
        _unique(tensor.metadata_props, "key")
    for graph in graphs(proto):
        _unique(graph.quantization_annotation, "tensor_name")
        known = {tensor.name for tensor in graph.initializer}
        kept = [v for v in graph.value_info if v.name not in known or v.metadata_props or v.doc_string]
        if len(kept) != len(graph.value_info):
            del graph.value_info[:]
            graph.value_info.extend(kept)


def _unique(entries: Any, key: str) -> None:
    if len(entries) > 1:
        seen: set[str] = set()
        for index in reversed(range(len(entries))):  # the last one counts, as in a dict
            name = getattr(entries[index], key)
            if name in seen:
                del entries[index]
            seen.add(name)


def _sparse_node(sparse: onnx.SparseTensorProto) -> onnx.NodeProto:
    import onnx

    node = onnx.NodeProto(op_type="SparseInitializer", domain=DOMAIN, output=[sparse.values.name])
    node.attribute.add(name="sparse", type=onnx.AttributeProto.STRING, s=_text(sparse).encode())
    return node


def _text(message: Any) -> str:
    return base64.b64encode(message.SerializeToString(deterministic=True)).decode()


def _plain(type_proto: onnx.TypeProto) -> bool:
    """Whether onnx-ir gives this type back as it was."""
    kind = type_proto.WhichOneof("value")
    if kind is None:
        return bool(type_proto.ByteSize() == 0)
    if kind in ("tensor_type", "sparse_tensor_type"):
        return bool(getattr(type_proto, kind).HasField("elem_type"))
    if kind in ("sequence_type", "optional_type"):
        inner: Any = getattr(type_proto, kind)
        return (
            bool(inner.HasField("elem_type"))
            and inner.elem_type.WhichOneof("value") is not None
            and _plain(inner.elem_type)
        )
    return False


def _kind(attribute: onnx.AttributeProto) -> onnx.AttributeProto.AttributeType:
    """The type of an attribute that only its content tells."""
    import onnx

    kinds = onnx.AttributeProto
    one = {"f": kinds.FLOAT, "i": kinds.INT, "s": kinds.STRING, "t": kinds.TENSOR, "g": kinds.GRAPH}
    many = {"floats": kinds.FLOATS, "ints": kinds.INTS, "strings": kinds.STRINGS, "tensors": kinds.TENSORS}
    for field, kind in one.items():
        if attribute.HasField(field):
            return kind
    return next((kind for field, kind in many.items() if getattr(attribute, field)), kinds.UNDEFINED)


def _opaque(attribute: onnx.AttributeProto) -> bool:
    """Whether onnx-ir would refuse or change this attribute."""
    import onnx

    if attribute.ref_attr_name:
        return False
    kinds = onnx.AttributeProto
    if attribute.type in (kinds.SPARSE_TENSOR, kinds.SPARSE_TENSORS):
        return True
    if attribute.type == kinds.TYPE_PROTO:
        return not _plain(attribute.tp)
    if attribute.type == kinds.TYPE_PROTOS:
        return not all(_plain(tp) for tp in attribute.type_protos)
    if attribute.type in (kinds.STRING, kinds.STRINGS):
        return not all(_is_utf8(s) for s in (attribute.s, *attribute.strings))
    return False


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
