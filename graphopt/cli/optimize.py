"""``graphopt optimize``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from graphopt.cli import _complete, _options


@click.command(
    cls=_options.Command,
    epilog="\b\nExample:\n  graphopt optimize model.onnx -o small.onnx\n"
    "  graphopt optimize model.onnx small.onnx --recipe r.toml --data calib.npz",
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
    "--recipe",
    metavar="R.toml",
    shell_complete=_complete.files,
    help="Passes and settings from a recipe, instead of the exact defaults.",
)
@click.option("--passes", metavar="A,B", shell_complete=_complete.passes, help="Just these passes, in this order.")
@click.option(
    "--allow-slower", is_flag=True, help="Write what is quantized even where it is slower than IN here (else exit 3)."
)
@_options.data
@_options.images
@_options.gates
@_options.model
@_options.asked
@_options.running
@_options.result
def command(
    model: str, destination: str | None, output: str | None, recipe: str | None, passes: str | None, **values: Any
) -> None:
    """Simplify IN with exact passes: same outputs, fewer nodes, never a larger file.

    What is exact is checked: the result is compared with the original, and a pass that changed the numbers is found and
    reverted alone. A recipe may add passes that approximate; gates judge those.
    """
    from graphopt import api
    from graphopt.cli._finish import make

    target = where(output, destination)
    shown = {key: values.pop(key) for key in ("as_json", "verbose", "quiet", "external")}
    options = _options.api_options(values)
    names = None if passes is None else [n.strip() for n in passes.split(",") if n.strip()]
    make(partial(api.optimize, model, recipe=recipe, passes=names, **options), target, **shown)


def where(output: str | None, destination: str | None) -> str:
    """The one output path, however it was given."""
    if output is not None and destination is not None:
        raise click.UsageError(f"two outputs: '{destination}' and -o '{output}'; give one")
    if output is None and destination is None:
        verb = click.get_current_context().info_name
        raise click.UsageError(f"no output; give one: graphopt {verb} IN -o OUT (OUT may be IN)")
    found = output if output is not None else destination
    assert found is not None
    return found
