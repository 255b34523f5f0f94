"""The real frameworks, where their environments are (tools/sources): sources agree, hostile ones run nothing."""

from __future__ import annotations

import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnxruntime
import pytest
from conftest import DEMO, ROOT, python, run_cli
from sources import SOURCES, Made, feeds, make, write_data

COOKBOOK = sorted((ROOT / "docs" / "cookbook").glob("*.md"))
HEAD = re.compile(r"<!-- environment: (\w+); files: (.*?) -->")


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
    given = feeds(test["image"], made.layout, [port.name for port in session.get_inputs()])
    hits = 0
    for index, label in enumerate(test["label"]):
        outputs = session.run(None, {name: array[index : index + 1] for name, array in given.items()})
        scores = next(o for o in outputs if np.ndim(o) == 2 and np.shape(o)[1] == 10)
        hits += int(np.argmax(scores) == label)
    assert hits / len(test["label"]) > made.least


@pytest.mark.framework
def test_one_net_of_three_frameworks_is_one_net(workplace: Path) -> None:
    """basic-pitch ships the same net as SavedModel, TFLite and ONNX."""
    package = Path(python("basicpitch")).parents[1]
    (models,) = package.glob("lib/*/site-packages/basic_pitch/saved_models/icassp_2022")
    sound = np.random.default_rng(0).standard_normal((2, 43844, 1)).astype(np.float32) * 0.1
    made = {"own": models / "nmp.onnx"}
    for name in ("nmp", "nmp.tflite"):
        made[name] = Path(f"{name}.onnx")
        ran = run_cli("convert", models / name, "-o", made[name], "--python", python("tensorflow"), "-q")
        assert ran.code == 0, ran.err
    outputs = {}
    for name, path in made.items():
        session = onnxruntime.InferenceSession(str(path))
        order = sorted(output.name for output in session.get_outputs())  # contour, note, onset; or :0, :1, :2
        outputs[name] = session.run(order, {session.get_inputs()[0].name: sound})
    for name in ("nmp", "nmp.tflite"):
        for ours, theirs in zip(outputs[name], outputs["own"], strict=True):
            assert np.abs(ours - theirs).max() < 5e-6, name


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
def test_what_jax_export_writes_is_known_and_refused(sources: Callable[[str], Path], workplace: Path) -> None:
    ran = run_cli("convert", sources("jax") / "net.jaxexport", "-o", "m.onnx", "--python", python("jax"))
    assert ran.code == 2
    assert "jax.export" in ran.error
    assert "module.py:function" in ran.error


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


HERE = ("digits.onnx", "calibration.npz", "evaluation.npz")
"""Files that pages take from the demo."""


def runs(page: Path) -> object:
    """A page as a parameter: it is a framework's test unless it needs nothing but what is here."""
    head = HEAD.search(page.read_text("utf-8"))
    assert head is not None
    marks = () if head[1] == "here" else (pytest.mark.framework,)
    return pytest.param(page, head[1], head[2].split(", "), marks=marks, id=page.stem)


@pytest.mark.parametrize(
    ("page", "environment", "files"), [runs(p) for p in COOKBOOK if HEAD.search(p.read_text("utf-8"))]
)
def test_cookbook(
    page: Path, environment: str, files: list[str], request: pytest.FixtureRequest, workplace: Path
) -> None:
    interpreter_path = None if environment == "here" else python(environment)
    for name in files:
        if name in HERE:
            given = ROOT / "graphopt" / "demo" / name
        elif environment == "here":
            given = request.getfixturevalue("estimators") / name
        else:
            given = request.getfixturevalue("sources")(environment) / name
        (shutil.copytree if given.is_dir() else shutil.copy)(given, name)
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert lines
    for line in lines:
        words = shlex.split(line)[1:]
        if words[0] in ("convert", "export") and interpreter_path and words[-1] != "ort":
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


def with_graphopt(workplace: Path, *more: str) -> dict[str, str]:
    """An environment in which ``graphopt`` is this one, given ``more`` behind whatever it is asked."""
    folder = workplace / "bin"
    folder.mkdir()
    command = shlex.join([sys.executable, "-m", "graphopt"])
    (folder / "graphopt").write_text(f'#!/bin/sh\nexec {command} "$@" {shlex.join(more)}\n')
    (folder / "graphopt").chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_the_step_in_ci_writes_its_gates_and_a_summary(workplace: Path) -> None:
    text = (ROOT / "docs" / "cookbook" / "exporters.md").read_text("utf-8")
    (step,) = re.findall(r"^- run: \|\n((?:    .*\n)+)", text, re.M)
    shutil.copy(DEMO / "digits.onnx", "model.onnx")
    shutil.copy(DEMO / "calibration.npz", "calib.npz")
    shutil.copy(DEMO / "evaluation.npz", "test.npz")
    # Whether int8 is faster depends on who else uses this machine.
    environment = {**with_graphopt(workplace, "--allow-slower", "--time", "0"), "GITHUB_STEP_SUMMARY": "summary.md"}

    def run(script: str) -> int:
        done = subprocess.run(
            ["bash", "-e", "-c", script], env=environment, check=False, capture_output=True, text=True
        )
        return done.returncode

    assert run(textwrap.dedent(step)) == 0
    assert re.search(r"^\| accuracy ", Path("summary.md").read_text("utf-8"), re.M)
    gates = ElementTree.parse("gates.xml").getroot()
    assert {str(case.get("name")).split()[0] for case in gates.iter("testcase")} >= {"max-drop", "max-size"}
    assert not list(gates.iter("failure"))
    Path("int8.onnx").unlink()
    assert run(textwrap.dedent(step).replace("--max-size 0.3", "--max-size 0.1")) == 1
    assert list(ElementTree.parse("gates.xml").getroot().iter("failure"))
    assert not Path("int8.onnx").exists()


def test_the_hook_judges_every_model_it_is_given(workplace: Path) -> None:
    text = (ROOT / "docs" / "cookbook" / "exporters.md").read_text("utf-8")
    (entry,) = re.findall(r"^ *entry: (.*)$", text, re.M)
    environment = with_graphopt(workplace)
    right, wrong = str(ROOT / "fixtures" / "models" / "shared.onnx"), "wrong.onnx"
    Path(wrong).write_bytes(b"no model")
    for models, code in (([right], 0), ([wrong, right], 1), ([right, wrong], 1)):
        done = subprocess.run([*shlex.split(entry), *models], env=environment, check=False, capture_output=True)
        assert done.returncode == code, done.stderr.decode()


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
