"""A model of another framework -> ONNX, compared with that framework on the way."""

from graphopt.conversion.road import convert

__all__ = ["convert"]
