"""A progress bar with time left, on stderr, where a person is watching."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Task

MEGABYTES = "(MB)"
"""How a step ends that counts them: its speed is told too."""


class Progress:
    """Call it with (done, total, what); it draws nothing when stderr is no terminal.

    One line, of the step that was heard of last. ``total`` None: nobody knows how long it will take.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            class Left(TimeRemainingColumn):
                def render(self, task: Task) -> Any:
                    return TimeElapsedColumn().render(task) if task.total is None else super().render(task)

            class Count(TextColumn):
                def render(self, task: Task) -> Any:
                    self.text_format = "" if task.total is None else "{task.completed:.0f}/{task.total:.0f}"
                    if task.description.endswith(MEGABYTES) and task.speed:
                        self.text_format += f" at {task.speed:.0f} MB/s"
                    return super().render(task)

            columns = (TextColumn("{task.description}"), BarColumn(), Count(""), Left())
            self._bar = Bar(*columns, console=Console(file=sys.stderr), transient=True)
        return self

    def __call__(self, done: int, total: int | None, what: str) -> None:
        if self._bar is None:
            return
        if what not in self._tasks:
            for task in self._tasks.values():
                self._bar.update(task, visible=False)
            self._tasks[what] = self._bar.add_task(what, total=total)
            self._bar.start()
        self._bar.update(self._tasks[what], completed=done, total=total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
