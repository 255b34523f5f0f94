"""What two models both take: the same inputs, sizes that suit both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import InputError
from graphopt.model import clone, interface

Dims = tuple[int | str | None, ...]


def check_same_inputs(first: ir.Model, second: ir.Model) -> None:
    """Names, types and shapes can be the same ones.

    Raises:
        InputError: naming the input that is another one in B.
    """
    same = "only models that take the same inputs can be compared"
    mine, theirs = ({i.name: i for i in interface(model)[0]} for model in (first, second))
    if mine.keys() != theirs.keys():
        raise InputError(f"A has the inputs {', '.join(mine)} and B {', '.join(theirs)}; {same}")
    for name, spec in mine.items():
        if spec.dtype != theirs[name].dtype or not _fits(theirs[name].shape, spec.shape):
            raise InputError(f"input '{name}' is {spec} in A and {theirs[name]} in B; {same}")


def _fits(asked: Dims | None, given: Dims | None) -> bool:
    """Whether there is a shape that is both."""
    if asked is None or given is None:
        return True
    both = zip(asked, given, strict=False)
    return len(asked) == len(given) and all(x == y or not (isinstance(x, int) and isinstance(y, int)) for x, y in both)


def narrowed(first: ir.Model, second: ir.Model) -> ir.Model:
    """A, with the sizes of symbolic input dims that B fixes: random samples of it can be run by both."""
    theirs = {i.name: i.shape for i in interface(second)[0]}
    copy = clone(first)
    for value in copy.graph.inputs:
        other = theirs.get(value.name or "")
        if value.shape is not None and other is not None:
            dims = zip(value.shape, other, strict=True)
            value.shape = ir.Shape([y if isinstance(y, int) else x for x, y in dims])
    return copy


def taken_by_b(feeds: Iterable[Any], second: ir.Model) -> Iterator[Any]:
    """The samples, which fit A already, as long as B takes their shapes too.

    Raises:
        InputError: at the first that it does not take.
    """
    theirs = interface(second)[0]
    for index, feed in enumerate(feeds):
        for spec in theirs:
            shape = np.shape(feed[spec.name]) if spec.name in feed and spec.dtype is not None else None
            if not _fits(spec.shape, shape):
                raise InputError(
                    f"sample {index}: input '{spec.name}' has shape {list(shape or ())}, and B takes {spec}; give "
                    "--data that both models take"
                )
        yield feed
