"""Inputs and outputs whose types are odd, empty, enormous or not true."""

from __future__ import annotations

from typing import Any

import builders
import numpy as np
import onnx
from builders import value, weight
from onnx import TensorProto, helper

from hostile.corpus import ANY, OK, REFUSED, UNRUN, Group

KINDS = Group("type")
node = helper.make_node


def through(op: str, given: Any, result: Any, *more: onnx.TensorProto, **attributes: Any) -> Any:
    """One node between an input and an output of these types; names of weights follow the input."""

    def make(_folder: object, _rng: object) -> onnx.ModelProto:
        names = ["x", *(t.name for t in more)]
        return builders.model([node(op, names, ["y"], **attributes)], [given], [result], list(more))

    return make


def info(name: str, kind: onnx.TypeProto) -> onnx.ValueInfoProto:
    return helper.make_value_info(name, kind)


FLOATS = helper.make_tensor_type_proto(TensorProto.FLOAT, [2])
SEQUENCE = helper.make_sequence_type_proto(FLOATS)
OPTIONAL = helper.make_optional_type_proto(FLOATS)
MAP = helper.make_map_type_proto(TensorProto.INT64, FLOATS)
SPARSE = helper.make_sparse_tensor_type_proto(TensorProto.FLOAT, [2])
OPAQUE = onnx.TypeProto(opaque_type=onnx.TypeProto.Opaque(domain="d", name="n"))
ZERO = weight("zero", 0, np.int64)

for name, outcome, make in (
    ("dim-0", ANY, through("Relu", value("x", (0, 4)), value("y", (0, 4)))),
    ("dim-negative", ANY, through("Relu", value("x", (-1, 4)), value("y", (-1, 4)))),
    ("dim-minus-2-62", ANY, through("Relu", value("x", (-(2**62),)), value("y", None))),
    ("dim-2-40", REFUSED, through("Relu", value("x", (2**40,)), value("y", (2**40,)))),
    ("dim-2-62", REFUSED, through("Relu", value("x", (2**62, 2**62)), value("y", None))),
    ("rank-70", ANY, through("Relu", value("x", (1,) * 70), value("y", None))),
    ("rank-5000", ANY, through("Relu", value("x", (1,) * 5000), value("y", None))),
    ("rank-lies", ANY, through("Relu", value("x", (2,)), value("y", (2, 3, 4)))),
    ("output-shape-lies", ANY, through("Relu", value("x", (2,)), value("y", (5,)))),
    ("output-type-lies", UNRUN, through("Relu", value("x"), value("y", (2,), TensorProto.INT64))),
    ("element-type-unknown", ANY, through("Relu", value("x", (2,), 999), value("y", (2,), 999))),
    ("element-type-0", ANY, through("Relu", value("x", (2,), 0), value("y", (2,), 0))),
    ("element-type-negative", ANY, through("Relu", value("x", (2,), -3), value("y", (2,), -3))),
    ("string", ANY, through("Identity", value("x", (2,), TensorProto.STRING), value("y", (2,), TensorProto.STRING))),
    (
        "complex",
        ANY,
        through("Identity", value("x", (2,), TensorProto.COMPLEX64), value("y", (2,), TensorProto.COMPLEX64)),
    ),
    (
        "float8",
        ANY,
        through("Identity", value("x", (2,), TensorProto.FLOAT8E5M2), value("y", (2,), TensorProto.FLOAT8E5M2)),
    ),
    ("int4", ANY, through("Identity", value("x", (3,), TensorProto.INT4), value("y", (3,), TensorProto.INT4))),
    (
        "bfloat16",
        ANY,
        through("Identity", value("x", (2,), TensorProto.BFLOAT16), value("y", (2,), TensorProto.BFLOAT16)),
    ),
    ("sequence", ANY, through("SequenceAt", info("x", SEQUENCE), value("y"), ZERO)),
    ("optional", ANY, through("OptionalGetElement", info("x", OPTIONAL), value("y"))),
    ("map", ANY, through("Identity", info("x", MAP), info("y", MAP))),
    ("sparse", ANY, through("Identity", info("x", SPARSE), info("y", SPARSE))),
    ("opaque", ANY, through("Identity", info("x", OPAQUE), info("y", OPAQUE))),
    ("of-nothing", ANY, through("Identity", info("x", onnx.TypeProto()), info("y", onnx.TypeProto()))),
    (
        "sequence-of-nothing",
        ANY,
        through(
            "SequenceLength",
            info("x", helper.make_sequence_type_proto(onnx.TypeProto())),
            value("y", (), TensorProto.INT64),
        ),
    ),
    ("shape-unknown", ANY, through("Relu", value("x", None), value("y", None))),
    ("dims-of-one-name-1000", ANY, through("Relu", value("x", ("n",) * 1000), value("y", None))),
    ("dim-name-arithmetic", OK, through("Relu", value("x", ("2*n+1", 2)), value("y", ("2*n+1", 2)))),
    ("dim-name-code", OK, through("Relu", value("x", ("__import__('os').system('true')", 2)), value("y", (None, 2)))),
):
    KINDS.add(name, outcome, make)


def nested_type(depth: int) -> onnx.TypeProto:
    kind = FLOATS
    for _ in range(depth):
        kind = helper.make_sequence_type_proto(kind)
    return kind


KINDS.add("sequences-nested-20", ANY, through("Identity", info("x", nested_type(20)), info("y", nested_type(20))))


@KINDS.kind("value-info-lies", ANY)
def _lies(_folder: object, _rng: object) -> onnx.ModelProto:
    """The file says that a value in the middle has other dims and another type than it has."""
    proto = builders.model(
        [node("Relu", ["x"], ["h"]), node("Shape", ["h"], ["s"]), node("Reshape", ["x", "s"], ["y"])],
        [value("x", (2, 3))],
        [value("y", None)],
    )
    proto.graph.value_info.append(value("h", (6,), TensorProto.FLOAT))
    return proto


@KINDS.kind("value-info-lies-hugely", ANY)
def _lies_hugely(_folder: object, _rng: object) -> onnx.ModelProto:
    proto = builders.chain(3)
    proto.graph.value_info.append(value("v1", (2**50, 2**50)))
    return proto
