"""A matrix product and the bias added to it become one Gemm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.graph import constant_array, is_op, label, nodes, opset
from graphopt.passes._facts import Facts
from graphopt.passes._rewire import OFF, remove

if TYPE_CHECKING:
    from numpy.typing import NDArray

_KINDS = (np.dtype(np.float32), np.dtype(np.float64))
"""Types in which ONNX Runtime has both operators and adds in the same precision."""


@dataclass(frozen=True)
class MatmulToGemm(Pass):
    """``x @ W + b`` with constant W and b, where x is a matrix: rank 2 by inference, not by declaration."""

    name: ClassVar[str] = "matmul-to-gemm"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        facts = Facts(model)
        for node in list(nodes(model)):
            side = next((i for i, v in enumerate(node.inputs) if v is not None and is_op(v.producer(), "MatMul")), None)
            if not is_op(node, "Add") or side is None or len(node.inputs) != 2:
                continue
            bias = constant_array(node.inputs[1 - side])
            value = node.inputs[side]
            product = value.producer() if value is not None else None
            if product is None or bias is None:
                continue  # two computed values: no bias
            site = label(node)
            reason = _reason(node, product, bias, facts, opset(model))
            if reason is None and not context.allows(self.name, site):
                reason = OFF
            made = None if reason is not None else _gemm(node, product, side)
            if made is None:
                result.skipped.append(Skip(site, str(reason)))
                continue
            assert node.graph is not None
            node.graph.insert_before(node, [made])
            result.changes.append(Change("fuse", site, f"MatMul {label(product)} and its bias into a Gemm"))
            _take_over(node.outputs[0], made.outputs[0])
            remove([node])
            remove([product])
        if not result.changes and not result.skipped:
            result.skipped.append(Skip("(graph)", "no constant is added to a matrix product"))
        return result


def _reason(node: ir.Node, product: ir.Node, bias: NDArray[Any], facts: Facts, version: int) -> str | None:
    """Why this product stays, or None."""
    weight = constant_array(product.inputs[1])
    output = product.outputs[0]
    if version < 7:
        return f"Gemm at opset {version} broadcasts its bias on request only; run upgrade-opset first"
    if output.is_graph_output() or len(output.uses()) != 1:
        return f"the output of {label(product)} is read elsewhere too"
    if product.graph is not node.graph:
        return f"{label(product)} stands outside the body that it is in, and may run where the body does not"
    if weight is None:
        return f"the weight of {label(product)} is not a constant that nobody can override"
    if weight.dtype not in _KINDS:
        return f"Gemm may round {weight.dtype} in another way"
    rank = facts.rank(product.inputs[0])
    if weight.ndim != 2 or rank != 2:
        known = "a rank that is not known" if rank is None else f"rank {rank}"
        return f"Gemm multiplies matrices only; here are {known} and rank {weight.ndim}"
    if bias.ndim > 2 or bias.shape[:-1] not in ((), (1,)) or bias.shape[-1:] not in ((), (1,), weight.shape[1:]):
        return f"what is added, of shape {list(bias.shape)}, is no row of the result"
    return None


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Put ``new``, made at the same place, in ``old``'s stead under the same name."""
    name, old.name = old.name, None
    new.name, new.type, new.shape, new.doc_string = name, old.type, old.shape, old.doc_string
    new.metadata_props.update(old.metadata_props)
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _gemm(node: ir.Node, product: ir.Node, side: int) -> ir.Node:
    inputs = [product.inputs[0], product.inputs[1], node.inputs[1 - side]]
    made = ir.node("Gemm", inputs, name=product.name, doc_string=product.doc_string or node.doc_string)
    made.metadata_props.update({**node.metadata_props, **product.metadata_props})
    return made
