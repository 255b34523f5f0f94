"""PaddlePaddle: ``inference.json`` or ``.pdmodel`` with its ``.pdiparams`` beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.conversion.workers.worker import Job


def convert(job: Job) -> None:
    """Export with paddle2onnx, run Paddle's own predictor."""
    job.need("paddle", "paddle2onnx")
    import paddle
    import paddle2onnx

    job.framework = f"paddlepaddle {paddle.__version__}"
    job.converter = f"paddle2onnx {getattr(paddle2onnx, '__version__', '2')}"
    weights = job.source.with_suffix(".pdiparams")
    if not weights.is_file():
        raise job.Refused(f"no weights beside {job.source.name}; put {weights.name} there")
    paddle2onnx.export(
        str(job.source),
        str(weights),
        str(job.target),
        opset_version=job.opset,
        auto_upgrade_opset=True,
        verbose=False,
        enable_onnx_checker=True,
        optimize_tool="None",  # by default it may run pip by itself
    )
    if not job.target.is_file():
        raise job.Refused(f"paddle2onnx wrote nothing for {job.source.name}; its operators may have no converter")
    config = paddle.inference.Config(str(job.source), str(weights))
    config.disable_gpu()
    config.disable_glog_info()
    predictor = paddle.inference.create_predictor(config)
    taken, given = predictor.get_input_names(), predictor.get_output_names()
    names = job.names()
    order = taken if set(taken) != set(names[0]) else names[0]
    for size in (*[1] * (job.count - 1), 2):
        values = [_value(job, k, name, size) for k, name in enumerate(order)]
        for name, value in zip(order, values, strict=True):
            predictor.get_input_handle(name).copy_from_cpu(value)
        predictor.run()
        outputs = given if set(given) != set(names[1]) else names[1]
        job.sample(values, [predictor.get_output_handle(name).copy_to_cpu() for name in outputs])


def _value(job: Job, position: int, name: str, size: int) -> Any:
    """Of the shape that the converted model declares, or ``--input-shape``."""
    import numpy
    import onnx

    if job.data is not None:
        array = job.data.get(name)
        if array is None:
            raise job.Refused(f"--data has no '{name}'; its keys must be the inputs")
        row = int(job.rng.integers(0, len(array)))
        return array[row : row + 1]
    kind = onnx.load(str(job.target), load_external_data=False).graph.input[position].type.tensor_type
    dtype = numpy.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    asked = next(
        (s["shape"] for k, s in enumerate(job.shapes) if s["name"] == name or (not s["name"] and k == position)), None
    )
    dims: list[Any] = asked or [
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else "?" for d in kind.shape.dim
    ]
    if any(isinstance(dim, str) for dim in dims[1:]):
        raise job.Refused(f"input '{name}' has free dims; give their sizes: --input-shape {name}:N,3,224,224")
    shape = tuple(dim if isinstance(dim, int) else size for dim in dims)
    return job.drawn(dtype, shape, high=8)
