"""Repair in closed form: the layers behind removed channels learn to put out what they did, from unlabelled samples.

For a layer ``y = W x`` of the original, and ``x~`` what it reads now, ridge least squares towards weights ``V``:
``W' = (E[y x~^T] + l V) (E[x~ x~^T] + l I)^-1``, all centred, so that the bias is refitted with it (He et al. 2017,
arXiv 1707.06168, for every layer). First *symmetric*: ``x~`` is what is left of ``x`` in the original, ``V`` the
weights that are left. Then *asymmetric*: layers are taken in topological order, in a few segments, ``x~`` is seen in
the model as repaired so far, so that what went wrong before is made up for too, and ``V`` is the symmetric solution:
with few samples the layers before fit those better than they fit others, and a large ``l`` then keeps to what does not
depend on it. ``l`` is what serves best on held-out samples, and a layer that no ``l`` helps there keeps its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.channels.atoms import live
from graphopt.graph import attribute, constant_array, is_op, value_names
from graphopt.linear import Form, form_of, from_matrix, to_matrix
from graphopt.model import clone, replace
from graphopt.passes._amplification import distance
from graphopt.passes._ridge import Solved, solve
from graphopt.passes._saliency import column_units
from graphopt.passes._shrink import put
from graphopt.passes._weights import add_constant, drop_unread
from graphopt.session import Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from graphopt.base import Context
    from graphopt.channels import Channels

REPAIRS = ("auto", "asymmetric", "symmetric", "moments", "none")

SEGMENTS = 4
"""In how many parts of the model, one after the other, layers are refitted on what they read then, each in a sweep."""

_LEAST_ROWS, _MOST_ROWS = 1024, 8192
"""Rows that a layer is refitted on, over all samples."""

_OUTPUT_MB = 512
"""What the original's inputs and outputs on those rows may hold in memory, of all layers together."""


_Inputs = dict[tuple["str | None", bool], list["NDArray[np.float32]"]]


@dataclass
class Layer:
    """A layer that reads something else than it did. ``was``: its form and matrices in the original model; ``mask``:
    bool[groups, K], which of the original inputs are left; ``outputs``: which of its output rows, per group."""

    node: ir.Node
    depth: int
    was: Form
    matrices: NDArray[np.float64]
    mask: NDArray[np.bool_]
    rows: NDArray[np.bool_]
    wanted: dict[bool, list[NDArray[np.float32]]] = field(default_factory=lambda: {False: [], True: []})
    symmetric: list[Solved] | None = None

    def keep(self, columns: NDArray[np.float32]) -> NDArray[np.float32]:
        """What is left of inputs as the original reads them: [groups, K~, n] of [groups, K, n]."""
        groups = self.mask.any(axis=1)
        count = int(self.mask[groups][0].sum())
        return columns[self.mask].reshape(int(groups.sum()), count, -1)


def plan_layers(model: ir.Model, channels: Channels, keep: NDArray[np.bool_]) -> list[Layer]:
    """The layers to refit when the units that ``keep`` lacks are gone, before anything is removed from ``model``."""
    products = {product.node: product for product in channels.products}
    shrunk = {v for v, axes in channels.constants.items() if any(not channels.kept(a, keep).all() for a in axes)}
    depth: dict[ir.Value, int] = {}
    found: list[Layer] = []
    for node in model.graph:
        inputs = [v for v in node.inputs if v is not None]
        before = max((depth[v] for v in inputs if v in depth), default=-1)
        changed = before >= 0 or any(v in shrunk for v in inputs)
        product, form = products.get(node), form_of(node)
        if changed:
            level = max(before, 0)
            if product is not None and form is not None and node.inputs[0] in depth:
                layer = _layer(node, product.read, product.made, form, channels, keep, depth[node.inputs[0]])
                if layer is not None:
                    found.append(layer)
                    level += 1
            depth |= dict.fromkeys(node.outputs, level)
    return found


def _layer(
    node: ir.Node,
    read: NDArray[np.int64],
    made: NDArray[np.int64],
    form: Form,
    channels: Channels,
    keep: NDArray[np.bool_],
    depth: int,
) -> Layer | None:
    weight = node.inputs[1]
    stored = constant_array(weight)
    if weight is None or stored is None or len(list(weight.uses())) > 1 or weight.is_graph_output():
        return None  # of a weight that several layers share, each would ask for another one
    depthwise = form.groups > 1 and form.groups == len(read)
    units = column_units(channels, read, form)
    mask = np.where(units >= 0, keep[np.maximum(units, 0)], True)
    matrices = to_matrix(node, stored)
    rows = channels.kept(made, keep).reshape(form.groups, -1) if not form.batch else None
    if rows is None or rows.shape[1] != matrices.shape[1] or not mask.any():
        return None
    if depthwise:
        rows = rows | ~mask[:, :1]
    if not np.isfinite(stored.astype(np.float64)).all():
        return None
    return Layer(node, depth, form, matrices, mask, rows)


def refit(
    original: ir.Model,
    model: ir.Model,
    layers: list[Layer],
    context: Context,
    how: str,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Refit ``layers`` of ``model``, which has been shrunk; ``original`` is the model before.

    ``how`` is one of :data:`REPAIRS` but ``none``; ``auto`` is the better of the two least squares by the whole model's
    outputs on held-out samples. Returns which it was, how many layers were refitted, and the mean relative error of
    their outputs on held-out samples, before and after each one's own refit.

    Raises:
        RuntimeFailure: a model does not run.
    """
    stream = context.layer_rows
    assert stream is not None
    layers = [layer for layer in layers if form_of(layer.node) is not None]
    if not layers:
        return {"repair": how, "layers_refitted": 0, "layers_looked_at": 0, "layer_error": None}
    inputs = _original(original, layers, stream, how)
    for layer in layers:
        if layer.wanted[True] and how != "moments":
            seen = (inputs.pop((_name(layer), False)), inputs.pop((_name(layer), True)))
            layer.symmetric = _solve(layer, seen, how, None)
    done: list[tuple[float, float]] = []
    chosen = how
    if how == "symmetric":
        done = [_write(model, layer.node, layer.symmetric) for layer in layers if layer.symmetric is not None]
    else:
        twin = clone(model) if how == "auto" else None
        done = _in_order(model, layers, stream, how, say)
        if twin is not None:
            nodes = {node.outputs[0].name: node for node in twin.graph if node.outputs}
            other = [_write(twin, nodes[_name(o)], o.symmetric) for o in layers if o.symmetric is not None]
            chosen = "asymmetric"
            if _distance(original, twin, context) <= _distance(original, model, context):
                replace(model, twin)
                chosen, done = "symmetric", other
    return {
        "repair": chosen,
        "layers_refitted": sum(1 for before, after in done if after < before),
        "layers_looked_at": len(layers),
        "layer_error": [float(np.mean([d[i] for d in done])) for i in (0, 1)] if done else None,
    }


def _in_order(
    model: ir.Model, layers: list[Layer], stream: Any, how: str, say: Callable[[int, int], None]
) -> list[tuple[float, float]]:
    """The symmetric solution of every layer, and of those that each segment begins with, in order, the one on what they
    read once the segments before are refitted; held-out errors before and after. (``moments``: that of every layer.)"""
    done: dict[int, tuple[float, float]] = {}
    if how != "moments":
        for layer in layers:
            if layer.symmetric is not None:
                done[id(layer)] = _write(model, layer.node, layer.symmetric)
    parts = segments(layers, SEGMENTS if how != "moments" else len(layers))
    for number, part in enumerate(parts):
        say(number, len(parts))
        # Of two that stand one behind the other, both would make up for the same.
        mine = [layer for layer in part if layer.depth == part[0].depth]
        inputs = _look(model, mine, stream, layers)
        for layer in mine:
            if (_name(layer), True) not in inputs or not layer.wanted[True]:
                continue
            seen = (inputs.pop((_name(layer), False)), inputs.pop((_name(layer), True)))
            found = _solve(layer, seen, how, layer.symmetric)
            if found is not None:
                before, after = _write(model, layer.node, found)
                done[id(layer)] = (done.get(id(layer), (before, 0.0))[0], after)
    return list(done.values())


def segments(layers: list[Layer], most: int) -> list[list[Layer]]:
    """The layers in topological order, in at most ``most`` parts of about as many; what lies side by side in the model
    is not parted."""
    levels = [[layer for layer in layers if layer.depth == level] for level in sorted({o.depth for o in layers})]
    if len(levels) <= most:
        return levels
    parts: list[list[Layer]] = []
    done = 0
    for mine in levels:
        if not parts or done >= len(layers) * len(parts) / most:
            parts.append([])
        parts[-1] += mine
        done += len(mine)
    return parts


def _distance(original: ir.Model, candidate: ir.Model, context: Context) -> float:
    """The squared error of the model's outputs on held-out samples, as a share of what they hold, over all outputs."""
    assert context.held_out is not None
    before, after = Session(original, threads=context.threads), Session(candidate, threads=context.threads)
    feeds = list(context.held_out(original))
    return distance([before.run(feed) for feed in feeds], [after.run(feed) for feed in feeds])


def _rows(layers: list[Layer], held: bool) -> Callable[[Form, int], int]:
    """Rows per sample: as many for every layer and in both models, and a quarter of them held out."""
    numbers = sum(int(layer.rows.sum()) + layer.mask.size for layer in layers)
    wanted = int(np.clip(_OUTPUT_MB * 2**20 / (4 * max(numbers, 1)), _LEAST_ROWS, _MOST_ROWS)) // (4 if held else 1)
    return lambda form, samples: max(-(-wanted // max(samples, 1)), 8)


def _outputs(layer: Layer, columns: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is left of W x of the original: float32[groups left, rows left, n]."""
    groups = layer.mask.any(axis=1) & layer.rows.any(axis=1)
    parts = [
        (layer.matrices[g][layer.rows[g]] @ columns[g].astype(np.float64)).astype(np.float32)
        for g in np.flatnonzero(groups)
    ]
    return np.stack(parts)


def _look(model: ir.Model, layers: list[Layer], stream: Any, everything: list[Layer]) -> _Inputs:
    """Inputs of these layers in ``model`` as it is now."""
    forms: dict[Form, list[Layer]] = {}
    for layer in layers:
        form = form_of(layer.node)
        if form is not None:
            forms.setdefault(form, []).append(layer)
    found: _Inputs = {}
    for held in (False, True):
        for form, columns in stream(model, list(forms), _rows(everything, held), held):
            for layer in forms[form]:
                found.setdefault((layer.node.outputs[0].name, held), []).append(columns)
    return found


def _original(original: ir.Model, layers: list[Layer], stream: Any, how: str) -> _Inputs:
    """What each layer put out in the original, into ``layers``, and what is left of what it read."""
    by_form: dict[Form, list[Layer]] = {}
    for layer in layers:
        by_form.setdefault(layer.was, []).append(layer)
    inputs: _Inputs = {}
    for held in (False, True):
        for form, columns in stream(original, list(by_form), _rows(layers, held), held):
            for layer in by_form[form]:
                layer.wanted[held].append(_outputs(layer, columns))
                if how != "moments":
                    inputs.setdefault((_name(layer), held), []).append(layer.keep(columns))
    return inputs


def _name(layer: Layer) -> str | None:
    return layer.node.outputs[0].name


def _solve(
    layer: Layer,
    seen: tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]],
    how: str,
    towards: list[Solved] | None,
) -> list[Solved] | None:
    """Each group's solution; None where rows of the two models cannot be matched."""
    stored = constant_array(layer.node.inputs[1])
    assert stored is not None
    now = to_matrix(layer.node, stored)
    x, x_held = (np.concatenate(part, axis=2) for part in seen)
    y, y_held = (np.concatenate(layer.wanted[held], axis=2) for held in (False, True))
    if (len(x), x.shape[1], y.shape[1]) != (len(now), now.shape[2], now.shape[1]) or x.shape[2] != y.shape[2]:
        return None
    centre = None if towards is None else np.stack([one.weight for one in towards])
    return solve(now, (x, y), (x_held, y_held), how, bias_site(layer.node) is not None, centre)


def _write(model: ir.Model, node: ir.Node, found: list[Solved]) -> tuple[float, float]:
    """Let a layer have these weights; (its relative error on held-out inputs before, after)."""
    stored = constant_array(node.inputs[1])
    assert stored is not None
    energy = sum(one.energy for one in found) or 1.0
    before, after = sum(one.before for one in found) / energy, sum(one.after for one in found) / energy
    put_alone(
        model, node, 1, from_matrix(node, np.stack([one.weight for one in found]), stored.shape).astype(stored.dtype)
    )
    site = bias_site(node)
    if site is not None:
        shift_bias(model, site, np.concatenate([one.shift for one in found]), stored.dtype)
    return before, after


def bias_site(node: ir.Node) -> tuple[ir.Node, int] | None:
    """Where the layer's bias is, or goes; None where there is no place for one."""
    if is_op(node, "Conv", "ConvTranspose"):
        return node, 2
    if is_op(node, "Gemm"):
        return (node, 2) if float(attribute(node, "beta", 1.0)) == 1.0 else None
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output() or not is_op(uses[0][0], "Add"):
        return None
    add, index = uses[0]
    array = constant_array(add.inputs[1 - index])
    return (add, 1 - index) if array is not None and array.ndim == 1 and array.size > 1 else None


def shift_bias(model: ir.Model, site: tuple[ir.Node, int], gain: NDArray[np.float64], dtype: Any) -> None:
    """Add ``gain`` (one number per output) to the bias at ``site``, which is made where there is none yet."""
    node, index = site
    old = node.inputs[index] if index < len(node.inputs) else None
    array = constant_array(old)
    if old is not None and array is None:
        return
    if array is None:
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        name = f"{node.outputs[0].name}_bias"
        node.replace_input_with(
            index, add_constant(model, model.graph, name, gain.astype(dtype), value_names(model), node)
        )
        return
    wide = np.broadcast_to(array.astype(np.float64), np.broadcast_shapes(array.shape, gain.shape))
    put_alone(model, node, index, (wide + gain).astype(dtype))


def put_alone(model: ir.Model, node: ir.Node, index: int, array: NDArray[Any]) -> None:
    """Let input ``index`` of ``node`` be the constant ``array``; others that read the old one keep it."""
    value = node.inputs[index]
    assert value is not None
    if len(list(value.uses())) == 1 and not value.is_graph_output():
        put(value, array)
        return
    new = add_constant(model, model.graph, f"{value.name}_refitted", array, value_names(model), node)
    node.replace_input_with(index, new)
    drop_unread(value)


def worth_refitting(channels: Channels, keep: NDArray[np.bool_]) -> bool:
    """Whether anything was removed that a layer reads."""
    return any(live(p.read) and not channels.kept(p.read, keep).all() for p in channels.products)
