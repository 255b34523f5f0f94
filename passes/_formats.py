"""The forms that weights are stored in, and rounding to them: rows of a matrix at a time, so that memory is bounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Format:
    """``bits`` per element, stored as ``codes`` (a numpy or ONNX type name); ``opset``: the first that has what decodes
    it. ``blocked``: a scale for each block of a row, else one for the row."""

    name: str
    bits: int
    codes: str
    opset: int
    blocked: bool = False
    palette: bool = False

    @property
    def whole(self) -> bool:
        """Whether an element is stored by itself, as a shorter float."""
        return self.bits == 16

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest integer that is used."""
        if self.codes == "int8":
            return -127, 127
        return (-8, 7) if self.codes == "int4" else (0, 2**self.bits - 1)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("fp16", 16, "float16", 9),
        Format("bf16", 16, "bfloat16", 13),
        Format("int8", 8, "int8", 13),
        Format("int8-block", 8, "int8", 21, blocked=True),
        Format("int4", 4, "int4", 21, blocked=True),
        Format("uint4", 4, "uint4", 21, blocked=True),
        Format("palette8", 8, "uint8", 13, palette=True),
        Format("palette4", 4, "uint4", 21, palette=True),
    )
}
"""``int4`` is symmetric (-8 to 7, no zero point), ``uint4`` has a zero point per block."""

TINY = float(np.finfo(np.float32).tiny)
_SHRINK = (0.94, 0.88, 0.81, 0.74)
"""Shares of a block's range that a fitted scale is chosen from, besides the whole: clipping the largest few costs less
than a coarse step for all (Banner et al. 2019). Measured on MiniLM, PP-OCR rec and basic-pitch, blocks of 64: 1.0, 1.1
and 0.8 dB less error of int4 weights, 0.3 dB of uint4."""

BINS = 1 << 14


@dataclass
class Codes:
    """Rounded rows: ``codes`` [rows, columns], ``scale`` float32 [rows, blocks], ``zero`` uint8 likewise or None."""

    codes: NDArray[Any]
    scale: NDArray[np.float32]
    zero: NDArray[np.uint8] | None

    def decoded(self, block: int) -> NDArray[np.float32]:
        """The floats that these stand for, as ONNX Runtime computes them."""
        found = np.empty_like(self.codes, np.float32)
        for part, blocks in split(self.codes, block):
            out = _view(found, part)
            np.copyto(out, _view(self.codes, part))
            if self.zero is not None:
                out -= self.zero[:, blocks, None]
            out *= self.scale[:, blocks, None]
        return found


def split(rows: NDArray[Any], block: int) -> list[tuple[tuple[int, int, int], slice]]:
    """The rows as whole blocks, and a shorter last one: ((first column, last, block), which blocks)."""
    columns = rows.shape[1]
    whole = columns // block
    found = [((0, whole * block, block), slice(0, whole))] if whole else []
    if columns % block:
        found.append(((whole * block, columns, columns % block), slice(whole, whole + 1)))
    return found


def _view(rows: NDArray[Any], part: tuple[int, int, int]) -> NDArray[Any]:
    """[rows, blocks, block] of one part; no copy, so that it can be written to."""
    begin, end, block = part
    strides = (rows.strides[0], rows.strides[1] * block, rows.strides[1])
    shape = (len(rows), (end - begin) // block, block)
    return np.lib.stride_tricks.as_strided(rows[:, begin:end], shape, strides)


def ranges(rows: NDArray[np.float32], form: Format, block: int) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
    """(scale, zero point) of each block, so that all of it is representable."""
    parts = [_range(_view(rows, part), form, 1.0) for part, _ in split(rows, block)]
    zero = None if form.codes != "uint4" else np.concatenate([z for _, z in parts if z is not None], axis=1)
    return np.concatenate([s for s, _ in parts], axis=1), zero


def _range(
    blocks: NDArray[np.float32], form: Format, share: float
) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
    low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
    return _fit(low, high, form, share)


def _fit(
    low: NDArray[np.float32], high: NDArray[np.float32], form: Format, share: float
) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
    if form.codes == "uint4":
        scale = (high - low) * np.float32(share / 15)
        scale = np.where(scale >= TINY, scale, np.float32(1))
        return scale, np.clip(np.rint(low * np.float32(-share) / scale), 0, 15).astype(np.uint8)
    least, most = form.bounds  # -8 to 7: where the negative side is the heavier one, the steps can be finer
    scale = np.maximum(high * np.float32(share / most), low * np.float32(share / least))
    return np.where(scale >= TINY, scale, np.float32(1)), None


def round_rows(
    rows: NDArray[np.float32], form: Format, block: int, *, fitted: bool = False, half: bool = False
) -> Codes:
    """Round to nearest in a format of integers, ``rows`` being laid out in memory either way round.

    Args:
        rows: float32 [rows, columns], finite.
        form: one of :data:`FORMATS`.
        block: elements of a row that share a scale.
        fitted: of each block, the range (all of it, or a share) that leaves least squared error.
        half: scales are stored as float16, and have to be some.
    """
    found = Codes(np.empty_like(rows, np.uint8 if form.codes == "uint4" else np.int8), *ranges(rows, form, block))
    if half:
        found.scale = as_half(found.scale)
    for part, blocks in split(rows, block):
        source, target = _view(rows, part), _view(found.codes, part)
        scale, zero = found.scale[:, blocks], None if found.zero is None else found.zero[:, blocks]
        if fitted:
            scale, zero = _searched(source, scale, zero, form, half)
            found.scale[:, blocks] = scale
            if found.zero is not None and zero is not None:
                found.zero[:, blocks] = zero
        np.copyto(target, _integers(source, scale, zero, form), casting="unsafe")
    return found


def as_half(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales rounded to what float16 holds, none to zero; those that are then far off are not normal float16."""
    with np.errstate(over="ignore"):
        return np.maximum(scale.astype(np.float16), np.float16(2.0**-24)).astype(np.float32)


def _integers(
    source: NDArray[np.float32], scale: NDArray[np.float32], zero: NDArray[np.uint8] | None, form: Format
) -> NDArray[np.float32]:
    found = source / scale[:, :, None]
    np.rint(found, out=found)
    if zero is not None:
        found += zero[:, :, None]
    np.clip(found, *form.bounds, out=found)
    return found


def _searched(
    source: NDArray[np.float32],
    scale: NDArray[np.float32],
    zero: NDArray[np.uint8] | None,
    form: Format,
    half: bool,
) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
    low, high = np.minimum(source.min(axis=2), 0), np.maximum(source.max(axis=2), 0)

    def error(s: NDArray[np.float32], z: NDArray[np.uint8] | None) -> NDArray[np.float32]:
        back = _integers(source, s, z, form)
        if z is not None:
            back -= z[:, :, None]
        back *= s[:, :, None]
        back -= source
        found: NDArray[np.float32] = np.einsum("rbk,rbk->rb", back, back)
        return found

    least = error(scale, zero)
    for share in _SHRINK:
        s, z = _fit(low, high, form, share)
        s = as_half(s) if half else s
        other = error(s, z)
        better = other < least
        least = np.where(better, other, least)
        scale = np.where(better, s, scale)
        zero = None if zero is None or z is None else np.where(better, z, zero)
    return scale, zero


def spread(rows: NDArray[np.float32], half: bool) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """(largest magnitude of each row, [rows, 1], as float16 can hold it where ``half``; the bin of each element over
    it, of :data:`BINS` from -1 to 1)."""
    scale = np.abs(rows).max(axis=1, keepdims=True)
    scale = as_half(scale) if half else scale
    scale[scale < TINY] = 0
    found = rows / np.where(scale > 0, scale, np.float32(1)) * np.float32(BINS / 2) + np.float32(BINS / 2)
    return scale, np.clip(found.astype(np.intp), 0, BINS - 1)


def palette(counts: NDArray[np.float64], entries: int) -> NDArray[np.float32]:
    """``entries`` values that :data:`BINS` bins with these counts (or weights) are closest to: Lloyd's k-means in one
    dimension, started from quantiles of the cube root of the density (where its optimum lies, Panter and Dite 1951)."""
    centres = (np.arange(BINS) + 0.5) * (2 / BINS) - 1
    smooth = np.convolve(counts, np.ones(65) / 65, "same")
    cumulated = np.cumsum(np.cbrt(smooth))
    cumulated /= cumulated[-1]
    book = np.interp((np.arange(entries) + 0.5) / entries, cumulated, centres)
    mass = np.concatenate([[0], np.cumsum(counts)])
    moment = np.concatenate([[0], np.cumsum(counts * centres)])
    for _ in range(64):
        edges = np.searchsorted(centres, (book[1:] + book[:-1]) / 2)
        edges = np.concatenate([[0], edges, [BINS]])
        inside = mass[edges[1:]] - mass[edges[:-1]]
        new = np.where(inside > 0, (moment[edges[1:]] - moment[edges[:-1]]) / np.maximum(inside, 1e-300), book)
        if np.allclose(new, book, rtol=0, atol=1e-7):
            break
        book = np.sort(new)
    found: NDArray[np.float32] = book.astype(np.float32)
    return found


def codes_of_bins(book: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The nearest entry of each bin, uint8 [:data:`BINS`]."""
    centres = (np.arange(BINS) + 0.5) * (2 / BINS) - 1
    middle = (book[1:].astype(np.float64) + book[:-1]) / 2
    return np.searchsorted(middle, centres).astype(np.uint8)
