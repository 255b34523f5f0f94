"""What a runtime wants, as data (``targets/*.toml``), and what this machine's CPU can do."""

from __future__ import annotations

import difflib
import platform
import tomllib
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from graphopt.errors import InputError


@dataclass(frozen=True)
class Target:
    """One runtime's wishes; see the TOML files for what each key means."""

    name: str
    description: str
    opset: int
    heavy: tuple[str, ...]
    needs_integer_output: tuple[str, ...]
    absorbed: tuple[str, ...]
    shared_scale: tuple[str, ...]
    bridging: tuple[str, ...]
    reasons: dict[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    integer: tuple[str, ...] = ()
    gated: tuple[str, ...] = ()
    here: bool = False
    weight: dict[str, Any] = field(default_factory=dict)
    activation: dict[str, Any] = field(default_factory=dict)
    bias: str = "int32"
    saturates: bool = False
    duplicates: bool = False
    residual: str = "any"
    whole: bool = False
    unsupported: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


@cache
def targets() -> dict[str, Target]:
    """All profiles by name."""
    found: dict[str, Target] = {}
    for file in sorted(files("graphopt.targets").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".toml"):
            table: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
            ops: dict[str, Any] = {key: tuple(value) for key, value in table.pop("ops").items()}
            aliases = tuple(table.pop("aliases", ()))
            target = Target(**table, **ops, aliases=aliases)
            found[target.name] = target
    return found


def get_target(name: str) -> Target:
    """A profile by name or alias.

    Raises:
        InputError: unknown name, with the nearest known one.
    """
    wanted = name.lower().replace("_", "-")
    for target in targets().values():
        if wanted == target.name or wanted in target.aliases:
            return target
    names = {known: t.name for t in targets().values() for known in (t.name, *t.aliases)}
    near = difflib.get_close_matches(wanted, names, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known targets: {', '.join(targets())}"
    raise InputError(f"unknown target '{name}'; {hint}")


CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Cpu:
    """This machine's processor. ``saturates``: u8 x s8 products overflow in ONNX Runtime's kernels here."""

    name: str
    vnni: bool
    saturates: bool


@cache
def this_cpu() -> Cpu:
    """What /proc/cpuinfo (or the platform) tells; an x86 that tells nothing is taken to saturate."""
    flags: set[str] = set()
    name = platform.processor() or platform.machine()
    if CPUINFO.is_file():
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags.update(value.split())
    vnni = bool(flags & {"avx512_vnni", "avx_vnni"})
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i686", "x86")
    return Cpu(name, vnni, x86 and not vnni)
