"""Calling what may crash, hang or swell, in a process of its own."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptError, RuntimeFailure
from graphopt.session import one_line


def in_child(function: Callable[..., Any], *arguments: Any, timeout: float = 600.0, memory: int | None = None) -> Any:
    """Call a module-level function in a fresh interpreter that may crash, hang or swell without harming this one.

    Arguments and result are pickled through files in a scratch folder, which is also the child's working folder.
    ``memory`` caps its address space in bytes where the platform can.

    Raises:
        RuntimeFailure: it crashed, ran out of time or memory, or raised; the message says which.
    """
    folder = Path(tempfile.mkdtemp(prefix="graphopt-child-"))
    try:
        request, answer = folder / "request", folder / "answer"
        request.write_bytes(pickle.dumps((function.__module__, function.__qualname__, arguments, memory)))
        package_root = str(Path(__file__).resolve().parent.parent)
        code = f"import sys; sys.path.insert(0, {package_root!r}); from graphopt.isolation import _child; _child()"
        try:
            done = subprocess.run(
                [sys.executable, "-c", code],
                cwd=folder,
                capture_output=True,
                timeout=timeout,
                check=False,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
            )
        except subprocess.TimeoutExpired:
            raise RuntimeFailure(f"it took longer than {timeout:g} s and was stopped") from None
        if not answer.exists():
            lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
            why = f"signal {-done.returncode}" if done.returncode < 0 else f"exit {done.returncode}"
            raise RuntimeFailure(f"the child process died ({why}){': ' + lines[-1][:200] if lines else ''}")
        ok, value = pickle.loads(answer.read_bytes())
        if not ok:
            raise RuntimeFailure(value)
        return value
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _child() -> None:
    folder = Path.cwd()  # the function may go elsewhere
    module, name, arguments, memory = pickle.loads((folder / "request").read_bytes())
    if memory is not None and sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    try:
        import importlib

        result: tuple[bool, Any] = (True, getattr(importlib.import_module(module), name)(*arguments))
    except MemoryError:
        result = (False, "it ran out of the memory it was given")
    except Exception as error:
        kind = "" if isinstance(error, GraphoptError) else f"{type(error).__name__}: "
        result = (False, kind + one_line(error))
    temporary = folder / "answer.part"
    temporary.write_bytes(pickle.dumps(result))
    temporary.rename(folder / "answer")
    # Some native libraries crash while they are torn down; the answer is already safe.
    sys.stdout.flush()
    os._exit(0)
