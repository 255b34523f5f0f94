"""Which form a layer's weights have is part of a mixture, and looking at the costs comes before a search."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import DEMO, run_cli
from onnx import TensorProto, helper, numpy_helper
from test_schema import check

import graphopt
from graphopt.base import Context
from graphopt.errors import PreconditionError
from graphopt.passes.quantize_static import QuantizeStatic
from graphopt.search.costs import Pricing
from graphopt.search.measured import Search
from graphopt.search.racing import Candidate

OPTIONS: dict[str, Any] = {"data": DEMO / "calibration.npz", "eval_data": DEMO / "evaluation.npz", "samples": 32}
DIGITS = DEMO / "digits.onnx"
NS = {"float": 1000, "s7": 100, "u8": 120}
"""What every region takes."""


def priced(monkeypatch: pytest.MonkeyPatch, cost: Callable[[str, str], int]) -> None:
    """In place of measuring: what a unit takes in integers, by its name and the kind of weights; in float all alike."""

    def observe(self: Pricing, *_: Any) -> None:
        for unit in self.units:
            self.table.entries[self.unit_key(unit, integer=False)] = NS["float"]
            self.table.entries[self.unit_key(unit, integer=True)] = cost(unit.name, self._kind)

    monkeypatch.setattr(Pricing, "observe", observe)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prices of :data:`NS`, and times of wholes that agree with them; the names of those raced."""
    raced: list[str] = []
    priced(monkeypatch, lambda _, kind: NS["u8" if kind == "u8" else "s7"])

    def ran(self: Search, candidates: list[Candidate]) -> Any:
        for one in candidates:
            if one.holds is False:
                continue
            floats = len(one.floats)
            narrow = len(self.units) - floats - len(one.uint8)
            spent = floats * NS["float"] + len(one.uint8) * NS["u8"] + narrow * NS["s7"]
            ratio = spent / (len(self.units) * NS["float"])
            one.ratio = (ratio, ratio - 0.001, ratio + 0.001)
            raced.append(one.name)
        return (1.0, 0.99, 1.01)

    monkeypatch.setattr(Pricing, "estimate_conversions", lambda self: None)
    monkeypatch.setattr(Search, "_race", ran)
    return raced


def weight_kinds(path: Path) -> dict[str, str]:
    """Of each Conv and Gemm: the type its weight is stored in."""
    proto = onnx.load(path)
    held = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    made = {
        n.output[0]: held[n.input[0]]
        for n in proto.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in held
    }
    heavy = [n for n in proto.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    return {n.name: str(made[n.input[1]].dtype) for n in heavy if n.input[1] in made}


@pytest.fixture(params=[3])
def dense(request: pytest.FixtureRequest, workplace: Path) -> dict[str, Any]:
    """So many dense layers of weights and inputs as wide as a normal distribution: 7 bits cost more than the input's 8,
    though not ten times as much."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal((64, 64)).astype(np.float32) / 8, f"w{i}")
        for i in range(request.param)
    ]
    nodes = [
        helper.make_node("MatMul", [f"v{i}", f"w{i}"], [f"v{i + 1}"], name=f"layer{i}") for i in range(request.param)
    ]
    shape = ["n", 64]
    graph = helper.make_graph(
        nodes,
        "dense",
        [helper.make_tensor_value_info("v0", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"v{request.param}", TensorProto.FLOAT, shape)],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "dense.onnx")
    for name in ("calibration", "evaluation"):
        np.savez(f"{name}.npz", v0=rng.standard_normal((128, 64)).astype(np.float32))
    return {"data": "calibration.npz", "eval_data": "evaluation.npz"}


def test_a_budget_is_met_by_uint8_weights_before_float(made_up: list[str], dense: dict[str, Any]) -> None:
    plain = {w: graphopt.quantize("dense.onnx", **dense, weights=w, time=0).report for w in ("auto", "s7", "u8")}
    narrow, seven, wide = (report["comparison"]["outputs"][0]["sqnr_db"] for report in plain.values())
    assert narrow == seven, "by themselves all layers get 7 bits"
    assert wide > narrow + 1, "which cost something here"
    wanted = (narrow + wide) / 2
    command = ["quantize", "dense.onnx", "-o", "q.onnx", "--min-sqnr", str(wanted), "--allow-slower", "--json"]
    command += ["--data", dense["data"], "--eval-data", dense["eval_data"]]
    ran = run_cli(*command, "--cost-table", "t.json", "--time", "0.01", "--lock", "q.lock")
    assert ran.code == 0, ran.err
    check(ran.json, "made")
    found = ran.json["placement"]
    assert found["uint8_weights"]
    assert found["left_in_float"] == [], "each of them costs more than eight times the other form"
    assert ran.json["comparison"]["outputs"][0]["sqnr_db"] >= wanted
    kinds = weight_kinds(Path("q.onnx"))
    assert {name for name, kind in kinds.items() if kind == "uint8"} == set(found["uint8_weights"])
    first = Path("q.onnx").read_bytes()
    table = json.loads(Path("t.json").read_text())
    assert any(key.endswith(" u8") for key in table["entries"])
    again = run_cli(*command, "--cost-table", "t.json", "--time", "0")
    assert again.code == 0, again.err
    assert Path("q.onnx").read_bytes() == first, "the table decides alone"
    assert again.json["placement"]["uint8_weights"] == found["uint8_weights"]
    assert run_cli("run", "--locked", "q.lock").code == 0
    assert Path("q.onnx").read_bytes() == first, "the lock knows them"


def test_without_a_budget_nothing_is_tried_where_nothing_is_to_be_gained(made_up: list[str]) -> None:
    report = graphopt.quantize(DIGITS, **OPTIONS, time=0.01).report
    found = report["placement"]
    assert found["looked_only"] is True
    assert found["predicted"] == 1.0
    assert made_up == []
    assert any(note.endswith("is no faster by what its parts take here") for note in report["notes"])
    asked = graphopt.quantize(DIGITS, **OPTIONS, time=0.01, placement="measured").report["placement"]
    assert asked["looked_only"] is False
    assert made_up


def test_it_looks_only_where_somebody_cares(made_up: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pricing, "observe", lambda *_: pytest.fail("nobody asked for measuring"))
    for given in ({"allow_slower": True, "time": 0.01}, {"time": 0}, {"time": 0.01, "placement": "rules"}):
        assert graphopt.quantize(DIGITS, **OPTIONS, **given).report["placement"] is None
    other = graphopt.quantize(DIGITS, **OPTIONS, time=0.01, target="ort-arm64").report
    assert other["placement"] is None


def test_what_a_look_leaves_alone_is_searched_where_it_comes_out_slower(
    made_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphopt.judge.SLOWER", -1.0)  # everything is slower than that
    monkeypatch.setattr("graphopt.search.speed._AGAIN", 1.0)
    with pytest.raises(graphopt.NothingDone) as error:
        graphopt.quantize(DIGITS, **OPTIONS, time=0.01)
    assert error.value.report is not None
    found = error.value.report["placement"]
    assert found["looked_only"] is False
    assert made_up
    told = [note for note in error.value.report["notes"] if note.startswith("placement: ")]
    assert len(told) == 1, "what the look said does not stand beside what the search found"
    made_up.clear()
    with pytest.raises(graphopt.NothingDone) as error:
        graphopt.quantize(DIGITS, **OPTIONS, time=0.01, placement="rules")
    assert error.value.report is not None
    assert error.value.report["placement"] is None
    assert graphopt.quantize(DIGITS, **OPTIONS, time=0.01, allow_slower=True).report["placement"] is None
    assert made_up == []


def test_names_that_mean_no_layer_are_refused(workplace: Path) -> None:
    Path("r.toml").write_text('[[pass]]\nuse = "quantize-static"\nuint8 = ["/stem/Cnv"]\n')
    ran = run_cli("optimize", DIGITS, "-o", "q.onnx", "--recipe", "r.toml", "--data", OPTIONS["data"])
    assert ran.code == 2, ran.err
    assert "uint8 '/stem/Cnv' matches no node; did you mean '/stem/Conv'?" in ran.error
    Path("r.toml").write_text('[[pass]]\nuse = "quantize-static"\nuint8 = ["/stem/Conv"]\n')
    ran = run_cli("optimize", DIGITS, "-o", "q.onnx", "--recipe", "r.toml", "--data", OPTIONS["data"], "--time", "0")
    assert ran.code == 0, ran.err
    assert weight_kinds(Path("q.onnx"))["/stem/Conv"] == "uint8"
    assert np.unique(list(weight_kinds(Path("q.onnx")).values())).tolist() == ["int8", "uint8"]


def test_a_cut_that_is_not_faster_as_a_whole_is_not_searched(
    made_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table says that one layer is dear in integers; the two wholes are raced, and only then it is known."""
    priced(monkeypatch, lambda name, _: 5000 if name == "/stem/Conv" else 100)
    for ratio, searched in (((1.01, 1.0, 1.02), False), ((0.8, 0.79, 0.81), True)):
        monkeypatch.setattr("graphopt.search.measured.race", lambda *_, _found=ratio, **__: {"cut 1": _found})
        report = graphopt.quantize(DIGITS, **OPTIONS, time=0.01).report
        found = report["placement"]
        assert found["looked_only"] is not searched
        if searched:
            assert "cut 1" in made_up
        else:
            assert made_up == []
            assert found["raced"]["median"] == 1.01
            assert found["left_in_float"] == []
            assert any(note.endswith("but as a whole it takes 1.010x their time") for note in report["notes"])
        check(report, "made")


def test_where_the_table_calls_all_of_it_cheaper_in_float_a_mixture_is_raced(
    made_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses of a few percent are noise; whether the mixture wins, wholes tell."""
    priced(monkeypatch, lambda name, _: 1050 if name.startswith("/block2") else 5000)
    found = graphopt.quantize(DIGITS, **OPTIONS, time=0.01, placement="measured", allow_slower=True).report["placement"]
    assert found["cheapest_in_float"] == found["regions"]
    generous = next(c for c in found["candidates"] if c["name"] == "generous cut 1")
    assert 0 < generous["in_float"] < found["regions"]
    assert "generous cut 1" in made_up


@pytest.mark.parametrize("dense", [1], indirect=True)
def test_what_no_layer_in_float_can_save_other_weights_may(
    made_up: list[str], dense: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer: without it nothing is quantized, so that the budget's own search finds nothing."""
    monkeypatch.setattr("graphopt.judge.SLOWER", 100.0)  # it takes a few microseconds either way
    plain = {w: graphopt.quantize("dense.onnx", **dense, weights=w, time=0).report for w in ("s7", "u8")}
    narrow, wide = (report["comparison"]["outputs"][0]["sqnr_db"] for report in plain.values())
    report = graphopt.quantize("dense.onnx", **dense, time=0.01, min_sqnr=(narrow + wide) / 2).report
    assert report["placement"]["uint8_weights"] == ["layer0"]
    assert any(note.startswith("placement: uint8 weights in 1 layer, because") for note in report["notes"])
    assert not any("no quantized part keeps" in note for note in report["notes"])


def test_a_budget_of_the_pass_alone_is_not_searched_away(
    made_up: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the table everything belongs into integers again, which the budget of the pass does not bear."""
    monkeypatch.setattr("graphopt.search.measured.race", lambda *_, **__: {"cut 1": (0.5, 0.4, 0.6)})
    monkeypatch.setattr("graphopt.judge.SLOWER", 100.0)  # whatever else the machine does
    whole = graphopt.quantize(DIGITS, **OPTIONS, time=0).report["comparison"]["outputs"][0]["sqnr_db"]
    Path("r.toml").write_text(f'[[pass]]\nuse = "quantize-static"\nmin-sqnr = {whole + 3}\n')
    command = ["optimize", DIGITS, "-o", "q.onnx", "--recipe", "r.toml", "--samples", "32", "--time", "0.01", "--json"]
    ran = run_cli(*command, "--data", OPTIONS["data"], "--eval-data", OPTIONS["eval_data"])
    assert ran.code == 0, ran.err
    assert ran.json["placement"] is None
    assert ran.json["comparison"]["outputs"][0]["sqnr_db"] >= whole + 2.5


def test_patterns_are_lists(workplace: Path) -> None:
    with pytest.raises(ValueError, match=r"uint8 is one string; give a list of patterns: \['/stem/Conv'\]"):
        QuantizeStatic(uint8="/stem/Conv")  # type: ignore[arg-type]
    step = QuantizeStatic(exclude=["/head/Gemm"], uint8=["/stem/Conv"])  # type: ignore[arg-type]
    assert hash(step) == hash(QuantizeStatic(exclude=("/head/Gemm",), uint8=("/stem/Conv",)))


def test_a_target_without_uint8_weights_takes_none(workplace: Path) -> None:
    model = graphopt.optimize(DIGITS, time=0).ir_model
    with pytest.raises(PreconditionError, match=r"openvino takes int8 .* and uint8 names layers that get others"):
        QuantizeStatic(uint8=("/stem/Conv",)).run(model, Context(original=model, target="openvino"))
