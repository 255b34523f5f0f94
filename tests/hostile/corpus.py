"""The corpus: what a kind is, and where all of them are found.

A kind is a few lines that write one broken, hostile or extreme file, with what graphopt has to do about it. Everything
random is seeded by the kind's own name, so that adding one changes no other.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

OK = "ok"
"""Exit 0; what is written passes the checker and does what the file did."""
UNRUN = "unrun"
"""As OK, but nothing could be run here: optimized around, and said; verbs that have to run it exit 2."""
REFUSED = "refused"
"""Exit 2, one line, nothing written."""
ANY = "any"
"""OK, UNRUN or REFUSED: what random damage means is not known beforehand."""

OTHER_FILES = {"convert", "unpack"}
"""Verbs that read something else than a model: whatever is given to them here is refused, for what it is."""

Array = npt.NDArray[Any]
Make = Callable[[Path, np.random.Generator], Any]


@dataclass(frozen=True)
class Kind:
    """``make(folder, rng)`` returns a ModelProto, the bytes of ``m.onnx``, or None where it wrote the files itself.

    ``outcome`` is that of verbs that load a model; ``seen`` that of ``inspect``, which reads no weight and runs
    nothing. A kind of ``data`` writes calibration data for the plain model of :mod:`samples`, and returns its spec.
    """

    name: str
    make: Make
    outcome: str
    seen: str
    says: str = ""
    options: tuple[str, ...] = ()

    def write(self, folder: Path) -> str:
        """The files, in ``folder``; returns the model's name, or for data its spec."""
        made = self.make(folder, np.random.default_rng(zlib.crc32(self.name.encode())))
        if isinstance(made, str):
            return made
        if isinstance(made, onnx.ModelProto):
            made = made.SerializeToString()
        if made is not None:
            (folder / "m.onnx").write_bytes(made)
        return "m.onnx"


class Group:
    """The kinds of one file, in the order in which they stand there."""

    def __init__(self, name: str, *, seen: bool = True) -> None:
        self.name = name
        self.seen = seen  # whether inspect may show what other verbs refuse
        self.kinds: dict[str, Kind] = {}

    def add(
        self, name: str, outcome: str, make: Make, *, seen: str | None = None, says: str = "", options: Any = ()
    ) -> None:
        """``says``: a part of the error line, where it matters which one it is."""
        full = f"{self.name}-{name}"
        assert full not in self.kinds, full
        self.kinds[full] = Kind(full, make, outcome, seen or (ANY if self.seen else outcome), says, tuple(options))

    def kind(self, name: str, outcome: str, **more: Any) -> Callable[[Make], Make]:
        """The same as a decorator."""

        def decorate(make: Make) -> Make:
            self.add(name, outcome, make, **more)
            return make

        return decorate

    def __iter__(self) -> Iterator[Kind]:
        return iter(self.kinds.values())


def models() -> list[Kind]:
    """Every kind of model."""
    from hostile import bombs, damaged, escapes, functions, graphs, names, tensors, types

    groups = (damaged, names, graphs, functions, types, tensors, bombs, escapes)
    return [kind for module in groups for kind in module.KINDS]


def data() -> list[Kind]:
    """Every kind of calibration data."""
    from hostile import samples

    return list(samples.KINDS)
