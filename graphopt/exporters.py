"""What exporters return and is no ``ModelProto``: ``torch.onnx.ONNXProgram``. Nothing of theirs is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graphopt.errors import InputError
from graphopt.model import register_loader

if TYPE_CHECKING:
    import onnx


def to_model_proto(exported: Any) -> onnx.ModelProto:
    """What :func:`graphopt.model.load` does with an object of PyTorch's.

    Raises:
        InputError: it is none that holds an ONNX model.
    """
    import onnx

    proto = getattr(exported, "model_proto", None)
    if isinstance(proto, onnx.ModelProto):
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        return copy
    kind = type(exported).__name__
    raise InputError(
        f"a {kind} of PyTorch is no ONNX model yet; export it (torch.onnx.export(module, inputs, dynamo=True)) and "
        "give what that returns, or use graphopt.convert('net.py:make')"
    )


register_loader("torch", to_model_proto)
