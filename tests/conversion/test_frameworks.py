"""The real frameworks, where their environments are (tools/sources): sources agree, hostile ones run nothing."""

from __future__ import annotations

import os
import pickle
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import ROOT, run_cli

sys.path.insert(0, str(ROOT / "tools"))

from sources import SOURCES, Made, interpreter, make, shaped, write_data

COOKBOOK = sorted((ROOT / "docs" / "cookbook").glob("*.md"))
HEAD = re.compile(r"<!-- environment: (\w+); files: (.*?) -->")


def python(environment: str) -> str:
    found = interpreter(environment)
    if found is None:
        pytest.skip(f"no environment for {environment} (GRAPHOPT_FRAMEWORKS)")
    return str(found)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an environment, with its sources and the data; made when it is first asked for."""

    @cache
    def folder(environment: str) -> Path:
        python(environment)
        found = tmp_path_factory.mktemp(environment)
        write_data(found)
        make(environment, found)
        return found

    return folder


@pytest.mark.framework
@pytest.mark.parametrize("made", SOURCES, ids=lambda m: m.source)
def test_converts_and_knows_the_digits(made: Made, sources: Callable[[str], Path], workplace: Path) -> None:
    interpreter_path = python(made.environment)
    folder = sources(made.environment)
    ran = run_cli("convert", folder / made.source, "-o", "m.onnx", "--python", interpreter_path, *made.options)
    assert ran.code == 0, ran.err
    test = np.load(folder / "test.npz")
    session = onnxruntime.InferenceSession("m.onnx")
    name = session.get_inputs()[0].name
    hits = 0
    for image, label in zip(shaped(test["image"], made.layout), test["label"], strict=True):
        outputs = session.run(None, {name: image[None]})
        scores = next(o for o in outputs if np.ndim(o) == 2 and np.shape(o)[1] == 10)
        hits += int(np.argmax(scores) == label)
    assert hits / len(test["label"]) > 0.75


@pytest.mark.framework
def test_hostile_pickles_run_nothing(workplace: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {workplace}/ran",)

    Path("evil.pkl").write_bytes(pickle.dumps(Payload()))
    ran = run_cli("convert", "evil.pkl", "-o", "m.onnx", "--python", python("sklearn"))
    assert ran.code == 2
    assert "--allow-pickle" in ran.error
    assert sorted(p.name for p in workplace.iterdir()) == ["evil.pkl"]


@pytest.mark.framework
def test_a_saved_model_with_a_custom_operator(sources: Callable[[str], Path], workplace: Path) -> None:
    interpreter_path = python("tensorflow")
    shutil.copytree(sources("tensorflow") / "saved", "saved")
    path = Path("saved/saved_model.pb")
    path.write_bytes(path.read_bytes().replace(b"Conv2D", b"EvilOp"))
    ran = run_cli("convert", "saved", "-o", "m.onnx", "--python", interpreter_path)
    assert ran.code == 2
    assert "EvilOp" in ran.error
    assert "nothing was loaded" in ran.error


@pytest.mark.framework
@pytest.mark.parametrize("page", [p for p in COOKBOOK if HEAD.search(p.read_text("utf-8"))], ids=lambda p: p.stem)
def test_cookbook(page: Path, sources: Callable[[str], Path], workplace: Path) -> None:
    text = page.read_text("utf-8")
    head = HEAD.search(text)
    assert head is not None
    interpreter_path = python(head[1])
    for name in head[2].split(", "):
        given = sources(head[1]) / name
        (shutil.copytree if given.is_dir() else shutil.copy)(given, name)
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
    assert lines
    for line in lines:
        words = shlex.split(line)[1:]
        if words[0] == "convert":
            words += ["--python", interpreter_path]
        if words[0] == "quantize" and "--allow-slower" not in words:
            words += ["--allow-slower", "--time", "0"]  # whether int8 is faster depends on who else uses this machine
        ran = run_cli(*words)
        assert ran.code == 0, f"{line}\n{ran.err}"


def test_the_page_on_exporters(workplace: Path) -> None:
    shutil.copy(ROOT / "fixtures" / "models" / "shared.onnx", "model.onnx")
    text = (ROOT / "docs" / "cookbook" / "exporters.md").read_text("utf-8")
    (line,) = re.findall(r"^```sh\n(graphopt .*?)\n```", text, re.M | re.S)
    words = shlex.split(line.split(" > ")[0])[1:]
    assert run_cli(*words).code == 0
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    import onnx

    exec(compile(block, "exporters.md", "exec"), {"model_onnx": onnx.load("model.onnx")})


def test_links_and_names_in_the_cookbook() -> None:
    """Every option on these pages exists."""
    import click

    from graphopt.cli import cli

    for page in COOKBOOK:
        for line in re.findall(r"^ *(?:graphopt|entry: graphopt) .*$", page.read_text("utf-8"), re.M):
            for part in line.replace("entry: ", "").split(" | "):
                words = shlex.split(part.replace("\\", ""), comments=False)
                command = cli.get_command(click.Context(cli), words[1])
                assert command is not None, part
                known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
                assert {w for w in words[2:] if w.startswith("--")} <= known, part
