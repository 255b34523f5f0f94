"""The tables of ``graphopt inspect``: one model, or several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphopt.report.table import Table
from graphopt.report.units import count, plural, size

_SHOWN = 24


def overview(reports: list[dict[str, Any]]) -> Table:
    """What each model is; inputs and outputs one a row."""
    table = Table(["", *_names(reports)], "l" + "l" * len(reports))
    for title, value in (
        ("file size", _file_size),
        ("opsets", lambda r: ", ".join(f"{k} {v}" for k, v in r["opsets"].items())),
        ("IR version", lambda r: str(r["ir_version"])),
        ("producer", lambda r: r["producer"] or ""),
        ("parameters", lambda r: count(r["parameters"])),
        ("weights", lambda r: size(r["weight_bytes"])),
        ("  by type", lambda r: ", ".join(f"{k} {size(v)}" for k, v in r["bytes_by_type"].items())),
        ("MACs", _macs),
        ("quantized", _coverage),
    ):
        table.add(title, *(value(r) for r in reports))
    for side in ("inputs", "outputs"):
        for index in range(max(len(r[side]) for r in reports)):
            table.add(
                side[:-1] if index == 0 else "",
                *(_port(r[side][index]) if index < len(r[side]) else "" for r in reports),
            )
    table.add("nodes", *(_nodes(r) for r in reports))
    if len(reports) == 1:
        found = reports[0]["operators"]
        table.add("operators", ", ".join(f"{n} {name}" for name, n in found.items()) or "none")
    return table


def operators(reports: list[dict[str, Any]], *, limit: int | None = _SHOWN) -> Table:
    """Operator counts side by side, the most frequent first."""
    table = Table(["operator", *_names(reports), ""], "l" + "r" * len(reports) + "l")
    most = {n: max(r["operators"].get(n, 0) for r in reports) for r in reports for n in r["operators"]}
    names = sorted(most, key=lambda n: (-most[n], n))
    for name in names[:limit]:
        table.add(name, *(str(r["operators"].get(name, "")) for r in reports))
    if limit is not None and len(names) > limit:
        table.add(f"{plural(len(names) - limit, 'more operator')}; -v")
    return table


def largest(report: dict[str, Any]) -> Table:
    """The tensors that take most of the file."""
    table = Table(["largest tensors", "type", "shape", "size", ""], "lllrl")
    for tensor in report["largest"]:
        shape = "x".join(map(str, tensor["shape"])) or "scalar"
        table.add(tensor["name"], tensor["type"], shape, size(tensor["bytes"]))
    return table


def _names(reports: list[dict[str, Any]]) -> list[str]:
    paths = [r["path"] or "(model)" for r in reports]
    short = [Path(p).name for p in paths]
    return short if len(paths) > 1 and len(set(short)) == len(short) else paths


def _file_size(report: dict[str, Any]) -> str:
    outside = report["external_bytes"]
    return size(report["bytes"]) + (f" and {size(outside)} of external weights" if outside else "")


def _nodes(report: dict[str, Any]) -> str:
    graphs = f" in {report['subgraphs'] + 1} graphs" if report["subgraphs"] else ""
    return (
        str(report["nodes"]) + graphs + (f", {plural(report['functions'], 'function')}" if report["functions"] else "")
    )


def _macs(report: dict[str, Any]) -> str:
    unknown = report["macs_unknown_nodes"]
    if not unknown:
        return count(report["macs"])
    known = f"{count(report['macs'])} and " if report["macs"] else ""
    return f"{known}? for {plural(unknown, 'node')} of unknown shape"


def _coverage(report: dict[str, Any]) -> str:
    q = report["quantization"]
    if q is None:
        return "no"
    return (
        f"{q['heavy_nodes_integer']} of {q['heavy_nodes']} heavy nodes; {plural(q['quantize_nodes'], 'QuantizeLinear')}"
    )


def _port(value: dict[str, Any]) -> str:
    shape = "[...]" if value["shape"] is None else f"[{', '.join(map(str, value['shape']))}]"
    return f"{value['name']}  {value['type']}{shape}"
