"""The HTML report: complete, harmless, alone in the world, and the same in every theme of a real browser."""

from __future__ import annotations

import copy
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MODELS, run_cli

from graphopt import api
from graphopt.errors import GateFailed, InputError, NothingDone
from graphopt.report.html import render, write
from graphopt.report.regions import changed_regions
from graphopt.report.units import ratio, size

DEMO = Path(api.__file__).parent / "demo"
EVIL = "<script>alert(1)</script>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "input", "br"}
DRAWN = {"line", "rect", "circle", "path"}
"""Elements of SVG that close themselves."""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    result = api.quantize(
        DEMO / "digits.onnx",
        data=DEMO / "calibration.npz",
        eval_data=DEMO / "evaluation.npz",
        samples=64,
        metric="accuracy",
        max_drop="5%",
        time=0.1,
        allow_slower=True,
    )
    result.save(tmp_path_factory.mktemp("out") / "digits.int8.onnx")
    return result.report


class Reader(HTMLParser):
    """Text, elements and their nesting."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(page)
        self.close()
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in DRAWN
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.pieces.append(data)


def test_has_the_numbers_of_the_report(quantized: dict[str, Any]) -> None:
    page = render(quantized)
    reader = Reader(page)
    assert reader.open == []
    before, after, m = quantized["input"], quantized["output"], quantized["metric"]
    expected = [
        size(before["bytes"]),
        size(after["bytes"]),
        ratio(after["bytes"], before["bytes"]),
        f"{quantized['latency_ratio']['median']:.3f}x",
        f"{m['original']:.4f} → {m['candidate']:.4f}",
        f"95 %: {m['low']:+.4f} to {m['high']:+.4f}",
        f"{quantized['comparison']['outputs'][0]['sqnr_db']:.1f} dB",
        after["sha256"],
        quantized["data"]["sha256"],
        "The gate holds",
        quantized["versions"]["onnxruntime"],
        "DequantizeLinear",
    ]
    for entry in quantized["ledger"]:
        expected += [entry["pass"], entry["status"]]
        expected += [change["site"] for change in entry["changes"]]
        expected += [text for skip in entry["skipped"] for text in skip.values() if text != "(graph)"]
    assert [text for text in expected if text not in reader.text] == []
    assert len(page) < 1_000_000


def test_layers_are_columns(quantized: dict[str, Any]) -> None:
    entry = next(e for e in quantized["ledger"] if e["pass"] == "quantize-static")
    detail = entry["changes"][0]["detail"]
    found = re.fullmatch(r"Conv: (\w+) weights \(([\d.]+ dB)\), input range (\[.*\]) \(([\d.]+ dB)\)", detail)
    assert found is not None
    section = render(quantized).partition('id="layers"')[2].partition("</section>")[0]
    row = section.partition("<tbody>")[2].partition("</tr>")[0]
    assert all(f">{text}<" in row for text in found.groups())
    assert f'data-v="{found[2].removesuffix(" dB")}"' in row


def test_is_deterministic_and_leaves_the_report_alone(quantized: dict[str, Any]) -> None:
    before = copy.deepcopy(quantized)
    assert render(quantized) == render(copy.deepcopy(quantized))
    assert quantized == before
    assert render(json.loads(json.dumps(quantized))) == render(quantized)


def test_needs_nothing_from_elsewhere(quantized: dict[str, Any]) -> None:
    page = render(quantized)
    for tag, attributes in Reader(page).seen:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:,")), (tag, name, value)
    assert not re.search(r"https?://|@import|url\(", page)
    assert "default-src 'none'" in page


def test_names_are_text_and_never_markup(quantized: dict[str, Any]) -> None:
    report = copy.deepcopy(quantized)

    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k if k in keys else f"{k}{EVIL}": poison(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v, key) for v in value]
        kept = key in ("verb", "status", "max_drop") or (key == "pass" and value.startswith("quantize-"))
        return value + EVIL if isinstance(value, str) and not kept else value

    keys = _keys(quantized) - set(quantized["input"]["operators"])
    poisoned = poison(report)
    poisoned["ledger"][0]["changes"][0]["site"] = '"><img src=x onerror=alert(1)>'
    page = render(poisoned)
    reader = Reader(page)
    assert [tag for tag, _ in reader.seen].count("script") == 1
    assert "img" not in [tag for tag, _ in reader.seen]
    assert page.count(html.escape(EVIL)) > 100
    assert not any(name.startswith("on") for _, attributes in reader.seen for name in attributes)


def _keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | set().union(*(_keys(v) for v in value.values()))
    return set().union(*(_keys(v) for v in value)) if isinstance(value, list) else set()


def test_a_failed_gate_is_the_headline() -> None:
    with pytest.raises(GateFailed) as caught:
        api.quantize(
            DEMO / "digits.onnx", data=DEMO / "calibration.npz", samples=16, max_size="0.01", min_sqnr=5, time=0
        )
    report = caught.value.report
    assert report is not None
    text = Reader(render(report)).text
    assert "1 gate failed: nothing was written" in text
    assert "digits.onnx → nothing written" in text
    assert str(caught.value) in text
    assert text.count("holds") == 1
    assert "Latency" not in text  # time=0


def test_nothing_done_is_said_with_its_reasons() -> None:
    with pytest.raises(NothingDone) as caught:
        api.quantize(DEMO / "digits.onnx", mode="dynamic", include=["/stem/Conv"], time=0)
    assert caught.value.report is not None
    text = Reader(render(caught.value.report)).text
    assert "Nothing was done" in text
    assert "ConvInteger is slower than its float Conv" in text


def test_compare_has_no_ledger(quantized: dict[str, Any]) -> None:
    result = api.compare(
        DEMO / "digits.onnx", quantized["output"]["path"], data=DEMO / "evaluation.npz", samples=16, metric="accuracy"
    )
    reader = Reader(render(result.report))
    assert "digits.onnx against digits.int8.onnx" in reader.text
    assert "No tolerance was asked for" in reader.text
    assert not {"passes", "layers", "latency"} & {attributes.get("id") for _, attributes in reader.seen}
    same = api.compare(DEMO / "digits.onnx", DEMO / "digits.onnx", samples=2)
    assert "The outputs are identical" in Reader(render(same.report)).text


def test_exact_passes_only() -> None:
    text = Reader(render(api.optimize(DEMO / "digits.onnx", time=0).report)).text
    assert "fuse-batchnorm" in text
    assert "Quantized layers" not in text


def test_a_reverted_pass_and_what_could_not_be_measured(quantized: dict[str, Any]) -> None:
    report = copy.deepcopy(quantized)
    entry = report["ledger"][1]
    entry.update(status="partly reverted", reason="output 'logits' differs", reproducer="/tmp/reproducer")
    report["metric"].update(low=float("nan"), high=np.float32("nan"), difference=np.float64(-0.5))
    report["comparison"]["outputs"] += [
        {**report["comparison"]["outputs"][0], "output": "b", "mismatch": "float32[2] became float32[3]"},
        {**report["comparison"]["outputs"][0], "output": "c", "nondeterministic": True},
    ]
    report["notes"].append("WARNING: output 'b' has little left of the original")
    page = render(report)
    text = Reader(page).text
    for expected in ("partly reverted", "output 'logits' differs", "/tmp/reproducer", "float32[2] became float32[3]"):
        assert expected in text
    assert "1 warning output 'b' has little left" in text
    assert "-0.5000" in text
    assert "nan" not in text.lower().replace("nan and infinities", "")  # what the passes were verified on
    assert page.count("<details open>") == 1


def test_what_a_quantizing_pass_says_otherwise_is_shown_as_it_is(quantized: dict[str, Any]) -> None:
    report = copy.deepcopy(quantized)
    entry = report["ledger"][-1]
    entry["changes"] = [
        {"action": "quantize", "site": "a", "detail": "MatMul: u8 weights, input rounded at run time"},
        {"action": "quantize", "site": "b", "detail": "in a way of its own"},
    ]
    section = render(report).partition('id="layers"')[2].partition("</section>")[0]
    text = Reader(f"<section>{section.partition('>')[2]}</section>").text
    assert "input rounded at run time" in text
    assert "in a way of its own" in text
    assert "SQNR" not in text


def test_sizes_by_type_are_a_waterfall(quantized: dict[str, Any]) -> None:
    report = copy.deepcopy(quantized)
    report["input"]["bytes_by_type"] = {"FLOAT": 4000, "INT64": 16}
    report["output"]["bytes_by_type"] = {"FLOAT": 400, "UINT8": 900, "INT64": 16}
    text = Reader(render(report)).text
    falls = text.partition("Weights by type")[2].partition("Initializers, pass by pass")[0]
    assert falls.endswith("original 4.02 kB UINT8 +900 B FLOAT −3.60 kB result 1.32 kB ")


def section(page: str, name: str) -> Reader:
    """One part of a page."""
    found = re.search(f'<section id="{name}"[^>]*>.*?</section>', page, re.DOTALL)
    assert found is not None, name
    return Reader(found[0])


def test_every_chosen_range_is_a_picture(quantized: dict[str, Any]) -> None:
    ranges = quantized["ledger"][-1]["metrics"]["ranges"]
    part = section(render(quantized), "activations")
    assert len(ranges) > 8
    assert [a["class"] for tag, a in part.seen if a.get("class") == "hist"] == ["hist"] * len(ranges)
    assert [r["sqnr_db"] for r in ranges] == sorted(r["sqnr_db"] for r in ranges)
    for one in ranges:
        assert len(one["histogram"]) in (1, 48)
        assert one["value"] in part.text
        assert f"range {one['low']:.3g} to {one['high']:.3g}" in part.text
        assert f"{one['sqnr_db']:.1f} dB" in part.text
    paths = [a["d"] or "" for tag, a in part.seen if a.get("class") == "area"]
    assert [path.count("h1") for path in paths] == [len(one["histogram"]) for one in ranges]
    assert "ranges" not in section(render(quantized), "passes").text, "they are pictures, no row of numbers"


def test_what_is_clipped_is_shaded(quantized: dict[str, Any]) -> None:
    report = copy.deepcopy(quantized)
    one = report["ledger"][-1]["metrics"]["ranges"][0]
    one.update(low=0.0, high=6.0, min=-2.0, max=8.0, clipped=0.25, sqnr_db=None)
    report["ledger"][-1]["metrics"].update(ranges=[one], ranges_left_out=7)
    part = section(render(report), "activations")
    cuts = [(a.get("x"), a["width"]) for tag, a in part.seen if a.get("class") == "cut"]
    assert cuts == [(None, "20.0%"), ("80.0%", "20.0%")]
    assert [a["x1"] for tag, a in part.seen if a.get("class") == "gate"] == ["20.0%", "80.0%"]
    assert "25 % clipped" in part.text
    assert "exact" in part.text
    assert "7 more have a higher one" in part.text


@pytest.fixture(scope="module")
def ranked() -> dict[str, Any]:
    return api.sensitivity(str(DEMO / "digits.onnx"), data=str(DEMO / "calibration.npz"), samples=16)


def test_sensitivity_is_bars_and_a_table(ranked: dict[str, Any]) -> None:
    page = render(ranked)
    part = section(page, "sensitivity")
    worst = ranked["layers"][0]
    total = sum(layer["damage"] for layer in ranked["layers"])
    assert all(part.text.count(layer["layer"]) >= 1 for layer in ranked["layers"])
    assert f"{100 * worst['damage'] / total:.1f} %, {worst['sqnr_db']:.1f} dB" in part.text
    widths = [float((a["width"] or "").rstrip("%")) for tag, a in part.seen if tag == "rect"]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == 100
    assert "digits.onnx: graphopt sensitivity" in page
    report = {**ranked, "suggested": [worst["layer"]]}
    assert f"1 of {len(ranked['layers'])} layers does" in Reader(render(report)).text
    assert section(render(report), "sensitivity").text.count("leave in float") == 2
    alike = Reader(render({**ranked, "suggested": []})).text
    assert f"{len(ranked['layers'])} layers hurt about alike" in alike


def test_a_search_for_a_budget_shows_what_it_ranked(quantized: dict[str, Any], ranked: dict[str, Any]) -> None:
    report = copy.deepcopy(quantized)
    report["sensitivity"] = ranked["layers"]
    name = ranked["layers"][0]["layer"]
    report["ledger"][-1]["skipped"].append({"site": name, "reason": "Conv: left in float to keep to the budget: ..."})
    assert section(render(report), "sensitivity").text.count("left in float") == 2
    assert "sensitivity" not in [a.get("id") for _, a in Reader(render(quantized)).seen]


@pytest.fixture(scope="module")
def layer_by_layer(quantized: dict[str, Any]) -> dict[str, Any]:
    b = quantized["output"]["path"]
    return api.compare(DEMO / "digits.onnx", b, data=DEMO / "evaluation.npz", samples=4, layerwise=True).report


def test_layer_by_layer_is_a_chart_and_a_table(layer_by_layer: dict[str, Any]) -> None:
    found = layer_by_layer["layers"]
    part = section(render(layer_by_layer), "layerwise")
    (path,) = [a["d"] or "" for tag, a in part.seen if a.get("class") == "area"]
    assert path.count("h1") == len(found["values"])
    heights = [100 - int(h) for h in re.findall(r"V(\d+)h1", path)]
    known = {h: v["lowest_sqnr_db"] for h, v in zip(heights, found["values"], strict=True) if v["lowest_sqnr_db"]}
    assert sorted(known) == sorted(known, key=known.__getitem__), "a higher column is a higher SQNR"
    differing = [v for v in found["values"] if v["differs"]]
    assert all(v["value"] in part.text for v in differing)
    assert f"first value that differs: {found['first']['value']}" in part.text
    assert "falls most" in part.text
    assert all(name in part.text for name in found["unmatched"])


def test_the_changed_graph_is_drawn(quantized: dict[str, Any]) -> None:
    changed = changed_regions(DEMO / "digits.onnx", quantized["output"]["path"])
    page = render(quantized, changed=changed)
    part = section(page, "changed")
    assert f"Nodes: {changed['added']} added, {changed['removed']} removed" in part.text
    kinds = [n["kind"] for region in changed["regions"] for n in region["nodes"]]
    for kind, sign in (("added", "+"), ("removed", "−")):
        assert [a.get("class") for tag, a in part.seen if tag == "g"].count(f"node {kind}") == kinds.count(kind) > 0
        assert f"{sign} " in part.text, "said in words, not by colour alone"
    assert all(region["operator"] in part.text for region in changed["regions"])
    assert 'href="#changed"' in page
    assert "bodies of If" not in part.text
    branching = {**quantized, "input": {**quantized["input"], "operators": {"If": 1}}}
    assert "bodies of If" in section(render(branching, changed=changed), "changed").text
    assert page == render(quantized, changed=copy.deepcopy(changed))
    assert "Not drawn: too big." in Reader(render(quantized, changed={**changed, **NOTHING, "why": "too big"})).text
    assert 'id="changed"' not in render(quantized, changed={**changed, **NOTHING})


NOTHING = {"added": 0, "removed": 0, "changed": 0, "regions": [], "left_out": 0, "why": None}


def test_hostile_names_in_a_drawn_graph(quantized: dict[str, Any]) -> None:
    changed = changed_regions(DEMO / "digits.onnx", quantized["output"]["path"])
    for region in changed["regions"]:
        region["names"] = [EVIL]
        for node in region["nodes"]:
            node.update(name=EVIL, operator=EVIL, detail=EVIL, title=f'"><img src=x onerror=alert(1)>{EVIL}')
    reader = Reader(render(quantized, changed=changed))
    assert [tag for tag, _ in reader.seen].count("script") == 1
    assert "img" not in [tag for tag, _ in reader.seen]


def test_inspect_is_a_page(workplace: Path) -> None:
    report = api.inspect(MODELS / "encoder.onnx", tree=True)
    text = Reader(render(report)).text
    assert "encoder.onnx: graphopt inspect" in render(report)
    for expected in (report["producer"], size(report["weight_bytes"]), "Modules", "Largest tensors", "Operators"):
        assert expected in text
    assert all(tensor["name"] in text for tensor in report["largest"])
    assert all(name in text for name in report["operators"])
    node = next(iter(report["outputs"]))["name"]
    assert "reads" in Reader(render(api.inspect(MODELS / "encoder.onnx", node=node))).text
    both = {"schema_version": 1, "models": [report, api.inspect(MODELS / "gru.onnx")]}
    assert "gru.onnx" in Reader(render(both)).text
    evil = {**report, "producer": EVIL, "inputs": [{"name": EVIL, "type": EVIL, "shape": [EVIL]}]}
    assert [tag for tag, _ in Reader(render(evil)).seen].count("script") == 1


def test_diff_is_a_page() -> None:
    report = api.diff(MODELS / "shared.onnx", MODELS / "metadata.onnx").as_dict()
    text = Reader(render(report)).text
    assert f"{report['differences']} differences" in text
    assert "shared.onnx against metadata.onnx" in text
    assert all(one["name"] in text for one in report["nodes"])
    same = api.diff(MODELS / "shared.onnx", MODELS / "shared.onnx").as_dict()
    assert "No difference" in Reader(render(same)).text


def test_a_page_stays_small(quantized: dict[str, Any]) -> None:
    report = copy.deepcopy(quantized)
    changes = [{"action": "fold", "site": f"/model/layer/{i}/Constant", "detail": "x"} for i in range(12_000)]
    report["ledger"][0]["changes"] = changes
    page = render(report)
    assert len(page) < 300_000
    assert "and 11600 more; --json has all" in page
    assert "12000 changes" in page


def test_writing_is_all_or_nothing(quantized: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write(quantized, page)
    assert page.read_text(encoding="utf-8") == render(quantized)
    with pytest.raises(InputError, match=r"cannot write .*name another file"):
        write(quantized, tmp_path)
    with pytest.raises(KeyError):
        write({"verb": "quantize"}, page)
    assert page.read_text(encoding="utf-8") == render(quantized)
    assert list(tmp_path.iterdir()) == [page]


def _luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = digits if len(digits) == 6 else "".join(2 * c for c in digits)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_has_contrast(quantized: dict[str, Any], theme: int) -> None:
    found = re.findall(r"--([\w-]+):light-dark\((#\w+),(#\w+)\)", render(quantized))
    colours = {name: _luminance((light, dark)[theme]) for name, light, dark in found}
    surfaces = {"ink": ("bg", "card", "plain-bg", "bad-bg", "warn-bg", "good-bg"), "soft": ("bg", "card")}
    surfaces |= {"blue": ("bg", "card"), **{tone: ("card", f"{tone}-bg") for tone in ("good", "bad", "warn")}}
    for ink, backgrounds in surfaces.items():
        for background in backgrounds:
            high, low = sorted((colours[ink], colours[background]), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, background)


# On the command line.


def test_every_verb_that_makes_or_compares_writes_it(workplace: Path) -> None:
    digits = DEMO / "digits.onnx"
    Path("r.toml").write_text(f'model = "{digits.as_posix()}"\noutput = "r.onnx"\n[[pass]]\nuse = "fold-constants"\n')
    for verb, *arguments in (
        ("optimize", digits, "-o", "o.onnx", "--time", "0", "-q"),
        ("quantize", digits, "-o", "q.onnx", "--data", DEMO / "calibration.npz", "--samples", "8", "--time", "0"),
        ("run", "r.toml", "--time", "0", "--json"),
        ("compare", digits, "o.onnx", "--samples", "2"),
        ("demo", "--json"),
        ("inspect", digits),
        ("diff", digits, "o.onnx"),
        ("extract", digits, "--outputs", "/stem/Conv_output_0", "-o", "e.onnx"),
        ("sensitivity", digits, "--data", DEMO / "calibration.npz", "--samples", "8", "--json"),
    ):
        ran = run_cli(verb, *arguments, "--report", f"{verb}.html")
        assert ran.code == (verb == "diff"), ran.err
        page = Reader(Path(f"{verb}.html").read_text(encoding="utf-8")).text
        assert page.partition("graphopt ")[2].startswith("run" if verb == "demo" else verb)
        assert ("The graph where it changed" in page) == (verb in ("optimize", "quantize", "run", "demo", "diff"))
        if "output" in (ran.json if "--json" in arguments else {}):
            assert ran.json["output"]["sha256"] in page
    assert not [p for p in workplace.iterdir() if p.suffix == ".tmp"]


def test_a_failed_gate_and_nothing_done_are_pages_too(workplace: Path) -> None:
    common = ("quantize", DEMO / "digits.onnx", "-o", "q.onnx", "--time", "0", "-q", "--report", "r.html")
    ran = run_cli(*common, "--data", DEMO / "calibration.npz", "--samples", "8", "--max-size", "0.01")
    assert ran.code == 1
    assert "1 gate failed: nothing was written" in Path("r.html").read_text(encoding="utf-8")
    assert run_cli(*common, "--mode", "dynamic", "--include", "/stem/Conv").code == 3
    assert "Nothing was done" in Path("r.html").read_text(encoding="utf-8")
    assert [p.name for p in workplace.iterdir()] == ["r.html"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("r.json", "--report r.json: the report is one HTML page; name it FILE.html"),
        ("none/r.html", "the folder of none/r.html does not exist; make it first: mkdir -p none"),
        ("folder.html", "folder.html is a folder"),
    ],
)
def test_where_it_cannot_go_is_told_before_the_work(workplace: Path, name: str, said: str) -> None:
    Path("folder.html").mkdir()
    digits = DEMO / "digits.onnx"
    data = DEMO / "calibration.npz"
    for verb in (
        *(["optimize", digits, "-o", "o.onnx"], ["compare", digits, "o.onnx"], ["diff", digits, digits]),
        *(["inspect", digits], ["sensitivity", digits, "--data", data]),
        ["extract", digits, "--outputs", "/stem/Conv_output_0", "-o", "o.onnx"],
    ):
        ran = run_cli(*verb, "--report", name)
        assert ran.code == 2
        assert said in ran.error
    assert [p.name for p in workplace.iterdir()] == ["folder.html"]


def test_a_dry_run_has_no_page(workplace: Path) -> None:
    ran = run_cli("quantize", DEMO / "digits.onnx", "--dry-run", "--report", "r.html")
    assert ran.code == 2
    assert "--dry-run makes no report; leave --report out" in ran.error
    assert not list(workplace.iterdir())


# In a browser.

PROBE = """
<script>
function cells(n) { return Array.from(document.querySelectorAll("#layers tbody tr")).filter(r => !r.hidden)
  .map(r => r.cells[n].textContent); }
const told = {theme: [], names: cells(0)};
const toggle = document.getElementById("theme");
for (let i = 0; i < 3; i++) {
  toggle.click();
  told.theme.push([document.documentElement.dataset.theme || "auto", getComputedStyle(document.body).backgroundColor]);
}
const head = document.querySelectorAll("#layers thead th")[1];
head.querySelector("button").click();
told.up = cells(1); told.sorted = head.getAttribute("aria-sort");
head.querySelector("button").click(); told.down = cells(1);
head.querySelector("button").click(); told.back = cells(0);
const box = document.querySelector("#layers input");
box.value = "BLOCK1 conv2"; box.dispatchEvent(new Event("input"));
told.found = cells(0); told.count = document.querySelector("#layers [aria-live]").textContent;
document.getElementById("all").click();
told.open = Array.from(document.querySelectorAll("#passes details")).every(d => d.open);
told.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
document.body.append(Object.assign(document.createElement("pre"), {id: "told", textContent: JSON.stringify(told)}));
</script>
"""


def _browse(page: Path, folder: Path, *options: str) -> str:
    """The page's DOM once its script has run; a message on its console is an error."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
            *("--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'profile'}"),
            *("--enable-logging=stderr", "--v=0", *options, "--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    return done.stdout


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; apt-get install chromium")


@needs_browser
def test_in_a_browser(quantized: dict[str, Any], tmp_path: Path) -> None:
    write(quantized, tmp_path / "report.html")
    dom = _browse(tmp_path / "report.html", tmp_path)
    text = Reader(dom.partition("<html")[1] + dom.partition("<html")[2]).text
    for expected in (size(quantized["output"]["bytes"]), quantized["output"]["sha256"], "Theme: auto", "Open all"):
        assert expected in text


@needs_browser
def test_its_controls_in_a_browser(quantized: dict[str, Any], tmp_path: Path) -> None:
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", render(quantized))
    (tmp_path / "report.html").write_text(page.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    dom = _browse(tmp_path / "report.html", tmp_path, "--window-size=500,900")
    told = json.loads(html.unescape(dom.partition('<pre id="told">')[2].partition("</pre>")[0]))
    assert [name for name, _ in told["theme"]] == ["light", "dark", "auto"]
    assert told["theme"][0][1] != told["theme"][1][1]
    up = [float(text.split()[0]) for text in told["up"]]
    assert up == sorted(up)
    assert told["sorted"] == "ascending"
    assert [float(text.split()[0]) for text in told["down"]] == up[::-1]
    assert told["back"] == told["names"]
    assert told["found"] == ["/block1/conv2/Conv"]
    assert told["count"] == f"1 of {len(told['names'])}"
    assert told["open"]
    assert told["wide"] == 0, "the page scrolls sideways on a narrow screen"


@needs_browser
def test_a_hostile_model_in_a_browser(quantized: dict[str, Any], tmp_path: Path) -> None:
    report = copy.deepcopy(quantized)
    for change in report["ledger"][-1]["changes"]:
        change["site"] = f"<img src=x onerror=\"document.title='owned'\">{EVIL}"
    write(report, tmp_path / "report.html")
    dom = _browse(tmp_path / "report.html", tmp_path)
    assert "<title>owned" not in dom
    assert html.escape(EVIL, quote=False) in dom


PHONE = """
<script>
const told = {inner: innerWidth, wide: document.documentElement.scrollWidth, over: []};
for (const e of document.querySelectorAll("main > section, header > *, h1, p, li, figcaption, dl")) {
  const right = e.getBoundingClientRect().right;
  if (right > innerWidth + 0.5 && !e.closest(".scroll")) told.over.push(e.tagName + " " + e.textContent.slice(0, 40));
}
const drawn = Array.from(document.querySelectorAll("path.edge"));
told.filled = drawn.filter(e => getComputedStyle(e).fill !== "none").length;
const pre = parent.document.createElement("pre");
parent.document.body.append(Object.assign(pre, {id: "told", textContent: JSON.stringify(told)}));
</script>
"""
FRAME = '<!doctype html><body><iframe width="390" height="844" style="border:0" srcdoc="{}"></iframe></body>'
"""A phone: a window of Chromium's own is never narrower than 500 pixels."""


@needs_browser
@pytest.mark.parametrize("which", ["quantize", "sensitivity", "layerwise", "diff", "inspect"])
def test_every_page_fits_a_phone_and_its_console_stays_silent(
    which: str, quantized: dict[str, Any], ranked: dict[str, Any], layer_by_layer: dict[str, Any], tmp_path: Path
) -> None:
    digits, made = DEMO / "digits.onnx", quantized["output"]["path"]
    changed = changed_regions(digits, made) if which in ("quantize", "diff") else None
    report, expected = {
        "quantize": lambda: (quantized, f"{quantized['ledger'][-1]['metrics']['ranges'][0]['sqnr_db']:.1f} dB"),
        "sensitivity": lambda: (ranked, ranked["layers"][0]["layer"]),
        "layerwise": lambda: (layer_by_layer, layer_by_layer["layers"]["first"]["value"]),
        "diff": lambda: (api.diff(digits, made).as_dict(), "QuantizeLinear"),
        "inspect": lambda: (api.inspect(digits, tree=True), "Multiply-accumulates"),
    }[which]()
    (tmp_path / "page.html").write_text(render(report, changed=changed), encoding="utf-8")
    assert expected in _browse(tmp_path / "page.html", tmp_path)  # its script by its policy, nothing on the console
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", render(report, changed=changed))
    framed = FRAME.format(html.escape(bare.replace("</body>", PHONE + "</body>"), quote=True))
    (tmp_path / "phone.html").write_text(framed, encoding="utf-8")
    dom = _browse(tmp_path / "phone.html", tmp_path)
    told = json.loads(html.unescape(dom.partition('<pre id="told">')[2].partition("</pre>")[0]))
    assert told["inner"] == 390
    assert told["wide"] <= 390, "the page scrolls sideways on a phone"
    assert told["over"] == []
    assert told["filled"] == 0, "a line of a drawn graph is no area"
