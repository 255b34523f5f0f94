"""A package of somebody else's with a pass in it: installed by pip, found by its entry point, run from everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from conftest import DEMO, ROOT, Ran

EXAMPLE = ROOT / "tests" / "plugin_example"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that ``pip install`` has put the example into."""
    import shutil

    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, folder / "source")  # setuptools builds where the sources are
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
    done = subprocess.run(
        [*pip, "--target", str(folder / "there"), str(folder / "source")],
        capture_output=True, text=True, check=False, env=clean,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "there"


def run(installed: Path, *words: str | Path) -> Ran:
    """The command line in a process that has the package."""
    path = os.pathsep.join([str(installed), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "graphopt", *map(str, words)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    return Ran(done.returncode, done.stdout, done.stderr)


def test_it_is_listed_and_runs(installed: Path, workplace: Path) -> None:
    assert "rename-nodes" in run(installed, "passes").out
    ran = run(installed, "optimize", DEMO / "digits.onnx", "-o", "a.onnx", "--passes", "rename-nodes", "--time", "0")
    assert ran.code == 0, ran.err
    assert onnx.load("a.onnx").graph.node[0].name == f"{onnx.load('a.onnx').graph.node[0].op_type}_0"
    Path("r.toml").write_text('[[pass]]\nuse = "rename-nodes"\nprefix = "my_"\n')
    ran = run(installed, "optimize", DEMO / "digits.onnx", "-o", "b.onnx", "--recipe", "r.toml", "--time", "0")
    assert ran.code == 0, ran.err
    assert all(node.name.startswith("my_") for node in onnx.load("b.onnx").graph.node)


def test_without_the_package_it_is_unknown(workplace: Path) -> None:
    ran = run(ROOT, "optimize", DEMO / "digits.onnx", "-o", "a.onnx", "--passes", "rename-nodes")
    assert ran.code == 2
    assert "unknown pass 'rename-nodes'" in ran.error
