"""What of a student can be trained, and how it goes back: integers get float shadows that are rounded on every step.

A weight stored as integers becomes ``DequantizeLinear(QuantizeLinear(W))`` of a float ``W``, kept within the integers
that the student used (4 bits stay 4 bits); an int32 bias becomes a float. At the end they are rounded for good.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.autodiff.specialize import hoist
from graphopt.base import Skip
from graphopt.graph import constant_array, fresh, is_op, label, value_names
from graphopt.model import clone, to_proto
from graphopt.passes._weights import add_constant
from graphopt.qdq import dequantizer, is_dq, is_q, parameters
from graphopt.training import Variable

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from graphopt.qdq import Parameters

SCALES = ("none", "weights", "all")
_HUGE = 1e4  # a constant that large is a mask, not a weight

_FIXED = {
    "Resize": (1, 2, 3), "Upsample": (1,), "Clip": (1, 2), "Pad": (1, 2, 3), "BatchNormalization": (3, 4), "Pow": (1,),
    "QuantizeLinear": (1, 2), "DequantizeLinear": (1, 2), "OneHot": (0, 1, 2), "Range": (0, 1, 2), "Where": (0,),
    "Dropout": (1, 2), "Equal": (0, 1), "Greater": (0, 1), "Less": (0, 1), "GreaterOrEqual": (0, 1),
    "LessOrEqual": (0, 1),
}  # fmt: skip
"""Operator -> inputs that are settings, not weights."""


@dataclass
class _Integers:
    """A stored weight: its integers lie in ``value`` of the model that is written to."""

    value: ir.Value
    node: ir.Node
    form: Parameters
    limit: int | None
    shadow: str
    scale: str


@dataclass
class _Bias:
    """An int32 bias and the scales whose product is its own, where that is so."""

    value: ir.Value
    scale: ir.Value | None
    shadow: str
    factors: tuple[str, str] | None
    kept: NDArray[Any]


@dataclass
class Shadows:
    """A student ready to be trained: ``proto`` (float wherever it is trained) and the ``variables`` in it.

    ``frozen``: what stays as it is, and why.
    """

    proto: onnx.ModelProto
    variables: list[Variable]
    frozen: list[Skip]
    weights: int = 0
    _integers: list[_Integers] = field(default_factory=list)
    _biases: list[_Bias] = field(default_factory=list)
    _plain: dict[str, ir.Value] = field(default_factory=dict)
    _scales: dict[str, list[ir.Value]] = field(default_factory=dict)

    def write(self, values: Mapping[str, NDArray[np.float32]]) -> list[str]:
        """Put trained values into the model this was made of; returns the names of what was written."""
        written: list[str] = []

        def scale_of(name: str, stored: ir.Value | None) -> NDArray[Any]:
            array = values.get(name)
            found = array if array is not None else constant_array(stored)
            assert found is not None
            return found

        for name, held in self._scales.items():
            if name in values:
                for value in held:
                    set_constant(value, values[name])
        for item in self._integers:
            scale = scale_of(item.scale, item.node.inputs[1])
            stored = constant_array(item.value)
            assert stored is not None
            line = _along(scale, stored.ndim, item.form.axis)
            zero = _along(item.form.zero, stored.ndim, item.form.axis)
            whole = np.rint(values[item.shadow].astype(np.float64) / line.astype(np.float64))
            low, high = _bounds(item.form.kind)
            if item.limit is not None:
                whole = np.clip(whole, -item.limit, item.limit)
            set_constant(item.value, np.clip(whole + zero, low, high).astype(stored.dtype))
            written.append(item.value.name or "")
        for bias in self._biases:
            scale = bias.kept
            if bias.factors is not None and bias.scale is not None and set(bias.factors) & set(values):
                parts = [values[n] if n in values else self._fixed_scale(n) for n in bias.factors]
                product = (parts[0].reshape(-1).astype(np.float32) * parts[1].reshape(-1)).astype(np.float32)
                scale = product.reshape(bias.kept.shape)
                set_constant(bias.scale, scale)
            limit = 2.0**31 - 1
            whole = np.rint(values[bias.shadow].astype(np.float64) / scale.astype(np.float64))
            set_constant(bias.value, np.clip(whole, -limit, limit).astype(np.int32))
            written.append(bias.value.name or "")
        for name, value in self._plain.items():
            set_constant(value, values[name])
            written.append(name)
        return written

    def _fixed_scale(self, name: str) -> NDArray[Any]:
        found = constant_array(self._scales[name][0])
        assert found is not None
        return found


def set_constant(value: ir.Value, array: NDArray[Any]) -> None:
    """Let an initializer or a Constant node hold ``array``."""
    old = value.const_value
    kind = old.dtype if old is not None and value.is_initializer() else None
    tensor = ir.tensor(np.ascontiguousarray(array), dtype=kind, name=value.name)
    if value.is_initializer():
        value.const_value = tensor
        return
    node = value.producer()
    assert node is not None
    for name in ("value_float", "value_floats"):
        node.attributes.pop(name, None)
    node.attributes["value"] = ir.AttrTensor("value", tensor)


def shadow(model: ir.Model, freeze: tuple[str, ...], scales: str) -> Shadows:
    """Find what can be trained in ``model``; it is not changed until :meth:`Shadows.write`."""
    work = clone(model)
    builder = _Builder(model, work, freeze, scales)
    builder.pairs()
    builder.integers()
    builder.floats()
    found = builder.found
    found.proto = to_proto(work)
    hoist(found.proto.graph, {v.name for v in found.variables})
    if found.proto.functions:
        found.frozen.append(Skip("(functions)", "weights inside model functions; run inline-functions first"))
    return found


class _Builder:
    """One sweep over a copy of the student; ``here`` is the same value in the model that is written to."""

    def __init__(self, model: ir.Model, work: ir.Model, freeze: tuple[str, ...], scales: str) -> None:
        import onnx

        self.model, self.work, self.freeze, self.scales = model, work, freeze, scales
        self.here = {v.name: v for graph in model.graphs() for v in _constants(graph) if v.name}
        self.counts = Counter(v.name for graph in model.graphs() for v in _constants(graph))
        self.nodes = {node.outputs[0].name: node for node in model.graph if node.outputs}
        self.taken = value_names(work)
        self.found = Shadows(onnx.ModelProto(), [], [])
        self._names: set[str] = set()

    def frozen(self, value: ir.Value, *names: str) -> bool:
        """Whether the user froze a constant: by its own name, or a reader's name or operator type."""
        known = {value.name or "", *names}
        for user, _ in value.uses():
            known |= {label(user), user.op_type}
        return any(fnmatch.fnmatchcase(name, pattern) for name in known for pattern in self.freeze)

    def variable(self, name: str, value: NDArray[Any], **options: Any) -> None:
        """Train the initializer ``name`` of the copy."""
        if name not in self._names:
            self._names.add(name)
            self.found.variables.append(Variable(name, np.array(value, np.float32), **options))

    def pairs(self) -> None:
        """Activation pairs: both operators read one scale, equal ones are one, and it may be trained."""
        shared: dict[tuple[float, int, str], ir.Value] = {}
        for node in list(self.work.graph):
            if not is_q(node) or (form := parameters(node)) is None or form.per_axis:
                continue
            source = node.inputs[0]
            if source is None or node.inputs[1] is None or constant_array(source) is not None:
                continue
            key = (float(form.scale.reshape(())), int(form.zero.reshape(-1)[0]), form.kind)
            scale = shared.setdefault(key, node.inputs[1])
            self.found._scales.setdefault(scale.name or "", [])
            held = self.found._scales[scale.name or ""]
            for reader in [node, *(u.node for u in node.outputs[0].uses() if is_dq(u.node))]:
                theirs = parameters(reader)
                if theirs is None or not theirs.same(form) or reader.inputs[1] is None:
                    continue
                original = self.here.get(reader.inputs[1].name or "")
                if original is not None and original not in held:
                    held.append(original)
                reader.replace_input_with(1, scale)
                if reader is not node and len(node.inputs) > 2:
                    while len(reader.inputs) > 2 and reader.inputs[2] is not node.inputs[2]:
                        reader.replace_input_with(2, node.inputs[2])
            if self.scales == "all" and not self.frozen(scale):
                clipped = is_op(source.producer(), "Clip")  # the runtime drops it only while the range is inside
                options = {"ceiling": float(key[0])} if clipped else {}
                self._float_scale(scale, form.scale, **options)

    def _float_scale(self, scale: ir.Value, value: NDArray[Any], **options: Any) -> None:
        self.variable(scale.name or "", value, positive=True, **options)

    def integers(self) -> None:
        """Stored integer weights, then the biases, whose scales follow from theirs."""
        stored_nodes = [n for n in self.work.graph if is_dq(n) and constant_array(n.inputs[0]) is not None]
        for node in sorted(stored_nodes, key=lambda n: str(constant_array(n.inputs[0]).dtype) == "int32"):  # type: ignore[union-attr]
            stored = constant_array(node.inputs[0])
            assert stored is not None
            form, value = parameters(node), node.inputs[0]
            assert value is not None
            name = value.name or ""
            if self.frozen(value, *(label(u.node) for u in node.outputs[0].uses())):
                self.found.frozen.append(Skip(name, "frozen, as asked"))
            elif form is None or node.inputs[1] is None:
                self.found.frozen.append(Skip(name, "its scale or zero point is computed"))
            elif form.block or form.scale.ndim > 1:
                self.found.frozen.append(Skip(name, "it has scales per block"))
            elif form.kind == "int32":
                self._bias(node, value, form, stored)
            elif np.issubdtype(form.scale.dtype, np.float32):
                self._weight(node, value, form, stored)
            else:
                self.found.frozen.append(Skip(name, f"its scales are {form.scale.dtype}"))

    def _weight(self, node: ir.Node, value: ir.Value, form: Parameters, stored: NDArray[Any]) -> None:
        scale = node.inputs[1]
        assert scale is not None
        name, rank = value.name or "", stored.ndim
        centred = stored.astype(np.int64) - _along(form.zero, rank, form.axis)
        largest = int(np.abs(centred).max()) if centred.size else 0
        limit = largest if 0 < largest < 128 else None
        data = (centred * _along(form.scale, rank, form.axis)).astype(np.float32)
        own = fresh(f"{name}//float", self.taken)
        source = _initializer(self.work, own, data)
        axis = form.axis % rank if rank else 0
        if limit is not None:
            edge = ir.node(
                "Mul", [scale, _initializer(self.work, fresh(f"{name}//limit", self.taken), np.float32(limit))]
            )
            line = [-1 if i == axis else 1 for i in range(rank)] if form.scale.ndim else []
            shape = _initializer(self.work, fresh(f"{name}//line", self.taken), np.asarray(line, np.int64))
            wide = ir.node("Reshape", [edge.outputs[0], shape])
            least = ir.node("Neg", [wide.outputs[0]])
            above = ir.node("Max", [source, least.outputs[0]])
            within = ir.node("Min", [above.outputs[0], wide.outputs[0]])
            made = [edge, wide, least, above, within]
            zero = np.zeros(form.scale.shape, np.int8)
        else:
            made, within = [], None
            zero = form.zero.astype(form.kind).reshape(form.scale.shape)
        point = _initializer(self.work, fresh(f"{name}//zero", self.taken), zero)
        read = within.outputs[0] if within is not None else source
        pair = ir.node(
            "QuantizeLinear", [read, scale, point], attributes={"axis": form.axis} if form.scale.ndim else {}
        )
        made.append(pair)
        back = ir.node("DequantizeLinear", [pair.outputs[0], scale, point])
        if form.scale.ndim:
            back.attributes["axis"] = ir.AttrInt64("axis", form.axis)
        made.append(back)
        for item in made:
            item.outputs[0].name = fresh(f"{name}//{item.op_type}", self.taken)
        self.work.graph.insert_before(node, made)
        for user, index in list(node.outputs[0].uses()):
            user.replace_input_with(index, back.outputs[0])
        if not node.outputs[0].is_graph_output():
            self.work.graph.remove([node], safe=True)
        self.variable(own, data)
        self.found._scales.setdefault(scale.name or "", [])
        original = self.here[scale.name or ""]
        if original not in self.found._scales[scale.name or ""]:
            self.found._scales[scale.name or ""].append(original)
        if self.scales != "none" and not self.frozen(scale):
            self._float_scale(scale, form.scale)
        node_here = self.nodes[node.outputs[0].name]
        self.found._integers.append(_Integers(self.here[name], node_here, form, limit, own, scale.name or ""))
        self.found.weights += stored.size

    def _bias(self, node: ir.Node, value: ir.Value, form: Parameters, stored: NDArray[Any]) -> None:
        name = value.name or ""
        data = (stored.astype(np.float64) * form.scale.astype(np.float64)).astype(np.float32)
        own = fresh(f"{name}//float", self.taken)
        source = _initializer(self.work, own, data)
        factors = self._factors(node)
        if factors is not None and any(f not in self.found._scales for f in factors):
            factors = None
        for user, index in list(node.outputs[0].uses()):
            user.replace_input_with(index, source)
        scale = node.inputs[1]
        assert scale is not None
        kept = self.here.get(scale.name or "")
        if kept is not None and len({id(u.node) for u in kept.uses()}) > 1:
            factors = None  # somebody else reads that scale too
        self.variable(own, data)
        self.found._biases.append(_Bias(self.here[name], kept, own, factors, form.scale))
        self.found.weights += stored.size

    def _factors(self, node: ir.Node) -> tuple[str, str] | None:
        """The names of the input's and the weight's scale of the layer that adds this bias."""
        for user, _ in node.outputs[0].uses():
            layer: ir.Node | None = user
            if is_op(user, "Add"):
                makers = [v.producer() for v in user.inputs if v is not None]
                layer = next((p for p in makers if is_op(p, "MatMul", "Conv", "ConvTranspose", "Gemm")), None)
            if layer is None or len(layer.inputs) < 2:
                continue
            ends = [dequantizer(layer.inputs[i]) for i in (0, 1)]
            scales = [end.inputs[1].name for end in ends if end is not None and end.inputs[1] is not None]
            if len(scales) == 2 and all(scales):
                return str(scales[0]), str(scales[1])
        return None

    def floats(self) -> None:
        """Everything stored in float that is a weight."""
        trained = set(self._names)
        for value in (value for graph in self.work.graphs() for value in _constants(graph)):
            name = value.name or ""
            array = constant_array(value)
            if name in trained or name not in self.here or array is None or array.size < 2:
                continue
            if str(array.dtype) in ("float16", "bfloat16"):
                self.found.frozen.append(Skip(name, f"it is {array.dtype}; gradients are float32"))
            if array.dtype != np.float32:
                continue
            if value.is_graph_input() or value.is_graph_output():
                continue
            uses = [(u.node, u.idx) for u in value.uses()]
            if not uses or any(index in _FIXED.get(user.op_type, ()) for user, index in uses):
                continue
            why = self._why_not(value, array, uses)
            if why is not None:
                self.found.frozen.append(Skip(name, why))
                continue
            self.variable(name, array)
            self.found._plain[name] = self.here[name]
            self.found.weights += array.size

    def _why_not(self, value: ir.Value, array: NDArray[Any], uses: list[tuple[ir.Node, int]]) -> str | None:
        if self.frozen(value):
            return "frozen, as asked"
        if self.counts[value.name] > 1:
            return "another branch has a weight of this name"
        if not np.isfinite(array).all() or np.abs(array).max() > _HUGE:
            return f"it holds numbers beyond {_HUGE:g}: a mask"
        if all(is_op(user, "Gather") and index == 0 for user, index in uses):
            return "an embedding table: few of its rows occur in the samples"
        return None


def _constants(graph: ir.Graph) -> Iterator[ir.Value]:
    """Initializers and the outputs of Constant nodes."""
    yield from graph.initializers.values()
    for node in graph:
        if is_op(node, "Constant"):
            yield node.outputs[0]


def _initializer(model: ir.Model, name: str, array: Any) -> ir.Value:
    found = add_constant(model, model.graph, name, np.asarray(array), set())
    assert found.name == name
    return found


def _along(array: NDArray[Any], rank: int, axis: int) -> NDArray[Any]:
    """Scales or zero points so that they broadcast against a tensor of ``rank``."""
    if array.size == 1:
        return array.reshape(())
    return array.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def _bounds(kind: str) -> tuple[int, int]:
    signed, bits = kind.startswith("int"), int(kind.lstrip("uint"))
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
