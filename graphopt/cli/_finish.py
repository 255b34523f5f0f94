"""From a result to files and words: what every verb that makes a model does at its end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from graphopt.api import Result


def make(
    work: Callable[..., Result],
    destination: str | None,
    *,
    as_json: bool,
    verbose: bool,
    quiet: bool = False,
    external: bool | None = None,
) -> None:
    """Do ``work(progress=...)``, write its model to ``destination`` (None: it has been written), print the report.

    Where a gate fails or nothing was done, the report is printed all the same, then the error is raised.
    """
    from graphopt.cli._progress import Progress
    from graphopt.errors import GraphoptError, InputError

    if destination == "-" and as_json:
        raise InputError("the model and --json both want stdout; write the model to a file")
    if destination is not None and destination != "-":
        _check_destination(destination)
    try:
        with Progress() as progress:
            result = work(progress=progress)
    except GraphoptError as error:
        if error.report is not None and not quiet:
            error.report["error"] = str(error)
            error.report["exit_code"] = int(error.exit_code)
            show(error.report, as_json=as_json, verbose=verbose)
        raise
    if destination is not None:
        written = result.save(destination, external=external)
        result.report["output"]["path"] = destination
        if written:
            result.report["output"]["bytes"] = sum(file.stat().st_size for file in written)
    result.report["exit_code"] = 0
    if not quiet:
        show(result.report, as_json=as_json, verbose=verbose, stream=sys.stderr if destination == "-" else None)


def _check_destination(destination: str) -> None:
    """Fail before the work, not after it, where the output cannot be written."""
    from pathlib import Path

    from graphopt.errors import InputError

    path = Path(destination)
    if path.is_dir():
        raise InputError(f"{destination} is a folder; name the output file, e.g. {path / 'model.onnx'}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"the folder of {destination} does not exist; make it first: mkdir -p {path.parent}")


def show(report: dict[str, Any], *, as_json: bool, verbose: bool, stream: Any = None) -> None:
    """The report on stdout, for a program or for a person."""
    if as_json:
        click.echo(to_json(report))
        return
    from graphopt.report.text import print_result

    if "ledger" in report:
        print_result(report, verbose=verbose, stream=stream)


def to_json(report: Any) -> str:
    """JSON that every parser takes: no NaN, no Infinity."""
    return json.dumps(_plain(report), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value if isinstance(value, (int, bool)) else str(value)
