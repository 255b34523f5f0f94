"""Inner values as outputs, where a run can return them: those inside the branches of an If too."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

_LIFTED = "graphopt.lifted:"


def with_taps(
    proto: onnx.ModelProto, taps: Sequence[str], *, keep_outputs: bool
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """A copy whose graph outputs are the taps too (types are left for the runtime to infer), and the names that those
    have which an If had to hand out."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    present = {o.name for o in copy.graph.output}
    if not keep_outputs:
        kept = [o for o in copy.graph.output if o.name in set(taps)]
        del copy.graph.output[:]
        copy.graph.output.extend(kept)
        present = {o.name for o in kept}
    sizes = [node for node in copy.graph.node if node.op_type == "Size" and node.output[0] in set(taps)]
    lifted = {n: o for n, o in lift(copy.graph, {*taps, *(n for s in sizes for n in s.input)}).items() if n != o}
    for node in sizes:
        node.input[0] = lifted.get(node.input[0], node.input[0])
    copy.graph.output.extend(onnx.ValueInfoProto(name=lifted.get(name, name)) for name in taps if name not in present)
    return copy, lifted


def lift(graph: onnx.GraphProto, names: Collection[str]) -> dict[str, str]:
    """Let every If hand out those of the float32 values ``names`` that its branches make, at any depth.

    ``graph`` is changed. Returns the name each has in ``graph``. The branch that does not make a value hands out a
    tensor of no elements instead, which is how a run says that the branch was not taken. What a Loop or Scan makes in
    each of its turns stays inside, and so does what two branches make under one name.
    """
    found: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "If" and node.domain in ("", "ai.onnx"):
            found |= _from_branches(node, names)
    return found | {name: name for node in graph.node for name in node.output if name in names}


def _from_branches(node: onnx.NodeProto, names: Collection[str]) -> dict[str, str]:
    branches = [a.g for a in node.attribute if a.HasField("g")]
    made = [lift(branch, names) for branch in branches]
    found: dict[str, str] = {}
    for number, inside in enumerate(made):
        for name, local in inside.items():
            if sum(name in other for other in made) > 1:
                continue
            for other, branch in enumerate(branches):
                branch.output.add(name=local if other == number else _nothing(branch, name))
            found[name] = f"{_LIFTED}{name}"
            node.output.append(found[name])
    return found


def _nothing(branch: onnx.GraphProto, name: str) -> str:
    """A float32 tensor without elements, made in ``branch``."""
    from onnx import TensorProto, helper

    value = helper.make_tensor("nothing", TensorProto.FLOAT, [0], [])
    made = f"{_LIFTED}no {name}"
    branch.node.append(helper.make_node("Constant", [], [made], value=value))
    return made
