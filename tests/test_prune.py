"""``graphopt prune``: smaller and still right, repaired, honest about what it could not do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import DATA, DEMO, MODELS, ROOT, Ran, run_cli
from test_schema import check

sys.path.insert(0, str(ROOT / "tools"))

from architectures import ARCHITECTURES, feeds

import graphopt
from graphopt.base import Context, Gates
from graphopt.cost import node_macs, shapes
from graphopt.data import load_data
from graphopt.errors import InputError, NothingDone
from graphopt.judge import Verdict
from graphopt.linear import form_of
from graphopt.model import interface, load
from graphopt.passes._amplification import amplifications, distance
from graphopt.passes._refit import segments
from graphopt.passes._ridge import solve
from graphopt.passes._saliency import Reader, _inverse, _trusted
from graphopt.registry import create
from graphopt.search import pruning
from graphopt.session import Session
from graphopt.sweeps import attach
from graphopt.timing import Timing

Watch = Callable[[Path], AbstractContextManager[None]]
DIGITS = DEMO / "digits.onnx"
SAMPLES: dict[str, Any] = {
    "data": DEMO / "calibration.npz", "eval_data": DEMO / "evaluation.npz", "metric": "accuracy", "time": 0,
    "samples": 80,
}  # fmt: skip


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """The demo's model with half of its MACs, and the report in JSON."""
    out = tmp_path_factory.mktemp("half") / "half.onnx"
    ran = run_cli(
        "prune", DIGITS, "-o", out, "--data", DEMO / "calibration.npz", "--eval-data", DEMO / "evaluation.npz",
        "--metric", "accuracy", "--macs", "0.5", "--time", "0", "--json",
    )  # fmt: skip
    return out, ran


def macs(path: Path) -> int:
    proto = onnx.load(path)
    known = shapes(proto, {"image": (1, 1, 8, 8)})
    return sum(node_macs(node, known) or 0 for node in proto.graph.node)


def test_half_of_the_arithmetic_is_gone_and_the_accuracy_is_not(half: tuple[Path, Ran]) -> None:
    out, ran = half
    assert ran.code == 0, ran.err
    report = ran.json
    metrics = report["ledger"][-1]["metrics"]
    assert 0.4 < metrics["macs_left"] <= 0.5
    assert macs(out) / macs(DIGITS) == pytest.approx(metrics["macs_left"], abs=0.01)
    left = out.stat().st_size / DIGITS.stat().st_size  # how many bytes go with half of the arithmetic is no promise
    assert left == pytest.approx(metrics["weight_bytes_left"], abs=0.02)
    assert left < 0.7
    assert report["metric"]["candidate"] > report["metric"]["original"] - 0.01
    onnx.checker.check_model(onnx.load(out), full_check=True)
    for batch in (1, 3):
        (logits,) = Session(onnx.load(out), threads=1).run({"image": np.zeros((batch, 1, 8, 8), np.float32)}).values()
        assert logits.shape == (batch, 10)


def test_the_report_says_what_went_and_what_stayed(half: tuple[Path, Ran]) -> None:
    report = half[1].json
    entry = report["ledger"][-1]
    assert entry["pass"] == "prune"
    assert all("channels" in change["detail"] for change in entry["changes"])
    assert entry["skipped"] == [{"site": "/head/Gemm", "reason": "its channels stay: 'logits' is a graph output"}]
    before, after = entry["metrics"]["layer_error"]
    assert after < 0.5 * before
    assert report["never_slower"]["checked"] is False
    check(report, "made")


def test_repair_is_what_keeps_the_accuracy() -> None:
    bare = graphopt.prune(DIGITS, macs=0.5, repair="none", **SAMPLES).report["metric"]
    repaired = graphopt.prune(DIGITS, macs=0.5, repair="symmetric", **SAMPLES).report["metric"]
    assert repaired["candidate"] > bare["candidate"] + 0.2


def test_without_data_by_magnitude() -> None:
    result = graphopt.prune(DIGITS, ratio=0.2, importance="l2", repair="none", time=0)
    assert result.report["ledger"][-1]["metrics"]["units_removed"] == pytest.approx(0.2 * 304, abs=8)


def test_as_much_as_a_budget_allows() -> None:
    report = graphopt.prune(DIGITS, max_drop="3%", importance="l2", repair="none", **SAMPLES).report
    assert report["exit_code"] == 0
    assert report["metric"]["candidate"] >= 0.97 * report["metric"]["original"]
    assert any("as much as keeps to the budget" in note for note in report["notes"])


def test_prune_then_quantize_in_one_recipe() -> None:
    steps = [create("prune", {"left": 0.7, "repair": "symmetric"}), create("quantize-static", {})]
    before = graphopt.optimize(DIGITS, time=0).model
    result = graphopt.optimize(before, passes=steps, **SAMPLES, min_sqnr=1)
    assert [entry["status"] for entry in result.report["ledger"]] == ["changed", "changed"]
    assert {t.data_type for t in result.model.graph.initializer} & {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    assert len(result.model.SerializeToString()) < 0.25 * DIGITS.stat().st_size
    assert result.report["metric"]["candidate"] > 0.97


@pytest.mark.parametrize("name", ["shufflenet", "transformer", "recurrent", "yolo", "vgg"])
def test_every_repair_runs_on_other_structures(name: str) -> None:
    proto = ARCHITECTURES[name]()
    before = proto.SerializeToString()
    samples = [feeds(proto, 1, size) for size in (16, 16, 24, 24)]
    result = graphopt.prune(proto, data=samples, macs=0.7, multiple=2, time=0)
    assert proto.SerializeToString() == before
    session = Session(result.model, threads=1)
    for feed in (feeds(proto, 1), feeds(proto, 3, 20)):
        old = Session(proto, threads=1).run(feed)
        assert [a.shape for a in session.run(feed).values()] == [a.shape for a in old.values()]
    assert result.report["ledger"][-1]["metrics"]["macs_left"] <= 0.7


def test_the_plan_is_a_table(workplace: Path, untouched: Watch) -> None:
    with untouched(workplace):
        ran = run_cli("prune", DIGITS, "--dry-run")
        assert ran.code == 0, ran.err
        assert ran.out.startswith("304 channels in 5 groups could go")
        assert "'logits' is a graph output (/head/Gemm)" in ran.out
        plan = run_cli("prune", DIGITS, "--dry-run", "--exclude", "/stem/Conv", "--json").json
    groups = {group["name"]: group for group in plan["groups"]}
    assert groups["/stem/Conv"]["reason"] == "excluded"
    assert groups["/down/conv/Conv"]["free"] == 80
    assert 0 < groups["/down/conv/Conv"]["macs_share"] < 1


def test_nothing_to_remove_is_no_success(workplace: Path, untouched: Watch) -> None:
    with untouched(workplace):
        ran = run_cli(
            "prune", DIGITS, "-o", "o.onnx", "--include", "/head/Gemm", "--macs", "0.7", "--importance", "l2",
            "--repair", "none", "--time", "0",
        )  # fmt: skip
    assert ran.code == 3
    assert "its channels stay" in ran.error


def test_no_faster_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[float] = []
    monkeypatch.setattr(pruning, "time_both", lambda *_, seconds: timed.append(seconds))
    timing = {name: Timing(1e-3, 1e-3, 1e-3, 10) for name in ("original", "candidate")}
    context: Any = Context(original=None)  # type: ignore[arg-type]
    for speed, holds in (((1.02, 0.98, 1.05), False), ((0.8, 0.75, 0.9), True), ((0.97, 0.9, 1.01), True)):
        verdict = Verdict(speed=speed, timing=timing)
        kept = pruning.Faster().keep(verdict, context, context, context, Gates(), 2.0)
        assert kept["holds"] is holds
    assert timed == [6.0, 6.0]  # what does not clearly hold is timed again
    assert pruning.Faster(allow_slower=True).keep(Verdict(), context, context, context, Gates(), 2.0)["holds"] is None


USAGE: dict[str, tuple[list[str], str]] = {
    "no-amount": (["--data", "random"], "say how much goes"),
    "two-amounts": (["--data", "random", "--macs", "0.5", "--ratio", "0.5"], "give one"),
    "macs": (["--data", "random", "--macs", "1.5"], "--macs is 1.5"),
    "size": (["--data", "random", "--size", "2GB"], "ask for something in between"),
    "size-text": (["--data", "random", "--size", "small"], "'small' is no size"),
    "no-data": (["--macs", "0.5"], "no labels needed"),
    "multiple": (["--macs", "0.5", "--multiple", "0"], "--multiple"),
    "latency": (["--data", "random", "--latency", "2"], "give what is left of the time"),
    "latency-unit": (["--data", "random", "--latency", "3h"], "--latency is '3h'"),
    "latency-above": (["--data", "random", "--latency", "9s"], "here already; ask for less"),
    "latency-untimed": (["--data", "random", "--latency", "0.7", "--time", "0"], "--latency has to time models"),
    "exclude": (["--data", "random", "--macs", "0.5", "--exclude", "no_such_node"], "matches no node"),
    "repair": (["--macs", "0.5", "--repair", "gradient"], "--repair"),
    "no-output": (["--macs", "0.5", "--data", "random"], "no output"),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage_that_is_wrong(name: str, workplace: Path, untouched: Watch) -> None:
    arguments, fragment = USAGE[name]
    output = [] if name == "no-output" else ["-o", "o.onnx"]
    with untouched(workplace):
        ran = run_cli("prune", DIGITS, *output, *arguments)
    assert ran.code == 2
    assert fragment in ran.error


def test_python_says_the_same() -> None:
    with pytest.raises(InputError, match="one string"):
        graphopt.prune(DIGITS, macs=0.5, data=DEMO / "calibration.npz", exclude="/stem/Conv")
    with pytest.raises(NothingDone, match="prune changed nothing"):
        graphopt.prune(MODELS / "opset11.onnx", data="random", macs=0.5, include=["Gemm"], time=0)


def test_a_latency_is_measured() -> None:
    options = {**SAMPLES, "time": 0.3, "threads": 1}
    report = graphopt.prune(DIGITS, latency=0.7, importance="l2", repair="none", **options).report
    metrics = report["ledger"][-1]["metrics"]
    assert 0.1 < metrics["seconds_left"] < 0.9
    assert report["latency_ratio"]["median"] < 0.8
    assert any("of the profile's time left" in note and "as fast as asked" in note for note in report["notes"])


def test_few_rows_do_not_make_inputs_free() -> None:
    """Of fewer rows than inputs each input follows from the others: nothing would seem to be lost with it."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(40, 12)), rng.normal(size=(5, 40))
    h = x @ x.T / 12
    columns = {unit: np.array([unit]) for unit in range(40)}
    plain, trusted = (Reader(weight, _inverse(g), columns, 1.0, np.diagonal(h)) for g in (h, _trusted(h, 12)))
    wanted = np.square(weight).sum(0)  # independent inputs of variance 1: nothing makes up for one
    losses = [reader.losses(np.arange(40)) / wanted for reader in (plain, trusted)]
    assert losses[0].mean() < 0.05
    assert losses[1].mean() > 0.3
    assert np.allclose(_trusted(h, 4000), h, atol=1e-4)


def test_what_an_error_of_a_layer_becomes() -> None:
    """The last layer's is the output's; one that is cut down to a hundredth before the output counts for less."""
    rng = np.random.default_rng(0)
    names = ("first", "small", "last")
    tensors = {name: rng.normal(size=(8, 8)).astype(np.float32) for name in names}
    tensors["small"] *= 0.01
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()]
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "first"], ["a"], "one"),
        onnx.helper.make_node("MatMul", ["x", "small"], ["b"], "two"),
        onnx.helper.make_node("Add", ["a", "b"], ["sum"]),
        onnx.helper.make_node("MatMul", ["sum", "last"], ["y"], "three"),
    ]
    shape = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", 8]) for n in ("x", "y")]
    graph = onnx.helper.make_graph(nodes, "g", shape[:1], shape[1:], weights)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    model = load(proto)
    context = Context(original=model, threads=1)
    context.data = load_data(
        [{"x": rng.normal(size=(16, 8)).astype(np.float32)} for _ in range(8)], interface(model)[0]
    )
    attach(context)
    layers = [node for node in model.graph if node.op_type == "MatMul"]
    assert context.layer_inputs is not None
    seen = context.layer_inputs(model, [form for node in layers if (form := form_of(node)) is not None])
    found = {node.name: value for node, value in amplifications(model, layers, seen, context).items()}
    assert found["three"] == pytest.approx(1, abs=0.2)
    assert found["two"] < 0.01 * found["one"]


def test_segments_keep_what_lies_side_by_side_together() -> None:
    layers: Any = [SimpleNamespace(depth=d) for d in (0, 1, 1, 2, 3, 4, 4, 4, 5, 6)]
    parts = [[layer.depth for layer in part] for part in segments(layers, 4)]
    assert [d for part in parts for d in part] == [layer.depth for layer in layers]
    assert 3 <= len(parts) <= 4
    assert all(sum(depth in part for part in parts) == 1 for depth in range(7))
    assert segments(layers, 7) == [[o for o in layers if o.depth == d] for d in range(7)]


def test_the_loss_of_a_unit_is_what_refitting_leaves() -> None:
    """OBS: tr(W_u [(H^-1)_uu]^-1 W_u^T) is the error after the best refit without u."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 400)) + 0.5 * rng.normal(size=(1, 400))
    h, weight = x @ x.T / 400, rng.normal(size=(5, 12))
    gone = np.array([3, 4])
    reader = Reader(weight.copy(), _inverse(h), {7: gone}, 1.0, np.diagonal(h))
    kept = np.delete(np.arange(12), gone)
    best = weight @ h[:, kept] @ np.linalg.inv(h[np.ix_(kept, kept)])
    error = weight @ x - best @ x[kept]
    assert reader.losses(np.array([7]))[0] == pytest.approx(np.square(error).sum() / 400, rel=0.02)
    reader.remove(np.array([7]))
    assert np.allclose(reader.weight[:, kept], best, rtol=0.02, atol=0.02)


def test_refitting_finds_the_map_and_the_bias() -> None:
    rng = np.random.default_rng(0)
    true, shift = rng.normal(size=(3, 6)), rng.normal(size=(3, 1))
    x, held = rng.normal(size=(6, 500)), rng.normal(size=(6, 100))
    wrong = true + rng.normal(size=true.shape)
    rows = [(a[None].astype(np.float32), (true @ a + shift)[None].astype(np.float32)) for a in (x, held)]
    (solved,) = solve(wrong[None], rows[0], rows[1], "symmetric", True, None)
    assert np.allclose(solved.weight, true, atol=1e-3)
    assert np.allclose(solved.shift, shift[:, 0], atol=1e-3)
    assert solved.after < 1e-5 * solved.before


def test_data_of_the_fixtures() -> None:
    """An LSTM whose states are made at run time."""
    result = graphopt.prune(MODELS / "lstm.onnx", data=DATA / "lstm.npz", macs=0.7, multiple=4, time=0)
    attributes = {a.name: a for n in result.model.graph.node if n.op_type == "LSTM" for a in n.attribute}
    assert attributes["hidden_size"].i < 24


def test_what_cannot_be_reached_is_said() -> None:
    report = graphopt.prune(
        DIGITS,
        macs=0.3,
        include=["/down/conv/Conv", "/conv/Conv"],
        importance="l2",
        repair="none",
        allow_slower=True,
        time=0,
    ).report
    entry = report["ledger"][-1]
    assert entry["metrics"]["macs_left"] > 0.8
    assert any("are left, not 30 %" in skip["reason"] for skip in entry["skipped"])


def test_outputs_that_are_infinite_are_no_error_and_no_warning() -> None:
    whole = [{"y": np.array([np.inf, 1.0], np.float32)}]
    assert distance(whole, whole) == 0.0
