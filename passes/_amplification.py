"""What a small error of one layer becomes at the model's outputs: measured, layer by layer, on a few samples.

Losses of different layers can be compared only where they are felt. A layer's weights are disturbed at random, so much
that a hundredth of its output's energy is wrong, and the model is run: what is wrong of the outputs then, over that
hundredth, is how much the layer counts. (The same one-at-a-time measurement that ranks layers for quantization.)
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.graph import constant_array
from graphopt.linear import form_of, from_matrix, to_matrix
from graphopt.model import clone
from graphopt.passes._shrink import put
from graphopt.session import Session

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from graphopt.base import Context
    from graphopt.gram import Seen
    from graphopt.linear import Form

_SHARE = 0.01  # of the energy of a layer's output
_SAMPLES = 4

Outputs = Mapping[str, Any]


def amplifications(
    model: ir.Model, layers: Iterable[ir.Node], seen: Mapping[Form, Seen], context: Context
) -> dict[ir.Node, float]:
    """By layer: the share of the outputs' energy that is wrong, summed over the outputs, per share of its own.

    Raises:
        RuntimeFailure: the model does not run.
    """
    if context.held_out is None:
        return {}
    feeds = list(islice(context.held_out(model), _SAMPLES))
    expected = [Session(model, threads=context.threads).run(feed) for feed in feeds]
    twin = clone(model)
    nodes = {node.outputs[0].name: node for node in twin.graph if node.outputs}
    found: dict[ir.Node, float] = {}
    chosen = [layer for layer in layers if (form := form_of(layer)) is not None and form in seen]
    for number, layer in enumerate(chosen):
        context.progress(number, len(chosen), "weighing layers")
        node, form = nodes[layer.outputs[0].name], form_of(layer)
        value = node.inputs[1]
        stored = constant_array(value)
        assert form is not None
        assert value is not None
        assert stored is not None
        # Drawn for what the layer is, not for where it stands: in another order of nodes it weighs the same.
        rng = np.random.default_rng([context.seed, zlib.crc32(stored.tobytes())])
        noise = _noise(to_matrix(node, stored), seen[form].moments.second_moment, rng)
        if noise is None:
            continue
        put(value, (stored + from_matrix(node, noise, stored.shape)).astype(stored.dtype))
        session = Session(twin, threads=context.threads)
        found[layer] = distance(expected, [session.run(feed) for feed in feeds]) / _SHARE
        put(value, stored)
    return found


def _noise(
    matrix: NDArray[np.float64], gram: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64] | None:
    """What makes :data:`_SHARE` of the energy of W x wrong; None where there is none."""
    energy = float(np.sum(np.matmul(matrix, gram) * matrix))
    noise = rng.standard_normal(matrix.shape)
    wrong = float(np.sum(np.matmul(noise, gram) * noise))
    if energy <= 0 or wrong <= 0:
        return None
    scaled: NDArray[np.float64] = noise * np.sqrt(_SHARE * energy / wrong)
    return scaled


def distance(expected: Sequence[Outputs], found: Sequence[Outputs]) -> float:
    """The squared error of outputs as a share of what they hold, summed over the outputs that are floats."""
    error: dict[str, float] = {}
    energy: dict[str, float] = {}
    for before, after in zip(expected, found, strict=True):
        for name, array in before.items():
            if isinstance(array, np.ndarray) and array.dtype.kind == "f" and array.shape == after[name].shape:
                wanted, got = array.astype(np.float64), after[name].astype(np.float64)
                with np.errstate(invalid="ignore"):  # infinity less infinity is no error
                    error[name] = error.get(name, 0.0) + float(np.nansum(np.square(wanted - got)))
                energy[name] = energy.get(name, 0.0) + float(np.nansum(np.square(wanted)))
    return sum(error[name] / (energy[name] or 1.0) for name in error)
