"""Tables of the HTML report: those of the terminal with columns that sort; the pages of ``inspect`` and ``diff``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphopt.report import diff as differences
from graphopt.report import inspection
from graphopt.report.figures import Card, Scale
from graphopt.report.table import Table
from graphopt.report.units import count, plural, size

Report = dict[str, Any]

_FOLDED = 40  # more differences than that open on a click
_PLURALS = {title: f"{title}s" for title in ("node", "weight", "declared shape", "function", "name")}

ROWS = 400
"""Rows of one table on a page; the JSON report has all."""

_UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "k": 1e3, "M": 1e6, "G": 1e9, "dB": 1, "%": 1, "x": 1}
_MEASURE = re.compile(r"([-+]?[\d.]+) ?(kB|MB|GB|B|k|M|G|dB|%|x)")


def grid(
    table: Table,
    *,
    heads: Sequence[str] | None = None,
    order: Sequence[int] | None = None,
    name: bool = False,
    kind: str = "data",
) -> Report:
    """A table for the page; columns without a word in them are left out.

    ``order``: of the columns, what matters most on a phone first. ``n`` in its ``align`` is a column of names;
    ``name``: the first is one. ``kind``: "data" sorts and is searched, "data narrow" takes no more width than it needs.
    """
    titles = list(heads or table.titles)
    sides = "n" + table.align[1:] if name else table.align
    columns = order or range(len(titles))
    used = [k for k in columns if titles[k] or any(row[k].plain for row in table.rows)]
    rows = [[(row[k].plain.strip(), sort_value(row[k].plain.strip())) for k in used] for row in table.rows]
    return {
        "heads": [(titles[k].strip(), sides[k]) for k in used],
        "rows": rows[:ROWS],
        "more": rest(len(rows) - ROWS),
        "kind": kind,
    }


def rest(left: int) -> str:
    """What a table that is cut says below it."""
    return f"and {left} more; --json has all" if left > 0 else ""


def sort_value(text: str) -> float | str | None:
    """What a cell sorts by where its text does not say it plainly; None: it does."""
    if text in ("identical", "exact"):
        return "inf"
    if text == "?":
        return ""
    found = _MEASURE.fullmatch(text)
    return float(found[1]) * _UNITS[found[2]] if found else None


def inspected(reports: list[Report]) -> Report:
    """The page of ``graphopt inspect``."""
    names = [name or "(model)" for name in inspection.names(reports)]
    one = reports[0] if len(reports) == 1 else None
    overview = inspection.overview(reports)
    overview.titles[0] = "what"
    parts = [_part("models", "What is in it" if one else "What is in them", grid(overview, kind=""))]
    if one:
        if one["bytes_by_type"]:
            parts.append({**_part("types", "Weights by type"), "bars": _bars(one["bytes_by_type"])})
        costs = inspection.costs(reports)
        parts.append(_part("operators", "Operators", grid(costs, name=True, kind="data narrow")))
        if one["largest"]:
            largest = inspection.largest(one)
            parts.append(
                _part("largest", "Largest tensors", grid(largest, heads=["name", *largest.titles[1:]], name=True))
            )
        for table in inspection.details(one):
            title = table.titles[0]
            heads = ["what" if title == "duplicates" else "name", *table.titles[1:-1], table.titles[-1] or "which"]
            parts.append(_part(title.replace(" ", "-"), title.capitalize(), grid(table, heads=heads)))
        if "node_costs" in one:
            parts.append(_part("nodes", "Nodes", grid(inspection.nodes(one["node_costs"]), name=True)))
        if "tree" in one:
            modules = grid(inspection.modules(one["tree"], depth=None), name=True)
            parts.append(_part("modules", "Modules", modules))
        for index, node in enumerate(one.get("node") or []):
            text = "\n".join(str(line) for line in inspection.neighbourhood(node))
            parts.append({**_part(f"node-{index}", "One node" if not index else "And another"), "pre": text})
    else:
        parts.append(_part("operators", "Operators", grid(inspection.operators(reports, limit=None), name=True)))
    return {
        "verb": "inspect",
        "title": (Path(names[0]).name if one else plural(len(names), "model"), "", ""),
        "cards": _cards(one) if one else [],
        "tables": parts,
        "schema": reports[0]["schema_version"],
    }


def _part(id: str, title: str, *grids: Report) -> Report:
    return {"id": id, "title": title, "text": "", "bars": [], "grids": list(grids), "pre": "", "folded": ""}


def _bars(sizes: dict[str, int]) -> list[Report]:
    scale = Scale(0, max(sizes.values(), default=0))
    return [{"name": name, "text": size(n), "width": scale.at(n)} for name, n in sizes.items()]


def _cards(one: Report) -> list[Card]:
    macs, peak, q = one["macs"], one["activation_peak"]["bytes"], one["quantization"]
    unknown = one["macs_unknown_nodes"]
    share = [] if q is None else [f"{q['heavy_nodes_integer']} of {q['heavy_nodes']} heavy nodes in integers"]
    return [
        Card("File", size(one["bytes"] + one["external_bytes"]), [f"{plural(one['nodes'], 'node')}", *share]),
        Card("Parameters", count(one["parameters"]), [f"{size(one['weight_bytes'])} of weights"]),
        Card("Multiply-accumulates", count(macs), [f"and ? for {plural(unknown, 'node')}"] if unknown else []),
        Card("Activations at once", "?" if peak is None else size(peak), ["at their peak; unknown dims count as 1"]),
    ]


def ports(report: Report) -> list[Report]:
    """What a piece that was cut out takes and gives; nothing for other verbs."""
    if report["verb"] != "extract":
        return []
    table = Table(["", "name", "type"], "lnl")
    for side in ("inputs", "outputs"):
        for value in report[side]:
            table.add(side[:-1], value["name"], value["type"])
    return [_part("ports", "Inputs and outputs of the piece", grid(table, heads=["what", "name", "type"]))]


def differing(report: Report) -> Report:
    """The page of ``graphopt diff``."""
    a, b = report["models"]
    lines = [line.plain for line in differences.heading(report)]
    parts = []
    for section, title in differences.TITLES.items():
        found = report[section]
        if found:
            table = grid(differences.table(section, found), heads=["change", title, "type", "what"])
            table["heads"][:2] = [("change", "k"), (title, "n")]
            part = _part(f"in-{section}", f"{_PLURALS.get(title, title).capitalize()} ({len(found)})", table)
            kinds = Counter(one["kind"] for one in found)
            part["text"] = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
            part["folded"] = (
                f"Show {'them' if len(found) <= ROWS else f'the first {ROWS}'}" if len(found) > _FOLDED else ""
            )
            parts.append(part)
    number = report["differences"]
    said = lines[1].partition("(")[2].removesuffix(")")
    paths = [one["path"] or letter for one, letter in zip((a, b), "AB", strict=True)]
    names = [Path(path).name for path in paths]
    return {
        "verb": "diff",
        "title": (names[0], "against", names[1]),
        "verdict": ("warn", plural(number, "difference"), said) if number else ("good", "No difference", said),
        "data": [(letter, "", [path]) for letter, path in zip("AB", paths, strict=True)],
        "tables": parts,
        "schema": report["schema_version"],
    }
