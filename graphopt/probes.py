"""Inputs that ordinary samples do not bring: zeros of both signs, halves, ties, negatives, large values, NaN, Inf.

A rewrite that is right on N(0, 1) may be wrong there: x * 0 is no 0 where x is infinite, a bound of 6 is never met, the
order of equal values is not seen. What decides about shapes or repetitions is left as it was, so that nothing grows
past all bounds or runs for ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.bounds import input_bounds
from graphopt.graph import is_op, nodes
from graphopt.model import ValueSpec, interface
from graphopt.validation import random_feeds

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    Feed = dict[str, NDArray[Any]]

EDGES = (0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1.5, -1.5, 2.0, -2.0, 3.0, -3.0, 7.0, -7.0, 20.5, -20.5, 300.0, -300.0)
"""Planted among ordinary values. When noise is measured they stay where they are: beside them is something else."""

_SHARE = 0.5  # of the elements are edges
_INTEGERS = 20  # integers are drawn up to this, both ways; bytes from their whole range
_ELEMENTS = 128  # small inputs are repeated along the batch until they have so many
_MOST_ROWS = 64

_SHAPED = {
    **dict.fromkeys(("Expand", "Reshape", "Resize", "Upsample", "Tile", "Pad", "OneHot", "Slice", "Split"), 1),
    **dict.fromkeys(("Unsqueeze", "Squeeze", "TopK", "CenterCropPad", "AffineGrid"), 1),
    **dict.fromkeys(("Range", "ConstantOfShape", "NonZero", "Compress", "Unique", "Trilu", "Bernoulli"), 0),
}
"""Operators whose inputs from this one on decide how large the result is."""


def probes(
    model: ir.Model, other_than: Mapping[str, NDArray[Any]], *, seed: int, size: int | None = None
) -> tuple[list[Feed], list[Feed]]:
    """Two lists of feeds, each in the order to try them until the model runs on one: edges, and NaN and infinities.

    ``other_than`` is a feed that was tried: what is one boolean there is the other here. ``size`` is that of symbolic
    dims (see :func:`graphopt.validation.random_feeds`). Both lists are empty for a model with loops, or without inputs
    to vary.

    Raises:
        InputError: an input cannot be drawn.
    """
    if any(is_op(node, "Loop") for node in nodes(model)):
        return [], []
    inputs, _ = interface(model)
    fixed = _structural(model)
    free = [spec for spec in inputs if spec.name not in fixed and spec.dtype is not None]
    base = random_feeds(model, 1, seed=seed, batch=_rows(free, size or 8), size=size)[0]
    base |= {k: v for k, v in other_than.items() if v.dtype.kind == "b" and v.size == 1 and base[k].shape == v.shape}
    rng = np.random.default_rng([seed, 1])
    bounds = input_bounds(model, inputs)
    varied = {spec.name: _edges(rng, base[spec.name], bounds.get(spec.name)) for spec in free}
    floats = {name for name, array in base.items() if array.dtype.kind == "f"}
    edges = [base | varied, base | {k: v for k, v in varied.items() if k in floats}]
    odd = {k: _odd(rng, base[k]) for k in varied if k in floats and k not in bounds}
    return (edges if varied else []), ([base | odd] if odd else [])


def _rows(inputs: Sequence[ValueSpec], size: int) -> int | None:
    """A batch large enough for every edge to be met; None where one row is."""
    rows = 1
    for spec in inputs:
        if spec.shape and not isinstance(spec.shape[0], int):
            known = int(np.prod([d if isinstance(d, int) else size for d in spec.shape[1:]]))
            rows = max(rows, -(-_ELEMENTS // max(known, 1)))
    return min(rows, _MOST_ROWS) if rows > 1 else None


def _edges(rng: np.random.Generator, array: NDArray[Any], bounds: tuple[float, float] | None) -> NDArray[Any]:
    kind = array.dtype.kind
    if kind == "b":
        return np.asarray(~array)
    if kind in "iu":
        return _integers(rng, array, bounds)
    if kind != "f" or bounds is not None:  # masks stay masks
        return array
    planted = np.resize(rng.permutation(np.asarray(EDGES)), array.size)
    rng.shuffle(planted)
    where = rng.permutation(array.size) < max(1, round(_SHARE * array.size))
    return np.where(where.reshape(array.shape), planted.reshape(array.shape).astype(array.dtype), array)


def _integers(rng: np.random.Generator, array: NDArray[Any], bounds: tuple[float, float] | None) -> NDArray[Any]:
    """Both signs where the type has them; an index into a table may count from its end."""
    if bounds is not None:
        low, high = int(bounds[0]), int(bounds[1])
        if (low, high) == (0, 1) or low > 0 or array.dtype.kind == "u":
            return array
        low = -high - 1
    elif array.dtype.itemsize == 1:
        low, high = int(np.iinfo(array.dtype).min), int(np.iinfo(array.dtype).max)
    else:
        low, high = (0 if array.dtype.kind == "u" else -_INTEGERS), _INTEGERS
    return rng.integers(low, high, array.shape, endpoint=True).astype(array.dtype)


def _odd(rng: np.random.Generator, array: NDArray[Any]) -> NDArray[Any]:
    """NaN and both infinities at one place in sixteen each, at least one."""
    changed = array.copy()
    flat = changed.reshape(-1)
    places = rng.permutation(flat.size)
    each = max(1, flat.size // 16)
    for index, value in enumerate((np.nan, np.inf, -np.inf)):
        flat[places[index * each : (index + 1) * each]] = value
    return changed


def _structural(model: ir.Model) -> set[str]:
    """The inputs whose numbers decide about shapes, not only about values."""
    stack: list[ir.Value | None] = []
    for node in nodes(model):
        start = _SHAPED.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if start is not None:
            stack += node.inputs[start:]
    seen: set[ir.Value] = set()
    while stack:
        value = stack.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        producer = value.producer()
        if producer is not None and not is_op(producer, "Shape", "Size"):
            stack += producer.inputs
    return {value.name or "" for value in seen if value.is_graph_input()}


def still(feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.bool_]]:
    """Which elements stay where they are when noise is measured: the next float after minus infinity is finite."""
    edges = {k: np.isin(v, np.asarray(EDGES, v.dtype)) for k, v in feed.items() if v.dtype.kind == "f"}
    return {k: where | ~np.isfinite(feed[k]) for k, where in edges.items()}
