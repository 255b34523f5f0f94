"""Rounding on H: never worse on the quadratic, near the best where that can be enumerated, confirmed on others."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from onnx import helper

from graphopt.gram import LayerInput, Seen, squared_error
from graphopt.model import load
from graphopt.passes._integer_weights import LARGEST, WeightKind, round_weight, weight_error
from graphopt.passes._rounding import DAMPING, input_noise, round_on_gram, rounded_for_output
from tests.builders import model, value, weight

Array = npt.NDArray[Any]


def correlated(rng: np.random.Generator, count: int, width: int, groups: int = 1) -> Array:
    """Inputs [groups, width, count] that go together, as neighbours in a picture do."""
    mixing = rng.standard_normal((groups, width, width)) * np.geomspace(1, 0.05, width)
    return (np.matmul(mixing, rng.standard_normal((groups, width, count))) + 0.5).astype(np.float32)


def moments(x: Array) -> LayerInput:
    seen = LayerInput.empty(len(x), x.shape[1])
    seen.add(x)
    seen.flush()
    return seen


def nearest(w: Array, largest: int) -> tuple[Array, Array]:
    scale = np.abs(w).max(axis=2) / largest
    return np.rint(w / scale[..., None]), scale


@pytest.mark.parametrize("largest", [127, 64, 7, 3])
@pytest.mark.parametrize("groups", [1, 5])
def test_it_lowers_the_error_of_every_output(largest: int, groups: int) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((groups, 6, 40))
    h = moments(correlated(rng, 600, 40, groups)).second_moment
    h += DAMPING * np.trace(h, axis1=1, axis2=2)[:, None, None] / 40 * np.eye(40)
    plain, scale = nearest(w, largest)
    found, fitted = round_on_gram(w, h, scale, largest)
    assert np.array_equal(found, np.rint(found))
    assert np.abs(found).max() <= largest
    before, after = (squared_error(q * s[..., None] - w, h) for q, s in ((plain, scale), (found, fitted)))
    assert (after <= before * (1 + 1e-9)).all()
    assert after.sum() < 0.5 * before.sum()


def test_it_comes_near_the_best_there_is() -> None:
    rng = np.random.default_rng(3)
    w = rng.standard_normal((1, 8, 6))
    h = moments(correlated(rng, 300, 6)).second_moment
    plain, scale = nearest(w, 3)
    found, fitted = round_on_gram(w, h, scale, 3)
    grid = np.array(list(itertools.product((-1, 0, 1), repeat=6)), float)
    best = 0.0
    for row in range(8):
        around = np.clip(plain[0, row] + grid, -3, 3)
        errors = around * scale[0, row] - w[0, row]
        best += float(np.einsum("nk,kl,nl->n", errors, h[0], errors).min())
    mine = squared_error(found * fitted[..., None] - w, h).sum()
    assert mine < 1.3 * best  # and its scales may go below what the old scales allow


def test_the_floor_of_the_scale_holds() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((1, 6, 20))
    h = moments(correlated(rng, 200, 20)).second_moment
    floor = np.full((1, 6), 0.5)
    _, scale = round_on_gram(w, h, np.maximum(nearest(w, 127)[1], floor), 127, floor)
    assert (scale >= floor).all()


def test_a_channel_that_is_never_used_and_one_that_is_zero() -> None:
    rng = np.random.default_rng(0)
    x = correlated(rng, 100, 5)
    x[:, 2] = 0
    w = rng.standard_normal((1, 3, 5))
    w[0, 1] = 0
    found, scale = round_on_gram(w, moments(x).second_moment, np.array([[0.1, 1.0, 0.1]]), 127)
    assert np.isfinite(found).all()
    assert np.isfinite(scale).all()
    assert (found[0, 1] == 0).all()


def layer(stored: Array) -> ir.Node:
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="layer")
    return load(model([node], [value("x", ("N", 4, 6, 6))], [value("y", None)], [weight("w", stored)])).graph[0]


@pytest.mark.parametrize("kind", ["s8", "s7", "u8"])
def test_a_layer_makes_less_noise_and_says_how_its_mean_moves(kind: WeightKind) -> None:
    rng = np.random.default_rng(0)
    stored = rng.standard_normal((5, 4, 3, 3)).astype(np.float32)
    node = layer(stored)
    x = correlated(rng, 2000, 36)
    seen = Seen(moments(x[..., :1500]), x[..., 1500:])
    found = rounded_for_output(node, stored, 0, kind, seen, centred=True)
    plain = round_weight(stored, 0, kind)
    integers = found.weight.data.astype(int) - found.weight.zero_point.astype(int).reshape(-1, 1, 1, 1)
    assert found.refined
    assert found.weight.kind == kind
    assert np.abs(integers).max() <= LARGEST[kind]
    others = x[0, :, 1500:].astype(float)
    noises = []
    for candidate in (found.weight, plain):
        error = weight_error(candidate, stored).reshape(5, 36)
        noises.append(np.square(error @ (others - seen.moments.mean[0][:, None])).mean(axis=1).sum())
        if candidate is found.weight:
            np.testing.assert_allclose(found.shift, error @ x[0, :, :1500].mean(axis=1), rtol=1e-3, atol=1e-6)
    assert noises[0] < 0.8 * noises[1]
    assert found.noise == pytest.approx(noises[0], rel=1e-4)


def test_what_does_not_hold_on_other_inputs_is_not_used() -> None:
    """Few samples, and the inputs held back are of another kind: to nearest is what remains."""
    rng = np.random.default_rng(0)
    stored = rng.standard_normal((5, 4, 3, 3)).astype(np.float32)
    seen = Seen(moments(correlated(rng, 8, 36)), rng.standard_normal((1, 36, 400)).astype(np.float32))
    found = rounded_for_output(layer(stored), stored, 0, "s7", seen, centred=False)
    assert not found.refined
    np.testing.assert_array_equal(found.weight.data, round_weight(stored, 0, "s7").data)


def test_input_noise_is_what_uniform_noise_does() -> None:
    rng = np.random.default_rng(0)
    stored = rng.standard_normal((5, 4, 3, 3)).astype(np.float32)
    x = rng.standard_normal((1, 36, 4000)).astype(np.float32)
    noise = rng.uniform(-0.1, 0.1, x.shape)
    sqnr = 10 * np.log10(np.square(x).mean() / np.square(noise).mean())
    expected = np.square(stored.reshape(5, 36) @ noise[0]).mean(axis=1).sum()
    assert input_noise(layer(stored), stored, Seen(moments(x), x), float(sqnr)) == pytest.approx(expected, rel=0.05)
