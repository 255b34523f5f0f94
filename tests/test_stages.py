"""Budgets of single passes in one recipe: each is searched in and held to by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, run_cli
from test_schema import check

import graphopt
from graphopt.base import Repeat
from graphopt.errors import GateFailed, InputError
from graphopt.recipe import Recipe, parse, write
from graphopt.registry import create
from graphopt.stages import budget_of

DIGITS = DEMO / "digits.onnx"
SAMPLES: dict[str, Any] = {
    "data": DEMO / "calibration.npz", "eval_data": DEMO / "evaluation.npz", "metric": "accuracy", "time": 0,
    "samples": 80, "threads": 1,
}  # fmt: skip
RECIPE = """
[[pass]]
use = "prune"
left = 0.3
importance = "l2"
repair = "none"
max-drop = "2%"

[[pass]]
use = "quantize-static"
min-sqnr = 12.0
"""


def test_prune_then_quantize_each_inside_its_own_budget() -> None:
    plain = graphopt.optimize(DIGITS, time=0).model
    result = graphopt.optimize(plain, recipe=parse(RECIPE), **SAMPLES)
    report = result.report
    check(json.loads(json.dumps(report)), "made")
    gates = {gate["gate"]: gate for gate in report["gates"]}
    assert list(gates) == ["max-drop of prune", "min-sqnr of quantize-static"]
    assert all(gate["passed"] for gate in gates.values())
    assert [entry["status"] for entry in report["ledger"]] == ["changed", "changed"]
    # By size alone and without repair, 30 % of the MACs would be ruin: the search stopped before.
    assert report["ledger"][0]["metrics"]["macs_left"] > 0.5
    assert any("as much as keeps to the budget was removed" in note for note in report["notes"])
    assert report["metric"]["candidate"] >= 0.95
    ran = [step for step in result.pipeline if step.name == "prune"]  # type: ignore[union-attr]
    assert ran[0].left > 0.5  # type: ignore[union-attr]


def test_a_budget_that_cannot_be_kept_is_a_gate_that_fails() -> None:
    plain = graphopt.optimize(DIGITS, time=0).model
    step = create("sparsify", {"sparsity": 0.5})
    hopeless = create("quantize-static", {"min-sqnr": 90.0})
    with pytest.raises(GateFailed, match="min-sqnr of quantize-static"):
        graphopt.optimize(plain, passes=[step, hopeless], **SAMPLES)


def test_what_comes_after_the_last_budget_is_held_to_the_whole_s_gates() -> None:
    plain = graphopt.optimize(DIGITS, time=0).model
    steps = [create("prune", {"left": 0.8, "repair": "symmetric", "max-drop": "5%"}), create("quantize-static", {})]
    report = graphopt.optimize(plain, passes=steps, min_sqnr=20, **SAMPLES).report
    assert {gate["gate"] for gate in report["gates"]} == {"max-drop of prune", "min-sqnr"}
    assert all(gate["passed"] for gate in report["gates"])


def test_a_recipe_keeps_the_budgets() -> None:
    recipe = parse(RECIPE)
    assert parse(write(recipe)) == recipe
    assert budget_of(recipe.passes[0]).max_drop == "2%"  # type: ignore[union-attr]
    assert budget_of(recipe.passes[1]).min_sqnr == 12.0  # type: ignore[union-attr]
    assert budget_of(create("prune", {})) is None


def test_a_budget_that_cannot_be_judged_is_refused(workplace: Path) -> None:
    budgeted = create("prune", {"max-drop": "1%"})
    with pytest.raises(InputError, match="needs a metric"):
        graphopt.optimize(DIGITS, passes=[budgeted], data=SAMPLES["data"], time=0)
    with pytest.raises(InputError, match="is judged on data"):
        graphopt.optimize(DIGITS, passes=[create("prune", {"min-sqnr": 9, "importance": "l2", "repair": "none"})])
    with pytest.raises(InputError, match="take it out of the repeat"):
        graphopt.optimize(DIGITS, recipe=Recipe(passes=(Repeat((budgeted,), 2),)), **SAMPLES)
    with pytest.raises(InputError, match="is no drop"):
        create("prune", {"max-drop": "a bit"})
    (workplace / "r.toml").write_text('[[pass]]\nuse = "prune"\nmax-drop = "a bit"\n', encoding="utf-8")
    ran = run_cli("optimize", DIGITS, "-o", "o.onnx", "--recipe", "r.toml")
    assert ran.code == 2
    assert "is no drop" in ran.error
    assert not (workplace / "o.onnx").exists()
