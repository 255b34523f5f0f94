"""Replace calls of the model's own functions by what they do, on request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.errors import PreconditionError
from graphopt.graph import STANDARD_DOMAINS, bodies, label, nodes
from graphopt.passes._rewire import OFF


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """onnx-ir's inliner, after counting: functions that call functions can grow without bound.

    More than ``max_nodes`` nodes afterwards is refused. Makes the graph larger, so it runs on request only.
    """

    max_nodes: int = 100_000
    name: ClassVar[str] = "inline-functions"
    contract: ClassVar[Contract] = "exact"

    def check(self, model: ir.Model) -> None:
        total = _expanded(model)
        if model.functions and total > self.max_nodes:
            raise PreconditionError(
                f"inlining would make {_count(total)} nodes, more than max-nodes ({self.max_nodes}); raise it if you "
                "mean it"
            )

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        if not model.functions:
            return PassResult(skipped=[Skip("(graph)", "the model has no functions of its own")])
        ready: set[ir.OperatorIdentifier] = set()
        for identity, function in model.functions.items():
            site = "::".join(part for part in identity if part)
            reason = self._reason(model, function)
            if reason is None and not context.allows(self.name, site):
                reason = OFF
            if reason is None:
                ready.add(identity)
            else:
                result.skipped.append(Skip(site, reason))
        calls = [node for node in nodes(model) if node.op_identifier() in ready]
        for identity in sorted(ready):
            mine = [label(node) for node in calls if node.op_identifier() == identity]
            site = "::".join(part for part in identity if part)
            detail = f"{len(mine)} calls ({', '.join(mine[:3])}{', ...' if len(mine) > 3 else ''})"
            result.changes.append(Change("inline", site, detail))
        if ready:
            _Inliner(model, ready)(model)
        return result

    def _reason(self, model: ir.Model, function: ir.Function) -> str | None:
        """Why calls of this function stay."""
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in function.attributes.values()):
            return "it takes a graph as an attribute"
        for domain, version in function.opset_imports.items():
            imported = {model.opset_imports.get(d) for d in _spellings(domain)} - {None}
            if imported and imported != {version}:
                return f"it is written for version {version} of the operator set '{domain}', the model for another"
        return None


class _Inliner(InlinePass):
    """onnx-ir's inliner, told names that are still free.

    To find one it counts up from 2 at every call, which is quadratic in the calls of one function: 4096 of them take a
    minute. So a function's nodes and values get the next name before it is copied. Should a later onnx-ir have no such
    method, it is merely slow again, since what it is told is a proposal.
    """

    def __init__(self, model: ir.Model, ready: set[ir.OperatorIdentifier]) -> None:
        super().__init__(criteria=lambda function: function.identifier() in ready)
        self._proposed = {
            identity: [(thing, thing.name or base) for thing, base in _named(function)]
            for identity, function in model.functions.items()
        }
        self._count: Counter[tuple[type, str]] = Counter()

    def _instantiate_call(self, node: ir.Node, *more: Any) -> Any:
        for thing, base in self._proposed[node.op_identifier()]:
            self._count[type(thing), base] += 1
            nth = self._count[type(thing), base]
            thing.name = base if nth == 1 else f"{base}_{nth}"
        return super()._instantiate_call(node, *more)


def _named(function: ir.Function) -> Iterator[tuple[ir.Node | ir.Value, str]]:
    """What is copied with a new name at every call, and what it is called where it has none."""
    for node in function.all_nodes():
        yield node, "node"
        for value in node.outputs:
            yield value, "val"


def _spellings(domain: str) -> frozenset[str]:
    return STANDARD_DOMAINS if domain in STANDARD_DOMAINS else frozenset({domain})


def _count(total: int) -> str:
    return str(total) if total < 10**9 else f"over {10 ** (len(str(total)) - 1):.0e}"


def _expanded(model: ir.Model) -> int:
    """How many nodes the model would have; linear in what is there, however much that is."""
    known: dict[ir.OperatorIdentifier, int] = {}

    def inside(graph: ir.Graph | ir.Function) -> int:
        total = 0
        for node in graph:
            identity = node.op_identifier()
            total += of(identity) if identity in model.functions else 1
            total += sum(inside(body) for body in bodies(node))
        return total

    def of(identity: ir.OperatorIdentifier) -> int:
        if identity not in known:
            known[identity] = inside(model.functions[identity])
        return known[identity]

    return inside(model.graph)
