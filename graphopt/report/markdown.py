"""What the terminal shows, as GitHub's Markdown: for an issue, or a comment on a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable

import click

KEY = "graphopt.markdown"
"""Where the context of a command keeps that ``--markdown`` was given."""

_SPECIAL = re.compile(r"[\\`*<|~]|(?<![^\W_])_|\](?=\()|^[#>+-](?= )")


class Row(str):
    """A line that is Markdown already."""

    __slots__ = ()


def asked() -> bool:
    """Whether the command that is running was given ``--markdown``."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(KEY))


def escaped(text: str) -> str:
    """``text`` so that it is read as it stands; names of nodes are full of what Markdown takes for emphasis or HTML."""
    return _SPECIAL.sub(r"\\\g<0>", text)


def cell(text: str) -> str:
    """A cell of a table, its indentation kept."""
    bare = text.strip()
    indent = len(text) - len(text.lstrip()) if bare else 0
    return "&nbsp;" * indent + escaped(bare)


def document(lines: Iterable[str]) -> str:
    """Lines for the terminal as Markdown: indented ones become list items, an empty one starts something new."""
    out: list[str] = []
    before: str | None = None
    for line in lines:
        bare = line.strip()
        indent = (len(line) - len(line.lstrip())) // 2
        kind = "" if not bare else "row" if isinstance(line, Row) else "item" if indent else "text"
        if kind == before == "text":
            out[-1] += "\\"  # a new line, also where GitHub would join them
        elif kind and before is not None and kind != before:
            out.append("")
        if kind == "row":
            out.append(line)
        elif kind:
            out.append(f"{'  ' * (indent - 1)}- {escaped(bare)}" if indent else escaped(bare))
        before = kind
    return "\n".join(out) + "\n"
