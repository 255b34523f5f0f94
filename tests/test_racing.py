"""Which mixture is kept on a machine that is not quiet: ties, heats, flips and objectives, with made-up times."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, ROOT, run_cli
from test_cut import chain, random_graph, random_prices

import graphopt
from graphopt.search import racing
from graphopt.search.costs import Pricing
from graphopt.search.measured import Search
from graphopt.search.placement import cut, price
from graphopt.search.racing import Candidate, best, clearly, flips, race
from graphopt.timing import Timing

sys.path.insert(0, str(ROOT / "tools" / "bench"))

import placement

NO_MODEL: Any = None
OPTIONS: dict[str, Any] = {"data": DEMO / "calibration.npz", "eval_data": DEMO / "evaluation.npz", "samples": 16}


def mixture(name: str, floats: int, median: float, spread: float = 0.01, **more: Any) -> Candidate:
    left = frozenset(f"n{i}" for i in range(floats))
    return Candidate(name, left, NO_MODEL, None, (median, median - spread, median + spread), **more)


def test_what_cannot_be_told_apart_goes_to_the_simpler() -> None:
    rules, few, many = mixture("rules", 0, 0.905), mixture("few", 2, 0.90), mixture("many", 9, 0.89)
    assert best([many, few, rules]) is rules
    far = mixture("rules", 0, 0.95)
    assert best([many, few, far]) is few, "the rules are slower beyond noise; of the others the simpler"
    assert best([many, far]) is many
    over = mixture("over", 0, 0.5, holds=False)
    assert best([over, many]) is many
    assert best([Candidate("untimed", frozenset(), NO_MODEL, None)]) is None


def test_objectives_choose_among_those_that_are_fast_enough() -> None:
    fast = mixture("fast", 5, 0.7, bytes=50, damage=0.5)
    small = mixture("small", 0, 1.02, bytes=20, damage=0.9)
    close = mixture("close", 9, 0.98, bytes=80, damage=0.1)
    slow = mixture("slow", 9, 1.3, bytes=10, damage=0.01)
    everything = [fast, small, close, slow]
    assert best(everything, "size") is small
    assert best(everything, "accuracy") is close
    assert best(everything, "accuracy", min_speedup=1.2) is fast
    assert best([slow], "size") is slow, "the promise has the last word on that"


def test_heats_that_disagree_are_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    heats = iter([(0.8, 0.79, 0.81), (1.2, 1.19, 1.21), (0.9, 0.89, 0.91)])
    spent: list[float] = []

    def time_models(sessions: Any, feeds: Any, *, seconds: float) -> Any:
        spent.append(seconds)
        return {"b": Timing(1, 1, 1, 1)}, {"b": next(heats)}

    monkeypatch.setattr(racing, "time_models", time_models)
    found = race({}, [], seconds=6)["b"]
    assert found[0] == 0.9, "the median: one heat that somebody disturbed does not count"
    assert found[1] <= 0.8
    assert found[2] >= 1.2
    assert sum(spent) == pytest.approx(6)


def test_clearly_means_beyond_both_intervals() -> None:
    assert clearly(mixture("a", 0, 0.8), mixture("b", 0, 0.9))
    assert not clearly(mixture("a", 0, 0.89), mixture("b", 0, 0.9))
    assert not clearly(mixture("a", 0, 0.8, holds=False), mixture("b", 0, 0.9))


@pytest.mark.parametrize("seed", range(10))
def test_flips_are_the_cheapest_neighbours(seed: int) -> None:
    rng = random.Random(seed)
    found = random_graph(rng, 6)
    prices = random_prices(rng, found)
    floats = cut(found, prices)
    near = flips(found, prices, floats, 3)
    assert all(len(floats ^ one) == 1 for one in near)
    told = [price(found, prices, one) for one in near]
    assert told == sorted(told)
    others = {floats ^ {u.name} for u in found} - set(near) - {frozenset(u.name for u in found)}
    assert not others or len(near) < 3 or min(price(found, prices, o) for o in others) >= told[-1]
    assert not set(near) & set(flips(found, prices, floats, 3, near))


@pytest.mark.parametrize("seed", range(8))
def test_noise_in_the_table_moves_the_cut_little(seed: int) -> None:
    """Prices that are a tenth off cost what is chosen at most twice that: the cut has no cliffs."""
    rng = random.Random(seed)
    sides = [(rng.randint(20, 100), rng.randint(10, 100)) for _ in range(12)]
    found, true = chain(*sides)
    _, noisy = chain(*[(round(a * rng.uniform(0.9, 1.1)), round(b * rng.uniform(0.9, 1.1))) for a, b in sides])
    wanted = price(found, true, cut(found, true))
    # Prices are by value, and the two chains are alike, value by value.
    noisy.quantize = dict(zip(true.quantize, noisy.quantize.values(), strict=True))
    noisy.dequantize = dict(zip(true.dequantize, noisy.dequantize.values(), strict=True))
    assert price(found, true, cut(found, noisy)) <= 1.25 * wanted


def test_no_list_and_no_greed_is_cheaper_than_the_cut() -> None:
    """What tools/bench/placement.py times on real models, on made-up prices: the cut is never beaten there."""
    beaten = 0
    for seed in range(12):
        rng = random.Random(seed)
        found = random_graph(rng, 9)
        prices = random_prices(rng, found)
        told = {name: price(found, prices, way(found, prices)) for name, way in placement.WAYS.items()}
        assert told["cut"] == min(told.values())
        assert told["greedy"] <= told["all-int8"]
        beaten += max(told["greedy alone"], told["greedy"]) > told["cut"]
    assert beaten >= 6, "on most graphs greed pays for conversions that the cut avoids"


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Truth: what each region gains in integers, in ns; conversions are free. The table has it wrong for one."""
    gains: dict[str, int] = {}

    def observe(self: Pricing, *_: Any) -> None:
        for unit in self.units:
            gains.setdefault(
                unit.name, {"/stem/Conv": 300, "/head/Gemm": -300}.get(unit.name, 200 if unit.layer else 10)
            )
            told = -100 if unit.name == "/stem/Conv" else gains[unit.name]
            self.table.entries[self.unit_key(unit, integer=False)] = 1000
            self.table.entries[self.unit_key(unit, integer=True)] = 1000 - told

    def ran(self: Search, candidates: list[Candidate]) -> Any:
        for candidate in candidates:
            gained = sum(gain for name, gain in gains.items() if name not in candidate.floats)
            ratio = 1 - gained / 10_000
            candidate.ratio = (ratio, ratio - 0.001, ratio + 0.001)
        return (1.0, 0.99, 1.01)

    monkeypatch.setattr(Pricing, "observe", observe)
    monkeypatch.setattr(Pricing, "estimate_conversions", lambda self: None)
    monkeypatch.setattr(Search, "_race", ran)
    return gains


def test_a_table_that_is_wrong_is_repaired_by_a_flip(made_up: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The cut leaves the stem in float, as the table says; racing one flip at a time finds that it should not."""
    options = {**OPTIONS, "time": 0.01, "allow_slower": True, "placement": "measured"}
    found = graphopt.quantize(DEMO / "digits.onnx", **options).report["placement"]
    cuts = [c for c in found["candidates"] if c["name"].startswith("cut")]
    assert cuts[0]["in_float"] == 2
    assert found["chosen"].startswith("flip")
    assert found["left_in_float"] == ["/head/Gemm"]
    ratios = {c["name"]: c["ratio"]["median"] for c in found["candidates"]}
    assert ratios[found["chosen"]] < min(c["ratio"]["median"] for c in cuts)


def test_accuracy_measures_mixtures_and_keeps_the_closest(made_up: dict[str, int]) -> None:
    options = {**OPTIONS, "time": 0.01, "allow_slower": True}
    plain = graphopt.quantize(DEMO / "digits.onnx", **{**OPTIONS, "time": 0, "placement": "rules"}).report
    report = graphopt.quantize(DEMO / "digits.onnx", **options, objective="accuracy").report
    found = report["placement"]
    assert found["objective"] == "accuracy"
    assert found["left_in_float"]
    assert report["comparison"]["outputs"][0]["sqnr_db"] > plain["comparison"]["outputs"][0]["sqnr_db"]
    assert any("closer to the original" in note for note in report["notes"])


BAD: dict[str, tuple[list[str], str]] = {
    "rules": (["--objective", "accuracy", "--placement", "rules"], "--placement rules has none"),
    "dynamic": (["--objective", "size", "--mode", "dynamic"], "--mode dynamic has none"),
    "untimed": (["--objective", "size", "--time", "0"], "--time 0 forbids it"),
    "table": (["--objective", "size", "--placement", "measured", "--cost-table", "t.json"], "than a cost table"),
    "unknown": (["--objective", "speed"], "--objective"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_has_no_mixtures_is_one_line(name: str, workplace: Path) -> None:
    arguments, fragment = BAD[name]
    ran = run_cli("quantize", DEMO / "digits.onnx", "-o", "q.onnx", "--data", DEMO / "calibration.npz", *arguments)
    assert ran.code == 2, ran.err
    assert fragment in ran.error
    assert list(workplace.iterdir()) == []
