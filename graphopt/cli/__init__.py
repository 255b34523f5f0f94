"""The command line. Verbs are imported when they are run, and what they need when they do it."""

from __future__ import annotations

import difflib
import gc
import importlib
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from graphopt.budgets import command

VERBS: dict[str, str] = {
    "convert": "any framework's model to ONNX, compared with it",
    "optimize": "simplify with exact passes, or run a recipe",
    "quantize": "make the weights and arithmetic int8",
    "compress": "store the weights in fewer bits",
    "unpack": "take a package for transport apart",
    "prune": "remove channels, heads and hidden units",
    "finetune": "train it until it does again what the original does",
    "tune": "search for the best mixture of passes on this machine",
    "sensitivity": "which layers hurt when they are quantized",
    "bench": "how fast models are here, and where the time goes",
    "compare": "numbers: does B still do what A does",
    "inspect": "what is in a model",
    "extract": "cut a piece out of a model",
    "view": "open a model in netron",
    "bisect": "which pass, rewrite and value goes wrong first",
    "diff": "structure: what changed between two models",
    "lint": "is a quantized model right for its runtime",
    "export": "a model in the form of another runtime",
    "run": "do what a recipe says, end to end",
    "passes": "the passes there are, with their options",
    "targets": "the runtimes there are profiles for",
    "demo": "the main job on a model that comes with graphopt",
}
"""verb -> one line for --help, so that listing them imports nothing."""

_MODULES = {"run": "run_recipe"}  # graphopt.cli.run is the function below

EPILOG = """\b
Exit codes: 0 done; 1 a gate or tolerance failed; 2 bad usage or bad input;
3 the work asked for did not happen; 4 internal error.
\b

\b
Example:
  graphopt demo
  graphopt optimize model.onnx -o small.onnx
  graphopt quantize model.onnx -o int8.onnx --data calibration.npz
  graphopt model.onnx small.onnx        the same as graphopt optimize
  cat model.onnx | graphopt - - > small.onnx
"""


_COMPLETE = "_GRAPHOPT_COMPLETE"
"""What click sets where the shell asks for completions (docs/completion.md)."""


class _Interrupted(BaseException):
    """A KeyboardInterrupt that click does not meet (it would print an empty line for it)."""


class Verbs(click.Group):
    """Finds verbs by name, and reads a bare ``IN OUT`` as ``optimize IN OUT``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"graphopt.cli.{_MODULES.get(cmd_name, cmd_name)}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        first = args[0]
        if first not in VERBS and not first.startswith("--"):
            if first == "-" or first.endswith(".onnx") or Path(first).is_file():
                args = ["optimize", *args]
            else:
                near = difflib.get_close_matches(first, VERBS, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"verbs: {', '.join(VERBS)}"
                raise click.UsageError(f"no such verb or file: '{first}'; {hint}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Verbs and options; a model where none starts like this (``graphopt model.onnx small.onnx``)."""
        from graphopt.cli import _complete

        if not incomplete.startswith("-"):
            verbs = [CompletionItem(name, help=text) for name, text in VERBS.items() if name.startswith(incomplete)]
            return verbs or _complete.models(ctx, ctx.command.params[0], incomplete)
        return super().shell_complete(ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted from error

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage("graphopt", "VERB [OPTIONS] ...")

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


def main() -> NoReturn:
    """The ``graphopt`` command: every error becomes one line and the documented exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    # A model is millions of objects that live long: looking through them all as often as Python does by default takes
    # half of the time on a graph of 100,000 nodes.
    gc.set_threshold(1_000_000, 20, 20)
    # numpy tells of overflows and of infinity less infinity; what comes of them is seen in what the result computes.
    warnings.simplefilter("ignore", RuntimeWarning)
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt as error:  # beside run's own watch: while it enters or leaves
        code = _fail("interrupted; nothing was written", 130, error)
    gc.freeze()  # and once more on the way out, where nothing is left to be saved by it
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    State.verbose = False
    if not arguments and _COMPLETE not in os.environ:
        with click.Context(cli, info_name="graphopt") as ctx:
            click.echo(cli.get_help(ctx), err=True)
        return 2
    try:
        with command():
            result: Any = cli.main(arguments, prog_name="graphopt", standalone_mode=False)
        return int(result) if isinstance(result, int) else 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        return _fail(_usage(error), 2, error)
    except (KeyboardInterrupt, _Interrupted, click.Abort) as error:
        if sys.stderr.isatty():
            click.echo(err=True)  # the line that says ^C ends here
        return _fail("interrupted; nothing was written", 130, error)
    except BrokenPipeError:  # the reader of our output has gone (head, less): say nothing more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from graphopt.errors import GraphoptError, RuntimeFailure

        if _memory_ran_out(error):
            return _fail("out of memory; give fewer or smaller samples, or a machine with more", 2, error)
        if isinstance(error, RuntimeFailure) and ";" not in str(error):  # the runtime says what, never what to do
            return _fail(f"{error}; does it need operators, data or memory that are not here?", 2, error)
        if isinstance(error, GraphoptError):
            return _fail(str(error), int(error.exit_code), error)
        return _fail(f"internal error: {type(error).__name__}: {error}; run again with -v and report it", 4, error)


def _memory_ran_out(error: BaseException | None) -> bool:
    """Whether that is behind it: MemoryError, or protobuf's word for it (what is too large for it is told before)."""
    from graphopt.errors import GraphoptError, RuntimeFailure

    while error is not None:
        if isinstance(error, MemoryError) or type(error).__name__ == "EncodeError":
            return True
        if isinstance(error, GraphoptError) and not isinstance(error, RuntimeFailure):
            return False  # it knows better what that means
        error = error.__cause__
    return False


def _usage(error: click.ClickException) -> str:
    """What was typed wrong, in one line that says how to go on."""
    ctx = getattr(error, "ctx", None)
    verb = ctx.info_name if ctx is not None and ctx.info_name in VERBS else None
    message = error.format_message().rstrip(".")
    if isinstance(error, click.NoSuchOption):
        message = f"no such option '{error.option_name}'"
        if verb is None:
            near = difflib.get_close_matches(error.option_name, ("--help", "--version"), n=1, cutoff=0.8)
            if near:
                return f"{message}; did you mean '{near[0]}'?"
            return f"{message} before the verb; options follow it: graphopt VERB ... {error.option_name}"
        near = difflib.get_close_matches(error.option_name, error.possibilities or (), n=1)
        if near:
            return f"{message} of {verb}; did you mean '{near[0]}'?"
    elif isinstance(error, click.BadParameter):
        message = re.sub(r"^Invalid value for '(-[^']*)'", r"\1", message)
    message = f"{message[:1].lower()}{message[1:]}"
    if ";" not in message:
        message += f"; see graphopt {verb} --help" if verb else "; see graphopt --help"
    return message


def _fail(message: str, code: int, error: BaseException) -> int:
    if State.verbose:
        import traceback

        traceback.print_exception(error)
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code
