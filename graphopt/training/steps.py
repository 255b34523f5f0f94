"""Loss and gradients of a student, one compiled graph per shape of its inputs."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, numpy_helper

from graphopt.autodiff import Concrete, differentiate, specialize
from graphopt.session import Session
from graphopt.training.examples import Feeds, signature
from graphopt.training.losses import LOSS

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from graphopt.training.optimizers import Variable

_KEPT = 24
"""Compiled graphs kept; none keeps what a run took (without an arena, at no cost in speed)."""

_FED = 1 << 20
"""Bytes from which a frozen weight is fed at each run, as those that train are: a graph would hold it four times (as a
message and in a session, forward and with gradients), and sentences of twenty lengths make twenty graphs."""

_WEIGHTS = {"Gather": 0, "MatMul": 1, "Gemm": 1, "Conv": 1, "ConvTranspose": 1}
"""Operators that ask nothing else of a weight than its numbers, and the input that it is."""


@dataclass
class _Graph:
    concrete: Concrete
    forward: Session | None = None
    backward: Session | None = None
    gradients: dict[str, str] | None = None


class Steps:
    """``model`` computes the loss; ``variables`` are its initializers to train, whose values are fed at each run."""

    def __init__(self, model: onnx.ModelProto, variables: Sequence[Variable], threads: int | None) -> None:
        self.variables = list(variables)
        self._model = model
        self._names = [v.name for v in variables]
        self._fed = _fed(model, self._names)
        self._threads = threads
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()

    def loss(self, feeds: Feeds) -> float:
        """The loss alone.

        Raises:
            RuntimeFailure: the student does not run on ``feeds``.
        """
        graph = self._graph(feeds)
        if graph.forward is None:
            graph.forward = Session(graph.concrete.model, threads=self._threads, integers=False, arena=False)
        return float(graph.forward.run(self._given(feeds), [LOSS])[LOSS])

    def gradients(self, feeds: Feeds) -> tuple[float, dict[str, NDArray[Any]]]:
        """(loss, gradient by variable; a variable without influence has none).

        Raises:
            PreconditionError: an operator has no gradient rule.
            RuntimeFailure: as :meth:`loss`.
        """
        graph = self._graph(feeds)
        if graph.backward is None or graph.gradients is None:
            made = differentiate(graph.concrete, LOSS, [n for n in self._names if n in graph.concrete.shapes])
            graph.gradients = made.of
            graph.backward = Session(made.model, threads=self._threads, integers=False, arena=False)
        found = graph.backward.run(self._given(feeds), [LOSS, *graph.gradients.values()])
        return float(found[LOSS]), {name: np.asarray(found[key]) for name, key in graph.gradients.items()}

    def _given(self, feeds: Feeds) -> Feeds:
        return {**feeds, **self._fed, **{v.name: v.value for v in self.variables}}

    def _graph(self, feeds: Feeds) -> _Graph:
        key = signature(feeds)
        if key not in self._graphs:
            self._graphs[key] = _Graph(specialize(self._model, feeds, [*self._names, *self._fed]))
            while len(self._graphs) > _KEPT:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return self._graphs[key]


def _fed(model: onnx.ModelProto, trained: Sequence[str]) -> Feeds:
    """The frozen weights that are fed at each run."""
    readers: dict[str, set[bool]] = {}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            readers.setdefault(name, set()).add(_WEIGHTS.get(node.op_type) == index and not node.domain)
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.name not in trained
        and tensor.data_type == TensorProto.FLOAT
        and readers.get(tensor.name) == {True}
        and 4 * math.prod(tensor.dims) >= _FED
    }
