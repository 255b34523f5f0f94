"""tune: what is tried, what is chosen, what is kept for the next time, and what is said when nothing is better."""

from __future__ import annotations

import functools
import itertools
import json
import math
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import DEMO, run_cli
from onnx import TensorProto, helper, numpy_helper
from test_schema import check

import graphopt
from graphopt import trials as trying
from graphopt import tuning
from graphopt.report import tuning as shown
from graphopt.search import space as spaces
from graphopt.search.frontier import Candidate, frontier, ranked
from graphopt.search.space import DYNAMIC, FLOAT, STATIC, Config, Space, depths, first, key
from graphopt.trials import Trials

Watch = Callable[[Path], AbstractContextManager[None]]


def candidate(name: str, time: float, score: float, size: int, **more: Any) -> Candidate:
    given: dict[str, Any] = {"holds": True, "sqnr": 30.0, **more}
    return Candidate(name, {"arithmetic": name}, (time, time - 0.02, time + 0.02), score, bytes=size, **given)


ORIGINAL = Candidate("original", {}, (1.0, 1.0, 1.0), 0.95, bytes=100, holds=True)


# What is chosen


def test_the_frontier_holds_what_nothing_beats() -> None:
    fast, exact, small = candidate("a", 0.5, 0.8, 40), candidate("b", 0.8, 0.9, 90), candidate("c", 0.9, 0.8, 20)
    beaten, failed = candidate("d", 0.6, 0.8, 40), Candidate("e", {}, error="no")
    assert frontier([beaten, small, exact, fast, failed, ORIGINAL]) == [fast, exact, small, ORIGINAL]
    for one in (fast, exact, small):
        others = [c for c in (fast, exact, small, beaten) if c is not one]
        assert not any(all(x <= y for x, y in zip(c.values, one.values, strict=True)) for c in others)


def test_each_objective_means_another_one() -> None:
    found = [candidate("fast", 0.5, 0.85, 60), candidate("small", 0.9, 0.8, 20), candidate("close", 0.8, 0.89, 90)]
    best = {o: ranked(found, ORIGINAL, o)[0].name for o in ("latency", "size", "accuracy")}
    assert best == {"latency": "fast", "size": "small", "accuracy": "close"}


def test_a_tie_in_time_goes_to_the_more_accurate() -> None:
    found = [candidate("a", 0.50, 0.85, 60), candidate("b", 0.52, 0.88, 60), candidate("c", 0.6, 0.9, 60)]
    assert [c.name for c in ranked(found, ORIGINAL, "latency")] == ["b", "a", "c"]
    found = [candidate("a", 0.50, 0.9, 60, sqnr=20.0), candidate("b", 0.52, 0.9, 60, sqnr=40.0)]
    assert ranked(found, ORIGINAL, "latency")[0].name == "b"


def test_nothing_slower_or_over_budget_is_chosen() -> None:
    found = [
        candidate("misses", 0.5, 0.1, 20, holds=False),
        candidate("slower", 1.2, 0.9, 10, slower=True),
        candidate("noise", 0.99, 0.9, 100),
        Candidate("failed", {}, error="no"),
    ]
    assert ranked(found, ORIGINAL, "latency") == []
    assert ranked(found, ORIGINAL, "size") == []
    assert [c.name for c in ranked(found, ORIGINAL, "size", allow_slower=True)] == ["slower"]


# What there is to try


def test_depths_double_up_to_half() -> None:
    assert depths(0) == depths(1) == (0,)
    assert depths(9) == (0, 1, 2, 4)
    assert depths(40) == (0, 1, 2, 4, 8, 16)


def test_every_configuration_makes_passes_and_is_told_apart() -> None:
    space = Space(["a", "b", "c", "d"], [[], ["x"], ["x", "y"]])
    everything = list(space.all())
    assert len({key(c) for c in everything}) == len(everything)
    assert len({space.describe(c) for c in everything}) == len(everything)
    for config in everything:
        assert space.complete(config) == config
        stored = config.get("compress", "none") != "none"
        assert len(space.after(config)) == (config["arithmetic"] != FLOAT or stored)
    assert len({str(space.before(c) + space.after(c)) for c in everything}) == len(everything)
    config = space.complete({"arithmetic": STATIC, "mixture": 1, "float_layers": 2})
    assert space.floats(config) == ["a", "b", "x"]
    (step,) = space.after(config)
    assert step.options()["exclude"] == ["re:^a$", "re:^b$", "re:^x$"]
    assert {c["arithmetic"] for c in first(space)} == {STATIC, FLOAT, DYNAMIC}


def test_a_pass_that_is_registered_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Space().missing
    for name, pass_name in (("prune", "prune"), ("compress", "compress-weights")):
        present = pass_name in spaces.available()
        assert (name in missing) == (not present)
    made: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(spaces, "available", lambda: {"prune": "", "compress-weights": "", "smooth": ""})
    monkeypatch.setattr(spaces, "create", lambda name, options: made.append((name, options)) or (name, options))
    space = Space()
    assert {"prune", "compress"} <= {d.name for d in space.dimensions}
    assert space.before(space.complete({"arithmetic": FLOAT, "prune": "0.7"})) == [("prune", {"left": 0.7})]
    assert space.after(space.complete({"arithmetic": FLOAT, "compress": "fp16"})) == [
        ("compress-weights", {"format": "fp16"})
    ]

    def refusing(name: str, options: dict[str, Any]) -> Any:
        raise graphopt.InputError("other options")

    monkeypatch.setattr(spaces, "create", refusing)
    assert "takes none of these values" in Space().missing["prune"]


# The search, with made-up measurements


def matmuls(width: int = 64, layers: int = 3) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for i in range(layers):
        weights.append(numpy_helper.from_array(rng.standard_normal((width, width)).astype(np.float32) / 8, f"w{i}"))
        nodes += [
            helper.make_node("MatMul", [value, f"w{i}"], [f"m{i}"], name=f"mul{i}"),
            helper.make_node("Relu", [f"m{i}"], [f"r{i}"], name=f"relu{i}"),
        ]
        value = f"r{i}"
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, ["n", width])],
        [info(value, TensorProto.FLOAT, ["n", width])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def place(workplace: Path) -> Path:
    pytest.importorskip("optuna", reason="tune's extra: pip install 'graphopt[tune]'")
    onnx.save(matmuls(), "m.onnx")
    np.savez("d.npz", x=np.random.default_rng(1).standard_normal((8, 1, 64)).astype(np.float32))
    return workplace


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Nothing is timed: a configuration's measurements follow from what it is. What was tried, in order."""
    tried: list[Config] = []
    few = ("arithmetic", "weights", "float_layers")
    monkeypatch.setattr(spaces, "DIMENSIONS", tuple(d for d in spaces.DIMENSIONS if d.name in few))

    def measure(self: Trials, config: Config, original: Candidate) -> Candidate:
        tried.append(dict(config))
        found = Candidate(self.space.describe(config), dict(config))
        if config["arithmetic"] == DYNAMIC:
            found.error = "made up"
        else:
            static = config["arithmetic"] == STATIC
            left = config.get("float_layers", 0)
            s7 = config.get("weights") == "s7"
            time = 0.5 + 0.1 * left - (0.05 if s7 else 0.0) if static else 0.99
            found.ratio = (time, time - 0.01, time + 0.01)
            found.score = found.sqnr = 25.0 + 5 * left - (6 if s7 else 0) if static else math.inf
            found.holds = found.score >= 20
            found.bytes = 5000 + 1000 * left if static else 40000
        self.done.append(found)
        return found

    def explore(self: Trials) -> None:
        self.enter(Space(["mul0", "mul1", "mul2"], [[]]))

    monkeypatch.setattr(Trials, "measure", measure)
    monkeypatch.setattr(Trials, "explore", explore)
    return tried


def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is a second later."""
    ticks = itertools.count()
    monkeypatch.setattr(tuning, "clock", types.SimpleNamespace(perf_counter=lambda: float(next(ticks))))


def instantly(real: Any, *arguments: Any, **options: Any) -> Any:
    """Judged, and as fast as the original without a look at the clock."""
    verdict = real(*arguments, **{**options, "seconds": 0})
    verdict.speed = (0.9, 0.9, 0.9)
    return verdict


TUNE = [
    "tune",
    "m.onnx",
    "-o",
    "o.onnx",
    "--data",
    "d.npz",
    "--min-sqnr",
    "20",
    "--verify",
    "off",
    "--allow-slower",
    "--json",
]


def test_the_best_that_keeps_to_the_budget_is_written(place: Path, made_up: list[Config]) -> None:
    ran = run_cli(*TUNE, "--time", "20s", "--lock", "graphopt.lock", "--report", "r.html")
    assert ran.code == 0, ran.err
    found = ran.json["tuning"]
    assert found["exhausted"] is True, "a small space is tried out, and no longer"
    tried = [key(c) for c in made_up]
    assert len(set(tried)) == len(tried) == len(found["candidates"]) - 1
    assert len(tried) == len(list(Space(["mul0", "mul1", "mul2"], [[]]).all()))
    chosen = next(c for c in found["candidates"] if c["name"] == found["chosen"])
    assert chosen["holds"]
    assert chosen["config"]["float_layers"] == 0
    assert chosen["config"].get("weights") != "s7", "that one is faster, and misses the budget"
    assert Path("o.onnx").is_file()
    assert ran.json["comparison"]["outputs"][0]["sqnr_db"] > 20, "it was judged again, in earnest"
    check(ran.json, "made")
    page = Path("r.html").read_text(encoding="utf-8")
    assert 'class="chosen"' in page
    assert page.count("<circle class=") >= len({c["name"] for c in found["candidates"] if c["ratio"]})
    first = Path("o.onnx").read_bytes()
    assert run_cli("run", "--locked", "graphopt.lock").code == 0
    assert Path("o.onnx").read_bytes() == first


def test_the_objective_decides(place: Path, made_up: list[Config]) -> None:
    ran = run_cli(*TUNE, "--time", "20s", "--objective", "accuracy", "--max-size", "7500")
    assert ran.code == 1, "what was made up is not so: the file is judged again"
    assert "max-size" in ran.err
    result = graphopt.tune(
        "m.onnx", data="d.npz", verify="off", min_sqnr=20, objective="accuracy", min_speedup=1e-6, time=20
    )
    chosen = result.report["tuning"]["chosen"]
    assert chosen == "float", "the same outputs are the most accurate"


def test_it_stops_when_the_time_is_over_and_goes_on_when_asked(
    place: Path, made_up: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticking(monkeypatch)
    first_run = graphopt.tune("m.onnx", data="d.npz", verify="off", min_sqnr=20, time=12, allow_slower=True).report[
        "tuning"
    ]
    before = [key(c) for c in made_up]
    assert not first_run["exhausted"]
    assert 1 <= len(before) < 12
    made_up.clear()
    second = graphopt.tune("m.onnx", data="d.npz", verify="off", min_sqnr=20, time=12, allow_slower=True, resume=True)
    found = second.report["tuning"]
    assert found["resumed"] == len(before)
    assert len(found["candidates"]) == 1 + len(before) + len(made_up)
    known = set(before)
    assert made_up
    assert not known & {key(c) for c in made_up}, "nothing is tried twice"
    made_up.clear()
    other = graphopt.tune("m.onnx", data="d.npz", verify="off", min_sqnr=21, time=12, allow_slower=True, resume=True)
    assert other.report["tuning"]["resumed"] == 0
    assert any("nothing to resume" in note for note in other.report["notes"])


def test_what_was_interrupted_is_gone_on_with(
    place: Path, made_up: list[Config], monkeypatch: pytest.MonkeyPatch, untouched: Watch
) -> None:
    real = Trials.measure

    def measure(self: Trials, config: Config, original: Candidate) -> Candidate:
        if len(made_up) == 3:
            raise KeyboardInterrupt
        return real(self, config, original)

    monkeypatch.setattr(Trials, "measure", measure)
    with untouched(place):
        ran = run_cli(*TUNE, "--time", "20s")
    assert ran.code == 130
    assert "nothing was written" in ran.err
    monkeypatch.setattr(Trials, "measure", real)
    ran = run_cli(*TUNE, "--time", "20s", "--resume")
    assert ran.code == 0, ran.err
    assert ran.json["tuning"]["resumed"] == 3
    assert len({key(c) for c in made_up}) == len(made_up)


def test_a_broken_memory_is_none(place: Path, made_up: list[Config], cache_folder: Path) -> None:
    options: dict[str, Any] = {"data": "d.npz", "verify": "off", "min_sqnr": 20, "time": 0.001, "allow_slower": True}
    graphopt.tune("m.onnx", **options)
    (kept,) = (cache_folder / "graphopt").glob("tune-*.json")
    for text in ("{", '{"version": 0}', json.dumps({"version": 1, "ranking": 3})):
        kept.write_text(text)
        assert graphopt.tune("m.onnx", **options, resume=True).report["tuning"]["resumed"] == 0


def test_nothing_better_is_exit_3_with_the_numbers(
    place: Path, monkeypatch: pytest.MonkeyPatch, untouched: Watch
) -> None:
    def measure(self: Trials, config: Config, original: Candidate) -> Candidate:
        found = Candidate(self.space.describe(config), dict(config), (1.2, 1.1, 1.3), 30.0, bytes=50000, holds=True)
        found.slower = True
        self.done.append(found)
        return found

    monkeypatch.setattr(Trials, "measure", measure)
    monkeypatch.setattr(Trials, "explore", lambda self: None)
    with untouched(place):
        ran = run_cli(*TUNE[:-2], "--json", "--time", "1s")
    assert ran.code == 3
    for part in ("nothing here is faster on this machine", "1.200x the original's time", "nothing was written"):
        assert part in ran.err
    assert ran.json["tuning"]["chosen"] is None
    assert len(ran.json["tuning"]["candidates"]) > 1
    check(ran.json, "made")
    assert any("original" in line for line in str(shown.table(ran.json["tuning"], every=True).rows).splitlines())


def test_a_finalist_that_does_not_hold_gives_way(place: Path, made_up: list[Config], monkeypatch: Any) -> None:
    """What looked best is judged again; where it fails, the next is handed over."""
    real, asked = tuning.make, []

    def make(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments[1])
        if len(asked) == 1:
            raise graphopt.NothingDone("nothing here is faster on this machine: made up")
        return real(*arguments, **options)

    monkeypatch.setattr(tuning, "make", make)
    report = graphopt.tune("m.onnx", data="d.npz", verify="off", min_sqnr=20, time=20, allow_slower=True).report
    assert len(asked) == 2
    names = [c.name for c in ranked(_read(report), ORIGINAL, "latency")]
    assert report["tuning"]["chosen"] in names[1:]


def _read(report: dict[str, Any]) -> list[Candidate]:
    found = []
    for one in report["tuning"]["candidates"]:
        if one["config"] and one["ratio"]:
            r = one["ratio"]
            score = math.inf if one["score"] is None else one["score"]
            sqnr = math.inf if one["sqnr_db"] is None else one["sqnr_db"]
            found.append(
                Candidate(one["name"], one["config"], (r["median"], r["low"], r["high"]), score, sqnr, one["bytes"],
                          one["holds"])
            )  # fmt: skip
    return found


# For real


def test_pruned_and_compressed_models_are_made(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dimensions of other passes: what is made is smaller by about what the name says, and written as any other."""
    assert Space().missing == {}
    wanted: list[Config] = [
        {"arithmetic": FLOAT, "prune": "0.5"},
        {"arithmetic": STATIC, "prune": "0.5"},
        {"arithmetic": FLOAT, "compress": "int8"},
        {"arithmetic": FLOAT, "compress": "int4"},
    ]
    monkeypatch.setattr(trying, "first", lambda space: [space.complete(config) for config in wanted])
    monkeypatch.setattr(Trials, "explore", lambda self: None)
    monkeypatch.setattr(trying, "judge", functools.partial(instantly, trying.judge))
    ticking(monkeypatch)
    options: dict[str, Any] = {"min_sqnr": -50, "time": 60, "objective": "size", "allow_slower": True}
    report = graphopt.tune("m.onnx", data="d.npz", verify="off", **options).report["tuning"]
    original, pruned, both, by_int8, by_int4 = report["candidates"][:5]
    assert [c["error"] for c in report["candidates"][:5]] == [None] * 5
    assert pruned["bytes"] < 0.85 * original["bytes"]
    assert both["bytes"] < 0.6 * pruned["bytes"]
    assert by_int4["bytes"] < by_int8["bytes"] < 0.5 * original["bytes"]


def test_one_for_real(place: Path) -> None:
    """A second on a small model: built, judged and timed, and what is said of it is what comes out."""
    ran = run_cli(*TUNE, "--time", "4s", "--objective", "size")
    assert ran.code == 0, ran.err
    found = ran.json["tuning"]
    chosen = next(c for c in found["candidates"] if c["name"] == found["chosen"])
    assert chosen["bytes"] == ran.json["output"]["bytes"] == Path("o.onnx").stat().st_size
    measured = [c for c in found["candidates"] if c["ratio"] is not None and c["holds"]]
    assert chosen["bytes"] == min(c["bytes"] for c in measured)
    assert chosen["config"]["arithmetic"] != FLOAT
    assert ran.json["never_slower"]["checked"] is False


def test_layers_and_mixtures_become_choices(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trying.Search, "mixtures", lambda self, damages: [frozenset({"mul1"})])
    monkeypatch.setattr(trying, "judge", functools.partial(instantly, trying.judge))
    ticking(monkeypatch)
    result = graphopt.tune(
        "m.onnx", data="d.npz", verify="off", min_sqnr=5, time=150, allow_slower=True, objective="size"
    )
    space = result.report["tuning"]["space"]
    assert set(space["ranking"]) == {"mul0", "mul1", "mul2"}
    assert space["mixtures"] == [[], ["mul1"]]
    left = [c for c in result.report["tuning"]["candidates"] if c["config"].get("mixture") == 1]
    assert left
    plain = next(c for c in result.report["tuning"]["candidates"] if c["name"] == STATIC)
    assert left[0]["bytes"] > plain["bytes"]


BAD: dict[str, tuple[list[str], str]] = {
    "no-data": (["--min-sqnr", "20"], "needs calibration data"),
    "nothing-to-keep": (["--data", "d.npz"], "what may be lost"),
    "accuracy-of-what": (["--data", "d.npz", "--min-sqnr", "20", "--objective", "accuracy"], "--min-speedup"),
    "objective": (["--data", "d.npz", "--min-sqnr", "20", "--objective", "sped"], "'sped'"),
    "time": (["--data", "d.npz", "--min-sqnr", "20", "--time", "soon"], "write 90s, 10m or 1h"),
    "no-time": (["--data", "d.npz", "--min-sqnr", "20", "--time", "0"], "write 90s, 10m or 1h"),
    "no-labels": (["--data", "d.npz", "--metric", "accuracy", "--time", "1s"], "needs labels"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_tuned_is_one_line(name: str, place: Path, untouched: Watch) -> None:
    arguments, fragment = BAD[name]
    with untouched(place):
        ran = run_cli("tune", "m.onnx", "-o", "o.onnx", *arguments)
    assert ran.code == 2, ran.err
    assert fragment in ran.error


def test_optuna_missing_is_one_line(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    ran = run_cli("tune", DEMO / "digits.onnx", "-o", "o.onnx", "--data", DEMO / "calibration.npz", "--min-sqnr", "9")
    assert ran.code == 2
    assert "pip install 'graphopt[tune]'" in ran.error


@pytest.mark.parametrize(
    ("text", "seconds"), [("10m", 600), ("90s", 90), ("1h", 3600), ("1.5h", 5400), (45, 45), ("2 min", 120)]
)
def test_times(text: Any, seconds: float) -> None:
    assert tuning.parse_time(text) == seconds
