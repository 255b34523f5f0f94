"""All rules: importing this registers every family."""

from graphopt.autodiff import (  # noqa: F401
    arithmetic,
    branches,
    convolution,
    elementwise,
    movement,
    normalization,
    pooling,
    products,
    quantization,
    reduction,
    resizing,
)
from graphopt.autodiff.rules import CONSTANT, RULES

__all__ = ["CONSTANT", "RULES"]
