"""``graphopt compare``."""

from __future__ import annotations

from typing import Any

import click

from graphopt.cli import _options


@click.command(
    epilog="\b\nExample:\n  graphopt compare model.onnx int8.onnx --data test.npz --metric accuracy --max-drop 1%"
)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--data", metavar="D", help="Samples to run (default: legal random ones, and the output says so).")
@click.option("--metric", metavar="M", help="accuracy, or module.py:function(outputs, samples) -> float.")
@click.option("--samples", type=click.IntRange(min=1), metavar="N", help="Use only the first N samples.")
@_options.images
@click.option("--max-drop", metavar="DROP", help="Exit 1 if the metric falls by more: 1% or 0.01.")
@click.option("--min-sqnr", type=float, metavar="DB", help="Exit 1 if an output's SQNR is lower.")
@click.option("--max-abs", type=click.FloatRange(min=0), metavar="X", help="Exit 1 if an output differs by more.")
@click.option("--external-root", "external_roots", multiple=True, metavar="DIR", help="See graphopt optimize --help.")
@click.option("--seed", type=int, metavar="N", help="For random samples (default 0).")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads ONNX Runtime may use.")
@_options.output
def command(
    a: str,
    b: str,
    max_drop: str | None,
    min_sqnr: float | None,
    max_abs: float | None,
    as_json: bool,
    verbose: bool,
    **values: Any,
) -> None:
    """Run A and B on the same samples and say how far their outputs are apart.

    Exits 1 only past a tolerance you gave.
    """
    from graphopt import api
    from graphopt.cli._finish import to_json
    from graphopt.errors import GateFailed
    from graphopt.report.text import print_comparison

    result = api.compare(a, b, **_options.api_options(values))
    gates = api.comparison_gates(result, max_drop=max_drop, min_sqnr=min_sqnr, max_abs=max_abs)
    result.report["gates"] = [g.as_dict() for g in gates]
    failed = [g for g in gates if not g.passed]
    result.report["exit_code"] = 1 if failed else 0
    if as_json:
        click.echo(to_json(result.report))
    else:
        print_comparison(result.report)
    if failed:
        raise GateFailed("; ".join(f"{g.gate} {g.asked} failed: {g.measured}" for g in failed))
