"""``graphopt sensitivity``."""

from __future__ import annotations

from typing import Any

import click

from graphopt.cli import _complete, _options


@click.command(
    cls=_options.Command,
    epilog="\b\nExample:\n  graphopt sensitivity model.onnx --data calib.npz -o sens.json\n"
    "\nThen: quantize model.onnx -o int8.onnx --data calib.npz --exclude-from sens.json",
)
@click.argument("model", metavar="IN", shell_complete=_complete.models)
@click.option(
    "-o",
    "--output",
    metavar="S.json",
    shell_complete=_complete.files,
    help="Also write the list to a file, for --exclude-from.",
)
@click.option(
    "--data",
    metavar="D",
    shell_complete=_complete.files,
    required=True,
    help="Calibration data, as for graphopt quantize.",
)
@click.option(
    "--eval-data",
    metavar="D",
    shell_complete=_complete.files,
    help="Samples that judge (default: a part of --data is held back).",
)
@click.option("--samples", type=click.IntRange(min=1), metavar="N", help="Use only the first N samples.")
@_options.images
@click.option("--observer", type=_options.Choice(["min-max", "percentile", "entropy", "mse"]), help="As for quantize.")
@click.option("--weights", type=_options.Choice(["auto", "s8", "s7", "u8"]), help="As for quantize.")
@click.option(
    "--target",
    metavar="T",
    shell_complete=_complete.targets,
    help="The runtime it is for; graphopt targets lists them.",
)
@click.option(
    "--external-root",
    "external_roots",
    multiple=True,
    metavar="DIR",
    shell_complete=_complete.folders,
    help="See graphopt optimize --help.",
)
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="For everything random (default 0).")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads ONNX Runtime may use.")
@_options.limits
@_options.output
@_options.report
def command(model: str, output: str | None, as_json: bool, verbose: bool, **values: Any) -> None:
    """Say which layers hurt when they are quantized.

    Each layer is quantized alone and the damage read at the outputs, on samples it was not calibrated with; the layers
    at the top of the list, marked, are those that quantize --exclude-from leaves in float.
    """
    from graphopt import api
    from graphopt.cli._finish import to_json, with_page
    from graphopt.cli._progress import Progress
    from graphopt.storage import write_text

    def print_report(report: dict[str, Any]) -> None:
        if as_json:
            click.echo(to_json(report))
            return
        from graphopt.report.text import print_sensitivity

        print_sensitivity(report, verbose=verbose)

    show = with_page(print_report)
    with Progress() as progress:
        report = api.sensitivity(model, progress=progress, **_options.api_options(values))
    if output is not None:
        write_text(output, to_json(report) + "\n")
    show(report)
