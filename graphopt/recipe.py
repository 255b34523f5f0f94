"""Recipes: TOML <-> a pipeline of passes with its data, target and gates.

    target = "ort-cpu"
    data = "calibration.npz"

    [gates]
    max-drop = "1%"

    [[pass]]
    use = "quantize-static"
    observer = "mse"

``use`` is a registered pass or ``package.module:function``. ``[[pass]] repeat = 4`` with ``[[pass.pass]]`` entries
repeats those until nothing changes. Paths are relative to the recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.base import Gates, Pass, Repeat
from graphopt.errors import InputError
from graphopt.foreign import ForeignPass, foreign, kind_of, resolve
from graphopt.registry import create

MAX_REPEAT = 32

_KEYS = ("model", "output", "data", "eval-data", "metric", "target", "verify", "seed", "this-cpu", "gates", "pass")


@dataclass
class Recipe:
    """What to do to which model, with what data, and what the result must keep to."""

    passes: tuple[Pass | Repeat, ...] = ()
    model: str | None = None
    output: str | None = None
    data: str | None = None
    eval_data: str | None = None
    metric: str | None = None
    target: str = "ort-cpu"
    verify: str = "end"
    seed: int = 0
    this_cpu: bool = False
    gates: Gates = field(default_factory=Gates)


def read(source: str | Path) -> Recipe:
    """A recipe from a file.

    Raises:
        InputError: not TOML, an unknown key, pass or option; the message names file and key.
    """
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"no such recipe: {path}; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read recipe {path}: {error}") from error
    try:
        return parse(text, path.parent)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def parse(text: str, folder: Path | None = None) -> Recipe:
    """A recipe from TOML text; relative paths are taken from ``folder``."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"not valid TOML: {error}") from error
    _known(table, _KEYS, "recipe")
    gates = table.pop("gates", {})
    known_gates = [f.name.replace("_", "-") for f in dataclasses.fields(Gates)]
    _known(gates, known_gates, "[gates]")
    steps = table.pop("pass", [])
    if not isinstance(steps, list):
        raise InputError("'pass' must be a list of tables: write [[pass]]")
    for key in ("model", "output", "data", "eval-data"):
        value = table.get(key)
        if isinstance(value, str) and folder is not None and not value.startswith("random") and value != "-":
            table[key] = str(folder / value)
    metric = table.get("metric")
    if isinstance(metric, str) and ".py:" in metric and folder is not None:
        table["metric"] = str(folder / metric)
    return Recipe(
        passes=tuple(_step(step, folder) for step in steps),
        gates=Gates(**{k.replace("-", "_"): v for k, v in gates.items()}),
        **{k.replace("-", "_"): v for k, v in table.items()},
    )


def _known(table: dict[str, Any], keys: list[str] | tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(keys)}"
            raise InputError(f"unknown key '{key}' in {where}; {hint}")


def _step(step: dict[str, Any], folder: Path | None) -> Pass | Repeat:
    options = dict(step)
    if "repeat" in options:
        _known(options, ("repeat", "pass"), "a repeat")
        times = options["repeat"]
        if not isinstance(times, int) or not 1 <= times <= MAX_REPEAT:
            raise InputError(f"repeat = {times!r}; it must be a whole number from 1 to {MAX_REPEAT}")
        inner = tuple(_step(s, folder) for s in options.get("pass", []))
        return Repeat(tuple(p for p in inner if isinstance(p, Pass)), times)
    use = options.pop("use", None)
    if not isinstance(use, str):
        raise InputError("a [[pass]] has no 'use'; write e.g. use = \"fold-constants\"")
    if ":" not in use:
        return create(use, options)
    _known(options, ("view", "contract"), f"pass '{use}' (a foreign callable)")
    function = resolve(use, folder)
    wrapped = foreign(function, view=options.get("view"), contract=options.get("contract", "exact"))
    return ForeignPass(use, options.get("view") or kind_of(function), wrapped.contract, function)


def write(recipe: Recipe) -> str:
    """The TOML text that :func:`parse` turns back into an equal recipe (defaults are left out)."""
    lines: list[str] = []
    for option in dataclasses.fields(Recipe):
        value = getattr(recipe, option.name)
        if option.name not in ("passes", "gates") and value is not None and value != option.default:
            lines.append(f"{option.name.replace('_', '-')} = {_toml(value)}")
    gates = recipe.gates.asked()
    if gates:
        lines += ["", "[gates]", *(f"{k.replace('_', '-')} = {_toml(v)}" for k, v in gates.items())]
    for step in recipe.passes:
        lines += ["", *_lines(step, "pass")]
    return "\n".join(lines).strip() + "\n"


def _lines(step: Pass | Repeat, table: str) -> list[str]:
    if isinstance(step, Repeat):
        lines = [f"[[{table}]]", f"repeat = {step.times}"]
        for inner in step.passes:
            lines += _lines(inner, f"{table}.pass")
        return lines
    if isinstance(step, ForeignPass):
        return [
            f"[[{table}]]",
            f"use = {_toml(step.use)}",
            f"view = {_toml(step.view)}",
            f"contract = {_toml(step.contract)}",
        ]
    return [f"[[{table}]]", f"use = {_toml(step.name)}", *(f"{k} = {_toml(v)}" for k, v in step.options().items())]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return json.dumps(str(value), ensure_ascii=False)  # JSON strings are TOML basic strings
