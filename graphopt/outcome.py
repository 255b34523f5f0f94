"""How a run ends: the report it fills, and the errors that carry it."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from graphopt.base import Pipeline, flatten
from graphopt.errors import GateFailed, GraphoptError, NothingDone
from graphopt.judge import Verdict

if TYPE_CHECKING:
    from graphopt.ledger import RunResult


def blank(about_input: dict[str, Any]) -> dict[str, Any]:
    """The keys of a report on a model that is made, before anything is done."""
    return {
        "input": about_input,
        "output": None,
        "data": None,
        "eval_data": None,
        "ledger": [],
        "sensitivity": None,
        **Verdict().as_dict(),
        "floor": None,
        "never_slower": None,
        "placement": None,
        "tuning": None,
        "package": None,
        "notes": [],
        "reproducer": None,
        "exit_code": 0,
        "error": None,
    }


def something_done(result: RunResult, pipeline: Pipeline, must: Collection[str], report: dict[str, Any]) -> None:
    """Raise NothingDone where a pass did not do what the user asked it for."""
    narrowing = {step.name for step in flatten(pipeline) if step.narrows}
    for name in dict.fromkeys((*narrowing, *must)):
        entry = next(e for e in result.ledger if e.name == name)
        if entry.changes or (name not in must and entry.status != "reverted"):
            continue
        reasons = list(dict.fromkeys(s.reason for s in entry.skipped)) or [entry.reason or "no reason was given"]
        shown = "; ".join(reasons[:4]) + (f"; and {len(reasons) - 4} more" if len(reasons) > 4 else "")
        raise with_report(NothingDone(f"{name} changed nothing: {shown}; nothing was written"), report)


def narrowed(result: RunResult, pipeline: Pipeline) -> list[str]:
    """What the result does not take any more, or why it still does: a note for each pass that was asked."""
    names = {step.name for step in flatten(pipeline) if step.narrows}
    found: list[str] = []
    for entry in (e for e in result.ledger if e.name in names):
        told = [f"{c.site} {c.detail}" for c in entry.changes] or [f"nothing, {s.reason}" for s in entry.skipped]
        more = f"; and {len(told) - 4} more" if len(told) > 4 else ""
        found.append(f"{entry.name}, as asked: {'; '.join(told[:4])}{more}")
    return found


def hold(verdict: Verdict, result: RunResult, report: dict[str, Any], *, strict: bool) -> None:
    """Raise where a gate failed, a revert matters to the user, or the result is slower than was promised."""
    problems = [f"gate {g.gate} {g.asked} failed: {g.measured}" for g in verdict.failed]
    floor = report["floor"]
    if floor is not None and floor["holds"] is False:
        problems.append(
            f"quantized, its worst output keeps {floor['result_db'] or 0:.1f} dB SQNR on calibration samples held "
            f"back, below the floor of {floor['limit_db']:g} dB; no smaller part keeps more; a lower "
            "--min-sqnr writes it all the same, --metric with --max-drop judges it by its task"
        )
    if strict and result.reverted:
        problems += [f"pass {e.name} was {e.status}: {e.reason}" for e in result.reverted]
    if problems:
        raise with_report(GateFailed("; ".join(problems) + "; nothing was written"), report)
    promised = report["never_slower"]
    if promised is not None and promised["holds"] is False:
        raise with_report(
            NothingDone(
                f"nothing here is faster on this machine: it takes {promised['why']}; --allow-slower writes "
                "it all the same; nothing was written"
            ),
            report,
        )


def with_report(error: GraphoptError, report: dict[str, Any]) -> GraphoptError:
    """``error``, carrying everything that was measured before it."""
    report["error"], report["exit_code"] = str(error), int(error.exit_code)
    error.report = report
    return error


def merge_notes(notes: list[str], more: list[str]) -> None:
    """Append, but a reason that two stages met (the model does not run here) is told once, by the later one."""
    for note in more:
        _, _, reason = note.partition(": ")
        notes[:] = [n for n in notes if not reason or not n.endswith(reason)]
        notes.append(note)
