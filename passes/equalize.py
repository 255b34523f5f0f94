"""Giving every channel its share of the integer range, exactly.

Cross-layer equalization (Nagel et al. 2019, arXiv 1906.04721; Meller et al. 2019). Where a layer's output reaches
others through functions with ``f(s x) = s f(x)`` alone, channel ``i`` may be scaled by any ``s_i > 0`` in the first
layer's weights and scaled back in those that read it. Weights have a scale per output channel anyway; what gains is the
value in between, which has one scale for all its channels and rounds the quiet ones worst. Every ``s`` is a power of
two, so that not one bit of the result changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.errors import PreconditionError
from graphopt.graph import EQUALIZED, attribute, constant_array, fresh, is_op, label, value_names
from graphopt.linear import Form, form_of, from_matrix, to_matrix
from graphopt.passes._evenness import rounding_error
from graphopt.passes._patterns import matches
from graphopt.passes._placement import adder_of
from graphopt.passes._weights import add_constant, drop_unread

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STRENGTHS = (0.25, 0.5, 0.75, 1.0)
"""How much of the unevenness goes to the weights that read the value."""

_WORTH = 0.8
"""Of the error before: what is left after must be less."""

_ROWS = 512  # held-out inputs per layer that a scale is chosen on

_HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "Identity")
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")


@dataclass
class _Site:
    """``producer`` makes ``channels`` channels (its bias is input ``bias[1]`` of ``bias[0]``), which reach ``readers``
    and nobody else, by ``values``."""

    producer: ir.Node
    bias: tuple[ir.Node, int] | None
    axis: int
    channels: int
    readers: list[ir.Node] = field(default_factory=list)
    values: list[ir.Value] = field(default_factory=list)


@dataclass(frozen=True)
class Equalize(Pass):
    """Scale the channels between layers so that each uses the whole integer range, where quantizing the layers that
    read them then costs less on held-out inputs.

    ``exclude``: layers to leave as they are, named as for ``quantize-static``.
    """

    exclude: tuple[str, ...] = ()
    name: ClassVar[str] = "equalize"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        sites = _sites(model, self.exclude)
        if not sites:
            return result
        if context.data is None or context.layer_rows is None:
            raise PreconditionError("equalize looks at what layers read and needs calibration data; give --data FILE")
        held = _held_inputs(model, sites, context)
        taken = value_names(model)
        for site in sites:
            where = label(site.producer)
            if not context.allows(self.name, where) or not all(form_of(n) in held for n in site.readers):
                continue
            scale, left = _best(site, held)
            if left >= _WORTH:
                result.skipped.append(Skip(where, "its output's channels are even enough"))
                continue
            _apply(model, site, scale, taken)
            detail = (
                f"{len(site.readers)} readers; 8 bits cost {-10 * math.log10(max(left, 1e-12)):.1f} dB less held-out"
            )
            result.changes.append(Change("equalize", where, detail))
        return result


def _sites(model: ir.Model, exclude: Sequence[str]) -> list[_Site]:
    found = []
    for node in model.graph:
        site = _begin(node)
        if site is None or matches(node, exclude) or not _walk(site, site.bias[0] if site.bias else node, exclude):
            continue
        found.append(site)
    return found


def _begin(node: ir.Node) -> _Site | None:
    """A layer whose weights and bias can be scaled."""
    form = form_of(node)
    if form is None or form.batch or form.kind == "gemm-t" or not _own_weight(node):
        return None
    weight = constant_array(node.inputs[1])
    assert weight is not None
    matrix = to_matrix(node, weight)
    channels = matrix.shape[0] * matrix.shape[1]
    adder = adder_of(node)
    bias = None
    if adder is not None:
        bias = adder, 1 if adder.inputs[0] is node.outputs[0] else 0
    elif len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = node, 2
    if bias is not None:
        stored = constant_array(bias[0].inputs[bias[1]])
        if stored is None or stored.dtype != np.float32 or not stored.size == stored.shape[-1] == channels:
            return None
    return _Site(node, bias, -1 if form.kind == "gemm" else 1, channels)


def _own_weight(node: ir.Node) -> bool:
    weight = node.inputs[1]
    stored = constant_array(weight)
    alone = weight is not None and len(list(weight.uses())) == 1 and not weight.is_graph_output()
    alone = alone and attribute(node, "alpha", 1.0) != 0  # what Gemm multiplies its product by
    return alone and stored is not None and stored.dtype == np.float32 and bool(np.isfinite(stored).all())


def _walk(site: _Site, start: ir.Node, exclude: Sequence[str]) -> bool:
    """Follow the channels to everything that reads them; False where something would notice that they were scaled."""
    waiting = [start.outputs[0]]
    while waiting:
        value = waiting.pop()
        site.values.append(value)
        uses = list(value.uses())
        if value.is_graph_output() or not uses or not value.name:
            return False
        for node, index in uses:
            if node.graph is not site.producer.graph or index != 0:
                return False
            if _reads(site, node) and not matches(node, exclude):
                site.readers.append(node)
            elif is_op(node, *_HOMOGENEOUS) or (site.axis == 1 and is_op(node, *_POOLS) and len(node.outputs) == 1):
                waiting.append(node.outputs[0])
            else:
                return False
    return bool(site.readers)


def _reads(site: _Site, node: ir.Node) -> bool:
    """Whether ``node`` is a layer that reads the site's channels as its input channels, with weights of its own."""
    form = form_of(node)
    if form is None or form.batch or not _own_weight(node):
        return False
    if site.axis == 1:
        return form.kind in ("conv", "transpose") and form.groups * form.width == site.channels * math.prod(form.kernel)
    return form.kind == "gemm" and form.width == site.channels


def _held_inputs(model: ir.Model, sites: Sequence[_Site], context: Context) -> dict[Form, NDArray[np.float32]]:
    """Held-out inputs of all readers, float32[groups, K, n]."""
    forms = dict.fromkeys(form for site in sites for node in site.readers if (form := form_of(node)) is not None)
    assert context.layer_rows is not None
    found: dict[Form, list[NDArray[np.float32]]] = {}
    rows = context.layer_rows(model, list(forms), lambda form, samples: max(_ROWS // samples, 1), True)
    for form, columns in rows:
        found.setdefault(form, []).append(np.where(np.isfinite(columns), columns, 0))
    return {form: np.concatenate(parts, axis=2) for form, parts in found.items()}


def _best(site: _Site, held: dict[Form, NDArray[np.float32]]) -> tuple[NDArray[np.float64], float]:
    """(the best scale per channel, the readers' error with it, of that without it), on held-out inputs."""
    layers = [(to_matrix(node, _weight(node)), held[form]) for node in site.readers if (form := form_of(node))]

    def error(scale: NDArray[np.float64]) -> float:
        return sum(rounding_error(matrix, inputs, _spread(scale, matrix)) for matrix, inputs in layers)

    best, before = np.ones(site.channels), error(np.ones(site.channels))
    lowest = before
    loud = np.max([np.abs(inputs.reshape(site.channels, -1)).max(axis=1) for _, inputs in layers], axis=0)
    if before <= 0 or loud.max() <= 0:
        return best, 1.0
    heard = loud > loud.max() * 2.0**-20  # what was never seen to be anything stays as it is
    for strength in _STRENGTHS:
        exponent = np.where(heard, strength * np.log2(loud.max() / np.where(heard, loud, 1)), 0)
        scale = np.exp2(np.rint(exponent))
        found = error(scale)
        if found < lowest:
            best, lowest = scale, found
    return best, lowest / before


def _weight(node: ir.Node) -> NDArray[np.float32]:
    stored = constant_array(node.inputs[1])
    assert stored is not None
    return stored


def _spread(scale: NDArray[np.float64], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The scale of each of a reader's inputs x, [groups, K], out of one per input channel."""
    groups, _, width = matrix.shape
    return np.repeat(scale.reshape(groups, -1), width * groups // len(scale), axis=1)


def _apply(model: ir.Model, site: _Site, scale: NDArray[np.float64], taken: set[str]) -> None:
    """Scale what the producer makes, and take it back in its readers. What lies between gets other names: whoever
    compares models value by value must not take it for what had them before."""

    def put(node: ir.Node, index: int, array: NDArray[np.float64]) -> None:
        old = node.inputs[index]
        assert old is not None
        found = add_constant(model, model.graph, f"{old.name}_equalized", array.astype(np.float32), taken, node)
        node.replace_input_with(index, found)
        drop_unread(old)

    def weights(node: ir.Node, factor: NDArray[np.float64]) -> None:
        stored = _weight(node)
        put(node, 1, from_matrix(node, to_matrix(node, stored) * factor, stored.shape))

    made = to_matrix(site.producer, _weight(site.producer))
    weights(site.producer, scale.reshape(made.shape[0], made.shape[1], 1))
    if site.bias is not None:
        node, index = site.bias
        stored = constant_array(node.inputs[index])
        assert stored is not None
        put(node, index, (stored.reshape(-1) * scale).reshape(stored.shape))
    for value in site.values:
        value.name = fresh(f"{value.name}{EQUALIZED}", taken)
    for reader in site.readers:
        weights(reader, 1 / _spread(scale, to_matrix(reader, _weight(reader)))[:, None, :])
