"""Adam and SGD on numpy arrays, with a cosine schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

OPTIMIZERS = ("adam", "sgd")
_MOMENTUM, _FIRST, _SECOND, _EPSILON = 0.9, 0.9, 0.999, 1e-8


@dataclass
class Variable:
    """One trained tensor. ``positive``: a scale, of which the logarithm is trained; ``ceiling``: its largest value."""

    name: str
    value: NDArray[np.float32]
    positive: bool = False
    ceiling: float = math.inf

    @property
    def size(self) -> float:
        """What a step is measured in: its root mean square. That of a scale is 1, for its logarithm is trained."""
        if self.positive:
            return 1.0
        return max(float(np.sqrt(np.mean(np.square(self.value, dtype=np.float64)))), 1e-3)


@dataclass
class Optimizer:
    """Steps of ``rate`` times each variable's own size: one learning rate then fits layers of any magnitude (as in
    LAMB, You et al. 2020, but by the size at the start).

    ``adam`` (Kingma and Ba 2015), or ``sgd`` with momentum 0.9 whose gradients are scaled to norm 1 per variable.
    """

    kind: str
    variables: list[Variable]
    moments: dict[str, NDArray[Any]] = field(default_factory=dict)
    count: int = 0
    sizes: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sizes = self.sizes or {v.name: v.size for v in self.variables}

    def step(self, gradients: dict[str, NDArray[Any]], rate: float) -> None:
        """Move every variable that has a gradient."""
        self.count += 1
        for variable in self.variables:
            if variable.name not in gradients:
                continue
            g = np.asarray(gradients[variable.name])
            if variable.positive:  # of its logarithm; numpy makes a number of a product without axes
                g = np.asarray(g * variable.value)
            move = rate * self.sizes[variable.name] * self._direction(variable.name, g)
            if variable.positive:
                grown = np.minimum(variable.value * np.exp(-move), variable.ceiling)
                variable.value = np.asarray(np.maximum(grown, np.finfo(np.float32).tiny), np.float32)
            else:
                variable.value = np.asarray(variable.value - move, np.float32)

    def _direction(self, name: str, g: NDArray[Any]) -> NDArray[Any]:
        if self.kind == "sgd":
            norm = float(np.linalg.norm(g)) / math.sqrt(max(g.size, 1))
            first = self.moments.setdefault(f"{name}/m", np.zeros_like(g))
            first *= _MOMENTUM
            first += g / max(norm, _EPSILON) * (1 - _MOMENTUM)
            return first
        first = self.moments.setdefault(f"{name}/m", np.zeros_like(g))
        second = self.moments.setdefault(f"{name}/v", np.zeros_like(g))
        first *= _FIRST
        first += (1 - _FIRST) * g
        second *= _SECOND
        second += (1 - _SECOND) * np.square(g)
        scale = math.sqrt(1 - _SECOND**self.count) / (1 - _FIRST**self.count)
        found: NDArray[Any] = first * scale / (np.sqrt(second) + _EPSILON)
        return found


def cosine(step: int, steps: int, rate: float) -> float:
    """``rate`` after a warm-up over the first twentieth, then down to 0 along half a cosine (SGDR, Loshchilov 2017)."""
    warm = max(steps // 20, 1)
    if step < warm:
        return rate * (step + 1) / warm
    return rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))
