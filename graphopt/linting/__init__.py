"""``graphopt lint``: is a quantized file right for the runtime it is for, whoever made it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from graphopt.graph import nodes, opset
from graphopt.linting import operators, pairs
from graphopt.linting.findings import Finding
from graphopt.model import ModelLike, load
from graphopt.qdq import DOMAINS, PAIR
from graphopt.target import get_target

_QUANTIZED = frozenset({*PAIR, "QLinearConv", "QLinearMatMul", "MatMulInteger", "ConvInteger", "DynamicQuantizeLinear"})

RULES = (*pairs.RULES, *operators.RULES)


def lint(model: ModelLike, target: str = "ort-cpu", *, external_roots: Any = ()) -> dict[str, Any]:
    """Every place where the Q/DQ of ``model`` goes against what ``target`` documents, errors first.

    Nothing is run, and the model is not touched. Bodies of If, Loop and Scan are judged like the rest.

    Raises:
        InputError: the file cannot be read; unknown target.
        ModelError: it is no ONNX model.
    """
    profile = get_target(target)
    loaded = load(model, external_roots=external_roots)
    found: list[Finding] = []
    version = opset(loaded)
    kinds: Counter[str] = Counter()
    for node in nodes(loaded):
        kinds[node.op_type] += node.op_type in _QUANTIZED and node.domain in DOMAINS
        if pairs.applies(node):
            found.extend(pairs.since(node, version))
        for rule in RULES if pairs.applies(node) else operators.RULES:
            found.extend(rule(node, profile))
    found = sorted(dict.fromkeys(found), key=lambda f: f.severity != "error")  # stable: order of execution within
    quantized = {kind: count for kind, count in kinds.items() if count}
    return {
        "schema_version": 1,
        "path": str(model) if isinstance(model, str) else None,
        "target": profile.name,
        "quantization": quantized,
        "errors": sum(f.severity == "error" for f in found),
        "warnings": sum(f.severity == "warning" for f in found),
        "findings": [f.as_dict(profile) for f in found],
        "notes": [] if quantized else ["the model is not quantized: it has no Q/DQ to judge"],
    }
