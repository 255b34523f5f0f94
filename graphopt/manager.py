"""The pass manager: one copy, each pass held to its contract, everything in the ledger, only the guilty reverted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.base import Change, Context, Pass, PassResult, Pipeline, Repeat, Skip
from graphopt.errors import GraphoptError, PreconditionError
from graphopt.graph import nodes
from graphopt.model import clone, weight_bytes
from graphopt.structure import check_model
from graphopt.verify import Verifier, write_reproducer

if TYPE_CHECKING:
    import onnx_ir as ir

VERIFY = ("end", "each", "off")


@dataclass
class LedgerEntry:
    """What became of one pass."""

    name: str
    options: dict[str, Any]
    contract: str
    status: str = "unchanged"  # changed | unchanged | skipped | reverted | partly reverted
    changes: list[Change] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    seconds: float = 0.0
    nodes: tuple[int, int] = (0, 0)
    weight_bytes: tuple[int, int] = (0, 0)

    def as_dict(self) -> dict[str, Any]:
        return {
            "pass": self.name,
            "options": self.options,
            "contract": self.contract,
            "status": self.status,
            "reason": self.reason,
            "seconds": round(self.seconds, 4),
            "nodes": list(self.nodes),
            "weight_bytes": list(self.weight_bytes),
            "changes": [vars(c) for c in self.changes],
            "skipped": [vars(s) for s in self.skipped],
            "metrics": self.metrics,
        }


@dataclass
class RunResult:
    """The model a pipeline ended with, and how it got there."""

    model: ir.Model
    ledger: list[LedgerEntry]
    notes: list[str]
    reproducer: Path | None = None

    @property
    def reverted(self) -> list[LedgerEntry]:
        return [e for e in self.ledger if "reverted" in e.status]


@dataclass
class _Step:
    """A pass that ran in the current exact segment, so that the segment can be replayed without its guilty rewrites."""

    pass_: Pass
    entry: LedgerEntry


class PassManager:
    """Runs a pipeline on a copy of the model.

    ``verify``: ``end`` compares numerically once after each run of exact passes (before the first approximate one, and
    at the end), ``each`` after every exact pass, ``off`` never. A violation is bisected to the pass and, where the pass
    asks ``context.allows``, to the rewrites; only those are reverted. Approximate passes are judged by gates, not here.
    """

    def __init__(self, pipeline: Pipeline, *, verify: str = "end", raise_preconditions: bool = False) -> None:
        if verify not in VERIFY:
            raise ValueError(f"verify is {verify!r}; one of {', '.join(VERIFY)}")
        self.pipeline = list(pipeline)
        self.verify = verify
        self.raise_preconditions = raise_preconditions

    def run(self, model: ir.Model, context: Context | None = None) -> RunResult:
        """Run the pipeline; ``model`` is not touched.

        Raises:
            PreconditionError: a pass cannot work on this graph, where ``raise_preconditions`` asks for it.
        """
        run = _Run(model, context or Context(original=model), self.verify, self.raise_preconditions)
        for step in self.pipeline:
            if isinstance(step, Repeat):
                for _ in range(step.times):
                    changed = [run.apply(inner) for inner in step.passes]  # every one runs, whatever the first did
                    if not any(changed):
                        break
            else:
                run.apply(step)
        run.close_segment()
        return RunResult(run.model, run.ledger, run.notes, run.reproducer)


class _Run:
    """The state of one run; nothing of it stays on a pass or on the manager."""

    def __init__(self, model: ir.Model, context: Context, verify: str, raise_preconditions: bool) -> None:
        self.context = context
        self.mode = verify
        self.raise_preconditions = raise_preconditions
        self.start = model  # where the current exact segment began; never edited
        self.model = clone(model)
        self.segment: list[_Step] = []
        self.ledger: list[LedgerEntry] = []
        self.notes: list[str] = []
        self.disabled: set[tuple[str, str]] = set(context.disabled)
        self.reproducer: Path | None = None

    def apply(self, pass_: Pass) -> bool:
        """Run one pass; True if it changed something that was kept."""
        exact = pass_.contract == "exact"
        if not exact:
            self.close_segment()
        entry = LedgerEntry(str(getattr(pass_, "use", pass_.name)), pass_.options(), pass_.contract)
        self.ledger.append(entry)
        before = self._size()
        started = time.perf_counter()
        try:
            self._execute(pass_, entry)
        except PreconditionError as error:
            if self.raise_preconditions:
                raise
            entry.status, entry.reason = "skipped", str(error)
        entry.seconds = time.perf_counter() - started
        entry.nodes, entry.weight_bytes = (before[0], self._size()[0]), (before[1], self._size()[1])
        if exact:
            if entry.changes:
                self.segment.append(_Step(pass_, entry))
                if self.mode == "each":
                    self.close_segment()
        elif entry.changes:
            self.start = clone(self.model)
        return bool(entry.changes) and entry.status == "changed"

    def _size(self) -> tuple[int, int]:
        return sum(1 for _ in nodes(self.model)), weight_bytes(self.model)

    def _execute(self, pass_: Pass, entry: LedgerEntry) -> None:
        """Run on the working copy; a pass that crashes or breaks the graph is undone by replaying without it."""
        pass_.check(self.model)
        keep = clone(self.model) if pass_.contract != "exact" else None
        try:
            result = self._run_once(pass_, self.model)
            check_model(self.model, entry.name)
        except PreconditionError:
            self._undo(keep)
            raise
        except GraphoptError as error:
            if pass_.contract != "exact" and error.exit_code != 4:
                raise
            self._undo(keep)
            entry.status, entry.reason = "reverted", str(error)
            return
        except Exception as error:
            self._undo(keep)
            entry.status, entry.reason = "reverted", f"it crashed: {type(error).__name__}: {error}"
            return
        entry.changes, entry.skipped, entry.metrics = result.changes, result.skipped, result.metrics
        entry.status = "changed" if result.modified else "unchanged"

    def _undo(self, keep: ir.Model | None) -> None:
        self.model = keep if keep is not None else self._replay(self.segment)

    def _run_once(self, pass_: Pass, model: ir.Model) -> PassResult:
        self.context.disabled = frozenset(self.disabled)
        return pass_.run(model, self.context)

    def _replay(self, steps: Sequence[_Step]) -> ir.Model:
        """The segment's start with these passes run again (they are deterministic), minus the disabled rewrites."""
        model = clone(self.start)
        for step in steps:
            result = self._run_once(step.pass_, model)
            step.entry.changes = result.changes
        return model

    def close_segment(self) -> None:
        """Hold the exact passes since ``start`` to their contract; revert only what breaks it."""
        steps, self.segment = self.segment, []
        if not steps or self.mode == "off":
            self.start = clone(self.model) if steps else self.start
            return
        verifier = Verifier(self.start, self.context)
        if verifier.unable is not None:
            self.notes.append(f"not compared numerically: {verifier.unable}")
            self.start = clone(self.model)
            return
        for _ in range(len(steps) + 1):
            violation = verifier.violation(self.model)
            if violation is None:
                break
            steps = self._revert(steps, violation, verifier)
            self.model = self._replay(steps)
        self.notes.append(f"exact passes compared with the original on {verifier.description}")
        self.start = clone(self.model)

    def _revert(self, steps: list[_Step], violation: str, verifier: Verifier) -> list[_Step]:
        """Find the first guilty pass, then its guilty rewrites; switch just those off."""
        guilty = next((i for i in range(len(steps)) if self._breaks(steps[: i + 1], verifier)), len(steps) - 1)
        step = steps[guilty]
        broken = verifier.violation(self._replay(steps[: guilty + 1])) or violation
        sites = list(dict.fromkeys(c.site for c in self._changes_of(steps[:guilty], step)))
        before = self._replay(steps[:guilty])
        found = self._guilty_sites(steps[:guilty], step, sites, verifier)
        self.reproducer = write_reproducer(before, step.pass_, broken, verifier)
        if found:
            self.disabled |= {(step.entry.name, site) for site in found}
            step.entry.status = "partly reverted"
            step.entry.reason = f"reverted: {broken} (by the rewrite at {', '.join(found[:3])})"
            step.entry.skipped += [Skip(site, f"reverted: {broken}") for site in found]
            return steps
        step.entry.status, step.entry.reason = "reverted", f"reverted: {broken}"
        step.entry.changes = []
        return [s for s in steps if s is not step]

    def _breaks(self, steps: Sequence[_Step], verifier: Verifier) -> bool:
        return verifier.violation(self._replay(steps)) is not None

    def _changes_of(self, before: Sequence[_Step], step: _Step) -> list[Change]:
        return self._run_once(step.pass_, self._replay(before)).changes

    def _guilty_sites(self, before: Sequence[_Step], step: _Step, sites: list[str], verifier: Verifier) -> list[str]:
        """The rewrites that break the contract, by halving; empty when the pass cannot be switched off by site."""
        name = step.entry.name
        kept = set(self.disabled)

        def breaks(disabled: Sequence[str]) -> bool:
            self.disabled = kept | {(name, site) for site in disabled}
            try:
                model = self._replay(before)
                self._run_once(step.pass_, model)
                return verifier.violation(model) is not None
            finally:
                self.disabled = set(kept)

        if len(sites) < 2 or breaks(sites):
            return []
        found: list[str] = []
        while breaks(found):
            suspects = [s for s in sites if s not in found]
            while len(suspects) > 1:
                half = suspects[: len(suspects) // 2]
                rest = [s for s in sites if s not in half]
                suspects = half if breaks(rest) else suspects[len(suspects) // 2 :]
            if not suspects:
                break
            found.append(suspects[0])
            if len(found) > 8:  # that is not a few bad sites, that is a bad pass
                return []
        return found
