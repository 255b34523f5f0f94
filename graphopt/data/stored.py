"""Arrays lying on disk in .npy and .npz files, read sample by sample and never trusted.

Plain reads rather than memory maps: touched pages of a map stay resident, a file cut short under a map kills
the process, and an open map stops Windows from deleting the file.
"""

from __future__ import annotations

import io
import lzma
import math
import os
import shutil
import stat
import struct
import tempfile
import tokenize
import warnings
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from graphopt.data.dataset import Array
from graphopt.errors import DataError

SPOOL_LIMIT = 4 * 2**30
_MAGIC = b"\x93NUMPY"
_MAX_HEADER = 10_000  # numpy's own bound: a longer one is made to exhaust the parser
_SLICE = 1 << 20
_FIX = "write the file again"
_BOMB = 2**30
_PACKED = 100
"""Members larger than that, packed more than so many times, are taken for a bomb: data that compresses like that has
nothing to say about ranges."""

# What numpy, zipfile and the codecs raise on a broken or hostile file.
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    RuntimeError,  # encrypted members; NotImplementedError (unknown compression) is one too
    MemoryError,
    OverflowError,
    SyntaxError,
    tokenize.TokenError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


def one_line(text: object) -> str:
    """Any text as one line of at most 300 characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= 300 else line[:297] + "..."


@contextmanager
def reading(where: str, fix: str = _FIX) -> Iterator[None]:
    """Turn whatever a broken file makes numpy or zipfile raise into one DataError line."""
    try:
        yield
    except UNREADABLE as error:
        reason = one_line(error) or type(error).__name__
        raise DataError(f"cannot read '{where}' ({reason}); {fix}") from error


class Scratch:
    """A temporary folder with a cap, made when first needed and removed with its last user.

    Removed by ``close``, when nothing refers to it any more, or at exit; whichever comes first.
    """

    def __init__(self, parent: Path | None = None, limit: int = SPOOL_LIMIT) -> None:
        self._parent = parent
        self._limit = limit
        self._used = 0
        self._folder: Path | None = None
        self._extracted: dict[tuple[Path, str], Path] = {}
        self._remove: weakref.finalize[Any, Any] | None = None

    def folder(self) -> Path:
        """The folder, created on first use. Raises DataError where it cannot be."""
        if self._folder is None:
            try:
                if self._parent is not None:
                    self._parent.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix="graphopt-spool-", dir=self._parent))
            except OSError as error:
                raise DataError(
                    f"cannot make a temporary folder for data ({one_line(error)}); give one with spool_dir"
                ) from error
            self._remove = weakref.finalize(self, _remove, self._folder, os.getpid())
        return self._folder

    def charge(self, size: int, what: str) -> None:
        """Count ``size`` bytes about to be written; raises DataError past the cap."""
        self._used += size
        if self._used > self._limit:
            raise DataError(
                f"'{what}' needs more than {self._limit / 2**20:,.0f} MiB of temporary space; "
                "use fewer samples (limit) or raise spool_limit"
            )

    def extract(self, archive: zipfile.ZipFile, path: Path, member: str) -> Path:
        """A compressed member as a plain file, decompressed once. Raises DataError past the cap."""
        done = self._extracted.get((path, member))
        if done is None:
            done = self.folder() / f"member-{len(self._extracted)}.npy"
            with archive.open(member) as source, done.open("wb") as target:
                while chunk := source.read(_SLICE):
                    self.charge(len(chunk), f"{path.name}: {member}")
                    target.write(chunk)
            self._extracted[path, member] = done
        return done

    def close(self) -> None:
        """Remove the folder now."""
        if self._remove is not None:
            self._remove()


def _remove(folder: Path, owner: int) -> None:
    """A forked child has a copy of the finalizer, but the folder is its parent's."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Stored:
    """One array in a .npy file or a .npz member, of which only the header has been read.

    ``skip`` is the header's length in bytes.
    """

    path: Path
    member: str | None
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    skip: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along the leading axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def label(self) -> str:
        """How a message names the array."""
        return self.path.name if self.member is None else f"{self.path.name}: {self.member}"


def read_header(stream: IO[bytes], available: int, path: Path, member: str | None) -> Stored:
    """Read a .npy header and hold it against the ``available`` bytes before anything is allocated.

    Raises DataError for objects and pickles, structured types and headers that lie about the size.
    """
    label = path.name if member is None else f"{path.name}: {member}"
    with reading(label, "save it again with numpy.save or numpy.savez"):
        start = stream.read(8)
        if len(start) < 8 or start[:6] != _MAGIC:
            raise ValueError("not a .npy array")
        if start[6] not in (1, 2):
            raise ValueError(f"format version {start[6]}, which holds structured types only")
        length = stream.read(2 if start[6] == 1 else 4)
        count = int.from_bytes(length, "little")
        if count > _MAX_HEADER:
            raise ValueError(f"a header of {count} bytes")
        text = io.BytesIO(length + stream.read(count))
        parse = np.lib.format.read_array_header_1_0 if start[6] == 1 else np.lib.format.read_array_header_2_0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # files written by Python 2 are fine
            shape, fortran, dtype = parse(text, max_header_size=_MAX_HEADER)
        if any(dim < 0 for dim in shape):
            raise ValueError(f"negative shape {shape}")
    if dtype.hasobject:
        raise DataError(
            f"'{label}' holds Python objects, which only an unsafe pickle could read; save numbers, "
            "and samples of different shapes as members '<input>/<index>'"
        )
    if dtype.fields is not None:
        raise DataError(f"'{label}' holds records, not numbers; save one array per input")
    skip = 8 + len(length) + count
    claimed = math.prod(shape) * dtype.itemsize
    if claimed > available - skip:
        raise DataError(
            f"'{label}' claims {claimed:,} bytes ({dtype.name}{list(shape)}) but holds "
            f"{max(available - skip, 0):,}; it is truncated or forged, save it again"
        )
    return Stored(path, member, dtype, tuple(int(dim) for dim in shape), bool(fortran), skip)


def plain_file(path: Path) -> Path:
    """``path``, if reading it comes to an end. Raises ValueError for a pipe or a device, OSError for nothing."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")
    return path


def open_npy(path: Path) -> Stored:
    """The header of a .npy file. Raises DataError."""
    with reading(path.name, _FIX), plain_file(path).open("rb") as stream:
        return read_header(stream, os.fstat(stream.fileno()).st_size, path, None)


def open_npz(path: Path) -> dict[str, Stored]:
    """Key -> header for every array of a .npz, in file order. Raises DataError."""
    found: dict[str, Stored] = {}
    with reading(path.name, "it may be truncated or no .npz at all, save it again"):
        size = plain_file(path).stat().st_size
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                if info.compress_type == zipfile.ZIP_STORED and info.file_size > size:
                    raise ValueError(f"member {info.filename} claims {info.file_size:,} bytes of {size:,}")
                if info.file_size > _BOMB and info.file_size > _PACKED * info.compress_size:
                    raise ValueError(
                        f"member {info.filename} would be {info.file_size:,} bytes out of {info.compress_size:,}; if "
                        "that is right, save it with numpy.savez, uncompressed"
                    )
                with archive.open(info) as stream:
                    header = read_header(stream, info.file_size, path, info.filename)
                found[info.filename.removesuffix(".npy")] = header
    return found


class Rows(AbstractContextManager["Rows"]):
    """One stored array opened for one pass: ``get`` reads a few rows along the leading axis.

    A .npz member is read through the zip's own stream while the order is ascending, so its checksum is
    verified; going back, or Fortran order, needs random access: in place where the member is stored,
    from a decompressed temporary copy where it is compressed.
    """

    def __init__(self, stored: Stored, archive: zipfile.ZipFile | None, scratch: Scratch) -> None:
        self._stored = stored
        self._archive = archive
        self._scratch = scratch
        self._stream: IO[bytes] | None = None
        self._plain = False
        self._base = 0
        self._at = 0

    def get(self, start: int, count: int) -> Array:
        """Rows ``start`` to ``start + count`` as a fresh C-contiguous array. Raises DataError."""
        stored = self._stored
        if stored.fortran and len(stored.shape) > 1:
            return self._mapped(start, count)
        want = count * stored.row_bytes
        with reading(stored.label, "the file is damaged, save it again"):
            raw = self._bytes(start * stored.row_bytes, want)
            if len(raw) != want:
                raise EOFError(f"it ends {want - len(raw):,} bytes early")
            # A bytearray, so that the array is writable like any other.
            return np.frombuffer(bytearray(raw), dtype=stored.dtype).reshape(count, *stored.shape[1:])

    def whole(self) -> Array:
        """The whole array, any rank. Raises DataError."""
        shape = self._stored.shape
        if not shape or 0 in shape:
            want = 0 if 0 in shape else self._stored.dtype.itemsize
            with reading(self._stored.label, "the file is damaged, save it again"):
                raw = bytearray(self._bytes(0, want))
                return np.frombuffer(raw, dtype=self._stored.dtype).reshape(shape)
        return self.get(0, shape[0])

    def __exit__(self, *exc: object) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _bytes(self, offset: int, want: int) -> bytes:
        """``want`` bytes at ``offset`` of the array's data."""
        if self._stream is None or (offset < self._at and not self._plain):
            self._open(forward=self._stream is None)
        assert self._stream is not None
        if self._plain or offset != self._at:
            self._stream.seek(self._base + self._stored.skip + offset)
        raw = self._stream.read(want)
        self._at = offset + len(raw)
        return raw

    def _open(self, *, forward: bool) -> None:
        self.__exit__()
        if forward and self._archive is not None and self._stored.member is not None:
            self._stream = self._archive.open(self._stored.member)
            self._stream.read(self._stored.skip)
            self._plain, self._base, self._at = False, 0, 0
        else:
            path, self._base = self._place()
            self._stream, self._plain = path.open("rb"), True

    def _place(self) -> tuple[Path, int]:
        """A plain file holding the .npy bytes, and where in it they begin."""
        stored = self._stored
        if self._archive is None or stored.member is None:
            return stored.path, 0
        info = self._archive.getinfo(stored.member)
        if info.compress_type != zipfile.ZIP_STORED:
            return self._scratch.extract(self._archive, stored.path, stored.member), 0
        with stored.path.open("rb") as raw:
            raw.seek(info.header_offset)
            # The local header repeats the name and may have another extra field than the directory.
            name, extra = struct.unpack("<26x2H", raw.read(30))
        return stored.path, info.header_offset + 30 + name + extra

    def _mapped(self, start: int, count: int) -> Array:
        """Rows of a Fortran-ordered array: strided, so only a map reads them without the whole array."""
        stored = self._stored
        if 0 in stored.shape:
            return np.empty((count, *stored.shape[1:]), stored.dtype)
        with reading(stored.label, "the file is damaged, save it again"):
            path, base = self._place()
            view = np.memmap(path, stored.dtype, mode="r", offset=base + stored.skip, shape=stored.shape, order="F")
            return np.array(view[start : start + count], order="C", subok=False)
