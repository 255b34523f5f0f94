"""``graphopt run``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from graphopt.cli import _complete, _options


@click.command(
    cls=_options.Command,
    epilog="\b\nExample:\n  graphopt run int8.toml\n  graphopt run int8.toml --model other.onnx -o other.int8.onnx",
)
@click.argument("recipe", metavar="R.toml", shell_complete=_complete.files)
@click.option("-o", "--output", metavar="OUT", shell_complete=_complete.files, help="Instead of the recipe's output.")
@click.option("--model", metavar="IN", shell_complete=_complete.models, help="Instead of the recipe's model.")
@_options.external_roots
@_options.running
@_options.limits
@_options.result
def command(recipe: str, output: str | None, model: str | None, **values: Any) -> None:
    """Do what a recipe says: its model, data, passes, gates and output.

    Paths in a recipe are relative to the recipe.
    """
    from graphopt import api
    from graphopt.cli._finish import make
    from graphopt.errors import InputError
    from graphopt.recipe import read

    shown = {key: values.pop(key) for key in ("as_json", "verbose", "quiet")}
    given = read(recipe)
    if model is not None:
        given.model = model
    destination = output or given.output
    if destination is None:
        raise InputError(f'{recipe} names no output; add output = "out.onnx", or give -o OUT')
    given.output = None  # written here, after the report is complete
    make(partial(api.run, given, **_options.api_options(values)), destination, **shown)
