"""Looking into a file without believing it: the members of a zip archive, the fields of a protobuf message."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

from graphopt.errors import InputError
from graphopt.external import shown

MAX_MEMBERS = 100_000
MAX_RATIO = 300
"""Bytes out per byte in. Text and zeros compress a thousandfold, weights by less than two."""
HARMLESS = 256 * 2**20
"""Bytes: below this the ratio does not matter."""


def members(path: Path) -> list[str]:
    """The names in a zip archive that may be unpacked without harm.

    Raises:
        InputError: it is damaged, it is a bomb (far more out than in, or members that share their bytes), or a name
            leads out of it.
    """
    where = shown(str(path))
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError) as error:
        raise InputError(f"{where} is a damaged zip archive ({error}); copy or export it again") from error
    out = sum(info.file_size for info in infos)
    packed = sum(info.compress_size for info in infos)
    size = path.stat().st_size
    if len(infos) > MAX_MEMBERS or packed > size or (out > HARMLESS and out > MAX_RATIO * size):
        raise InputError(
            f"{where} would unpack {size} bytes into {out} ({len(infos)} members): that is a zip bomb, no model; "
            "nothing was unpacked"
        )
    for info in infos:
        parts = info.filename.replace("\\", "/").split("/")
        if info.filename.startswith(("/", "\\")) or ".." in parts:
            raise InputError(f"{where} has a member outside of itself ('{shown(info.filename)}'); it was not opened")
    return [info.filename for info in infos]


def fields(data: bytes, limit: int = 64) -> Iterator[tuple[int, int, int | bytes]]:
    """(number, wire type, value) of the first fields of a protobuf message; ends where it is none.

    A length-delimited field that ``data`` holds only the beginning of comes with that beginning, as the last.
    """
    at = 0
    for _ in range(limit):
        key, at = _varint(data, at)
        if key is None or key >> 3 == 0:
            return
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            if value is None:
                return
            yield number, wire, value
        elif wire == 2:
            length, at = _varint(data, at)
            if length is None:
                return
            yield number, wire, data[at : at + length]
            at += length
        elif wire in (1, 5):
            width = 8 if wire == 1 else 4
            yield number, wire, data[at : at + width]
            at += width
        else:
            return
        if at >= len(data):
            return


def _varint(data: bytes, at: int) -> tuple[int | None, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    return None, at
