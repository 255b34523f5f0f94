"""graphopt lint: each rule finds the file that breaks it, and none the file that does not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import builders
import numpy as np
import onnx
import pytest
from conftest import DEMO, MODELS, ROOT, run_cli
from onnx import TensorProto, helper

import graphopt
from graphopt.target import targets

WRITTEN = [name for name, target in targets().items() if not target.whole]


class File:
    """x -> pair -> Conv -> Relu -> pair -> MaxPool -> pair -> y; every part can be another one."""

    def __init__(self, **parts: Any) -> None:
        self.opset = 21
        self.kind: Any = np.uint8
        self.zero = 7
        self.in_scale: Any = 0.02
        self.weight: Any = np.full((4, 4, 3, 3), 60, np.int8)
        self.weight_zero: Any = np.zeros(4, np.int8)
        self.weight_axis = 0
        self.bias: Any = np.arange(4, dtype=np.int32)
        self.bias_scale: Any = np.full(4, 0.02 * 0.01, np.float32)
        self.bias_zero: Any = np.zeros(4, np.int32)
        self.pool_scale = 0.05
        self.pair_before_relu = False
        self.output_pair = True
        self.extra: list[onnx.NodeProto] = []
        self.__dict__.update(parts)

    def model(self) -> onnx.ModelProto:
        """As onnx has it."""
        weights = [
            builders.weight("s", self.in_scale),
            builders.weight("z", self.zero, self.kind),
            builders.weight("so", 0.05),
            builders.weight("sp", self.pool_scale),
            builders.weight("w", self.weight, self.weight.dtype),
            builders.weight("ws", np.full(4, 0.01)),
            builders.weight("wz", self.weight_zero, self.weight_zero.dtype),
        ]
        dq = helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], name="w_dq", axis=self.weight_axis)
        nodes = [*_pair("x", "xd", "s"), dq]
        inputs = ["xd", "wd"]
        if self.bias is not None:
            weights += [builders.weight("b", self.bias, self.bias.dtype)]
            if self.bias.dtype == np.int32:
                weights += [builders.weight("bs", self.bias_scale), builders.weight("bz", self.bias_zero, np.int32)]
                nodes.append(helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], name="b_dq", axis=0))
            inputs.append("bd" if self.bias.dtype == np.int32 else "b")
        nodes.append(helper.make_node("Conv", inputs, ["c"], name="conv", pads=[1, 1, 1, 1]))
        nodes += _pair("c", "cd", "so") if self.pair_before_relu else []
        nodes.append(helper.make_node("Relu", ["cd" if self.pair_before_relu else "c"], ["r"], name="relu"))
        nodes += _pair("r", "rd", "so") if self.output_pair else []
        nodes.append(
            helper.make_node("MaxPool", ["rd" if self.output_pair else "r"], ["p"], kernel_shape=[2, 2], name="pool")
        )
        nodes += _pair("p", "y", "sp") + self.extra
        x = builders.value("x", (1, 4, 8, 8))
        return builders.model(
            nodes, [x], [builders.value("y", None)], weights, opset=self.opset, domains=["com.microsoft"]
        )


def _pair(source: str, result: str, scale: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("QuantizeLinear", [source, scale, "z"], [f"{source}_q"], name=f"{source}_quantize"),
        helper.make_node("DequantizeLinear", [f"{source}_q", scale, "z"], [result], name=f"{result}_dq"),
    ]


def rules(model: onnx.ModelProto, target: str = "ort-cpu") -> set[str]:
    """The rules that found something."""
    return {finding["rule"] for finding in graphopt.lint(model, target)["findings"]}


INT8_FILE: dict[str, Any] = {"kind": np.int8, "zero": 0, "bias": np.zeros(4, np.float32)}


@pytest.mark.parametrize("target", ["ort-cpu", "ort-arm64", "openvino"])
def test_a_good_file_has_no_finding(target: str) -> None:
    report = graphopt.lint(File().model(), target)
    assert (report["findings"], report["errors"], report["warnings"], report["notes"]) == ([], 0, 0, [])


def test_a_good_file_for_tensorrt_has_no_finding() -> None:
    assert rules(File(**INT8_FILE).model(), "tensorrt") == set()


BROKEN: list[tuple[str, str, Callable[[], File]]] = [
    ("scale", "ort-cpu", lambda: File(in_scale=0.0)),
    ("scale", "ort-cpu", lambda: File(in_scale=np.nan)),
    ("scale", "ort-cpu", lambda: File(in_scale=1e-42)),
    ("scales-fit", "ort-cpu", lambda: File(weight=np.full((4, 5, 3, 3), 9, np.int8), weight_axis=1)),
    ("opset", "ort-cpu", lambda: File(opset=12)),
    ("activation-type", "ort-cpu", lambda: File(kind=np.uint16)),
    ("activation-type", "tensorrt", lambda: File()),
    ("activation-zero-point", "tensorrt", lambda: File(**{**INT8_FILE, "zero": 3})),
    (
        "weight-type",
        "openvino",
        lambda: File(weight=np.full((4, 4, 3, 3), 9, np.uint8), weight_zero=np.zeros(4, np.uint8)),
    ),
    ("weight-zero-point", "tensorrt", lambda: File(**INT8_FILE, weight_zero=np.ones(4, np.int8))),
    ("weight-zero-point", "ort-cpu", lambda: File(weight_zero=np.arange(4, dtype=np.int8))),
    ("weight-axis", "ort-cpu", lambda: File(weight_axis=1)),
    ("bias", "ort-cpu", lambda: File(bias_scale=np.full(4, 0.5, np.float32))),
    ("bias", "ort-cpu", lambda: File(bias_zero=np.ones(4, np.int32))),
    ("bias", "tensorrt", lambda: File(kind=np.int8, zero=0)),
    ("pair-before-activation", "ort-cpu", lambda: File(pair_before_relu=True)),
    ("output-in-float", "ort-cpu", lambda: File(output_pair=False)),
    ("shared-scale", "ort-cpu", lambda: File(pool_scale=0.07)),
    ("saturation", "ort-cpu", lambda: File(weight=np.full((4, 4, 3, 3), 100, np.int8))),
    (
        "unsupported",
        "tensorrt",
        lambda: File(extra=[helper.make_node("DynamicQuantizeLinear", ["y"], ["a", "b1", "c1"])]),
    ),
    ("detour", "ort-cpu", lambda: File(extra=[helper.make_node("Erf", ["y"], ["e"]), *_pair("e", "ed", "sp")])),
    ("rounded-twice", "ort-cpu", lambda: File(extra=_pair("y", "y2", "s"))),
    ("several-scales", "ort-cpu", lambda: File(extra=[_other("p")])),
    ("float-island", "qnn-htp", lambda: File(extra=[helper.make_node("Relu", ["p"], ["i"], name="island")])),
]


def _other(source: str) -> onnx.NodeProto:
    return helper.make_node("QuantizeLinear", [source, "s", "z"], ["other"], name="other_quantize")


@pytest.mark.parametrize(("rule", "target", "make"), BROKEN, ids=[f"{r}-{t}-{i}" for i, (r, t, _) in enumerate(BROKEN)])
def test_a_broken_file_is_found(rule: str, target: str, make: Callable[[], File]) -> None:
    assert rule in rules(make().model(), target)


def test_arm_and_vnni_do_not_saturate() -> None:
    model = File(weight=np.full((4, 4, 3, 3), 100, np.int8)).model()
    assert "saturation" in rules(model, "ort-cpu")
    assert rules(model, "ort-arm64") == set()


def test_weights_without_data_and_data_without_weights() -> None:
    x, y = builders.value("x", (2, 4)), builders.value("y", (2, 4))
    integers = [
        builders.weight("w", np.full((4, 4), 3), np.int8),
        builders.weight("s", 0.1),
        builders.weight("z", 0, np.int8),
    ]
    dq = helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"], name="dq")
    only_weights = builders.model([dq, helper.make_node("MatMul", ["x", "wd"], ["y"], name="mm")], [x], [y], integers)
    assert rules(only_weights) == {"half-quantized"}
    floats = [builders.weight("w", np.ones((4, 4))), builders.weight("s", 0.1), builders.weight("z", 0, np.uint8)]
    nodes = [*_pair("x", "xd", "s"), helper.make_node("MatMul", ["xd", "w"], ["y"], name="mm")]
    assert rules(builders.model(nodes, [x], [y], floats)) == {"half-quantized"}


def test_fake_quantized_weights_are_told(tmp_path: Path) -> None:
    x, y = builders.value("x", (2, 4)), builders.value("y", (2, 4))
    weights = [builders.weight("w", np.ones((4, 4))), builders.weight("s", 0.1), builders.weight("z", 0, np.uint8)]
    nodes = [*_pair("x", "xd", "s"), *_pair("w", "wd", "s"), helper.make_node("MatMul", ["xd", "wd"], ["y"], name="mm")]
    model = builders.model(nodes, [x], [y], weights)
    assert rules(model) == {"float-weight"}
    assert rules(graphopt.optimize(model, passes=["fold-qdq-weights"], time=0).model) == set(), (
        "the fix it names is one"
    )


def test_bodies_are_judged_too() -> None:
    inner = File(in_scale=0.0).model().graph
    body = helper.make_graph(list(inner.node), "then", [], [builders.value("y", None)])
    other = builders.branch("else", [helper.make_node("Identity", ["x"], ["e"])], "e")
    node = helper.make_node("If", ["c"], ["out"], then_branch=body, else_branch=other, name="if")
    inputs = [builders.value("x", (1, 4, 8, 8)), builders.value("c", (), TensorProto.BOOL)]
    model = builders.model([node], inputs, [builders.value("out", None)], list(inner.initializer))
    assert "scale" in rules(model)


def test_nothing_to_judge_is_said() -> None:
    report = graphopt.lint(builders.mlp())
    assert report["findings"] == []
    assert report["notes"] == ["the model is not quantized: it has no Q/DQ to judge"]


@pytest.mark.parametrize("target", WRITTEN)
def test_what_quantize_writes_for_a_target_is_right_for_it(target: str) -> None:
    made = graphopt.quantize(DEMO / "digits.onnx", data=DEMO / "calibration.npz", samples=16, target=target, time=0)
    report = graphopt.lint(made.model, target)
    assert report["findings"] == []
    assert report["quantization"]["QuantizeLinear"] > 5
    worst = min(output["sqnr_db"] for output in made.report["comparison"]["outputs"])
    assert worst > 30


def test_one_targets_file_is_wrong_for_another() -> None:
    made = graphopt.quantize(DEMO / "digits.onnx", data=DEMO / "calibration.npz", samples=8, target="ort-cpu", time=0)
    assert {"activation-type", "bias"} <= rules(made.model, "tensorrt")


def test_a_target_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(graphopt.GraphoptError, match="graphopt lint M --target qnn-htp"):
        graphopt.quantize(DEMO / "digits.onnx", data=DEMO / "calibration.npz", samples=4, target="qnn-htp", time=0)


def test_weights_the_target_does_not_take_are_refused() -> None:
    with pytest.raises(graphopt.GraphoptError, match="openvino takes int8"):
        graphopt.quantize(
            DEMO / "digits.onnx", data=DEMO / "calibration.npz", samples=4, target="openvino", weights="u8", time=0
        )


def test_the_verb(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.onnx", tmp_path / "bad file.onnx"
    onnx.save(File().model(), good)
    onnx.save(File(in_scale=0.0, pair_before_relu=True).model(), bad)
    assert run_cli("lint", good).code == 0
    ran = run_cli("lint", bad)
    assert ran.code == 1
    assert "error scale" in ran.out
    assert "at x_quantize" in ran.out
    assert "fix: " in ran.out
    report = json.loads(run_cli("lint", bad, "--json").out)
    assert report["errors"] > 0
    assert {"rule", "severity", "node", "problem", "fix", "source"} == set(report["findings"][0])
    assert run_cli("lint", bad, "-q").out == ""
    warned = tmp_path / "warned.onnx"
    onnx.save(File(pool_scale=0.07).model(), warned)
    assert run_cli("lint", warned).code == 0
    assert run_cli("lint", warned, "--strict").code == 1


def test_bad_input(tmp_path: Path) -> None:
    good = tmp_path / "good.onnx"
    onnx.save(File().model(), good)
    ran = run_cli("lint", good, "--target", "tensrrt")
    assert (ran.code, ran.err.strip()) == (2, "error: unknown target 'tensrrt'; did you mean 'tensorrt'?")
    ran = run_cli("lint", tmp_path / "missing.onnx")
    assert ran.code == 2
    assert ran.err.startswith("error: no such file")


def test_every_rule_is_documented() -> None:
    text = (ROOT / "docs" / "lint.md").read_text(encoding="utf-8")
    source = "".join((ROOT / "graphopt" / "linting" / f).read_text() for f in ("pairs.py", "operators.py"))
    names = set(re.findall(r'(?:error|warning)\(\s*"([a-z-]+)"', source))
    assert len(names) > 15
    assert {name for name in names if f"`{name}`" not in text} == set()
    assert {rule for rule, _, _ in BROKEN} <= names


@pytest.mark.parametrize("target", ["tensorrt", "openvino"])
def test_targets_with_an_integer_convtranspose_get_one(target: str) -> None:
    made = graphopt.quantize(MODELS / "convtranspose.onnx", data="random", target=target, time=0)
    kinds = [change["detail"].split(":")[0] for e in made.report["ledger"] for change in e["changes"]]
    assert "ConvTranspose" in kinds
    assert graphopt.lint(made.model, target)["findings"] == []
