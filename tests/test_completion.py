"""What Tab offers, asked the way the shells ask, and typos answered with what was meant."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from conftest import DATA, MODELS, Ran, run_cli, run_process

from graphopt.cli import VERBS, cli

SHARED = MODELS / "shared.onnx"


def asked(*words: str) -> Ran:
    """What ``graphopt`` answers to bash when Tab is pressed behind ``words``."""
    variables = {
        "_GRAPHOPT_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["graphopt", *words]),
        "COMP_CWORD": str(len(words)),
    }
    return run_process(env={**os.environ, **variables})


def offered(*words: str) -> list[str]:
    ran = asked(*words)
    assert ran.code == 0
    assert ran.err == ""
    return [line.partition(",")[2] for line in ran.out.splitlines() if line]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_every_shell(shell: str) -> None:
    ran = run_process(env={**os.environ, "_GRAPHOPT_COMPLETE": f"{shell}_source"})
    assert ran.code == 0
    assert "_graphopt_completion" in ran.out
    assert "Usage" not in ran.out + ran.err


def test_bash_takes_the_script() -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    script = run_process(env={**os.environ, "_GRAPHOPT_COMPLETE": "bash_source"}).out
    done = subprocess.run([bash, "-c", f"{script}\ncomplete -p graphopt"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "_graphopt_completion" in done.stdout


def test_completing_imports_nothing_heavy() -> None:
    variables = {
        "_GRAPHOPT_COMPLETE": "bash_complete",
        "COMP_WORDS": "graphopt optimize --passes fu",
        "COMP_CWORD": "3",
        "PYTHONPROFILEIMPORTTIME": "1",
    }
    command = [sys.executable, "-m", "graphopt"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **variables})
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "click" in loaded
    assert not loaded & {"onnxruntime", "onnx", "onnx_ir", "numpy", "scipy", "rich"}


def test_verbs_and_options() -> None:
    assert offered("") == list(VERBS)
    assert offered("opt") == ["optimize"]
    assert offered("quantize", "--obs") == ["--observer"]
    assert offered("quantize", "--observer", "m") == ["min-max", "mse"]


def test_passes_behind_the_last_comma() -> None:
    both = ["fold-constants,fuse-batchnorm", "fold-constants,fuse-into-conv"]
    assert offered("optimize", "--passes", "fold-constants,fuse") == both
    assert offered("passes", "quantize-s") == ["quantize-static"]


def test_targets() -> None:
    assert offered("quantize", "--target", "ort") == ["ort-arm64", "ort-cpu"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_word_of_every_verb_is_completed(verb: str) -> None:
    """What names a file, a pass, a target or a metric, that is."""
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    wanted = {"D", "M", "IN", "A", "B", "OUT", "T", "DIR", "R.toml", "A,B", "M..."} - {"M" if verb == "passes" else ""}
    for param in command.params:
        named = param.metavar in wanted and param.name not in ("inputs", "outputs")
        assert not named or param._custom_shell_complete, f"{verb}: {param.name}"


def test_models_and_files(workplace: Path) -> None:
    Path("models").mkdir()
    for name in ("model.onnx", "models/deep.onnx", "notes.txt", ".hidden.onnx"):
        Path(name).touch()
    assert offered("inspect", "mo") == ["model.onnx", "models/"]
    assert offered("compare", "model.onnx", "models/") == ["models/deep.onnx"]
    assert offered("quantize", "n") == []
    assert offered("mo") == ["model.onnx", "models/"]  # graphopt model.onnx small.onnx
    assert asked("inspect", "models").out == "dir,models\n"  # the shell's own, which sets no space behind it
    assert asked("quantize", "--data", "no").out == "file,no\n"
    assert asked("quantize", "--metric", "acc").out == "plain,accuracy\n"


QUANTIZE = ("quantize", SHARED, "-o", "out.onnx", "--data", DATA / "shared.npz")


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        *(((verb[:-2] + verb[-1] + verb[-2], "x"), verb) for verb in VERBS if verb not in ("view", "diff", "compress")),
        (("comprss", "x"), "compress"),
        (("veiw", "x"), "view"),
        (("dif", "x"), "diff"),
        (("--versoin",), "--version"),
        (("--hlp",), "--help"),
        (("optimize", SHARED, "--reciep", "x"), "--recipe"),
        (("sensitivity", SHARED, "--dta", "x"), "--data"),
        (("extract", SHARED, "--output", "x", "--inputz", "y"), "--inputs"),
        (("compare", SHARED, SHARED, "--layerwse"), "--layerwise"),
        (("diff", SHARED, SHARED, "--nmes"), "--names"),
        (("inspect", SHARED, "--tre"), "--tree"),
        (("view", SHARED, "--no-browse"), "--no-browser"),
        (("run", "r.toml", "--modl"), "--model"),
        (("passes", "--jsn"), "--json"),
        (("targets", "--jsn"), "--json"),
        (("demo", "--jsn"), "--json"),
        (("optimize", SHARED, "-o", "out.onnx", "--passes", "fuse-batchnrm"), "fuse-batchnorm"),
        (("optimize", SHARED, "-o", "out.onnx", "--verify", "ech"), "each"),
        (("optimize", SHARED, "-o", "out.onnx", "--target", "ort-cup"), "ort-cpu"),
        (("passes", "quantize-sttic"), "quantize-static"),
        ((*QUANTIZE, "--observer", "entropi"), "entropy"),
        ((*QUANTIZE, "--mode", "statc"), "static"),
        ((*QUANTIZE, "--target", "ort_cup"), "ort-cpu"),
        ((*QUANTIZE, "--metric", "acuracy"), "accuracy"),
        ((*QUANTIZE, "--exclude", "Conv_con1"), "Conv_conv1"),
        ((*QUANTIZE, "--include", "Cnov"), "Conv"),
        (("sensitivity", SHARED, "--data", DATA / "shared.npz", "--observer", "mes"), "mse"),
        (("compare", SHARED, SHARED, "--data", DATA / "shared.npz", "--metric", "acuracy"), "accuracy"),
        (("compare", SHARED, SHARED, "--max-abs", "featurs:1"), "features"),
        (("compare", SHARED, SHARED, "--layerwise", "--max-abs", "conv_1:1"), "conv1"),
        (("inspect", SHARED, "--node", "Conv_conv1x"), "Conv_conv1"),
        (("inspect", SHARED, "--dim", "bacth=2"), "batch"),
        (("extract", SHARED, "--inputs", "imge", "-o", "out.onnx"), "image"),
        (("extract", SHARED, "--outputs", "featurs", "-o", "out.onnx"), "features"),
    ],
    ids=lambda value: " ".join(Path(str(v)).name for v in value) if isinstance(value, tuple) else value,
)
def test_what_was_meant(workplace: Path, arguments: tuple[str | Path, ...], meant: str) -> None:
    ran = run_cli(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.count("\n") == 1
    assert ran.err.startswith("error: ")
    assert f"did you mean '{meant}'" in ran.err
    assert list(workplace.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [("target", '"ort-cup"', "ort-cpu"), ("metrc", '"accuracy"', "metric"), ("metric", '"acuracy"', "accuracy")],
)
def test_what_was_meant_in_a_recipe(workplace: Path, key: str, value: str, meant: str) -> None:
    text = f'model = "{SHARED}"\noutput = "out.onnx"\ndata = "{DATA / "shared.npz"}"\n{key} = {value}\n'
    Path("r.toml").write_text(text + '\n[[pass]]\nuse = "quantize-static"\n')
    ran = run_cli("run", "r.toml")
    assert ran.code == 2
    assert f"did you mean '{meant}'" in ran.err


def test_what_was_meant_by_an_option_of_a_pass(workplace: Path) -> None:
    for line, meant in (('observer = "entropi"', "entropy"), ('observr = "mse"', "observer"), ('mode = "x"', None)):
        Path("r.toml").write_text(
            f'model = "{SHARED}"\noutput = "out.onnx"\ndata = "{DATA / "shared.npz"}"\n'
            f'[[pass]]\nuse = "quantize-static"\n{line}\n'
        )
        ran = run_cli("run", "r.toml")
        assert ran.code == 2
        assert meant is None or f"did you mean '{meant}'" in ran.err
