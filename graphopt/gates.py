"""Metrics on the user's data, paired intervals, and the gates that decide whether a model may be written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import InputError, did_you_mean
from graphopt.sizes import parse_size as parse_size
from graphopt.user_code import from_file, one_line

if TYPE_CHECKING:
    from numpy.typing import NDArray

Record = dict[str, Any]
MetricFunction = Callable[[Sequence[Record], Sequence[Record]], float]

RESAMPLES = 1000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Metric:
    """``function(outputs, samples) -> float``, higher is better.

    ``outputs[i]`` maps output name to array for sample i; ``samples[i]`` is that sample, labels included.
    """

    name: str
    function: MetricFunction


def load_metric(spec: str) -> Metric:
    """``accuracy``, or ``path/to/module.py:function``.

    Raises:
        InputError: unknown name, missing file or function, or the module does not import.
    """
    if spec == "accuracy":
        return Metric("accuracy", _accuracy)
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not name:
        raise InputError(
            f"unknown metric '{spec}'; "
            + did_you_mean(
                spec, ["accuracy"], "use accuracy, or module.py:function with function(outputs, samples) -> float"
            )
        )
    try:
        function = from_file(Path(path), name)
    except InputError as error:
        raise InputError(f"metric '{spec}': {error}") from error
    if not callable(function):
        raise InputError(f"metric '{spec}': '{name}' is a {type(function).__name__}, not a function")
    return Metric(name, function)


def _accuracy(outputs: Sequence[Record], samples: Sequence[Record]) -> float:
    """Share of samples whose first output has its largest value (last axis) where the label says."""
    right: list[bool] = []
    for output, sample in zip(outputs, samples, strict=True):
        scores = np.asarray(next(iter(output.values())))
        label = np.asarray(_label(sample)).reshape(-1)
        rows = scores.reshape(-1, scores.shape[-1]) if scores.ndim else scores.reshape(1, 1)
        if rows.shape[-1] < 2 or len(label) != len(rows):
            raise InputError(
                f"metric 'accuracy' needs one label for each row of class scores; the first output has shape "
                f"{list(scores.shape)} and the sample {len(label)} labels; write a metric of your own"
            )
        right.extend((rows.argmax(-1) == label).tolist())
    return float(np.mean(right)) if right else math.nan


def _label(sample: Record) -> Any:
    for key in ("label", "labels", "target", "y"):
        if key in sample:
            return sample[key]
    raise InputError(
        "metric 'accuracy' needs labels and the evaluation data has none; add a key 'label', one integer per sample"
    )


@dataclass(frozen=True)
class MetricResult:
    """The metric of original and candidate on the same samples; the interval is of ``candidate - original``."""

    name: str
    original: float
    candidate: float
    low: float
    high: float
    samples: int
    resamples: int

    @property
    def difference(self) -> float:
        return self.candidate - self.original


def measure(
    metric: Metric, original: Sequence[Record], candidate: Sequence[Record], samples: Sequence[Record], *, seed: int = 0
) -> MetricResult:
    """Both models' metric and a paired percentile bootstrap (Efron 1979) of the difference over samples, 95 %.

    Raises:
        InputError: the user's function raised or returned no number; the message names it.
    """
    count = len(samples)
    if count == 0:
        raise InputError(f"metric '{metric.name}' has no samples to be measured on; give --eval-data")
    before, after = evaluate(metric, original, samples), evaluate(metric, candidate, samples)
    was, now = _per_sample(metric, original, samples, before), _per_sample(metric, candidate, samples, after)
    rng = np.random.default_rng(seed)
    if was is not None and now is not None:
        delta = now - was
        draws = np.asarray([delta[rng.integers(0, count, count)].mean() for _ in range(RESAMPLES)])
        margin = 0.0
        if np.ptp(delta) == 0:
            # Resampling equal differences says nothing about the samples that were not seen; the rule of three does.
            margin = 3 / count * float(max(np.abs(was).max(), np.abs(now).max()))
    else:
        # The metric is no mean over samples (AUC, F1): evaluate it on each resample, fewer of them.
        draws = np.asarray([_resampled(metric, original, candidate, samples, rng) for _ in range(200)])
        draws, margin = draws[np.isfinite(draws)], 0.0
        if len(draws):
            # Resamples hold samples twice, which moves some metrics (retrieval: a twin is the nearest). The bootstrap's
            # own estimate of that bias is taken out, so that the interval lies about what was measured.
            draws = draws - draws.mean() + (after - before)
    tail = (1 - _CONFIDENCE) / 2
    # Where most resamples cannot be measured (one class only, say), there is no interval.
    low, high = np.quantile(draws, [tail, 1 - tail]) if len(draws) >= 100 else (math.nan, math.nan)
    return MetricResult(metric.name, before, after, float(low) - margin, float(high) + margin, count, len(draws))


def _resampled(
    metric: Metric,
    original: Sequence[Record],
    candidate: Sequence[Record],
    samples: Sequence[Record],
    rng: np.random.Generator,
) -> float:
    index = rng.integers(0, len(samples), len(samples))
    pick = [samples[i] for i in index]
    try:
        return evaluate(metric, [candidate[i] for i in index], pick) - evaluate(
            metric, [original[i] for i in index], pick
        )
    except InputError:  # a metric may rightly refuse a resample (of one class only)
        return math.nan


def _per_sample(
    metric: Metric, outputs: Sequence[Record], samples: Sequence[Record], whole: float
) -> NDArray[np.float64] | None:
    """The metric sample by sample, if its mean is the whole; else None."""
    try:
        values = np.asarray([float(metric.function([o], [s])) for o, s in zip(outputs, samples, strict=True)])
    except Exception:  # a metric may rightly refuse a single sample
        return None
    return (
        values
        if np.isfinite(values).all() and math.isclose(values.mean(), whole, rel_tol=1e-9, abs_tol=1e-12)
        else None
    )


def evaluate(metric: Metric, outputs: Sequence[Record], samples: Sequence[Record]) -> float:
    """The metric of one model's outputs. Raises InputError as :func:`measure`."""
    try:
        value = metric.function(outputs, samples)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"metric '{metric.name}' failed: {one_line(error)}; fix the function") from error
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(
            f"metric '{metric.name}' returned {value!r:.60}, not a number; return a float, higher is better"
        ) from None


@dataclass(frozen=True)
class GateResult:
    """One gate: what was asked, what was measured, and whether it holds."""

    gate: str
    asked: str
    measured: str
    passed: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def drop_gate(asked: str, result: MetricResult, *, certify: bool = False) -> GateResult:
    """``--max-drop``: ``1%`` is relative to the original's metric, ``0.01`` absolute.

    ``certify`` judges the lower end of the interval instead of the estimate.
    """
    allowed = parse_drop(asked, result.original)
    drop = -(result.low if certify else result.difference)
    text = (
        f"{result.name} {result.original:.4f} -> {result.candidate:.4f}, "
        f"difference {result.difference:+.4f} [{result.low:+.4f}, {result.high:+.4f}]"
    )
    passed = drop <= allowed + 1e-12
    if certify and not passed and -result.difference <= allowed:
        text += f"; cannot certify with {result.samples} samples"
    return GateResult("max-drop", asked, text, passed)


def parse_drop(text: str, reference: float) -> float:
    """The absolute drop that ``1%`` or ``0.01`` allows.

    Raises:
        InputError: not a non-negative number.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?\d+)?)\s*(%?)\s*", str(text))
    if match is None:
        raise InputError(f"--max-drop '{text}' is no drop; write 1% (relative) or 0.01 (absolute)")
    value = float(match[1])
    return value / 100 * abs(reference) if match[2] else value
