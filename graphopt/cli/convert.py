"""``graphopt convert``."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import click

from graphopt.cli import _complete, _options


@click.command(
    cls=_options.Command,
    epilog="\b\nExample:\n  graphopt convert net.pt2 -o model.onnx\n"
    "  graphopt convert net.py:make -o model.onnx --input-shape x:N,3,224,224\n"
    "  graphopt convert saved_model/ -o model.onnx --python tf/bin/python\n"
    "  graphopt convert pipeline.skops -o - | graphopt optimize - -o model.onnx",
)
@click.argument("source", metavar="SOURCE", shell_complete=_complete.files)
@click.option(
    "-o", "--output", metavar="OUT", shell_complete=_complete.files, required=True, help="Where to write ('-': stdout)."
)
@_options.section("Source")
@click.option("--from", "framework", metavar="F", help="What SOURCE is, where its bytes do not say (torch, jax, ...).")
@click.option(
    "--input-shape",
    "input_shapes",
    multiple=True,
    metavar="NAME:SHAPE",
    help="Of a source that does not say: x:1,3,224,224; a name is a free dim: x:N,16:int64 (repeatable).",
)
@click.option(
    "--data",
    metavar="D.npz",
    shell_complete=_complete.files,
    help="Inputs to compare on, one sample per row (default: random ones).",
)
@click.option("--python", metavar="PATH", shell_complete=_complete.files, help="An interpreter that has the framework.")
@click.option("--allow-pickle", is_flag=True, help="Load a pickle: it may run any code.")
@click.option("--allow-code", is_flag=True, help="Load TorchScript, and Keras layers with code in them.")
@_options.section("Result")
@click.option("--opset", type=click.IntRange(min=1), metavar="N", help="Operator set (default 18, and at least 17).")
@click.option(
    "--external-data/--no-external-data",
    "external",
    default=None,
    help="Weights in a data file beside the model (default: above 2 GB).",
)
@_options.section("Comparing with the framework (exit code 1 where they differ)")
@click.option("--max-abs", type=float, metavar="X", help="Most that an output may differ by (default: see the docs).")
@click.option("--samples", type=click.IntRange(min=1), metavar="N", help="How many inputs to compare on (default 4).")
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="For random inputs (default 0).")
@click.option("--timeout", type=click.FloatRange(min=1), metavar="S", help="Most seconds for the converter.")
@_options.unlocked
def command(
    source: str, output: str, external: bool | None, as_json: bool, verbose: bool, quiet: bool, **values: Any
) -> None:
    """Turn SOURCE, a model of any framework, into ONNX: by the framework's own converter, in a process of its own.

    SOURCE is recognised by its bytes, and never run before that. The result is run on the same inputs as the
    framework's model, and is written only if the outputs agree.
    """
    from graphopt import api
    from graphopt.cli import _finish
    from graphopt.cli._progress import Progress
    from graphopt.errors import InputError

    if output == "-" and as_json:
        raise InputError("the model and --json both want stdout; write the model to a file")
    if output != "-":
        _finish.check_destination(output)

    def print_report(report: dict[str, Any]) -> None:
        if as_json:
            click.echo(_finish.to_json(report))
        elif not quiet:
            from graphopt.report.conversion import print_conversion

            print_conversion(report, stream=sys.stderr if output == "-" else None)

    show = _finish.with_page(print_report)
    work = partial(api.convert, source, **_options.api_options(values))
    with _finish.reported(show):
        with Progress() as progress:
            result = work(progress=progress)
        result.save(output, external=external)
    show(result.report)
