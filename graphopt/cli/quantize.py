"""``graphopt quantize``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from graphopt.cli import _options


@click.command(
    epilog="\b\nExample:\n  graphopt quantize model.onnx -o int8.onnx --data calib.npz \\\n"
    "      --eval-data test.npz --metric accuracy --max-drop 1%"
)
@click.argument("model", metavar="IN")
@click.argument("destination", metavar="[OUT]", required=False)
@click.option("-o", "--output", metavar="OUT", help="Where to write ('-': stdout).")
@click.option("--mode", type=click.Choice(["static", "dynamic"]), default="static", show_default=True)
@click.option(
    "--observer",
    type=click.Choice(["min-max", "percentile", "entropy", "mse"]),
    default="mse",
    show_default=True,
    help="How ranges are chosen.",
)
@click.option(
    "--weights",
    type=click.Choice(["auto", "s8", "s7", "u8"]),
    default="auto",
    show_default=True,
    help="int8, 7-bit int8, or uint8 around 128.",
)
@click.option(
    "--exclude", multiple=True, metavar="P", help="Leave in float: name, glob, re:..., operator (repeatable)."
)
@click.option("--include", multiple=True, metavar="P", help="Quantize only these (repeatable).")
@click.option(
    "--dry-run", is_flag=True, help="Print what would be quantized and why the rest would not; write nothing."
)
@_options.data
@_options.images
@_options.gates
@_options.model
@_options.running
@_options.quiet
@_options.output
def command(model: str, destination: str | None, output: str | None, dry_run: bool, **values: Any) -> None:
    """Quantize IN to 8 bits: exact passes first, then QDQ from real calibration data (static) or none (dynamic).

    What stays in float is listed with the reason. The result is compared with the original on data it was not
    calibrated with, timed against it, and written only if every gate you gave holds.
    """
    from graphopt import api
    from graphopt.cli._finish import make
    from graphopt.cli.optimize import where

    shown = {key: values.pop(key) for key in ("as_json", "verbose", "quiet", "external")}
    if dry_run:
        _plan(model, values, as_json=shown["as_json"])
        return
    target = where(output, destination)
    options = _options.api_options(values)
    make(partial(api.quantize, model, **options), target, **shown)


def _plan(model: str, values: dict[str, Any], *, as_json: bool) -> None:
    from graphopt import api
    from graphopt.cli._finish import to_json

    plan = api.plan_quantization(
        model, target=values["target"] or "ort-cpu", exclude=values["exclude"], include=values["include"]
    )
    if as_json:
        click.echo(to_json(plan))
        return
    click.echo(f"would quantize {len(plan['layers'])} layers and {len(plan['light'])} light operators between them")
    for layer in plan["layers"]:
        click.echo(f"  {layer}")
    if plan["skipped"]:
        click.echo(f"would leave in float: {len(plan['skipped'])} nodes")
    for skip in plan["skipped"]:
        click.echo(f"  {skip['site']}: {skip['reason']}")
