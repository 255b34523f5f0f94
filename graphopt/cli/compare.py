"""``graphopt compare``."""

from __future__ import annotations

from typing import Any

import click

from graphopt.cli import _complete, _options


@click.command(
    cls=_options.Command,
    epilog="\b\nExample:\n  graphopt compare model.onnx int8.onnx --data test.npz \\\n"
    "      --metric accuracy --max-drop 1%\n"
    "  graphopt compare model.onnx int8.onnx --data test.npz --layerwise",
)
@click.argument("a", metavar="A", shell_complete=_complete.models)
@click.argument("b", metavar="B", shell_complete=_complete.models)
@_options.section("Data")
@click.option(
    "--data",
    metavar="D",
    shell_complete=_complete.files,
    help="Samples to run (default: legal random ones, and the output says so).",
)
@click.option(
    "--metric",
    metavar="M",
    shell_complete=_complete.metrics,
    help="accuracy, or module.py:function(outputs, samples) -> float.",
)
@click.option("--samples", type=click.IntRange(min=1), metavar="N", help="Use only the first N samples.")
@_options.images
@_options.section("Tolerances")
@click.option("--max-drop", metavar="DROP", help="Exit 1 if the metric falls by more: 1% or 0.01.")
@click.option("--min-sqnr", type=float, metavar="DB", help="Exit 1 if an output's SQNR is lower.")
@click.option(
    "--max-abs",
    multiple=True,
    metavar="X",
    help="Exit 1 if an output differs by more: 1e-3, or out0:1e-3 (repeatable).",
)
@_options.section("Layer by layer")
@click.option(
    "--layerwise", is_flag=True, help="Compare inner values too, hold them to the tolerances, say where it starts."
)
@click.option("--memory", metavar="SIZE", help="What inner values may take at once (default 1GiB).")
@_options.section("Running")
@_options.external_roots
@click.option("--seed", type=int, metavar="N", help="For random samples (default 0).")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads ONNX Runtime may use.")
@_options.limits
@_options.judged
@_options.report
@_options.junit
def command(a: str, b: str, as_json: bool, verbose: bool, quiet: bool, **values: Any) -> None:
    """Run A and B on the same samples and say how far their outputs are apart.

    Exits 1 only past a tolerance you gave.
    """
    from graphopt import api
    from graphopt.cli._finish import reported, to_json, with_page
    from graphopt.cli._progress import Progress

    def print_report(report: dict[str, Any]) -> None:
        if as_json:
            click.echo(to_json(report))
        elif not quiet:
            from graphopt.report.layerwise import print_layers
            from graphopt.report.text import print_comparison

            print_comparison(report)
            if report.get("layers") is not None:
                print_layers(report, verbose=verbose)

    show = with_page(print_report)
    with reported(show), Progress() as progress:
        result = api.compare(a, b, progress=progress, **_options.api_options(values))
    show(result.report)
