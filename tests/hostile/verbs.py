"""How each verb is called on a file; read off the command line's own options, so that new verbs need nothing here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from graphopt.cli import VERBS, cli
from hostile import samples
from hostile.corpus import OTHER_FILES

if TYPE_CHECKING:
    from hostile.oracle import Case

_NO_MODEL = {"passes", "targets", "demo"}

_MORE: dict[str, list[str]] = {
    "extract": ["--outputs", "y"],
    "sensitivity": ["--samples", "4"],
    "prune": ["--macs", "0.7"],
    "compress": ["--weights", "int8"],
    "finetune": ["--steps", "2"],
    "tune": ["--trials", "2", "--min-sqnr", "10"],
    "export": ["--to", "ort"],
}
"""What a verb cannot do without, or would take too long without; only options that it has are given."""

_OUT = {"sensitivity": "../out/o.json", "export": "../out/o.ort"}

_RECIPE = '[[pass]]\nuse = "fold-constants"\n\n[[pass]]\nuse = "inline-functions"\n'

_QUICK = "fold-constants,fold-shapes,inline-if,eliminate-identities,merge-reshapes,fuse-batchnorm,remove-unused"
"""Passes of ``optimize`` in `make test`: without onnxsim, whose child process takes a second to start."""


def verbs() -> list[str]:
    """Every verb that reads a model."""
    return [name for name in VERBS if name not in _NO_MODEL]


def quick(case: Case) -> list[list[str]]:
    """The two verbs of ``make test``."""
    if case.kind.name.startswith("data-"):
        found = [command_line("quantize", case), command_line("compare", case)]
    else:
        found = [[*command_line("optimize", case), "--passes", _QUICK], command_line("inspect", case)]
    return [line for line in found if line is not None]


def command_line(verb: str, case: Case) -> Any:
    """The arguments for this kind; None where the verb takes no such file."""
    context = click.Context(cli)
    command = cli.get_command(context, verb)
    assert command is not None
    options = {o for p in command.params if isinstance(p, click.Option) for o in p.opts}
    data = case.kind.name.startswith("data-")
    if data and ("--data" not in options or verb in OTHER_FILES):
        return None
    if case.kind.options and "--external-root" not in options:
        return None
    if data and not (case.work / "plain.onnx").exists():
        (case.work / "plain.onnx").write_bytes(samples.plain().SerializeToString())
    model = case.path("plain.onnx" if data else None)
    line = [verb]
    if verb == "run":
        (case.work / "r.toml").write_text(_RECIPE)
        line += [case.path("r.toml"), "--model", model]
    for param in command.params:
        if isinstance(param, click.Argument) and param.name not in ("destination", "recipe"):
            line.append(model)
    if "--output" in options or "-o" in options:
        line += ["-o", _OUT.get(verb, "../out/o.onnx")]
    if "--teacher" in options:
        line += ["--teacher", model]
    if "--data" in options:
        given = case.path() if data else "random:4"
        line += ["--data", given] if data or verb not in ("optimize", *OTHER_FILES) else []
    if "--time" in options:
        line += ["--time", {"bench": "0.1", "tune": "1s"}.get(verb, "0")]
    more = _MORE.get(verb, [])
    for option, value in zip(more[::2], more[1::2], strict=True):
        line += [option, value] if option in options else []
    return line
