"""What frameworks hand over, the real objects and not their likenesses: graphopt beside each in one interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import DEMO, MODELS, ROOT, python

import graphopt

BEFORE = f"""
import json, sys
sys.path += [{str(ROOT)!r}, {sysconfig.get_path("purelib")!r}]  # graphopt and what it needs, behind the framework's own
import numpy as np
known = np.load({str(DEMO / "evaluation.npz")!r})
images, labels = known["image"][:96], known["label"][:96]
QUICK = dict(time=0, allow_slower=True)
"""

TORCH = """
import torch, graphopt
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(),
                          torch.nn.Linear(288, 10)).eval()
batch = torch.export.Dim("batch")
program = torch.onnx.export(net, (torch.from_numpy(images[:2]),), dynamo=True, verbose=False, input_names=["image"],
                            dynamic_shapes=({0: batch},))
optimized = graphopt.optimize(program, time=0)
loader = DataLoader(TensorDataset(torch.from_numpy(images), torch.from_numpy(labels)), batch_size=16, shuffle=True)
quantized = graphopt.quantize(program, data=loader, **QUICK)
with torch.no_grad():
    theirs = net(torch.from_numpy(images)).numpy()
np.savez("theirs.npz", images=images, logits=theirs)
optimized.save("optimized.onnx")
quantized.save("int8.onnx")
print(json.dumps({"kind": type(program).__name__, "module": type(program).__module__,
                  "samples": quantized.report["data"]["samples"], "nodes": quantized.report["output"]["operators"]}))
"""

TENSORFLOW = """
import tensorflow as tf, graphopt
data = tf.data.Dataset.from_tensor_slices({"image": images}).batch(1).take(64)
made = graphopt.quantize(MODEL, data=data, eval_data={"image": images, "label": labels}, metric="accuracy", **QUICK)
metric = made.report["metric"]
print(json.dumps({"samples": made.report["data"]["samples"], "drop": metric["original"] - metric["candidate"],
                  "nodes": made.report["output"]["operators"]}))
"""


def run_in(environment: str, script: str, **names: object) -> Any:
    """What a script prints, in a framework's interpreter, where graphopt and its packages come last on the path."""
    given = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    done = subprocess.run(
        [python(environment), "-c", BEFORE + given + script], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.framework
def test_onnx_program_and_data_loader(workplace: Path) -> None:
    found = run_in("torch", TORCH)
    assert (found["kind"], found["module"].split(".")[0]) == ("ONNXProgram", "torch")
    assert found["samples"] == 6  # batches of 16
    assert found["nodes"]["QuantizeLinear"] >= 1
    theirs = np.load("theirs.npz")
    for name, least in (("optimized", 100.0), ("int8", 15.0)):
        (ours,) = onnxruntime.InferenceSession(f"{name}.onnx").run(None, {"image": theirs["images"]})
        noise = float(np.square(ours - theirs["logits"]).sum()) + 1e-30
        assert 10 * np.log10(float(np.square(theirs["logits"]).sum()) / noise) > least, name


@pytest.mark.framework
def test_tf_data(workplace: Path) -> None:
    found = run_in("tensorflow", TENSORFLOW, MODEL=str(DEMO / "digits.onnx"))
    assert found["samples"] == 64
    assert found["drop"] < 0.05
    assert found["nodes"]["QuantizeLinear"] > 3


def test_a_calibration_data_reader_of_onnx_runtime(workplace: Path) -> None:
    code = f"""
import numpy as np, warnings
warnings.simplefilter("ignore")
from onnxruntime.quantization import CalibrationDataReader
import graphopt
class Reader(CalibrationDataReader):
    def __init__(self):
        self.rows = iter(np.load({str(DEMO / "calibration.npz")!r})["image"][:20])
    def get_next(self):
        row = next(self.rows, None)
        return None if row is None else {{"image": row[None]}}
made = graphopt.quantize({str(DEMO / "digits.onnx")!r}, data=Reader(), time=0, allow_slower=True)
print(made.report["data"]["samples"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "20\n"


def test_every_form_of_a_model_is_the_same_model() -> None:
    """Path, text, bytes, ModelProto, onnx_ir.Model and gs.Graph; none is touched."""
    import onnx_graphsurgeon as gs
    import onnx_ir as ir

    path = MODELS / "shared.onnx"
    proto = onnx.load(path)
    before = proto.SerializeToString()
    forms = [path, str(path), path.read_bytes(), proto, ir.load(path), gs.import_onnx(onnx.load(path))]
    made = [graphopt.optimize(form, time=0).model for form in forms]
    wanted = {node.op_type for node in made[0].graph.node}
    for model in made:
        assert {node.op_type for node in model.graph.node} == wanted
        assert len(model.graph.node) == len(made[0].graph.node)
    assert proto.SerializeToString() == before
