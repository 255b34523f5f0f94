"""The report: the JSON is what docs/report.md says, the text is made from it, complete and aligned."""

from __future__ import annotations

import copy
import io
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import DATA, DEMO, MODELS, ROOT
from rich.console import Console
from rich.text import Text

import graphopt
from graphopt.cli._finish import to_json
from graphopt.report import markdown, result, text
from graphopt.report.table import Table
from graphopt.report.units import count, plural, ratio, seconds, size

PAGE = (ROOT / "docs" / "report.md").read_text("utf-8")


def documented(heading: str) -> set[str]:
    """The keys in the table under a heading."""
    section = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section is not None, heading
    return {
        key for row in re.findall(r"^\| (`.*?) \|", section[1], re.MULTILINE) for key in re.findall(r"`(\w+)`", row)
    }


@cache
def made() -> dict[str, Any]:
    """A report with everything in it."""
    options: dict[str, Any] = {"data": DEMO / "calibration.npz", "eval_data": DEMO / "evaluation.npz"}
    gates = {"max_drop": "5%", "min_sqnr": 1, "max_size": "1"}
    done = graphopt.quantize(DEMO / "digits.onnx", **options, **gates, metric="accuracy", time=0.1, allow_slower=True)
    return done.report


@cache
def optimized() -> dict[str, Any]:
    return graphopt.optimize(MODELS / "encoder.onnx", time=0).report


@cache
def undone() -> dict[str, Any]:
    with pytest.raises(graphopt.NothingDone) as caught:
        graphopt.quantize(MODELS / "overridable.onnx", data=DATA / "overridable.npz", time=0)
    assert caught.value.report is not None
    return caught.value.report


@cache
def compared() -> dict[str, Any]:
    return graphopt.compare(MODELS / "shared.onnx", MODELS / "shared.onnx").report


def shown(report: dict[str, Any], *, printer: Any = text.print_result, **options: Any) -> str:
    stream = io.StringIO()
    printer(report, stream=stream, **options)
    return stream.getvalue()


# The document


def test_every_key_is_documented_and_every_documented_key_exists() -> None:
    common, makes = documented("Every document"), documented("Documents of verbs that make a model")
    for report in (made(), optimized(), undone()):
        assert report.keys() == common | makes
    assert compared().keys() == common | documented("Documents of compare")


@pytest.mark.parametrize(
    ("heading", "parts"),
    [
        ("A model (`input`, `output`, `models`)", lambda: [made()["input"], made()["output"], *compared()["models"]]),
        ("A ledger entry (`ledger`)", lambda: [*made()["ledger"], *undone()["ledger"]]),
        ("Data (`data`, `eval_data`)", lambda: [made()["data"], made()["eval_data"], compared()["data"]]),
        ("A comparison (`comparison`)", lambda: [made()["comparison"], compared()["comparison"]]),
        ("An output (`comparison.outputs`)", lambda: made()["comparison"]["outputs"]),
        ("A metric (`metric`)", lambda: [made()["metric"]]),
        ("bisect", lambda: [graphopt.bisect(MODELS / "gru.onnx", passes=["remove-unused"]).report]),
        ("inspect", lambda: [graphopt.inspect(MODELS / "gru.onnx")]),
    ],
)
def test_the_parts_are_as_documented(heading: str, parts: Any) -> None:
    for part in parts():
        assert part.keys() == documented(heading)


def test_smaller_parts() -> None:
    assert made()["gates"][0].keys() == {"gate", "asked", "measured", "passed"}
    assert made()["machine"].keys() == {"cpu", "vnni", "platform"}
    assert made()["latency"].keys() == {"original", "candidate"}
    assert made()["latency"]["original"].keys() == {"median", "low", "high", "runs"}
    assert made()["latency_ratio"].keys() == {"median", "low", "high"}
    assert made()["ledger"][0]["changes"][0].keys() == {"action", "site", "detail"}
    assert {"graphopt", "python", "onnx", "onnx-ir", "onnxruntime", "numpy"} <= made()["versions"].keys()


def test_json_has_no_number_that_is_none() -> None:
    plain = json.loads(to_json({"a": float("nan"), "b": float("inf"), "c": (1, True, None), "d": Path("x")}))
    assert plain == {"a": None, "b": None, "c": [1, True, None], "d": "x"}
    for report in (made(), optimized(), undone(), compared()):
        json.loads(to_json(report), parse_constant=lambda name: pytest.fail(name))


# The text


def test_the_numbers_in_the_text_are_the_reports() -> None:
    report = made()
    page = shown(report)
    a, b = report["input"], report["output"]
    for title, values in {
        "file size": [size(a["bytes"]), size(b["bytes"]), f"{b['bytes'] / a['bytes']:.3f}x"],
        "weights": [size(a["weight_bytes"]), size(b["weight_bytes"])],
        "nodes": [str(a["nodes"]), str(b["nodes"])],
        "accuracy": [f"{report['metric']['original']:.4f}", f"{report['metric']['candidate']:.4f}"],
        "latency, 1 thread": [
            seconds(report["latency"]["original"]["median"]),
            f"{report['latency_ratio']['median']:.3f}x",
        ],
    }.items():
        row = re.search(rf"^{re.escape(title)} .*$", page, re.MULTILINE)
        assert row is not None, title
        assert [v for v in values if v not in row[0]] == []
    idle = result.idle(report["ledger"])
    for entry in report["ledger"]:
        if entry["status"] != "unchanged":
            assert re.search(rf"^{entry['pass']} +{entry['status']}", page, re.MULTILINE)
    assert idle
    assert f"nothing to do for {', '.join(idle)}; -v tells why" in " ".join(page.split())
    every = shown(report, verbose=True)
    assert all(re.search(rf"^{name} +unchanged", every, re.MULTILINE) for name in idle)
    for gate in report["gates"]:
        assert f"gate {gate['gate']} {gate['asked']}: holds ({gate['measured']})" in page


def test_operators_whose_count_changed_stand_under_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "SHOWN", 3)
    report = optimized()
    rows = result.changed_operators(report["input"]["operators"], report["output"]["operators"])
    assert rows == sorted(rows, key=lambda r: (-abs(r[1] - r[2]), r[0]))
    assert all(before != after for _, before, after in rows)
    short, long = shown(report), shown(report, verbose=True)
    name, before, after = rows[0]
    assert re.search(rf"^  {name} +{before} +{after}", short, re.MULTILINE)
    assert len(rows) > text.SHOWN
    assert f"{len(rows) - text.SHOWN} more operator" in short
    assert all(re.search(rf"^  {n} +{b} +{c}", long, re.MULTILINE) for n, b, c in rows)


@pytest.mark.parametrize("report", [made, optimized, undone])
def test_nothing_is_cut_padded_or_longer_than_a_screen(report: Any) -> None:
    page = shown(report())
    assert "…" not in page
    assert "\x1b" not in page
    assert all(line == line.rstrip() for line in page.splitlines())
    assert "\n\n\n" not in page
    assert len(page.splitlines()) <= 40


def test_a_report_without_result() -> None:
    page = shown({**undone(), "exit_code": 3})
    assert "(nothing was written)" in page.splitlines()[0]
    assert "quantize-static" in page
    assert "graph input" in page


def test_a_slower_result_and_an_unknown_interval_are_said() -> None:
    report = copy.deepcopy(made())
    report["latency_ratio"] = {"median": 1.5, "low": 1.4, "high": 1.6}
    report["metric"]["low"] = report["metric"]["high"] = float("nan")
    report["comparison"]["outputs"][0]["mismatch"] = "float32[1] instead of float32[2]"
    page = shown(report)
    assert "1.400 to 1.600  slower here" in page
    assert "no interval, 597 samples" in page
    assert "float32[1] instead of float32[2]" in page
    assert "nan" not in page


def test_warnings_come_first_and_each_note_once() -> None:
    report = {
        **made(),
        "notes": ["b", "WARNING: look", "b", ""],
        "reproducer": "/tmp/r",
        "data": None,
        "eval_data": None,
    }
    assert [n.plain for n in result.notes(report)] == ["WARNING: look", "note: b", "note: reproducer: /tmp/r"]


def test_names_with_brackets_are_shown_as_they_are() -> None:
    report = copy.deepcopy(made())
    report["input"]["path"] = "[red]m[/red].onnx"
    report["ledger"][0]["changes"] = [{"action": "fold", "site": "a[0]", "detail": "[bold]x"}]
    page = shown(report, verbose=True)
    assert "[red]m[/red].onnx" in page
    assert "fold a[0] [bold]x" in page


def test_skips_with_one_reason_are_one_line() -> None:
    skips = [{"site": f"n{i}", "reason": f"r{i % 3}"} for i in range(9)]
    assert [line.plain for line in result.grouped(skips, 2)] == [
        "  r0 (n0, n3 and 1 more)",
        "  r1 (n1, n4 and 1 more)",
        "  and 1 more reason; -v shows all",
    ]
    assert len(result.grouped(skips, None)) == 3


def test_comparison() -> None:
    page = shown(compared(), printer=text.print_comparison)
    assert "4 legal random samples; give --data for real ones" in page
    assert re.search(r"^features +identical +0 +0 +1\.000000", page, re.MULTILINE)


def test_markdown() -> None:
    with click.Context(click.Command("quantize")) as context:
        context.meta[markdown.KEY] = True
        page = shown(made())
    assert shown(made()) != page, "and without a context it is the terminal's"
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    for rows in tables:
        assert len({row.count("|") for row in rows}) == 1
        assert set(rows[1]) <= set("| -:")
    assert f"| nodes | {made()['input']['nodes']} | {made()['output']['nodes']} |" in page


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["a", "b"], "a\\\nb\n"),
        (["a", "  b", "    c", "  d"], "a\n\n- b\n  - c\n- d\n"),
        (["", "a"], "\na\n"),
        (["a", "", "b"], "a\n\nb\n"),
        (["__init__ *x* `y` <b> a_b a|b"], "\\_\\_init_\\_ \\*x\\* \\`y\\` \\<b> a_b a\\|b\n"),
        ([markdown.Row("| a |"), markdown.Row("| - |"), "b"], "| a |\n| - |\n\nb\n"),
        (["# 1", "[a](b)"], "\\# 1\\\n[a\\](b)\n"),
    ],
)
def test_lines_as_markdown(lines: list[str], expected: str) -> None:
    assert markdown.document(lines) == expected


def test_a_table_as_markdown_keeps_indentation_and_leaves_out_empty_columns() -> None:
    table = Table(["", "n", ""], "lrl")
    table.add("a|b", "1")
    table.add("  c", "")
    assert list(table.markdown()) == ["|  | n |", "| --- | ---: |", "| a\\|b | 1 |", "| &nbsp;&nbsp;c |  |"]


# Tables and units


def lines(table: Table, width: int | None) -> list[str]:
    return [line.plain for line in table.lines(Console(width=200), width)]


def test_a_table_is_aligned_and_its_remarks_wrapped() -> None:
    table = Table(["name", "n", ""], "lrl")
    table.add("a", "1", "one two three four five six seven eight")
    table.add("long name", "12345", Text("short"))
    table.add("模型", "7")
    assert lines(table, None) == [
        "name            n",
        "a               1   one two three four five six seven eight",
        "long name   12345   short",
        "模型            7",
    ]
    assert lines(table, 50)[1:3] == [
        "a               1   one two three four five six",
        "                    seven eight",
    ]
    assert lines(table, 30)[1:4] == ["a               1", "    one two three four five", "    six seven eight"]


def test_a_row_without_a_remark_has_no_line_for_one() -> None:
    table = Table(["a long name", "n", ""], "lrl")
    table.add("  indented", "1")
    table.add("  indented", "1", "a remark below its row")
    assert lines(table, 16) == [
        "a long name   n",
        "  indented    1",
        "  indented    1",
        "      a remark",
        "      below its",
        "      row",
    ]


def test_where_cells_do_not_fit_the_name_has_a_line_of_its_own() -> None:
    table = Table(["name", "SQNR", "n", ""], "lrrl")
    table.add("/a/very/long/name/of/a/node", "34.5 dB", "12", "odd")
    table.add("/short")
    assert lines(table, 42)[1] == "/a/very/long/name/of/a/node   34.5 dB   12"
    assert lines(table, 30) == [
        "name",
        "       SQNR    n",
        "/a/very/long/name/of/a/node",
        "    34.5 dB   12   odd",
        "/short",
    ]


def test_models_side_by_side_are_wrapped_each_in_its_place() -> None:
    table = Table(["", "a.onnx", "b.onnx", "ratio"], "lllr", side_by_side=True)
    table.add("size", "1 kB", "2 kB", "2.000x")
    table.add("operators", "one two three four", "five six seven eight")
    assert lines(table, 46) == [
        "            a.onnx        b.onnx         ratio",
        "size        1 kB          2 kB          2.000x",
        "operators   one two       five six",
        "            three four    seven eight",
    ]
    assert lines(table, 100)[2] == "operators   one two three four   five six seven eight"


def test_an_empty_table() -> None:
    assert lines(Table(["a", "b"], "lr"), 80) == ["a   b"]


@pytest.mark.parametrize(
    ("shown_as", "expected"),
    [
        (size(0), "0 B"),
        (size(999), "999 B"),
        (size(912_543), "912.54 kB"),
        (size(2_500_000_000), "2.50 GB"),
        (size(9e12), "9000.00 GB"),
        (count(None), "?"),
        (count(0), "0"),
        (count(9_330_000), "9.33 M"),
        (seconds(0.00571), "5.71 ms"),
        (seconds(0.0000004), "0 us"),
        (seconds(3), "3.00 s"),
        (ratio(1, 4), "0.250x"),
        (ratio(1, 0), ""),
        (plural(1, "node"), "1 node"),
        (plural(0, "node"), "0 nodes"),
    ],
)
def test_units(shown_as: str, expected: str) -> None:
    assert shown_as == expected
