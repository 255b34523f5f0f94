"""Pass names -> classes. Ours are listed here; other packages add theirs through the entry-point group."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from importlib.metadata import entry_points
from typing import Any

from graphopt.base import Pass
from graphopt.errors import InputError

GROUP = "graphopt.passes"

PASSES: dict[str, str] = {
    "upgrade-opset": "graphopt.passes.upgrade_opset:UpgradeOpset",
    "fold-constants": "graphopt.passes.fold_constants:FoldConstants",
    "fuse-batchnorm": "graphopt.passes.fuse_batchnorm:FuseBatchnorm",
    "remove-unused": "graphopt.passes.remove_unused:RemoveUnused",
    "simplify": "graphopt.passes.simplify:Simplify",
    "quantize-static": "graphopt.passes.quantize_static:QuantizeStatic",
    "quantize-dynamic": "graphopt.passes.quantize_dynamic:QuantizeDynamic",
}
"""name -> "module:Class", in the order a pipeline would use them. Nothing is imported until it is asked for."""


def available() -> dict[str, str]:
    """All passes by name: ours, then those of installed packages. Ours cannot be replaced."""
    found = dict(PASSES)
    for entry in entry_points(group=GROUP):
        found.setdefault(entry.name, entry.value)
    return found


def get(name: str) -> type[Pass]:
    """The class behind ``name``.

    Raises:
        InputError: unknown name (with the nearest known one), or its package does not import.
    """
    known = available()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known passes: {', '.join(known)}"
        raise InputError(f"unknown pass '{name}'; {hint}")
    module, _, attribute = known[name].partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"pass '{name}' cannot be imported from {known[name]}: {error}; is its package whole?"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise InputError(f"pass '{name}' ({known[name]}) is no graphopt Pass; it must subclass graphopt.base.Pass")
    return found


def create(name: str, options: dict[str, Any]) -> Pass:
    """An instance with options as a recipe spells them (dashes or underscores).

    Raises:
        InputError: unknown pass or option, or a value of the wrong type.
    """
    kind = get(name)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in options.items():
        field = key.replace("-", "_")
        if field not in fields:
            near = difflib.get_close_matches(field, fields, n=1)
            spelled = [f.replace("_", "-") for f in fields]
            hint = f"did you mean '{near[0].replace('_', '-')}'?" if near else f"it has: {', '.join(spelled) or 'none'}"
            raise InputError(f"pass '{name}' has no option '{key}'; {hint}")
        values[field] = tuple(value) if isinstance(value, list) else value
        _check_type(name, key, fields[field], values[field])
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"pass '{name}': {error}") from error


def _check_type(name: str, key: str, field: dataclasses.Field[Any], value: Any) -> None:
    """Options are plain TOML types, told by their default."""
    default = field.default
    if default is dataclasses.MISSING or default is None:
        return
    right = isinstance(value, bool) == isinstance(default, bool) and (
        isinstance(value, type(default)) or (isinstance(default, float) and isinstance(value, int))
    )
    if not right:
        wanted = {"tuple": "list", "str": "string"}.get(type(default).__name__, type(default).__name__)
        raise InputError(f"pass '{name}': option '{key}' is {value!r}, it must be a {wanted} (default {default!r})")
