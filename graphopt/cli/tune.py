"""``graphopt tune``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from graphopt.cli import _complete, _options


@click.command(
    cls=_options.Command,
    epilog="\b\nExample:\n  graphopt tune model.onnx -o best.onnx --data calib.npz \\\n"
    "    --eval-data test.npz --metric accuracy --max-drop 1% --time 10m\n"
    "  graphopt tune model.onnx -o best.onnx --data calib.npz --min-sqnr 30 \\\n    --resume",
)
@click.argument("model", metavar="IN", shell_complete=_complete.models)
@click.argument("destination", metavar="[OUT]", shell_complete=_complete.models, required=False)
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    shell_complete=_complete.files,
    help="Where to write ('-': stdout); IN itself is fine.",
)
@click.option(
    "--objective",
    type=_options.Choice(["latency", "size", "accuracy"]),
    default="latency",
    show_default=True,
    help="The fastest, the smallest, or the most accurate that --min-speedup or --max-size allows.",
)
@click.option(
    "--time",
    metavar="LIMIT",
    default="10m",
    show_default=True,
    help="How long to search: 90s, 10m, 1h (a try is not cut off).",
)
@click.option("--resume", is_flag=True, help="Go on where the last search of this model, data and metric stopped.")
@_options.data
@_options.images
@_options.gates
@click.option("--allow-slower", is_flag=True, help="The result may be slower than IN here.")
@_options.model
@_options.asked
@_options.running_untimed
@_options.result
def command(model: str, destination: str | None, output: str | None, **values: Any) -> None:
    """Search whole configurations of passes for the best one on this machine.

    Exact passes alone, int8 by the rules and by measured mixtures, kinds of weights, ranges, layers left in float, and
    what else is installed (graphopt passes) are made, judged on your data and timed against IN until --time is over.
    The gates are the budget; --max-drop is 1% where nothing else is said. The best is written; where nothing is better
    than IN, the exit code is 3 and nothing is written.
    """
    from graphopt import api
    from graphopt.cli._finish import make
    from graphopt.cli.optimize import where

    target = where(output, destination)
    shown = {key: values.pop(key) for key in ("as_json", "verbose", "quiet", "external")}
    make(partial(api.tune, model, **_options.api_options(values)), target, **shown)
