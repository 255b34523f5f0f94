"""Reverse-mode differentiation as a graph transformation: ONNX in, ONNX out, run by plain ONNX Runtime.

    concrete = specialize(model, feeds, variables)   # shapes fixed, everything that follows from them folded
    graph = differentiate(concrete, "loss", variables)

Every operator has one rule (its vector-Jacobian product), or is rewritten into operators that have.
"""

from graphopt.autodiff.reverse import Gradients, differentiate, obstacles
from graphopt.autodiff.specialize import Concrete, specialize

__all__ = ["Concrete", "Gradients", "differentiate", "obstacles", "specialize"]
