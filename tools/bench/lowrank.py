"""Whether a layer as two thin products is faster or smaller than what else there is: activation-aware factorization.

    python tools/bench/lowrank.py [--models digits,minilm] [--levels 20,30,40]

Of each dense Conv, MatMul and Gemm, W is split where W L (H = L L^T, H the second moments of what the layer reads) is
cut off at the least rank that keeps so many dB of its own output: the optimum for that error. It is split where the
two products have fewer weights and, timed on the layer's own input, take less than 0.95 of the time. A row per model
and level: how many layers that is, what it leaves of weights and time, and of the outputs, on data not seen before.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tools" / "bench")]

from rounding import Subject  # noqa: E402

from graphopt.graph import constant_array  # noqa: E402
from graphopt.linear import form_of, to_matrix  # noqa: E402
from graphopt.model import to_proto  # noqa: E402
from graphopt.session import Session  # noqa: E402
from graphopt.timing import time_models  # noqa: E402

_FASTER = 0.95
_DAMP = 1e-6

Split = tuple[list[onnx.NodeProto], list[onnx.TensorProto]]


def factors(matrix: Any, gram: Any) -> tuple[Any, Any, Any]:
    """(U S, rows V^T L^-1, energies S^2) of W[N, K] for H[K, K]."""
    energies, directions = np.linalg.eigh(gram)
    root = np.sqrt(np.maximum(energies, _DAMP * np.trace(gram) / len(gram) + 1e-30))
    u, s, vt = np.linalg.svd(matrix @ (directions * root), full_matrices=False)
    return u * s, (vt / root) @ directions.T, np.square(s)


def least_rank(energies: Any, level: float) -> int:
    """The rank from which on the layer's output has an SQNR of ``level`` dB."""
    left = np.append(np.cumsum(energies[::-1])[::-1], 0.0)
    return max(int(np.argmax(left <= left[0] * 10 ** (-level / 10))), 1)


def split(node: onnx.NodeProto, weight: Any, left: Any, right: Any) -> Split:
    """``node`` as two: by ``right`` [r, K], then by ``left`` [N, r]."""
    thin, first, second = f"{node.output[0]}_thin", f"{node.output[0]}_first", f"{node.output[0]}_second"
    if node.op_type == "Conv":
        kept = [a for a in node.attribute if a.name != "group"]
        nodes = [helper.make_node("Conv", [node.input[0], first], [thin]), helper.make_node("Conv", [thin, second], [])]
        nodes[0].attribute.extend(kept)
        arrays = right.reshape(-1, *weight.shape[1:]), left.reshape(*left.shape, *[1] * (weight.ndim - 2))
    else:
        nodes = [helper.make_node("MatMul", [node.input[0], first], [thin])]
        nodes.append(helper.make_node("Gemm" if node.op_type == "Gemm" else "MatMul", [thin, second], []))
        nodes[1].attribute.extend(a for a in node.attribute if a.name == "beta")
        arrays = right.T, left.T
    nodes[1].input.extend(node.input[2:])
    nodes[1].output.extend(node.output)
    tensors = [
        numpy_helper.from_array(np.ascontiguousarray(a, np.float32), n)
        for a, n in zip(arrays, (first, second), strict=True)
    ]
    return nodes, tensors


class Factored:
    """A model with what is known of its layers."""

    def __init__(self, name: str) -> None:
        self.subject = Subject(name)
        self.proto = to_proto(self.subject.model)
        self.stored = {t.name: t for t in self.proto.graph.initializer}
        self.layers: dict[str, tuple[Any, Any, Any, Any]] = {}
        for layer in self.subject.layers:
            form, weight = form_of(layer.node), constant_array(layer.weight)
            if form is None or weight is None or form.groups > 1 or form.batch or form.kind not in ("gemm", "conv"):
                continue
            gram = self.subject.seen[form].moments.second_moment[0]
            self.layers[str(layer.node.outputs[0].name)] = (weight, *factors(to_matrix(layer.node, weight)[0], gram))
        taps = [node.input[0] for node in self.proto.graph.node if node.output[0] in self.layers]
        feed = self.subject.feeds[0]
        inner = [tap for tap in dict.fromkeys(taps) if tap not in feed]
        self.inputs = {**feed, **Session(self.subject.model, taps=inner, threads=1).run(feed, inner)}

    def splits(self, level: float) -> tuple[dict[str, Split], int]:
        """Those that are faster, of how many that have fewer weights."""
        found, fewer = {}, 0
        for node in self.proto.graph.node:
            if not node.output or node.output[0] not in self.layers:
                continue
            weight, left, right, energies = self.layers[node.output[0]]
            rank = least_rank(energies, level)
            if rank * (len(left) + right.shape[1]) >= weight.size:
                continue
            fewer += 1
            made = split(node, weight, left[:, :rank], right[:rank])
            if self._ratio(node, made) < _FASTER:
                found[node.output[0]] = made
        return found, fewer

    def _ratio(self, node: onnx.NodeProto, made: Split) -> float:
        """Two products' time over one's, on the layer's own input."""
        plain = [node], [self.stored[name] for name in node.input[1:] if name in self.stored]
        extra = [self.stored[name] for name in node.input[2:] if name in self.stored]
        x = self.inputs[node.input[0]]
        sessions = {
            "original": Session(self._alone(*plain, x, node), threads=1, timed=True),
            "candidate": Session(self._alone(made[0], [*made[1], *extra], x, node), threads=1, timed=True),
        }
        return float(time_models(sessions, [{node.input[0]: x}], seconds=0.2)[1]["candidate"][0])

    def _alone(self, nodes: Any, tensors: Any, x: Any, node: onnx.NodeProto) -> onnx.ModelProto:
        given = helper.make_tensor_value_info(node.input[0], 1, x.shape)
        graph = helper.make_graph(nodes, "layer", [given], [onnx.ValueInfoProto(name=node.output[0])], tensors)
        return helper.make_model(graph, opset_imports=self.proto.opset_import, ir_version=self.proto.ir_version)

    def model(self, found: dict[str, Split]) -> onnx.ModelProto:
        """The whole, split there."""
        made = onnx.ModelProto()
        made.CopyFrom(self.proto)
        nodes = [
            n for node in made.graph.node for n in (found[node.output[0]][0] if node.output[0] in found else [node])
        ]
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del made.graph.node[:]
        made.graph.node.extend(nodes)
        made.graph.initializer.extend(t for _, tensors in found.values() for t in tensors)
        read = {name for node in nodes for name in node.input}
        kept = [t for t in made.graph.initializer if t.name in read]
        del made.graph.initializer[:]
        made.graph.initializer.extend(kept)
        return made


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="digits,minilm")
    parser.add_argument("--levels", default="20,30,40")
    given = parser.parse_args()
    print("| model | each layer keeps | fewer weights | faster too | weights | time | worst output | metric |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in given.models.split(","):
        one = Factored(name)
        total = sum(int(np.prod(t.dims)) for t in one.proto.graph.initializer)
        for level in map(float, given.levels.split(",")):
            found, fewer = one.splits(level)
            made = one.model(found)
            left = sum(int(np.prod(t.dims)) for t in made.graph.initializer)  # of a shared weight, all its halves
            layers = f"{fewer} of {len(one.layers)}"
            cells = [name, f"{level:g} dB", layers, str(len(found)), f"{left / total:.3f}x"]
            if found:
                sessions = {
                    "original": Session(one.proto, threads=1, timed=True),
                    "candidate": Session(made, threads=1, timed=True),
                }
                ratio = time_models(sessions, one.subject.feeds[:4], seconds=1.0)[1]["candidate"]
                judged = one.subject.judged(sessions["candidate"])
                cells += [f"{ratio[0]:.2f}x ({ratio[1]:.2f} to {ratio[2]:.2f})", f"{judged['sqnr_db']:.1f} dB"]
                cells.append(f"{judged['float']:.4f} -> {judged['metric']:.4f}")
            else:
                cells += ["", "", ""]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
