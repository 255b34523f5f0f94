"""``graphopt run``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from graphopt.cli import _complete, _options


@click.command(
    cls=_options.Command,
    epilog="\b\nExample:\n  graphopt run int8.toml\n  graphopt run int8.toml --model other.onnx -o other.int8.onnx\n"
    "  graphopt run --locked graphopt.lock",
)
@click.argument("recipe", metavar="[R.toml]", shell_complete=_complete.files, required=False)
@click.option(
    "--locked",
    metavar="LOCK",
    shell_complete=_complete.files,
    help="Instead of a recipe: make the bytes again that a --lock tells of.",
)
@click.option("-o", "--output", metavar="OUT", shell_complete=_complete.files, help="Instead of the recipe's output.")
@click.option("--model", metavar="IN", shell_complete=_complete.models, help="Instead of the recipe's model.")
@click.option(
    "--allow-slower", is_flag=True, help="Write a quantized model even where it is slower than its original here."
)
@_options.external_roots
@_options.running
@_options.limits
@_options.result
def command(
    recipe: str | None, locked: str | None, output: str | None, model: str | None, allow_slower: bool, **values: Any
) -> None:
    """Do what a recipe says: its model, data, passes, gates and output.

    Paths in a recipe are relative to the recipe. With --locked nothing is searched, timed or judged again: the result
    has the locked bytes, or one line says what differs and nothing is written.
    """
    from graphopt import api
    from graphopt.cli._finish import make
    from graphopt.errors import InputError
    from graphopt.locking import read_lock
    from graphopt.recipe import read

    shown = {key: values.pop(key) for key in ("as_json", "verbose", "quiet")}
    options = _options.api_options(values)
    if (recipe is None) == (locked is None):
        raise InputError("give a recipe, or a lock with --locked FILE; one of them")
    if locked is not None and allow_slower:
        raise InputError("--locked times nothing, so --allow-slower has nothing to say; leave it out")
    lock = read_lock(locked) if locked is not None else None
    given = lock.recipe if lock is not None else read(str(recipe))
    if model is not None:
        given.model = model
    destination = output or given.output
    if destination is None:
        raise InputError(f'{recipe or locked} names no output; add output = "out.onnx", or give -o OUT')
    given.output = None  # written here, after the report is complete
    if lock is not None:
        lock.check_output(destination)
        external = lock.table.get("external-data")
        make(partial(api.run, locked=lock, **options), destination, external=external, **shown)
        return
    make(partial(api.run, given, allow_slower=allow_slower, **options), destination, **shown)
