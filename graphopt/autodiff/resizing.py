"""Resize and Upsample: a linear map of each axis, whose matrix is read off the operator itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper

from graphopt.autodiff.rules import Call, rule
from graphopt.session import Session

if TYPE_CHECKING:
    from numpy.typing import NDArray


@rule("Resize", "Upsample")
def _resize(c: Call) -> None:
    g, now = c.grad, list(c.shape(c.y[0]))
    for axis, size in enumerate(c.shape(c.x[0])):
        if not _touched(c, axis, size, now[axis]):
            continue
        matrix = _matrix(c, axis, size, now[axis])
        g = c.e.along(g, tuple(now), axis, matrix)
        now[axis] = size
    c.give(0, g)


def _axes(c: Call) -> list[int]:
    rank = len(c.shape(c.x[0]))
    return [int(a) % rank for a in c.attribute("axes", range(rank))]


def _scale(c: Call, axis: int, size: int, out: int) -> float:
    """The axis's scale: as given, for with ``floor`` it is not what the sizes say."""
    index = 1 if c.node.op_type == "Upsample" else 2
    axes = _axes(c)
    if axis not in axes:
        return 1.0
    if c.has(index) and c.shapes[c.x[index]] != (0,):
        return float(c.number(index).reshape(-1)[axes.index(axis)])
    return out / size


def _touched(c: Call, axis: int, size: int, out: int) -> bool:
    return size != out or _scale(c, axis, size, out) != 1


def _matrix(c: Call, axis: int, size: int, out: int) -> NDArray[Any]:
    """[out, size]: the operator applied to each unit vector, along one axis.

    Raises:
        NotImplementedError: a form whose axes depend on one another.
    """
    if c.attribute("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        raise NotImplementedError("it crops")
    if c.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise NotImplementedError("it keeps the aspect ratio")
    kept = [a for a in c.node.attribute if a.name not in ("axes", "keep_aspect_ratio_policy")]
    scale = np.asarray([1.0, _scale(c, axis, size, out)], np.float32)
    if c.node.op_type == "Upsample":
        node = helper.make_node("Resize", ["x", "", "scales"], ["y"], mode=c.attribute("mode", "nearest"))
        extra = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        node.attribute.extend(helper.make_attribute(key, value) for key, value in extra.items())
        opset = 13
    else:
        node = helper.make_node("Resize", ["x", "", "scales"], ["y"])
        node.attribute.extend(kept)
        opset = max(c.e.opset, 13)
    spec = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in ("x", "scales", "y")]
    graph = helper.make_graph([node], "resize", spec[:2], spec[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    session = Session(model, optimize=False, threads=1)
    matrix: NDArray[Any] = session.run({"x": np.eye(size, dtype=np.float32), "scales": scale})["y"].T
    if matrix.shape != (out, size):
        raise NotImplementedError(f"its output size {out} is not what its scales say")
    return matrix
