"""Are the standard's own operators used as it says: inputs, outputs and attributes there, and of the right kind?

Everything behind this relies on it: an Add with one input crashes whoever looks at its second. Operators of other
domains, and of versions that are not known here, are nobody's business but their runtime's.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from graphopt.errors import ModelError
from graphopt.external import shown
from graphopt.inline import MAX_RANK
from graphopt.residue import graphs

if TYPE_CHECKING:
    import onnx


def check_nodes(proto: onnx.ModelProto, where: str) -> None:
    """Refuse what no runtime could run.

    Raises:
        ModelError: naming the first such node.
    """
    versions = _versions(proto.opset_import)
    problem = next((p for graph in graphs(proto) if (p := _problem(graph.node, versions))), None)
    for function in proto.functions:
        problem = problem or _problem(function.node, _versions(function.opset_import))
    problem = problem or next((p for v in (*proto.graph.input, *proto.graph.output) if (p := _port_problem(v))), None)
    if problem:
        raise ModelError(f"{where} is not a valid ONNX model: {problem}; export it again")


def _versions(imports: Any) -> int:
    return next((o.version for o in imports if o.domain in ("", "ai.onnx")), 0)


def _problem(nodes: Iterable[onnx.NodeProto], version: int) -> str | None:
    for index, node in enumerate(nodes):
        problem = next((p for a in node.attribute if (p := _empty(a))), None)
        if problem is None and node.domain in ("", "ai.onnx"):
            rules = _rules(node.op_type, version)
            problem = None if rules is None else _misused(node, rules)
        if problem:
            return f"node '{shown(node.name) or index}' ({shown(node.op_type)}) {problem}"
    return None


def _port_problem(value: onnx.ValueInfoProto) -> str | None:
    rank = len(value.type.tensor_type.shape.dim) if value.type.HasField("tensor_type") else 0
    return f"'{shown(value.name)}' has {rank} dims, more than the {MAX_RANK} of an array" if rank > MAX_RANK else None


def _empty(attribute: onnx.AttributeProto) -> str | None:
    """An attribute that says it holds something, and does not."""
    from onnx import AttributeProto

    if attribute.ref_attr_name:
        return None
    held = {AttributeProto.TENSOR: "t", AttributeProto.GRAPH: "g", AttributeProto.SPARSE_TENSOR: "sparse_tensor"}
    name = held.get(attribute.type)
    undefined = name == "t" and attribute.t.data_type == 0
    if name is not None and (undefined or not attribute.HasField(name)):
        return f"has no value in its attribute '{shown(attribute.name)}'"
    if not attribute.name:
        return "has an attribute without a name"
    return None


class _Rules:
    """What one version of an operator takes."""

    def __init__(self, schema: Any) -> None:
        single = [i.option.name == "Single" for i in schema.inputs]
        self.inputs = (schema.min_input, schema.max_input)
        self.outputs = (schema.min_output, schema.max_output)
        self.needed = [index for index, needed in enumerate(single) if needed]
        self.required = [name for name, a in schema.attributes.items() if a.required]
        self.kinds = {name: int(a.type.value) for name, a in schema.attributes.items()}


@lru_cache(maxsize=4096)
def _rules(op_type: str, version: int) -> _Rules | None:
    import onnx

    if not 0 < version < 2**31 or len(op_type) > 200:
        return None
    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except Exception:  # unknown, or newer than the onnx that is installed
        return None
    return None if schema.deprecated else _Rules(schema)


def _misused(node: onnx.NodeProto, rules: _Rules) -> str | None:
    for what, count, (least, most) in (
        ("input", len(node.input), rules.inputs),
        ("output", len(node.output), rules.outputs),
    ):
        if not least <= count <= most:
            takes = least if least == most else f"at least {least}" if count < least else f"at most {most}"
            return f"has {count} {what}{'' if count == 1 else 's'}, the operator takes {takes}"
    missing = next((i for i in rules.needed if i < len(node.input) and not node.input[i]), None)
    if missing is not None:
        return f"leaves out its input {missing}, which the operator needs"
    given = {a.name: a for a in node.attribute}
    if len(given) < len(node.attribute):
        return "has an attribute twice"
    absent = next((name for name in rules.required if name not in given), None)
    if absent is not None:
        return f"has no attribute '{absent}', which the operator needs"
    for name, attribute in given.items():
        kind = rules.kinds.get(name)
        if kind is not None and attribute.type not in (0, kind):  # files of IR version 1 leave it out
            return f"has an attribute '{shown(name)}' of another type than the operator takes"
    return None
