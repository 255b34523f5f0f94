"""``graphopt diff``."""

from __future__ import annotations

from typing import Any

import click

from graphopt.cli import _complete, _options


@click.command(
    cls=_options.Command,
    epilog="\b\nExample:\n  graphopt diff before.onnx after.onnx\n  graphopt diff exported.onnx renamed.onnx --json",
)
@click.argument("a", metavar="A", shell_complete=_complete.models)
@click.argument("b", metavar="B", shell_complete=_complete.models)
@click.option("--names", is_flag=True, help="Count other names of nodes and inner values as differences, too.")
@_options.external_roots
@_options.limits
@_options.judged
@_options.report
def command(
    a: str, b: str, names: bool, external_roots: tuple[str, ...], as_json: bool, verbose: bool, quiet: bool
) -> int:
    """Say what changed from A to B: nodes, attributes, wiring, weights, inputs and outputs, shapes, opsets, texts.

    Aligned by structure: other names or another order are no difference. Nothing is run. Exits 1 where there is a
    difference.
    """
    from graphopt.cli._finish import to_json, with_page
    from graphopt.model_diff import diff

    def print_report(report: dict[str, Any]) -> None:
        if as_json:
            click.echo(to_json(report))
        elif not quiet:
            from graphopt.report.diff import print_diff

            print_diff(report, verbose=verbose)

    readable = [] if "-" in (a, b) else [(a, b)]  # standard input cannot be read again to draw it
    show = with_page(print_report, models=readable, external_roots=external_roots)
    report = diff(a, b, names=names, external_roots=external_roots).as_dict()
    show(report)
    return 1 if report["differences"] else 0
