"""What ``graphopt convert`` and ``graphopt export`` say on a terminal."""

from __future__ import annotations

from typing import IO, Any

from graphopt.report import result
from graphopt.report.result import dim
from graphopt.report.table import Table
from graphopt.report.text import _page
from graphopt.report.units import plural, seconds, size


def print_conversion(report: dict[str, Any], *, stream: IO[str] | None = None) -> None:
    """From what, with what, to what, and how near it is."""
    source, output = report["source"], report["output"]
    target = output["path"]
    to = "nothing was written" if report["exit_code"] else "stdout" if target == "-" else target or "(model)"
    with _page(stream) as page:
        page.lines([f"{report['input']['path'] or '(model)'} -> {to}"])
        page.lines(
            [
                dim(f"{source['title']}, {source['framework']}, {source['converter']}, {seconds(source['seconds'])}"),
                f"opset {output['opset']}, {plural(output['nodes'], 'node')}, {size(output['bytes'])}",
            ]
        )
        ports = Table(["", "", ""], "lll")
        for side in ("inputs", "outputs"):
            for value in report[side]:
                ports.add(f"  {side[:-1]}", value["name"], value["type"])
        page.block(page.table(ports))
        if report["comparison"] is not None:
            page.block(page.table(_outputs(report)))
            page.lines([dim(f"against {source['framework']} on {plural(report['comparison']['samples'], 'sample')}")])
        page.block(result.notes(report))


def _outputs(report: dict[str, Any]) -> Table:
    table = Table(["output", "max abs", "allowed", "SQNR", ""], "lrrrl")
    for output in report["comparison"]["outputs"]:
        if output["mismatch"]:
            table.add(output["output"], "", "", "", output["mismatch"])
            continue
        sqnr = (
            "identical" if output["identical"] else "" if output["sqnr_db"] is None else f"{output['sqnr_db']:.1f} dB"
        )
        limit = report["allowed"][output["output"]]
        verdict = "" if output["max_abs"] <= limit else "too far"
        table.add(output["output"], f"{output['max_abs']:.3g}", f"{limit:.3g}", sqnr, verdict)
    return table
