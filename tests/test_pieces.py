"""Models larger than memory: run in pieces, read without keeping, and how little the verbs take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import DEMO, MODELS, ROOT, run_cli
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt import pieces, session
from graphopt.errors import RuntimeFailure
from graphopt.external import mapped_file
from graphopt.model import interface, load, tensor_buffer
from graphopt.pages import hashed, let_go
from graphopt.pieces import Pieces
from graphopt.session import Session, _inference_session, _session_options
from graphopt.validation import random_feeds

sys.path.insert(0, str(ROOT))
from tools import decoder
from tools.bench.memory import arguments, watched


def in_pieces(proto: onnx.ModelProto, piece: int = 1) -> Pieces:
    """Cut wherever it can be, without the runtime's optimizations: nothing is fused, so nothing may differ."""
    options = _session_options(optimize=False, threads=1, sizes_first=False)
    return Pieces(proto, lambda model: _inference_session(model, options), piece)


@pytest.mark.parametrize(
    "name", ["encoder", "control", "lstm", "shared", "half", "convtranspose", "fakequant", "digits"]
)
def test_pieces_compute_what_the_whole_computes(name: str) -> None:
    path = DEMO / "digits.onnx" if name == "digits" else MODELS / f"{name}.onnx"
    model, proto = load(path), onnx.load(path)
    whole, cut = Session(model, optimize=False, threads=1), in_pieces(onnx.load(path))
    assert len(cut) > 1
    assert [v.name for v in cut.get_inputs()] == [v.name for v in interface(model)[0]]
    for feed in random_feeds(model, 2, seed=0):
        wanted = whole.run(feed)
        found = dict(zip(wanted, cut.run(list(wanted), feed), strict=True))
        for output, value in wanted.items():
            # The runtime computes float16 in float32 here, and a cut rounds what it hands on.
            allowed = 3e-3 if value.dtype == np.float16 else 0
            assert np.allclose(value, found[output], atol=allowed, rtol=allowed, equal_nan=True), output
    assert proto == onnx.load(path)


def graph(nodes: list[Any], weights: dict[str, np.ndarray], outputs: dict[str, list[int | str]]) -> onnx.ModelProto:
    """A model of one input x[n, 8]."""
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in outputs.items()],
        [numpy_helper.from_array(w, k) for k, w in weights.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_what_bodies_read_is_handed_on_and_outputs_may_be_weights() -> None:
    rng = np.random.default_rng(0)
    square = {f"w{i}": rng.normal(size=(8, 8)).astype(np.float32) for i in range(3)}
    then, other = (
        helper.make_graph(
            [helper.make_node("MatMul", ["a", weight], [f"{weight}_out"])],
            weight,
            [],
            [helper.make_tensor_value_info(f"{weight}_out", TensorProto.FLOAT, ["n", 8])],
        )
        for weight in ("w1", "w2")
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"]),
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Less", ["s", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other),
    ]
    proto = graph(nodes, {**square, "zero": np.float32(0)}, {"y": ["n", 8], "w0": [8, 8]})  # type: ignore[dict-item]
    cut = in_pieces(proto)
    for x in (np.ones((2, 8), np.float32), -np.ones((3, 8), np.float32)):
        y, w = cut.run(["y", "w0"], {"x": x})
        chosen = square["w1"] if x.sum() < 0 else square["w2"]
        assert np.allclose(y, x @ square["w0"] @ chosen, atol=1e-5)
        assert np.array_equal(w, square["w0"])


def test_a_cut_never_parts_a_weight_from_what_decodes_it() -> None:
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {}
    decode, multiply = [], []
    for i in range(4):
        weights |= {f"q{i}": rng.integers(-9, 9, (8, 8)).astype(np.int8), f"s{i}": np.float32(0.1)}  # type: ignore[dict-item]
        decode.append(helper.make_node("DequantizeLinear", [f"q{i}", f"s{i}"], [f"w{i}"]))
        multiply.append(helper.make_node("MatMul", [f"m{i}" if i else "x", f"w{i}"], [f"m{i + 1}"]))
    cut = in_pieces(graph(decode + multiply, weights, {"m4": ["n", 8]}))
    assert len(cut) == 8, "the scale of each is a weight too"
    handed = {name for piece in cut._pieces for name in piece.reads}
    assert handed & {f"w{i}" for i in range(4)} == set() or all(len(p.nodes) == 1 for p in cut._pieces)
    cut = in_pieces(graph(decode + multiply, weights, {"m4": ["n", 8]}), 100)
    assert [len(piece.nodes) for piece in cut._pieces] == [2, 2, 2, 2]
    assert {name for piece in cut._pieces for name in piece.reads} == {"x", "m1", "m2", "m3"}


def test_what_is_no_tensor_cannot_be_handed_on() -> None:
    weights = {"a": np.ones(8, np.float32), "b": np.ones(8, np.float32)}
    nodes = [
        helper.make_node("Add", ["x", "a"], ["m"]),
        helper.make_node("SequenceConstruct", ["m", "m"], ["s"]),
        helper.make_node("ConcatFromSequence", ["s"], ["c"], axis=0),
        helper.make_node("Add", ["c", "b"], ["y"]),
    ]
    proto = graph(nodes, weights, {"y": ["k", 8]})
    assert in_pieces(proto).run(["y"], {"x": np.ones((1, 8), np.float32)})[0].shape == (2, 8)


@pytest.fixture
def big(workplace: Path) -> Path:
    """A decoder with 8 MB of weights in a data file."""
    decoder.make(Path("big.onnx"), 8_000_000, hidden=384, vocabulary=1001)
    return Path("big.onnx")


def test_only_what_is_large_and_in_a_file_is_cut(big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.references.BIG", 1)
    assert not isinstance(Session(load(big), threads=1)._session, Pieces)
    monkeypatch.setattr(session, "PIECE", 1 << 20)
    monkeypatch.setattr(pieces, "PIECE", 1 << 20)
    model, feed = load(big), {"ids": np.arange(6, dtype=np.int64).reshape(1, 6)}
    cut = Session(model, threads=1)
    assert isinstance(cut._session, Pieces)
    assert isinstance(Session(model, threads=1, timed=True)._session, Pieces) is False
    assert isinstance(Session(onnx.load(big), threads=1)._session, Pieces) is False
    whole = Session(onnx.load(big), threads=1)
    assert np.allclose(whole.run(feed)["logits"], cut.run(feed)["logits"], atol=1e-4)
    with pytest.raises(RuntimeFailure):
        cut.run({"ids": np.full((1, 6), 5000, np.int64)})
    # The verbs do not notice.
    ran = run_cli("optimize", big, "-o", "out.onnx", "--time", "0", "--json")
    assert ran.code == 0, ran.err
    assert [o["output"] for o in ran.json["comparison"]["outputs"]] == ["logits"]
    assert run_cli("compare", big, "out.onnx", "--min-sqnr", "90").code == 0


def test_hashing_keeps_nothing_of_a_mapped_weight(big: Path) -> None:
    tensor = load(big).graph.initializers["head"].const_value
    assert mapped_file(tensor) is not None
    buffer = tensor_buffer(tensor)
    assert isinstance(buffer, memoryview), "no copy"
    assert hashed(buffer) == hashed(bytes(buffer))
    assert hashed(b"b", b"a") == hashed(b"ab")
    let_go(np.frombuffer(buffer, np.uint8))
    assert bytes(buffer[:64]) == tensor.numpy().tobytes()[:64]


def test_what_would_fill_the_memory_is_not_timed(big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.references.BIG", 1)
    monkeypatch.setattr("graphopt.judge.total_memory", lambda: 20_000_000)
    report = graphopt.optimize(big, time=0.1).report
    assert report["latency_ratio"] is None
    assert any(note.startswith("not timed: ") for note in report["notes"])


def test_the_verbs_keep_to_the_bound(workplace: Path) -> None:
    """300 MB and three times the largest weight, whatever the model's size, which is larger here."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    made = decoder.make(Path("a.onnx"), 400_000_000, hidden=1024, vocabulary=4000)
    decoder.make(Path("b.onnx"), 400_000_000, hidden=1024, vocabulary=4000, seed=1)
    assert made > 380_000_000
    bound = 300_000_000 + 3 * 4000 * 1024 * 4
    for verb, wanted in (("inspect", 0), ("diff", 1), ("compare", 0), ("optimize", 0)):
        command = [
            sys.executable,
            "-m",
            "graphopt",
            *arguments(verb, *map(Path.absolute, map(Path, ("a.onnx", "b.onnx", "o.onnx")))),
        ]
        code, told, own, resident, _ = watched(command)
        assert code == wanted, told
        assert own < 200_000_000, verb
        assert resident < bound, f"{verb}: {resident}"
