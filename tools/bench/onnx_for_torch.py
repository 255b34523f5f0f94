"""ONNX models written so that onnx2torch and Torch-Pruning can follow them; they compute the same."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper


def prepare(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with what onnx2torch 1.5 does not convert spelled out, and no width in a Reshape that may be inferred."""
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    nodes: list[onnx.NodeProto] = []
    for at, node in enumerate(proto.graph.node):
        if node.op_type in ("Conv", "MaxPool"):
            nodes += _padded(proto, node, at)
        elif node.op_type == "GlobalMaxPool":
            axes = list(range(2, _rank(proto, node.input[0])))
            nodes.append(helper.make_node("ReduceMax", node.input, node.output, axes=axes, keepdims=1))
        else:
            nodes.append(node)
            if node.op_type == "Reshape":
                _infer_width(proto, node, at)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def _padded(proto: onnx.ModelProto, node: onnx.NodeProto, at: int) -> list[onnx.NodeProto]:
    """``auto_pad`` as a Pad in front, where the stride is 1 (else it depends on the input's size)."""
    known = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if known.get("auto_pad") != b"SAME_UPPER" or set(known.get("strides", [1])) != {1} or "kernel_shape" not in known:
        return [node]
    kernel = np.array(known["kernel_shape"])
    total = (kernel - 1) * np.array(known.get("dilations", [1] * len(kernel)))
    before = total // 2
    pads = np.concatenate([[0, 0], before, [0, 0], total - before]).astype(np.int64)
    value = np.array(-np.inf if node.op_type == "MaxPool" else 0, np.float32)
    for name, array in ((f"pads_{at}", pads), (f"padding_{at}", value)):
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    pad = helper.make_node("Pad", [node.input[0], f"pads_{at}", f"padding_{at}"], [f"padded_{at}"])
    bare = onnx.NodeProto()
    bare.CopyFrom(node)
    bare.input[0] = f"padded_{at}"
    del bare.attribute[:]
    bare.attribute.extend(a for a in node.attribute if a.name not in ("auto_pad", "pads"))
    return [pad, bare]


def _infer_width(proto: onnx.ModelProto, node: onnx.NodeProto, at: int) -> None:
    """Give the largest size of a constant target to Reshape itself to find, so that it may get narrower."""
    constant = next((i for i in proto.graph.initializer if i.name == node.input[1]), None)
    if constant is None:
        return
    target = numpy_helper.to_array(constant).copy()
    if target.size and -1 not in target and target.max() > 1:
        target[target.argmax()] = -1
        proto.graph.initializer.append(numpy_helper.from_array(target, f"target_{at}"))
        node.input[1] = f"target_{at}"


def _rank(proto: onnx.ModelProto, name: str) -> int:
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    for value in [*inferred.value_info, *inferred.input]:
        if value.name == name and value.type.tensor_type.HasField("shape"):
            return len(value.type.tensor_type.shape.dim)
    raise ValueError(f"rank of {name} is not known")
