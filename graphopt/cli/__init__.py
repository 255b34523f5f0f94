"""The command line. Verbs are imported when they are run, and what they need when they do it."""

from __future__ import annotations

import difflib
import importlib
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

VERBS: dict[str, str] = {
    "optimize": "simplify with exact passes, or run a recipe",
    "quantize": "make the weights and arithmetic int8",
    "compare": "numbers: does B still do what A does",
    "inspect": "what is in a model",
    "run": "do what a recipe says, end to end",
    "passes": "the passes there are, with their options",
    "targets": "the runtimes there are profiles for",
    "demo": "the main job on a model that comes with graphopt",
}
"""verb -> one line for --help, so that listing them imports nothing."""

EPILOG = """\b
Exit codes: 0 done; 1 a gate or tolerance failed; 2 bad usage or bad input;
3 the work asked for did not happen; 4 internal error.
\b
graphopt IN.onnx OUT.onnx      means   graphopt optimize IN.onnx OUT.onnx
"""


class Verbs(click.Group):
    """Finds verbs by name, and reads a bare ``IN OUT`` as ``optimize IN OUT``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"graphopt.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        first = args[0]
        if first not in VERBS:
            if first == "-" or first.endswith(".onnx") or Path(first).is_file():
                args = ["optimize", *args]
            else:
                near = difflib.get_close_matches(first, VERBS, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"verbs: {', '.join(VERBS)}"
                raise click.UsageError(f"no such verb or file: '{first}'; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import version

        click.echo(f"graphopt {version('graphopt')}")
        ctx.exit()


@click.group(cls=Verbs, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, callback=_version, expose_value=False, is_eager=True, help="Print the version."
)
def cli() -> None:
    """Make ONNX models smaller and faster, and prove that they still do their job.

    graphopt VERB --help tells more, with an example.
    """


class State:
    """What the outermost frame has to know when something goes wrong."""

    verbose = False
    as_json = False


def main() -> NoReturn:
    """The ``graphopt`` command: every error becomes one line and the documented exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    State.verbose = State.as_json = False
    try:
        result: Any = cli.main(arguments, prog_name="graphopt", standalone_mode=False)
        return int(result) if isinstance(result, int) else 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        return _fail(f"{error.format_message()}{_help_hint(error)}", 2, error)
    except (KeyboardInterrupt, click.Abort) as error:
        return _fail("interrupted; nothing was written", 130, error)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; say nothing more
        return 0
    except Exception as error:
        from graphopt.errors import GraphoptError

        if isinstance(error, GraphoptError):
            return _fail(str(error), int(error.exit_code), error)
        if isinstance(error, MemoryError):
            return _fail("out of memory; give fewer or smaller samples, or a machine with more", 2, error)
        return _fail(f"internal error: {type(error).__name__}: {error}; run again with -v and report it", 4, error)


def _help_hint(error: click.ClickException) -> str:
    ctx = getattr(error, "ctx", None)
    return f" (try 'graphopt {ctx.info_name} --help')" if ctx is not None and ctx.info_name in VERBS else ""


def _fail(message: str, code: int, error: BaseException) -> int:
    if State.verbose:
        import traceback

        traceback.print_exception(error)
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code
