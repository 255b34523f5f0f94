"""``graphopt passes``."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import click

from graphopt.cli import _complete, _options


@click.command(cls=_options.Command, epilog="\b\nExample:\n  graphopt passes\n  graphopt passes quantize-static")
@click.argument("name", required=False, shell_complete=_complete.passes)
@_options.output
def command(name: str | None, as_json: bool, verbose: bool) -> None:
    """List the passes, or tell all about one: contract, options, defaults."""
    from graphopt.cli._finish import to_json
    from graphopt.registry import available, get

    names = [name] if name else list(available())
    described = [_describe(n, get(n)) for n in names]
    if as_json:
        found = described[0] if name else {"passes": described}
        click.echo(to_json({"schema_version": 1, **found}))
        return
    from graphopt.report.text import print_pass, print_passes

    if name is None:
        print_passes(described)
    else:
        print_pass(described[0])


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
