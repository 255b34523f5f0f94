"""``graphopt compare --layerwise``: the value where two models part is named, whatever else happens to them."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from builders import chain, external, model, value, weight
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.cli import run
from graphopt.divergence import Layer, Tolerances, findings, tolerances
from graphopt.errors import InputError, RuntimeFailure
from graphopt.layerwise import compare_layers, match_values
from graphopt.model import load

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "graphopt" / "demo"
DIGITS, CALIBRATION, EVALUATION = (DEMO / n for n in ("digits.onnx", "calibration.npz", "evaluation.npz"))
FIXTURES = {path.stem: path for path in sorted((ROOT / "fixtures" / "models").glob("*.onnx"))}
RUNNABLE = sorted(set(FIXTURES) - {"custom"})

Feeds = Mapping[str, npt.NDArray[Any]]


def layers_of(a: Any, b: Any, feeds: list[dict[str, Any]], **options: Any) -> tuple[dict[str, Layer], dict[str, Any]]:
    first, second = load(a), load(b)
    matches, unmatched = match_values(first, second)
    layers = compare_layers(first, second, lambda: feeds, matches, threads=1, **options)
    return {layer.match.a: layer for layer in layers}, findings(layers, unmatched, Tolerances())


def digits(count: int = 8) -> list[dict[str, Any]]:
    with np.load(EVALUATION) as stored:
        return [{"image": stored["image"][i : i + 1]} for i in range(count)]


def fixture_feeds(name: str, count: int = 3) -> list[dict[str, Any]]:
    with np.load(ROOT / f"fixtures/data/{name}.npz", allow_pickle=False) as stored:
        arrays = dict(stored)
    return [{k: v[i : i + 1] for k, v in arrays.items()} for i in range(count)]


def planted(name: str, factor: float = 1.5) -> onnx.ModelProto:
    """The demo with one output channel of one weight scaled."""
    proto = onnx.load(DIGITS)
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array[0] *= factor
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    return proto


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layerwise") / "int8.onnx"
    graphopt.quantize(DIGITS, data=CALIBRATION, time=0).save(path)
    return path


# Where they part


@pytest.mark.parametrize(
    ("tensor", "output"),
    [
        ("block2.conv1.weight", "/block2/conv1/Conv_output_0"),
        ("separable.depthwise.weight", "/separable/depthwise/Conv_output_0"),
        ("block1.norm2.weight", "/block1/norm2/BatchNormalization_output_0"),
    ],
)
def test_one_wrong_weight_is_found(tensor: str, output: str) -> None:
    layers, found = layers_of(DIGITS, planted(tensor), digits())
    assert found["first"]["value"] == output
    assert found["steepest"]["value"] == output
    assert found["first"]["inputs_sqnr_db"] is None  # what goes in is identical
    names = list(layers)
    assert all(layers[n].lowest == float("inf") for n in names[: names.index(output)])


def test_a_wrong_weight_is_found_in_a_model_whose_names_are_all_others(tmp_path: Path) -> None:
    proto = planted("block2.conv1.weight")
    names: dict[str, str] = {"image": "image", "logits": "logits", "": ""}
    for node in proto.graph.node:
        node.name = f"n{len(names)}"
        for group in (node.input, node.output):
            group[:] = [names.setdefault(n, f"t{len(names)}") for n in group]
    for tensor in proto.graph.initializer:
        tensor.name = names[tensor.name]
    del proto.graph.value_info[:]
    _, found = layers_of(DIGITS, proto, digits())
    assert found["first"]["value"] == "/block2/conv1/Conv_output_0"


@pytest.mark.parametrize("name", RUNNABLE)
def test_an_optimized_model_does_not_part_from_its_original(name: str) -> None:
    optimized = graphopt.optimize(FIXTURES[name], time=0).model
    layers, found = layers_of(FIXTURES[name], optimized, fixture_feeds(name))
    assert found["first"] is None
    assert found["steepest"] is None
    assert layers


def test_the_optimized_demo_does_not_part_either() -> None:
    optimized = graphopt.optimize(DIGITS, time=0).model
    layers, found = layers_of(DIGITS, optimized, digits())
    assert found["first"] is None
    others = [v for v in found["values"] if v["other_value"]]
    assert len(others) <= 2  # values of Convs that were fused with what follows
    assert layers["logits"].lowest > 100


def test_a_softmax_that_is_sure_hides_nothing() -> None:
    """Its result agrees to rounding though everything before it is a little off."""
    table = np.eye(4, dtype=np.float32) * 200
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
        helper.make_node("Mul", ["h", "two"], ["m"], name="second"),
        helper.make_node("Softmax", ["m"], ["s"], name="sure"),
        helper.make_node("Identity", ["s"], ["y"], name="out"),
    ]

    def made(scale: float) -> onnx.ModelProto:
        stored = [weight("w", table * scale), weight("two", 2.0)]
        return model(nodes, [value("x", (1, 4))], [value("y", (1, 4))], stored)

    feeds = [{"x": np.roll(np.array([[1, 0.1, 0.2, 0.3]], np.float32), i)} for i in range(4)]
    layers, found = layers_of(made(1.0), made(1.01), feeds)
    assert not layers["y"].differs
    assert [layers[n].elsewhere for n in ("h", "m")] == [False, False]
    assert found["first"]["value"] == "h"


def test_what_is_called_equalized_in_both_is_compared() -> None:
    model = onnx.load(DIGITS)
    old = next(node for node in model.graph.node if node.op_type == "Conv").output[0]
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["image_equalized" if name == old else name for name in names]
    layers, found = layers_of(model, model, digits(4))
    assert "image_equalized" in layers
    assert "image_equalized" not in found["unmatched"]


def test_every_float_value_of_a_quantized_model_gets_its_sqnr(quantized: Path) -> None:
    layers, found = layers_of(DIGITS, quantized, digits(16))
    assert not any(layer.elsewhere for layer in layers.values())
    floats = [layer for layer in layers.values() if layer.kind == "f"]
    scaled = {"/block2/norm1/BatchNormalization_output_0", "/block2/act1/Relu_output_0"}  # equalize's: other numbers
    assert scaled <= set(found["unmatched"])
    assert len(floats) + len(scaled) >= 25
    assert all(layer.lowest > 10 for layer in floats)
    read_quantized = [layer for layer in floats if layer.match.after is not None]
    assert len(read_quantized) >= 12
    assert all(v["quantized"]["sqnr_db"] is not None for v in found["values"] if v["quantized"])
    assert layers["image"].direct.sqnr == float("inf")
    assert 40 < layers["image"].effective < 70
    assert found["first"]["value"] == "image"
    assert found["steepest"]["inputs_sqnr_db"] > found["steepest"]["sqnr_db"]


def test_the_result_does_not_depend_on_the_memory_given() -> None:
    wrong = planted("block1.conv1.weight")
    one, _ = layers_of(DIGITS, wrong, digits(4))
    many, _ = layers_of(DIGITS, wrong, digits(4), memory=100_000)
    assert {n: layer.as_dict() for n, layer in one.items()} == {n: layer.as_dict() for n, layer in many.items()}


# What values may hold


def two(nodes: list[onnx.NodeProto], a: dict[str, Any], b: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    made = []
    for tensors in (a, b):
        stored = [weight(k, v, np.asarray(v).dtype) for k, v in tensors.items()]
        made.append(model(nodes, [value("x", (4,))], [value("y", None)], stored, **options))
    return made[0], made[1]


def test_nan_and_inf_are_counted_and_placed() -> None:
    nodes = [helper.make_node("Log", ["x"], ["l"]), helper.make_node("Mul", ["l", "w"], ["y"])]
    a, b = two(nodes, {"w": np.ones(4, np.float32)}, {"w": np.array([1, 1, 1, np.nan], np.float32)})
    feeds = [{"x": np.array([1, 2, 3, 4], np.float32)}, {"x": np.array([-1, 0, 3, 4], np.float32)}]
    layers, found = layers_of(a, b, feeds)
    assert layers["l"].odd_a.as_dict() == {"nan": 1, "inf": 1, "sample": 1, "index": [0]}
    assert not layers["l"].differs  # the same NaN in the same places
    assert layers["y"].odd_b.as_dict() == {"nan": 3, "inf": 1, "sample": 0, "index": [3]}
    assert found["first"]["value"] == "y"
    assert "NaN" in found["first"]["why"]


def test_an_attention_mask_hides_nothing() -> None:
    lowest = float(np.finfo(np.float32).min)
    nodes = [helper.make_node("Mul", ["x", "w"], ["s"]), helper.make_node("Where", ["c", "m", "s"], ["y"])]
    mask = {"c": np.array([True, False, False, False]), "m": np.float32(lowest)}
    a, b = two(nodes, {"w": np.float32(1), **mask}, {"w": np.float32(1.1), **mask})
    layers, _ = layers_of(a, b, [{"x": np.array([1, 2, 3, 4], np.float32)}])
    assert layers["y"].lowest == pytest.approx(20, abs=0.1)
    assert layers["y"].direct.scale == 4
    half = {"w": np.float16(1), "c": mask["c"], "m": np.float16(-65504)}
    cast = [helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16), *nodes]
    cast[1].input[0] = "h"
    a, b = two(cast, half, {**half, "w": np.float16(1.1)})
    for proto in (a, b):
        proto.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    layers, _ = layers_of(a, b, [{"x": np.array([1, 2, 3, 4], np.float32)}])
    assert layers["y"].lowest == pytest.approx(20, abs=0.2)


def test_a_mask_with_the_other_sign_is_a_difference() -> None:
    nodes = [helper.make_node("Add", ["x", "m"], ["y"])]
    a, b = two(nodes, {"m": np.float32(-3e38)}, {"m": np.float32(3e38)})
    layers, found = layers_of(a, b, [{"x": np.ones(4, np.float32)}])
    assert found["first"]["value"] == "y"
    assert layers["y"].lowest < 0


def test_what_is_random_in_the_original_is_excluded() -> None:
    nodes = [
        helper.make_node("RandomNormalLike", ["x"], ["r"]),
        helper.make_node("Mul", ["x", "w"], ["k"]),
        helper.make_node("Add", ["k", "r"], ["y"]),
    ]
    a, b = two(nodes, {"w": np.float32(2)}, {"w": np.float32(3)})
    layers, found = layers_of(a, b, [{"x": np.ones(4, np.float32)}] * 2)
    assert set(found["nondeterministic"]) == {"r", "y"}
    assert found["first"]["value"] == "k"
    assert Tolerances(min_sqnr=100).past(layers["y"]) is None


def test_values_that_are_no_numbers_are_compared_too() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["text"], to=TensorProto.STRING),
        helper.make_node("SequenceConstruct", ["x", "x"], ["parts"]),
        helper.make_node("SequenceAt", ["parts", "i"], ["one"]),
        helper.make_node("Mul", ["one", "w"], ["y"]),
    ]
    a, b = two(nodes, {"i": np.int64(0), "w": np.float32(1)}, {"i": np.int64(0), "w": np.float32(2)})
    layers, found = layers_of(a, b, [{"x": np.ones(4, np.float32)}])
    assert set(layers) == {"text", "parts", "one", "y"}
    assert found["first"]["value"] == "y"


def test_another_width_of_floats_is_compared_by_value() -> None:
    nodes = [helper.make_node("Mul", ["x", "w"], ["y"])]
    a, _ = two(nodes, {"w": np.float32(1.2345)}, {"w": np.float32(0)})
    half = [
        helper.make_node("Cast", ["x"], ["xh"], to=TensorProto.FLOAT16),
        helper.make_node("Mul", ["xh", "w"], ["y"]),
    ]
    b = model(half, [value("x", (4,))], [value("y", None, TensorProto.FLOAT16)], [weight("w", 1.2345, np.float16)])
    layers, _ = layers_of(a, b, [{"x": np.array([1, 2, 3, 4], np.float32)}])
    assert 50 < layers["y"].lowest < 90


def test_another_shape_says_so() -> None:
    a = model([helper.make_node("Relu", ["x"], ["y"])], [value("x", (4,))], [value("y", None)])
    b = model([helper.make_node("Reshape", ["x", "s"], ["y"])], [value("x", (4,))], [value("y", None)])
    b.graph.initializer.append(weight("s", [2, 2], np.int64))
    _, found = layers_of(a, b, [{"x": np.ones(4, np.float32)}])
    assert "[2, 2] instead of" in found["first"]["why"]


# Memory


BOUNDED = """
import resource, sys
import numpy as np, onnx
from onnx import helper, TensorProto
sys.path.insert(0, {tests!r})
from builders import model, value, weight
from graphopt.divergence import Tolerances, findings
from graphopt.layerwise import layerwise
from graphopt.model import load

def made(wrong):
    nodes = [helper.make_node("Mul", [f"v{{i}}", "w" if i != wrong else "w2"], [f"v{{i + 1}}"], name=f"n{{i}}")
             for i in range(300)]
    return load(model(nodes, [value("v0", (1, 500_000))], [value("v300", None)],
                      [weight("w", 1.0001), weight("w2", 1.01)]))

feeds = [{{"v0": np.full((1, 500_000), i + 1, np.float32)}} for i in range(2)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report, _ = layerwise(made(None), made(170), lambda: feeds, Tolerances(), memory="100MB", threads=1)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(report["first"]["node"], len(report["values"]), round(grown), flush=True)
"""


def test_three_hundred_nodes_stay_within_the_memory_given() -> None:
    """Their values are 600 MB a model; the growth is that of the taps, and of a runtime that holds two models."""
    if sys.platform == "win32":
        pytest.skip("no resource module")
    code = BOUNDED.format(tests=str(ROOT / "tests"))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    node, count, grown = done.stdout.split()
    assert (node, count) == ("n170", "300")
    assert int(grown) < 400


# The verb


def test_the_verb_shows_one_screen(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["compare", str(DIGITS), str(quantized), "--data", str(EVALUATION), "--samples", "8", "--layerwise"]
    assert run(line) == 0
    text = capsys.readouterr().out
    assert "the SQNR falls most at " in text
    assert "first value that differs: image" in text
    assert len(text.splitlines()) <= 32
    assert run([*line, "-v"]) == 0
    everything = capsys.readouterr().out
    assert len(everything.splitlines()) > len(text.splitlines())
    assert "/stem/Conv_output_0" in everything  # only in A
    assert run([*line, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layers"]["first"]["value"] == "image"
    assert len(report["layers"]["values"]) > 20


def test_only_a_tolerance_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "wrong.onnx"
    onnx.save(planted("block2.conv1.weight"), other)
    line = ["compare", str(DIGITS), str(other), "--data", str(EVALUATION), "--samples", "8", "--layerwise"]
    assert run(line) == 0
    assert run([*line, "--min-sqnr", "10"]) == 0
    assert "every value is within min-sqnr 10" in capsys.readouterr().out
    assert run([*line, "--min-sqnr", "31"]) == 1
    captured = capsys.readouterr()
    assert "first value past min-sqnr 31: /block2/conv1/Conv_output_0" in captured.out
    assert "layerwise min-sqnr 31 failed: first past it is '/block2/conv1/Conv_output_0' (Conv" in captured.err
    assert run([*line, "--max-abs", "logits:5"]) == 0
    assert run([*line, "--max-abs", "logits:1e-3"]) == 1
    assert run([*line, "--max-abs", "1e-3", "--max-abs", "logits:5"]) == 1
    assert "max-abs 0.001" in capsys.readouterr().out


def test_tolerances_of_single_outputs_work_without_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", str(DIGITS), str(DIGITS), "--max-abs", "logits:0", "--max-abs", "1"]) == 0
    assert run(["compare", str(DIGITS), str(DIGITS), "--max-abs", "logit:0"]) == 2
    assert "did you mean 'logits'?" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["x", "out0:", "-1", "out:nan", "out0:-3"])
def test_what_is_no_tolerance_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no tolerance; write 1e-3 for all, or out0:1e-3"):
        tolerances(None, text)


def test_tolerances_in_python() -> None:
    assert tolerances(None, 0.5) == Tolerances(None, 0.5)
    assert tolerances(3.0, {"a:b": 1}) == Tolerances(3.0, None, {"a:b": 1.0})
    assert tolerances(None, ["1", "o:2"]).limit("o") == 2
    assert not tolerances(None, None)


def test_memory_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["compare", str(DIGITS), str(DIGITS)]
    assert run([*line, "--memory", "1GB"]) == 2
    assert "give --layerwise too" in capsys.readouterr().err
    for text in ("10", "much"):
        assert run([*line, "--layerwise", "--memory", text]) == 2
        assert "512MB" in capsys.readouterr().err or text == "much"


def test_a_model_that_does_not_load_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    custom = str(FIXTURES["custom"])
    assert run(["compare", custom, custom, "--layerwise"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "MysteryOp" in captured.err
    other = load(chain(2))
    other.graph[1].domain, other.graph[1].op_type = "com.example", "MysteryOp"
    other.opset_imports["com.example"] = 1
    matches, _ = match_values(load(chain(2)), other)
    with pytest.raises(RuntimeFailure, match=r"^B: ONNX Runtime cannot load"):
        compare_layers(load(chain(2)), other, lambda: [{"v0": np.ones(2, np.float32)}], matches)


# graphopt view


class FakeNetron(types.ModuleType):
    def __init__(self, fails: bool = False) -> None:
        super().__init__("netron")
        self.calls: list[tuple[str, Any]] = []
        self.fails = fails

    def start(self, file: str, address: int | None = None, browse: bool = True) -> tuple[str, int]:
        if self.fails:
            raise OSError(98, "Address already in use")
        self.calls.append(("start", (file, address, browse)))
        return "localhost", address or 8080

    def wait(self) -> None:
        self.calls.append(("wait", None))
        raise KeyboardInterrupt

    def stop(self, address: Any = None) -> None:
        self.calls.append(("stop", address))


def test_view_opens_netron(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeNetron()
    monkeypatch.setitem(sys.modules, "netron", fake)
    assert run(["view", str(DIGITS), "--no-browser", "--port", "9000"]) == 0
    assert fake.calls == [("start", (str(DIGITS), 9000, False)), ("wait", None), ("stop", ("localhost", 9000))]
    assert "http://localhost:9000" in capsys.readouterr().out
    assert run(["view", str(DIGITS)]) == 0
    assert fake.calls[3] == ("start", (str(DIGITS), None, True))


def test_view_hands_on_no_model_that_points_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeNetron()
    monkeypatch.setitem(sys.modules, "netron", fake)
    (tmp_path / "in").mkdir()
    outside = external(tmp_path / "in", "../secret.bin")
    assert run(["view", str(outside)]) == 2
    assert "lies outside the model's folder" in capsys.readouterr().err
    assert not fake.calls
    within = external(tmp_path / "in")
    assert run(["view", str(within)]) == 0
    assert fake.calls[0] == ("start", (str(within), None, True))


def test_view_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "netron", None)
    assert run(["view", str(DIGITS)]) == 2
    assert 'netron is not installed; run: pip install "graphopt[view]"' in capsys.readouterr().err
    assert run(["view", "nowhere.onnx"]) == 2
    assert "no such file: nowhere.onnx" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "netron", FakeNetron(fails=True))
    assert run(["view", str(DIGITS), "--port", "80"]) == 2
    assert "cannot serve on port 80: Address already in use; give another with --port" in capsys.readouterr().err
