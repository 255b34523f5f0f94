"""``graphopt passes``."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import click

from graphopt.cli import _options


@click.command(epilog="\b\nExample:\n  graphopt passes\n  graphopt passes quantize-static")
@click.argument("name", required=False)
@_options.output
def command(name: str | None, as_json: bool, verbose: bool) -> None:
    """List the passes, or tell all about one: contract, options, defaults."""
    from graphopt.cli._finish import to_json
    from graphopt.registry import available, get

    names = [name] if name else list(available())
    described = [_describe(n, get(n)) for n in names]
    if as_json:
        click.echo(to_json(described[0] if name else {"schema_version": 1, "passes": described}))
        return
    if name is None:
        width = max(len(n) for n in names)
        for one in described:
            click.echo(f"{one['name']:<{width}}  {one['contract']:<11}  {one['summary']}")
        click.echo("\ngraphopt passes NAME tells more about one.")
        return
    one = described[0]
    click.echo(f"{one['name']} ({one['contract']})\n\n{one['description']}\n")
    for option in one["options"]:
        click.echo(f"  {option['name']} = {option['default']!r}")
    if not one["options"]:
        click.echo("  no options")


def _describe(name: str, kind: type[Any]) -> dict[str, Any]:
    text = inspect.cleandoc(kind.__doc__ or "")
    module = inspect.getmodule(kind)
    summary = inspect.cleandoc(module.__doc__ or "").splitlines()[0] if module is not None and module.__doc__ else ""
    return {
        "name": name,
        "contract": kind.contract,
        "summary": summary,
        "description": text,
        "options": [
            {
                "name": f.name.replace("_", "-"),
                "default": list(f.default) if isinstance(f.default, tuple) else f.default,
            }
            for f in dataclasses.fields(kind)
        ],
    }
