"""The report for a terminal: one screen, aligned, colour only where there is a person."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

_SHOWN = 8

_STATUS_STYLE = {"changed": "green", "reverted": "red", "partly reverted": "yellow", "skipped": "yellow"}


def console(stream: IO[str] | None = None) -> Console:
    """A console that wraps at the terminal's width, or at 120 columns where there is none."""
    target = stream or sys.stdout
    width = None if target.isatty() else 120
    return Console(file=target, width=width, highlight=False, soft_wrap=False)


def size(count: float) -> str:
    """Bytes for a person: 912.5 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def count(number: int | None) -> str:
    """A count for a person: 9.33 M, or ``?``."""
    if number is None:
        return "?"
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return str(number)


def seconds(value: float) -> str:
    """A duration for a person: 5.71 ms."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value * 1e6:.0f} us"


def print_result(report: dict[str, Any], *, verbose: bool = False, stream: IO[str] | None = None) -> None:
    """What a verb that makes a model has to say."""
    out = console(stream)
    source, result = report["input"], report.get("output")
    name = source["path"] or "(model)"
    target = (result or {}).get("path")
    machine = report["machine"]
    out.print(
        f"[bold]{escape(name)}[/bold]" + (f" -> [bold]{escape(target)}[/bold]" if target else ""),
        f"[dim]{escape(report['options']['target'])}, ONNX Runtime {report['versions']['onnxruntime']}, "
        f"{escape(machine['cpu'])}{' with VNNI' if machine['vnni'] else ''}[/dim]",
        sep="\n",
    )
    if result is not None:
        out.print(Padding(_before_after(report), (1, 0, 0, 0), expand=False))
    out.print(Padding(_ledger(report["ledger"]), (1, 0, 0, 0), expand=False))
    for entry in report["ledger"]:
        _quantization(out, entry, verbose)
        if verbose:
            _changes(out, entry)
    _notes(out, report)
    _gates(out, report.get("gates") or [])


def _before_after(report: dict[str, Any]) -> Table:
    a, b = report["input"], report["output"]
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for title in ("original", "result", "ratio"):
        table.add_column(title, justify="right")
    table.add_column("")
    table.add_row("file size", size(a["bytes"]), size(b["bytes"]), f"{b['bytes'] / max(a['bytes'], 1):.3f}x")
    table.add_row(
        "weights", size(a["weight_bytes"]), size(b["weight_bytes"]), _ratio(b["weight_bytes"], a["weight_bytes"])
    )
    table.add_row("nodes", str(a["nodes"]), str(b["nodes"]), _ratio(b["nodes"], a["nodes"]))
    if report.get("latency_ratio"):
        ratio, times = report["latency_ratio"], report["latency"]
        threads = report["options"]["threads"] or 1
        table.add_row(
            f"latency, {threads} thread{'s' if threads > 1 else ''}",
            seconds(times["original"]["median"]),
            seconds(times["candidate"]["median"]),
            f"{ratio['median']:.3f}x",
            f"[dim]{ratio['low']:.3f} to {ratio['high']:.3f}[/dim]" + _slower(ratio),
        )
    if report.get("metric"):
        m = report["metric"]
        table.add_row(
            escape(m["name"]),
            f"{m['original']:.4f}",
            f"{m['candidate']:.4f}",
            f"{m['difference']:+.4f}",
            f"[dim]95 %: {m['low']:+.4f} to {m['high']:+.4f}, {m['samples']} samples[/dim]",
        )
    comparison = report.get("comparison")
    for output in (comparison or {}).get("outputs", [])[:_SHOWN]:
        table.add_row(f"output {escape(output['output'])}", "", *_closeness(output))
    return table


def _slower(ratio: dict[str, float]) -> str:
    return "  [yellow]slower here[/yellow]" if ratio["low"] > 1 else ""


def _closeness(output: dict[str, Any]) -> tuple[str, str, str]:
    if output["nondeterministic"]:
        return "", "", "[dim]non-deterministic in the original[/dim]"
    if output["mismatch"]:
        return "", "", f"[red]{escape(output['mismatch'])}[/red]"
    if output["identical"]:
        return "identical", "", ""
    sqnr = "" if output["sqnr_db"] is None else f"{output['sqnr_db']:.1f} dB"
    agreement = output["top1_agreement"]
    extra = f"max abs diff {output['max_abs']:.3g}, cosine {output['cosine']:.6f}"
    if agreement is not None:
        extra += f", top-1 agrees {100 * agreement:.1f} %"
    return sqnr, "", f"[dim]{extra}[/dim]"


def _ratio(after: float, before: float) -> str:
    return f"{after / before:.3f}x" if before else ""


def _ledger(entries: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title, side in (
        ("pass", "left"),
        ("status", "left"),
        ("changes", "right"),
        ("nodes", "right"),
        ("time", "right"),
        ("", "left"),
    ):
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    for entry in entries:
        style = _STATUS_STYLE.get(entry["status"], "dim")
        reason = entry["reason"]
        if reason is None and not entry["changes"] and entry["skipped"]:
            reason = entry["skipped"][0]["reason"]
        table.add_row(
            escape(entry["pass"]),
            f"[{style}]{entry['status']}[/{style}]",
            str(len(entry["changes"]) or ""),
            str(entry["nodes"][0])
            if entry["nodes"][0] == entry["nodes"][1]
            else f"{entry['nodes'][0]} -> {entry['nodes'][1]}",
            seconds(entry["seconds"]),
            f"[dim]{escape(reason or '')}[/dim]",
        )
    return table


def _quantization(out: Console, entry: dict[str, Any], verbose: bool) -> None:
    """Coverage, and what stayed in float and why."""
    if not entry["pass"].startswith("quantize"):
        return
    m = entry["metrics"]
    if m.get("layers_quantized"):
        kinds = ", ".join(f"{v} {k}" for k, v in sorted(m["weight_kinds"].items()))
        macs = "?" if m["macs_percent"] is None else f"{m['macs_percent']:.1f} %"
        partial = "" if m["macs_complete"] else " of those known"
        out.print(
            f"\nin integers: {m['layers_quantized']} layers, {macs} of the MACs{partial}, "
            f"{m['weight_bytes_percent']:.1f} % of the weight bytes [dim](weights: {kinds}; {m['samples']} samples)[/dim]"
        )
    if entry["skipped"] and entry["changes"]:
        out.print(f"left in float: {len(entry['skipped'])} nodes")
        for line in _grouped(entry["skipped"], None if verbose else _SHOWN):
            out.print(f"  {line}", soft_wrap=True)


def _grouped(skips: Iterable[dict[str, str]], limit: int | None) -> list[str]:
    """Skips with one reason are one line."""
    groups: dict[str, list[str]] = {}
    for skip in skips:
        groups.setdefault(skip["reason"], []).append(skip["site"])
    lines = []
    for reason, sites in list(groups.items())[:limit]:
        names = ", ".join(sites if limit is None else sites[:2])
        more = f" and {len(sites) - 2} more" if limit is not None and len(sites) > 2 else ""
        lines.append(f"{escape(reason)} [dim]({escape(names)}{more})[/dim]")
    if limit is not None and len(groups) > limit:
        lines.append(f"[dim]and {len(groups) - limit} more reasons; -v shows all[/dim]")
    return lines


def _changes(out: Console, entry: dict[str, Any]) -> None:
    if entry["changes"]:
        out.print(f"\n[bold]{escape(entry['pass'])}[/bold]")
    for change in entry["changes"]:
        out.print(
            f"  {change['action']} {escape(change['site'])} [dim]{escape(change['detail'])}[/dim]", soft_wrap=True
        )


def _notes(out: Console, report: dict[str, Any]) -> None:
    notes = [n for n in report.get("notes", []) if n]
    for key in ("data", "eval_data"):
        about = report.get(key) or {}
        notes += [
            f"{key.replace('_', ' ')}: {text}" for text in (*about.get("notes", []), *about.get("skipped", [])[:3])
        ]
    if report.get("reproducer"):
        notes.append(f"reproducer: {report['reproducer']}")
    if notes:
        out.print()
    for note in dict.fromkeys(notes):
        style = "yellow" if note.startswith("WARNING") else "dim"
        out.print(f"[{style}]note: {escape(note)}[/{style}]", soft_wrap=True)


def _gates(out: Console, gates: list[dict[str, Any]]) -> None:
    if gates:
        out.print()
    for gate in gates:
        word = "[green]holds[/green]" if gate["passed"] else "[red]FAILED[/red]"
        out.print(
            f"gate {gate['gate']} {escape(gate['asked'])}: {word} [dim]({escape(gate['measured'])})[/dim]",
            soft_wrap=True,
        )


def print_comparison(report: dict[str, Any], *, stream: IO[str] | None = None) -> None:
    """What ``graphopt compare`` has to say."""
    out = console(stream)
    a, b = report["models"]
    out.print(f"[bold]{escape(a['path'] or 'A')}[/bold] against [bold]{escape(b['path'] or 'B')}[/bold]")
    about = report["data"]
    out.print(f"[dim]{about['samples']} samples from {escape(str(about['source']))}[/dim]\n")
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("output")
    for title in ("max abs", "max rel", "SQNR", "cosine", "top-1 agrees"):
        table.add_column(title, justify="right")
    table.add_column("")
    for o in report["comparison"]["outputs"]:
        agreement = "" if o["top1_agreement"] is None else f"{100 * o['top1_agreement']:.1f} %"
        sqnr = "identical" if o["identical"] else "" if o["sqnr_db"] is None else f"{o['sqnr_db']:.1f} dB"
        remark = o["mismatch"] or ("non-deterministic" if o["nondeterministic"] else "")
        table.add_row(
            escape(o["output"]),
            f"{o['max_abs']:.3g}",
            f"{o['max_rel']:.3g}",
            sqnr,
            f"{o['cosine']:.6f}",
            agreement,
            f"[red]{escape(remark)}[/red]",
        )
    out.print(table)
    if report["metric"]:
        m = report["metric"]
        out.print(
            f"\n{escape(m['name'])}: {m['original']:.4f} -> {m['candidate']:.4f}, difference {m['difference']:+.4f} "
            f"[dim](95 %: {m['low']:+.4f} to {m['high']:+.4f}, {m['samples']} samples)[/dim]"
        )
    _notes(out, report)
    _gates(out, report.get("gates") or [])


def print_inspection(reports: list[dict[str, Any]], *, stream: IO[str] | None = None) -> None:
    """What ``graphopt inspect`` has to say; several models stand side by side."""
    out = console(stream)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for report in reports:
        table.add_column(
            escape(report["path"] or "(model)"), justify="right" if len(reports) > 1 else "left", overflow="fold"
        )
    rows: list[tuple[str, Any]] = [
        ("file size", lambda r: size(r["bytes"])),
        ("opsets", lambda r: ", ".join(f"{k} {v}" for k, v in r["opsets"].items())),
        ("IR version", lambda r: str(r["ir_version"])),
        ("producer", lambda r: r["producer"] or ""),
        ("nodes", lambda r: str(r["nodes"]) + (f" in {r['subgraphs'] + 1} graphs" if r["subgraphs"] else "")),
        ("parameters", lambda r: count(r["parameters"])),
        ("weights", lambda r: size(r["weight_bytes"])),
        ("  by type", lambda r: ", ".join(f"{k} {size(v)}" for k, v in r["bytes_by_type"].items())),
        (
            "MACs",
            lambda r: count(r["macs"]) + (f" and {r['macs_unknown_nodes']} nodes ?" if r["macs_unknown_nodes"] else ""),
        ),
        ("quantized", _coverage),
    ]
    for title, value in rows:
        table.add_row(title, *(escape(value(r)) for r in reports))
    for side in ("inputs", "outputs"):
        table.add_row(side[:-1], *("\n".join(escape(_port(v)) for v in r[side]) for r in reports))
    out.print(table)
    operators = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    operators.add_column("operator")
    for _ in reports:
        operators.add_column("", justify="right")
    names = sorted(
        {n for r in reports for n in r["operators"]}, key=lambda n: (-max(r["operators"].get(n, 0) for r in reports), n)
    )
    for name in names:
        operators.add_row(escape(name), *(str(r["operators"].get(name, "")) for r in reports))
    out.print(Padding(operators, (1, 0, 0, 0), expand=False))
    if len(reports) == 1 and reports[0]["largest"]:
        largest = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for title in ("largest tensors", "type", "shape", "bytes"):
            largest.add_column(title, justify="right" if title == "bytes" else "left")
        for tensor in reports[0]["largest"]:
            shape = "x".join(map(str, tensor["shape"])) or "scalar"
            largest.add_row(escape(tensor["name"]), tensor["type"], shape, size(tensor["bytes"]))
        out.print(Padding(largest, (1, 0, 0, 0), expand=False))


def _coverage(report: dict[str, Any]) -> str:
    q = report["quantization"]
    return (
        "no"
        if q is None
        else f"{q['heavy_nodes_integer']} of {q['heavy_nodes']} heavy nodes, {q['quantize_nodes']} QuantizeLinear"
    )


def _port(value: dict[str, Any]) -> str:
    shape = "[...]" if value["shape"] is None else f"[{', '.join(map(str, value['shape']))}]"
    return f"{value['name']}  {value['type']}{shape}"
