"""Models in and out: load from anything, clone, fingerprint.

Between passes a model is an ``onnx_ir.Model``. This file owns the way in and the way back; what onnx-ir cannot carry
travels as ``residue.py`` says. External weights come in through the one gate in ``external.py``; writing files is
``storage.py``'s job.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt import costing, residue
from graphopt.errors import GraphoptError, InputError, ModelError
from graphopt.expansion import check_readable
from graphopt.external import ExternalFiles, adopt, all_graphs, shown
from graphopt.inline import check_inline
from graphopt.opened import PROTO_LIMIT as PROTO_LIMIT
from graphopt.opened import read_file, read_stdin
from graphopt.pages import hashed
from graphopt.remote import beside, is_remote, place
from graphopt.residue import graphs as graphs
from graphopt.schemas import check_nodes
from graphopt.traversal import ir_graphs

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

ModelLike = Any
"""A path, ``bytes``, ``"-"`` (stdin), ``onnx.ModelProto``, ``onnx_ir.Model``, or what a registered loader takes."""

_LARGE = 1024
"""Bytes from which a fingerprint takes a tensor's hash instead of the tensor."""

_TRAINING = "graphopt.training"
_EXTERNAL = "graphopt.external"
_ANNOTATION = "quant_parameter_tensor_names"  # where onnx-ir keeps a value's quantization annotation

_LOADERS: dict[str, Callable[[Any], onnx.ModelProto]] = {}
_LOADER_MODULES = {"onnx_graphsurgeon": "graphopt.surgery", "torch": "graphopt.exporters"}
"""Imported by name when such an object comes: whoever holds one has paid for the import already."""


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

    roots = tuple(Path(root) for root in external_roots)
    if isinstance(source, ir.Model):
        return _adopt(source, roots)
    folder: Path | None = None
    if isinstance(source, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(source)  # what follows rewrites sparse tensors in place
        where = "the ModelProto given"
        _require_graph(proto, where)
        check_readable(proto, where)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        proto, where = _parse(bytes(source), "the bytes given"), "the bytes given"
    elif isinstance(source, str) and source == "-":
        proto, where = read_proto("-"), "standard input"
    elif isinstance(source, (str, os.PathLike)):
        where = shown(os.fspath(source))
        proto = read_proto(source)
        gather(source, proto)
        folder = Path.cwd() / place(source).parent  # where the name stands, links not followed
    else:
        proto, where = _loader(source)(source), f"the {type(source).__name__} given"
        check_readable(proto, where)
    return _from_proto(proto, where, ExternalFiles(folder, roots))


def _loader(source: Any) -> Callable[[Any], onnx.ModelProto]:
    for base in type(source).__mro__:
        module = base.__module__.split(".")[0]
        if module not in _LOADERS and module in _LOADER_MODULES:
            importlib.import_module(_LOADER_MODULES[module])
        if module in _LOADERS:
            return _LOADERS[module]
    raise InputError(
        f"cannot load a {type(source).__module__}.{type(source).__name__}; give a path, bytes, an "
        "onnx.ModelProto, an onnx_ir.Model or an onnx_graphsurgeon.Graph"
    )


def _adopt(source: ir.Model, roots: tuple[Path, ...]) -> ir.Model:
    """A clone of a caller's ``onnx_ir.Model``, its external weights mapped through our gate as well."""
    from graphopt.structure import model_problem

    problem = model_problem(source)
    if problem:
        raise ModelError(f"the onnx_ir.Model given is not valid: {problem}; build it again")
    model = clone(source)
    if adopt(model, roots):
        model.meta[_EXTERNAL] = True
    return model


def read_proto(source: str | os.PathLike[str]) -> onnx.ModelProto:
    """The protobuf of a file (``"-"``: stdin), external weights not looked at.

    Raises:
        InputError, ModelError: as :func:`load`.
    """
    stdin = str(source) == "-"
    return _parse(read_stdin() if stdin else read_file(source), "standard input" if stdin else shown(str(source)))


def gather(source: str | os.PathLike[str], proto: onnx.ModelProto) -> None:
    """The data files of a model that was read from an address, brought beside it; of others nothing is to do.

    Raises:
        InputError: one is not there.
    """
    if is_remote(source):
        tensors = (*residue.dense_tensors(proto), *residue.opaque_tensors(proto))
        entries = (entry for tensor in tensors for entry in tensor.external_data)
        beside(source, {str(entry.value) for entry in entries if entry.key == "location"})


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
    except DecodeError as error:
        if "alloc failed" in str(error):
            raise MemoryError(str(error)) from error
        raise ModelError(
            f"{where} is not an ONNX model (the protobuf does not parse: truncated, or another format); export it again"
        ) from None
    _require_graph(proto, where)
    check_readable(proto, where)
    return proto


def _require_graph(proto: onnx.ModelProto, where: str) -> None:
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output) or proto.ir_version < 1:
        raise ModelError(f"{where} is not an ONNX model (no graph in it); export it again")


def _from_proto(proto: onnx.ModelProto, where: str, external: ExternalFiles) -> ir.Model:
    """``proto`` is ours: it is rewritten on the way."""
    import onnx_ir as ir

    from graphopt.structure import check_proto

    try:
        check_proto(proto, where)
        check_nodes(proto, where)
        for tensor in (*residue.dense_tensors(proto), *residue.opaque_tensors(proto)):
            external.check(tensor)
            check_inline(tensor)
        for tensor in residue.opaque_tensors(proto):
            external.inline(tensor)
        training = residue.take(proto)
        model = ir.from_proto(proto)
        residue.function_inputs(proto, model)
        external.map_all(model)
    except GraphoptError:
        raise
    except Exception as error:  # onnx-ir raises whatever it met; the file is to blame, not the reader
        raise ModelError(f"{where} is not a valid ONNX model ({_innermost(error)}); export it again") from error
    costing.started(model)
    model.meta[_TRAINING] = training
    model.meta[_EXTERNAL] = external.used
    return model


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return shown(text.splitlines()[0]) if text else type(error).__name__


def clone(model: ir.Model) -> ir.Model:
    """A copy whose graph may be edited freely; weights are shared, so it costs no memory.

    Raises:
        ModelError: the graph is broken, so that there is nothing sensible to copy.
    """
    try:
        twin = model.clone()
    except Exception as error:
        raise ModelError(f"the model cannot be copied: {_innermost(error)}; is its graph complete?") from error
    for graph in all_graphs(twin):
        # onnx-ir shares these with the original, and `value.dtype = ...` writes into them
        for value in (*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)):
            if value.type is not None:
                value.type = _copied(value.type)
            if value.meta.get(_ANNOTATION) is not None:  # onnx-ir's None is an annotation that says nothing
                value.meta[_ANNOTATION] = dict(value.meta[_ANNOTATION])
    twin.meta.update(model.meta)
    return twin


def _copied(kind: ir.TypeProtocol) -> ir.TypeProtocol:
    import onnx_ir as ir

    if kind.__class__ is ir.TensorType:  # copy.deepcopy takes ten times as long, which counts for 100,000 values
        return ir.TensorType(kind.dtype, denotation=kind.denotation)
    return copy.deepcopy(kind)


def is_external(model: ir.Model) -> bool:
    """Whether the model came with its weights in a data file."""
    return bool(model.meta.get(_EXTERNAL))


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, as stored."""
    return sum(
        value.const_value.nbytes
        for graph in ir_graphs(model)
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as a ``ModelProto`` with its weights inside.

    Raises:
        ModelError: it holds something that has no form in ONNX (a text that is no UTF-8, an unknown type).
    """
    proto = _serialized(model)
    residue.put_back(proto, model.meta.get(_TRAINING, []))
    residue.tidy(proto)
    return proto


def _serialized(model: ir.Model) -> onnx.ModelProto:
    import onnx_ir as ir

    try:
        return ir.to_proto(model)
    except Exception as error:  # onnx-ir and protobuf raise whatever they met
        raise ModelError(f"the model cannot be written as ONNX ({_innermost(error)}); export it again") from error


def to_bytes(model: ir.Model) -> bytes:
    """Deterministic serialized form of a model below :data:`PROTO_LIMIT`.

    Raises:
        ModelError: the model is too large for one protobuf message.
    """
    import onnx_ir as ir
    from google.protobuf.message import EncodeError

    stored = [
        v.const_value for graph in ir_graphs(model) for v in graph.initializers.values() if v.const_value is not None
    ]
    if sum(tensor.nbytes for tensor in stored if not isinstance(tensor, ir.ExternalTensor)) < PROTO_LIMIT:
        try:
            data: bytes = to_proto(model).SerializeToString(deterministic=True)
            return data
        except (EncodeError, ValueError) as error:  # weights in attributes are not counted above
            reason = error
    else:
        reason = ValueError("its weights alone are larger")
    raise ModelError(f"the model does not fit into one 2 GB protobuf message ({_innermost(reason)}); use a data file")


def fingerprint(model: ir.Model) -> str:
    """sha256 over structure and weights; equal fingerprints mean equal models, and every edit changes it."""
    import onnx_ir as ir

    light = clone(model)
    for graph in ir_graphs(light):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _LARGE or tensor.dtype.is_string():
                continue
            digest = hashed(tensor_buffer(tensor), f"{tensor.dtype}:{tensor.shape}:".encode())
            stand_in = np.frombuffer(digest, np.uint8)
            value.const_value = ir.Tensor(
                stand_in, doc_string=tensor.doc_string, metadata_props=dict(tensor.metadata_props)
            )
    whole = hashlib.sha256(_serialized(light).SerializeToString(deterministic=True))
    for blob in model.meta.get(_TRAINING, []):
        whole.update(hashlib.sha256(blob).digest())
    return whole.hexdigest()


def tensor_buffer(tensor: ir.TensorProtocol) -> bytes | memoryview:
    """The tensor's bytes as ONNX stores them (little endian, 4-bit types packed), without a copy where possible."""
    if tensor.dtype.bitwidth >= 8 and not tensor.dtype.is_string():
        array = tensor.numpy()
        # Not `isbuiltin`: a mapped weight's dtype says "<" in so many words, which numpy takes for another type.
        if array.flags.c_contiguous and array.dtype.isnative and sys.byteorder == "little":
            return array.reshape(-1).view(np.uint8).data if array.size else b""
    packed = getattr(tensor, "raw", None)
    if isinstance(packed, np.ndarray) and packed.dtype == np.uint8 and packed.size == tensor.nbytes and packed.size:
        return packed.reshape(-1).data  # 4-bit types as they are stored
    data: bytes = tensor.tobytes()
    return data


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


def replace(model: ir.Model, other: ir.Model) -> None:
    """Make ``model`` (a working copy somebody holds) be ``other``, which must not be used afterwards.

    Raises:
        ModelError: ``other`` points at external data that our gate refuses.
    """
    adopt(other, ())
    for name in ("graph", "ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(model, name, getattr(other, name))
    model.device_configurations = other.device_configurations
    for mine, theirs in ((model.functions, other.functions), (model.metadata_props, other.metadata_props)):
        kept = dict(theirs)
        mine.clear()
        mine.update(kept)  # type: ignore[arg-type]
    external = is_external(model)
    model.meta.update(other.meta)
    model.meta[_EXTERNAL] = external  # where the weights go is decided by where they came from
