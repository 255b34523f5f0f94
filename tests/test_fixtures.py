"""The fixtures that other tests rely on are what their README says they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "graphopt" / "demo"
MODELS = {path.stem: path for path in sorted((ROOT / "fixtures" / "models").glob("*.onnx"))}
EXPECTED = {
    "bigfold", "control", "convtranspose", "custom", "encoder", "fakequant", "gru", "half", "lstm", "metadata",
    "opset11", "overridable", "shared",
}  # fmt: skip
UNLOADABLE = {"custom"}  # on purpose: its operator is nobody's
FILE_LIMIT, DEMO_LIMIT = 300_000, 1_200_000

Arrays = dict[str, npt.NDArray[Any]]


def load(name: str) -> tuple[onnx.ModelProto, Arrays]:
    with np.load(ROOT / "fixtures" / "data" / f"{name}.npz", allow_pickle=False) as data:
        return onnx.load(MODELS[name]), dict(data)


def session_of(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def inputs_of(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    weights = {tensor.name for tensor in model.graph.initializer}
    return {value.name: value.type.tensor_type for value in model.graph.input if value.name not in weights}


def sizes_of(model: onnx.ModelProto) -> int:
    return sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)


def test_every_fixture_is_there_with_its_data() -> None:
    assert set(MODELS) == EXPECTED
    assert {path.stem for path in (ROOT / "fixtures" / "data").glob("*.npz")} == EXPECTED


@pytest.mark.parametrize("path", [*MODELS.values(), DEMO / "digits.onnx"], ids=lambda path: path.stem)
def test_model_is_valid_and_says_what_it_is(path: Path) -> None:
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.name == path.stem
    assert f"fixture '{path.stem}'" in model.doc_string


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_data_fits_the_declared_inputs(name: str) -> None:
    model, data = load(name)
    inputs = inputs_of(model)
    assert set(data) == set(inputs)
    for key, tensor in inputs.items():
        assert data[key].dtype == onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        assert 16 <= len(data[key]) <= 32
        declared = [dim.dim_value for dim in tensor.shape.dim][1:]
        assert all(want in (0, size) for want, size in zip(declared, data[key].shape[1:], strict=True))


@pytest.mark.parametrize("name", sorted(EXPECTED - UNLOADABLE))
def test_model_runs_on_its_data_one_sample_at_a_time(name: str) -> None:
    _, data = load(name)
    session = session_of(MODELS[name])
    samples = len(next(iter(data.values())))
    singles = [session.run(None, {key: array[at : at + 1] for key, array in data.items()}) for at in range(samples)]
    stacked = [np.concatenate(values) for values in zip(*singles, strict=True)]
    for output in stacked:
        assert np.isfinite(output).all()
        assert np.abs(output - output[:1]).max() > 1e-3, "the output must depend on the input"
    if session.get_inputs()[0].shape[0] == "batch":
        tolerance = 5e-3 if name == "half" else 1e-5
        for together, output in zip(session.run(None, data), stacked, strict=True):
            np.testing.assert_allclose(together, output, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["encoder", "gru", "lstm"])
def test_sequences_may_be_shorter(name: str) -> None:
    _, data = load(name)
    (logits,) = session_of(MODELS[name]).run(None, {key: array[:2, :7] for key, array in data.items()})
    assert logits.shape == (2, 4)


def test_unknown_operator_keeps_runtime_away() -> None:
    with pytest.raises(Exception, match="MysteryOp"):
        session_of(MODELS["custom"])


def test_control_takes_both_branches_and_stops_early_at_times() -> None:
    model, data = load("control")
    graph = model.graph
    graph.output.extend(
        [
            onnx.helper.make_tensor_value_info("is_bright", onnx.TensorProto.BOOL, []),
            onnx.helper.make_tensor_value_info("trace", onnx.TensorProto.FLOAT, ["turns", 1, 8]),
        ]
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    runs = [session.run(["is_bright", "trace"], {"image": image[np.newaxis]}) for image in data["image"]]
    assert {bool(bright) for bright, _ in runs} == {True, False}
    assert {len(trace) for _, trace in runs} == {1, 2, 3, 4}


def test_shared_weights_have_two_users_each() -> None:
    graph = load("shared")[0].graph
    for name, operator in [("both_weight", "Conv"), ("both_bias", "Conv"), ("both_matrix", "MatMul")]:
        assert [node.op_type for node in graph.node if name in node.input] == [operator, operator]


def test_old_forms_are_old() -> None:
    opset11, overridable = load("opset11")[0], load("overridable")[0]
    assert (opset11.ir_version, opset11.opset_import[0].version) == (6, 11)
    assert not opset11.graph.initializer
    assert (overridable.ir_version, overridable.opset_import[0].version) == (3, 8)
    weights = {tensor.name for tensor in overridable.graph.initializer}
    assert weights < {value.name for value in overridable.graph.input}


def test_bigfold_would_grow_a_thousandfold() -> None:
    model, _ = load("bigfold")
    values = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.value_info
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
    folded = sum(4 * int(np.prod(shapes[name])) for name in ("wave", "small", "ramp"))
    assert MODELS["bigfold"].stat().st_size < 3_000
    assert folded > 6_000_000


def test_metadata_is_everywhere() -> None:
    model, _ = load("metadata")
    graph = model.graph
    assert model.metadata_props
    assert graph.doc_string
    parts = [*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]
    assert all(part.doc_string and part.metadata_props for part in parts)


def test_demo_recognizes_held_out_digits() -> None:
    model = onnx.load(DEMO / "digits.onnx")
    assert sizes_of(model) >= 200_000
    with np.load(DEMO / "evaluation.npz", allow_pickle=False) as data:
        image, label = data["image"], data["label"]
    assert (image.shape, image.dtype, label.dtype) == ((597, 1, 8, 8), np.float32, np.int64)
    (logits,) = session_of(DEMO / "digits.onnx").run(["logits"], {"image": image})
    assert float(np.mean(logits.argmax(axis=1) == label)) >= 0.97


def test_demo_is_neither_fused_nor_simplified_yet() -> None:
    operators = {node.op_type for node in onnx.load(DEMO / "digits.onnx").graph.node}
    assert {"BatchNormalization", "Identity", "Shape", "Gather", "Concat", "Reshape", "Exp"} <= operators


def test_demo_calibrates_on_other_images_than_it_is_judged_by() -> None:
    with np.load(DEMO / "calibration.npz", allow_pickle=False) as data:
        assert set(data.files) == {"image"}
        calibration = {image.tobytes() for image in data["image"]}
    with np.load(DEMO / "evaluation.npz", allow_pickle=False) as data:
        assert calibration.isdisjoint({image.tobytes() for image in data["image"]})


def test_files_are_small_and_named_in_the_readme() -> None:
    readme = (ROOT / "fixtures" / "README.md").read_text(encoding="utf-8")
    files = [path for folder in ("models", "data") for path in (ROOT / "fixtures" / folder).iterdir()]
    assert all(path.stat().st_size < FILE_LIMIT for path in files)
    demo = [*DEMO.glob("*.onnx"), *DEMO.glob("*.npz")]
    assert sum(path.stat().st_size for path in demo) < DEMO_LIMIT
    assert sum(path.stat().st_size for path in demo if path.suffix == ".npz") < FILE_LIMIT
    missing = [path.relative_to(ROOT).as_posix() for path in [*files, *demo] if path.name not in readme]
    assert not missing
