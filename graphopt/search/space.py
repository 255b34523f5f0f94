"""What ``tune`` may choose: dimensions, and the passes that a choice of each stands for.

A configuration is a plain dict, dimension to value, so that it can be stored, shown and asked for again. A dimension
that belongs to a pass that is not installed is not there; one added to :data:`DIMENSIONS` joins the search.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphopt.base import Pass
from graphopt.errors import InputError
from graphopt.observers import OBSERVERS
from graphopt.presets import EVENING_PASSES
from graphopt.registry import available, create
from graphopt.search.sensitivity import exactly

Config = dict[str, Any]
Value = str | int

FLOAT, STATIC, DYNAMIC = "float", "int8", "dynamic int8"
NONE = "none"


@dataclass(frozen=True)
class Dimension:
    """One thing to choose. ``under``: the kinds of arithmetic it exists under. ``of``: the pass it needs."""

    name: str
    choices: tuple[Value, ...]
    under: tuple[str, ...] = (FLOAT, STATIC, DYNAMIC)
    of: str | None = None


DIMENSIONS = (
    Dimension("arithmetic", (STATIC, FLOAT, DYNAMIC)),
    Dimension("prune", (NONE, "0.9", "0.8", "0.7", "0.5"), of="prune"),
    Dimension("smooth", ("on", "off"), (STATIC,), of="smooth"),
    Dimension("weights", ("auto", "s8", "s7", "u8"), (STATIC,)),
    Dimension("observer", ("mse", *(o for o in OBSERVERS if o != "mse")), (STATIC,)),
    Dimension("mixture", (0,), (STATIC,)),
    Dimension("float_layers", (0,), (STATIC,)),
    Dimension("compress", (NONE, "fp16", "int8", "int4"), (FLOAT,), of="compress-weights"),
)
"""In the order in which they are chosen. ``prune``: the share of multiply-accumulates that is left. ``smooth``: whether
channels are evened out (:data:`~graphopt.presets.EVENING_PASSES`). ``mixture``: an
index into :attr:`Space.mixtures`; ``float_layers``: how many of :attr:`Space.ranking` stay in float besides."""

_OPTIONS = {"prune": "left", "compress-weights": "format"}
"""The option of a pass that its dimension chooses."""


@dataclass
class Space:
    """The configurations there are.

    ``ranking``: layers, the one that hurts most first. ``mixtures``: regions that stay in float, measured: the first
    is none. ``missing``: dimensions that are not there, with the reason.
    """

    ranking: list[str] = field(default_factory=list)
    mixtures: list[list[str]] = field(default_factory=lambda: [[]])
    missing: dict[str, str] = field(default_factory=dict)
    dimensions: list[Dimension] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.missing, self.dimensions = {}, []
        for dimension in DIMENSIONS:
            found = Dimension(dimension.name, self._choices(dimension), dimension.under, dimension.of)
            if len(found.choices) > 1:
                self.dimensions.append(found)

    def _choices(self, dimension: Dimension) -> tuple[Value, ...]:
        if dimension.name == "mixture":
            return tuple(range(len(self.mixtures)))
        if dimension.name == "float_layers":
            return depths(len(self.ranking))
        if dimension.of is None:
            return dimension.choices
        if dimension.of not in available():
            self.missing[dimension.name] = f"there is no pass {dimension.of}"
            return ()
        if dimension.of not in _OPTIONS:
            return dimension.choices
        fits = [value for value in dimension.choices if value == NONE or _made(dimension.of, value) is not None]
        if len(fits) < 2:
            self.missing[dimension.name] = f"the pass {dimension.of} takes none of these values"
        return tuple(fits)

    def complete(self, config: Config) -> Config:
        """``config`` with the first choice of what it does not choose, and without what does not exist under it."""
        found: Config = {}
        for dimension in self.dimensions:
            if dimension.name == "arithmetic" or found["arithmetic"] in dimension.under:
                value = config.get(dimension.name, dimension.choices[0])
                found[dimension.name] = value if value in dimension.choices else dimension.choices[0]
        return found

    def all(self) -> Iterator[Config]:
        """Every configuration, once."""
        seen: set[str] = set()
        for values in itertools.product(*(d.choices for d in self.dimensions)):
            config = self.complete(dict(zip((d.name for d in self.dimensions), values, strict=True)))
            if (known := key(config)) not in seen:
                seen.add(known)
                yield config

    def floats(self, config: Config) -> list[str]:
        """The layers and regions that ``config`` leaves in float by name."""
        chosen = [*self.mixtures[config.get("mixture", 0)], *self.ranking[: config.get("float_layers", 0)]]
        return sorted(dict.fromkeys(chosen))

    def before(self, config: Config) -> list[Pass]:
        """The passes between the exact ones and the quantizing one."""
        found: list[Pass] = []
        if config.get("prune", NONE) != NONE:
            found += [p for p in [_made("prune", config["prune"])] if p is not None]
        if config["arithmetic"] == STATIC and config.get("smooth", "off") == "on":
            found += [create(name, {}) for name in EVENING_PASSES]
        return found

    def after(self, config: Config) -> list[Pass]:
        """The quantizing pass, or the compressing one."""
        if config["arithmetic"] == STATIC:
            options: dict[str, Any] = {name: config[name] for name in ("weights", "observer") if name in config}
            options["exclude"] = list(exactly(self.floats(config)))
            return [create("quantize-static", options)]
        if config["arithmetic"] == DYNAMIC:
            return [create("quantize-dynamic", {})]
        made = _made("compress-weights", config["compress"]) if config.get("compress", NONE) != NONE else None
        return [made] if made is not None else []

    def describe(self, config: Config) -> str:
        """In a few words, what differs from the default first."""
        told = [str(config["arithmetic"])]
        if config.get("prune", NONE) != NONE:
            told.append(f"pruned to {float(config['prune']):.0%} of the MACs".replace("%", " %"))
        if config.get("compress", NONE) != NONE:
            told.append(f"weights stored as {config['compress']}")
        if config["arithmetic"] == STATIC:
            told += [f"{config['weights']} weights"] if config.get("weights", "auto") != "auto" else []
            told += [str(config["observer"])] if config.get("observer", "mse") != "mse" else []
            told += ["not smoothed"] if config.get("smooth") == "off" else []
            told += [f"mixture {config['mixture']}"] if config.get("mixture") else []
            told += [f"{config['float_layers']} worst in float"] if config.get("float_layers") else []
        return ", ".join(told)

    def as_dict(self) -> dict[str, Any]:
        """As it is stored and reported."""
        return {
            "dimensions": {d.name: list(d.choices) for d in self.dimensions},
            "ranking": self.ranking,
            "mixtures": self.mixtures,
            "missing": self.missing,
        }


def key(config: Config) -> str:
    """What tells a configuration from others."""
    return ", ".join(f"{name}={config[name]}" for name in sorted(config))


def depths(layers: int) -> tuple[int, ...]:
    """How many layers may stay in float: none, then doubling, up to half of them."""
    found = [0]
    while (more := max(2 * found[-1], 1)) <= layers // 2:
        found.append(more)
    return tuple(found)


def first(space: Space) -> list[Config]:
    """The configurations to begin with: what people would try by hand."""
    plain: Sequence[Config] = [
        {"arithmetic": STATIC},
        {"arithmetic": FLOAT},
        {"arithmetic": DYNAMIC},
        *({"arithmetic": STATIC, "mixture": index} for index in range(1, len(space.mixtures))),
        *({"arithmetic": STATIC, "float_layers": depth} for depth in depths(len(space.ranking))[1:]),
        {"arithmetic": STATIC, "weights": "s8"},
        {"arithmetic": STATIC, "weights": "s7"},
        {"arithmetic": FLOAT, "compress": "fp16"},
        {"arithmetic": STATIC, "prune": "0.7"},
    ]
    found: dict[str, Config] = {}
    for config in map(space.complete, plain):
        found.setdefault(key(config), config)
    return list(found.values())


def _made(name: str, value: Value) -> Pass | None:
    """The pass with its option; None where it does not take that."""
    option = _OPTIONS[name]
    try:
        return create(name, {option: float(value) if name == "prune" else value})
    except InputError:
        return None
