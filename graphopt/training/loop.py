"""Training with early stopping: the best of what held-out samples saw, never the last."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.training.checkpoint import Checkpoint
from graphopt.training.optimizers import Optimizer, cosine

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from graphopt.training.examples import Examples, Feeds
    from graphopt.training.steps import Steps

_LOOKS = 20
"""How often held-out samples are looked at in one training."""


@dataclass(frozen=True)
class Schedule:
    """``rate`` is relative to each variable's size; ``patience``: looks without improvement after which it ends."""

    steps: int = 300
    rate: float = 5e-3
    batch: int = 16
    optimizer: str = "adam"
    patience: int = 6
    seed: int = 0


@dataclass
class Trained:
    """What came of it. ``losses``: (step, training loss since the last look, held-out loss); ``values``: the best."""

    values: dict[str, NDArray[np.float32]]
    before: float
    best: float
    best_step: int
    steps: int
    seconds: float
    seconds_per_step: float
    losses: list[tuple[int, float, float]] = field(default_factory=list)
    skipped: int = 0


def train(
    steps: Steps,
    examples: Examples,
    held: Examples,
    schedule: Schedule,
    told: Callable[[int, int, str], None],
    checkpoint: Checkpoint | None = None,
) -> Trained:
    """Train ``steps.variables``; afterwards they hold the values that held-out samples liked best (perhaps the first).

    Raises:
        PreconditionError: an operator has no gradient rule.
        InputError: the checkpoint is of another training, or cannot be written.
    """
    rng = np.random.default_rng(schedule.seed)
    optimizer = Optimizer(schedule.optimizer, steps.variables)
    state = checkpoint.read(optimizer, rng) if checkpoint is not None else None
    if state is None:
        before = held_loss(steps, held, schedule.batch)
        state = Trained(_copy(steps), before, before, 0, 0, 0.0, 0.0, [(0, math.nan, before)])
    every = max(schedule.steps // _LOOKS, 1)
    started, recent, spent = time.perf_counter(), [], []
    told(state.steps, schedule.steps, "training")
    while state.steps < schedule.steps and not _stuck(state, every, schedule.patience):
        began = time.perf_counter()
        loss, gradients = _averaged(steps, examples.draw(schedule.batch, rng))
        if math.isfinite(loss) and all(np.isfinite(g).all() for g in gradients.values()):
            optimizer.step(gradients, cosine(state.steps, schedule.steps, schedule.rate))
            recent.append(loss)
        else:
            state.skipped += 1
        state.steps += 1
        spent.append(time.perf_counter() - began)
        told(state.steps, schedule.steps, "training")
        if state.steps % every == 0 or state.steps == schedule.steps:
            now = held_loss(steps, held, schedule.batch)
            state.losses.append((state.steps, float(np.mean(recent)) if recent else math.nan, now))
            recent = []
            if now < state.best:
                state.best, state.best_step, state.values = now, state.steps, _copy(steps)
            if checkpoint is not None:
                state.seconds += time.perf_counter() - started
                started = time.perf_counter()
                checkpoint.write(state, optimizer, rng)
    state.seconds += time.perf_counter() - started
    state.seconds_per_step = float(np.median(spent)) if spent else state.seconds_per_step
    for variable in steps.variables:
        variable.value = state.values[variable.name]
    return state


def held_loss(steps: Steps, held: Examples, batch: int) -> float:
    """The mean loss over all samples."""
    parts = [(steps.loss(feeds), count) for feeds, count in held.all(batch)]
    return float(sum(loss * count for loss, count in parts) / sum(count for _, count in parts))


def _stuck(state: Trained, every: int, patience: int) -> bool:
    return state.steps - state.best_step >= (patience + 1) * every


def _copy(steps: Steps) -> dict[str, NDArray[np.float32]]:
    return {v.name: v.value.copy() for v in steps.variables}


def _averaged(steps: Steps, runs: list[Feeds]) -> tuple[float, dict[str, NDArray[Any]]]:
    total, loss = dict[str, Any](), 0.0
    for feeds in runs:
        part, gradients = steps.gradients(feeds)
        loss += part / len(runs)
        for name, gradient in gradients.items():
            total[name] = gradient / len(runs) + total.get(name, 0)
    return loss, total
