"""One command, measured from outside: wall and CPU time, peak memory, its child processes included (Linux)."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_STEP = 0.02


@dataclass(frozen=True)
class Measured:
    """``rss_mb``: peak of the resident memory of all its processes together, mapped files included. ``own_mb``: the
    same without pages of mapped files, which the kernel can drop at any time. Both are sampled every 20 ms."""

    exit_code: int
    wall_s: float
    cpu_s: float
    rss_mb: float
    own_mb: float
    error: str


def measure(command: Sequence[str], *, timeout: float = 1800.0) -> Measured:
    """Run ``command`` to its end; exit code 124 where it took longer than ``timeout`` seconds."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        rss = own = 0.0
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            together = [_memory(pid) for pid in _tree(process.pid)]
            rss = max(rss, sum(total for total, _ in together))
            own = max(own, sum(anonymous for _, anonymous in together))
            if time.perf_counter() - started > timeout:
                process.kill()
            time.sleep(_STEP)
        process.returncode = os.waitstatus_to_exitcode(status)
        stderr = process.stderr.read() if process.stderr is not None else ""
    wall = time.perf_counter() - started
    lines = stderr.strip().splitlines() or [""]
    code = 124 if wall > timeout else process.returncode
    return Measured(code, wall, usage.ru_utime + usage.ru_stime, rss, own, lines[-1][:160])


def _tree(pid: int) -> list[int]:
    """The process and all below it."""
    found = [pid]
    for parent in found:
        try:
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text(encoding="ascii").split()]
        except OSError:  # it has ended
            continue
    return found


def _memory(pid: int) -> tuple[float, float]:
    """(resident, resident and not of a file) in MB; zeros where the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0.0, 0.0
    values = {
        key: int(rest.split()[0]) / 1024 for key, _, rest in (line.partition(":") for line in lines) if "kB" in rest
    }
    return values.get("VmRSS", 0.0), values.get("RssAnon", 0.0) + values.get("RssShmem", 0.0)
