"""Nothing slower than what came in is handed over, unless that is what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import DEMO, MODELS, run_cli
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.base import Context, Gates
from graphopt.judge import SLOWER, Verdict
from graphopt.model import load
from graphopt.report import units
from graphopt.search import speed
from graphopt.search.speed import Promise
from graphopt.timing import Timing

Watch = Callable[[Path], AbstractContextManager[None]]
DIGITS: dict[str, Any] = {"data": DEMO / "calibration.npz", "eval_data": DEMO / "evaluation.npz", "samples": 16}


def depthwise(blocks: int = 3, channels: int = 32, side: int = 64) -> onnx.ModelProto:
    """1x1 depthwise convolutions between operators that only run in float: all that int8 adds is conversions."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for i in range(blocks):
        array = rng.uniform(0.5, 1.0, (channels, 1, 1, 1)).astype(np.float32)
        weights.append(numpy_helper.from_array(array, f"w{i}"))
        nodes += [
            helper.make_node("Conv", [value, f"w{i}"], [f"c{i}"], name=f"conv{i}", group=channels),
            helper.make_node("Relu", [f"c{i}"], [f"r{i}"], name=f"relu{i}"),
            helper.make_node("Sqrt", [f"r{i}"], [f"s{i}"], name=f"sqrt{i}"),
        ]
        value = f"s{i}"
    shape = ["n", channels, side, side]
    graph = helper.make_graph(
        nodes,
        "depthwise",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, shape)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def images(count: int = 6, channels: int = 32, side: int = 64) -> dict[str, Any]:
    return {"x": np.random.default_rng(1).standard_normal((count, channels, side, side)).astype(np.float32)}


def test_a_net_where_int8_loses_ends_with_exit_3_and_both_medians(workplace: Path, untouched: Watch) -> None:
    onnx.save(depthwise(), "m.onnx")
    np.savez("d.npz", **images())
    command = ["quantize", "m.onnx", "-o", "int8.onnx", "--data", "d.npz", "--time", "0.5", "--json"]
    with untouched(workplace):
        ran = run_cli(*command)
    assert ran.code == 3, ran.out
    assert "nothing here is faster on this machine" in ran.error
    assert "--allow-slower" in ran.error
    kept, times = ran.json["never_slower"], ran.json["latency"]
    assert kept == {"limit": SLOWER, "checked": True, "holds": False, "why": kept["why"]}
    assert ran.json["latency_ratio"]["low"] > SLOWER
    for which in ("original", "candidate"):
        assert units.seconds(times[which]["median"]) in ran.error
    assert ran.json["placement"]["regions"] == 3, "the float side was looked at before it was refused"
    allowed = run_cli(*command, "--allow-slower")
    assert allowed.code == 0, allowed.err
    assert Path("int8.onnx").is_file()
    assert allowed.json["never_slower"]["checked"] is False
    assert allowed.json["latency_ratio"]["low"] > SLOWER


def test_recipes_keep_the_promise_too(workplace: Path, untouched: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Promise, "search", lambda *_, **__: None)
    onnx.save(depthwise(), "m.onnx")
    np.savez("d.npz", **images())
    recipe = 'model = "m.onnx"\noutput = "int8.onnx"\ndata = "d.npz"\n{}\n[[pass]]\nuse = "quantize-static"\n'
    Path("r.toml").write_text(recipe.format(""))
    Path("slow.toml").write_text(recipe.format("allow-slower = true\n"))
    with untouched(workplace):
        ran = run_cli("run", "r.toml", "--time", "0.5")
    assert ran.code == 3, ran.out
    assert "nothing here is faster on this machine" in ran.err.splitlines()[-1]
    for arguments in (["r.toml", "--allow-slower"], ["slow.toml"]):
        assert run_cli("run", *arguments, "--time", "0.1").code == 0
        Path("int8.onnx").unlink()


@pytest.mark.parametrize("given", [("--recipe", "r.toml"), ("--passes", "quantize-static", "--data", "d.npz")])
def test_optimize_keeps_it_where_it_is_told_to_quantize(
    given: tuple[str, ...], workplace: Path, untouched: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Promise, "search", lambda *_, **__: None)
    onnx.save(depthwise(), "m.onnx")
    np.savez("d.npz", **images())
    Path("r.toml").write_text('data = "d.npz"\n[[pass]]\nuse = "quantize-static"\n')
    command = ["optimize", "m.onnx", "-o", "o.onnx", *given]
    with untouched(workplace):
        ran = run_cli(*command, "--time", "0.5")
    assert ran.code == 3, ran.out
    assert "nothing here is faster on this machine" in ran.error
    assert run_cli(*command, "--time", "0.1", "--allow-slower").code == 0


def test_optimize_says_so_where_what_it_was_told_to_do_was_not_done(workplace: Path, untouched: Watch) -> None:
    onnx.save(depthwise(), "m.onnx")
    with untouched(workplace):
        ran = run_cli("optimize", "m.onnx", "-o", "o.onnx", "--passes", "fuse-batchnorm,quantize-dynamic")
    assert ran.code == 3, ran.out
    assert "quantize-dynamic" in ran.error


def test_what_was_not_checked_is_said() -> None:
    report = graphopt.quantize(DEMO / "digits.onnx", **DIGITS, time=0).report
    assert report["never_slower"]["checked"] is False
    assert any("was not checked: nothing was timed (--time 0)" in note for note in report["notes"])
    report = graphopt.quantize(DEMO / "digits.onnx", **DIGITS, time=0.05, min_speedup=0.01).report
    assert report["never_slower"]["why"].startswith("--min-speedup")
    assert not any("not checked" in note for note in report["notes"])
    report = graphopt.optimize(MODELS / "shared.onnx", time=0).report
    assert report["never_slower"] is None


def test_a_target_that_is_not_here_is_not_judged_here(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from graphopt.target import get_target

    elsewhere = dataclasses.replace(get_target("ort-cpu"), here=False)
    monkeypatch.setattr(speed, "get_target", lambda name: elsewhere)
    assert Promise().unchecked(Gates(), "phone", 2.0) == "phone is not this machine"


@pytest.mark.parametrize(
    ("first", "second", "holds", "timed"),
    [
        ((0.7, 0.6, 0.8), None, True, 1),
        ((1.2, SLOWER, 1.4), None, True, 1),  # the lower bound has to be above it
        ((1.2, 1.1, 1.4), (1.0, 0.9, 1.1), True, 2),  # noise: the second, longer look decides
        ((1.2, 1.1, 1.4), (1.2, 1.1, 1.4), False, 2),
    ],
)
def test_what_looks_slower_is_timed_again_and_longer(
    first: Any, second: Any, holds: bool, timed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(depthwise(1))
    looks: list[float] = [1.0]
    timing = {name: Timing(1.0, 1.0, 1.0, 10) for name in ("original", "candidate")}

    def again(verdict: Verdict, *_: Any, seconds: float) -> None:
        looks.append(seconds)
        verdict.speed = second

    monkeypatch.setattr(speed, "time_both", again)
    verdict = Verdict(timing=timing, speed=first)
    kept = Promise().keep(verdict, model, model, Context(original=model, target="ort-cpu"), Gates(), 1.0)
    assert kept["holds"] is holds
    assert len(looks) == timed
    assert looks == sorted(looks)
    assert timed == 1 or looks[1] > looks[0]


def test_a_failed_gate_comes_first(workplace: Path) -> None:
    onnx.save(depthwise(), "m.onnx")
    np.savez("d.npz", **images())
    ran = run_cli("quantize", "m.onnx", "-o", "o.onnx", "--data", "d.npz", "--time", "0.3", "--min-sqnr", "200")
    assert ran.code == 1
    assert "gate min-sqnr" in ran.err.splitlines()[-1]
