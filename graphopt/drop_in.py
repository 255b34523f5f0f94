"""``graphopt.simplify`` in the place of ``onnxsim.simplify``: the same call, ``(model, ok)`` back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.base import Pipeline, Repeat
from graphopt.errors import InputError, did_you_mean
from graphopt.foreign import foreign
from graphopt.model import load, to_proto
from graphopt.pipeline import make, merge_options
from graphopt.presets import EXACT_PASSES, exact_passes
from graphopt.registry import create

if TYPE_CHECKING:
    import onnx

_FOLDING = ("fold-constants", "fold-shapes", "fold-qdq-weights")
_FUSING = ("fuse-batchnorm", "fuse-into-conv")
_NO_MATTER = frozenset(
    {"check_n", "test_input_shapes", "dynamic_input_shape", "include_subgraph", "skip_shape_inference", "certify"}
)
"""Of onnxsim's arguments, those whose wish is granted without them: the result is compared with the original always,
and bodies of If and Loop are simplified always."""
_NOT_HERE = frozenset(
    {
        *("tensor_size_threshold", "inline_functions", "import_custom_schemas", "extra_optimizers", "check_rtol"),
        *("function_rewrite_rules", "check_atol", "input_fill", "providers", "gemm_fusion_backend", "profile"),
        *("ort_profile", "merge_ort_profile", "external_data_threshold", "range_opt", "check_hazards"),
        *("check_gradients", "gradient_precision", "initializers_as_constants"),
    }
)
"""Those that change nothing here; whoever gives one is warned."""


def simplify(
    model: Any,
    check_n: int = 0,
    perform_optimization: bool = True,
    skip_fuse_bn: bool = False,
    overwrite_input_shapes: Any = None,
    test_input_shapes: Any = None,
    skipped_optimizers: Sequence[str] | None = None,
    skip_constant_folding: bool = False,
    skip_shape_inference: bool = False,
    input_data: Mapping[str, Any] | None = None,
    *,
    custom_lib: str | None = None,
    unused_output: Sequence[str] | None = None,
    mutable_initializer: bool = False,
    input_shapes: Any = None,
    target_opset_version: int | None = None,
    custom_rewriter: Callable[..., Any] | None = None,
    output_path: str | None = None,
    **others: Any,
) -> tuple[onnx.ModelProto, bool]:
    """What ``onnxsim.simplify`` does, by :func:`graphopt.optimize`; ``model`` is not touched.

    ``ok`` is whether every pass kept its promise: where one did not, it was taken back, so that the model is right all
    the same. Arguments are onnxsim's; those that change nothing here warn.

    Raises:
        InputError: a bad model or argument, or ``custom_lib``.
        TypeError: an argument that onnxsim has not either.
    """
    del check_n, test_input_shapes, skip_shape_inference  # granted always
    _look_at(others)
    if custom_lib is not None:
        raise InputError("graphopt runs no operators of a library; leave custom_lib out: nodes it does not know stay")
    skipped = set(skipped_optimizers or ())
    gone = set(_FOLDING) if skip_constant_folding else set()
    if skip_fuse_bn or "fuse_bn_into_conv" in skipped or not perform_optimization:
        gone |= set(_FUSING)
    passes: Pipeline = _without(gone, plain=not gone and not skipped and perform_optimization)
    if custom_rewriter is not None:
        passes = [*passes, foreign(custom_rewriter)]
    source = model if not unused_output else _fewer_outputs(model, unused_output)
    asked = {
        "time": 0.0,
        "opset": target_opset_version,
        "input_shapes": _shapes(overwrite_input_shapes) or _shapes(input_shapes),
        "fold_overridable": not mutable_initializer,
        "data": None if input_data is None else [dict(input_data)],
    }
    result = make(source, passes, merge_options(asked, None), verb="optimize")
    if output_path is not None:
        result.save(Path(output_path))
    return result.model, all(
        entry["status"] not in ("reverted", "partly reverted") for entry in result.report["ledger"]
    )


def _look_at(others: Mapping[str, Any]) -> None:
    for name, value in others.items():
        if name in _NO_MATTER or value is None:
            continue
        if name not in _NOT_HERE:
            raise TypeError(f"unknown argument '{name}'; {did_you_mean(name, _NOT_HERE | _NO_MATTER, 'see onnxsim')}")
        warnings.warn(f"graphopt.simplify does nothing for '{name}'", stacklevel=3)


def _without(gone: set[str], *, plain: bool) -> Pipeline:
    """The exact passes but for those; onnxsim, which does what they do, only where nothing is left out."""
    if plain:
        return exact_passes()
    return [Repeat(tuple(create(name, {}) for name in EXACT_PASSES if name not in gone), 4)]


def _shapes(given: Any) -> list[str]:
    """onnxsim's ``{"x": [1, 3, 224, 224]}``, ``["x:1,3,224,224"]``, or one list of sizes for the only input."""
    if not given:
        return []
    if isinstance(given, Mapping):
        return [
            f"{name}:{','.join(map(str, sizes))}" if name else ",".join(map(str, sizes))
            for name, sizes in given.items()
        ]
    if all(isinstance(item, int) for item in given):
        return [",".join(map(str, given))]
    return [str(item) for item in given]


def _fewer_outputs(model: Any, unused: Sequence[str]) -> onnx.ModelProto:
    proto = to_proto(load(model))
    known = [output.name for output in proto.graph.output]
    for name in unused:
        if name not in known:
            raise InputError(
                f"unused_output names '{name}'; {did_you_mean(name, known, 'outputs: ' + ', '.join(known))}"
            )
    kept = [output for output in proto.graph.output if output.name not in unused]
    if not kept:
        raise InputError("unused_output names every output; keep one")
    del proto.graph.output[:]
    proto.graph.output.extend(kept)
    return proto
