"""Compute in float16, but for what its range or digits do not hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.errors import PreconditionError
from graphopt.graph import constant, fresh, label, nodes, opset, value_names
from graphopt.passes._facts import Facts
from graphopt.passes._half import Narrowable, narrowable, out_of_range
from graphopt.passes._patterns import check_patterns, matches
from graphopt.passes._rewire import OFF
from graphopt.passes._weight_uses import LEAST
from graphopt.passes._weights import add_tensor, drop_unread

_ALONE = "the nodes around it stay in float32, so that it would cost two Casts"


@dataclass(frozen=True)
class ComputeFp16(Pass):
    """Nodes compute in float16, their weights stored so; inputs and outputs of the model keep their types.

    An island stays in float32 where calibration data shows a value, or a weight, whose range float16 does not hold
    (``margin``: values may become so many times larger than those seen), where sums run up inside an operator, and
    where there is no float16 form. Needs calibration data. ``exclude`` and ``include``: node names, globs, ``re:``
    expressions or operator types.
    """

    margin: float = 4.0
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    name: ClassVar[str] = "compute-fp16"
    contract: ClassVar[Contract] = "approximate"
    least_opset: ClassVar[int] = 9

    def __post_init__(self) -> None:
        if not self.margin >= 1:
            raise ValueError(f"margin is {self.margin}; it must be 1 or more")

    def check(self, model: ir.Model) -> None:
        if opset(model) < self.least_opset:
            raise PreconditionError(
                f"float16 needs opset {self.least_opset} and the model has {opset(model)}; run upgrade-opset first"
            )

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult(skipped=check_patterns(model, context.original, self.exclude, "exclude"))
        result.skipped += check_patterns(model, context.original, self.include, "include")
        chosen = self._chosen(model, context, result)
        chosen = self._in_range(model, chosen, context, result)
        _drop_alone(chosen, result)
        writer = _Writer(model, chosen)
        writer.write()
        for node in chosen:
            result.changes.append(Change("narrow", label(node), f"{node.op_type} computes in float16"))
        floats = sum(1 for node in nodes(model) if node.op_type not in ("Constant", "Cast")) - len(chosen)
        result.metrics = {"nodes_in_float16": len(chosen), "other_nodes": floats, "casts": writer.casts}
        if not result.changes and not result.skipped:
            result.skipped.append(Skip("(graph)", "no node computes in float32"))
        return result

    def _chosen(self, model: ir.Model, context: Context, result: PassResult) -> dict[ir.Node, Narrowable]:
        """The nodes of the main graph that could, as far as operators and options say."""
        facts, version = Facts(model), opset(model)
        found: dict[ir.Node, Narrowable] = {}
        for node in model.graph:
            one = narrowable(node, version, facts)
            if isinstance(one, Narrowable):
                if matches(node, self.exclude):
                    one = "it was excluded"
                elif self.include and not matches(node, self.include):
                    one = "it is not among those to include"
                elif not context.allows(self.name, label(node)):
                    one = OFF
            if isinstance(one, Narrowable):
                found[node] = one
            elif one is not None:
                result.skipped.append(Skip(label(node), f"{node.op_type}: {one}"))
        if any(node.graph is not model.graph for node in nodes(model)):
            result.skipped.append(Skip("(bodies)", "what bodies of If, Loop and Scan compute stays in float32"))
        return found

    def _in_range(
        self, model: ir.Model, chosen: dict[ir.Node, Narrowable], context: Context, result: PassResult
    ) -> dict[ir.Node, Narrowable]:
        """Those whose values and weights float16 holds."""
        values = dict.fromkeys(v for one in chosen.values() for v in (*one.read(), *one.made()))
        why: dict[ir.Value, str | None] = {}
        computed = []
        for value in values:
            tensor = constant(value)
            if tensor is None and value.is_initializer():
                why[value] = "may be replaced by a caller"
                continue
            if tensor is None:
                computed.append(value)
                continue
            array = tensor.numpy()
            why[value] = out_of_range(float(array.min()), float(array.max()), 1.0) if array.size else None
        if computed:
            seen = context.statistics(model, [str(v.name) for v in computed], histograms=False).values
            for value in computed:
                found = seen[str(value.name)]
                if found.nonfinite:
                    why[value] = "is infinite or no number for some inputs"
                elif found.count:
                    why[value] = out_of_range(found.minimum, found.maximum, self.margin)
        kept: dict[ir.Node, Narrowable] = {}
        for node, one in chosen.items():
            reason = next(((v, why[v]) for v in (*one.read(), *one.made()) if why.get(v)), None)
            if reason is None:
                kept[node] = one
            else:
                result.skipped.append(Skip(label(node), f"{node.op_type}: '{reason[0].name}' {reason[1]}"))
        return kept


def _drop_alone(chosen: dict[ir.Node, Narrowable], result: PassResult) -> None:
    """Nodes without weights between islands are theirs."""
    for node, one in list(chosen.items()):
        if any(_weighs(value) for value in one.read()):
            continue
        before = [producer for v in one.read() if (producer := v.producer()) is not None]
        after = [reader for v in one.made() for reader, _ in v.uses()]
        if any(other in chosen for other in (*before, *after)):
            continue
        del chosen[node]
        result.skipped.append(Skip(label(node), f"{node.op_type}: {_ALONE}"))


def _weighs(value: ir.Value) -> bool:
    tensor = constant(value)
    return tensor is not None and tensor.size >= LEAST


@dataclass
class _Writer:
    """Rewrites the graph: each value has a float32 and a float16 form where both are read."""

    model: ir.Model
    chosen: dict[ir.Node, Narrowable]
    casts: int = 0
    halves: dict[ir.Value, ir.Value] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def write(self) -> None:
        self.taken = value_names(self.model)
        made = dict.fromkeys(value for one in self.chosen.values() for value in one.made())
        self.halves.update((value, value) for value in made)
        for node, one in self.chosen.items():
            for index in one.inputs:
                value = node.inputs[index]
                if value is not None:
                    node.replace_input_with(index, self._half(value, node))
        for value in made:
            self._widen(value)

    def _half(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        if value in self.halves:
            return self.halves[value]
        tensor, base = constant(value), f"{value.name}_fp16"
        if tensor is not None:
            small = ir.tensor(tensor.numpy().astype(np.float16))
            found = add_tensor(self.model, self.model.graph, base, small, self.taken, reader)
            self.halves[value] = found
            for node, index in list(value.uses()):
                if node in self.chosen and index in self.chosen[node].inputs:
                    node.replace_input_with(index, found)
            drop_unread(value)
            return found
        self.halves[value] = self._cast(value, base, ir.DataType.FLOAT16)
        return self.halves[value]

    def _cast(self, value: ir.Value, base: str, kind: ir.DataType) -> ir.Value:
        node = ir.node("Cast", [value], attributes={"to": int(kind)})
        node.name = fresh(f"{base}_cast", self.taken)
        found = node.outputs[0]
        found.name, found.type, found.shape = fresh(base, self.taken), ir.TensorType(kind), value.shape
        producer = value.producer()
        if producer is not None:
            self.model.graph.insert_after(producer, [node])
        else:
            self.model.graph.insert_before(self.model.graph[0], [node])
        self.casts += 1
        return found

    def _widen(self, value: ir.Value) -> None:
        """``value`` is float16 now; whoever reads float32 gets that."""
        inside = [(n, i) for n, i in value.uses() if n in self.chosen and i in self.chosen[n].inputs]
        outside = [(n, i) for n, i in value.uses() if (n, i) not in inside]
        value.type = ir.TensorType(ir.DataType.FLOAT16)
        if not outside and not value.is_graph_output():
            return
        wide = self._cast(value, f"{value.name}_fp32", ir.DataType.FLOAT)
        for node, index in outside:
            node.replace_input_with(index, wide)
        if value.is_graph_output():
            outputs = self.model.graph.outputs
            for index, output in enumerate(outputs):
                if output is value:
                    outputs[index] = wide
            name = value.name
            value.name, wide.name = fresh(f"{name}_fp16", self.taken), name
            wide.doc_string = value.doc_string
