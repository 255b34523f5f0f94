"""The other way: an ONNX model as ``model.tflite``, by onnx2tf, run in TFLite's interpreter on given inputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.conversion.workers.worker import Job


def convert(job: Job) -> None:
    """Convert with the inputs' shapes as they are, and run what was written."""
    job.need("onnx2tf", "tensorflow", "onnx")
    import numpy
    import onnx2tf
    import onnx2tf.onnx2tf as converter
    import tensorflow

    job.converter = f"onnx2tf {onnx2tf.__version__}"
    job.framework = f"TensorFlow Lite {tensorflow.__version__}"
    # It asks the network for pictures to try the graph on where an input looks like one; any numbers will do.
    converter.download_test_image_data = lambda: numpy.asarray(job.drawn("float32", (20, 128, 128, 3)))
    inputs, outputs = job.names()
    try:
        onnx2tf.convert(
            input_onnx_file_path=str(job.source),
            output_folder_path="made",
            keep_shape_absolutely_input_names=inputs,
            not_use_onnxsim=True,
            output_signaturedefs=True,  # without, it refuses names with a slash at their front
            non_verbose=True,
        )
    except SystemExit as error:
        raise job.Refused("onnx2tf gave up on the model; run again with -v for what it says") from error
    made = sorted(Path("made").glob("*_float32.tflite"))
    if not made:
        raise job.Refused(f"{job.converter} said that it was done and wrote nothing; run again with -v")
    made[0].replace("model.tflite")
    interpreter = tensorflow.lite.Interpreter("model.tflite")
    places = _matched(inputs, interpreter.get_input_details())
    assert job.data is not None
    for index in range(job.count):
        feeds = {name: job.data[f"{index}/{name}"] for name in inputs}
        for name, place in zip(inputs, places, strict=True):
            interpreter.resize_tensor_input(place["index"], feeds[name].shape)
        interpreter.allocate_tensors()
        for name, place in zip(inputs, places, strict=True):
            interpreter.set_tensor(place["index"], feeds[name].astype(place["dtype"]))
        interpreter.invoke()
        found = [interpreter.get_tensor(p["index"]) for p in _matched(outputs, interpreter.get_output_details())]
        job.sample([feeds[name] for name in inputs], found)


def _matched(names: list[str], details: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The interpreter's tensors in the order of the model's: by name where that is clear, else as numbered."""
    found = [[d for d in details if name in d["name"]] for name in names]
    if all(len(some) == 1 for some in found):
        return [some[0] for some in found]
    return sorted(details, key=lambda d: (len(d["name"]), d["name"]))
