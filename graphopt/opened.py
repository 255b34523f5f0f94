"""Opening a file that a stranger may have put there: what counts is what was opened, not what its name says."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import IO

from graphopt.errors import InputError, ModelError
from graphopt.external import shown
from graphopt.remote import local

PROTO_LIMIT = 2**31 - 1
"""Bytes: protobuf cannot serialize a larger message, so larger models keep their weights in a data file."""

_PART = 1 << 20

_PIPES = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")
"""Where a shell puts the other end of ``<(command)``: pipes that somebody writes to."""


def open_regular(path: Path, where: str) -> IO[bytes]:
    """``path`` for reading, if it is a plain file, or a pipe that the shell has made.

    Opening never waits: a named pipe nobody writes to, or a device that never ends, would hold up whoever reads it.

    Raises:
        InputError: it is something else.
        OSError, ValueError: it cannot be opened.
    """
    ours = str(path).startswith(_PIPES)
    # A pipe of the shell's may be empty yet, and has to be waited for.
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | (0 if ours else getattr(os, "O_NONBLOCK", 0))
    descriptor = os.open(path, flags)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(path)
        if not (stat.S_ISREG(mode) or (ours and stat.S_ISFIFO(mode))):
            raise InputError(f"{where} is no regular file (a pipe or a device); copy it to a file, or pipe it to '-'")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _read_bounded(stream: IO[bytes], limit: int) -> bytes | None:
    """All that is in ``stream``; None where it is more than ``limit`` bytes, which are then not read to the end."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # a stream of somebody's own
        status = None
    if status is not None and stat.S_ISREG(status.st_mode):
        if status.st_size > limit:
            return None
        data = stream.read()
        return data if len(data) <= limit else None
    parts: list[bytes] = []
    total = 0
    while part := stream.read(_PART):
        total += len(part)
        if total > limit:
            return None
        parts.append(part)
    return b"".join(parts)


def read_stdin() -> bytes:
    """All of standard input.

    Raises:
        ModelError: it is larger than a model can be.
    """
    return _bounded(sys.stdin.buffer, "standard input")


def _bounded(stream: IO[bytes], where: str) -> bytes:
    data = _read_bounded(stream, PROTO_LIMIT)
    if data is None:
        raise ModelError(f"{where} is larger than 2 GB, more than one ONNX file can hold; export it with external data")
    return data


def read_file(path: str | os.PathLike[str]) -> bytes:
    """A model's file, or what an address names.

    Raises:
        InputError: it cannot be read.
        ModelError: it is larger than a model can be.
    """
    where = shown(str(path))
    here = local(path)
    try:
        with open_regular(here, where) as stream:
            return _bounded(stream, where)
    except FileNotFoundError:
        raise InputError(f"no such file: {where}; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{where} is a folder; give the .onnx file in it") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {where}: {reason}; check the path and its permissions") from error
