"""merge-reshapes: of two in a row one is enough, where that is certain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import apply, build, node, ops, reasons, run

from graphopt.passes.merge_reshapes import MergeReshapes

I64 = np.int64


def same_bits(before: onnx.ModelProto, after: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> None:
    other = run(after, feeds)
    for name, array in run(before, feeds).items():
        assert array.dtype == other[name].dtype
        assert array.shape == other[name].shape
        assert array.tobytes() == other[name].tobytes(), name


def between(
    first: onnx.NodeProto, second: onnx.NodeProto, weights: dict[str, Any] | None = None, **options: Any
) -> onnx.ModelProto:
    """x -> Neg -> a -> first -> b -> second -> c -> Neg -> y."""
    shape = options.pop("shape", [2, 3, 4])
    nodes = [node("Neg", ["x"], "a"), first, second, node("Neg", ["c"], "y")]
    return build(nodes, {"x": shape}, ["y"], weights, **options)


def shapes(first: Sequence[int], second: Sequence[int]) -> dict[str, np.ndarray]:
    return {"s": np.array(first, I64), "t": np.array(second, I64)}


RESHAPE = (node("Reshape", ["a", "s"], "b"), node("Reshape", ["b", "t"], "c"))
AX = {"u": np.array([1, 3], I64), "v": np.array([1, 3], I64), "n": np.array([-4, -2], I64)}

MERGED: dict[str, tuple[tuple[onnx.NodeProto, onnx.NodeProto], dict[str, Any], dict[str, Any], list[str]]] = {
    "Reshape": (RESHAPE, shapes([6, 4], [4, -1]), {}, ["Reshape"]),
    "Reshape of a dynamic one": (RESHAPE, shapes([-1, 4], [2, -1, 2]), {"shape": ["N", 4]}, ["Reshape"]),
    "Reshape with a zero that copies the same": (
        RESHAPE,
        shapes([0, -1], [0, 4, -1]),
        {"shape": ["N", 3, 4]},
        ["Reshape"],
    ),
    "Flatten": ((node("Flatten", ["a"], "b"), RESHAPE[1]), shapes([], [4, 6]), {}, ["Reshape"]),
    "Reshape 4": (
        (node("Flatten", ["a"], "b"), node("Reshape", ["b"], "c", shape=[4, 6])),
        {},
        {"opset": 4, "ir_version": 3},
        ["Reshape"],
    ),
    "Transpose": (
        (node("Transpose", ["a"], "b", perm=[1, 2, 0]), node("Transpose", ["b"], "c", perm=[0, 2, 1])),
        {},
        {},
        ["Transpose"],
    ),
    "Transpose back": (
        (node("Transpose", ["a"], "b", perm=[1, 2, 0]), node("Transpose", ["b"], "c", perm=[2, 0, 1])),
        {},
        {},
        [],
    ),
    "reversed twice": ((node("Transpose", ["a"], "b"), node("Transpose", ["b"], "c")), {}, {}, []),
    "reversed and back": ((node("Transpose", ["a"], "b"), node("Transpose", ["b"], "c", perm=[2, 1, 0])), {}, {}, []),
    "Unsqueeze, Squeeze": (
        (node("Unsqueeze", ["a", "u"], "b"), node("Squeeze", ["b", "n"], "c")),
        AX,
        {},
        [],
    ),
    "Squeeze, Unsqueeze": (
        (node("Squeeze", ["a", "u"], "b"), node("Unsqueeze", ["b", "v"], "c")),
        AX,
        {"shape": [2, 1, 3, 1]},
        [],
    ),
    "Unsqueeze, Squeeze 11": (
        (node("Unsqueeze", ["a"], "b", axes=[0]), node("Squeeze", ["b"], "c", axes=[0])),
        {},
        {"opset": 11},
        [],
    ),
    "Cast there and back": (
        (node("Cast", ["a"], "b", to=TensorProto.DOUBLE), node("Cast", ["b"], "c", to=TensorProto.FLOAT)),
        {},
        {},
        [],
    ),
}


@pytest.mark.parametrize("name", MERGED)
def test_two_become_one_or_none(name: str) -> None:
    pair, weights, options, left = MERGED[name]
    read = {i for n in pair for i in n.input}
    used = {k: a for k, a in weights.items() if k in read}
    proto = between(*pair, used, **options)
    after, entry = apply(proto, MergeReshapes())
    assert ops(after) == ["Neg", *left, "Neg"], entry.skipped
    shape = [d if isinstance(d, int) else 2 for d in options.get("shape", [2, 3, 4])]
    if options.get("opset", 17) > 6:
        same_bits(proto, after, {"x": np.arange(np.prod(shape), dtype=np.float32).reshape(shape)})
    again, entry = apply(after, MergeReshapes())
    assert again == after
    assert "follow each other" in reasons(entry)["(graph)"]


KEPT: dict[str, tuple[tuple[onnx.NodeProto, onnx.NodeProto], dict[str, Any], dict[str, Any], str]] = {
    "zero": (RESHAPE, shapes([6, 4], [0, 2, 2]), {}, "zeros"),
    "Unsqueeze elsewhere": (
        (node("Unsqueeze", ["a", "u"], "b"), node("Squeeze", ["b", "v"], "c")),
        {"u": np.array([0], I64), "v": np.array([1], I64)},
        {"shape": [1, 3]},
        "not (or not known",
    ),
    "Squeeze of all": (
        (node("Unsqueeze", ["a", "u"], "b"), node("Squeeze", ["b"], "c")),
        {"u": np.array([0], I64)},
        {"shape": ["N", 3]},
        "axes are not constant",
    ),
    "narrow": (
        (node("Cast", ["a"], "b", to=TensorProto.FLOAT16), node("Cast", ["b"], "c", to=TensorProto.FLOAT)),
        {},
        {},
        "does not hold",
    ),
    "through an integer": (
        (node("Cast", ["a"], "b", to=TensorProto.INT64), node("Cast", ["b"], "c", to=TensorProto.FLOAT)),
        {},
        {},
        "does not hold",
    ),
    "to an integer": (
        (node("Cast", ["a"], "b", to=TensorProto.DOUBLE), node("Cast", ["b"], "c", to=TensorProto.INT32)),
        {},
        {"tail": "Cast"},
        "too large",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_not_certain_stays(name: str) -> None:
    pair, weights, options, expected = KEPT[name]
    options = {k: v for k, v in options.items() if k != "tail"}
    proto = between(*pair, weights, **options)
    if name == "to an integer":
        proto.graph.output[0].type.tensor_type.elem_type = TensorProto.INT32
    after, entry = apply(proto, MergeReshapes())
    assert after == proto
    assert expected in reasons(entry)["n_c"]


def cast(*types: int) -> onnx.ModelProto:
    """x (the first type) through the others."""
    names = ["x", *(f"c{i}" for i in range(len(types) - 2)), "y"]
    nodes = [node("Cast", [names[i]], names[i + 1], to=kind) for i, kind in enumerate(types[1:])]
    return build(nodes, {"x": [6]}, ["y"], dtype=types[0], out_dtype=types[-1])


T = TensorProto


@pytest.mark.parametrize(
    ("types", "left"),
    [
        ((T.INT32, T.INT64, T.INT8), 1),
        ((T.INT8, T.FLOAT, T.INT64), 1),
        ((T.INT16, T.FLOAT, T.INT8), 2),
        ((T.INT32, T.FLOAT, T.INT32), 2),
        ((T.INT64, T.DOUBLE, T.INT64), 2),
        ((T.INT32, T.DOUBLE, T.FLOAT), 1),
        ((T.UINT8, T.INT8, T.UINT8), 2),
        ((T.BOOL, T.FLOAT, T.INT32), 1),
        ((T.FLOAT16, T.FLOAT, T.BFLOAT16), 1),
        ((T.FLOAT16, T.BFLOAT16, T.FLOAT), 2),
        ((T.FLOAT, T.BOOL, T.FLOAT), 2),
        ((T.INT8, T.INT16, T.STRING), 2),
    ],
)
def test_casts(types: tuple[int, ...], left: int) -> None:
    proto = cast(*types)
    after, _ = apply(proto, MergeReshapes())
    assert len(after.graph.node) == left
    kind = helper.tensor_dtype_to_np_dtype(types[0])
    if T.BFLOAT16 not in types and T.STRING not in types:
        same_bits(proto, after, {"x": np.array([0, 1, 2, 100, 127, 77]).astype(kind)})
        if kind.kind == "i":
            same_bits(proto, after, {"x": np.array([np.iinfo(kind).min, np.iinfo(kind).max, -1, -128, 99, 3], kind)})


def test_what_others_read_stays() -> None:
    nodes = [node("Reshape", ["x", "s"], "b"), node("Reshape", ["b", "t"], "y"), node("Neg", ["b"], "z")]
    proto = build(nodes, {"x": [2, 6]}, ["y", "z"], shapes([3, 4], [4, 3]))
    after, entry = apply(proto, MergeReshapes())
    assert after == proto
    assert "read elsewhere" in reasons(entry)["n_y"]


def test_an_output_under_its_own_name() -> None:
    """x and y are both outside names: one Transpose that does nothing is left between them."""
    nodes = [node("Transpose", ["x"], "b", perm=[1, 0]), node("Transpose", ["b"], "y", perm=[1, 0])]
    proto = build(nodes, {"x": [2, 3]}, ["y"])
    after, _ = apply(proto, MergeReshapes())
    assert ops(after) == ["Transpose"]
    same_bits(proto, after, {"x": np.arange(6, dtype=np.float32).reshape(2, 3)})


def test_nested_pairs_and_bodies() -> None:
    inner = [
        node("Transpose", ["x"], "p", perm=[1, 0]),
        node("Unsqueeze", ["p", "u"], "q"),
        node("Squeeze", ["q", "u"], "r"),
        node("Transpose", ["r"], "s", perm=[1, 0]),
        node("Abs", ["s"], "o"),
    ]
    body = helper.make_graph(inner, "b", [], [helper.make_tensor_value_info("o", 1, None)])
    other = helper.make_graph([node("Neg", ["x"], "e")], "e", [], [helper.make_tensor_value_info("e", 1, None)])
    proto = build(
        [node("If", ["g"], "y", then_branch=body, else_branch=other)], {"x": [2, 3]}, ["y"], {"u": np.array([0], I64)}
    )
    proto.graph.input.append(helper.make_tensor_value_info("g", TensorProto.BOOL, []))
    after, entry = apply(proto, MergeReshapes())
    assert len(entry.changes) == 2
    same_bits(proto, after, {"x": np.arange(6, dtype=np.float32).reshape(2, 3) - 2, "g": np.array(True)})
    assert not after.graph.initializer
