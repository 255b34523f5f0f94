"""External data that leads somewhere else: another folder, another file, a device, nowhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import builders
import numpy as np
import onnx
from builders import externalize, value, weight
from onnx import helper

from hostile.corpus import OK, REFUSED, Group

KINDS = Group("external")
BYTES = np.arange(8, dtype=np.float32).tobytes()
SECRET = "TOPSECRET-TOPSECRET-TOPSECRET-32"
"""What lies outside; the tests look for it in everything that comes out."""


def base(location: str, **entries: Any) -> onnx.ModelProto:
    """y = x + w, with w in ``location``."""
    node = helper.make_node("Add", ["x", "w"], ["y"])
    tensor = externalize(weight("w", np.arange(8)), location, **entries)
    return builders.model([node], [value("x", (8,))], [value("y", (8,))], [tensor])


def prepare(folder: Path) -> None:
    """A good data file, a secret beside the model's folder, and every kind of way to it."""
    (folder / "w.bin").write_bytes(BYTES)
    secret = folder.parent / "secret.bin"
    secret.write_text(SECRET)
    secret_folder = folder.parent / "secrets"
    secret_folder.mkdir(exist_ok=True)
    (secret_folder / "s.bin").write_text(SECRET)
    opened = folder.parent / "opened"
    opened.mkdir(exist_ok=True)
    (opened / "w.bin").write_bytes(BYTES)
    (folder / "sub").mkdir()
    (folder / "sub" / "w.bin").write_bytes(BYTES)
    (folder / "link.bin").symlink_to("../secret.bin")
    (folder / "inner.bin").symlink_to("w.bin")
    (folder / "door").symlink_to("../secrets")
    (folder / "sub" / "door").symlink_to("../../secrets")
    (folder / "again.bin").symlink_to("again.bin")
    (folder / "empty.bin").touch()
    os.mkfifo(folder / "pipe.bin")


def at(location: str, **entries: Any) -> Any:
    def make(folder: Path, _rng: object) -> onnx.ModelProto:
        prepare(folder)
        return base(location.replace("HERE", str(folder)), **entries)

    return make


OUTSIDE = "lies outside the model's folder"
for name, location in {
    "absolute": "/etc/hostname",
    "absolute-secret": "HERE/../secret.bin",
    "parent": "../secret.bin",
    "detour": "sub/../../secret.bin",
    "deep-detour": "sub/" * 20 + "../" * 22 + "secret.bin",
    "many-parents": "../" * 200 + "etc/hostname",
    "linked-file": "link.bin",
    "linked-folder": "door/s.bin",
    "linked-folder-below": "sub/door/s.bin",
    "proc-self-environ": "/proc/self/environ",
    "proc-by-parents": "../" * 30 + "proc/self/environ",
    "dev-zero": "/dev/zero",
    "dev-stdin": "/dev/stdin",
    "dev-fd": "/proc/self/fd/0",
}.items():
    KINDS.add(name, REFUSED, at(location), seen=OK, says=OUTSIDE)

for name, location in {
    "missing": "gone.bin",
    "backslash": "..\\secret.bin",
    "backslash-detour": "sub\\..\\..\\secret.bin",
    "drive": "C:\\secret.bin",
    "unc": "\\\\server\\share\\secret.bin",
    "url": "http://example.com/w.bin",
    "file-url": "file:///etc/hostname",
    "home": "~/.ssh/id_rsa",
    "variable": "$HOME/.bashrc",
    "nul": "w.bin\0../secret.bin",
    "folder": "sub",
    "itself": ".",
    "empty-location": "",
    "link-to-itself": "again.bin",
    "fifo": "pipe.bin",
    "long-location": "a" * 5000,
    "deep-location": "a/" * 3000 + "w.bin",
    "newline": "w.bin\nerror: forged; line",
    "below-a-file": "w.bin/x",
    "empty-file": "empty.bin",
}.items():
    KINDS.add(name, REFUSED, at(location), seen=OK)

for name, entries in {
    "offset-negative": {"offset": -1},
    "offset-past-the-end": {"offset": 64},
    "offset-2-63": {"offset": 2**63},
    "offset-2-64": {"offset": 2**64},
    "offset-of-5000-digits": {"offset": "9" * 5000},
    "offset-no-number": {"offset": "0x10"},
    "offset-in-other-digits": {"offset": "٣"},
    "length-negative": {"length": -32},
    "length-0": {"length": 0},
    "length-too-short": {"length": 16},
    "length-too-long": {"length": 2**40},
    "length-2-64": {"length": 2**64 + 32},
    "length-no-number": {"length": "all"},
    "offset-and-length-wrap": {"offset": 2**64 - 16, "length": 32},
}.items():
    KINDS.add(name, REFUSED, at("w.bin", **entries), seen=OK)

for name, location in {
    "plain": "w.bin",
    "below": "sub/w.bin",
    "dotted": "./sub/../w.bin",
    "link-inside": "inner.bin",
    "model-itself": "m.onnx",
}.items():
    KINDS.add(name, OK, at(location))
KINDS.add("unknown-key", OK, at("w.bin", checksum="0" * 40, basepath="/etc"))
KINDS.add("root-named", OK, at("../opened/w.bin"), options=("--external-root", "opened"))
KINDS.add(
    "root-does-not-open-more",
    REFUSED,
    at("../secret.bin"),
    seen=OK,
    options=("--external-root", "opened"),
    says=OUTSIDE,
)


@KINDS.kind("key-twice", REFUSED, seen=OK, says="twice")
def _twice(folder: Path, _rng: object) -> onnx.ModelProto:
    proto = at("w.bin")(folder, None)
    proto.graph.initializer[0].external_data.add(key="location", value="../secret.bin")
    return proto


@KINDS.kind("no-location", REFUSED, seen=OK)
def _no_location(folder: Path, _rng: object) -> onnx.ModelProto:
    proto = at("w.bin")(folder, None)
    del proto.graph.initializer[0].external_data[:]
    return proto


@KINDS.kind("inline-data-too", OK)
def _both(folder: Path, _rng: object) -> onnx.ModelProto:
    proto = at("w.bin")(folder, None)
    proto.graph.initializer[0].raw_data = b"\0" * 32
    return proto


@KINDS.kind("hard-link", REFUSED, seen=OK, says="hard link")
def _hard_link(folder: Path, _rng: object) -> onnx.ModelProto:
    """As an archive may bring it: the user's own file, under a name in the model's folder."""
    proto = at("hard.bin")(folder, None)
    os.link(folder.parent / "secret.bin", folder / "hard.bin")
    return proto


@KINDS.kind("huge-sparse-file", OK)
def _huge_file(folder: Path, _rng: object) -> onnx.ModelProto:
    """Eight floats at the end of a file of 40 GB of nothing."""
    proto = at("w.bin", offset=40 * 2**30)(folder, None)
    with (folder / "w.bin").open("r+b") as stream:
        stream.truncate(40 * 2**30 + 32)
    return proto


@KINDS.kind("huge-tensor", REFUSED, seen=OK)
def _huge_tensor(folder: Path, _rng: object) -> onnx.ModelProto:
    """Dims of 2^40 floats and a length that agrees: the file has 32 bytes."""
    proto = at("w.bin", length=2**42)(folder, None)
    proto.graph.initializer[0].dims[:] = [2**40]
    return proto


@KINDS.kind("alias-10000", OK)
def _alias(folder: Path, _rng: object) -> onnx.ModelProto:
    """Many weights of the same bytes."""
    prepare(folder)
    names = [f"w{i}" for i in range(2000)]
    weights = [externalize(weight(name, np.arange(8)), "w.bin") for name in names]
    nodes = [helper.make_node("Sum", ["x", *names], ["y"])]
    return builders.model(nodes, [value("x", (8,))], [value("y", (8,))], weights)


# Everywhere a tensor may stand


def _in_body(tensor: onnx.TensorProto) -> onnx.ModelProto:
    then = builders.branch("t", [helper.make_node("Add", ["x", "w"], ["t"])], "t")
    then.initializer.append(tensor)
    other = builders.branch("e", [helper.make_node("Neg", ["x"], ["e"])], "e")
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    given = [value("x", (8,)), value("c", (), onnx.TensorProto.BOOL)]
    return builders.model([node], given, [value("y", (8,))])


def _in_constant(tensor: onnx.TensorProto) -> onnx.ModelProto:
    nodes = [helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("Add", ["x", "w"], ["y"])]
    return builders.model(nodes, [value("x", (8,))], [value("y", (8,))])


def _in_sparse(tensor: onnx.TensorProto) -> onnx.ModelProto:
    proto = _in_constant(weight("w", np.arange(8)))
    del proto.graph.node[0]
    sparse = onnx.SparseTensorProto(dims=[8])
    sparse.values.CopyFrom(tensor)
    sparse.indices.CopyFrom(weight("", np.arange(8), np.int64))
    proto.graph.sparse_initializer.append(sparse)
    return proto


def _in_sparse_constant(tensor: onnx.TensorProto) -> onnx.ModelProto:
    sparse = _in_sparse(tensor).graph.sparse_initializer[0]
    nodes = [helper.make_node("Constant", [], ["w"], sparse_value=sparse), helper.make_node("Add", ["x", "w"], ["y"])]
    return builders.model(nodes, [value("x", (8,))], [value("y", (8,))])


def _in_function(tensor: onnx.TensorProto) -> onnx.ModelProto:
    proto = builders.function_model()
    proto.functions[0].node[0].attribute[0].t.CopyFrom(tensor)
    for info in (*proto.graph.input, *proto.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = 8
    return proto


def _in_training(tensor: onnx.TensorProto) -> onnx.ModelProto:
    proto = builders.relu()
    proto.training_info.add().initialization.initializer.append(tensor)
    return proto


PLACES: dict[str, Callable[[onnx.TensorProto], onnx.ModelProto]] = {
    "body": _in_body,
    "constant": _in_constant,
    "sparse": _in_sparse,
    "sparse-constant": _in_sparse_constant,
    "function": _in_function,
    "training": _in_training,
}


def _placed(build: Callable[[onnx.TensorProto], onnx.ModelProto], location: str) -> Any:
    def make(folder: Path, _rng: object) -> onnx.ModelProto:
        prepare(folder)
        return build(externalize(weight("w", np.arange(8)), location))

    return make


for place, build in PLACES.items():
    for label, location in (("parent", "../secret.bin"), ("linked", "link.bin"), ("fifo", "pipe.bin")):
        KINDS.add(f"{label}-in-{place}", REFUSED, _placed(build, location), seen=OK)
