"""The other way: an ONNX model as OpenVINO IR (``model.xml`` and ``model.bin``), run in OpenVINO on given inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.conversion.workers.worker import Job


def convert(job: Job) -> None:
    """Read ``model.onnx``, save the IR with its weights as they are, run it from the files that were written."""
    job.need("openvino", "onnx")
    import openvino

    job.framework = job.converter = f"openvino {openvino.__version__.split('-')[0]}"
    model = openvino.convert_model(str(job.source))
    inputs, outputs = job.names()
    openvino.save_model(model, "model.xml", compress_to_fp16=False)
    core = openvino.Core()
    written = core.read_model("model.xml")
    compiled = core.compile_model(written, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert job.data is not None
    for index in range(job.count):
        feeds = {name: job.data[f"{index}/{name}"] for name in inputs}
        made: Any = compiled([_input(compiled, k, name, feeds) for k, name in enumerate(inputs)])
        job.sample([feeds[name] for name in inputs], [made[k] for k in range(len(outputs))])
    if any(op.get_type_name() == "FakeQuantize" for op in written.get_ops()):
        job.notes.append("quantized layers are there as FakeQuantize, which OpenVINO runs in int8 where the CPU has it")


def _input(compiled: Any, position: int, name: str, feeds: dict[str, Any]) -> Any:
    """OpenVINO keeps the order of the inputs; names are checked, since it may drop one that nothing depends on."""
    known = compiled.inputs[position].get_names()
    return feeds[name if name in known or not known else next(iter(known & set(feeds)), name)]
