"""``graphopt.simplify`` where ``onnxsim.simplify`` was, as exporters call it; and what exporters return."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import DEMO, MODELS

import graphopt
from graphopt.errors import InputError

ENCODER = MODELS / "encoder.onnx"


def export(simplifier: Any, source: Path, file: Path) -> onnx.ModelProto:
    """The end of an exporter as YOLO's, mmdeploy's and PaddleDetection's have it: check, simplify, assert, save."""
    model_onnx = onnx.load(str(source))
    onnx.checker.check_model(model_onnx)
    model_onnx, check = simplifier.simplify(model_onnx)
    assert check, "Simplified ONNX model could not be validated"
    model_onnx.metadata_props.add(key="stride", value="32")
    onnx.save(model_onnx, str(file))
    return model_onnx


def test_an_exporter_switches_by_one_line(tmp_path: Path) -> None:
    import onnxsim

    theirs = export(onnxsim, ENCODER, tmp_path / "theirs.onnx")
    ours = export(graphopt, ENCODER, tmp_path / "ours.onnx")
    assert len(ours.graph.node) <= len(theirs.graph.node)
    feeds = {
        "input_ids": np.array([[1, 2, 3, 4]], np.int64),
        "attention_mask": np.ones((1, 4), np.int64),
    }
    names = {i.name for i in ours.graph.input}
    feeds = {k: v for k, v in feeds.items() if k in names}
    if len(feeds) == len(names):
        a, b = (onnxruntime.InferenceSession(str(tmp_path / f"{n}.onnx")).run(None, feeds) for n in ("theirs", "ours"))
        assert all(np.allclose(x, y, atol=1e-4) for x, y in zip(a, b, strict=True))


def test_the_argument_is_not_touched_and_paths_will_do(tmp_path: Path) -> None:
    model = onnx.load(MODELS / "shared.onnx")
    before = model.SerializeToString()
    made, ok = graphopt.simplify(model, check_n=3, perform_optimization=True)
    assert ok
    assert model.SerializeToString() == before
    again, _ = graphopt.simplify(str(MODELS / "shared.onnx"), output_path=str(tmp_path / "o.onnx"))
    assert again == made
    assert onnx.load(tmp_path / "o.onnx") == made


def test_shapes_in_each_of_their_spellings() -> None:
    name = onnx.load(MODELS / "shared.onnx").graph.input[0].name
    for option in ("overwrite_input_shapes", "input_shapes"):
        for given in ({name: [2, 8, 8, 8]}, [f"{name}:2,8,8,8"], [2, 8, 8, 8], {None: [2, 8, 8, 8]}):
            model, ok = graphopt.simplify(MODELS / "shared.onnx", **{option: given})
            assert ok
            assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [2, 8, 8, 8]


def test_what_is_to_be_left_alone_stays() -> None:
    def kinds(**options: Any) -> set[str]:
        return {node.op_type for node in graphopt.simplify(DEMO / "digits.onnx", **options)[0].graph.node}

    assert "BatchNormalization" not in kinds()
    for options in (
        {"skip_fuse_bn": True},
        {"skipped_optimizers": ["fuse_bn_into_conv"]},
        {"perform_optimization": False},
    ):
        assert "BatchNormalization" in kinds(**options)


def test_their_rewriter_runs() -> None:
    def rename(model: onnx.ModelProto) -> onnx.ModelProto:
        model.graph.name = "rewritten"
        return model

    assert graphopt.simplify(MODELS / "shared.onnx", custom_rewriter=rename)[0].graph.name == "rewritten"


def test_unused_outputs_go() -> None:
    model = onnx.load(MODELS / "shared.onnx")
    inner = model.graph.node[0].output[0]
    model.graph.output.append(onnx.ValueInfoProto(name=inner))
    made, ok = graphopt.simplify(model, unused_output=[inner])
    assert ok
    assert [o.name for o in made.graph.output] == [onnx.load(MODELS / "shared.onnx").graph.output[0].name]
    with pytest.raises(InputError, match="unused_output names 'nope'"):
        graphopt.simplify(model, unused_output=["nope"])
    with pytest.raises(InputError, match="every output"):
        graphopt.simplify(MODELS / "shared.onnx", unused_output=[o.name for o in made.graph.output])


def test_arguments_that_do_nothing_say_so() -> None:
    with pytest.warns(UserWarning, match="does nothing for 'providers'"):
        graphopt.simplify(MODELS / "shared.onnx", providers=["CUDAExecutionProvider"])
    graphopt.simplify(MODELS / "shared.onnx", include_subgraph=True, dynamic_input_shape=False)
    with pytest.raises(TypeError, match="did you mean 'check_rtol'"):
        graphopt.simplify(MODELS / "shared.onnx", check_rtoll=1)
    with pytest.raises(InputError, match="custom_lib"):
        graphopt.simplify(MODELS / "shared.onnx", custom_lib="ops.so")


def test_every_argument_of_theirs_is_known() -> None:
    import inspect

    import onnxsim

    from graphopt.drop_in import _NO_MATTER, _NOT_HERE

    ours = set(inspect.signature(graphopt.simplify).parameters) | _NO_MATTER | _NOT_HERE
    assert set(inspect.signature(onnxsim.simplify).parameters) <= ours


def test_input_data_of_theirs() -> None:
    data = np.load(DEMO / "calibration.npz")["image"][:1]
    model, ok = graphopt.simplify(DEMO / "digits.onnx", input_data={"image": data})
    assert ok
    assert len(model.graph.node) < len(onnx.load(DEMO / "digits.onnx").graph.node)


class _Program:
    """As ``torch.onnx.ONNXProgram`` looks."""

    __module__ = "torch.onnx._internal.exporter._onnx_program"

    def __init__(self) -> None:
        self.model_proto = onnx.load(MODELS / "shared.onnx")


class _Module:
    __module__ = "torch.nn.modules.container"


def test_what_torch_onnx_export_returns_is_a_model() -> None:
    program = _Program()
    before = program.model_proto.SerializeToString()
    result = graphopt.optimize(program, time=0)
    assert result.report["output"]["nodes"] <= len(program.model_proto.graph.node)
    assert program.model_proto.SerializeToString() == before
    with pytest.raises(InputError, match=r"no ONNX model yet; export it"):
        graphopt.optimize(_Module())


class _Tensor:
    """As a tensor of torch or TensorFlow looks."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array
        self.shape = array.shape

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray[Any, Any]:
        return self._array if dtype is None else self._array.astype(dtype)


class _Reader:
    """As ONNX Runtime's CalibrationDataReader."""

    def __init__(self, images: np.ndarray[Any, Any]) -> None:
        self._left = iter(images)

    def get_next(self) -> dict[str, Any] | None:
        image = next(self._left, None)
        return None if image is None else {"image": image[None]}


def test_calibration_data_as_pipelines_have_them() -> None:
    """The same images as numpy, generator, loader of (batch, labels), tensors, and reader give the same model."""
    images = np.load(DEMO / "calibration.npz")["image"][:16]

    class Loader:
        def __iter__(self) -> Any:
            for k in range(0, len(images), 4):
                yield _Tensor(images[k : k + 4]), _Tensor(np.zeros(4, np.int64))

    ways: dict[str, Any] = {
        "numpy": images,
        "dict": {"image": images},
        "generator": ({"image": image[None]} for image in images),
        "tensors": [_Tensor(image[None]) for image in images],
        "reader": _Reader(images),
    }
    made = {
        name: graphopt.quantize(DEMO / "digits.onnx", data=data, eval_data={"image": images}, time=0, allow_slower=True)
        for name, data in ways.items()
    }
    first = made["numpy"].model
    assert all(result.model == first for result in made.values())
    batches = graphopt.quantize(
        DEMO / "digits.onnx", data=Loader(), eval_data={"image": images}, time=0, allow_slower=True
    )
    assert batches.report["data"]["samples"] == 4
