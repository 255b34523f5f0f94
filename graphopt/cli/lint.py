"""``graphopt lint``."""

from __future__ import annotations

import click

from graphopt.cli import _complete, _options


@click.command(
    cls=_options.Command,
    epilog="\b\nExample:\n  graphopt lint int8.onnx --target tensorrt\n  graphopt lint int8.onnx --strict --json",
)
@click.argument("model", metavar="M", shell_complete=_complete.models)
@click.option(
    "--target",
    metavar="T",
    shell_complete=_complete.targets,
    default="ort-cpu",
    show_default=True,
    help="The runtime it is for.",
)
@click.option("--strict", is_flag=True, help="Exit 1 for warnings, too.")
@_options.external_roots
@_options.limits
@_options.judged
def command(
    model: str,
    target: str,
    strict: bool,
    external_roots: tuple[str, ...],
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> int:
    """Say where the quantization of M, whoever made it, goes against what runtime T documents: rule, node, fix.

    Nothing is run. Errors are what T refuses or computes differently, warnings what is slower, larger or less exact
    than it could be. Exits 1 where there is an error.
    """
    from graphopt import api
    from graphopt.cli._finish import to_json

    report = api.lint(model, target, external_roots=external_roots)
    if as_json:
        click.echo(to_json(report))
    elif not quiet:
        from graphopt.report.lint import print_findings

        print_findings(report, verbose=verbose)
    return 1 if report["errors"] or (strict and report["warnings"]) else 0
