"""freeze-shapes: named dims and inputs get their sizes, everywhere, and nothing out of date is left."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import apply, build, node, reasons, run

from graphopt import registry
from graphopt.errors import InputError, PreconditionError
from graphopt.passes.freeze_shapes import FreezeShapes


def model() -> onnx.ModelProto:
    nodes = [node("Relu", ["a:0"], "h"), node("Add", ["h", "b"], "y")]
    proto = build(nodes, {"a:0": ["N", 3, "W"], "b": ["N", 3, "W"]}, {"y": ["N", 3, "W"]})
    proto.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["N", 3, "W"]))
    return proto


def shapes(proto: onnx.ModelProto) -> dict[str, list[int | str]]:
    found = {}
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        if value.type.tensor_type.HasField("shape"):
            found[value.name] = [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
    return found


def test_a_named_dim() -> None:
    proto = model()
    after, entry = apply(proto, FreezeShapes(dims=("N=2",)), verify="off")
    assert shapes(after) == {"a:0": [2, 3, "W"], "b": [2, 3, "W"], "y": [2, 3, "W"]}
    assert [c.site for c in entry.changes] == ["(graph)"] * 3
    assert entry.changes[0].detail == "input a:0: [N,3,W] -> [2,3,W]"
    x = np.ones((2, 3, 5), np.float32)
    assert run(after, {"a:0": x, "b": x})["y"].tobytes() == run(proto, {"a:0": x, "b": x})["y"].tobytes()
    again, entry = apply(after, FreezeShapes(inputs=("a:0:2,3,4",)), verify="off")
    assert shapes(again)["y"] == [2, 3, 4]
    _, entry = apply(again, FreezeShapes(inputs=("a:0:2,3,4",)), verify="off")
    assert "already" in reasons(entry)["(graph)"]


def test_an_input_whose_name_has_a_colon() -> None:
    after, _ = apply(model(), FreezeShapes(inputs=("a:0:1,3,7",)), verify="off")
    assert shapes(after) == {"a:0": [1, 3, 7], "b": [1, 3, 7], "y": [1, 3, 7]}


def test_an_unnamed_dim_and_an_unknown_rank() -> None:
    proto = build([node("Add", ["p", "q"], "y")], {"p": [2, 3], "q": [2, 3]}, ["y"])
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    proto.graph.input[1].type.tensor_type.shape.dim[0].Clear()
    after, _ = apply(proto, FreezeShapes(inputs=("p:4,3", "q:4,3")), verify="off")
    assert shapes(after) == {"p": [4, 3], "q": [4, 3]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": ("batch=1",)}, "no input has a dim 'batch'; its named dims are: N, W"),
        ({"inputs": ("c:1",)}, "there is no input 'c'; the inputs are: a:0, b"),
        ({"inputs": ("b:1,3",)}, "another number of dims"),
        ({"inputs": ("b:1,4,5",)}, "4 is not 3"),
        ({"inputs": ("b:1,3,5", "a:0:2,3,5")}, "dim 'N' would be both 1 and 2"),
        ({"dims": ("N=2",), "inputs": ("b:1,3,5",)}, "dim 'N' would be both 2 and 1"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(PreconditionError) as caught:
        apply(model(), FreezeShapes(**options), verify="off")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"dims": ["batch"]}, {"dims": ["batch=0"]}, {"inputs": ["x"]}, {"inputs": ["x:a"]}]
)
def test_what_cannot_be_read_is_refused(options: dict[str, list[str]]) -> None:
    with pytest.raises(InputError, match="write it like"):
        registry.create("freeze-shapes", options)


def test_without_options_nothing_is_done() -> None:
    after, entry = apply(model(), FreezeShapes())
    assert after == model()
    assert "no shapes were asked for" in reasons(entry)["(graph)"]
