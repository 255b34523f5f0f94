"""How long ``graphopt diff`` takes on large graphs that were renamed, shuffled and changed.

    python tools/bench/diff.py [--nodes 5000,12000] [--limit SECONDS] [--limit-nodes 5000]

Each graph is a chain of residual blocks (MatMul, Add, Relu, Add) with weights of their own. ``--limit`` makes the exit
code 1 where a row of at most ``--limit-nodes`` nodes takes longer; the larger ones are there to show how it grows.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graphopt.model_diff import diff

WIDTH = 8


def blocks(nodes: int, *, equal: bool = False) -> onnx.ModelProto:
    """``nodes`` nodes, four a block; with ``equal``, all blocks hold the same weights."""
    rng, made, weights, last = np.random.default_rng(0), [], [], "x"
    first = rng.standard_normal((WIDTH, WIDTH)).astype(np.float32)
    for index in range(nodes // 4):
        w, b, names = f"w{index}", f"b{index}", [f"{kind}{index}" for kind in ("m", "a", "r", "s")]
        array = first if equal else rng.standard_normal((WIDTH, WIDTH)).astype(np.float32)
        weights += [numpy_helper.from_array(array, w), numpy_helper.from_array(array[0], b)]
        made += [
            helper.make_node("MatMul", [last, w], [names[0]]),
            helper.make_node("Add", [names[0], b], [names[1]]),
            helper.make_node("Relu", [names[1]], [names[2]]),
            helper.make_node("Add", [names[2], last], [names[3]]),
        ]
        last = names[3]
    return _model(made, last, weights)


def branches(count: int, order: list[int]) -> onnx.ModelProto:
    """``count`` branches that differ in nothing but their weights, which are dealt out in ``order``."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) for _ in range(count)]
    weights = [numpy_helper.from_array(arrays[k], f"w{i}") for i, k in enumerate(order)]
    made = [helper.make_node("MatMul", ["x", f"w{i}"], [f"m{i}"]) for i in range(count)]
    made += [helper.make_node("Relu", [f"m{i}"], [f"r{i}"]) for i in range(count)]
    made.append(helper.make_node("Concat", [f"r{i}" for i in range(count)], ["y"], axis=1))
    return _model(made, "y", weights)


def _model(nodes: list[onnx.NodeProto], output: str, weights: list[onnx.TensorProto]) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, WIDTH]) for name in ("x", output)]
    graph = helper.make_graph(nodes, "bench", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def renamed(model: onnx.ModelProto, *, seed: int = 0) -> onnx.ModelProto:
    """Every inner value and node has another name, and the nodes stand in another legal order."""
    copy, rng = onnx.ModelProto(), random.Random(seed)
    copy.CopyFrom(model)
    graph = copy.graph
    kept = {v.name for v in (*graph.input, *graph.output)}
    names: dict[str, str] = {}

    def other(name: str) -> str:
        return name if name in kept or not name else names.setdefault(name, f"v{rng.getrandbits(64):x}")

    for tensor in graph.initializer:
        tensor.name = other(tensor.name)
    for index, node in enumerate(graph.node):
        node.name = f"node{index}"
        node.input[:] = [other(name) for name in node.input]
        node.output[:] = [other(name) for name in node.output]
    weights = list(graph.initializer)
    rng.shuffle(weights)
    del graph.initializer[:]
    graph.initializer.extend(weights)
    nodes = list(graph.node)
    rng.shuffle(nodes)  # put in order again by whoever reads it
    del graph.node[:]
    graph.node.extend(nodes)
    return copy


def inserted(model: onnx.ModelProto, every: int) -> onnx.ModelProto:
    """An Identity behind every so-many-th Relu, and one weight changed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes: list[onnx.NodeProto] = []
    for index, node in enumerate(copy.graph.node):
        nodes.append(node)
        if node.op_type == "Relu" and index // 4 % every == 0:
            made = node.output[0]
            node.output[0] = f"{made}_before"
            nodes.append(helper.make_node("Identity", [node.output[0]], [made]))
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    tensor = copy.graph.initializer[0]
    array = numpy_helper.to_array(tensor).copy()
    array.flat[0] += 1e-3
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return copy


def main() -> int:
    """Print the table (Markdown)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", default="5000,12000", help="sizes, comma-separated")
    parser.add_argument("--limit", type=float, help="exit 1 where a row takes longer")
    parser.add_argument("--limit-nodes", type=int, default=5000, help="nodes up to which the limit holds")
    options = parser.parse_args()
    rows: list[tuple[str, Callable[[], tuple[onnx.ModelProto, onnx.ModelProto]]]] = []
    for size in map(int, options.nodes.split(",")):
        rows += [
            (f"{size} nodes, renamed and shuffled", lambda n=size: (blocks(n), renamed(blocks(n)))),
            (
                f"{size} nodes, equal weights, the same",
                lambda n=size: (blocks(n, equal=True), renamed(blocks(n, equal=True))),
            ),
            (
                f"{size} nodes, renamed, 1 weight and every 5th block changed",
                lambda n=size: (blocks(n), renamed(inserted(blocks(n), 5))),
            ),
            (
                f"{size} nodes, a chain of which every 5th block changed, equal weights",
                lambda n=size: (blocks(n, equal=True), renamed(inserted(blocks(n, equal=True), 5))),
            ),
        ]
    shuffled = random.Random(1).sample(range(100), 100)
    rows.append(
        ("100 equal branches, weights permuted", lambda: (branches(100, list(range(100))), branches(100, shuffled)))
    )
    rows.append(
        (
            "3000 equal branches, renamed",
            lambda: (branches(3000, list(range(3000))), renamed(branches(3000, list(range(3000))))),
        )
    )
    print("| models | seconds | CPU seconds | differences |\n| --- | ---: | ---: | ---: |")
    slow = False
    for title, make in rows:
        a, b = make()
        started, busy = time.perf_counter(), time.process_time()
        found = diff(a, b)
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
        held = options.limit is not None and len(a.graph.node) <= options.limit_nodes
        over = held and seconds > options.limit
        slow = slow or over
        mark = " too long" if over else ""
        print(f"| {title} | {seconds:.2f}{mark} | {busy:.2f} | {found.differences} |", flush=True)
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
