"""``graphopt view``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click

from graphopt.cli import _complete, _options


@click.command(
    cls=_options.Command, epilog="\b\nExample:\n  graphopt view model.onnx\n  graphopt view m.onnx --port 8081"
)
@click.argument("model", metavar="M", shell_complete=_complete.models)
@click.option("--no-browser", is_flag=True, help="Only serve it, and print the address.")
@click.option(
    "--port", type=click.IntRange(min=0, max=65535), metavar="N", help="Port to serve on (default: a free one)."
)
@_options.plain
def command(model: str, no_browser: bool, port: int | None, as_json: bool, verbose: bool) -> None:
    """Open M in netron, a viewer in the browser; Ctrl-C ends it.

    It is served to this machine only. Needs: pip install "graphopt[view]"
    """
    from graphopt.cli._finish import to_json
    from graphopt.errors import InputError

    # Read before netron is looked for or a page is opened: a wrong path is the likelier mistake.
    content = _content(model)
    try:
        netron: Any = importlib.import_module("netron")
    except ImportError:
        raise InputError('netron is not installed; run: pip install "graphopt[view]"') from None
    try:
        if content is None:
            address = netron.start(model, address=port, browse=not no_browser)
        else:
            address = netron.serve("model.onnx", content, address=port, browse=not no_browser)
    except OSError as error:
        raise InputError(f"cannot serve on port {port}: {error.strerror or error}; give another with --port") from error
    url = f"http://{address[0]}:{address[1]}"
    click.echo(to_json({"schema_version": 1, "model": model, "url": url}) if as_json else f"{model} is at {url}")
    try:
        netron.wait()
    except KeyboardInterrupt:  # how one leaves
        netron.stop(address)


def _content(model: str) -> bytes | None:
    """What was piped in; None for a file, which netron reads itself, with its data file once that passed the gate.

    Raises:
        InputError, ModelError: not a model, or its external data is missing, lies, or points outside.
    """
    from graphopt.external import ExternalFiles
    from graphopt.model import read_proto
    from graphopt.residue import dense_tensors, opaque_tensors

    proto = read_proto(model)
    if not Path(model).is_file():
        return bytes(proto.SerializeToString())
    files = ExternalFiles(Path.cwd() / Path(model).parent)
    for tensor in (*dense_tensors(proto), *opaque_tensors(proto)):
        files.check(tensor)
    return None
