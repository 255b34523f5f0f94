"""The registry: operator type -> its rule, or how it is rewritten into operators that have one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onnx import helper

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from graphopt.autodiff.emit import Emitter, Shape

DOMAINS = frozenset({"", "ai.onnx"})


@dataclass
class Call:
    """One node met on the way back: what a rule reads, and where it writes.

    ``e`` writes nodes. ``x[i]`` and ``y[i]`` are the names of inputs and outputs ('' where absent), ``g`` those of the
    outputs' gradients (None: nothing comes back through it). ``shapes``: of every value in the forward graph;
    ``constants``: what is known of it in numbers. A rule answers by :meth:`give`.
    """

    e: Emitter
    node: onnx.NodeProto
    shapes: dict[str, Shape]
    kinds: dict[str, int]
    constants: dict[str, NDArray[Any]]
    g: list[str | None]
    active: Callable[[str], bool]
    producers: dict[str, onnx.NodeProto]
    samples: dict[str, NDArray[Any]] = field(default_factory=dict)
    given: list[tuple[str, str]] = field(default_factory=list)

    @property
    def x(self) -> list[str]:
        return list(self.node.input)

    @property
    def y(self) -> list[str]:
        return list(self.node.output)

    @property
    def grad(self) -> str:
        """The first output's gradient."""
        assert self.g[0] is not None
        return self.g[0]

    def shape(self, name: str) -> Shape:
        return self.shapes[name]

    def has(self, index: int) -> bool:
        return index < len(self.node.input) and bool(self.node.input[index])

    def wants(self, index: int) -> bool:
        """Whether input ``index`` is there and its gradient is of any use."""
        return self.has(index) and self.active(self.node.input[index])

    def attribute(self, name: str, default: Any) -> Any:
        for item in self.node.attribute:
            if item.name == name:
                value = helper.get_attribute_value(item)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def number(self, index: int) -> NDArray[Any]:
        """Input ``index`` in numbers.

        Raises:
            NotImplementedError: it is computed, and no rule is written for that.
        """
        name = self.node.input[index]
        if name not in self.constants:
            raise NotImplementedError(f"input '{name}' is computed")
        return self.constants[name]

    def give(self, index: int, gradient: str) -> None:
        """``gradient`` is (part of) that of input ``index``, in its shape."""
        self.give_value(self.node.input[index], gradient)

    def give_value(self, name: str, gradient: str) -> None:
        """The same of any earlier value."""
        self.given.append((name, gradient))


Rule = Callable[[Call], None]
Lowering = Callable[["Call"], list[str]]

RULES: dict[str, Rule] = {}
"""Operator type -> vector-Jacobian product."""

LOWERINGS: dict[str, Lowering] = {}
"""Operator type -> its outputs written with other operators."""

CONSTANT: set[str] = set()
"""Operators whose derivative is zero wherever there is one."""


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register the rule of these operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def lowering(*operators: str) -> Callable[[Lowering], Lowering]:
    """Register how these operators are written with others."""

    def register(function: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(operators, function))
        return function

    return register


def steps(*operators: str) -> None:
    """These operators are constant between their steps: nothing comes back through them."""
    CONSTANT.update(operators)


def known(node: onnx.NodeProto) -> bool:
    """Whether gradients can pass this node."""
    return node.domain in DOMAINS and (node.op_type in RULES or node.op_type in CONSTANT)
