"""What ``graphopt lint`` prints: findings by rule, errors first, each with its places and its fix."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import IO, Any

from rich.text import Text

from graphopt.report.result import dim
from graphopt.report.text import _page
from graphopt.report.units import plural

SHOWN = 3
"""Nodes named for one problem on one screen; ``-v`` names all."""

_STYLE = {"error": "red", "warning": "yellow"}


def print_findings(report: dict[str, Any], *, verbose: bool = False, stream: IO[str] | None = None) -> None:
    """The findings, grouped by rule and problem."""
    with _page(stream) as page:
        page.lines(_heading(report))
        key = ("severity", "rule", "problem")
        ordered = sorted(report["findings"], key=lambda f: [f[k] for k in key])  # "error" sorts before "warning"
        for (severity, rule, problem), group in groupby(ordered, key=lambda f: tuple(f[k] for k in key)):
            found = list(group)
            page.block(_problem(severity, rule, problem, found, verbose))
        page.block([f"note: {note}" for note in report["notes"]])


def _heading(report: dict[str, Any]) -> Iterator[Text]:
    path = report["path"] or "the model"
    yield Text(path, style="bold").append(f" for {report['target']}", style="not bold")
    counts = [plural(report[f"{kind}s"], kind) for kind in ("error", "warning") if report[f"{kind}s"]]
    style = "red" if report["errors"] else "yellow" if counts else "green"
    has = ", ".join(f"{count} {kind}" for kind, count in report["quantization"].items())
    yield Text(", ".join(counts) or "no finding", style=style).append(f" ({has})" if has else "", style="dim")


def _problem(severity: str, rule: str, problem: str, found: list[dict[str, Any]], verbose: bool) -> Iterator[Text]:
    yield Text(severity, style=_STYLE[severity]).append(f" {rule}: ", style="bold").append(problem, style="not bold")
    names = [f["node"] for f in found] if verbose else [f["node"] for f in found[:SHOWN]]
    more = f" and {len(found) - len(names)} more (-v names all)" if len(found) > len(names) else ""
    yield Text(f"  at {', '.join(names)}{more}")
    yield Text(f"  fix: {found[0]['fix']}")
    if found[0]["source"]:
        yield dim(f"  see {found[0]['source']}")
