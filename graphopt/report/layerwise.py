"""Layer by layer, for a terminal: where two models part, and the values that differ most."""

from __future__ import annotations

import math
from typing import IO, Any

from rich.text import Text

from graphopt.report.result import dim
from graphopt.report.table import Table
from graphopt.report.text import _page
from graphopt.report.units import plural

WORST = 15
"""Values shown on one screen; ``-v`` shows all, in order of execution."""


def print_layers(report: dict[str, Any], *, verbose: bool = False, stream: IO[str] | None = None) -> None:
    """What ``graphopt compare --layerwise`` has to say beyond the outputs."""
    found = report["layers"]
    values = found["values"]
    with _page(stream) as page:
        page.block(summary(found))
        page.block(findings(found))
        shown = values if verbose else _worst(values)
        if shown:
            page.block(page.table(value_table(shown)))
        left = sum(_counts(v) for v in values) - len(shown)
        if left > 0 and not verbose:
            page.lines([dim(f"{plural(left, 'more value')} that differ; -v shows all, in order of execution")])
        if verbose and found["unmatched"]:
            page.block([dim(f"only in A: {', '.join(found['unmatched'])}")])


def summary(found: dict[str, Any]) -> list[Text]:
    """How many values were compared, and which were not."""
    values = found["values"]
    line = Text(f"layer by layer: {plural(len(values), 'value')} in both")
    same = sum(_same(v) for v in values)
    remarks = [f"{same} identical"] if same else []
    if found["unmatched"]:
        remarks.append(f"{len(found['unmatched'])} only in A")
    others = sum(v["other_value"] for v in values)
    if others:
        remarks.append(f"{others} excluded: another value in B (all that they lead to agrees)")
    if found["nondeterministic"]:
        names = ", ".join(found["nondeterministic"][:3])
        more = "" if len(found["nondeterministic"]) <= 3 else ", ..."
        remarks.append(f"{len(found['nondeterministic'])} non-deterministic in A and excluded: {names}{more}")
    return [line.append(f"; {'; '.join(remarks)}", style="dim") if remarks else line]


def findings(found: dict[str, Any]) -> list[Text]:
    """Where the two part, and where the SQNR falls most."""
    first, steepest = found["first"], found["steepest"]
    lines = []
    if first is not None:
        what = f"first value past {found['tolerances']}: " if found["tolerances"] else "first value that differs: "
        line = Text(what).append(first["value"], style="bold red").append(f" ({_made(first)}), {first['why']}")
        lines.append(line)
    elif found["tolerances"]:
        lines.append(Text(f"every value is within {found['tolerances']}", style="green"))
    else:
        lines.append(Text("no value differs by more than rounding", style="green"))
    if steepest is not None:
        line = Text("the SQNR falls most at ").append(_made(steepest), style="bold")
        after = "nothing left" if steepest["sqnr_db"] is None else f"{steepest['sqnr_db']:.1f} dB"
        before = "identical" if steepest["inputs_sqnr_db"] is None else f"{steepest['inputs_sqnr_db']:.1f}"
        lines.append(line.append(f": {before} -> {after}", style="not bold"))
    return lines


def _made(value: dict[str, Any]) -> str:
    return f"{value['op_type']} {value['node']}" if value["op_type"] else "an input, quantized"


def _same(value: dict[str, Any]) -> bool:
    quantized = value["quantized"]
    return bool(value["identical"]) and (quantized is None or quantized["identical"]) and not value["nondeterministic"]


def _counts(value: dict[str, Any]) -> bool:
    return not _same(value) and not value["nondeterministic"] and not value["other_value"]


def _worst(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lowest SQNR first; what cannot be expressed as one before that."""

    def key(value: dict[str, Any]) -> float:
        return -math.inf if value["lowest_sqnr_db"] is None else value["lowest_sqnr_db"]

    return sorted(filter(_counts, values), key=key)[:WORST]


def value_table(values: list[dict[str, Any]]) -> Table:
    """Values one a row."""
    quantized = any(v["quantized"] for v in values)
    titles = ["value", "made by", "SQNR", *(["quantized"] if quantized else []), "max abs", "max |A|", ""]
    table = Table(titles, "ll" + "r" * (len(titles) - 3) + "l")
    for value in values:
        after = [_decibel(value["quantized"]) if value["quantized"] else ""] if quantized else []
        largest = max(part["max_abs"] for part in (value, value["quantized"]) if part)
        table.add(
            value["value"],
            value["op_type"] or "input",
            "" if value["mismatch"] or value["nondeterministic"] else _decibel(value),
            *after,
            f"{largest:.3g}",
            f"{value['scale']:.3g}",
            _remark(value),
        )
    return table


def _decibel(part: dict[str, Any]) -> str:
    if part["identical"]:
        return "identical"
    return "none" if part["sqnr_db"] is None else f"{part['sqnr_db']:.1f} dB"


def _remark(value: dict[str, Any]) -> Text:
    remark = Text()
    if value["nondeterministic"]:
        remark.append("non-deterministic in A: excluded", style="dim")
    if value["other_value"]:
        remark.append("another value in B: excluded", style="dim")
    elif value["mismatch"]:
        remark.append(value["mismatch"], style="red")
    for side in ("a", "b"):
        odd = value[f"odd_{side}"]
        if odd:
            kinds = " and ".join(f"{odd[kind]} {name}" for kind, name in (("nan", "NaN"), ("inf", "Inf")) if odd[kind])
            where = ", ".join(map(str, odd["index"]))
            text = (
                f"{'; ' if remark.plain else ''}{side.upper()} has {kinds}, first at sample {odd['sample']} [{where}]"
            )
            remark.append(text, style="yellow" if side == "b" else "dim")
    return remark
