#!/usr/bin/env python3
"""How long ``graphopt inspect`` takes on very large models, in what memory, and what other tools tell of the same ones.

    python tools/bench/inspection.py [--folder DIR] [--limit SECONDS] [--memory MB] [--rivals PYTHON]

Two models are made: one with 18 GB of external weights (a sparse file: it takes no room on the disk) in 4,000 tensors,
and one of 12,000 nodes. Each run is a process of its own, timed from start to end, its peak memory the kernel's figure.
(The file cannot be called inspect.py: it would hide Python's own module from every script in this folder.)
``--limit`` and ``--memory`` make the exit code 1 where a run takes more. ``--rivals`` names a Python that has any of
polygraphy, onnxslim and onnx-tool (make one: ``python -m venv /tmp/rivals; /tmp/rivals/bin/pip install ...``).
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
MODEL = "MODEL"


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


def measured(command: Sequence[str | Path]) -> Ran:
    """Run ``command`` by itself."""
    with tempfile.TemporaryFile() as stream:
        start = time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), stdout=stream, stderr=stream, cwd=ROOT)
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            seconds = time.perf_counter() - start
            if done:
                break
            if seconds > _TIMEOUT:
                process.kill()
            time.sleep(0.005)
        process.returncode = os.waitstatus_to_exitcode(status)
        stream.seek(0)
        mb = usage.ru_maxrss / 1000
        return Ran(process.returncode, seconds, mb, stream.read().decode("utf-8", "replace"))


ASKED: dict[str, tuple[str, str, str, str]] = {
    "inputs and outputs": (r"^input ", r"Graph Input", r"IN: ", ""),
    "symbolic dims": (r"\[batch", r"'batch'", r"'batch'", ""),
    "opset": (r"^opsets", r"ONNX Opset", r"Op Set", ""),
    "producer": (r"^producer", "", "", ""),
    "how many of each operator": (r"^operators .*\d MatMul", "", r"\| +MatMul +\| +\d", ""),
    "parameters": (r"^parameters", "", "", r"Params"),
    "bytes of weights by type": (r"^  by type", "", "", ""),
    "MACs": (r"^MACs +\d", "", "", r"Forward_MACs"),
    "MACs with unknown operators": (r"^MACs .*\?", "", "", r"MysteryOp"),
    "peak of activations": (r"^activations +\d", "", "", ""),
    "largest tensors": (r"^largest tensors", "", "", ""),
    "dynamic dims, listed": (r"^dynamic dims", "", "", ""),
    "duplicate weights": (r"^  duplicates +\d", "", "", ""),
    "dead weights and nodes": (r"^  dead +\d", "", "", ""),
    "QDQ coverage": (r"^quantized +\d", "", "", ""),
    "functions": (r"^functions +mine::", r"Function", r"Function", r"Function"),
    "bodies of If and Loop": (r"in \d+ graphs", r"Subgraph", "", ""),
    "metadata": (r"^metadata", r"Metadata", r"Metadata", ""),
    "each node's inputs and attributes": (r"^  attributes", r"Node \d+ .*\[Op: ", "", ""),
    "cost of each operator": (r"^operator +nodes +MACs", "", "", r"FPercent"),
    "cost of each module": (r"^module +nodes +MACs", "", "", ""),
    "values of weights": (r"^  values: ", r"\| Values:", "", ""),
}
"""What one wants to know -> what stands in the output of graphopt, polygraphy, onnxslim, onnx-tool where it is told."""

_ONNX_TOOL = """\
import sys, onnx, numpy, onnx_tool
m = onnx.load(sys.argv[1], load_external_data=False)
stored = {t.name for t in m.graph.initializer}
feeds = {
    v.name: numpy.zeros(
        [d.dim_value or 1 for d in v.type.tensor_type.shape.dim],
        onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type),
    )
    for v in m.graph.input
    if v.name not in stored
}
onnx_tool.model_profile(sys.argv[1], dynamic_shapes=feeds)
"""
"""It wants a size for every dim: 1, as graphopt counts them."""

Commands = list[list[str | Path]]


def rivals(python: Path) -> dict[str, Commands]:
    """Tool -> its commands; MODEL stands for the path."""
    folder = python.absolute().parent
    ours: list[str | Path] = [sys.executable, "-m", "graphopt", "inspect", MODEL]
    found: dict[str, Commands] = {
        "graphopt": [ours, [*ours, "--ops"], [*ours, "--tree"], [*ours, "--node", "y"], [*ours, "--node", "w1"]],
        "polygraphy": [[folder / "polygraphy", "inspect", "model", MODEL, "--show", "layers", "attrs", "weights"]],
        "onnxslim": [[folder / "onnxslim", "--inspect", MODEL]],
        "onnx-tool": [[python, "-c", _ONNX_TOOL, MODEL]],
    }
    return {name: commands for name, commands in found.items() if Path(commands[0][0]).exists()}


def everything(folder: Path) -> Path:
    """A small model with a bit of everything: a function, dead and repeated weights, QDQ, metadata."""
    rng = np.random.default_rng(0)
    array = rng.standard_normal((8, 8)).astype(np.float32)
    weights = [numpy_helper.from_array(array, name) for name in ("w1", "w2", "unused")]
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
    found = {"18 GB external": external(folder), "12,000 nodes": many(folder), "everything": everything(folder)}
    for name in ("encoder", "control", "custom", "shared"):
        found[name] = ROOT / "fixtures" / "models" / f"{name}.onnx"
    return found


def _told(tools: dict[str, Commands], models: dict[str, Path]) -> None:
    texts: dict[str, list[str]] = {name: [] for name in tools}
    print("\n| model | " + " | ".join(tools) + " |\n| --- |" + " --- |" * len(tools))
    for title, path in models.items():
        cells = []
        for name, commands in tools.items():
            ran = measured([path if part == MODEL else part for part in commands[0]])
            texts[name].append(ran.text if ran.code == 0 else "")
            why = (ran.text.strip().splitlines() or ["killed"])[-1][:60].replace("|", "/")
            cells.append(f"{ran.seconds:.1f} s, {ran.mb:.0f} MB" if ran.code == 0 else f"fails: {why}")
            if title == "everything":
                others = [[path if part == MODEL else part for part in command] for command in commands[1:]]
                texts[name] += [measured(command).text for command in others]
        print(f"| {title} | " + " | ".join(cells) + " |", flush=True)
    order = ("graphopt", "polygraphy", "onnxslim", "onnx-tool")
    print("\n| told | " + " | ".join(tools) + " |\n| --- |" + " --- |" * len(tools))
    for fact, patterns in ASKED.items():
        cells = []
        for name in tools:
            pattern = patterns[order.index(name)]
            seen = pattern and any(re.search(pattern, text, re.MULTILINE) for text in texts[name])
            cells.append("yes" if seen else "no")
        print(f"| {fact} | " + " | ".join(cells) + " |")


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to make the models (default: a temporary folder)")
    parser.add_argument("--limit", type=float, help="seconds one run may take")
    parser.add_argument("--memory", type=float, help="MB one run may take")
    parser.add_argument("--rivals", type=Path, metavar="PYTHON", help="a Python that has the other tools")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        models = _models(folder)
        failed = False
        for title in list(models)[:2]:
            for more in ([], ["--tree"], ["--ops"], ["--json"]):
                ran = measured([sys.executable, "-m", "graphopt", "inspect", models[title], *more])
                over = ran.code != 0 or ran.seconds > (options.limit or 1e9) or ran.mb > (options.memory or 1e9)
                failed |= over
                mark = "  too much" if over else ""
                print(f"{title:16} {' '.join(more):8} {ran.seconds:6.2f} s {ran.mb:7.0f} MB{mark}", flush=True)
        if options.rivals is not None:
            _told(rivals(options.rivals), models)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
