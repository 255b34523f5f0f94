"""Reading weights in mapped files without keeping them in memory: the pages that were read are given back."""

from __future__ import annotations

import hashlib
import mmap
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PAGE = mmap.ALLOCATIONGRANULARITY
_CHUNK = 1 << 24
"""Bytes read at a time."""


def let_go(array: NDArray[Any]) -> None:
    """Tell the system that the pages of a mapped file behind ``array`` are not needed now: they are read again where
    they are, and until then take no memory. Nothing happens for an array in memory."""
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    if base is None or not hasattr(base, "madvise"):
        return
    start = array.__array_interface__["data"][0]
    origin = np.frombuffer(base, np.uint8).__array_interface__["data"][0]
    begin = (start - origin) // _PAGE * _PAGE
    end = start - origin + array.nbytes
    if end > begin:
        base.madvise(mmap.MADV_DONTNEED, begin, min(end, len(base)) - begin)


def hashed(buffer: bytes | memoryview, before: bytes = b"") -> bytes:
    """The sha256 of ``before`` and a tensor's bytes, which do not stay in memory where they are mapped."""
    digest = hashlib.sha256(before)
    view = memoryview(buffer)
    for start in range(0, len(view), _CHUNK):
        part = view[start : start + _CHUNK]
        digest.update(part)
        let_go(np.frombuffer(part, np.uint8))
    return digest.digest()
