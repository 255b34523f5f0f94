"""What runs in integers by measured cost: the cut is the cheapest there is, the table is what was measured."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import DEMO, run_cli
from onnx import TensorProto, helper, numpy_helper
from test_schema import check
from test_sensitivity import PLANTED
from test_sensitivity import planted as planted  # a fixture

import graphopt
from graphopt.cost import shapes
from graphopt.model import load, to_proto
from graphopt.passes._placement import place
from graphopt.search import costs
from graphopt.search.costs import CostTable, Pricing, cache_path, cached, keep, read_table, this_machine
from graphopt.search.placement import Prices, Unit, borders, cut, hull, price, units
from graphopt.target import get_target

Watch = Callable[[Path], AbstractContextManager[None]]
DIGITS = DEMO / "digits.onnx"
DATA: dict[str, Any] = {"data": DEMO / "calibration.npz", "eval_data": DEMO / "evaluation.npz", "samples": 32}


# The cut


def random_graph(rng: random.Random, count: int) -> list[Unit]:
    """``count`` units, and some nodes that only run in float, wired at random."""
    values, nodes, kinds = ["x"], [], []
    for index in range(count + 3):
        reads = rng.sample(values, k=min(len(values), rng.choice((1, 1, 2))))
        nodes.append(helper.make_node("Sum", reads, [f"v{index}"], name=f"n{index}"))
        kinds.append("float" if index >= count else rng.choice(("integer", "integer", "floats out")))
        values.append(f"v{index}")
    order = list(range(len(nodes)))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"])
            for name in {values[-1], rng.choice(values[1:])}
        ],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    by_name = {node.name: node for node in model.graph}
    made = []
    for index in order:
        node = by_name[f"n{index}"]
        if kinds[index] != "float":
            reads = tuple(v for v in node.inputs if v is not None)
            made.append(Unit(f"n{index}", True, (node,), reads, node.outputs[0], kinds[index] == "integer"))
    model.graph.doc_string = "kept alive by its nodes"
    return made


def random_prices(rng: random.Random, found: list[Unit], each: int = 1) -> Prices:
    prices = Prices()
    for unit in found:
        prices.in_float[unit.name], prices.in_integers[unit.name] = each * rng.randint(0, 40), each * rng.randint(0, 40)
    for border in borders(found):
        if border.readers:
            prices.quantize[border.value] = each * rng.randint(0, 15)
        if border.maker is not None:
            for reader in border.readers:
                prices.dequantize[border.value, reader.name] = each * rng.randint(0, 15)
            prices.dequantize[border.value, ""] = each * rng.randint(0, 15)
    return prices


def every_placement(found: list[Unit]) -> list[frozenset[str]]:
    names = [unit.name for unit in found]
    return [frozenset(c) for size in range(len(names) + 1) for c in itertools.combinations(names, size)]


@pytest.mark.parametrize("seed", range(40))
def test_no_placement_is_cheaper_than_the_cut(seed: int) -> None:
    rng = random.Random(seed)
    found = random_graph(rng, rng.randint(1, 8))
    prices = random_prices(rng, found)
    best = min(price(found, prices, floats) for floats in every_placement(found))
    assert price(found, prices, cut(found, prices)) == best


@pytest.mark.parametrize("seed", range(15))
def test_the_hull_is_the_lower_convex_hull_of_all_placements(seed: int) -> None:
    rng = random.Random(seed)
    found = random_graph(rng, 6)
    prices = random_prices(rng, found, 1000)  # what damage costs is rounded to nanoseconds
    damages = {unit.name: float(rng.randint(0, 20)) for unit in found}

    wide = {}
    for unit in found[: rng.choice((0, 3))]:  # these may have another form, slower and closer, or not
        prices.in_uint8[unit.name] = prices.in_integers[unit.name] + 1000 * rng.randint(0, 10)
        wide[unit.name] = damages[unit.name] * rng.choice((0.25, 0.5, 1.25))

    def point(floats: frozenset[str], uint8: Collection[str]) -> tuple[int, float]:
        left = [name for name in damages if name not in floats]
        return price(found, prices, floats, uint8), sum((wide if n in uint8 else damages)[n] for n in left)

    points = [point(mixture.floats, mixture.uint8) for mixture in hull(found, prices, damages, wide)]
    assert points == sorted(points)
    forms = [frozenset(c) for size in range(len(wide) + 1) for c in itertools.combinations(wide, size)]
    everything = [point(f, form - f) for f in every_placement(found) for form in forms]
    assert points[0][0] == min(time for time, _ in everything)
    assert any(damage == 0 for _, damage in points)
    for weight in (10.0, 100.0, 500.0, 1000.0, 2000.0, 10000.0):  # whatever damage costs, the best is among them
        best = min(time + weight * damage for time, damage in everything)
        assert min(time + weight * damage for time, damage in points) == pytest.approx(best)


def test_a_layer_that_ruins_an_output_is_the_first_in_float() -> None:
    found, prices = chain((50, 10), (50, 10), (50, 10))
    points = hull(found, prices, {"n0": 0.1, "n1": float("inf"), "n2": 0.2})
    assert points[0].floats == frozenset(), "nothing weighs anything there"
    assert all("n1" in mixture.floats for mixture in points[1:])


def chain(*sides: tuple[int, int]) -> tuple[list[Unit], Prices]:
    """Units one after the other, each (in float, in integers); every conversion costs 10."""
    graph = helper.make_graph(
        [helper.make_node("Relu", [f"v{i}"], [f"v{i + 1}"], name=f"n{i}") for i in range(len(sides))],
        "g",
        [helper.make_tensor_value_info("v0", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info(f"v{len(sides)}", TensorProto.FLOAT, ["n"])],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    found = []
    for node in list(model.graph):
        value = node.inputs[0]
        assert value is not None
        found.append(Unit(str(node.name), True, (node,), (value,), node.outputs[0], True))
    prices = Prices()
    for unit, (slow, fast) in zip(found, sides, strict=True):
        prices.in_float[unit.name], prices.in_integers[unit.name] = slow, fast
    for border in borders(found):
        prices.quantize[border.value] = 10
        for name in ("", *(reader.name for reader in border.readers)):
            prices.dequantize[border.value, name] = 10
    return found, prices


def test_a_gain_smaller_than_its_conversions_stays_in_float() -> None:
    assert cut(*chain((15, 0))) == {"n0"}
    assert cut(*chain((25, 0))) == frozenset()
    assert cut(*chain((15, 0), (15, 0))) == frozenset(), "two in a row share the conversions"
    assert cut(*chain((50, 0), (0, 5), (50, 0))) == frozenset(), "one that loses less than converting around it"
    assert cut(*chain((50, 0), (0, 25), (50, 0))) == {"n1"}


# The table


def pricing(table: CostTable | None = None) -> tuple[Pricing, ir.Model, ir.Model]:
    exact = graphopt.optimize(DIGITS, time=0).ir_model
    made = graphopt.quantize(DIGITS, **DATA, time=0, verify="off").ir_model
    found = units(place(exact, get_target("ort-cpu")), get_target("ort-cpu"))
    known = shapes(to_proto(exact), {"image": (1, 1, 8, 8)})
    return Pricing(table or CostTable(this_machine(1)), exact, found, known, "auto", 1), exact, made


def test_what_runs_show_prices_every_unit_and_conversion() -> None:
    found, _, made = pricing()
    assert not found.complete()
    found.observe([made], [{"image": np.zeros((1, 1, 8, 8), np.float32)}], 0.1)
    found.estimate_conversions()
    assert found.complete()
    prices = found.prices()
    names = {unit.name for unit in found.units}
    assert {"/stem/Conv", "/block1/Add", "/head/Gemm"} <= names
    assert prices.in_float.keys() == prices.in_integers.keys() == names
    heavy = [unit.name for unit in found.units if unit.layer]
    assert all(prices.in_float[name] > 0 and prices.in_integers[name] > 0 for name in heavy)
    assert all(border.value in prices.quantize for border in found.borders if border.readers)
    heaviest = max(heavy, key=lambda name: prices.in_float[name])
    assert heaviest.startswith("/block2/conv"), "the layer with the most multiplications"
    assert any(prices.dequantize.values())


def test_entries_of_other_models_stay_in_the_cache() -> None:
    found, _, made = pricing(CostTable(this_machine(1), {"Conv of another model": 1}))
    found.observe([made], [{"image": np.zeros((1, 1, 8, 8), np.float32)}], 0.05)
    assert "Conv of another model" not in found.own().entries
    assert found.own().entries.keys() == found.table.entries.keys() - {"Conv of another model"}


def test_layers_alike_share_an_entry_and_others_do_not() -> None:
    found, _, _ = pricing()
    by_name = {unit.name: found.unit_key(unit, integer=True) for unit in found.units}
    assert by_name["/block1/conv1/Conv"] != by_name["/block2/conv1/Conv"]
    keys = {side: found.unit_key(found.units[0], integer=side) for side in (True, False)}
    assert keys[True] != keys[False]
    assert "Relu" in by_name["/stem/Conv"], "a region is a layer with what it absorbs"


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = CostTable({"cpu": "x"}, {"b": 2, "a": 1}, {"model": [{"float": ["n"], "ratio": 0.5}]})
    table.write(tmp_path / "t.json")
    assert read_table(tmp_path / "t.json") == table
    assert read_table(tmp_path / "t.json").sha256 == table.sha256
    table.entries["a"] = 3
    assert read_table(tmp_path / "t.json").sha256 != table.sha256


def test_what_was_measured_is_kept_for_the_next_model(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = this_machine(1)
    assert cached(machine).entries == {}
    keep(CostTable(machine, {"a": 1}, {"m": []}))
    assert cached(machine) == CostTable(machine, {"a": 1})
    assert cache_path(machine).is_relative_to(cache_folder)
    assert cached(this_machine(2)).entries == {}, "other threads, other times"
    cache_path(machine).write_text("{")
    assert cached(machine).entries == {}
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    keep(CostTable(machine, {"a": 1}))  # nowhere to write: no error


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_the_cache_is_where_the_platform_has_it(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(costs.sys, "platform", platform)
    expected = {"linux": ".cache", "darwin": "Library/Caches", "win32": "AppData/Local"}[platform]
    assert cache_path({}).parent == Path.home() / expected / "graphopt"


# The whole


def mixed() -> onnx.ModelProto:
    """A convolution worth its integers, then a depthwise one between operators that only run in float."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> Any:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / 24, name)

    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="heavy", pads=[1, 1, 1, 1]),
        helper.make_node("Erf", ["a"], ["b"], name="e1"),
        helper.make_node("Conv", ["b", "w2"], ["c"], name="light", group=64),
        helper.make_node("Erf", ["c"], ["y"], name="e2"),
    ]
    shape = ["n", 64, 40, 40]
    graph = helper.make_graph(
        nodes,
        "mixed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [weight("w1", 64, 64, 3, 3), weight("w2", 64, 1, 1, 1)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def mixture(workplace: Path) -> list[str]:
    """A command that quantizes :func:`mixed` by measured cost."""
    onnx.save(mixed(), "m.onnx")
    np.savez("d.npz", x=np.random.default_rng(1).standard_normal((6, 64, 40, 40)).astype(np.float32))
    return ["quantize", "m.onnx", "-o", "q.onnx", "--data", "d.npz", "--placement", "measured", "--json"]


def test_what_only_pays_for_conversions_stays_in_float(mixture: list[str]) -> None:
    ran = run_cli(*mixture, "--time", "0.3", "--allow-slower", "--cost-table", "t.json")
    assert ran.code == 0, ran.err
    check(ran.json, "made")
    found = ran.json["placement"]
    table = found["cost_table"]
    assert table["entries"] == json.loads(Path("t.json").read_text())["entries"]
    names = [candidate["name"] for candidate in found["candidates"]]
    assert names[0] == "rules"
    assert found["chosen"] in names
    assert found["all_float"]["low"] <= found["all_float"]["median"] <= found["all_float"]["high"]
    fastest = min((c["ratio"] for c in found["candidates"]), key=lambda ratio: ratio["median"])
    chosen = next(c for c in found["candidates"] if c["name"] == found["chosen"])
    assert chosen["ratio"]["low"] <= fastest["high"], "what is measured best is kept, or what cannot be told from it"
    if "cut 1" in names:  # it is only built where the heavy one is worth its integers
        assert found["left_in_float"] == ["light"] or found["chosen"] == "rules"


def test_the_same_table_makes_the_same_bytes(mixture: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_cli(*mixture, "--time", "0.1", "--allow-slower", "--cost-table", "t.json").code == 0
    first = Path("q.onnx").read_bytes()
    before = Path("t.json").read_bytes()
    monkeypatch.setattr(Pricing, "observe", lambda *_: pytest.fail("a table that is given is not measured again"))
    for name in ("a.onnx", "b.onnx"):
        ran = run_cli(*mixture[:3], name, *mixture[4:], "--time", "0", "--cost-table", "t.json")
        assert ran.code == 0, ran.err
        assert Path(name).read_bytes() == first
        assert ran.json["placement"]["cost_table"]["source"] == "t.json"
    assert Path("t.json").read_bytes() == before


@pytest.mark.parametrize("dear", ["heavy", "light"])
def test_the_table_decides(dear: str, mixture: list[str]) -> None:
    assert run_cli(*mixture, "--time", "0.1", "--allow-slower", "--cost-table", "t.json").code == 0
    table = json.loads(Path("t.json").read_text())
    table["wholes"] = {}
    for key in table["entries"]:
        of_heavy = "group=64" not in key
        if key.startswith("Conv"):
            costly = (of_heavy == (dear == "heavy")) == key.endswith("auto")
            table["entries"][key] = 10_000_000 if costly else 1
        else:
            table["entries"][key] = 10
    Path("t.json").write_text(json.dumps(table))
    ran = run_cli(*mixture, "--time", "0", "--cost-table", "t.json")
    assert ran.code == 0, ran.err
    assert ran.json["placement"]["left_in_float"] == [dear]
    made = onnx.load("q.onnx")
    quantized = {i for node in made.graph.node if node.op_type == "DequantizeLinear" for i in node.output}
    in_integers = {node.name for node in made.graph.node if node.op_type == "Conv" and node.input[1] in quantized}
    assert in_integers == {"heavy", "light"} - {dear}
    entry = next(e for e in ran.json["ledger"] if e["pass"] == "quantize-static")
    assert entry["nodes"][1] == ran.json["output"]["nodes"], "the ledger tells of what was handed over"


def test_a_budget_holds_whatever_is_fastest(planted: Path) -> None:
    options = {**DATA, "time": 0.1, "allow_slower": True, "placement": "measured"}
    plain = graphopt.quantize(planted, **{**DATA, "time": 0})
    wanted = plain.report["comparison"]["outputs"][0]["sqnr_db"] + 6
    result = graphopt.quantize(planted, **options, min_sqnr=wanted)
    assert result.report["comparison"]["outputs"][0]["sqnr_db"] >= wanted
    found = result.report["placement"]
    tried = {c["name"]: c for c in found["candidates"]}
    assert tried["rules"]["holds"] is True, "the layers that hurt went back to float before"
    assert next(c for c in found["candidates"] if c["name"] == found["chosen"])["holds"] is True
    entry = next(e for e in result.report["ledger"] if e["pass"] == "quantize-static")
    assert {s["site"] for s in entry["skipped"] if "left in float" in s["reason"]} & PLANTED


BAD: dict[str, tuple[list[Any], str]] = {
    "placement": (["--placement", "best"], "--placement"),
    "dynamic": (["--placement", "measured", "--mode", "dynamic"], "--mode dynamic has none"),
    "untimed": (["--placement", "measured", "--time", "0"], "--time 0 forbids it"),
    "table-of-rules": (["--placement", "rules", "--cost-table", "t.json"], "leave out --placement rules"),
    "table-of-another": (["--cost-table", "t.json", "--target", "ort-arm64"], "--cost-table measures this machine"),
    "no-table": (["--placement", "measured", "--cost-table", DEMO / "int8.toml"], "is no cost table"),
    "table-nowhere": (["--placement", "measured", "--cost-table", "no/t.json"], "mkdir -p no"),
    "table-version": (["--placement", "measured", "--cost-table", "old.json"], "version 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_placed_is_one_line(name: str, workplace: Path, untouched: Watch) -> None:
    Path("old.json").write_text('{"version": 0}')
    arguments, fragment = BAD[name]
    with untouched(workplace):
        ran = run_cli("quantize", DIGITS, "-o", "q.onnx", "--data", DATA["data"], *arguments)
    assert ran.code == 2, ran.err
    assert fragment in ran.error


def test_a_plan_takes_the_same_options(workplace: Path) -> None:
    assert run_cli("quantize", DIGITS, "--dry-run", "--placement", "measured", "--allow-slower", "-q").code == 0
