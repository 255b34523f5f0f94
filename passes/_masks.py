"""Which connections of a layer go, and what the others become: masks and the OBS update on H.

A layer's squared error is ``tr(E H E^T)`` with ``E = W~ - W``. Columns are walked through in order, in blocks; in each
block the weights whose end costs least (``w^2 / U_jj^2``, U the upper Cholesky factor of the inverse of H) become zero,
and what that does to the output is spread over the columns still ahead (SparseGPT, Frantar and Alistarh 2023, arXiv
2301.00774, after OBS, Hassibi 1993). Then the weights that are left are settled by coordinate descent on the same
quadratic, which never raises it. Without H: the smallest weights go, and the others stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphopt.gram import mean_diagonal
from graphopt.passes._rounding import DAMPING, inverse_factor

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_BLOCK = 128  # columns in which a share of zeros is chosen together
_SETTLE = 3  # sweeps of coordinate descent


@dataclass(frozen=True)
class Pattern:
    """Which zeros: a ``share`` of a layer's weights, wherever they are, or (``of`` not 0) ``zeros`` in every ``of``
    neighbours along the inputs."""

    share: float
    zeros: int = 0
    of: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """``0.5``, or ``2:4``: two of every four stay.

        Raises:
            ValueError: it is neither.
        """
        kept, colon, of = text.partition(":")
        try:
            if colon:
                left, width = int(kept), int(of)
                if 0 < left < width <= 32:
                    return cls(1 - left / width, width - left, width)
            elif 0 < float(text) < 1:
                return cls(float(text))
        except ValueError:
            pass
        raise ValueError(
            f"sparsity is '{text}'; give the share of zeros, 0.5, or how many of how many neighbours stay, 2:4"
        )


def smallest(scores: Array, pattern: Pattern, run: int | None = None) -> Mask:
    """True where a weight goes: the smallest of ``scores``, [..., outputs, K]; of every ``of`` neighbours (counted anew
    after ``run`` columns), or of each [outputs, K] together."""
    if pattern.of:
        return _neighbours(scores.reshape(*scores.shape[:-1], -1, run or scores.shape[-1]), pattern).reshape(
            scores.shape
        )
    flat = scores.reshape(*scores.shape[:-2], -1)
    count = round(pattern.share * flat.shape[-1])
    gone = np.zeros(flat.shape, np.bool_)
    if count:
        np.put_along_axis(gone, np.argpartition(flat, count - 1, axis=-1)[..., :count], True, axis=-1)
    return gone.reshape(scores.shape)


def _neighbours(scores: Array, pattern: Pattern) -> Mask:
    """A last part of fewer than ``of`` inputs counts as filled up with zeros."""
    width = scores.shape[-1]
    missing = -width % pattern.of
    filled = np.concatenate([scores, np.full((*scores.shape[:-1], missing), -1.0)], axis=-1)
    parts = filled.reshape(*scores.shape[:-1], -1, pattern.of)
    gone = np.zeros(parts.shape, np.bool_)
    np.put_along_axis(gone, np.argsort(parts, axis=-1, kind="stable")[..., : pattern.zeros], True, axis=-1)
    return gone.reshape(filled.shape)[..., :width]


def sparse_on_gram(matrix: Array, gram: Array, pattern: Pattern, run: int) -> tuple[Array, Mask]:
    """(W~ with its zeros, where they are), both [groups, outputs, K], for ``matrix`` W and ``gram`` H [groups, K, K].

    ``run``: neighbours are counted anew after so many columns (K / ``run`` places of a kernel, each with all inputs).

    Raises:
        LinAlgError: H cannot be factored.
    """
    damped = gram + DAMPING * mean_diagonal(gram)[:, None, None] * np.eye(gram.shape[1])
    upper = inverse_factor(damped)
    diagonal = np.diagonal(upper, axis1=1, axis2=2)
    left, gone = matrix.copy(), np.zeros(matrix.shape, np.bool_)
    for block in _blocks(matrix.shape[2], run, pattern.of):
        begin, end = block[0].start, block[-1].stop
        errors = np.zeros((*matrix.shape[:2], end - begin))
        for part in block:
            gone[..., part] = smallest((left[..., part] / diagonal[:, None, part]) ** 2, pattern)
            for j in range(part.start, part.stop):
                error = np.where(gone[..., j], left[..., j], 0.0) / diagonal[:, None, j]
                left[..., j + 1 : end] -= error[..., None] * upper[:, None, j, j + 1 : end]
                errors[..., j - begin] = error
        left[..., end:] -= np.matmul(errors, upper[:, begin:end, end:])
    return settled(np.where(gone, 0.0, left), matrix, damped, gone), gone


def _blocks(width: int, run: int, of: int) -> list[list[slice]]:
    """Columns in blocks whose effect on the rest is applied together, each of the parts in which zeros are chosen."""
    if not of:
        return [[slice(begin, min(begin + _BLOCK, width))] for begin in range(0, width, _BLOCK)]
    blocks: list[list[slice]] = [[]]
    for start in range(0, width, run):
        for begin in range(start, start + run, of):
            if blocks[-1] and begin - blocks[-1][0].start >= _BLOCK:
                blocks.append([])
            blocks[-1].append(slice(begin, min(begin + of, start + run)))
    return blocks


def settled(start: Array, matrix: Array, damped: Array, gone: Mask) -> Array:
    """What is left of ``start`` moved towards the least ``e H e^T``, one column after the other; zeros stay."""
    found = start.copy()
    slope = np.matmul(found - matrix, damped)
    inverse = 1 / np.diagonal(damped, axis1=1, axis2=2)
    for _ in range(_SETTLE):
        for begin in range(0, matrix.shape[2], _BLOCK):
            end = min(begin + _BLOCK, matrix.shape[2])
            near, moved = slope[..., begin:end].copy(), np.zeros((*matrix.shape[:2], end - begin))
            for j in range(begin, end):
                step = np.where(gone[..., j], 0.0, -near[..., j - begin] * inverse[:, j, None])
                moved[..., j - begin] = step
                near += step[..., None] * damped[:, None, j, begin:end]
            found[..., begin:end] += moved
            slope += np.matmul(moved, damped[:, begin:end])
    return found
