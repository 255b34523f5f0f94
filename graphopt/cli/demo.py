"""``graphopt demo``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from graphopt.cli import _complete, _options


@click.command(cls=_options.Command, epilog="\b\nExample:\n  graphopt demo\n  graphopt demo -o demo-out")
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    shell_complete=_complete.folders,
    default="graphopt-demo",
    show_default=True,
    help="Folder for the result.",
)
@_options.plain
@_options.lock
@_options.report
def command(output: str, as_json: bool, verbose: bool) -> None:
    """The main job on a model and data that come with graphopt.

    A residual CNN for handwritten digits is simplified, quantized with real samples, compared with the original on 597
    labelled digits it never saw, timed against it, and written.
    """
    from importlib.resources import as_file, files

    from graphopt import api
    from graphopt.cli._finish import make
    from graphopt.errors import InputError
    from graphopt.errors import command as shell
    from graphopt.recipe import read

    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {output}: {error.strerror or error}; give another with -o") from error
    destination = folder / "digits.int8.onnx"
    with as_file(files("graphopt.demo")) as package:
        recipe = read(package / "int8.toml")
        if not as_json:
            click.echo(f"$ {shell('graphopt', 'run', package / 'int8.toml', '-o', destination)}\n")
        make(partial(api.run, recipe), str(destination), as_json=as_json, verbose=verbose)
    if not as_json:
        click.echo(f"\nwritten: {destination}\nnext: {shell('graphopt', 'inspect', destination)}")
