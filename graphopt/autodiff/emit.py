"""Writing nodes: fresh names, shared constants, and the few operators whose form depends on the operator set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

if TYPE_CHECKING:
    from numpy.typing import NDArray

Shape = tuple[int, ...]

OLDEST = 11
"""Below it Slice and Pad take attributes and Clip has no inputs; upgrade-opset helps."""


class Emitter:
    """Collects nodes and constants. Calling it adds one node: ``e("Mul", a, b)`` is the name of the product.

    ``opset``: of the graph the nodes are for; ``taken``: names in use there, which new ones avoid; ``prefix``: of every
    new name (the values of a branch must not be called like any outside). Python numbers become float32.
    """

    def __init__(self, opset: int, taken: set[str], prefix: str = "") -> None:
        self.opset = opset
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._taken = taken
        self._count = 0
        self._constants: dict[tuple[str, Shape, bytes], str] = {}

    def fresh(self, base: str) -> str:
        """A name nobody has."""
        while True:
            self._count += 1
            name = f"{self.prefix}{base}//{self._count}"
            if name not in self._taken:
                self._taken.add(name)
                return name

    def __call__(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        return self.many(op, 1, *inputs, domain=domain, **attributes)[0]

    def many(self, op: str, outputs: int, *inputs: str, domain: str = "", **attributes: Any) -> list[str]:
        """A node with several outputs."""
        names = [self.fresh(op) for _ in range(outputs)]
        given = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(helper.make_node(op, list(inputs), names, name=names[0], domain=domain, **given))
        return names

    def constant(self, array: Any) -> str:
        """An initializer; equal ones are one."""
        value = np.asarray(array)
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._constants:
            name = self.fresh("constant")
            self.initializers.append(numpy_helper.from_array(value, name))
            self._constants[key] = name
        return self._constants[key]

    def number(self, value: float) -> str:
        """A float32 scalar."""
        return self.constant(np.float32(value))

    def integers(self, values: Sequence[int]) -> str:
        """An int64 vector."""
        return self.constant(np.asarray(list(values), np.int64))

    def zeros(self, shape: Sequence[int]) -> str:
        """float32 zeros, made when they are needed instead of stored."""
        return self("ConstantOfShape", self.integers(shape))

    # arithmetic that rules are full of

    def times(self, a: str, factor: float) -> str:
        """``a * factor``."""
        return a if factor == 1 else self("Mul", a, self.number(factor))

    def mask(self, condition: str, value: str) -> str:
        """``value`` where ``condition`` (bool) holds, else 0. ONNX Runtime's Where takes six times as long."""
        return self("Mul", value, self("Cast", condition, to=onnx.TensorProto.FLOAT))

    def reshape(self, a: str, shape: Sequence[int]) -> str:
        """``a`` with other dims; a dim of 0 is meant as 0."""
        if 0 in shape and self.opset >= 14:
            return self("Reshape", a, self.integers(shape), allowzero=1)
        return self("Reshape", a, self.integers(shape))

    def transpose(self, a: str, perm: Sequence[int]) -> str:
        """``a`` with its axes in another order."""
        return a if list(perm) == list(range(len(perm))) else self("Transpose", a, perm=list(perm))

    def sum(self, a: str, axes: Sequence[int], *, keep: bool) -> str:
        """ReduceSum over ``axes`` (none: nothing to do)."""
        if not axes:
            return a
        if self.opset >= 13:
            return self("ReduceSum", a, self.integers(axes), keepdims=int(keep))
        return self("ReduceSum", a, axes=list(axes), keepdims=int(keep))

    def reduce(self, op: str, a: str, axes: Sequence[int], *, keep: bool = True) -> str:
        """ReduceMean, ReduceMax, ... over ``axes``."""
        if self.opset >= 18:
            return self(op, a, self.integers(axes), keepdims=int(keep))
        return self(op, a, axes=list(axes), keepdims=int(keep))

    def slice(
        self, a: str, axes: Sequence[int], starts: Sequence[int], ends: Sequence[int], steps: Sequence[int]
    ) -> str:
        """Slice with constant bounds."""
        return self("Slice", a, *(self.integers(v) for v in (starts, ends, axes, steps)))

    def pad(self, a: str, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> str:
        """Constant padding; nothing where every amount is 0."""
        if not any(before) and not any(after):
            return a
        return self("Pad", a, self.integers([*before, *after]), self.number(value))

    def concat(self, parts: Sequence[str], axis: int) -> str:
        """The parts along ``axis``."""
        return parts[0] if len(parts) == 1 else self("Concat", *parts, axis=axis)

    def total(self, parts: Sequence[str]) -> str:
        """The sum of tensors of one shape."""
        found = parts[0]
        for part in parts[1:]:
            found = self("Add", found, part)
        return found

    def sum_to(self, a: str, have: Shape, want: Shape) -> str:
        """What broadcasting ``want`` to ``have`` asks of the gradient: summed where a dim was repeated."""
        if have == want:
            return a
        lead = len(have) - len(want)
        axes = [*range(lead), *(lead + i for i, dim in enumerate(want) if dim == 1 and have[lead + i] != 1)]
        summed = self.sum(a, axes, keep=True)
        return self.reshape(summed, want) if lead else summed

    def along(self, a: str, shape: Shape, axis: int, matrix: NDArray[Any]) -> str:
        """A linear map of one axis: ``result[..., j, ...] = sum_i a[..., i, ...] matrix[i, j]``."""
        size_in, size_out = matrix.shape
        factor = size_in // size_out if size_out and size_in % size_out == 0 else 0
        if factor and np.array_equal(matrix, np.repeat(np.eye(size_out), factor, axis=0)):
            split = (*shape[:axis], size_out, factor, *shape[axis + 1 :])  # nearest, a whole number of times larger
            return self.sum(self.reshape(a, split), [axis + 1], keep=False)
        weights = matrix.astype(np.float32)
        if axis == len(shape) - 1:
            return self("MatMul", a, self.constant(weights))
        flat = (math.prod(shape[:axis]), size_in, math.prod(shape[axis + 1 :]))
        product = self("MatMul", self.constant(np.ascontiguousarray(weights.T)), self.reshape(a, flat))
        return self.reshape(product, (*shape[:axis], size_out, *shape[axis + 1 :]))

    def spread(self, a: str, shape: Shape, axis: int, step: int) -> str:
        """``step - 1`` zeros between neighbours along ``axis``; the dim becomes ``(n - 1) * step + 1``."""
        if step == 1 or shape[axis] <= 1:
            return a
        wide = (*shape[: axis + 1], 1, *shape[axis + 1 :])
        after = [0] * len(wide)
        after[axis + 1] = step - 1
        padded = self.pad(self.reshape(a, wide), [0] * len(wide), after)
        joined = self.reshape(padded, (*shape[:axis], shape[axis] * step, *shape[axis + 1 :]))
        return self.slice(joined, [axis], [0], [(shape[axis] - 1) * step + 1], [1])
