"""Running, tapping, timing, and what a child process may do to us: nothing."""

from __future__ import annotations

import os
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.errors import InputError, RuntimeFailure
from graphopt.isolation import in_child
from graphopt.model import load
from graphopt.session import Session, one_line
from graphopt.taps import tap_chunks
from graphopt.timing import time_models


def chain(length: int = 4, size: int = 0) -> ir.Model:
    """x[N] -> v0 -> v1 -> ... -> y, each a Relu or, with ``size``, a MatMul by a square matrix."""
    names = ["x", *(f"v{i}" for i in range(length)), "y"]
    weights = [numpy_helper.from_array(np.eye(size, dtype=np.float32), "w")] if size else []
    nodes = [helper.make_node("MatMul" if size else "Neg", [a, "w"] if size else [a], [b]) for a, b in pairwise(names)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", size] if size else ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        weights,
    )
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def blocks() -> tuple[ir.Model, dict[str, Any]]:
    """Two convolutions, so that the value between them is in the runtime's own layout."""
    rng = np.random.default_rng(0)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w1"], ["a"], pads=[1, 1, 1, 1]),
            helper.make_node("Conv", ["a", "w2"], ["b"], pads=[1, 1, 1, 1]),
            helper.make_node("GlobalAveragePool", ["b"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
            for name, shape in (("w1", (32, 3, 3, 3)), ("w2", (12, 32, 3, 3)))
        ],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    return model, {"x": rng.standard_normal((2, 3, 16, 16)).astype(np.float32)}


# Session


def test_taps_come_beside_the_outputs_or_instead_of_them() -> None:
    x = np.arange(3, dtype=np.float32)
    assert set(Session(chain(), taps=("v1", "y")).run({"x": x})) == {"v1", "y"}
    found = Session(chain(), taps=("v0", "v1"), outputs=False).run({"x": x})
    assert set(found) == {"v0", "v1"}
    np.testing.assert_array_equal(found["v1"], x)


def test_keys_that_are_no_input_are_ignored() -> None:
    x = np.ones(2, np.float32)
    np.testing.assert_array_equal(Session(chain(1)).run({"x": x, "label": np.array(3)})["y"], x)


def test_permuted_taps_are_the_same_elements_per_sample() -> None:
    model, feed = blocks()
    plain = Session(model, taps=("a", "b"), threads=1).run(feed)
    permuted = Session(model, taps=("a", "b"), threads=1, permuted=True).run(feed)
    assert set(permuted) == set(plain)
    for name, expected in plain.items():
        found = permuted[name]
        assert found.shape[0] == 2
        for a, b in zip(expected, found, strict=True):  # b has 12 channels: a padded block must not come out
            np.testing.assert_allclose(np.sort(a.ravel()), np.sort(b.ravel()), rtol=1e-5, atol=1e-5)


def test_a_model_that_does_not_load_is_one_line() -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(ir.to_proto(chain()))
    broken.graph.node[0].op_type = "Nonsense"
    with pytest.raises(RuntimeFailure, match="cannot load the model") as caught:
        Session(broken)
    assert "\n" not in str(caught.value)


def test_an_unknown_tap_is_one_line() -> None:
    with pytest.raises(RuntimeFailure, match="cannot load the model") as caught:
        Session(chain(), taps=("nobody",))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "feed", [{}, {"x": np.ones((2, 2), np.float32)}, {"x": np.ones(2, np.int64)}, {"x": "text"}, {"x": None}]
)
def test_a_feed_that_does_not_fit_is_one_line(feed: dict[str, Any]) -> None:
    with pytest.raises(RuntimeFailure, match="cannot run the model") as caught:
        Session(chain()).run(feed)
    assert "\n" not in str(caught.value)
    assert "[ONNXRuntimeError]" not in str(caught.value)


def test_one_line_never_is_empty_or_long() -> None:
    assert one_line(ValueError()) == "ValueError"
    assert one_line(ValueError("a\n  b")) == "a b"
    assert len(one_line(ValueError("x" * 5000))) <= 300


# Taps in chunks


def test_chunks_stay_below_the_cap_and_keep_the_order() -> None:
    names = [f"v{i}" for i in range(10)]
    feed = {"x": np.ones(1000, np.float32)}
    assert tap_chunks(chain(10), names, feed) == [names]
    assert tap_chunks(chain(10), names, feed, cap=12_000) == [names[:3], names[3:6], names[6:9], names[9:]]
    assert tap_chunks(chain(10), names, feed, cap=11_999) == [names[i : i + 2] for i in range(0, 10, 2)]


def test_a_value_larger_than_the_cap_gets_a_run_of_its_own() -> None:
    feed = {"x": np.ones(1000, np.float32)}
    assert tap_chunks(chain(3), ["v0", "v1", "v2"], feed, cap=10) == [["v0"], ["v1"], ["v2"]]
    assert tap_chunks(chain(3), [], feed) == []


def test_sizes_are_in_bytes_and_a_sequence_counts_nothing() -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["d"], to=TensorProto.DOUBLE),
            helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
            helper.make_node("SequenceConstruct", ["x", "x"], ["s"]),
            helper.make_node("ConcatFromSequence", ["s"], ["y"], axis=0),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [100])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        value_info=[
            helper.make_tensor_value_info("d", TensorProto.DOUBLE, [100]),
            helper.make_tensor_value_info("h", TensorProto.FLOAT16, [100]),
            helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None),
        ],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    feed = {"x": np.ones(100, np.float32)}
    assert tap_chunks(model, ["d", "h", "s"], feed, cap=1000) == [["d", "h", "s"]]
    assert tap_chunks(model, ["d", "h", "s"], feed, cap=999) == [["d"], ["h", "s"]]


# Timing


def test_timing_is_paired_and_has_an_interval() -> None:
    sessions = {"light": Session(chain(1, 256), threads=1), "heavy": Session(chain(15, 256), threads=1)}
    feed = {"x": np.ones((64, 256), np.float32)}
    timings, ratios = time_models(sessions, [feed], rounds=20, seconds=0.3)
    assert set(timings) == {"light", "heavy"}
    assert set(ratios) == {"heavy"}
    ratio, low, high = ratios["heavy"]
    assert low <= ratio <= high
    assert 3 < ratio < 20
    for timing in timings.values():
        assert 0 < timing.low <= timing.median <= timing.high
    assert timings["light"].runs == timings["heavy"].runs >= 10


def test_a_model_against_itself_is_about_one() -> None:
    session = Session(chain(3, 256), threads=1)
    feed = {"x": np.ones((64, 256), np.float32)}
    _, ratios = time_models({"a": session, "b": session}, [feed, feed], seconds=0.3)
    assert ratios["b"][0] == pytest.approx(1.0, abs=0.25)


# A child process


def add(a: int, b: int) -> int:
    return a + b


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave() -> None:
    os._exit(7)


def hang() -> None:
    time.sleep(60)


def swell(size: int) -> int:
    return len(np.ones(size, np.uint8))


def fail(kind: str) -> None:
    if kind == "ours":
        raise InputError("no such thing; try another")
    raise ValueError("first\nsecond")


def big(size: int) -> bytes:
    return b"x" * size


def not_picklable() -> Any:
    return lambda: 0


def wander() -> str:
    os.chdir("/")
    print("noise on stdout")
    print("noise on stderr", file=sys.stderr)
    return str(Path.cwd())


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent))


def test_a_child_answers() -> None:
    assert in_child(add, 2, 3) == 5
    assert in_child(wander) == "/"


def test_a_big_result_comes_back_whole() -> None:
    assert in_child(big, 50_000_000) == b"x" * 50_000_000


@pytest.mark.parametrize(
    ("function", "arguments", "options", "message"),
    [
        (crash, (), {}, "the child process died (signal 11)"),
        (leave, (), {}, "the child process died (exit 7)"),
        (hang, (), {"timeout": 3.0}, "it took longer than 3 s and was stopped"),
        (fail, ("ours",), {}, "no such thing; try another"),
        (fail, ("theirs",), {}, "ValueError: first second"),
        (not_picklable, (), {}, "the child process died (exit 1): "),
    ],
)
def test_whatever_a_child_does_is_one_line(
    function: Any, arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    started = time.perf_counter()
    with pytest.raises(RuntimeFailure) as caught:
        in_child(function, *arguments, **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - started < 30


@pytest.mark.skipif(sys.platform != "linux", reason="address space is capped on Linux")
def test_a_child_may_not_swell() -> None:
    with pytest.raises(RuntimeFailure, match="memory"):
        in_child(swell, 3 << 30, memory=2 << 30)
    assert in_child(swell, 1 << 20, memory=2 << 30) == 1 << 20


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    in_child(add, 1, 1)
    with pytest.raises(RuntimeFailure):
        in_child(crash)
    Session(blocks()[0], taps=("a",), permuted=True)
    assert list(tmp_path.iterdir()) == []
