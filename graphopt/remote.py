"""Paths that are addresses (``s3://``, ``gs://``, ``hf://``, ``memory://``, ...), through fsspec.

Every address has one place in a scratch folder that goes with the process. What is read is brought there and opened
as any other file; what is written is completed there and sent at the end, the model last, so that nobody ever finds
half of one. Whoever opens or writes a path asks :func:`local` or :func:`place` first; nothing else knows of addresses.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import secrets
import shutil
import tempfile
import urllib.request
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptError, InputError, command
from graphopt.external import shown

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # two letters or more: C:// is a drive
_FILE = "file://"
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
    "hf": "huggingface_hub",
}
"""What fsspec needs beside itself, by scheme."""


class _Scratch:
    """The folder that addresses have their places in, and what was brought there: place -> how it looked remotely."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="graphopt-remote-"))
        self.held: dict[Path, str] = {}
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


_scratch: _Scratch | None = None


def _folder() -> _Scratch:
    global _scratch
    if _scratch is None or not _scratch.path.is_dir():
        _scratch = _Scratch()
    return _scratch


def is_address(path: object) -> bool:
    """Whether ``path`` is the text of an address, ``file://`` included."""
    return isinstance(path, str) and _ADDRESS.match(path) is not None


def is_remote(path: object) -> bool:
    """Whether ``path`` is an address of what cannot be opened here as it is."""
    return is_address(path) and not str(path).startswith(_FILE)


def place(path: str | os.PathLike[str]) -> Path:
    """Where ``path`` lies, or will lie, on this machine; nothing is brought or looked at."""
    text = os.fspath(path)
    if text.startswith(_FILE):
        return Path(urllib.request.url2pathname(text.removeprefix(_FILE).removeprefix("localhost")))
    if not is_remote(text):
        return Path(path)
    parent, _, name = text.rstrip("/").rpartition("/")
    return _folder().path / hashlib.sha256(parent.encode()).hexdigest()[:16] / re.sub(r"[^\w.+-]", "_", name)


def local(path: str | os.PathLike[str]) -> Path:
    """A path that can be opened here: what an address names, a file or a folder, is brought first.

    Raises:
        InputError: a package is missing, or it cannot be read there.
    """
    if is_remote(path):
        with _told("read", str(path)):
            _system(str(path))  # before a folder is made for it
    target = place(path)
    if is_remote(path):
        _bring(str(path), target)
    return target


def beside(path: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Bring files that lie beside an address, too; names that lead out of its folder are left to who opens them.

    Raises:
        InputError: one cannot be read there.
    """
    if not is_remote(path):
        return
    folder, _, _ = str(path).rstrip("/").rpartition("/")
    for name in sorted(set(names)):
        parts = name.split("/")
        if name and "\\" not in name and "\0" not in name and not {"", ".", ".."} & set(parts):
            _bring(f"{folder}/{name}", place(path).parent.joinpath(*parts))


def with_suffix(path: str | os.PathLike[str], suffix: str) -> str:
    """A file of that suffix beside ``path``."""
    if is_address(path):
        return str(path)[: len(str(path)) - len(place(path).suffix)] + suffix
    return str(Path(path).with_suffix(suffix))


def send(path: str | os.PathLike[str], files: Iterable[Path]) -> list[str]:
    """Put ``files``, written at and beside :func:`place`, where the address says: the first one last, each whole.

    Returns where each of them is then; of a path that is no address, where they are anyway.

    Raises:
        InputError: it cannot be written there.
    """
    files = list(files)
    if not is_remote(path):
        return [str(file) for file in files]
    text, home = str(path), place(path)
    folder, _, _ = text.rpartition("/")
    where = {file: text if file.name == home.name else f"{folder}/{file.name}" for file in files}
    with _told("write", text):
        for file in reversed(files):
            _folder().held.pop(file, None)
            system, name = _system(where[file])
            with contextlib.suppress(NotImplementedError):
                system.makedirs(system._parent(name), exist_ok=True)
            with system.transaction, file.open("rb") as stream, system.open(name, "wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)
    return list(where.values())


def ready(path: str) -> None:
    """Say before the work, not after it, what writing to an address needs.

    Raises:
        InputError: a package is missing, or nothing knows such addresses.
    """
    if is_remote(path):
        with _told("write", path):
            _system(path)


def _system(text: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    scheme = text.partition("://")[0].lower()
    lacking = [] if importlib.util.find_spec("fsspec") else ["graphopt[remote]"]
    package = _PACKAGES.get(scheme)
    if package is not None and importlib.util.find_spec(package) is None:
        lacking.append(package)
    if not lacking:
        from fsspec.core import url_to_fs

        try:
            system, name = url_to_fs(text)
            return system, str(name)
        except ValueError as error:
            if "rotocol not known" not in str(error):
                raise
            raise InputError(f"{shown(text)}: nothing knows {scheme}:// addresses; s3://, gs://, hf://, ...") from error
        except ImportError as error:
            lacking = re.findall(r"\b(?:pip install|[Ii]nstall) ([\w.-]+)", str(error)) or [scheme]
    raise InputError(
        f"{shown(text)} is an address, which needs {' and '.join(lacking)}; run: {command('pip', 'install', *lacking)}"
    )


@contextlib.contextmanager
def _told(what: str, text: str) -> Iterator[None]:
    """Whatever a file system raises, in one line."""
    try:
        yield
    except GraphoptError:
        raise
    except FileNotFoundError:
        raise InputError(f"no such file: {shown(text)}; check the address") from None
    except NotImplementedError as error:
        raise InputError(f"cannot {what} {shown(text)}: such addresses are not for that; use a file") from error
    except Exception as error:  # each has a family of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"cannot {what} {shown(text)}: {reason}; check the address and your credentials") from error


def _bring(text: str, target: Path) -> None:
    """What the address names, at ``target``, unless it is there already as it is remotely."""
    with _told("read", text):
        system, name = _system(text)
        system.invalidate_cache()
        info = system.info(name)
        folder = info.get("type") == "directory"
        found = system.find(name, detail=True) if folder else {name: info}
        if folder and not found:
            raise FileNotFoundError(name)
        looks = repr(sorted((key, sorted(map(repr, about.items()))) for key, about in found.items()))
        held = _folder().held
        if target.exists() and held.get(target) == looks:
            return
        _room(text, sum(about.get("size") or 0 for about in found.values()))
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{secrets.token_hex(8)}.part")
        try:
            for inner in found:
                file = part / _inside(inner, name) if folder else part
                file.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(inner, str(file))
            if target.is_dir():
                shutil.rmtree(target)
            part.replace(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        held[target] = looks


def _inside(inner: str, folder: str) -> Path:
    parts = [p for p in inner.removeprefix(folder).split("/") if p]
    if not inner.startswith(folder) or not parts or {".", ".."} & set(parts) or any("\\" in p for p in parts):
        raise InputError(f"{shown(folder)} holds '{shown(inner)}', which leads out of it; it was not read")
    return Path(*parts)


def _room(text: str, size: int) -> None:
    free = shutil.disk_usage(_folder().path).free
    if size > free:
        raise InputError(
            f"{shown(text)} has {size} bytes and {_folder().path} room for {free}; point TMPDIR to a larger disk"
        )
