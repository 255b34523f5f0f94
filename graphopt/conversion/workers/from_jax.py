"""JAX (and Flax, Equinox): ``module.py:function``, a function of arrays, or one that returns such a function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.conversion.workers.worker import Job


def convert(job: Job) -> None:
    """Export with jax2onnx, run the function itself."""
    job.need("jax", "jax2onnx")
    from importlib.metadata import version

    import jax
    import numpy

    job.framework = f"jax {jax.__version__}"
    job.converter = f"jax2onnx {version('jax2onnx')}"
    import jax2onnx

    function, shapes = _function(job)
    specs = [
        jax.ShapeDtypeStruct(tuple(s["shape"]), s["dtype"])
        if all(isinstance(dim, int) for dim in s["shape"])
        else tuple(s["shape"])
        for s in shapes
    ]
    proto = jax2onnx.to_onnx(function, specs, opset=job.opset, model_name=job.function)
    job.target.write_bytes(proto.SerializeToString())
    taken = len(job.names()[0])
    if taken != len(shapes):
        raise job.Refused(
            f"the function takes {len(shapes)} arrays and the converted model {taken}; jax2onnx dropped one that "
            "nothing depends on: leave it out of the function"
        )
    job.rename(inputs=[s["name"] for s in shapes if s["name"]])
    sizes = [2] * (job.count - 1) + [3]
    for size in sizes:
        if job.data is not None:
            row = int(job.rng.integers(0, len(next(iter(job.data.values())))))
            values = [array[row : row + 1] for array in job.data.values()]
        else:
            values = [
                job.drawn(s["dtype"], tuple(dim if isinstance(dim, int) else size for dim in s["shape"]))
                for s in shapes
            ]
        made = jax.tree_util.tree_leaves(function(*values))
        job.sample(values, [numpy.asarray(value) for value in made])


def _function(job: Job) -> tuple[Any, list[dict[str, Any]]]:
    """The function to convert, and what it takes: ``--input-shape``, or example inputs it came with."""
    found = job.called()
    if job.shapes:
        made = found if not _takes_nothing(found) else found()
        return (made[0] if isinstance(made, tuple) else made), job.shapes
    if not _takes_nothing(found):
        raise job.Refused(
            f"{job.source.name}:{job.function} does not say what it takes; give --input-shape x:1,3,32,32"
        )
    made = found()
    if not isinstance(made, tuple) or len(made) < 2:
        raise job.Refused(
            f"{job.source.name}:{job.function} does not say what it takes; give --input-shape x:1,3,32,32, or return "
            "(function, example inputs)"
        )
    examples = made[1] if isinstance(made[1], (tuple, list)) else made[1:]
    return made[0], [{"name": "", "shape": list(e.shape), "dtype": str(e.dtype)} for e in examples]


def _takes_nothing(function: Any) -> bool:
    import inspect

    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return not [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
