"""upgrade-opset: old models load at a later opset with the same numbers, names and metadata."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from support import MODELS, apply, build, fixture_feeds, node, ops, reasons, run

from graphopt import optimize
from graphopt.errors import PreconditionError
from graphopt.model import graphs
from graphopt.passes.upgrade_opset import UpgradeOpset

RNG = np.random.default_rng(4)
IMAGE = [1, 2, 4, 4]


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def _classifier(opset: int) -> onnx.ModelProto:
    weights = {"w": normal(4, 2, 3, 3), "g": normal(4), "b": normal(4), "m": normal(4), "v": np.abs(normal(4))}
    return build(
        [
            node("Conv", ["x", "w"], "c", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            node("BatchNormalization", ["c", "g", "b", "m", "v"], "n"),
            node("MaxPool", ["n"], "p", kernel_shape=[2, 2], strides=[2, 2]),
            node("Dropout", ["p"], "d"),
            node("ReduceMean", ["d"], "r", axes=[2, 3], keepdims=0),
            node("Softmax", ["r"], "y", axis=1),
        ],
        {"x": ["batch", 2, 4, 4]},
        {"y": ["batch", 4]},
        weights,
        opset=opset,
        ir_version=3,
        inputs_too=True,
    )


def _softmax_of_an_image(opset: int) -> onnx.ModelProto:
    """Before 13 Softmax flattened; the converter makes several nodes of it, with one name."""
    return build([node("Softmax", ["x"], "s"), node("Neg", ["s"], "y")], {"x": IMAGE}, {"y": IMAGE}, opset=opset)


def _attributes_that_became_inputs(opset: int) -> onnx.ModelProto:
    made = [
        node("Unsqueeze", ["x"], "u", axes=[0]),
        node("Squeeze", ["u"], "q", axes=[0]),
        node("Split", ["q"], ["a", "b"], axis=1, split=[1, 1]),
        node("Add", ["a", "b"], "t"),
    ]
    if opset < 11:
        made += [node("Clip", ["t"], "k", min=-1.0, max=1.0), node("Pad", ["k"], "e", pads=[0, 0, 1, 1, 0, 0, 1, 1])]
    else:
        made += [node("Neg", ["t"], "e")]
    made.append(node("ReduceSum", ["e"], "y", axes=[1], keepdims=1))
    return build(made, {"x": IMAGE}, ["y"], opset=opset, ir_version=4)


def _upsample(opset: int) -> onnx.ModelProto:
    if opset < 9:
        made = [node("Upsample", ["x"], "y", scales=[1.0, 1.0, 2.0, 2.0])]
    elif opset == 9:
        scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32))
        made = [node("Constant", [], "s", value=scales), node("Upsample", ["x", "s"], "y")]
    else:
        scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32))
        empty = numpy_helper.from_array(np.zeros(0, np.float32))
        made = [node("Constant", [], "s", value=scales), node("Constant", [], "roi", value=empty)]
        made.append(node("Resize", ["x", "s"] if opset == 10 else ["x", "roi", "s"], "y"))
    return build(made, {"x": IMAGE}, ["y"], opset=opset, ir_version=4)


def _branches(opset: int) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    branch = [
        helper.make_graph(
            [node("Unsqueeze", ["x"], f"u{i}", axes=[0]), node("Squeeze", [f"u{i}"], f"o{i}", axes=[0])],
            f"b{i}",
            [],
            [info(f"o{i}", 1, IMAGE)],
        )
        for i in (0, 1)
    ]
    made = [node("If", ["c"], "y", then_branch=branch[0], else_branch=branch[1])]
    return build(made, {"x": IMAGE}, ["y"], {"c": np.array(True)}, opset=opset, ir_version=4)


MAKERS: list[Callable[[int], onnx.ModelProto]] = [
    _classifier,
    _softmax_of_an_image,
    _attributes_that_became_inputs,
    _upsample,
    _branches,
]


@pytest.mark.parametrize("opset", range(7, 13))
@pytest.mark.parametrize("make", MAKERS, ids=lambda m: m.__name__.strip("_"))
def test_the_same_model_at_thirteen(make: Callable[[int], onnx.ModelProto], opset: int) -> None:
    proto = make(opset)
    proto.doc_string, proto.producer_name, proto.graph.doc_string = "doc", "me", "graph doc"
    proto.graph.node[0].doc_string = "first"
    helper.set_model_props(proto, {"author": "me"})
    made, entry = apply(proto, UpgradeOpset())
    assert entry.changes[0].detail == f"opset {opset} -> 13"
    assert made.opset_import[0].version == 13
    names = [n.name for n in made.graph.node if n.name]
    assert len(set(names)) == len(names)
    assert set(names) >= {n.name for n in proto.graph.node}
    assert next(n for n in made.graph.node if n.name == proto.graph.node[0].name).doc_string == "first"
    assert (made.doc_string, made.producer_name, made.graph.doc_string) == ("doc", "me", "graph doc")
    assert list(made.metadata_props) == list(proto.metadata_props)
    assert list(made.graph.input) == list(proto.graph.input)
    assert list(made.graph.output) == list(proto.graph.output)
    feeds = {"x": normal(*IMAGE)}
    np.testing.assert_allclose(run(made, feeds)["y"], run(proto, feeds)["y"], rtol=1e-5, atol=1e-6)


def test_value_docs_survive() -> None:
    proto = _attributes_that_became_inputs(9)
    value = helper.make_tensor_value_info("t", 1, ["batch", 1, 4, 4])
    value.doc_string = "the sum"
    proto.graph.value_info.append(value)
    made, _ = apply(proto, UpgradeOpset())
    assert next(v for v in made.graph.value_info if v.name == "t") == value


def test_the_fixtures_and_a_custom_operator() -> None:
    proto = onnx.load(MODELS / "opset11.onnx")
    made, _ = apply(proto, UpgradeOpset())
    feeds = fixture_feeds("opset11", 1)[0]
    np.testing.assert_allclose(run(made, feeds)["probabilities"], run(proto, feeds)["probabilities"], atol=1e-6)
    proto = build(
        [node("Squeeze", ["x"], "s", axes=[0]), node("Mystery", ["s"], "y", domain="com.example")],
        {"x": [1, 4]},
        ["y"],
        opset=11,
        domains=["com.example"],
    )
    made, entry = apply(proto, UpgradeOpset())
    assert entry.changes
    assert "Mystery" in ops(made)
    assert {o.domain for o in made.opset_import} == {"", "com.example"}


def test_a_recent_model_is_left_and_an_unknown_opset_refused() -> None:
    proto = build([node("Neg", ["x"], "y")], {"x": [1]}, ["y"], opset=17)
    made, entry = apply(proto, UpgradeOpset())
    assert "at opset 17 already" in reasons(entry)["(graph)"]
    assert made.SerializeToString() == proto.SerializeToString()
    with pytest.raises(PreconditionError, match="opset 99 is not known"):
        apply(proto, UpgradeOpset(to=99))


def test_a_converter_that_fails_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("No Adapter From Version 8\nfor Scan")

    monkeypatch.setattr(onnx.version_converter, "convert_version", fail)
    with pytest.raises(PreconditionError, match=r"from opset 8 to 13 .*Scan.*export it again at opset 13") as caught:
        apply(build([node("Neg", ["x"], "y")], {"x": [1]}, ["y"], opset=8, ir_version=4), UpgradeOpset())
    assert "\n" not in str(caught.value)


def test_nodes_of_one_name_in_both_branches_keep_what_is_said_of_them() -> None:
    branches = []
    for side in ("then", "else"):
        made = helper.make_node("ReduceSum", ["x"], [side], name="same", axes=[0], doc_string=f"the {side} side")
        output = helper.make_tensor_value_info(side, onnx.TensorProto.FLOAT, IMAGE)
        branches.append(helper.make_graph([made], side, [], [output]))
    proto = build(
        [node("If", ["go"], "y", then_branch=branches[0], else_branch=branches[1])],
        {"x": IMAGE},
        {"y": IMAGE},
        {"go": np.array(True)},
        opset=11,
    )
    model, entry = apply(proto, UpgradeOpset(to=13))
    assert entry.status == "changed"
    for attribute in model.graph.node[0].attribute:
        side = attribute.g.output[0].name
        (kept,) = [n for n in attribute.g.node if n.op_type == "ReduceSum"]
        assert (kept.name, kept.doc_string) == ("same", f"the {side} side")


def test_scan_of_opset_8_is_refused() -> None:
    """It had a batch dim and other inputs; the converter leaves it, and ONNX Runtime does not load the result."""
    body = helper.make_graph(
        [helper.make_node("Neg", ["a"], ["b"])],
        "body",
        [helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, [2])],
    )
    scan = node("Scan", ["", "x"], "y", body=body, num_scan_inputs=1)
    proto = build([scan], {"x": [1, 3, 2]}, {"y": [1, 3, 2]}, opset=8, ir_version=3)
    with pytest.raises(PreconditionError, match="Scan had a batch dim before opset 9"):
        apply(proto, UpgradeOpset(to=13))


def _with_function() -> onnx.ModelProto:
    inner = [node("Squeeze", ["a"], "s", axes=[0]), node("Relu", ["s"], "b")]
    function = helper.make_function("mine", "Block", ["a"], ["b"], inner, [helper.make_opsetid("", 11)])
    made = build(
        [node("Block", ["x"], "y", domain="mine")], {"x": [1, 4]}, ["y"], opset=11, ir_version=8, domains=["mine"]
    )
    made.functions.append(function)
    return made


def test_functions_would_be_left_behind() -> None:
    with pytest.raises(PreconditionError, match=r"functions, and 1 of the model's \(Block.*run inline-functions first"):
        apply(_with_function(), UpgradeOpset())


def test_on_request_functions_are_inlined_first() -> None:
    proto = _with_function()
    made = optimize(proto, opset=17, time=0, threads=1)
    assert [e["pass"] for e in made.report["ledger"][:2]] == ["inline-functions", "upgrade-opset"]
    assert not made.model.functions
    assert {o.domain: o.version for o in made.model.opset_import}[""] == 17
    feeds = {"x": normal(1, 4)}
    np.testing.assert_array_equal(run(made.model, feeds)["y"], run(proto, feeds)["y"])


def test_nodes_and_bodies_are_sorted_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnx's converter leaves graphs in an order that the checker refuses."""
    convert = onnx.version_converter.convert_version

    def shuffled(proto: onnx.ModelProto, to: int) -> onnx.ModelProto:
        made = convert(proto, to)
        for graph in graphs(made):
            backwards = list(graph.node)[::-1]
            del graph.node[:]
            graph.node.extend(backwards)
        return made

    monkeypatch.setattr(onnx.version_converter, "convert_version", shuffled)
    branches = _branches(11)
    branches.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, IMAGE))  # the checker wants a shape
    for proto in (branches, _classifier(9)):
        made, _ = apply(proto, UpgradeOpset())
        onnx.checker.check_model(made)
