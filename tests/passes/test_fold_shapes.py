"""fold-shapes: what is known of sizes beforehand is stored, and only that; dims stay symbolic."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import apply, build, initializers, node, ops, reasons, run

from graphopt.base import Context
from graphopt.errors import RuntimeFailure
from graphopt.manager import PassManager
from graphopt.model import load, to_proto
from graphopt.passes._dims import OPEN, product, quotient, symbol, unknown, weak
from graphopt.passes.eliminate_identities import EliminateIdentities
from graphopt.passes.fold_shapes import FoldShapes

I64 = np.int64
X = {"x": ["batch", 3, "height", 8]}


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, I64)


def graph(*nodes: onnx.NodeProto, inputs: Any = None, **options: Any) -> onnx.ModelProto:
    """From x to y, with whatever constants the nodes name: z 0, o 1, t 3, f 4, m -1, all of rank 1; s of rank 0."""
    stored = {"z": ints(0), "o": ints(1), "t": ints(3), "f": ints(4), "m": ints(-1), "s": np.array(1)}
    read = {name for n in nodes for name in n.input}
    given = {k: v for k, v in stored.items() if k in read} | options.pop("weights", {})
    out = options.pop("outputs", ["y"])
    return build(list(nodes), inputs or X, out, given, **options)


def same(before: onnx.ModelProto, after: onnx.ModelProto, *shapes: tuple[int, ...]) -> None:
    for shape in shapes:
        feeds = {"x": np.arange(np.prod(shape), dtype=np.float32).reshape(shape)}
        got = run(after, feeds)
        for name, array in run(before, feeds).items():
            assert (array.dtype, array.shape) == (got[name].dtype, got[name].shape)
            assert array.tobytes() == got[name].tobytes()


def runs(proto: onnx.ModelProto, shape: tuple[int, ...]) -> bool:
    """Whether it takes that: a size of 0 in the target of a Reshape means another thing."""
    try:
        run(proto, {"x": np.zeros(shape, np.float32)})
    except RuntimeFailure:
        return False
    return True


def target(proto: onnx.ModelProto) -> list[int]:
    """What the one Reshape reshapes to."""
    (reshape,) = (n for n in proto.graph.node if n.op_type == "Reshape")
    return list(initializers(proto)[reshape.input[1]].tolist())


SIZES = ((2, 3, 5, 8), (1, 3, 1, 8), (0, 3, 5, 8), (2, 3, 0, 8))
"""Two of each dynamic dim, and none."""


def targets(*parts: str) -> list[onnx.NodeProto]:
    """A Reshape of x to dims of x and constants: ``b``, ``h`` are computed."""
    made = [
        node("Shape", ["x"], "shape"),
        node("Slice", ["shape", "z", "o"], "b"),
        node("Slice", ["shape", "two", "t"], "h"),
        node("Concat", list(parts), "to", axis=0),
        node("Reshape", ["x", "to"], "r"),
        node("Neg", ["r"], "y"),
    ]
    used = set(parts)
    return [n for n in made if n.output[0] not in ("b", "h") or n.output[0] in used]


TARGETS: dict[str, tuple[tuple[str, ...], list[int] | None]] = {
    "copied": (("b", "t", "h", "two", "f"), None),  # axis 3 and 4 are no more than numbers
    "fixed ones split": (("b", "t", "h", "f", "two"), [0, 3, 0, 4, 2]),
    "open beside fixed": (("b", "m"), [0, -1]),
    "moved": (("h", "m", "f"), None),  # neither at its place, beside an open one
    "moved alone": (("h", "b", "t", "eight"), None),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets(name: str) -> None:
    parts, expected = TARGETS[name]
    if name == "copied":
        expected = [0, 3, 0, 2, 4]
    made = targets(*parts)
    weights = {k: v for k, v in {"two": ints(2), "eight": ints(8)}.items() if any(k in n.input for n in made)}
    proto = graph(*made, weights=weights)
    after, entry = apply(proto, FoldShapes())
    if expected is None:
        assert ops(after) == ops(proto)
    else:
        assert ops(after) == ["Reshape", "Neg"], entry.skipped
        assert target(after) == expected
    same(proto, after, *(shape for shape in SIZES if 0 not in shape or runs(proto, shape)))
    again, _ = apply(after, FoldShapes())
    assert again == after


def test_an_open_dim_is_used_beside_fixed_ones_only() -> None:
    """[N, T] -> [N * T, 1] is [-1, 1]; but [0, 3, -1] would refuse an empty batch that [N, 3, H * 8] takes."""
    flat = [
        node("Shape", ["x"], "shape"),
        node("Gather", ["shape", "z"], "b"),
        node("Gather", ["shape", "two"], "h"),
    ]
    rows = [*flat, node("Mul", ["b", "h"], "n"), node("Concat", ["n", "t", "eight"], "to", axis=0)]
    moved = [node("Transpose", ["x"], "p", perm=[0, 2, 1, 3]), *rows, node("Reshape", ["p", "to"], "y")]
    proto = graph(*moved, weights={"two": ints(2), "eight": ints(8)})
    after, _ = apply(proto, FoldShapes())
    assert ops(after) == ["Transpose", "Reshape"]
    assert target(after) == [-1, 3, 8]
    same(proto, after, *(shape for shape in SIZES if runs(proto, shape)))
    columns = [*flat, node("Mul", ["h", "eight"], "n"), node("Concat", ["b", "t", "n"], "to", axis=0)]
    proto = graph(*columns, node("Reshape", ["x", "to"], "y"), weights={"two": ints(2), "eight": ints(8)})
    after, _ = apply(proto, FoldShapes())
    assert ops(after) == ops(proto)


CHAINS: dict[str, tuple[list[onnx.NodeProto], dict[str, Any], dict[str, Any]]] = {
    "Gather": ([node("Shape", ["x"], "a"), node("Gather", ["a", "o"], "k")], {}, {}),
    "Gather of one": (
        [node("Shape", ["x"], "a"), node("Gather", ["a", "s"], "g"), node("Unsqueeze", ["g", "z"], "k")],
        {},
        {},
    ),
    "Slice": ([node("Shape", ["x"], "a"), node("Slice", ["a", "o", "two"], "k")], {"two": ints(2)}, {}),
    "Slice 9": (
        [node("Shape", ["x"], "a"), node("Slice", ["a"], "k", axes=[0], starts=[1], ends=[2])],
        {},
        {"opset": 9},
    ),
    "start and end": ([node("Shape", ["x"], "k", start=1, end=2)], {}, {}),
    "negative start": ([node("Shape", ["x"], "e", start=-1), node("Sub", ["e", "five"], "k")], {"five": ints(5)}, {}),
    "arithmetic": (
        [
            node("Shape", ["x"], "a"),
            node("Gather", ["a", "t"], "w"),
            node("Mul", ["w", "f"], "p"),
            node("Div", ["p", "five"], "q"),
            node("Sub", ["q", "t"], "k"),
        ],
        {"five": ints(5)},
        {},
    ),
    "of the same dim": (
        [node("Shape", ["x"], "a"), node("Slice", ["a", "z", "o"], "b"), node("Sub", ["b", "b"], "d"),
         node("Add", ["d", "t"], "k")],
        {},
        {},
    ),
    "Cast": (
        [
            node("Shape", ["x"], "a"),
            node("Gather", ["a", "o"], "g"),
            node("Cast", ["g"], "c", to=TensorProto.INT32),
            node("Cast", ["c"], "k", to=TensorProto.INT64),
        ],
        {},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_a_size_that_is_known(name: str) -> None:
    """k, of rank 1, is 3 whatever the batch; it is what x is tiled by."""
    nodes, weights, options = CHAINS[name]
    proto = graph(
        *nodes, node("Concat", ["o", "o", "o", "k"], "r", axis=0), node("Tile", ["x", "r"], "y"),
        weights=weights, **options,
    )  # fmt: skip
    after, entry = apply(proto, FoldShapes())
    assert ops(after) == ["Tile"], entry.skipped
    assert initializers(after)["r"].tolist() == [1, 1, 1, 3]
    assert any("whatever the input" in change.detail for change in entry.changes)
    same(proto, after, *SIZES)


def test_size() -> None:
    inputs = {"x": [2, 3, 4]}
    proto = graph(node("Size", ["x"], "n"), node("Reshape", ["n", "m"], "v"), node("Expand", ["x1", "v"], "y"),
                  inputs=inputs, weights={"x1": np.ones(1, np.float32)}, outputs=["y"])  # fmt: skip
    after, _ = apply(proto, FoldShapes())
    assert ops(after) == ["Expand"]
    assert initializers(after)["v"].tolist() == [24]


def test_what_a_caller_may_override_or_a_file_only_declares_is_no_fact() -> None:
    lying = graph(
        node("NonZero", ["x"], "i"), node("Shape", ["i"], "a"), node("Gather", ["a", "o"], "k"),
        node("Expand", ["x", "k"], "y"), inputs={"x": [1]},
    )  # fmt: skip
    lying.graph.value_info.append(helper.make_tensor_value_info("i", TensorProto.INT64, [1, 1]))
    after, _ = apply(lying, FoldShapes())
    assert ops(after) == ops(lying)
    nodes = [
        node("Shape", ["x"], "s"), node("Gather", ["s", "o"], "g"), node("Concat", ["g"], "a", axis=0),
        node("Add", ["a", "w"], "k"), node("Expand", ["x", "k"], "y"),
    ]  # fmt: skip
    proto = build(nodes, {"x": [2]}, ["y"], {"w": ints(0), "o": ints(0)})
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.INT64, [1]))
    after, _ = apply(proto, FoldShapes())
    assert ops(after) == ["Add", "Expand"]


def test_elements_of_a_sequence_have_sizes_of_their_own() -> None:
    nodes = [
        node("SplitToSequence", ["x", "parts"], "q", axis=0),
        node("SequenceAt", ["q", "zero"], "a"),
        node("SequenceAt", ["q", "one"], "b"),
        node("Shape", ["b"], "to"),
        node("Expand", ["a", "to"], "y"),
    ]
    proto = build(nodes, {"x": [4]}, ["y"], {"parts": ints(1, 3), "zero": np.array(0), "one": np.array(1)})
    for pass_ in (FoldShapes(), EliminateIdentities()):
        after, _ = apply(proto, pass_, verify="off")
        assert ops(after) == ops(proto)


def test_the_file_does_not_grow() -> None:
    """Four numbers take more than a node without a name."""
    proto = graph(node("Shape", ["x"], "a"), node("Identity", ["a"], "y"), outputs=["y"], out_dtype=TensorProto.INT64,
                  inputs={"x": [2, 3, 4, 5]})  # fmt: skip
    for n in proto.graph.node:
        n.name = ""
    after, entry = apply(proto, FoldShapes())
    assert ops(after) == ops(proto)
    assert "more of the file" in reasons(entry)["a"]


def test_an_output_stays_what_it_is() -> None:
    proto = graph(node("Shape", ["x"], "y"), outputs=["y"], out_dtype=TensorProto.INT64, inputs={"x": [2, 3]})
    after, _ = apply(proto, FoldShapes())
    assert after == proto


def test_inside_bodies() -> None:
    info = helper.make_tensor_value_info
    inner = [*targets("b", "m")[:-1], node("Neg", ["r"], "then")]
    body = helper.make_graph(inner, "t", [], [info("then", 1, None)])
    other = helper.make_graph([node("Flatten", ["x"], "else")], "e", [], [info("else", 1, None)])
    decide = node("If", ["go"], "y", then_branch=body, else_branch=other)
    proto = graph(decide, weights={"z": ints(0), "o": ints(1), "m": ints(-1)})
    proto.graph.input.append(info("go", TensorProto.BOOL, []))
    after, entry = apply(proto, FoldShapes())
    then = next(a.g for a in after.graph.node[0].attribute if a.name == "then_branch")
    assert [n.op_type for n in then.node] == ["Reshape", "Neg"], entry.skipped
    for go in (True, False):
        feeds = {"x": np.arange(48, dtype=np.float32).reshape(2, 3, 1, 8), "go": np.array(go)}
        assert run(after, feeds)["y"].tobytes() == run(proto, feeds)["y"].tobytes()


def test_before_ir_4_the_constant_is_a_node() -> None:
    nodes = [node("Shape", ["x"], "a"), node("Slice", ["a"], "k", axes=[0], starts=[1], ends=[2]),
             node("Concat", ["k", "k", "k", "k"], "r", axis=0), node("Tile", ["x", "r"], "y")]  # fmt: skip
    proto = build(nodes, X, ["y"], opset=9, ir_version=3)
    after, _ = apply(proto, FoldShapes())
    assert ops(after) == ["Constant", "Tile"]
    same(proto, after, (2, 3, 1, 8))


def test_switched_off_by_site() -> None:
    proto = graph(*CHAINS["Gather"][0], node("Expand", ["x", "k"], "y"))
    after, entry = apply(proto, FoldShapes(), disabled={("fold-shapes", "n_k")})
    assert after == proto
    assert "switched off" in reasons(entry)["n_k"]


def test_names_of_dims_stay() -> None:
    proto = graph(*targets("b", "m"))
    proto.graph.value_info.append(helper.make_tensor_value_info("r", 1, ["batch", "rest"]))
    after, _ = apply(proto, FoldShapes())
    assert list(after.graph.input) == list(proto.graph.input)
    assert list(after.graph.value_info) == list(proto.graph.value_info)


def test_what_shapes_say_of_an_expand_tile_slice_or_resize_that_does_nothing() -> None:
    """Sizes that are computed from x itself, dynamic ones too."""
    shape = node("Shape", ["x"], "a")
    cases = {
        "Expand": [shape, node("Expand", ["x", "a"], "y")],
        "Slice": [shape, node("Gather", ["a", "z"], "e"), node("Slice", ["x", "z", "e", "z"], "y")],
        "Reshape": [shape, node("Reshape", ["x", "a"], "y")],
        "Resize by sizes": [shape, node("Resize", ["x", "", "", "a"], "y", mode="linear")],
        "Resize by scales": [node("Resize", ["x", "", "scales"], "y", mode="cubic")],
    }
    for name, nodes in cases.items():
        weights = {"scales": np.ones(4, np.float32)} if "scales" in name else {}
        proto = graph(node("Abs", ["x"], "x0"), *nodes, node("Neg", ["y"], "out"), weights=weights, outputs=["out"])
        for n in list(proto.graph.node)[1:]:
            n.input[:] = ["x0" if i == "x" else i for i in n.input]
        model = load(proto)
        result = PassManager([EliminateIdentities()]).run(model, Context(original=model, threads=1))
        left = [n.op_type for n in to_proto(result.model).graph.node]
        assert name.split()[0] not in left, name
        same(proto, to_proto(result.model), (2, 3, 5, 8), (1, 3, 1, 8))


@pytest.mark.parametrize(
    "attributes",
    [{"coordinate_transformation_mode": "tf_crop_and_resize"}, {"antialias": 1}],
)
def test_a_resize_that_may_move_something_stays(attributes: dict[str, Any]) -> None:
    roi = {"roi": np.zeros(8, np.float32), "scales": np.ones(4, np.float32)}
    proto = graph(node("Resize", ["x", "roi", "scales"], "y", mode="linear", **attributes), weights=roi, opset=18)
    after, _ = apply(proto, EliminateIdentities(), verify="off")
    assert ops(after) == ["Resize"]


def test_products_of_dims() -> None:
    n, t = symbol(0, 0), symbol(0, 1)
    assert product(2, 3) == 6
    assert product(n, t) == product(t, n) != product(n, n)
    assert product(n, 8, t) == product(8, product(t, n))
    assert product(None, 0) == 0
    assert product(None, 2) is None
    assert quotient(product(n, t, 8), product(t, 4)) == product(n, 2)
    assert quotient(n, t) is None
    assert quotient(product(n, 6), 4) is None
    assert quotient(6, 0) is None
    assert product(OPEN, 2) is None
    assert weak(unknown("3"))
    assert weak(product(unknown("3"), 2))
    assert not weak(n)
