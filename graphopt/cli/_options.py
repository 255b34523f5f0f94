"""Options that several verbs share, and how their values become keyword arguments of the API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

Decorator = Callable[[F], F]


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


output = _stack(
    click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON on stdout."),
    click.option("-v", "--verbose", is_flag=True, callback=_verbose, is_eager=True, help="Every change; tracebacks."),
)

quiet = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")

gates = _stack(
    click.option("--max-drop", metavar="DROP", help="Largest loss of the metric: 1% (relative) or 0.01 (absolute)."),
    click.option("--min-sqnr", type=float, metavar="DB", help="Least SQNR of every output, in dB."),
    click.option("--min-speedup", type=float, metavar="X", help="Least speed-up measured here (lower bound)."),
    click.option("--max-size", metavar="SIZE", help="Largest file: 25MB, or 0.3 of the original."),
    click.option("--certify", is_flag=True, help="Judge --max-drop by the bound of the interval, not the estimate."),
)

data = _stack(
    click.option("--data", metavar="D", help="Calibration data: .npz, .npy, a folder, module.py:function, random."),
    click.option("--eval-data", metavar="D", help="Data that judges (default: a seeded 20 % of --data is held back)."),
    click.option("--metric", metavar="M", help="accuracy, or module.py:function(outputs, samples) -> float."),
    click.option("--samples", type=click.IntRange(min=1), metavar="N", help="Use only the first N samples."),
)

images = _stack(
    click.option("--image-size", metavar="HxW", help="For folders of images: the size to resize to."),
    click.option("--mean", metavar="R,G,B", help="Subtracted after scaling (default 0)."),
    click.option("--std", metavar="R,G,B", help="Divided by after --mean (default 1)."),
    click.option("--scale", type=float, metavar="X", help="Multiplied first (default 1/255)."),
    click.option("--layout", type=click.Choice(["NCHW", "NHWC"]), default="NCHW", show_default=True),
    click.option("--channel-order", type=click.Choice(["RGB", "BGR", "L"]), default="RGB", show_default=True),
)

model = _stack(
    click.option("--target", metavar="T", help="The runtime it is for; graphopt targets lists them."),
    click.option("--this-cpu", is_flag=True, help="For this machine's CPU only, not for all of the target's."),
    click.option(
        "--external-root",
        "external_roots",
        multiple=True,
        metavar="DIR",
        help="A folder outside the model's own that external weights may be read from (repeatable).",
    ),
    click.option(
        "--external-data/--no-external-data",
        "external",
        default=None,
        help="Weights in a data file beside the model (default: as they came; always above 2 GB).",
    ),
)

running = _stack(
    click.option("--verify", type=click.Choice(["end", "each", "off"]), help="When exact passes are compared."),
    click.option("--strict", is_flag=True, help="Exit 1 if a pass had to be reverted."),
    click.option("--seed", type=int, metavar="N", help="For everything random (default 0)."),
    click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads ONNX Runtime may use."),
    click.option("--time", type=click.FloatRange(min=0), metavar="S", help="Seconds for timing (default 2; 0: none)."),
)


def api_options(values: dict[str, Any]) -> dict[str, Any]:
    """Drop what was not given, and pack the image options."""
    image_keys = ("image_size", "mean", "std", "scale", "layout", "channel_order")
    image = {key: values.pop(key) for key in image_keys if key in values}
    given = {k: v for k, v in values.items() if v is not None and v is not False and v != ()}
    if image.get("image_size") is not None:
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
