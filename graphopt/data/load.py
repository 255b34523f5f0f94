"""One resolver for every way calibration and evaluation data are given."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.data.columns import ColumnReader, Origin, columns
from graphopt.data.dataset import Array, Dataset, Reader
from graphopt.data.folders import Namer, open_folder, open_images
from graphopt.data.images import SUFFIXES, ImageOptions
from graphopt.data.spool import ListReader, raised, spool, to_array
from graphopt.data.stored import SPOOL_LIMIT, Scratch, open_npy, open_npz
from graphopt.data.synthetic import legal_random
from graphopt.errors import DataError, GraphoptError, InputError
from graphopt.external import shown
from graphopt.remote import is_address, local
from graphopt.user_code import neighbours_of

if TYPE_CHECKING:
    from graphopt.model import ValueSpec

_FORMS = "give a .npz, .npy, a folder of them, images or test_data_set_*, module.py:function, or random:8"
_RANDOM = 8


def load_data(
    spec: object,
    inputs: Sequence[ValueSpec],
    *,
    limit: int | None = None,
    seed: int = 0,
    image: ImageOptions | None = None,
    spool_dir: Path | None = None,
    spool_limit: int = SPOOL_LIMIT,
) -> Dataset:
    """A re-iterable, lazy dataset of samples (input name -> array with its batch dimension) from ``spec``.

    ``spec`` is a path (.npz, .npy, folder, image), ``module.py:function``, ``random`` or ``random:n``, a dict of
    arrays, one array, an iterable of dicts, tuples or arrays, an ONNX Runtime CalibrationDataReader, a torch
    DataLoader, or a Dataset. What can be read only once goes to a temporary folder (in ``spool_dir``, at most
    ``spool_limit`` bytes), which is removed with the dataset. ``limit`` takes the first samples; ``seed`` is
    for random data. Raises InputError for a spec nobody can read, DataError for data that do not fit.
    """
    if not inputs:
        raise InputError("the model has no inputs, so it takes no data; leave the data out")
    if limit is not None and limit < 1:
        raise InputError(f"cannot load {limit} samples; ask for 1 or more")
    scratch = Scratch(spool_dir, spool_limit)
    if isinstance(spec, str | Path):
        dataset = _from_text(spec, inputs, limit, seed, image, scratch)
    else:
        dataset = _from_python(spec, inputs, limit, None, scratch)
    if not len(dataset):
        raise DataError(f"{dataset.source} holds no samples; give at least one")
    return dataset if limit is None else dataset.take(limit)


def _from_text(
    spec: str | Path,
    inputs: Sequence[ValueSpec],
    limit: int | None,
    seed: int,
    image: ImageOptions | None,
    scratch: Scratch,
) -> Dataset:
    text = str(spec)
    if isinstance(spec, str) and (text == "random" or text.startswith("random:")):
        return legal_random(inputs, seed, _random_count(text, limit))
    stem, dot, function = text.rpartition(".py:")
    if (dot or text.endswith(".py")) and is_address(text):
        raise InputError(f"{shown(text)}: code is run from a file here only; copy it, look at it, and name the copy")
    if dot or text.endswith(".py"):
        path = Path(stem + ".py") if dot else Path(text)
        return _from_module(path, function if dot else "load_data", inputs, limit, scratch)
    path = local(spec).expanduser()
    notes: list[str] = []
    try:
        path.exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"no file or folder '{shown(text)}' ({reason}); {_FORMS}") from error
    if path.is_dir():
        reader, notes = open_folder(path.resolve(), inputs, image, scratch)
    elif not path.exists():
        raise InputError(f"no file or folder '{text}'; {_FORMS}")
    elif path.suffix.casefold() in (".npz", ".npy"):
        reader, notes = _from_file(path, inputs, scratch)
    elif path.suffix.casefold() in SUFFIXES:
        reader = open_images(path.resolve().parent, [path.resolve()], inputs, image)
    else:
        raise InputError(f"'{path.name}' is no data that can be read; {_FORMS}")
    return Dataset(reader, source=text, notes=notes)


def _random_count(text: str, limit: int | None) -> int:
    number = text.removeprefix("random").removeprefix(":")
    if not number:
        if ":" in text:
            raise InputError(f"'{text}' does not say how many samples; write random:8")
        return limit or _RANDOM
    if not number.isdecimal() or int(number) < 1:
        raise InputError(f"'{text}' does not say how many samples; write random:8")
    return int(number)


def _from_file(path: Path, inputs: Sequence[ValueSpec], scratch: Scratch) -> tuple[Reader, list[str]]:
    """A single .npz, or the .npy of a single-input model."""
    if path.suffix.casefold() == ".npz":
        arrays: Mapping[str, Origin] = open_npz(path)
    elif len(inputs) == 1:
        arrays = {inputs[0].name: open_npy(path)}
    else:
        names = ", ".join(f"'{spec.name}'" for spec in inputs)
        raise DataError(f"'{path.name}' is one array but the model has the inputs {names}; save a .npz with these keys")
    found, notes = columns(arrays, {}, inputs, f"'{path.name}'")
    return ColumnReader(found, Namer(path.name, False), scratch), notes


def _from_python(
    spec: object, inputs: Sequence[ValueSpec], limit: int | None, source: str | None, scratch: Scratch
) -> Dataset:
    name = source or type(spec).__name__
    if isinstance(spec, Dataset):
        return spec
    loose: Any = spec
    if isinstance(spec, Mapping):
        return _from_arrays(spec, inputs, name, scratch)
    if isinstance(spec, np.ndarray) or (hasattr(spec, "__array__") and hasattr(spec, "shape")):
        if len(inputs) != 1:
            names = ", ".join(f"'{item.name}'" for item in inputs)
            raise DataError(f"one array is given but the model has the inputs {names}; give a dict with these keys")
        return _from_arrays({inputs[0].name: spec}, inputs, name, scratch)
    if isinstance(spec, list | tuple):
        return Dataset(ListReader(spec, inputs, name), source=f"{name} in memory")
    if callable(getattr(spec, "get_next", None)):
        items: Iterator[object] = iter(loose.get_next, None)
    elif isinstance(spec, Iterable):
        items = iter(spec)
    elif hasattr(spec, "__getitem__") and hasattr(spec, "__len__"):
        items = (loose[index] for index in range(len(loose)))
    else:
        raise InputError(f"{name} is no data that can be read; give arrays, an iterable of samples or a path")
    return Dataset(spool(items, inputs, name, scratch, limit=limit), source=name)


def _from_arrays(spec: Mapping[Any, object], inputs: Sequence[ValueSpec], name: str, scratch: Scratch) -> Dataset:
    """A dict of arrays (leading axis = samples) or of lists of arrays (one per sample, batch included)."""
    arrays: dict[str, Origin] = {}
    lists: dict[str, list[Array]] = {}
    for key, value in spec.items():
        where = f"'{key}' of the {name}"
        if isinstance(value, list | tuple) and value and not isinstance(value[0], int | float | str | list):
            lists[str(key)] = [to_array(item, f"{where}[{i}]") for i, item in enumerate(value)]
        else:
            arrays[str(key)] = to_array(value, where)
    found, notes = columns(arrays, lists, inputs, f"the {name}")
    return Dataset(ColumnReader(found, Namer(name, False), scratch), source=f"{name} in memory", notes=notes)


_modules = itertools.count()


def _from_module(
    path: Path, function: str, inputs: Sequence[ValueSpec], limit: int | None, scratch: Scratch
) -> Dataset:
    """Run the user's function; what it gives is read once, while its folder is importable."""
    source = f"{path.name}:{function}"
    if not path.is_file():
        raise InputError(f"no file '{path}' (for {source}); {_FORMS}")
    with _importable(path.resolve()) as module_spec:
        try:
            module = importlib.util.module_from_spec(module_spec)
            sys.modules[module_spec.name] = module
            module_spec.loader.exec_module(module)
            made = getattr(module, function, None)
            given = made() if callable(made) else None
        except GraphoptError:
            raise
        except (Exception, SystemExit) as error:
            raise raised(source, error, "while it was called") from error
        if not callable(made):
            have = ", ".join(k for k, v in vars(module).items() if callable(v) and not k.startswith("_"))
            raise InputError(
                f"'{path.name}' has no function '{function}' (it has {have or 'none'}); name one, as in {path.name}:f"
            )
        if given is None:
            raise DataError(f"'{source}' returned nothing; yield samples, or return an iterable of them")
        return _from_python(given, inputs, limit, source, scratch)


@contextmanager
def _importable(path: Path) -> Iterator[Any]:
    """A module spec for ``path``, with its folder on the search path so that it may import its neighbours."""
    name = f"_graphopt_data_{next(_modules)}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"'{path.name}' is no Python module; give module.py:function")
    try:
        with neighbours_of(path):
            yield spec
    finally:
        sys.modules.pop(name, None)
