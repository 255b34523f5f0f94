"""A model as a protobuf that refers to its large weights where they lie, instead of holding them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.external import MappedFile, mapped_file
from graphopt.model import clone, to_proto
from graphopt.traversal import ir_graphs

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

BIG = 1 << 27
"""Bytes of weights in data files below which they are put into the protobuf all the same: copying those is nothing."""

_MANY = 2000
"""Initializers from which their order is worth a thought."""

_LARGE = 1 << 16
"""Bytes from which one weight is referred to; shape inference wants to see the small ones."""


def referring(model: ir.Model) -> tuple[onnx.ModelProto, Path | None]:
    """The model with its weights inside, or, where files hold :data:`BIG` or more of them, with references.

    Locations are relative to the folder returned (None: there are no references). They are made of what the gate in
    ``external.py`` opened, and only while each path still leads to that very file; ``model`` is not touched.

    Raises:
        ModelError: as :func:`graphopt.model.to_proto`.
    """
    import onnx_ir as ir

    files = _files(model)
    folder = _common_folder({file.path for file in files.values()})
    if folder is None:
        return _easily_removed(to_proto(model)), None
    light = clone(model)
    for graph in ir_graphs(light):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and (file := files.get(id(tensor))) is not None:
                value.const_value = ir.ExternalTensor(
                    os.path.relpath(file.path, folder),
                    file.offset,
                    tensor.nbytes,
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=value.name or "",
                )
    return _easily_removed(to_proto(light)), folder


def _easily_removed(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with its initializers in the order in which ONNX Runtime finds each without a search.

    It takes them out of the list by first use, looking for the name from the front, and puts the last one in the place
    of the one that went: with 50,000 that is half of all the time it takes to load, unless the last is the one that it
    wants next.
    """
    stored = model.graph.initializer
    if len(stored) < _MANY:
        return model
    use: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            use.setdefault(name, len(use))
    first = min(stored, key=lambda tensor: use.get(tensor.name, len(use))).name
    stored.sort(key=lambda tensor: -1 if tensor.name == first else len(use) - use.get(tensor.name, len(use)))
    return model


def referred_bytes(model: ir.Model) -> int:
    """Bytes of the weights that :func:`referring` leaves in their files."""
    files = _files(model)
    stored = (value.const_value for graph in ir_graphs(model) for value in graph.initializers.values())
    return sum(tensor.nbytes for tensor in stored if tensor is not None and id(tensor) in files)


def _files(model: ir.Model) -> dict[int, MappedFile]:
    """The file of each large weight by the tensor's id; none at all where it does not pay or a file has changed."""
    import onnx_ir as ir

    found: dict[int, MappedFile] = {}
    total = 0
    for graph in ir_graphs(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or isinstance(tensor, ir.serde.TensorProtoTensor):  # in the protobuf, not in a file
                continue
            if tensor.nbytes >= _LARGE and (file := mapped_file(tensor)) is not None:
                found[id(tensor)] = file
                total += tensor.nbytes
    if total < BIG or not all(file.unchanged for file in {f.path: f for f in found.values()}.values()):
        return {}
    return found


def _common_folder(paths: set[Path]) -> Path | None:
    try:
        return Path(os.path.commonpath([path.parent for path in paths]))
    except ValueError:  # no paths at all, or paths on two drives
        return None
