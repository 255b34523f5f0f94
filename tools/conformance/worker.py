"""A child interpreter that is kept, and replaced when it dies or takes too long."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import subprocess
import time
from pathlib import Path
from typing import IO, Any

from graphopt.errors import RuntimeFailure

LIMIT = 20.0
"""Seconds of CPU that a contestant may take for one model; a busy machine is no fault of its own."""
PATIENCE = 10
"""Times that long by the clock, for what waits and never works."""

_SERVER = Path(__file__).parent / "rivals.py"


class TookTooLong(RuntimeFailure):
    """The child did not answer in time."""


class Worker:
    """Calls functions in a child that stays: starting one for each of 11,000 models would take longer than the work."""

    def __init__(self, python: str) -> None:
        self.python = python
        self._child: subprocess.Popen[bytes] | None = None

    def call(self, function: str, *arguments: Any, limit: float = LIMIT) -> Any:
        """``module:function``, or a function of ``rivals.py``, on pickled arguments.

        Raises:
            TookTooLong: it did not answer within ``limit`` seconds of CPU.
            RuntimeFailure: it raised, or the child died.
        """
        child = self._started()
        stdin, stdout = child.stdin, child.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            pickle.dump((function, arguments), stdin)
            stdin.flush()
            ok, value = pickle.loads(_read(stdout, child.pid, limit))
        except BaseException as error:
            self.close()
            if isinstance(error, (EOFError, OSError)):
                raise RuntimeFailure(f"its process died (exit {child.returncode})") from None
            raise
        if not ok:
            raise RuntimeFailure(value)
        return value

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            root = str(Path(__file__).resolve().parent.parent.parent)
            self._child = subprocess.Popen(
                [self.python, str(_SERVER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=1 << 16,
                env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
            )
        return self._child

    def close(self) -> None:
        """End the child; the next call starts another."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                with contextlib.suppress(OSError):  # what it did not read any more
                    if pipe is not None:
                        pipe.close()
            self._child = None


def _read(pipe: IO[bytes], pid: int, limit: float) -> bytes:
    """One answer: its length in eight bytes, then itself."""
    found = bytearray()
    cpu, clock = _cpu(pid) + limit, time.monotonic() + PATIENCE * limit
    while len(found) < 8 or len(found) < 8 + int.from_bytes(found[:8], "big"):
        ready, _, _ = select.select([pipe], [], [], 0.2)
        if not ready:
            if _cpu(pid) > cpu or time.monotonic() > clock:
                raise TookTooLong(f"it took longer than {limit:g} s and was stopped")
            continue
        piece = os.read(pipe.fileno(), 1 << 20)
        if not piece:
            raise EOFError
        found += piece
    return bytes(found[8:])


def _cpu(pid: int) -> float:
    """Seconds of CPU that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
