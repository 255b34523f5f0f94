"""docs/report.schema.json: what --json prints is what it says, and it knows every key there is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import function_model
from conftest import DATA, DEMO, MODELS, ROOT, run_cli

import graphopt
from graphopt.cli._finish import to_json

SCHEMA: dict[str, Any] = json.loads((ROOT / "docs" / "report.schema.json").read_text("utf-8"))
KEYWORDS = {
    *("$schema", "$ref", "$defs", "title", "description", "type", "properties", "required", "additionalProperties"),
    *("items", "minItems", "maxItems", "minimum", "pattern", "enum", "const", "anyOf"),
}
TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "number": (int, float), "integer": int, "boolean": bool,
    "null": type(None),
}  # fmt: skip


def problems(value: Any, schema: dict[str, Any], at: str = "$") -> Iterator[str]:
    """Where ``value`` is not what ``schema`` says; knows the keywords that ours uses."""
    assert schema.keys() <= KEYWORDS, schema.keys() - KEYWORDS
    if "$ref" in schema:
        yield from problems(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], at)
    if "anyOf" in schema:
        tried = [list(problems(value, one, at)) for one in schema["anyOf"]]
        if all(tried):
            yield from min(tried, key=len)
    if "type" in schema and not any(is_a(value, t) for t in as_list(schema["type"])):
        yield f"{at}: {value!r} is no {schema['type']}"
        return
    if "const" in schema and value != schema["const"]:
        yield f"{at}: {value!r} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at}: {value!r} is not in {schema['enum']}"
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{at}: {value!r} does not match {schema['pattern']}"
    if isinstance(value, int) and value < schema.get("minimum", value):
        yield f"{at}: {value} is below {schema['minimum']}"
    if isinstance(value, list):
        yield from _list_problems(value, schema, at)
    if isinstance(value, dict):
        yield from _dict_problems(value, schema, at)


def _list_problems(value: list[Any], schema: dict[str, Any], at: str) -> Iterator[str]:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        yield f"{at}: {len(value)} items"
    for index, item in enumerate(value):
        yield from problems(item, schema.get("items", {}), f"{at}[{index}]")


def _dict_problems(value: dict[str, Any], schema: dict[str, Any], at: str) -> Iterator[str]:
    known = schema.get("properties", {})
    yield from (f"{at}: no {key}" for key in schema.get("required", ()) if key not in value)
    for key, item in value.items():
        if key in known:
            yield from problems(item, known[key], f"{at}.{key}")
        elif "additionalProperties" in schema:
            yield from problems(item, schema["additionalProperties"], f"{at}.{key}")


def is_a(value: Any, name: str) -> bool:
    return isinstance(value, TYPES[name]) and not (name in ("integer", "number") and isinstance(value, bool))


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def check(report: Any, kind: str) -> None:
    """``report``, as JSON, is a ``kind``, with no key that the schema does not know, and our schema takes it."""
    document = json.loads(to_json(report))
    assert list(problems(document, {"$ref": f"#/$defs/{kind}"})) == []
    assert document.keys() <= SCHEMA["$defs"][kind]["properties"].keys()
    assert list(problems(document, SCHEMA)) == []
    try:
        import jsonschema  # type: ignore[import-untyped]
    except ImportError:
        return
    jsonschema.Draft202012Validator(SCHEMA).validate(document)


def test_verbs_that_make_a_model() -> None:
    options: dict[str, Any] = {"data": DEMO / "calibration.npz", "eval_data": DEMO / "evaluation.npz"}
    gates = {"max_drop": "5%", "min_sqnr": 1, "max_size": "1"}
    check(
        graphopt.quantize(
            DEMO / "digits.onnx", **options, **gates, metric="accuracy", time=0.1, allow_slower=True
        ).report,
        "made",
    )
    check(graphopt.optimize(MODELS / "encoder.onnx", time=0).report, "made")
    check(graphopt.quantize(MODELS / "encoder.onnx", mode="dynamic", time=0).report, "made")
    with pytest.raises(graphopt.NothingDone) as caught:
        graphopt.quantize(MODELS / "overridable.onnx", data=DATA / "overridable.npz", time=0)
    check(caught.value.report, "made")


def test_compress_and_unpack(workplace: Path) -> None:
    pytest.importorskip("zstandard")
    result = graphopt.compress(DEMO / "digits.onnx", weights="palette4", time=0, package=True)
    result.save("digits.gopt")
    assert result.report["package"] is not None
    check(result.report, "made")
    check(graphopt.unpack("digits.gopt", "digits.onnx"), "unpacked")


def test_run(workplace: Path) -> None:
    text = f'model = "{MODELS / "shared.onnx"}"\noutput = "o.onnx"\n\n[[pass]]\nuse = "fuse-batchnorm"\n'
    Path("r.toml").write_text(text)
    ran = run_cli("run", "r.toml", "--json")
    assert ran.code == 0, ran.err
    check(ran.json, "made")


def test_compare() -> None:
    check(graphopt.compare(MODELS / "shared.onnx", MODELS / "shared.onnx").report, "compared")
    report = graphopt.compare(MODELS / "gru.onnx", MODELS / "gru.onnx", data=DATA / "gru.npz", layerwise=True).report
    check(report, "compared")
    dynamic = graphopt.quantize(MODELS / "encoder.onnx", mode="dynamic", time=0).model
    with pytest.raises(graphopt.GateFailed) as caught:
        graphopt.compare(MODELS / "encoder.onnx", dynamic, min_sqnr=300)
    check(caught.value.report, "compared")


def test_sensitivity_extract_diff_and_lint() -> None:
    digits = DEMO / "digits.onnx"
    check(graphopt.sensitivity(digits, data=DEMO / "calibration.npz", samples=4), "sensitivities")
    check(graphopt.extract(digits, outputs=["/act/Relu_output_0"]).report, "extracted")
    for other in sorted(MODELS.glob("*.onnx")):
        check(graphopt.diff(digits, other).as_dict(), "differed")
    made = graphopt.quantize(digits, data=DEMO / "calibration.npz", samples=4, time=0).model
    check(graphopt.diff(digits, made).as_dict(), "differed")
    check(graphopt.lint(made, "tensorrt"), "linted")
    check(graphopt.lint(digits), "linted")


def test_passes_targets_and_a_plan() -> None:
    check(run_cli("passes", "--json").json, "passes_listed")
    check(run_cli("passes", "quantize-static", "--json").json, "pass_told")
    check(run_cli("targets", "--json").json, "targets_listed")
    for name in ("gru.onnx", "overridable.onnx"):
        check(run_cli("quantize", MODELS / name, "--dry-run", "--json").json, "planned")


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.onnx")), ids=lambda p: p.stem)
def test_inspect(path: Path) -> None:
    report = graphopt.inspect(path, tree=True)
    output = report["outputs"][0]["name"]
    check(graphopt.inspect(path, tree=True, nodes=True, node=output), "inspected")
    check(report, "inspected")


def test_inspect_of_functions_and_of_several() -> None:
    check(graphopt.inspect(function_model(), tree=True, node="y"), "inspected")
    both = run_cli("inspect", MODELS / "gru.onnx", MODELS / "shared.onnx", "--json").json
    check(both, "inspected_several")


def test_the_validator_finds_what_is_wrong() -> None:
    report = json.loads(to_json(graphopt.inspect(MODELS / "shared.onnx")))
    for change in (
        {"nodes": -1}, {"nodes": "3"}, {"nodes": True}, {"graph": None}, {"schema_version": 2},
        {"inputs": [{"name": "x"}]}, {"operators": {"Conv": 1.5}}, {"duplicates": [{}]},
    ):  # fmt: skip
        assert list(problems({**report, **change}, {"$ref": "#/$defs/inspected"})), change
    del report["macs"]
    assert list(problems(report, SCHEMA))
