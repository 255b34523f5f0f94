"""Which configuration to try next: the ones people would try by hand, then what Optuna's sampler makes of the results.

Optuna keeps its trials in memory; what is kept between runs is graphopt's own list, which is told to a new study.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from graphopt.errors import InputError
from graphopt.search.space import Config, Space, key

_PATIENCE = 20
"""Proposals that were tried before, in a row, until an untried one is drawn instead."""


def require_optuna() -> None:
    """Raise InputError where Optuna is missing."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise InputError("tune searches with Optuna, which is not installed: pip install 'graphopt[tune]'") from None


class Proposals:
    """Asks a sampler for configurations, each of them once; ``first`` come first."""

    def __init__(self, space: Space, first: Sequence[Config], *, seed: int = 0) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(10, len(first)))
        self._study: Any = optuna.create_study(directions=["minimize"] * 3, sampler=sampler)
        self._optuna: Any = optuna
        self._space, self._known = space, dict[str, tuple[float, ...] | None]()
        self._waiting = list(first)
        self._random = random.Random(seed)
        self._asked: Any = None

    def tell(self, config: Config, values: tuple[float, ...] | None) -> None:
        """What came of a configuration, whoever proposed it; None: there is no model."""
        self._known[key(config)] = values
        asked, self._asked = self._asked, None
        if asked is not None and asked[0] == key(config):
            self._finish(asked[1], values)
            return
        distributions = {
            d.name: self._optuna.distributions.CategoricalDistribution(d.choices)
            for d in self._space.dimensions
            if d.name in config
        }
        states = self._optuna.trial.TrialState
        self._study.add_trial(
            self._optuna.trial.create_trial(
                params=dict(config),
                distributions=distributions,
                values=None if values is None else list(values),
                state=states.FAIL if values is None else states.COMPLETE,
            )
        )

    def ask(self) -> Config | None:
        """A configuration that nobody was told the values of yet; None: there is none left."""
        while self._waiting:
            config = self._waiting.pop(0)
            if key(config) not in self._known:
                return config
        for _ in range(_PATIENCE):
            trial = self._study.ask()
            config = self._suggested(trial)
            if key(config) not in self._known:
                self._asked = (key(config), trial)
                return config
            self._finish(trial, self._known[key(config)])
        left = [config for config in self._space.all() if key(config) not in self._known]
        return self._random.choice(left) if left else None

    def _suggested(self, trial: Any) -> Config:
        config: Config = {}
        for dimension in self._space.dimensions:
            if dimension.name == "arithmetic" or config["arithmetic"] in dimension.under:
                config[dimension.name] = trial.suggest_categorical(dimension.name, dimension.choices)
        return config

    def _finish(self, trial: Any, values: tuple[float, ...] | None) -> None:
        if values is None:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(trial, list(values))
