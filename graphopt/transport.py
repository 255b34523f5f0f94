"""Results that are saved as packages for transport, and ``graphopt.unpack``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graphopt.base import Progress
from graphopt.errors import InputError
from graphopt.model import ModelLike, is_external
from graphopt.outcome import blank
from graphopt.package import pack
from graphopt.package import unpack as take_apart
from graphopt.pipeline import Options, Result, merge_options, read_source
from graphopt.remote import local, send
from graphopt.report.document import SCHEMA_VERSION, about, file_sha256, versions
from graphopt.report.units import size as in_words
from graphopt.storage import room_for, save


class Packaged(Result):
    """A result that is saved as a package."""

    progress: Progress | None = None
    file: Path | None = None
    """The very file to be packed, where the model is one and was not changed."""

    def save(self, path: str | Path, *, external: bool | None = None) -> list[Path]:
        """Write the package atomically, and enter the file, and ``package``, in the report."""
        target = Path(os.path.realpath(room_for(path)))
        with tempfile.TemporaryDirectory(prefix=".graphopt-", dir=target.parent) as folder:
            files = (
                [self.file]
                if self.file
                else save(self.ir_model, Path(folder) / f"{target.name}.onnx", external=external)
            )
            self.report["package"] = found = pack(files, target, _megabytes(self.progress, "packing (MB)"))
        sizes = f"{in_words(found['bytes'])} -> {in_words(found['packed_bytes'])}"
        self.report["notes"].append(
            f"packed for transport: {sizes}; the bytes' entropy is {in_words(found['shannon_bytes'])}"
        )
        output = self.report["output"]
        output.update(path=str(path), bytes=target.stat().st_size, sha256=file_sha256(target))
        send(path, [target])
        return [target]


def packaged(result: Result, package: bool, options: Options) -> Result:
    """``result``, to be saved as a package where ``package`` says so."""
    if not package:
        return result
    found = Packaged(result.ir_model, result.report, result.original)
    found.progress = options.progress
    return found


def kept_as_it_is(model: ModelLike, package: bool, options: dict[str, Any]) -> Result:
    """The model as it is, to be packaged."""
    merged = merge_options(options, None)
    if not package:
        raise InputError("--weights keep changes nothing, which only a package is for; give --package, or a format")
    if merged.gates.asked() or merged.data is not None or merged.eval_data is not None:
        raise InputError("--weights keep changes nothing that could be judged; leave out the data and the gates")
    merged.settings = {"weights": "keep", "package": True}
    loaded, source = read_source(model, merged)
    report = {**versions("compress", vars(merged)), **blank(about(loaded, source)), "output": about(loaded, None)}
    found = Packaged(loaded, report, loaded)
    found.progress = merged.progress
    if isinstance(source, (str, os.PathLike)) and not is_external(loaded):
        found.file = local(source)
    return found


def unpack(package: str | Path, output: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Write the model that a package holds to ``output``, its data file beside it, bit by bit as it was packed.

    Raises:
        InputError: zstandard is not installed, or it cannot be written.
        ModelError: it is no package, or a damaged one; nothing was written.
    """
    target = Path(os.path.realpath(room_for(output)))
    found = take_apart(local(package), target, _megabytes(progress, "unpacking (MB)"))
    found["files"] = send(output, [Path(file) for file in found["files"]])
    return {
        "schema_version": SCHEMA_VERSION,
        "verb": "unpack",
        "input": str(package),
        "output": str(output),
        **found,
    }


def _megabytes(progress: Progress | None, what: str) -> Callable[[int, int], None]:
    def told(done: int, total: int) -> None:
        if progress is not None:
            progress(done // 1_000_000, max(total // 1_000_000, 1), what)

    return told
