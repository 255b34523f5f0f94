"""``graphopt targets``."""

from __future__ import annotations

import dataclasses

import click

from graphopt.cli import _options


@click.command(epilog="\b\nExample:\n  graphopt targets")
@_options.output
def command(as_json: bool, verbose: bool) -> None:
    """List the runtimes there are profiles for, and what this machine's CPU can do."""
    from graphopt.cli._finish import to_json
    from graphopt.target import targets, this_cpu

    cpu = this_cpu()
    if as_json:
        found = [dataclasses.asdict(target) for target in targets().values()]
        click.echo(to_json({"schema_version": 1, "targets": found, "cpu": dataclasses.asdict(cpu)}))
        return
    for target in targets().values():
        click.echo(f"{target.name}  {target.description}")
        click.echo(f"  also called: {', '.join(target.aliases)}")
        click.echo(
            f"  integer: {', '.join(target.heavy)}; between them: {', '.join((*target.bridging, *target.shared_scale))}"
        )
        for op_type, reason in target.reasons.items():
            click.echo(f"  stays in float: {op_type}: {reason}")
    about = "u8 x s8 products saturate here" if cpu.saturates else "u8 x s8 products are exact here"
    click.echo(f"\nthis CPU: {cpu.name}; {'VNNI' if cpu.vnni else 'no VNNI'}; {about}")
