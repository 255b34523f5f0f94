"""The pass manager: one copy, each pass held to its contract, everything in the ledger, only the guilty reverted."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from graphopt.base import VERIFY as VERIFY
from graphopt.base import Change, Context, Pass, PassResult, Pipeline, Repeat, Skip
from graphopt.errors import ExitCode, GraphoptError, OverBudget, PreconditionError
from graphopt.graph import nodes
from graphopt.ledger import Guilt, LedgerEntry, RunResult, told_or_forgotten
from graphopt.model import clone, fingerprint, weight_bytes
from graphopt.structure import check_model
from graphopt.user_code import one_line
from graphopt.validation import Comparison
from graphopt.verify import Verifier, Violation, outline, write_reproducer

if TYPE_CHECKING:
    import onnx_ir as ir


MAX_GUILTY_SITES = 8
"""More bad rewrites than that are not a few bad sites but a bad pass, which is reverted whole."""


@dataclass
class _Step:
    """An exact pass that changed something, and the model from before it (weights are shared, so it is cheap)."""

    pass_: Pass
    entry: LedgerEntry
    before: ir.Model


@dataclass
class _Snapshot:
    """A copy that nobody edits, good until a pass changes something: copying a large graph takes seconds."""

    model: ir.Model

    @cached_property
    def outline(self) -> list[Any]:
        return outline(self.model)

    @cached_property
    def size(self) -> tuple[int, int]:
        return _size(self.model)

    def differs(self, model: ir.Model) -> bool:
        """Whether ``model`` was edited since; weights are read only where the outline differs."""
        return self.outline != outline(model) and fingerprint(self.model) != fingerprint(model)


class PassManager:
    """Runs a pipeline on a copy of the model.

    ``verify``: ``end`` compares numerically once after each run of exact passes (before the next approximate one, and
    at the end), ``each`` after every exact pass, ``off`` never. A violation is bisected to the pass and, where the pass
    asks ``context.allows``, to the rewrites; only those are reverted, and what followed is run again. A pass that
    narrows the interface is a segment of its own, compared on what its result takes. Approximate passes are judged by
    gates, not here. ``raise_preconditions`` names the passes (or True: all) whose failed
    precondition is an error instead of a skip.
    """

    def __init__(
        self, pipeline: Pipeline, *, verify: str = "end", raise_preconditions: bool | Collection[str] = False
    ) -> None:
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
        with told_or_forgotten(run.ledger):
            self._all(run)
        return RunResult(run.model, run.ledger, list(run.notes), run.exact, run.comparison)

    def _all(self, run: _Run) -> None:
        for step in self.pipeline:
            if isinstance(step, Repeat):
                for _ in range(step.times):
                    # Every one runs, whatever the first did.
                    changed = [run.apply(inner, repeated=True) for inner in step.passes]
                    if not any(changed):
                        break
            else:
                run.apply(step)
        run.close()


class _Run:
    """The state of one run; nothing of it stays on a pass, the context or the manager."""

    def __init__(
        self, model: ir.Model, context: Context, verify: str, raise_preconditions: bool | Collection[str]
    ) -> None:
        original = _Snapshot(clone(context.original))
        self.context = replace(context, original=original.model)
        self.snapshot = original if context.original is model else None
        self.idle: list[Pass] = []  # ran since the last change and found nothing: they would find nothing again
        self.mode = verify
        self.raise_preconditions = raise_preconditions
        self.model = clone(model)
        self.compared_with = "the original"
        self.steps: list[_Step] = []  # the current segment: exact passes since the last approximate one
        self.verified = 0  # how many of them are known to be right
        self.verifier: Verifier | None = None
        self.original = original.model
        self.comparison: Comparison | None = None
        self.ledger: list[LedgerEntry] = []
        self.exact: ir.Model | None = None
        self.notes: dict[str, None] = {}
        self.distrusted: list[Pass] = []  # reverted whole: not run again
        self.reverted: dict[tuple[str, str], str] = {}  # (pass, site) -> why it is switched off

    def apply(self, pass_: Pass, *, repeated: bool = False) -> bool:
        """Run one pass; True if it changed something that was kept.

        ``repeated``: in a further round that finds nothing it gets no second entry in the ledger.
        """
        if repeated and pass_ in self.idle:
            return False
        exact = pass_.contract == "exact"
        if not exact or pass_.narrows:
            self.close()
        entry = LedgerEntry(str(getattr(pass_, "use", pass_.name)), pass_.options(), pass_.contract)
        self.ledger.append(entry)
        if pass_ in self.distrusted:
            entry.status, entry.reason = "skipped", "it was reverted earlier in this run"
            return False
        wanted = self.raise_preconditions
        raising = wanted if isinstance(wanted, bool) else pass_.name in wanted
        self._step(pass_, entry, raising=raising or pass_.narrows)
        if pass_.narrows:
            self.close()
        elif exact and self.mode == "each":
            self._hold()
        if not exact and entry.changes:
            self.compared_with = "the model before them"
        if repeated and entry.status in ("unchanged", "skipped") and self._told_before(entry):
            self.ledger.remove(entry)
        return bool(entry.changes)

    def _told_before(self, entry: LedgerEntry) -> bool:
        return any(e is not entry and (e.name, e.options) == (entry.name, entry.options) for e in self.ledger)

    def _step(self, pass_: Pass, entry: LedgerEntry, *, raising: bool = False) -> None:
        """Run on the working copy, and write down what happened; a pass that crashes or breaks the graph is undone."""
        if self.snapshot is None:
            self.snapshot = _Snapshot(clone(self.model))
        before = self.snapshot.model
        started = time.perf_counter()
        untouched = True
        try:
            pass_.check(self.model)
            untouched = False
            result = self._call(pass_, self.model, entry.name)
            if not result.changes and self.snapshot.differs(self.model):
                result.changes.append(Change("edit", "(graph)", "changed, but the pass did not say what"))
                check_model(self.model, entry.name)
            self._record(entry, result)
        except PreconditionError as error:
            if raising:
                raise
            self.model = self.model if untouched else clone(before)
            self._record(entry, PassResult())
            entry.status, entry.reason = "skipped", str(error)
        except OverBudget:
            raise  # the model is to blame, and nothing may run it
        except Exception as error:
            ours = isinstance(error, GraphoptError)
            if pass_.contract != "exact" and isinstance(error, GraphoptError) and error.exit_code != ExitCode.INTERNAL:
                raise  # the user's data or options, not the pass
            self.model = clone(before)
            self._revert(pass_, entry, before, Violation(str(error) if ours else f"it crashed: {one_line(error)}"))
        entry.seconds += time.perf_counter() - started
        sizes = self.snapshot.size, _size(self.model) if entry.changes else self.snapshot.size
        entry.nodes, entry.weight_bytes = zip(*sizes, strict=True)
        if entry.changes:
            self.snapshot, self.idle, self.comparison = None, [], None
        else:
            self.idle.append(pass_)
        if entry.changes and pass_.contract != "exact":
            self.exact = before
        if entry.changes and pass_.contract == "exact":
            self.steps.append(_Step(pass_, entry, before))

    def _call(self, pass_: Pass, model: ir.Model, name: str, off: Collection[tuple[str, str]] = ()) -> PassResult:
        """The pass on ``model``, without the rewrites that are switched off."""
        disabled = frozenset((*self.context.disabled, *self.reverted, *off))
        return run_pass(pass_, model, replace(self.context, disabled=disabled), name)

    def _record(self, entry: LedgerEntry, result: PassResult) -> None:
        off = {site: why for (name, site), why in self.reverted.items() if name == entry.name}
        entry.changes, entry.metrics = result.changes, result.metrics
        entry.skipped = [s for s in result.skipped if s.site not in off] + [Skip(*item) for item in off.items()]
        if entry.status != "partly reverted":
            entry.status = "changed" if result.modified else "unchanged"

    def close(self) -> None:
        """End the current segment of exact passes, verified."""
        self._hold()
        self.steps, self.verified, self.verifier = [], 0, None

    def _hold(self) -> None:
        """Hold the exact passes of this segment to their contract; revert only what breaks it."""
        if self.mode == "off" or self.verified == len(self.steps):
            return
        if self.verifier is None:
            narrowed = self.model if self.steps[0].pass_.narrows else None
            self.verifier = Verifier(self.steps[0].before, self.context, narrowed)
            self.notes |= dict.fromkeys(self.verifier.notes)
        if self.verifier.refused:
            raise PreconditionError(
                f"{self.steps[0].pass_.name}: the model does not run with the inputs asked for "
                f"({self.verifier.unable}); ask for sizes that it takes"
            )
        if self.verifier.unable is not None:
            self.notes[f"not compared numerically: {self.verifier.unable}"] = None
        # Each round takes out a pass, or switches off sites of one that is taken out if it is found again.
        while self.steps[self.verified :]:
            violation = self.verifier.violation(self.model)
            if violation is None:
                from_original = self.steps[0].before is self.original
                self.comparison = self.verifier.comparison if from_original else None
                break
            self._bisect(self.verifier, violation)
        self.verified = len(self.steps)
        if self.verifier.unable is None:
            self.notes[f"exact passes compared with {self.compared_with} on {self.verifier.description}"] = None

    def _bisect(self, verifier: Verifier, violation: Violation) -> None:
        """Revert one pass, or its guilty rewrites, and run again what followed it."""
        seen = {len(self.steps): violation}

        def breaks(count: int) -> bool:
            found = verifier.violation(self.steps[count].before)
            if found is not None:
                seen[count] = found
            return found is not None

        count = first_true(self.verified, len(self.steps), breaks)
        step, rest, violation = self.steps[count - 1], self.steps[count:], seen[count]
        sites = [] if step.entry.status == "partly reverted" else self._guilty_sites(step, verifier)
        self.model = clone(step.before)
        self.snapshot, self.idle, self.comparison = None, [], None
        del self.steps[count - 1 :]
        self.verified = min(self.verified, len(self.steps))
        why = f"reverted: {violation.reason}"
        self._blame(step.pass_, step.entry, step.before, violation, verifier, sites)
        if sites:
            self.reverted |= {(step.entry.name, site): why for site in sites}
            more = f" and {len(sites) - 3} more" if len(sites) > 3 else ""
            step.entry.status = "partly reverted"
            step.entry.reason = f"{why} (by the rewrite at {', '.join(sites[:3])}{more})"
            step.entry.reproducer = write_reproducer(
                step.before, step.pass_, violation, verifier.feeds, self.context.seed
            )
            self._step(step.pass_, step.entry)
        else:
            self._revert(step.pass_, step.entry, step.before, violation, verifier)
        for later in rest:
            self._step(later.pass_, later.entry)

    def _blame(
        self,
        pass_: Pass,
        entry: LedgerEntry,
        before: ir.Model,
        violation: Violation,
        verifier: Verifier | None,
        sites: Sequence[str] = (),
    ) -> None:
        """Keep what a bisection needs, of the first time; what comes later follows from it."""
        if entry.guilt is None:
            feeds = verifier.feeds if verifier is not None else []
            feed = feeds[violation.feed] if violation.feed < len(feeds) else None
            rewrites = dict.fromkeys(change.site for change in entry.changes)
            entry.guilt = Guilt(pass_, before, tuple(sites), tuple(rewrites), violation, feed)

    def _revert(
        self, pass_: Pass, entry: LedgerEntry, before: ir.Model, violation: Violation, verifier: Verifier | None = None
    ) -> None:
        """Put on record that the pass was undone whole."""
        self.distrusted.append(pass_)
        self._blame(pass_, entry, before, violation, verifier)
        feeds = verifier.feeds if verifier is not None else []
        entry.reproducer = write_reproducer(before, pass_, violation, feeds, self.context.seed)
        entry.status, entry.reason = "reverted", f"reverted: {violation.reason}"
        entry.changes, entry.metrics = [], {}
        entry.nodes = (entry.nodes[0], entry.nodes[0])
        entry.weight_bytes = (entry.weight_bytes[0], entry.weight_bytes[0])

    def _guilty_sites(self, step: _Step, verifier: Verifier) -> Sequence[str]:
        """The rewrites that break the contract; none where the pass cannot be switched off by site, or all break it."""
        sites = list(dict.fromkeys(change.site for change in step.entry.changes))

        def breaks(allowed: Sequence[str]) -> bool:
            model = clone(step.before)
            try:
                self._call(
                    step.pass_, model, step.entry.name, {(step.entry.name, s) for s in sites if s not in allowed}
                )
            except Exception:  # a crash without those rewrites is no better than a wrong result
                return True
            return verifier.violation(model) is not None

        if len(sites) < 2 or breaks([]):
            return []
        guilty: list[str] = []
        left = sites
        known = 0  # so many of ``left`` are harmless together
        while len(guilty) < MAX_GUILTY_SITES:
            rest = left
            known = first_true(known, len(rest), lambda count: breaks(rest[:count])) - 1  # noqa: B023  # used at once
            guilty.append(left[known])
            left = [site for site in left if site not in guilty]
            if not left:
                return []
            if not breaks(left):
                return guilty
        return []


def run_pass(pass_: Pass, model: ir.Model, context: Context, name: str) -> PassResult:
    """Run one pass on ``model`` and see that what it leaves is a graph; ``name`` is its name in messages.

    Raises:
        InternalError: the graph is broken.
        Exception: whatever the pass raises.
    """
    result = pass_.run(model, context)
    if not isinstance(result, PassResult):
        raise TypeError(f"it returned a {type(result).__name__}, not a PassResult")
    if result.changes:
        check_model(model, name)
    return result


def _size(model: ir.Model) -> tuple[int, int]:
    """(nodes, bytes of weights)."""
    return sum(1 for _ in nodes(model)), weight_bytes(model)


def first_true(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """A number up to ``high`` where ``holds`` turns true, known to be false at ``low`` and true at ``high``.

    Asks log2(high - low) times, and needs no monotony: just before the number, ``holds`` is false.
    """
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
