"""From a result to files and words: what every verb that makes or judges a model does at its end."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from graphopt.api import Result

Show = Callable[[dict[str, Any]], None]


def make(
    work: Callable[..., Result],
    destination: str,
    *,
    as_json: bool,
    verbose: bool,
    quiet: bool = False,
    external: bool | None = None,
) -> None:
    """Do ``work(progress=...)``, write its model to ``destination``, print the report.

    Where a gate fails or nothing was done, the report is printed all the same, then the error is raised.
    """
    from graphopt.cli._progress import Progress
    from graphopt.errors import InputError

    if destination == "-" and as_json:
        raise InputError("the model and --json both want stdout; write the model to a file")
    if destination != "-":
        check_destination(destination)
    lock = _lock_path(destination)

    def print_report(report: dict[str, Any]) -> None:
        if as_json:
            click.echo(to_json(report))
        elif not quiet:
            from graphopt.report import text

            text.print_result(report, verbose=verbose, stream=sys.stderr if destination == "-" else None)

    models: list[tuple[Any, Any]] = []
    show = with_page(print_report, models=models)
    with reported(show):
        with Progress() as progress:
            result = work(progress=progress)
        result.save(destination, external=external)
        if lock is not None:
            from graphopt.locking import lock as write_lock

            write_lock(result, lock, external=external)
    models.append((result.original, result.ir_model))
    show(result.report)


def _lock_path(destination: str) -> str | None:
    """What ``--lock`` asked for, where it can be written."""
    from pathlib import Path

    from graphopt.cli._options import LOCK
    from graphopt.errors import InputError
    from graphopt.remote import is_address

    context = click.get_current_context(silent=True)
    lock: str | None = context.meta.get(LOCK) if context is not None else None
    if lock is None:
        return None
    if destination == "-":
        raise InputError("--lock says how a file was made, and the model goes to stdout; write it to a file")
    if is_address(lock):
        raise InputError(f"--lock {lock}: a lock names files as seen from its own folder; write it here and copy it")
    if Path(lock).absolute() == Path(destination).absolute():
        raise InputError(f"--lock {lock} is the output itself; name another file, e.g. graphopt.lock")
    check_destination(lock)
    return lock


def refuse_lock(why: str) -> None:
    """Where there is nothing to lock, say so instead of leaving the lock out in silence."""
    from graphopt.cli._options import LOCK
    from graphopt.errors import InputError

    if click.get_current_context().meta.get(LOCK) is not None:
        raise InputError(why)


def refuse_page(why: str) -> None:
    """Where there is nothing for ``--report`` to show, say so instead of leaving the page out in silence."""
    from graphopt.cli._options import PAGE
    from graphopt.errors import InputError

    if click.get_current_context().meta.get(PAGE) is not None:
        raise InputError(why)


def with_page(show: Show, *, models: Sequence[tuple[Any, Any]] = (), external_roots: Sequence[str] = ()) -> Show:
    """``show``, and then the page that ``--report`` asked for; where that cannot be written, it is told here.

    ``models``: filled by then, the two models whose differences the page draws; empty: none.
    """
    from graphopt.cli._options import PAGE

    context = click.get_current_context(silent=True)
    show = _with_junit(show, context)
    page: str | None = context.meta.get(PAGE) if context is not None else None
    if page is None:
        return show
    check_destination(page)

    def both(report: dict[str, Any]) -> None:
        from graphopt.report.html import write

        try:
            show(report)
        finally:  # also where the reader of our output has gone
            write(report, page, changed=_changed(models, external_roots))

    return both


def _with_junit(show: Show, context: click.Context | None) -> Show:
    """``show``, and then the gates as ``--junit`` asked for."""
    from graphopt.cli._options import JUNIT

    path: str | None = context.meta.get(JUNIT) if context is not None else None
    if path is None:
        return show
    check_destination(path)

    def both(report: dict[str, Any]) -> None:
        from graphopt.report.junit import write

        try:
            show(report)
        finally:
            write(report, path)

    return both


def _changed(models: Sequence[tuple[Any, Any]], external_roots: Sequence[str]) -> dict[str, Any] | None:
    from graphopt.report.regions import changed_regions

    return changed_regions(*models[0], external_roots=external_roots) if models else None


@contextmanager
def reported(show: Show) -> Iterator[None]:
    """An error that carries a report has it shown before it goes on its way."""
    from graphopt.errors import GraphoptError

    try:
        yield
    except GraphoptError as error:
        if error.report is not None:
            show(error.report)
        raise


def check_destination(destination: str) -> None:
    """Fail before the work, not after it, where the output cannot be written.

    Raises:
        InputError: saying why not.
    """

    from graphopt.errors import InputError, command
    from graphopt.remote import is_remote, place, ready

    if is_remote(destination):
        ready(destination)
        return
    path = place(destination)
    if path.is_dir():
        raise InputError(f"{destination} is a folder; name the output file, e.g. {path / 'model.onnx'}")
    if path.exists() and not path.is_file():  # writing replaces it, which would be the end of /dev/null
        raise InputError(f"{destination} is no regular file; name a file, or '-' for stdout")
    folder = path.absolute().parent
    if not folder.exists():
        make = command("mkdir", "-p", path.parent)
        raise InputError(f"the folder of {destination} does not exist; make it first: {make}")
    if not folder.is_dir():
        raise InputError(f"{path.parent} is a file, so {destination} cannot be written into it; name another output")
    if not os.access(folder, os.W_OK):
        raise InputError(f"the folder of {destination} is not writable; name another output, or change its permissions")


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
