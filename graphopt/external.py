"""The one gate through which external weights enter: contained paths, true lengths, mapped through our own descriptor.

Other libraries are given bytes or in-memory models, never paths, so nothing else opens what a model points at.
"""

from __future__ import annotations

import mmap
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphopt.errors import ModelError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


@dataclass
class ExternalFiles:
    """The data files of one model.

    ``folder`` is the model's own (None when it came as bytes: then only ``roots`` are open). A file is accepted when
    its real path lies in one of them, it is a regular file, and nobody else's hard link.
    """

    folder: Path | None
    roots: tuple[Path, ...] = ()
    _maps: dict[str, mmap.mmap | None] = field(default_factory=dict)

    @property
    def used(self) -> bool:
        return bool(self._maps)

    def check(self, tensor: onnx.TensorProto) -> None:
        """Refuse before anything is allocated.

        Raises:
            ModelError: path outside, missing file, or a length that differs from dims times dtype.
        """
        import onnx

        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return
        name = tensor.name or "(unnamed)"
        entries: dict[str, str] = {}
        for entry in tensor.external_data:
            if entry.key in entries:
                raise ModelError(f"external data of '{name}' names '{entry.key}' twice; export the model again")
            entries[entry.key] = entry.value
        if "location" not in entries:
            raise ModelError(f"external data of '{name}' has no location; export the model again")
        size = self._file_size(entries["location"], name)
        offset = _integer(entries.get("offset", "0"), "offset", name)
        needed = _tensor_bytes(tensor, name)
        length = _integer(entries.get("length", str(needed)), "length", name)
        if length != needed:
            raise ModelError(
                f"external data of '{name}' is {length} bytes long but its shape {list(tensor.dims)} needs "
                f"{needed}; the file does not belong to this model"
            )
        if offset + length > size:
            raise ModelError(
                f"external data of '{name}' ends at byte {offset + length} of '{entries['location']}', which has "
                f"only {size}; the data file is truncated or another one"
            )

    def map(self, tensor: ir.ExternalTensor) -> ir.TensorProtocol:
        """The tensor as a read-only view of its mapped file; no weight is read until somebody looks at it."""
        import onnx_ir as ir

        mapped = self._maps[os.fspath(tensor.location)]
        shape = tuple(int(d) for d in tensor.shape.numpy())
        numpy_dtype = np.dtype(tensor.dtype.numpy())
        if mapped is None or 0 in shape:
            return ir.Tensor(np.empty(shape, numpy_dtype), dtype=tensor.dtype, name=tensor.name)
        if tensor.dtype.bitwidth < 8:
            data = np.frombuffer(mapped, np.uint8, count=tensor.nbytes, offset=tensor.offset or 0)
            return ir.PackedTensor(data, tensor.dtype, shape=ir.Shape(shape), name=tensor.name)
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(mapped, numpy_dtype.newbyteorder("<"), count=count, offset=tensor.offset or 0)
        return ir.Tensor(array.reshape(shape), dtype=tensor.dtype, name=tensor.name, doc_string=tensor.doc_string)

    def _file_size(self, location: str, name: str) -> int:
        if location not in self._maps:
            self._maps[location] = self._open(location, name)
        mapped = self._maps[location]
        return 0 if mapped is None else len(mapped)

    def _open(self, location: str, name: str) -> mmap.mmap | None:
        path = self._contained(location, name)
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            raise ModelError(
                f"external data file '{location}' of '{name}' is missing (looked in {path.parent}); "
                "keep it beside the model"
            ) from None
        except OSError as error:
            raise ModelError(f"cannot open external data file '{location}': {error.strerror or error}") from error
        try:
            status = os.fstat(descriptor)  # of what was opened: a path can change between the check and the open
            if not stat.S_ISREG(status.st_mode):
                raise ModelError(f"external data '{location}' of '{name}' is no regular file; refused")
            foreign = hasattr(os, "getuid") and status.st_uid not in (os.getuid(), 0)
            if status.st_nlink > 1 and foreign:
                raise ModelError(
                    f"external data '{location}' of '{name}' is a hard link to another user's file; copy it first"
                )
            return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) if status.st_size else None
        finally:
            os.close(descriptor)

    def _contained(self, location: str, name: str) -> Path:
        if not location or "\0" in location:
            raise ModelError(f"external data of '{name}' has no usable location; export the model again")
        allowed = [p.resolve() for p in ((self.folder,) if self.folder else ()) + self.roots]
        if not allowed:
            raise ModelError(
                f"external data file '{location}' of '{name}' has no folder to be looked for in; load the model "
                "from its path, or name the folder with --external-root DIR"
            )
        for base in allowed:
            path = Path(os.path.realpath(base / location))
            if any(path == root or root in path.parents for root in allowed) and (path.exists() or base == allowed[-1]):
                return path
        raise ModelError(
            f"external data '{location}' of '{name}' lies outside the model's folder; if you trust it, name its "
            "folder with --external-root DIR"
        )


def _integer(text: str, what: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ModelError(f"external data of '{name}' has {what} {text!r}, not a byte count; export the model again")
    return int(text)


def _tensor_bytes(tensor: onnx.TensorProto, name: str) -> int:
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
        raise ModelError(f"tensor '{name}' has no type that can be external ({tensor.data_type})") from None
