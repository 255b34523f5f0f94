"""The report for a terminal: one screen, aligned, colour only where there is a person.

Every number comes from the report; the tables are made in ``result.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import click
from rich.console import Console
from rich.text import Text

from graphopt.report import markdown, pruning, result, tuning
from graphopt.report.result import SHOWN, dim
from graphopt.report.table import Table
from graphopt.report.units import plural

Line = Text | str


class _Page:
    """Lines for one stream. They are put out together, so that a reader who goes away is met in one place."""

    def __init__(self, stream: IO[str]) -> None:
        # Wrapped at a terminal's width; where there is none (a file, a pipe) nothing is wrapped or cut.
        self._console = Console(file=stream, highlight=False)
        self._width = self._console.width if stream.isatty() else None
        self.markdown = markdown.asked()
        self._said: list[str] = []

    def lines(self, lines: Iterable[Line]) -> None:
        if self.markdown:
            self._said += [line.plain if isinstance(line, Text) else line for line in lines]
            return
        for line in lines:
            self._console.print(line if isinstance(line, Text) else Text(line), soft_wrap=True)

    def block(self, lines: Iterable[Line]) -> None:
        """Lines with an empty one before them, if there are any."""
        found = list(lines)
        if found:
            self.lines(["", *found])

    def table(self, table: Table) -> Iterator[Line]:
        return table.markdown() if self.markdown else table.lines(self._console, self._width)

    @contextmanager
    def written(self, stream: IO[str]) -> Iterator[_Page]:
        with self._console.capture() as captured:
            yield self
        said = markdown.document(self._said) if self.markdown else captured.get()
        click.echo(said, file=stream, nl=False, color=True)


@contextmanager
def _page(stream: IO[str] | None = None) -> Iterator[_Page]:
    target = stream or sys.stdout
    with _Page(target).written(target) as page:
        yield page


def print_result(report: dict[str, Any], *, verbose: bool = False, stream: IO[str] | None = None) -> None:
    """What a verb that makes a model has to say."""
    with _page(stream) as page:
        page.lines(_heading(report))
        if page.markdown:  # it is read where nobody can ask
            page.lines([f"graphopt {report['versions']['graphopt']}"])
        if report.get("tuning") is not None:
            page.block([tuning.heading(report["tuning"])])
            page.block(page.table(tuning.table(report["tuning"], every=verbose)))
        if report.get("output") is not None:
            page.block(page.table(result.before_after(report, limit=None if verbose else SHOWN)))
        idle = [] if verbose or len(report["ledger"]) <= SHOWN else result.idle(report["ledger"])
        page.block(page.table(result.ledger(report["ledger"], every=not idle)))
        if idle:
            page.lines([dim(f"nothing to do for {', '.join(idle)}; -v tells why")])
        for entry in report["ledger"]:
            page.block(_left_in_float(entry, verbose))
            page.block(pruning.summary(entry))
            if verbose:
                page.block(_changes(entry))
        page.block(result.notes(report))
        page.block(result.gates(report))


def _machine(report: dict[str, Any]) -> str:
    machine = report["machine"]
    cpu = f"{machine['cpu']}{' with VNNI' if machine['vnni'] else ''}"
    return f"{report['options']['target']}, ONNX Runtime {report['versions']['onnxruntime']}, {cpu}"


def _heading(report: dict[str, Any]) -> list[Line]:
    target = (report.get("output") or {}).get("path")
    name = Text(report["input"]["path"] or "(model)", style="bold")
    if target is not None:
        name.append(" -> ", style="not bold").append("stdout" if target == "-" else target)
    elif report.get("exit_code"):
        name.append("  (nothing was written)", style="not bold red")
    return [name, dim(_machine(report))]


def _left_in_float(entry: dict[str, Any], verbose: bool) -> Iterator[Line]:
    """Coverage, and what stayed in float and why; of a training, how it went and what was not trained."""
    trained = result.training(entry)
    if trained is not None:
        yield trained
        left = [skip for skip in entry["skipped"] if skip["site"] != "(graph)"]
        if left:
            yield f"not trained: {plural(len(left), 'weight')}"
            yield from result.grouped(left, None if verbose else SHOWN)
    covered = result.coverage(entry)
    if covered is not None:
        yield covered
    if covered is not None and entry["skipped"]:
        what = ("as they are", "weight") if "weights_compressed" in entry["metrics"] else ("in float", "node")
        yield f"left {what[0]}: {plural(len(entry['skipped']), what[1])}"
        yield from result.grouped(entry["skipped"], None if verbose else SHOWN)


def _changes(entry: dict[str, Any]) -> Iterator[Line]:
    if entry["changes"]:
        yield Text(entry["pass"], style="bold")
    for change in entry["changes"]:
        yield Text(f"  {change['action']} {change['site']}").append(f" {change['detail']}", style="dim")


def print_plan(plan: dict[str, Any], *, verbose: bool = False, stream: IO[str] | None = None) -> None:
    """What ``graphopt quantize --dry-run`` has to say."""
    with _page(stream) as page:
        between = f" and {plural(len(plan['light']), 'light operator')} between them" if plan["light"] else ""
        page.lines([f"would quantize {plural(len(plan['layers']), 'layer')}{between}"])
        page.lines(f"  {layer}" for layer in plan["layers"])
        if plan["skipped"]:
            page.lines([f"would leave in float: {plural(len(plan['skipped']), 'node')}"])
            page.lines(result.grouped(plan["skipped"], None if verbose else SHOWN))


def print_comparison(report: dict[str, Any], *, stream: IO[str] | None = None) -> None:
    """What ``graphopt compare`` has to say."""
    a, b = report["models"]
    about = report["data"]
    if about["source"] == "random":
        fed = f"{plural(about['samples'], 'legal random sample')}; give --data for real ones"
    else:
        fed = f"{plural(about['samples'], 'sample')} from {about['source']}"
    with _page(stream) as page:
        heading = Text(a["path"] or "A", style="bold").append(" against ", style="not bold").append(b["path"] or "B")
        page.lines([heading, dim(fed)])
        page.block(page.table(_outputs(report["comparison"]["outputs"])))
        if report["metric"]:
            m = report["metric"]
            line = Text(f"{m['name']}: {m['original']:.4f} -> {m['candidate']:.4f}, difference {m['difference']:+.4f} ")
            page.block([line.append(f"({result.interval(m)})", style="dim")])
        page.block(result.notes(report))
        page.block(result.gates(report))


def _outputs(outputs: list[dict[str, Any]]) -> Table:
    table = Table(["output", "SQNR", "max abs", "max rel", "cosine", "top-1 agrees", ""], "lrrrrrl")
    for o in outputs:
        if o["mismatch"] or o["nondeterministic"]:
            remark = Text(o["mismatch"], style="red") if o["mismatch"] else dim("non-deterministic in A")
            table.add(o["output"], "", "", "", "", "", remark)
            continue
        sqnr = "identical" if o["identical"] else "" if o["sqnr_db"] is None else f"{o['sqnr_db']:.1f} dB"
        agreement = "" if o["top1_agreement"] is None else f"{100 * o['top1_agreement']:.1f} %"
        table.add(o["output"], sqnr, f"{o['max_abs']:.3g}", f"{o['max_rel']:.3g}", f"{o['cosine']:.6f}", agreement)
    return table


def print_sensitivity(report: dict[str, Any], *, verbose: bool = False, stream: IO[str] | None = None) -> None:
    """What ``graphopt sensitivity`` has to say: layers, worst first."""
    table = Table(["layer", "operator", "damage", "SQNR alone", ""], "llrrl")
    chosen = set(report["suggested"])
    layers = report["layers"] if verbose else report["layers"][: 2 * SHOWN]
    total = sum(layer["damage"] or 0.0 for layer in report["layers"])
    for layer in layers:
        share = f"{100 * layer['damage'] / total:.1f} %" if total else ""
        sqnr = "exact" if layer["sqnr_db"] is None else f"{layer['sqnr_db']:.1f} dB"
        table.add(layer["layer"], layer["op_type"], share, sqnr, "leave in float" if layer["layer"] in chosen else "")
    with _page(stream) as page:
        page.block(page.table(table))
        more = len(report["layers"]) - len(layers)
        if more > 0:
            page.lines([dim(f"{plural(more, 'more layer')} below; -v shows all")])
        if not chosen:
            page.block([dim("no few layers do most of the damage; quantize --max-drop finds how many to leave")])
        page.block(result.notes(report))


def print_passes(passes: list[dict[str, Any]], *, stream: IO[str] | None = None) -> None:
    """The list of passes."""
    table = Table(["pass", "contract", ""], "lll")
    for one in passes:
        table.add(one["name"], one["contract"], one["summary"])
    with _page(stream) as page:
        page.lines(page.table(table))
        page.block([dim("graphopt passes NAME tells more about one.")])


def print_pass(one: dict[str, Any], *, stream: IO[str] | None = None) -> None:
    """All about one pass."""
    table = Table(["option", "default", ""], "lll")
    for option in one["options"]:
        default = option["default"]
        table.add(option["name"], f'"{default}"' if isinstance(default, str) else str(default))
    with _page(stream) as page:
        page.lines([Text(one["name"], style="bold").append(f" ({one['contract']})", style="not bold")])
        page.block(one["description"].replace("``", '"').splitlines())
        page.block(page.table(table) if one["options"] else ["no options"])


def _types(wanted: dict[str, Any]) -> str:
    return " or ".join(wanted["types"]) + (", symmetric" if wanted["symmetric"] else "")


def print_targets(targets: list[dict[str, Any]], cpu: dict[str, Any], *, stream: IO[str] | None = None) -> None:
    """The targets, and this machine's CPU."""
    with _page(stream) as page:
        for index, target in enumerate(targets):
            page.lines([""] if index else [])
            page.lines([Text(target["name"], style="bold").append(f"  {target['description']}", style="not bold")])
            table = Table(["", ""], "ll")
            table.add("  also called", ", ".join(target["aliases"]))
            table.add("  activations", _types(target["activation"]))
            table.add("  weights", _types(target["weight"]))
            table.add("  in integers", ", ".join(target["heavy"]))
            table.add("  between them", ", ".join((*target["bridging"], *target["shared_scale"])))
            for op_type, reason in target["reasons"].items():
                table.add("  stays in float", f"{op_type}: {reason}")
            page.lines(page.table(table))
        about = "u8 x s8 products saturate here" if cpu["saturates"] else "u8 x s8 products are exact here"
        page.block([f"this CPU: {cpu['name']}; {'VNNI' if cpu['vnni'] else 'no VNNI'}; {about}"])
