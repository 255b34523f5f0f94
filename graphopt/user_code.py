"""What a user names as ``file.py:function``: passes and metrics of their own."""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

from graphopt.errors import InputError

_PREFIX = "_graphopt_user_"
_count = itertools.count()


@contextmanager
def neighbours_of(path: Path) -> Iterator[None]:
    """The files beside ``path`` can be imported meanwhile, and are forgotten afterwards: another folder may have a
    neighbour of the same name."""
    folder = str(path.resolve().parent)
    before = set(sys.modules)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
        for other in set(sys.modules) - before:
            if not other.startswith(_PREFIX) and _lies_in(sys.modules[other], folder):
                del sys.modules[other]


def _lies_in(module: Any, folder: str) -> bool:
    return str(getattr(module, "__file__", None)).startswith(folder + os.sep)


def from_file(path: Path, name: str) -> Any:
    """``name`` (dots allowed) out of the Python file ``path``, which may import its neighbours.

    Raises:
        InputError: no such file, it does not import, or it has no such name.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path} (for '{path.name}:{name}'); check the path")
    spec = importlib.util.spec_from_file_location(f"{_PREFIX}{next(_count)}_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is no Python file; give module.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # stays there: dataclasses and pickle look their module up
    try:
        with neighbours_of(path):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(spec.name, None)
        raise InputError(f"{path} does not import: {one_line(error)}; fix the file") from error
    try:
        return reduce(getattr, name.split("."), module)
    except AttributeError:
        raise InputError(f"{path} has no function '{name}'; check the name after the colon") from None


def spelled(kind: Any) -> str | None:
    """How a function or class is named so that another process finds it: ``module:name``, or ``/path/file.py:name``.

    None for what only exists inside a function.
    """
    name = getattr(kind, "__qualname__", "<unnamed>")
    if "<" in name:
        return None
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    if kind.__module__ == "__main__" or kind.__module__.startswith(_PREFIX):
        return f"{Path(file).resolve()}:{name}" if file else None
    return f"{kind.__module__}:{name}"


def one_line(error: BaseException) -> str:
    """``Type: message`` of what somebody else's code raised, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
