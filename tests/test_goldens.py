"""What the terminal shows, word for word: 100 columns, no colour, what changes from machine to machine blotted out.

GRAPHOPT_REGEN=1 python -m pytest tests/test_goldens.py     rewrites tests/goldens/; look at the diff before you commit
"""

from __future__ import annotations

import io
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import DEMO, MODELS, ROOT, Ran, run_cli

GOLDENS = ROOT / "tests" / "goldens"
REGENERATE = os.environ.get("GRAPHOPT_REGEN") == "1"

COMMANDS: dict[str, list[str]] = {
    "help": ["--help"],
    **{
        f"{verb}-help": [verb, "--help"]
        for verb in (
            "convert",
            "export",
            "inspect",
            "optimize",
            "quantize",
            "prune",
            "bench",
            "compare",
            "bisect",
            "diff",
            "passes",
            "targets",
            "sensitivity",
            "tune",
            "run",
            "extract",
            "lint",
            "compress",
            "unpack",
        )
    },
    "inspect-digits": ["inspect", "digits.onnx"],
    "inspect-encoder": ["inspect", "encoder.onnx", "--dim", "batch=2", "--dim", "sequence=8"],
    "inspect-control-verbose": ["inspect", "control.onnx", "-v"],
    "inspect-custom": ["inspect", "custom.onnx"],
    "inspect-two": ["inspect", "gru.onnx", "lstm.onnx"],
    "inspect-ops": ["inspect", "shared.onnx", "encoder.onnx", "--ops"],
    "inspect-nodes": ["inspect", "shared.onnx", "--nodes"],
    "inspect-tree": ["inspect", "gru.onnx", "--tree"],
    "inspect-node": ["inspect", "shared.onnx", "--node", "Conv_conv1"],
    "inspect-node-unknown": ["inspect", "shared.onnx", "--node", "Conv_cnv1"],
    "inspect-json": ["inspect", "shared.onnx", "--json"],
    "inspect-control-markdown": ["inspect", "control.onnx", "--markdown"],
    "inspect-tree-markdown": ["inspect", "gru.onnx", "--tree", "--markdown"],
    "inspect-node-markdown": ["inspect", "shared.onnx", "--node", "Conv_conv1", "--markdown"],
    "compare-markdown": ["compare", "shared.onnx", "shared.onnx", "--layerwise", "--markdown"],
    "diff-markdown": ["diff", "shared.onnx", "metadata.onnx", "--markdown"],
    "lint-markdown": ["lint", "fakequant.onnx", "--markdown"],
    "markdown-json": ["diff", "shared.onnx", "metadata.onnx", "--markdown", "--json"],
    "compare-same": ["compare", "shared.onnx", "shared.onnx"],
    "diff-same": ["diff", "shared.onnx", "shared.onnx"],
    "diff-other": ["diff", "shared.onnx", "metadata.onnx"],
    "optimize-shared": ["optimize", "shared.onnx", "-o", "out.onnx", "--time", "0"],
    "optimize-encoder-markdown": ["optimize", "encoder.onnx", "-o", "out.onnx", "--time", "0", "--markdown"],
    "compress-digits-markdown": ["compress", "digits.onnx", "-o", "out.onnx", "--time", "0", "--markdown"],
    "quantize-dry-run": ["quantize", "digits.onnx", "--dry-run"],
    "prune-dry-run": ["prune", "digits.onnx", "--dry-run"],
    "passes": ["passes"],
    "passes-one": ["passes", "fuse-batchnorm"],
    "targets": ["targets"],
    "lint-float": ["lint", "digits.onnx"],
    "lint-fakequant": ["lint", "fakequant.onnx", "--target", "ort-cpu"],
    "unknown-verb": ["inspct", "shared.onnx"],
}

_VOLATILE = (
    (re.compile(r"\x1b\[[0-9;?]*[A-Za-z]"), ""),
    (re.compile(r"\b\d+(\.\d+)? (ms|us|s)\b"), "<time>"),
    (re.compile(r"ONNX Runtime [\d.]+[^,\n]*, .*$", re.MULTILINE), "ONNX Runtime <version>, <cpu>"),
    (re.compile(r"^this CPU: .*$", re.MULTILINE), "this CPU: <cpu>"),
    (re.compile(r"graphopt \d[\w.+]*"), "graphopt <version>"),
    (re.compile(r"\d\.\d+e-\d\d"), "<tiny>"),
    (re.compile(r"\b\d+\.\d dB"), "<dB>"),
    (re.compile(r" +(time|<time>)$", re.MULTILINE), r" \1"),  # the column is as wide as the times are
)


def normalized(text: str) -> str:
    """``text`` without times, versions, and what only this machine's arithmetic says."""
    for pattern, replacement in _VOLATILE:
        text = pattern.sub(replacement, text)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def shown(ran: Ran) -> str:
    """The output, the error where there is one (else stderr holds passing signs of progress), the exit code."""
    parts = [normalized(ran.out)] if ran.out else []
    parts += [normalized(f"stderr: {ran.err}")] if ran.code else []
    return "".join(parts) + f"exit code {ran.code}\n"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> Path:
    """A folder with the models, and streams that say they are a terminal of 100 columns without colour."""
    for path in (*MODELS.glob("*.onnx"), DEMO / "digits.onnx"):
        shutil.copy(path, workplace / path.name)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")  # a dumb one has 80 columns
    monkeypatch.setenv("NO_COLOR", "1")

    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("conftest.io.TextIOWrapper", Terminal)
    return workplace


@pytest.mark.parametrize("name", COMMANDS)
def test_what_the_terminal_shows(name: str, terminal: Path) -> None:
    found = shown(run_cli(*COMMANDS[name]))
    path = GOLDENS / f"{name}.txt"
    if REGENERATE:
        path.write_text(found, "utf-8")
    assert path.is_file(), f"no golden for {name}; make it: GRAPHOPT_REGEN=1 python -m pytest {Path(__file__).name}"
    assert found == path.read_text("utf-8")


def test_no_golden_is_left_over() -> None:
    assert {path.stem for path in GOLDENS.glob("*.txt")} == set(COMMANDS)


@pytest.mark.parametrize("name", [n for n in COMMANDS if n.startswith(("inspect-", "help")) and "markdown" not in n])
def test_nothing_is_wider_than_the_terminal_but_what_cannot_be_cut(name: str) -> None:
    text = (GOLDENS / f"{name}.txt").read_text("utf-8")
    wide = [line for line in text.splitlines() if len(line) > 100 and " " in line.strip()]
    assert name == "inspect-json" or not [line for line in wide if not line.startswith("stderr")]
