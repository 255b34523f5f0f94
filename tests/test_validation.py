"""Numbers against hand calculations, and feeds that a model can take."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.errors import InputError, RuntimeFailure
from graphopt.model import load
from graphopt.probes import probes
from graphopt.session import Session
from graphopt.validation import (
    Comparison,
    OutputDifference,
    compare_sessions,
    exact_violation,
    output_noise,
    random_feeds,
    runnable,
    runnable_feeds,
    unstable,
)

ROOT = Path(__file__).resolve().parent.parent


def difference(*pairs: tuple[Any, Any]) -> OutputDifference:
    made = OutputDifference("y")
    for a, b in pairs:
        made.add(a, b)
    return made


def f32(*values: Any) -> Any:
    return np.asarray(values, np.float32)


def model_of(nodes: list[Any], inputs: list[Any], outputs: list[Any], tensors: dict[str, Any]) -> ir.Model:
    graph = helper.make_graph(
        [helper.make_node(op, i.split(), o.split(), **attributes) for op, i, o, attributes in nodes],
        "test",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()],
    )
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def test_numbers_by_hand() -> None:
    found = difference((f32([3, 4]), f32([3, 5])))
    assert found.max_abs == 1
    assert found.max_rel == 0.25
    assert found.scale == 4
    assert found.sqnr == pytest.approx(10 * math.log10(25 / 1))
    assert found.cosine == pytest.approx((9 + 20) / math.sqrt(25 * 34))
    assert found.agreement == 1
    assert found.mismatch is None
    told = found.as_dict()
    assert told["sqnr_db"] == pytest.approx(13.979, abs=1e-3)
    assert told["identical"] is False


def test_numbers_add_up_over_samples() -> None:
    found = difference((f32([1, 0], [0, 1]), f32([0, 1], [0, 1])), (f32([2, 0]), f32([2, 0])), (f32([0]), f32([0])))
    assert found.max_abs == 1
    assert found.max_rel == 1
    assert found.sqnr == pytest.approx(10 * math.log10(6 / 2))
    assert found.agreement == pytest.approx(2 / 3)  # three rows of two; the last has one value and no arg max


def test_identical_and_all_zero() -> None:
    same = difference((f32([1, 2]), f32([1, 2])))
    assert (same.max_abs, same.sqnr, same.cosine) == (0, math.inf, pytest.approx(1))
    assert same.as_dict()["identical"] is True
    assert same.as_dict()["sqnr_db"] is None
    zero = difference((f32([0, 0]), f32([0, 0])))
    assert (zero.sqnr, zero.cosine) == (math.inf, 1)
    lost = difference((f32([0, 0]), f32([0, 1])))
    assert (lost.sqnr, lost.cosine) == (-math.inf, 0)
    assert difference((f32([1, 2]), f32([0, 0]))).cosine == 0
    assert OutputDifference("y").sqnr == math.inf


def test_a_huge_value_does_not_overflow() -> None:
    mask = f32([-3.4e38, 1])
    assert difference((mask, mask)).sqnr == math.inf
    tiny, large = np.asarray([[5e-324, 1.0]]), np.asarray([[1e300, 1.0]])
    assert difference((tiny, large)).max_rel == math.inf


@pytest.mark.parametrize(
    ("a", "b", "mismatch"),
    [
        ([1, np.nan, 3], [1, np.nan, 3], False),
        ([1, np.nan, 3], [np.nan, 1, 3], True),
        ([1, np.inf, 3], [1, np.inf, 3], False),
        ([1, np.inf, 3], [1, -np.inf, 3], True),
        ([1, np.inf, 3], [1, np.nan, 3], True),
        ([1, 2, 3], [1, np.inf, 3], True),
        ([np.nan] * 3, [np.nan] * 3, False),
    ],
)
def test_nan_and_inf_by_place(a: list[float], b: list[float], mismatch: bool) -> None:
    found = difference((f32(a), f32(b)))
    assert found.mismatch == ("NaN or Inf in other places" if mismatch else None)
    assert found.max_abs == 0  # the finite rest is compared all the same
    assert math.isfinite(found.max_rel)


def test_finite_values_beside_nan_still_count() -> None:
    found = difference((f32([1, np.nan, 4]), f32([1, np.nan, 6])))
    assert (found.max_abs, found.max_rel, found.mismatch) == (2, 0.5, None)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (np.asarray([2**60], np.int64), np.asarray([2**60 + 1], np.int64), 1),
        (np.asarray([-(2**63)]), np.asarray([2**63 - 1]), 2.0**64),
        (np.asarray([2**64 - 1], np.uint64), np.asarray([0], np.uint64), 2.0**64),
        (np.asarray([-128], np.int8), np.asarray([127], np.int8), 255),
        (np.asarray([True, False]), np.asarray([True, True]), 1),
        (np.asarray([7]), np.asarray([7]), 0),
    ],
)
def test_integers_are_exact(a: Any, b: Any, expected: float) -> None:
    assert difference((a, b)).max_abs == expected
    assert difference((b, a)).max_abs == expected


@pytest.mark.parametrize(
    ("a", "b", "mismatch"),
    [
        (f32([1]), np.asarray([[1.0]]), "float64[1, 1] instead of float32[1, 1]"),
        (f32([1]), f32([1, 2]), "float32[1, 2] instead of float32[1, 1]"),
        (np.asarray(["a"], object), np.asarray(["b"], object), "values of a non-numeric output differ"),
        (np.asarray(["a"], object), np.asarray(["a"], object), None),
        ([f32([1])], [f32([1]), f32([1])], "a sequence, map or optional output has other parts"),
        ([f32([1])], f32([1]), "a sequence, map or optional output has other parts"),
        ({1: 0.5}, {2: 0.5}, "a sequence, map or optional output has other parts"),
        (None, f32([1]), "a sequence, map or optional output has other parts"),
        (None, None, None),
        ([{1: 0.5, 2: 0.25}], [{1: 0.5, 2: 0.25}], None),
        ([np.asarray(["a"], object)], [np.asarray(["b"], object)], "values of a non-numeric output differ"),
        ({"a": "x"}, {"a": "y"}, "values of a non-numeric output differ"),
        (f32(), f32(), None),
    ],
)
def test_what_is_no_difference_is_a_mismatch(a: Any, b: Any, mismatch: str | None) -> None:
    assert difference((a, b)).mismatch == mismatch


def test_parts_of_maps_and_sequences_are_numbers() -> None:
    found = difference(([{1: 0.5, 2: 0.25}], [{1: 0.5, 2: 0.75}]))
    assert found.max_abs == 0.5
    assert found.mismatch is None


def test_the_worst_output() -> None:
    good = difference((f32([1, 2]), f32([1, 2.001])))
    bad = difference((f32([1, 2]), f32([1, 3])))
    odd = difference((f32([1, 2]), f32([1])))
    noise = difference((f32([1, 2]), f32([9, 9])))
    noise.nondeterministic = True
    assert Comparison([good, bad, noise], 1).worst is bad
    assert Comparison([good, bad, noise], 1).sqnr == bad.sqnr
    assert Comparison([good, bad, odd], 1).sqnr == -math.inf
    assert Comparison([noise], 1).sqnr == math.inf
    assert Comparison([], 0).worst is None


def test_exact_violation() -> None:
    found = difference((f32([1, 2]), f32([1, 2.5])))
    assert exact_violation(Comparison([found], 1), {"y": 0.5}) is None
    assert exact_violation(Comparison([found], 1), {"y": 0.4}) == (
        "output 'y': max abs diff 0.5, the model's own noise is 0.4"
    )
    assert exact_violation(Comparison([found], 1), {}) is not None
    found.nondeterministic = True
    assert exact_violation(Comparison([found], 1), {}) is None
    odd = difference((f32([1, np.nan]), f32([np.nan, 1])))
    assert "NaN or Inf" in str(exact_violation(Comparison([odd], 1), {"y": 0.5}))
    assert exact_violation(Comparison([odd], 1), {"y": math.inf}) is None
    shape = difference((f32([1, 2]), f32([1])))
    assert exact_violation(Comparison([shape], 1), {"y": 9}) is not None


def test_noise_is_the_models_own() -> None:
    model = model_of(
        [("Mul", "x w", "y", {}), ("Cast", "y", "i", {"to": INT64}), ("Greater", "x zero", "b", {})],
        [("x", FLOAT, ["n", 2])],
        [("y", FLOAT, ["n", 2]), ("i", INT64, ["n", 2]), ("b", TensorProto.BOOL, ["n", 2])],
        {"w": f32(1e4), "zero": f32(0)},
    )
    feed = {"x": f32([0.12345, 2])}
    noise = output_noise(model, [feed], threads=1)
    moved = float(np.abs(np.nextafter(feed["x"], f32(np.inf)) * f32(1e4) - feed["x"] * f32(1e4)).max())
    assert noise["y"] == pytest.approx(4 * max(moved, 1e-6 * 2e4), rel=1e-3)
    assert noise["i"] == 0
    assert noise["b"] == 0


def test_noise_is_infinite_where_nan_moves_by_itself() -> None:
    """x - x' is zero or not by the last bit of the input; its logarithm is Inf or not."""
    model = model_of(
        [("Sub", "x one", "s", {}), ("Log", "s", "y", {})],
        [("x", FLOAT, ["n"])],
        [("y", FLOAT, ["n"])],
        {"one": f32(1)},
    )
    assert output_noise(model, [{"x": f32(1, 2)}])["y"] == math.inf
    assert output_noise(model, [{"x": f32(3, 2)}])["y"] < 1
    assert output_noise(model, [{"x": f32(3, 2)}, {"x": f32(1)}])["y"] == math.inf
    assert output_noise(model, []) == {}


def test_non_deterministic_outputs_are_found() -> None:
    model = model_of(
        [("RandomUniform", "", "r", {"shape": [1, 4]}), ("Add", "x r", "noisy", {}), ("Neg", "x", "y", {})],
        [("x", FLOAT, [1, 4])],
        [("noisy", FLOAT, [1, 4]), ("y", FLOAT, [1, 4])],
        {},
    )
    session = Session(model, threads=1)
    feed = {"x": f32([1, 2, 3, 4])}
    assert unstable(session, feed) == {"noisy"}
    comparison = compare_sessions(session, Session(model, threads=1), [feed])
    assert comparison.notes == ["output 'noisy' is non-deterministic in the original: excluded"]
    assert comparison.sqnr == math.inf
    assert [o.nondeterministic for o in comparison.outputs] == [True, False]


def test_sessions_are_compared_by_output_name() -> None:
    inputs, tensors = [("x", FLOAT, ["n", 2])], {"w": f32(2)}
    y, z = ("y", FLOAT, ["n", 2]), ("z", FLOAT, ["n", 2])
    a = model_of([("Mul", "x w", "y", {}), ("Neg", "x", "z", {})], inputs, [y, z], tensors)
    b = model_of([("Mul", "x w", "y", {}), ("Neg", "x", "z", {})], inputs, [z, y], tensors)
    c = model_of([("Mul", "x w", "y", {})], inputs, [y], tensors)
    feeds = [{"x": f32([1, 2])}, {"x": f32([3, 4], [5, 6])}]
    assert compare_sessions(Session(a), Session(b), feeds).sqnr == math.inf
    found = compare_sessions(Session(a), Session(c), feeds)
    assert [o.mismatch for o in found.outputs] == [None, "the output is gone"]
    assert found.samples == 2
    assert compare_sessions(Session(a), Session(b), feeds, limit=1).samples == 1
    assert [o.name for o in compare_sessions(Session(a), Session(c), feeds, output_names=["y"]).outputs] == ["y"]


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in (ROOT / "fixtures" / "models").glob("*.onnx") if p.stem != "custom")
)
def test_random_feeds_run_on_every_fixture(name: str) -> None:
    model = load(ROOT / "fixtures" / "models" / f"{name}.onnx")
    session = Session(model, threads=1)
    for feed in random_feeds(model, 3, seed=1):
        session.run(feed)
    first, again, other = random_feeds(model, 1), random_feeds(model, 1), random_feeds(model, 1, seed=5)
    assert all(np.array_equal(first[0][k], again[0][k]) for k in first[0])
    assert any(not np.array_equal(first[0][k], other[0][k]) for k in first[0])


def test_ids_stay_within_their_table_and_masks_are_masks() -> None:
    model = load(ROOT / "fixtures" / "models" / "encoder.onnx")
    feeds = random_feeds(model, 200)
    ids = np.concatenate([f["input_ids"] for f in feeds])
    assert ids.min() >= 0
    assert ids.max() == 199  # the whole table is used, and no more
    assert set(np.unique(np.concatenate([f["attention_mask"] for f in feeds]))) == {0, 1}
    assert [f["input_ids"].shape for f in random_feeds(model, 1, batch=3)] == [(3, 8)]


@pytest.mark.parametrize(
    "between",
    [
        [],
        [("Cast", "ids", "c", {"to": TensorProto.INT32})],
        [("Unsqueeze", "ids axes", "u", {}), ("Cast", "u", "c", {"to": INT64}), ("Squeeze", "c axes", "s", {})],
        [("Identity", "ids", "c", {}), ("Transpose", "c", "t", {}), ("Reshape", "t flat", "r", {})],
    ],
)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_the_table_is_found_behind_what_leaves_values_alone(between: list[Any], axis: int) -> None:
    last = between[-1][2] if between else "ids"
    model = model_of(
        [*between, ("Gather", f"table {last}", "y", {"axis": axis})],
        [("ids", INT64, ["n"])],
        [("y", FLOAT, None)],
        {"table": np.zeros((3, 2) if axis == 0 else (2, 3), np.float32), "axes": [0], "flat": [-1]},
    )
    for feed in random_feeds(model, 50, batch=6):
        assert feed["ids"].shape == (6,)
        assert feed["ids"].max() < 3
        Session(model, threads=1).run(feed)


def test_the_smallest_of_two_tables_counts_and_a_computed_table_too() -> None:
    model = model_of(
        [("Gather", "large ids", "a", {}), ("Gather", "small ids", "b", {}), ("Neg", "a", "y", {})],
        [("ids", INT64, ["n"]), ("small", FLOAT, [2, 5])],
        [("y", FLOAT, None), ("b", FLOAT, None)],
        {"large": np.zeros((50, 2), np.float32)},
    )
    assert {int(f["ids"].max()) for f in random_feeds(model, 30)} == {0, 1}


def test_float_masks_are_zero_or_one_and_overridable_masks_are_no_inputs() -> None:
    model = model_of(
        [("Mul", "x attention_mask", "m", {}), ("Add", "m mask_bias", "y", {})],
        [("x", FLOAT, ["n", 4]), ("attention_mask", FLOAT, ["n", 4]), ("mask_bias", FLOAT, [4])],
        [("y", FLOAT, ["n", 4])],
        {"mask_bias": f32(1, 2, 3, 4)},
    )
    feeds = random_feeds(model, 20)
    assert set(np.unique([f["attention_mask"] for f in feeds])) == {0, 1}
    assert all(f.keys() == {"x", "attention_mask"} and f["attention_mask"].dtype == np.float32 for f in feeds)


def test_a_second_batch_size_goes_wherever_its_name_stands() -> None:
    model = model_of(
        [("Neg", "x", "y", {}), ("Neg", "state", "z", {}), ("Neg", "fixed", "w", {})],
        [("x", FLOAT, ["batch", 4]), ("state", FLOAT, [2, "batch", 5]), ("fixed", FLOAT, [1, "steps"])],
        [("y", FLOAT, None), ("z", FLOAT, None), ("w", FLOAT, None)],
        {},
    )
    (feed,) = random_feeds(model, 1, batch=3)
    assert {k: v.shape for k, v in feed.items()} == {"x": (3, 4), "state": (2, 3, 5), "fixed": (1, 8)}


def test_runnable_feeds_are_of_a_size_that_the_model_takes() -> None:
    model = model_of(
        [("Reshape", "x shape", "y", {})], [("x", FLOAT, ["n", "m"])], [("y", FLOAT, None)], {"shape": [-1, 64]}
    )
    feeds = runnable_feeds(model, Session(model, threads=1))
    assert [f["x"].shape for f in feeds] == [(1, 64), (1, 64)]


def test_why_no_random_feeds_run_is_told() -> None:
    lengths = model_of(
        [("ReverseSequence", "x n", "y", {"batch_axis": 0, "time_axis": 1})],
        [("x", FLOAT, [4, 4]), ("n", INT64, [4])],
        [("y", FLOAT, None)],
        {},
    )
    with pytest.raises(RuntimeFailure, match="Invalid sequence length"):
        runnable_feeds(lengths, Session(lengths, threads=1), seed=3)


def test_many_symbolic_dims_do_not_fill_the_memory() -> None:
    model = model_of([("Neg", "x", "y", {})], [("x", FLOAT, ["a", "b", "c", "d", "e"])], [("y", FLOAT, None)], {})
    with pytest.raises(InputError, match="16777216 elements"):
        random_feeds(model, 1, size=64)
    assert random_feeds(model, 1)[0]["x"].shape == (1, 8, 8, 8, 8)


def test_runnable() -> None:
    assert runnable(load(ROOT / "fixtures" / "models" / "half.onnx")) is None
    assert "MysteryOp" in str(runnable(load(ROOT / "fixtures" / "models" / "custom.onnx")))


def test_no_zero_is_drawn_for_what_the_runtime_divides_by_without_a_look() -> None:
    """STFT of frames without length: ONNX Runtime 1.32 ends the process by a signal (found by the conformance run)."""
    info = helper.make_tensor_value_info
    inside = helper.make_function(
        "mine", "Spectrum", ["a", "s", "n"], ["y"], [helper.make_node("STFT", ["a", "s", "", "n"], ["y"])],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("Spectrum", ["a", "s", "n"], ["y"], domain="mine")],
        "g",
        [info("a", TensorProto.FLOAT, [1, 64, 1]), *(info(name, TensorProto.INT64, []) for name in "sn")],
        [info("y", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    model = load(helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=[inside]))
    for feed in random_feeds(model, 50, seed=0):
        assert feed["n"] >= 1
    for feeds in probes(model, random_feeds(model, 1, seed=0)[0], seed=1):
        assert all(feed["n"] >= 1 for feed in feeds)
