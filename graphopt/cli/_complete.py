"""What the shell is offered when Tab is pressed: passes, targets, model files, files (docs/completion.md)."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Any file: the shell completes it in its own way."""
    return [CompletionItem(incomplete, type="file")]


def folders(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Any folder."""
    return [CompletionItem(incomplete, type="dir")]


def models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """``*.onnx`` files, and the folders on the way to them.

    Where only folders are left the shell completes those itself, since it sets no space behind them.
    """
    head = incomplete[: incomplete.rfind("/") + 1]
    start = incomplete[len(head) :]
    try:
        there = [p for p in Path(head or ".").expanduser().iterdir() if p.name.startswith(start)]
    except OSError:
        return []
    there = [p for p in there if start.startswith(".") or not p.name.startswith(".")]
    found = sorted(p.name for p in there if p.name.endswith(".onnx") and p.is_file())
    inner = sorted(p.name for p in there if p.is_dir())
    if not found:
        return [CompletionItem(incomplete, type="dir")] if inner else []
    return [CompletionItem(f"{head}{name}") for name in [*found, *(f"{name}/" for name in inner)]]


def passes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The pass after the last comma."""
    from graphopt.registry import available

    before, comma, start = incomplete.rpartition(",")
    return [CompletionItem(f"{before}{comma}{name}") for name in available() if name.startswith(start)]


def targets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Runtimes by name, with what they are."""
    from graphopt.target import targets as known

    return [CompletionItem(t.name, help=t.description) for t in known().values() if t.name.startswith(incomplete)]


def metrics(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """``accuracy``, or else a file with a function in it."""
    named = [CompletionItem("accuracy")] if incomplete and "accuracy".startswith(incomplete) else []
    return named or files(ctx, param, incomplete)
