"""Ranges from histograms, held against the raw samples and against slow references."""

from __future__ import annotations

import time
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from graphopt.observers import OBSERVERS, clipped_share, linear_histogram, observe, quantization_sqnr
from graphopt.statistics import BIN_COUNT, ValueStatistics

Array = npt.NDArray[Any]
RNG = np.random.default_rng(7)
COUNT = 100_000
GAUSS = RNG.standard_normal(COUNT)
DISTRIBUTIONS: dict[str, Array] = {
    "gauss": GAUSS,
    "laplace": RNG.laplace(size=COUNT),
    "relu": np.maximum(GAUSS, 0),
    "negative": -np.abs(GAUSS) * 3,
    "uniform": RNG.uniform(-1, 3, COUNT),
    "sigmoid": 1 / (1 + np.exp(-3 * GAUSS)),
    "shifted": GAUSS + 20,
    "two peaks": np.where(RNG.random(COUNT) < 0.3, GAUSS * 0.1 - 6, GAUSS * 0.5 + 2),
    "heavy": RNG.standard_t(3, COUNT),
    "outlier": np.append(GAUSS, 60.0),
    "huge": GAUSS * 1e20,
    "tiny": GAUSS * 1e-25,
}


def seen(array: Array) -> ValueStatistics:
    value = ValueStatistics(np.zeros(BIN_COUNT, np.int64))
    for start in range(0, len(array), 10_000):  # small enough never to be thinned
        value.update(array[start : start + 10_000].astype(np.float32))
    return value


def rounded(array: Array, low: float, high: float, levels: int = 255) -> Array:
    """uint8 affine quantization and back, the zero point not rounded."""
    step = (high - low) / levels
    return np.clip(np.round(array / step), low / step, high / step) * step


def squared_error(array: Array, low: float, high: float) -> float:
    return float(np.sum((array - rounded(array, low, high)) ** 2))


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_range_includes_zero_and_claims_nothing_that_was_not_reached(name: str, observer: str) -> None:
    array = DISTRIBUTIONS[name].astype(np.float32)
    low, high = observe(seen(array), observer)
    assert min(float(array.min()), 0.0) <= low <= 0.0 <= high <= max(float(array.max()), 0.0)
    assert low < high
    if array.min() >= 0:
        assert low == 0.0
    if array.max() <= 0:
        assert high == 0.0


def test_min_max_is_exact() -> None:
    single = GAUSS.astype(np.float32)
    assert observe(seen(GAUSS), "min-max") == (float(single.min()), float(single.max()))


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("mask", [-3.4e38, -1e32, 3.4e38])
def test_a_mask_spoils_nothing(observer: str, mask: float) -> None:
    masked = np.append(GAUSS, np.full(COUNT // 2, mask))
    assert observe(seen(masked), observer) == pytest.approx(observe(seen(GAUSS), observer), rel=0.035)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_degenerate_values(observer: str) -> None:
    assert observe(seen(np.zeros(100)), observer) == (0.0, 0.0)
    assert observe(seen(np.full(100, -0.0)), observer) == (0.0, 0.0)
    assert observe(seen(np.array([])), observer) == (0.0, 0.0)
    assert observe(seen(np.array([np.nan, np.inf])), observer) == (0.0, 0.0)
    assert observe(seen(np.full(100, 5.0)), observer) == (0.0, 5.0)
    assert observe(seen(np.full(100, -0.25)), observer) == (-0.25, 0.0)
    assert observe(seen(np.array([7.0])), observer) == (0.0, 7.0)


def test_minus_zero_is_no_negative_side() -> None:
    array = np.where(RNG.random(COUNT) < 0.5, -0.0, np.abs(GAUSS))
    assert observe(seen(array), "percentile", percentile=99) == pytest.approx((0.0, np.percentile(array, 99)), rel=0.03)


# Percentile


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 99.99])
@pytest.mark.parametrize("name", ["gauss", "laplace", "uniform", "heavy", "two peaks"])
def test_percentile_two_sided(name: str, percentile: float) -> None:
    array = DISTRIBUTIONS[name]
    expected = np.percentile(array, [(100 - percentile) / 2, 100 - (100 - percentile) / 2])
    assert observe(seen(array), "percentile", percentile=percentile) == pytest.approx(tuple(expected), rel=0.032)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 99.99])
@pytest.mark.parametrize("name", ["relu", "sigmoid", "shifted"])
def test_percentile_one_sided(name: str, percentile: float) -> None:
    array = DISTRIBUTIONS[name]
    low, high = observe(seen(array), "percentile", percentile=percentile)
    assert low == 0.0
    assert high == pytest.approx(np.percentile(array, percentile), rel=0.032)


def test_percentile_drops_an_outlier_and_100_keeps_it() -> None:
    outlier = np.append(GAUSS, 1e6)
    assert observe(seen(outlier), "percentile", percentile=99.99)[1] < 6
    assert observe(seen(outlier), "percentile", percentile=100)[1] == pytest.approx(1e6, rel=0.032)


# MSE


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_mse_is_within_two_percent_of_brute_force(name: str) -> None:
    array = DISTRIBUTIONS[name][-20_000:].astype(np.float32).astype(np.float64)
    low, high = observe(seen(array), "mse")
    smallest, largest = min(array.min(), 0.0), max(array.max(), 0.0)
    shares = np.linspace(0.02, 1, 29)
    lows = [smallest * s for s in shares] if smallest < 0 else [0.0]
    highs = [largest * s for s in shares] if largest > 0 else [0.0]
    best = min(squared_error(array, lo, hi) for lo, hi in product(lows, highs))
    assert squared_error(array, low, high) <= best * 1.02


def test_mse_keeps_an_outlier_that_carries_the_energy_and_drops_one_that_does_not() -> None:
    many = np.tile(GAUSS, 10)
    assert observe(seen(np.append(GAUSS, 1e4)), "mse")[1] == pytest.approx(1e4, rel=0.05)
    assert observe(seen(np.append(many, 20.0)), "mse")[1] < 8


# Entropy


def slow_entropy(magnitudes: Array, bins: int = 2048, levels: int = 128) -> dict[float, float]:
    """TensorRT's algorithm as the slides of GTC 2017 spell it, loop by loop: threshold -> divergence."""
    limit = float(magnitudes.max())
    histogram = np.histogram(magnitudes[magnitudes > 0], bins=bins, range=(0, limit))[0].astype(np.float64)
    found = {}
    for stop in range(levels, bins + 1, 16):
        p = list(histogram[:stop])
        p[-1] += float(histogram[stop:].sum())
        q = [0.0] * stop
        for level in range(levels):
            members = [i for i in range(stop) if i * levels // stop == level]
            mass = sum(histogram[i] for i in members)
            occupied = [i for i in members if histogram[i] > 0]
            for i in occupied:
                q[i] = mass / len(occupied)
        total_p, total_q = sum(p), sum(q)
        divergence = 0.0
        for a, b in zip(p, q, strict=True):
            if a > 0:
                divergence += a / total_p * float(np.log(a / total_p / max(b / total_q if total_q else 0.0, 1e-12)))
        found[limit * stop / bins] = divergence
    return found


@pytest.mark.parametrize("name", ["gauss", "laplace", "relu", "heavy", "sigmoid", "outlier"])
def test_entropy_against_the_slow_reference(name: str) -> None:
    array = DISTRIBUTIONS[name].astype(np.float32)
    reference = slow_entropy(np.abs(array).astype(np.float64))
    low, high = observe(seen(array), "entropy")
    threshold = max(-low, high)
    nearest = min(reference, key=lambda t: abs(t - threshold))
    # Bins 3 % wide are smoother than the reference's, so where it is nearly flat its minimum may sit elsewhere.
    best = min(reference, key=lambda t: reference[t])
    spread = max(reference.values()) - reference[best]
    assert reference[nearest] <= reference[best] + 0.05 * spread


def test_entropy_ignores_how_many_zeros_a_relu_made() -> None:
    few, many = np.append(DISTRIBUTIONS["relu"], np.zeros(10)), np.append(DISTRIBUTIONS["relu"], np.zeros(10 * COUNT))
    assert observe(seen(few), "entropy") == observe(seen(many), "entropy")


# The estimate of the noise


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("name", ["gauss", "laplace", "relu", "sigmoid", "uniform", "heavy"])
def test_the_estimated_sqnr_is_the_measured_one(name: str, observer: str) -> None:
    array = DISTRIBUTIONS[name].astype(np.float32).astype(np.float64)
    value = seen(array)
    for levels, shrink in ((255, 1.0), (255, 0.6), (127, 1.0), (15, 1.0)):
        low, high = (end * shrink for end in observe(value, observer))
        noise = np.sum((array - rounded(array, low, high, levels)) ** 2)
        measured = 10 * np.log10(np.sum(array**2) / noise)
        assert quantization_sqnr(value, low, high, levels) == pytest.approx(measured, abs=0.5)


def test_the_estimate_without_anything_to_judge_by_is_infinite() -> None:
    assert quantization_sqnr(ValueStatistics(), 0, 1) == float("inf")
    assert quantization_sqnr(seen(np.zeros(10)), 0, 0) == float("inf")


@pytest.mark.parametrize("name", [n for n in DISTRIBUTIONS if n != "relu"])
def test_the_linear_histogram_is_the_samples_own(name: str) -> None:
    array = DISTRIBUTIONS[name].astype(np.float32)
    low, high, counts = linear_histogram(seen(array))
    assert (low, high) == (array.min(), array.max())
    wanted, _ = np.histogram(array.astype(np.float64), 48, (low, high))
    assert len(counts) == 48
    # A bin of the sweep is 3 % wide, so a few elements stand one step beside where they are; none is lost.
    assert 0 <= sum(counts) - len(array) <= 48
    assert np.abs(np.cumsum(counts) - np.cumsum(wanted)).max() < 0.04 * len(array)
    assert all(counts[i] > 0 for i in np.flatnonzero(wanted) if i in (0, 47))


def test_the_zeros_of_a_relu_are_in_its_first_step() -> None:
    _, _, counts = linear_histogram(seen(DISTRIBUTIONS["relu"]))
    assert counts[0] >= (DISTRIBUTIONS["relu"] == 0).sum()


def test_histograms_of_little() -> None:
    assert linear_histogram(ValueStatistics(np.zeros(BIN_COUNT, np.int64))) == (0.0, 0.0, [])
    assert linear_histogram(seen(np.full(7, 1.3))) == (np.float32(1.3), np.float32(1.3), [7])
    low, high, counts = linear_histogram(seen(np.array([-3.4e38, -1.0, 0.5])))
    assert -1.04 < low <= -1.0, "a mask is no end of the picture"
    assert high == 0.5
    assert sum(counts) == 2


@pytest.mark.parametrize("name", [n for n in DISTRIBUTIONS if n != "outlier"])
def test_the_clipped_share_is_the_share_outside(name: str) -> None:
    array = DISTRIBUTIONS[name].astype(np.float32)
    low, high = np.quantile(array, [0.02, 0.95])
    wanted = ((array < low) | (array > high)).mean()
    assert clipped_share(seen(array), low, high) == pytest.approx(wanted, abs=0.02)
    assert clipped_share(seen(array), float(array.min()), float(array.max())) == 0


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="unknown observer 'median'; one of min-max"):
        observe(seen(GAUSS), "median")
    bare = ValueStatistics()
    bare.update(GAUSS)
    with pytest.raises(ValueError, match="needs a histogram"):
        observe(bare, "mse")
    assert observe(bare, "min-max")[0] < 0


@pytest.mark.parametrize(("observer", "limit"), [("min-max", 5), ("percentile", 5), ("mse", 5), ("entropy", 20)])
def test_hundreds_of_values_take_seconds(observer: str, limit: float) -> None:
    value = seen(DISTRIBUTIONS["heavy"])
    taken = []
    for _ in range(9):
        before = time.perf_counter()
        observe(value, observer)
        taken.append(time.perf_counter() - before)
    assert min(taken) * 1e3 < limit
