"""How far two weights are apart: in elements, in bytes, in value; a slice at a time, so that large ones stay mapped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from graphopt.errors import GraphoptError, ModelError
from graphopt.external import shown
from graphopt.numbering import Side
from graphopt.pages import let_go

_SLICE = 2**20
"""Elements compared at a time."""

Array = npt.NDArray[Any]


def type_name(tensor: onnx.TensorProto | onnx.SparseTensorProto) -> str:
    """``float32[3, 4]``."""
    code = tensor.data_type if isinstance(tensor, onnx.TensorProto) else tensor.values.data_type
    sparse = "" if isinstance(tensor, onnx.TensorProto) else "sparse "
    return f"{sparse}{element_type(code)}[{', '.join(map(str, tensor.dims))}]"


def element_type(code: int) -> str:
    """ONNX's name for an element type, numpy's where they differ."""
    try:
        name: str = onnx.TensorProto.DataType.Name(code).lower()
    except ValueError:
        return f"type {code}"
    return {"float": "float32", "double": "float64"}.get(name, name)


def compare_tensors(a: Side, x: Any, b: Side, y: Any) -> dict[str, Any]:
    """How many elements and bytes differ, and the largest difference (``max_abs``).

    None where it cannot be said (other shapes, texts). Elements are compared by their bits where the types are
    equal, by value otherwise; ``max_abs`` is over the elements that are finite in both.

    Raises:
        ModelError: a tensor's data does not fit its type and shape.
    """
    if isinstance(x, onnx.SparseTensorProto) or isinstance(y, onnx.SparseTensorProto):
        if type(x) is not type(y) or a.sparse(x, 0) == b.sparse(y, 0) or a.tensor(x.indices) != b.tensor(y.indices):
            return _unknown(0)  # one dense and one sparse, or other positions
        x, y = x.values, y.values
    elements = int(np.prod(x.dims, dtype=np.int64))
    if list(x.dims) != list(y.dims):
        return _unknown(elements)
    try:
        first, second = a.read(x).numpy().reshape(-1), b.read(y).numpy().reshape(-1)
        return _compare(first, second, x.data_type == y.data_type)
    except GraphoptError:
        raise
    except Exception as error:  # onnx-ir and numpy raise whatever they met
        names = f"tensor '{shown(x.name)}' or '{shown(y.name)}'"
        raise ModelError(f"{names} does not fit its type and shape; export the model again") from error


def _unknown(elements: int) -> dict[str, Any]:
    return {"elements": elements, "elements_differ": None, "bytes_differ": None, "max_abs": None, "not_finite": 0}


def _compare(a: Array, b: Array, same_type: bool) -> dict[str, Any]:
    elements = changed = not_finite = 0
    largest: float | None = 0.0
    in_bytes: int | None = 0 if same_type else None
    for x, y in _slices(a, b):
        elements += x.size
        if x.dtype.kind in "OSU" or y.dtype.kind in "OSU":  # texts
            changed += int(np.sum(x != y))
            largest = in_bytes = None
            continue
        if same_type:
            bits = _bits(x) != _bits(y)
            differ = bits.any(axis=1)
            in_bytes = (in_bytes or 0) + int(bits.sum())
        else:
            differ = np.array([]) if not x.size else ~_equal(x, y)
        changed += int(differ.sum())
        if differ.any():
            gap = _distance(x[differ], y[differ])
            finite = np.isfinite(gap)
            not_finite += int(np.sum(~finite))
            largest = max(largest or 0.0, float(gap[finite].max(initial=0.0)))
    return {
        "elements": elements,
        "elements_differ": changed,
        "bytes_differ": in_bytes,
        "max_abs": largest,
        "not_finite": not_finite,
    }


def _slices(a: Array, b: Array) -> Iterator[tuple[Array, Array]]:
    for start in range(0, a.size, _SLICE):
        x, y = a[start : start + _SLICE], b[start : start + _SLICE]
        yield x, y
        let_go(x)
        let_go(y)


def _bits(array: Array) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).view(np.uint8).reshape(array.size, -1)


def _wide(array: Array) -> Array:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _equal(x: Array, y: Array) -> npt.NDArray[np.bool_]:
    first, second = _wide(x), _wide(y)
    same: npt.NDArray[np.bool_] = (first == second) | (np.isnan(first) & np.isnan(second))
    return same


def _distance(x: Array, y: Array) -> npt.NDArray[np.float64]:
    """Absolute differences; exact for integers that float64 cannot hold."""
    with np.errstate(invalid="ignore", over="ignore"):
        if x.dtype.kind in "iu" and y.dtype.kind in "iu" and max(x.dtype.itemsize, y.dtype.itemsize) == 8:
            return np.array([float(abs(int(p) - int(q))) for p, q in zip(x, y, strict=True)])
        return np.asarray(np.abs(_wide(x) - _wide(y)), np.float64)
