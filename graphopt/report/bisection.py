"""What ``graphopt bisect`` found, in a few lines: the pass, the rewrite, the value, the piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from rich.text import Text

from graphopt.external import shown
from graphopt.report.result import dim, left_out
from graphopt.report.text import _page
from graphopt.report.units import plural

SHOWN = 3
"""Rewrites named; ``-v`` names all."""


def print_bisection(report: dict[str, Any], *, verbose: bool = False, stream: IO[str] | None = None) -> None:
    """What ``graphopt bisect`` has to say."""
    with _page(stream) as page:
        page.lines([_heading(report)])
        if report["guilty"]:
            page.block(_row(*line) for line in _found(report, verbose))
        page.block(left_out(report))
        if verbose or not report["guilty"]:
            page.block(dim(note) for note in report["notes"])


def _heading(report: dict[str, Any]) -> Text:
    bad, name = len(report["guilty"]), report["input"]["path"] or "model"
    of = f" of {plural(report['passes'], 'pass')}".replace("passs", "passes")
    what = f"{bad}{of} {'diverges' if bad == 1 else 'diverge'}" if bad else f"nothing diverges ({of[4:]})"
    return Text(name, style="bold").append(": ", style="not bold").append(what, style="red" if bad else "green")


def _row(title: str, text: str) -> Text:
    return Text(title.ljust(9), style="dim").append(text, style="not dim")


def _found(report: dict[str, Any], verbose: bool) -> Iterator[tuple[str, str]]:
    first, *others = report["guilty"]
    yield "pass", f"{shown(first['pass'])} (step {first['step']} of {report['passes']})"
    yield "rewrite", _rewrites(first, None if verbose else SHOWN)
    yield "reason", shown(first["reason"])
    value = report["value"]
    if value is not None:
        made = f" ({value['op_type']} '{shown(value['node'])}')" if value["op_type"] else ""
        yield "value", f"'{shown(value['value'])}'{made}: {value['why']}"
        if value["differ"] is not None:
            yield "", f"{value['differ']} of {value['elements']} elements of {value['dtype']}{value['shape']} differ"
            for which in ("first", "worst") if value["first"] != value["worst"] else ("first",):
                at = value[which]
                yield "", f"{which} at {at['index']}: {at['before']} before, {at['after']} after"
    else:
        yield "value", "none: it crashed, broke the graph or the interface, or shows with optimizations on only"
    repro = report["repro"]
    piece = f"{repro['nodes']} of {plural(repro['of'], 'node')} on which it still goes wrong"
    if repro["path"] is None:
        yield "repro", f"{piece}; give -o repro.onnx to have them"
    else:
        beside = [repro[k] for k in ("data", "recipe") if repro[k] is not None]
        yield "repro", f"{repro['path']}: {piece} (with {', '.join(beside)})"
        yield "", repro["command"]
    for other in others:
        yield "also", f"{shown(other['pass'])} (step {other['step']}): {_rewrites(other, SHOWN)}"


def _rewrites(entry: dict[str, Any], limit: int | None) -> str:
    sites, count = entry["sites"], entry["rewrites"]
    if not sites:
        return f"the pass as a whole ({plural(count, 'rewrite')})"
    named = ", ".join(shown(s) for s in sites[:limit]) + (", ..." if limit and len(sites) > limit else "")
    return f"{named} ({len(sites)} of {plural(count, 'rewrite')}; the rest is right)"
