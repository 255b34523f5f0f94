"""``graphopt.tune``: whole configurations tried under a wall-clock limit, the best one handed over."""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
import time as clock
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import GateFailed, GraphoptError, InputError, NothingDone
from graphopt.ledger import forget_reproducers
from graphopt.model import ModelLike, fingerprint
from graphopt.outcome import blank, with_report
from graphopt.pipeline import (
    Options,
    Result,
    as_metric,
    check_gates,
    make,
    make_context,
    merge_options,
    read_source,
    requested,
)
from graphopt.presets import facing
from graphopt.report.document import about, versions
from graphopt.report.units import plural
from graphopt.report.units import ratio as ratio_text
from graphopt.report.units import size as size_text
from graphopt.search.costs import cache_folder, this_machine
from graphopt.search.frontier import OBJECTIVES, Candidate, frontier, ranked
from graphopt.search.proposals import Proposals, require_optuna
from graphopt.search.space import Space
from graphopt.search.speed import Promise
from graphopt.storage import write_text
from graphopt.target import get_target
from graphopt.trials import Trials

if TYPE_CHECKING:
    import onnx_ir as ir

VERSION = 1
MAX_DROP = "1%"
"""What a metric may lose where nobody said anything else."""

_FINALISTS = 3
"""So many of the best are built again and judged in full, until one of them holds."""

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_time(text: str | float) -> float:
    """Seconds from ``10m``, ``90s``, ``1h``, ``1.5h``, or a number of seconds.

    Raises:
        InputError: it is none of them, or not above 0.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", str(text).lower())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise InputError(f"--time '{text}' is no time; write 90s, 10m or 1h")
    return float(match[1]) * _UNITS[match[2]]


@dataclass
class Search:
    """One search: what was asked, and what it found so far. ``path``: where that is kept for ``resume``."""

    objective: str
    limit: float
    allow_slower: bool
    trials: Trials
    original: Candidate
    path: Path
    resumed: int = 0
    seconds: float = 0.0
    chosen: Candidate | None = None
    ran_out: bool = False
    took: list[float] = field(default_factory=list)

    def run(self, seed: int, started: float) -> None:
        """Try configurations until the time is over, or there are none left; what is known is kept after each."""
        trials = self.trials
        if not self.resumed:
            for config in trials.beginnings():
                if not self._try(config, started):
                    return
            if clock.perf_counter() - started < self.limit / 2:  # it takes the time of some tries
                trials.explore()
                self.keep()
        proposals = Proposals(trials.space, trials.beginnings(), seed=seed)
        for candidate in trials.done:
            proposals.tell(candidate.config, None if candidate.ratio is None else candidate.values)
        while (proposed := proposals.ask()) is not None:
            if not self._try(proposed, started):
                return
            last = trials.done[-1]
            proposals.tell(proposed, None if last.ratio is None else last.values)
        self.ran_out = True

    def _try(self, config: dict[str, Any], started: float) -> bool:
        """Measure one; False: there is no time for it."""
        if not self._time_left(started):
            return False
        before = clock.perf_counter()
        self.trials.measure(config, self.original)
        self.took.append(clock.perf_counter() - before)
        self.keep()
        return True

    def _time_left(self, started: float) -> bool:
        """Whether another try fits, and the last judging after it; the first always does, and none is cut off."""
        if not self.took:
            return not self.trials.done or clock.perf_counter() - started < self.limit
        # The first one also makes what all others share, once.
        typical = statistics.median(self.took[1:] or [self.took[0] / 3])
        return clock.perf_counter() - started + 2 * typical < self.limit

    def ranked(self) -> list[Candidate]:
        """The candidates that are better than the original, the best first."""
        return ranked(self.trials.done, self.original, self.objective, allow_slower=self.allow_slower)

    def keep(self) -> None:
        """Store what is known, for ``--resume``."""
        stored = {
            "version": VERSION,
            "ranking": self.trials.space.ranking,
            "mixtures": self.trials.space.mixtures,
            "done": [candidate.as_dict() for candidate in self.trials.done],
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(stored))
        except (OSError, GraphoptError):  # a cache folder that cannot be written: there will be nothing to resume
            return

    def resume(self) -> bool:
        """Take up what an earlier run stored; False: there is nothing."""
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if stored["version"] != VERSION:
                return False
            space = Space(list(stored["ranking"]), [list(names) for names in stored["mixtures"]])
            done = [Candidate.from_dict(one) for one in stored["done"]]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        self.trials.done = done
        self.trials.enter(space)
        self.resumed = len(done)
        return bool(done)

    def as_dict(self) -> dict[str, Any]:
        """As the report has it."""
        everything = [self.original, *self.trials.done]
        good = {id(c) for c in frontier([c for c in everything if c.error is None])}
        return {
            "objective": self.objective,
            "limit_seconds": self.limit,
            "seconds": self.seconds,
            "resumed": self.resumed,
            "exhausted": self.ran_out,
            "score": self.trials.metric.name if self.trials.metric is not None else "SQNR in dB",
            "space": self.trials.space.as_dict(),
            "chosen": None if self.chosen is None else self.chosen.name,
            "candidates": [
                {
                    "name": c.name,
                    "config": c.config,
                    "ratio": None if c.ratio is None else dict(zip(("median", "low", "high"), c.ratio, strict=True)),
                    "score": _finite(c.score) if c.error is None else None,
                    "sqnr_db": _finite(c.sqnr) if c.error is None else None,
                    "bytes": c.bytes or None,
                    "holds": c.holds,
                    "slower": c.slower,
                    "on_frontier": id(c) in good,
                    "error": c.error,
                }
                for c in everything
            ],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def tune(
    model: ModelLike,
    *,
    data: Any = None,
    objective: str = "latency",
    time: str | float = "10m",
    resume: bool = False,
    allow_slower: bool = False,
    **options: Any,
) -> Result:
    """Search whole configurations of passes for the best one that keeps to the budget on this machine.

    Args:
        model: anything :func:`graphopt.model.load` takes; never mutated.
        data: calibration samples, in any form :func:`graphopt.data.load_data` reads.
        objective: ``latency`` (the fastest), ``size`` (the smallest file) or ``accuracy`` (the one closest to the
            original that ``min_speedup`` or ``max_size`` allows).
        time: how long to search: ``10m``, ``90s``, ``1h``, or seconds. One try is never cut off.
        resume: go on where the last search of this model, data, metric and machine stopped.
        allow_slower: what is slower than ``model`` here may be handed over too.
        options: fields of :class:`Options` but ``time``, and gates: they are the budget. ``max_drop`` is 1% where a
            metric is given and no other limit on what may be lost.

    Raises:
        InputError: bad model, data or option; Optuna is missing.
        NothingDone: nothing is better than the original; ``error.report`` has everything measured.
        GateFailed: what was best does not hold when it is judged in full.
    """
    limit = parse_time(time)
    merged = merge_options({**options, "data": data, "time": min(2.0, max(limit / 60, 0.1))}, None)
    _check(objective, merged)
    require_optuna()
    check_gates(merged)
    merged.search = False
    merged.settings = {"objective": objective, "limit": limit, "resume": resume, "allow_slower": allow_slower}
    started = clock.perf_counter()
    loaded, source = read_source(model, merged)
    report = {**versions("tune", vars(merged)), **blank(about(loaded, source))}
    search = _prepared(loaded, merged, report, objective, limit, allow_slower, started)
    if resume and not search.resume():
        report["notes"].append("nothing to resume: no earlier search of this model, data, metric and machine is kept")
    search.run(merged.seed, started)
    search.seconds = clock.perf_counter() - started
    return _handed_over(search, loaded, source, merged, report)


def _check(objective: str, options: Options) -> None:
    gates = options.gates
    if objective not in OBJECTIVES:
        raise InputError(f"unknown objective '{objective}'; use {', '.join(OBJECTIVES)}")
    if options.data is None:
        raise InputError("tune needs calibration data; give --data calibration.npz, as for graphopt quantize")
    if options.metric is None and gates.min_sqnr is None:
        raise InputError(
            "tune has to know what may be lost; give --metric accuracy (or file.py:function) and --max-drop, or else "
            "--min-sqnr"
        )
    if gates.max_drop is None and gates.min_sqnr is None:
        gates.max_drop = MAX_DROP
    if objective == "accuracy" and gates.min_speedup is None and gates.max_size is None:
        raise InputError(
            "--objective accuracy alone is met by the original; say what there is to gain with --min-speedup or "
            "--max-size"
        )
    if not get_target(options.target).here:
        raise InputError(f"tune measures this machine, and {options.target} is another; use quantize --target")


def _prepared(
    model: ir.Model,
    options: Options,
    report: dict[str, Any],
    objective: str,
    limit: float,
    allow_slower: bool,
    started: float,
) -> Search:
    """Data loaded, the original measured, nothing tried yet."""
    first = requested(model, options)
    context = make_context(facing(model, first), options, report)
    shown = context.progress

    def progress(done: int, total: int | None, what: str) -> None:
        """Whatever is being done, the time of the search is what a person waits for."""
        del done, total, what
        shown(min(int(clock.perf_counter() - started), int(limit)), int(limit), "tuning, seconds")

    context.progress = progress
    metric = as_metric(options.metric)
    trials = Trials(model, context, options.gates, metric, options.time, options.verify, first)
    asked = {
        "model": fingerprint(model),
        "data": [report["data"]["sha256"], (report["eval_data"] or {}).get("sha256"), options.seed],
        "metric": None if metric is None else str(options.metric),
        "begin": list(map(str, first)),
        "machine": this_machine(options.threads or 1),
        "this_cpu": options.this_cpu,
        "target": options.target,
        "graphopt": report["versions"]["graphopt"],
        "gates": dict(options.gates.asked()),
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    original = trials.original_candidate(report["input"]["bytes"])
    return Search(objective, limit, allow_slower, trials, original, cache_folder() / f"tune-{digest}.json")


def _handed_over(search: Search, model: ir.Model, source: Any, options: Options, report: dict[str, Any]) -> Result:
    """The best candidate built again and judged in full; the next where that finds it wanting.

    Raises:
        NothingDone, GateFailed: as :func:`tune`.
    """
    notes = list(report["notes"])
    failed: list[GateFailed | NothingDone] = []
    for candidate in search.ranked()[:_FINALISTS]:
        search.chosen = candidate
        pipeline = search.trials.pipeline(candidate.config)[len(search.trials.begin) :]
        must = [p.name for p in search.trials.space.after(candidate.config)]
        promise = Promise(search.allow_slower, "rules")
        try:
            result = make(model, pipeline, options, verb="tune", named=source, must=must, promise=promise)
        except (GateFailed, NothingDone) as error:
            failed.append(error)
            continue
        _forget(failed)
        for entry in result.report["ledger"]:
            entry["skipped"] = [_why(skip) for skip in entry["skipped"]]
        result.report["notes"][:0] = [*notes, _told(search, candidate)]
        result.report["tuning"] = search.as_dict()
        return result
    search.chosen = None
    if failed:
        _forget(failed[1:])
        last = failed[0]
        if last.report is not None:
            last.report["tuning"] = search.as_dict()
        raise last
    report["tuning"] = search.as_dict()
    raise with_report(NothingDone(_nothing(search)), report)


def _forget(failed: Sequence[GateFailed | NothingDone]) -> None:
    """Nobody is told of the reproducers of these."""
    for error in failed:
        forget_reproducers((error.report or {}).get("ledger", ()))


def _why(skip: dict[str, str]) -> dict[str, str]:
    """Nobody but the search excluded anything."""
    return {**skip, "reason": skip["reason"].replace("excluded by the user", "left in float by what was tuned")}


def _told(search: Search, candidate: Candidate) -> str:
    tried = plural(len(search.trials.done), "configuration")
    more = f", {search.resumed} of them in earlier runs" if search.resumed else ""
    return f"tuned for {search.objective}: {candidate.name}, the best of {tried} tried{more}"


def _nothing(search: Search) -> str:
    """Why there is nothing to hand over, with the numbers."""
    done = [c for c in search.trials.done if c.ratio is not None]
    count = len(search.trials.done)
    tried = f"{plural(count, 'configuration')} {'was' if count == 1 else 'were'} tried"
    better = {"latency": "faster", "size": "smaller"}.get(search.objective, "good enough")
    if not done:
        return f"nothing here is {better} on this machine: {tried} and none could be made; nothing was written"
    kept = [c for c in done if c.holds]
    fastest = min(kept or done, key=lambda c: c.values)
    assert fastest.ratio is not None
    median, low, high = fastest.ratio
    smallest = min(kept or done, key=lambda c: c.bytes)
    left = ratio_text(smallest.bytes, search.original.bytes)
    budget = "that keep to the budget " if kept else "(none of them keeps to the budget) "
    return (
        f"nothing here is {better} on this machine: {tried}; of those {budget}the fastest takes {median:.3f}x the "
        f"original's time (90 %: {low:.3f} to {high:.3f}; {fastest.name}), the smallest has "
        f"{size_text(smallest.bytes)}, {left} ({smallest.name}); nothing was written"
    )
