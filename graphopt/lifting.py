"""Inner values as outputs, where a run can return them: those in branches of an If and in bodies of loops too."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from graphopt.traversal import bodies, nodes, subgraphs

if TYPE_CHECKING:
    from typing import Any

    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray

_LIFTED = "graphopt.lifted:"
_LOOPS = ("Loop", "Scan")


@dataclass(frozen=True)
class Handed:
    """The name that a value has in the graph around, and how many loops stack their turns in front of its own dims."""

    name: str
    turns: int = 0

    def rows(self, array: NDArray[Any]) -> NDArray[Any]:
        """The value with its turns stacked along its own first axis, as if they were samples of a batch; in an axis of
        their own where it has no other than the last."""
        for _ in range(self.turns):
            if array.ndim > 2:
                array = array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])
        return array


def with_taps(
    proto: onnx.ModelProto, taps: Sequence[str], *, keep_outputs: bool
) -> tuple[onnx.ModelProto, dict[str, Handed]]:
    """A copy whose graph outputs are the taps too (types are left for the runtime to infer), and how those come that
    an If, a Loop or a Scan had to hand out."""
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
    lifted = lift(copy.graph, {*taps, *(n for s in sizes for n in s.input)})
    lifted = {name: handed for name, handed in lifted.items() if handed.name != name}
    for node in sizes:
        if node.input[0] in lifted:
            node.input[0] = lifted[node.input[0]].name
    names = [lifted[name].name if name in lifted else name for name in taps if name not in present]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return copy, lifted


def in_turns(model: ir.Model) -> set[str]:
    """The names of all values in bodies of loops, at any depth."""
    loops = [node for node in nodes(model) if node.op_type in _LOOPS]
    inside = [graph for node in loops for body in bodies(node) for graph in (body, *subgraphs(body))]
    return {v.name or "" for graph in inside for v in (*graph.inputs, *(o for node in graph for o in node.outputs))}


def lift(graph: onnx.GraphProto, names: Collection[str], *, looping: bool = False) -> dict[str, Handed]:
    """Let every If, Loop and Scan hand out those of the values ``names`` that its bodies make, at any depth.

    ``graph`` is changed. Returns how each comes in ``graph``. The branch of an If that does not make a value (a float32
    one) hands out a tensor of no elements instead, which is how a run says that it was not taken; in the body of a loop
    (``looping``), whose turns have to agree, what branches make stays inside. So does what two bodies make under one
    name. A Loop or Scan hands out what it makes in all of its turns, or fails where they differ in shape.
    """
    found: dict[str, Handed] = {}
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type == "If" and not looping:
            found |= _from_branches(node, names)
        elif node.op_type in _LOOPS:
            found |= _from_turns(node, names)
    return found | {name: Handed(name) for node in graph.node for name in node.output if name in names}


def _from_branches(node: onnx.NodeProto, names: Collection[str]) -> dict[str, Handed]:
    branches = [a.g for a in node.attribute if a.HasField("g")]
    made = [lift(branch, names) for branch in branches]
    found: dict[str, Handed] = {}
    for number, inside in enumerate(made):
        for name, local in inside.items():
            if sum(name in other for other in made) > 1:
                continue
            for other, branch in enumerate(branches):
                branch.output.add(name=local.name if other == number else _nothing(branch, name))
            found[name] = replace(local, name=f"{_LIFTED}{name}")
            node.output.append(found[name].name)
    return found


def _from_turns(node: onnx.NodeProto, names: Collection[str]) -> dict[str, Handed]:
    """What is stacked comes after all that a Loop or Scan gives otherwise, in its body and outside."""
    from onnx import helper

    body = next(a.g for a in node.attribute if a.name == "body")
    inside = {value.name: Handed(value.name) for value in body.input if value.name in names}
    inside |= lift(body, names, looping=True)
    found: dict[str, Handed] = {}
    for name, local in inside.items():
        handed = f"{_LIFTED}turn of {name}"  # what the body gives already may not be given twice
        body.node.append(helper.make_node("Identity", [local.name], [handed]))
        body.output.add(name=handed)
        found[name] = Handed(f"{_LIFTED}{name}", local.turns + 1)
        node.output.append(found[name].name)
    for attribute in node.attribute:
        if attribute.name in ("scan_output_axes", "scan_output_directions"):
            attribute.ints.extend([0] * len(found))
    return found


def _nothing(branch: onnx.GraphProto, name: str) -> str:
    """A float32 tensor without elements, made in ``branch``."""
    from onnx import TensorProto, helper

    value = helper.make_tensor("nothing", TensorProto.FLOAT, [0], [])
    made = f"{_LIFTED}no {name}"
    branch.node.append(helper.make_node("Constant", [], [made], value=value))
    return made
