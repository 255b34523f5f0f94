"""``graphopt bisect``."""

from __future__ import annotations

import sys
from typing import Any

import click

from graphopt.cli import _complete, _options


@click.command(
    cls=_options.Command,
    epilog="\b\nExample:\n  graphopt bisect model.onnx --data calib.npz\n"
    "  graphopt bisect model.onnx --passes fold-constants,mine.py:rewrite \\\n"
    "      -o repro.onnx",
)
@click.argument("model", metavar="IN", shell_complete=_complete.models)
@click.option(
    "-o",
    "--output",
    metavar="REPRO.onnx",
    shell_complete=_complete.files,
    help="Where to write the smallest piece that shows it.",
)
@click.option(
    "--recipe",
    metavar="R.toml",
    shell_complete=_complete.files,
    help="The passes to try (default: what graphopt optimize runs).",
)
@click.option(
    "--passes",
    metavar="A,B",
    shell_complete=_complete.passes,
    help="Just these passes: names, file.py:function, package.module:function.",
)
@_options.section("Data")
@click.option("--data", metavar="D", shell_complete=_complete.files, help="Samples to look on, besides made-up ones.")
@click.option("--samples", type=click.IntRange(min=1), metavar="N", help="Use only the first N samples.")
@_options.images
@_options.section("Running")
@_options.external_roots
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="For everything random (default 0).")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads ONNX Runtime may use.")
@_options.limits
@_options.judged
def command(
    model: str,
    output: str | None,
    recipe: str | None,
    passes: str | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **values: Any,
) -> int:
    """Find the exact pass that changes what IN computes: the pass, then the rewrite, then the first value that differs.

    -o writes the smallest piece of the model on which it still goes wrong, with inputs and a recipe beside it. Exits 1
    where something diverges, 0 where nothing does.
    """
    from graphopt import api
    from graphopt.cli._finish import check_destination, to_json
    from graphopt.cli._progress import Progress
    from graphopt.errors import InputError

    if output == "-":
        raise InputError("bisect writes three files (model, inputs, recipe), so '-' will not do; name repro.onnx")
    if output is not None:
        check_destination(output)
    names = None if passes is None else [n.strip() for n in passes.split(",") if n.strip()]
    with Progress() as progress:
        found = api.bisect(model, recipe=recipe, passes=names, progress=progress, **_options.api_options(values))
    if output is not None:
        found.save(output)
    if as_json:
        click.echo(to_json(found.report))
    elif not quiet:
        from graphopt.report.bisection import print_bisection

        print_bisection(found.report, verbose=verbose, stream=sys.stdout)
    return int(found.report["exit_code"])
