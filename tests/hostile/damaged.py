"""Files that are no ONNX model any more, or never were: the bytes themselves are wrong."""

from __future__ import annotations

import gzip
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import builders
import numpy as np
import onnx

from hostile.corpus import ANY, OK, REFUSED, Group

KINDS = Group("bytes", seen=False)
GOOD = builders.mlp(16).SerializeToString()


def varint(number: int) -> bytes:
    """As protobuf writes it; negative numbers as 64 bits."""
    number &= 2**64 - 1
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def field(number: int, content: bytes | int) -> bytes:
    """One field: a number, or bytes with their length."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def fixed(content: bytes) -> Any:
    return lambda _folder, _rng: content


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps({"w": 1}))
    return stream.getvalue()


GRAPH, OPSET = 7, 8
HEAD = field(1, 8) + field(OPSET, field(1, b"") + field(2, 17))

for name, content in {
    "empty": b"",
    "one-byte": b"\x08",
    "one-zero": b"\0",
    "zeros": bytes(4096),
    "ones": b"\xff" * 4096,
    "text": b"this is no model\n" * 50,
    "html": b"<!DOCTYPE html><html><body>404 not found</body></html>",
    "json": b'{"graph": {"node": []}}',
    "git-lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
    "zip": zipped(),
    "gzip": gzip.compress(GOOD, mtime=0),
    "pickle": pickle.dumps({"graph": [1, 2, 3]}),
    "tflite": b"\x1c\0\0\0TFL3" + bytes(100),
    "ort-format": b"\x1c\0\0\0ORTM" + bytes(100),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "gguf": b"GGUF\3\0\0\0" + bytes(100),
    "openvino": b'<?xml version="1.0"?><net name="m" version="11"></net>',
    "safetensors": (64).to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(72),
    "elf": b"\x7fELF\x02\x01\x01" + bytes(200),
    "utf16-bom": "graph".encode("utf-16") * 20,
    "graph-as-number": HEAD + field(GRAPH, 1),
    "graph-as-text": HEAD + field(GRAPH, b"this is no graph"),
    "length-past-the-end": HEAD + varint(GRAPH << 3 | 2) + varint(10**6) + b"abc",
    "length-2-63": HEAD + varint(GRAPH << 3 | 2) + varint(2**63 - 1) + b"abc",
    "length-negative": HEAD + varint(GRAPH << 3 | 2) + varint(-1) + b"abc",
    "varint-of-11-bytes": b"\x08" + b"\xff" * 11 + b"\x01" + GOOD,
    "field-zero": GOOD + b"\x00\x01",
    "field-huge": GOOD + varint(2**40 << 3) + b"\x01",
    "wire-type-7": GOOD + b"\x0f\x01\x02",
    "group-never-ends": GOOD + b"\x0b" * 3,
    "group-ends-first": GOOD + b"\x0c",
    "groups-nested-100000": GOOD + b"\x7b" * 100_000 + b"\x7c" * 100_000,
    "twice-in-a-row": GOOD + GOOD,
    "head-only": HEAD,
    "empty-graph": HEAD + field(GRAPH, b""),
    "tail-cut": GOOD[:-1],
}.items():
    # Messages one after the other are one, to protobuf: inspect shows what that is.
    KINDS.add(name, REFUSED, fixed(content), seen=ANY if name == "twice-in-a-row" else REFUSED)

for percent in (1, 5, 20, 50, 80, 95):
    KINDS.add(f"cut-at-{percent}-percent", REFUSED, fixed(GOOD[: len(GOOD) * percent // 100]))

KINDS.add("unknown-fields", OK, fixed(GOOD + field(1000, b"from the future") + field(1001, 7)))
KINDS.add("fields-in-another-order", OK, lambda _f, _r: _reordered())
KINDS.add("unknown-field-of-20-MB", OK, lambda _f, _r: GOOD + field(2000, bytes(20_000_000)))


def _reordered() -> bytes:
    model = onnx.ModelProto.FromString(GOOD)
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    return field(GRAPH, graph) + model.SerializeToString()


def _deep_graph(depth: int) -> bytes:
    """GraphProto in NodeProto in GraphProto ..., by hand: protobuf's own writer refuses this."""
    inner = field(1, field(4, b"Relu"))
    for _ in range(depth):
        inner = field(1, field(4, b"If") + field(5, field(1, b"then_branch") + field(6, inner) + field(20, 5)))
    return HEAD + field(GRAPH, inner + field(2, b"g") + field(12, field(1, b"y")))


for depth in (40, 2_000):
    KINDS.add(f"messages-nested-{depth}", REFUSED, lambda _f, _r, depth=depth: _deep_graph(depth))


def _flipped(_folder: Path, rng: np.random.Generator) -> bytes:
    data = bytearray(GOOD)
    for _ in range(int(rng.integers(1, 6))):
        data[int(rng.integers(len(data)))] = int(rng.integers(256))
    return bytes(data)


def _spliced(_folder: Path, rng: np.random.Generator) -> bytes:
    first, second = sorted(int(n) for n in rng.integers(0, len(GOOD), 2))
    return GOOD[:first] + GOOD[second:]


for number in range(4):
    KINDS.add(f"random-{number}", REFUSED, lambda _f, rng: rng.bytes(4096))
    KINDS.add(f"flipped-{number}", ANY, _flipped)
    KINDS.add(f"spliced-{number}", ANY, _spliced)


@KINDS.kind("folder", REFUSED, says="is a folder")
def _a_folder(folder: Path, _: object) -> None:
    (folder / "m.onnx").mkdir()


@KINDS.kind("missing", REFUSED, says="no such file")
def _missing(_folder: Path, _: object) -> None:
    pass


@KINDS.kind("dangling-link", REFUSED)
def _dangling(folder: Path, _: object) -> None:
    (folder / "m.onnx").symlink_to("nowhere.onnx")


@KINDS.kind("link-to-itself", REFUSED)
def _loop(folder: Path, _: object) -> None:
    (folder / "m.onnx").symlink_to("m.onnx")


@KINDS.kind("linked-model", OK)
def _linked(folder: Path, _: object) -> None:
    (folder / "real").mkdir()
    (folder / "real" / "model.onnx").write_bytes(GOOD)
    (folder / "m.onnx").symlink_to("real/model.onnx")


@KINDS.kind("fifo", REFUSED, says="no regular file")
def _fifo(folder: Path, _: object) -> None:
    import os

    os.mkfifo(folder / "m.onnx")


@KINDS.kind("endless-device", REFUSED, says="no regular file")
def _device(folder: Path, _: object) -> None:
    (folder / "m.onnx").symlink_to("/dev/zero")


@KINDS.kind("sparse-file-of-3-GB", REFUSED, says="larger than 2 GB")
def _sparse_file(folder: Path, _: object) -> None:
    with (folder / "m.onnx").open("wb") as stream:
        stream.truncate(3 * 2**30)
