"""``graphopt unpack``."""

from __future__ import annotations

import click

from graphopt.cli import _complete, _options


@click.command(
    cls=_options.Command,
    epilog="\b\nExample:\n  graphopt compress model.onnx -o model.gopt --package\n"
    "  graphopt unpack model.gopt -o small.onnx",
)
@click.argument("package", metavar="PACKAGE", shell_complete=_complete.files)
@click.argument("destination", metavar="[OUT]", shell_complete=_complete.models, required=False)
@click.option("-o", "--output", metavar="OUT", shell_complete=_complete.files, help="Where to write the model.")
@_options.plain
def command(package: str, destination: str | None, output: str | None, as_json: bool, verbose: bool) -> None:
    """Write the model that PACKAGE holds, its data file beside it, bit by bit as it was packed.

    Nothing takes its place before its hash was checked. Needs: pip install "graphopt[package]"
    """
    from graphopt import api
    from graphopt.cli._finish import check_destination, to_json
    from graphopt.cli._progress import Progress
    from graphopt.cli.optimize import where
    from graphopt.errors import InputError
    from graphopt.report.units import size

    target = where(output, destination)
    if target == "-":
        raise InputError("a package may hold two files; name an output file with -o")
    check_destination(target)
    with Progress() as progress:
        report = api.unpack(package, target, progress=progress)
    if as_json:
        click.echo(to_json(report))
    else:
        click.echo(f"{package} -> {', '.join(report['files'])}")
        click.echo(f"{size(report['packed_bytes'])} -> {size(report['bytes'])}, as they were packed")
