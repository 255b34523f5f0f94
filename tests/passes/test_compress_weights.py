"""compress-weights: every format, every place a weight can stand, and what the runtime computes from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import apply, build, initializers, node, ops, optimized, reasons, run, size, sqnr

from graphopt.errors import PreconditionError
from graphopt.passes._decodable import undecodable
from graphopt.passes._encode import pack
from graphopt.passes._formats import BINS, FORMATS, codes_of_bins, palette, round_rows
from graphopt.passes._layout import fitting_block
from graphopt.passes.compress_weights import BLOCKS, CompressWeights
from graphopt.session import Session

RNG = np.random.default_rng(3)
LEAST_DB = {
    "fp16": 65,
    "bf16": 45,
    "int8": 35,
    "int8-block": 38,
    "int4": 16,
    "uint4": 17,
    "palette8": 35,
    "palette4": 15,
}


def weights(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def matmul() -> onnx.ModelProto:
    return build(
        [node("MatMul", ["x", "w"], "y")], {"x": ["b", 96]}, ["y"], {"w": weights(96, 64)}, opset=21, ir_version=10
    )


def gemm(transposed: int) -> onnx.ModelProto:
    shape = (64, 96) if transposed else (96, 64)
    return build(
        [node("Gemm", ["x", "w", "c"], "y", transB=transposed, alpha=0.5)],
        {"x": ["b", 96]},
        ["y"],
        {"w": weights(*shape), "c": weights(64)},
        opset=21,
        ir_version=10,
    )


def behind_transpose() -> onnx.ModelProto:
    nodes = [node("Transpose", ["w"], "t", perm=[1, 0]), node("MatMul", ["x", "t"], "y")]
    return build(nodes, {"x": ["b", 96]}, ["y"], {"w": weights(64, 96)}, opset=21, ir_version=10)


def conv(shape: tuple[int, ...] = (16, 24, 3, 3), **attributes: Any) -> onnx.ModelProto:
    channels = shape[1] * attributes.get("group", 1)
    return build(
        [node("Conv", ["x", "w"], "y", **attributes)],
        {"x": ["b", channels, 8, 8]},
        ["y"],
        {"w": weights(*shape)},
        opset=21,
        ir_version=10,
    )


def conv_transpose(group: int = 1) -> onnx.ModelProto:
    return build(
        [node("ConvTranspose", ["x", "w"], "y", group=group)],
        {"x": ["b", 24, 6, 6]},
        ["y"],
        {"w": weights(24, 8, 3, 3)},
        opset=21,
        ir_version=10,
    )


def embedding(*, twice: bool = False) -> onnx.ModelProto:
    graph = helper.make_graph(
        [
            node("Gather", ["w", "ids"], "a"),
            *([node("Gather", ["w", "ids"], "b"), node("Add", ["a", "b"], "y")] if twice else []),
        ],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "m"])],
        [helper.make_tensor_value_info("y" if twice else "a", TensorProto.FLOAT, ["n", "m", 64])],
        [numpy_helper.from_array(weights(80, 64), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def tied() -> onnx.ModelProto:
    """One table, looked up and multiplied by."""
    graph = helper.make_graph(
        [
            node("Gather", ["w", "ids"], "a"),
            node("Transpose", ["w"], "t", perm=[1, 0]),
            node("MatMul", ["a", "t"], "y"),
        ],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "m"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m", 80])],
        [numpy_helper.from_array(weights(80, 64), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def shared() -> onnx.ModelProto:
    """One weight, multiplied by twice and the other way round once."""
    nodes = [
        node("MatMul", ["x", "w"], "a"),
        node("MatMul", ["a", "w"], "b"),
        node("Gemm", ["b", "w"], "y", transB=1),
    ]
    return build(nodes, {"x": ["b", 64]}, ["y"], {"w": weights(64, 64) / 8}, opset=21, ir_version=10)


def constant_node() -> onnx.ModelProto:
    made = node("Constant", [], "w", value=numpy_helper.from_array(weights(96, 64)))
    return build([made, node("MatMul", ["x", "w"], "y")], {"x": ["b", 96]}, ["y"], opset=21, ir_version=10)


def lstm() -> onnx.ModelProto:
    made = node("LSTM", ["x", "w", "r"], ["", "h"], hidden_size=16, name="lstm", direction="bidirectional")
    arrays = {"w": weights(2, 64, 32) / 6, "r": weights(2, 64, 16) / 4}
    return build([made], {"x": [5, "b", 32]}, ["h"], arrays, opset=21, ir_version=10)


def in_branches() -> onnx.ModelProto:
    """A weight of each branch's own, and one of the outer graph's that both read."""

    def branch(name: str) -> onnx.GraphProto:
        own = numpy_helper.from_array(weights(64, 64), f"{name}_w")
        return helper.make_graph(
            [node("MatMul", ["x", "outer"], f"{name}_a"), node("MatMul", [f"{name}_a", f"{name}_w"], f"{name}_y")],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)],
            [own],
        )

    made = node("If", ["flag"], "y", then_branch=branch("yes"), else_branch=branch("no"))
    graph = helper.make_graph(
        [made],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 64]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weights(64, 64), "outer")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


CASES = {
    "matmul": matmul,
    "gemm": lambda: gemm(0),
    "gemm-transposed": lambda: gemm(1),
    "behind-transpose": behind_transpose,
    "conv": conv,
    "conv-odd": lambda: conv((17, 27, 3, 1)),
    "conv-grouped": lambda: conv((16, 12, 3, 3), group=4),
    "conv-transpose": conv_transpose,
    "conv-transpose-grouped": lambda: conv_transpose(2),
    "embedding": embedding,
    "embedding-twice": lambda: embedding(twice=True),
    "tied": tied,
    "shared": shared,
    "constant-node": constant_node,
    "lstm": lstm,
    "in-branches": in_branches,
}


def feeds(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for value in proto.graph.input:
        dims = [d.dim_value or 3 for d in value.type.tensor_type.shape.dim]
        if value.name == "ids":
            found[value.name] = RNG.integers(-80, 80, dims)
        elif value.name == "flag":
            found[value.name] = np.asarray(True)
        else:
            found[value.name] = RNG.normal(size=dims).astype(np.float32)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_shrinks_every_weight_and_keeps_its_numbers(form: str, case: str) -> None:
    proto = CASES[case]()
    made, entry = apply(proto, CompressWeights(format=form, block=32))
    # A branch's decoding nodes take some of what such small weights give.
    assert size(made) < size(proto) * {16: 0.75, 8: 0.6, 4: 0.5}[FORMATS[form].bits], entry.skipped
    given = feeds(proto)
    wanted = next(iter(run(proto, given).values()))
    for optimize in (False, True):
        found = next(iter(run(made, given, optimize=optimize).values()))
        assert found.dtype == wanted.dtype
        layers = {"shared": 3, "in-branches": 2, "tied": 2}.get(case, 1)
        assert sqnr(wanted, found) > LEAST_DB[form] - 3 * (layers - 1) - 3 * optimize, optimize
    assert np.isfinite(entry.metrics["weight_sqnr_db"])


@pytest.mark.parametrize("form", ["int8", "int8-block", "int4", "uint4"])
@pytest.mark.parametrize("case", ["matmul", "gemm", "gemm-transposed", "behind-transpose", "constant-node"])
def test_products_are_computed_from_the_integers(form: str, case: str, tmp_path: Any) -> None:
    made, entry = apply(CASES[case](), CompressWeights(format=form, block=32))
    assert entry.metrics["bytes_multiplied_packed"] == entry.metrics["bytes_before"]
    kinds = ops(optimized(made, tmp_path))
    if not case.startswith("gemm"):  # alpha keeps a Gemm from that kernel
        assert "MatMulNBits" in kinds
    assert "Transpose" not in ops(made)


def test_lookups_pick_rows_of_integers() -> None:
    proto = embedding()
    for form in ("int8", "uint4", "int4", "fp16", "palette4"):
        made, entry = apply(proto, CompressWeights(format=form, block=32))
        assert entry.metrics["bytes_decoded_on_lookup"] == 80 * 64 * 4
        ids = np.zeros((0, 3), np.int64)
        assert next(iter(run(made, {"ids": ids}).values())).shape == (0, 3, 64)
        assert next(o for o in made.graph.output).name == "a"


def test_convolutions_are_decoded_when_the_model_is_loaded(tmp_path: Any) -> None:
    for form in FORMATS:
        made, entry = apply(conv(), CompressWeights(format=form))
        assert entry.metrics["bytes_decoded_at_load"] == entry.metrics["bytes_before"]
        assert set(ops(optimized(made, tmp_path))) <= {"Conv", "ReorderInput", "ReorderOutput"}, form


@pytest.mark.parametrize("opset", [18, 21])
@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_weights_of_other_float_types(kind: Any, opset: int) -> None:
    code = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    proto = build(
        [node("MatMul", ["x", "w"], "y")], {"x": ["b", 96]}, ["y"], {"w": weights(96, 64).astype(kind)},
        opset=opset, ir_version=10, dtype=code,
    )  # fmt: skip
    given = {"x": RNG.normal(size=(3, 96)).astype(kind)}
    for form in ("int8", *(("uint4", "int4") if opset == 21 else ())):
        made, _ = apply(proto, CompressWeights(format=form))
        assert made.graph.output[0].type.tensor_type.elem_type == code
        wanted, found = run(proto, given)["y"], run(made, given)["y"]
        assert found.dtype == wanted.dtype
        assert sqnr(wanted, found) > LEAST_DB[form] - 3
    _, entry = apply(proto, CompressWeights(format="fp16"))
    if kind is np.float16:
        assert "16 bits already" in reasons(entry)["w"]


def test_what_stays_is_told_with_the_reason() -> None:
    arrays = {"w": weights(64, 64), "big": weights(64, 64) * 1e30, "table": weights(64, 64), "v": weights(4, 64)}
    nodes = [
        node("MatMul", ["x", "w"], "a"), node("MatMul", ["a", "big"], "b"),
        node("Add", ["b", "table"], "c"), node("MatMul", ["v", "c"], "y"),
    ]  # fmt: skip
    proto = build(nodes, {"x": [64, 64]}, ["y"], arrays, opset=21, ir_version=10)
    made, entry = apply(proto, CompressWeights(format="fp16"))
    told = reasons(entry)
    assert "65,504" in told["big"]
    assert "read by Add" in told["table"]
    assert "fewer than 1,024" in told["(small)"]
    assert initializers(made).keys() >= {"big", "table", "v"}
    _, entry = apply(proto, CompressWeights(format="int8", exclude=("n_a",)))
    assert "excluded" in reasons(entry)["w"]
    _, entry = apply(proto, CompressWeights(format="int8", include=("n_a",)))
    assert [c.site for c in entry.changes] == ["w"]
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((64, 64), np.inf, np.float32), "w"))
    _, entry = apply(proto, CompressWeights(format="int8"))
    assert "infinite" in reasons(entry)["w"]


def test_single_weights_can_have_a_format_of_their_own() -> None:
    arrays = {"w": weights(64, 64), "v": weights(64, 64), "u": weights(64, 64)}
    nodes = [node("MatMul", ["x", "w"], "a"), node("MatMul", ["a", "v"], "b"), node("MatMul", ["b", "u"], "y")]
    proto = build(nodes, {"x": ["b", 64]}, ["y"], arrays, opset=21, ir_version=10)
    _, entry = apply(proto, CompressWeights(format="fp16", assign=("w=uint4", "u=float")))
    assert entry.metrics["formats"] == {"uint4": 1, "fp16": 1}
    assert "stay in float" in reasons(entry)["u"]
    with pytest.raises(ValueError, match="WEIGHT=FORMAT"):
        CompressWeights(assign=("w=int3",))


def test_an_opset_that_is_too_old_is_refused() -> None:
    proto = build([node("MatMul", ["x", "w"], "y")], {"x": ["b", 96]}, ["y"], {"w": weights(96, 64)}, opset=17)
    with pytest.raises(PreconditionError, match="need opset 21 and the model has 17; run upgrade-opset"):
        apply(proto, CompressWeights(format="int4"))


def test_zero_and_tiny_weights_come_back() -> None:
    array = weights(96, 64) * 1e-9
    array[:, 3] = 0
    array[:, 5] *= 1e-30
    proto = build([node("MatMul", ["x", "w"], "y")], {"x": ["b", 96]}, ["y"], {"w": array}, opset=21, ir_version=10)
    given = {"x": RNG.normal(size=(3, 96)).astype(np.float32)}
    for form in ("int8", "int4", "uint4", "palette8"):
        made, _ = apply(proto, CompressWeights(format=form, block=32))
        found = run(made, given)["y"]
        assert np.abs(found[:, 3]).max() == 0
        assert sqnr(run(proto, given)["y"], found) > LEAST_DB[form] - 3
    # Where scales are stored in 16 bits, those that these are too small for are not.
    small = conv()
    tensor = small.graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1e-12), "w"))
    made, _ = apply(small, CompressWeights(format="uint4"))
    given = feeds(small)
    assert sqnr(run(small, given)["y"], run(made, given)["y"]) > LEAST_DB["uint4"] - 3


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("form", ["int8-block", "int4", "uint4"])
def test_the_runtime_computes_every_block_size_right(form: str, block: int) -> None:
    assert undecodable(form, block, False) is None
    assert undecodable(form, block, True) is None


def test_a_runtime_that_computes_a_block_size_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Session.run
    monkeypatch.setattr(Session, "run", lambda *a, **k: {n: v * 0 for n, v in real(*a, **k).items()})
    undecodable.cache_clear()
    with pytest.raises(PreconditionError, match="does not compute int4 weights in blocks of 64 right here"):
        apply(matmul(), CompressWeights(format="int4"))
    undecodable.cache_clear()


def test_rounding_is_to_nearest_and_a_fitted_range_never_loses_more() -> None:
    rows = weights(8, 100)
    rows[0, 0] = 40  # an outlier makes its block coarse
    for name in ("int8", "int4", "uint4"):
        form = FORMATS[name]
        plain, fitted = (round_rows(rows, form, 32, fitted=f) for f in (False, True))
        step = np.repeat(plain.scale, 32, axis=1)[:, :100]
        assert (np.abs(plain.decoded(32) - rows) <= step * 0.5001 + (step if name == "uint4" else 0)).all()
        error = [np.square(c.decoded(32) - rows).sum() for c in (plain, fitted)]
        assert error[1] <= error[0]
    turned = np.asfortranarray(rows)
    assert (round_rows(turned, form, 32).codes == round_rows(rows, form, 32).codes).all()


def test_a_palette_is_where_the_weights_are() -> None:
    values = np.concatenate([np.full(500, -0.7), np.full(300, 0.1), np.full(200, 0.9)])
    counts = np.bincount(((values + 1) / 2 * BINS).astype(int), minlength=BINS).astype(np.float64)
    book = palette(counts, 16)
    codes = codes_of_bins(book)[((values + 1) / 2 * BINS).astype(int)]
    assert np.abs(book[codes] - values).max() < 1e-3
    assert (np.diff(book) >= 0).all()


def test_packing_and_blocks() -> None:
    assert pack(np.asarray([1, 2, 15], np.uint8)).tolist() == [0x21, 0x0F]
    assert [fitting_block(n, 64) for n in (27, 90, 576, 97, 384)] == [27, 90, 64, 97 if 97 <= 96 else 0, 64]


def test_the_same_twice() -> None:
    proto = conv()
    first, _ = apply(proto, CompressWeights(format="palette4"))
    second, _ = (
        apply(proto, CompressWeights(format="palette4"), threads=2)
        if False
        else apply(proto, CompressWeights(format="palette4"))
    )
    assert first.SerializeToString() == second.SerializeToString()
    again, entry = apply(first, CompressWeights(format="palette4"))
    assert entry.status == "unchanged"
    assert again.SerializeToString() == first.SerializeToString()


# ONNX Runtime's own product by name


def kernels(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for n in proto.graph.node if n.op_type == "MatMulNBits"]


@pytest.mark.parametrize("form", ["int4", "uint4"])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_the_kernel_by_name_computes_what_the_runtime_fuses(form: str, block: int) -> None:
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(384, 96)).astype(np.float32)
    weights = {
        "w": wide,
        "t": rng.normal(size=(64, 96)).astype(np.float32),
        "b": rng.normal(size=64).astype(np.float32),
    }
    nodes = [node("MatMul", ["x", "w"], "a"), node("Gemm", ["a", "t", "b"], "y", transB=1)]
    proto = build(nodes, {"x": ("n", 384)}, {"y": ("n", 64)}, weights, opset=21, ir_version=10)
    options = {"format": form, "block": block}
    standard, _ = apply(proto, CompressWeights(**options))  # type: ignore[arg-type]
    made, entry = apply(proto, CompressWeights(**options, kernel="ort"))  # type: ignore[arg-type]
    assert len(kernels(made)) == (2 if 96 % block == 0 else 1)
    assert entry.metrics["bytes_multiplied_packed"] == 4 * (384 * 96 + 96 * 64)
    x = {"x": rng.normal(size=(5, 384)).astype(np.float32)}
    assert np.array_equal(run(made, x, optimize=True)["y"], run(standard, x, optimize=True)["y"])
    assert not any(t.name == "w" for t in made.graph.initializer)


def test_the_kernel_takes_only_what_it_can() -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(128, 64)).astype(np.float32)

    def made(nodes: list[onnx.NodeProto], outputs: dict[str, Any], **weights: Any) -> onnx.ModelProto:
        inputs = {"x": ("n", 128)}
        proto = build(nodes, inputs, outputs, {"w": w, **weights}, opset=21, ir_version=10)
        small, _ = apply(proto, CompressWeights(format="uint4", kernel="ort"))
        feed = {"x": rng.normal(size=(3, 128)).astype(np.float32)}
        wanted, found = run(proto, feed), run(small, feed)
        assert all(sqnr(wanted[name], found[name]) > 10 for name in wanted)
        return small

    scaled = made([node("Gemm", ["x", "w"], "y", alpha=0.5)], {"y": ("n", 64)})
    assert not kernels(scaled)
    full = made([node("Gemm", ["x", "w", "c"], "y")], {"y": ("n", 64)}, c=np.ones((1, 1), np.float32))
    assert not kernels(full)
    shared = made([node("MatMul", ["x", "w"], "y"), node("MatMul", ["x", "w"], "z")], {"y": ("n", 64), "z": ("n", 64)})
    assert len(kernels(shared)) == 2
    assert len({n.input[1] for n in kernels(shared)}) == 1
    with pytest.raises(ValueError, match="kernel"):
        CompressWeights(kernel="cuda")
