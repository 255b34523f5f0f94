"""``graphopt.lock``: what made a model, so that the same bytes can be made again, or it is said what differs.

A lock is a recipe without anything left to decide (what a search chose is written out, nothing has to be timed again),
and a table ``[locked]``: hashes of model, data, code and output, versions, the machine, and the cost table where one
was used.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.base import Gates, flatten
from graphopt.data import ImageOptions
from graphopt.errors import GateFailed, InputError
from graphopt.model import fingerprint, is_external
from graphopt.outcome import with_report
from graphopt.pipeline import Options, Result, make, merge_options, read_source
from graphopt.recipe import Recipe, from_table, pass_use, seen_from, toml, write
from graphopt.report.document import file_sha256
from graphopt.storage import save, write_text
from graphopt.timing import usable_cpus

if TYPE_CHECKING:
    import onnx_ir as ir

VERSION = 1
_SETTINGS = ("samples", "threads")
_IMAGE = ("size", "mean", "std", "scale", "layout", "order", "fit")


@dataclass
class Lock:
    """A lock that was read: ``recipe`` makes the model again, ``table`` says what it was made of.

    ``name``: the output's file name, which is in the bytes where weights lie in another file.
    """

    path: Path
    recipe: Recipe
    table: dict[str, Any]
    name: str

    def check_output(self, path: str | Path) -> None:
        """Raise InputError where the same bytes cannot be written to ``path``."""
        if "fingerprint" in self.table["output"] and Path(path).name != self.name:
            raise InputError(
                f"the weights lie in a file named after {self.name}, so that {path} would have other bytes; name it "
                f"{Path(path).with_name(self.name)}"
            )


def lock(result: Result, path: str | Path, *, external: bool | None = None) -> None:
    """Write the lock of a result that was saved; ``external`` as it was given to :meth:`Result.save`.

    Raises:
        InputError: the result was not saved to a file, or model, data or a pass exist as Python objects only.
    """
    write_text(path, locked_text(result, Path(path).absolute().parent, external=external))


def locked_text(result: Result, folder: Path, *, external: bool | None = None) -> str:
    """What :func:`lock` writes into ``folder``; raises as it does."""
    report, options = result.report, result.options
    if options is None or result.original is None or not report["output"]["path"] or report["output"]["path"] == "-":
        raise InputError("only a model that was written to a file can be locked; save it first")
    recipe = _recipe(result, options)
    text = write(recipe, folder)
    try:
        again = from_table(tomllib.loads(text), folder)
    except InputError as error:
        raise InputError(f"the lock cannot name what was run: {error}; move it to a file of its own") from error
    if write(again, folder) != text:
        raise InputError("the lock cannot name the passes that were run; give them as package.module:name")
    settings = {name: getattr(options, name) for name in _SETTINGS}
    locked: dict[str, Any] = {"version": VERSION, "verb": report["verb"], **settings, "external-data": external}
    locked["external-roots"] = [seen_from(folder, str(root)) for root in options.external_roots] or None
    if isinstance(options.image, ImageOptions):
        locked["image"] = {name: getattr(options.image, name) for name in _IMAGE}
    locked["model"] = _about(report["input"], result.original)
    for name in ("data", "eval_data"):
        if report[name] is not None:
            locked[name.replace("_", "-")] = {key: report[name][key] for key in ("sha256", "samples")}
    locked["code"] = _code(recipe, folder)
    locked["output"] = _about(report["output"], result.ir_model)
    locked["versions"], locked["machine"] = report["versions"], _machine(report)
    if report["placement"] is not None:
        locked["cost-table"] = report["placement"]["cost_table"]
    remark = f"# Made by graphopt {report['verb']}. The same bytes again: graphopt run --locked FILE\n"
    return remark + text + "\n" + "\n".join(_tables(locked, "locked")) + "\n"


def _recipe(result: Result, options: Options) -> Recipe:
    def path(name: str) -> str | None:
        value = getattr(options, name)
        if value is None or isinstance(value, (str, Path)):
            return None if value is None else str(value)
        raise InputError(f"the lock cannot name {name.replace('_', ' ')} that exists in Python only; give a path")

    report = result.report
    metric = options.metric if isinstance(options.metric, str) else None
    return Recipe(
        passes=tuple(result.pipeline),
        model=report["input"]["path"],
        output=str(report["output"]["path"]),
        data=path("data"),
        eval_data=path("eval_data"),
        metric=metric,
        gates=options.gates,
        **{name: getattr(options, name) for name in ("target", "verify", "seed", "this_cpu")},
    )


def _about(about: Mapping[str, Any], model: ir.Model) -> dict[str, Any]:
    """Its hash, and where weights lie in another file, one of all that the model holds."""
    found = {"sha256": about["sha256"], "bytes": about["bytes"]}
    return {**found, "fingerprint": fingerprint(model)} if is_external(model) else found


def _code(recipe: Recipe, folder: Path) -> dict[str, str]:
    """The hashes of the user's own files that passes come from, by path as read from ``folder``."""
    files = {f"{stem}.py" for step in flatten(recipe.passes) if (stem := pass_use(step).rpartition(".py:")[0])}
    return {seen_from(folder, file): file_sha256(file) for file in sorted(files)}


def _machine(report: Mapping[str, Any]) -> dict[str, Any]:
    return {**report["machine"], "cpus": usable_cpus()}


def _tables(table: Mapping[str, Any], name: str) -> Iterator[str]:
    """TOML of nested tables; None is left out."""
    plain = {key: value for key, value in table.items() if value is not None}
    inner = {key: value for key, value in plain.items() if isinstance(value, Mapping)}
    if not inner or len(inner) < len(plain):
        yield f"[{name}]"
    yield from (f"{_key(key)} = {_value(value)}" for key, value in plain.items() if key not in inner)
    for key, value in inner.items():
        yield ""
        yield from _tables(value, f"{name}.{_key(key)}")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml(name)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    return toml(value)


def read_lock(path: str | Path) -> Lock:
    """A lock from a file.

    Raises:
        InputError: it cannot be read, or is something else (a recipe, say).
    """
    where = Path(path)
    try:
        table = tomllib.loads(where.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no such lock: {where}; make it with --lock {where} on a verb that writes a model") from None
    except (OSError, ValueError) as error:  # a bad TOML, a bad UTF-8
        raise InputError(f"cannot read the lock {where}: {error}") from error
    locked = table.pop("locked", None)
    if not isinstance(locked, dict):
        raise InputError(f"{where} is no lock (it has no table [locked]); make one with --lock FILE")
    if locked.get("version") != VERSION:
        raise InputError(f"{where} is a lock of version {locked.get('version')}, this graphopt reads {VERSION}")
    try:
        for name, keys in (("model", ("sha256",)), ("output", ("sha256",)), ("versions", ()), ("machine", ())):
            dict(locked[name])
            [locked[name][key] for key in keys]
        recipe = from_table(table, where.parent)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where} is no whole lock ({type(error).__name__}: {error}); make it again") from error
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return Lock(where, recipe, locked, Path(recipe.output or "model.onnx").name)


def run_locked(found: Lock, **options: Any) -> Result:
    """Make the locked model again; its bytes are the locked ones. Nothing is written: save it where it shall be.

    Nothing is searched or timed, and gates are not judged again.

    Raises:
        InputError: the model, its data or code are not those that were locked.
        GateFailed: the result has other bytes; the message says what differs, ``error.report`` the rest.
    """
    recipe, locked = found.recipe, found.table
    if recipe.model is None:
        raise InputError(f"{found.path} names no model (it came from standard input); give --model IN")
    image = locked.get("image")
    known: dict[str, Any] = {name: locked.get(name) for name in _SETTINGS}
    known["external_roots"] = [str(found.path.parent / root) for root in locked.get("external-roots", ())]
    known["image"] = None if image is None else ImageOptions(**{k: _hashable(v) for k, v in image.items()})
    merged = merge_options({"time": 0.0, **known, **options}, replace(recipe, gates=Gates(), metric=None))
    merged.search, merged.settings = False, {"locked": str(found.path)}
    for file, digest in locked.get("code", {}).items():
        path = found.path.parent / file
        if not path.is_file() or file_sha256(path) != digest:
            raise InputError(f"{path} is not the code that {found.path} was made with; {_AGAIN}")
    model, source = read_source(recipe.model, merged)
    _same_model(found, model, source)
    result = make(model, recipe.passes, merged, verb="run", named=source)
    _same_data(found, result.report)
    made, external = _hash(result, found), locked["output"].get("fingerprint")
    if made != locked["output"]["sha256"] or external not in (None, fingerprint(result.ir_model)):
        told = "; ".join(differences(found, result.report)) or "no version and nothing of the machine that is known"
        raise with_report(
            GateFailed(f"other bytes than {found.path} locked; what differs: {told}; nothing was written"),
            result.report,
        )
    return result


_AGAIN = "go back to that, or make a new lock"


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _same_model(found: Lock, model: ir.Model, source: Any) -> None:
    wanted = found.table["model"]
    now = hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else file_sha256(source)
    if now != wanted["sha256"]:
        raise InputError(
            f"the model is not the one of {found.path}: its hash is {now[:12]}, {str(wanted['sha256'])[:12]} was "
            f"locked; {_AGAIN}"
        )
    if "fingerprint" in wanted and wanted["fingerprint"] != fingerprint(model):
        raise InputError(f"the weights of the model are not those of {found.path}; {_AGAIN}")


def _same_data(found: Lock, report: Mapping[str, Any]) -> None:
    for name in ("data", "eval_data"):
        wanted = found.table.get(name.replace("_", "-"))
        now = report[name]
        if wanted is not None and (now is None or now["sha256"] != wanted["sha256"]):
            held = "none" if now is None else f"{now['samples']} samples with the hash {now['sha256'][:12]}"
            raise InputError(
                f"the {name.replace('_', ' ')} is not that of {found.path}: {held}, locked were {wanted['samples']} "
                f"with {wanted['sha256'][:12]}; {_AGAIN}"
            )


def _hash(result: Result, found: Lock) -> str:
    """The hash of the file that saving ``result`` makes, under the locked name (a data file's name is in the model)."""
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        written = save(result.ir_model, Path(folder) / found.name, external=found.table.get("external-data"))
        return file_sha256(written[0])


def differences(found: Lock, report: Mapping[str, Any]) -> list[str]:
    """In words, what is not as it was when the lock was made: versions, then the machine."""
    now = {**report["versions"], **_machine(report)}
    locked = {**found.table["versions"], **found.table["machine"]}
    return [
        f"{name} is {now.get(name, 'missing')}, locked was {locked[name]}"
        for name in locked
        if now.get(name) != locked[name] and not (name == "cpus" and found.table.get("threads"))
    ]
