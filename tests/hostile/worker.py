"""One warm process that runs command lines under limits: a fresh interpreter for each would take a second longer.

Run as a script by :mod:`pool`. A request is a line of JSON (the arguments, the folders); so is the answer.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import resource
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEMORY = 2 * 10**9
CPU_SECONDS = 20


def _peak() -> int:
    """Bytes that were resident at most since the last reset."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cpu() -> float:
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


def _limit() -> None:
    """The CPU time of this request; the kernel ends a process that takes more."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    own = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(own.ru_utime + own.ru_stime) + CPU_SECONDS + 1, hard))
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def run(request: dict[str, Any]) -> dict[str, Any]:
    """One command line, its output caught where the operating system writes it."""
    from graphopt import cli

    os.chdir(request["folder"])
    os.environ["TMPDIR"] = tempfile.tempdir = request["scratch"]
    _limit()
    before, base = _cpu(), _peak()
    with tempfile.TemporaryFile(dir="/tmp") as out, tempfile.TemporaryFile(dir="/tmp") as err:
        saved = [os.dup(1), os.dup(2)]
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        streams = sys.stdout, sys.stderr
        sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
        sys.stderr = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace")
        try:
            code = cli.run(request["arguments"])
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.close()
            sys.stdout, sys.stderr = streams
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read(5_000_000).decode("utf-8", "replace"))
    peak = _peak()
    gc.collect()
    os.chdir("/")
    return {"code": code, "out": texts[0], "err": texts[1], "cpu": _cpu() - before, "peak": peak, "base": base}


def _viewer() -> types.ModuleType:
    """What stands for netron: it would serve until it is stopped."""
    found = types.ModuleType("netron")
    vars(found).update({"start": lambda *_, **__: ("localhost", 1), "wait": lambda: None, "stop": lambda *_: None})
    vars(found)["serve"] = found.start
    return found


def _remembered(call: Callable[..., Any]) -> Callable[..., Any]:
    """``in_child`` that answers what it was asked before: six verbs ask onnxsim the same, a second of CPU each time."""
    known: dict[bytes, Any] = {}

    def found(function: Any, data: bytes, **more: Any) -> Any:
        key = hashlib.sha256(data).digest()
        if key not in known:
            if len(known) > 20:
                known.clear()
            known[key] = call(function, data, **more)
        return known[key]

    return found


def main() -> None:
    channel = os.fdopen(os.dup(1), "w")
    requests = os.fdopen(os.dup(0), "r")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    import graphopt.api
    import graphopt.cli
    import graphopt.inspection
    from graphopt.passes import simplify

    assert graphopt.api
    simplify.in_child = _remembered(simplify.in_child)
    sys.modules["netron"] = _viewer()
    sys.argv[0] = "graphopt"
    warnings.simplefilter("ignore", RuntimeWarning)  # as graphopt.cli.main does
    gc.collect()
    gc.freeze()  # what is imported stays: to look through it after every request takes longer than most of them
    print("ready", file=channel, flush=True)
    for line in requests:
        print(json.dumps(run(json.loads(line))), file=channel, flush=True)


if __name__ == "__main__":
    main()
