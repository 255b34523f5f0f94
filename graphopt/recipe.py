"""Recipes: TOML <-> a pipeline of passes with its data, target and gates.

    target = "ort-cpu"
    data = "calibration.npz"

    [gates]
    max-drop = "1%"

    [[pass]]
    use = "quantize-static"
    observer = "mse"

``use`` is a registered pass, or ``package.module:name`` or ``file.py:name`` of a Pass class or of a foreign callable.
``[[pass]] repeat = 4`` with ``[[pass.pass]]`` entries repeats those until nothing changes. Paths are relative to the
recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.base import VERIFY, Gates, Pass, Pipeline, Repeat
from graphopt.errors import InputError
from graphopt.foreign import ForeignPass, foreign, resolve
from graphopt.registry import available, build, create, is_pass
from graphopt.remote import is_address
from graphopt.user_code import spelled

MAX_REPEAT = 32

_TYPES = {
    "model": str,
    "output": str,
    "data": str,
    "eval-data": str,
    "metric": str,
    "target": str,
    "verify": str,
    "seed": int,
    "this-cpu": bool,
    "allow-slower": bool,
    "gates": dict,
    "pass": list,
}
_GATES = {"max-drop": str, "min-sqnr": float, "min-speedup": float, "max-size": str, "certify": bool}
_PATHS = ("model", "output", "data", "eval_data")
_WORDS = {
    str: "a string",
    int: "a whole number",
    bool: "true or false",
    float: "a number",
    dict: "a table",
    list: "a list of tables: write [[pass]]",
}


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
    allow_slower: bool = False
    gates: Gates = field(default_factory=Gates)


def read(source: str | Path) -> Recipe:
    """A recipe from a file.

    Raises:
        InputError: not TOML, an unknown key, pass or option; the message names file and key.
    """
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"no such recipe: {path}; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read recipe {path}: {error}") from error
    try:
        return parse(text, path.parent)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def parse(text: str, folder: Path | None = None) -> Recipe:
    """A recipe from TOML text; relative paths are taken from ``folder``.

    Raises:
        InputError: as :func:`read`.
    """
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise InputError("not valid TOML: it is nested too deep; is it a recipe?") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"not valid TOML: {error}") from error
    if "locked" in table:
        raise InputError("this is a lock, not a recipe; graphopt run --locked FILE makes what it says")
    return from_table(table, folder)


def from_table(table: dict[str, Any], folder: Path | None = None) -> Recipe:
    """A recipe from what its TOML says; paths and errors as :func:`parse`."""
    table = _checked(table, _TYPES, "the recipe")
    gates = _checked(table.pop("gates", {}), _GATES, "[gates]")
    steps = table.pop("pass", [])
    if table.get("verify", "end") not in VERIFY:
        raise InputError(f"verify is '{table['verify']}'; one of {', '.join(VERIFY)}")
    for key in (name.replace("_", "-") for name in _PATHS):
        if key in table and not _no_path(table[key]):
            table[key] = _beside(folder, table[key])
    if ".py:" in table.get("metric", ""):
        table["metric"] = _beside(folder, table["metric"])
    return Recipe(
        passes=tuple(_step(step, folder, f"pass {index}") for index, step in enumerate(steps, 1)),
        gates=Gates(**{k.replace("-", "_"): v for k, v in gates.items()}),
        **{k.replace("-", "_"): v for k, v in table.items()},
    )


def _no_path(text: str) -> bool:
    return text in ("-", "random") or text.startswith("random:") or is_address(text)


def _beside(folder: Path | None, text: str) -> str:
    return text if folder is None else str(folder / text)


def _checked(table: dict[str, Any], types: dict[str, type], where: str) -> dict[str, Any]:
    """The table, its keys known and its values of the right type; numbers stand for text where a gate takes both."""
    done: dict[str, Any] = {}
    for key, value in table.items():
        if key not in types:
            near = difflib.get_close_matches(key, types, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(types)}"
            raise InputError(f"unknown key '{key}' in {where}; {hint}")
        kind, number = types[key], isinstance(value, (int, float)) and not isinstance(value, bool)
        if key in ("max-drop", "max-size") and number:
            value = repr(value)  # max-drop = 0.01
        elif not (type(value) is kind or (kind is float and number)):
            raise InputError(f"'{key}' in {where} is {value!r}; it must be {_WORDS[kind]}")
        done[key] = value
    return done


def _step(step: Any, folder: Path | None, where: str) -> Pass | Repeat:
    if not isinstance(step, dict):
        raise InputError(f"{where} is {step!r}, not a table; write [[pass]]")
    if "repeat" not in step:
        return _pass(dict(step), folder, where)
    table = _checked(step, {"repeat": int, "pass": list}, f"{where} (a repeat)")
    times, inner = table["repeat"], table.get("pass", [])
    if not 1 <= times <= MAX_REPEAT:
        raise InputError(f"'repeat' in {where} is {times}; it must be a whole number from 1 to {MAX_REPEAT}")
    if not inner:
        raise InputError(f"the repeat in {where} holds no passes; add [[pass.pass]] tables")
    passes: list[Pass] = []
    for index, item in enumerate(inner, 1):
        made = _step(item, folder, f"{where}.{index}")
        if isinstance(made, Repeat):
            raise InputError(f"{where}.{index} is a repeat within a repeat; list its passes instead")
        passes.append(made)
    return Repeat(tuple(passes), times)


def _pass(options: dict[str, Any], folder: Path | None, where: str) -> Pass:
    use = options.pop("use", None)
    if not isinstance(use, str):
        raise InputError(f"{where} has no 'use'; write e.g. use = \"fold-constants\"")
    if ":" not in use:
        return create(use, options)
    if ".py:" in use:
        use = _beside(folder, use)
    found = resolve(use)
    if is_pass(found):
        return build(found, use, options)
    options = _checked(options, {"view": str, "contract": str}, f"pass '{use}' (a foreign callable)")
    try:
        return foreign(found, use=use, **options)
    except ValueError as error:
        raise InputError(f"pass '{use}': {error}") from error


def chosen(
    recipe: str | Path | Recipe | None, passes: Sequence[Any] | None, default: Callable[[], Pipeline]
) -> tuple[Recipe | None, Pipeline]:
    """The recipe and the pipeline that a caller asked for; ``default`` makes one where neither was given.

    ``passes`` holds names, ``module:name`` or ``file.py:name``, :class:`Pass` objects or foreign callables.

    Raises:
        InputError: both were given, or no passes, or what is no pass.
    """
    if recipe is not None and passes is not None:
        raise InputError("both a recipe and passes; give one of them")
    if passes is not None:
        if not passes:
            raise InputError("no passes; name at least one, or leave the option out (graphopt passes lists them)")
        return None, [_as_pass(item) for item in passes]
    if recipe is None:
        return None, default()
    given = recipe if isinstance(recipe, Recipe) else read(recipe)
    return given, given.passes


def _as_pass(item: Any) -> Pass:
    if isinstance(item, Pass):
        return item
    if isinstance(item, str):
        return _pass({"use": item}, None, "a pass")
    if callable(item):
        return foreign(item)
    raise InputError(f"{item!r} is no pass; give a name, a Pass or a callable")


def write(recipe: Recipe, folder: Path | None = None) -> str:
    """The TOML text that :func:`parse` turns back into an equal recipe (defaults are left out).

    ``folder``: where it will lie; paths in it are written as they read from there.
    """
    lines: list[str] = []
    for option in dataclasses.fields(Recipe):
        value = getattr(recipe, option.name)
        if value is not None and (option.name in _PATHS or (option.name == "metric" and ".py:" in value)):
            value = seen_from(folder, value)
        if option.name not in ("passes", "gates") and value is not None and value != option.default:
            lines.append(f"{option.name.replace('_', '-')} = {toml(value)}")
    gates = recipe.gates.asked()
    if gates:
        lines += ["", "[gates]", *(f"{k.replace('_', '-')} = {toml(v)}" for k, v in gates.items())]
    for step in recipe.passes:
        lines += ["", *_lines(step, "pass", folder)]
    return "\n".join(lines).strip() + "\n"


def _lines(step: Pass | Repeat, table: str, folder: Path | None) -> Sequence[str]:
    if isinstance(step, Repeat):
        inner = [line for item in step.passes for line in _lines(item, f"{table}.pass", folder)]
        return [f"[[{table}]]", f"repeat = {step.times}", *inner]
    use = pass_use(step)
    use = seen_from(folder, use) if ".py:" in use else use
    return [f"[[{table}]]", f"use = {toml(use)}", *(f"{k} = {toml(v)}" for k, v in step.options().items())]


def seen_from(folder: Path | None, text: str) -> str:
    """The path ``text`` as it reads from ``folder``; absolute where there is no way (another drive)."""
    if folder is None or _no_path(text):
        return text
    path = Path(text).expanduser().absolute()
    try:
        return Path(os.path.relpath(path, folder.absolute())).as_posix()
    except ValueError:
        return path.as_posix()


def pass_use(step: Pass) -> str:
    """What ``use`` says of a pass: a registered name where there is one, else where the class is."""
    if isinstance(step, ForeignPass):
        return step.use
    where = f"{type(step).__module__}:{type(step).__qualname__}"
    return step.name if available().get(step.name) == where else spelled(type(step)) or where


def toml(value: Any) -> str:
    """A value as TOML spells it: text, numbers, booleans, lists of them."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml(v) for v in value) + "]"
    # JSON strings are TOML basic strings, but for one control character that JSON leaves alone.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
