"""``graphopt extract``."""

from __future__ import annotations

import sys
from typing import Any

import click

from graphopt.cli import _complete, _options


@click.command(
    cls=_options.Command,
    epilog="\b\nExample:\n  graphopt extract model.onnx --inputs relu_1 --outputs conv_5 -o sub.onnx\n"
    "  graphopt extract model.onnx --outputs conv_5 -o head.onnx",
)
@click.argument("model", metavar="M", shell_complete=_complete.models)
@click.option("--inputs", multiple=True, metavar="A,B", help="Values to cut at (default: the model's inputs).")
@click.option("--outputs", multiple=True, metavar="C", help="Values to end with (default: the model's outputs).")
@click.option(
    "-o", "--output", metavar="OUT", shell_complete=_complete.files, required=True, help="Where to write ('-': stdout)."
)
@_options.external_roots
@_options.limits
@_options.plain
@_options.report
def command(
    model: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    output: str,
    external_roots: tuple[str, ...],
    as_json: bool,
    verbose: bool,
) -> None:
    """Cut a piece out of M: from the values --inputs to the values --outputs.

    Weights, bodies of If and Loop, and functions come along. The piece computes exactly what M computes there.
    """
    from graphopt import api
    from graphopt.cli._finish import to_json, with_page
    from graphopt.errors import InputError
    from graphopt.report.units import plural, size

    if output == "-" and as_json:
        raise InputError("the model and --json both want stdout; write the model to a file")

    def print_report(report: dict[str, Any]) -> None:
        if as_json:
            click.echo(to_json(report))
            return
        stream = sys.stderr if output == "-" else sys.stdout
        whole, piece = report["input"], report["output"]
        nodes = f"{piece['nodes']} of {plural(whole['nodes'], 'node')}"
        click.echo(f"{whole['path'] or 'model'} -> {output}: {nodes}, {size(piece['bytes'])}", file=stream)
        for side in ("inputs", "outputs"):
            for value in report[side]:
                click.echo(f"  {side[:-1]:6} {value['name']}  {value['type']}", file=stream)
        for note in report["notes"]:
            click.echo(note, file=stream)

    show = with_page(print_report)
    result = api.extract(model, inputs or None, outputs or None, external_roots=external_roots)
    result.save(output)
    show(result.report)
