"""A graph for inputs of certain shapes: what follows from shapes and constants alone is computed once and for all.

The runtime says what those values are: the model runs once, with every such value and the shape of every other one
tapped. A branch that then is decided takes the place of its If. So rules see numbers where exporters wrote arithmetic
on shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper, numpy_helper

from graphopt.autodiff.emit import OLDEST, Emitter, Shape
from graphopt.autodiff.lowering import lower
from graphopt.errors import PreconditionError
from graphopt.session import Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

_RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
_ROUNDS = 24
"""Branches in branches: each round decides one more level."""


@dataclass
class Concrete:
    """A model with nothing dynamic left.

    ``shapes`` and ``kinds`` (ONNX element types): of every value of the main graph; ``constants``: those known in
    numbers; ``samples``: values that branches capture, as they were on the one run.
    """

    model: onnx.ModelProto
    shapes: dict[str, Shape]
    kinds: dict[str, int]
    constants: dict[str, NDArray[Any]]
    samples: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def opset(self) -> int:
        """Of the standard operators."""
        return opset_of(self.model)


def opset_of(model: onnx.ModelProto) -> int:
    """The standard operator set's version."""
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


def specialize(
    model: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]], variables: Collection[str] = (), *, prefix: str = ""
) -> Concrete:
    """``model`` for inputs shaped as ``feeds``; the initializers ``variables`` become inputs and stay unknown.

    Inputs of one whole number or truth value (a sampling rate, a flag) are fixed at what ``feeds`` says: they decide
    which way a model takes. ``prefix``: of the names that are new in it.

    Raises:
        PreconditionError: below opset 11.
        RuntimeFailure: the model does not run.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    if opset_of(made) < OLDEST:
        raise PreconditionError(f"gradients need opset {OLDEST} and the model has {opset_of(made)}; run upgrade-opset")
    if made.functions:
        made = onnx.inliner.inline_local_functions(made)
    made.ir_version = max(made.ir_version, 8)
    given = dict(feeds)
    for name in fixed_inputs(made.graph, feeds):
        made.graph.initializer.append(numpy_helper.from_array(np.asarray(given.pop(name)), name))
    _constants_to_initializers(made.graph)
    _free(made.graph, variables, given)
    for _ in range(_ROUNDS):
        shapes, known, samples = _look(made, given)
        changed = _fold(made.graph, known)
        changed |= _decide(made.graph, known)
        if not changed:
            kinds = _kinds(made)
            emitter = Emitter(opset_of(made), _names(made.graph), prefix)
            changed = lower(made.graph, emitter, shapes, kinds, _stored(made.graph))
            if not changed:
                break
    _unused(made.graph)
    return Concrete(made, shapes, kinds, _stored(made.graph), samples)


def fixed_inputs(graph: onnx.GraphProto, feeds: Mapping[str, NDArray[Any]]) -> list[str]:
    """Inputs of a single integer or boolean."""
    stored = {t.name for t in graph.initializer}
    given = {i.name: np.asarray(feeds[i.name]) for i in graph.input if i.name in feeds and i.name not in stored}
    return [n for n, value in given.items() if value.dtype.kind in "iub" and value.size == 1 and value.ndim < 2]


def _free(graph: onnx.GraphProto, variables: Collection[str], given: dict[str, NDArray[Any]]) -> None:
    """Variables become inputs, and are fed what they hold; other initializers cannot be overridden."""
    kept, wanted = [], set(variables)
    inputs = {i.name for i in graph.input}
    for tensor in graph.initializer:
        if tensor.name not in wanted:
            kept.append(tensor)
            continue
        given[tensor.name] = numpy_helper.to_array(tensor)
        if tensor.name not in inputs:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    names = {t.name for t in kept}
    del graph.initializer[:]
    graph.initializer.extend(kept)
    entries = [i for i in graph.input if i.name not in names]
    del graph.input[:]
    for entry in entries:
        if entry.name in given:
            value = np.asarray(given[entry.name])
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            entry = helper.make_tensor_value_info(entry.name, kind, list(value.shape))
        graph.input.append(entry)
    del graph.value_info[:]
    for output in graph.output:
        output.ClearField("type")


def _constants_to_initializers(graph: onnx.GraphProto, names: Collection[str] | None = None) -> None:
    """Constant nodes (None: all that hold a tensor) become initializers."""
    kept = []
    for node in graph.node:
        tensor = next((a.t for a in node.attribute if a.name == "value"), None) if node.op_type == "Constant" else None
        if tensor is None or (names is not None and node.output[0] not in names):
            kept.append(node)
        else:
            graph.initializer.add().CopyFrom(tensor)
            graph.initializer[-1].name = node.output[0]
    del graph.node[:]
    graph.node.extend(kept)


def hoist(graph: onnx.GraphProto, names: Collection[str]) -> None:
    """Weights inside branches, by names that are nowhere else, become initializers of the main graph."""
    for node in graph.node:
        for body in bodies(node):
            _constants_to_initializers(body, names)
            hoist(body, names)
            moved = [t for t in body.initializer if t.name in names]
            kept = [t for t in body.initializer if t.name not in names]
            graph.initializer.extend(moved)
            del body.initializer[:]
            body.initializer.extend(kept)


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs a node holds."""
    for item in node.attribute:
        if item.type == onnx.AttributeProto.GRAPH:
            yield item.g
        yield from item.graphs


def captured(graph: onnx.GraphProto) -> set[str]:
    """Names that a body reads from outside."""
    inner = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    found: set[str] = set()
    for node in graph.node:
        found |= {name for name in reads(node) if name not in inner}
        inner.update(node.output)
    return found | {o.name for o in graph.output if o.name not in inner}


def reads(node: onnx.NodeProto) -> set[str]:
    """What a node and its bodies read."""
    found = {name for name in node.input if name}
    for body in bodies(node):
        found |= captured(body)
    return found


def _names(graph: onnx.GraphProto) -> set[str]:
    found = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    for node in graph.node:
        found.update(node.output)
        for body in bodies(node):
            found |= _names(body)
    return found


def _static(graph: onnx.GraphProto) -> set[str]:
    """Values that depend on shapes and constants alone."""
    found = {t.name for t in graph.initializer}
    for node in graph.node:
        by_shape = node.op_type in ("Shape", "Size") and not node.domain
        if node.op_type not in _RANDOM and (by_shape or reads(node) <= found):
            found.update(name for name in node.output if name)
    return found


def _look(
    model: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]]
) -> tuple[dict[str, Shape], dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """(shapes of all values, the static ones in numbers, what undecided branches capture), from one run."""
    graph = model.graph
    static = _static(graph) - {t.name for t in graph.initializer}
    kinds = _kinds(model)
    used = set().union(*(reads(n) for n in graph.node)) if graph.node else set()
    wanted = [n for n in static if n in used or n in {o.name for o in graph.output}]
    branches = set().union(*(captured(b) for n in graph.node for b in bodies(n)))
    branches -= {t.name for t in graph.initializer} | set(feeds) | set(wanted)
    produced = [name for node in graph.node for name in node.output if name and kinds.get(name) != -1]
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    labels = {name: f"{name}//shape" for name in produced}
    # ONNX Runtime has no Shape of 4-bit integers; they have that of what was rounded.
    rounded = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "QuantizeLinear"}
    sized.graph.node.extend(helper.make_node("Shape", [rounded.get(n, n)], [label]) for n, label in labels.items())
    session = Session(sized, optimize=False, threads=1, taps=[*labels.values(), *wanted, *branches], outputs=False)
    values = session.run(feeds)
    shapes: dict[str, Shape] = {name: tuple(values[label].tolist()) for name, label in labels.items()}
    shapes |= {name: np.asarray(value).shape for name, value in feeds.items()}
    shapes |= {t.name: tuple(t.dims) for t in graph.initializer}
    known = {name: np.asarray(values[name]) for name in wanted}
    return shapes, known, {name: np.asarray(values[name]) for name in branches}


def _kinds(model: onnx.ModelProto) -> dict[str, int]:
    """Element types by name; -1: no tensor."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    found = {t.name: t.data_type for t in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        kind = value.type.WhichOneof("value")
        found[value.name] = value.type.tensor_type.elem_type if kind in ("tensor_type", None) else -1
    for node in inferred.node:  # what inference could not tell is float
        for name in node.output:
            if not found.get(name):
                found[name] = TensorProto.FLOAT
    return found


def _fold(graph: onnx.GraphProto, known: Mapping[str, NDArray[Any]]) -> bool:
    """Nodes whose outputs are known go; those outputs that are read become initializers."""
    static = _static(graph)
    gone = [node for node in graph.node if any(node.output) and {n for n in node.output if n} <= static]
    if not gone:
        return False
    for name, value in known.items():
        graph.initializer.append(numpy_helper.from_array(value, name))
    left = [node for node in graph.node if node not in gone]
    del graph.node[:]
    graph.node.extend(left)
    return True


def _decide(graph: onnx.GraphProto, known: Mapping[str, NDArray[Any]]) -> bool:
    """An If whose condition is known becomes the branch it takes."""
    stored = {t.name: t for t in graph.initializer}
    kept: list[onnx.NodeProto] = []
    changed = False
    for node in graph.node:
        if node.op_type != "If" or node.input[0] not in stored:
            kept.append(node)
            continue
        condition = bool(numpy_helper.to_array(stored[node.input[0]]).reshape(()))
        attribute = "then_branch" if condition else "else_branch"
        body = next(a.g for a in node.attribute if a.name == attribute)
        kept += inline(graph, body, {}, list(node.output), f"{node.output[0]}//{attribute}/")
        changed = True
    del graph.node[:]
    graph.node.extend(kept)
    if changed:
        _constants_to_initializers(graph)
    return changed


def inline(
    graph: onnx.GraphProto, body: onnx.GraphProto, rename: Mapping[str, str], outputs: list[str], prefix: str
) -> list[onnx.NodeProto]:
    """The nodes of ``body`` under names of their own, ending in ``outputs``; its initializers go to ``graph``."""
    names = dict(rename)
    for tensor in body.initializer:
        names[tensor.name] = prefix + tensor.name
        graph.initializer.add().CopyFrom(tensor)
        graph.initializer[-1].name = names[tensor.name]
    found = []
    for node in body.node:
        copy = _renamed(node, names, prefix)
        found.append(copy)
    for inner, outer in zip(body.output, outputs, strict=True):
        if outer:
            found.append(helper.make_node("Identity", [names.get(inner.name, inner.name)], [outer]))
    return found


def _renamed(node: onnx.NodeProto, names: dict[str, str], prefix: str) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [names.get(n, n) for n in node.input]
    for name in node.output:
        if name:
            names[name] = prefix + name
    copy.output[:] = [names.get(n, n) for n in node.output]
    copy.name = prefix + (node.name or node.op_type)
    for body in bodies(copy):
        own = dict(names)
        for item in (*body.input, *body.initializer):
            own.pop(item.name, None)
        inner = [_renamed(n, own, prefix) for n in body.node]
        del body.node[:]
        body.node.extend(inner)
        for output in body.output:
            output.name = own.get(output.name, output.name)
    return copy


def _stored(graph: onnx.GraphProto) -> dict[str, NDArray[Any]]:
    return {t.name: numpy_helper.to_array(t) for t in graph.initializer}


def _unused(graph: onnx.GraphProto) -> None:
    """Drop nodes and initializers that lead to no output."""
    needed = {o.name for o in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed |= reads(node)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    tensors = [t for t in graph.initializer if t.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
