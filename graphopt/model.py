"""Models in and out: load from anything, clone, fingerprint.

Between passes a model is an ``onnx_ir.Model``. This file owns the way in and the way back, including the few things
onnx-ir cannot carry (sparse tensors, map types, training information), which travel as opaque residue and are put back
on the way out. Writing files is ``storage.py``'s job; external weights come in through its one gate.
"""

from __future__ import annotations

import base64
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import InputError, ModelError
from graphopt.external import ExternalFiles

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

ModelLike = Any
"""A path, ``bytes``, ``"-"`` (stdin), ``onnx.ModelProto``, ``onnx_ir.Model``, or what a registered loader takes."""

PROTO_LIMIT = 2**31 - 1
"""Bytes: protobuf cannot serialize a larger message, so larger models keep their weights in a data file."""

_RESIDUE = "graphopt.residue"
_SPARSE_ATTRIBUTE = "graphopt.sparse:"

_LOADERS: dict[str, Callable[[Any], onnx.ModelProto]] = {}


@dataclass(frozen=True)
class ValueSpec:
    """One graph input or output.

    ``dtype`` is None for what is no tensor (sequence, map, optional); ``np.dtype(object)`` for strings.
    ``shape`` is None when the rank is unknown; a dim is an int, a symbolic name, or None.
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        kind = "not a tensor" if self.dtype is None else "string" if self.dtype == object else str(self.dtype)
        if self.shape is None:
            return f"{kind}[...]"
        return f"{kind}[{','.join('?' if d is None else str(d) for d in self.shape)}]"


def register_loader(module: str, loader: Callable[[Any], onnx.ModelProto]) -> None:
    """Teach :func:`load` objects whose type lives in the top-level package ``module``."""
    _LOADERS[module] = loader


def load(source: ModelLike, *, external_roots: Sequence[str | Path] = ()) -> ir.Model:
    """Load a model without ever touching the caller's object.

    External weights are memory-mapped, and only from files inside the model's folder or below one of
    ``external_roots``.

    Raises:
        InputError: the file cannot be read.
        ModelError: it is no ONNX model, or its external data is missing, lies, or points outside.
    """
    import onnx
    import onnx_ir as ir

    if isinstance(source, ir.Model):
        return clone(source)
    folder: Path | None = None
    if isinstance(source, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(source)  # what follows rewrites sparse tensors in place
        where = "the ModelProto given"
    elif isinstance(source, (bytes, bytearray, memoryview)):
        proto, where = _parse(bytes(source), "the bytes given"), "the bytes given"
    elif isinstance(source, str) and source == "-":
        proto, where = _parse(sys.stdin.buffer.read(), "standard input"), "standard input"
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        proto, where = _parse(_read(path), str(path)), str(path)
        folder = Path.cwd() / path.parent  # where the name stands, links not followed
    else:
        loader = _LOADERS.get(type(source).__module__.split(".")[0])
        if loader is None:
            raise InputError(
                f"cannot load a {type(source).__module__}.{type(source).__name__}; give a path, bytes, an "
                "onnx.ModelProto, an onnx_ir.Model or an onnx_graphsurgeon.Graph"
            )
        proto, where = loader(source), f"the {type(source).__name__} given"
    return _from_proto(proto, where, ExternalFiles(folder, tuple(Path(r) for r in external_roots)))


def read_proto(source: str | Path) -> onnx.ModelProto:
    """The protobuf of a file (``"-"``: stdin), external weights not looked at.

    Raises:
        InputError, ModelError: as :func:`load`.
    """
    if str(source) == "-":
        return _parse(sys.stdin.buffer.read(), "standard input")
    return _parse(_read(Path(source)), str(source))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"no such file: {path}; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; give the .onnx file in it") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


_FORMATS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"PK\x03\x04", "a zip archive (PyTorch, Keras, NumPy or skops)"),
    (0, b"\x89HDF", "an HDF5 file (Keras .h5)"),
    (0, b"GGUF", "a GGUF file"),
    (0, b"<?xml", "an XML file (OpenVINO IR?)"),
    (4, b"TFL3", "a TensorFlow Lite file"),
    (4, b"ORTM", "an ONNX Runtime .ort file"),
)


def _parse(data: bytes, where: str) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    for offset, magic, name in _FORMATS:
        if data[offset : offset + len(magic)] == magic:
            raise ModelError(f"{where} is {name}, not an ONNX model; convert it to ONNX first")
    if not data:
        raise ModelError(f"{where} is empty; was the export interrupted?")
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError:
        raise ModelError(
            f"{where} is not an ONNX model (the protobuf does not parse: truncated, or another format); export it again"
        ) from None
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output) or proto.ir_version < 1:
        raise ModelError(f"{where} is not an ONNX model (no graph in it); export it again")
    return proto


def _from_proto(proto: onnx.ModelProto, where: str, external: ExternalFiles) -> ir.Model:
    import onnx_ir as ir

    from graphopt.structure import check_proto

    check_proto(proto, where)
    residue = _Residue.take(proto)
    for tensor in _tensors(proto):
        external.check(tensor)
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # onnx-ir raises whatever it met; the file is to blame, not the reader
        raise ModelError(f"{where} is not a valid ONNX model ({_innermost(error)}); export it again") from error
    _map_external(model, external)
    model.meta[_RESIDUE] = residue
    model.meta["graphopt.external"] = external.used
    return model


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _map_external(model: ir.Model, external: ExternalFiles) -> None:
    """Replace onnx-ir's path-based external tensors by arrays mapped through the gate's own descriptors."""
    import onnx_ir as ir

    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = external.map(value.const_value)
        for node in graph:
            for name, attribute in node.attributes.items():
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, external.map(attribute.value))


def clone(model: ir.Model) -> ir.Model:
    """A copy whose graph may be edited freely; weights are shared, so it costs no memory."""
    copy = model.clone()
    copy.meta.update(model.meta)
    return copy


def is_external(model: ir.Model) -> bool:
    """Whether the model came with its weights in a data file."""
    return bool(model.meta.get("graphopt.external"))


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, as stored."""
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as a ``ModelProto`` with its weights inside.

    onnx-ir writes a ``value_info`` for each initializer; they repeat what the tensor says, so they are left out.
    """
    import onnx_ir as ir

    proto = ir.to_proto(model)
    for graph in graphs(proto):
        known = {tensor.name for tensor in graph.initializer}
        kept = [v for v in graph.value_info if v.name not in known or v.metadata_props or v.doc_string]
        if len(kept) != len(graph.value_info):
            del graph.value_info[:]
            graph.value_info.extend(kept)
    residue = model.meta.get(_RESIDUE)
    if residue is not None:
        residue.put_back(proto)
    return proto


def to_bytes(model: ir.Model) -> bytes:
    """Deterministic serialized form of a model below :data:`PROTO_LIMIT`.

    Raises:
        ModelError: the model is too large for one protobuf message.
    """
    if weight_bytes(model) >= PROTO_LIMIT:
        raise ModelError("the model is larger than 2 GB and cannot be one protobuf message; write it to a path")
    data: bytes = to_proto(model).SerializeToString(deterministic=True)
    return data


def fingerprint(model: ir.Model) -> str:
    """sha256 over structure and weights; equal fingerprints mean byte-equal models."""
    digest = hashlib.sha256()
    light = clone(model)
    for graph in light.graphs():
        for name in list(graph.initializers):
            value = graph.initializers[name]
            tensor = value.const_value
            if tensor is None or tensor.nbytes < 1024:
                continue
            digest.update(f"{name}:{tensor.dtype}:{tensor.shape}".encode())
            digest.update(tensor_buffer(tensor))
            value.const_value = None
    light.meta.pop(_RESIDUE, None)
    for graph in light.graphs():
        for name in [n for n, v in graph.initializers.items() if v.const_value is None]:
            del graph.initializers[name]
    import onnx_ir as ir

    digest.update(ir.to_proto(light).SerializeToString(deterministic=True))
    return digest.hexdigest()


def tensor_buffer(tensor: ir.TensorProtocol) -> bytes | memoryview:
    """The tensor's bytes as ONNX stores them (little endian, 4-bit types packed), without a copy where possible."""
    if tensor.dtype.bitwidth >= 8 and not tensor.dtype.is_string():
        array = tensor.numpy()
        if array.flags.c_contiguous and array.dtype.isbuiltin == 1 and sys.byteorder == "little":
            return array.reshape(-1).view(np.uint8).data if array.size else b""
    return tensor.tobytes()


def interface(model: ir.Model) -> tuple[tuple[ValueSpec, ...], tuple[ValueSpec, ...]]:
    """(inputs, outputs). Initializers that are listed as inputs are no inputs: nobody feeds them."""
    inputs = tuple(_spec(v) for v in model.graph.inputs if v.name not in model.graph.initializers)
    return inputs, tuple(_spec(v) for v in model.graph.outputs)


def _spec(value: ir.Value) -> ValueSpec:
    import onnx_ir as ir

    dtype: np.dtype[Any] | None = None
    if isinstance(value.type, ir.TensorType):
        code = value.type.dtype
        if code.is_string():
            dtype = np.dtype(object)
        elif code != ir.DataType.UNDEFINED:
            dtype = np.dtype(code.numpy())
    shape: tuple[int | str | None, ...] | None = None
    if value.shape is not None:
        shape = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
        # -1 and "?" are how some exporters write "any"; as a name, "?" would tie dims together that are free.
        shape = tuple(None if dim in ("", "?") or (isinstance(dim, int) and dim < 0) else dim for dim in shape)
    return ValueSpec(value.name or "", dtype, shape)


def graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and every subgraph, outermost first; function bodies' subgraphs included."""
    stack: list[onnx.GraphProto] = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    while stack or nodes:
        if stack:
            graph = stack.pop()
            yield graph
            nodes.extend(graph.node)
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    stack.append(attribute.g)
                stack.extend(attribute.graphs)
        nodes = []


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in graphs(proto):
        yield from graph.node
    for function in proto.functions:
        yield from function.node


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor anywhere in the file, those inside sparse tensors and attributes too."""
    for graph in graphs(proto):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in _nodes(proto):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sparse in ([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []) + list(
                attribute.sparse_tensors
            ):
                yield from (sparse.values, sparse.indices)


@dataclass
class _Residue:
    """What onnx-ir cannot hold: types by value name, and training information. Sparse tensors stay in the graph as
    opaque nodes and attributes, so that passes see their names and leave them alone."""

    types: dict[str, bytes]
    training: list[bytes]

    @classmethod
    def take(cls, proto: onnx.ModelProto) -> _Residue:
        import onnx

        types: dict[str, bytes] = {}
        for graph in graphs(proto):
            for info in (*graph.input, *graph.output, *graph.value_info):
                if _has_map(info.type):
                    types[info.name] = info.type.SerializeToString()
                    info.ClearField("type")
            for sparse in graph.sparse_initializer:
                node = onnx.NodeProto(op_type="SparseInitializer", domain=_RESIDUE, output=[sparse.values.name])
                node.attribute.append(_string(sparse, "sparse"))
                graph.node.insert(0, node)
            del graph.sparse_initializer[:]
        for node in _nodes(proto):
            for attribute in list(node.attribute):
                if attribute.HasField("sparse_tensor"):
                    node.attribute.remove(attribute)
                    node.attribute.append(_string(attribute, _SPARSE_ATTRIBUTE + attribute.name))
        training = [info.SerializeToString() for info in proto.training_info]
        del proto.training_info[:]
        return cls(types, training)

    def put_back(self, proto: onnx.ModelProto) -> None:
        import onnx

        for graph in graphs(proto):
            for info in (*graph.input, *graph.output, *graph.value_info):
                if info.name in self.types:
                    info.type.ParseFromString(self.types[info.name])
            for node in [n for n in graph.node if n.domain == _RESIDUE]:
                graph.sparse_initializer.append(
                    onnx.SparseTensorProto.FromString(base64.b64decode(node.attribute[0].s))
                )
                graph.node.remove(node)
        for node in _nodes(proto):
            for attribute in list(node.attribute):
                if attribute.name.startswith(_SPARSE_ATTRIBUTE):
                    node.attribute.append(onnx.AttributeProto.FromString(base64.b64decode(attribute.s)))
                    node.attribute.remove(attribute)
        for blob in self.training:
            proto.training_info.append(onnx.TrainingInfoProto.FromString(blob))


def _string(message: Any, name: str) -> onnx.AttributeProto:
    import onnx

    data = base64.b64encode(message.SerializeToString())
    return onnx.AttributeProto(name=name, type=onnx.AttributeProto.STRING, s=data)


def _has_map(type_proto: onnx.TypeProto) -> bool:
    kind = type_proto.WhichOneof("value")
    if kind == "map_type":
        return True
    if kind in ("sequence_type", "optional_type"):
        return _has_map(getattr(type_proto, kind).elem_type)
    return False


def replace(model: ir.Model, other: ir.Model) -> None:
    """Make ``model`` (a working copy somebody holds) be ``other``, which must not be used afterwards."""
    for name in ("graph", "ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(model, name, getattr(other, name))
    for mine, theirs in ((model.functions, other.functions), (model.metadata_props, other.metadata_props)):
        kept = dict(theirs)
        mine.clear()
        mine.update(kept)  # type: ignore[arg-type]
    external = is_external(model)
    model.meta.update(other.meta)
    model.meta["graphopt.external"] = external
