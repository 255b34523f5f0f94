"""Large weights stay in their files: how little memory a model takes, and that what the runtime reads is right."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graphopt import references
from graphopt.model import clone, load, to_proto
from graphopt.references import referred_bytes, referring
from graphopt.report.document import about
from graphopt.session import Session
from graphopt.taps import tap_chunks

WIDTH = 256


def layers(folder: Path, count: int, width: int = WIDTH, *, files: tuple[str, ...] = ("w.data",)) -> Path:
    """x[1, width] -> (MatMul, Identity) times ``count`` -> y, weights in turn in ``files``."""
    rng = np.random.default_rng(0)
    weights, nodes = [], []
    for i in range(count):
        data = folder / files[i % len(files)]
        data.parent.mkdir(parents=True, exist_ok=True)
        with data.open("ab") as stream:
            offset = stream.tell()
            stream.write((rng.standard_normal((width, width), np.float32) / width**0.5).data)
        tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[width, width])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", files[i % len(files)]), ("offset", offset), ("length", 4 * width * width)):
            tensor.external_data.add(key=key, value=str(value))
        weights.append(tensor)
        nodes.append(helper.make_node("MatMul", [f"v{i}", f"w{i}"], [f"m{i}"], name=f"m{i}"))
        nodes.append(helper.make_node("Identity", [f"m{i}"], [f"v{i + 1}"], name=f"i{i}"))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width]) for name in ("v0", f"v{count}")]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], weights)
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """References from the first byte on, so that small models show what large ones do."""
    monkeypatch.setattr(references, "BIG", 1)


def feed() -> dict[str, np.ndarray]:
    return {"v0": np.random.default_rng(1).standard_normal((1, WIDTH)).astype(np.float32)}


def plain(path: Path) -> np.ndarray:
    """What the runtime makes of the file by itself, with the kernels that do not repack: they round otherwise."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feed())[0])


@pytest.mark.usefixtures("eager")
class TestWhatIsReferredTo:
    @pytest.mark.parametrize("files", [("w.data",), ("重 量.data", "sub folder/b.data")])
    def test_the_runtime_computes_the_same(self, tmp_path: Path, files: tuple[str, ...]) -> None:
        folder = tmp_path / "模型 with spaces"
        folder.mkdir()
        path = layers(folder, 4, files=files)
        model = load(path)
        proto, where = referring(model)
        assert where == folder.resolve()
        assert proto.ByteSize() < 2000
        assert not any(t.raw_data for t in proto.graph.initializer)
        assert referred_bytes(model) == 4 * 4 * WIDTH * WIDTH
        for optimize in (True, False):
            session = Session(model, optimize=optimize, threads=1, taps=("m1",))
            np.testing.assert_allclose(session.run(feed())["v4"], plain(path), rtol=1e-5, atol=1e-6)
        assert tap_chunks(model, ["m0", "m1"], feed(), cap=WIDTH * 4 + 1) == [["m0"], ["m1"]]

    def test_the_model_is_not_touched(self, tmp_path: Path) -> None:
        model = load(layers(tmp_path, 2))
        before = to_proto(model).SerializeToString(deterministic=True)
        referring(model)
        assert to_proto(model).SerializeToString(deterministic=True) == before

    def test_an_edited_weight_is_its_own(self, tmp_path: Path) -> None:
        import onnx_ir as ir

        path = layers(tmp_path, 2)
        model = clone(load(path))
        model.graph.initializers["w1"].const_value = ir.tensor(np.zeros((WIDTH, WIDTH), np.float32), name="w1")
        assert not Session(model, threads=1).run(feed())["v2"].any()
        assert plain(path).any()

    def test_links(self, tmp_path: Path) -> None:
        """As in package caches: the model and its data are links to files with other names."""
        real, seen = tmp_path / "blobs", tmp_path / "snapshot"
        real.mkdir()
        seen.mkdir()
        path = layers(real, 2)
        for name in ("model.onnx", "w.data"):
            (seen / name).symlink_to(real / name)
        model = load(seen / "model.onnx", external_roots=[real])
        assert referring(model)[1] == real.resolve()
        np.testing.assert_allclose(Session(model, threads=1).run(feed())["v2"], plain(path), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("how", ["replaced", "removed", "swapped for a link"])
    def test_another_file_in_its_place_is_not_read(self, tmp_path: Path, how: str) -> None:
        path = layers(tmp_path, 2)
        expected, model, data = plain(path), load(path), tmp_path / "w.data"
        other = tmp_path / "other"
        other.write_bytes(bytes(data.stat().st_size))
        if how == "replaced":
            other.replace(data)
        else:
            data.unlink()
        if how == "swapped for a link":
            data.symlink_to(other)
        assert referring(model)[1] is None
        np.testing.assert_allclose(Session(model, threads=1).run(feed())["v2"], expected, rtol=1e-5, atol=1e-6)

    def test_the_report_tells_what_the_file_takes(self, tmp_path: Path) -> None:
        path = layers(tmp_path, 4)
        told = about(load(path), None)
        whole = path.stat().st_size + (tmp_path / "w.data").stat().st_size
        assert told["bytes"] == pytest.approx(whole, rel=1e-3)
        assert told["sha256"] is None


def test_small_models_are_taken_whole(tmp_path: Path) -> None:
    proto, folder = referring(load(layers(tmp_path, 2)))
    assert folder is None
    assert all(t.raw_data for t in proto.graph.initializer)


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is told by /proc")
def test_memory_stays_far_below_the_weights(tmp_path: Path) -> None:
    """200 MB of weights, verified and saved: what the process holds itself peaks below them, timing left out."""
    path = layers(tmp_path, 12, 2048)
    size = (tmp_path / "w.data").stat().st_size
    assert size > 200e6
    code = (
        "import sys, threading, time\n"
        "from graphopt.cli import main\n"
        "peak = 0\n"
        "def watch():\n"
        "    global peak\n"
        "    while True:\n"
        "        lines = dict(l.split(':', 1) for l in open('/proc/self/status') if 'Rss' in l)\n"
        "        peak = max(peak, sum(int(lines[k].split()[0]) for k in ('RssAnon', 'RssShmem')))\n"
        "        time.sleep(0.005)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print('PEAK', peak * 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "optimize", str(path), "-o", str(tmp_path / "small.onnx"), "--time", "0"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.rsplit("PEAK", 1)[1])
    assert peak < size, f"{peak / 1e6:.0f} MB for {size / 1e6:.0f} MB of weights"
    assert len(onnx.load(tmp_path / "small.onnx", load_external_data=False).graph.node) == 12
    shutil.rmtree(tmp_path)


def test_many_initializers_come_in_the_order_in_which_the_runtime_takes_them(tmp_path: Path) -> None:
    """The first used first, the others backwards; the model itself keeps its order, and the numbers are the same."""
    count = references._MANY
    shuffled = np.random.default_rng(0).permutation(count)
    weights = [onnx.numpy_helper.from_array(np.float32([1 + i / count]), f"w{i}") for i in map(int, shuffled)]
    nodes = [helper.make_node("Mul", [f"v{i}", f"w{i}"], [f"v{i + 1}"]) for i in range(count)]
    ends = [helper.make_tensor_value_info(f"v{i}", TensorProto.FLOAT, [1]) for i in (0, count)]
    graph = helper.make_graph(nodes, "many", ends[:1], ends[1:], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = load(proto)
    order = [t.name for t in referring(model)[0].graph.initializer]
    assert order == ["w0", *(f"w{i}" for i in range(count - 1, 0, -1))]
    assert [t.name for t in to_proto(model).graph.initializer] == [f"w{i}" for i in shuffled]
    fed = {"v0": np.float32([1e-30])}
    ours, runtime = Session(model, optimize=False).run(fed), Session(proto, optimize=False).run(fed)
    np.testing.assert_array_equal(ours[f"v{count}"], runtime[f"v{count}"])
