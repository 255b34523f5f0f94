"""Writing a model: the old file or the complete new one, never anything between.

Weights that do not fit go first, into a new file named by their hash; one rename of the ``.onnx`` then commits, and the
data file it replaced is removed if it was ours. A source's own data file is never touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from graphopt.errors import InputError
from graphopt.model import PROTO_LIMIT, clone, graphs, is_external, tensor_buffer, to_bytes, to_proto, weight_bytes

if TYPE_CHECKING:
    import onnx_ir as ir

INLINE_LIMIT = PROTO_LIMIT - 64 * 2**20
"""Weight bytes above which a data file is used unasked; the margin is for the graph itself."""

_ALIGNMENT = 4096
_SMALL = 1024


def save(model: ir.Model, path: str | Path, *, external: bool | None = None) -> list[Path]:
    """Write ``model`` to ``path`` (``"-"``: standard output) atomically; ``path`` may be the file it came from.

    ``external`` puts weights into ``<stem>.<hash>.data`` beside it; None does so where the model came that way or is
    too large for one file. Returns the files written.

    Raises:
        InputError: the folder is missing, not writable, or the disk is full; nothing was changed then.
    """
    if str(path) == "-":
        sys.stdout.buffer.write(to_bytes(model))
        sys.stdout.buffer.flush()
        return []
    target = Path(os.path.realpath(path))  # a symlinked output stays a link, its target is replaced
    if target.is_dir():
        raise InputError(f"{path} is a folder; name the output file, e.g. {Path(path) / 'model.onnx'}")
    if not target.parent.is_dir():
        raise InputError(f"the folder of {path} does not exist; make it first: mkdir -p {target.parent}")
    if external is None:
        external = is_external(model) or weight_bytes(model) > INLINE_LIMIT
    before = _data_files(target)
    written: list[Path] = []
    try:
        if external:
            model, data = _write_data(model, target)
            written.append(data)
        with _replacing(target) as stream:
            stream.write(to_proto(model).SerializeToString(deterministic=True))
    except OSError as error:
        for file in written:
            if file not in before:
                file.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
    for old in before:
        if old not in written:
            with contextlib.suppress(OSError):  # mapped on Windows: it stays, and the new model is whole all the same
                old.unlink()
    return [target, *written]


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[IO[bytes]]:
    """A temporary file beside ``target`` that takes its place once it is complete and on disk."""
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        _copy_mode(target, temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _copy_mode(target: Path, temporary: Path) -> None:
    if target.exists():
        mode = target.stat().st_mode & 0o7777
    else:
        umask = os.umask(0)
        os.umask(umask)
        mode = 0o666 & ~umask
    with contextlib.suppress(OSError):
        temporary.chmod(mode)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there; the rename is durable with the file
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems refuse; the rename itself has happened
    finally:
        os.close(descriptor)


def _write_data(model: ir.Model, target: Path) -> tuple[ir.Model, Path]:
    """The weights of at least 1 kB into their own file; returns a clone that points there."""
    import onnx_ir as ir

    light = clone(model)
    digest = hashlib.sha256()
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    temporary = Path(name)
    placed: list[tuple[ir.Value, int, int]] = []
    try:
        with os.fdopen(descriptor, "wb") as stream:
            for graph in light.graphs():
                for value in graph.initializers.values():
                    tensor = value.const_value
                    if tensor is None or tensor.nbytes < _SMALL or tensor.dtype.is_string():
                        continue
                    padding = b"\0" * (-stream.tell() % _ALIGNMENT)
                    stream.write(padding)
                    offset = stream.tell()
                    buffer = tensor_buffer(tensor)
                    for part in (padding, buffer):
                        digest.update(part)
                    stream.write(buffer)
                    placed.append((value, offset, tensor.nbytes))
            stream.flush()
            os.fsync(stream.fileno())
        data = target.with_name(f"{target.stem}.{digest.hexdigest()[:12]}.data")
        _copy_mode(data, temporary)
        temporary.replace(data)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    for value, offset, length in placed:
        tensor = value.const_value
        assert tensor is not None
        value.const_value = ir.ExternalTensor(
            data.name, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=value.name or ""
        )
    return light, data


def _data_files(target: Path) -> set[Path]:
    """Data files that an earlier save of ours put beside ``target`` and that its present content uses."""
    import onnx

    ours = re.compile(re.escape(target.stem) + r"\.[0-9a-f]{12}\.data")
    if not any(ours.fullmatch(file.name) for file in target.parent.iterdir()):
        return set()
    try:
        proto = onnx.ModelProto.FromString(target.read_bytes())
    except Exception:  # whatever stood there before is being replaced
        return set()
    names = {
        entry.value
        for graph in graphs(proto)
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return {target.with_name(name) for name in names if ours.fullmatch(name)}
