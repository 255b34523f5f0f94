"""A pass in a package of its own: every node gets a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from graphopt.base import Change, Context, Contract, Pass, PassResult


@dataclass(frozen=True)
class RenameNodes(Pass):
    """Gives every node the name of its operator and a number."""

    prefix: str = ""
    name: ClassVar[str] = "rename-nodes"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: Any, context: Context) -> PassResult:
        result = PassResult()
        for index, node in enumerate(model.graph):
            node.name = f"{self.prefix}{node.op_type}_{index}"
            result.changes.append(Change("rename", node.name))
        return result
