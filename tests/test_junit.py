"""``--junit``: the gates as CI systems read them."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from conftest import DATA, DEMO, MODELS, run_cli

from graphopt.report.junit import render

QUANTIZE = ["quantize", DEMO / "digits.onnx", "-o", "q.onnx", "--data", DEMO / "calibration.npz", "--time", "0"]


def suite(path: str) -> ElementTree.Element:
    found = ElementTree.parse(path).getroot().find("testsuite")
    assert found is not None
    return found


def test_a_gate_is_a_test_case(workplace: Path) -> None:
    ran = run_cli(*QUANTIZE, "--max-size", "0.5", "--min-sqnr", "1", "--junit", "gates.xml", "-q")
    assert ran.code == 0, ran.err
    found = suite("gates.xml")
    assert found.attrib == {"name": "graphopt quantize", "tests": "3", "failures": "0", "errors": "0"}
    assert [str(case.get("name")).split()[0] for case in found] == ["min-sqnr", "max-size", "done"]
    assert all(case.get("classname", "").endswith("digits.onnx") for case in found)


def test_one_that_fails_is_a_failure_and_the_file_is_written_all_the_same(workplace: Path) -> None:
    ran = run_cli(*QUANTIZE, "--min-sqnr", "500", "--junit", "gates.xml", "-q")
    assert ran.code == 1
    found = suite("gates.xml")
    assert (found.get("failures"), found.get("errors")) == ("1", "0")
    failure = found[0].find("failure")
    assert failure is not None
    assert "dB" in failure.get("message", "")
    assert not Path("q.onnx").exists()


def test_nothing_done_is_an_error(workplace: Path) -> None:
    ran = run_cli(
        "quantize",
        MODELS / "overridable.onnx",
        "-o",
        "q.onnx",
        "--data",
        DATA / "overridable.npz",
        "--junit",
        "g.xml",
        "-q",
    )
    assert ran.code == 3
    found = suite("g.xml")
    assert (found.get("tests"), found.get("errors")) == ("1", "1")
    error = found[0].find("error")
    assert error is not None
    assert "also a graph input" in error.get("message", "")


def test_compare_and_its_tolerances(workplace: Path) -> None:
    model = MODELS / "shared.onnx"
    assert run_cli("compare", model, model, "--max-abs", "0", "--junit", "c.xml", "-q").code == 0
    found = suite("c.xml")
    assert found.get("tests") == "2"
    assert found[0].get("classname") == f"{model} {model}"


def test_without_gates_the_run_is_the_test(workplace: Path) -> None:
    assert (
        run_cli("optimize", MODELS / "shared.onnx", "-o", "o.onnx", "--time", "0", "--junit", "o.xml", "-q").code == 0
    )
    assert suite("o.xml").get("tests") == "1"


def test_where_it_cannot_be_written_is_told_before_the_work(workplace: Path) -> None:
    ran = run_cli(*QUANTIZE, "--junit", "no/such/folder/g.xml")
    assert ran.code == 2
    assert "the folder of no/such/folder/g.xml does not exist" in ran.error
    assert not Path("q.onnx").exists()


def test_names_may_hold_anything() -> None:
    gate = {"gate": 'a<b>"&', "asked": "\x00\x1b", "measured": "]]>", "passed": False}
    text = render({"verb": "compare", "models": [{"path": "<&>.onnx"}], "gates": [gate], "exit_code": 1, "error": "x"})
    case = ElementTree.fromstring(text)[0][0]
    assert case.get("name") == 'a<b>"& ??'
    assert case.get("classname") == "<&>.onnx"
