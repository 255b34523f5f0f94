"""What happens to the output when the system fails: through the command line, at every call that can fail."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import builders
import onnx
import pytest
from conftest import ROOT, contents, run_cli

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="other calls there")
OPTIMIZE = ("optimize", "in/m.onnx", "-o", "out/o.onnx", "--time", "0", "--passes", "eliminate-identities", "-q")
CALLS = ("open", "fsync", "fdopen", "replace", "unlink", "fchmod")


@pytest.fixture
def place(workplace: Path) -> Path:
    """``in/m.onnx``, and ``out/o.onnx`` from an earlier run with other weights."""
    for name, seed in (("in", 0), ("out", 1)):
        (workplace / name).mkdir()
        onnx.save(builders.mlp(seed=seed), workplace / name / ("m.onnx" if name == "in" else "o.onnx"))
    return workplace


class Failing:
    """A function of ``os`` that fails the n-th time it is called for something in ``below``."""

    def __init__(self, name: str, nth: int, below: Path) -> None:
        self.name, self.left, self.below = name, nth, str(below)
        self.real = getattr(os, name)
        self.hit = False

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self._ours(args):
            self.left -= 1
            if self.left == 0:
                self.hit = True
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self.real(*args, **options)

    def _ours(self, args: tuple[Any, ...]) -> bool:
        first = args[0] if args else ""
        if isinstance(first, int):
            with contextlib.suppress(OSError):
                return self.below in str(Path(f"/proc/self/fd/{first}").readlink())
            return False
        return self.below in os.fsdecode(first) if isinstance(first, (str, bytes, os.PathLike)) else False


@contextlib.contextmanager
def failing(name: str, nth: int, below: Path) -> Iterator[Failing]:
    found = Failing(name, nth, below)
    setattr(os, name, found)
    try:
        yield found
    finally:
        setattr(os, name, found.real)


def models(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("extra", [(), ("--external-data",), ("--report", "out/r.html")], ids=["one", "two", "page"])
@pytest.mark.parametrize("call", CALLS)
def test_every_call_fails_once(place: Path, call: str, extra: tuple[str, ...]) -> None:
    """The old file, or the complete new one; nothing else beside it; one line where it failed."""
    out = place / "out"
    before, source = models(out), contents(place / "in")
    for nth in range(1, 30):
        for path in out.iterdir():
            path.unlink()
        for name, data in before.items():
            (out / name).write_bytes(data)
        with failing(call, nth, place) as fault:
            ran = run_cli(*OPTIMIZE, *extra)
        assert contents(place / "in") == source
        after = models(out)
        assert "Traceback" not in ran.err
        assert ran.code in (0, 2), ran.err
        if ran.code:
            assert ran.error.count("; ") >= 1
        if after["o.onnx"] != before["o.onnx"]:
            whole = onnx.load(out / "o.onnx")  # with its data file, where it has one
            onnx.checker.check_model(whole)
            assert len(whole.graph.node) == 3
        assert not [name for name in after if name.endswith(".tmp")]
        if not fault.hit:
            return
    pytest.fail(f"{call} is called more often than that")


def test_read_only_folder_is_told_before_the_work(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # whom no permission stops
        monkeypatch.setattr("graphopt.cli._finish.os.access", lambda *_: False)
    else:
        (place / "out").chmod(0o555)
    before = contents(place)
    ran = run_cli(*OPTIMIZE)
    assert ran.code == 2
    assert "not writable" in ran.error
    assert contents(place) == before


def test_a_linked_output_stays_a_link_and_its_target_is_replaced(place: Path) -> None:
    (place / "real").mkdir()
    (place / "out" / "o.onnx").rename(place / "real" / "o.onnx")
    (place / "out" / "o.onnx").symlink_to("../real/o.onnx")
    assert run_cli(*OPTIMIZE).code == 0
    assert (place / "out" / "o.onnx").is_symlink()
    assert onnx.load(place / "real" / "o.onnx") == onnx.load(place / "in" / "m.onnx")


def test_external_data_in_another_folder_is_not_touched(place: Path) -> None:
    """The source's weights stay where they are; the result has its own, beside it."""
    onnx.save(builders.mlp(), place / "in" / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    source = contents(place / "in")
    assert run_cli(*OPTIMIZE).code == 0
    assert contents(place / "in") == source
    onnx.checker.check_model(str(place / "out" / "o.onnx"))
    for path in (place / "in").iterdir():
        path.unlink()
    assert len(onnx.load(place / "out" / "o.onnx").graph.initializer) == 2


def test_the_same_bytes_whatever_the_seed_of_hashes(place: Path) -> None:
    """Sets and dicts in another order change nothing."""
    found = set()
    for seed in ("1", "2"):
        out = place / f"{seed}.onnx"
        command = [sys.executable, "-m", "graphopt", "optimize", "in/m.onnx", "-o", str(out), "--time", "0", "-q"]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True)
        found.add(out.read_bytes())
    assert len(found) == 1
