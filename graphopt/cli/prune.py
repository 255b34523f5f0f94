"""``graphopt prune``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from graphopt.cli import _complete, _options


@click.command(
    cls=_options.Command,
    epilog="\b\nExample:\n  graphopt prune model.onnx -o small.onnx --data calib.npz --macs 0.7 \\\n"
    "      --eval-data test.npz --metric accuracy --max-drop 1%",
)
@click.argument("model", metavar="IN", shell_complete=_complete.models)
@click.argument("destination", metavar="[OUT]", shell_complete=_complete.models, required=False)
@click.option("-o", "--output", metavar="OUT", shell_complete=_complete.files, help="Where to write ('-': stdout).")
@click.option("--macs", type=float, metavar="X", help="Share of the multiply-accumulates that is left: 0.7.")
@click.option("--ratio", type=float, metavar="X", help="Share of the removable channels that goes: 0.3.")
@click.option("--size", metavar="SIZE", help="What is left of the file: 25MB, or 0.5 of the original.")
@click.option("--latency", metavar="TIME", help="What is left of the time here, measured: 5ms, or 0.7 of the original.")
@click.option(
    "--sparsity",
    metavar="X",
    help="Single connections instead: share of zeros in each layer, 0.5, or 2:4 (smaller packed, no faster here).",
)
@click.option(
    "--importance",
    type=_options.Choice(["loss", "l2", "l1"]),
    default="loss",
    show_default=True,
    help="Which channels go: whose loss the rest cannot make up for least, or the smallest weights.",
)
@click.option(
    "--repair",
    type=_options.Choice(["auto", "asymmetric", "symmetric", "moments", "none"]),
    default="auto",
    show_default=True,
    help="How the layers behind are refitted: on what they read now, on what they read before, the better of the two.",
)
@click.option(
    "--multiple",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="N",
    help="Channels that are left come in multiples of N.",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="P",
    help="Layers whose output channels stay: name, glob, re:..., operator (repeatable).",
)
@click.option("--include", multiple=True, metavar="P", help="Only these layers' output channels may go (repeatable).")
@click.option("--dry-run", is_flag=True, help="Print the groups of channels and why some stay; write nothing.")
@_options.data
@_options.images
@_options.gates
@click.option(
    "--allow-slower", is_flag=True, help="Write the result even where latency does not fall here (else exit 3)."
)
@_options.model
@_options.asked
@_options.running
@_options.result
def command(model: str, destination: str | None, output: str | None, dry_run: bool, **values: Any) -> None:
    """Remove channels, attention heads and hidden units from IN, and refit the layers that read them.

    Exact passes first. What goes together is found by following every index through the graph; what has to stay is
    listed with the reason. The layers behind are refitted in closed form on the samples of --data, which need no
    labels. The result is compared with the original on data it was not repaired with, timed against it, and written
    only if it is faster here and every gate you gave holds. With --max-drop or --min-sqnr alone, as much goes as they
    allow. --sparsity puts zeros into weights instead, layers keep their size; without --data the smallest go.
    """
    from graphopt import pruned
    from graphopt.cli._finish import make, refuse_lock, refuse_page
    from graphopt.cli.optimize import where
    from graphopt.errors import InputError

    shown = {key: values.pop(key) for key in ("as_json", "verbose", "quiet", "external")}
    options = _options.api_options(values)
    if dry_run:
        refuse_page("--dry-run makes no report; leave --report out")
        refuse_lock("--dry-run makes no model; leave --lock out")
        options.pop("allow_slower", None)
        if options.pop("sparsity", None) is not None:
            raise InputError("--dry-run lists groups of channels, and --sparsity has none; leave one out")
        _plan(model, options, shown)
        return
    target = where(output, destination)
    make(partial(pruned.prune, model, **options), target, **shown)


def _plan(model: str, options: dict[str, Any], shown: dict[str, Any]) -> None:
    from graphopt import pruned
    from graphopt.cli._finish import to_json

    plan = pruned.plan_pruning(model, **options)
    if shown["as_json"]:
        click.echo(to_json(plan))
    elif not shown["quiet"]:
        from graphopt.report.pruning import print_groups

        print_groups(plan, verbose=shown["verbose"])
