"""The Python API: what it takes, that it leaves that alone, and that it does what the command line does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import parsed
from conftest import DATA, DEMO, MODELS, run_cli

import graphopt
from graphopt.recipe import read

DIGITS = DEMO / "digits.onnx"
CALIBRATION = DEMO / "calibration.npz"
SHARED = MODELS / "shared.onnx"
SHARED_DATA = DATA / "shared.npz"


def graph(path: Path) -> Any:
    surgeon = pytest.importorskip("onnx_graphsurgeon")
    return surgeon.import_onnx(onnx.load(path))


FORMS: dict[str, Callable[[Path], Any]] = {
    "str": str,
    "path": lambda p: p,
    "bytes": lambda p: p.read_bytes(),
    "proto": onnx.load,
    "ir": ir.load,
    "gs": graph,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_model_is_taken(form: str) -> None:
    result = graphopt.optimize(FORMS[form](SHARED), passes=["fuse-batchnorm"], time=0)
    assert isinstance(result.model, onnx.ModelProto)
    assert result.report["ledger"][0]["status"] == "changed"
    assert graphopt.inspect(result.model)["nodes"] == result.report["output"]["nodes"]
    assert result.report["input"]["path"] == (str(SHARED) if form in ("str", "path") else None)


def test_other_forms_are_refused_with_advice() -> None:
    with pytest.raises(graphopt.InputError, match="give a path, bytes"):
        graphopt.optimize(3.5)


def state(model: Any) -> bytes:
    if isinstance(model, bytes):
        return model
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    return bytes(proto.SerializeToString(deterministic=True))


@pytest.mark.parametrize("form", ["bytes", "proto", "ir"])
@pytest.mark.parametrize("name", ["shared", "control", "fakequant", "overridable"])
def test_the_argument_is_never_changed(name: str, form: str) -> None:
    model = FORMS[form](MODELS / f"{name}.onnx")
    data = DATA / f"{name}.npz"
    before = state(model)
    graphopt.optimize(model, time=0)
    assert state(model) == before
    if name == "shared":
        graphopt.quantize(model, data=data, time=0)
        graphopt.quantize(model, mode="dynamic", time=0)
        assert state(model) == before
    graphopt.compare(model, model, data=data)
    graphopt.inspect(model) if form == "proto" else None
    assert state(model) == before


def test_the_data_is_never_changed() -> None:
    samples = [{"image": np.load(SHARED_DATA)["image"][i : i + 1].copy()} for i in range(6)]
    before = [s["image"].tobytes() for s in samples]
    result = graphopt.quantize(SHARED, data=samples, time=0)
    assert [s["image"].tobytes() for s in samples] == before
    assert len(str(result.report["options"])) < 1000  # the arrays are not in it


def test_two_runs_are_equal() -> None:
    first, second = (graphopt.quantize(SHARED, data=SHARED_DATA, time=0).model for _ in range(2))
    assert state(first) == state(second)


@pytest.mark.parametrize("form", FORMS)
def test_the_form_of_the_model_makes_no_difference(form: str) -> None:
    if form == "gs":
        pytest.skip("graphsurgeon itself drops names and orders on import")
    expected = graphopt.optimize(SHARED, time=0).model
    assert state(graphopt.optimize(FORMS[form](SHARED), time=0).model) == state(expected)


# The same as the command line


def test_optimize_is_the_command(workplace: Path) -> None:
    assert run_cli("optimize", DIGITS, "-o", "cli.onnx", "--time", "0").code == 0
    graphopt.optimize(DIGITS, time=0).save("api.onnx")
    assert Path("api.onnx").read_bytes() == Path("cli.onnx").read_bytes()


def test_quantize_is_the_command(workplace: Path) -> None:
    options = ["--data", CALIBRATION, "--observer", "percentile", "--exclude", "Gemm", "--samples", "50"]
    ran = run_cli("quantize", DIGITS, "-o", "cli.onnx", *options, "--time", "0", "--json")
    assert ran.code == 0, ran.err
    result = graphopt.quantize(
        DIGITS, data=str(CALIBRATION), observer="percentile", exclude=["Gemm"], samples=50, time=0
    )
    assert result.report.keys() == ran.json.keys()
    result.save("api.onnx")
    assert Path("api.onnx").read_bytes() == Path("cli.onnx").read_bytes()
    assert result.report["output"]["sha256"] == ran.json["output"]["sha256"]
    assert result.report["output"]["path"] == "api.onnx"
    assert result.report["options"] == ran.json["options"]


def test_compare_is_the_command(workplace: Path) -> None:
    graphopt.quantize(SHARED, data=SHARED_DATA, time=0).save("b.onnx")
    result = graphopt.compare(str(SHARED), "b.onnx", data=str(SHARED_DATA))
    ran = run_cli("compare", SHARED, "b.onnx", "--data", SHARED_DATA, "--json")
    assert ran.json == result.report


def test_run_is_the_command(workplace: Path) -> None:
    text = f"""
model = "{SHARED}"
output = "OUT"
data = "{SHARED_DATA}"
[[pass]]
use = "fuse-batchnorm"
[[pass]]
use = "quantize-static"
observer = "min-max"
"""
    Path("cli.toml").write_text(text.replace("OUT", "cli.onnx"))
    Path("api.toml").write_text(text.replace("OUT", "api.onnx"))
    assert run_cli("run", "cli.toml", "--time", "0").code == 0
    result = graphopt.run("api.toml", time=0)
    assert Path("api.onnx").read_bytes() == Path("cli.onnx").read_bytes()
    assert state(result.model) == Path("api.onnx").read_bytes()
    assert result.report["output"]["path"] == "api.onnx"
    recipe = read("api.toml")
    recipe.output = None
    assert state(graphopt.run(recipe, time=0).model) == state(result.model)
    assert state(graphopt.optimize(SHARED, recipe="api.toml", time=0).model) == state(result.model)


# Options, gates and errors


def test_a_failed_gate_carries_the_report() -> None:
    with pytest.raises(graphopt.GateFailed, match="max-size") as caught:
        graphopt.optimize(SHARED, max_size=10, time=0)
    report = caught.value.report
    assert report is not None
    assert report["exit_code"] == 1
    assert report["error"] == str(caught.value)
    assert report["gates"][0]["asked"] == "10 (10 B)"


def test_compare_holds_to_tolerances() -> None:
    quantized = graphopt.quantize(SHARED, data=SHARED_DATA, time=0).model
    with pytest.raises(graphopt.GateFailed, match="max-abs 0 failed") as caught:
        graphopt.compare(SHARED, quantized, max_abs=0)
    assert caught.value.report is not None
    assert caught.value.report["comparison"]["outputs"]
    assert graphopt.compare(SHARED, quantized, max_abs=1e6, min_sqnr=1).comparison.sqnr > 1
    with pytest.raises(graphopt.InputError, match="compare takes"):
        graphopt.compare(SHARED, quantized, max_size="1MB")


def test_nothing_done_carries_the_reasons() -> None:
    with pytest.raises(graphopt.NothingDone, match="also a graph input") as caught:
        graphopt.quantize(MODELS / "overridable.onnx", data=DATA / "overridable.npz", time=0)
    report = caught.value.report
    assert report is not None
    assert report["output"] is None
    assert report["ledger"][-1]["skipped"]


def test_a_misspelt_option_is_named() -> None:
    with pytest.raises(TypeError, match="did you mean 'max_drop'"):
        graphopt.optimize(SHARED, max_dorp="1%")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": "a"}, "--seed"),
        ({"seed": True}, "--seed"),
        ({"threads": 0}, "--threads"),
        ({"samples": 0, "data": "random"}, "--samples"),
        ({"time": -1}, "--time"),
        ({"time": float("nan")}, "--time"),
        ({"verify": "never"}, "--verify"),
        ({"target": "abacus"}, "unknown target"),
        ({"min_sqnr": "high"}, "--min-sqnr"),
        ({"max_drop": "much", "metric": "accuracy", "data": "random"}, "--max-drop"),
        ({"max_size": "huge"}, "--max-size"),
        ({"passes": []}, "no passes"),
        ({"passes": ["simplify"], "recipe": "r.toml"}, "both"),
        ({"passes": [3]}, "is no pass"),
    ],
)
def test_options_are_checked_before_any_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(graphopt.InputError, match=message):
        graphopt.optimize("is not even looked for", **options)


def test_patterns_must_be_a_list() -> None:
    with pytest.raises(graphopt.InputError, match="list of patterns"):
        graphopt.quantize(SHARED, data=SHARED_DATA, exclude="Conv")


def test_a_number_will_do_for_max_drop() -> None:
    result = graphopt.quantize(
        DIGITS, data=CALIBRATION, eval_data=DEMO / "evaluation.npz", metric="accuracy", max_drop=0.02, time=0
    )
    assert result.report["gates"][0] == {**result.report["gates"][0], "asked": "0.02", "passed": True}


def test_a_metric_may_be_a_function() -> None:
    def negative_error(outputs: Any, samples: Any) -> float:
        assert set(samples[0]) == {"image"}
        return -float(np.mean([np.abs(o["features"]).mean() for o in outputs]))

    result = graphopt.quantize(SHARED, data=SHARED_DATA, metric=negative_error, time=0)
    assert result.report["metric"]["name"] == "negative_error"
    assert result.report["options"]["metric"] == "negative_error"


def test_passes_may_be_names_objects_and_functions() -> None:
    from graphopt.registry import create

    def touch(model: onnx.ModelProto) -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        copy.doc_string = "touched"
        return copy

    result = graphopt.optimize(SHARED, passes=["fuse-batchnorm", create("remove-unused", {}), touch], time=0)
    assert [e["pass"] for e in result.report["ledger"]][:2] == ["fuse-batchnorm", "remove-unused"]
    assert len(result.report["ledger"]) == 3
    assert result.model.doc_string == "touched"


def test_metadata_and_names_are_kept() -> None:
    before, after = onnx.load(MODELS / "metadata.onnx"), graphopt.optimize(MODELS / "metadata.onnx", time=0).model
    for name in ("producer_name", "producer_version", "domain", "model_version", "doc_string", "ir_version"):
        assert getattr(after, name) == getattr(before, name)
    assert {p.key: p.value for p in after.metadata_props} == {p.key: p.value for p in before.metadata_props}
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    assert list(after.opset_import) == list(before.opset_import)


def test_a_model_that_takes_no_random_inputs_is_optimized_all_the_same() -> None:
    """Its integers mean something: here they are lengths, which random numbers exceed."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[4, 2] x, int64[4] n) => (float[4, 2] y)
        { a = Identity(x)  y = ReverseSequence <batch_axis = 0, time_axis = 1> (a, n) }"""
    )
    result = graphopt.optimize(proto, time=0)
    assert [node.op_type for node in result.model.graph.node] == ["ReverseSequence"]
    assert any(
        note.startswith("nothing was compared or timed on random inputs; give --data: ONNX Runtime")
        for note in result.report["notes"]
    )


def test_importing_graphopt_is_lazy() -> None:
    assert {"optimize", "quantize", "compare", "run", "inspect", "GateFailed"} <= set(dir(graphopt))
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        graphopt.optimise  # noqa: B018


@pytest.mark.parametrize(("window", "compared"), [(64, True), (4099, False)])
def test_no_data_and_a_model_that_needs_longer_inputs(window: int, compared: bool) -> None:
    """Other sizes of the free dims are tried; where none runs, that is said, and the model is made all the same."""
    body = f"{{ s = Constant<value = int64[2] {{-1, {window}}}>() z = Identity(x) y = Reshape(z, s) }}"
    model = parsed(f"agraph (float[1, N] x) => (float[A, B] y) {body}")
    result = graphopt.optimize(model, time=0)
    assert result.report["output"]["nodes"] == 1
    assert (result.report["comparison"] is not None) == compared
    assert any("give --data" in note and "cannot run" in note for note in result.report["notes"]) != compared


def test_constants_are_counted_and_kept_as_initializers() -> None:
    """A Constant node is a node to every tool that counts them."""
    model = parsed("agraph (float[2] x) => (float[2] y) { c = Constant<value = float[2] {1, 2}>() y = Add(x, c) }")
    result = graphopt.optimize(model, time=0)
    assert [node.op_type for node in result.model.graph.node] == ["Add"]
    assert [tensor.name for tensor in result.model.graph.initializer] == ["c"]
