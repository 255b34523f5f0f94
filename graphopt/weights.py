"""The tensors stored in a protobuf: what each is and takes, which repeat another, and the protobuf without them.

No data file is opened unless every byte is asked for, and then through the gate in ``external.py``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from graphopt.external import ExternalFiles, shown
from graphopt.model import graphs

BITS: dict[int, int] = {
    **dict.fromkeys((TensorProto.BOOL, TensorProto.INT8, TensorProto.UINT8), 8),
    **dict.fromkeys((TensorProto.INT16, TensorProto.UINT16, TensorProto.FLOAT16, TensorProto.BFLOAT16), 16),
    **dict.fromkeys((TensorProto.INT32, TensorProto.UINT32, TensorProto.FLOAT), 32),
    **dict.fromkeys((TensorProto.INT64, TensorProto.UINT64, TensorProto.DOUBLE, TensorProto.COMPLEX64), 64),
    TensorProto.COMPLEX128: 128,
    # By number, since older onnx does not name them all: float8 (17 to 20), (u)int4, float4, e8m0, (u)int2, float6.
    **dict.fromkeys((17, 18, 19, 20, 24), 8),
    **dict.fromkeys((21, 22, 23), 4),
    **dict.fromkeys((25, 26), 2),
    **dict.fromkeys((27, 28), 6),
}
"""Element type -> bits of one value, as ONNX stores it."""

_NAMES: dict[int, str] = {number: name.lower() for name, number in TensorProto.DataType.items()}

_TYPED = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
_WHOLE = 4096
"""Bytes up to which a tensor is compared whole; of a larger one, three samples of a third of that are."""

_BODY = 1024
"""Bytes of data up to which :func:`strip` leaves a tensor alone: shape inference reads small ones."""

_CHUNK = 2**26


@dataclass(frozen=True)
class Weight:
    """One stored tensor. ``bytes`` is None where its type is unknown; ``graph`` counts the file's graphs, -1: none."""

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int | None
    where: str
    graph: int
    tensor: onnx.TensorProto | None = None

    @property
    def count(self) -> int:
        """How many values it holds (of a sparse tensor, those stored)."""
        return math.prod(self.shape)

    @property
    def external(self) -> bool:
        return self.tensor is not None and self.tensor.data_location == TensorProto.EXTERNAL


def kind_of(elem_type: int) -> str:
    """``float``, ``int4``, ...; ``type 99`` where this onnx has no name for it."""
    return _NAMES.get(elem_type) or f"type {elem_type}"


def text(value: str | bytes) -> str:
    """A name as text, also where the file holds no UTF-8."""
    return value if isinstance(value, str) else shown(value)


def collect(proto: onnx.ModelProto) -> list[Weight]:
    """Every tensor of every graph and function: initializers, sparse ones, Constants, what stands in attributes."""
    found: list[Weight] = []
    for index, graph in enumerate(graphs(proto)):
        found += [_weight(t, t.name, "initializer", index) for t in graph.initializer]
        for sparse in graph.sparse_initializer:
            found += _sparse(sparse, sparse.values.name, index)
        for node in graph.node:
            found += _of_node(node, index)
    for function in proto.functions:
        for node in function.node:
            found += _of_node(node, -1)
    return found


def _of_node(node: onnx.NodeProto, graph: int) -> Iterator[Weight]:
    constant = node.op_type == "Constant" and node.domain in ("", "ai.onnx")
    for attribute in node.attribute:
        owner = node.output[0] if node.output else node.name
        name = owner if constant else f"{text(owner)}.{text(attribute.name)}"
        where = "constant" if constant else "attribute"
        for tensor in ([attribute.t] if attribute.HasField("t") else []) + list(attribute.tensors):
            yield _weight(tensor, name, where, graph)
        for sparse in ([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []) + list(
            attribute.sparse_tensors
        ):
            yield from _sparse(sparse, name, graph)
        if node.domain == "ai.onnx.ml":  # trees and linear models keep all they learned in lists
            for values, kind, size in ((attribute.floats, "float", 4), (attribute.ints, "int64", 8)):
                if len(values) > 1:
                    yield Weight(text(name), kind, (len(values),), size * len(values), where, graph)


def _sparse(sparse: onnx.SparseTensorProto, name: str | bytes, graph: int) -> list[Weight]:
    return [
        _weight(sparse.values, name, "sparse", graph),
        _weight(sparse.indices, f"{text(name)} (indices)", "sparse", graph),
    ]


def _weight(tensor: onnx.TensorProto, name: str | bytes, where: str, graph: int) -> Weight:
    shape, size = tuple(tensor.dims), None
    if tensor.data_type == TensorProto.STRING:
        size = sum(map(len, tensor.string_data))
    elif tensor.data_type in BITS:
        size = (math.prod(shape) * BITS[tensor.data_type] + 7) // 8
    elif tensor.HasField("raw_data"):
        size = len(tensor.raw_data)
    return Weight(text(name), kind_of(tensor.data_type), shape, size, where, graph, tensor)


def strip(proto: onnx.ModelProto) -> None:
    """Throw the data of larger tensors away, in place; names, types and shapes stay."""
    for weight in collect(proto):
        tensor = weight.tensor
        if tensor is not None and (weight.bytes or 0) > _BODY and not weight.external:
            for name in ("raw_data", *_TYPED, "string_data"):
                tensor.ClearField(name)


@dataclass(frozen=True)
class Repeat:
    """Tensors with the same content. ``certainty``: ``same bytes of the file``, ``equal`` or ``probable``."""

    names: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    bytes: int
    certainty: str

    @property
    def wasted(self) -> int:
        """Bytes that the file would not need; tensors that share their bytes already waste none."""
        return 0 if self.certainty == "same bytes of the file" else self.bytes * (len(self.names) - 1)


def repeats(weights: Iterable[Weight], *, folder: Path | None = None, deep: bool = False) -> list[Repeat]:
    """Groups of equal tensors, what wastes most first.

    External ones by file, offset and length; inline ones by type, shape and bytes, of the larger ones a sample. With
    ``deep`` by a hash of every byte.

    Raises:
        ModelError: with ``deep``, external data that is missing or lies outside the model's ``folder``.
    """
    files = ExternalFiles(folder)
    groups: dict[tuple[Any, ...], list[Weight]] = {}
    for weight in weights:
        key = _key(weight, files if deep else None)
        if key is not None:
            groups.setdefault(key, []).append(weight)
    found = [_repeat(key[0], group, deep) for key, group in groups.items() if len(group) > 1]
    return sorted(found, key=lambda r: (-r.wasted, -r.bytes, r.names))


def _repeat(certainty: str, group: list[Weight], deep: bool) -> Repeat:
    first = group[0]
    if deep and len({p for w in group if (p := _place(w))}) == 1 and all(w.external for w in group):
        certainty = "same bytes of the file"
    return Repeat(tuple(w.name for w in group), first.kind, first.shape, first.bytes or 0, certainty)


def _place(weight: Weight) -> tuple[str, ...] | None:
    if not weight.external or weight.tensor is None:
        return None
    entries = {e.key: text(e.value) for e in weight.tensor.external_data}
    return (entries.get("location", ""), entries.get("offset", "0"), entries.get("length", str(weight.bytes)))


def _key(weight: Weight, files: ExternalFiles | None) -> tuple[Any, ...] | None:
    """(certainty, what equal tensors share); None where nothing can be said."""
    tensor = weight.tensor
    if tensor is None or not weight.bytes or tensor.data_type == TensorProto.STRING:
        return None
    kind = (weight.kind, weight.shape)
    if files is not None:
        return ("equal", *kind, _digest(weight, tensor, files))
    if weight.external:
        return ("same bytes of the file", *kind, _place(weight))
    if tensor.HasField("raw_data"):
        data: Any = tensor.raw_data
        step, certain = _WHOLE // 3, len(data) <= _WHOLE
        middle = len(data) // 2
        sample = data if certain else data[:step] + data[middle : middle + step] + data[-step:]
        return ("equal" if certain else "probable", *kind, len(data), sample)
    for name in _TYPED:
        values = getattr(tensor, name)
        if len(values):
            step, certain = _WHOLE // 24, len(values) * 8 <= _WHOLE
            middle = len(values) // 2
            chosen = list(values if certain else values[:step]) + (
                [] if certain else [*values[middle : middle + step], *values[-step:]]
            )
            return ("equal" if certain else "probable", *kind, len(values), repr(chosen))
    return None


def content(weights: Iterable[Weight], name: str, *, folder: Path | None = None, deep: bool = False) -> str | None:
    """The values of a stored tensor in a line; None where there is none of that name, or onnx cannot read it.

    Raises:
        ModelError: with ``deep``, as :func:`repeats`.
    """
    found = next((w.tensor for w in weights if w.name == name and w.tensor is not None), None)
    if found is None or 0 in found.dims:
        return None
    tensor = TensorProto()
    tensor.CopyFrom(found)
    if tensor.data_location == TensorProto.EXTERNAL:
        if not deep:
            return "in a data file; --deep reads it"
        files = ExternalFiles(folder)
        files.check(tensor)
        files.inline(tensor)
    try:
        array = onnx.numpy_helper.to_array(tensor)
        first = ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in array.reshape(-1)[:6].tolist())
        if (
            tensor.data_type not in (TensorProto.STRING, TensorProto.COMPLEX64, TensorProto.COMPLEX128)
            and array.size > 6
        ):
            return f"{first}, ... (from {float(array.min()):.4g} to {float(array.max()):.4g})"
        return first + (", ..." if array.size > 6 else "")
    except Exception:  # a type or a form this onnx cannot read
        return None


def _digest(weight: Weight, tensor: onnx.TensorProto, files: ExternalFiles) -> str:
    digest = hashlib.sha256()
    if weight.external:
        for chunk in _chunks(weight, tensor, files):
            digest.update(chunk)
    elif tensor.HasField("raw_data"):
        digest.update(tensor.raw_data)
    else:
        digest.update(onnx.numpy_helper.to_array(tensor).tobytes())
    return digest.hexdigest()


def _chunks(weight: Weight, tensor: onnx.TensorProto, files: ExternalFiles) -> Iterator[bytes]:
    """The bytes of an external tensor, never many of them at once."""
    whole = TensorProto()
    whole.CopyFrom(tensor)
    files.check(whole)  # against its own shape
    entries = {e.key: e.value for e in whole.external_data}
    start, length = int(entries["offset"]), int(entries["length"])
    for offset in range(start, start + length, _CHUNK):
        size = min(_CHUNK, start + length - offset)
        part = TensorProto(
            name=weight.name, data_type=TensorProto.UINT8, dims=[size], data_location=TensorProto.EXTERNAL
        )
        for key, value in (("location", entries["location"]), ("offset", str(offset)), ("length", str(size))):
            part.external_data.add(key=key, value=value)
        files.check(part)
        files.inline(part)
        yield part.raw_data
