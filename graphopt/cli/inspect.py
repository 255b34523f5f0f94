"""``graphopt inspect``."""

from __future__ import annotations

import click

from graphopt.cli import _options


@click.command(
    cls=_options.Command,
    epilog="\b\nExample:\n  graphopt inspect model.onnx --dim batch=8\n"
    "  graphopt inspect before.onnx after.onnx --json",
)
@click.argument("models", metavar="M...", nargs=-1, required=True)
@click.option("--dim", "dims", multiple=True, metavar="NAME=N", help="A size for a symbolic dim, for MACs (default 1).")
@_options.output
def command(models: tuple[str, ...], dims: tuple[str, ...], as_json: bool, verbose: bool) -> None:
    """Say what is in each model M: inputs, operators, parameters, MACs, QDQ coverage, largest tensors.

    Nothing is run and no weight is read.
    """
    from graphopt.cli._finish import to_json
    from graphopt.errors import InputError
    from graphopt.inspection import inspect_model

    sizes: dict[str, int] = {}
    for text in dims:
        name, _, number = text.rpartition("=")
        if not name or not number.isdigit():
            raise InputError(f"--dim '{text}' is no size; write batch=1")
        sizes[name] = int(number)
    reports = [inspect_model(model, dims=sizes) for model in models]
    if as_json:
        click.echo(to_json(reports[0] if len(reports) == 1 else {"schema_version": 1, "models": reports}))
        return
    from graphopt.report.text import print_inspection

    print_inspection(reports, verbose=verbose)
