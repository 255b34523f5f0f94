"""The tables of ``graphopt bench``: the models side by side, and the nodes that take the time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from rich.text import Text

from graphopt.report.result import dim, notes
from graphopt.report.table import Table
from graphopt.report.text import _page
from graphopt.report.units import plural, seconds

SHOWN = 12
"""Nodes of one profile on one screen; ``-v`` shows all."""


def print_bench(report: dict[str, Any], *, verbose: bool = False, stream: IO[str] | None = None) -> None:
    """What ``graphopt bench`` has to say."""
    names = [model["path"] or f"model {index}" for index, model in enumerate(report["models"], start=1)]
    with _page(stream) as page:
        machine = report["machine"]
        cpu = f"{machine['cpu']}{' with VNNI' if machine['vnni'] else ''}"
        page.lines([dim(f"ONNX Runtime {report['versions']['onnxruntime']}, {cpu}"), dim(_fed(report))])
        page.block(page.table(_timings(report, names)))
        for name, found in zip(names, report["profiles"] or [], strict=False):
            page.block(_profile_heading(name, found))
            page.lines(page.table(_nodes(found, None if verbose else SHOWN)))
            more = len(found["nodes"]) - SHOWN
            if more > 0 and not verbose:
                rest = sum(node["share"] for node in found["nodes"][SHOWN:])
                page.lines([dim(f"{plural(more, 'more node')} take {100 * rest:.1f} %; -v shows all")])
        page.block(notes(report))


def _fed(report: dict[str, Any]) -> str:
    shapes = ", ".join(f"{i['name']} {'x'.join(map(str, i['shape'])) or 'scalar'}" for i in report["inputs"])
    about = report["data"]
    if about["source"] == "random":
        return f"{plural(about['samples'], 'legal random input')} in turn: {shapes}"
    return f"samples of {about['source']} in turn, the first: {shapes}"


def _timings(report: dict[str, Any], names: list[str]) -> Table:
    table = Table(["model", "threads", "median", "quartiles", "runs", "ratio", ""], "lrrrrrl")
    for timing in report["timings"]:
        for name, one in zip(names, timing["results"], strict=True):
            ratio, remark = "", Text()
            if one["ratio"] is not None:
                ratio = f"{one['ratio']['median']:.3f}x"
                remark = dim(f"{one['ratio']['low']:.3f} to {one['ratio']['high']:.3f}")
                if one["ratio"]["low"] > 1:
                    remark.append("  slower", style="yellow")
            quartiles = f"{seconds(one['low'])} to {seconds(one['high'])}"
            table.add(name, str(timing["threads"]), seconds(one["median"]), quartiles, str(one["runs"]), ratio, remark)
    return table


def _profile_heading(name: str, found: dict[str, Any]) -> Iterator[Text]:
    line = Text(name, style="bold")
    about = (
        f": {seconds(found['seconds'])} in nodes ({plural(found['threads'], 'thread')}, median of {found['runs']} runs)"
    )
    yield line.append(about, style="not bold dim")


def _nodes(found: dict[str, Any], limit: int | None) -> Table:
    table = Table(["node", "operator", "time", "share", "runs as"], "llrrl")
    for node in found["nodes"][:limit]:
        runs_as = ", ".join(dict.fromkeys(part["op_type"] for part in node["runtime"]))
        if node["fused"]:
            runs_as += f" with {', '.join(node['fused'])}"
        name = node["node"] or f"({node['runtime'][0]['name']})"
        table.add(name, node["op_type"] or "", seconds(node["seconds"]), f"{100 * node['share']:.1f} %", dim(runs_as))
    return table
