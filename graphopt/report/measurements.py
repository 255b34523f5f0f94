"""What the HTML report shows of what was measured inside a model: activations, layers' damage, layer by layer."""

from __future__ import annotations

import math
from typing import Any

from graphopt.report import layerwise as inner
from graphopt.report.figures import Scale
from graphopt.report.listings import ROWS, grid, rest
from graphopt.report.table import Table
from graphopt.report.units import plural

Report = dict[str, Any]

_FIRST = 12
"""Histograms that are seen at once; the others open on a click."""

_BARS = 10
_CEILING = 100.0  # dB: what is closer than that is drawn as that


def activations(entry: Report) -> Report | None:
    """The ranges that a pass chose, each over its histogram; None where it chose none."""
    ranges = entry["metrics"].get("ranges")
    if not ranges:
        return None
    pictures = [_histogram(one) for one in ranges]
    more = entry["metrics"].get("ranges_left_out", 0)
    text = (
        f"What calibration saw of {plural(len(ranges), 'quantized value')}, the lowest SQNR first"
        + (f" ({more} more have a higher one)" if more else "")
        + ". Heights are logarithmic; dashed lines are the ends of the chosen range, and what is shaded is clipped."
    )
    return {"text": text, "first": pictures[:_FIRST], "rest": pictures[_FIRST:]}


def _histogram(one: Report) -> Report:
    low, high = min(one["low"], one["min"]), max(one["high"], one["max"])
    scale = Scale(low, high)
    at, to = (scale.at(one["min"]), scale.at(one["max"])) if high > low else (0.0, 100.0)
    counts = one["histogram"]
    top = math.log1p(max(counts, default=0)) or 1.0
    heights = [max(2, round(100 * math.log1p(n) / top)) if n else 0 for n in counts]
    path = "M0 100" + "".join(f"V{100 - height}h1" for height in heights) + "V100z"
    sqnr = "exact" if one["sqnr_db"] is None else f"{one['sqnr_db']:.1f} dB"
    bounds = f"{one['low']:.3g} to {one['high']:.3g}"
    clipped = _clipped(one["clipped"])
    return {
        "value": one["value"],
        "sqnr": sqnr,
        "steps": max(len(counts), 1),
        "path": path,
        "at": at,
        "width": round(max(to - at, 0.5), 2),
        "low": scale.at(one["low"]),
        "high": scale.at(one["high"]) if high > low else 100.0,
        "ends": [f"{low:.3g}", f"{high:.3g}"],
        "range": bounds,
        "clipped": clipped,
        "label": f"{one['value']}: {sqnr}, seen {one['min']:.3g} to {one['max']:.3g}, range {bounds}, {clipped}",
    }


def _clipped(share: float) -> str:
    return "nothing clipped" if share <= 0 else f"{100 * share:.2g} % clipped" if share >= 1e-5 else "< 0.001 % clipped"


def sensitivity(report: Report) -> Report | None:
    """Each layer's damage alone, from ``graphopt sensitivity`` or from the search for a budget; None: not measured."""
    ranked = report["verb"] == "sensitivity"
    layers = report["layers"] if ranked else report.get("sensitivity")
    if not layers:
        return None
    skips = [skip for entry in report.get("ledger") or [] for skip in entry["skipped"]]
    chosen = report["suggested"] if ranked else [s["site"] for s in skips if "to keep to the budget" in s["reason"]]
    remark, marked = "leave in float" if ranked else "left in float", set(chosen)
    total = sum(layer["damage"] or 0.0 for layer in layers)
    table = Table(["layer", "operator", "damage", "share", "SQNR alone", *([""] if marked else [])], "nlrrrl")
    bars = []
    worst = max((layer["damage"] or 0.0 for layer in layers), default=0.0)
    for layer in layers:
        damage = layer["damage"]
        share = f"{100 * damage / total:.1f} %" if total and damage is not None else "?"
        sqnr = "exact" if layer["sqnr_db"] is None else f"{layer['sqnr_db']:.1f} dB"
        told = remark if layer["layer"] in marked else ""
        amount = "?" if damage is None else f"{damage:.3g}"
        table.add(layer["layer"], layer["op_type"], amount, share, sqnr, *([told] if marked else []))
        width = Scale(0, worst).at(damage or 0.0)
        bars.append({"layer": layer["layer"], "share": share, "sqnr": sqnr, "remark": told, "width": width})
    text = (
        "Each layer quantized alone: damage is noise energy over signal energy, summed over the outputs; SQNR is the "
        f"worst output's. The bars are the {plural(len(bars[:_BARS]), 'layer')} that hurt most, by their share of all "
        "damage."
    )
    return {"text": text, "bars": bars[:_BARS], "table": grid(table, order=[0, 3, 4, *([5] if marked else []), 2, 1])}


def blame(report: Report) -> tuple[str, str, str]:
    """The headline of ``graphopt sensitivity``: whether a few layers are to blame."""
    layers, chosen = report["layers"], set(report["suggested"])
    total = sum(layer["damage"] or 0.0 for layer in layers)
    if not chosen or not total:
        why = "No few layers do most of it; quantize --max-drop finds how many to leave in float."
        return "plain", f"{plural(len(layers), 'layer')} hurt about alike", why
    share = sum(layer["damage"] or 0.0 for layer in layers if layer["layer"] in chosen) / total
    what = f"{len(chosen)} of {plural(len(layers), 'layer')} {'does' if len(chosen) == 1 else 'do'} {100 * share:.0f} %"
    return "warn", f"{what} of the damage", "quantize --exclude-from leaves them in float."


def layerwise(report: Report) -> Report | None:
    """``compare --layerwise``: where two models part, and every value in order of execution; None for other reports."""
    found = report.get("layers")
    if report["verb"] != "compare" or not found:
        return None
    values = found["values"]
    differing = [value for value in values if value["differs"] or value["mismatch"]] or values
    shown = sorted(differing, key=lambda v: -math.inf if v["lowest_sqnr_db"] is None else v["lowest_sqnr_db"])[:ROWS]
    places = {id(value) for value in shown}
    listed = inner.value_table([value for value in values if id(value) in places])
    last = len(listed.titles) - 1
    table = grid(listed, name=True, order=[0, *range(2, last), 1, last])
    identical = len(values) - len(differing)
    table["more"] = "; ".join(filter(None, (rest(len(differing) - len(shown)), _same(identical))))
    return {
        "findings": [line.plain for line in (*inner.summary(found), *inner.findings(found))],
        "chart": _chart(found) if len(values) > 1 else None,
        "table": table,
        "unmatched": found["unmatched"],
    }


def _same(count: int) -> str:
    return f"{plural(count, 'value')} without a difference not listed" if count else ""


def _chart(found: Report) -> Report:
    """SQNR as columns, one a value in order of execution."""
    values = found["values"]
    known = [v["lowest_sqnr_db"] for v in values if v["lowest_sqnr_db"] is not None]
    top = min(_CEILING, max(20.0, 10 * math.ceil(max(known, default=20.0) / 10)))
    same, path = "M0 100", "M0 100"
    for value in values:
        sqnr = value["lowest_sqnr_db"]
        equal = value["identical"] and sqnr is None
        height = 0 if sqnr is None else round(100 * min(max(sqnr / top, 0.01), 1))
        same += f"V{0 if equal else 100}h1"
        path += f"V{100 - height}h1"
    marks: list[Report] = []
    for key, text in (("first", "first that differs"), ("steepest", "falls most")):
        at = next((k for k, v in enumerate(values) if found[key] and v["value"] == found[key]["value"]), None)
        if at is not None and not any(mark["value"] == at for mark in marks):
            place = Scale(0, len(values)).at(at + 0.5)
            anchor = "start" if place < 20 else "end" if place > 80 else "middle"
            name = "first past the tolerance" if key == "first" and found["tolerances"] else text
            marks.append({"value": at, "at": place, "text": name, "anchor": anchor, "y": 10})
    if len(marks) == 2 and abs(marks[0]["at"] - marks[1]["at"]) < 45:
        marks[1]["y"] = 25
    ticks = [{"y": round(190 - 160 * part / 2, 1), "text": f"{top * part / 2:.0f} dB"} for part in (1, 2)]
    text = f"SQNR of {plural(len(values), 'value')} in order of execution, left to right"
    above = f"; {top:.0f} dB and more alike" if max(known, default=0) > top else ""
    return {
        "steps": len(values),
        "path": path + "V100z",
        "same": same + "V100z" if any(v["identical"] for v in values) else "",
        "marks": marks,
        "ticks": ticks,
        "text": f"{text}; grey: identical{above}.",
        "label": f"{text}; " + "; ".join(inner.findings(found)[0].plain.splitlines()),
    }
