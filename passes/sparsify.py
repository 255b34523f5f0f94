"""Zeros in weights: single connections of Conv, ConvTranspose, Gemm and MatMul go, and the others make up for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.errors import PreconditionError
from graphopt.graph import constant_array, label, nodes
from graphopt.linear import Form, form_of, from_matrix, to_matrix
from graphopt.passes._masks import Array, Pattern, smallest, sparse_on_gram
from graphopt.passes._patterns import check_patterns, matches
from graphopt.passes._refit import bias_site, shift_bias
from graphopt.passes._shrink import put
from graphopt.passes._weight_uses import LEAST

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from graphopt.gram import Seen

UPDATES = ("auto", "data", "none")
_RECURRENT = ("LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class Sparsify(Pass):
    """Set weights of layers to zero: ``sparsity`` is the share of each layer's (0.5), or how many of how many
    neighbouring inputs keep theirs (``2:4``, the form that NVIDIA's sparse tensor cores take).

    ``update``: ``data`` chooses them by what they cost the layer's output on calibration data and lets the others make
    up for them; ``none`` takes the smallest and changes nothing else; ``auto`` is ``data`` where there is some.
    ``exclude`` and ``include``: layers by name, glob, ``re:`` expression or operator type.
    """

    sparsity: str | float = "0.5"
    update: str = "auto"
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    name: ClassVar[str] = "sparsify"
    contract: ClassVar[Contract] = "approximate"

    def __post_init__(self) -> None:
        if self.update not in UPDATES:
            raise ValueError(f"update is '{self.update}'; one of {', '.join(UPDATES)}")
        Pattern.parse(str(self.sparsity))

    def check(self, model: ir.Model) -> None:
        """Functions hide layers."""
        if model.functions:
            raise PreconditionError("sparsify does not look into functions; run inline-functions first")

    def run(self, model: ir.Model, context: Context) -> PassResult:
        if self.update == "data" and (context.data is None or context.layer_inputs is None):
            raise PreconditionError("sparsify weighs connections on samples and there are none; give --data FILE")
        gone = check_patterns(model, context.original, self.exclude, "exclude")
        gone += check_patterns(model, context.original, self.include, "include")
        pattern = Pattern.parse(str(self.sparsity))
        layers, skipped = self._layers(model)
        result = PassResult(skipped=gone + skipped)
        seen: dict[Form, Seen] = {}
        if self.update != "none" and context.data is not None and context.layer_inputs is not None and layers:
            context.progress(0, None, "weighing connections")
            seen = context.layer_inputs(model, list(dict.fromkeys(layer.form for layer in layers)))
        done = []
        for number, layer in enumerate(layers):
            context.progress(number, len(layers), "removing connections")
            done.append(_sparse(layer, pattern, seen.get(layer.form)))
        for layer, found in zip(layers, done, strict=True):
            _write(model, layer, found)
            result.changes.append(_change(layer, found))
        result.metrics = _metrics(layers, done, str(self.sparsity))
        if not result.changes and not result.skipped:
            result.skipped.append(
                Skip("(graph)", "it has no Conv, ConvTranspose, Gemm or MatMul with constant weights")
            )
        return result

    def _layers(self, model: ir.Model) -> tuple[list[_Layer], list[Skip]]:
        """The layers whose connections may go, each weight once, and why others keep theirs."""
        found: list[_Layer] = []
        skipped: list[Skip] = []
        small, met = 0, set()
        inner = {id(node) for node in model.graph}
        for node in nodes(model):
            stored = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
            form = form_of(node)
            if form is None or stored is None or id(node.inputs[1]) in met:
                if form is None and node.op_type in _RECURRENT and node.domain == "":
                    skipped.append(Skip(label(node), "only Conv, ConvTranspose, Gemm and MatMul have zeros put in"))
                continue
            met.add(id(node.inputs[1]))
            why = self._keeps(node, form, stored, inside=id(node) in inner)
            if why is None and stored.size < LEAST:
                small += 1
            elif why is None:
                found.append(_Layer(node, form, stored))
            else:
                skipped.append(Skip(label(node), why))
        if small:
            skipped.append(Skip("(small)", f"{small} weights have fewer than {LEAST:,} elements"))
        return found, skipped

    def _keeps(self, node: ir.Node, form: Form, stored: NDArray[Any], *, inside: bool) -> str | None:
        """Why every connection of a layer stays; None: they may go."""
        if self.exclude and matches(node, self.exclude):
            return "excluded"
        if self.include and not matches(node, self.include):
            return "not included"
        value = node.inputs[1]
        assert value is not None
        if value.is_graph_output():
            return "its weight is an output of the graph"
        if any(index != 1 or form_of(user) != form for user, index in value.uses()):
            return "others read its weight in another way"
        if form.groups > 1 and form.kind in ("conv", "transpose") and form.width == int(np.prod(form.kernel)):
            return "it is a depthwise convolution: few weights, and each counts"
        if not inside:
            return "it is in a body of If, Loop or Scan"
        return None if np.isfinite(stored.astype(np.float64)).all() else "its weight holds NaN or infinity"


@dataclass(frozen=True)
class _Layer:
    node: ir.Node
    form: Form
    stored: NDArray[Any]

    @property
    def run(self) -> int:
        """Inputs that lie side by side: of a convolution, all channels of a group at one place of the kernel."""
        return self.form.width // int(np.prod(self.form.kernel or (1,)))

    @property
    def order(self) -> NDArray[np.intp]:
        """The columns of W with those inputs side by side."""
        return np.arange(self.form.width).reshape(self.run, -1).T.reshape(-1)


@dataclass(frozen=True)
class _Sparse:
    """``weight``: [groups, outputs, K]; ``shift``: what the bias gains; ``errors``: of the output on held-out inputs,
    as a share of its energy, with the smallest weights gone and as it is now; None: not measured."""

    weight: Array
    shift: Array | None
    errors: tuple[float, float] | None
    updated: bool


def _sparse(layer: _Layer, pattern: Pattern, seen: Seen | None) -> _Sparse:
    """The layer's weights with zeros; those found on H where they serve held-out inputs better than plain ones."""
    matrix = to_matrix(layer.node, layer.stored)
    back = np.argsort(layer.order)
    turned = matrix[..., layer.order]
    plain = np.where(smallest(np.abs(turned), pattern, layer.run), 0.0, turned)[..., back]
    if seen is None:
        return _Sparse(plain, None, None, False)
    mean = seen.moments.mean
    gram, held = seen.moments.second_moment, seen.held.astype(np.float64)
    biased = bias_site(layer.node) is not None and len(list(layer.node.inputs[1].uses())) == 1  # type: ignore[union-attr]
    if biased:  # the bias takes back what happens to the mean, so that only the rest counts
        gram, held = gram - mean[:, :, None] * mean[:, None, :], held - mean[:, :, None]
    try:
        found, _ = sparse_on_gram(turned, gram[:, layer.order][:, :, layer.order], pattern, layer.run)
    except np.linalg.LinAlgError:
        return _Sparse(plain, None, None, False)
    candidate = found[..., back]
    energy = float(np.square(np.matmul(matrix, held)).sum()) or 1.0
    before, after = (float(np.square(np.matmul(w - matrix, held)).sum()) / energy for w in (plain, candidate))
    best, updated = (candidate, True) if after < before else (plain, False)
    shift = np.matmul(matrix - best, mean[:, :, None]).reshape(-1) if biased else None
    return _Sparse(best, shift, (before, min(before, after)), updated)


def _write(model: ir.Model, layer: _Layer, found: _Sparse) -> None:
    value = layer.node.inputs[1]
    assert value is not None
    put(value, from_matrix(layer.node, found.weight, layer.stored.shape).astype(layer.stored.dtype))
    site = bias_site(layer.node)
    if found.shift is not None and site is not None:
        shift_bias(model, site, found.shift, layer.stored.dtype)


def _zeros(found: _Sparse) -> int:
    return int(found.weight.size - np.count_nonzero(found.weight))


def _change(layer: _Layer, found: _Sparse) -> Change:
    detail = f"{layer.node.op_type} weight, {_zeros(found):,} of {found.weight.size:,} are zero"
    if found.errors is not None:
        before, after = (100 * e for e in found.errors)
        how = f", {before:.1f} % without the others' making up for it" if found.updated else ""
        detail += f" (error of its output {after:.1f} %{how})"
    return Change("sparsify", label(layer.node), detail)


def _metrics(layers: list[_Layer], done: list[_Sparse], pattern: str) -> dict[str, Any]:
    errors = [found.errors for found in done if found.errors is not None]
    total, zeros = sum(layer.stored.size for layer in layers), sum(map(_zeros, done))
    return {
        "sparsity": pattern,
        "layers_sparsified": len(layers),
        "layers_updated": sum(found.updated for found in done),
        "weights_looked_at": total,
        "zeros": zeros,
        "zeros_share": zeros / total if total else None,
        "layer_error": [float(np.mean([e[i] for e in errors])) for i in (0, 1)] if errors else None,
    }
