"""The tables of ``graphopt inspect``: one model, or several side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from rich.text import Text

from graphopt.external import shown
from graphopt.report.table import Table
from graphopt.report.text import _page
from graphopt.report.units import count, plural, ratio, size

_SHOWN = 24
_DIMS = 6
_DEPTH = 3
_MODULES = 60
_FEW = 3


_NAMED = 8
"""Names told of one group of equal tensors, with ``-v`` too: exporters leave hundreds, and --json has them all."""


def print_inspection(
    reports: list[dict[str, Any]], *, ops: bool = False, verbose: bool = False, stream: IO[str] | None = None
) -> None:
    """What ``graphopt inspect`` has to say; several models stand side by side."""
    with _page(stream) as page:
        if len(reports) == 1 and "node" in reports[0]:
            for index, one in enumerate(reports[0]["node"]):
                (page.block if index else page.lines)(neighbourhood(one))
            return
        if len(reports) == 1 and "tree" in reports[0]:
            page.lines(page.table(modules(reports[0]["tree"], depth=None if verbose else _DEPTH)))
            return
        if len(reports) == 1 and "node_costs" in reports[0]:
            page.lines(page.table(nodes(reports[0]["node_costs"])))
            return
        if ops:
            page.lines(page.table(costs(reports)))
            return
        page.lines(page.table(overview(reports, verbose=verbose)))
        if len(reports) > 1:
            page.block(page.table(operators(reports, limit=None if verbose else _SHOWN)))
        elif reports[0]["largest"]:
            page.block(page.table(largest(reports[0])))
        if len(reports) == 1 and verbose:
            for table in details(reports[0]):
                page.block(page.table(table))


def overview(reports: list[dict[str, Any]], *, verbose: bool = False) -> Table:
    """What each model is; inputs and outputs one a row."""
    pair = len(reports) == 2
    titles = ["", *names(reports), *(["ratio"] if pair else [])]
    table = Table(titles, "l" * (1 + len(reports)) + "r" * pair, side_by_side=len(reports) > 1)
    for title, value in (
        ("file size", _file_size),
        ("opsets", lambda r: ", ".join(f"{shown(k)} {v}" for k, v in r["opsets"].items())),
        ("IR version", lambda r: str(r["ir_version"])),
        ("producer", lambda r: shown(r["producer"] or "")),
        ("parameters", lambda r: count(r["parameters"])),
        ("weights", lambda r: size(r["weight_bytes"])),
        ("  by type", lambda r: ", ".join(f"{k} {size(v)}" for k, v in r["bytes_by_type"].items())),
        ("  duplicates", _duplicates),
        ("  dead", _dead),
        ("MACs", _macs),
        ("activations", lambda r: _peak(r, len(reports) == 1)),
        ("quantized", _coverage),
    ):
        table.add(title, *(value(r) for r in reports), *([_ratio(title, *reports)] if pair else []))
    for side in ("inputs", "outputs"):
        for index in range(max(len(r[side]) for r in reports)):
            table.add(
                side[:-1] if index == 0 else "",
                *(_port(r[side][index]) if index < len(r[side]) else "" for r in reports),
            )
    if any(r["dynamic_dims"] for r in reports):
        table.add("dynamic dims", *(_dims(r, None if verbose else _DIMS) for r in reports))
    table.add("nodes", *(_nodes(r) for r in reports), *([_ratio("nodes", *reports)] if pair else []))
    if any(r["function_list"] for r in reports):
        table.add("functions", *(_functions(r) for r in reports))
    if any(r["metadata"] for r in reports):
        table.add("metadata", *(_metadata(r) for r in reports))
    if len(reports) == 1:
        found = reports[0]["operators"]
        table.add("operators", ", ".join(f"{n} {shown(name)}" for name, n in found.items()) or "none")
    return table


def _ratio(title: str, a: dict[str, Any], b: dict[str, Any]) -> str:
    """What B has over what A has, where that is a number and known in both."""
    measured: dict[str, Callable[[dict[str, Any]], int | None]] = {
        "file size": lambda r: r["bytes"] + r["external_bytes"],
        "parameters": lambda r: r["parameters"],
        "weights": lambda r: r["weight_bytes"],
        "MACs": lambda r: None if r["macs_unknown_nodes"] else r["macs"],
        "activations": lambda r: None if r["activation_peak"]["unknown_values"] else r["activation_peak"]["bytes"],
        "nodes": lambda r: r["nodes"],
    }
    if title not in measured:
        return ""
    before, after = (measured[title](r) for r in (a, b))
    return "" if before is None or after is None else ratio(after, before)


def operators(reports: list[dict[str, Any]], *, limit: int | None = _SHOWN) -> Table:
    """Operator counts side by side, the most frequent first."""
    pair = len(reports) == 2
    titles = ["operator", *names(reports), *(["ratio"] if pair else []), ""]
    table = Table(titles, "l" + "r" * (len(titles) - 2) + "l")
    most = {n: max(r["operators"].get(n, 0) for r in reports) for r in reports for n in r["operators"]}
    ordered = sorted(most, key=lambda n: (-most[n], n))
    for name in ordered[:limit]:
        counts = [r["operators"].get(name, 0) for r in reports]
        table.add(shown(name), *(str(n or "") for n in counts), *([ratio(counts[1], counts[0])] if pair else []))
    if limit is not None and len(ordered) > limit:
        table.add(f"{plural(len(ordered) - limit, 'more operator')}; -v")
    return table


def costs(reports: list[dict[str, Any]]) -> Table:
    """Per operator: nodes, MACs, bytes of weights; functions inlined."""
    titles = [f"{what}" for _ in reports for what in ("nodes", "MACs", "weights")]
    table = Table(["operator", *titles, ""], "l" + "rrr" * len(reports) + "l")
    if len(reports) > 1:
        table.add("", *(cell for name in names(reports) for cell in (name, "", "")))
    rows = [{row["operator"]: row for row in r["operator_costs"]} for r in reports]
    for name in dict.fromkeys(name for one in rows for name in one):
        table.add(shown(name), *(cell for one in rows for cell in _cost(one.get(name))))
    total = [
        (
            str(sum(row["nodes"] for row in one.values())),
            _partly(r["macs"], r["macs_unknown_nodes"]),
            size(sum(row["weight_bytes"] for row in one.values())),
        )
        for r, one in zip(reports, rows, strict=True)
    ]
    table.add(Text("all", style="bold"), *(cell for cells in total for cell in cells))
    return table


def _cost(row: dict[str, Any] | None) -> tuple[str, str, str]:
    if row is None:
        return "", "", ""
    weights = size(row["weight_bytes"]) if row["weight_bytes"] else ""
    return str(row["nodes"]), _partly(row["macs"], row["macs_unknown_nodes"]), weights


def _partly(macs: int | None, unknown: int) -> str:
    """``?`` where nothing is known, ``1.20 M + ?`` where something is missing, nothing for 0."""
    if unknown:
        return f"{count(macs)} + ?" if macs else "?"
    return count(macs) if macs else ""


def nodes(rows: list[dict[str, Any]]) -> Table:
    """Every node in the file's order: what it makes, MACs, bytes of weights."""
    table = Table(["node", "operator", "makes", "MACs", "weights", ""], "lllrrl")
    for row in rows:
        made = ", ".join(f"{m['type']}{_shape(m['shape'])}" for m in row["makes"])
        weights = size(row["weight_bytes"]) if row["weight_bytes"] else ""
        body = f"in graph {row['graph']}" if row["graph"] else ""
        macs = _partly(row["macs"], row["macs"] is None)
        table.add(shown(row["name"]), shown(row["operator"]), made, macs, weights, body)
    return table


def modules(root: dict[str, Any], *, depth: int | None = _DEPTH) -> Table:
    """The tree of modules; where one holds nothing but one other, they share a line."""
    table = Table(["module", "nodes", "MACs", "parameters", "weights", "operators"], "lrrrrl")

    def add(one: dict[str, Any], name: str, level: int) -> None:
        while len(one["children"]) == 1 and not one["operators"] and name:
            one = one["children"][0]
            name += "/" + one["name"]
        inner = one["children"]
        cut = depth is not None and level >= depth and bool(inner)
        most = sorted(one["operators"].items(), key=lambda item: -item[1])
        here = ", ".join(f"{n} {shown(op)}" for op, n in (most if depth is None else most[:_FEW]))
        here += f", {len(most) - _FEW} more" if depth is not None and len(most) > _FEW else ""
        if cut:
            hidden = plural(_count(one) - 1, "more module")
            here = f"{here}; {hidden}" if here else hidden
        cells = (str(one["nodes"]), _partly(one["macs"], one["macs_unknown_nodes"]))
        weights = size(one["weight_bytes"]) if one["weight_bytes"] else ""
        table.add("  " * level + shown(name or "(model)"), *cells, count(one["parameters"]), weights, here)
        for child in [] if cut else inner:
            add(child, child["name"], level + 1)

    add(root, "", 0)
    if len(table.rows) == 1 and not root["children"]:
        table.add("(its nodes' names tell of no modules)")
    if depth is not None and (_count(root) > len(table.rows) or len(table.rows) > _MODULES):
        table.add("-v shows all levels")
    return table


def _count(one: dict[str, Any]) -> int:
    return 1 + sum(_count(child) for child in one["children"])


def neighbourhood(one: dict[str, Any]) -> Iterator[Text | str]:
    """A node: what it reads and who made that, its attributes, who reads what it makes."""
    head = Text(shown(one["name"]), style="bold")
    yield head.append(f"  {shown(one['op_type'])}" if one["op_type"] else "", style="not bold")
    for title, text in (
        ("module", "/".join(one["scope"])),
        ("body", f"graph {one['graph']} of the file" if one["graph"] else ""),
        ("MACs", count(one["macs"]) if one["op_type"] and one["macs"] != 0 else ""),
        ("about", one["doc"]),
        ("values", one["values"]),
    ):
        if text:
            yield f"  {title}: {shown(text)}"
    for title, ports in (("reads", one["inputs"]), ("its bodies read", one["captured"])):
        if ports:
            yield f"  {title}"
        for port in ports:
            weigh = f", {size(port['bytes'])}" if port["bytes"] is not None else ""
            yield f"    {_port(port)}  <- {shown(port['from'])}{weigh}" if port["name"] else "    (left out)"
    if one["attributes"]:
        yield "  attributes"
        width = max(len(shown(name)) for name in one["attributes"])
        yield from (f"    {shown(name):{width}}  {shown(value)}" for name, value in one["attributes"].items())
    yield "  makes" if one["op_type"] else "  is"
    for port in one["outputs"]:
        readers = [*map(shown, port["readers"]), *(["the model's output"] if port["is_output"] else [])]
        told = ", ".join(readers[:_SHOWN]) + (f" and {len(readers) - _SHOWN} more" if len(readers) > _SHOWN else "")
        origin = f" ({port['from']})" if "from" in port else ""
        yield f"    {_port(port)}{origin}  -> {told or 'nothing'}" if port["name"] else "    (left out)"
    for key, value in one["metadata"].items():
        yield f"  {shown(key)}: {shown(value)}"


def largest(report: dict[str, Any]) -> Table:
    """The tensors that take most of the file."""
    return _tensors("largest tensors", report["largest"])


def details(report: dict[str, Any]) -> Iterator[Table]:
    """What ``-v`` adds: every duplicate, every dead weight, functions, metadata."""
    if report["duplicates"]:
        table = Table(["duplicates", "type", "shape", "each", "wasted", ""], "lllrrl")
        for r in report["duplicates"]:
            more = len(r["names"]) - _NAMED
            names = ", ".join(map(shown, r["names"][:_NAMED])) + (f" and {more} more" if more > 0 else "")
            shape = "x".join(map(str, r["shape"])) or "scalar"
            table.add(r["certainty"], r["type"], shape, size(r["bytes"]), size(r["wasted_bytes"]), names)
        yield table
    if report["dead_weights"]:
        yield _tensors("dead weights", report["dead_weights"])
    if report["function_list"]:
        table = Table(["functions", "nodes", "calls", ""], "lrrl")
        for f in report["function_list"]:
            table.add(shown(f["name"]), str(f["nodes"]), str(f["calls"]))
        yield table
    if report["metadata"]:
        table = Table(["metadata", ""], "ll")
        for key, value in report["metadata"].items():
            table.add(shown(key), shown(value))
        yield table


def _tensors(title: str, tensors: list[dict[str, Any]]) -> Table:
    table = Table([title, "type", "shape", "size", ""], "lllrl")
    for tensor in tensors:
        shape = "x".join(map(str, tensor["shape"])) or "scalar"
        weigh = "?" if tensor["bytes"] is None else size(tensor["bytes"])
        table.add(shown(tensor["name"]), tensor["type"], shape, weigh)
    return table


def names(reports: list[dict[str, Any]]) -> list[str]:
    """What to call each model: its file, with the folder only where that tells two apart."""
    paths = [r["path"] or "(model)" for r in reports]
    short = [Path(p).name for p in paths]
    return short if len(paths) > 1 and len(set(short)) == len(short) else paths


def _file_size(report: dict[str, Any]) -> str:
    outside = report["external_bytes"]
    return size(report["bytes"]) + (f" and {size(outside)} of external weights" if outside else "")


def _duplicates(report: dict[str, Any]) -> str:
    found = report["duplicates"]
    if not found:
        return "none"
    extra = sum(len(r["names"]) - 1 for r in found)
    wasted = sum(r["wasted_bytes"] for r in found)
    probable = ", probably (--deep tells)" if any(r["certainty"] == "probable" for r in found) else ""
    verb = "repeats" if extra == 1 else "repeat"
    return f"{plural(extra, 'tensor')} {verb} another: {size(wasted)}{probable}"


def _dead(report: dict[str, Any]) -> str:
    found, idle = report["dead_weights"], report["dead_nodes"]
    parts = [f"{plural(len(found), 'tensor')} ({size(sum(w['bytes'] or 0 for w in found))})"] if found else []
    return ", ".join(parts + ([plural(idle, "node")] if idle else [])) or "none"


def _nodes(report: dict[str, Any]) -> str:
    graphs = f" in {report['subgraphs'] + 1} graphs" if report["subgraphs"] else ""
    return (
        str(report["nodes"]) + graphs + (f", {plural(report['functions'], 'function')}" if report["functions"] else "")
    )


def _functions(report: dict[str, Any]) -> str:
    found = report["function_list"]
    told = [f"{shown(f['name'])} ({plural(f['nodes'], 'node')}, {plural(f['calls'], 'call')})" for f in found[:_DIMS]]
    return ", ".join(told) + (f" and {len(found) - _DIMS} more" if len(found) > _DIMS else "")


def _metadata(report: dict[str, Any]) -> str:
    found = list(report["metadata"])
    return ", ".join(map(shown, found[:_DIMS])) + (f" and {len(found) - _DIMS} more" if len(found) > _DIMS else "")


def _macs(report: dict[str, Any]) -> str:
    unknown = report["macs_unknown_nodes"]
    if not unknown:
        return count(report["macs"])
    known = f"{count(report['macs'])} and " if report["macs"] else ""
    return f"{known}? for {plural(unknown, 'node')} of unknown shape or meaning"


def _peak(report: dict[str, Any], whole: bool) -> str:
    peak = report["activation_peak"]
    unknown = peak["unknown_values"]
    missing = f"? for {plural(unknown, 'value')} of unknown size" if unknown else ""
    if peak["bytes"] is None:
        return missing
    at = f" at once, in {shown(peak['node'])}" if peak["node"] and whole else ""
    return f"{size(peak['bytes'])}{at}" + (f"; {missing}" if missing else "")


def _dims(report: dict[str, Any], limit: int | None) -> str:
    named = [
        shown(d["name"]) + ("" if d["counted_as"] is None else f" (as {d['counted_as']})")
        for d in report["dynamic_dims"]
        if d["name"]
    ]
    unnamed = sum(not d["name"] for d in report["dynamic_dims"])
    told = named[:limit] + ([f"{len(named) - limit} more"] if limit is not None and len(named) > limit else [])
    return ", ".join(told + ([f"{unnamed} without a name"] if unnamed else [])) or "none"


def _coverage(report: dict[str, Any]) -> str:
    q = report["quantization"]
    if q is None:
        return "no"
    return (
        f"{q['heavy_nodes_integer']} of {q['heavy_nodes']} heavy nodes; {plural(q['quantize_nodes'], 'QuantizeLinear')}"
    )


def _port(value: dict[str, Any]) -> str:
    return f"{shown(value['name'])}  {value['type']}{_shape(value['shape'])}"


def _shape(shape: list[int | str] | None) -> str:
    return "[...]" if shape is None else f"[{', '.join(shown(str(d)) for d in shape)}]"
