"""Whether the ONNX Runtime that is installed computes a form of DequantizeLinear right, tried once on a small product.

Releases have got some block sizes wrong without a word (onnxruntime issue 28551: blocks of 512 came out as zeros).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.errors import RuntimeFailure
from graphopt.passes._encode import Encoder
from graphopt.passes._formats import FORMATS
from graphopt.passes._layout import Layout
from graphopt.session import Session
from graphopt.spill import Spill

_ALLOWED = 0.05
"""Of the product's norm: the runtime may round the other factor to int8."""


@lru_cache(64)
def undecodable(name: str, block: int, half: bool) -> str | None:
    """Why MatMul by a weight of this format does not work here; None: it does."""
    form, rng = FORMATS[name], np.random.default_rng(0)
    columns, rows = 2 * block + block // 2 if form.blocked else 96, 32
    layout = Layout(
        form, (columns, rows), rows, columns, block if form.blocked else columns, flipped=True, turned=True, half=half
    )
    weight = rng.normal(size=(columns, rows)).astype(np.float32)
    encoder = Encoder(_none, lambda _: None, 1)
    stored = encoder.encode(ir.tensor(weight), layout, fitted=False)
    kind = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    parts = {"q": stored.codes, "s": stored.scale, "z": stored.zero}
    tensors = []
    for key, tensor in parts.items():
        if tensor is not None:
            proto = ir.to_proto(tensor)
            proto.name = key
            tensors.append(proto)
    how: dict[str, Any] = {"axis": 0, "block_size": block} if form.blocked else {"axis": 1}
    if not form.blocked:
        tensors[1].dims[:] = [rows]
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("DequantizeLinear", [t.name for t in tensors], ["w"], **how),
            onnx.helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        "probe",
        [onnx.helper.make_tensor_value_info("x", kind, [8, columns])],
        [onnx.helper.make_tensor_value_info("y", kind, [8, rows])],
        tensors,
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    x = rng.normal(size=(8, columns)).astype(np.float16 if half else np.float32)
    try:
        found = Session(proto, threads=1).run({"x": x})["y"].astype(np.float32)
    except RuntimeFailure as error:
        return str(error)
    wanted = x.astype(np.float32) @ weight
    allowed = _ALLOWED * np.linalg.norm(wanted) + 2 * np.sqrt(stored.error / stored.signal) * np.linalg.norm(wanted)
    return None if np.linalg.norm(found - wanted) <= allowed else "the product comes out wrong"


def _none() -> Spill:
    raise AssertionError("nothing is mapped here")
