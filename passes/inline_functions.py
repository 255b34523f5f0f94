"""Replace calls of the model's own functions by what they do, on request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
            InlinePass(criteria=lambda function: function.identifier() in ready)(model)
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
