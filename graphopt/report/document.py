"""The report as one JSON-ready object; ``--json`` prints it, ``Result.report`` is it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.graph import nodes, opset
from graphopt.model import is_external, to_proto
from graphopt.references import referred_bytes, referring
from graphopt.remote import local, place
from graphopt.session import runtime_version
from graphopt.storage import INLINE_LIMIT
from graphopt.target import this_cpu
from graphopt.traversal import ir_graphs

if TYPE_CHECKING:
    import onnx_ir as ir

SCHEMA_VERSION = 1


def versions(verb: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Who made this document, with which options, on which machine."""
    shown = {k: _option(v) for k, v in options.items() if k not in ("progress", "gates", "settings")}
    shown.update({k: _option(v) for k, v in options["settings"].items()})
    return {
        "schema_version": SCHEMA_VERSION,
        "verb": verb,
        "options": {**shown, "gates": dict(options["gates"].asked())},
        "versions": {
            "graphopt": version("graphopt"),
            "python": platform.python_version(),
            **{name: version(name) for name in ("onnx", "onnx-ir", "onnxsim", "numpy")},
            "onnxruntime": runtime_version(),
        },
        "machine": {"cpu": this_cpu().name, "vnni": this_cpu().vnni, "platform": sys.platform},
    }


def _option(value: Any) -> Any:
    """An option as JSON holds it; of data given as a Python object only its type is told."""
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (tuple, list)) and all(isinstance(v, (str, int, float, os.PathLike)) for v in value):
        return [_option(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _option(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return getattr(value, "__name__", f"({type(value).__name__})")


def about(model: ir.Model, source: Any) -> dict[str, Any]:
    """A model in a few numbers.

    ``bytes`` and ``sha256`` are those of what ``source`` is (a file, bytes), else of what would be written; weights in
    a data file count, so that models can be compared by size however they are stored.
    """
    path = os.fspath(source) if isinstance(source, (str, os.PathLike)) and str(source) != "-" else None
    by_type, weights = _bytes_by_type(model)
    size, digest = weights, None
    if path is not None and local(path).is_file():
        size, digest = place(path).stat().st_size + (weights if is_external(model) else 0), file_sha256(path)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        size, digest = len(source), hashlib.sha256(source).hexdigest()
    elif (referred := referred_bytes(model)) or weights >= INLINE_LIMIT:
        size = weights if weights - referred >= INLINE_LIMIT else referring(model)[0].ByteSize() + referred
    else:
        data = to_proto(model).SerializeToString(deterministic=True)
        size, digest = len(data), hashlib.sha256(data).hexdigest()
    return {
        "path": path,
        "bytes": size,
        "sha256": digest,
        "weight_bytes": weights,
        "bytes_by_type": by_type,
        "nodes": sum(1 for _ in nodes(model)),
        "opset": opset(model),
        "ir_version": model.ir_version,
        "operators": _histogram(model),
    }


def file_sha256(path: str | Path) -> str:
    """The hash of a file's bytes."""
    with local(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _bytes_by_type(model: ir.Model) -> tuple[dict[str, int], int]:
    """Bytes of the initializers and of tensors in attributes (Constant nodes) by element type, the most first; and of
    the initializers alone.

    Types are called as ``inspect`` calls them.
    """
    import onnx_ir as ir

    found: dict[str, int] = {}
    stored = [value.const_value for graph in ir_graphs(model) for value in graph.initializers.values()]
    given = (attribute for node in nodes(model) for attribute in node.attributes.values() if not attribute.is_ref())
    others = [attribute.as_tensor() for attribute in given if attribute.type == ir.AttributeType.TENSOR]
    weights = _add(found, stored)
    _add(found, others)
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0]))), weights


def _add(found: dict[str, int], tensors: Iterable[ir.TensorProtocol | None]) -> int:
    """Count the tensors' bytes into ``found`` by element type; returns their sum."""
    total = 0
    for tensor in tensors:
        if tensor is not None:
            name, size = tensor.dtype.name.lower(), tensor.nbytes
            found[name] = found.get(name, 0) + size
            total += size
    return total


def _histogram(model: ir.Model) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in nodes(model):
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))
