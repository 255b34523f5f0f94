"""The tables of a report on a model that was made: before and after, the ledger, what stayed in float."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from rich.text import Text

from graphopt.report.table import Table
from graphopt.report.units import plural, ratio, seconds, size

SHOWN = 8
"""Rows of one kind on one screen; ``-v`` shows all."""

_TOLD = 3
"""Samples that were left out, of which each is told."""

_STATUS_STYLE = {"changed": "green", "reverted": "red", "partly reverted": "yellow", "skipped": "yellow"}


def dim(text: str) -> Text:
    """A remark."""
    return Text(text, style="dim")


def before_after(report: dict[str, Any], *, limit: int | None = SHOWN) -> Table:
    """Size, nodes, operators whose count changed, latency, metric, and how close each output is."""
    a, b = report["input"], report["output"]
    table = Table(["", "original", "result", "ratio", ""], "lrrrl")
    table.add("file size", size(a["bytes"]), size(b["bytes"]), ratio(b["bytes"], a["bytes"]))
    table.add("weights", size(a["weight_bytes"]), size(b["weight_bytes"]), ratio(b["weight_bytes"], a["weight_bytes"]))
    table.add("nodes", str(a["nodes"]), str(b["nodes"]), ratio(b["nodes"], a["nodes"]))
    changed = changed_operators(a["operators"], b["operators"])
    for name, before, after in changed[:limit]:
        table.add(f"  {name}", str(before), str(after), ratio(after, before))
    if limit is not None and len(changed) > limit:
        table.add(dim(f"  {plural(len(changed) - limit, 'more operator')}"), dim("..."), dim("-v"))
    _measured(table, report)
    comparison = report.get("comparison")
    outputs = comparison["outputs"] if comparison else []
    for output in outputs[:limit]:
        table.add(f"output {output['output']}", "", *closeness(output))
    if limit is not None and len(outputs) > limit:
        table.add(dim(plural(len(outputs) - limit, "more output")), "", dim("-v"))
    return table


def changed_operators(before: dict[str, int], after: dict[str, int]) -> list[tuple[str, int, int]]:
    """(operator, count before, count after) where they differ, the largest difference first."""
    counts = [(name, before.get(name, 0), after.get(name, 0)) for name in before.keys() | after.keys()]
    return sorted((c for c in counts if c[1] != c[2]), key=lambda c: (-abs(c[1] - c[2]), c[0]))


def _measured(table: Table, report: dict[str, Any]) -> None:
    if report.get("latency_ratio"):
        faster, times = report["latency_ratio"], report["latency"]
        remark = dim(f"{faster['low']:.3f} to {faster['high']:.3f}")
        if faster["low"] > 1:
            remark.append("  slower here", style="yellow")
        table.add(
            f"latency, {plural(report['options']['threads'] or 1, 'thread')}",
            seconds(times["original"]["median"]),
            seconds(times["candidate"]["median"]),
            f"{faster['median']:.3f}x",
            remark,
        )
    if report.get("metric"):
        m = report["metric"]
        table.add(
            m["name"], f"{m['original']:.4f}", f"{m['candidate']:.4f}", f"{m['difference']:+.4f}", dim(interval(m))
        )


def interval(metric: dict[str, Any]) -> str:
    """The paired interval of a metric's difference, and what it rests on."""
    low, high = metric["low"], metric["high"]
    known = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    return (f"95 %: {low:+.4f} to {high:+.4f}, " if known else "no interval, ") + plural(metric["samples"], "sample")


def closeness(output: dict[str, Any]) -> tuple[str, str, Text]:
    """Three cells on one output: SQNR or ``identical``, nothing, and a remark."""
    if output["nondeterministic"]:
        return "", "", dim("non-deterministic in the original")
    if output["mismatch"]:
        return "", "", Text(output["mismatch"], style="red")
    if output["identical"]:
        return "identical", "", Text()
    remark = f"SQNR; max abs diff {output['max_abs']:.3g}, cosine {output['cosine']:.6f}"
    if output["top1_agreement"] is not None:
        remark += f", top-1 agrees {100 * output['top1_agreement']:.1f} %"
    return "" if output["sqnr_db"] is None else f"{output['sqnr_db']:.1f} dB", "", dim(remark)


def idle(entries: Iterable[dict[str, Any]]) -> list[str]:
    """The exact passes that found nothing to do, each once."""
    return list(dict.fromkeys(entry["pass"] for entry in entries if _idle(entry)))


def _idle(entry: dict[str, Any]) -> bool:
    return bool(entry["status"] == "unchanged" and entry["contract"] == "exact")


def ledger(entries: Iterable[dict[str, Any]], *, every: bool = True) -> Table:
    """What became of each pass; ``every`` False leaves out the :func:`idle` ones."""
    table = Table(["pass", "status", "changes", "nodes", "time", ""], "llrrrl")
    for entry in entries:
        if not every and _idle(entry):
            continue
        reason = entry["reason"]
        if reason is None and not entry["changes"] and entry["skipped"]:
            reason = entry["skipped"][0]["reason"]
        before, after = entry["nodes"]
        table.add(
            entry["pass"],
            Text(entry["status"], style=_STATUS_STYLE.get(entry["status"], "dim")),
            str(len(entry["changes"]) or ""),
            str(before) if before == after else f"{before} -> {after}",
            seconds(entry["seconds"]),
            dim(reason or ""),
        )
    return table


def coverage(entry: dict[str, Any]) -> Text | None:
    """How much of the model a quantizing pass put into integers; None where it is no such pass."""
    m = entry["metrics"]
    if m.get("weights_compressed"):
        return _compressed(m)
    if not entry["pass"].startswith("quantize-") or not m.get("layers_quantized"):
        return None
    macs = "?" if m.get("macs_percent") is None else f"{m['macs_percent']:.1f} %"
    known = "" if m.get("macs_complete", True) else " of those known"
    line = Text(f"in integers: {plural(m['layers_quantized'], 'layer')}, {macs} of the MACs{known}")
    if m.get("weight_bytes_percent") is not None:
        line.append(f", {m['weight_bytes_percent']:.1f} % of the weight bytes")
    remarks = []
    if m.get("weight_kinds"):
        remarks.append("weights: " + ", ".join(f"{v} {k}" for k, v in sorted(m["weight_kinds"].items())))
    if m.get("samples"):
        remarks.append(f"{plural(m['samples'], 'sample')} calibrated")
    if remarks:
        line.append(f" ({'; '.join(remarks)})", style="dim")
    return line


def training(entry: dict[str, Any]) -> Text | None:
    """How the training of a pass went; None where it is no such pass, or did not start."""
    m = entry["metrics"]
    if entry["pass"] != "finetune" or "best_step" not in m:
        return None
    line = Text(f"trained: loss {m['held_out_before']:.4g} -> {m['held_out_best']:.4g} at step {m['best_step']}")
    if m.get("judged_samples"):
        gain = f"better by {m['judged_low']:.3g} to {m['judged_high']:.3g}"
        line.append(f"; judged {m['judged_before']:.4g} -> {m['judged_after']:.4g} ({gain})")
    used = f"{m['samples_trained']} samples, {m['samples_held_out']} to stop"
    shown = f"{m['weights_trained']} weights, {m['steps']} steps of {seconds(m['seconds_per_step'])}, {used}"
    return line.append(f" ({shown})", style="dim")


def _compressed(m: dict[str, Any]) -> Text:
    line = Text(f"compressed: {plural(m['weights_compressed'], 'weight')}, ")
    line.append(f"{size(m['bytes_before'])} -> {size(m['bytes_after'])}")
    how = ", ".join(f"{count} {form}" for form, count in sorted(m["formats"].items()))
    loss = "exact" if m["weight_sqnr_db"] is None else f"weights to {m['weight_sqnr_db']:.1f} dB"
    if m["weights_rounded_for_output"]:
        loss += f", {m['weights_rounded_for_output']} rounded to what layers read"
    return line.append(f" ({how}; {loss})", style="dim")


def grouped(skips: Iterable[dict[str, str]], limit: int | None) -> list[Text]:
    """Skips with one reason are one line; ``limit`` None shows every site."""
    groups: dict[str, list[str]] = {}
    for skip in skips:
        groups.setdefault(skip["reason"], []).append(skip["site"])
    lines = []
    for reason, sites in list(groups.items())[:limit]:
        names = ", ".join(sites if limit is None else sites[:2])
        more = f" and {len(sites) - 2} more" if limit is not None and len(sites) > 2 else ""
        line = Text(f"  {reason}")
        whole = names.startswith("(") and len(sites) == 1  # "(small)", "(graph)": no node's name
        lines.append(line.append(f" {names}" if whole else f" ({names}{more})", style="dim"))
    if limit is not None and len(groups) > limit:
        lines.append(dim(f"  and {plural(len(groups) - limit, 'more reason')}; -v shows all"))
    return lines


def notes(report: dict[str, Any]) -> list[Text]:
    """What else the user should know, once each; warnings first."""
    found = [n for n in report.get("notes", []) if n]
    for key in ("data", "eval_data"):
        about = report.get(key) or {}
        name = key.replace("_", " ")
        found += [f"{name}: {text}" for text in about.get("notes", [])]
    reproducers = [report.get("reproducer"), *(entry.get("reproducer") for entry in report.get("ledger", []))]
    found += [f"reproducer: {path}" for path in reproducers if path]
    warnings = [Text(n, style="yellow") for n in dict.fromkeys(found) if n.startswith("WARNING")]
    others = [f"note: {n}" for n in found if not n.startswith("WARNING")]
    return [*warnings, *left_out(report), *(dim(n) for n in dict.fromkeys(others))]


def left_out(report: dict[str, Any]) -> list[Text]:
    """Samples that could not be used."""
    lines = []
    for key in ("data", "eval_data"):
        texts = (report.get(key) or {}).get("skipped", [])
        name = key.replace("_", " ")
        lines += [f"WARNING: {name}: {text}, so it is left out" for text in texts[:_TOLD]]
        lines += [f"WARNING: {name}: {len(texts) - _TOLD} more samples are left out"] if len(texts) > _TOLD else []
    return [Text(line, style="yellow") for line in lines]


def gates(report: dict[str, Any]) -> list[Text]:
    """Each gate, what it asked and what was measured."""
    lines = []
    for gate in report.get("gates") or []:
        line = Text(f"gate {gate['gate']} {gate['asked']}: ")
        line.append("holds" if gate["passed"] else "FAILED", style="green" if gate["passed"] else "red")
        lines.append(line.append(f" ({gate['measured']})", style="dim"))
    return lines
