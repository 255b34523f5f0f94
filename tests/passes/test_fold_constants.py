"""fold-constants: the same numbers, never a larger file, and a reason for what stays."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from support import MODELS, apply, build, fixture_feeds, initializers, node, ops, reasons, run, size

from graphopt.passes.fold_constants import FoldConstants

RNG = np.random.default_rng(0)


def same(before: onnx.ModelProto, after: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> None:
    one, two = run(before, feeds), run(after, feeds)
    assert one.keys() == two.keys()
    for name, array in one.items():
        assert array.dtype == two[name].dtype
        np.testing.assert_allclose(two[name], array, rtol=1e-6, atol=1e-6)


# -- hypothesis: graphs of constants and inputs mixed

BINARY = ["Add", "Mul", "Sub", "Max"]
UNARY = ["Neg", "Abs", "Identity", "Transpose"]


@st.composite
def graphs(draw: st.DrawFn) -> onnx.ModelProto:
    """Values of shape [2, 2] of one dtype; some constants (initializers or Constant nodes), some inputs; a body too."""
    kind = draw(st.sampled_from([np.float32, np.float16, np.int64, np.int32, np.bool_]))
    code = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    ir_version = draw(st.sampled_from([3, 8]))
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)

    def array() -> Any:
        return rng.integers(-3, 4, (2, 2)).astype(kind)

    names, nodes, weights = ["x"], [], {}
    for index in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            weights[f"w{index}"] = array()
            names.append(f"w{index}")
        else:
            nodes.append(node("Constant", [], f"c{index}", value=numpy_helper.from_array(array())))
            names.append(f"c{index}")
    binary = ["And", "Or", "Xor"] if kind is np.bool_ else BINARY[:3] if kind is np.int32 else BINARY
    unary = ["Not", "Identity", "Transpose"] if kind is np.bool_ else UNARY
    for index in range(draw(st.integers(1, 8))):
        op = draw(st.sampled_from([*binary, *unary, "Split", "Clip"]))
        pick = st.sampled_from(names)
        if op == "Split":
            nodes.append(node("Split", [draw(pick)], [f"v{index}a", f"v{index}b"], axis=0))
            nodes.append(node("Concat", [f"v{index}b", f"v{index}a"], f"v{index}", axis=0))
        elif op == "Clip" and kind is np.float32:
            weights[f"hi{index}"] = np.float32(1.5)
            nodes.append(node("Clip", [draw(pick), "", f"hi{index}"], f"v{index}"))
        elif op in binary:
            nodes.append(node(op, [draw(pick), draw(pick)], f"v{index}"))
        else:
            nodes.append(node(op if op in unary else "Identity", [draw(pick)], f"v{index}"))
        names.append(f"v{index}")
    outputs = [names[-1]]
    if draw(st.booleans()):
        outer = draw(st.sampled_from(names))
        branch = [
            helper.make_graph(
                [
                    node("Constant", [], f"b{side}c", value=numpy_helper.from_array(array())),
                    node("Identity", [f"b{side}c"], f"b{side}i"),
                    node("And" if kind is np.bool_ else "Add", [f"b{side}i", outer], f"b{side}o"),
                ],
                f"branch{side}",
                [],
                [helper.make_tensor_value_info(f"b{side}o", code, [2, 2])],
            )
            for side in (0, 1)
        ]
        weights["condition"] = np.array(draw(st.booleans()))
        nodes.append(node("If", ["condition"], "chosen", then_branch=branch[0], else_branch=branch[1]))
        outputs.append("chosen")
    other = draw(st.sampled_from(names[1:]))
    if other not in outputs and other.startswith("v"):
        outputs.append(other)
    overridable = ir_version == 3
    return build(
        nodes,
        {"x": [2, 2]},
        dict.fromkeys(outputs, (2, 2)),
        weights,
        opset=13,
        ir_version=ir_version,
        dtype=code,
        inputs_too=overridable,
    )


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_any_graph_keeps_its_numbers_and_never_grows(proto: onnx.ModelProto) -> None:
    kind = helper.tensor_dtype_to_np_dtype(proto.graph.input[0].type.tensor_type.elem_type)
    folded, _ = apply(proto, FoldConstants(), verify="off")
    onnx.checker.check_model(folded)
    same(proto, folded, {"x": RNG.integers(-3, 4, (2, 2)).astype(kind)})
    assert size(folded) <= size(proto)
    assert [v.name for v in folded.graph.input] == [v.name for v in proto.graph.input]
    assert [v.name for v in folded.graph.output] == [v.name for v in proto.graph.output]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 400), st.booleans()), min_size=1, max_size=8),
    st.integers(0, 9),
)
def test_generators_and_shared_constants_never_grow_the_file(steps: list[tuple[int, int, bool]], seed: int) -> None:
    """Expand, Tile, Transpose and Reshape of constants that may share their sources, some read twice."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Any] = {"base": rng.normal(size=(1, 40)).astype(np.float32)}
    nodes, total = [], "x"
    for index, (kind, amount, reuse) in enumerate(steps):
        source = "base" if reuse else f"own{index}"
        if not reuse:
            weights[source] = rng.normal(size=(1, 40)).astype(np.float32)
        if kind == 0:
            weights[f"shape{index}"] = np.array([amount, 40])
            nodes.append(node("Expand", [source, f"shape{index}"], f"e{index}"))
        elif kind == 1:
            weights[f"times{index}"] = np.array([amount, 1])
            nodes.append(node("Tile", [source, f"times{index}"], f"e{index}"))
        else:
            nodes.append(node("Neg" if kind == 2 else "Abs", [source], f"e{index}"))
        nodes.append(node("ReduceMean", [f"e{index}"], f"m{index}", axes=[0], keepdims=1))
        nodes.append(node("Add", [total, f"m{index}"], f"t{index}a"))
        nodes.append(node("Add", [f"t{index}a", f"e{index}" if amount % 2 else f"m{index}"], f"t{index}b"))
        nodes.append(node("ReduceMax", [f"t{index}b"], f"t{index}", axes=[0], keepdims=1))
        total = f"t{index}"
    proto = build(nodes, {"x": [1, 40]}, [total], weights, opset=13)
    folded, entry = apply(proto, FoldConstants(), verify="off")
    assert size(folded) <= size(proto)
    assert entry.changes or entry.skipped
    same(proto, folded, {"x": rng.normal(size=(1, 40)).astype(np.float32)})


# -- what stays


def test_random_custom_and_training_nodes_stay_with_a_reason() -> None:
    proto = build(
        [
            node("RandomNormalLike", ["c"], "r"),
            node("Dropout", ["c", "ratio", "training"], "d"),
            node("Mystery", ["c"], "m", domain="com.example"),
            node("Neg", ["own"], "neg"),
            node("Sum", ["x", "r", "d", "m", "neg"], "y"),
        ],
        {"x": [4]},
        ["y"],
        {
            "c": np.ones(4, np.float32),
            "own": np.ones(4, np.float32),
            "ratio": np.float32(0.5),
            "training": np.array(True),
        },
        domains=["com.example"],
    )
    folded, entry = apply(proto, FoldConstants())
    assert ops(folded) == ["RandomNormalLike", "Dropout", "Mystery", "Sum"]
    why = reasons(entry)
    assert "random" in why["n_r"]
    assert "training" in why["n_d"]
    assert "com.example" in why["n_m"]


def test_dequantize_of_a_constant_stays() -> None:
    proto = build(
        [node("DequantizeLinear", ["q", "s", "z"], "w"), node("MatMul", ["x", "w"], "y")],
        {"x": [1, 64]},
        ["y"],
        {"q": RNG.integers(-9, 9, (64, 64)).astype(np.int8), "s": np.float32(0.1), "z": np.int8(0)},
    )
    folded, entry = apply(proto, FoldConstants())
    assert folded.SerializeToString() == onnx.ModelProto.FromString(folded.SerializeToString()).SerializeToString()
    assert ops(folded) == ["DequantizeLinear", "MatMul"]
    assert "as float again" in reasons(entry)["n_w"]


def test_overridable_initializers_are_no_constants_and_that_is_said() -> None:
    proto = build(
        [node("Neg", ["w"], "n"), node("Add", ["x", "n"], "y")],
        {"x": [4]},
        ["y"],
        {"w": np.ones(4, np.float32)},
        ir_version=3,
        inputs_too=True,
        opset=8,
    )
    folded, entry = apply(proto, FoldConstants())
    assert ops(folded) == ["Neg", "Add"]
    assert "caller may replace" in reasons(entry)["(graph)"]


def test_ir3_results_become_constant_nodes() -> None:
    proto = build(
        [
            node("Constant", [], "c", value=numpy_helper.from_array(np.ones((4, 4), np.float32))),
            node("Transpose", ["c"], "n"),
            node("Add", ["x", "n"], "y"),
        ],
        {"x": [4, 4]},
        ["y"],
        ir_version=3,
        opset=8,
    )
    folded, _ = apply(proto, FoldConstants())
    assert ops(folded) == ["Constant", "Add"]
    assert not folded.graph.initializer
    same(proto, folded, {"x": np.ones((4, 4), np.float32)})


def test_a_result_that_is_a_graph_output_keeps_its_name_and_is_made_by_a_constant_node() -> None:
    proto = build(
        [node("ReduceSum", ["c"], "a"), node("Abs", ["a"], "fixed"), node("Add", ["x", "fixed"], "y")],
        {"x": [4]},
        ["y", "fixed"],
        {"c": np.arange(40, dtype=np.float32)},
    )
    folded, entry = apply(proto, FoldConstants())
    assert ops(folded) == ["Constant", "Add"]
    assert [o.name for o in folded.graph.output] == ["y", "fixed"]
    assert len(entry.changes) == 2
    same(proto, folded, {"x": np.ones(4, np.float32)})


def test_several_outputs_some_unread() -> None:
    proto = build(
        [
            node("TopK", ["c", "k"], ["unread", "index"]),
            node("Cast", ["index"], "f", to=TensorProto.FLOAT),
            node("Add", ["x", "f"], "y"),
        ],
        {"x": [2]},
        ["y"],
        {"c": np.array([3.0, 1.0, 2.0], np.float32), "k": np.array([2])},
    )
    folded, _ = apply(proto, FoldConstants())
    assert ops(folded) == ["Add"]
    same(proto, folded, {"x": np.zeros(2, np.float32)})


# -- size


def test_bigfold_does_not_grow_and_growth_is_allowed_on_request() -> None:
    proto = onnx.load(MODELS / "bigfold.onnx")
    folded, entry = apply(proto, FoldConstants())
    assert size(folded) <= size(proto)
    assert any("larger" in reason for reason in reasons(entry).values())
    grown, _ = apply(proto, FoldConstants(allow_growth=True))
    assert size(grown) > 2**20
    feeds = fixture_feeds("bigfold", 1)[0]
    same(proto, folded, feeds)
    same(proto, grown, feeds)


def test_a_big_expand_does_not_stop_a_big_transpose_from_being_folded() -> None:
    """What pays for itself is kept even where something larger stands beside it."""
    proto = build(
        [
            node("Transpose", ["w"], "wt", perm=[1, 0]),
            node("Expand", ["one", "shape"], "filled"),
            node("MatMul", ["x", "wt"], "p"),
            node("Add", ["p", "filled"], "y"),
        ],
        {"x": [512, 300]},
        ["y"],
        {"w": RNG.normal(size=(128, 300)).astype(np.float32), "one": np.ones((1, 1), np.float32), "shape": [512, 128]},
    )
    folded, entry = apply(proto, FoldConstants())
    assert ops(folded) == ["Expand", "MatMul", "Add"]
    assert [c.site for c in entry.changes] == ["n_wt"]
    assert "larger" in reasons(entry)["n_filled"]
    assert size(folded) <= size(proto)


def test_dead_sources_leave_the_file() -> None:
    proto = build(
        [node("Transpose", ["w"], "wt"), node("MatMul", ["x", "wt"], "y")],
        {"x": [1, 8]},
        ["y"],
        {"w": np.ones((8, 8), np.float32)},
    )
    folded, _ = apply(proto, FoldConstants())
    assert list(initializers(folded)) == ["wt"]


HUGE = {
    "Expand": ([node("Expand", ["one", "dims"], "big")], {"one": np.float32(1), "dims": np.array([100000, 100000])}),
    "ConstantOfShape": ([node("ConstantOfShape", ["dims"], "big")], {"dims": np.array([100000, 100000])}),
    "Range": (
        [node("Range", ["start", "stop", "step"], "big")],
        {"start": np.float32(0), "stop": np.float32(1e10), "step": np.float32(1)},
    ),
    "Tile": ([node("Tile", ["one", "dims"], "big")], {"one": np.ones(10, np.float32), "dims": np.array([10**9])}),
    "Pad": ([node("Pad", ["one", "dims"], "big")], {"one": np.ones(10, np.float32), "dims": np.array([0, 10**10])}),
    "OneHot": (
        [node("OneHot", ["ids", "depth", "pair"], "big")],
        {"ids": np.zeros(10, np.int64), "depth": np.array(10**9), "pair": np.array([0, 1], np.float32)},
    ),
    "HannWindow": ([node("HannWindow", ["length"], "big")], {"length": np.array(10**10)}),
    "NonZero": (
        [node("Expand", ["one", "dims"], "e"), node("NonZero", ["e"], "z"), node("Cast", ["z"], "big", to=1)],
        {"one": np.float32(1), "dims": np.array([2000, 2000])},
    ),
}


@pytest.mark.parametrize("case", HUGE)
@pytest.mark.parametrize("growth", [False, True])
def test_huge_results_are_refused_before_they_are_computed(case: str, growth: bool) -> None:
    made, weights = HUGE[case]
    proto = build([*made, node("Mul", ["x", "big"], "y")], {"x": [1]}, ["y"], weights)
    apply(build([node("Neg", ["x"], "y")], {"x": [1]}, ["y"]), FoldConstants())  # imports are not what is timed
    tracemalloc.start()
    started = time.perf_counter()
    folded, entry = apply(proto, FoldConstants(allow_growth=growth), verify="off")
    seconds = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1.0
    assert peak < 200 * 2**20
    assert "Mul" in ops(folded)
    assert any("max-result" in r or "huge" in r or "larger" in r for r in reasons(entry).values())


def test_max_result_is_the_limit_when_growth_is_allowed() -> None:
    proto = build(
        [node("Expand", ["one", "dims"], "e"), node("Add", ["x", "e"], "y")],
        {"x": [1]},
        ["y"],
        {"one": np.float32(1), "dims": np.array([1000])},
    )
    assert ops(apply(proto, FoldConstants(allow_growth=True, max_result=4000))[0]) == ["Add"]
    kept, entry = apply(proto, FoldConstants(allow_growth=True, max_result=3999))
    assert ops(kept) == ["Expand", "Add"]
    assert "4000 bytes; raise max-result" in reasons(entry)["n_e"]


# -- quantized weights


def test_fake_quantized_weights_become_integers_and_outputs_stay_bit_equal() -> None:
    proto = onnx.load(MODELS / "fakequant.onnx")
    folded, _ = apply(proto, FoldConstants())
    stored = initializers(folded)
    assert not [n for n, a in stored.items() if a.dtype == np.float32 and a.ndim > 1]
    assert [n for n, a in stored.items() if a.dtype == np.int8 and a.ndim > 1]
    assert size(folded) < 0.5 * size(proto)
    for feeds in fixture_feeds("fakequant", 4):
        for name, array in run(proto, feeds).items():
            np.testing.assert_array_equal(run(folded, feeds)[name], array)


# -- time and repetition


def _chain(length: int) -> onnx.ModelProto:
    """Constants chained, every value read by the model too: nothing may be looked at again and again."""
    nodes = [node("Neg", ["c" if i == 0 else f"v{i - 1}"], f"v{i}") for i in range(length)]
    nodes += [node("Add", ["x" if i == 0 else f"s{i - 1}", f"v{i}"], f"s{i}") for i in range(length)]
    return build(nodes, {"x": [64]}, [f"s{length - 1}"], {"c": np.ones(64, np.float32)})


def test_long_chains_take_linear_time() -> None:
    apply(_chain(10), FoldConstants(), verify="off")

    def seconds(length: int) -> float:
        started = time.perf_counter()
        _, entry = apply(_chain(length), FoldConstants(), verify="off")
        assert len(entry.changes) + len(entry.skipped) == length
        return time.perf_counter() - started

    short, long = seconds(250), seconds(1000)
    assert long < 10 * short + 1.0


def test_two_runs_are_byte_identical_and_the_second_pass_changes_nothing() -> None:
    proto = onnx.load(MODELS / "encoder.onnx")
    one, _ = apply(proto, FoldConstants(), verify="off")
    two, _ = apply(proto, FoldConstants(), verify="off")
    assert one.SerializeToString(deterministic=True) == two.SerializeToString(deterministic=True)
    again, entry = apply(one, FoldConstants(), verify="off")
    assert not entry.changes
    assert entry.skipped
    assert again.SerializeToString(deterministic=True) == one.SerializeToString(deterministic=True)


def test_loop_bodies_are_folded_and_a_switched_off_site_stays() -> None:
    proto = onnx.load(MODELS / "control.onnx")
    folded, _ = apply(proto, FoldConstants())
    same(proto, folded, fixture_feeds("control", 1)[0])
    chain = build(
        [node("Neg", ["c"], "a"), node("Add", ["x", "a"], "y")], {"x": [4]}, ["y"], {"c": np.ones(4, np.float32)}
    )
    kept, entry = apply(chain, FoldConstants(), disabled={("fold-constants", "n_a")}, verify="off")
    assert ops(kept) == ["Neg", "Add"]
    del entry
