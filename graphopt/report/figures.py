"""The figures of the HTML report: what stands at its top, and numbers as shares of a picture's width."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from graphopt.gates import parse_drop
from graphopt.report.units import plural, ratio, seconds, size

Report = dict[str, Any]


@dataclass(frozen=True)
class Card:
    """One key number with what belongs to it."""

    title: str
    value: str
    lines: list[str]
    tone: str = ""
    bars: tuple[float, float] | None = None
    plot: dict[str, Any] | None = None


def cards(report: Report, before: Report, after: Report | None) -> list[Card]:
    """Size, latency, metric and closeness, each with its picture, as far as they were measured."""
    return [card for card in (_size(before, after), _speed(report), _metric(report), _close(report)) if card]


@dataclass(frozen=True)
class Scale:
    """Numbers as percentages of a picture's width, so that it fits every page."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """Where ``value`` is, in percent."""
        return round(100 * (value - self.low) / (self.high - self.low), 2) if self.high > self.low else 0.0


def _size(before: Report, after: Report | None) -> Card | None:
    if after is None:
        return None
    scale = Scale(0, max(before["bytes"], after["bytes"]))
    return Card(
        title="File size",
        value=ratio(after["bytes"], before["bytes"]),
        lines=[f"{size(before['bytes'])} → {size(after['bytes'])}"],
        bars=(scale.at(before["bytes"]), scale.at(after["bytes"])),
    )


def _speed(report: Report) -> Card | None:
    found, times = report.get("latency_ratio"), report.get("latency")
    if not found or not times:
        return None
    asked = report["options"]["gates"].get("min_speedup")
    plot = _interval(
        found["median"],
        found["low"],
        found["high"],
        (1.0, "1x: as fast"),
        (1 / asked, f"gate {asked:g}x") if asked else None,
    )
    threads = report["options"].get("threads") or 1
    return Card(
        title=f"Latency, {plural(threads, 'thread')}",
        value=f"{found['median']:.3f}x",
        tone="warn" if found["low"] > 1 else "",
        lines=[
            f"{seconds(times['original']['median'])} → {seconds(times['candidate']['median'])}",
            f"90 %: {found['low']:.3f} to {found['high']:.3f}" + (", slower here" if found["low"] > 1 else ""),
        ],
        plot=plot,
    )


def _metric(report: Report) -> Card | None:
    m = report.get("metric")
    if not m:
        return None
    asked = report["options"]["gates"].get("max_drop")
    lines = [f"{_fixed(m['original'])} → {_fixed(m['candidate'])}, {plural(m['samples'], 'sample')}"]
    plot = None
    if m["difference"] is not None and m["low"] is not None and m["high"] is not None:
        lines.append(f"95 %: {m['low']:+.4f} to {m['high']:+.4f}")
        gate = (-parse_drop(str(asked), m["original"]), f"gate -{asked}") if asked else None
        plot = _interval(m["difference"], m["low"], m["high"], (0.0, "0: no change"), gate)
    return Card(
        title=f"{m['name']}, difference",
        value="?" if m["difference"] is None else f"{m['difference']:+.4f}",
        lines=lines,
        plot=plot,
    )


def _close(report: Report) -> Card | None:
    """The output that is farthest from the original's."""
    outputs = [o for o in (report.get("comparison") or {}).get("outputs", []) if not o["nondeterministic"]]
    if not outputs:
        return None
    worst = min(outputs, key=lambda o: (not o["mismatch"], o["identical"], number(o["sqnr_db"])))
    shown = output_cells(worst)
    which = f"output {worst['output']}" if len(outputs) == 1 else f"worst of {len(outputs)} outputs: {worst['output']}"
    found = [("max abs difference", "max_abs"), ("top-1 agrees", "top1"), ("cosine", "cosine")]
    return Card(
        title="Output mismatch" if worst["mismatch"] else "Outputs" if worst["identical"] else "Output SQNR",
        value="mismatch" if worst["mismatch"] else shown["sqnr"] or "?",
        tone="bad" if worst["mismatch"] else "",
        lines=[which, shown["remark"], *(f"{text} {shown[key]}" for text, key in found if shown[key])],
    )


def _interval(
    value: float, low: float, high: float, reference: tuple[float, str], gate: tuple[float, str] | None
) -> dict[str, Any]:
    """An estimate and its interval, beside a reference and what a gate allows."""
    marks = [value, low, high, reference[0], *([gate[0]] if gate else [])]
    margin = (max(marks) - min(marks)) * 0.08 or 1.0
    scale = Scale(min(marks) - margin, max(marks) + margin)
    return {
        "gated": gate is not None,
        "value": scale.at(value),
        "low": scale.at(low),
        "width": round(scale.at(high) - scale.at(low), 2),
        "marks": [
            {"at": scale.at(at), "text": text, "anchor": _anchor(scale.at(at)), "gate": kind}
            for kind, (at, text) in ((False, reference), *(((True, gate),) if gate else ()))
        ],
        "label": f"estimate {value:.4g}, interval {low:.4g} to {high:.4g}; "
        + "; ".join(t for _, t in filter(None, (reference, gate))),
    }


def _anchor(at: float) -> str:
    return "start" if at < 25 else "end" if at > 75 else "middle"


def _waterfall(start: int, steps: Iterable[tuple[str, int]], end: int) -> list[dict[str, Any]]:
    """From one total to another: what each step adds or takes away."""
    level, spans = start, [("original", 0, start, "before")]
    for name, change in steps:
        if change:
            spans.append((name, level, level + change, "less" if change < 0 else "more"))
            level += change
    if level != end:
        spans.append(("other", level, end, "less" if end < level else "more"))
    spans.append(("result", 0, end, "after"))
    scale = Scale(0, max(max(a, b) for _, a, b, _ in spans) or 1)
    return [
        {
            "name": name,
            "kind": kind,
            "at": scale.at(min(a, b)),
            "width": round(abs(scale.at(b) - scale.at(a)), 2),
            "text": size(b) if kind in ("before", "after") else ("−" if b < a else "+") + size(abs(b - a)),
        }
        for name, a, b, kind in spans
    ]


def by_type(before: Report, after: Report | None) -> list[dict[str, Any]]:
    """The weights' way from original to result, type by type; empty where the report does not tell types."""
    a, b = before.get("bytes_by_type"), (after or {}).get("bytes_by_type")
    if not a or b is None:
        return []
    changes = {name: b.get(name, 0) - a.get(name, 0) for name in sorted(a.keys() | b.keys())}
    steps = sorted(changes.items(), key=lambda item: (-item[1], item[0]))
    return _waterfall(sum(a.values()), steps, sum(b.values()))


def by_pass(before: Report, after: Report | None, ledger: list[Report]) -> list[dict[str, Any]]:
    """The weights' way from original to result, pass by pass; empty where no pass changed them.

    Passes are told the initializers only, so that it is empty, too, where most weights came in Constant nodes.
    """
    if before["weight_bytes"] < sum(before["bytes_by_type"].values()) / 2:
        return []
    steps = [(e["pass"], e["weight_bytes"][1] - e["weight_bytes"][0]) for e in ledger if e["status"] != "reverted"]
    if after is None or not any(change for _, change in steps):
        return []
    return _waterfall(before["weight_bytes"], steps, after["weight_bytes"])


def latencies(latency: Report) -> list[dict[str, Any]]:
    """Each model's median and quartiles, on one scale from zero."""
    scale = Scale(0, max((t["high"] for t in latency.values()), default=0) * 1.05)
    return [
        {
            "name": {"candidate": "result"}.get(name, name),
            "median": seconds(t["median"]),
            "quartiles": f"{seconds(t['low'])} to {seconds(t['high'])}",
            "runs": t["runs"],
            "low": scale.at(t["low"]),
            "width": round(scale.at(t["high"]) - scale.at(t["low"]), 2),
            "at": scale.at(t["median"]),
        }
        for name, t in latency.items()
    ]


def number(text: Any) -> float:
    """The number that a cell starts with; what has none (identical, exact) is past all others."""
    match = re.match(r"-?[\d.]+", str(text))
    return float(match[0]) if match else float("inf")


def _fixed(value: float | None, form: str = ".4f") -> str:
    return "?" if value is None else format(value, form)


def output_cells(o: Report) -> dict[str, Any]:
    """An output's cells; a mismatch or noise in the original leaves only a remark."""
    row = {"name": o["output"], "sqnr": "", "max_abs": "", "max_rel": "", "cosine": "", "top1": "", "remark": ""}
    if o["mismatch"] or o["nondeterministic"]:
        return {**row, "remark": o["mismatch"] or "non-deterministic in the original"}
    sqnr = "identical" if o["identical"] else "" if o["sqnr_db"] is None else f"{o['sqnr_db']:.1f} dB"
    agreement = "" if o["top1_agreement"] is None else f"{100 * o['top1_agreement']:.1f} %"
    wide, relative = (_fixed(o[key], ".3g") for key in ("max_abs", "max_rel"))
    return {
        **row,
        "sqnr": sqnr,
        "max_abs": wide,
        "max_rel": relative,
        "cosine": _fixed(o["cosine"], ".6f"),
        "top1": agreement,
    }
