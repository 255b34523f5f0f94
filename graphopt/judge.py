"""The last word on a candidate: compared with the original on data, timed against it, held to the gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.base import Context, Gates
from graphopt.budgets import total_memory
from graphopt.data import feeds as to_feeds
from graphopt.data import labels as to_labels
from graphopt.errors import InputError, RuntimeFailure
from graphopt.gates import GateResult, Metric, MetricResult, drop_gate, measure, parse_size
from graphopt.model import interface
from graphopt.references import referred_bytes
from graphopt.report.units import ratio, size
from graphopt.session import Feeds, Session
from graphopt.timing import Timing, time_models
from graphopt.validation import Comparison, compare_sessions, runnable_feeds

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.data import Dataset

COLLAPSE_DB = 5.0
"""SQNR below which an output has little to do with the original's; that is said loudly."""

GAP_DB = 3.0
"""How far optimizations on may fall below off before the report warns (saturating kernels)."""

SLOWER = 1.03
"""A candidate is slower where the lower bound of its time over the original's is above this: below, it is noise."""

_TIMED_SAMPLES = 4

_RANDOM_ONLY = "compared on random inputs only; give --data for real ones"


@dataclass
class Verdict:
    """What judging found. ``timing``: seconds per run, on ``feeds``; ``speed``: candidate time over original time."""

    comparison: Comparison | None = None
    metric: MetricResult | None = None
    timing: dict[str, Timing] = field(default_factory=dict)
    speed: tuple[float, float, float] | None = None
    optimization_gap_db: float | None = None
    gates: list[GateResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    feeds: Sequence[Feeds] = ()

    @property
    def slower(self) -> bool:
        """Whether the candidate was timed and is slower than the original, beyond :data:`SLOWER`."""
        return self.speed is not None and self.speed[1] > SLOWER

    @property
    def failed(self) -> list[GateResult]:
        return [g for g in self.gates if not g.passed]

    def as_dict(self) -> dict[str, Any]:
        return {
            "comparison": self.comparison.as_dict() if self.comparison else None,
            "metric": metric_dict(self.metric),
            "latency": {name: vars(t) for name, t in self.timing.items()},
            "latency_ratio": dict(zip(("median", "low", "high"), self.speed, strict=True)) if self.speed else None,
            "optimization_gap_db": self.optimization_gap_db,
            "gates": [g.as_dict() for g in self.gates],
        }


def metric_dict(result: MetricResult | None) -> dict[str, Any] | None:
    """A metric's result as the report has it."""
    return None if result is None else {**vars(result), "difference": result.difference}


def judge(
    original: ir.Model,
    candidate: ir.Model,
    context: Context,
    gates: Gates,
    *,
    metric: Metric | None = None,
    sizes: tuple[int, int],
    seconds: float = 2.0,
    approximate: bool = True,
    known: Comparison | None = None,
) -> Verdict:
    """Compare, measure, time and gate, on inputs that ``context.original`` takes, as the candidate does.

    ``sizes``: (original, candidate) file bytes. ``known`` is a comparison on random inputs made already, which stands
    where nothing else is to be measured: loading two large models takes a while.

    Where the original does not run here (custom operators), or on no random inputs where there is no data, nothing is
    compared, and the notes say so.

    Raises:
        RuntimeFailure: the candidate does not run although the original does.
        InputError: a metric or gate that cannot be evaluated.
    """
    verdict = Verdict()
    dataset = context.eval_data or context.data
    if known is not None and dataset is None and not approximate and seconds == 0:
        verdict.comparison, verdict.notes = known, [_RANDOM_ONLY, *known.notes]
        _gate(verdict, gates, sizes)
        return verdict
    why = "nothing was compared or timed"
    try:
        before = Session(original, threads=context.threads)
        if dataset is None:
            why += " on random inputs; give --data"
            feeds = runnable_feeds(context.original, before, 2, seed=context.seed)
    except (RuntimeFailure, InputError) as error:  # custom operators; or it takes no random inputs
        verdict.notes.append(f"{why}: {error}")
        _gate(verdict, gates, sizes)
        return verdict
    after = Session(candidate, threads=context.threads)
    inputs, _ = interface(context.original)
    if dataset is None:
        verdict.comparison = compare_sessions(before, after, feeds)
        verdict.notes.append(_RANDOM_ONLY)
    else:
        verdict.comparison, verdict.metric = _on_data(before, after, dataset, metric, context)
        feeds = [to_feeds(sample, inputs) for sample in dataset.take(_TIMED_SAMPLES)]
    verdict.notes.extend(verdict.comparison.notes)
    if approximate:
        _no_smaller(verdict, sizes)
        _optimization_gap(verdict, original, candidate, after, feeds, context)
        _collapse(verdict)
    if seconds > 0 and _can_be_timed(verdict, original, candidate):
        verdict.feeds = feeds
        time_both(verdict, original, candidate, context, seconds=seconds)
    _gate(verdict, gates, sizes)
    return verdict


def fits_timing(original: ir.Model, candidate: ir.Model) -> bool:
    """Whether there is memory to time both: a session that is timed copies the weights that others leave in files."""
    return referred_bytes(original) + referred_bytes(candidate) <= total_memory() // 4


def _can_be_timed(verdict: Verdict, original: ir.Model, candidate: ir.Model) -> bool:
    if fits_timing(original, candidate):
        return True
    together = size(referred_bytes(original) + referred_bytes(candidate))
    why = f"each model's weights are copied for that, and together they take {together}"
    verdict.notes.append(f"not timed: {why}, more than a quarter of this machine's memory")
    return False


def _no_smaller(verdict: Verdict, sizes: tuple[int, int]) -> None:
    if sizes[1] >= sizes[0] > 1:
        verdict.notes.append(
            f"WARNING: the file is no smaller ({sizes[0]} -> {sizes[1]} bytes): what stayed in float outweighs the rest"
        )


def timed_feeds(original: ir.Model, context: Context) -> list[dict[str, Any]]:
    """What models are timed on: a few of the samples that judge, or legal random inputs."""
    dataset = context.eval_data or context.data
    if dataset is None:
        return runnable_feeds(context.original, Session(original, threads=context.threads), 2, seed=context.seed)
    inputs, _ = interface(context.original)
    return [to_feeds(sample, inputs) for sample in dataset.take(_TIMED_SAMPLES)]


def time_both(verdict: Verdict, original: ir.Model, candidate: ir.Model, context: Context, *, seconds: float) -> None:
    """Time the two against each other on what ``verdict`` was judged on, and enter it there."""
    context.progress(0, None, "timing")
    threads = context.threads or 1
    sessions = {"original": Session(original, threads=threads, timed=True)}
    sessions["candidate"] = Session(candidate, threads=threads, timed=True)
    verdict.timing, ratios = time_models(sessions, verdict.feeds, seconds=seconds)
    verdict.speed = ratios["candidate"]


def _on_data(
    before: Session, after: Session, dataset: Dataset, metric: Metric | None, context: Context
) -> tuple[Comparison, MetricResult | None]:
    inputs, _ = interface(context.original)
    total = len(dataset)
    if metric is None:
        return compare_sessions(before, after, (to_feeds(s, inputs) for s in dataset)), None
    # The metric wants all outputs together.
    outputs: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    samples = [to_labels(sample, inputs) for sample in dataset]

    def keep(feed: Mapping[str, Any], a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
        index = len(outputs[0])
        samples[index] = {**feed, **samples[index]}
        outputs[0].append(dict(a))
        outputs[1].append(dict(b))
        context.progress(index + 1, total, "comparing with the original")

    comparison = compare_sessions(before, after, (to_feeds(s, inputs) for s in dataset), keep=keep)
    return comparison, measure(metric, outputs[0], outputs[1], samples, seed=context.seed)


def _optimization_gap(
    verdict: Verdict,
    original: ir.Model,
    candidate: ir.Model,
    optimized: Session,
    feeds: Sequence[Any],
    context: Context,
) -> None:
    """The same integers on two paths of the runtime, both against the original: where they part, one is wrong."""
    plain = Session(candidate, optimize=False, threads=context.threads)
    gap = compare_sessions(plain, optimized, feeds).sqnr
    verdict.optimization_gap_db = round(float(gap), 2) if np.isfinite(gap) else None
    reference = Session(original, optimize=False, threads=context.threads)
    off, on = (compare_sessions(reference, session, feeds).sqnr for session in (plain, optimized))
    if on < off - GAP_DB and on < 40:
        verdict.notes.append(
            f"WARNING: ONNX Runtime's optimizations cost accuracy here: SQNR {off:.1f} dB with them off, {on:.1f} dB "
            "with them on (kernels that saturate on this CPU, or a fused kernel that computes something else)"
        )


def _collapse(verdict: Verdict) -> None:
    worst = verdict.comparison.worst if verdict.comparison else None
    if worst is not None and (worst.mismatch or worst.sqnr < COLLAPSE_DB):
        found = worst.mismatch or f"SQNR {worst.sqnr:.1f} dB"
        verdict.notes.append(
            f"WARNING: output '{worst.name}' has little left of the original ({found}); judge it with --metric and "
            "--max-drop before you ship it"
        )


def size_verdict(gates: Gates, sizes: tuple[int, int]) -> Verdict:
    """The verdict where nothing is run: only ``max_size`` can be held to, on ``sizes`` (original, candidate)."""
    verdict = Verdict()
    _gate(verdict, gates, sizes)
    return verdict


def _gate(verdict: Verdict, gates: Gates, sizes: tuple[int, int]) -> None:
    if gates.max_drop is not None:
        if verdict.metric is None:
            verdict.gates.append(GateResult("max-drop", gates.max_drop, "no metric could be measured", False))
        else:
            verdict.gates.append(drop_gate(gates.max_drop, verdict.metric, certify=gates.certify))
    if gates.min_sqnr is not None:
        verdict.gates.append(sqnr_gate(gates.min_sqnr, verdict.comparison))
    if gates.min_speedup is not None:
        verdict.gates.append(_speed_gate(gates.min_speedup, verdict.speed))
    if gates.max_size is not None:
        verdict.gates.append(_size_gate(str(gates.max_size), *sizes))


def sqnr_gate(asked: float, comparison: Comparison | None) -> GateResult:
    """``--min-sqnr``: the worst output's; another type or shape fails it, identical outputs hold it."""
    worst = comparison.worst if comparison is not None else None
    if comparison is None:
        passed, text = False, "nothing could be compared"
    elif worst is None:
        passed, text = True, "there is no deterministic output to compare"
    elif worst.mismatch is not None:
        passed, text = False, f"output '{worst.name}': {worst.mismatch}"
    else:
        passed = worst.sqnr >= asked
        text = "identical" if worst.sqnr == np.inf else f"output '{worst.name}': {worst.sqnr:.2f} dB"
    return GateResult("min-sqnr", f"{asked:g} dB", text, passed)


def _speed_gate(asked: float, speed: tuple[float, float, float] | None) -> GateResult:
    if speed is None:
        return GateResult("min-speedup", f"{asked:g}x", "nothing could be timed", False)
    median, _, high = speed
    text = f"{1 / median:.3f}x, at least {1 / high:.3f}x"
    return GateResult("min-speedup", f"{asked:g}x", text, 1 / high >= asked)


def _size_gate(asked: str, original: int, candidate: int) -> GateResult:
    allowed = parse_size(asked, original)
    text = f"{size(candidate)}, {ratio(candidate, original)} of the original"
    return GateResult("max-size", f"{asked} ({size(allowed)})", text, candidate <= allowed)
