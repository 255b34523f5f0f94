"""Calibration data of every broken kind, for one plain model: x float32 [batch, 4] -> y."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import builders
import numpy as np
import onnx

from hostile.corpus import ANY, OK, REFUSED, Group

KINDS = Group("data")
GOOD = np.linspace(-1, 1, 64, dtype=np.float32).reshape(16, 4)


def plain() -> onnx.ModelProto:
    """The model the data is for."""
    proto = builders.mlp(4)
    for index, tensor in enumerate(proto.graph.initializer):
        tensor.CopyFrom(builders.weight(tensor.name, np.eye(4) * (index + 1)))
    return proto


def npz(**arrays: Any) -> Any:
    def make(folder: Path, _rng: object) -> str:
        np.savez(folder / "d.npz", **arrays)
        return "d.npz"

    return make


def members(**contents: bytes) -> Any:
    """A .npz whose members hold these bytes, compressed."""

    def make(folder: Path, _rng: object) -> str:
        with zipfile.ZipFile(folder / "d.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in contents.items():
                archive.writestr(f"{name}.npy", content)
        return "d.npz"

    return make


def raw(content: bytes, name: str = "d.npz") -> Any:
    def make(folder: Path, _rng: object) -> str:
        (folder / name).write_bytes(content)
        return name

    return make


def header(shape: str, descr: str = "'<f4'", version: int = 1, fortran: str = "False") -> bytes:
    """The start of a .npy file, true or not."""
    text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text


def whole() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, x=GOOD)
    return stream.getvalue()


class _Runs:
    """Its pickle makes a file when it is loaded."""

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return Path.write_text, (Path("PICKLE-RAN"), "x")  # type: ignore[return-value]


def with_(change: Callable[[np.ndarray[Any, Any]], Any]) -> np.ndarray[Any, Any]:
    found = GOOD.copy()
    change(found)
    return found


OBJECTS = np.array([{}, None, "x"], dtype=object)
for name, outcome, says, make in (
    ("good", OK, "", npz(x=GOOD)),
    ("npy", OK, "", lambda folder, _r: (np.save(folder / "d.npy", GOOD), "d.npy")[1]),
    ("labels-too", OK, "", npz(x=GOOD, label=np.zeros(16, np.int64))),
    ("float64", OK, "", npz(x=GOOD.astype(np.float64))),
    ("dtype-text", REFUSED, "'x'", npz(x=np.full((4, 4), "a"))),
    ("dtype-complex", REFUSED, "'x'", npz(x=GOOD.astype(np.complex64))),
    ("dtype-records", REFUSED, "records", npz(x=np.zeros(4, [("a", "<f4")]))),
    ("dtype-dates", REFUSED, "'x'", npz(x=np.zeros((4, 4), "datetime64[s]"))),
    ("dtype-void", REFUSED, "'x'", npz(x=np.zeros((4, 4), "V4"))),
    ("nearly-too-large", ANY, "", npz(x=np.sign(GOOD) * np.float32(3.3e38))),
    ("float64-too-large", REFUSED, "'x'", npz(x=GOOD.astype(np.float64) * 1e300)),
    ("rank-1", REFUSED, "'x'", npz(x=GOOD.reshape(-1))),
    ("rank-4", REFUSED, "'x'", npz(x=GOOD[:, None, None])),
    ("rank-0", REFUSED, "'x'", npz(x=np.float32(3))),
    ("shape", REFUSED, "'x'", npz(x=GOOD[:, :3])),
    ("all-nan", REFUSED, "NaN", npz(x=np.full_like(GOOD, np.nan))),
    ("all-inf", REFUSED, "infinite", npz(x=np.full_like(GOOD, np.inf))),
    ("all-minus-inf", REFUSED, "infinite", npz(x=np.full_like(GOOD, -np.inf))),
    ("empty-array", REFUSED, "no sample", npz(x=GOOD[:0])),
    ("empty-rows", REFUSED, "'x'", npz(x=GOOD[:, :0])),
    ("input-missing", REFUSED, "no input 'x'", npz(z=GOOD)),
    ("input-misspelt", REFUSED, "'X'", npz(X=GOOD)),
    ("counts-differ", REFUSED, "", npz(**{"x/0": GOOD[:1], "x/2": GOOD[1:2]})),
    ("objects", REFUSED, "Python objects", npz(x=OBJECTS)),
    ("objects-npy", REFUSED, "Python objects", lambda folder, _r: (np.save(folder / "d.npy", OBJECTS), "d.npy")[1]),
    ("pickle-as-npz", REFUSED, "", raw(pickle.dumps(_Runs()))),
    ("pickle-as-npy", REFUSED, "", raw(pickle.dumps(_Runs()), "d.npy")),
    ("pickle-as-member", REFUSED, "", members(x=pickle.dumps(_Runs()))),
    ("pickle-behind-a-header", REFUSED, "Python objects", members(x=header("(3,)", "'|O'") + pickle.dumps(_Runs()))),
    ("pickle-file", REFUSED, "", raw(pickle.dumps({"x": GOOD}), "d.pkl")),
    ("torch-file", REFUSED, "", raw(b"PK\x03\x04torch", "d.pt")),
    ("header-code", REFUSED, "", members(x=header("__import__('os').system('touch PICKLE-RAN')"))),
    ("header-lies-upwards", REFUSED, "claims", members(x=header("(1000000, 4)") + bytes(64))),
    ("header-lies-2-62", REFUSED, "claims", members(x=header("(4611686018427387904, 4)") + bytes(64))),
    ("header-lies-npy", REFUSED, "claims", raw(header("(10000000000, 4)") + bytes(64), "d.npy")),
    ("header-negative", REFUSED, "negative", members(x=header("(-4, 4)") + bytes(64))),
    ("header-boolean", REFUSED, "", members(x=header("(True, 4)", "'<f4'") + bytes(3))),
    ("header-overflow", REFUSED, "", members(x=header("(99999999999999999999, 4)") + bytes(64))),
    ("header-text", REFUSED, "", members(x=header("('4', 4)") + bytes(64))),
    ("header-rank-100", REFUSED, "", members(x=header(str((1,) * 100)) + bytes(4))),
    ("header-of-4-GB", REFUSED, "", members(x=b"\x93NUMPY\x02\0" + struct.pack("<I", 2**32 - 1) + b"{" * 99)),
    ("header-nested", REFUSED, "", members(x=b"\x93NUMPY\x01\0" + struct.pack("<H", 9000) + b"(" * 9000)),
    ("header-version-3", REFUSED, "", members(x=header("(4, 4)", version=3) + bytes(64))),
    ("header-version-9", REFUSED, "", members(x=header("(4, 4)", version=9) + bytes(64))),
    ("header-itemsize-huge", REFUSED, "", members(x=header("(1, 4)", "'|S1000000000'") + bytes(64))),
    ("header-without-shape", REFUSED, "", members(x=b"\x93NUMPY\x01\0\x10\0{'descr': '<f4'}")),
    ("header-cut", REFUSED, "", members(x=b"\x93NUMPY\x01\0\xff\x00{'des")),
    ("member-empty", REFUSED, "", members(x=b"")),
    ("member-text", REFUSED, "", members(x=b"no array")),
    ("no-members", REFUSED, "", members()),
    ("truncated", REFUSED, "", raw(whole()[:200])),
    ("truncated-at-the-end", REFUSED, "", raw(whole()[:-30])),
    ("empty-file", REFUSED, "", raw(b"")),
    ("zeros", REFUSED, "", raw(bytes(5000))),
    ("text", REFUSED, "", raw(b"1,2,3,4\n")),
    ("csv", REFUSED, "", raw(b"1,2,3,4\n", "d.csv")),
    ("onnx", REFUSED, "", raw(plain().SerializeToString(), "d.onnx")),
    ("missing", REFUSED, "no file or folder", lambda _f, _r: "gone.npz"),
    ("url", REFUSED, "", lambda _f, _r: "http://example.com/d.npz"),
    ("nul", REFUSED, "", lambda _f, _r: "d\0.npz"),
    ("long-path", REFUSED, "", lambda _f, _r: "d" * 5000 + ".npz"),
    ("empty-name", REFUSED, "", lambda _f, _r: ""),
    ("random-of-nothing", REFUSED, "", lambda _f, _r: "random:0"),
    ("script-missing", REFUSED, "", lambda _f, _r: "gone.py:load"),
    ("script-without-function", REFUSED, "", raw(b"x = 1\n", "d.py")),
    ("folder-empty", REFUSED, "", lambda folder, _r: ((folder / "d").mkdir(), "d")[1]),
    ("fortran", OK, "", npz(x=np.asfortranarray(GOOD))),
    ("big-endian", OK, "", npz(x=GOOD.astype(">f4"))),
):
    KINDS.add(name, outcome, make, says=says)


@KINDS.kind("one-nan", OK, says="")
def _one_nan(folder: Path, _rng: object) -> str:
    return str(npz(x=with_(lambda a: a.__setitem__((3, 0), np.nan)))(folder, None))


@KINDS.kind("zip-bomb", REFUSED, says="would be")
def _zip_bomb(folder: Path, _rng: object) -> str:
    """A member of 3.2 GB of zeros that takes 3 MB, behind a header that tells the truth about it."""
    rows = 200 * 2**20
    return str(_bomb(folder, 16 * rows // 2**24, header(f"({rows}, 4)")))


@KINDS.kind("zip-bomb-that-lies", REFUSED)
def _zip_lies(folder: Path, _rng: object) -> str:
    """The same, and the directory says that it is small."""
    return str(_bomb(folder, 100, header("(100, 4)"), claimed=128 + 1600))


def _bomb(folder: Path, count: int, start: bytes, claimed: int | None = None) -> str:
    import zlib

    # One block of 16 MB of zeros compressed, repeated: deflate streams can be joined where they are flushed.
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH)
    block_maker = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = block_maker.compress(bytes(2**24)) + block_maker.flush(zlib.Z_FULL_FLUSH)
    data = body + block * count + zlib.compressobj(9, zlib.DEFLATED, -15).flush()
    size = len(start) + count * 2**24 if claimed is None else claimed
    name = b"x.npy"
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 0x21, 0, len(data), size, len(name), 0) + name
    central = (
        struct.pack(
            "<4s6H3L5H2L",
            b"PK\1\2",
            20,
            20,
            0,
            8,
            0,
            0x21,
            0,
            len(data),
            size,
            len(name),
            0,
            0,
            0,
            0,
            0,
            0,
        )
        + name
    )
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(central), len(local) + len(data), 0)
    (folder / "d.npz").write_bytes(local + data + central + end)
    return "d.npz"


@KINDS.kind("zip-member-claims-2-60", REFUSED)
def _claims(folder: Path, _rng: object) -> str:
    data = bytearray(whole())
    at = data.rindex(b"PK\1\2")
    data[at + 20 : at + 28] = b"\xff\xff\xff\x7f" * 2
    return str(raw(bytes(data))(folder, None))


@KINDS.kind("zip-in-zip", REFUSED)
def _zip_in_zip(folder: Path, _rng: object) -> str:
    return str(members(x=whole())(folder, None))


@KINDS.kind("zip-of-20000-members", REFUSED)
def _many(folder: Path, _rng: object) -> str:
    with zipfile.ZipFile(folder / "d.npz", "w") as archive:
        for index in range(20_000):
            archive.writestr(f"z{index}.npy", b"")
    return "d.npz"


@KINDS.kind("zip-member-outside", REFUSED)
def _slip(folder: Path, _rng: object) -> str:
    """A name that would lead out of the folder it is unpacked in."""
    stream = io.BytesIO()
    np.save(stream, GOOD)
    with zipfile.ZipFile(folder / "d.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../z.npy", stream.getvalue())
    return "d.npz"


@KINDS.kind("encrypted", REFUSED)
def _encrypted(folder: Path, _rng: object) -> str:
    data = bytearray(whole())
    data[6] |= 1
    data[data.rindex(b"PK\1\2") + 8] |= 1
    return str(raw(bytes(data))(folder, None))


@KINDS.kind("fifo", REFUSED)
def _fifo(folder: Path, _rng: object) -> str:
    os.mkfifo(folder / "d.npz")
    return "d.npz"


@KINDS.kind("device", REFUSED)
def _device(folder: Path, _rng: object) -> str:
    (folder / "d.npy").symlink_to("/dev/zero")
    return "d.npy"


@KINDS.kind("test-data-external", REFUSED)
def _external(folder: Path, _rng: object) -> str:
    """A TensorProto in a test_data_set that keeps its numbers elsewhere."""
    place = folder / "d" / "test_data_set_0"
    place.mkdir(parents=True)
    tensor = builders.externalize(builders.weight("x", GOOD[:1]), "/etc/hostname")
    (place / "input_0.pb").write_bytes(tensor.SerializeToString())
    return "d"


@KINDS.kind("test-data-dims-lie", REFUSED)
def _dims(folder: Path, _rng: object) -> str:
    place = folder / "d" / "test_data_set_0"
    place.mkdir(parents=True)
    tensor = builders.weight("x", GOOD[:1])
    tensor.dims[:] = [2**40, 4]
    (place / "input_0.pb").write_bytes(tensor.SerializeToString())
    return "d"
