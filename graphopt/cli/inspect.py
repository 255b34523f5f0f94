"""``graphopt inspect``."""

from __future__ import annotations

from typing import Any

import click

from graphopt.cli import _complete, _options


@click.command(
    cls=_options.Command,
    epilog="\b\nExample:\n  graphopt inspect model.onnx --dim batch=8\n"
    "  graphopt inspect before.onnx after.onnx --ops\n"
    "  graphopt inspect model.onnx --tree\n"
    "  graphopt inspect before.onnx after.onnx --json",
)
@click.argument("models", metavar="M...", shell_complete=_complete.models, nargs=-1, required=True)
@click.option("--ops", is_flag=True, help="Per operator: nodes, MACs, bytes of weights.")
@click.option("--tree", is_flag=True, help="The modules it was exported from, from names and metadata.")
@click.option("--nodes", is_flag=True, help="Every node in order: what it makes, MACs, bytes of weights.")
@click.option("--node", metavar="NAME", help="One node (or value) and its neighbours.")
@click.option("--deep", is_flag=True, help="Read every weight, data files too, to tell which are equal.")
@click.option(
    "--dim", "dims", multiple=True, metavar="NAME=N", help="A size for a symbolic dim, for MACs and activations."
)
@_options.limits
@_options.output
@_options.report
def command(
    models: tuple[str, ...],
    ops: bool,
    tree: bool,
    nodes: bool,
    node: str | None,
    deep: bool,
    dims: tuple[str, ...],
    as_json: bool,
    verbose: bool,
) -> None:
    """Say what is in each model M: inputs, operators, parameters, MACs, duplicates, QDQ coverage, largest tensors.

    Nothing is run, and no data file is read without --deep. Symbolic dims count as 1 unless --dim says otherwise.
    """
    from graphopt.cli._finish import to_json, with_page
    from graphopt.errors import InputError
    from graphopt.inspection import inspect_model

    if sum((ops, tree, nodes, node is not None)) > 1:
        raise InputError("--ops, --tree, --nodes and --node each show something else; give one of them")
    if (tree or nodes or node is not None) and len(models) > 1:
        raise InputError(f"{'--tree' if tree else '--nodes' if nodes else '--node'} looks at one model; give one")
    sizes: dict[str, int] = {}
    for text in dims:
        name, _, number = text.rpartition("=")
        if not name or not number.isdigit():
            raise InputError(f"--dim '{text}' is no size; write batch=1")
        sizes[name] = int(number)

    def print_report(report: dict[str, Any]) -> None:
        if as_json:
            click.echo(to_json(report))
            return
        from graphopt.report.inspection import print_inspection

        print_inspection(reports, ops=ops, verbose=verbose)

    show = with_page(print_report)
    reports = [inspect_model(model, dims=sizes, deep=deep, tree=tree, nodes=nodes, node=node) for model in models]
    show(reports[0] if len(reports) == 1 else {"schema_version": 1, "models": reports})
