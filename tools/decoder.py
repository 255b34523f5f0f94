"""A synthetic decoder with the shapes of a language model, its weights in a data file: for tests of size, not of sense.

    python tools/decoder.py out.onnx --size 2GB [--hidden 4096] [--dtype float32]

Weights are written a piece at a time, so that this takes little memory whatever the size. Every layer is RMS-normalized
attention projections (without the attention itself, which has no weights) and a gated feed-forward, as in LLaMA; an
embedding comes first and a projection to the vocabulary last.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graphopt.gates import parse_size

PIECE = 1 << 22
KINDS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


class Builder:
    """Nodes, and weights that go to the data file as they are made."""

    def __init__(self, path: Path, dtype: str, seed: int) -> None:
        self.data = path.with_name(f"{path.name}.data")
        self.stream = self.data.open("wb")
        self.dtype, self.rng = dtype, np.random.default_rng(seed)
        # Drawn once: what matters is that the values are spread as weights are, not that no two are alike.
        self.noise = self.rng.standard_normal(PIECE, np.float32).astype(dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def weight(self, name: str, shape: tuple[int, ...]) -> str:
        """Normal values of the usual size (1 over the root of the inputs)."""
        self.stream.write(b"\0" * (-self.stream.tell() % 4096))
        tensor = TensorProto(name=name, data_type=KINDS[self.dtype], dims=shape, data_location=TensorProto.EXTERNAL)
        begin, left = self.stream.tell(), math.prod(shape)
        scale = np.float32(1 / math.sqrt(shape[0]))
        while left:
            count = min(left, PIECE)
            turned = np.roll(self.noise, int(self.rng.integers(PIECE)))[:count]
            self.stream.write((turned * turned.dtype.type(scale)).tobytes())
            left -= count
        length = self.stream.tell() - begin
        for key, value in (("location", self.data.name), ("offset", begin), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.tensors.append(tensor)
        return name

    def small(self, name: str, array: np.ndarray) -> str:
        """A constant in the model itself."""
        self.tensors.append(numpy_helper.from_array(array, name))
        return name

    def add(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{op}_{output}", **attributes))
        return output


def layer(b: Builder, number: int, x: str, hidden: int, wide: int) -> str:
    """One decoder layer; returns its output's name."""
    p = f"layers.{number}"
    norm = b.add("LayerNormalization", [x, b.small(f"{p}.norm", np.ones(hidden, b.dtype))], f"{p}.normed", axis=-1)
    parts = [b.add("MatMul", [norm, b.weight(f"{p}.{k}.weight", (hidden, hidden))], f"{p}.{k}") for k in "qkv"]
    mixed = b.add("Add", [b.add("Add", parts[:2], f"{p}.qk"), parts[2]], f"{p}.mixed")
    x = b.add("Add", [x, b.add("MatMul", [mixed, b.weight(f"{p}.o.weight", (hidden, hidden))], f"{p}.o")], f"{p}.mid")
    gate = b.add("MatMul", [x, b.weight(f"{p}.gate.weight", (hidden, wide))], f"{p}.gate")
    gate = b.add("Mul", [gate, b.add("Sigmoid", [gate], f"{p}.sigmoid")], f"{p}.silu")
    gate = b.add(
        "Mul", [gate, b.add("MatMul", [x, b.weight(f"{p}.up.weight", (hidden, wide))], f"{p}.up")], f"{p}.gated"
    )
    down = b.add("MatMul", [gate, b.weight(f"{p}.down.weight", (wide, hidden))], f"{p}.down")
    return b.add("Add", [x, down], f"{p}.out")


def make(
    path: Path, size: int, *, hidden: int = 2048, vocabulary: int = 32000, dtype: str = "float32", seed: int = 0
) -> int:
    """Write the model; as many layers as fit ``size`` bytes, at least one. Returns the bytes of weights."""
    wide = hidden * 11 // 4 // 64 * 64
    each = (4 * hidden * hidden + 3 * hidden * wide) * np.dtype(dtype).itemsize
    ends = 2 * vocabulary * hidden * np.dtype(dtype).itemsize
    count = max((size - ends) // each, 1)
    b = Builder(path, dtype, seed)
    x = b.add("Gather", [b.weight("embedding", (vocabulary, hidden)), "ids"], "embedded")
    for number in range(count):
        x = layer(b, number, x, hidden, wide)
    b.add("MatMul", [x, b.weight("head", (hidden, vocabulary))], "logits")
    b.stream.close()
    graph = helper.make_graph(
        b.nodes,
        "decoder",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", KINDS[dtype], ["batch", "length", vocabulary])],
        b.tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return b.data.stat().st_size


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", default="2GB")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", choices=sorted(KINDS), default="float32")
    given = parser.parse_args()
    size = parse_size(given.size, 1)
    made = make(given.output, size, hidden=given.hidden, vocabulary=given.vocabulary, dtype=given.dtype)
    print(f"{given.output}: {made / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
