"""``graphopt export``."""

from __future__ import annotations

from typing import Any

import click

from graphopt.cli import _complete, _options


@click.command(
    cls=_options.Command,
    epilog="\b\nExample:\n  graphopt export model.onnx -o model.ort --to ort\n"
    "  graphopt export int8.onnx -o int8.xml --to openvino --min-sqnr 25\n"
    "  graphopt export model.onnx -o m.tflite --to tflite --python tf/bin/python",
)
@click.argument("model", metavar="MODEL", shell_complete=_complete.models)
@click.option("-o", "--output", metavar="OUT", shell_complete=_complete.files, required=True, help="Where to write.")
@click.option("--to", type=_options.Choice(["ort", "openvino", "tflite"]), required=True, help="The runtime it is for.")
@click.option("--python", metavar="PATH", shell_complete=_complete.files, help="An interpreter that has the runtime.")
@_options.section("Comparing with ONNX Runtime (exit code 1 where they differ)")
@click.option(
    "--data",
    metavar="D",
    shell_complete=_complete.files,
    help="Inputs to compare on (default: legal random ones).",
)
@click.option("--max-abs", type=float, metavar="X", help="Most that an output may differ by (default: see the docs).")
@click.option("--min-sqnr", type=float, metavar="DB", help="Instead: least SQNR of every output, in dB.")
@click.option("--samples", type=click.IntRange(min=1), metavar="N", help="How many inputs to compare on (default 4).")
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="For random inputs (default 0).")
@click.option("--timeout", type=click.FloatRange(min=1), metavar="S", help="Most seconds for the converter.")
@_options.external_roots
@_options.limits
@_options.unlocked
def command(model: str, output: str, as_json: bool, verbose: bool, quiet: bool, **values: Any) -> None:
    """Write MODEL in the form of another runtime, by that runtime's own converter, after running it there.

    It is written only where the other runtime's outputs agree with ONNX Runtime's.
    """
    from graphopt.cli import _finish
    from graphopt.cli._progress import Progress
    from graphopt.exporting import export

    _finish.check_destination(output)

    def print_report(report: dict[str, Any]) -> None:
        if as_json:
            click.echo(_finish.to_json(report))
        elif not quiet:
            from graphopt.report.conversion import print_conversion

            print_conversion(report)

    show = _finish.with_page(print_report)
    with _finish.reported(show), Progress() as progress:
        report = export(model, output, progress=progress, **_options.api_options(values))
    show(report)
