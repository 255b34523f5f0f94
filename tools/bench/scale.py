#!/usr/bin/env python3
"""``graphopt optimize`` on very large graphs and weights: is time linear, is memory bounded, end check included?

    python tools/bench/scale.py [--cases chain,weights,concat,external] [--folder DIR] [--json]

Each graph goes through twice, at half its size and whole. CPU seconds are user and system time of the command and its
children; memory is explained in measured.py. Limits (of issue 3): below 40 CPU s and 1.5 GB, time(2n)/time(n) < 2.5.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
from measured import measure
from onnx import TensorProto, helper, numpy_helper

CPU_S, MEMORY_MB, RATIO = 40.0, 1500.0, 2.5
SIZES = {"chain": 100_000, "weights": 50_000, "concat": 20_000, "external": 96}
"""Nodes; initializers; inputs of one Concat; weights of 32 MB in a data file (3 GB)."""


def build(case: str, count: int, path: Path) -> None:
    """A model of its kind in which there is something to remove, so that the end check has work."""
    if case == "external":
        _external(count, path)
        return
    weights: list[onnx.TensorProto] = []
    inputs, outputs = ["N", 4], ["N", 4]
    if case == "chain":
        kinds = ("Relu", "Abs", "Identity", "Sigmoid")
        nodes = [helper.make_node(kinds[i % 4], [f"v{i}"], [f"v{i + 1}"], name=f"n{i}") for i in range(count)]
    elif case == "weights":
        rng = np.random.default_rng(0)
        weights = [numpy_helper.from_array(rng.standard_normal(4).astype(np.float32), f"w{i}") for i in range(count)]
        kinds = ("Mul", "Add")
        nodes = [helper.make_node(kinds[i % 2], [f"v{i}", f"w{i}"], [f"v{i + 1}"], name=f"n{i}") for i in range(count)]
        nodes[-1].output[0] = "last"
        nodes.append(helper.make_node("Identity", ["last"], [f"v{count}"], name="id"))
    else:
        inputs = outputs = [count, 4]
        parts = [f"s{i}" for i in range(count)]
        nodes = [helper.make_node("Split", ["v0"], parts, axis=0, name="split")]
        nodes += [helper.make_node("Identity", [p], [f"i{p}"], name=f"id{p}") for p in parts[::2]]
        read = [f"i{p}" if i % 2 == 0 else p for i, p in enumerate(parts)]
        nodes.append(helper.make_node("Concat", read, [f"v{count}"], axis=0, name="concat"))
    _save(nodes, weights, (inputs, outputs), count, path)


def _external(count: int, path: Path) -> None:
    """``count`` MatMuls of 2896 x 2896 (32 MB each) and as many Identities."""
    width = 2896
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    data = path.with_suffix(".data")
    with data.open("wb") as stream:
        for i in range(count):
            offset = stream.tell()
            stream.write(rng.standard_normal((width, width), np.float32).__itruediv__(width**0.5).data)
            stream.write(b"\0" * (-stream.tell() % 4096))
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[width, width])
            tensor.data_location = TensorProto.EXTERNAL
            entries = {"location": data.name, "offset": str(offset), "length": str(4 * width * width)}
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=value)
            weights.append(tensor)
            nodes.append(helper.make_node("MatMul", [f"v{i}", f"w{i}"], [f"m{i}"], name=f"m{i}"))
            nodes.append(helper.make_node("Identity", [f"m{i}"], [f"v{i + 1}"], name=f"i{i}"))
    _save(nodes, weights, ([1, width], [1, width]), count, path)


def _save(
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto],
    shapes: tuple[list[str | int], list[str | int]],
    count: int,
    path: Path,
) -> None:
    ends = [
        helper.make_tensor_value_info(f"v{i}", TensorProto.FLOAT, s) for i, s in zip((0, count), shapes, strict=True)
    ]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def run(case: str, count: int, folder: Path) -> dict[str, object]:
    """One model through the command line; what it cost and how many nodes were left."""
    source, target = folder / "large.onnx", folder / "small.onnx"
    build(case, count, source)
    command = [sys.executable, "-m", "graphopt", "optimize", str(source), "-o", str(target), "--verify", "end"]
    try:
        cost = measure([*command, "--time", "0", "--threads", "1", "--quiet"])
        nodes = len(onnx.load(target, load_external_data=False).graph.node) if target.exists() else None
        return {"case": case, "size": count, "nodes_left": nodes, **asdict(cost)}
    finally:
        for file in folder.iterdir():
            file.unlink()


def main() -> int:
    """Print a row per size; exit 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(SIZES), help="comma-separated (default: all)")
    parser.add_argument("--folder", type=Path, help="where the models are built and removed again (7 GB)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the sizes, for a quick look")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cases = options.cases.split(",")
    unknown = [case for case in cases if case not in SIZES]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(SIZES)}")
    rows, missed = [], False
    if not options.json:
        print(
            "| case | size | nodes left | CPU s | wall s | peak RSS MB | without mapped files MB | time(2n)/time(n) | |"
        )
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for case in cases:
        previous = None
        for count in (int(SIZES[case] * options.scale) // 2, int(SIZES[case] * options.scale)):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                row = run(case, count, Path(folder))
            row["ratio"] = ratio = row["cpu_s"] / previous if previous else None  # type: ignore[operator]
            previous = row["cpu_s"]
            memory = row["own_mb"] if case == "external" else row["rss_mb"]
            held = row["exit_code"] == 0 and row["cpu_s"] < CPU_S and memory < MEMORY_MB and (ratio or 0) < RATIO  # type: ignore[operator]
            missed |= not held
            rows.append(row)
            if not options.json:
                verdict = "ok" if held else f"missed {row['error']}"
                shown = f"{ratio:.2f}" if ratio else ""
                print(
                    f"| {case} | {count} | {row['nodes_left']} | {row['cpu_s']:.1f} | {row['wall_s']:.1f} | "
                    f"{row['rss_mb']:.0f} | {row['own_mb']:.0f} | {shown} | {verdict} |",
                    flush=True,
                )
    if options.json:
        print(json.dumps(rows, indent=2))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
