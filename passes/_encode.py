"""Weights to what is stored of them, a piece at a time and on all cores; nothing of a mapped weight stays in memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.external import mapped_file
from graphopt.pages import let_go
from graphopt.passes._formats import (
    BINS,
    Codes,
    codes_of_bins,
    palette,
    round_rows,
    spread,
)
from graphopt.passes._layout import Layout
from graphopt.spill import Spill

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PIECE = 1 << 18
"""Elements worked on at a time by each thread: about ten arrays of that size nearly fit the processor's cache."""

_SPILLED = 1 << 20
"""Bytes of a mapped weight from which its new form goes to a file too."""

_SPILLED_PART = 1 << 16

_TYPES = {
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "uint4": ir.DataType.UINT4,
    "uint8": ir.DataType.UINT8,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "float32": ir.DataType.FLOAT,
}


Piece = tuple[slice, slice]
"""Rows and columns of a weight's matrix."""


class Unfit(Exception):
    """The weight cannot be stored like this; the message says why."""


@dataclass
class Encoded:
    """A weight as it is stored. ``error`` and ``signal``: sums of squares, of what it lost and of the weight."""

    layout: Layout
    codes: ir.TensorProtocol
    scale: ir.TensorProtocol | None = None
    zero: ir.TensorProtocol | None = None
    book: ir.TensorProtocol | None = None
    error: float = 0.0
    signal: float = 0.0
    refined: bool = False
    """Whether it was rounded to what layers read."""

    @property
    def sqnr(self) -> float:
        """dB; infinite where nothing was lost."""
        return math.inf if self.error == 0 else 10 * math.log10(self.signal / self.error) if self.signal else 0.0


class Encoder:
    """Encodes weights; those whose source is mapped go to ``spill``. ``told``: called with bytes done."""

    def __init__(self, spill: Callable[[], Spill], told: Callable[[int], None], threads: int | None = None) -> None:
        self._spill = spill
        self._told = told
        self._threads = threads or min(os.cpu_count() or 1, 4)

    def encode(
        self,
        tensor: ir.TensorProtocol,
        layout: Layout,
        *,
        fitted: bool = True,
        given: Codes | None = None,
        importance: NDArray[np.float64] | None = None,
    ) -> Encoded:
        """``tensor`` as ``layout`` says.

        Args:
            tensor: any floats.
            layout: how it is read and stored.
            fitted: see :func:`graphopt.passes._formats.round_rows`.
            given: the integers of all rows, worked out already.
            importance: of each column for the rows of each group, float64 [groups, columns], which the entries of a
                palette are fitted by.

        Raises:
            Unfit: it has values that the format does not hold.
        """
        spill = self._spill() if mapped_file(tensor) is not None and tensor.nbytes >= _SPILLED else None
        job = _Job(tensor.numpy(), layout, spill, fitted, given)
        job.importance = importance
        job.book(self._each)
        totals = self._each(job.piece, job.pieces())
        found = job.stored()
        found.error, found.signal = (float(sum(column)) for column in zip(*totals, strict=True))
        return found

    def _each(self, work: Callable[[Piece], Any], pieces: list[Piece]) -> list[Any]:
        if len(pieces) == 1 or self._threads == 1:
            return [self._one(work, piece) for piece in pieces]
        with ThreadPoolExecutor(self._threads) as pool:
            running = [pool.submit(self._one, work, piece) for piece in pieces]
            try:
                return [task.result() for task in running]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _one(self, work: Callable[[Piece], Any], piece: Piece) -> Any:
        found, size = work(piece)
        self._told(size)
        return found


class _Job:
    """One weight on its way."""

    def __init__(
        self, array: NDArray[Any], layout: Layout, spill: Spill | None, fitted: bool, given: Codes | None
    ) -> None:
        self.array, self.layout, self.spill, self.fitted, self.given = array, layout, spill, fitted, given
        self.rows = layout.matrix(array)
        size = math.prod(layout.shape) * layout.form.bits
        self.out = spill.room(size // 8 + size % 8 // 4) if spill is not None else np.zeros(-(-size // 8), np.uint8)
        self.odd: NDArray[Any] | None = None
        if layout.form.bits == 4 and layout.turned and layout.rows % 2:
            self.odd = np.empty((layout.columns, layout.rows), np.uint8)  # pairs then go over the ends of rows
        blocks = layout.blocks
        self.scale = np.empty((layout.rows, blocks), np.float32)
        has_zero = layout.form.codes == "uint4" and not layout.form.palette
        self.zero = np.empty((layout.rows, blocks), np.uint8) if has_zero else None
        self.entries: NDArray[np.float32] | None = None
        self.importance: NDArray[np.float64] | None = None

    @property
    def across(self) -> bool:
        """Whether pieces are some columns of all rows: those lie together where the weight is [columns, rows]."""
        return self.layout.flipped and self.layout.blocks > 1

    def pieces(self) -> list[Piece]:
        """Runs of the weight that are rounded by themselves."""
        rows, columns, block = self.layout.rows, self.layout.columns, self.layout.block
        if self.across:
            step = max(_PIECE // rows // block, 1) * block
            return [(slice(0, rows), slice(i, min(i + step, columns))) for i in range(0, columns, step)]
        step = max(_PIECE // max(columns, 1), 1)
        step += step % 2  # pairs of 4-bit integers must not be cut
        return [(slice(i, min(i + step, rows)), slice(0, columns)) for i in range(0, rows, step)]

    def _read(self, piece: Piece) -> NDArray[np.float32]:
        """A piece in memory, laid out as it comes: whole arrays are then computed along the longer runs."""
        part = self.rows[piece]
        with np.errstate(over="ignore"):
            found = np.array(part, np.float32, order="K")
        if not np.isfinite(found).all():
            raise Unfit("it holds values that are infinite or no numbers")
        if self.across or not self.layout.flipped:
            let_go(part)
        return found

    def book(self, each: Callable[..., list[Any]]) -> None:
        """Of a palette, the entries: from a first look at all rows."""
        if not self.layout.form.palette:
            return

        def look(piece: Piece) -> tuple[Any, int]:
            scale, bins = spread(self._read(piece), self.layout.half)
            counts = np.bincount(bins.reshape(-1), self._matters(piece, scale), BINS)
            return counts, bins.size * self.array.itemsize

        counts = np.asarray(sum(each(look, self.pieces())), np.float64)
        self.entries = palette(counts if counts.any() else np.ones(BINS), 2**self.layout.form.bits)

    def _matters(self, piece: Piece, scale: NDArray[np.float32]) -> NDArray[np.float64]:
        """What an error in the palette's entries costs at each element of a piece, flat."""
        rows, columns = piece
        found = np.square(scale, dtype=np.float64)
        if self.importance is not None:
            group = np.arange(rows.start, rows.stop) // (self.layout.rows // len(self.importance))
            found = found * self.importance[group][:, columns]
        return np.broadcast_to(found, (rows.stop - rows.start, columns.stop - columns.start)).reshape(-1)

    def piece(self, piece: Piece) -> tuple[tuple[float, float], int]:
        """Encode a piece; ((squared error, squared weights), bytes read)."""
        source = self._read(piece)
        form, block = self.layout.form, self.layout.block
        rows, columns = piece
        if form.whole:
            decoded = self._shorter(source, piece)
        elif self.entries is not None:
            scale, bins = spread(source, self.layout.half)
            codes = codes_of_bins(self.entries)[bins]
            self.scale[rows] = scale
            decoded = self.entries[codes] * scale
            self._place(codes, piece)
        else:
            blocks = slice(columns.start // block, -(-columns.stop // block))
            if self.given is not None:
                zero = None if self.given.zero is None else self.given.zero[rows, blocks]
                found = Codes(self.given.codes[piece], self.given.scale[rows, blocks], zero)
            else:
                found = round_rows(source, form, block, fitted=self.fitted, half=self.layout.half)
            self.scale[rows, blocks] = found.scale
            if self.zero is not None and found.zero is not None:
                self.zero[rows, blocks] = found.zero
            decoded = found.decoded(block)
            self._place(found.codes, piece)
        decoded -= source
        return (_energy(decoded), _energy(source)), source.size * self.array.itemsize

    def _shorter(self, source: NDArray[np.float32], piece: Piece) -> NDArray[np.float32]:
        import ml_dtypes

        form, layout = self.layout.form, self.layout
        if form.codes == "float16" and (np.abs(source) > 65504).any():
            raise Unfit("it holds values beyond what float16 can, 65,504")
        kind = np.dtype(np.float16 if form.codes == "float16" else ml_dtypes.bfloat16)
        values = source.astype(kind)
        out = self.out.view(kind).reshape(layout.rows, layout.columns)[piece]
        out[:] = values
        self._written(out)
        return values.astype(np.float32)

    def _place(self, codes: NDArray[Any], piece: Piece) -> None:
        """Write the integers where they belong."""
        layout = self.layout
        rows, columns = piece
        if layout.form.bits == 8:
            whole = self.out.view(codes.dtype)
            out = whole.reshape(layout.columns, layout.rows).T if layout.turned else whole.reshape(layout.rows, -1)
            out[piece] = codes
            self._written(out[piece])
        elif self.odd is not None:
            self.odd[columns, rows] = codes.T.view(np.uint8) & 15
        elif layout.turned:
            low, high = codes[0::2].view(np.uint8) & 15, codes[1::2].view(np.uint8)
            packed = self.out.reshape(layout.columns, layout.rows // 2)[columns, rows.start // 2 : rows.stop // 2]
            packed[:] = (low | (high << 4)).T
            self._written(packed)
        elif layout.kernel:
            codes = codes.view(np.uint8) + np.uint8(8 if layout.form.codes == "int4" else 0)
            packed = self.out.reshape(layout.rows, -1)[rows, columns.start // 2 : columns.stop // 2]
            packed[:] = (codes[:, 0::2] & 15) | (codes[:, 1::2] << 4)
            self._written(packed)
        elif layout.table:
            pairs = codes.view(np.uint8).reshape(len(codes), layout.blocks, 2, layout.block // 2)
            if layout.form.codes == "int4":
                pairs = pairs + np.uint8(8)
            table = self.out.reshape(layout.rows, layout.blocks, layout.block // 2)[rows]
            table[:] = (pairs[:, :, 0] & 15) | (pairs[:, :, 1] << 4)
            self._written(table)
        else:
            first = rows.start * layout.columns // 2
            packed = pack(np.ascontiguousarray(codes).view(np.uint8))
            self.out[first : first + len(packed)] = packed
            self._written(self.out[first : first + len(packed)])

    def _written(self, part: NDArray[Any]) -> None:
        """Where a piece of the file lies together, its pages are not needed any more."""
        together = not self.layout.kernel if self.across else not self.layout.turned
        if self.spill is not None and together:
            let_go(part)

    def stored(self) -> Encoded:
        """The tensors."""
        let_go(self.array)
        layout, form = self.layout, self.layout.form
        if self.odd is not None:
            packed = pack(self.odd)
            self.out[: len(packed)] = packed
        if form.whole:
            shape = layout.shape
        elif layout.table or layout.kernel:
            shape = (layout.rows, layout.blocks, layout.block * form.bits // 8)
        elif layout.turned:
            shape = (layout.columns, layout.rows)
        else:
            shape = (layout.rows, layout.columns)
        dtype = ir.DataType.UINT8 if (layout.table or layout.kernel) and form.bits == 4 else _TYPES[form.codes]
        found = Encoded(layout, self._tensor(self.out, dtype, shape))
        if form.whole:
            return found
        scale = self.scale.astype(np.float16) if layout.half else self.scale
        scale = self._arranged(scale)
        found.scale = self._kept(scale, ir.DataType.FLOAT16 if layout.half else ir.DataType.FLOAT, scale.shape)
        if self.zero is not None:
            zero = self._arranged(self.zero)
            if layout.kernel:
                zero = np.pad(zero, [(0, 0), (0, zero.shape[1] % 2)])
                zero = (zero[:, 0::2] & 15) | (zero[:, 1::2] << 4)
            if layout.table or layout.kernel:
                found.zero = self._kept(zero, ir.DataType.UINT8, zero.shape)
            else:
                found.zero = self._kept(pack(zero), ir.DataType.UINT4, zero.shape)
        if self.entries is not None:
            found.book = ir.tensor(self.entries)
        return found

    def _arranged(self, values: NDArray[Any]) -> NDArray[Any]:
        """Scales or zero points in the order in which they are stored."""
        if self.layout.table:
            return values.reshape(*values.shape, 1)
        return np.ascontiguousarray(values.T if self.layout.turned else values)

    def _kept(self, array: NDArray[Any], dtype: ir.DataType, shape: tuple[int, ...]) -> ir.TensorProtocol:
        """A smaller part of what is stored, in the file too where the rest is and it counts."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if self.spill is not None and data.nbytes >= _SPILLED_PART:
            room = self.spill.room(data.nbytes)
            room[:] = data
            return self.spill.tensor(room, dtype, shape)
        return _in_memory(data, dtype, shape)

    def _tensor(self, data: NDArray[np.uint8], dtype: ir.DataType, shape: tuple[int, ...]) -> ir.TensorProtocol:
        return _in_memory(data, dtype, shape) if self.spill is None else self.spill.tensor(data, dtype, shape)


def _in_memory(data: NDArray[np.uint8], dtype: ir.DataType, shape: tuple[int, ...]) -> ir.TensorProtocol:
    if dtype.bitwidth == 4:
        return ir.PackedTensor(data, dtype, shape=ir.Shape(shape))
    return ir.Tensor(data.view(dtype.numpy()).reshape(shape), dtype=dtype)


def _energy(values: NDArray[np.float32]) -> float:
    flat = values.ravel(order="K")
    with np.errstate(over="ignore"):
        found = float(np.dot(flat, flat))
    return found if np.isfinite(found) else float(np.square(flat, dtype=np.float64).sum())


def pack(codes: NDArray[Any]) -> NDArray[np.uint8]:
    """4-bit integers, two in a byte, the first one in the lower half, as ONNX stores them."""
    flat = codes.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.zeros(1, flat.dtype))
    return np.asarray((flat[0::2] & 15) | (flat[1::2] << 4), np.uint8)
