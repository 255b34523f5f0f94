"""``graphopt targets``."""

from __future__ import annotations

import dataclasses

import click

from graphopt.cli import _options


@click.command(cls=_options.Command, epilog="\b\nExample:\n  graphopt targets")
@_options.output
def command(as_json: bool, verbose: bool) -> None:
    """List the runtimes there are profiles for, and what this machine's CPU can do."""
    from graphopt.cli._finish import to_json
    from graphopt.target import targets, this_cpu

    found = [dataclasses.asdict(target) for target in targets().values()]
    cpu = dataclasses.asdict(this_cpu())
    if as_json:
        click.echo(to_json({"schema_version": 1, "targets": found, "cpu": cpu}))
        return
    from graphopt.report.text import print_targets

    print_targets(found, cpu)
