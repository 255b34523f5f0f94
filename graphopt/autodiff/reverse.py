"""From a concrete graph to one that computes gradients too: reverse mode, one rule per node (Griewank and Walther 2008,
chapter 3)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from graphopt.autodiff.emit import Emitter, Shape
from graphopt.autodiff.families import CONSTANT, RULES
from graphopt.autodiff.rules import Call, known
from graphopt.autodiff.specialize import Concrete, reads
from graphopt.errors import PreconditionError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Gradients:
    """``model`` computes what it did and, as further outputs, ``of[variable]``: the gradient's name."""

    model: onnx.ModelProto
    of: dict[str, str]


@dataclass
class Tape:
    """What the way back needs to know of the graph it goes through."""

    e: Emitter
    shapes: dict[str, Shape]
    kinds: dict[str, int]
    constants: dict[str, NDArray[Any]]
    samples: dict[str, NDArray[Any]]

    def back(
        self, nodes: Sequence[onnx.NodeProto], seeds: Mapping[str, str], variables: Sequence[str]
    ) -> dict[str, str]:
        """Gradients by variable, given those of the ends (``seeds``). A variable that has no influence is left out.

        Raises:
            PreconditionError: an operator without a rule lies between; the message names it and what may be frozen.
        """
        active = set(variables)
        for node in nodes:
            if node.op_type not in CONSTANT and not active.isdisjoint(reads(node)):
                active.update(n for n in node.output if n and self.kinds.get(n, 1) in _CARRIERS)
        producers = {name: node for node in nodes for name in node.output if name}
        parts: dict[str, list[str]] = defaultdict(list)
        for name, gradient in seeds.items():
            parts[name].append(gradient)
        for node in reversed(nodes):
            if active.isdisjoint(node.output):
                continue
            g = [self._collected(parts, name) for name in node.output]
            if all(part is None for part in g):
                continue
            if not known(node):
                raise PreconditionError(no_rule(node, "no gradient rule", nodes, variables))
            call = Call(
                self.e, node, self.shapes, self.kinds, self.constants, g, active.__contains__, producers, self.samples
            )
            try:
                RULES[node.op_type](call)
            except NotImplementedError as error:
                raise PreconditionError(no_rule(node, f"no gradient: {error}", nodes, variables)) from error
            for name, gradient in call.given:
                if name in active:
                    parts[name].append(gradient)
        found = {name: self._collected(parts, name) for name in variables}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def _collected(self, parts: dict[str, list[str]], name: str) -> str | None:
        """The sum of what came back to ``name``."""
        if not parts.get(name):
            return None
        total = self.e.total(parts[name])
        parts[name] = [total]
        return total


_CARRIERS = frozenset(
    {TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT16}
    | {TensorProto.UINT4, TensorProto.INT4, TensorProto.DOUBLE}
)
"""Types a gradient can pass: floats, and the integers between the two operators of a pair."""


def no_rule(node: onnx.NodeProto, why: str, nodes: Sequence[onnx.NodeProto], variables: Sequence[str]) -> str:
    """One line on a node that stops the gradient, and what to freeze."""
    label = node.name or next((n for n in node.output if n), "")
    behind = set(node.output)
    wanted = reads(node)
    for earlier in reversed(nodes):
        if earlier is not node and wanted.intersection(earlier.output) and not behind.intersection(earlier.output):
            wanted |= reads(earlier)
    above = [name for name in variables if name in wanted]
    shown = " ".join(f"--freeze '{name}'" for name in above[:3])
    more = f" and {len(above) - 3} more before it" if len(above) > 3 else ""
    return f"{why} for {node.op_type} (node '{label}'); freeze what is trained before it: {shown}{more}"


def differentiate(concrete: Concrete, loss: str, variables: Sequence[str]) -> Gradients:
    """Add to ``concrete`` the gradients of the scalar ``loss`` with respect to the float inputs ``variables``.

    A variable that ``loss`` does not depend on has none. Gradients are float32, in the variables' shapes.

    Raises:
        PreconditionError: an operator without a rule lies between.
    """
    made = onnx.ModelProto()
    made.CopyFrom(concrete.model)
    graph = made.graph
    taken = set(concrete.shapes) | {t.name for t in graph.initializer} | {n.name for n in graph.node}
    emitter = Emitter(concrete.opset, taken)
    tape = Tape(emitter, concrete.shapes, concrete.kinds, concrete.constants, concrete.samples)
    shape = concrete.shapes[loss]
    seed = emitter.constant(np.ones(shape, np.float32))
    found = tape.back(list(graph.node), {loss: seed}, variables)
    of = {}
    for name, gradient in found.items():
        of[name] = emitter.fresh(f"{name}//gradient")
        emitter.nodes.append(helper.make_node("Identity", [gradient], [of[name]]))
    graph.node.extend(emitter.nodes)
    graph.initializer.extend(emitter.initializers)
    for name, gradient in of.items():
        graph.output.append(helper.make_tensor_value_info(gradient, TensorProto.FLOAT, list(concrete.shapes[name])))
    return Gradients(made, of)


def obstacles(concrete: Concrete, loss: str, variables: Sequence[str]) -> str | None:
    """Why there is no gradient, in one line; None: there is."""
    try:
        differentiate(concrete, loss, variables)
    except PreconditionError as error:
        return str(error)
    return None
