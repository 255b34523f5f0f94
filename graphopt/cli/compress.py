"""``graphopt compress``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from graphopt.cli import _complete, _options

FORMATS = (
    "auto",
    "keep",
    "fp16",
    "bf16",
    "int8",
    "int8-block",
    "int4",
    "uint4",
    "palette8",
    "palette4",
    "fp16-compute",
)


@click.command(
    cls=_options.Command,
    epilog="\b\nExample:\n  graphopt compress model.onnx -o small.onnx --weights int8\n"
    "  graphopt compress model.onnx -o model.gopt --weights keep --package\n"
    "  graphopt compress llm.onnx -o llm4.onnx --weights uint4 --block 32",
)
@click.argument("model", metavar="IN", shell_complete=_complete.models)
@click.argument("destination", metavar="[OUT]", shell_complete=_complete.models, required=False)
@click.option("-o", "--output", metavar="OUT", shell_complete=_complete.files, help="Where to write ('-': stdout).")
@click.option(
    "--weights",
    metavar="FORMAT",
    type=_options.Choice(list(FORMATS)),
    help="auto, keep, fp16, bf16, int8, int8-block, int4, uint4, palette8, palette4 or fp16-compute (default int8): "
    "int8 has a scale per channel; int8-block, int4 and uint4 per block; "
    "palettes hold the 256 or 16 best values; fp16-compute: computed in fp16 too, where --data shows that its range "
    "holds; auto: each as --size, --max-drop or --min-sqnr allows.",
)
@click.option("--size", metavar="SIZE", help="What is to be left: 25MB, or 0.3 of the file; formats are chosen for it.")
@click.option(
    "--block",
    type=_options.Choice(["16", "32", "64", "128", "256"]),
    default="64",
    show_default=True,
    help="Weights that share a scale, of the formats in blocks.",
)
@click.option(
    "--rounding",
    type=_options.Choice(["auto", "nearest", "fitted", "data"]),
    default="auto",
    show_default=True,
    help="To the nearest; in a range fitted to each block; to what layers read in --data; auto: the best of these.",
)
@click.option(
    "--exclude", multiple=True, metavar="P", help="Leave as they are: name, glob, re:..., operator (repeatable)."
)
@click.option("--include", multiple=True, metavar="P", help="Compress only these (repeatable).")
@click.option(
    "--memory",
    metavar="SIZE",
    help="Above this many bytes of weights nothing is run: they are compressed one by one (default 1/4 of the RAM).",
)
@click.option(
    "--kernel",
    type=_options.Choice(["standard", "ort"]),
    default="standard",
    show_default=True,
    help="4-bit products: standard operators, which run anywhere and which ONNX Runtime fuses as it loads them; or "
    "its own MatMulNBits, which loads faster.",
)
@click.option(
    "--package",
    is_flag=True,
    help="OUT is a package for transport (zstd) that graphopt unpack takes apart; --weights keep: of IN as it is.",
)
@_options.data
@_options.images
@_options.gates
@_options.model
@_options.asked
@_options.running
@_options.result
def command(model: str, destination: str | None, output: str | None, block: str, **values: Any) -> None:
    """Store the weights of IN in fewer bits. What is computed stays in float; no data is needed.

    What stays as it is is listed with the reason. The result is compared with the original and timed against it, and
    the report says which weights only got smaller in the file. Where nothing shrinks, nothing is written (exit 3).
    """
    from graphopt import api
    from graphopt.cli._finish import make, refuse_lock
    from graphopt.cli.optimize import where
    from graphopt.errors import InputError

    shown = {key: values.pop(key) for key in ("as_json", "verbose", "quiet", "external")}
    options = _options.api_options(values)
    target = where(output, destination)
    if values.get("package") and target == "-":
        raise InputError("a package is a file; name one with -o")
    if values.get("package"):
        refuse_lock("--lock tells how a model was made, not a package; lock the model, or leave one out")
    make(partial(api.compress, model, block=int(block), **options), target, **shown)
