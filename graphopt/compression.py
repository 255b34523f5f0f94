"""``graphopt.compress``: weights in fewer bits, and what that did to bytes, time and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from graphopt.base import Pass
from graphopt.budgets import total_memory
from graphopt.errors import InputError, NothingDone
from graphopt.gates import parse_size
from graphopt.graph import opset
from graphopt.judge import size_verdict
from graphopt.manager import PassManager
from graphopt.model import ModelLike, clone, weight_bytes
from graphopt.outcome import blank, hold, something_done, with_report
from graphopt.package import check_zstandard
from graphopt.passes.compress_weights import CompressWeights
from graphopt.pipeline import Options, Result, as_metric, check_gates, make, make_context, merge_options, read_source
from graphopt.registry import create
from graphopt.report.document import about, versions
from graphopt.report.units import size as in_words
from graphopt.search.bits import Move, assigned, for_budget, for_size, moves
from graphopt.search.limits import limit_of
from graphopt.transport import kept_as_it_is, packaged

if TYPE_CHECKING:
    import onnx_ir as ir

HALF = "fp16-compute"
"""The format that is no way of storing weights alone."""

_SHRINKS = "fold-constants", "deduplicate-weights", "remove-unused"
"""Exact passes that run before: constants that stand behind a Transpose are one weight then, equal ones are one."""

_NODES = 400
"""Bytes that the nodes which decode a weight take, about."""

_FASTER = 0.97
"""A median time over the original's below which a model is told to be faster."""


def compress(
    model: ModelLike,
    *,
    weights: str | None = None,
    block: int = 64,
    rounding: str = "auto",
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    size: str | int | None = None,
    memory: str | int | None = None,
    kernel: str = "standard",
    package: bool = False,
    **options: Any,
) -> Result:
    """Store weights in fewer bits; activations and sums stay in float. No data is needed.

    Args:
        model: anything :func:`graphopt.model.load` takes; never mutated.
        weights: ``fp16``, ``bf16``, ``int8`` (a scale per channel), ``int8-block``, ``int4``, ``uint4`` (a scale per
            block), ``palette8`` or ``palette4`` (the 256 or 16 values that fit best); ``fp16-compute``: fp16, and
            computed in it where the ranges in ``data`` allow; ``keep`` with ``package``: as they are; ``auto`` (the
            default with ``size``, else ``int8``): for each weight its own, for ``size``, ``max_drop`` or ``min_sqnr``.
        block: weights that share a scale, of the formats in blocks: 16, 32, 64, 128 or 256.
        rounding: ``nearest``, ``fitted``, ``data`` or ``auto``.
        exclude, include: names, globs, ``re:`` expressions or operator types of nodes whose weights stay, or do not.
        size: what is to be left of the file: ``"25MB"``, or a ratio such as ``"0.3"``.
        memory: weights above which the models are not run to be compared (``"4GB"``; default a quarter of the
            machine's memory): then they are read, compressed and written tensor by tensor.
        kernel: of 4-bit products, ``standard`` or ``ort`` (MatMulNBits: loads faster, in ONNX Runtime alone).
        package: :meth:`Result.save` writes a package for transport, which :func:`unpack` takes apart again.
        options: fields of :class:`Options`, and gates (``max_drop``, ``min_sqnr``, ``min_speedup``, ``max_size``).

    Raises:
        InputError: bad model, data or option, or an operator set that cannot be raised as far as the format needs.
        NothingDone: no weight could be stored in fewer bytes; the message says why.
        GateFailed: a gate was not met.
    """
    weights = weights or ("int8" if size is None else "auto")
    if package:
        check_zstandard()
    if weights == "keep":
        return kept_as_it_is(model, package, options)
    settings = _settings("uint4" if weights == "auto" else weights, block, rounding, kernel, exclude, include)
    merged = merge_options(options, None)
    _check(weights, rounding, kernel, size, merged)
    limit = memory_limit(memory)
    told = {"weights": weights, "block": block, "rounding": rounding, "kernel": kernel, "exclude": exclude}
    merged.settings = {**told, "include": include, "size": size, "memory": memory, "package": package}
    loaded, source = read_source(model, merged)
    if weights == HALF:
        patterns = {key: settings[key] for key in ("exclude", "include")}
        return packaged(_computed_in_half(loaded, source, create("compute-fp16", patterns), merged), package, merged)
    step = create("compress-weights", settings)
    assert isinstance(step, CompressWeights)
    if weight_bytes(loaded) <= limit:
        return packaged(_made(loaded, source, step, merged, size, choose=weights == "auto"), package, merged)
    if weights == "auto":
        raise InputError("choosing formats has to run the model, and its weights are more than --memory; raise it")
    return packaged(_streamed(loaded, source, step, merged, limit), package, merged)


def _made(
    model: ir.Model, source: ModelLike, step: CompressWeights, options: Options, size: str | int | None, *, choose: bool
) -> Result:
    """Compressed, compared with the original and timed against it."""
    before = prepared(model, step)
    notes: list[str] = []
    if choose:
        before = _worth_it(model, step, before)
        step, notes = _chosen(model, source, before, step, options, size)
    must = [step.name, *(p.name for p in before if p.name == "upgrade-opset")]
    result = make(model, [*before, step], options, verb="compress", named=source, must=must)
    result.report["notes"][:0] = [*notes, *_told(result.report)]
    _smaller(result.report)
    return result


def _worth_it(model: ir.Model, step: CompressWeights, before: list[Pass]) -> list[Pass]:
    """``before``, or what leaves the operator set lower, where raising it for 4 bits adds more to the file (shapes that
    become inputs) than the other 4 bits of every weight."""
    lower = prepared(model, replace(step, format="int8"))
    sizes = (about(PassManager(p, verify="off").run(model).model, None)["bytes"] for p in (before, lower))
    grown = next(sizes) - next(sizes)
    return lower if grown >= weight_bytes(model) // 8 else before


def _computed_in_half(model: ir.Model, source: ModelLike, step: Pass, options: Options) -> Result:
    """Computed in float16, compared with the original and timed against it."""
    fused = (create(name, {}) for name in ("fuse-batchnorm", "fuse-into-conv"))
    pipeline = [*prepared(model, step), *fused, step]
    result = make(model, pipeline, options, verb="compress", named=source, must=[step.name])
    metrics = next(e["metrics"] for e in reversed(result.report["ledger"]) if e["pass"] == step.name)
    counts = f"{metrics['nodes_in_float16']} nodes compute in float16, {metrics['other_nodes']} as before"
    told = f"{counts}, with {metrics['casts']} Casts between them"
    result.report["notes"][:0] = [told, *_speed(result.report, smaller_in_memory=False)]
    _smaller(result.report)
    return result


def _check(weights: str, rounding: str, kernel: str, size: str | int | None, options: Options) -> None:
    """Nothing is asked for that cannot be done with what was given."""
    check_gates(options)
    gates = options.gates
    if rounding == "data" and options.data is None:
        raise InputError("--rounding data rounds to what layers read, and there is none; give --data, or leave it out")
    if weights == HALF and options.data is None:
        raise InputError(
            "--weights fp16-compute has to see what values the model computes with; give --data calibration.npz, or "
            "--weights fp16, which only stores them so"
        )
    if kernel == "ort" and weights not in ("int4", "uint4", "auto"):
        raise InputError(f"--kernel ort multiplies 4-bit weights, not {weights}; give --weights int4 or uint4")
    if weights == HALF and rounding != "auto":
        raise InputError("--rounding is how integers are found, and fp16-compute has none; leave it out")
    if size is not None and weights != "auto":
        raise InputError(f"--size chooses a format for each weight, and --weights {weights} is one for all; give one")
    if size is not None:
        try:
            parse_size(str(size), 1)
        except InputError as error:
            raise InputError(f"--size {error}") from error
    if weights == "auto" and size is None:
        if gates.max_drop is None and gates.min_sqnr is None:
            raise InputError("--weights auto needs something to aim at; give --size, --max-drop or --min-sqnr")
        if options.data is None and options.eval_data is None:
            raise InputError("--weights auto judges formats on data here; give --eval-data (or --data), or --size")


def _chosen(
    model: ir.Model, source: ModelLike, before: list[Pass], step: CompressWeights, options: Options, size: Any
) -> tuple[CompressWeights, list[str]]:
    """The step with a format for each weight, and what to tell of that.

    Raises:
        NothingDone: not even the smallest formats reach the size, or nothing keeps to the budget.
    """
    report = {**versions("compress", vars(options)), **blank(about(model, source))}
    context = make_context(model, options, report)
    run = PassManager(before, verify="off", raise_preconditions=True).run(model, context)
    found = moves(run.model, step, context)
    bytes_in, now = report["input"]["bytes"], about(run.model, None)["bytes"]
    if size is not None:
        wanted = parse_size(str(size), bytes_in)
        taken = for_size(found, now + _NODES * len({move.weight for move in found}), wanted)
        if taken is None:
            least = now - sum(move.saved for move in found)
            why = f"the smallest formats leave about {in_words(least)}, and --size asks for {in_words(wanted)}"
            raise with_report(NothingDone(f"{why}; nothing was written"), report)
    else:
        holds = limit_of(model, context, options.gates, as_metric(options.metric))
        assert holds is not None

        def kept(some: Sequence[Move]) -> bool:
            one = clone(run.model)
            replace(step, format="float", assign=assigned(some)).run(one, context)
            return holds(one)

        taken = for_budget(found, kept)
        if not taken:
            raise with_report(NothingDone("not one weight can be stored in less within the budget"), report)
    counts = f"{len({m.weight for m in taken})} of {len({m.weight for m in found})} weights"
    note = f"{counts} got a format for least damage per byte, {len(taken)} of {len(found)} steps down"
    return replace(step, format="float", assign=assigned(taken)), [note]


def _settings(
    weights: str, block: int, rounding: str, kernel: str, exclude: Sequence[str], include: Sequence[str]
) -> dict[str, Any]:
    """The options of the pass."""
    for name, patterns in (("exclude", exclude), ("include", include)):
        if isinstance(patterns, str):
            raise InputError(f"{name} is one string; give a list of patterns: [{patterns!r}]")
    return {
        "format": weights,
        "block": block,
        "round_to": rounding,
        "kernel": kernel,
        "exclude": tuple(exclude),
        "include": tuple(include),
    }


def memory_limit(memory: str | int | None) -> int:
    """Bytes of weights that may be run; see :func:`compress`.

    Raises:
        InputError: no size.
    """
    if memory is not None:
        try:
            return parse_size(str(memory), 1)
        except InputError as error:
            raise InputError(f"--memory {error}") from error
    return total_memory() // 4


def prepared(model: ir.Model, step: Pass) -> list[Pass]:
    """What runs before: the operator set that the format needs, and exact passes that make weights fewer."""
    return [*_raised(model, step), *(create(name, {}) for name in _SHRINKS)]


def _raised(model: ir.Model, step: Pass) -> list[Pass]:
    wanted = int(getattr(step, "least_opset", 1))
    inline = [create("inline-functions", {})] if model.functions else []
    return [*inline, create("upgrade-opset", {"to": wanted})] if 0 < opset(model) < wanted else inline


def _streamed(model: ir.Model, source: ModelLike, step: Pass, options: Options, limit: int) -> Result:
    """The same without running anything: each weight against itself."""
    why = f"the weights take {in_words(weight_bytes(model))}, more than --memory ({in_words(limit)})"
    asked = {key for key in options.gates.asked() if key != "max_size"}
    for name in (*sorted(asked), *(key for key in ("data", "eval_data") if getattr(options, key) is not None)):
        raise InputError(f"--{name.replace('_', '-')} has to run the model, and {why}; raise --memory, or leave it out")
    if options.dims or options.input_shapes or options.fold_overridable or options.opset:
        raise InputError(f"changes to the model's interface are verified by running it, and {why}; raise --memory")
    report = {**versions("compress", vars(options)), **blank(about(model, source))}
    context = make_context(model, options, report)
    pipeline = [*_raised(model, step), step]
    result = PassManager(pipeline, verify="off", raise_preconditions=True).run(model, context)
    report["ledger"] = [entry.as_dict() for entry in result.ledger]
    something_done(result, pipeline, [step.name], report)
    report["output"] = about(result.model, None)
    sizes = report["input"]["bytes"], report["output"]["bytes"]
    verdict = size_verdict(options.gates, sizes)
    report.update(verdict.as_dict())
    loss = result.ledger[-1].metrics["weight_sqnr_db"]
    told = "exactly" if loss is None else f"to {loss:.1f} dB"
    report["notes"] += [*_told(report), f"neither model was run: {why}; each weight was compared with itself: {told}"]
    hold(verdict, result, report, strict=options.strict)
    _smaller(report)
    return Result(result.model, report, model, pipeline, options)


def _smaller(report: dict[str, Any]) -> None:
    before, after = report["input"]["bytes"], report["output"]["bytes"]
    if after >= before:
        raise with_report(
            NothingDone(
                f"the file would not shrink ({in_words(before)} -> {in_words(after)}): what decodes the weights "
                "outweighs them; nothing was written"
            ),
            report,
        )


def _told(report: dict[str, Any]) -> list[str]:
    """What the runtime does with the weights, and whether anything but the file got smaller."""
    metrics = next(e["metrics"] for e in reversed(report["ledger"]) if e["pass"] == "compress-weights")
    parts = []
    for key, what in (
        ("bytes_multiplied_packed", "are multiplied as they are stored (less memory)"),
        ("bytes_decoded_on_lookup", "are decoded row by row as they are looked up (less memory)"),
        ("bytes_decoded_at_load", "are decoded when the model is loaded (memory and time as before)"),
    ):
        if metrics[key]:
            parts.append(f"{in_words(metrics[key])} {what}")
    smaller = metrics["bytes_decoded_at_load"] == 0
    return [f"of the weights compressed, {'; '.join(parts)}", *_speed(report, smaller_in_memory=smaller)]


def _speed(report: dict[str, Any], *, smaller_in_memory: bool) -> list[str]:
    """Whether it runs faster or slower here, where it was timed."""
    speed = report["latency_ratio"]
    if speed is None:
        return []
    if speed["median"] < _FASTER and speed["high"] < 1:
        return [f"it runs faster here: {speed['median']:.2f} of the original's time"]
    if speed["median"] > 1 / _FASTER and speed["low"] > 1:
        return [f"it runs slower here: {speed['median']:.2f} of the original's time; smaller is all it is"]
    too = " and what the weights take in memory" if smaller_in_memory else ""
    return [f"it takes the time that the original takes: it only shrinks the file{too}"]
