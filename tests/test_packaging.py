"""What people install: built from a copy, listed, unpacked and imported."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETTINGS = PROJECT["tool"]["setuptools"]

pytestmark = pytest.mark.slow


def copy_of_the_project(to: Path) -> Path:
    """What git would check out, more or less: no caches, no environments, the symlink a symlink."""
    ignore = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "__pycache__", "shared", "venv", "demo-out", "*.pyc"
    )
    return Path(shutil.copytree(ROOT, to, symlinks=True, ignore=ignore))


def build(source: Path, to: Path, *what: str) -> None:
    """With the setuptools that is installed where it is new enough, else in an environment build makes."""
    found = importlib.util.find_spec("setuptools") and int(version("setuptools").split(".")[0]) >= 77
    isolation = ["--no-isolation"] if found else []
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONWARNINGS", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-m", "build", *what, *isolation, "--outdir", str(to), str(source)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    noise = [line for line in (done.stdout + done.stderr).splitlines() if "Deprecat" in line or "ambiguous" in line]
    assert noise == []


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist): the sdist from the sources, the wheel from the sources too."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("packaging")
    source = copy_of_the_project(folder / "source")
    build(source, folder / "dist", "--wheel", "--sdist")
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert [n for n, count in Counter(names).items() if count > 1] == []
        return {name: archive.read(name) for name in names}


def expected_files() -> set[str]:
    """Every source and data file, under the name it is imported by."""
    found = {f"graphopt/{p.name}" for p in (ROOT / "graphopt").glob("*.py")} | {"graphopt/py.typed"}
    for package in SETTINGS["packages"]:
        folder = ROOT / SETTINGS["package-dir"].get(package, package.replace(".", "/"))
        patterns = ["*.py", *SETTINGS["package-data"].get(package, [])]
        found |= {f"{package.replace('.', '/')}/{p.name}" for pattern in patterns for p in folder.glob(pattern)}
    return found


def test_every_package_is_listed() -> None:
    """Packages are named by hand, because ``graphopt.passes`` lives elsewhere; none may be forgotten."""
    folders = {p.parent for p in (ROOT / "graphopt").rglob("*.py") if "passes" not in p.relative_to(ROOT).parts}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert names | {"graphopt.passes", "graphopt.demo"} == set(SETTINGS["packages"])  # the demo has data only


def test_every_data_file_is_packaged() -> None:
    """What is no Python file in the package is package data by some pattern."""
    there = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "graphopt").rglob("*")
        if p.is_file() and p.suffix not in (".py", ".pyc") and "passes" not in p.relative_to(ROOT).parts
    }
    assert there <= expected_files()


def test_the_wheel_holds_everything_once_and_nothing_else(built: tuple[Path, Path]) -> None:
    files = contents(built[0])
    ours = {name for name in files if not name.split("/")[0].endswith(".dist-info")}
    assert ours == expected_files()
    assert {"graphopt/passes/fold_constants.py", "graphopt/demo/digits.onnx", "graphopt/targets/ort-cpu.toml"} <= ours
    assert files["graphopt/passes/fold_constants.py"] == (ROOT / "passes" / "fold_constants.py").read_bytes()
    info = {name.split("/", 1)[1] for name in files if name not in ours}
    assert {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"} <= info
    # The demo's model is most of it; code may grow, data may not slip in.
    assert sum(len(data) for name, data in files.items() if not name.endswith(".py")) < 1_200_000


def test_the_metadata_says_what_the_project_says(built: tuple[Path, Path]) -> None:
    files = contents(built[0])
    text = next(data for name, data in files.items() if name.endswith("/METADATA")).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.11" in text
    assert f"Version: {PROJECT['project']['version']}\n" in text
    entry_points = next(data for name, data in files.items() if name.endswith("/entry_points.txt")).decode()
    assert "graphopt = graphopt.cli:main" in entry_points


def test_the_wheel_imports(built: tuple[Path, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(built[0]) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import graphopt, graphopt.passes.fold_constants as f, graphopt.registry as r;"
        "print(graphopt.__file__); print(f.__file__);"
        "print(all(r.get(n).name == n for n in r.PASSES));"
        "from importlib.metadata import version; print(version('graphopt') == graphopt.__version__)"
    )
    # -P and an own working folder: what is found is the unpacked wheel, not the checkout.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    package, fold, registered, same_version = done.stdout.splitlines()
    assert Path(package) == tmp_path / "site" / "graphopt" / "__init__.py"
    assert Path(fold) == tmp_path / "site" / "graphopt" / "passes" / "fold_constants.py"
    assert (registered, same_version) == ("True", "True")


def test_the_sdist_builds_an_equal_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        safe: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 has it
        archive.extractall(tmp_path, **safe)
    (source,) = [p for p in tmp_path.iterdir() if p.is_dir()]
    names = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()}
    assert {"passes/fold_constants.py", "graphopt/demo/digits.onnx", "pyproject.toml", "LICENSE"} <= names
    assert not any(n.split("/")[0] in ("fixtures", "tools") or ".cache" in n or "__pycache__" in n for n in names)
    build(source, tmp_path / "again", "--wheel")
    (again,) = (tmp_path / "again").glob("*.whl")
    assert again.name == wheel.name
    first, second = contents(wheel), contents(again)
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name] and not name.endswith("/RECORD")} == set()
