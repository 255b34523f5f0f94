"""What each region takes here, in float and in integers, and what it takes to go from one to the other.

The runtime's profile of whole models is the measure, not regions cut out of them: a convolution alone pays for changes
of layout that it does not pay between two others, and is timed with caches that are never that warm. The float model
and the integer one run in turn with the profile on; every node the runtime ran is led back to the region it came from,
Q/DQ nodes and the changes of layout beside them to the border they stand on. What no run has shown yet (a conversion
where nobody converts so far) is estimated by the same conversion alone. Each mixture that is tried corrects the table.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.errors import GraphoptError, InputError
from graphopt.graph import label
from graphopt.model import load
from graphopt.profiling import Origins, Ran, recorded
from graphopt.search.placement import Border, Prices, Unit, borders
from graphopt.session import runtime_version
from graphopt.storage import write_text
from graphopt.target import this_cpu

Shapes = Mapping[str, tuple[int, ...]]

VERSION = 1
UINT8 = "u8"
"""The kind of weights that a layer may have in place of 7-bit ones."""
_LAYOUT = ("Transpose", "ReorderInput", "ReorderOutput", "Reshape")
_RANK = 0.25
"""The quantile of a node's times that stands for it: what else the machine does only ever adds."""


@dataclass
class CostTable:
    """``entries``: signature to nanoseconds. ``wholes``: by model, the placements that were timed as a whole: the units
    left ``float`` (and those with ``uint8`` weights), and candidate time over original time, its ``ratio`` and the ends
    of the 90 % interval."""

    machine: dict[str, Any]
    entries: dict[str, int] = field(default_factory=dict)
    wholes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As it is stored, in an order that depends on nothing else."""
        return {
            "version": VERSION,
            "machine": self.machine,
            "entries": dict(sorted(self.entries.items())),
            "wholes": dict(sorted(self.wholes.items())),
        }

    @property
    def sha256(self) -> str:
        """The hash of what :meth:`as_dict` says."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Store it, atomically."""
        write_text(path, json.dumps(self.as_dict(), indent=1) + "\n")


def this_machine(threads: int) -> dict[str, Any]:
    """What times depend on besides the model."""
    return {"onnxruntime": runtime_version(), "cpu": this_cpu().name, "vnni": this_cpu().vnni, "threads": threads}


def read_table(path: Path) -> CostTable:
    """A table that was written before.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            raise ValueError(f"version {found['version']}")
        entries = {str(key): int(value) for key, value in found["entries"].items()}
        wholes = {
            str(key): [
                {"float": sorted(map(str, one["float"])), "ratio": float(one["ratio"])}
                | {end: float(one[end]) for end in ("low", "high") if end in one}
                | ({"uint8": sorted(map(str, one["uint8"]))} if "uint8" in one else {})
                for one in tries
            ]
            for key, tries in found["wholes"].items()
        }
        return CostTable(dict(found["machine"]), entries, wholes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} is no cost table ({type(error).__name__}: {str(error)[:80]}); name a new file, and it is written"
        ) from error


def cache_folder() -> Path:
    """Where what was measured is kept for the next time: the user's cache folder."""
    if os.environ.get("XDG_CACHE_HOME"):
        folder = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        folder = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return folder / "graphopt"


def cache_path(machine: Mapping[str, Any]) -> Path:
    """Where tables of this machine are kept for the next model."""
    digest = hashlib.sha256(json.dumps(dict(machine), sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / f"costs-{digest}.json"


def cached(machine: Mapping[str, Any]) -> CostTable:
    """What earlier runs measured here; empty where there is nothing that can be read."""
    try:
        return CostTable(dict(machine), read_table(cache_path(machine)).entries)
    except InputError:
        return CostTable(dict(machine))


def keep(table: CostTable) -> None:
    """Put the entries into the cache. A folder that cannot be written is no error: the next run measures again."""
    path = cache_path(table.machine)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        CostTable(table.machine, table.entries).write(path)
    except (OSError, GraphoptError):
        return


class Pricing:
    """Prices of the units of one model from a table, and the table corrected by what runs of mixtures show."""

    def __init__(
        self, table: CostTable, model: ir.Model, found: Sequence[Unit], shapes: Shapes, kind: str, threads: int
    ) -> None:
        self.table, self.units, self.borders = table, found, borders(found)
        self._model, self._shapes, self._kind, self._threads = model, shapes, kind, threads
        self._unit_of = {label(node): unit for unit in found for node in unit.nodes}
        self._border_of = {border.value.name: border for border in self.borders}

    def of(self, kind: str) -> Pricing:
        """The same for another kind of integer weights, from and into the same table."""
        return Pricing(self.table, self._model, self.units, self._shapes, kind, self._threads)

    # What a thing is called in the table

    def unit_key(self, unit: Unit, *, integer: bool) -> str:
        """Operators with attributes and shapes, and the side."""
        parts = [f"{node.op_type}{_attributes(node)}" for node in unit.nodes]
        sizes = [self._shapes.get((v.name if v is not None else None) or "") for v in unit.nodes[0].inputs]
        known = ",".join("?" if size is None else "x".join(map(str, size)) for size in sizes)
        where = "" if None not in sizes else f" {unit.name}"  # of unknown size: nobody else's
        return f"{'+'.join(parts)}({known}){where} {self._kind if integer else 'float'}"

    def _shape(self, value: ir.Value) -> str:
        size = self._shapes.get(value.name or "")
        return f"? {value.name}" if size is None else "x".join(map(str, size))

    def quantize_key(self, border: Border) -> str:
        """A conversion is called by its shape and the operators around it, which decide the changes of layout."""
        producer = border.value.producer()
        readers = sorted({unit.nodes[0].op_type for unit in border.readers})
        return f"quantize {self._shape(border.value)} {producer.op_type if producer else 'input'}>{'+'.join(readers)}"

    def dequantize_key(self, border: Border, reader: ir.Node | None) -> str:
        """For one reader."""
        assert border.maker is not None
        maker = border.maker.nodes[0].op_type
        return f"dequantize {self._shape(border.value)} {maker}>{reader.op_type if reader is not None else 'output'}"

    # From the table

    def complete(self) -> bool:
        """Whether the table knows every unit on both sides."""
        keys = (self.unit_key(unit, integer=side) for unit in self.units for side in (False, True))
        return all(key in self.table.entries for key in keys)

    def own(self) -> CostTable:
        """What of the table is about this model."""
        keys = {self.unit_key(unit, integer=side) for unit in self.units for side in (False, True)}
        other = self.of(UINT8)
        keys |= {other.unit_key(unit, integer=True) for unit in self.units}
        for border in self.borders:
            keys |= {f"{what} {self._shape(border.value)}" for what in ("quantize", "dequantize")}
            keys |= {self.quantize_key(border)} if border.readers else set()
            if border.maker is not None:
                nodes = [unit.nodes[0] for unit in border.readers]
                keys |= {self.dequantize_key(border, node) for node in (*nodes, *border.others)}
        known = self.table.entries
        return CostTable(self.table.machine, {k: known[k] for k in sorted(keys) if k in known}, self.table.wholes)

    def prices(self) -> Prices:
        """What the table says of this model; a unit that it does not know is as fast on both sides."""
        result, entries = Prices(), self.table.entries
        for unit in self.units:
            a, b = (entries.get(self.unit_key(unit, integer=side)) for side in (False, True))
            result.in_float[unit.name] = a if a is not None else b or 0
            result.in_integers[unit.name] = b if b is not None else a or 0
        for border in self.borders:
            if border.readers:
                result.quantize[border.value] = self._known(self.quantize_key(border))
            if border.maker is not None:
                for unit in border.readers:
                    key = self.dequantize_key(border, unit.nodes[0])
                    result.dequantize[border.value, unit.name] = self._known(key)
                each = [self._known(self.dequantize_key(border, node)) for node in border.others]
                result.dequantize[border.value, ""] = sum(each) // max(len(each), 1)
        return result

    def _known(self, key: str) -> int:
        exact = self.table.entries.get(key)
        return exact if exact is not None else self.table.entries.get(" ".join(key.split(" ")[:2]), 0)

    # Into the table

    def estimate_conversions(self) -> None:
        """Measure the conversions of every shape alone, where the table does not have them."""
        wanted = [self._shape(border.value) for border in self.borders]
        wanted = [s for s in dict.fromkeys(wanted) if f"quantize {s}" not in self.table.entries and s[:1] != "?"]
        if not wanted:
            return
        model, feed = _conversions(wanted)
        (ran,), _ = recorded([model], [feed], threads=self._threads, seconds=0.2, rank=_RANK)
        for one in ran:
            what, _, index = one.name.partition(" ")
            if index.isdigit():
                self.table.entries[f"{what} {wanted[int(index)]}"] = round(one.seconds * 1e9)

    def observe(self, mixtures: Sequence[ir.Model], feeds: Sequence[Any], seconds: float) -> None:
        """Run the float model and ``mixtures`` in turn, and enter what they show."""
        (plain, *others), _ = recorded(
            [self._model, *mixtures], feeds, threads=self._threads, seconds=seconds, rank=_RANK
        )
        known = self.table.entries
        floats = {key: statistics.median(spent) * 1e9 for key, spent in self._attributed(self._model, plain).items()}
        both = [key for key in floats if key in known]
        # The machine may be slower or faster now than when the table was made: the float model tells by how much.
        scale = sum(known[key] for key in both) / max(sum(floats[key] for key in both), 1e-9) if both else 1.0
        seen: dict[str, list[float]] = {key: [ns] for key, ns in floats.items() if key not in known}
        for model, ran in zip(mixtures, others, strict=True):
            for key, spent in self._attributed(model, ran).items():
                if key not in floats:
                    seen.setdefault(key, []).extend(s * 1e9 for s in spent)
        for key, values in seen.items():
            known[key] = round(statistics.median(values) * (scale if scale > 0 else 1.0))

    def _attributed(self, model: ir.Model, ran: Sequence[Ran]) -> dict[str, list[float]]:
        """Seconds by key, each region and border of ``model`` once."""
        nodes = {label(node): node for node in model.graph}
        integer = {n.name: _reads_integers(nodes[n.name]) for n in self.units if n.name in nodes}
        spent: dict[tuple[str, str], float] = {}
        find = Origins(model)
        origin = {one.name: find(one)[0] for one in ran}
        made_by = {name: one for one in ran for name in one.writes}
        read_by: dict[str, Ran] = {name: one for one in reversed(ran) for name in one.reads}
        for one in ran:
            place = self._place(one, origin, made_by, read_by, integer)
            if place is not None:
                spent[place] = spent.get(place, 0.0) + one.seconds
        for unit in self.units:  # one that the runtime folded into another costs nothing
            if unit.name in nodes:
                spent.setdefault((self.unit_key(unit, integer=integer[unit.name]), unit.name), 0.0)
        for name, node in nodes.items():  # a conversion that the runtime fused away costs nothing
            if node.op_type == "QuantizeLinear" and node.inputs[0] is not None:
                border = self._border_of.get(node.inputs[0].name)
                if border is not None and not (border.maker is not None and integer.get(border.maker.name)):
                    spent.setdefault((self.quantize_key(border), name), 0.0)
        found: dict[str, list[float]] = {}
        for (key, _), seconds in spent.items():
            found.setdefault(key, []).append(seconds)
        return found

    def _place(
        self,
        one: Ran,
        origin: Mapping[str, ir.Node | None],
        made_by: Mapping[str, Ran],
        read_by: Mapping[str, Ran],
        integer: Mapping[str, bool],
    ) -> tuple[str, str] | None:
        """(key, which of those with this key) that ``one`` belongs to; None: to what runs in float anyway."""
        before = made_by.get(one.reads[0]) if one.reads else None
        around = [before, read_by.get(one.writes[0]) if one.writes else None]
        if one.op_type in _LAYOUT:  # beside a conversion it is part of that
            near = next((n for n in around if n is not None and n.op_type in _CONVERSIONS), None)
            if near is not None:
                return self._place(near, origin, made_by, read_by, integer)
        node = origin[one.name]
        if node is None and before is not None:
            node = origin[before.name]
        if node is None:
            return None
        if node.op_type in _CONVERSIONS and one.op_type in _CONVERSIONS:
            return self._conversion(one, node, origin, read_by, integer)
        unit = self._unit_of.get(label(node))
        return None if unit is None else (self.unit_key(unit, integer=integer.get(unit.name, False)), unit.name)

    def _conversion(
        self,
        one: Ran,
        node: ir.Node,
        origin: Mapping[str, ir.Node | None],
        read_by: Mapping[str, Ran],
        integer: Mapping[str, bool],
    ) -> tuple[str, str] | None:
        """Where a Q or DQ node belongs: to its border, or to a unit whose kernel did not take it in."""
        source = node if node.op_type == "QuantizeLinear" else node.inputs[0].producer() if node.inputs[0] else None
        border = self._border_of.get(source.inputs[0].name) if source is not None and source.inputs[0] else None
        if border is None:
            return None
        maker = border.maker
        if one.op_type == "QuantizeLinear":
            if maker is not None and integer.get(maker.name):
                return self.unit_key(maker, integer=True), maker.name
            return self.quantize_key(border), label(node)
        after = read_by.get(one.writes[0]) if one.writes else None
        reader = origin.get(after.name) if after is not None else None
        unit = self._unit_of.get(label(reader)) if reader is not None else None
        if unit is not None and integer.get(unit.name):
            return self.unit_key(unit, integer=True), unit.name
        return None if maker is None else (self.dequantize_key(border, reader), f"{label(node)} {one.name}")


_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")


def _reads_integers(node: ir.Node) -> bool:
    data = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    return data is not None and data.op_type == "DequantizeLinear"


def _attributes(node: ir.Node) -> str:
    plain = (ir.AttributeType.INT, ir.AttributeType.INTS, ir.AttributeType.FLOAT, ir.AttributeType.STRING)
    found = [f"{a.name}={a.value}" for a in _sorted(node) if a.type in plain]
    return f"[{','.join(found).replace(' ', '')}]" if found else ""


def _sorted(node: ir.Node) -> Iterable[ir.Attr]:
    return sorted(node.attributes.values(), key=lambda a: a.name)


def _conversions(shapes: Sequence[str]) -> tuple[ir.Model, dict[str, Any]]:
    """A model with each conversion once, and what to feed it."""
    helper, rng = onnx.helper, np.random.default_rng(0)
    nodes, inputs, outputs, feed = [], [], [], {}
    for index, text in enumerate(shapes):
        size = [int(part) for part in text.split("x")] if text else []
        for what, kind, result in (
            ("quantize", onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8),
            ("dequantize", onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT),
        ):
            a, b = f"{what}_in_{index}", f"{what}_out_{index}"
            op_type = "QuantizeLinear" if what == "quantize" else "DequantizeLinear"
            nodes.append(helper.make_node(op_type, [a, "scale", "zero"], [b], name=f"{what} {index}"))
            inputs.append(helper.make_tensor_value_info(a, kind, size))
            outputs.append(helper.make_tensor_value_info(b, result, size))
            drawn = rng.integers(0, 255, size)
            feed[a] = np.asarray(drawn, np.float32 if what == "quantize" else np.uint8)
    constants = [
        onnx.numpy_helper.from_array(np.asarray(1.0, np.float32), "scale"),
        onnx.numpy_helper.from_array(np.asarray(128, np.uint8), "zero"),
    ]
    graph = helper.make_graph(nodes, "conversions", inputs, outputs, constants)
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)), feed
