"""``--input-shape`` of convert: ``x:1,3,224,224``, ``ids:N,16:int64``; a name is a dim that stays free."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from graphopt.errors import InputError

TYPES = (
    *("float16", "float32", "float64", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64", "bool"),
)
_FORM = "write name:1,3,224,224, a name for a dim that is free (name:N,3,224,224), a type last (name:1,16:int64)"


def parse(texts: Sequence[str]) -> list[dict[str, Any]]:
    """``name`` (may be empty), ``shape`` (numbers and names) and ``dtype`` of each.

    Raises:
        InputError: one that cannot be read, or two of one name.
    """
    found = [_one(text) for text in texts]
    names = [shape["name"] for shape in found if shape["name"]]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--input-shape names '{name}' twice; give each input once")
    return found


def _one(text: str) -> dict[str, Any]:
    rest, _, last = text.rpartition(":")
    dtype = "float32"
    if last in TYPES:
        dtype, text = last, rest
    name, _, sizes = text.rpartition(":")
    sizes = sizes.strip("[]() ")
    if re.fullmatch(r"\d+(x\d+)+", sizes):
        sizes = sizes.replace("x", ",")
    dims: list[int | str] = []
    for part in filter(None, (piece.strip() for piece in sizes.split(","))):
        if part.isdigit() and int(part) > 0:
            dims.append(int(part))
        elif part.isidentifier():
            dims.append(part)
        else:
            raise InputError(f"--input-shape '{text}': '{part}' is no size; {_FORM}")
    if sizes and not dims:
        raise InputError(f"--input-shape '{text}' has no sizes; {_FORM}")
    return {"name": name, "shape": dims, "dtype": dtype}
