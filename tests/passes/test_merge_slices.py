"""merge-slices: one that does the work of two, bit for bit, where that is certain."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from support import apply, build, node, ops, reasons, run, size

from graphopt.passes.merge_slices import MergeSlices, _composed

I64 = np.int64


def between(first: onnx.NodeProto, second: onnx.NodeProto, weights: Any = None, **options: Any) -> onnx.ModelProto:
    """x -> Neg -> a -> first -> b -> second -> c -> Neg -> y."""
    shape = options.pop("shape", [4, 6, 8])
    nodes = [node("Neg", ["x"], "a"), first, second, node("Neg", ["c"], "y")]
    return build(nodes, {"x": shape}, ["y"], weights, **options)


def cuts(prefix: str, *lists: list[int], kind: Any = I64) -> dict[str, np.ndarray]:
    return {f"{prefix}{i}": np.array(numbers, kind) for i, numbers in enumerate(lists)}


def slices(first: list[list[int]], second: list[list[int]], **options: Any) -> onnx.ModelProto:
    """Each: starts, ends, axes, steps."""
    weights = cuts("p", *first) | cuts("q", *second)
    one = node("Slice", ["a", *(f"p{i}" for i in range(len(first)))], "b")
    two = node("Slice", ["b", *(f"q{i}" for i in range(len(second)))], "c")
    return between(one, two, weights, **options)


def same(proto: onnx.ModelProto, after: onnx.ModelProto, *shapes: tuple[int, ...]) -> None:
    for shape in shapes:
        feeds = {"x": np.arange(np.prod(shape), dtype=np.float32).reshape(shape)}
        before, got = run(proto, feeds)["y"], run(after, feeds)["y"]
        assert before.shape == got.shape
        assert before.tobytes() == got.tobytes()


MERGED: dict[str, tuple[list[list[int]], list[list[int]]]] = {
    "other axes": ([[1], [3], [0]], [[2], [7], [2]]),
    "other axes, from the end": ([[-3], [-1], [0]], [[0], [-2], [-1]]),
    "one axis": ([[1], [6], [1]], [[1], [3], [1]]),
    "one axis to the end": ([[1], [2**63 - 1], [2]], [[2], [2**63 - 1], [2]]),
    "steps": ([[1], [8], [2], [2]], [[1], [3], [2], [2]]),
    "without axes": ([[0, 1, 2], [3, 5, 7]], [[1], [9]]),
    "past the end": ([[5], [100], [1]], [[3], [4], [1]]),
    "both": ([[1, 0], [5, 3], [1, 0]], [[0, 1], [4, 2], [2, 1]]),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", MERGED)
def test_slices(name: str, dynamic: bool) -> None:
    shape: list[int | str] = ["n", "m", "k"] if dynamic else [4, 6, 8]
    proto = slices(*MERGED[name], shape=shape)
    after, entry = apply(proto, MergeSlices())
    assert ops(after) == ["Neg", "Slice", "Neg"], entry.skipped
    assert size(after) <= size(proto)
    same(proto, after, (4, 6, 8), *([(1, 1, 1), (3, 9, 2)] if dynamic else []))
    again, _ = apply(after, MergeSlices())
    assert again == after


def test_slices_of_a_known_size_from_the_end() -> None:
    first, second = [[-5], [-1], [1]], [[-3], [-1], [1]]
    after, _ = apply(slices(first, second), MergeSlices())
    assert ops(after) == ["Neg", "Slice", "Neg"]
    same(slices(first, second), after, (4, 6, 8))
    proto = slices(first, second, shape=["n", "m", "k"])
    after, entry = apply(proto, MergeSlices())
    assert after == proto
    assert "from the end" in reasons(entry)["n_c"]


def test_backwards_stays() -> None:
    proto = slices([[5], [0], [1], [-1]], [[0], [2], [1]])
    after, entry = apply(proto, MergeSlices())
    assert after == proto
    assert "backwards" in reasons(entry)["n_c"]


def test_slices_as_attributes() -> None:
    one = node("Slice", ["a"], "b", starts=[1], ends=[5], axes=[1])
    two = node("Slice", ["b"], "c", starts=[0, 1], ends=[2, 3], axes=[0, 1])
    proto = between(one, two, opset=9, ir_version=3)
    after, _ = apply(proto, MergeSlices())
    assert ops(after) == ["Neg", "Slice", "Neg"]
    same(proto, after, (4, 6, 8))


def test_composed_is_what_python_does() -> None:
    numbers = [0, 1, 2, 5, 9, -1, -3]
    for start, end, step in itertools.product(numbers, numbers, (1, 2, 3)):
        for other in itertools.product(numbers, numbers, (1, 2)):
            for length in (0, 1, 4, 7):
                expected = list(range(length)[start:end:step][other[0] : other[1] : other[2]])
                for known in (length, None):
                    made = _composed((start, end, step), (other[0], other[1], other[2]), known)
                    if made is None:
                        assert known is None
                        assert min(start, end, *other) < 0
                    else:
                        assert list(range(length)[made[0] : made[1] : made[2]]) == expected


PAIRS = [([0], [3]), ([1], [0]), ([2], [2]), ([0, 2], [1, -1]), ([-1], [-1]), ([-2], [0])]


@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize(("inner", "outer"), PAIRS)
def test_unsqueezes_and_squeezes(inner: list[int], outer: list[int], opset: int) -> None:
    for name in ("Unsqueeze", "Squeeze"):
        wide = np.zeros((2, 3, 4))
        if name == "Squeeze":
            wide = np.expand_dims(np.expand_dims(wide, tuple(outer)), tuple(inner))
        steps = (inner, outer)
        if opset < 13:
            pair = [node(name, [s], t, axes=a) for s, t, a in zip("ab", "bc", steps, strict=True)]
            proto = between(*pair, shape=list(wide.shape), opset=opset)
        else:
            weights = {"u": np.array(steps[0], I64), "v": np.array(steps[1], I64)}
            proto = between(
                node(name, ["a", "u"], "b"), node(name, ["b", "v"], "c"), weights, shape=list(wide.shape), opset=opset
            )
        after, entry = apply(proto, MergeSlices())
        assert ops(after) == ["Neg", name, "Neg"], entry.skipped
        same(proto, after, wide.shape)


def test_what_has_to_stay() -> None:
    weights = {"u": np.array([0], I64)}
    squeezed = between(node("Squeeze", ["a"], "b"), node("Squeeze", ["b", "u"], "c"), weights, shape=[1, 2, 3])
    squeezed.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1
    after, entry = apply(squeezed, MergeSlices(), verify="off")
    assert "not constant" in reasons(entry)["n_c"]
    assert ops(after) == ops(squeezed)
    read = slices(*MERGED["one axis"])
    read.graph.node.append(node("Abs", ["b"], "z"))
    read.graph.output.append(helper.make_tensor_value_info("z", 1, None))
    after, entry = apply(read, MergeSlices())
    assert ops(after) == ops(read)
    assert "read elsewhere" in reasons(entry)["n_c"]


def test_the_file_does_not_grow() -> None:
    """Positions that other nodes read stay, so that new ones come on top."""
    proto = slices([[1, 0], [5, 3], [1, 0], [1, 1]], [[1], [4], [2], [2]])
    for index, name in enumerate([t.name for t in proto.graph.initializer]):
        proto.graph.node.append(node("Identity", [name], f"k{index}"))
        proto.graph.output.append(helper.make_tensor_value_info(f"k{index}", 7, None))
    after, entry = apply(proto, MergeSlices())
    assert ops(after) == ops(proto)
    assert "more of the file" in reasons(entry)["n_c"]


def test_switched_off_and_in_a_body() -> None:
    proto = slices(*MERGED["one axis"])
    after, entry = apply(proto, MergeSlices(), disabled={("merge-slices", "n_c")})
    assert after == proto
    assert "switched off" in reasons(entry)["n_c"]
    info = helper.make_tensor_value_info
    inner = [*list(proto.graph.node)[1:3], node("Abs", ["c"], "then")]
    body = helper.make_graph(inner, "t", [], [info("then", 1, None)])
    other = helper.make_graph([node("Abs", ["a"], "else")], "e", [], [info("else", 1, None)])
    outer = between(node("Abs", ["a"], "b"), node("If", ["go"], "c", then_branch=body, else_branch=other))
    outer.graph.initializer.extend(proto.graph.initializer)
    outer.graph.input.append(info("go", onnx.TensorProto.BOOL, []))
    for branch in outer.graph.node[2].attribute:
        for each in branch.g.node:
            each.output[:] = [f"{branch.name}_{n}" if n in "bc" else n for n in each.output]
            each.input[:] = [f"{branch.name}_{n}" if n in "bc" else n for n in each.input]
    after, _ = apply(outer, MergeSlices())
    then = next(a.g for a in after.graph.node[2].attribute if a.name == "then_branch")
    assert [n.op_type for n in then.node] == ["Slice", "Abs"]
    feeds = {"x": np.arange(192, dtype=np.float32).reshape(4, 6, 8), "go": np.array(True)}
    assert run(after, feeds)["y"].tobytes() == run(outer, feeds)["y"].tobytes()
