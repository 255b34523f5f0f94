"""Time models against each other: interleaved, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import os
import statistics as pystatistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.session import Feeds, Session

_LEAST_ROUNDS = 10


@dataclass(frozen=True)
class Timing:
    """Seconds per run: the median, and the first and third quartile around it."""

    median: float
    low: float
    high: float
    runs: int


def usable_cpus() -> int:
    """How many CPUs this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def time_models(
    sessions: Mapping[str, Session],
    feeds: Sequence[Feeds] | Mapping[str, Sequence[Feeds]],
    *,
    rounds: int = 30,
    seconds: float = 3.0,
    warmup: int = 3,
) -> tuple[dict[str, Timing], dict[str, tuple[float, float, float]]]:
    """Time several models against each other, interleaved, in one go.

    ``feeds`` are what all are fed in turn, or say so for each. Returns the timings, and for each model after the first
    the ratio of its time to the first's: (median of the per-round ratios, 5th and 95th percentile of that median under
    resampling of the rounds).
    """
    order = list(sessions)
    given = feeds if isinstance(feeds, Mapping) else dict.fromkeys(order, feeds)
    for name in order:
        for index in range(warmup):
            sessions[name].run(given[name][index % len(given[name])])
    taken: dict[str, list[float]] = {name: [] for name in order}
    started = time.perf_counter()
    for index in range(rounds * 100):
        for name in order if index % 2 == 0 else reversed(order):
            feed = given[name][index % len(given[name])]
            before = time.perf_counter()
            sessions[name].run(feed)
            taken[name].append(time.perf_counter() - before)
        if time.perf_counter() - started > seconds and index + 1 >= min(rounds, _LEAST_ROUNDS):
            break
    timings = {name: _timing(taken[name]) for name in order}
    base = np.asarray(taken[order[0]])
    ratios = {}
    for name in order[1:]:
        paired = np.asarray(taken[name]) / base
        draws = np.random.default_rng(0).integers(0, len(paired), (200, len(paired)))
        medians = np.median(paired[draws], axis=1)
        low, high = np.percentile(medians, [5, 95])
        ratios[name] = (float(np.median(paired)), float(low), float(high))
    return timings, ratios


def _timing(values: list[float]) -> Timing:
    low, median, high = pystatistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return Timing(median, low, high, len(values))
