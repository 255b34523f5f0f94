"""A small graph as boxes and lines: one row for each step from inputs to outputs, drawn as SVG by the HTML report.

The layered layout of Sugiyama, Tagawa and Toda (1981) in its simplest form: rows by longest path, the order within a
row by the mean place of the neighbours, long lines led through the rows between.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

_WIDTH, _HEIGHT = 150.0, 40.0
_DETAIL = 15.0  # more height for what changed
_GAP_X, _GAP_Y = 12.0, 28.0
_LANE = 18.0  # width of a line that passes through a row
_MARGIN = 2.0
_CHARACTERS = 22
_SWEEPS = 4

Key = Hashable
Edge = tuple[Any, Any, str]


@dataclass(frozen=True)
class Box:
    """A node as it is drawn. ``kind`` is "added", "removed", "changed" or "same"."""

    kind: str
    operator: str
    name: str
    detail: str = ""


def draw(boxes: Mapping[Any, Box], edges: Sequence[Edge], order: Callable[[Any], Any]) -> dict[str, Any]:
    """``width``, ``height``, ``nodes`` with the places of their boxes, ``edges`` with their paths; all in pixels.

    ``edges``: (from, to, kind). ``order``: what decides where nothing else does.
    """
    keys = sorted(boxes, key=order)
    level = _levels(keys, edges)
    rows: list[list[Key]] = [[] for _ in range(max(level.values(), default=-1) + 1)]
    for key in keys:
        rows[level[key]].append(key)
    chains = [_chain(number, edge, level, rows) for number, edge in enumerate(edges)]
    _arrange(rows, [pair for chain in chains for pair in pairwise(chain)])
    return _placed(rows, boxes, edges, chains)


def _levels(keys: Sequence[Any], edges: Sequence[Edge]) -> dict[Any, int]:
    """The row of each node: one below all that it reads, and what reads nothing right above its reader.

    Two graphs over each other may have a circle; it is cut at the node that comes first.
    """
    above: dict[Any, set[Any]] = {key: set() for key in keys}
    for x, y, _ in edges:
        if x != y:
            above[y].add(x)
    level: dict[Any, int] = {}
    while len(level) < len(keys):
        left = [key for key in keys if key not in level]
        ready = [key for key in left if above[key] <= level.keys()] or left[:1]
        for key in ready:
            level[key] = max((level[k] + 1 for k in above[key] if k in level), default=0)
    for key in keys:
        below = [level[y] for x, y, _ in edges if x == key and y != key]
        if not above[key] and below:
            level[key] = max(min(below) - 1, 0)
    least = min(level.values(), default=0)
    return {key: row - least for key, row in level.items()}


def _chain(number: int, edge: Edge, level: Mapping[Any, int], rows: list[list[Any]]) -> list[Any]:
    """The stops of one line: its ends, and a lane in each row between them."""
    x, y, _ = edge
    lanes = [("lane", number, row) for row in range(level[x] + 1, level[y])]
    for lane in lanes:
        rows[lane[2]].append(lane)
    return [x, *lanes, y]


def _arrange(rows: list[list[Any]], pairs: Sequence[tuple[Any, Any]]) -> None:
    """Sort each row by the mean place of what its members hang on, downwards and upwards by turns."""
    near: dict[Any, list[Any]] = {}
    for x, y in pairs:
        near.setdefault(x, []).append(y)
        near.setdefault(y, []).append(x)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for at in range(1, len(rows)) if down else range(len(rows) - 2, -1, -1):
            beside = rows[at - 1 if down else at + 1]
            place = {key: (k + 0.5) / len(beside) for k, key in enumerate(beside)}
            mean = {}
            for k, key in enumerate(rows[at]):
                found = [place[other] for other in near.get(key, ()) if other in place]
                mean[key] = sum(found) / len(found) if found else (k + 0.5) / len(rows[at])
            rows[at].sort(key=mean.__getitem__)


def _placed(
    rows: Sequence[Sequence[Any]], boxes: Mapping[Any, Box], edges: Sequence[Edge], chains: Sequence[Sequence[Any]]
) -> dict[str, Any]:
    def wide(key: Any) -> float:
        return _WIDTH if key in boxes else _LANE

    widths = [sum(map(wide, row)) + _GAP_X * (len(row) - 1) for row in rows]
    whole, y = max(widths, default=0.0), _MARGIN
    at: dict[Any, tuple[float, float, float]] = {}  # centre, top, bottom
    for row, taken in zip(rows, widths, strict=True):
        high = _HEIGHT + (_DETAIL if any(key in boxes and boxes[key].detail for key in row) else 0)
        x = _MARGIN + (whole - taken) / 2
        for key in row:
            tall = _HEIGHT + (_DETAIL if boxes[key].detail else 0) if key in boxes else high
            top = y + (high - tall) / 2
            at[key] = (x + wide(key) / 2, top, top + tall)
            x += wide(key) + _GAP_X
        y += high + _GAP_Y
    nodes = [
        {
            "x": round(at[key][0] - _WIDTH / 2, 1),
            "y": round(at[key][1], 1),
            "width": _WIDTH,
            "height": round(at[key][2] - at[key][1], 1),
            "kind": box.kind,
            "operator": _head(box.operator, _CHARACTERS - 3),
            "name": _tail(box.name, _CHARACTERS),
            "detail": _head(box.detail, _CHARACTERS),
            "title": ": ".join(filter(None, (f"{box.operator} {box.name}", box.detail))),
        }
        for key, box in boxes.items()
    ]
    lines = [{"kind": e[2], "path": _path([at[k] for k in chain])} for e, chain in zip(edges, chains, strict=True)]
    return {"width": whole + 2 * _MARGIN, "height": y - _GAP_Y + _MARGIN, "nodes": nodes, "edges": lines}


def _path(stops: Sequence[tuple[float, float, float]]) -> str:
    """A smooth line down through ``stops``, from the bottom of each to the top of the next."""
    x, _, y = stops[0]
    path = f"M{x:.1f} {y:.1f}"
    for index, (to, top, bottom) in enumerate(stops[1:], 1):
        end = top - 5 if index == len(stops) - 1 else top  # room for the arrow's head
        middle = (y + end) / 2
        path += f"C{x:.1f} {middle:.1f} {to:.1f} {middle:.1f} {to:.1f} {end:.1f}"
        if index < len(stops) - 1:
            path += f"V{bottom:.1f}"
        x, y = to, bottom
    return path


def _tail(text: str, most: int) -> str:
    """The end of a name, which tells it from others."""
    return text if len(text) <= most else "…" + text[1 - most :]


def _head(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
