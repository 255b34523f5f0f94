"""What pruning has to say: the table of groups, what went and what stayed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from rich.text import Text

from graphopt.report.result import grouped
from graphopt.report.table import Table
from graphopt.report.units import plural

_SHOWN = 12


def summary(entry: dict[str, Any]) -> Iterator[Text]:
    """How much a ``prune`` or ``sparsify`` removed, and how well it was repaired; nothing for other passes."""
    m = entry["metrics"]
    if entry["pass"] == "sparsify" and m.get("layers_sparsified"):
        yield from _zeros(m, entry["skipped"])
    if entry["pass"] != "prune" or m.get("units_removed") is None:
        return
    line = Text(
        f"pruned: {m['units_removed']} of {plural(m['units'], 'channel')} in {plural(len(entry['changes']), 'group')}, "
        f"{_percent(m['macs_left'])} of the MACs and {_percent(m['weight_bytes_left'])} of the weights are left"
    )
    yield line
    yield from (Text(s["reason"], style="yellow") for s in entry["skipped"] if s["site"] == "(graph)")
    if m.get("layer_error"):
        before, after = m["layer_error"]
        yield Text(
            f"repaired: {m['layers_refitted']} of {plural(m['layers_looked_at'], 'layer')} ({m['repair']}), their mean "
            f"error on held-out samples {_percent(before)} -> {_percent(after)}"
        )


def _zeros(m: dict[str, Any], skipped: list[dict[str, str]]) -> Iterator[Text]:
    yield Text(
        f"zeros: {m['zeros']:,} of {m['weights_looked_at']:,} weights in {plural(m['layers_sparsified'], 'layer')} "
        f"({_percent(m['zeros_share'])})"
    )
    if m.get("layer_error"):
        before, after = m["layer_error"]
        yield Text(
            f"the others made up for it in {m['layers_updated']}: the layers' mean error on held-out samples "
            f"{_percent(before)} -> {_percent(after)}"
        )
    if skipped:
        yield Text(f"keep every connection: {plural(len(skipped), 'layer')}")
        yield from grouped(skipped, 5)


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.1f} %" if share < 10 else f"{100 * share:.0f} %"


def print_groups(plan: dict[str, Any], *, verbose: bool = False, stream: IO[str] | None = None) -> None:
    """What ``graphopt prune --dry-run`` has to say."""
    from graphopt.report.text import _page

    groups = plan["groups"]
    free = [group for group in groups if group["free"]]
    with _page(stream) as page:
        total = sum(group["free"] for group in free)
        page.lines([f"{plural(total, 'channel')} in {plural(len(free), 'group')} could go"])
        if free:
            page.block(page.table(_table(free, None if verbose else _SHOWN)))
        if len(free) > _SHOWN and not verbose:
            page.lines([Text(f"and {plural(len(free) - _SHOWN, 'group')} worth less; -v shows all", style="dim")])
        stuck = [group for group in groups if not group["free"]]
        if stuck:
            page.lines([f"stay: {plural(len(stuck), 'group')}"])
            reasons: dict[str, list[str]] = {}
            for group in stuck:
                reasons.setdefault(group["reason"] or "", []).append(group["name"])
            for reason, names in reasons.items():
                more = f" and {len(names) - 2} more" if len(names) > 2 and not verbose else ""
                told = ", ".join(names if verbose else names[:2])
                page.lines([Text(f"  {reason}").append(f" ({told}{more})", style="dim")])


def _table(groups: list[dict[str, Any]], limit: int | None) -> Table:
    """Groups, those that are worth most first; MACs and weights are what would go if the whole group did."""
    table = Table(["group", "layers", "channels", "free", "MACs", "weights"], "nrrrrr")
    for group in sorted(groups, key=lambda g: -g["macs_share"])[:limit]:
        table.add(
            group["name"],
            str(len(group["layers"])),
            str(group["channels"]),
            str(group["free"]),
            _percent(group["macs_share"]),
            _percent(group["bytes_share"]),
        )
    return table
