"""Which nodes a user means: names, globs, ``re:`` expressions and operator types."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable

import onnx_ir as ir

from graphopt.base import Skip
from graphopt.errors import PreconditionError
from graphopt.graph import label, nodes


def check_patterns(model: ir.Model, original: ir.Model, patterns: Iterable[str], option: str) -> list[Skip]:
    """Notes on patterns whose nodes are gone (fused or folded by an earlier pass).

    Raises:
        PreconditionError: a pattern never meant any node, so obeying it would be doing nothing in silence.
    """
    gone: list[Skip] = []
    for pattern in patterns:
        try:
            here = any(matches(node, [pattern]) for node in nodes(model))
        except re.error as error:
            raise PreconditionError(f"{option} '{pattern}' is no regular expression: {error}") from error
        if here:
            continue
        if any(matches(node, [pattern]) for node in nodes(original)):
            why = f"{option} '{pattern}' only meant nodes that earlier passes fused or removed; it had no effect"
            gone.append(Skip(pattern, why))
            continue
        known = sorted({label(node) for node in nodes(model)} | {node.op_type for node in nodes(model)})
        near = difflib.get_close_matches(pattern, known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else "give a node's name, a glob, re:EXPRESSION or an operator type"
        raise PreconditionError(f"{option} '{pattern}' matches no node; {hint}")
    return gone


def matches(node: ir.Node, patterns: Iterable[str]) -> bool:
    """Whether a name, glob, ``re:`` expression or operator type among ``patterns`` means this node."""
    name = label(node)
    return any(
        re.search(p[3:], name) is not None
        if p.startswith("re:")
        else p in (name, node.op_type) or fnmatch.fnmatchcase(name, p)
        for p in patterns
    )
