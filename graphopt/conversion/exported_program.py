"""Does a ``.pt2`` archive carry anything that ``torch.export.load`` would run? It is read as JSON, without torch."""

from __future__ import annotations

import io
import json
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graphopt.errors import InputError
from graphopt.external import shown

_TARGETS = ("torch.ops.", "_operator.", "math.", "torch.sym_", "torch._sym_", "torch.utils._sympy.", "torch.fx.")
"""What a node of an exported graph calls."""

_FUNCTIONS = frozenset({
    "Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Abs", "Max", "Min", "Mod", "PythonMod",
    "FloorDiv", "CleanDiv", "CeilDiv", "ModularIndexing", "TrueDiv", "IntTrueDiv", "FloatTrueDiv", "FloatPow",
    "PowByNatural", "ToFloat", "TruncToInt", "TruncToFloat", "FloorToInt", "CeilToInt", "RoundToInt", "RoundDecimal",
    "Identity", "Where", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "StrictLessThan", "LessThan",
    "StrictGreaterThan", "GreaterThan", "And", "Or", "Not", "floor", "ceiling", "LShift", "RShift",
    "BitwiseFn_bitwise_and", "BitwiseFn_bitwise_or",
})  # fmt: skip
"""Functions in the text of a size. PyTorch hands that text to sympy, which evaluates it as Python."""


_GLOBALS = re.compile(
    r"torch\._utils _rebuild_(tensor|tensor_v2|parameter|device_tensor_from_numpy)|torch(\.storage)? \w*Storage|"
    r"collections OrderedDict|torch (\w+|Size|device|Tensor)|torch\._tensor _rebuild_from_type_v2|"
    r"torch\.nn\.parameter Parameter|torch\.serialization _get_layout"
)
"""What the pickle of tensors names. The example inputs are one, and torch loads it without looking."""
_TORCH_CODE = frozenset({"load", "save", "compile", "jit", "hub", "ops", "classes", "utils", "package", "os", "sys"})
"""Attributes of torch that are no types."""


def what_runs(path: Path) -> str | None:
    """What would run code when the archive is loaded, or None.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return next(_found(archive), None)
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, RecursionError) as error:
        raise InputError(f"{shown(str(path))} is a damaged archive ({error}); export it again") from error


def _found(archive: zipfile.ZipFile) -> Iterator[str]:
    names = archive.namelist()
    for name in names:
        inner = name.split("/", 1)[-1]
        if inner.startswith("data/aotinductor/"):
            yield "compiled code (AOTInductor)"
        elif inner == "serialized_exported_program.json":
            yield "weights pickled by an older PyTorch (save it again with 2.9 or newer)"
        elif inner.startswith("data/sample_inputs/"):
            yield from _in_pickles(archive.read(name))
        elif inner.startswith(("data/weights/", "data/constants/")) and inner.endswith("_config.json"):
            config = json.loads(archive.read(name)).get("config", {})
            if any(entry.get("use_pickle") for entry in config.values()):
                yield "pickled weights or constants"
        elif inner.startswith("models/") and inner.endswith(".json"):
            yield from _in_graph(json.loads(archive.read(name)))


def _in_pickles(data: bytes) -> Iterator[str]:
    """What ``torch.save`` wrote: a zip archive with a pickle in it that names tensors' own functions and no others."""
    try:
        inner = zipfile.ZipFile(io.BytesIO(data))
    except zipfile.BadZipFile:
        yield "example inputs in a bare pickle"
        return
    with inner:
        for name in inner.namelist():
            if name.endswith(".pkl"):
                yield from _named(inner.read(name))


def _named(data: bytes) -> Iterator[str]:
    try:
        for operation, argument, _ in pickletools.genops(data):
            if operation.name in ("GLOBAL", "INST"):
                module, _, attribute = str(argument).partition(" ")
                code = module == "torch" and attribute in _TORCH_CODE
                if code or not _GLOBALS.fullmatch(str(argument)):
                    yield f"a pickle that names {shown(str(argument)).replace(' ', '.')}"
            elif operation.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                yield "a pickle that names what it is not seen to name"
    except ValueError:
        yield "a damaged pickle"


def _in_graph(document: Any) -> Iterator[str]:
    stack = [document]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack.extend(item)
        if not isinstance(item, dict):
            continue
        stack.extend(item.values())
        target, text = item.get("target"), item.get("expr_str")
        if isinstance(target, str) and "inputs" in item and not target.startswith(_TARGETS):
            yield f"a call of {shown(target)}"
        if isinstance(text, str) and not is_size(text):
            yield f"an expression that is no size ({shown(text[:60])})"


def is_size(text: str) -> bool:
    """Whether the text is arithmetic on sizes, and nothing that Python would do something else with."""
    if "__" in text or re.search(r"[\[\]{};:\\]|\.\s*[A-Za-z_]|\blambda\b", text):
        return False
    return all(name in _FUNCTIONS for name in re.findall(r"([A-Za-z_]\w*)\s*\(", text))
