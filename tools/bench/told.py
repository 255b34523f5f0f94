"""Facts of a model by plain onnx alone, and where a tool's output would say them: for ``inspect_rivals.py``."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx
from onnx import numpy_helper

Told = Callable[[str], bool]
Question = Callable[["Model"], Told | None]
HEAVY = ("Conv", "MatMul", "Gemm")
UNCOUNTED = ("LSTM", "GRU", "RNN", "If", "Loop", "Scan", "Einsum", "ConvTranspose")
BODIES = (onnx.AttributeProto.GRAPH,)


@dataclass
class Model:
    """A model, and what plain onnx makes of it."""

    title: str
    path: Path

    @cached_property
    def proto(self) -> onnx.ModelProto:
        return onnx.load(self.path, load_external_data=False)

    @cached_property
    def graphs(self) -> list[onnx.GraphProto]:
        def inner(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
            yield graph
            for node in graph.node:
                for attribute in node.attribute:
                    if attribute.type in BODIES:
                        yield from inner(attribute.g)

        return list(inner(self.proto.graph))

    @cached_property
    def tensors(self) -> dict[str, onnx.TensorProto]:
        return {t.name: t for graph in self.graphs for t in graph.initializer}

    @cached_property
    def constants(self) -> list[onnx.TensorProto]:
        """Tensors in attributes: of Constant, and what ConstantOfShape fills with."""
        attributes = (a for graph in self.graphs for node in graph.node for a in node.attribute)
        return [a.t for a in attributes if a.type == onnx.AttributeProto.TENSOR]

    @property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        return [v for v in self.proto.graph.input if v.name not in self.tensors]

    @cached_property
    def counts(self) -> dict[str, set[int]]:
        """Operator -> how often, in the main graph and in all (both are right)."""
        inside = Counter(node.op_type for node in self.proto.graph.node)
        both = Counter(node.op_type for graph in self.graphs for node in graph.node)
        return {name: {both[name], inside[name]} - {0} for name in both}

    @cached_property
    def sizes(self) -> dict[str, tuple[list[int], int]]:
        """Value -> (shape, bytes per element) where onnx infers it with every unknown input dim as 1."""
        copy = onnx.ModelProto()
        copy.CopyFrom(self.proto)
        for value in copy.graph.input:
            for dim in value.type.tensor_type.shape.dim:
                dim.dim_value = dim.dim_value or 1
        for value in copy.graph.output:
            value.type.tensor_type.ClearField("shape")
        del copy.graph.value_info[:]
        try:
            copy = onnx.shape_inference.infer_shapes(copy, data_prop=True)
        except Exception:
            return {}
        found = {t.name: (list(t.dims), 0) for t in copy.graph.initializer}
        for value in (*copy.graph.input, *copy.graph.value_info, *copy.graph.output):
            kind = value.type.tensor_type
            dims = [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim]
            if kind.HasField("shape") and min(dims, default=0) >= 0 and value.name not in found:
                found[value.name] = (dims, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize)
        return found

    @cached_property
    def macs(self) -> dict[str, int] | None:
        """Node -> MACs of Conv, MatMul and Gemm; None where a shape is missing or others multiply too."""
        found: dict[str, int] = {}
        if self.proto.functions or any(n.op_type in UNCOUNTED or n.domain not in ("", "ai.onnx") for n in self.nodes):
            return None
        for node in self.nodes:
            if node.op_type not in HEAVY:
                continue
            if any(name not in self.sizes for name in (*node.input[:2], node.output[0])):
                return None
            (a, _), (b, _), (y, _) = (self.sizes[name] for name in (*node.input[:2], node.output[0]))
            transposed = any(x.name == "transA" and x.i for x in node.attribute)
            found[node.name] = math.prod(y) * (
                math.prod(b[1:]) if node.op_type == "Conv" else a[-2 if transposed else -1]
            )
        return found or None

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        return list(self.proto.graph.node)

    @cached_property
    def peak(self) -> int | None:
        """Bytes of inputs, outputs and inner values at once, in the file's order, each let go after its last reader."""
        if len(self.graphs) > 1 or self.proto.functions:
            return None
        kept = {v.name for v in self.proto.graph.output}
        last = {name: index for index, node in enumerate(self.nodes) for name in node.input if name}
        alive = {v.name for v in self.inputs}
        most = 0
        for index, node in enumerate(self.nodes):
            alive |= {name for name in node.output if name}
            if any(name not in self.sizes for name in alive):
                return None
            if node.op_type != "Constant":
                most = max(most, sum(math.prod(self.sizes[n][0]) * self.sizes[n][1] for n in alive))
            alive = {n for n in alive if n in kept or last.get(n, -1) > index}
        return most


# Answers: where a tool prints them


def line(*parts: str) -> Told:
    """All of these stand in one line, in any order."""
    patterns = [re.compile(part, re.IGNORECASE) for part in parts]
    return lambda text: any(all(p.search(one) for p in patterns) for one in text.splitlines())


def every(*all_told: Told) -> Told:
    return lambda text: all(told(text) for told in all_told)


def either(*some: Told) -> Told:
    return lambda text: any(told(text) for told in some)


def word(text: str) -> str:
    return rf"(?<![\w.]){re.escape(text)}(?![\w])"


def spelled(number: int) -> str:
    """``24720``, ``24,720``, ``24.72 k``, ``24.1 Ki``: however a tool writes it."""
    forms = {str(number), f"{number:,}"}
    for base in (1000, 1024):
        for power, unit in enumerate("kMG", 1):
            if number >= base**power:
                for digits in (1, 2, 3):
                    forms.add(f"{number / base**power:.{digits}f} ?[{unit.lower()}{unit.upper()}]")
    return r"(?<![\d.,])(?:" + "|".join(f.replace(".", r"\.") for f in sorted(forms)) + r")(?![\d])"


def near(number: int, more: float, *parts: str) -> Told:
    """A line with ``parts`` holds a number between ``number`` and ``more`` times as much (or twice: FLOPs)."""
    found = re.compile(r"(?<![\w.])(\d[\d,]*(?:\.\d+)?) ?([kKMG]?)")
    scale = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}

    def told(text: str) -> bool:
        for row in filter(line(*parts), text.splitlines()):
            for digits, unit in found.findall(row):
                value = float(digits.replace(",", "")) * scale[unit]
                if any(number * k * 0.995 <= value <= number * k * more for k in (1, 2)):
                    return True
        return False

    return told


def operator(name: str, counts: set[int]) -> Told:
    many = "|".join(str(c) for c in counts)
    return either(
        line(rf"(?<!\d)(?:{many}) (?:[\w.]+::)?{re.escape(name)}(?!\w)"), line(rf"{word(name)}[\s|:]+(?:{many})(?!\d)")
    )


# Questions


def symbolic(m: Model) -> Told | None:
    dims = [(v.name, d.dim_param) for v in m.inputs for d in v.type.tensor_type.shape.dim if d.dim_param.strip("?")]
    return every(*(line(word(name), word(dim)) for name, dim in dims)) if dims else None


def dynamic(m: Model) -> Told | None:
    shapes = [[d for v in side for d in v.type.tensor_type.shape.dim] for side in (m.inputs, m.proto.graph.output)]
    named = {d.dim_param for side in shapes for d in side if d.dim_param.strip("?")}
    unnamed = sum(
        d.dim_param in ("", "?") and (d.dim_value < 0 or not d.HasField("dim_value")) for side in shapes for d in side
    )
    parts = [word(n) for n in named] + ([rf"(?<!\d){unnamed}(?!\d)"] if unnamed else [])
    return line(r"dynamic|symbolic", *parts) if parts else None


def opsets(m: Model) -> Told | None:
    return every(
        *(line(r"op ?sets?", word(str(o.version)), word(o.domain) if o.domain else "") for o in m.proto.opset_import)
    )


def producer(m: Model) -> Told | None:
    known = [text for text in (m.proto.producer_name, m.proto.producer_version) if text]
    return line(*map(re.escape, known)) if known else None


def operators(m: Model) -> Told | None:
    return every(*(operator(name, counts) for name, counts in m.counts.items()))


def parameters(m: Model) -> Told | None:
    plain = sum(math.prod(t.dims) for t in m.tensors.values())
    floats = sum(math.prod(t.dims) for t in m.tensors.values() if t.data_type == onnx.TensorProto.FLOAT)
    both = plain + sum(math.prod(t.dims) for t in m.constants)
    return either(*(line("param|total", spelled(n)) for n in (plain, floats, both) if n))


def by_type(m: Model) -> Told | None:
    answers = []
    for tensors in (list(m.tensors.values()), [*m.tensors.values(), *m.constants]):
        kinds: Counter[int] = Counter()
        for t in tensors:
            kinds[t.data_type] += math.prod(t.dims) * onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize
        names = {k: onnx.TensorProto.DataType.Name(k).lower() for k in kinds}
        if not any(kinds.values()):
            continue
        answers.append(every(*(line(rf"{names[k]}(?:32)?[ :|]+{spelled(n)}") for k, n in kinds.items() if n)))
    return either(*answers)


def macs(m: Model) -> Told | None:
    return near(sum(m.macs.values()), 1.3, "mac|flop|total") if m.macs else None


def macs_by_operator(m: Model) -> Told | None:
    kinds: Counter[str] = Counter()
    for node in m.nodes:
        kinds[node.op_type] += (m.macs or {}).get(node.name, 0)
    return every(*(near(n, 1.1, word(kind)) for kind, n in kinds.items() if n)) if m.macs else None


def macs_by_node(m: Model) -> Told | None:
    if not m.macs or not all(m.macs):
        return None
    return every(*(near(n, 1.3, re.escape(name[:190])) for name, n in m.macs.items()))


def activations(m: Model) -> Told | None:
    return near(m.peak, 1.02, "activ|peak|memory|total") if m.peak else None


def largest(m: Model) -> Told | None:
    def size(t: onnx.TensorProto) -> int:
        return math.prod(t.dims) * onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize

    ranked = sorted(m.tensors.values(), key=size, reverse=True)
    if len(ranked) < 3 or size(ranked[0]) == size(ranked[-1]):
        return None

    def told(text: str) -> bool:
        named = {t.name: size(t) for t in ranked}
        rows = [[named[token] for token in row.split() if token in named] for row in text.splitlines()]
        found = [row[0] for row in rows if len(row) == 1]
        top = [size(t) for t in ranked[:5]]
        return any(found[i : i + len(top)] == top for i in range(len(found)))

    return told


def duplicates(m: Model) -> Told | None:
    groups: dict[tuple[int, bytes, str], list[str]] = {}
    for t in m.tensors.values():
        groups.setdefault((t.data_type, numpy_helper.to_array(t).tobytes(), str(t.dims)), []).append(t.name)
    groups = {key: names for key, names in groups.items() if len(names) > 1}
    if not groups:
        return None
    names = max(groups.values(), key=len)[:2]
    return line("equal|same|duplic|repeat", *map(word, names))


def dead(m: Model) -> Told | None:
    read = {name for graph in m.graphs for node in graph.node for name in node.input}
    read |= {v.name for graph in m.graphs for v in graph.output}
    idle = [name for name in m.tensors if name not in read]
    return line("dead|unused|unread|unreach", rf"(?<!\d){len(idle)}(?!\d)|{word(idle[0])}") if idle else None


def qdq(m: Model) -> Told | None:
    made = {name for node in m.nodes if node.op_type == "DequantizeLinear" for name in node.output}
    heavy = [node for node in m.nodes if node.op_type in HEAVY]
    done = sum(all(name in made for name in node.input[:2]) for node in heavy)
    return line("quanti", rf"(?<!\d){done}\D{{1,12}}{len(heavy)}(?!\d)") if made else None


def functions(m: Model) -> Told | None:
    return every(*(line("function", word(f.name)) for f in m.proto.functions)) if m.proto.functions else None


def bodies(m: Model) -> Told | None:
    outside = {node.op_type for node in m.nodes}
    inner = {name: counts for name, counts in m.counts.items() if name not in outside}
    return every(*(operator(name, counts) for name, counts in inner.items())) if inner else None


def metadata(m: Model) -> Told | None:
    plain = [p for p in m.proto.metadata_props if p.value.isprintable() and p.value.strip()]
    return every(*(line(word(p.key), re.escape(p.value[:20])) for p in plain)) if plain else None


def one_node(m: Model) -> onnx.NodeProto | None:
    named = (n for n in m.nodes if n.name and n.op_type not in ("Constant", "If", "Loop") and n.attribute)
    return next((n for n in named if any(a.type == onnx.AttributeProto.INT for a in n.attribute)), None)


def attributes(m: Model) -> Told | None:
    node = one_node(m)
    if node is None:
        return None
    wanted = [name for name in (*node.input, *node.output) if name]
    whole = [rf"{a.name}\W+{a.i}(?!\d)" for a in node.attribute if a.type == onnx.AttributeProto.INT]
    patterns = [re.compile(part) for part in (*map(word, wanted), *whole)]
    starts = re.compile(word(node.name))
    return lambda text: any(
        all(p.search(text, s.start(), s.start() + 2500) for p in patterns) for s in starts.finditer(text)
    )


QUESTIONS: dict[str, Question] = {
    "inputs with symbolic dims": symbolic,
    "all dynamic dims, listed": dynamic,
    "opsets of all domains": opsets,
    "producer": producer,
    "how many of each operator": operators,
    "parameters": parameters,
    "bytes of weights by type": by_type,
    "MACs": macs,
    "MACs of each operator": macs_by_operator,
    "MACs of each node": macs_by_node,
    "peak of activations": activations,
    "largest tensors, in order": largest,
    "duplicate weights": duplicates,
    "dead weights": dead,
    "QDQ coverage": qdq,
    "functions": functions,
    "operators inside If and Loop": bodies,
    "metadata": metadata,
    "a node's inputs and attributes": attributes,
}
