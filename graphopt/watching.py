"""One run of a model under watch, where only running it can tell what it takes."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from graphopt import budgets
from graphopt.costing import Estimate
from graphopt.errors import OverBudget

_OUT_OF_MEMORY = ("bad_alloc", "Failed to allocate memory", "std::length_error", "bad array new length")


def run(
    session: Any, names: Sequence[str], feeds: Mapping[str, Any], estimate: Estimate, options: Callable[[], Any]
) -> list[Any]:
    """``session.run``; stopped where loops of unknown length take too long, or values of unknown size too much.

    ``options`` makes the runtime's own object for that (its ``terminate`` is looked at between any two nodes).
    Memory is capped where this process is the command line's own (Linux): other threads of a caller's program would
    meet the cap too.

    Raises:
        OverBudget: it was stopped.
    """
    if not (estimate.loops or estimate.unknown):
        found: list[Any] = session.run(names, feeds)
        return found
    allowed = budgets.current()
    given = options() if estimate.loops else None
    with _timed(given, allowed.seconds) as late, _capped(estimate, feeds):
        try:
            found = session.run(names, feeds, given)
        except Exception as error:
            if late.is_set():
                raise OverBudget(
                    f"one run of the model takes longer than {allowed.seconds:g} s, in a loop whose end is not known "
                    "beforehand; raise --max-seconds if you trust it"
                ) from error
            if any(words in str(error) for words in _OUT_OF_MEMORY) or isinstance(error, MemoryError):
                raise OverBudget(
                    "running the model takes more memory than it may, for values whose size is not known beforehand; "
                    "raise --max-memory if you trust it"
                ) from error
            raise
    return found


@contextlib.contextmanager
def _timed(options: Any, seconds: float) -> Iterator[threading.Event]:
    """``options`` (None: no watch) end the run after ``seconds``; set where they did."""
    late = threading.Event()
    if options is None:
        yield late
        return

    def stop() -> None:
        late.set()
        options.terminate = True

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()


@contextlib.contextmanager
def _capped(estimate: Estimate, feeds: Mapping[str, Any]) -> Iterator[None]:
    """No more memory for this process than it has now and the run may take. Mapped files do not count."""
    if not (estimate.unknown and budgets.alone() and sys.platform == "linux"):
        yield
        return
    import resource

    held = sum(getattr(value, "nbytes", 0) for value in feeds.values())
    old = resource.getrlimit(resource.RLIMIT_DATA)
    cap = _private() + budgets.current().allowed(estimate.held + held)
    if old[0] != resource.RLIM_INFINITY and old[0] < cap:
        yield
        return
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (cap, old[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, old)


def _private() -> int:
    """Bytes of this process that count against the limit."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmData")) * 1024
