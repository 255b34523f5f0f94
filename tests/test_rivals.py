"""tools/bench/quantize.py: who is called the fastest of those that do the job, and what bad options get."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "bench" / "quantize.py"
sys.path.insert(0, str(SCRIPT.parent))

from quantize import Row, finalists, verdict  # noqa: E402

Ratio = tuple[float, float, float]


def row(tool: str, metric: float | None, latency: Ratio | None = None) -> Row:
    return Row("m", tool, metric=metric, latency=latency)


ROWS = [
    row("float", 0.900),
    row("graphopt", 0.880, (0.50, 0.49, 0.51)),
    row("graphopt-1%", 0.895, (0.70, 0.69, 0.71)),
    row("ort-dynamic", 0.899, (0.90, 0.89, 0.91)),
    row("nncf-mixed", 0.892, (0.65, 0.64, 0.66)),
    row("quark", 0.892, (0.80, 0.79, 0.81)),
    row("aimet", 0.500, (0.30, 0.29, 0.31)),
    row("onnxsim-minmax", None),
]


def test_who_misses_the_metric_is_not_raced() -> None:
    assert finalists(ROWS) == ["float", "graphopt-1%", "nncf-mixed", "quark"]


@pytest.mark.parametrize(
    ("ours", "rival", "answer"),
    [
        ((0.70, 0.69, 0.71), (0.75, 0.74, 0.76), "ok"),
        ((0.70, 0.69, 0.71), (0.695, 0.685, 0.705), "ok"),  # not to be told from it
        ((0.70, 0.69, 0.71), (0.65, 0.64, 0.66), "BEHIND"),
        ((1.02, 1.01, 1.03), (1.30, 1.20, 1.40), "ok"),
        ((1.10, 1.09, 1.11), (1.30, 1.20, 1.40), "BEHIND"),  # slower than float, whoever is slower still
    ],
)
def test_behind_is_who_is_clearly_slower(ours: Ratio, rival: Ratio, answer: str) -> None:
    assert verdict(ROWS, {"graphopt-1%": ours, "nncf-mixed": rival}).endswith(f"| {answer} |")


def test_who_hands_over_nothing_has_the_float_model() -> None:
    assert verdict(ROWS, {"nncf-mixed": (0.9, 0.89, 0.91)}).endswith(
        "| float 1 | nncf-mixed 0.900 (0.890 to 0.910) | BEHIND |"
    )
    assert verdict(ROWS, {"nncf-mixed": (1.9, 1.89, 1.91)}).endswith("| ok |")
    assert verdict(ROWS, {}) == "| m | float 1 | none does the job | ok |"


@pytest.mark.parametrize(
    ("options", "told"), [(["--tools", "nncf"], "nncf: no such tool"), (["--make"], "--make needs --keep FOLDER")]
)
def test_bad_options(options: list[str], told: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert told in done.stderr
