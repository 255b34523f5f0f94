"""How a weight lies as a matrix, and how it is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphopt.passes._formats import Format

if TYPE_CHECKING:
    from numpy.typing import NDArray

KERNEL_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class Layout:
    """How a weight is read as a matrix [rows, columns], a scale for each row or block of a row, and how it is stored.

    ``flipped``: its dims are [columns, rows]. ``turned``: it is stored as [columns, rows], as MatMul reads it.
    ``table``: it is stored as [rows, blocks, block] with two 4-bit integers in one byte, half a block apart, so that
    Gather picks rows of it. ``kernel``: it is stored as ONNX Runtime's MatMulNBits reads it, [rows, blocks, bytes],
    int4 with 8 added; whole blocks only.
    """

    form: Format
    shape: tuple[int, ...]
    rows: int
    columns: int
    block: int
    flipped: bool = False
    turned: bool = False
    table: bool = False
    half: bool = False
    kernel: bool = False

    @property
    def blocks(self) -> int:
        return -(-self.columns // self.block)

    @property
    def multiplied(self) -> bool:
        """Whether MatMul reads it through DequantizeLinear, which the runtime makes one kernel of packed integers, or
        that kernel reads it."""
        return (self.turned or self.kernel) and not self.spatial and not self.form.palette and not self.form.whole

    @property
    def spatial(self) -> bool:
        """Whether it is no matrix."""
        return len(self.shape) != 2

    @property
    def stored_bytes(self) -> int:
        """What it will take, scales and zero points included."""
        codes = math.prod(self.shape) * self.form.bits // 8
        if self.form.whole:
            return codes
        scales = self.rows * self.blocks
        pairs = scales if self.table else self.rows * -(-self.blocks // 2) if self.kernel else scales // 2
        zero = pairs if self.form.codes == "uint4" and not self.form.palette else 0
        book = 4 * 2**self.form.bits if self.form.palette else 0  # float32
        return codes + scales * (2 if self.half else 4) + zero + book

    def matrix(self, array: NDArray[Any]) -> NDArray[Any]:
        """The weight as [rows, columns], a view."""
        return array.reshape(self.columns, self.rows).T if self.flipped else array.reshape(self.rows, self.columns)


def fitting_block(columns: int, block: int) -> int:
    """A block of about ``block`` elements that divides a row, so that it can be decoded by a Mul; the whole row where
    that is short, 0 where there is none."""
    if columns <= block * 3 // 2:
        return columns
    return next((size for size in range(block, 15, -1) if columns % size == 0), 0)


def kernel_sizes(layout: Layout) -> dict[str, int]:
    """The attributes of MatMulNBits. Accuracy level 4 (the other factor is rounded to int8) is what ONNX Runtime makes
    of DequantizeLinear by itself; the levels that do not round it take 2 to 7 times as long (docs/compress.md)."""
    return {"K": layout.columns, "N": layout.rows, "bits": 4, "block_size": layout.block, "accuracy_level": 4}
