"""Small models for tests, built with onnx alone, so that a bug of ours cannot hide in both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper, parser

IR_VERSION = 10
OPSET = 21


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Iterable[onnx.ValueInfoProto] = (),
    outputs: Iterable[onnx.ValueInfoProto] = (),
    initializers: Iterable[onnx.TensorProto] = (),
    *,
    opset: int = OPSET,
    ir_version: int = IR_VERSION,
    domains: Iterable[str] = (),
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """A model of these nodes; ``domains`` are imported at version 1."""
    graph = helper.make_graph(nodes, "graph", list(inputs), list(outputs), list(initializers))
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, functions=list(functions))


def parsed(body: str, *, opset: int = OPSET, ir_version: int = IR_VERSION) -> onnx.ModelProto:
    """``agraph (float[N] x) => (float[N] y) { y = Relu(x) }`` -> a model."""
    return parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["" : {opset}]> {body}')


def value(
    name: str, shape: Sequence[int | str | None] | None = (2,), dtype: int = TensorProto.FLOAT
) -> onnx.ValueInfoProto:
    """A tensor-typed input, output or value_info."""
    return helper.make_tensor_value_info(name, dtype, shape)


def weight(name: str, array: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> onnx.TensorProto:
    """An initializer with raw data."""
    return numpy_helper.from_array(np.asarray(array, dtype), name)


def relu() -> onnx.ModelProto:
    """The smallest model that does something."""
    return parsed("agraph (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }")


def mlp(width: int = 32, *, seed: int = 0) -> onnx.ModelProto:
    """Two dense layers, enough weights (over 1 kB each) to be worth a data file."""
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((width, width)), rng.standard_normal((width, width))
    return model(
        [
            helper.make_node("MatMul", ["x", "w1"], ["h"], name="first"),
            helper.make_node("Relu", ["h"], ["a"], name="act"),
            helper.make_node("MatMul", ["a", "w2"], ["y"], name="second"),
        ],
        [value("x", ("batch", width))],
        [value("y", ("batch", width))],
        [weight("w1", first), weight("w2", second)],
    )


def chain(length: int) -> onnx.ModelProto:
    """``length`` Relus in a row."""
    nodes = [helper.make_node("Relu", [f"v{i}"], [f"v{i + 1}"], name=f"n{i}") for i in range(length)]
    return model(nodes, [value("v0")], [value(f"v{length}")])


def branch(name: str, nodes: Sequence[onnx.NodeProto], output: str) -> onnx.GraphProto:
    """A body for If."""
    return helper.make_graph(list(nodes), name, [], [value(output, None)])


def conditional(count: int = 1) -> onnx.ModelProto:
    """``count`` If nodes in a row; both bodies read a value of the main graph, and name theirs alike."""
    nodes = []
    for i in range(count):
        then = branch("then", [helper.make_node("Relu", [f"v{i}"], ["out"])], "out")
        other = branch("else", [helper.make_node("Neg", [f"v{i}"], ["out"])], "out")
        nodes.append(helper.make_node("If", ["c"], [f"v{i + 1}"], name=f"if{i}", then_branch=then, else_branch=other))
    return model(nodes, [value("v0"), value("c", (), TensorProto.BOOL)], [value(f"v{count}")])


def nested(depth: int) -> onnx.ModelProto:
    """If in If, ``depth`` bodies deep."""
    body = branch("b", [helper.make_node("Identity", ["x"], ["o0"])], "o0")
    for level in range(1, depth):
        other = branch("e", [helper.make_node("Identity", ["x"], [f"e{level}"])], f"e{level}")
        node = helper.make_node("If", ["c"], [f"o{level}"], then_branch=body, else_branch=other)
        body = branch("b", [node], f"o{level}")
    other = branch("e", [helper.make_node("Identity", ["x"], ["e"])], "e")
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=other)
    return model([node], [value("x"), value("c", (), TensorProto.BOOL)], [value("y")])


def function_model() -> onnx.ModelProto:
    """A model that calls a function of its own, whose body holds a Constant."""
    constant = helper.make_node("Constant", [], ["k"], value=weight("k", [1.0, 2.0]))
    add = helper.make_node("Add", ["a", "k"], ["b"])
    function = helper.make_function("mine", "AddK", ["a"], ["b"], [constant, add], [helper.make_opsetid("", OPSET)])
    node = helper.make_node("AddK", ["x"], ["y"], domain="mine")
    return model([node], [value("x")], [value("y")], domains=["mine"], functions=[function])


def sparse(name: str = "s") -> onnx.SparseTensorProto:
    """A 4-vector with two values."""
    return helper.make_sparse_tensor(weight(name, [1.0, 2.0]), weight("", [0, 2], np.int64), [4])


def tensors(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    """The main graph's initializers."""
    return list(proto.graph.initializer)


def externalize(tensor: onnx.TensorProto, location: str, **entries: int | str) -> onnx.TensorProto:
    """Make ``tensor`` point at a data file, truthfully or not; other keys (``offset``, ``length``) as given."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, entry in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(entry))
    return tensor


def external(folder: Path, location: str = "w.bin", *, write: bool = True, **entries: int | str) -> Path:
    """``folder/m.onnx``: y = x + w, with w (8 floats, 0..7) in ``location``."""
    proto = model(
        [helper.make_node("Add", ["x", "w"], ["y"], name="add")],
        [value("x", (8,))],
        [value("y", (8,))],
        [weight("w", np.arange(8))],
    )
    data = proto.graph.initializer[0].raw_data
    externalize(proto.graph.initializer[0], location, **entries)
    folder.mkdir(parents=True, exist_ok=True)
    if write:
        (folder / location).write_bytes(data)
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path
