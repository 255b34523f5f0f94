"""If with captured values: the way back is an If too, whose branches run their own forward again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper

from graphopt.autodiff.rules import Call, rule

if TYPE_CHECKING:
    from numpy.typing import NDArray


@rule("If")
def _if(c: Call) -> None:
    from graphopt.autodiff.specialize import captured

    e = c.e
    bodies = {name: c.attribute(name, None) for name in ("then_branch", "else_branch")}
    wanted = sorted({n for body in bodies.values() for n in captured(body) if c.active(n) and c.kinds.get(n) == 1})
    if not wanted:
        return
    made = {key: _branch(c, body, wanted, key) for key, body in bodies.items()}
    names = [e.fresh("If") for _ in wanted]
    e.nodes.append(helper.make_node("If", [c.x[0]], names, name=names[0], **made))
    for name, gradient in zip(wanted, names, strict=True):
        c.give_value(name, gradient)


def _branch(c: Call, body: onnx.GraphProto, wanted: list[str], key: str) -> onnx.GraphProto:
    """The branch's nodes again, and the way back through them to what it captured."""
    from graphopt.autodiff.emit import Emitter
    from graphopt.autodiff.reverse import Tape
    from graphopt.autodiff.specialize import captured, inline, specialize

    outside = sorted(captured(body))
    values: dict[str, NDArray[Any]] = {}
    for name in outside:
        stored = c.constants.get(name, c.samples.get(name))
        if stored is None:
            kind = helper.tensor_dtype_to_np_dtype(c.kinds[name])
            stored = np.ones(c.shapes[name], kind)
        values[name] = np.asarray(stored)
    prefix = c.e.fresh(f"{c.y[0]}//{key}") + "/"
    graph = onnx.GraphProto(name=key)
    outputs = [f"{prefix}out{i}" for i in range(len(body.output))]
    graph.node.extend(inline(graph, body, {}, outputs, prefix))
    for name in outside:
        if name in c.constants:
            graph.initializer.append(onnx.numpy_helper.from_array(values.pop(name), name))
    variable = [n for n in wanted if n in outside]
    graph.input.extend(
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), list(v.shape))
        for n, v in values.items()
    )
    graph.output.extend(onnx.ValueInfoProto(name=n) for n in outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", c.e.opset)], ir_version=8)
    concrete = specialize(model, values, prefix=prefix)
    inner = Emitter(c.e.opset, set(concrete.shapes), f"{prefix}back/")
    tape = Tape(inner, concrete.shapes, concrete.kinds, concrete.constants, concrete.samples)
    seeds = {}
    for own, outer, g in zip(outputs, c.y, c.g, strict=True):
        if g is not None and outer:
            shape = concrete.shapes.get(own, ())
            seeds[own] = g if shape == c.shapes[outer] else inner.reshape(g, shape)
    found = tape.back(list(concrete.model.graph.node), seeds, variable)
    results = [inner("Identity", found.get(name) or inner.zeros(c.shapes[name])) for name in wanted]
    result = onnx.GraphProto(name=key)
    result.node.extend([*concrete.model.graph.node, *inner.nodes])
    result.initializer.extend(t for t in concrete.model.graph.initializer if t.name not in outside)
    result.initializer.extend(inner.initializers)
    shapes = [list(c.shapes[name]) for name in wanted]
    result.output.extend(helper.make_tensor_value_info(r, 1, s) for r, s in zip(results, shapes, strict=True))
    return result
