"""From what a converter wrote to a model that is whole: operator sets declared once, opset and IR recent, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.errors import GraphoptError, InputError, ModelError, PreconditionError
from graphopt.graph import opset
from graphopt.manager import PassManager
from graphopt.model import PROTO_LIMIT, graphs, load, read_proto
from graphopt.presets import asked
from graphopt.session import one_line

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

LEAST_OPSET = 17
LEAST_IR = 8
_ASSUMED = 15
"""Opset of the default domain where a converter (XGBoost's) used it without saying so."""


def tidied(path: Path, *, to_opset: int | None, converter: str) -> tuple[ir.Model, list[str]]:
    """The model in ``path``, which is rewritten on the way, and notes on what was put right.

    Raises:
        ModelError: the converter wrote something that is no valid model; what it is is named.
        InputError: ``to_opset`` is below what was written.
    """
    notes: list[str] = []
    try:
        proto = read_proto(path)
        notes += _declare(proto) + _erfc(proto)
        path.write_bytes(proto.SerializeToString())
        _check(proto)
        model = load(path)
    except ModelError as error:
        text = str(error).replace(str(path), "it").partition(";")[0]
        raise ModelError(f"{converter} wrote an invalid model: {text}; nothing was written") from error
    now = opset(model)
    wanted = max(to_opset or LEAST_OPSET, now if to_opset is None else 0)
    if (now and now < wanted) or (to_opset is not None and to_opset < now):
        model, more = _raised(model, wanted, now, demanded=to_opset is not None)
        notes += more
    if model.ir_version < LEAST_IR:
        notes.append(f"IR version {model.ir_version} -> {LEAST_IR}")
        model.ir_version = LEAST_IR
    return model, notes


def _declare(proto: onnx.ModelProto) -> list[str]:
    """Each operator set that nodes use, once: skl2onnx imports the default one twice, XGBoost's converter never."""
    notes: list[str] = []
    found: dict[str, int] = {}
    for entry in proto.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        found[domain] = max(found.get(domain, 0), entry.version)
    if len(found) != len(proto.opset_import):
        notes.append("an operator set was imported twice; the later one counts")
    used = {"" if n.domain == "ai.onnx" else n.domain for graph in graphs(proto) for n in graph.node}
    local = {function.domain for function in proto.functions}
    if "" in used and "" not in found:
        found[""] = _ASSUMED
        notes.append(f"the default operator set was not imported; opset {_ASSUMED} is assumed")
    found.setdefault("", LEAST_OPSET)
    for domain in sorted(set(found) - used - local - {""}):
        del found[domain]
    del proto.opset_import[:]
    for domain, version in found.items():
        proto.opset_import.add(domain=domain, version=version)
    return notes


def _erfc(proto: onnx.ModelProto) -> list[str]:
    """tf2onnx writes Keras' gelu with an operator Erfc, which ONNX has not: 1 - Erf it is."""
    import onnx

    count = 0
    for graph in graphs(proto):
        for node in [n for n in graph.node if n.op_type == "Erfc" and n.domain in ("", "ai.onnx")]:
            at = next(k for k, other in enumerate(graph.node) if other is node)
            one, inner = f"{node.output[0]}/one", f"{node.output[0]}/erf"
            made = (
                onnx.helper.make_node("Erf", [node.input[0]], [inner], name=f"{node.name}/Erf"),
                onnx.helper.make_node("Constant", [], [one], name=f"{node.name}/One", value_float=1.0),
                onnx.helper.make_node("Sub", [one, inner], [node.output[0]], name=node.name),
            )
            graph.node.remove(node)
            for k, new in enumerate(made):
                graph.node.insert(at + k, new)
            count += 1
    return [f"{count} Erfc, which ONNX has not, became 1 - Erf"] if count else []


def loosen(model: ir.Model, seen: Mapping[str, Sequence[tuple[int, ...]]]) -> list[str]:
    """Free the dims of outputs that were declared as one size and came in another (LightGBM's labels): what
    :func:`~graphopt.conversion.agreement.agree` saw, by output. Returns notes."""
    import onnx_ir as ir

    notes: list[str] = []
    for value in model.graph.outputs:
        shape, came = value.shape, seen.get(value.name or "", ())
        if shape is None or not came:
            continue
        if any(len(other) != len(shape) for other in came):
            value.shape = None
        else:
            free = {k for k, dim in enumerate(shape) for other in came if isinstance(dim, int) and dim != other[k]}
            if not free:
                continue
            value.shape = ir.Shape([None if k in free else dim for k, dim in enumerate(shape)])
        notes.append(f"output '{value.name}' was declared {shape} and comes in other sizes; they are free now")
    return notes


def _check(proto: onnx.ModelProto) -> None:
    """onnx's own checker: a converter may write operators that do not exist, say "saved" and exit 0."""
    import onnx

    if proto.ByteSize() >= PROTO_LIMIT or any(t.external_data for t in proto.graph.initializer):
        return  # the checker would look for data files; the runtime judges these
    try:
        onnx.checker.check_model(proto)
    except Exception as error:  # the checker raises a family of its own
        raise ModelError(one_line(error).partition("==>")[0].strip()) from error


def _raised(model: ir.Model, wanted: int, now: int, *, demanded: bool) -> tuple[ir.Model, list[str]]:
    try:
        result = PassManager(asked(model, to_opset=wanted), verify="off", raise_preconditions=["upgrade-opset"])
        raised = result.run(model).model
    except PreconditionError as error:
        if demanded:
            raise
        return model, [f"it stays at opset {now}: {error}"]
    except InputError:
        raise
    except GraphoptError as error:
        if demanded:
            raise
        return model, [f"it stays at opset {now}: {error}"]
    return raised, [f"opset {now} -> {wanted}"]
