"""What must be true of every run, whatever it was given."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx

from hostile.corpus import ANY, OK, OTHER_FILES, REFUSED, UNRUN, Kind
from hostile.escapes import SECRET
from hostile.pool import Ran, Worker
from hostile.worker import CPU_SECONDS, MEMORY

_OTHERS = ("inspect", "view", *OTHER_FILES)
_LINE = re.compile(r"error: .+; .+")
_LOAD = {OK: (0,), UNRUN: (0,), REFUSED: (2,), ANY: (0, 2)}
_RUN = {OK: (0, 1, 2, 3), UNRUN: (0, 1, 2, 3), REFUSED: (2,), ANY: (0, 1, 2, 3)}


def codes(kind: Kind, verb: str) -> tuple[int, ...]:
    """The exit codes that are right."""
    if verb in OTHER_FILES:
        return (2,)
    if verb == "inspect":
        return _LOAD[kind.seen]
    if verb == "view" and not kind.name.startswith("external-"):  # a broken model is worth looking at
        return _LOAD[OK if kind.outcome in (OK, UNRUN) else ANY]
    if kind.name.startswith("data-"):  # of numbers that mean nothing, a result may be held back by a gate
        nothing = (3,) if kind.outcome != REFUSED and verb not in ("quantize", "compare") else ()
        return (*_LOAD[kind.outcome], *nothing, 1) if kind.outcome == ANY else (*_LOAD[kind.outcome], *nothing)
    if verb in ("optimize", "view"):
        return _LOAD[kind.outcome]
    return _RUN[kind.outcome] if kind.seen == kind.outcome else (0, 1, 2, 3)


class Case:
    """One kind written out: ``work`` holds its files, ``here`` is the working folder, ``scratch`` the temporary one."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind = kind
        self.work, self.here, self.scratch = (folder / name for name in ("work", "here", "scratch"))
        for each in (self.work, self.here, self.scratch):
            each.mkdir(parents=True)
        self.given = kind.write(self.work)
        self.out = folder / "out"
        self.out.mkdir()

    def path(self, name: str | None = None) -> str:
        """A file of the kind, as it is given on the command line."""
        given = self.given if name is None else name
        plain = not given or ":" in given or "\0" in given
        return given if plain else f"../work/{given}"

    def problems(self, worker: Worker, arguments: list[str]) -> list[str]:
        """Run it; what is wrong with what happened."""
        before = _files(self.work.parent, self.out)
        options = [f"../{option}" if not option.startswith("--") else option for option in self.kind.options]
        ran = worker.run([*arguments, *options], self.here, self.scratch)
        found = list(_wrong(ran, codes(self.kind, arguments[0])))
        after = _files(self.work.parent, self.out)
        said = ran.out + ran.err
        changed = {name for name, _ in set(after.items()) ^ set(before.items())}
        # A reproducer in the temporary folder is kept, and told, where a pass failed its contract.
        told = {name for name in changed if "/graphopt-repro-" in name and Path(name).parts[1] in said}
        if changed - told:
            found.append(f"it left or changed {sorted(changed - told)[:4]}")
        if SECRET[:8] in said or any(SECRET.encode()[:8] in file.read_bytes() for file in self.out.rglob("*.onnx*")):
            found.append("what lies outside came out")
        if self.kind.says and ran.code == 2 and arguments[0] not in _OTHERS and self.kind.says not in ran.err:
            found.append(f"the message is another one: {ran.err[:300]}")
        if ran.code > 1 and any(self.out.iterdir()):
            found.append("it failed and wrote all the same")
        if ran.code == 0:
            found += [text for file in self.out.glob("*.onnx") if (text := _unsound(file, self.kind))]
        for file in self.out.iterdir():
            file.unlink()
        return [f"{arguments[0]}: {text}" for text in found]


def _wrong(ran: Ran, allowed: tuple[int, ...]) -> Any:
    if ran.died:
        yield f"it died: {ran.died}"
        return
    if ran.code not in allowed:
        yield f"exit {ran.code}, not {allowed}: {(ran.err or ran.out)[-400:]}"
    if "Traceback" in ran.out + ran.err:
        yield f"a traceback: {ran.err[-600:]}"
    if "it crashed: " in ran.out:
        yield f"a pass crashed: {ran.out.split('it crashed: ')[1][:200]}"
    lines = ran.err.splitlines()
    found_something = ran.code == 1 and not lines  # bisect, diff and lint say it on stdout
    if ran.code != 0 and not found_something and (len(lines) != 1 or not _LINE.fullmatch(lines[0])):
        yield f"not one line 'error: what; how to fix': {ran.err[:400]!r}"
    if ran.code == 0 and ran.err:
        yield f"words on stderr: {ran.err[:300]!r}"
    if len(ran.err) > 2000:
        yield f"an error of {len(ran.err)} characters"
    if ran.cpu > CPU_SECONDS:
        yield f"{ran.cpu:.0f} CPU seconds"
    if ran.peak > MEMORY:
        yield f"{ran.peak / 1e9:.1f} GB of memory"


def _files(folder: Path, *but: Path) -> dict[str, Any]:
    found = contents_of(folder)
    return {name: what for name, what in found.items() if not any((folder / name).is_relative_to(b) for b in but)}


def contents_of(folder: Path) -> dict[str, Any]:
    """As :func:`conftest.contents`, without reading what is large."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        large = path.is_symlink() or not path.is_file() or status.st_size > 2**20
        found[str(path.relative_to(folder))] = (
            status.st_mode,
            status.st_size if not path.is_dir() else 0,
            status.st_mtime_ns if not path.is_dir() else 0,
            b"" if large else path.read_bytes(),
        )
    return found


def _unsound(file: Path, kind: Kind) -> str | None:
    """Why a model that was written is none; the checker has its say where the file that came in passed it."""
    try:
        proto = onnx.load(file, load_external_data=False)
    except Exception as error:
        return f"what was written does not parse: {error}"
    return "what was written has no graph" if not proto.graph.node and not proto.graph.output else None
