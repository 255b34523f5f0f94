"""What is in a model, read through onnx alone: nothing is run, no data file is opened."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from graphopt.errors import InputError, did_you_mean
from graphopt.lifetimes import dead, peak
from graphopt.model import gather, graphs, read_proto
from graphopt.neighbourhood import neighbourhood
from graphopt.remote import place
from graphopt.scopes import tree as module_tree
from graphopt.values import Values, known
from graphopt.weights import Weight, collect, content, repeats, strip, text
from graphopt.workload import inlined, listed, operator, table, works

_TOP = 10


def inspect_model(
    source: Any,
    *,
    dims: Mapping[str, int] | None = None,
    deep: bool = False,
    tree: bool = False,
    nodes: bool = False,
    node: str | None = None,
) -> dict[str, Any]:
    """What the file says and what follows from it; unknown is None, and never an end.

    Args:
        source: anything :func:`graphopt.model.load` takes; it is not touched.
        dims: sizes for symbolic dims (the others count as 1), for MACs and activations.
        deep: read every weight, data files included, to tell which are equal.
        tree: add ``tree``, the modules the nodes come from.
        nodes: add ``node_costs``, every node in the file's order, functions inlined.
        node: add ``node``, all about the node or value of that name.

    Raises:
        InputError: the file cannot be read, or has no such dim or node.
        ModelError: it is no ONNX model; with ``deep``, its external data is missing or lies outside its folder.
    """
    proto, path = _read(source)
    size = path.stat().st_size if path is not None and path.is_file() else proto.ByteSize()
    _check_dims(proto, dims or {})
    weights = collect(proto)
    report = _stated(proto, weights)
    folder = Path.cwd() / path.parent if path is not None else None
    if path is not None and (deep or node is not None):
        gather(source, proto)
    report.update(_waste(proto, weights, folder, deep))
    values = content(weights, node, folder=folder, deep=deep) if node is not None else None
    weights = []  # they hold the tensors' data
    bare = _bare(proto, source)
    del proto
    plain = inlined(bare)
    sized = Values(plain, dims or {})
    done = works(sized, collect(plain))
    report.update(_computed(done))
    report["activation_peak"] = peak(sized).as_dict()
    report["dynamic_dims"] = _dynamic(bare, dims or {})
    if tree:
        report["tree"] = module_tree(done)
    if nodes:
        report["node_costs"] = listed(done, sized)
    if node is not None:
        same = sized if plain is bare else Values(bare, dims or {})
        report["node"] = [{**one, "values": values} for one in neighbourhood(Values(bare), same, node)]
    return {"schema_version": 1, "path": os.fspath(source) if path is not None else None, "bytes": size, **report}


def _read(source: Any) -> tuple[onnx.ModelProto, Path | None]:
    if isinstance(source, onnx.ModelProto):
        return source, None
    if isinstance(source, (bytes, bytearray, memoryview)):
        from graphopt.model import _parse

        return _parse(bytes(source), "the bytes given"), None
    if isinstance(source, (str, os.PathLike)):
        return read_proto(source), None if str(source) == "-" else place(source)
    from graphopt.model import load, to_proto

    return to_proto(load(source)), None


def _bare(proto: onnx.ModelProto, source: Any) -> onnx.ModelProto:
    """``proto`` without its weights; a copy where it is the caller's."""
    if proto is source:
        proto = onnx.ModelProto()
        proto.CopyFrom(source)
    strip(proto)
    return proto


def _stated(proto: onnx.ModelProto, weights: Sequence[Weight]) -> dict[str, Any]:
    """What the file says."""
    operators = Counter(operator(node) for graph in graphs(proto) for node in graph.node)
    by_type: Counter[str] = Counter()
    for weight in weights:
        by_type[weight.kind] += weight.bytes or 0
    stored = {t.name for t in proto.graph.initializer}
    producer = f"{text(proto.producer_name)} {text(proto.producer_version)}".strip()
    return {
        "external_bytes": sum(w.bytes or 0 for w in weights if w.external),
        "ir_version": proto.ir_version,
        "opsets": {text(o.domain) or "ai.onnx": o.version for o in proto.opset_import},
        "producer": producer or None,
        "graph": text(proto.graph.name),
        "inputs": [_port(v) for v in proto.graph.input if v.name not in stored],
        "outputs": [_port(v) for v in proto.graph.output],
        "nodes": sum(operators.values()),
        "operators": dict(operators.most_common()),
        "subgraphs": sum(1 for _ in graphs(proto)) - 1,
        "functions": len(proto.functions),
        "function_list": [_function(f, operators) for f in proto.functions],
        "parameters": sum(w.count for w in weights),
        "weight_bytes": sum(w.bytes or 0 for w in weights),
        "bytes_by_type": dict(by_type.most_common()),
        "quantization": _quantization(proto),
        "largest": [_entry(w) for w in sorted(weights, key=lambda w: (-(w.bytes or 0), w.name))[:_TOP]],
        "metadata": {text(p.key): text(p.value) for p in proto.metadata_props},
        "doc": text(proto.doc_string) or None,
    }


def _entry(weight: Weight) -> dict[str, Any]:
    return {"name": weight.name, "type": weight.kind, "shape": list(weight.shape), "bytes": weight.bytes}


def _port(value: onnx.ValueInfoProto) -> dict[str, Any]:
    told = known(value.type)
    shape = None if told.shape is None else list(told.shape)
    return {"name": text(value.name), "type": told.kind, "shape": shape}


def _function(function: onnx.FunctionProto, operators: Mapping[str, int]) -> dict[str, Any]:
    domain = "" if function.domain in ("", "ai.onnx") else f"{text(function.domain)}::"
    name = domain + text(function.name)
    return {"name": name, "nodes": len(function.node), "calls": operators.get(name, 0)}


def _waste(proto: onnx.ModelProto, weights: Sequence[Weight], folder: Path | None, deep: bool) -> dict[str, Any]:
    """What the file need not hold."""
    found = repeats(weights, folder=folder, deep=deep)
    unused, idle = dead(proto, weights)
    return {
        "duplicates": [
            {
                "names": list(r.names),
                "type": r.kind,
                "shape": list(r.shape),
                "bytes": r.bytes,
                "wasted_bytes": r.wasted,
                "certainty": r.certainty,
            }
            for r in found
        ],
        "dead_weights": [_entry(w) for w in unused],
        "dead_nodes": idle,
    }


def _computed(done: Sequence[Any]) -> dict[str, Any]:
    found = [work.macs for work in done if work.macs is not None]
    return {
        "macs": sum(found) if found else None if done else 0,
        "macs_unknown_nodes": len(done) - len(found),
        "operator_costs": table(done),
    }


def _dynamic(proto: onnx.ModelProto, dims: Mapping[str, int]) -> list[dict[str, Any]]:
    """Dims of inputs and outputs that are no numbers: where they stand, and what they were counted as."""
    stored = {t.name for t in proto.graph.initializer}
    found: dict[str, dict[str, Any]] = {}
    for side, values in (("input", proto.graph.input), ("output", proto.graph.output)):
        for value in values:
            if side == "input" and value.name in stored:
                continue
            for axis, dim in enumerate(known(value.type).shape or ()):
                if isinstance(dim, str):
                    where = f"{side} {text(value.name)} axis {axis}"
                    key = where if dim == "?" else dim
                    size = dims.get(dim, 1) if side == "input" else dims.get(dim)
                    entry: dict[str, Any] = {"name": None if dim == "?" else dim, "where": [], "counted_as": size}
                    found.setdefault(key, entry)["where"].append(where)
    return list(found.values())


def _check_dims(proto: onnx.ModelProto, dims: Mapping[str, int]) -> None:
    names = [text(d.dim_param) for v in proto.graph.input for d in v.type.tensor_type.shape.dim if d.dim_param]
    for name in dims:
        if name not in names:
            has = f"its inputs have {', '.join(dict.fromkeys(names))}" if names else "its inputs have none"
            raise InputError(f"the model has no symbolic dim '{name}'; {did_you_mean(name, names, has)}")


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
