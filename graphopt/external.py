"""The one gate through which external weights enter: contained paths, true lengths, mapped through our own descriptor.

Other libraries are given bytes or in-memory models, never paths, so nothing else opens what a model points at.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import ModelError
from graphopt.pages import let_go
from graphopt.traversal import ir_graphs, subgraphs

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

_INLINE_LIMIT = 2**30
"""Bytes of one sparse or training tensor that may be read into memory; those cannot stay mapped."""

_SHOWN = 200

_MAPPED = "graphopt.mapped"
"""Key in a tensor's ``meta`` (shared by clones, never written) under which its :class:`MappedFile` stands."""


@dataclass(frozen=True)
class MappedFile:
    """Where a mapped tensor's bytes lie: the real path and identity of the file that was opened, and the offset."""

    path: Path
    identity: tuple[int, ...]
    offset: int

    @property
    def unchanged(self) -> bool:
        """Whether the path still leads to the file that is mapped, so that somebody else may read it by its path."""
        try:
            return _identity(self.path.lstat()) == self.identity
        except OSError:
            return False


def mapped_file(tensor: ir.TensorProtocol) -> MappedFile | None:
    """The file behind a tensor that came in through the gate; None for any other."""
    found = getattr(tensor, "meta", {}).get(_MAPPED)
    return found if isinstance(found, MappedFile) else None


@dataclass
class ExternalFiles:
    """The data files of one model.

    ``folder`` is the model's own (None when it came as bytes: then only ``roots`` are open). A file is accepted when
    its real path lies in one of them, it is a regular file, and no hard link (below a root the user named, links are
    the user's business: package caches are made of them).
    """

    folder: Path | None
    roots: tuple[Path, ...] = ()
    _maps: dict[str, mmap.mmap | None] = field(default_factory=dict)
    _places: dict[str, tuple[Path, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def used(self) -> bool:
        return bool(self._maps)

    def check(self, tensor: onnx.TensorProto) -> None:
        """Refuse before anything is allocated; afterwards ``tensor`` names exactly location, offset and length.

        Raises:
            ModelError: path outside, missing file, or a length that differs from dims times dtype.
        """
        import onnx

        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return
        name = shown(tensor.name) or "(unnamed)"
        entries: dict[str, str] = {}
        for entry in tensor.external_data:
            if entry.key in entries:
                raise ModelError(
                    f"external data of '{name}' names '{shown(entry.key)}' twice; which one is meant? "
                    "Export the model again"
                )
            entries[entry.key] = entry.value
        if "location" not in entries:
            raise ModelError(f"external data of '{name}' has no location; export the model again")
        location = entries["location"]
        needed = tensor_bytes(tensor, name)
        offset = _integer(entries.get("offset", "0"), "offset", name)
        length = _integer(entries["length"], "length", name) if "length" in entries else needed
        if length != needed:
            raise ModelError(
                f"external data of '{name}' is {length} bytes long but its shape {shown(str(list(tensor.dims)))} needs "
                f"{needed}; the file does not belong to this model, export it again"
            )
        size = self._file_size(location, name)
        if offset + length > size:
            raise ModelError(
                f"external data of '{name}' ends at byte {offset + length} of '{shown(location)}', which has "
                f"only {size}; the data file is truncated or another one, copy it again"
            )
        # Other keys are hints of other tools (checksums, prepacked copies) that are not true of what we write.
        del tensor.external_data[:]
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)

    def map(self, tensor: ir.ExternalTensor) -> ir.TensorProtocol:
        """The tensor as a read-only view of its mapped file; no weight is read until somebody looks at it."""
        import onnx_ir as ir

        mapped = self._maps[os.fspath(tensor.location)]
        shape = tuple(int(d) for d in tensor.shape.numpy())
        dtype, offset = tensor.dtype, tensor.offset or 0
        result: ir.Tensor[Any] | ir.PackedTensor[Any]
        if mapped is None or 0 in shape:
            result = ir.Tensor(np.empty(shape, np.dtype(dtype.numpy())), dtype=dtype, name=tensor.name)
        elif dtype.bitwidth < 8:
            data = np.frombuffer(mapped, np.uint8, count=tensor.nbytes, offset=offset)
            result = ir.PackedTensor(data, dtype, shape=ir.Shape(shape), name=tensor.name)
        else:
            count = int(np.prod(shape, dtype=np.int64))
            array = np.frombuffer(mapped, np.dtype(dtype.numpy()).newbyteorder("<"), count=count, offset=offset)
            result = ir.Tensor(array.reshape(shape), dtype=dtype, name=tensor.name)
        result.doc_string = tensor.doc_string
        result.metadata_props.update(tensor.metadata_props)
        result.meta[_MAPPED] = MappedFile(*self._places[os.fspath(tensor.location)], offset)
        return result

    def map_all(self, model: ir.Model) -> None:
        """Replace onnx-ir's path-based tensors everywhere in ``model``, all of them checked before."""
        _replace_external(model, self.map)

    def inline(self, tensor: onnx.TensorProto) -> None:
        """Put the checked bytes into ``tensor`` itself, for what no reader keeps mapped (sparse tensors).

        Raises:
            ModelError: it is too large for that.
        """
        import onnx

        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return
        entries = {entry.key: entry.value for entry in tensor.external_data}
        offset, length = int(entries["offset"]), int(entries["length"])
        if length > _INLINE_LIMIT:
            raise ModelError(
                f"external data of '{shown(tensor.name)}' is {length} bytes, too many for a sparse or training tensor; "
                "store it dense"
            )
        mapped = self._maps[entries["location"]]
        tensor.raw_data = b"" if mapped is None else mapped[offset : offset + length]
        if mapped is not None and length:
            let_go(np.frombuffer(mapped, np.uint8, count=length, offset=offset))
        tensor.ClearField("data_location")
        del tensor.external_data[:]

    def _file_size(self, location: str, name: str) -> int:
        if location not in self._maps:
            self._maps[location] = self._open(location, name)
        mapped = self._maps[location]
        return 0 if mapped is None else len(mapped)

    def _open(self, location: str, name: str) -> mmap.mmap | None:
        path, what = self._contained(location, name), f"external data '{shown(location)}' of '{name}'"
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            raise ModelError(
                f"{what} is missing (looked in {shown(str(path.parent))}); keep the data file beside the model"
            ) from None
        except OSError as error:
            raise ModelError(f"cannot open {what}: {error.strerror or error}; make it readable") from error
        try:
            # What counts is what was opened: a path can change between the check and the open.
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ModelError(f"{what} is no regular file; put the real data file beside the model")
            real = _path_of(descriptor, path)
            if not self._inside(real, self._bases()):
                raise ModelError(f"{what} moved out of the model's folder while it was opened; load the model again")
            # An archive may hold a hard link to the user's own keys: whose the file is says nothing.
            if status.st_nlink > 1 and not self._inside(real, self._named()):
                raise ModelError(
                    f"{what} is a hard link to a file that may lie anywhere; copy it, or name its folder with "
                    "--external-root DIR if you trust it"
                )
            self._places[location] = real, _identity(status)
            return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) if status.st_size else None
        except OSError as error:
            raise ModelError(f"cannot map {what}: {error.strerror or error}; copy it to a local disk") from error
        finally:
            os.close(descriptor)

    def _named(self) -> list[Path]:
        return [Path(os.path.realpath(root)) for root in self.roots]

    def _bases(self) -> list[Path]:
        return ([Path(os.path.realpath(self.folder))] if self.folder else []) + self._named()

    @staticmethod
    def _inside(path: Path, bases: list[Path]) -> bool:
        return any(base in path.parents for base in bases)

    def _contained(self, location: str, name: str) -> Path:
        if not isinstance(location, str) or not location or "\0" in location:
            raise ModelError(f"external data of '{name}' has no usable location; export the model again")
        bases = self._bases()
        if not bases:
            raise ModelError(
                f"external data '{shown(location)}' of '{name}' has no folder to be looked for in; load the model "
                "from its path, or name the folder with --external-root DIR"
            )
        found: list[Path] = []
        for base in bases:
            path = Path(os.path.realpath(base / location))
            if self._inside(path, bases):
                found.append(path)
        # The model's own folder first; a root only where the file is not there.
        for path in found:
            if os.path.lexists(path):
                return path
        if found:
            return found[0]
        raise ModelError(
            f"external data '{shown(location)}' of '{name}' lies outside the model's folder; if you trust it, name its "
            "folder with --external-root DIR"
        )


def shown(text: str | bytes) -> str:
    """A stranger's text as part of a one-line message: escaped where it is not printable, and cut."""
    text = text if isinstance(text, str) else repr(text)[2:-1]
    cut = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _path_of(descriptor: int, path: Path) -> Path:
    """Where the opened file lies; the kernel's own answer where there is one."""
    try:
        return Path(f"/proc/self/fd/{descriptor}").readlink()
    except OSError:  # no /proc: the second best is to resolve the path once more
        return Path(os.path.realpath(path))


def _integer(text: str, what: str, name: str) -> int:
    if not (isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 20):
        raise ModelError(
            f"external data of '{name}' has {what} '{shown(text)}', not a byte count; export the model again"
        )
    return int(text)


def tensor_bytes(tensor: onnx.TensorProto, name: str) -> int:
    """Bytes that dims and type say.

    Raises:
        ModelError: a negative dim, or a type of no fixed size.
    """
    import onnx_ir as ir

    count = 1
    for dim in tensor.dims:
        if dim < 0:
            raise ModelError(f"tensor '{name}' has a negative dim {dim}; export the model again")
        count *= dim
    try:
        dtype = ir.DataType(tensor.data_type)
        if dtype.is_string() or dtype == ir.DataType.UNDEFINED:
            raise ValueError
        return (count * dtype.bitwidth + 7) // 8
    except (ValueError, TypeError):
        raise ModelError(
            f"tensor '{name}' has a type that cannot be external ({tensor.data_type}); export the model again"
        ) from None


def _replace_external(model: ir.Model, mapped: Callable[[ir.ExternalTensor], ir.TensorProtocol]) -> None:
    """Replace every tensor of onnx-ir's that would open a path by itself."""
    import onnx_ir as ir

    def inner(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        return mapped(tensor) if isinstance(tensor, ir.ExternalTensor) else tensor

    def replace(attributes: MutableMapping[str, ir.Attr]) -> None:
        for name, attribute in attributes.items():
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                attributes[name] = ir.AttrTensor(name, inner(attribute.value), doc_string=attribute.doc_string)
            elif attribute.type == ir.AttributeType.TENSORS:
                tensors = [inner(t) for t in attribute.value]
                attributes[name] = ir.AttrTensors(name, tensors, doc_string=attribute.doc_string)

    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = mapped(value.const_value)
        for node in graph:
            replace(node.attributes)
    for function in model.functions.values():
        replace(function.attributes)  # default values


def adopt(model: ir.Model, roots: tuple[Path, ...]) -> bool:
    """Map what an ``onnx_ir.Model`` from elsewhere reads from paths, through the gate; True if there was any.

    Raises:
        ModelError: as :meth:`ExternalFiles.check`, each tensor's own base folder being the one allowed.
    """
    import onnx_ir as ir

    files: dict[str, ExternalFiles] = {}

    def mapped(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
        base = os.fspath(tensor.base_dir)
        gate = files.setdefault(base, ExternalFiles(Path.cwd() / base, roots))
        gate.check(ir.to_proto(tensor))
        return gate.map(tensor)

    _replace_external(model, mapped)
    return bool(files)


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Main graph, its bodies, and the same for each function (``Model.graphs`` leaves functions out)."""
    yield from ir_graphs(model)
    for function in model.functions.values():
        yield function.graph
        yield from subgraphs(function.graph)
