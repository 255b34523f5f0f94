"""Pass names -> classes. Ours are listed here; other packages add theirs through the entry-point group."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from graphopt.base import Pass
from graphopt.errors import InputError
from graphopt.user_code import one_line

GROUP = "graphopt.passes"

PASSES: dict[str, str] = {
    "upgrade-opset": "graphopt.passes.upgrade_opset:UpgradeOpset",
    "fold-overridable": "graphopt.passes.fold_overridable:FoldOverridable",
    "freeze-shapes": "graphopt.passes.freeze_shapes:FreezeShapes",
    "fold-constants": "graphopt.passes.fold_constants:FoldConstants",
    "fold-shapes": "graphopt.passes.fold_shapes:FoldShapes",
    "inline-if": "graphopt.passes.inline_if:InlineIf",
    "inline-functions": "graphopt.passes.inline_functions:InlineFunctions",
    "constants-to-initializers": "graphopt.passes.constants_to_initializers:ConstantsToInitializers",
    "fold-qdq-weights": "graphopt.passes.fold_qdq_weights:FoldQdqWeights",
    "eliminate-identities": "graphopt.passes.eliminate_identities:EliminateIdentities",
    "merge-reshapes": "graphopt.passes.merge_reshapes:MergeReshapes",
    "merge-slices": "graphopt.passes.merge_slices:MergeSlices",
    "eliminate-duplicates": "graphopt.passes.eliminate_duplicates:EliminateDuplicates",
    "fuse-batchnorm": "graphopt.passes.fuse_batchnorm:FuseBatchnorm",
    "fuse-into-conv": "graphopt.passes.fuse_into_conv:FuseIntoConv",
    "matmul-to-gemm": "graphopt.passes.matmul_to_gemm:MatmulToGemm",
    "remove-unused": "graphopt.passes.remove_unused:RemoveUnused",
    "deduplicate-weights": "graphopt.passes.deduplicate_weights:DeduplicateWeights",
    "simplify": "graphopt.passes.simplify:Simplify",
    "compute-fp32": "graphopt.passes.compute_fp32:ComputeFp32",
    "equalize": "graphopt.passes.equalize:Equalize",
    "smooth": "graphopt.passes.smooth:Smooth",
    "prune": "graphopt.passes.prune:Prune",
    "sparsify": "graphopt.passes.sparsify:Sparsify",
    "quantize-static": "graphopt.passes.quantize_static:QuantizeStatic",
    "quantize-dynamic": "graphopt.passes.quantize_dynamic:QuantizeDynamic",
    "compress-weights": "graphopt.passes.compress_weights:CompressWeights",
    "compute-fp16": "graphopt.passes.compute_fp16:ComputeFp16",
    "finetune": "graphopt.passes.finetune:Finetune",
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
    known = PASSES if name in PASSES else available()  # installed packages are searched only where it matters
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known passes: {', '.join(known)}"
        raise InputError(f"unknown pass '{name}'; {hint}")
    try:
        found = EntryPoint(name, known[name], GROUP).load()
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:  # somebody else's package may raise anything while it is imported
        raise InputError(
            f"pass '{name}' cannot be imported from {known[name]}: {one_line(error)}; is its package whole?"
        ) from error
    if not is_pass(found):
        raise InputError(f"pass '{name}' ({known[name]}) is no graphopt Pass: subclass graphopt.base.Pass, a dataclass")
    if found.name != name:
        raise InputError(f"pass '{name}' ({known[name]}) calls itself '{found.name}'; its entry point must say so too")
    return typing.cast("type[Pass]", found)


def is_pass(found: Any) -> bool:
    """Whether this is a class of passes that recipes can make."""
    return isinstance(found, type) and issubclass(found, Pass) and dataclasses.is_dataclass(found)


def create(name: str, options: dict[str, Any]) -> Pass:
    """An instance with options as a recipe spells them (dashes or underscores).

    Raises:
        InputError: unknown pass or option, or a value of the wrong type.
    """
    return build(get(name), name, options)


def build(kind: type[Pass], name: str, options: dict[str, Any]) -> Pass:
    """An instance of ``kind``, which messages call ``name``; options and errors as :func:`create`."""
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in options.items():
        field = key.replace("-", "_")
        if field not in fields:
            near = difflib.get_close_matches(field, fields, n=1)
            spelled = [f.replace("_", "-") for f in fields]
            hint = f"did you mean '{near[0].replace('_', '-')}'?" if near else f"it has: {', '.join(spelled) or 'none'}"
            raise InputError(f"pass '{name}' has no option '{key}'; {hint}")
        if field in values:
            raise InputError(f"pass '{name}': option '{key}' is given twice; keep one spelling")
        values[field] = tuple(value) if isinstance(value, list) else value
        if not _fits(values[field], hints[field]):
            default = fields[field].default
            known = "" if default is dataclasses.MISSING else f" (default {default!r})"
            raise InputError(f"pass '{name}': option '{key}' is {value!r}, it must be {_spell(hints[field])}{known}")
    missing = [f.replace("_", "-") for f, field in fields.items() if f not in values and _required(field)]
    if missing:
        raise InputError(f"pass '{name}' needs the option '{missing[0]}'; add {missing[0]} = ...")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"pass '{name}': {error}") from error


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of a recipe (bool, int, float, str, or a tuple of such) is of the annotated type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, args[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint or (hint not in (int, bool) and isinstance(hint, type) and isinstance(value, hint))


def _spell(hint: Any) -> str:
    """The annotated type in words of TOML."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spell(arg) for arg in args if arg is not types.NoneType)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin is tuple:
        return f"a list (each item {_spell(args[0])})"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    return words.get(hint, str(getattr(hint, "__name__", hint)))
