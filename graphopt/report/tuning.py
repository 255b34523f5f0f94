"""What ``tune`` tried: the frontier as a table for a terminal and as a picture for the page."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from graphopt.report.figures import Scale
from graphopt.report.table import Table
from graphopt.report.units import plural, ratio, seconds, size

Report = dict[str, Any]

_RADIUS = (4.0, 16.0)
"""Pixels: of a dot for no bytes, and of the largest file's."""

_EDGE = 0.08
"""Of the picture's width and height, what is left free on each side so that dots stay inside."""


def heading(tuning: Report) -> str:
    """How many were tried, in which time, for what."""
    tried = [one for one in tuning["candidates"] if one["config"]]
    failed = sum(one["error"] is not None for one in tried)
    told = f"{plural(len(tried), 'configuration')} tried in {_duration(tuning['seconds'])} for {tuning['objective']}"
    if tuning["resumed"]:
        told += f", {tuning['resumed']} of them in earlier runs"
    if failed:
        told += f"; {failed} could not be made"
    return told + ("; there are no others" if tuning["exhausted"] else "")


def _duration(spent: float) -> str:
    return f"{int(spent // 60)} min {spent % 60:.0f} s" if spent >= 60 else seconds(spent)


def table(tuning: Report, *, every: bool = False) -> Table:
    """The candidates that no other beats in time, accuracy and size at once, the fastest first; ``every``: all."""
    found = Table(["configuration", "time", "90 %", tuning["score"], "size", "", ""], "lrlrrrl")
    original = next(one for one in tuning["candidates"] if not one["config"])
    shown = [one for one in tuning["candidates"] if every or one["on_frontier"] or one["name"] == tuning["chosen"]]
    for one in sorted(shown, key=lambda c: (c["ratio"] or {"median": float("inf")})["median"]):
        remark = Text(style="dim")
        if one["name"] == tuning["chosen"]:
            remark.append("chosen", style="green")
        elif one["error"] is not None:
            remark.append(one["error"])
        elif one["config"]:
            remark.append("" if one["holds"] else "misses the budget").append("  slower here" if one["slower"] else "")
        if one["ratio"] is None:
            found.add(one["name"], "", "", "", "", "", remark)
            continue
        r = one["ratio"]
        span = f"{r['low']:.3f} to {r['high']:.3f}" if one["config"] else ""
        relative = ratio(one["bytes"], original["bytes"])
        found.add(one["name"], f"{r['median']:.3f}x", span, _score(one), size(one["bytes"]), relative, remark)
    return found


def _score(one: Report) -> str:
    return "same" if one["score"] is None else f"{one['score']:.4g}"


def page(tuning: Report | None) -> Report | None:
    """The picture: time to the right, accuracy upwards, larger dots for larger files; None: nothing was tuned."""
    from graphopt.report.listings import grid  # which knows the printers, that know this module

    measured = [one for one in tuning["candidates"] if one["ratio"] is not None] if tuning is not None else []
    if tuning is None or not measured:
        return None
    scores = [one["score"] for one in measured if one["score"] is not None]
    top = max(scores, default=1.0)
    worth = {id(one): top if one["score"] is None else one["score"] for one in measured}
    across = _widened(min(one["ratio"]["median"] for one in measured), max(one["ratio"]["median"] for one in measured))
    upward = _widened(min(worth.values()), max(worth.values()))
    levels = _ends(upward) if len(set(worth.values())) > 1 else [top]
    largest = max(one["bytes"] for one in measured)
    good = sum(one["on_frontier"] for one in measured)
    dots = []
    for one in sorted(measured, key=lambda c: (c["on_frontier"], -c["bytes"])):
        kind = "chosen" if one["name"] == tuning["chosen"] else "front" if one["on_frontier"] else "beaten"
        radius = _RADIUS[0] + (_RADIUS[1] - _RADIUS[0]) * (one["bytes"] / largest) ** 0.5
        dots.append(
            {
                "x": across.at(one["ratio"]["median"]),
                "y": round(100 - upward.at(worth[id(one)]), 2),
                "r": round(radius, 1),
                "kind": kind if one["config"] else "original",
                "text": f"{one['name']}: {one['ratio']['median']:.3f}x the time, {_score(one)}, {size(one['bytes'])}",
            }
        )
    return {
        "heading": heading(tuning),
        "dots": dots,
        "marks": [{"at": across.at(value), "text": f"{value:.3f}x"} for value in _ends(across)],
        "levels": [{"at": round(100 - upward.at(value), 2), "text": f"{value:.4g}"} for value in levels],
        "score": tuning["score"],
        "table": grid(table(tuning, every=True), name=True),
        "label": f"{heading(tuning)}; {plural(good, 'candidate')} on the frontier",
    }


def _widened(low: float, high: float) -> Scale:
    width = (high - low) or max(abs(high), 1.0) * 0.1
    return Scale(low - _EDGE * width, high + _EDGE * width)


def _ends(scale: Scale) -> list[float]:
    inner = (scale.high - scale.low) * _EDGE / (1 + 2 * _EDGE)
    return [scale.low + inner, scale.high - inner]
