"""What the manager did, pass by pass, and the model it ended with."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.base import Change, Pass, Pipeline, Repeat, Skip

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.validation import Comparison
    from graphopt.verify import Feed, Violation


@dataclass(frozen=True)
class Guilt:
    """What a failed verification was traced to; ``graphopt bisect`` goes on from here."""

    pass_: Pass
    before: ir.Model
    """The model that the pass was given; its weights are shared with the original."""
    sites: tuple[str, ...]
    """The rewrites to blame; none: the pass as a whole."""
    rewrites: tuple[str, ...]
    """All that it made."""
    violation: Violation
    feed: Feed | None
    """The inputs that show it; None: none are needed (it crashed, broke the graph, changed the interface)."""


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
    reproducer: Path | None = None
    guilt: Guilt | None = None
    """Of a pass that was undone, the first time."""

    def as_dict(self) -> dict[str, Any]:
        """As the report prints it."""
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
            "reproducer": str(self.reproducer) if self.reproducer else None,
        }


def forget_reproducers(entries: Iterable[LedgerEntry | Mapping[str, Any]]) -> None:
    """Remove the reproducers of a run of which nobody will be told; entries may be those of its report."""
    for entry in entries:
        folder = entry.reproducer if isinstance(entry, LedgerEntry) else entry["reproducer"]
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def told_or_forgotten(entries: Sequence[LedgerEntry]) -> Iterator[None]:
    """What fails here without a report that tells of the entries leaves no reproducers of theirs behind."""
    try:
        yield
    except BaseException as error:
        if getattr(error, "report", None) is None:
            forget_reproducers(entries)
        raise


@dataclass
class RunResult:
    """The model a pipeline ended with, and how it got there."""

    model: ir.Model
    ledger: list[LedgerEntry]
    notes: list[str]
    exact: ir.Model | None = None
    """The model as the last approximate pass that changed it found it; None where none changed anything."""
    comparison: Comparison | None = None
    """``model`` against the original, where verifying left one: see :class:`graphopt.verify.Verifier`."""
    adopted: Pass | None = None
    """The pass that made ``model`` in the place of the pipeline's one of that name, where a search chose another."""

    def as_ran(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline that makes ``model`` without a search."""
        if self.adopted is None:
            return pipeline
        done: dict[str, Pass] = {self.adopted.name: self.adopted}

        def one(step: Pass | Repeat) -> Pass | Repeat:
            if isinstance(step, Repeat):
                return Repeat(tuple(done.get(inner.name, inner) for inner in step.passes), step.times)
            return done.get(step.name, step)

        return [one(step) for step in pipeline]

    @property
    def reverted(self) -> list[LedgerEntry]:
        """The passes that were undone, wholly or in part."""
        return [e for e in self.ledger if "reverted" in e.status]

    @property
    def reproducer(self) -> Path | None:
        """The folder that shows the first pass that was undone."""
        return next((e.reproducer for e in self.ledger if e.reproducer), None)
