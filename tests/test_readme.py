"""What the README shows is run: its commands, its recipe, its Python, on the demo model and data."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from graphopt.cli import VERBS, run

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "graphopt" / "demo"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every line that begins with ``graphopt`` in a fenced block without a language, comments cut off."""
    lines = [line for block in blocks("") for line in block.replace("\\\n", " ").splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.startswith("graphopt ")]


PREPARED = {
    "finetune": ["prune", "model.onnx", "-o", "thin.onnx", "--data", "calib.npz", "--macs", "0.08", "--allow-slower"],
    "unpack": ["compress", "model.onnx", "-o", "model.gopt", "--weights", "keep", "--package", "--time", "0"],
}
"""What a verb's example needs, beyond the rest; so little is left of the pruned one that there is something to win."""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds what the README's commands name."""
    shutil.copy(DEMO / "digits.onnx", tmp_path / "model.onnx")
    shutil.copy(DEMO / "calibration.npz", tmp_path / "calib.npz")
    shutil.copy(DEMO / "evaluation.npz", tmp_path / "test.npz")
    recipe = next(block for block in blocks("toml") if "output" in block)
    # The example leaves "/head/*" in float; the demo's head has that name too.
    (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run(["optimize", "model.onnx", "-o", "small.onnx", "--time", "0", "-q"]) == 0
    assert run(["quantize", "model.onnx", "-o", "int8.onnx", "--data", "calib.npz", "--time", "0", "-q"]) == 0
    return tmp_path


@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith("graphopt convert ")])  # a framework's
def test_every_command_runs(command: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = shlex.split(command)[1:]
    if "--min-speedup" in arguments:  # whether int8 is faster depends on who else uses this machine
        at = arguments.index("--min-speedup")
        del arguments[at : at + 2]
    if arguments[0] == "tune":
        pytest.importorskip("optuna", reason="tune's extra: pip install 'graphopt[tune]'")
        arguments[arguments.index("--time") + 1] = "2s"
    if arguments[0] in ("quantize", "prune", "tune") and not {"--dry-run", "--sparsity"} & set(arguments):
        arguments.append("--allow-slower")
    before = PREPARED.get(arguments[0])
    assert before is None or run(before) == 0
    code = run(arguments)
    captured = capsys.readouterr()
    assert code == (1 if arguments[0] == "diff" else 0), captured.err


def test_every_verb_is_shown() -> None:
    shown = {shlex.split(command)[1] for command in commands()}
    assert set(VERBS) - shown == {"view"}, "the README shows every verb but view, which opens a window"


def test_the_python_runs(workplace: Path) -> None:
    seen: list[str] = []

    def my_rewrite(model: onnx.ModelProto) -> onnx.ModelProto:
        seen.append(model.graph.name)
        return model

    names: dict[str, Any] = {"my_rewrite": my_rewrite}
    for block in blocks("python"):
        # Whether int8 is faster depends on who else uses this machine.
        exec(compile(block.replace("quantize(", "quantize(allow_slower=True, model=", 1), "README.md", "exec"), names)
    assert seen
    assert (workplace / "int8.onnx").stat().st_size < 0.3 * (workplace / "model.onnx").stat().st_size


def test_the_recipe_ran_as_written(workplace: Path) -> None:
    (workplace / "int8.onnx").unlink()
    assert run(["run", "recipe.toml", "-q"]) == 0
    assert (workplace / "int8.onnx").is_file()


def test_no_figure_is_missing() -> None:
    for name, block in re.findall(r"<!-- (\w+):begin -->\n(.*?)<!-- \1:end -->", README, re.DOTALL):
        assert block.strip(), f"run: python tools/update_readme.py {name}"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
