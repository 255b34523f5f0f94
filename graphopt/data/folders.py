"""Folders of data: .npz, .npy, one subfolder per input, ONNX test_data_set_*, images."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.data.check import missing_input
from graphopt.data.columns import ChainReader, ColumnReader, Listed, Origin, columns
from graphopt.data.dataset import Array, Reader, Sample
from graphopt.data.images import SUFFIXES, ImageOptions, ImageReader
from graphopt.data.stored import Scratch, Stored, one_line, open_npy, open_npz, plain_file, reading
from graphopt.errors import DataError, InputError

if TYPE_CHECKING:
    from graphopt.model import ValueSpec

_UNSAFE = re.compile(r'[\\/:*?"<>|]')
_NO_IMAGE_OPTIONS = (
    "how are they to be prepared? give ImageOptions(size=..., mean=..., std=..., scale=..., layout=...) "
    "(on the command line --image-size, --mean, --std, --scale, --layout)"
)


def natural(path: Path) -> tuple[list[tuple[int, int | str]], str]:
    """A sort key by which ``x2`` comes before ``x10``, the same on every file system."""
    parts = re.split(r"(\d+)", path.name)
    # The name itself last: "1" and "01" must not be left to the order of the directory.
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part], path.as_posix()


def open_folder(
    root: Path, inputs: Sequence[ValueSpec], image: ImageOptions | None, scratch: Scratch
) -> tuple[Reader, list[str]]:
    """The reader for whatever ``root`` holds, and notes. Raises DataError or InputError naming the folder."""
    with reading(root.name, "check the folder's permissions"):
        entries = sorted((e for e in root.iterdir() if not e.name.startswith(".")), key=natural)
        folders = [entry for entry in entries if entry.is_dir()]
    sets = [folder for folder in folders if (folder / "input_0.pb").exists()]
    if (root / "input_0.pb").exists():
        return ProtoReader([root], inputs), []
    if sets:
        return ProtoReader(sets, inputs), []
    npz = [entry for entry in entries if entry.suffix.casefold() == ".npz"]
    npy = [entry for entry in entries if entry.suffix.casefold() == ".npy"]
    if npz and npy:
        raise InputError(f"'{root.name}' holds both .npz and .npy files; keep one kind per folder")
    if npz:
        return _npz_folder(root, npz, inputs, scratch)
    if npy:
        return _npy_folder(root, npy, inputs, scratch), []
    named = {spec.name: folder for spec in inputs if (folder := _input_folder(root, spec.name)) is not None}
    if named:
        return _folder_per_input(root, named, folders, inputs, scratch)
    pictures = [e for e in entries if e.suffix.casefold() in SUFFIXES]
    for folder in folders:
        with reading(f"{root.name}/{folder.name}", "check the folder's permissions"):
            inner = [e for e in folder.iterdir() if e.suffix.casefold() in SUFFIXES and e.name[0] != "."]
        pictures += sorted(inner, key=natural)
    if pictures:
        return open_images(root, pictures, inputs, image), []
    held = [folder for folder in folders if any(e.suffix.casefold() == ".npy" for e in folder.iterdir())]
    if held:
        raise missing_input(inputs[0], [f.name for f in held], f"folder '{root.name}'", [s.name for s in inputs])
    what = ", ".join(entry.name for entry in entries[:5]) or "nothing"
    raise InputError(
        f"'{root.name}' holds no data ({what}); expected .npz or .npy files, one subfolder per input, "
        "test_data_set_* folders or images"
    )


def open_images(
    root: Path, files: Sequence[Path], inputs: Sequence[ValueSpec], image: ImageOptions | None
) -> ImageReader:
    """A reader of images. Raises InputError where nobody said how to prepare them."""
    if image is None:
        raise InputError(f"'{root.name}' holds {len(files)} images; {_NO_IMAGE_OPTIONS}")
    return ImageReader(root, files, inputs, image)


def _input_folder(root: Path, name: str) -> Path | None:
    """The subfolder of an input; characters no file system takes may be underscores."""
    for candidate in (name.strip("/"), _UNSAFE.sub("_", name)):
        if not candidate or ".." in candidate.split("/") or Path(candidate).drive:
            continue
        folder = root / candidate
        if folder.is_dir() and any(entry.suffix.casefold() == ".npy" for entry in folder.iterdir()):
            return folder
    return None


def _npz_folder(
    root: Path, files: Sequence[Path], inputs: Sequence[ValueSpec], scratch: Scratch
) -> tuple[ChainReader, list[str]]:
    readers: list[ColumnReader] = []
    notes: list[str] = []
    for file in files:
        name = f"{root.name}/{file.name}"
        found, said = columns(open_npz(file), {}, inputs, f"'{name}'", per_file=True)
        # One and the same remark on a thousand files would bury the others.
        notes += [] if notes else said
        single = found[inputs[0].name].count == 1
        readers.append(ColumnReader(found, Namer(name, single), scratch))
    return ChainReader(readers), notes


class Namer:
    """Names the samples of a file: the file itself where there is one, else ``file[index]``."""

    def __init__(self, name: str, single: bool) -> None:
        self._name = name
        self._single = single

    def __call__(self, index: int) -> str:
        return self._name if self._single else f"{self._name}[{index}]"


def _npy_folder(root: Path, files: Sequence[Path], inputs: Sequence[ValueSpec], scratch: Scratch) -> ColumnReader:
    if len(inputs) != 1:
        wanted = ", ".join(f"'{spec.name}'" for spec in inputs)
        raise DataError(
            f"'{root.name}' holds .npy files but the model has the inputs {wanted}; make one subfolder per input"
        )
    column = _listed([open_npy(file) for file in files], inputs[0])
    names = [f"{root.name}/{file.name}" for file in files]
    return ColumnReader({inputs[0].name: column}, names.__getitem__, scratch)


def _listed(origins: Sequence[Stored], spec: ValueSpec | None) -> Listed:
    """One file per sample; where every one lacks the batch axis it is put there."""
    rank = None if spec is None or spec.shape is None else len(spec.shape)
    add = rank is not None and all(len(origin.shape) == rank - 1 for origin in origins)
    return Listed(tuple(origins), add)


def _folder_per_input(
    root: Path,
    named: dict[str, Path],
    folders: Sequence[Path],
    inputs: Sequence[ValueSpec],
    scratch: Scratch,
) -> tuple[ColumnReader, list[str]]:
    where = f"folder '{root.name}'"
    for spec in inputs:
        if spec.name not in named:
            used = set(named.values())
            raise missing_input(spec, [f.name for f in folders if f not in used], where)
    used = set(named.values())
    others = {f.name: f for f in folders if f not in used and any(f.glob("*.npy"))}
    stems: list[str] | None = None
    found: dict[str, Sequence[Origin]] = {}
    adds: dict[str, bool] = {}
    notes: list[str] = []
    specs = {spec.name: spec for spec in inputs}
    for key, folder in {**named, **others}.items():
        files = sorted((f for f in folder.glob("*.npy") if not f.name.startswith(".")), key=natural)
        have = [file.stem for file in files]
        if stems is None:
            stems = have
        elif have != stems:
            odd = sorted(set(have) ^ set(stems))[0]
            if key not in specs:
                notes.append(f"'{root.name}/{folder.name}' is left out: it is no input and has other samples")
                continue
            raise DataError(
                f"{where} does not have sample '{odd}' for every input ('{inputs[0].name}' and '{key}' differ); "
                "give each input's subfolder files of the same names"
            )
        listed = _listed([open_npy(file) for file in files], specs.get(key))
        found[key], adds[key] = listed.origins, listed.add
    made = {key: Listed(tuple(origins), adds[key]) for key, origins in found.items()}
    names = [f"{root.name}/{stem}" for stem in stems or ()]
    return ColumnReader(made, names.__getitem__, scratch), notes


class ProtoReader:
    """ONNX test data: folders with ``input_0.pb``, ``input_1.pb``, ... in graph-input order."""

    def __init__(self, folders: Sequence[Path], inputs: Sequence[ValueSpec]) -> None:
        self._folders = folders
        self._inputs = inputs

    def __len__(self) -> int:
        return len(self._folders)

    def name(self, index: int) -> str:
        return f"{self._folders[index].parent.name}/{self._folders[index].name}"

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        for index in indices:
            yield self._read(index)

    def _read(self, index: int) -> Sample:
        files = sorted(self._folders[index].glob("input_*.pb"), key=natural)
        tensors = [_tensor(file, f"{self.name(index)}/{file.name}") for file in files]
        by_name = {name: array for name, array in tensors if name}
        wanted = {spec.name for spec in self._inputs}
        if wanted <= set(by_name):  # names, where there are any, are safer than the order
            return {name: by_name[name] for name in by_name if name in wanted}
        if len(tensors) < len(wanted):
            spec = self._inputs[len(tensors)]
            raise DataError(
                f"sample '{self.name(index)}' has {len(tensors)} input_*.pb, none for input '{spec.name}' ({spec}); "
                f"add input_{len(tensors)}.pb"
            )
        return {spec.name: array for spec, (_, array) in zip(self._inputs, tensors, strict=False)}


def _tensor(path: Path, where: str) -> tuple[str, Array]:
    """Name and array of a serialized TensorProto. Raises DataError."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnx import numpy_helper

    tensor = onnx.TensorProto()
    fix = "write it as a serialized onnx.TensorProto"
    try:
        with reading(where, fix):
            tensor.ParseFromString(plain_file(path).read_bytes())
    except DecodeError as error:
        raise DataError(f"cannot read '{where}' ({one_line(error)}); {fix}") from error
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise DataError(f"'{where}' keeps its numbers in another file, which is not followed; store them inside")
    if tensor.data_type == onnx.TensorProto.UNDEFINED:
        raise DataError(f"'{where}' is no tensor (a sequence or an empty file?); {fix}")
    with reading(where, fix):
        return tensor.name, numpy_helper.to_array(tensor)
