"""Tensors inside the file: do their data, dims and type agree?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from graphopt.errors import ModelError
from graphopt.external import shown, tensor_bytes

if TYPE_CHECKING:
    import onnx

MAX_RANK = 64
"""Dims an array can have in numpy, through which all data goes."""

_MAX_ELEMENTS = 2**60

_FIELDS = {
    "FLOAT": "float_data",
    "COMPLEX64": "float_data",
    "DOUBLE": "double_data",
    "COMPLEX128": "double_data",
    "INT64": "int64_data",
    "UINT32": "uint64_data",
    "UINT64": "uint64_data",
    "STRING": "string_data",
}
"""Where numbers of a type stand that are not raw; of all others in ``int32_data``."""


def check_inline(tensor: onnx.TensorProto) -> None:
    """Refuse a tensor inside the file whose data are fewer or more than its dims say, or more than an array can have.

    Raises:
        ModelError: naming the tensor.
    """
    import onnx

    if tensor.data_location == onnx.TensorProto.EXTERNAL or not tensor.ByteSize():
        return
    name = shown(tensor.name) or "(unnamed)"
    if len(tensor.dims) > MAX_RANK or math.prod(max(d, 1) for d in tensor.dims) > _MAX_ELEMENTS:
        raise ModelError(
            f"tensor '{name}' has the shape {shown(str(list(tensor.dims)))}, which no array can have; "
            "export the model again"
        )
    if not tensor.HasField("raw_data"):
        _check_typed(tensor, name)
        return
    needed, given = tensor_bytes(tensor, name), len(tensor.raw_data)
    if needed != given:
        raise ModelError(
            f"tensor '{name}' holds {given} bytes but its shape {shown(str(list(tensor.dims)))} needs {needed}; "
            "export the model again"
        )


def _check_typed(tensor: onnx.TensorProto, name: str) -> None:
    """The same for numbers that stand one by one in the field of their type."""
    import onnx_ir as ir

    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        dtype = ir.DataType.UNDEFINED
    if dtype == ir.DataType.UNDEFINED:
        raise ModelError(f"tensor '{name}' has no type that is known ({tensor.data_type}); export the model again")
    field = _FIELDS.get(dtype.name, "int32_data")
    given = len(getattr(tensor, field))
    if dtype.is_string():
        needed = math.prod(tensor.dims)
    else:
        words = 2 if dtype.name.startswith("COMPLEX") else 1
        packed = dtype.bitwidth < 8  # of those, as many share an entry as fit into a byte
        needed = tensor_bytes(tensor, name) if packed else math.prod(tensor.dims) * words
    if given != needed or min(tensor.dims, default=1) < 0:
        raise ModelError(
            f"tensor '{name}' holds {given} numbers but its shape {shown(str(list(tensor.dims)))} needs {needed}; "
            "export the model again"
        )
