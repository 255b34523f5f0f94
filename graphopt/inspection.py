"""What is in a model, read through onnx alone: nothing is run, no weight is looked at."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx

from graphopt.cost import node_macs, shapes
from graphopt.errors import InputError, ModelError
from graphopt.model import graphs, read_proto

_TOP = 10


def inspect_model(source: Any, *, dims: dict[str, int] | None = None) -> dict[str, Any]:
    """Inputs, outputs, operators, parameters, bytes by type, MACs, QDQ coverage, largest tensors, metadata.

    ``dims`` fixes symbolic dims for MACs (the others count as 1). What is unknown is None.

    Raises:
        InputError: the file cannot be read.
        ModelError: it is no ONNX model.
    """
    proto = source if isinstance(source, onnx.ModelProto) else read_proto(source)
    _check_dims(proto, dims or {})
    operators: Counter[str] = Counter()
    tensors: list[tuple[int, str, str, list[int]]] = []
    by_type: Counter[str] = Counter()
    for graph in graphs(proto):
        for node in graph.node:
            domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}::"
            operators[domain + node.op_type] += 1
            tensors += [
                _tensor(a.t, node.output[0]) for a in node.attribute if a.HasField("t") and node.op_type == "Constant"
            ]
        tensors += [_tensor(t, t.name) for t in graph.initializer]
    for size, _, kind, _ in tensors:
        by_type[kind] += size
    macs, unknown = _macs(proto, dims or {})
    path = str(source) if isinstance(source, (str, Path)) and str(source) != "-" else None
    return {
        "schema_version": 1,
        "path": path,
        "bytes": Path(path).stat().st_size if path else proto.ByteSize(),
        "external_bytes": _external_bytes(proto),
        "ir_version": proto.ir_version,
        "opsets": {o.domain or "ai.onnx": o.version for o in proto.opset_import},
        "producer": f"{proto.producer_name} {proto.producer_version}".strip() or None,
        "graph": proto.graph.name,
        "inputs": [_value(v) for v in proto.graph.input if v.name not in {t.name for t in proto.graph.initializer}],
        "outputs": [_value(v) for v in proto.graph.output],
        "nodes": sum(operators.values()),
        "operators": dict(operators.most_common()),
        "subgraphs": sum(1 for _ in graphs(proto)) - 1,
        "functions": len(proto.functions),
        "parameters": sum(_count(shape) for *_, shape in tensors),
        "weight_bytes": sum(size for size, *_ in tensors),
        "bytes_by_type": dict(by_type.most_common()),
        "macs": macs,
        "macs_unknown_nodes": unknown,
        "quantization": _quantization(proto),
        "largest": [
            {"name": n, "type": k, "shape": s, "bytes": b}
            for b, n, k, s in sorted(tensors, key=lambda t: (-t[0], t[1]))[:_TOP]
        ],
        "metadata": {p.key: p.value for p in proto.metadata_props},
    }


def _tensor(tensor: onnx.TensorProto, name: str) -> tuple[int, str, str, list[int]]:
    """(bytes, name, type, shape), from what the file says of it."""
    import onnx_ir as ir

    shape = list(tensor.dims)
    if tensor.data_type == onnx.TensorProto.STRING:
        return sum(map(len, tensor.string_data)), name, "string", shape
    try:
        bits = ir.DataType(tensor.data_type).bitwidth
        kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
    except (TypeError, ValueError) as error:
        raise ModelError(f"tensor '{name}' has an unknown type {tensor.data_type}; export the model again") from error
    return (_count(shape) * bits + 7) // 8, name, kind, shape


def _count(shape: list[int]) -> int:
    count = 1
    for dim in shape:
        count *= dim
    return count


def _value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return {"name": value.name, "type": (kind or "unknown").removesuffix("_type"), "shape": None}
    tensor = value.type.tensor_type
    shape: list[int | str] | None = None
    if tensor.HasField("shape"):
        shape = [
            d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else d.dim_param or "?"
            for d in tensor.shape.dim
        ]
    return {"name": value.name, "type": onnx.TensorProto.DataType.Name(tensor.elem_type).lower(), "shape": shape}


def _macs(proto: onnx.ModelProto, dims: dict[str, int]) -> tuple[int | None, int]:
    """(sum over the nodes whose shapes are known, how many are not)."""
    feeds = {
        v.name: tuple(
            d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else dims.get(d.dim_param, 1)
            for d in v.type.tensor_type.shape.dim
        )
        for v in proto.graph.input
        if v.type.HasField("tensor_type")
    }
    known = {**_declared(proto, dims), **shapes(proto, feeds)}
    counts = [node_macs(node, known) for graph in graphs(proto) for node in graph.node]
    found = [c for c in counts if c is not None]
    return (sum(found) if found else None), len(counts) - len(found)


def _declared(proto: onnx.ModelProto, dims: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes that the file itself states, their symbolic dims sized; for values inference does not reach."""
    found = {}
    for graph in graphs(proto):
        for value in graph.value_info:
            tensor = value.type.tensor_type
            if value.type.HasField("tensor_type") and tensor.HasField("shape"):
                sizes = [
                    d.dim_value if d.HasField("dim_value") else _sized(d.dim_param, dims) for d in tensor.shape.dim
                ]
                if None not in sizes and all(s is not None and s >= 0 for s in sizes):
                    found[value.name] = tuple(s for s in sizes if s is not None)
    return found


def _sized(name: str, dims: dict[str, int]) -> int | None:
    """A plain symbol's size; of an expression ("2*batch", "unk__7 + 1") nothing is guessed."""
    return dims.get(name, 1) if name.isidentifier() else dims.get(name)


def _check_dims(proto: onnx.ModelProto, dims: dict[str, int]) -> None:
    names = [d.dim_param for v in proto.graph.input for d in v.type.tensor_type.shape.dim if d.dim_param]
    for name in dims:
        if name not in names:
            has = f"its inputs have {', '.join(dict.fromkeys(names))}" if names else "its inputs have none"
            raise InputError(f"the model has no symbolic dim '{name}'; {has}")


def _external_bytes(proto: onnx.ModelProto) -> int:
    """What of the weights stands in other files, as the model says."""
    return sum(
        _tensor(tensor, tensor.name)[0]
        for graph in graphs(proto)
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    )


def _quantization(proto: onnx.ModelProto) -> dict[str, Any] | None:
    """How much of the heavy operators reads integers through DequantizeLinear, by node count; None: not quantized."""
    heavy = {"Conv", "ConvTranspose", "MatMul", "Gemm"}
    pairs = dequantized = total = 0
    for graph in graphs(proto):
        dq = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
        for node in graph.node:
            pairs += node.op_type == "QuantizeLinear"
            if node.op_type in heavy:
                total += 1
                dequantized += len(node.input) > 1 and node.input[0] in dq and node.input[1] in dq
            elif node.op_type in (
                "QLinearConv",
                "QLinearMatMul",
                "MatMulInteger",
                "ConvInteger",
                "DynamicQuantizeMatMul",
            ):
                total += 1
                dequantized += 1
    if not pairs and not dequantized:
        return None
    return {"quantize_nodes": pairs, "heavy_nodes": total, "heavy_nodes_integer": dequantized}
