"""Concrete shapes of every value, at one or two sizes of a model's dynamic dims."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.cost import Shape, shapes
from graphopt.errors import RuntimeFailure
from graphopt.model import interface, to_proto
from graphopt.session import Session

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    Feed = Mapping[str, NDArray[Any]]


def shapes_seen(model: ir.Model, feed: Feed, *, threads: int | None = None) -> dict[str, Shape]:
    """Shapes by value name for ``feed``: as onnx infers them, and where that depends on data, as a run shows them.

    Raises:
        RuntimeFailure: the run was needed and failed.
    """
    import onnx

    known = shapes(to_proto(model), {name: array.shape for name, array in feed.items()})
    tensors = [v for node in model.graph for v in node.outputs if v.name and v.name not in known]
    if not tensors:
        return known
    wanted = {f"graphopt.shape:{v.name}": v.name or "" for v in tensors}
    looking = [onnx.helper.make_node("Shape", [name], [shape]) for shape, name in wanted.items()]
    session = Session(model, optimize=False, threads=threads, taps=list(wanted), outputs=False, sizes=looking)
    found = session.run(feed, list(wanted))
    return known | {name: tuple(int(d) for d in found[shape]) for shape, name in wanted.items()}


def two_sizes(model: ir.Model, feed: Feed, *, threads: int | None = None) -> list[dict[str, Shape]]:
    """:func:`shapes_seen` for ``feed``, and where the model has dynamic dims also for one that is twice as long in
    them; where the model does not run on that, for one twice as long in the first, and failing that for ``feed`` alone.

    Raises:
        RuntimeFailure: the model does not run on ``feed`` although that was needed.
    """
    found = [shapes_seen(model, feed, threads=threads)]
    inputs, _ = interface(model)
    dynamic = {
        (spec.name, axis) for spec in inputs for axis, dim in enumerate(spec.shape or ()) if not isinstance(dim, int)
    }
    for doubled in (dynamic, {item for item in dynamic if item[1] == 0}):
        if not doubled:
            break
        longer = dict(feed)
        for name, axis in doubled & {(n, a) for n, array in feed.items() for a in range(array.ndim)}:
            longer[name] = np.concatenate([longer[name]] * 2, axis)
        try:
            return [*found, shapes_seen(model, longer, threads=threads)]
        except RuntimeFailure:
            continue
    return found
