"""Warm workers under limits, each replaced where a request killed it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_WORKER = Path(__file__).with_name("worker.py")
WALL_SECONDS = 100
_REQUESTS = 150
"""After so many a worker is replaced, so that nothing that piles up in it is taken for a kind's own memory."""


@dataclass(frozen=True)
class Ran:
    """What became of one command line; ``died`` says how the process ended where it did not answer."""

    code: int
    out: str
    err: str
    cpu: float
    peak: int
    base: int
    died: str = ""


class Worker:
    """One process; started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._served = 0
        self.cpu = 0.0
        """Seconds that all requests took so far, those that died left out."""

    def run(self, arguments: list[str], folder: Path, scratch: Path) -> Ran:
        """A command line in ``folder``, its temporary files in ``scratch``."""
        if self._process is None or self._process.poll() is not None or self._served >= _REQUESTS:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        self._served += 1
        request = {"arguments": arguments, "folder": str(folder), "scratch": str(scratch)}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._line(WALL_SECONDS)
        if line:
            ran = Ran(**json.loads(line))
            self.cpu += ran.cpu
            return ran
        died = self._end()
        return Ran(-1, "", "", 0.0, 0, 0, died)

    def close(self) -> None:
        """End the process and what it started."""
        self._end()

    def _start(self) -> None:
        self._end()
        environment = {
            **os.environ,
            "PYTHONPATH": str(_ROOT),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment,
        )
        self._served = 0
        ready = self._line(120)
        assert ready.strip() == "ready", f"the worker did not start: {ready!r}"

    def _line(self, seconds: float) -> str:
        """The next line of its answer; empty where it ended or took too long."""
        assert self._process is not None
        assert self._process.stdout is not None
        until = time.monotonic() + seconds
        found = ""
        number = self._process.stdout.fileno()
        while not found.endswith("\n"):
            left = until - time.monotonic()
            if left <= 0 or not select.select([number], [], [], left)[0]:
                return ""
            part = os.read(number, 1 << 20)
            if not part:
                return ""
            found += part.decode("utf-8", "replace")
        return found

    def _end(self) -> str:
        process, self._process = self._process, None
        if process is None:
            return ""
        code = process.poll()
        if code is None:  # it may be on its way out
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(0.5)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        if code is None:
            return f"no answer within {WALL_SECONDS} s"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit {code}"


def start() -> Any:
    """A context that gives a worker and ends it."""
    return contextlib.closing(Worker())
