"""What a stranger's model may ask for: memory, time and nodes, and who says otherwise.

The defaults fit the file: what a model makes is allowed to be far larger than its weights and inputs, but not a million
times. They are one object that everything asks (:func:`current`), since the answer does not depend on who asks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from graphopt.sizes import parse_size

_BASE = 640 * 2**20
_FACTOR = 32
_NODES = 10_000
_NODES_FACTOR = 32
_MOST_NODES = 100_000
_STEPS_PER_SECOND = 100_000
"""Nodes of loops: ONNX Runtime gets through two million in a second, and a verb runs a model some twenty times."""


@dataclass(frozen=True)
class Budgets:
    """``memory``: bytes that the values of one run may take at once (None: :meth:`allowed` says); ``seconds``: how long
    one run may take where a loop's trips are not known beforehand; ``nodes``: how many may come out of the model's own
    functions (None: :meth:`allowed_nodes` says); ``calls``: how deep these may call each other."""

    memory: int | None = None
    seconds: float = 10.0
    nodes: int | None = None
    calls: int = 200

    @property
    def steps(self) -> int:
        """Nodes that loops may run together."""
        return int(self.seconds * _STEPS_PER_SECOND)

    def allowed(self, held: int) -> int:
        """Bytes that values may take at once in a model whose weights and inputs take ``held``."""
        return self.memory if self.memory is not None else min(_BASE + _FACTOR * held, total_memory() // 2)

    def allowed_nodes(self, written: int) -> int:
        """How many nodes the functions of a model may become in whose file ``written`` nodes stand."""
        return self.nodes if self.nodes is not None else min(max(_NODES, _NODES_FACTOR * written), _MOST_NODES)


def total_memory() -> int:
    """Bytes of memory in this machine; 8 GiB where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 8 * 2**30


class _Now:
    """Of the process, so that threads see it too."""

    budgets = Budgets()
    alone = False


def current() -> Budgets:
    """What holds now."""
    return _Now.budgets


def alone() -> bool:
    """Whether this process is the command line's own, so that its limits may be lowered while a model runs."""
    return _Now.alone


def change(*, memory: int | None = None, seconds: float | None = None, nodes: int | None = None) -> None:
    """Other budgets from here on; None leaves one as it is."""
    given = {"memory": memory, "seconds": seconds, "nodes": nodes}
    _Now.budgets = replace(current(), **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]


@contextmanager
def command() -> Iterator[None]:
    """One command line: the defaults at its start, and what it changes ends with it."""
    before, process = _Now.budgets, _Now.alone
    _Now.budgets, _Now.alone = Budgets(), True
    try:
        yield
    finally:
        _Now.budgets, _Now.alone = before, process


@contextmanager
def limits(
    *, memory: int | str | None = None, seconds: float | None = None, nodes: int | None = None
) -> Iterator[Budgets]:
    """Within it, models may ask for this much: ``with graphopt.limits(memory="8GB", seconds=60): ...``.

    Args:
        memory: bytes, or ``"8GB"``, that the values of one run may take at once.
        seconds: of one run of a model with loops.
        nodes: that may come out of the model's own functions.

    Raises:
        InputError: ``memory`` is no size.
    """
    before = _Now.budgets
    try:
        change(memory=size(memory), seconds=seconds, nodes=nodes)
        yield current()
    finally:
        _Now.budgets = before


def size(text: int | str | None) -> int | None:
    """Bytes from ``"8GB"``, a share of the machine's memory (``"0.5"``), or bytes.

    Raises:
        InputError: not a size.
    """
    return parse_size(text, total_memory()) if isinstance(text, str) else text
