"""The report as one JSON-ready object; ``--json`` prints it, ``Result.report`` is it."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.graph import nodes, opset
from graphopt.model import is_external, to_proto, weight_bytes
from graphopt.session import runtime_version
from graphopt.target import this_cpu

if TYPE_CHECKING:
    import onnx_ir as ir

SCHEMA_VERSION = 1


def versions(verb: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Who made this document, with which options, on which machine."""
    shown = {k: v for k, v in options.items() if k not in ("progress", "gates", "image")}
    plain = {k: v if isinstance(v, (str, int, float, bool, type(None))) else str(v) for k, v in shown.items()}
    return {
        "schema_version": SCHEMA_VERSION,
        "verb": verb,
        "options": {**plain, "gates": dict(options["gates"].asked())},
        "versions": {
            "graphopt": version("graphopt"),
            "python": platform.python_version(),
            **{name: version(name) for name in ("onnx", "onnx-ir", "onnxsim", "numpy")},
            "onnxruntime": runtime_version(),
        },
        "machine": {"cpu": this_cpu().name, "vnni": this_cpu().vnni, "platform": sys.platform},
    }


def about(model: ir.Model, source: Any) -> dict[str, Any]:
    """A model in a few numbers; ``bytes`` is the file's where ``source`` is one, else what would be written."""
    data = to_proto(model).SerializeToString(deterministic=True) if weight_bytes(model) < 2**31 - 2**26 else b""
    path = str(source) if isinstance(source, (str, Path)) and str(source) != "-" else None
    size = len(data) or weight_bytes(model)
    if path is not None and Path(path).is_file() and not is_external(model):
        size = Path(path).stat().st_size
    return {
        "path": path,
        "bytes": size,
        "sha256": hashlib.sha256(data).hexdigest() if data else None,
        "weight_bytes": weight_bytes(model),
        "nodes": sum(1 for _ in nodes(model)),
        "opset": opset(model),
        "ir_version": model.ir_version,
        "operators": _histogram(model),
    }


def _histogram(model: ir.Model) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in nodes(model):
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))
