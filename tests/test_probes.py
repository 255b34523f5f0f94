"""Probes: what they hold, what they leave alone, and that the verifier finds planted mistakes with them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import conditional, parsed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import verifier_mutation
from mutations import MUTATIONS

from graphopt.model import load
from graphopt.probes import EDGES, probes, still
from graphopt.validation import random_feeds

SUBSET = (
    "softmax-axis", "mul-by-zero-is-zero", "isnan-dropped", "clip-bound-moved", "wrong-batch", "wrong-length",
    "int-division-floors", "cast-saturation", "overridable-int-folded", "random-merged", "capture-swapped",
    "branches-swapped-when-false", "branches-swapped-when-true", "gather-negative", "round-half-even", "stable-order",
)  # fmt: skip


@pytest.mark.parametrize("name", SUBSET)
def test_a_mistake_is_detected_and_isolated(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    outcome = verifier_mutation.judge(next(m for m in MUTATIONS if m.name == name))
    assert outcome.detected
    assert outcome.isolated, outcome.why


def test_the_tool_prints_shares_and_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert verifier_mutation.main(["--only", "softmax-axis"]) == 0
    first, *shares = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["softmax-axis", "isolated"]
    assert shares == ["detected: 1 of 1 (100 %)", "isolated: 1 of 1 (100 %)"]


def test_the_tool_sees_what_escapes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("graphopt.verify.probes", lambda *_, **__: ([], []))
    assert verifier_mutation.main(["--only", "isnan-dropped"]) == 1
    assert "ESCAPED" in capsys.readouterr().out


def made(text: str, **options: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    model = load(parsed(text))
    return probes(model, random_feeds(model, 1)[0], seed=0, **options)


def test_edges_hold_zeros_halves_negatives_and_large_values() -> None:
    edges, odd = made("agraph (float[N, 3] x, int64[N] i, bool go, uint8[4] b) => (float[N, 3] y) { y = Neg(x) }")
    x = edges[0]["x"]
    assert set(EDGES) - {0.0} <= set(x.reshape(-1).tolist())
    assert {True, False} == set(np.signbit(x[x == 0]).tolist())
    assert 0.3 < np.isin(x, EDGES).mean() < 0.7
    assert (edges[0]["i"] < 0).any()
    assert (edges[1]["i"] >= 0).all()  # for a model that takes none
    assert np.isnan(odd[0]["x"]).any()
    assert {np.inf, -np.inf} <= set(odd[0]["x"].reshape(-1).tolist())
    assert np.isfinite(odd[0]["x"]).mean() > 0.5


def test_a_boolean_is_the_other_one() -> None:
    model = load(conditional())
    for value in (True, False):
        edges, _ = probes(model, {"c": np.asarray(value)}, seed=0)
        assert bool(edges[0]["c"]) is not value


def test_what_decides_about_shapes_is_left_alone() -> None:
    text = """agraph (float[N, 3] x, float s, int64[2] shape, float[N, 3] attention_mask) => (float[N, 3] y) {
        z = Constant <value_float = 0.0> () one = Constant <value_float = 1.0> ()
        twice = Add(s, s) r = Range(z, twice, one) e = Expand(x, shape) y = Neg(x) }"""
    edges, odd = made(text)
    base, _ = made(text)
    assert 0 < abs(float(edges[0]["s"])) < 10
    assert edges[0]["s"] not in EDGES
    assert (edges[0]["shape"] >= 0).all()
    assert set(edges[0]["attention_mask"].reshape(-1).tolist()) <= {0.0, 1.0}
    assert np.isfinite(odd[0]["s"])
    assert np.array_equal(edges[0]["x"], base[0]["x"])


def test_a_loop_gets_none_so_that_it_ends() -> None:
    text = """agraph (float x, int64 n, bool c) => (float y) {
        y = Loop (n, c, x) <body = b (int64 i, bool d, float a) => (bool e, float f) {
            e = Identity(d) f = Neg(a) }> }"""
    assert made(text) == ([], [])


def test_noise_moves_what_is_ordinary_only() -> None:
    feed = {"x": np.asarray([0.5, 0.3, np.nan, -np.inf], np.float32), "i": np.asarray([1])}
    assert {k: v.tolist() for k, v in still(feed).items()} == {"x": [True, False, True, True]}
