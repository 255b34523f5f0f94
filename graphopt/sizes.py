"""Sizes as people write them."""

from __future__ import annotations

import re

from graphopt.errors import InputError


def parse_size(text: str, reference: int) -> int:
    """Bytes from ``25MB``, ``800kB``, ``1GiB``, or a ratio of ``reference`` such as ``0.3``.

    Raises:
        InputError: not a size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(?:([kmg]i?)?(b?))\s*", str(text), re.IGNORECASE)
    if match is None:
        raise InputError(f"'{text}' is no size; write 25MB, 800kB, or a ratio such as 0.3")
    value, unit = float(match[1]), (match[2] or "").lower()
    if not unit and not match[3]:
        if value > 1 and not value.is_integer():
            raise InputError(f"'{text}' is no size: neither a ratio (0 to 1) nor a whole number of bytes")
        return int(value * reference) if value <= 1 else int(value)
    base = 1024 if unit.endswith("i") else 1000
    return int(value * base ** " kmg".index(unit[:1] or " "))
