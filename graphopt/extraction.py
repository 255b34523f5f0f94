"""Cut a piece out of a model: between these values and those, with everything it needs (weights, bodies, functions).

The cut itself is made on the graphsurgeon view where that can carry the model, and on onnx-ir where it cannot. What is
cut, and whether it is a piece at all, is decided here, so that the message is the same on both.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from graphopt.errors import InputError, RuntimeFailure
from graphopt.external import shown
from graphopt.graph import bodies, fresh, label, value_names
from graphopt.model import clone, to_proto, weight_bytes
from graphopt.propagation import inferred
from graphopt.session import Session
from graphopt.storage import INLINE_LIMIT
from graphopt.surgery import edit
from graphopt.validation import random_feeds

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

_SHOWN = 8
_LIGHT = 1024  # bytes: smaller weights may be shapes


def cut_out(
    model: ir.Model, inputs: Sequence[str] | None = None, outputs: Sequence[str] | None = None
) -> tuple[ir.Model, list[str]]:
    """The piece of ``model`` from ``inputs`` to ``outputs``, and what the user should know about it.

    None stands for the model's own: the inputs that the outputs need, all outputs. Weights come along by themselves,
    also those that a caller may override.

    Raises:
        InputError: an unknown name, a value inside a body, or inputs that do not cut the outputs off.
    """
    model = clone(model)
    first, last = _bounds(model, inputs, outputs)
    types = _types(model, [*first, *last])
    names = [v.name or "" for v in first], [v.name or "" for v in last]
    _declare([*first, *last], types)
    _unplug(model, first)
    problem: str | None = None
    for engine in (_by_graphsurgeon, by_onnx_ir):
        piece = engine(model, *names)
        if piece is None:
            continue
        _finish(piece)
        problem = _checked(piece)
        if problem is None:
            break
    assert piece is not None  # onnx-ir carries everything
    return piece, [f"WARNING: the onnx checker refuses the piece: {problem}"] if problem else []


def _unplug(model: ir.Model, first: Sequence[ir.Value]) -> None:
    """Give who reads an inner value an input of the same name instead; both engines then only drop what is unused.

    Its node may still be needed for another of its outputs, and goes on making the value under another name.
    """
    taken = value_names(model)
    for old in first:
        if old.producer() is None:
            continue
        new = ir.Value(name=old.name, type=old.type, shape=old.shape, doc_string=old.doc_string)
        new.metadata_props.update(old.metadata_props)
        new.meta.update(old.meta)
        for user, index in list(old.uses()):
            user.replace_input_with(index, new)
        old.name = fresh(f"{old.name}_cut", taken)
        model.graph.inputs.append(new)


def by_onnx_ir(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """The piece, weights shared with ``model``; no question is asked and no type looked for."""
    overridable = [v for v in model.graph.inputs if v.is_initializer() and v.name not in inputs]
    given: list[ir.Value | str] = [*inputs, *(v for v in overridable if v.uses())]
    graph = ir.convenience.extract(model.graph, given, list(outputs))
    read = {v for node in graph for v in reads(node)}
    for value in [v for v in graph.inputs if v.is_initializer() and v not in read]:
        graph.inputs.remove(value)
        graph.initializers.pop(value.name or "")
    piece = ir.Model(
        graph,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        domain=model.domain,
        model_version=model.model_version,
        doc_string=model.doc_string,
        functions=list(model.functions.values()),
        metadata_props=dict(model.metadata_props),
        device_configurations=tuple(model.device_configurations),
    )
    piece.meta.update(model.meta)
    return piece


def _by_graphsurgeon(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model | None:
    """The piece, or None where graphsurgeon cannot carry the model."""

    def cut(graph: gs.Graph) -> None:
        tensors = graph.tensors()
        # An input that is a weight too (a caller may override it) is a constant here, and listed again afterwards.
        starts = [tensors[name] for name in inputs if not hasattr(tensors[name], "values")]
        graph.inputs, graph.outputs = starts, [tensors[name] for name in outputs]
        graph.cleanup(recurse_subgraphs=False, recurse_functions=False)

    piece = clone(model)
    if not all(isinstance(v.type, ir.TensorType) for v in (*model.graph.inputs, *model.graph.outputs)):
        return None  # it would complain aloud about what is no tensor
    try:
        edit(piece, cut)
    except Exception:  # it says what it cannot carry, or fails in ways of its own; onnx-ir carries everything
        return None
    return piece


def _declare(values: Iterable[ir.Value], types: dict[str, tuple[Any, Any]]) -> None:
    """Write down the types of what becomes an input or output; a checker wants them, and so does graphsurgeon."""
    for value in values:
        kind, shape = types.get(value.name or "", (None, None))
        value.type = kind if value.type is None else value.type
        value.shape = shape if value.shape is None else value.shape


def _finish(piece: ir.Model) -> None:
    """No functions that nothing calls, no training of weights that are gone."""
    ir_passes.RemoveUnusedFunctionsPass()(piece)  # type: ignore[no-untyped-call]
    piece.meta["graphopt.training"] = []


def _checked(piece: ir.Model) -> str | None:
    """What onnx's checker has against it, in one line."""
    import onnx

    if weight_bytes(piece) > INLINE_LIMIT:
        return None  # the checker takes no more in memory
    try:
        onnx.checker.check_model(to_proto(piece))
    except Exception as error:  # onnx raises ValidationError, and TypeError or ValueError from below
        return shown(" ".join(str(error).split()))
    return None


# What is to be cut


def _bounds(
    model: ir.Model, inputs: Sequence[str] | None, outputs: Sequence[str] | None
) -> tuple[list[ir.Value], list[ir.Value]]:
    """The values to cut at, or an error that says what to give instead."""
    for option, given in (("inputs", inputs), ("outputs", outputs)):
        if isinstance(given, str):
            raise InputError(f"{option} is one string; give a list of value names: [{given!r}]")
        if given is not None and not given:
            raise InputError(f"no {option} are named; name at least one, or leave --{option} out for the model's own")
    find = _Finder(model)
    last = find.all(outputs) if outputs is not None else list(model.graph.outputs)
    own = [v for v in model.graph.inputs if not v.is_initializer()]
    first = find.all(inputs) if inputs is not None else own
    for value in last:
        if inputs is not None and value in first:
            raise InputError(f"'{_name(value)}' is both an input and an output: there is nothing between; name another")
        if value.producer() is None:
            what = "a weight" if value.is_initializer() else "an input of the model"
            raise InputError(f"'{_name(value)}' is {what}, so no node makes it; name a value that a node makes")
    for value in first:
        if value.is_initializer() and not value.is_graph_input():
            raise InputError(f"'{_name(value)}' is a weight, and weights come along by themselves; leave it out")
    reached, needed = _backwards(last, set(first))
    idle = [v for v in first if v not in reached]
    if inputs is not None and idle:
        raise InputError(f"{_list(last)} can be computed without {_list(idle)}; leave it out of --inputs")
    missing = [v for v in own if v in reached and v not in first]
    if missing:
        also = _also(model, first, last, needed, set(missing))
        raise InputError(
            f"{_list(first)} {'does' if len(first) == 1 else 'do'} not cut {_list(last)} off; also needs: "
            f"{', '.join(map(_name, also))}"
        )
    return [v for v in first if v in reached], last


def _list(values: Sequence[ir.Value]) -> str:
    return ", ".join(f"'{_name(v)}'" for v in values[:_SHOWN]) + (", ..." if len(values) > _SHOWN else "")


def _name(value: ir.Value) -> str:
    return shown(value.name or "")


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads: its inputs, and what its bodies read (their own values among it)."""
    yield from (v for v in node.inputs if v is not None)
    for body in bodies(node):
        for inner in body:
            yield from reads(inner)
        yield from body.outputs


def _backwards(last: Iterable[ir.Value], stop: set[ir.Value]) -> tuple[set[ir.Value], set[ir.Node]]:
    """The values and nodes that ``last`` depends on, up to and with ``stop``."""
    values: set[ir.Value] = set()
    made: set[ir.Node] = set()
    stack = list(last)
    while stack:
        value = stack.pop()
        if value in values:
            continue
        values.add(value)
        producer = value.producer()
        if value in stop or producer is None or producer in made:
            continue
        made.add(producer)
        stack.extend(reads(producer))
    return values, made


def _also(
    model: ir.Model, first: list[ir.Value], last: list[ir.Value], needed: set[ir.Node], missing: set[ir.Value]
) -> list[ir.Value]:
    """What else to cut at: where other branches come into what the given inputs lead to.

    The nearest such values, not the model's inputs far behind them: beside a residual block that is its other branch.
    """
    led = set(first)  # the given inputs and what they lead to
    live = set(missing)  # the missing inputs and what they lead to, past the given ones
    found: dict[ir.Value, None] = {}
    for node in model.graph:
        if node not in needed:
            continue
        read = list(reads(node))
        if any(v in live for v in read):
            live.update(v for v in node.outputs if v not in first)
        if any(v in led for v in read):
            found.update((v, None) for v in read if v in live and v not in led)
            led.update(node.outputs)
    for value in last:
        if value not in led:  # no given input leads there: only the model's own inputs help
            behind, _ = _backwards([value], set(first))
            found.update((v, None) for v in missing if v in behind)
    return list(found)


class _Finder:
    """Values of the main graph by name, with a helpful error for every other name."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        graph = model.graph
        self._known: dict[str | None, ir.Value] = {v.name: v for node in graph for v in node.outputs if v.name}
        self._known |= {v.name: v for v in (*graph.initializers.values(), *graph.inputs)}

    def all(self, given: Sequence[str]) -> list[ir.Value]:
        """Each once; ``a,b`` are two names unless one value is called that."""
        names = [n.strip() for text in given for n in ([text] if text in self._known else text.split(","))]
        return [self(name) for name in dict.fromkeys(names)]

    def __call__(self, name: str) -> ir.Value:
        found = self._known.get(name)
        if found is not None:
            return found
        for node in self._model.graph:
            if node.name == name:
                made = ", ".join(v.name for v in node.outputs if v.name)
                raise InputError(f"'{shown(name)}' is a node, and cuts are made at values; it makes: {made}")
            if name in _inner_names(node):
                made = ", ".join(v.name for v in node.outputs if v.name)
                raise InputError(
                    f"'{shown(name)}' is inside a body of {node.op_type} '{label(node)}', and only the main graph can "
                    f"be cut; cut at what that node makes: {made}"
                )
        functions = self._model.functions.values()
        holder = next((f for f in functions for node in f for v in node.outputs if v.name == name), None)
        if holder is not None:
            raise InputError(f"'{shown(name)}' is inside function '{holder.name}'; only the main graph can be cut")
        near = difflib.get_close_matches(name, [n for n in self._known if n], n=1)
        hint = f"did you mean '{shown(near[0])}'?" if near else "graphopt inspect --nodes lists the nodes"
        raise InputError(f"no value is called '{shown(name)}' (in the main graph); {hint}")


def _inner_names(node: ir.Node) -> set[str | None]:
    names: set[str | None] = set()
    for body in bodies(node):
        names.update(v.name for v in (*body.inputs, *body.initializers.values()))
        for inner in body:
            names.update(v.name for v in inner.outputs if v.name)
            names |= _inner_names(inner)
    return names


# The types of what was an inner value


def _types(model: ir.Model, values: Sequence[ir.Value]) -> dict[str, tuple[Any, Any]]:
    """Type and shape by name: as declared, else inferred by onnx, else type and rank as ONNX Runtime computes them.

    Raises:
        InputError: nobody knows the type of a value.
    """
    known: dict[str | None, tuple[Any, Any]] = {v.name: (v.type, v.shape) for v in values}
    if any(kind is None or shape is None for kind, shape in known.values()):
        inferred = typed(model)
        for node in inferred.graph:
            for value in node.outputs:
                if value.name in known:
                    kind, shape = known[value.name]
                    known[value.name] = (kind or value.type, value.shape if shape is None else shape)
    found = {name or "": kinds for name, kinds in known.items()}
    unknown = [name for name, (kind, shape) in found.items() if kind is None or shape is None]
    computed = _computed(model, unknown) if unknown else {}
    for name in unknown:
        kind, shape = found[name]
        found[name] = (
            kind or computed.get(name, (None, None))[0],
            computed.get(name, (None, None))[1] if shape is None else shape,
        )
        if found[name][0] is None:
            raise InputError(
                f"the type of '{shown(name)}' is not known: the model does not say, onnx cannot infer it and ONNX "
                "Runtime cannot run it; cut somewhere else, or export the model with types"
            )
    return found


def typed(model: ir.Model) -> ir.Model:
    """A copy with the types and shapes that onnx can infer; it stops at operators it does not know."""

    twin, light = clone(model), clone(model)
    for name, value in list(light.graph.initializers.items()):
        if value.const_value is None or value.const_value.nbytes > _LIGHT:
            del light.graph.initializers[name]  # inference needs its type, not its numbers
            value.const_value = None
            if value not in light.graph.inputs:
                light.graph.inputs.append(value)
    try:
        graph = inferred(to_proto(light)).graph
    except Exception:  # a hint, and no more
        return twin
    # Not onnx_ir.passes.common.ShapeInferencePass: it makes tensors of sequences (1.1.0).
    infos = {info.name: info for info in (*graph.value_info, *graph.output)}
    for node in twin.graph:
        for value in node.outputs:
            if value.name in infos and (value.type is None or value.shape is None):
                with contextlib.suppress(ir.serde.SerdeError):  # a type that onnx-ir has no form for, a map say
                    ir.serde.deserialize_value_info_proto(infos[value.name], value)
    return twin


def _computed(model: ir.Model, names: list[str]) -> dict[str, tuple[Any, Any]]:
    """Type and rank as one run on random inputs finds them; nothing where the model does not run."""
    try:
        values = Session(model, optimize=False, taps=names, outputs=False).run(random_feeds(model, 1)[0], names)
    except (RuntimeFailure, InputError):
        return {}
    return {
        name: (ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.Shape([None] * array.ndim))
        for name, array in values.items()
        if isinstance(array, np.ndarray) and array.dtype != object
    }
