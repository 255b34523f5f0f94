"""What happens to the output when memory runs out: at every allocation in turn, and under limits that grow."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import builders
import numpy as np
import onnx
import pytest
from conftest import ROOT, contents, run_cli

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="other limits there")
MOST = int(os.environ.get("GRAPHOPT_FAULTS", "20"))
"""Of the allocations of a run, so many fail, spread over all of them; `make hostile` takes more."""
QUANTIZE = '[[pass]]\nuse = "quantize-static"\n'
DATA = ("--data", "in/d.npz", "--time", "0")
VERBS = {
    "optimize": ("--time", "0", "--passes", "fold-constants,eliminate-identities,remove-unused"),
    "recipe": ("--recipe", "in/r.toml", *DATA),
    "quantize": DATA,
    "compress": ("--weights", "int8", *DATA),
    "prune": ("--macs", "0.7", *DATA),
}
FAST = ("optimize", "recipe")
"""Without onnxsim, whose process takes a second to start."""


@pytest.fixture
def place(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``in/m.onnx`` with data and a recipe, and ``out/o.onnx`` from an earlier run."""
    for name in ("in", "out", "tmp"):
        (workplace / name).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(workplace / "tmp"))
    onnx.save(builders.mlp(), workplace / "in" / "m.onnx")
    onnx.save(builders.mlp(seed=1), workplace / "out" / "o.onnx")
    x = np.random.default_rng(0).normal(size=(48, 32)).astype(np.float32)
    np.savez(workplace / "in" / "d.npz", x=x)
    (workplace / "in" / "r.toml").write_text(QUANTIZE)
    return workplace


class Failing:
    """A profile function: the n-th call of something that allocates gets a MemoryError instead."""

    methods = frozenset(
        (
            *("SerializeToString", "FromString", "ParseFromString", "CopyFrom", "MergeFrom", "extend", "add", "mmap"),
            *("read", "write", "join", "encode", "astype", "copy", "tobytes", "flatten", "sum", "min", "max", "mean"),
            *("dot", "view", "update", "run", "load_model", "initialize_session", "infer_shapes"),
        )
    )

    def __init__(self, nth: float) -> None:
        self.left = nth
        self.count = 0
        self.at = ""

    def __call__(self, frame: FrameType, event: str, called: Any) -> None:
        if event != "c_call" or not self._allocates(called):
            return
        self.count += 1
        if self.count == self.left:
            self.at = f"{called.__qualname__} in {frame.f_code.co_filename}:{frame.f_lineno}"
            raise MemoryError(self.at)

    def _allocates(self, called: Any) -> bool:
        return (called.__module__ or "").startswith("numpy") or called.__name__ in self.methods


def failing(verb: str, nth: float) -> tuple[Any, Failing]:
    """One run in which the ``nth`` allocation fails."""
    fault = Failing(nth)
    name = "optimize" if verb == "recipe" else verb
    before = sys.getprofile()
    sys.setprofile(fault)
    try:
        ran = run_cli(name, "in/m.onnx", "-o", "out/o.onnx", "-q", *VERBS[verb])
    finally:
        sys.setprofile(before)
    return ran, fault


@pytest.mark.parametrize("verb", VERBS if "GRAPHOPT_FAULTS" in os.environ else FAST)
def test_every_allocation_fails_once(place: Path, verb: str) -> None:
    """The old file or a complete new one, one line, nothing else; a pass that could not go on is undone, and said."""
    old = (place / "out" / "o.onnx").read_bytes()
    source = contents(place / "in")
    ran, fault = failing(verb, float("inf"))
    assert ran.code == 0, ran.err
    assert fault.count > 100
    seen = set()
    for nth in sorted({1 + int(i * fault.count / MOST) for i in range(MOST)}):
        (place / "out" / "o.onnx").write_bytes(old)
        for path in (place / "tmp").iterdir():  # reproducers, which the runs told of
            assert path.name.startswith("graphopt-repro-"), path
            for inner in path.iterdir():
                inner.unlink()
            path.rmdir()
        ran, fault = failing(verb, nth)
        seen.add(ran.code)
        assert "Traceback" not in ran.err, fault.at
        assert ran.code in (0, 2, 3), f"{fault.at}: {ran.err}"
        assert contents(place / "in") == source
        assert {path.name for path in (place / "out").iterdir()} == {"o.onnx"}, fault.at
        new = (place / "out" / "o.onnx").read_bytes()
        if ran.code:
            assert new == old, fault.at
            assert "; " in ran.error, fault.at
        else:
            onnx.checker.check_model(onnx.load_from_string(new))
    assert 2 in seen


LIMITED = """
import os, resource, sys
import graphopt.api, graphopt.cli, onnxsim
from graphopt.cli import run

def held():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024

for step in map(int, sys.argv[1].split(",")):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(f"err{step}", os.O_WRONLY | os.O_CREAT), 2)
        limit = held() + step * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        os._exit(run(sys.argv[2:]))
    print(step, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA holds there only")
def test_limits_that_grow(place: Path) -> None:
    """Memory that is really not there, from 1 MB more than Python holds to enough."""
    onnx.save(builders.mlp(2048), place / "in" / "m.onnx")  # 32 MB of weights
    before = contents(place)
    steps = [1, 4, 16, 48, 64, 96, 192, 256, 1000]
    command = ["optimize", "in/m.onnx", "-o", "out/o.onnx", "-q", *VERBS["optimize"]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(place / "tmp")}
    code = [sys.executable, "-c", LIMITED, ",".join(map(str, steps)), *command]
    done = subprocess.run(code, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert not done.returncode, done.stderr
    codes = dict(tuple(map(int, line.split())) for line in done.stdout.splitlines())
    assert set(codes.values()) <= {0, 2}, codes
    assert codes[1000] == 0
    assert codes[1] == 2
    assert list(codes.values()) == sorted(codes.values(), reverse=True)  # more memory never fails where less did
    for step in steps:
        lines = (place / f"err{step}").read_text().splitlines()
        assert len(lines) == (1 if codes[step] else 0), lines
        assert all("memory" in line for line in lines), lines
        (place / f"err{step}").unlink()
    onnx.checker.check_model(onnx.load(place / "out" / "o.onnx"))
    left = contents(place)
    assert {name for name in itertools.chain(before, left) if before.get(name) != left.get(name)} == {"out/o.onnx"}
