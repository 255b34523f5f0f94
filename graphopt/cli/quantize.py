"""``graphopt quantize``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from graphopt.cli import _complete, _options


@click.command(
    cls=_options.Command,
    epilog="\b\nExample:\n  graphopt quantize model.onnx -o int8.onnx --data calib.npz \\\n"
    "      --eval-data test.npz --metric accuracy --max-drop 1%",
)
@click.argument("model", metavar="IN", shell_complete=_complete.models)
@click.argument("destination", metavar="[OUT]", shell_complete=_complete.models, required=False)
@click.option("-o", "--output", metavar="OUT", shell_complete=_complete.files, help="Where to write ('-': stdout).")
@click.option(
    "--mode",
    type=_options.Choice(["static", "dynamic"]),
    default="static",
    show_default=True,
    help="Ranges of activations from --data, or found at run time.",
)
@click.option(
    "--observer",
    type=_options.Choice(["min-max", "percentile", "entropy", "mse"]),
    help="How static ranges are chosen (default mse).",
)
@click.option(
    "--weights",
    type=_options.Choice(["auto", "s8", "s7", "u8"]),
    default="auto",
    show_default=True,
    help="int8, 7-bit int8, or uint8 around 128.",
)
@click.option(
    "--exclude", multiple=True, metavar="P", help="Leave in float: name, glob, re:..., operator (repeatable)."
)
@click.option(
    "--exclude-from",
    metavar="S.json",
    shell_complete=_complete.files,
    help="Leave in float what graphopt sensitivity --json suggests.",
)
@click.option("--include", multiple=True, metavar="P", help="Quantize only these (repeatable).")
@click.option(
    "--placement",
    type=click.Choice(["auto", "rules", "measured"]),
    default="auto",
    show_default=True,
    help="What runs in integers: by the target's rules, as measured here, or (auto) measured where that gains.",
)
@click.option(
    "--cost-table", metavar="T.json", help="What measuring found: read if there, and it decides; else written."
)
@click.option(
    "--objective",
    type=_options.Choice(["latency", "size", "accuracy"]),
    default="latency",
    show_default=True,
    help="What measured mixtures are chosen for, of those that are fast enough.",
)
@click.option(
    "--dry-run", is_flag=True, help="Print what would be quantized and why the rest would not; write nothing."
)
@_options.data
@_options.images
@_options.gates
@click.option(
    "--allow-slower", is_flag=True, help="Write the result even where it is slower than IN here (else exit 3)."
)
@_options.model
@_options.asked
@_options.running
@_options.result
def command(
    model: str, destination: str | None, output: str | None, dry_run: bool, exclude_from: str | None, **values: Any
) -> None:
    """Quantize IN to 8 bits: exact passes first, then QDQ from real calibration data (static) or none (dynamic).

    What stays in float is listed with the reason. The result is compared with the original on data it was not
    calibrated with, timed against it, and written only if it is not slower here and every gate you gave holds. Where
    --max-drop or --min-sqnr would fail, static quantization puts the layers that hurt most back to float until it
    holds; without either every output keeps 15 dB SQNR, measured on calibration samples held back (a lower
    --min-sqnr ships less).
    """
    from graphopt import api
    from graphopt.cli._finish import make, refuse_lock, refuse_page
    from graphopt.cli.optimize import where

    shown = {key: values.pop(key) for key in ("as_json", "verbose", "quiet", "external")}
    options = _options.api_options(values)
    if exclude_from is not None:
        from graphopt.ranking import excluded_layers

        options["exclude"] = [*options.get("exclude", ()), *excluded_layers(exclude_from)]
    if dry_run:
        refuse_page("--dry-run makes no report; leave --report out")
        refuse_lock("--dry-run makes no model; leave --lock out")
        for key in ("allow_slower", "placement", "cost_table", "objective"):  # a plan measures nothing
            options.pop(key, None)
        _plan(model, options, shown)
        return
    target = where(output, destination)
    make(partial(api.quantize, model, **options), target, **shown)


def _plan(model: str, options: dict[str, Any], shown: dict[str, Any]) -> None:
    from graphopt import api
    from graphopt.cli._finish import to_json

    plan = api.plan_quantization(model, **options)
    if shown["as_json"]:
        click.echo(to_json(plan))
    elif not shown["quiet"]:
        from graphopt.report.text import print_plan

        print_plan(plan, verbose=shown["verbose"])
