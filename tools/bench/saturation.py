"""Where int8 products saturate in ONNX Runtime: native CPU, and an emulated one without VNNI.

    python tools/bench/saturation.py

Dense, grouped and depthwise convolutions with weights that push pairs of products past int16, in the three weight forms
graphopt emits, with the runtime's optimizations off (exact) against on. A second run under ``qemu-x86_64 -cpu Haswell``
(Debian: apt-get install qemu-user) shows a CPU with AVX2 and no VNNI; it is left out where qemu is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS = 32
KINDS = {"dense": 1, "grouped": 4, "depthwise": CHANNELS}
FORMS = {"s8": 127, "s7": 64, "u8": 127}


def model(group: int, form: str) -> bytes:
    """Q -> DQ -> Conv 3x3 (integer weights -> DQ) -> Q -> DQ, mostly positive weights so that pairs add up."""
    rng = np.random.default_rng(0)
    largest = FORMS[form]
    weight = rng.integers(-largest, largest + 1, (CHANNELS, CHANNELS // group, 3, 3))
    weight = np.where(rng.random(weight.shape) < 0.7, np.abs(weight), weight)
    zero = 128 if form == "u8" else 0
    kind: Any = np.uint8 if form == "u8" else np.int8
    constants = {
        "xs": np.float32(1 / 255), "xz": np.uint8(0), "ys": np.float32(0.5 if group == 1 else 0.1), "yz": np.uint8(128),
        "w": (weight + zero).astype(kind), "ws": np.full(CHANNELS, 0.01, np.float32),
        "wz": np.full(CHANNELS, zero, kind),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd"], ["c"], group=group, kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("QuantizeLinear", ["c", "ys", "yz"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "saturation",
        [value("x", TensorProto.FLOAT, [1, CHANNELS, 8, 8])],
        [value("y", TensorProto.FLOAT, [1, CHANNELS, 8, 8])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString())


def sqnr(data: bytes) -> float:
    """dB between optimizations off and on; rounding alone gives about 60 dB."""
    import onnxruntime as ort

    x = (np.random.default_rng(1).random((1, CHANNELS, 8, 8)) ** 0.3).astype(np.float32)
    results = []
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = ort.SessionOptions()
        options.graph_optimization_level, options.intra_op_num_threads = level, 1
        options.log_severity_level = 4
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        results.append(session.run(None, {"x": x})[0])
    error = float(np.square(results[0] - results[1]).sum())
    return 10 * float(np.log10(float(np.square(results[0]).sum()) / max(error, 1e-12)))


def table() -> None:
    """One row per convolution and weight form."""
    for kind, group in KINDS.items():
        for form in FORMS:
            found = sqnr(model(group, form))
            print(f"{kind:<10} {form}  {found:6.1f} dB  {'SATURATES' if found < 50 else 'exact'}", flush=True)


def main() -> int:
    """The native table, then the emulated one."""
    if "--table" in sys.argv:
        table()
        return 0
    print("this CPU")
    table()
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        print("no qemu-x86_64 here: the CPU without VNNI is not emulated")
        return 0
    print("emulated Haswell (AVX2, no VNNI)")
    python = os.path.realpath(sys.executable)
    paths = os.pathsep.join(p for p in sys.path if p.endswith("site-packages"))
    done = subprocess.run(
        [qemu, "-cpu", "Haswell", python, __file__, "--table"],
        env={**os.environ, "PYTHONPATH": paths, "OPENBLAS_CORETYPE": "Haswell"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    print(done.stdout, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
