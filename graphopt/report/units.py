"""Numbers as a person reads them: ``912.54 kB``, ``9.33 M``, ``5.71 ms``, ``0.277x``."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def count(number: int | None) -> str:
    """A count; ``?`` where it is unknown."""
    if number is None:
        return "?"
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return str(number)


def seconds(value: float) -> str:
    """A duration."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value * 1e6:.0f} us"


def ratio(after: float, before: float) -> str:
    """``after`` over ``before``; empty where there was nothing before."""
    return f"{after / before:.3f}x" if before else ""


def plural(number: int, noun: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
