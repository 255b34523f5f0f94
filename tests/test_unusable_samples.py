"""NaN, infinite and empty samples: no verb uses one, each is told by name and input, and where none is left that is
an error; ``--strict`` takes no such data at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import builders
import click
import numpy as np
import onnx
import pytest
from conftest import Ran, contents, run_cli
from hostile.corpus import OTHER_FILES

from graphopt.cli import VERBS, cli

MORE: dict[str, tuple[str, ...]] = {
    "quantize": ("--allow-slower",),
    "prune": ("--macs", "0.7", "--multiple", "1", "--allow-slower"),
    "compress": ("--weights", "int8"),
    "finetune": ("--teacher", "m.onnx", "--steps", "2"),
    "tune": ("--min-sqnr", "10", "--time", "2s"),
    "optimize": ("--passes", "fold-constants,smooth"),
    "export": ("--to", "ort"),
    "run": ("--model", "m.onnx"),
    "bench": ("--time", "0.05"),
}
OUT = {"export": "o.ort", "sensitivity": "o.json"}
UNUSABLE = {
    "nan": (np.nan, "1 NaN or infinite of 32 values"),
    "inf": (np.inf, "1 NaN or infinite of 32 values"),
    "minus-inf": (-np.inf, "1 NaN or infinite of 32 values"),
}


def options_of(verb: str) -> set[str]:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    return {o for p in command.params if isinstance(p, click.Option) for o in p.opts}


WITH_DATA = [verb for verb in VERBS if "--data" in options_of(verb) and verb not in OTHER_FILES]
WITH_EVALUATION = [verb for verb in WITH_DATA if "--eval-data" in options_of(verb)]


def samples(value: float, *rows: int) -> np.ndarray[Any, Any]:
    found = np.random.default_rng(0).normal(size=(48, 32)).astype(np.float32)
    found[list(rows), 5] = value
    return found


@pytest.fixture
def place(workplace: Path) -> Path:
    onnx.save(builders.mlp(), "m.onnx")
    np.savez("good.npz", x=samples(0))
    (workplace / "r.toml").write_text('[[pass]]\nuse = "quantize-static"\n')
    return workplace


def command(verb: str, data: str, evaluation: str | None = None) -> Ran:
    has = options_of(verb)
    line = [verb, "r.toml"] if verb == "run" else [verb, *["m.onnx"] * (2 if verb == "compare" else 1)]
    line += ["-o", OUT.get(verb, "o.onnx")] if "-o" in has else []
    line += ["--data", data, *(["--eval-data", evaluation] if evaluation else []), *MORE.get(verb, ())]
    line += ["--time", "0"] if "--time" in has and "--time" not in line else []
    return run_cli(*line)


def test_these_are_all() -> None:
    assert {"quantize", "compress", "prune", "finetune", "sensitivity", "tune", "compare", "bench"} <= set(WITH_DATA)


@pytest.mark.parametrize("verb", WITH_DATA)
def test_one_is_left_out_and_told(verb: str, place: Path) -> None:
    np.savez("d.npz", x=samples(np.nan, 3))
    ran = command(verb, "d.npz")
    assert ran.code in (0, 1, 3), ran.err
    told = " ".join(ran.out.split())
    assert "WARNING: data: sample 'd.npz[3]' has 1 NaN or infinite of 32 values for input 'x'" in told


@pytest.mark.parametrize("verb", WITH_DATA)
def test_nothing_but_those_is_refused(verb: str, place: Path) -> None:
    for name, (value, words) in UNUSABLE.items():
        np.savez(f"{name}.npz", x=samples(value, *range(48)))
        before = contents(place)
        ran = command(verb, f"{name}.npz")
        assert ran.code == 2
        assert f"none of the 48 samples can be used: sample '{name}.npz[0]' has {words} for input 'x'" in ran.error
        assert contents(place) == before


@pytest.mark.parametrize("verb", WITH_EVALUATION)
def test_of_evaluation_data_likewise(verb: str, place: Path) -> None:
    np.savez("d.npz", x=samples(np.inf, *range(48)))
    before = contents(place)
    ran = command(verb, "good.npz", "d.npz")
    assert ran.code == 2
    assert "sample 'd.npz[0]' has 1 NaN or infinite of 32 values for input 'x'" in ran.error
    assert contents(place) == before


@pytest.mark.parametrize("verb", [verb for verb in WITH_DATA if "--strict" in options_of(verb)])
def test_strictly_one_is_too_many(verb: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MORE, verb, (*MORE.get(verb, ()), "--strict"))
    np.savez("d.npz", x=samples(np.nan, 3, 7))
    before = contents(place)
    ran = command(verb, "d.npz")
    assert ran.code == 2
    assert "sample 'd.npz[3]' has 1 NaN or infinite of 32 values for input 'x' (2 of 48 samples" in ran.error
    assert contents(place) == before


def test_empty_ones_too(place: Path) -> None:
    rows = [samples(0)[i] for i in range(48)]
    np.savez("d.npz", **{f"x/{i}": row[None] if i != 5 else row[None][:0] for i, row in enumerate(rows)})
    ran = command("quantize", "d.npz")
    assert ran.code == 0, ran.err
    assert "is empty ([0,32]) for input 'x', so it is left out" in " ".join(ran.out.split())
