"""What a rule finds, and what every rule may ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

from graphopt.graph import label
from graphopt.target import Target

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """``error``: the runtime refuses the file or computes something else; ``warning``: it runs, but slower, larger or
    less exact than it could."""

    rule: str
    severity: Severity
    node: str
    problem: str
    fix: str

    def as_dict(self, target: Target) -> dict[str, Any]:
        """As ``--json`` has it, with the document of the target's vendor that says so (None: none is named)."""
        return {**vars(self), "source": target.sources.get(self.rule)}


Rule = Callable[[ir.Node, Target], Iterator[Finding]]


def error(rule: str, node: ir.Node, problem: str, fix: str) -> Finding:
    """A finding of that severity at a node."""
    return Finding(rule, "error", label(node), problem, fix)


def warning(rule: str, node: ir.Node, problem: str, fix: str) -> Finding:
    """A finding of that severity at a node."""
    return Finding(rule, "warning", label(node), problem, fix)
