"""Metrics, intervals and gates."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.errors import InputError
from graphopt.gates import GateResult, Metric, MetricResult, drop_gate, load_metric, measure, parse_drop, parse_size


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("1%", 0.8, 0.008),
        (" 2.5 % ", -4.0, 0.1),
        ("0.01", 0.8, 0.01),
        (".5%", 1.0, 0.005),
        ("1e-3", 0.8, 0.001),
        ("0", 0.8, 0.0),
        ("0%", 0.8, 0.0),
        ("1%", 0.0, 0.0),
        (0.01, 0.8, 0.01),
        (1e-05, 0.8, 1e-05),
    ],
)
def test_parse_drop(text: Any, reference: float, expected: float) -> None:
    assert parse_drop(text, reference) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "%", "-1%", "one", "1%%", "nan", "inf", "1 percent", "1,5%"])
def test_what_is_no_drop(text: str) -> None:
    with pytest.raises(InputError, match=r"is no drop; write 1% \(relative\) or 0.01 \(absolute\)"):
        parse_drop(text, 1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("25MB", 25_000_000),
        ("25 mb", 25_000_000),
        ("25M", 25_000_000),
        ("800kB", 800_000),
        ("800k", 800_000),
        ("1.5GiB", 1.5 * 2**30),
        ("1KiB", 1024),
        ("1Mi", 2**20),
        ("0.3", 300),
        ("1", 1000),
        ("1.0", 1000),
        ("0", 0),
        ("1B", 1),
        ("2", 2),
        ("123456", 123456),
        (0.3, 300),
        (123456, 123456),
    ],
)
def test_parse_size(text: Any, expected: float) -> None:
    assert parse_size(text, 1000) == int(expected)


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "25TB", "25 apples", "1.5", "5iB", "nan", "1e6"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="is no size"):
        parse_size(text, 1000)


# --- metrics ---


def scores(*rows: Any) -> dict[str, Any]:
    return {"logits": np.asarray(rows, np.float32), "other": np.zeros(3)}


def test_accuracy() -> None:
    metric = load_metric("accuracy")
    outputs = [scores([1, 2, 0]), scores([3, 2, 0]), scores([0, 0, 9])]
    samples = [{"label": np.asarray([1])}, {"label": np.asarray(1)}, {"labels": [2]}]
    assert metric.function(outputs, samples) == pytest.approx(2 / 3)
    batch = [scores([1, 2], [2, 1], [0, 5])]
    assert metric.function(batch, [{"y": np.asarray([1, 1, 1])}]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("output", "sample", "message"),
    [
        (scores([1, 2]), {}, "needs labels and the evaluation data has none"),
        (scores([1], [2]), {"label": [0, 1]}, r"one label for each row .* shape \[2, 1\]"),
        (scores([1, 2], [2, 1]), {"label": [0]}, r"shape \[2, 2\] and the sample 1 labels"),
        ({"y": np.float32(3)}, {"label": [0]}, r"shape \[\]"),
    ],
)
def test_accuracy_where_it_has_no_meaning(output: Any, sample: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure(load_metric("accuracy"), [output], [output], [sample])


FILE = """
from dataclasses import dataclass
from neighbour import SCALE

def score(outputs, samples):
    return SCALE * sum(float(o["y"][0]) for o in outputs) / len(outputs)

def nothing(outputs, samples):
    pass

def text(outputs, samples):
    return "good"

def raising(outputs, samples):
    raise KeyError("no such\\nlabel")

not_a_function = 3
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    folder = tmp_path / "maß stab"
    folder.mkdir()
    (folder / "metric.py").write_text(FILE)
    (folder / "neighbour.py").write_text("SCALE = 2.0\n")
    (folder / "bad.py").write_text("import no_such_module\n")
    return folder / "metric.py"


def values(*numbers: float) -> list[dict[str, Any]]:
    return [{"y": np.asarray([n])} for n in numbers]


def test_a_users_metric(module: Path) -> None:
    metric = load_metric(f"{module}:score")
    result = measure(metric, values(1, 2, 3), values(1, 2, 4), [{}] * 3)
    assert (metric.name, result.original, result.candidate) == ("score", 4.0, pytest.approx(14 / 3))
    assert result.low <= result.difference <= result.high


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("acuracy", "^unknown metric 'acuracy'; did you mean 'accuracy'"),
        ("metric.py", "^unknown metric"),
        ("FOLDER/metric.py:", "^unknown metric"),
        ("FOLDER/missing.py:score", "no such file: .*missing.py"),
        ("FOLDER/metric.py:scoer", "has no function 'scoer'"),
        ("FOLDER/metric.py:not_a_function", "'not_a_function' is a int, not a function"),
        ("FOLDER/bad.py:score", "bad.py does not import: ModuleNotFoundError"),
    ],
)
def test_a_metric_that_cannot_be_loaded(module: Path, spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_metric(spec.replace("FOLDER", str(module.parent)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "^metric 'nothing' returned None, not a number; return a float, higher is better$"),
        ("text", "^metric 'text' returned 'good', not a number"),
        ("raising", "^metric 'raising' failed: KeyError: .*label.*; fix the function$"),
    ],
)
def test_a_metric_that_fails(module: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        measure(load_metric(f"{module}:{name}"), values(1), values(1), [{}])
    assert "\n" not in str(caught.value)


def test_no_samples() -> None:
    with pytest.raises(InputError, match="no samples to be measured on"):
        measure(Metric("mean", mean), [], [], [])


# --- intervals ---


def mean(outputs: Any, samples: Any) -> float:
    return float(np.mean([o["y"][0] for o in outputs]))


def auc(outputs: Any, samples: Any) -> float:
    """Area under the curve by ranks; it has no value where there is one class only."""
    found = np.asarray([o["y"][0] for o in outputs])
    positive = np.asarray([s["label"] for s in samples], bool)
    if positive.all() or not positive.any():
        raise ValueError("one class only")
    pairs = found[positive][:, None] - found[~positive][None, :]
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def test_the_interval_of_a_mean_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits, runs, count = 0, 300, 200
    for run in range(runs):
        before = (rng.random(count) < 0.90).astype(float)
        # The candidate loses 8 % of what was right and gains 20 % of what was wrong: -0.072 + 0.020.
        flip = rng.random(count)
        after = np.where(before == 1, flip >= 0.08, flip < 0.20).astype(float)
        result = measure(Metric("mean", mean), values(*before), values(*after), [{}] * count, seed=run)
        hits += result.low <= -0.052 <= result.high
    assert 0.91 <= hits / runs <= 0.98


def test_the_interval_of_what_is_no_mean() -> None:
    rng = np.random.default_rng(1)
    hits, runs, count = 0, 40, 80
    for run in range(runs):
        label = rng.random(count) < 0.5
        hidden = rng.normal(size=count) + 1.5 * label
        outputs = [values(*(hidden + rng.normal(size=count) * noise)) for noise in (0.5, 0.5)]
        samples = [{"label": bool(x)} for x in label]
        result = measure(Metric("auc", auc), *outputs, samples, seed=run)
        assert result.resamples == 200
        hits += result.low <= 0 <= result.high  # equally noisy: the true difference is zero
    assert hits / runs >= 0.85


def test_paired_not_pooled() -> None:
    """Both models agree on everything but one sample: pairing sees that, two separate intervals would not."""
    rng = np.random.default_rng(2)
    before = (rng.random(500) < 0.8).astype(float)
    after = before.copy()
    after[np.argmax(before)] = 0
    result = measure(Metric("mean", mean), values(*before), values(*after), [{}] * 500)
    assert result.difference == pytest.approx(-0.002)
    assert -0.01 < result.low <= -0.002
    assert result.high <= 0


def test_equal_results_are_no_proof() -> None:
    """The rule of three: of n samples without one difference, up to 3/n may still differ."""
    result = measure(Metric("mean", mean), values(*[1] * 30), values(*[1] * 30), [{}] * 30)
    assert (result.difference, result.low, result.high) == (0, pytest.approx(-0.1), pytest.approx(0.1))


def test_a_metric_that_refuses_some_resamples() -> None:
    samples = [{"label": i == 0} for i in range(8)]
    outputs = values(3, 1, 2, 0.5, 0, 0.1, 0.2, 0.3)
    result = measure(Metric("auc", auc), outputs, outputs, samples)
    assert (result.original, result.difference) == (1.0, 0.0)
    assert 100 <= result.resamples < 200  # (7/8)^8 of them have no positive
    lone = measure(Metric("auc", auc), outputs[:2], outputs[:2], samples[:2], seed=3)
    assert (math.isnan(lone.low), lone.resamples < 200) == (lone.resamples < 100, True)


def test_the_seed_decides() -> None:
    rng = np.random.default_rng(3)
    a, b = values(*rng.random(50)), values(*rng.random(50))
    first, again, other = (measure(Metric("mean", mean), a, b, [{}] * 50, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first != other


# --- the gate ---


def result(low: float, difference: float, high: float, *, original: float = 0.8) -> MetricResult:
    return MetricResult("accuracy", original, original + difference, low, high, 100, 1000)


@pytest.mark.parametrize(
    ("asked", "difference", "passed"),
    [
        ("1%", -0.008, True),
        ("1%", -0.0081, False),
        ("0.01", -0.01, True),
        ("0.01", -0.011, False),
        ("0", 0.0, True),
        ("0", 0.1, True),
        ("0", -1e-6, False),
        ("1%", math.nan, False),
        (0.01, -0.005, True),
    ],
)
def test_the_gate_compares_the_estimate(asked: Any, difference: float, passed: bool) -> None:
    gate = drop_gate(asked, result(difference - 0.05, difference, difference + 0.05))
    assert gate.passed is passed
    assert gate.gate == "max-drop"
    assert "[" in gate.measured


def test_certify_compares_the_bound() -> None:
    assert drop_gate("0.01", result(-0.009, -0.005, 0.001), certify=True).passed
    gate = drop_gate("0.01", result(-0.02, -0.005, 0.001), certify=True)
    assert not gate.passed
    assert gate.measured.endswith("; cannot certify with 100 samples")
    gate = drop_gate("0.01", result(-0.04, -0.03, -0.02), certify=True)
    assert not gate.passed
    assert "cannot certify" not in gate.measured  # that is a plain no
    gate = drop_gate("0.01", result(math.nan, 0.0, math.nan), certify=True)
    assert not gate.passed
    assert "cannot certify" in gate.measured


def test_three_samples_certify_nothing() -> None:
    found = measure(Metric("mean", mean), values(1, 1, 1), values(1, 1, 1), [{}] * 3)
    gate = drop_gate("1%", found, certify=True)
    assert not gate.passed
    assert "cannot certify with 3 samples" in gate.measured
    assert drop_gate("1%", found).passed


def test_a_gate_is_plain_data() -> None:
    assert GateResult("max-drop", "1%", "ok", True).as_dict() == {
        "gate": "max-drop", "asked": "1%", "measured": "ok", "passed": True
    }  # fmt: skip
