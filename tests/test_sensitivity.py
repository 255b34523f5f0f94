"""Which layers hurt, and how many go back to float to keep to a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import DEMO, run_cli
from onnx import helper, numpy_helper

import graphopt
from graphopt.cli import run
from graphopt.search.budget import fewest, foretold, ranked
from graphopt.search.sensitivity import LayerDamage

DATA: dict[str, Any] = {
    "data": str(DEMO / "calibration.npz"),
    "eval_data": str(DEMO / "evaluation.npz"),
    "time": 0,
    "samples": 120,
}
PLANTED = {"/block2/conv1/Conv", "/block2/conv2/Conv"}
"""The two layers around the value that no longer fits 8 bits."""


def plant() -> onnx.ModelProto:
    """The demo with one channel between two layers scaled up a thousandfold, and down again in the second one:
    the same function (a Relu lies between them), but a value whose other channels vanish in 8 bits."""
    model = onnx.load(DEMO / "digits.onnx")
    nodes = {node.name: node for node in model.graph.node}
    weights = {t.name: t for t in model.graph.initializer}

    def scale(name: str, index: Any, factor: float) -> None:
        array = numpy_helper.to_array(weights[name]).copy()
        array[index] *= factor
        weights[name].CopyFrom(numpy_helper.from_array(array, name))

    norm = next(n for n in model.graph.node if [*n.input][:1] == nodes["/block2/conv1/Conv"].output[:1])
    for parameter in norm.input[1:3]:
        scale(parameter, 0, 1000.0)
    scale(nodes["/block2/conv2/Conv"].input[1], (slice(None), 0), 1 / 1000.0)
    return model


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """:func:`plant`, with a Clip in place of the Relu, through which ``equalize`` does not take it back."""
    model = plant()
    reader = next(node for node in model.graph.node if node.name == "/block2/conv2/Conv")
    between = next(node for node in model.graph.node if list(node.output) == list(reader.input[:1]))
    bounds = [numpy_helper.from_array(np.float32(value), name) for name, value in (("none", 0), ("million", 1e6))]
    model.graph.initializer.extend(bounds)
    between.CopyFrom(helper.make_node("Clip", [between.input[0], "none", "million"], between.output, between.name))
    path = tmp_path_factory.mktemp("planted") / "planted.onnx"
    onnx.save(model, path)
    return path


def test_what_equalize_takes_back_hurts_nobody() -> None:
    report = graphopt.quantize(plant(), **DATA).report
    whole = graphopt.quantize(DEMO / "digits.onnx", **DATA).report
    mine, plain = (r["comparison"]["outputs"][0]["sqnr_db"] for r in (report, whole))
    assert mine > plain - 2
    assert report["floor"]["left_in_float"] == []


def test_a_planted_outlier_ranks_first_and_is_the_one_suggested(planted: Path) -> None:
    report = graphopt.sensitivity(str(planted), **DATA)
    assert {layer["layer"] for layer in report["layers"][:2]} == PLANTED
    assert set(report["suggested"]) == PLANTED
    damages = [layer["damage"] for layer in report["layers"]]
    assert damages == sorted(damages, reverse=True)


def test_leaving_it_in_float_lifts_the_output_by_ten_decibels(planted: Path, tmp_path: Path, capsys: Any) -> None:
    base = ["--data", DATA["data"], "--eval-data", DATA["eval_data"], "--samples", "120"]
    assert run(["sensitivity", str(planted), *base, "--json"]) == 0
    listing = tmp_path / "sens.json"
    listing.write_text(capsys.readouterr().out, encoding="utf-8")
    found = {}
    for name, extra in (("all", ["--min-sqnr", "-100"]), ("without", ["--exclude-from", str(listing)])):
        command = ["quantize", str(planted), "-o", str(tmp_path / f"{name}.onnx"), *base, "--time", "0", "--json"]
        assert run([*command, *extra]) == 0
        found[name] = json.loads(capsys.readouterr().out)["comparison"]["outputs"][0]["sqnr_db"]
    assert found["without"] >= found["all"] + 10


def test_max_drop_and_min_sqnr_leave_in_float_what_they_must(planted: Path) -> None:
    plain = graphopt.quantize(str(planted), **DATA, min_sqnr=-100)
    wanted = plain.report["comparison"]["outputs"][0]["sqnr_db"] + 6
    with pytest.raises(graphopt.GateFailed):
        graphopt.quantize(str(planted), **DATA, min_sqnr=wanted, search=False)
    result = graphopt.quantize(str(planted), **DATA, min_sqnr=wanted)
    assert result.report["comparison"]["outputs"][0]["sqnr_db"] >= wanted
    assert result.report["sensitivity"][0]["layer"] in PLANTED
    entry = next(e for e in result.report["ledger"] if e["pass"] == "quantize-static")
    left = [s for s in entry["skipped"] if "keep to the budget" in s["reason"]]
    assert {s["site"] for s in left} <= PLANTED
    assert any(f"{len(left)} of 10 layers" in note for note in result.report["notes"])


def test_without_a_word_no_collapse_is_shipped(planted: Path, tmp_path: Path, capsys: Any) -> None:
    """The floor: few layers, those that hurt, the model otherwise in integers; a lower --min-sqnr turns it off."""
    assert graphopt.quantize(str(planted), **DATA, min_sqnr=-100).report["comparison"]["outputs"][0]["sqnr_db"] < 10
    command = ["quantize", str(planted), "-o", str(tmp_path / "o.onnx"), "--data", DATA["data"], "--time", "0"]
    assert run([*command, "--samples", "120", "--eval-data", DATA["eval_data"], "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    floor = report["floor"]
    assert report["comparison"]["outputs"][0]["sqnr_db"] >= floor["limit_db"] <= floor["result_db"]
    assert floor["everything_db"] is None or floor["everything_db"] < floor["limit_db"]
    assert len(floor["left_in_float"]) > 0
    assert set(floor["left_in_float"]) <= PLANTED
    entry = next(e for e in report["ledger"] if e["pass"] == "quantize-static")
    told = {s["site"]: s["reason"] for s in entry["skipped"]}
    assert all("floor of 15 dB: alone it brings" in told[name] for name in floor["left_in_float"])
    assert any("to keep to the floor of 15 dB" in note for note in report["notes"])


def test_what_nothing_in_integers_can_keep_is_refused(tmp_path: Path, capsys: Any) -> None:
    """y = 1e-4 x + (x - x): what the layer adds to the output is far smaller than what its input is rounded to."""
    path = tmp_path / "m.onnx"
    weight = np.eye(8, dtype=np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "layer"), helper.make_node("Sub", ["h", "x"], ["y"], "rest")]
    x, y = (helper.make_tensor_value_info(name, 1, [1, 8]) for name in "xy")
    weight = weight * np.float32(1.0001)
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)
    samples = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=samples)
    command = ["quantize", str(path), "-o", str(tmp_path / "o.onnx"), "--data", str(tmp_path / "d.npz"), "--time", "0"]
    assert run(command) == 1
    error = capsys.readouterr().err
    assert "below the floor of 15 dB" in error
    assert "--min-sqnr" in error
    assert not (tmp_path / "o.onnx").exists()
    assert run([*command, "--min-sqnr", "-100"]) == 0


@pytest.mark.parametrize("total", [2, 3, 7, 12])
def test_the_fewest_is_found_from_any_guess(total: int) -> None:
    for answer in range(1, total):
        for guess in range(total + 2):
            asked: list[int] = []

            def attempt(count: int, asked: list[int] = asked, answer: int = answer) -> bool:
                asked.append(count)
                return count >= answer

            fewest(total, guess, attempt)
            assert answer in asked
            assert answer == 1 or answer - 1 in asked
            assert len(asked) == len(set(asked)) <= 8


def test_noise_of_layers_adds_up_to_what_the_whole_will_have() -> None:
    order = [LayerDamage(f"l{i}", "Conv", 0.01, 20.0, {"y": 0.01}) for i in range(10)]
    assert foretold(order, 15.0) == 7  # 10 ** -1.5 = 0.0316: three of them may stay
    assert foretold(order, 5.0) == 0


def test_a_layer_that_computes_much_goes_last() -> None:
    big, small = LayerDamage("big", "Conv", 1.0, 0.0), LayerDamage("small", "Conv", 0.5, 3.0)
    assert [d.layer for d in ranked([big, small], {"big": 0.9, "small": 0.0})] == ["small", "big"]
    assert [d.layer for d in ranked([big, small], {})] == ["big", "small"]


def test_an_impossible_budget_is_refused_and_says_what_was_tried() -> None:
    with pytest.raises(graphopt.GateFailed) as caught:
        graphopt.quantize(str(DEMO / "digits.onnx"), **DATA, min_sqnr=200.0)
    assert caught.value.report is not None
    assert len(caught.value.report["sensitivity"]) == 10
    assert any("no quantized part" in note for note in caught.value.report["notes"])


def test_a_budget_that_holds_costs_no_search() -> None:
    result = graphopt.quantize(str(DEMO / "digits.onnx"), **DATA, min_sqnr=20.0)
    assert result.report["sensitivity"] is None


def test_no_few_layers_are_suggested_where_all_hurt_alike() -> None:
    from graphopt.ranking import suggested

    alike = [LayerDamage(f"l{i}", "Conv", 1.0, 20.0) for i in range(20)]
    assert suggested(alike) == []
    one = [LayerDamage("bad", "Conv", 100.0, 3.0), *alike]
    assert [d.layer for d in suggested(one)] == ["bad"] or suggested(one) == []
    assert suggested([]) == []


@pytest.mark.parametrize("text", ["{}", "not json", '{"suggested": 3}', None])
def test_a_file_that_is_no_listing_is_one_line(text: str | None, tmp_path: Path, capsys: Any) -> None:
    listing = tmp_path / "sens.json"
    if text is not None:
        listing.write_text(text, encoding="utf-8")
    command = ["quantize", str(DEMO / "digits.onnx"), "-o", str(tmp_path / "o.onnx"), "--data", DATA["data"]]
    code = run([*command, "--exclude-from", str(listing)])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.count("error:") == 1
    assert not (tmp_path / "o.onnx").exists()


def test_the_table_as_markdown() -> None:
    ran = run_cli(
        "sensitivity", DEMO / "digits.onnx", "--data", DEMO / "calibration.npz", "--samples", "4", "--markdown"
    )
    assert ran.code == 0
    lines = ran.out.strip().splitlines()
    assert lines[:2] == ["| layer | operator | damage | SQNR alone |", "| --- | --- | ---: | ---: |"]
    assert sum(line.startswith("| /") for line in lines) == 10
