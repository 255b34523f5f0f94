#!/usr/bin/env python3
"""How long ``graphopt inspect`` takes on very large models, and in what memory.

    python tools/bench/inspection.py [--folder DIR] [--limit SECONDS] [--memory MB]

Two models are made: one with 18 GB of external weights (a sparse file: it takes no room on the disk) in 4,000 tensors,
and one of 12,000 nodes. Each run is a process of its own, timed from start to end, its peak memory the kernel's figure.
(The file cannot be called inspect.py: it would hide Python's own module from every script in this folder.)
``--limit`` and ``--memory`` make the exit code 1 where a run takes more. ``inspect_rivals.py`` asks other tools too.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parent.parent.parent
TENSORS, BYTES = 4000, 18_000_000_000
_TIMEOUT = 120


def external(folder: Path) -> Path:
    """4,000 MatMuls, each with a weight in one data file of 18 GB."""
    width = 1060
    size = BYTES // TENSORS // (4 * width) * 4 * width
    nodes, weights, last = [], [], "x"
    for index in range(TENSORS):
        weight = TensorProto(
            name=f"layers.{index}.weight", data_type=TensorProto.FLOAT, dims=[width, size // 4 // width]
        )
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights.bin"), ("offset", str(index * size)), ("length", str(size))):
            weight.external_data.add(key=key, value=value)
        weights.append(weight)
        nodes.append(helper.make_node("MatMul", [last, weight.name], [f"h{index}"], name=f"/layers.{index}/MatMul"))
        last = f"h{index}"
        if size // 4 // width != width:
            nodes.append(
                helper.make_node(
                    "Slice", [last, "starts", "ends", "axes"], [f"s{index}"], name=f"/layers.{index}/Slice"
                )
            )
            last = f"s{index}"
    for name, number in (("starts", 0), ("ends", width), ("axes", 1)):
        weights.append(numpy_helper.from_array(np.array([number], np.int64), name))
    with (folder / "weights.bin").open("wb") as stream:
        stream.truncate(size * TENSORS)
    return _write(folder / "external.onnx", nodes, last, weights, width)


def many(folder: Path, count: int = 12_000) -> Path:
    """Blocks of eight nodes with weights of their own, shapes computed from the input as exporters write it."""
    rng, width = np.random.default_rng(0), 16
    nodes, weights, last = [], [], "x"
    weights.append(numpy_helper.from_array(np.array([0], np.int64), "zero"))
    weights.append(numpy_helper.from_array(np.array([-1], np.int64), "rest"))
    for index in range(count // 8):
        names = [f"v{index}.{k}" for k in range(8)]
        weights.append(numpy_helper.from_array(rng.standard_normal((width, width)).astype(np.float32), f"w{index}"))
        rows = [
            ("MatMul", [last, f"w{index}"]),
            ("Relu", [names[0]]),
            ("Shape", [names[1]]),
            ("Gather", [names[2], "zero"]),
            ("Concat", [names[3], "rest"]),
            ("Reshape", [names[1], names[4]]),
            ("Add", [names[5], last]),
            ("Erf", [names[6]]),
        ]
        for (op_type, inputs), name in zip(rows, names, strict=True):
            options = {"axis": 0} if op_type in ("Gather", "Concat") else {}
            node = helper.make_node(op_type, inputs, [name], name=f"/encoder/layer.{index}/{op_type}", **options)
            nodes.append(node)
        last = names[7]
    return _write(folder / "many.onnx", nodes, last, weights, width)


def _write(path: Path, nodes: Sequence[onnx.NodeProto], last: str, weights: Sequence[TensorProto], width: int) -> Path:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name in ("x", last)]
    graph = helper.make_graph(nodes, "bench", ends[:1], ends[1:], weights)
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    return path


@dataclass
class Ran:
    """One process; ``mb`` its peak."""

    code: int
    seconds: float
    mb: float
    text: str


def _peak(pid: int) -> float:
    """MB a living process has taken at most. Not ru_maxrss: a child starts with its parent's."""
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text("ascii"))
    except OSError:
        return 0.0
    return int(found[1]) * 1.024 / 1000 if found else 0.0


def measured(command: Sequence[str | Path]) -> Ran:
    """Run ``command`` by itself."""
    with tempfile.TemporaryFile() as stream:
        start = time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), stdout=stream, stderr=stream, cwd=ROOT)
        mb = 0.0
        while True:
            mb = max(mb, _peak(process.pid))
            done, status = os.waitpid(process.pid, os.WNOHANG)
            seconds = time.perf_counter() - start
            if done:
                break
            if seconds > _TIMEOUT:
                process.kill()
            time.sleep(0.005)
        process.returncode = os.waitstatus_to_exitcode(status)
        stream.seek(0)
        return Ran(process.returncode, seconds, mb, stream.read().decode("utf-8", "replace"))


def everything(folder: Path) -> Path:
    """A small model with a bit of everything: a function, dead and repeated weights, QDQ, metadata."""
    rng = np.random.default_rng(0)
    array = rng.standard_normal((8, 8)).astype(np.float32)
    weights = [numpy_helper.from_array(array, name) for name in ("w1", "w2", "spare")]
    weights += [numpy_helper.from_array(np.float32(0.1), "scale"), numpy_helper.from_array(np.int8(0), "zero")]
    weights.append(numpy_helper.from_array(rng.integers(-9, 9, (8, 8)).astype(np.int8), "wq"))
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="first"),
        helper.make_node("MatMul", ["a", "w2"], ["b"], name="second"),
        helper.make_node("Twice", ["b"], ["c"], domain="mine", name="call"),
        helper.make_node("QuantizeLinear", ["c", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["wq", "scale", "zero"], ["w"]),
        helper.make_node("Gemm", ["d", "w"], ["y"], name="third", alpha=0.5),
    ]
    twice = helper.make_function(
        "mine", "Twice", ["p"], ["r"], [helper.make_node("Add", ["p", "p"], ["r"])], [helper.make_opsetid("", 17)]
    )
    path = folder / "everything.onnx"
    _write(path, nodes, "y", weights, 8)
    model = onnx.load(path)
    model.functions.append(twice)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    model.metadata_props.add(key="licence", value="none")
    path.write_bytes(model.SerializeToString())
    return path


def _models(folder: Path) -> dict[str, Path]:
    return {"18 GB external": external(folder), "12,000 nodes": many(folder)}


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to make the models (default: a temporary folder)")
    parser.add_argument("--limit", type=float, help="seconds one run may take")
    parser.add_argument("--memory", type=float, help="MB one run may take")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        models = _models(folder)
        failed = False
        for title in models:
            for more in ([], ["--tree"], ["--ops"], ["--json"]):
                ran = measured([sys.executable, "-m", "graphopt", "inspect", models[title], *more])
                over = ran.code != 0 or ran.seconds > (options.limit or 1e9) or ran.mb > (options.memory or 1e9)
                failed |= over
                mark = "  too much" if over else ""
                print(f"{title:16} {' '.join(more):8} {ran.seconds:6.2f} s {ran.mb:7.0f} MB{mark}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
