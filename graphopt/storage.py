"""Writing a model: the old file or the complete new one, never anything between.

Weights that do not fit go first, into a new file named by their hash; one rename of the ``.onnx`` then commits, and the
data file it replaced is removed if it was ours. A source's own data file is never touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from graphopt.errors import InputError, command
from graphopt.external import shown
from graphopt.model import PROTO_LIMIT, clone, graphs, is_external, tensor_buffer, to_bytes, weight_bytes
from graphopt.pages import let_go
from graphopt.remote import is_remote, place, send
from graphopt.traversal import ir_graphs

if TYPE_CHECKING:
    import onnx_ir as ir

INLINE_LIMIT = PROTO_LIMIT - 64 * 2**20
"""Weight bytes above which a data file is used unasked; the margin is for the graph itself."""

_PAGE = 4096
_SMALL = 1024


def save(model: ir.Model, path: str | Path, *, external: bool | None = None) -> list[Path]:
    """Write ``model`` to ``path`` (``"-"``: standard output) atomically; ``path`` may be the file it came from, or an
    address (:mod:`graphopt.remote`).

    ``external`` puts weights into ``<name>.<hash>.data`` beside it; None does so where the model came that way or is
    too large for one file. Returns the files written.

    Raises:
        InputError: the folder is missing, not writable, or the disk is full; nothing was changed then.
        ModelError: it is too large for one file, and ``external`` is False or the output no file.
    """
    if str(path) == "-":
        return _stream(model, None)
    if is_remote(path):
        written = save(model, room_for(path), external=external)
        send(path, written)
        return written
    where = shown(str(path))
    try:
        target = Path(os.path.realpath(place(path)))  # a symlinked output stays a link, its target is replaced
        if target.is_dir():
            raise InputError(f"{where} is a folder; name the output file, e.g. {shown(str(Path(path) / 'model.onnx'))}")
        if target.exists() and not target.is_file():  # /dev/null and the like: a rename would replace the device
            return _stream(model, target)
        if not target.parent.is_dir():
            make = command("mkdir", "-p", shown(str(target.parent)))
            raise InputError(f"the folder of {where} does not exist; make it first: {make}")
        before = _data_files(target)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {where}: {reason}; nothing was changed, choose another path") from error
    if external is None:
        external = is_external(model) or weight_bytes(model) > INLINE_LIMIT
    return _commit(model, target, where, before, external=external)


def _commit(model: ir.Model, target: Path, where: str, before: set[Path], *, external: bool) -> list[Path]:
    data: Path | None = None
    existed = True
    try:
        if external:
            model, data, existed = _write_data(model, target)
        content = to_bytes(model)
        with replacing(target) as stream:
            stream.write(content)
    except BaseException as error:
        if data is not None and not existed:
            data.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise InputError(
                f"cannot write {where}: {reason}; nothing was changed, make room or choose another path"
            ) from error
        raise
    for old in before - {data}:
        with contextlib.suppress(OSError):  # mapped on Windows: it stays, and the new model is whole all the same
            old.unlink()
    return [target] if data is None else [target, data]


def _stream(model: ir.Model, device: Path | None) -> list[Path]:
    """To standard output, or to something that is no file and so cannot be replaced atomically."""
    content = to_bytes(model)
    try:
        if device is None:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        else:
            with device.open("wb") as stream:
                stream.write(content)
    except OSError as error:
        where = "standard output" if device is None else shown(str(device))
        raise InputError(f"cannot write to {where}: {error.strerror or error}; write to a file") from error
    return []


def write_text(path: str | Path, text: str) -> None:
    """Write a text file as :func:`write_bytes` does."""
    write_bytes(path, text.encode("utf-8", "replace"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file atomically: what was at ``path`` stays until the new one is complete.

    Raises:
        InputError: it cannot be written there.
    """
    target = Path(os.path.realpath(room_for(path)))
    try:
        with replacing(target) as stream:
            stream.write(data)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; name another file") from error
    send(path, [target])


def room_for(path: str | Path) -> Path:
    """Where ``path`` is written on this machine, before it is sent."""
    target = place(path)
    if is_remote(path):
        target.parent.mkdir(parents=True, exist_ok=True)
    return target


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """A temporary file beside ``target`` that takes its place once it is complete and on disk."""
    with _temporary(target.parent) as (temporary, stream):
        yield stream
        stream.flush()
        _keep_mode(target, stream.fileno())
        os.fsync(stream.fileno())
        stream.close()
        temporary.replace(target)
        _sync_folder(target.parent)


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """A new file in ``folder``, gone at the end unless it was renamed; its mode is what the umask makes of it."""
    temporary = folder / f".graphopt-{secrets.token_hex(8)}.tmp"  # short: a model's name may be as long as names can be
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(temporary, flags, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield temporary, stream
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _keep_mode(target: Path, descriptor: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # no file there yet; no fchmod on Windows
        os.fchmod(descriptor, target.stat().st_mode & 0o777)


def _sync_folder(folder: Path) -> None:
    """Make renames durable. They have happened already, so a refusal (network file systems, Windows) is no failure."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_data(model: ir.Model, target: Path) -> tuple[ir.Model, Path | None, bool]:
    """The weights of at least 1 kB into their own file.

    Returns a clone that points there, the file (None where no weight is that large), and whether that very file was
    there already.
    """
    import onnx_ir as ir

    light = clone(model)
    digest = hashlib.sha256()
    placed: list[tuple[ir.Value, int, int]] = []
    with _temporary(target.parent) as (temporary, stream):
        position = 0
        for graph in ir_graphs(light):
            for value in graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < _SMALL or tensor.dtype.is_string():
                    continue
                buffer = memoryview(tensor_buffer(tensor))
                # Large weights start on a page, so that runtimes can map them; small ones would be mostly padding.
                padding = b"\0" * (-position % (_PAGE if len(buffer) >= 16 * _PAGE else 64))
                for part in (padding, buffer):
                    digest.update(part)
                    stream.write(part)
                let_go(np.frombuffer(buffer, np.uint8))
                placed.append((value, position + len(padding), len(buffer)))
                position += len(padding) + len(buffer)
        if not placed:
            return model, None, True
        stream.flush()
        os.fsync(stream.fileno())
        stream.close()
        # The whole name, not the stem: m.onnx and m.opt must not remove each other's data.
        data = target.with_name(f"{target.name}.{digest.hexdigest()[:12]}.data")
        existed = data.exists()
        try:
            temporary.replace(data)
            _sync_folder(data.parent)
        except BaseException:  # interrupted: nobody would know of it
            if not existed:
                data.unlink(missing_ok=True)
            raise
    for value, offset, length in placed:
        tensor = value.const_value
        assert tensor is not None
        value.const_value = ir.ExternalTensor(
            data.name,
            offset,
            length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=value.name or "",
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
        )
    return light, data, existed


def _data_files(target: Path) -> set[Path]:
    """Data files that an earlier save of ours put beside ``target`` and that its present content uses."""
    import onnx

    ours = re.compile(re.escape(target.name) + r"\.[0-9a-f]{12}\.data")
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
        if entry.key == "location" and isinstance(entry.value, str)
    }
    return {target.with_name(name) for name in names if ours.fullmatch(name)}
