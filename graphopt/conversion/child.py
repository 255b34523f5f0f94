"""A front end's script in a process of its own: its interpreter, its folder, its answer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graphopt.conversion.front_ends import FrontEnd
from graphopt.errors import InputError, RuntimeFailure, command

WORKERS = Path(__file__).resolve().parent / "workers"
_LOG_TAIL = 4000
_QUIET = {
    "PYTHONSAFEPATH": "1",  # a folder named jax where the user stands must not become the framework
    "PIP_NO_INDEX": "1",  # paddle2onnx installs packages by itself where it may
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "CUDA_VISIBLE_DEVICES": "-1",  # compared on the CPU, where the result runs
}


class _Trace(Exception):
    """What the other interpreter said of an exception; shown by ``-v``."""


def run(
    front_end: FrontEnd,
    request: dict[str, Any],
    folder: Path,
    *,
    python: str | os.PathLike[str] | None = None,
    timeout: float = 3600.0,
    progress: Callable[[int, int | None, str], None] | None = None,
) -> dict[str, Any]:
    """Do ``request`` in ``folder`` with the interpreter ``python`` (None: this one).

    Raises:
        InputError: the interpreter cannot be started or has not what is needed, or the source is refused.
        RuntimeFailure: the converter failed, died, or took longer than ``timeout`` seconds.
    """
    python = None if python is None else _interpreter(os.fspath(python))
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    script = WORKERS / front_end.script
    words = [python or sys.executable, str(WORKERS / "worker.py"), str(script), "request.json"]
    environment = {**os.environ, **_QUIET, "TMPDIR": str(folder)}
    if python is not None:  # packages of this interpreter are none of another's
        for name in ("PYTHONPATH", "PYTHONHOME"):
            environment.pop(name, None)
    with (folder / "log.txt").open("wb") as log:
        try:
            process = subprocess.Popen(
                words, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise InputError(
                f"cannot start the interpreter {words[0]}: {error.strerror or error}; name one that has the "
                "framework: --python PATH"
            ) from error
        try:
            _wait(
                process,
                timeout,
                lambda: progress and progress(0, None, f"converting {front_end.road}"),
            )
        finally:
            _end(process)
    return _answer(front_end, folder, process.returncode, python)


def _interpreter(given: str) -> str:
    path = shutil.which(given)
    if path is None:
        raise InputError(f"no interpreter at {given}; --python is the path of a python that has the framework")
    return str(Path.cwd() / path)  # links not followed: where that of an environment stands says what it has


def _wait(process: subprocess.Popen[bytes], timeout: float, tick: Callable[[], Any]) -> None:
    deadline = time.monotonic() + timeout
    while True:
        tick()
        try:
            process.wait(min(0.2, max(deadline - time.monotonic(), 0.01)))
            return
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                raise RuntimeFailure(
                    f"the converter took longer than {timeout:g} s and was stopped; give it more: --timeout SECONDS"
                ) from None


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and what it started are gone."""
    with contextlib.suppress(OSError, AttributeError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        process.kill()
    process.wait()


def _answer(front_end: FrontEnd, folder: Path, code: int, python: str | None) -> dict[str, Any]:
    log = (folder / "log.txt").read_bytes()[-_LOG_TAIL:].decode("utf-8", "replace")
    try:
        answer: dict[str, Any] = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        lines = [line for line in log.splitlines() if line.strip()]
        why = f"signal {-code}" if code < 0 else f"exit {code}"
        last = f": {' '.join(lines[-1].split())[:200]}" if lines else ""
        raise RuntimeFailure(f"the converter {front_end.road} died ({why}){last}; -v shows more") from _Trace(log)
    if answer["ok"]:
        return answer
    if answer["why"] == "missing":
        raise InputError(missing(front_end, answer["modules"], python))
    if answer["why"] == "refused":
        raise InputError(answer["message"])
    raise RuntimeFailure(
        f"the converter {front_end.road} failed: {answer['message'].rstrip('.')}; -v shows where, and the "
        "framework's converter is the place to report it"
    ) from _Trace(f"{log}\n{answer.get('trace', '')[-_LOG_TAIL:]}")


def missing(front_end: FrontEnd, modules: list[str], python: str | None) -> str:
    """One line on what is not installed, with the command that installs it."""
    names = ", ".join(modules)
    if python is None:
        install = command("pip", "install", f"graphopt[{front_end.extra}]")
        return (
            f"converting {front_end.road} needs {names}, which is not installed here: {install}; or name an "
            "interpreter that has it: --python PATH"
        )
    shown = shutil.which(python) or python
    return f"{shown} has no {names}; install it there: " + command(
        shown, "-m", "pip", "install", *front_end.packages.split()
    )
