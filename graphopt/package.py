"""Models in transport: every file as it is, weights byte-shuffled and compressed with zstd, and back, bit by bit.

Floats of one weight have much the same exponents and unlike mantissas: the bytes of one kind together compress better
than as they come (Alted's blosc calls it shuffle). A package is one file: a magic line, a manifest, chunks, and the
hashes of what was packed. Nothing in it is trusted when it is unpacked: names must be plain, sizes must agree, and the
hashes must hold before a file takes its place.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx

from graphopt.errors import InputError, ModelError
from graphopt.external import shown
from graphopt.model import graphs, read_proto
from graphopt.opened import open_regular
from graphopt.storage import replacing

MAGIC = b"graphopt package 1\n"
_CHUNK = 1 << 22
_LEAST = 1024  # bytes of a weight from which its own bytes are shuffled
_RAW = 1 << 31  # bit of a chunk's length: it is stored as it is
_LEVEL = 9
_MANIFEST = 1 << 28  # bytes that a manifest may have

_DATA = re.compile(r"[^/\\\0]+\.[0-9a-f]{12}\.data")
"""What save() calls data files: nothing else is written beside a model."""

Told = Callable[[int, int], None]


def _zstd() -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        raise InputError('packages need zstandard; run: pip install "graphopt[package]"') from None


def check_zstandard() -> None:
    """Raise InputError where zstandard is not installed."""
    _zstd()


@dataclass
class Segment:
    """``length`` bytes of a file, elements of ``width`` bytes each."""

    length: int
    width: int


@dataclass
class _Sizes:
    """What was counted on the way: bytes before and after, and the bits that the bytes of each kind need."""

    before: int = 0
    after: int = 0
    shannon: float = 0.0
    hashes: dict[str, str] = field(default_factory=dict)


def pack(files: Sequence[Path], target: Path, told: Told = lambda done, total: None) -> dict[str, Any]:
    """Put a model's files (the ``.onnx`` first, then its data file) into one package at ``target``, atomically.

    Returns ``files``, ``bytes`` (of them), ``packed_bytes`` and ``shannon_bytes``: the entropy of the bytes, of each
    weight and each byte of its elements by itself; less is only possible where values follow from their neighbours.

    Raises:
        InputError: zstandard is not installed, or the package cannot be written.
    """
    zstd = _zstd()
    total = sum(file.stat().st_size for file in files)
    manifest: list[dict[str, Any]] = [
        {"name": file.name, "segments": [[s.length, s.width] for s in segments(file, files[0])]} for file in files
    ]
    sizes = _Sizes()
    try:
        with replacing(target) as stream:
            _write(stream, MAGIC, sizes)
            _write_json(stream, manifest, sizes)
            for file, entry in zip(files, manifest, strict=True):
                _pack_file(stream, file, entry["segments"], zstd.ZstdCompressor(level=_LEVEL), sizes, told, total)
            _write_json(stream, sizes.hashes, sizes)
    except OSError as error:
        raise InputError(f"cannot write {shown(str(target))}: {error.strerror or error}; make room") from error
    return {
        "files": [file.name for file in files],
        "bytes": total,
        "packed_bytes": sizes.after,
        "shannon_bytes": math.ceil(sizes.shannon / 8),
    }


def _write(stream: IO[bytes], data: bytes, sizes: _Sizes) -> None:
    stream.write(data)
    sizes.after += len(data)


def _write_json(stream: IO[bytes], value: Any, sizes: _Sizes) -> None:
    data = json.dumps(value, separators=(",", ":")).encode()
    _write(stream, struct.pack("<I", len(data)) + data, sizes)


def _pack_file(
    stream: IO[bytes], file: Path, parts: list[list[int]], compressor: Any, sizes: _Sizes, told: Told, total: int
) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as source:
        for length, width in parts:
            counts = np.zeros((width, 256), np.int64)
            for size in _chunks(length, width):
                data = source.read(size)
                digest.update(data)
                planes = np.frombuffer(data, np.uint8).reshape(-1, width).T
                for plane, count in zip(planes, counts, strict=True):
                    count += np.bincount(plane, minlength=256)
                shuffled = planes.tobytes()
                packed = compressor.compress(shuffled)
                head = struct.pack("<I", len(packed) if len(packed) < size else size | _RAW)
                _write(stream, head + (packed if len(packed) < size else shuffled), sizes)
                sizes.before += size
                told(sizes.before, total)
            share = counts / max(length // width, 1)
            bits = -(share * np.log2(np.where(share > 0, share, 1))).sum()
            sizes.shannon += float(bits) * (length // width)
    sizes.hashes[file.name] = digest.hexdigest()


def _chunks(length: int, width: int) -> Iterator[int]:
    step = _CHUNK // width * width
    for begin in range(0, length, step):
        yield min(step, length - begin)


def segments(file: Path, model: Path) -> list[Segment]:
    """A file as runs of elements of one width: its weights, and what lies between them (width 1)."""
    proto = read_proto(model)
    found: list[tuple[int, int, int]] = []  # (begin, length, width)
    tensors = [t for graph in graphs(proto) for t in graph.initializer]
    if file == model:
        data, position = file.read_bytes(), 0
        for tensor in tensors:
            raw = tensor.raw_data
            begin = data.find(raw, position) if len(raw) >= _LEAST else -1
            if begin >= 0:  # else it compresses a little less well
                position = begin + len(raw)
                found.append((begin, len(raw), _width(tensor)))
    else:
        for tensor in tensors:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if entries.get("location") == file.name:
                found.append((int(entries.get("offset", 0)), int(entries["length"]), _width(tensor)))
    return _covering(sorted(found), file.stat().st_size)


def _covering(found: list[tuple[int, int, int]], size: int) -> list[Segment]:
    parts: list[Segment] = []
    position = 0
    for begin, length, width in found:
        if begin < position or begin + length > size:  # two weights share bytes
            continue
        if begin > position:
            parts.append(Segment(begin - position, 1))
        parts.append(Segment(length, width if length % width == 0 else 1))
        position = begin + length
    return [*parts, Segment(size - position, 1)] if position < size else parts


def _width(tensor: onnx.TensorProto) -> int:
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return max(int(kind.itemsize), 1)


def unpack(package: Path, target: Path, told: Told = lambda done, total: None) -> dict[str, Any]:
    """Write the model of ``package`` to ``target`` and its data file beside it, as they were, bit by bit.

    Returns ``files`` (paths written), ``bytes`` and ``packed_bytes``.

    Raises:
        InputError: zstandard is not installed, or it cannot be written.
        ModelError: it is no package of ours, or not whole.
    """
    zstd = _zstd()
    where = shown(str(package))
    try:
        with open_regular(package, where) as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                raise ModelError(f"{where} is no graphopt package; make one with graphopt compress --package")
            manifest = _checked(_read_json(stream, where), where)
            places = [target, *(target.with_name(entry["name"]) for entry in manifest[1:])]
            total = sum(length for entry in manifest for length, _ in entry["segments"])
            _unpack_files(stream, manifest, places, zstd.ZstdDecompressor(), where, told, total)
    except FileNotFoundError:
        raise InputError(f"no such file: {where}; check the path") from None
    except OSError as error:
        raise InputError(f"cannot unpack {where}: {error.strerror or error}; nothing was changed") from error
    return {"files": [str(p) for p in places], "bytes": total, "packed_bytes": package.stat().st_size}


def _checked(manifest: Any, where: str) -> list[dict[str, Any]]:
    """The manifest, its names such as save() gives and its numbers numbers."""
    try:
        names = [entry["name"] for entry in manifest]
        plain = isinstance(names[0], str) and all(_DATA.fullmatch(name) for name in names[1:])
        whole = all(
            isinstance(length, int) and isinstance(width, int) and 0 <= length < 2**50 and 1 <= width <= 16
            and length % width == 0
            for entry in manifest
            for length, width in entry["segments"]
        )  # fmt: skip
        if plain and whole and len(names) <= 2:
            return list(manifest)
    except (TypeError, KeyError, ValueError, IndexError):
        pass
    raise ModelError(f"{where} has a manifest that cannot be right; copy the package again")


def _read(stream: IO[bytes], size: int, where: str) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise ModelError(f"{where} is cut off; copy the package again")
    return data


def _read_json(stream: IO[bytes], where: str) -> Any:
    (size,) = struct.unpack("<I", _read(stream, 4, where))
    if size > _MANIFEST:
        raise ModelError(f"{where} has a manifest that cannot be right; copy the package again")
    try:
        return json.loads(_read(stream, size, where))
    except ValueError:
        raise ModelError(f"{where} has a manifest that cannot be read; copy the package again") from None


def _unpack_files(
    stream: IO[bytes],
    manifest: list[dict[str, Any]],
    places: list[Path],
    decompressor: Any,
    where: str,
    told: Told,
    total: int,
) -> None:
    """Data files take their place before the model that reads them; none does unless all are right."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        outs = [stack.enter_context(replacing(place)) for place in places]  # left in reverse: the model is the last
        digests = {}
        done = 0
        for entry, out in zip(manifest, outs, strict=True):
            digest = hashlib.sha256()
            for length, width in entry["segments"]:
                for size in _chunks(length, width):
                    data = _chunk(stream, size, width, decompressor, where)
                    digest.update(data)
                    out.write(data)
                    done += size
                    told(done, total)
            digests[entry["name"]] = digest.hexdigest()
        if _read_json(stream, where) != digests:
            raise ModelError(f"{where} does not hold what was packed (its hashes differ); copy the package again")


def _chunk(stream: IO[bytes], size: int, width: int, decompressor: Any, where: str) -> bytes:
    (head,) = struct.unpack("<I", _read(stream, 4, where))
    stored = head & ~_RAW
    if stored > size:
        raise ModelError(f"{where} is damaged; copy the package again")
    data = _read(stream, stored, where)
    if not head & _RAW:
        try:
            data = decompressor.decompress(data, max_output_size=size)
        except Exception as error:  # zstandard has an error of its own
            raise ModelError(f"{where} is damaged ({error}); copy the package again") from error
    if len(data) != size:
        raise ModelError(f"{where} is damaged; copy the package again")
    return np.frombuffer(data, np.uint8).reshape(width, -1).T.tobytes()
