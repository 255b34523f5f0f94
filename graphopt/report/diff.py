"""The tables of ``graphopt diff``: one line a difference, the names of A first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import IO, Any

from rich.text import Text

from graphopt.external import shown
from graphopt.report.result import dim
from graphopt.report.table import Table
from graphopt.report.text import _page
from graphopt.report.units import plural

SHOWN = 12
"""Differences of one section on one screen; ``-v`` shows all."""

_STYLE = {"added": "green", "removed": "red", "changed": "yellow"}
TITLES = {
    "model": "model",
    "interface": "inputs and outputs",
    "nodes": "node",
    "weights": "weight",
    "declared": "declared shape",
    "functions": "function",
    "texts": "doc string or metadata",
    "names": "name",
}
"""What each section lists."""


def print_diff(report: dict[str, Any], *, verbose: bool = False, stream: IO[str] | None = None) -> None:
    """What ``graphopt diff`` has to say."""
    with _page(stream) as page:
        page.lines(heading(report))
        for name in TITLES:
            found = report[name]
            if found:
                page.block(page.table(table(name, found if verbose else found[:SHOWN])))
                if len(found) > SHOWN and not verbose:
                    page.lines([dim(f"and {len(found) - SHOWN} more; -v shows all")])


def heading(report: dict[str, Any]) -> Iterator[Text]:
    """What was compared, and how much differs."""
    a, b = report["models"]
    yield Text(a["path"] or "A", style="bold").append(" against ", style="not bold").append(b["path"] or "B")
    aligned, renamed = report["aligned"], report["renamed"]
    same = f"{plural(aligned['nodes'], 'node')} and {plural(aligned['weights'], 'weight')} correspond"
    others = [plural(count, what[:-1]) for what, count in renamed.items() if count]
    same += f"; {_listed(others)} {'has' if sum(renamed.values()) == 1 else 'have'} another name" if others else ""
    count = report["differences"]
    answer = Text(plural(count, "difference"), style="yellow") if count else Text("no difference", style="green")
    yield answer.append(f" ({same})", style="dim")


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def table(section: str, found: list[dict[str, Any]]) -> Table:
    """The differences of one section, one a line."""
    made = Table(["", TITLES[section], "", ""], "llll")
    detail = _DETAILS.get(section, _edits)
    for one in found:
        name = one["name"] + (f" in {one['scope']}" if one["scope"] else "")
        kind = Text(one["kind"], style=_STYLE[one["kind"]])
        made.add(kind, *(shown(text) for text in (name, one["type"] or "")), _plain(detail(one)))
    return made


def _plain(text: str) -> str:
    """Strangers' names stand in it: nothing that a terminal would obey."""
    return text if text.isprintable() else "".join(shown(c) for c in text)


def _edits(one: dict[str, Any]) -> str:
    """``axis 1 -> -1; input 0 a -> b``."""
    found = []
    for edit in one["changes"]:
        what = "" if edit["what"] == one["name"] or one["name"] == f"model {edit['what']}" else f"{edit['what']} "
        before, after = ("none" if edit[side] is None else edit[side] for side in ("before", "after"))
        found.append(f"{what}{before} -> {after}")
    return "; ".join(found)


def _node(one: dict[str, Any]) -> str:
    if one["kind"] == "changed":
        return _edits(one)
    reads = ", ".join(name or "none" for name in one["inputs"]) or "nothing"
    return f"reads {reads}; read by {', '.join(one['used_by'][:3]) or 'nothing'}" + (
        f" and {len(one['used_by']) - 3} more" if len(one["used_by"]) > 3 else ""
    )


def _weight(one: dict[str, Any]) -> str:
    if one["kind"] != "changed":
        other = one.get("copy_of")
        done = "no longer shared" if one["kind"] == "added" else "shared now"
        return f"the same bytes as {other}, {done}" if other else ""
    parts = [f"{e['what']} {e['before']} -> {e['after']}" for e in one["changes"] if e["what"] != "elements"]
    if one.get("elements_differ"):
        parts.append(f"{one['elements_differ']} of {plural(one['elements'], 'element')}")
        if one["bytes_differ"] is not None:
            parts.append(plural(one["bytes_differ"], "byte"))
        if one["max_abs"] is not None:
            parts.append(f"max abs {one['max_abs']:.3g}")
        if one["not_finite"]:
            parts.append(f"{one['not_finite']} not finite")
    elif len(parts) < len(one["changes"]):
        parts.append("other elements")
    return ", ".join(parts)


_DETAILS: dict[str, Callable[[dict[str, Any]], str]] = {"nodes": _node, "weights": _weight}
