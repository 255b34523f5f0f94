"""The gate for external weights: what lies outside is never read, what lies about itself is refused."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import builders
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graphopt.errors import ModelError
from graphopt.model import load, to_proto

SECRET = b"SECRET!!" * 4  # 32 bytes, as many as the weight has


def refused(path: Path | onnx.ModelProto, match: str, **options: object) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        load(path, **options)
    text = str(caught.value)
    assert text.isprintable()
    assert re.search(r"[;,?] *\S+", text), f"says no way out: {text}"
    assert "SECRET!!" not in text


def weights(path: Path, **options: object) -> list[float]:
    return list(onnx.numpy_helper.to_array(to_proto(load(path, **options)).graph.initializer[0]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``box`` is the model's folder; a secret lies beside it."""
    (tmp_path / "SECRET.bin").write_bytes(SECRET)
    (tmp_path / "box" / "sub").mkdir(parents=True)
    return tmp_path / "box"


class TestContained:
    @pytest.mark.parametrize("location", ["w.bin", "./w.bin", "sub/../w.bin", "sub/w.bin", "数据 1.bin"])
    def test_inside(self, folder: Path, location: str) -> None:
        assert weights(builders.external(folder, location)) == list(range(8))

    @pytest.mark.parametrize(
        "location", ["../SECRET.bin", "sub/../../SECRET.bin", "{tmp}/SECRET.bin", "sub/../../box/../SECRET.bin", ".."]
    )
    def test_outside(self, folder: Path, location: str) -> None:
        location = location.format(tmp=folder.parent)
        refused(builders.external(folder, location, write=False), "outside the model's folder.*--external-root DIR")

    @pytest.mark.parametrize(
        "location", ["/etc/passwd", "/proc/self/environ", "/dev/zero", "/dev/stdin", "//etc/hosts"]
    )
    def test_system_files(self, folder: Path, location: str) -> None:
        refused(builders.external(folder, location, write=False), "outside the model's folder")

    def test_linked_file(self, folder: Path) -> None:
        (folder / "w.bin").symlink_to("../SECRET.bin")
        refused(builders.external(folder, write=False), "outside the model's folder")

    def test_linked_folder(self, folder: Path) -> None:
        (folder / "link").symlink_to("..")
        refused(builders.external(folder, "link/SECRET.bin", write=False), "outside the model's folder")

    def test_link_within_the_folder(self, folder: Path) -> None:
        path = builders.external(folder)
        (folder / "w.bin").rename(folder / "real.bin")
        (folder / "w.bin").symlink_to("real.bin")
        assert weights(path) == list(range(8))

    def test_nothing_outside_is_opened(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = builders.external(folder, "../SECRET.bin", write=False)
        opened: list[str] = []
        real = os.open
        monkeypatch.setattr(os, "open", lambda p, *a, **k: (opened.append(os.fspath(p)), real(p, *a, **k))[1])
        refused(path, "outside")
        assert not any("SECRET" in name for name in opened)

    def test_swapped_between_check_and_open(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A folder that becomes a link after the check: the opened descriptor tells."""
        path = builders.external(folder, "sub/SECRET.bin")
        real = os.open

        def swap(name: object, *rest: object) -> int:
            if str(name).endswith("SECRET.bin"):
                (folder / "sub").rename(folder / "was")
                (folder / "sub").symlink_to("..")
            return real(name, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "open", swap)
        refused(path, "moved out of the model's folder")

    def test_file_that_becomes_a_link_after_the_check(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not followed, wherever it leads: the check saw another file."""
        path = builders.external(folder)
        real = os.open

        def swap(name: object, *rest: object) -> int:
            if str(name).endswith("w.bin"):
                (folder / "w.bin").rename(folder / "v.bin")
                (folder / "w.bin").symlink_to("v.bin")
            return real(name, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "open", swap)
        refused(path, "cannot open")


class TestRoots:
    def test_cache_of_links(self, folder: Path) -> None:
        """The Hugging Face layout: snapshots are links into ../../blobs."""
        blobs, path = folder / "blobs", builders.external(folder / "snapshots" / "x", write=False)
        blobs.mkdir()
        (blobs / "abc").write_bytes(np.arange(8, dtype=np.float32).tobytes())
        (path.parent / "w.bin").symlink_to("../../blobs/abc")
        refused(path, "--external-root DIR")
        assert weights(path, external_roots=[blobs]) == list(range(8))

    def test_model_as_bytes_needs_a_root(self, folder: Path) -> None:
        path = builders.external(folder)
        data = path.read_bytes()
        refused(data, "no folder to be looked for in")  # type: ignore[arg-type]
        assert list(load(data, external_roots=[folder]).graph.initializers["w"].const_value.numpy()) == list(range(8))

    def test_model_folder_comes_first(self, folder: Path) -> None:
        path = builders.external(folder)
        (folder / "sub" / "w.bin").write_bytes(SECRET)
        assert weights(path, external_roots=[folder / "sub"]) == list(range(8))

    def test_a_root_opens_nothing_else(self, folder: Path) -> None:
        path = builders.external(folder, "../SECRET.bin", write=False)
        refused(path, "outside|is missing", external_roots=[folder / "sub"])


class TestWhatKindOfFile:
    def test_missing(self, folder: Path) -> None:
        refused(builders.external(folder, write=False), r"is missing \(looked in .*box\); keep the data file beside")

    def test_folder(self, folder: Path) -> None:
        refused(builders.external(folder, "sub", write=False), "no regular file")

    def test_fifo(self, folder: Path) -> None:
        os.mkfifo(folder / "w.bin")  # a blocking open would hang this test
        refused(builders.external(folder, write=False), "no regular file")

    def test_socket(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("w.bin")
            refused(builders.external(folder, write=False), "cannot open")

    @pytest.mark.skipif(not hasattr(os, "link"), reason="no hard links there")
    def test_hard_link(self, folder: Path) -> None:
        """Whosever it is: an archive can bring a link to the user's own keys."""
        path = builders.external(folder / "model")
        os.link(folder / "model" / "w.bin", folder / "elsewhere.bin")
        refused(path, "hard link")
        assert load(path, external_roots=[folder / "model"]).graph.initializers["w"].const_value.numpy()[7] == 7
        (folder / "elsewhere.bin").unlink()
        assert load(path).graph.initializers["w"].const_value.numpy()[7] == 7

    @pytest.mark.parametrize("location", ["", "w\0.bin", "\0"])
    def test_unusable(self, folder: Path, location: str) -> None:
        refused(builders.external(folder, location, write=False), "no usable location")

    @pytest.mark.parametrize("location", ["..\\SECRET.bin", "sub\\..\\..\\SECRET.bin", "C:\\w.bin"])
    def test_backslashes(self, folder: Path, location: str) -> None:
        refused(builders.external(folder, location, write=False), "missing|outside")

    def test_name_that_breaks_the_line(self, folder: Path) -> None:
        refused(builders.external(folder, "a\nb\x1b[2J" + "x" * 180, write=False), r"a\\nb\\x1b")


class TestLies:
    @pytest.mark.parametrize(
        ("entries", "said"),
        [
            ({"offset": 4}, "ends at byte 36"),
            ({"offset": 2**62}, "ends at byte"),
            ({"offset": 10**30}, "not a byte count"),
            ({"offset": -4}, "not a byte count"),
            ({"offset": "0x10"}, "not a byte count"),
            ({"offset": "1e3"}, "not a byte count"),
            ({"offset": "٣"}, "not a byte count"),
            ({"offset": ""}, "not a byte count"),
            ({"length": 16}, "needs 32"),
            ({"length": 64}, "needs 32"),
            ({"length": 2**62}, "needs 32"),
            ({"length": -1}, "not a byte count"),
            ({"length": 0}, "needs 32"),
        ],
    )
    def test_offset_and_length(self, folder: Path, entries: dict[str, int | str], said: str) -> None:
        refused(builders.external(folder, **entries), said)

    @pytest.mark.parametrize("dims", [[2**62], [2**31, 2**31, 2**31], [-8], [9]])
    def test_dims(self, folder: Path, dims: list[int]) -> None:
        """Refused before anything of that size is allocated."""
        path = builders.external(folder)
        proto = onnx.load(path, load_external_data=False)
        proto.graph.initializer[0].dims[:] = dims
        path.write_bytes(proto.SerializeToString())
        refused(path, "ends at byte|negative dim")

    def test_empty_and_truncated(self, folder: Path) -> None:
        path = builders.external(folder)
        (folder / "w.bin").write_bytes(b"")
        refused(path, "has only 0")
        (folder / "w.bin").write_bytes(SECRET[:31])
        refused(path, "has only 31")

    @pytest.mark.parametrize("key", ["location", "offset", "length"])
    def test_key_twice(self, folder: Path, key: str) -> None:
        path = builders.external(folder, offset=0, length=32)
        proto = onnx.load(path, load_external_data=False)
        proto.graph.initializer[0].external_data.add(key=key, value="0")
        path.write_bytes(proto.SerializeToString())
        refused(path, f"'{key}' twice")

    def test_no_location(self, folder: Path) -> None:
        path = builders.external(folder)
        proto = onnx.load(path, load_external_data=False)
        del proto.graph.initializer[0].external_data[:]
        path.write_bytes(proto.SerializeToString())
        refused(path, "has no location")

    @pytest.mark.parametrize("kind", [TensorProto.STRING, TensorProto.UNDEFINED, 999])
    def test_type(self, folder: Path, kind: int) -> None:
        path = builders.external(folder)
        proto = onnx.load(path, load_external_data=False)
        proto.graph.initializer[0].data_type = kind
        path.write_bytes(proto.SerializeToString())
        refused(path, "cannot be external")

    def test_sparse_data_that_would_have_to_be_in_memory(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("graphopt.external._INLINE_LIMIT", 16)
        tensor = builders.externalize(builders.weight("w", np.arange(8)), "w.bin")
        (folder / "w.bin").write_bytes(SECRET)
        path = folder / "m.onnx"
        path.write_bytes(in_sparse(tensor).SerializeToString())
        refused(path, "too many for a sparse or training tensor")

    def test_unknown_keys_are_no_instructions(self, folder: Path) -> None:
        path = builders.external(folder, __class__="x", basepath="/etc", checksum="0")
        assert weights(path) == list(range(8))


def in_subgraph(tensor: onnx.TensorProto) -> onnx.ModelProto:
    proto = builders.conditional()
    proto.graph.node[0].attribute[0].g.initializer.append(tensor)
    return proto


def in_constant(tensor: onnx.TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["y"])
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
    return builders.model([node], [], [builders.value("y", (8,))])


def in_tensors(tensor: onnx.TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Custom", [], ["y"], domain="mine")
    node.attribute.add(name="many", type=onnx.AttributeProto.TENSORS).tensors.append(tensor)
    return builders.model([node], [], [builders.value("y", (8,))], domains=["mine"])


def in_sparse(tensor: onnx.TensorProto) -> onnx.ModelProto:
    proto = builders.model([helper.make_node("Identity", ["w"], ["y"])], [], [builders.value("y", (16,))])
    indices = builders.weight("", list(range(8)), np.int64)
    proto.graph.sparse_initializer.append(onnx.SparseTensorProto(values=tensor, indices=indices, dims=[16]))
    return proto


def in_sparse_attribute(tensor: onnx.TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["y"])
    value = node.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR).sparse_tensor
    value.values.CopyFrom(tensor)
    value.indices.CopyFrom(builders.weight("", list(range(8)), np.int64))
    value.dims.append(16)
    return builders.model([node], [], [builders.value("y", (16,))])


def in_function(tensor: onnx.TensorProto) -> onnx.ModelProto:
    proto = builders.function_model()
    proto.functions[0].node[0].attribute[0].t.CopyFrom(tensor)
    return proto


def in_function_default(tensor: onnx.TensorProto) -> onnx.ModelProto:
    proto = builders.function_model()
    proto.functions[0].attribute_proto.add(name="d", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
    return proto


def in_training(tensor: onnx.TensorProto) -> onnx.ModelProto:
    proto = builders.relu()
    proto.training_info.add().algorithm.initializer.append(tensor)
    return proto


EVERYWHERE = [
    in_subgraph, in_constant, in_tensors, in_sparse, in_sparse_attribute, in_function, in_function_default, in_training,
]  # fmt: skip


@pytest.mark.parametrize("place", EVERYWHERE, ids=lambda f: f.__name__)
class TestEveryPlace:
    """A tensor may hide anywhere."""

    def test_escape_is_refused(self, folder: Path, place: Callable[[onnx.TensorProto], onnx.ModelProto]) -> None:
        tensor = builders.externalize(builders.weight("w", np.arange(8)), "../SECRET.bin")
        path = folder / "m.onnx"
        path.write_bytes(place(tensor).SerializeToString())
        refused(path, "outside the model's folder")

    def test_wrong_length_is_refused(self, folder: Path, place: Callable[[onnx.TensorProto], onnx.ModelProto]) -> None:
        (folder / "w.bin").write_bytes(SECRET)
        tensor = builders.externalize(builders.weight("w", np.arange(8)), "w.bin", length=31)
        path = folder / "m.onnx"
        path.write_bytes(place(tensor).SerializeToString())
        refused(path, "needs 32")

    def test_what_comes_out_needs_no_data_file(
        self, folder: Path, place: Callable[[onnx.TensorProto], onnx.ModelProto]
    ) -> None:
        (folder / "w.bin").write_bytes(b"\0" * 16 + np.arange(8, dtype=np.float32).tobytes())
        tensor = builders.externalize(builders.weight("w", np.arange(8)), "w.bin", offset=16)
        path = folder / "m.onnx"
        path.write_bytes(place(tensor).SerializeToString())
        inline = place(builders.weight("w", np.arange(8)))
        result = to_proto(load(path))
        assert b"w.bin" not in result.SerializeToString()
        assert result == to_proto(load(inline)) or str(result) == str(to_proto(load(inline)))


class TestMapped:
    @pytest.mark.parametrize("name", ["FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "INT4", "UINT4", "BOOL", "DOUBLE", "INT2"])
    def test_types(self, tmp_path: Path, name: str) -> None:
        if not hasattr(TensorProto, name):
            pytest.skip(f"this onnx has no {name}")
        kind = getattr(TensorProto, name)
        source = helper.make_tensor("w", kind, [3], [1, 0, 1])
        model = builders.model(
            [helper.make_node("Identity", ["w"], ["y"])], [], [builders.value("y", (3,), kind)], [source]
        )
        data = load(model).graph.initializers["w"].const_value.tobytes()
        tensor = model.graph.initializer[0]
        tensor.ClearField("int32_data")
        tensor.ClearField("double_data")
        tensor.doc_string = "kept"
        tensor.metadata_props.add(key="also", value="kept")
        builders.externalize(tensor, "w.bin", offset=1)  # not even aligned
        (tmp_path / "w.bin").write_bytes(b"\0" + data)
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        result = to_proto(load(tmp_path / "m.onnx")).graph.initializer[0]
        assert result.raw_data == data
        assert (result.doc_string, result.metadata_props[0].value, len(result.metadata_props)) == ("kept", "kept", 1)

    def test_empty_tensor(self, tmp_path: Path) -> None:
        path = builders.external(tmp_path)
        proto = onnx.load(path, load_external_data=False)
        proto.graph.initializer[0].dims[:] = [0, 3]
        path.write_bytes(proto.SerializeToString())
        (tmp_path / "w.bin").write_bytes(b"")
        assert load(path).graph.initializers["w"].const_value.numpy().shape == (0, 3)

    def test_read_only(self, tmp_path: Path) -> None:
        array = load(builders.external(tmp_path)).graph.initializers["w"].const_value.numpy()
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
    def test_memory_does_not_grow_with_the_file(self, tmp_path: Path) -> None:
        size = 300 * 2**20
        path = builders.external(tmp_path)
        proto = onnx.load(path, load_external_data=False)
        proto.graph.initializer[0].dims[:] = [size // 4]
        path.write_bytes(proto.SerializeToString())
        with (tmp_path / "w.bin").open("wb") as stream:
            stream.truncate(size)
        # In a process of its own: what earlier tests left in this one's heap would be counted too.
        (tmp_path / "other").mkdir()
        code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_external import memory
from graphopt.model import fingerprint, load
load({str(builders.external(tmp_path / "other"))!r})  # whatever the first load imports
before = memory("RssAnon"), memory("VmRSS")
model = load({str(path)!r})
assert memory("VmRSS") - before[1] < 30 * 2**20, "loading"
fingerprint(model)  # reads all of it, through the page cache
assert memory("RssAnon") - before[0] < 30 * 2**20, "reading"
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def memory(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
