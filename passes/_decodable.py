"""Whether the ONNX Runtime that is installed computes a form of DequantizeLinear right, tried once on a small product.

Releases have got some block sizes wrong without a word (onnxruntime issue 28551: blocks of 512 came out as zeros).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.errors import RuntimeFailure
from graphopt.passes._encode import Encoded, Encoder
from graphopt.passes._formats import FORMATS
from graphopt.passes._layout import KERNEL_DOMAIN, Layout, kernel_sizes
from graphopt.session import Session
from graphopt.spill import Spill

_ALLOWED = 0.05
"""Of the product's norm: the runtime may round the other factor to int8."""


@lru_cache(64)
def undecodable(name: str, block: int, half: bool, *, kernel: bool = False) -> str | None:
    """Why MatMul by a weight of this format does not work here; None: it does. ``kernel``: ONNX Runtime's own."""
    form, rng = FORMATS[name], np.random.default_rng(0)
    columns, rows = 2 * block + block // 2 * (not kernel) if form.blocked else 96, 32
    layout = Layout(form, (columns, rows), rows, columns, block if form.blocked else columns, flipped=True)
    layout = replace(layout, kernel=True) if kernel else replace(layout, turned=True, half=half)
    weight = rng.normal(size=(columns, rows)).astype(np.float32)
    stored = Encoder(_none, lambda _: None, 1).encode(ir.tensor(weight), layout, fitted=False)
    proto = _product(stored)
    x = rng.normal(size=(8, columns)).astype(np.float16 if half else np.float32)
    try:
        found = Session(proto, threads=1).run({"x": x})["y"].astype(np.float32)
    except RuntimeFailure as error:
        return str(error)
    wanted = x.astype(np.float32) @ weight
    allowed = _ALLOWED * np.linalg.norm(wanted) + 2 * np.sqrt(stored.error / stored.signal) * np.linalg.norm(wanted)
    return None if np.linalg.norm(found - wanted) <= allowed else "the product comes out wrong"


def _product(stored: Encoded) -> onnx.ModelProto:
    """x[8, columns] by the weight, as compress-weights would have it."""
    layout = stored.layout
    tensors = []
    for key, tensor in (("q", stored.codes), ("s", stored.scale), ("z", stored.zero)):
        if tensor is not None:
            tensors.append(ir.to_proto(tensor))
            tensors[-1].name = key
    names = [t.name for t in tensors]
    if layout.kernel:
        sizes: dict[str, Any] = {**kernel_sizes(layout)}
        nodes = [onnx.helper.make_node("MatMulNBits", ["x", *names], ["y"], domain=KERNEL_DOMAIN, **sizes)]
    else:
        how: dict[str, Any] = {"axis": 0, "block_size": layout.block} if layout.form.blocked else {"axis": 1}
        if not layout.form.blocked:
            tensors[1].dims[:] = [layout.rows]
        nodes = [
            onnx.helper.make_node("DequantizeLinear", names, ["w"], **how),
            onnx.helper.make_node("MatMul", ["x", "w"], ["y"]),
        ]
    kind = onnx.TensorProto.FLOAT16 if layout.half else onnx.TensorProto.FLOAT
    ends = [onnx.helper.make_tensor_value_info(n, kind, [8, d]) for n, d in (("x", layout.columns), ("y", layout.rows))]
    graph = onnx.helper.make_graph(nodes, "probe", ends[:1], ends[1:], tensors)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(KERNEL_DOMAIN, 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _none() -> Spill:
    raise AssertionError("nothing is mapped here")
