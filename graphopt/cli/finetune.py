"""``graphopt finetune``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from graphopt.cli import _complete, _options


@click.command(
    cls=_options.Command,
    epilog="\b\nExample:\n  graphopt finetune student.onnx -o better.onnx --teacher model.onnx \\\n"
    "      --data calib.npz",
)
@click.argument("model", metavar="STUDENT", shell_complete=_complete.models)
@click.argument("destination", metavar="[OUT]", shell_complete=_complete.models, required=False)
@click.option("-o", "--output", metavar="OUT", shell_complete=_complete.files, help="Where to write ('-': stdout).")
@click.option(
    "--teacher",
    metavar="ORIGINAL",
    required=True,
    shell_complete=_complete.models,
    help="The model to learn from: what STUDENT was made of, or any other with the same outputs.",
)
@_options.section("Training")
@click.option(
    "--loss",
    multiple=True,
    metavar="L",
    help="auto, kl, mse, cross-entropy (labels) or loss.onnx, each with a weight: kl:0.5 (repeatable, default auto).",
)
@click.option("--temperature", type=float, metavar="DEGREES", help="Of kl (default 2).")
@click.option(
    "--match", multiple=True, metavar="S=T", help="Bring these values of student and teacher together (repeatable)."
)
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="At most (default 300).")
@click.option("--lr", type=float, metavar="X", help="Of the size of each weight (default 0.005).")
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Samples a step (default 16).")
@click.option("--optimizer", type=_options.Choice(["adam", "sgd"]), help="Default adam.")
@click.option("--patience", type=click.IntRange(min=1), metavar="N", help="Looks without improvement (default 6).")
@click.option(
    "--freeze", multiple=True, metavar="GLOB", help="Leave these as they are: weight, node, operator (repeatable)."
)
@click.option(
    "--scales",
    type=_options.Choice(["none", "weights", "all"]),
    help="Which quantization scales learn (default weights).",
)
@click.option("--checkpoint", metavar="C.npz", shell_complete=_complete.files, help="Write the state of training here.")
@click.option("--resume", metavar="C.npz", shell_complete=_complete.files, help="Go on from such a file.")
@_options.data
@_options.images
@_options.gates
@_options.model
@_options.asked
@_options.running
@_options.result
def command(model: str, destination: str | None, output: str | None, **values: Any) -> None:
    """Train STUDENT on its own graph until it does again what ORIGINAL does. No framework, no labels needed.

    Repairs what quantization or pruning lost, or teaches a smaller model. Integer weights stay integers. A fifth of
    --data says when to stop; OUT is written only where samples it never saw (--eval-data) are better, else the exit
    code is 3.
    """
    from graphopt import api
    from graphopt.cli._finish import make
    from graphopt.cli.optimize import where

    target = where(output, destination)
    shown = {key: values.pop(key) for key in ("as_json", "verbose", "quiet", "external")}
    options = _options.api_options(values)
    make(partial(api.finetune, model, **options), target, **shown)
