"""``graphopt bench``."""

from __future__ import annotations

from typing import Any

import click

from graphopt.cli import _complete, _options


@click.command(
    cls=_options.Command,
    epilog="\b\nExample:\n  graphopt bench model.onnx int8.onnx\n"
    "  graphopt bench model.onnx --data test.npz --profile\n"
    "  graphopt bench model.onnx --input-shape image:1,1,8,8",
)
@click.argument("models", metavar="M...", nargs=-1, required=True, shell_complete=_complete.models)
@_options.section("Inputs")
@click.option(
    "--data",
    metavar="D",
    shell_complete=_complete.files,
    help="Samples to run (default: legal random ones, and the output says so).",
)
@click.option("--samples", type=click.IntRange(min=1), metavar="N", help="How many (default: the first 4).")
@click.option(
    "--input-shape",
    "input_shapes",
    multiple=True,
    metavar="NAME:A,B",
    help="The shape of a random input whose dims are not all fixed (repeatable).",
)
@_options.images
@_options.section("Running")
@click.option("--profile", is_flag=True, help="Also what each node takes, by the names the model has.")
@click.option(
    "--time", type=click.FloatRange(min=0), metavar="S", help="Seconds of timing per number of threads (default 2)."
)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Only this many (default: one, then all).")
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="For random inputs (default 0).")
@_options.external_roots
@_options.limits
@_options.output
def command(
    models: tuple[str, ...], input_shapes: tuple[str, ...], as_json: bool, verbose: bool, **values: Any
) -> None:
    """Time each model M in ONNX Runtime on this machine: medians and quartiles, on one thread and on all.

    All run the same inputs in turn, so that what else the machine does meets all of them alike. Ratios are to the
    first model, run by run, with a 90 % interval.
    """
    from graphopt import api
    from graphopt.cli._finish import to_json
    from graphopt.cli._progress import Progress

    shapes = dict(_shape(text) for text in input_shapes)
    with Progress() as progress:
        report = api.bench(models, input_shapes=shapes, progress=progress, **_options.api_options(values))
    if as_json:
        click.echo(to_json(report))
        return
    from graphopt.report.bench import print_bench

    print_bench(report, verbose=verbose)


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    from graphopt.errors import InputError

    name, _, dims = text.rpartition(":")  # names may hold colons, shapes do not
    parts = [part.strip() for part in dims.split(",")] if dims.strip() else []
    if not name or not all(part.isdigit() for part in parts):
        raise InputError(f"--input-shape '{text}' is no shape; write name:1,3,224,224")
    return name, tuple(map(int, parts))
