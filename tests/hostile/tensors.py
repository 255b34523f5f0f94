"""Weights whose bytes, dims and types do not agree, or are at the edge of what there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import builders
import numpy as np
import onnx
from builders import value, weight
from onnx import TensorProto, helper, numpy_helper

from hostile.corpus import ANY, OK, REFUSED, Group

KINDS = Group("tensor")
node = helper.make_node


def added(tensor: onnx.TensorProto) -> onnx.ModelProto:
    """y = x + w."""
    return builders.model([node("Add", ["x", "w"], ["y"])], [value("x")], [value("y", None)], [tensor])


def held(tensor: onnx.TensorProto) -> onnx.ModelProto:
    """A weight of any type, read by an operator that takes all of them; the model's own output is something else."""
    nodes = [node("Shape", ["w"], ["s"]), node("Cast", ["s"], ["f"], to=1), node("ReduceSum", ["f"], ["r"], keepdims=0)]
    return builders.model([*nodes, node("Add", ["x", "r"], ["y"])], [value("x")], [value("y")], [tensor])


def tensor(kind: int = TensorProto.FLOAT, dims: Any = (2,), **fields: Any) -> onnx.TensorProto:
    return onnx.TensorProto(name="w", data_type=kind, dims=list(dims), **fields)


TWO = np.array([1, 2], np.float32).tobytes()
for name, outcome, made in (
    ("raw-too-short", REFUSED, lambda: added(tensor(raw_data=TWO[:5]))),
    ("raw-too-long", REFUSED, lambda: added(tensor(raw_data=TWO * 2))),
    ("raw-empty", REFUSED, lambda: added(tensor(raw_data=b""))),
    ("no-data-at-all", REFUSED, lambda: added(tensor())),
    ("floats-too-few", REFUSED, lambda: added(tensor(float_data=[1.0]))),
    ("floats-too-many", REFUSED, lambda: added(tensor(float_data=[1.0] * 9))),
    ("floats-in-the-wrong-field", REFUSED, lambda: added(tensor(int64_data=[1, 2]))),
    ("both-raw-and-floats", ANY, lambda: added(tensor(raw_data=TWO, float_data=[3.0, 4.0]))),
    ("dims-negative", REFUSED, lambda: added(tensor(dims=(-2,), raw_data=TWO))),
    ("dims-negative-twice", REFUSED, lambda: added(tensor(dims=(-1, -2), raw_data=TWO))),
    ("dims-2-62", REFUSED, lambda: added(tensor(dims=(2**62,), raw_data=TWO))),
    ("dims-wrap-to-0", REFUSED, lambda: added(tensor(dims=(2**32, 2**32), raw_data=b""))),
    ("dims-wrap-to-2", REFUSED, lambda: added(tensor(dims=(2**63 - 1, 2), raw_data=TWO))),
    ("dims-huge-without-data", REFUSED, lambda: added(tensor(dims=(2**40,)))),
    ("dims-missing", REFUSED, lambda: added(tensor(dims=(), raw_data=TWO))),
    ("type-0", REFUSED, lambda: added(tensor(0, raw_data=TWO))),
    ("type-999", REFUSED, lambda: added(tensor(999, raw_data=TWO))),
    ("type-negative", REFUSED, lambda: added(tensor(-1, raw_data=TWO))),
    ("strings-in-raw-data", REFUSED, lambda: held(tensor(TensorProto.STRING, raw_data=b"abcd"))),
    ("strings", OK, lambda: held(tensor(TensorProto.STRING, string_data=[b"a", "ü".encode()]))),
    ("strings-no-utf8", OK, lambda: held(tensor(TensorProto.STRING, string_data=[b"\xff\xfe", b"\0"]))),
    ("strings-too-few", REFUSED, lambda: held(tensor(TensorProto.STRING, string_data=[b"a"]))),
    ("int4-odd", OK, lambda: held(tensor(TensorProto.INT4, (3,), raw_data=b"\x21\x03"))),
    ("int4-too-short", REFUSED, lambda: held(tensor(TensorProto.INT4, (5,), raw_data=b"\x21"))),
    ("float8-nan", OK, lambda: held(tensor(TensorProto.FLOAT8E4M3FN, raw_data=b"\x7f\xff"))),
    ("complex", OK, lambda: held(tensor(TensorProto.COMPLEX64, raw_data=TWO * 2))),
    ("bool-7", ANY, lambda: held(tensor(TensorProto.BOOL, raw_data=b"\x07\xff"))),
    ("int8-out-of-range", ANY, lambda: held(tensor(TensorProto.INT8, int32_data=[1000, -1000]))),
    ("segment", ANY, lambda: added(tensor(raw_data=TWO, segment=onnx.TensorProto.Segment(begin=0, end=9)))),
    ("of-size-0", OK, lambda: held(tensor(dims=(0,)))),
    ("of-size-0-and-2-62", REFUSED, lambda: held(tensor(dims=(0, 2**62)))),
    ("rank-300", REFUSED, lambda: held(tensor(dims=(1,) * 300, raw_data=TWO[:4]))),
    ("nan-and-inf", OK, lambda: added(weight("w", [np.nan, np.inf]))),
    ("denormal", OK, lambda: added(weight("w", [1e-45, -1e-45]))),
    ("largest", OK, lambda: added(weight("w", [3.4e38, -3.4e38]))),
    ("unnamed", REFUSED, lambda: added_unnamed()),
    ("twice", REFUSED, lambda: twice()),
):
    KINDS.add(name, outcome, lambda _f, _r, made=made: made())


def added_unnamed() -> onnx.ModelProto:
    proto = added(weight("w", [1, 2]))
    proto.graph.initializer.append(weight("", [1]))
    return proto


def twice() -> onnx.ModelProto:
    proto = added(weight("w", [1, 2]))
    proto.graph.initializer.append(weight("w", [3, 4]))
    return proto


# Constants


def constant(**attributes: Any) -> onnx.ModelProto:
    nodes = [node("Constant", [], ["w"], **attributes), node("Add", ["x", "w"], ["y"])]
    return builders.model(nodes, [value("x")], [value("y", None)])


for name, outcome, made in (
    ("constant-without-value", ANY, lambda: constant()),
    ("constant-with-two-values", ANY, lambda: constant(value_float=1.0, value_floats=[1.0, 2.0])),
    ("constant-too-short", REFUSED, lambda: constant(value=tensor(raw_data=TWO[:3]))),
    ("constant-of-2-40", REFUSED, lambda: constant(value=tensor(dims=(2**40,)))),
    ("constant-of-no-type", REFUSED, lambda: constant(value=onnx.TensorProto())),
    ("constant-of-text", ANY, lambda: constant(value_string="x")),
):
    KINDS.add(name, outcome, lambda _f, _r, made=made: made())


# Sparse


def sparse(values: Any, indices: Any, dims: Any) -> onnx.ModelProto:
    found = onnx.SparseTensorProto(dims=list(dims))
    found.values.CopyFrom(weight("w", values))
    found.indices.CopyFrom(numpy_helper.from_array(np.asarray(indices, np.int64)))
    proto = builders.model([node("Add", ["x", "w"], ["y"])], [value("x")], [value("y", None)])
    proto.graph.sparse_initializer.append(found)
    return proto


def sparse_constant(dims: Any, indices: Any = (0, 1)) -> onnx.ModelProto:
    proto = sparse([1, 2], indices, dims)
    held_by = node("Constant", [], ["w"], sparse_value=proto.graph.sparse_initializer[0])
    del proto.graph.sparse_initializer[:]
    nodes = [held_by, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def beside_a_free_dim(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Found by tools/fuzz_bytes.py: only then does shape inference write the dense form out, number by number."""
    for dim in proto.graph.input[0].type.tensor_type.shape.dim:
        dim.ClearField("dim_value")
    return proto


SPARSE: dict[str, tuple[str, Callable[[], onnx.ModelProto]]] = {
    "sparse": (ANY, lambda: sparse([1], [1], [2])),
    "sparse-index-outside": (ANY, lambda: sparse([1], [2**40], [2])),
    "sparse-index-negative": (ANY, lambda: sparse([1], [-1], [2])),
    "sparse-unsorted": (ANY, lambda: sparse([1, 2], [1, 0], [2])),
    "sparse-same-index-twice": (ANY, lambda: sparse([1, 2], [1, 1], [2])),
    "sparse-more-values-than-places": (ANY, lambda: sparse([1, 2, 3], [0, 1, 2], [2])),
    "sparse-fewer-indices": (ANY, lambda: sparse([1, 2], [1], [2])),
    "sparse-dense-2-40": (ANY, lambda: sparse([1, 2], [0, 2**39], [2**40])),
    "sparse-dims-negative": (ANY, lambda: sparse([1, 2], [0, 1], [-4])),
    "sparse-without-dims": (ANY, lambda: sparse([1, 2], [0, 1], [])),
    "sparse-constant": (ANY, lambda: sparse_constant([2])),
    "sparse-constant-dense-2-40": (ANY, lambda: sparse_constant([2**40])),
    "sparse-constant-dense-2-40-and-a-free-dim": (ANY, lambda: beside_a_free_dim(sparse_constant([2**40]))),
    "sparse-dense-2-40-and-a-free-dim": (ANY, lambda: beside_a_free_dim(sparse([1, 2], [0, 2**39], [2**40]))),
}
for name, (outcome, build) in SPARSE.items():
    KINDS.add(name, outcome, lambda _f, _r, build=build: build())
