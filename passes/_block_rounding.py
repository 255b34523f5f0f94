"""Rounding compressed weights to what the layers that read them ask for, on H, where that holds on other inputs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.gram import Seen
from graphopt.linear import Form
from graphopt.passes._formats import Codes, round_rows
from graphopt.passes._layout import Layout
from graphopt.passes._rounding import round_steps_on_gram


def fits(form: Form, layout: Layout) -> bool:
    """Whether the layer reads the weight's rows as its outputs, column by column."""
    return (
        form.kind in ("gemm", "gemm-t", "conv")
        and not form.batch
        and form.width == layout.columns
        and layout.rows % form.groups == 0
        and not layout.table
    )


def importance(seen: list[Seen]) -> np.ndarray:
    """How much an error in each column of a weight's rows costs the outputs of all layers that share it, as far as
    columns can be told apart: the diagonal of H, float64[groups, columns]."""
    gram = sum(one.moments.second_moment for one in seen)
    return np.diagonal(np.asarray(gram), axis1=1, axis2=2)


def rounded_for_outputs(tensor: ir.TensorProtocol, layout: Layout, seen: list[Seen]) -> Codes | None:
    """The integers that leave least noise in the outputs of all layers that share the weight; None where those to
    nearest leave less of it on the inputs held back, or the weight is not finite.

    Scales and zero points are those of the fitted ranges: that a block's integers are chosen for each other, and for
    those of other blocks, matters more than its scale (GPTQ, then coordinate descent: Frantar et al. 2022).
    """
    rows = np.array(layout.matrix(tensor.numpy()), np.float32)
    if not np.isfinite(rows).all():
        return None
    nearest = round_rows(rows, layout.form, layout.block, fitted=layout.form.bits == 4, half=layout.half)
    groups = len(seen[0].moments.gram)
    shape = (groups, layout.rows // groups, layout.columns)

    def spread(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, layout.block, axis=1)[:, : layout.columns].astype(np.float64).reshape(shape)

    zero = np.zeros_like(nearest.scale) if nearest.zero is None else nearest.zero
    low, high = (spread(bound - zero.astype(np.float64)) for bound in layout.form.bounds)
    gram = sum(one.moments.second_moment for one in seen)
    matrix = rows.astype(np.float64).reshape(shape)
    integers = round_steps_on_gram(matrix, np.asarray(gram), spread(nearest.scale), low, high)
    codes = (integers + spread(zero)).reshape(rows.shape).astype(nearest.codes.dtype)
    found = Codes(codes, nearest.scale, nearest.zero)

    def noise(candidate: Codes) -> float:
        error = (candidate.decoded(layout.block) - rows).astype(np.float64).reshape(shape)
        return sum(float(np.square(np.matmul(error, one.held.astype(np.float64))).sum()) for one in seen)

    return found if noise(found) < noise(nearest) else None
