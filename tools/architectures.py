"""Small models with the structures that pruning meets, as exporters write them; weights are random.

``ARCHITECTURES`` maps a name to a function that makes the model; every one has a dynamic batch, and some a dynamic
length or image size. What is asked of pruning is the same for all: valid, smaller, and exact where the layers that read
what is removed ignored it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Net:
    """A graph under construction; every method returns the name of the value it makes."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, *shape: int, fan: int | None = None, around: float = 0.0) -> str:
        """A random initializer."""
        scale = 1 / np.sqrt(fan or max(int(np.prod(shape[1:])), 1))
        return self.keep(around + scale * self.rng.standard_normal(shape).astype(np.float32))

    def keep(self, array: Any, dtype: Any = np.float32) -> str:
        """An initializer."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def ints(self, *numbers: int) -> str:
        """An int64 vector."""
        return self.keep(np.asarray(numbers, np.int64), np.int64)

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """A node; its output, or its outputs where there are several."""
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, f"{kind}_{len(self.nodes)}", **attributes))
        return names[0] if outputs == 1 else names

    def conv(
        self, x: str, inputs: int, outputs: int, kernel: int = 3, *, group: int = 1, stride: int = 1, bias: bool = True
    ) -> str:
        """A convolution that keeps the image's size, but for the stride."""
        given = [x, self.weight(outputs, inputs // group, kernel, kernel)]
        given += [self.weight(outputs, fan=4)] if bias else []
        pads = [kernel // 2] * 4
        return str(self.op("Conv", *given, group=group, strides=[stride] * 2, pads=pads, kernel_shape=[kernel] * 2))

    def norm(self, x: str, channels: int) -> str:
        """BatchNormalization, not fused."""
        parts = [self.weight(channels, fan=16, around=a) for a in (1.0, 0.0, 0.0)]
        variance = self.keep(0.5 + self.rng.random(channels))
        return str(self.op("BatchNormalization", x, *parts, variance))

    def block(self, x: str, inputs: int, outputs: int, **more: Any) -> str:
        """Convolution, normalization, Relu."""
        return str(self.op("Relu", self.norm(self.conv(x, inputs, outputs, bias=False, **more), outputs)))

    def dense(self, x: str, inputs: int, outputs: int) -> str:
        """MatMul and Add."""
        return str(self.op("Add", self.op("MatMul", x, self.weight(inputs, outputs, fan=inputs)), self.weight(outputs)))

    def head(self, x: str, channels: int, classes: int = 10) -> str:
        """Global average, Flatten, Gemm."""
        flat = self.op("Flatten", self.op("GlobalAveragePool", x))
        return str(self.op("Gemm", flat, self.weight(classes, channels), self.weight(classes, fan=4), transB=1))

    def layer_norm(self, x: str, width: int) -> str:
        """Over the last axis."""
        return str(self.op("LayerNormalization", x, self.weight(width, fan=16, around=1), self.weight(width, fan=16)))

    def model(
        self, output: str | Sequence[str], shape: Sequence[int | str] = ("N", 3, 16, 16), *, opset: int = 17
    ) -> onnx.ModelProto:
        """The model, with one input ``x``."""
        outputs = [output] if isinstance(output, str) else list(output)
        given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
        made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", given, made, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(model)
        return inferred


def resnet() -> onnx.ModelProto:
    """Residual blocks, one with a projection."""
    net = Net()
    x = net.block("x", 3, 16)
    y = net.norm(net.conv(net.block(x, 16, 16), 16, 16, bias=False), 16)
    x = net.op("Relu", net.op("Add", y, x))
    y = net.norm(net.conv(net.block(x, 16, 32, stride=2), 32, 32, bias=False), 32)
    x = net.op("Relu", net.op("Add", y, net.conv(x, 16, 32, 1, stride=2)))
    return net.model(net.head(x, 32), ("N", 3, "H", "W"))


def mobilenet() -> onnx.ModelProto:
    """Inverted residuals with depthwise convolutions and Clip."""
    net = Net()
    zero, six = net.keep(0.0), net.keep(6.0)
    x = net.op("Clip", net.conv("x", 3, 16, stride=2), zero, six)
    for _ in range(2):
        y = net.op("Clip", net.conv(x, 16, 48, 1), zero, six)
        y = net.op("Clip", net.conv(y, 48, 48, group=48), zero, six)
        x = net.op("Add", net.conv(y, 48, 16, 1), x)
    return net.model(net.head(x, 16))


def vgg() -> onnx.ModelProto:
    """Flatten into a Gemm: a channel is a block of columns."""
    net = Net()
    x = net.op("MaxPool", net.block("x", 3, 16), kernel_shape=[2, 2], strides=[2, 2])
    x = net.op("MaxPool", net.block(x, 16, 24), kernel_shape=[2, 2], strides=[2, 2])
    x = net.op("Reshape", x, net.ints(-1, 24 * 4 * 4))
    x = net.op("Relu", net.op("Gemm", x, net.weight(384, 64, fan=384), net.weight(64, fan=4)))
    return net.model(net.op("Gemm", x, net.weight(10, 64), transB=1))


def densenet() -> onnx.ModelProto:
    """Concatenation of all that came before, normalized before it is read."""
    net = Net()
    parts, width = [net.conv("x", 3, 16)], 16
    for _ in range(3):
        x = net.op("Concat", *parts, axis=1) if len(parts) > 1 else parts[0]
        x = net.op("Relu", net.norm(x, width))
        parts.append(net.conv(net.block(x, width, 24, kernel=1), 24, 8))
        width += 8
    return net.model(net.head(net.op("Relu", net.op("Concat", *parts, axis=1)), width))


def shufflenet() -> onnx.ModelProto:
    """Halves, grouped convolutions, and channels that are shuffled by two Reshapes and a Transpose."""
    net = Net()
    x = net.block("x", 3, 32, stride=2)
    for _ in range(2):
        left, right = net.op("Split", x, net.ints(16, 16), axis=1, outputs=2)
        right = net.block(right, 16, 16, kernel=1)
        right = net.block(net.norm(net.conv(right, 16, 16, group=16), 16), 16, 16, kernel=1)
        x = net.op("Concat", left, right, axis=1)
        x = net.op("Reshape", x, net.ints(0, 2, 16, 8, 8))
        x = net.op("Reshape", net.op("Transpose", x, perm=[0, 2, 1, 3, 4]), net.ints(0, -1, 8, 8))
    x = net.op("Relu", net.conv(x, 32, 32, group=4))
    return net.model(net.head(x, 32))


def squeeze_excite() -> onnx.ModelProto:
    """A gate per channel, from global means, with HardSigmoid; a residual around it."""
    net = Net()
    x = net.block("x", 3, 24)
    y = net.block(x, 24, 48, kernel=1)
    gate = net.op("ReduceMean", y, axes=[2, 3], keepdims=1)
    gate = net.op("HardSigmoid", net.conv(net.op("Relu", net.conv(gate, 48, 16, 1)), 16, 48, 1), alpha=0.2)
    x = net.op("Add", net.conv(net.op("Mul", y, gate), 48, 24, 1), x)
    return net.model(net.head(x, 24), ("N", 3, "H", "W"))


def unet() -> onnx.ModelProto:
    """Down, up by ConvTranspose, and skips that are concatenated; an image comes out."""
    net = Net()
    a = net.block("x", 3, 16)
    b = net.block(a, 16, 32, stride=2)
    c = net.block(b, 32, 48, stride=2)
    up = net.op("ConvTranspose", c, net.weight(48, 32, 2, 2), net.weight(32, fan=4), strides=[2, 2])
    x = net.block(net.op("Concat", up, b, axis=1), 64, 32)
    up = net.op("ConvTranspose", x, net.weight(32, 16, 2, 2), strides=[2, 2])
    x = net.block(net.op("Concat", up, a, axis=1), 32, 16)
    return net.model(net.op("Sigmoid", net.conv(x, 16, 1, 1)))


def transformer() -> onnx.ModelProto:
    """Two encoder layers of four heads; shapes are computed, as torch traces them."""
    net, width, heads = Net(), 32, 4
    x = net.layer_norm(net.dense("x", 16, width), width)
    for _ in range(2):
        shape = net.op("Shape", x)
        lead = [
            net.op("Unsqueeze", net.op("Gather", shape, net.keep(i, np.int64), axis=0), net.ints(0)) for i in (0, 1)
        ]
        split = net.op("Concat", *lead, net.ints(heads), net.ints(width // heads), axis=0)
        q, k, v = (net.op("Reshape", net.dense(x, width, width), split) for _ in range(3))
        q, v = (net.op("Transpose", part, perm=[0, 2, 1, 3]) for part in (q, v))
        scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 3, 1]))
        scores = net.op("Softmax", net.op("Div", scores, net.keep(np.sqrt(width / heads))), axis=-1)
        y = net.op("Transpose", net.op("MatMul", scores, v), perm=[0, 2, 1, 3])
        y = net.op("Reshape", y, net.op("Concat", *lead, net.ints(width), axis=0))
        x = net.layer_norm(net.op("Add", net.dense(y, width, width), x), width)
        y = net.dense(net.op("Relu", net.dense(x, width, 64)), 64, width)
        x = net.layer_norm(net.op("Add", y, x), width)
    return net.model(net.dense(net.op("ReduceMean", x, axes=[1], keepdims=0), width, 10), ("N", "T", 16))


def packed_attention() -> onnx.ModelProto:
    """Queries, keys and values from one product, taken apart by Gather, as in ViT of timm."""
    net, width, heads = Net(), 32, 8
    qkv = net.op("Reshape", net.dense("x", width, 3 * width), net.ints(0, -1, 3, heads, width // heads))
    qkv = net.op("Transpose", qkv, perm=[2, 0, 3, 1, 4])
    q, k, v = (net.op("Gather", qkv, net.keep(i, np.int64), axis=0) for i in range(3))
    scores = net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    y = net.op("Transpose", net.op("MatMul", scores, v), perm=[0, 2, 1, 3])
    y = net.dense(net.op("Reshape", y, net.ints(0, 0, -1)), width, width)
    return net.model(net.op("Add", y, "x"), ("N", "T", width))


def recurrent(kind: str = "LSTM") -> onnx.ModelProto:
    """Two layers, the second in both directions, with states made at run time."""
    net, gates = Net(), {"LSTM": 4, "GRU": 3}[kind]
    x = net.op("Transpose", "x", perm=[1, 0, 2])
    size = net.op("Unsqueeze", net.op("Gather", net.op("Shape", x), net.keep(1, np.int64), axis=0), net.ints(0))
    inputs = 12
    for directions in (1, 2):
        shape = net.op("Concat", net.ints(directions), size, net.ints(24), axis=0)
        state = net.op("ConstantOfShape", shape)
        parts = [net.weight(directions, gates * 24, n, fan=24) for n in (inputs, 24)]
        bias = net.weight(directions, 2 * gates * 24, fan=24)
        states = [state, state] if kind == "LSTM" else [state]
        direction = "bidirectional" if directions == 2 else "forward"
        x = net.op(kind, x, *parts, bias, "", *states, hidden_size=24, direction=direction)
        x = net.op("Transpose", x, perm=[0, 2, 1, 3])
        x = net.op("Reshape", x, net.ints(0, 0, -1))
        inputs = 24 * directions
    x = net.op("Gather", x, net.keep(-1, np.int64), axis=0)
    return net.model(net.op("Gemm", x, net.weight(10, 48), transB=1), ("N", "T", 12))


def gru() -> onnx.ModelProto:
    """As ``recurrent``, of GRUs."""
    return recurrent("GRU")


def yolo() -> onnx.ModelProto:
    """C2f (Split, bottlenecks, Concat), SPPF, nearest Resize, two scales, sigmoid times itself."""
    net = Net()

    def silu(x: str, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> str:
        y = net.conv(x, inputs, outputs, kernel, stride=stride)
        return str(net.op("Mul", y, net.op("Sigmoid", y)))

    def c2f(x: str, inputs: int, outputs: int) -> str:
        a, b = net.op("Split", silu(x, inputs, outputs, 1), net.ints(outputs // 2, outputs // 2), axis=1, outputs=2)
        c = net.op("Add", b, silu(silu(b, outputs // 2, outputs // 2), outputs // 2, outputs // 2))
        return silu(net.op("Concat", a, b, c, axis=1), 3 * outputs // 2, outputs, 1)

    p1 = c2f(silu("x", 3, 16, stride=2), 16, 16)
    p2 = silu(c2f(silu(p1, 16, 32, stride=2), 32, 32), 32, 16, 1)
    pools = [p2]
    for _ in range(2):
        pools.append(net.op("MaxPool", pools[-1], kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1]))
    p2 = silu(net.op("Concat", *pools, axis=1), 48, 32, 1)
    up = net.op("Resize", p2, "", net.keep([1, 1, 2, 2]), mode="nearest")
    p1 = c2f(net.op("Concat", up, p1, axis=1), 48, 16)
    outputs = []
    for value, channels in ((p1, 16), (p2, 32)):
        box = net.conv(silu(value, channels, 16), 16, 4, 1)
        score = net.op("Sigmoid", net.conv(silu(value, channels, 16), 16, 3, 1))
        outputs.append(net.op("Reshape", net.op("Concat", box, score, axis=1), net.ints(0, 7, -1)))
    return net.model(net.op("Concat", *outputs, axis=2))


def channels_last() -> onnx.ModelProto:
    """NHWC with a Transpose on either side of every convolution, as tf2onnx writes it; a MatMul on channels."""
    net = Net()

    def conv(x: str, inputs: int, outputs: int) -> str:
        y = net.conv(net.op("Transpose", x, perm=[0, 3, 1, 2]), inputs, outputs, bias=False)
        y = net.op("Transpose", y, perm=[0, 2, 3, 1])
        return str(net.op("Relu", net.op("Add", y, net.weight(outputs, fan=4))))

    x = conv(conv("x", 3, 16), 16, 24)
    x = net.op("Relu", net.dense(x, 24, 32))
    flat = net.op("Reshape", net.op("ReduceMean", x, axes=[1, 2], keepdims=1), net.ints(-1, 32))
    return net.model(net.dense(flat, 32, 10), ("N", 16, 16, 3))


def pixel_shuffle() -> onnx.ModelProto:
    """Super-resolution: DepthToSpace inside, Pad and Slice around."""
    net = Net()
    x = net.op("Relu", net.conv("x", 3, 16))
    x = net.op("DepthToSpace", net.conv(x, 16, 64), blocksize=2)
    x = net.op("Pad", net.op("PRelu", x, net.weight(16, 1, 1)), net.ints(0, 0, 1, 1, 0, 0, 1, 1))
    a = net.op("Slice", x, net.ints(0), net.ints(8), net.ints(1))
    b = net.op("Slice", x, net.ints(8), net.ints(16), net.ints(1))
    return net.model(net.conv(net.op("Mul", a, net.op("Tanh", b)), 8, 3))


def fan_out() -> onnx.ModelProto:
    """One value that three layers of different kinds read, and instance normalization."""
    net = Net()
    x = net.op("Relu", net.conv("x", 3, 24))
    x = net.op("InstanceNormalization", x, net.weight(24, fan=16, around=1), net.weight(24, fan=16))
    a = net.conv(x, 24, 8, 1)
    b = net.conv(x, 24, 8, group=2)
    c = net.op("Transpose", net.dense(net.op("Transpose", x, perm=[0, 2, 3, 1]), 24, 8), perm=[0, 3, 1, 2])
    return net.model(net.head(net.op("Sum", a, b, c), 8))


ARCHITECTURES: dict[str, Callable[[], onnx.ModelProto]] = {
    f.__name__: f
    for f in (
        *(resnet, mobilenet, vgg, densenet, shufflenet, squeeze_excite, unet, transformer, packed_attention),
        *(recurrent, gru, yolo, channels_last, pixel_shuffle, fan_out),
    )
}


def feeds(model: onnx.ModelProto, batch: int, size: int = 16) -> dict[str, np.ndarray]:
    """An input; other dynamic dims are ``size``."""
    dims = model.graph.input[0].type.tensor_type.shape.dim
    shape = [d.dim_value or (batch if d.dim_param == "N" else size) for d in dims]
    return {"x": np.random.default_rng([batch, size]).standard_normal(shape).astype(np.float32)}
