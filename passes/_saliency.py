"""What it costs to lose a unit: by the size of its weights, or by what is lost when everything else makes up for it.

Importances and where they come from: L1 and L2 norms over all of a group's weights (DepGraph, Fang et al. 2023), and
the loss after optimal compensation, ``tr(W_u [(H^-1)_uu]^-1 W_u^T)`` for the columns u of every layer that reads the
unit (OBS, Hassibi 1993, for groups; OBC, Frantar 2022): units go one after the other, and H^-1 and W follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

from graphopt.channels.atoms import live
from graphopt.graph import constant_array
from graphopt.linear import form_of, to_matrix
from graphopt.passes._units import Path

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from graphopt.channels import Channels, Group
    from graphopt.gram import Seen
    from graphopt.linear import Form

IMPORTANCES = ("loss", "l2", "l1")

WIDEST = 4096
"""Above, H is not inverted (it takes K^3): the layer counts by the size of its weights and of what it reads."""

_STEPS = 48  # in how many steps a group's path is worked out: within one, units do not see each other go

_DAMPING = 1e-3  # of the mean diagonal

_DOUBT = 0.1
"""What the square of inputs per row weighs the diagonal of H with: as many rows as inputs, a tenth."""

_POWER = 0.5
"""Of what a layer's error becomes at the outputs: random errors are felt more than those that are left of a repair."""


@dataclass
class Reader:
    """One matrix that reads units: W [outputs, K] on inputs of covariance ``h``; ``columns``: per unit, which of K.

    ``energy``: of what the whole layer puts out.
    """

    weight: NDArray[np.float64]
    inverse: NDArray[np.float64] | None
    columns: dict[int, NDArray[np.intp]]
    energy: float
    power: NDArray[np.float64]

    def losses(self, units: NDArray[np.int64]) -> NDArray[np.float64]:
        """What each unit's end would cost, as a share of the layer's energy."""
        found = np.zeros(len(units))
        sizes = np.array([len(self.columns.get(int(u), ())) for u in units])
        for size in np.unique(sizes[sizes > 0]):
            chosen = np.flatnonzero(sizes == size)
            columns = np.stack([self.columns[int(units[i])] for i in chosen])
            weight = self.weight[:, columns].transpose(1, 2, 0)  # [units, size, outputs]
            if self.inverse is None:
                found[chosen] = np.sum(np.square(weight) * self.power[columns][:, :, None], axis=(1, 2))
            elif size == 1:
                found[chosen] = np.sum(np.square(weight[:, 0]), axis=1) / np.diagonal(self.inverse)[columns[:, 0]]
            else:
                block = self.inverse[columns[:, :, None], columns[:, None, :]]
                found[chosen] = np.sum(weight * np.linalg.solve(block, weight), axis=(1, 2))
        return found / self.energy

    def remove(self, units: NDArray[np.int64]) -> None:
        """These are gone, and the others have made up for them."""
        parts = [self.columns.pop(int(u)) for u in units if int(u) in self.columns]
        if not parts:
            return
        gone = np.concatenate(parts)
        if self.inverse is not None:
            step = np.linalg.solve(self.inverse[np.ix_(gone, gone)], self.inverse[gone])
            self.weight -= self.weight[:, gone] @ step
            self.inverse -= self.inverse[:, gone] @ step
        self.weight[:, gone] = 0


def column_units(channels: Channels, read: NDArray[np.int64], form: Form) -> NDArray[np.int64]:
    """The unit of each of a layer's inputs x: int64[groups, K]; -1 where it stays."""
    units = channels.units_of(read)
    if form.kind in ("gemm", "gemm-t"):
        return np.broadcast_to(units, (form.groups, form.width))
    per_group = units.reshape(form.groups, -1)
    return np.repeat(per_group, form.width // per_group.shape[1], axis=1)


def readers(
    channels: Channels, seen: Mapping[Form, Seen], counts: Mapping[ir.Node, float]
) -> Iterator[tuple[Reader, set[int]]]:
    """Every matrix that reads units and whose inputs were seen, with the units it reads."""
    for product in channels.products:
        form = form_of(product.node)
        weight = constant_array(product.node.inputs[1])
        if form is None or form not in seen or weight is None or not live(product.read) or product.depthwise:
            continue
        matrices = to_matrix(product.node, weight)
        moments = seen[form].moments
        units = column_units(channels, product.read, form)
        for group, matrix in enumerate(matrices):
            mean = moments.mean[group]
            h = moments.second_moment[group] - np.outer(mean, mean)
            energy = float(np.sum(np.matmul(matrix, h) * matrix)) / max(counts.get(product.node, 1.0), 1e-12) ** _POWER
            if energy <= 0:
                continue
            mine = units[group]
            order = np.argsort(mine, kind="stable")
            starts = np.flatnonzero(np.r_[True, np.diff(mine[order]) > 0])
            columns = {int(mine[part[0]]): part for part in np.split(order, starts[1:]) if mine[part[0]] >= 0}
            inverse = _inverse(_trusted(h, moments.count)) if len(h) <= WIDEST else None
            yield Reader(matrix.copy(), inverse, columns, energy * len(matrices), np.diagonal(h).copy()), set(columns)


def _trusted(h: NDArray[np.float64], rows: int) -> NDArray[np.float64]:
    """``h`` as far as so many rows can tell: shrunk towards its diagonal. Of fewer rows than inputs, every input seems
    to follow from the others, and nothing would seem to be lost with it."""
    trust = 1 / (1 + _DOUBT * (len(h) / max(rows, 1)) ** 2)
    found: NDArray[np.float64] = trust * h + (1 - trust) * np.diag(np.diagonal(h))
    return found


def _inverse(h: NDArray[np.float64]) -> NDArray[np.float64]:
    damped = h.copy()
    diagonal = np.einsum("ii->i", damped)
    diagonal += _DAMPING * (diagonal.mean() or 1.0)
    found: NDArray[np.float64] = scipy.linalg.inv(damped, overwrite_a=True, check_finite=False)
    return (found + found.T) / 2


def by_loss(channels: Channels, seen: Mapping[Form, Seen], counts: Mapping[ir.Node, float] | None = None) -> list[Path]:
    """Each group's free units in the order in which losing one costs least, the others having made up for it; units
    that no layer of known inputs reads count by their weights. ``counts``: by layer, what an error of its output
    becomes at the model's outputs (1 where it is not told)."""
    by_unit: dict[int, list[Reader]] = {}
    for reader, units in readers(channels, seen, counts or {}):
        for unit in units:
            by_unit.setdefault(unit, []).append(reader)
    sizes = magnitudes(channels, 2)
    found = []
    for group in channels.groups:
        if not group.free:
            continue
        free = group.units[: group.free]
        mine = list({id(r): r for unit in free.tolist() for r in by_unit.get(unit, ())}.values())
        found.append(_path(group, free, mine) if mine else _sorted(group, free, sizes[free]))
    return found


def _path(group: Group, free: NDArray[np.int64], mine: list[Reader]) -> Path:
    working = [
        Reader(r.weight.copy(), None if r.inverse is None else r.inverse.copy(), dict(r.columns), r.energy, r.power)
        for r in mine
    ]
    left, order, loss = free.copy(), [], [0.0]
    step = max(1, len(free) // _STEPS)
    while len(left):
        costs = np.sum([reader.losses(left) for reader in working], axis=0)
        chosen = np.argsort(costs, kind="stable")[:step]
        for index in chosen:
            loss.append(loss[-1] + max(float(costs[index]), 0.0))
        going = left[chosen]
        order += going.tolist()
        left = np.delete(left, chosen)
        if len(left):
            for reader in working:
                reader.remove(going)
    return Path(group, np.array(order, np.int64), np.array(loss))


def _sorted(group: Group, free: NDArray[np.int64], scores: NDArray[np.float64]) -> Path:
    order = np.argsort(scores, kind="stable")
    return Path(group, free[order], np.concatenate([[0.0], np.cumsum(scores[order])]))


def magnitudes(channels: Channels, power: int) -> NDArray[np.float64]:
    """Per unit, the share of its layers' weights (|w|, or w squared) that its slices hold, summed over the layers."""
    found = np.zeros(channels.count)
    for value, axes in channels.constants.items():
        array = constant_array(value)
        if array is None or array.ndim < 2 or not any(live(vector) for vector in axes):
            continue
        sizes = np.abs(array.astype(np.float64)) ** power
        total = float(sizes.sum()) or 1.0
        for axis, vector in enumerate(axes):
            units = channels.units_of(vector)
            slices = sizes.sum(axis=tuple(a for a in range(array.ndim) if a != axis)) / total
            np.add.at(found, units[units >= 0], slices[units >= 0])
    return found


def by_magnitude(channels: Channels, power: int) -> list[Path]:
    """Each group's free units by the size of their weights."""
    scores = magnitudes(channels, power)
    return [_sorted(g, g.units[: g.free], scores[g.units[: g.free]]) for g in channels.groups if g.free]


def layers_read(channels: Channels) -> list[ir.Node]:
    """The layers that read units and end them."""
    found = [product for product in channels.products if live(product.read) and not product.depthwise]
    return [product.node for product in found if form_of(product.node) is not None]


def layer_forms(channels: Channels) -> list[Form]:
    """What has to be seen for :func:`by_loss`."""
    return list(dict.fromkeys(form for node in layers_read(channels) if (form := form_of(node)) is not None))
