"""What several test files need: the command line in this process and in another, and folders that are watched."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "fixtures" / "models"
DATA = ROOT / "fixtures" / "data"
DEMO = ROOT / "graphopt" / "demo"
sys.path.append(str(ROOT / "tools"))  # its sources


@dataclass
class Ran:
    """One run of the command line."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON document and nothing else."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one error line, which is all that a failure may say on standard error."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        assert "Traceback" not in self.err + self.out
        return lines[0]


def run_cli(*arguments: str | Path, stdin: bytes = b"") -> Ran:
    """``graphopt ARGUMENTS`` in this process, through the function that the ``graphopt`` command calls."""
    from graphopt.cli import run

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    old = sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run([str(a) for a in arguments])
    finally:
        sys.stdin = old
    texts = [stream.buffer.getvalue().decode("utf-8", "surrogateescape") for stream in (out, err)]  # type: ignore[attr-defined]
    return Ran(code, *texts)


def run_process(*arguments: str | Path, **options: Any) -> Ran:
    """``python -m graphopt ARGUMENTS`` in a process of its own."""
    command = [sys.executable, "-m", "graphopt", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that is not the user's, and empty."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is also the working folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def python(environment: str) -> str:
    """The interpreter of a framework's environment (``make frameworks``); without it the test is skipped."""
    from sources import interpreter

    found = interpreter(environment)
    if found is None:
        pytest.skip(f"no environment for {environment}; make frameworks builds it, GRAPHOPT_FRAMEWORKS says where")
    return str(found)


@pytest.fixture(scope="session")
def estimators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's sources of tools/sources, trained in this environment, with their data."""
    from sources import write_data
    from sources.sklearn_sources import estimators as train

    folder = tmp_path_factory.mktemp("scikit-learn")
    write_data(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of training
        train(folder)
    return folder


def contents(folder: Path) -> dict[str, Any]:
    """Everything below ``folder``: names, kinds, bytes and times of change."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        kind: Any = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        found[str(path.relative_to(folder))] = (kind, None if path.is_dir() else status.st_mtime_ns)
    return found


@pytest.fixture
def untouched() -> Callable[[Path], contextlib.AbstractContextManager[None]]:
    """A context in which nothing in a folder may appear, vanish or change."""

    @contextlib.contextmanager
    def watch(folder: Path) -> Iterator[None]:
        before = contents(folder)
        yield
        assert contents(folder) == before

    return watch
