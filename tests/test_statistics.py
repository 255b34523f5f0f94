"""The sweep: the same numbers whatever the batch, the order, the chunking or the split over two sweeps."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper

from graphopt.model import load
from graphopt.session import Session
from graphopt.statistics import BIN_COUNT, SAMPLED, ValueStatistics, _stride, bin_edges, collect

Array = npt.NDArray[Any]
LIMIT = float(np.finfo(np.float32).max)


def fresh() -> ValueStatistics:
    return ValueStatistics(np.zeros(BIN_COUNT, np.int64))


def of(*parts: Array, samples: int = 1) -> ValueStatistics:
    value = fresh()
    for part in parts:
        value.update(part, samples)
    value.flush()
    return value


def counts(value: ValueStatistics) -> Array:
    assert value.histogram is not None
    value.flush()
    return value.histogram


def assert_same(a: ValueStatistics, b: ValueStatistics) -> None:
    assert (a.count, a.nonfinite, a.minimum, a.maximum) == (b.count, b.nonfinite, b.minimum, b.maximum)
    assert a.mean == pytest.approx(b.mean, rel=1e-6, abs=1e-6)
    np.testing.assert_array_equal(counts(a), counts(b))


def conv_model(channels: int = 32, kind: int = TensorProto.FLOAT) -> ir.Model:
    """x[N,3,H,W] -> Conv -> a -> Relu -> b -> Conv -> c -> MaxPool -> d, and b + c -> y; b is read three times."""
    rng = np.random.default_rng(0)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weights = {
        "w1": rng.standard_normal((channels, 3, 3, 3)) / 5,
        "w2": rng.standard_normal((channels, channels, 3, 3)) / 17,
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w1"], ["a"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("Conv", ["b", "w2"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("MaxPool", ["b"], ["d"], kernel_shape=[2, 2]),
            helper.make_node("Add", ["b", "c"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", kind, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info(name, kind, None) for name in ("y", "d")],
        [numpy_helper.from_array(w.astype(dtype), name) for name, w in weights.items()],
    )
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def images(count: int, side: int = 40, seed: int = 1) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, 3, side, side)).astype(np.float32) for _ in range(count)]


def sweep(
    model: ir.Model, batches: Sequence[Array], names: Sequence[str] = ("x", "b", "c", "y"), **options: Any
) -> Any:
    return collect(model, list(names), [{"x": b} for b in batches], threads=1, **options)


# One value


def test_every_element_lies_between_the_edges_of_its_bin() -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(9000) * 10.0 ** rng.integers(-30, 30, 9000)).astype(np.float32)
    inner, outer = bin_edges()
    for value in values[:300]:
        index = int(np.flatnonzero(counts(of(np.array([value]))))[0])
        assert abs(inner[index]) <= abs(value) <= abs(outer[index])
        assert np.sign(outer[index]) == np.sign(value)
        assert abs(outer[index]) <= abs(inner[index]) * (1 + 2**-5)
    assert counts(of(values)).sum() == values.size


@settings(deadline=None, max_examples=60)
@given(arrays(np.float32, st.integers(0, 50), elements=st.floats(width=32, allow_nan=True, allow_infinity=True)))
def test_minimum_maximum_mean_and_counts_are_those_of_the_finite_elements(array: Array) -> None:
    value = of(array)
    finite = array[np.isfinite(array)].astype(np.float64)
    assert (value.count, value.nonfinite) == (finite.size, array.size - finite.size)
    assert counts(value).sum() == finite.size
    if finite.size:
        assert (value.minimum, value.maximum) == (finite.min(), finite.max())
        assert value.mean == pytest.approx(finite.mean(), rel=1e-6, abs=1e-6 * float(np.abs(finite).max()))
    else:
        assert value.mean == 0.0
        assert value.minimum > value.maximum


@pytest.mark.parametrize("size", [100, SAMPLED, SAMPLED + 1, 10 * SAMPLED + 7])
def test_ranges_and_mean_see_all_elements_however_large(size: int) -> None:
    array = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    for index in (0, size // 2, size - 1):
        spiked = array.copy()
        spiked[index] = 1e4
        value = of(spiked)
        assert value.maximum == 1e4
        assert value.mean == pytest.approx(spiked.mean(dtype=np.float64), rel=1e-5, abs=1e-6)
        assert counts(value).sum() <= SAMPLED


def test_a_mask_spoils_nothing() -> None:
    array = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    clean, masked = of(array), of(np.append(array, np.full(3000, -LIMIT, np.float32)))
    difference = counts(masked) - counts(clean)
    assert np.count_nonzero(difference) == 1
    assert difference.sum() == 3000
    assert np.isfinite(masked.mean)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_half_and_double(dtype: type) -> None:
    array: Array = np.random.default_rng(0).standard_normal(1000).astype(dtype)
    assert_same(of(array), of(array.astype(np.float32))) if dtype is np.float16 else None
    value = of(array)
    assert value.minimum == array.min()
    assert value.mean == pytest.approx(float(array.astype(np.float64).mean()), rel=1e-5)
    assert counts(value).sum() == 1000


def test_a_double_past_float32_is_finite() -> None:
    value = of(np.array([1e300, -1e300, 1.0, np.inf]))
    assert (value.count, value.nonfinite, value.maximum) == (3, 1, 1e300)
    assert counts(value).sum() == 3


def test_scalars_and_big_endian() -> None:
    assert of(np.array(2.5, np.float32)).maximum == 2.5
    array = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    assert_same(of(array), of(array.astype(">f4")))


def test_thinning_hits_every_row_column_and_channel() -> None:
    for shape in [(96, 60, 60), (60, 60, 96), (384, 900), (900, 384), (7, 128, 512)]:
        for axis, dim in enumerate(shape):
            index = np.indices(shape)[axis]
            seen = np.unique(np.flatnonzero(counts(of(2.0 ** (index % 32).astype(np.float32)))))
            assert len(seen) == min(dim, 32), (shape, axis)


def test_the_stride_shares_no_divisor_with_the_size() -> None:
    for size in (SAMPLED + 2, 96 * 56 * 56, 3 * 224 * 224, 30030 * 16):
        assert np.gcd(_stride(size), size) == 1
        assert size / _stride(size) <= SAMPLED


def test_thinned_shares_are_those_of_the_whole() -> None:
    array = np.random.default_rng(0).standard_normal((1, 24, 200, 200)).astype(np.float32)
    inner, outer = bin_edges()
    kept = counts(of(array))
    below = kept[(np.minimum(inner, outer) < 1.0)].sum() / kept.sum()
    assert below == pytest.approx(float((array < 1.0).mean()), abs=0.015)


def test_merging_one_with_and_one_without_histogram_is_refused() -> None:
    with pytest.raises(ValueError, match="only one of the two"):
        fresh().merge(ValueStatistics())


# Whole sweeps


def test_a_sweep_sees_what_the_model_computes() -> None:
    model, batches = conv_model(), images(5)
    result = sweep(model, batches, ("x", "a", "b", "c", "d", "y"))
    assert (result.samples, result.runs) == (5, 5)
    session = Session(model, taps=("a", "b", "c"), threads=1)
    runs = [session.run({"x": b}) | {"x": b} for b in batches]
    for name, value in result.values.items():
        all_of_them = np.concatenate([r[name].reshape(-1) for r in runs])
        scale = float(np.abs(all_of_them).max())
        assert value.count == all_of_them.size
        assert value.minimum == pytest.approx(all_of_them.min(), abs=1e-5 * scale)
        assert value.maximum == pytest.approx(all_of_them.max(), abs=1e-5 * scale)
        assert value.mean == pytest.approx(all_of_them.mean(dtype=np.float64), abs=1e-5 * scale)
    assert_same(result.values["x"], of(*batches))


@pytest.mark.parametrize("channels", [5, 16, 24, 32])
def test_padded_channel_blocks_are_never_counted(channels: int) -> None:
    result = sweep(conv_model(channels), images(1), ("b", "c"))
    assert result.values["b"].count == channels * 40 * 40


@pytest.mark.parametrize("batch", [4, 16])
def test_batch_size_and_order_do_not_matter(batch: int) -> None:
    model, single = conv_model(), images(16)
    single[3][0, 1, 2, 3] = np.nan
    one = sweep(model, single)
    order = np.random.default_rng(0).permutation(16)
    stacked = [np.concatenate([single[i] for i in order[start : start + batch]]) for start in range(0, 16, batch)]
    many = sweep(model, stacked)
    assert many.samples == one.samples == 16
    assert_same(one.values["x"], many.values["x"])
    for name in ("b", "c", "y"):
        # The runtime may round a batch differently in the last bit, so some elements sit on the other side of an edge.
        a, b = one.values[name], many.values[name]
        assert (a.count, a.nonfinite) == (b.count, b.nonfinite)
        assert (a.minimum, a.maximum) == pytest.approx((b.minimum, b.maximum), rel=1e-5)
        assert a.mean == pytest.approx(b.mean, rel=1e-6, abs=1e-6)
        assert np.abs(counts(a) - counts(b)).sum() <= 1e-4 * counts(a).sum()


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_thinning_is_by_index_within_the_sample(batch: int) -> None:
    samples = np.random.default_rng(0).standard_normal((16, 3 * SAMPLED + 5)).astype(np.float32)
    samples[5, 100:300] = np.nan
    single = of(*(s[None] for s in samples))
    shuffled = samples[np.random.default_rng(1).permutation(16)]
    assert_same(single, of(*(shuffled[i : i + batch] for i in range(0, 16, batch)), samples=batch))


def test_a_merge_equals_one_sweep_over_both() -> None:
    model, batches = conv_model(), images(7)
    first, second, both = sweep(model, batches[:3]), sweep(model, batches[3:]), sweep(model, batches)
    first.merge(second)
    assert (first.samples, first.runs) == (both.samples, both.runs)
    for name, value in both.values.items():
        assert_same(first.values[name], value)


def test_chunks_give_the_same_and_progress_only_grows() -> None:
    model, batches = conv_model(), images(6)
    whole = sweep(model, batches)
    seen: list[int] = []
    chunked = sweep(model, batches, cap=300_000, progress=seen.append)
    assert chunked.samples == 6
    assert chunked.runs == 18  # b, c and y, each in a sweep of its own
    for name, value in whole.values.items():
        assert_same(chunked.values[name], value)
    assert seen == sorted(seen)
    assert seen[-1] == 6


def test_progress_counts_samples() -> None:
    seen: list[int] = []
    sweep(conv_model(), [np.concatenate(images(4))] * 3, progress=seen.append)
    assert seen == [4, 8, 12]


def test_variable_shapes() -> None:
    batches = images(2, 40) + images(2, 24) + images(1, 56)
    result = sweep(conv_model(), batches)
    assert result.values["x"].count == sum(b.size for b in batches)
    assert result.values["b"].count == 32 * sum(b.size // 3 for b in batches)


def test_ranges_only() -> None:
    model, batches = conv_model(), images(3)
    bare, full = sweep(model, batches, histograms=False), sweep(model, batches)
    for name, value in bare.values.items():
        assert value.histogram is None
        assert (value.minimum, value.maximum) == (full.values[name].minimum, full.values[name].maximum)


def test_a_half_model() -> None:
    batches = [b.astype(np.float16) for b in images(2)]
    result = sweep(conv_model(16, TensorProto.FLOAT16), batches)
    assert result.values["x"].minimum == min(b.min() for b in batches)
    assert result.values["b"].minimum == 0.0
    assert counts(result.values["b"]).sum() > 0


def test_a_double_model() -> None:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["b"]), helper.make_node("Add", ["b", "x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, ["n"])],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    result = sweep(model, [np.array([0.1, -1e200])], ("x", "b", "y"))
    assert (result.values["b"].minimum, result.values["b"].maximum) == (-2e200, 0.2)


def test_inputs_alone_need_no_run_and_nothing_needs_nothing() -> None:
    assert sweep(conv_model(), images(2), ("x",)).runs == 0
    assert sweep(conv_model(), images(2), ("x",)).samples == 2
    assert sweep(conv_model(), [], ("x", "b")).samples == 0
    assert sweep(conv_model(), images(2), ()).values == {}


def test_integers_and_empty_values_are_skipped() -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
            helper.make_node("NonZero", ["x"], ["where"]),
            helper.make_node("Compress", ["x", "none"], ["empty"], axis=1),
            helper.make_node("Add", ["x", "x"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.zeros(4, bool), "none")],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    result = sweep(model, [np.ones((2, 4), np.float32)], ("x", "i", "where", "empty", "y"))
    assert {n: v.count for n, v in result.values.items()} == {"x": 8, "i": 0, "where": 0, "empty": 0, "y": 8}


def test_memory_does_not_grow_with_the_samples() -> None:
    model = conv_model()
    peaks = []
    for count in (16, 128):
        tracemalloc.start()
        collect(model, ["b", "c"], ({"x": b} for _ in range(count) for b in images(1)), threads=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] <= peaks[0] * 1.05


def test_the_model_is_not_touched() -> None:
    model = conv_model()
    before = onnx.ModelProto.FromString(ir.to_proto(model).SerializeToString())
    sweep(model, images(1))
    assert ir.to_proto(model) == before
