"""Which passes a verb stands for, and those that options ask for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

from graphopt.base import Pass, Pipeline, Repeat, flatten
from graphopt.errors import InputError
from graphopt.graph import nodes, opset, tells_half
from graphopt.manager import PassManager
from graphopt.registry import create
from graphopt.target import get_target

if TYPE_CHECKING:
    import onnx_ir as ir

EXACT_PASSES = (
    "fold-constants",
    "fold-shapes",
    "inline-if",
    "eliminate-identities",
    "merge-reshapes",
    "merge-slices",
    "fold-qdq-weights",
    "fuse-batchnorm",
    "fuse-into-conv",
    "matmul-to-gemm",
    "eliminate-duplicates",
    "constants-to-initializers",
    "deduplicate-weights",
    "remove-unused",
)
"""Our own exact passes, in the order in which each leaves work for the next."""

EVENING_PASSES = ("equalize", "smooth")
"""Exact ones that make room in the integer range, by what they see of calibration data."""

_ROUNDS = 4


def exact_passes() -> Pipeline:
    """What ``optimize`` runs without a recipe: our own passes until they find nothing, onnxsim for what is left, and
    ours again where that opened something up."""
    ours = Repeat(tuple(create(name, {}) for name in EXACT_PASSES), _ROUNDS)
    return [ours, create("simplify", {}), ours]


def prepare(model: ir.Model, target: str, *, calibrated: bool = False, exclude: Sequence[str] = ()) -> Pipeline:
    """What runs before quantization: an operator set the target can quantize in, and the exact passes; where there is
    calibration data (``calibrated``), the exact ones that look at it too, but for the layers to ``exclude``."""
    wanted = get_target(target).opset
    upgrade = _upgrade(model, wanted) if 0 < opset(model) < wanted else []
    inlined = inline(model) if not upgrade else []  # layers in functions are layers all the same
    wide = [create("compute-fp32", {})] if _tells_half(model) else []
    options = {"exclude": list(exclude)} if exclude else {}
    even = [create(name, options) for name in EVENING_PASSES] if calibrated else []
    return [*upgrade, *inlined, *wide, *exact_passes(), *even]


def _tells_half(model: ir.Model) -> bool:
    """Whether something is float16: what integers are decoded into is float32."""
    inside = (node for function in model.functions.values() for node in function.all_nodes())
    return any(tells_half(node) for node in chain(nodes(model), inside))


def inline(model: ir.Model) -> list[Pass]:
    """What brings the layers in functions into the graph."""
    return [create("inline-functions", {})] if model.functions else []


def _upgrade(model: ir.Model, wanted: int) -> list[Pass]:
    """Functions first become part of the graph: onnx's converter leaves them as they are."""
    return [*inline(model), create("upgrade-opset", {"to": wanted})]


def asked(
    model: ir.Model,
    *,
    to_opset: int | None = None,
    dims: Sequence[str] = (),
    input_shapes: Sequence[str] = (),
    fold_overridable: bool = False,
) -> list[Pass]:
    """The passes that change, on request, what the model takes: they come first.

    Raises:
        InputError: an opset below the model's.
    """
    found: list[Pass] = []
    now = opset(model)
    if to_opset is not None and to_opset < now:
        raise InputError(f"--opset {to_opset}: the model is at opset {now}, and it can only be raised")
    if to_opset is not None and to_opset != now:
        found += _upgrade(model, to_opset)
    if fold_overridable:
        found.append(create("fold-overridable", {}))
    if dims or input_shapes:
        found.append(create("freeze-shapes", {"dims": list(dims), "inputs": list(input_shapes)}))
    return found


def facing(model: ir.Model, pipeline: Pipeline) -> ir.Model:
    """The model with the interface that the result will have: what data and random inputs have to fit.

    Raises:
        PreconditionError: the interface asked for is none the model can have.
    """
    narrowing = [step for step in flatten(pipeline) if step.narrows]
    return PassManager(narrowing, verify="off").run(model).model if narrowing else model
