"""A scratch data file for new weights, so that a model larger than memory can be made: written in pieces, mapped."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphopt.errors import InputError
from graphopt.external import adopt
from graphopt.pages import let_go

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

_PAGE = mmap.ALLOCATIONGRANULARITY
_KEPT = "graphopt.spill"
"""Key in a model's ``meta`` (its clones have it too) under which the folder stands that its weights lie in."""


class Spill:
    """One file in a temporary folder (below ``parent``; None: the system's), which goes with the last model that
    :meth:`keep` was called for."""

    def __init__(self, parent: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="graphopt-weights-", dir=parent))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._path = self.folder / "weights.data"
        self._end = 0
        self._places: dict[int, tuple[int, NDArray[np.uint8]]] = {}
        self._path.touch()

    def room(self, size: int) -> NDArray[np.uint8]:
        """``size`` (1 or more) bytes of the file to be written to, uint8.

        Raises:
            InputError: the disk is full.
        """
        begin = -(-self._end // _PAGE) * _PAGE
        try:
            with self._path.open("r+b") as stream:
                if hasattr(os, "posix_fallocate"):  # else a full disk is told by a signal, while it is written
                    os.posix_fallocate(stream.fileno(), begin, size)
                else:
                    stream.truncate(begin + size)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"no room for weights in {self.folder}: {reason}; set TMPDIR to a larger disk") from error
        self._end = begin + size
        mapped = np.memmap(self._path, np.uint8, "r+", begin, (size,))
        self._places[id(mapped)] = begin, mapped
        return mapped

    def tensor(self, room: NDArray[np.uint8], dtype: ir.DataType, shape: tuple[int, ...]) -> ir.ExternalTensor:
        """What was written to ``room``, as a tensor; it can be read once :meth:`keep` was called."""
        import onnx_ir as ir

        begin, mapped = self._places.pop(id(room))
        let_go(mapped)
        return ir.ExternalTensor(
            self._path.name, begin, mapped.nbytes, dtype, shape=ir.Shape(shape), name="", base_dir=self.folder
        )

    def keep(self, model: ir.Model) -> None:
        """Map the tensors that ``model`` got, and keep the file as long as it or a clone of it lives."""
        adopt(model, ())
        model.meta[_KEPT] = [*model.meta.get(_KEPT, []), self]
