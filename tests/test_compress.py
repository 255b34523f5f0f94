"""graphopt compress and unpack: what a user sees of them, weights larger than memory, packages."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import DEMO, MODELS, ROOT, contents, run_cli
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.base import Context
from graphopt.cli._progress import Progress
from graphopt.cli.compress import FORMATS as OFFERED
from graphopt.compression import HALF
from graphopt.external import mapped_file
from graphopt.model import load
from graphopt.package import MAGIC, segments
from graphopt.pages import let_go
from graphopt.passes._formats import FORMATS
from graphopt.recipe import Recipe
from graphopt.registry import create
from graphopt.search.bits import Move, _hull, assigned, for_budget, for_size
from graphopt.session import Session
from graphopt.spill import Spill

sys.path.insert(0, str(ROOT))
from tools import decoder

DIGITS = DEMO / "digits.onnx"
EVALUATION = DEMO / "evaluation.npz"


@pytest.fixture
def big(workplace: Path) -> Path:
    """A decoder with 8 MB of weights in a data file."""
    decoder.make(Path("big.onnx"), 8_000_000, hidden=384, vocabulary=1001)
    return Path("big.onnx")


def feeds() -> dict[str, np.ndarray]:
    return {"ids": np.arange(12, dtype=np.int64).reshape(2, 6)}


def sqnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(np.square(a).sum() / np.square(a - b).sum()))


# The verb


def test_the_formats_offered_are_those_there_are() -> None:
    assert set(OFFERED) == {*FORMATS, "keep", "auto", HALF}


@pytest.mark.parametrize(
    ("form", "ratio", "least"), [("int8", 0.5, 0.94), ("uint4", 0.45, 0.8), ("palette8", 0.5, 0.94)]
)
def test_a_model_becomes_smaller_and_does_its_job(form: str, ratio: float, least: float, workplace: Path) -> None:
    arguments = ["--eval-data", EVALUATION, "--metric", "accuracy", "--time", "0.1", "--json"]
    ran = run_cli("compress", DIGITS, "-o", "out.onnx", "--weights", form, *arguments)
    assert ran.code == 0, ran.err
    report = ran.json
    assert report["output"]["bytes"] == Path("out.onnx").stat().st_size < ratio * DIGITS.stat().st_size
    assert report["metric"]["candidate"] >= least
    assert report["latency_ratio"]["median"] > 0
    told = [note for note in report["notes"] if "decoded when the model is loaded" in note]
    assert told, "which weights only get smaller in the file is said"
    assert any(re.search("runs (faster|slower) here|only shrinks", note) for note in report["notes"])


def product(kind: Any, opset: int) -> onnx.ModelProto:
    """MatMul by 64 x 64 weights."""
    code = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", code, ["n", 64])],
        [helper.make_tensor_value_info("y", code, ["n", 64])],
        [numpy_helper.from_array(np.random.default_rng(0).normal(size=(64, 64)).astype(kind), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=6)


def test_an_old_model_is_raised_to_what_the_format_needs(workplace: Path) -> None:
    onnx.save(product(np.float32, 11), "old.onnx")
    ran = run_cli("compress", "old.onnx", "-o", "out.onnx", "--weights", "int4", "--time", "0", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["output"]["opset"] == 21
    assert [e["status"] for e in ran.json["ledger"] if e["pass"] == "upgrade-opset"] == ["changed"]


def test_where_nothing_shrinks_nothing_is_written(workplace: Path, untouched: Any) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "relu.onnx")
    onnx.save(product(np.float16, 17), "half.onnx")
    with untouched(Path()):
        ran = run_cli("compress", "relu.onnx", "-o", "out.onnx", "--time", "0")
        assert ran.code == 3
        assert "has no weights" in ran.err
        ran = run_cli("compress", "half.onnx", "-o", "out.onnx", "--weights", "fp16", "--time", "0")
        assert ran.code == 3
        assert "already" in ran.err


def test_a_second_time_there_is_nothing_left(workplace: Path) -> None:
    assert run_cli("compress", MODELS / "encoder.onnx", "-o", "a.onnx", "--time", "0").code == 0
    ran = run_cli("compress", "a.onnx", "-o", "b.onnx", "--time", "0")
    assert ran.code == 3
    assert not Path("b.onnx").exists()


def test_a_kernel_is_for_what_it_multiplies(workplace: Path) -> None:
    ran = run_cli("compress", DIGITS, "-o", "o.onnx", "--weights", "int8", "--kernel", "ort")
    assert ran.code == 2
    assert "--weights int4 or uint4" in ran.error


def test_gates_hold_it(workplace: Path) -> None:
    ran = run_cli("compress", DIGITS, "-o", "o.onnx", "--weights", "int4", "--min-sqnr", "60", "--time", "0")
    assert ran.code == 1
    assert not Path("o.onnx").exists()
    ran = run_cli("compress", DIGITS, "-o", "o.onnx", "--max-size", "0.01", "--time", "0")
    assert ran.code == 1


def test_it_is_a_pass_of_a_recipe(workplace: Path) -> None:
    text = f'model = "{DIGITS}"\noutput = "o.onnx"\n\n[[pass]]\nuse = "compress-weights"\nformat = "int8"\n'
    Path("r.toml").write_text(text + 'exclude = ["/head/Gemm"]\n')
    ran = run_cli("run", "r.toml", "--time", "0", "--json")
    assert ran.code == 0, ran.err
    entry = ran.json["ledger"][-1]
    assert entry["contract"] == "approximate"
    assert entry["options"] == {"exclude": ["/head/Gemm"]}
    assert Recipe is not None


def test_the_callers_model_is_not_touched() -> None:
    proto = onnx.load(DIGITS)
    before = proto.SerializeToString()
    assert graphopt.compress(proto, weights="palette4", time=0).model.ByteSize() < len(before)
    assert proto.SerializeToString() == before


def test_data_makes_outputs_closer_where_the_weights_are_not() -> None:
    options: dict[str, Any] = {"weights": "uint4", "eval_data": EVALUATION, "time": 0, "verify": "off"}
    calibration = DEMO / "calibration.npz"
    plain, data = (
        graphopt.compress(DIGITS, data=calibration, rounding=rounding, **options).report
        for rounding in ("fitted", "auto")
    )
    entries = [report["ledger"][-1]["metrics"] for report in (plain, data)]
    assert entries[0]["weights_rounded_for_output"] == 0 < entries[1]["weights_rounded_for_output"]
    assert entries[0]["weight_sqnr_db"] > entries[1]["weight_sqnr_db"]
    closeness = [report["comparison"]["outputs"][0]["sqnr_db"] for report in (plain, data)]
    assert closeness[1] > closeness[0] + 2


# Formats chosen for each weight


def test_a_size_is_kept_to_with_the_least_damage(workplace: Path) -> None:
    ran = run_cli(
        "compress", DIGITS, "-o", "o.onnx", "--size", "0.22", "--eval-data", EVALUATION, "--time", "0", "--json"
    )
    assert ran.code == 0, ran.err
    report = ran.json
    assert 0.18 < report["output"]["bytes"] / report["input"]["bytes"] <= 0.22
    assert len(report["ledger"][-1]["metrics"]["formats"]) > 1
    assert any("least damage per byte" in note for note in report["notes"])
    plain = graphopt.compress(DIGITS, weights="uint4", eval_data=EVALUATION, time=0, verify="off").report
    closeness = [r["comparison"]["outputs"][0]["sqnr_db"] for r in (report, plain)]
    assert closeness[0] > closeness[1] + 3
    ran = run_cli("compress", DIGITS, "-o", "p.onnx", "--size", "0.01", "--time", "0")
    assert ran.code == 3
    assert "the smallest formats leave" in ran.err


def test_a_budget_is_kept_to_with_the_least_size(workplace: Path) -> None:
    made = {}
    for least in (20, 40):
        options: dict[str, Any] = {"eval_data": EVALUATION, "samples": 40, "time": 0, "verify": "off"}
        report = graphopt.compress(DIGITS, weights="auto", min_sqnr=least, **options).report
        assert report["comparison"]["outputs"][0]["sqnr_db"] >= least
        made[least] = report["output"]["bytes"]
    assert made[20] < made[40] < DIGITS.stat().st_size
    with pytest.raises(graphopt.NothingDone, match="within the budget"):
        graphopt.compress(DIGITS, weights="auto", min_sqnr=300, **options)


def test_the_opset_is_not_raised_where_that_costs_more_than_four_bits_save() -> None:
    """Attributes that become inputs of hundreds of nodes outweigh half a byte for each of 4,096 weights."""
    proto = product(np.float32, 17)
    rng = np.random.default_rng(0)
    samples = [{"x": rng.normal(size=(2, 64)).astype(np.float32)} for _ in range(8)]
    options: dict[str, Any] = {"weights": "auto", "min_sqnr": 5, "eval_data": samples, "time": 0, "verify": "off"}
    assert graphopt.compress(proto, **options).report["output"]["opset"] == 21
    last = "y"
    for i in range(200):
        proto.graph.node.append(helper.make_node("ReduceMean", [last], [f"r{i}"], axes=[i % 2], keepdims=1))
        last = f"r{i}"
    proto.graph.output.append(helper.make_tensor_value_info(last, TensorProto.FLOAT, None))
    report = graphopt.compress(proto, **options).report
    assert report["output"]["opset"] < 18
    assert set(report["ledger"][-1]["metrics"]["formats"]) == {"int8"}


def test_steps_are_taken_cheapest_first_and_stop_where_they_must() -> None:
    steps = [Move("a", "fp16", 100, 0.0), Move("b", "fp16", 50, 0.1), Move("a", "int8", 50, 1.0)]
    assert assigned(steps) == ("a=int8", "b=fp16")
    assert for_size(steps, 400, 400) == []
    assert for_size(steps, 400, 260) == steps[:2]
    assert for_size(steps, 400, 199) is None
    assert for_budget(steps, lambda some: len(some) <= 1) == steps[:1]
    assert for_budget(steps, lambda some: False) == []
    weight = SimpleNamespace(value=SimpleNamespace(name="w"), tensor=SimpleNamespace(nbytes=400))
    hull = _hull(weight, [("fp16", 200, 0.5), ("int8", 100, 0.1), ("uint4", 60, 9.0)])  # type: ignore[arg-type]
    assert [(m.form, m.saved) for m in hull] == [("int8", 300), ("uint4", 40)], "no step is worse than one behind it"


# Weights larger than memory


def test_streamed_is_what_is_made_in_memory(big: Path) -> None:
    for form, kernel in (("uint4", "standard"), ("int8", "standard"), ("palette4", "standard"), ("int4", "ort")):
        how = ["--weights", form, "--kernel", kernel, "--memory", "1"]
        streamed = run_cli("compress", big, "-o", "s.onnx", *how, "--json")
        assert streamed.code == 0, streamed.err
        assert any("neither model was run" in note for note in streamed.json["notes"])
        assert streamed.json["comparison"] is None
        whole = graphopt.compress(onnx.load(big), weights=form, kernel=kernel, time=0, verify="off").model
        assert any(node.op_type == "MatMulNBits" for node in whole.graph.node) == (kernel == "ort")
        given = feeds()
        wanted = Session(load(big), threads=1).run(given)["logits"]
        found = Session(load("s.onnx"), threads=1).run(given)["logits"]
        assert np.array_equal(Session(whole, threads=1).run(given)["logits"], found)
        assert sqnr(wanted, found) > {"uint4": 8, "int4": 6, "palette4": 6}.get(form, 25)


def test_files_are_aligned_whole_and_none_is_left_over(big: Path) -> None:
    source = contents(Path())
    for _ in range(2):
        assert run_cli("compress", big, "-o", "s.onnx", "--weights", "int4", "--memory", "1").code == 0
        made = sorted(p.name for p in Path().glob("s.onnx*"))
        assert len(made) == 2
    data = next(Path().glob("s.onnx.*.data"))
    end = 0
    for tensor in onnx.load("s.onnx", load_external_data=False).graph.initializer:
        entries = {e.key: e.value for e in tensor.external_data}
        if entries:
            offset, length = int(entries["offset"]), int(entries["length"])
            assert offset % (4096 if length >= 65536 else 64) == 0
            assert end <= offset < end + 4096
            end = offset + length
    assert data.stat().st_size == end
    assert {k: v for k, v in contents(Path()).items() if k in source} == source
    # In place: the pair is replaced, and ours alone are taken away.
    assert run_cli("compress", "s.onnx", "-o", "s.onnx", "--weights", "int8", "--memory", "1").code == 3
    assert sorted(p.name for p in Path().glob("s.onnx*")) == made


def test_the_scratch_file_goes_with_the_model(big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    result = graphopt.compress(big, weights="int4", memory=1)
    assert any(mapped_file(v.const_value) for v in result.ir_model.graph.initializers.values())
    assert len(list(scratch.iterdir())) == 1
    result.save("out.onnx")
    del result
    import gc

    gc.collect()
    assert not list(scratch.iterdir())


def test_memory_does_not_grow_with_the_model(workplace: Path) -> None:
    code = (
        "import sys, graphopt; r = graphopt.compress(sys.argv[1], weights='int4', rounding='nearest', memory=1);"
        "r.save('o.onnx');"
        "print([l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')][0])"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    made = decoder.make(Path("m.onnx"), 200_000_000, hidden=1024, vocabulary=8000)
    done = subprocess.run(
        [sys.executable, "-c", code, "m.onnx"], capture_output=True, text=True, check=True, cwd=Path()
    )
    assert made > 160_000_000
    assert int(done.stdout) * 1024 < 300_000_000 + 3 * 8000 * 1024 * 4


def test_a_full_disk_is_told_in_one_line(big: Path, monkeypatch: pytest.MonkeyPatch, untouched: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with untouched(Path()):
        ran = run_cli("compress", big, "-o", "s.onnx", "--memory", "1")
    assert ran.code == 2
    assert "set TMPDIR" in ran.error


def test_pages_can_be_let_go_of_and_come_back(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    room = spill.room(10_000)
    room[:] = 7
    let_go(room)
    assert (room == 7).all()
    let_go(np.zeros(3))  # in memory: nothing happens
    assert Context.progress is not None


def test_progress_is_told_in_megabytes(big: Path) -> None:
    seen: list[tuple[int, int | None, str]] = []
    graphopt.compress(big, weights="int8", memory=1, progress=lambda *told: seen.append(told))
    moved = [(done, total) for done, total, what in seen if what == "compressing (MB)"]
    assert moved[-1][0] == moved[-1][1]
    assert moved[-1][0] > 5


def test_progress_shows_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with Progress() as progress:
        for done in range(8):
            progress(50 * done, 400, "compressing (MB)")
            time.sleep(0.15)
    assert re.search(r"\d+/400 at \d+ MB/s +.*\d:\d\d:\d\d", re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue()))


def test_an_interrupt_leaves_the_old_files(workplace: Path, untouched: Any) -> None:
    """In the middle of it, weights being written to the scratch file: the old pair stays, nothing else is left."""
    decoder.make(Path("m.onnx"), 120_000_000, hidden=1024, vocabulary=8000)
    decoder.make(Path("o.onnx"), 1, hidden=64, vocabulary=100)
    scratch = Path("scratch")
    scratch.mkdir()
    # A background job of a shell ignores SIGINT, and so would the child; what has a handler here is default there.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with untouched(Path()):
        process = subprocess.Popen(
            [sys.executable, "-m", "graphopt", "compress", "m.onnx", "-o", "o.onnx", "--memory", "1"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(scratch.absolute()), "PYTHONPATH": str(ROOT)},
        )
        deadline = time.monotonic() + 60
        while not any(p.stat().st_size > 1_000_000 for p in scratch.rglob("*.data")):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.splitlines() == ["error: interrupted; nothing was written"]


@pytest.mark.parametrize("place", ["os.fsync", "pathlib.Path.replace"])
def test_an_interrupt_while_it_is_written_leaves_the_old_files(
    place: str, big: Path, monkeypatch: pytest.MonkeyPatch, untouched: Any
) -> None:
    assert run_cli("compress", big, "-o", "s.onnx", "--memory", "1").code == 0
    with untouched(Path()):
        for after in range(2):  # the data file's turn, then the model's
            with monkeypatch.context() as patch:
                patch.setattr(place, _interrupting(place, after))
                assert run_cli("compress", big, "-o", "s.onnx", "--memory", "1", "--weights", "uint4").code == 130


def _interrupting(place: str, after: int) -> Any:
    """What stands at ``place``, interrupted at the call after so many."""
    module, _, name = place.rpartition(".")
    owner = os if module == "os" else Path
    real, calls = getattr(owner, name), []

    def called(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*arguments)

    return called


def test_raising_the_opset_needs_no_weights(big: Path) -> None:
    from graphopt.manager import PassManager

    model = load(big)
    upgraded = PassManager([create("upgrade-opset", {"to": 21})], verify="off").run(model)
    assert upgraded.ledger[0].status == "changed"
    assert [v.name for v in upgraded.model.graph.inputs] == ["ids"]
    assert all(mapped_file(v.const_value) for n, v in upgraded.model.graph.initializers.items() if n == "head")
    a, b = (Session(m, threads=1).run(feeds())["logits"] for m in (model, upgraded.model))
    assert np.array_equal(a, b)


# Packages


@pytest.fixture(autouse=True)
def _zstandard(request: pytest.FixtureRequest) -> None:
    if "pack" in request.node.name:
        pytest.importorskip("zstandard")


def test_a_package_comes_back_bit_by_bit(workplace: Path) -> None:
    ran = run_cli("compress", DIGITS, "-o", "k.gopt", "--weights", "keep", "--package", "--json")
    assert ran.code == 0, ran.err
    packed = ran.json["package"]
    assert packed["packed_bytes"] == Path("k.gopt").stat().st_size == ran.json["output"]["bytes"]
    assert packed["bytes"] == DIGITS.stat().st_size > packed["packed_bytes"]
    assert 0.8 * packed["packed_bytes"] < packed["shannon_bytes"] < 1.1 * packed["packed_bytes"]
    assert run_cli("unpack", "k.gopt", "-o", "k.onnx").code == 0
    assert Path("k.onnx").read_bytes() == DIGITS.read_bytes()


def test_shuffling_packs_better(workplace: Path) -> None:
    import zstandard

    noise = np.random.default_rng(0).normal(size=(300, 300)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 300])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 300])],
        [numpy_helper.from_array(noise, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "m.onnx")
    plain = len(zstandard.ZstdCompressor(level=9).compress(Path("m.onnx").read_bytes()))
    assert run_cli("compress", "m.onnx", "-o", "m.gopt", "--weights", "keep", "--package").code == 0
    assert Path("m.gopt").stat().st_size < 0.95 * plain
    assert [s.width for s in segments(Path("m.onnx"), Path("m.onnx"))] == [1, 4, 1]


def test_weights_in_a_data_file_are_packed_with_it(big: Path) -> None:
    ran = run_cli("compress", big, "-o", "b.gopt", "--weights", "int8", "--memory", "1", "--package", "--json")
    assert ran.code == 0, ran.err
    assert len(ran.json["package"]["files"]) == 2
    Path("there").mkdir()
    done = run_cli("unpack", "b.gopt", "-o", "there/m.onnx", "--json")
    assert done.code == 0, done.err
    assert len(done.json["files"]) == 2
    graphopt.compress(big, weights="int8", memory=1).save("b.gopt.onnx")
    for name in ran.json["package"]["files"][1:]:
        assert (Path("there") / name).read_bytes() == Path(name).read_bytes()
    assert np.isfinite(Session(load("there/m.onnx"), threads=1).run(feeds())["logits"]).all()


def test_a_damaged_package_is_refused(workplace: Path, untouched: Any) -> None:
    assert run_cli("compress", DIGITS, "-o", "k.gopt", "--weights", "keep", "--package").code == 0
    good = Path("k.gopt").read_bytes()
    size = int.from_bytes(good[len(MAGIC) : len(MAGIC) + 4], "little")
    manifest = json.loads(good[len(MAGIC) + 4 : len(MAGIC) + 4 + size])

    def with_manifest(value: Any) -> bytes:
        data = json.dumps(value).encode()
        return MAGIC + len(data).to_bytes(4, "little") + data + good[len(MAGIC) + 4 + size :]

    segment = manifest[0]["segments"]
    bad = {
        "flipped": good[:2000] + bytes([good[2000] ^ 1]) + good[2001:],
        "cut": good[:-30],
        "empty": MAGIC,
        "huge": MAGIC + b"\xff\xff\xff\xff",
        "no-json": MAGIC + (4).to_bytes(4, "little") + b"{{{{",
        "no-list": with_manifest({"a": 1}),
        "nothing": with_manifest([]),
        "outside": with_manifest([*manifest, {"name": "../x.onnx.0123456789ab.data", "segments": []}]),
        "hidden": with_manifest([*manifest, {"name": ".bashrc", "segments": []}]),
        "negative": with_manifest([{"name": "m.onnx", "segments": [[-4, 4]]}]),
        "wide": with_manifest([{"name": "m.onnx", "segments": [[4, 0], *segment]}]),
    }
    for name, data in bad.items():
        Path("bad.gopt").write_bytes(data)
        with untouched(Path()):
            ran = run_cli("unpack", "bad.gopt", "-o", "out.onnx")
            assert ran.code == 2, name
            assert "copy the package again" in ran.error, name


def test_without_zstandard_a_package_says_what_to_install(
    workplace: Path, untouched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with untouched(Path()):
        for arguments in (["compress", DIGITS, "-o", "k.gopt", "--package"], ["unpack", DIGITS, "-o", "m.onnx"]):
            ran = run_cli(*arguments)
            assert ran.code == 2
            assert 'pip install "graphopt[package]"' in ran.error
