"""Options that several verbs share, and how their values become keyword arguments of the API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from graphopt.cli import _complete
from graphopt.errors import did_you_mean

F = TypeVar("F", bound=Callable[..., Any])


class Command(click.Command):
    """A verb whose ``--help`` lists its options under headings, in the order they were declared."""

    def invoke(self, ctx: click.Context) -> Any:
        from graphopt.errors import InputError
        from graphopt.report.markdown import asked

        if asked() and ctx.params.get("as_json"):
            raise InputError("--json and --markdown both want stdout; give one")
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        heading = "Options"
        for param in self.get_params(ctx):
            if isinstance(param, _Heading):
                heading = param.text
                continue
            if param.name == "help":
                heading = "Output"
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                groups.setdefault(heading, []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records, col_max=28)


class Choice(click.Choice[str]):
    """One of a few words; the nearest is named where another was given."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            message = error.message.rstrip(".")
            near = did_you_mean(str(value), self.choices, "")
            self.fail(f"{message}; {near}" if near else message, param, ctx)


class _Heading(click.Option):
    """No option: the place where a new heading starts in ``--help``."""

    def __init__(self, text: str) -> None:
        super().__init__([f"--heading-{text.lower()}"], hidden=True, expose_value=False)
        self.text = text

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """It cannot be typed."""


def section(text: str) -> Callable[[F], F]:
    """The options declared after this stand under ``text`` in ``--help``."""

    def decorate(function: F) -> F:
        params: list[click.Parameter] = function.__dict__.setdefault("__click_params__", [])
        params.append(_Heading(text))
        return function

    return decorate


def _stack(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _verbose(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    from graphopt.cli import State

    State.verbose = value
    return value


_shown = (
    click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON on stdout (docs/report.md)."),
    click.option(
        "-v", "--verbose", is_flag=True, callback=_verbose, is_eager=True, help="Say everything; tracebacks on errors."
    ),
)


def _as_markdown(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    from graphopt.report.markdown import KEY

    ctx.meta[KEY] = value


PAGE = "graphopt.page"
"""Where the context of a command keeps what ``--report`` was given."""


def _page(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    from graphopt.errors import InputError

    if value is not None and not value.lower().endswith(".html"):
        raise InputError(f"--report {value}: the report is one HTML page; name it FILE.html (for JSON: --json > FILE)")
    ctx.meta[PAGE] = value


report = click.option(
    "--report",
    metavar="FILE.html",
    shell_complete=_complete.files,
    callback=_page,
    expose_value=False,
    help="Write the report as one HTML page, too.",
)
"""Of a verb that makes or compares models, or looks into one; ``_finish.with_page`` writes it."""

JUNIT = "graphopt.junit"
"""Where the context of a command keeps what ``--junit`` was given."""


def _junit(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    ctx.meta[JUNIT] = value


junit = click.option(
    "--junit",
    metavar="FILE.xml",
    shell_complete=_complete.files,
    callback=_junit,
    expose_value=False,
    help="Write the gates as JUnit XML, for CI.",
)
"""Of a verb that has gates; ``_finish.with_page`` writes it."""

_quiet = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors (and --json).")
_markdown = click.option(
    "--markdown",
    is_flag=True,
    callback=_as_markdown,
    expose_value=False,
    help="Print it as Markdown, for an issue or a pull request.",
)

plain = _stack(section("Output"), *_shown)
"""Of a verb that says a few words."""

output = _stack(section("Output"), _markdown, *_shown)
"""Of a verb that prints tables; whatever it prints through ``report.text`` is Markdown where that is asked for."""

judged = _stack(section("Output"), _quiet, _markdown, *_shown)
"""Of a verb that judges."""

LOCK = "graphopt.lock"
"""Where the context of a command keeps what ``--lock`` was given."""


def _lock(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    ctx.meta[LOCK] = value


lock = click.option(
    "--lock",
    metavar="FILE",
    shell_complete=_complete.files,
    callback=_lock,
    expose_value=False,
    help="Write what makes the same bytes again, too, for graphopt run --locked.",
)
"""Of a verb that makes a model; ``_finish.make`` writes it."""

unlocked = _stack(section("Output"), report, junit, _quiet, _markdown, *_shown)
"""Of a verb that makes a file that no lock tells of: another framework's model is its input or its output."""

result = _stack(section("Output"), lock, report, junit, _quiet, _markdown, *_shown)
"""Of a verb that makes a model."""

gates = _stack(
    section("Gates (where one fails, nothing is written and the exit code is 1)"),
    click.option("--max-drop", metavar="DROP", help="Largest loss of the metric: 1% (relative) or 0.01 (absolute)."),
    click.option("--min-sqnr", type=float, metavar="DB", help="Least SQNR of every output, in dB."),
    click.option("--min-speedup", type=float, metavar="X", help="Least speed-up measured here (lower bound)."),
    click.option("--max-size", metavar="SIZE", help="Largest file: 25MB, or 0.3 of the original."),
    click.option("--certify", is_flag=True, help="Judge --max-drop by the bound of the interval, not the estimate."),
)

data = _stack(
    section("Data"),
    click.option(
        "--data",
        metavar="D",
        shell_complete=_complete.files,
        help="Calibration data: .npz, .npy, a folder, module.py:function, random.",
    ),
    click.option(
        "--eval-data",
        metavar="D",
        shell_complete=_complete.files,
        help="Data that judges (default: a seeded 20 % of --data is held back).",
    ),
    click.option(
        "--metric",
        metavar="M",
        shell_complete=_complete.metrics,
        help="accuracy, or module.py:function(outputs, samples) -> float.",
    ),
    click.option("--samples", type=click.IntRange(min=1), metavar="N", help="Use only the first N samples."),
)

images = _stack(
    section("Folders of images"),
    click.option("--image-size", metavar="HxW", help="The size to resize to; needed for images."),
    click.option("--mean", metavar="R,G,B", help="Subtracted after scaling (default 0)."),
    click.option("--std", metavar="R,G,B", help="Divided by after --mean (default 1)."),
    click.option("--scale", type=float, metavar="X", help="Multiplied first (default 1/255)."),
    click.option("--layout", type=Choice(["NCHW", "NHWC"]), help="Order of the axes (default NCHW)."),
    click.option("--channel-order", type=Choice(["RGB", "BGR", "L"]), help="Colours (default RGB)."),
)

external_roots = click.option(
    "--external-root",
    "external_roots",
    multiple=True,
    metavar="DIR",
    shell_complete=_complete.folders,
    help="A folder outside the model's own that external weights may be read from (repeatable).",
)


def _budget(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def set_(_: click.Context, __: click.Parameter, value: Any) -> None:
        from graphopt import budgets

        if value is not None:
            budgets.change(**{name: budgets.size(value) if name == "memory" else value})

    return set_


limits = _stack(
    section("Limits (a model that asks for more is refused)"),
    click.option(
        "--max-memory",
        metavar="SIZE",
        callback=_budget("memory"),
        expose_value=False,
        help="What its values may take at once: 8GB (default: by its size).",
    ),
    click.option(
        "--max-seconds",
        type=click.FloatRange(min=0, min_open=True),
        metavar="S",
        callback=_budget("seconds"),
        expose_value=False,
        help="What one run of its loops may take (default 10).",
    ),
    click.option(
        "--max-nodes",
        type=click.IntRange(min=1),
        metavar="N",
        callback=_budget("nodes"),
        expose_value=False,
        help="Nodes its own functions may become (default fits the file).",
    ),
)
"""What :mod:`graphopt.budgets` keeps, of every verb that loads a model."""

model = _stack(
    section("Model"),
    click.option(
        "--target",
        metavar="T",
        shell_complete=_complete.targets,
        help="The runtime it is for (default ort-cpu); see graphopt targets.",
    ),
    click.option("--this-cpu", is_flag=True, help="For this machine's CPU only, not for all of the target's."),
    external_roots,
    click.option(
        "--external-data/--no-external-data",
        "external",
        default=None,
        help="Weights in a data file beside the model (default: as they came; always above 2 GB).",
    ),
    limits,
)

asked = _stack(
    section("Changes to the model's interface, on request"),
    click.option(
        "--dim", "dims", multiple=True, metavar="NAME=N", help="Give a symbolic dim a size: batch=1 (repeatable)."
    ),
    click.option(
        "--input-shape",
        "input_shapes",
        multiple=True,
        metavar="NAME:SHAPE",
        help="Give an input a shape: image:1,3,224,224; '?' stays dynamic (repeatable).",
    ),
    click.option(
        "--fold-overridable",
        is_flag=True,
        help="Initializers that are inputs too become constants.",
    ),
    click.option("--opset", type=click.IntRange(min=1), metavar="N", help="Raise the operator set to N."),
)
"""Of a verb whose result may take less than its model did; without them the interface stays as it is."""

_running = (
    section("Running"),
    click.option(
        "--verify",
        type=Choice(["end", "each", "off"]),
        help="When exact passes are compared with the original (default end).",
    ),
    click.option("--strict", is_flag=True, help="Exit 1 if a pass had to be reverted, 2 if a sample is unusable."),
    click.option("--seed", type=click.IntRange(min=0), metavar="N", help="For everything random (default 0)."),
    click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads ONNX Runtime may use."),
)

running_untimed = _stack(*_running)
"""Of a verb that says itself what its time is for."""

running = _stack(
    *_running,
    click.option("--time", type=click.FloatRange(min=0), metavar="S", help="Seconds for timing (default 2; 0: none)."),
)

_IMAGE = ("image_size", "mean", "std", "scale", "layout", "channel_order")


def api_options(values: dict[str, Any]) -> dict[str, Any]:
    """Drop what was not given, and pack the image options."""
    image = {key: values.pop(key) for key in _IMAGE if key in values}
    given = {k: v for k, v in values.items() if v is not None and v is not False and v != ()}
    if any(value is not None for value in image.values()):
        given["image"] = _image(image)
    return given


def _image(values: dict[str, Any]) -> Any:
    from graphopt.data import ImageOptions
    from graphopt.errors import InputError

    def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
        if text is None:
            return None
        try:
            return tuple(float(part) for part in text.split(","))
        except ValueError:
            raise InputError(f"{option} '{text}' is no list of numbers; write e.g. 0.485,0.456,0.406") from None

    if values["image_size"] is None:
        given = next(key for key, value in values.items() if value is not None).replace("_", "-")
        raise InputError(f"--{given} is for folders of images; give --image-size HxW too")
    height, _, width = values["image_size"].lower().partition("x")
    if not height.isdigit() or not (width or height).isdigit():
        raise InputError(f"--image-size '{values['image_size']}' is no size; write 224 or 224x320 (height x width)")
    chosen: dict[str, Any] = {
        "size": (int(height), int(width or height)),
        "mean": numbers(values["mean"], "--mean"),
        "std": numbers(values["std"], "--std"),
        "scale": values["scale"],
        "layout": values["layout"],
        "order": values["channel_order"],
    }
    return ImageOptions(**{k: v for k, v in chosen.items() if v is not None})
