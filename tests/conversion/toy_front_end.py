"""A front end for a framework that is not there: sources are JSON, ``{"toy": what to do}``. Run by worker.py."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def convert(job: Any) -> None:
    """A Gemm and a Relu, right or wrong in the way that the source says."""
    what = json.loads(job.source.read_text())["toy"]
    job.framework, job.converter = "toy 1.0", "toy2onnx 0.1"
    print("frameworks print to stdout")
    if what == "missing":
        job.need("numpy", "no_such_framework")
    if what == "refused":
        raise job.Refused("the toy is broken; buy another")
    if what == "raises":
        raise ValueError("no converter for\n Frobnicate")
    if what == "dies":
        sys.stderr.write("a native library says goodbye\n")
        sys.stderr.flush()
        os._exit(3)
    if what == "hangs":
        time.sleep(60)
    if what == "nothing":
        return
    _write(job, what)
    import numpy

    weight = numpy.arange(12, dtype=numpy.float32).reshape(4, 3) / 10
    for rows in (1, 3):
        x = job.drawn("float32", (rows, 4))
        y = numpy.maximum(x @ weight, 0)
        labels = y.argmax(axis=1)
        outputs = {
            "wrong": [y + 1e-2, labels],
            "near": [y + 1e-5, labels],
            "label": [y, labels + 1],
            "shape": [y[:, :2], labels],
            "too-many": [y, labels, labels],
            "double": [y.astype("float64"), labels.astype("int32")],
        }
        job.sample([x], outputs.get(what, [y, labels]))


def _write(job: Any, what: str) -> None:
    import numpy
    from onnx import TensorProto, helper, numpy_helper

    if what == "garbage":
        job.target.write_bytes(b"this is no model")
        return
    weight = numpy.arange(12, dtype=numpy.float32).reshape(4, 3) / 10
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Erfc" if what == "erfc" else "Frobnicate" if what == "invalid" else "Relu", ["h"], ["y"]),
        helper.make_node("ArgMax", ["y"], ["label"], axis=1, keepdims=0),
    ]
    if what == "random":
        nodes.insert(1, helper.make_node("RandomNormalLike", ["h"], ["r"]))
        nodes[2] = helper.make_node("Add", ["h", "r"], ["y"])
    rows = 1 if what == "declared" else "unk__7"
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["s77", 4])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, 3]),
            helper.make_tensor_value_info("label", TensorProto.INT64, [rows]),
        ],
        [numpy_helper.from_array(weight, "w")],
    )
    opset = {"old": 11, "opset": job.opset}.get(what, 18)
    imports = [helper.make_opsetid("", opset)]
    if what == "twice":
        imports.append(helper.make_opsetid("", 13))
    if what == "unsaid":
        imports = [helper.make_opsetid("ai.onnx.ml", 3)]
    job.target.write_bytes(helper.make_model(graph, opset_imports=imports, ir_version=6).SerializeToString())
