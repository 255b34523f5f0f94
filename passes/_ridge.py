"""Least squares towards given weights, each group of a layer by itself, by the ridge that serves held-out rows best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from graphopt.gram import mean_diagonal

Array = NDArray[np.float64]
Rows = NDArray[np.float32]

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Of the mean diagonal of the covariance."""

_AT_ONCE = 1 << 23
"""Elements of the inputs of the groups that are solved together: a depthwise convolution has hundreds of small ones."""


@dataclass(frozen=True)
class Solved:
    """One group's weights, what the bias gains, the squared error on held-out inputs before and after, and the energy
    of what is wanted there."""

    weight: Array
    shift: Array
    before: float
    after: float
    energy: float


def solve(
    now: Array, fit: tuple[Rows, Rows], held: tuple[Rows, Rows], how: str, biased: bool, towards: Array | None
) -> list[Solved]:
    """The best W' of each group.

    ``now``: weights as they are, [groups, outputs, K]; ``fit`` and ``held``: (x~, y), [groups, K, n] and
    [groups, outputs, n]; ``towards``: the weights that a large ridge keeps to (None: ``now``). ``how``: ``moments``
    scales each output to the spread that is wanted; anything else is least squares.
    """
    step = max(1, _AT_ONCE // max(fit[0][0].size + held[0][0].size, 1))
    found: list[Solved] = []
    for begin in range(0, len(now), step):
        part = slice(begin, begin + step)
        x, y, x_held, y_held = (rows[part].astype(np.float64) for rows in (*fit, *held))
        centre = now[part] if towards is None else towards[part]
        found += _Groups(now[part], x, y, x_held, y_held, biased).best(how, centre)
    return found


class _Groups:
    """Some groups at once: [groups, ...] all."""

    def __init__(self, now: Array, x: Array, y: Array, x_held: Array, y_held: Array, biased: bool) -> None:
        self.now, self.held = now, (x_held, y_held)
        self.mean_x, self.mean_y = (
            a.mean(axis=2, keepdims=True) if biased else np.zeros((*a.shape[:2], 1)) for a in (x, y)
        )
        self.x, self.y = x - self.mean_x, y - self.mean_y
        self.weight, self.shift = now, np.zeros(now.shape[:2])
        self.before = self.after = np.square(np.matmul(now, x_held) - y_held).sum(axis=(1, 2))
        self.energy = np.square(y_held - y_held.mean(axis=2, keepdims=True)).sum(axis=(1, 2))

    def best(self, how: str, centre: Array) -> list[Solved]:
        if how == "moments":
            self.after = np.full(len(self.now), np.inf)
            self._try(self._spread())
        else:
            self._try(self.now)
            self._try(centre)
            self._ridges(centre)
        groups = zip(self.weight, self.shift, self.before, self.after, self.energy, strict=True)
        return [Solved(w, s, float(b), float(a), float(e)) for w, s, b, a, e in groups]

    def _try(self, weight: Array) -> None:
        """Take these weights, and the bias that goes with them, in the groups where they serve better."""
        shift = (self.mean_y - np.matmul(weight, self.mean_x))[:, :, 0]
        error = np.square(np.matmul(weight, self.held[0]) + shift[:, :, None] - self.held[1]).sum(axis=(1, 2))
        better = error < self.after
        self.weight = np.where(better[:, None, None], weight, self.weight)
        self.shift = np.where(better[:, None], shift, self.shift)
        self.after = np.where(better, error, self.after)

    def _spread(self) -> Array:
        spread, wanted = np.matmul(self.now, self.x).std(axis=2), self.y.std(axis=2)
        dead = spread <= 1e-9 * np.maximum(spread.max(axis=1, keepdims=True, initial=0), 1e-30)
        scaled: Array = self.now * np.where(dead, 1.0, wanted / np.where(dead, 1.0, spread))[:, :, None]
        return scaled

    def _ridges(self, centre: Array) -> None:
        count = self.x.shape[2]
        turned = self.x.transpose(0, 2, 1)
        covariance, cross = np.matmul(self.x, turned) / count, np.matmul(self.y, turned) / count
        mean = mean_diagonal(covariance)[:, None, None]
        eye = np.eye(covariance.shape[1])
        for ridge in RIDGES:
            try:
                self._try(_solved(covariance + ridge * mean * eye, cross + ridge * mean * centre))
            except np.linalg.LinAlgError:
                continue


def _solved(damped: Array, target: Array) -> Array:
    """target damped^-1, of each group."""
    if len(damped) > 1:
        return np.asarray(np.linalg.solve(damped, target.transpose(0, 2, 1)).transpose(0, 2, 1), np.float64)
    factor = scipy.linalg.cho_factor(damped[0], check_finite=False)
    one: Array = scipy.linalg.cho_solve(factor, target[0].T, check_finite=False).T[None]
    return one
