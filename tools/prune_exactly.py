"""Where the layers that read what is removed ignored it already, removing it must change no output.

``examine`` sets those slices to zero, removes the units, and compares outputs in ONNX Runtime at two sizes. Groups that
a product of two computed values reads are left out: there is no weight to set to zero.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.channels import Channels, find_channels
from graphopt.concrete_shapes import two_sizes
from graphopt.graph import attribute, constant_array, is_op
from graphopt.model import clone, load, to_proto
from graphopt.passes._shrink import Shrinker, put
from graphopt.session import Session


@dataclass
class Found:
    """What came of one model. ``removed``: units; ``worst``: the largest difference, relative to the output's scale."""

    groups: int = 0
    removed: int = 0
    worst: float = 0.0
    problems: list[str] = field(default_factory=list)


def examine(proto: onnx.ModelProto, feeds: Sequence[dict[str, Any]], rnd: random.Random, share: float = 0.5) -> Found:
    """Remove about ``share`` of every group that can be tested so, all at once."""
    model = load(proto)
    channels = find_channels(model, two_sizes(model, feeds[0], threads=1))
    found = Found()
    keep = np.ones(channels.count, np.bool_)
    untestable = _read_without_weights(channels)
    for group in channels.groups:
        free = [int(u) for u in group.units[: group.free] if int(u) not in untestable]
        gone = rnd.sample(free, min(int(np.ceil(share * len(free))), len(group.units) - 1)) if free else []
        keep[gone] = False
    _restore(channels, keep)
    found.groups = sum(bool((~keep[g.units]).any()) for g in channels.groups)
    found.removed = int((~keep).sum())
    if not found.removed:
        return found
    _silence(channels, keep)
    expected = [Session(clone(model), optimize=False, threads=1).run(feed) for feed in feeds]
    Shrinker(model, channels, keep).run()
    after = to_proto(model)
    try:
        onnx.checker.check_model(after, full_check=True)
    except Exception as error:
        found.problems.append(f"invalid: {' '.join(str(error).split())[:300]}")
        return found
    session = Session(after, optimize=False, threads=1)
    for feed, before in zip(feeds, expected, strict=True):
        now = session.run(feed)
        for name, array in before.items():
            if array.shape != now[name].shape or array.dtype != now[name].dtype:
                found.problems.append(f"output '{name}' was {array.shape}, is {now[name].shape}")
                continue
            if array.dtype.kind != "f":
                if not np.array_equal(array, now[name]):
                    found.problems.append(f"output '{name}' differs")
                continue
            same = (array == now[name]) | (np.isnan(array) & np.isnan(now[name]))
            with np.errstate(all="ignore"):
                off = np.where(
                    same, 0, np.abs(array - now[name]) / (np.abs(array[np.isfinite(array)]).max(initial=1e-6))
                )
            found.worst = max(found.worst, float(np.nan_to_num(off, nan=np.inf).max(initial=0)))
    if found.worst > 1e-4:
        found.problems.append(f"outputs differ by {found.worst:.2g} of their scale")
    return found


def _restore(channels: Channels, keep: np.ndarray) -> None:
    """Something has to be left of every axis."""
    vectors = {v.tobytes(): v for axes in channels.trace.axes.values() for v in axes}
    vectors |= {v.tobytes(): v for axes in channels.constants.values() for v in axes}
    for vector in vectors.values():
        if len(vector) and not channels.kept(vector, keep).any():
            keep[channels.units_of(vector)[0]] = True


def _weights(product: Any) -> list[tuple[int, int]]:
    """(input, axis) of the constants along whose axis a product sums."""
    node = product.node
    if is_op(node, "Conv"):
        return [(1, 1)]
    if is_op(node, "ConvTranspose"):
        return [(1, 0)]
    if is_op(node, "MatMul"):
        return [(1, -2)] if constant_array(node.inputs[1]) is not None else [(0, -1)]
    if is_op(node, "Gemm"):
        return [(1, 1 if attribute(node, "transB", 0) else 0)]
    return [(1, 2), (2, 2)]


def _read_without_weights(channels: Channels) -> set[int]:
    found: set[int] = set()
    multiplied = {product.node for product in channels.products}
    for product in channels.products:
        if all(constant_array(product.node.inputs[i]) is None for i, _ in _weights(product)):
            units = channels.units_of(product.read)
            found |= set(units[units >= 0].tolist())
    for node in channels.trace.axes:
        producer = node.producer()
        if is_op(producer, "Einsum") and producer not in multiplied:
            for value in producer.inputs:  # type: ignore[union-attr]
                for vector in channels.trace.of(value):
                    found |= set(channels.units_of(vector).tolist())
    return found


def _silence(channels: Channels, keep: np.ndarray) -> None:
    """The slices that read what goes become zero."""
    for product in channels.products:
        if product.depthwise:
            continue
        for index, axis in _weights(product):
            value = product.node.inputs[index]
            if value is None or constant_array(value) is None:
                continue
            _zero(channels, value, axis, keep)


def _zero(channels: Channels, value: ir.Value, axis: int, keep: np.ndarray) -> None:
    array = np.array(constant_array(value))
    mask = channels.kept(channels.constants[value][axis], keep)
    shape = [1] * array.ndim
    shape[axis] = -1
    put(value, np.where(mask.reshape(shape), array, np.zeros((), array.dtype)))
