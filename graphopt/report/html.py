"""The report as one HTML page that needs nothing else: no network, no scripts or fonts from elsewhere.

Every number comes from the report; what is here arranges them, and ``template.html`` draws them. The same report gives
the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.report import figures, measurements, result, tuning
from graphopt.report.listings import ROWS, differing, inspected, ports
from graphopt.report.units import plural, ratio, seconds, size
from graphopt.storage import write_text

if TYPE_CHECKING:
    from jinja2 import Template

Report = dict[str, Any]

_TONES = {
    "changed": "good",
    "unchanged": "plain",
    "skipped": "warn",
    "reverted": "bad",
    "partly reverted": "warn",
}

_LAYER = re.compile(
    r"(?P<operator>\w+): (?P<weights>\w+) weights(?: \((?P<weight_sqnr>[^)]*)\))?"
    r"(?:, input range (?P<range>\[[^\]]*\]) \((?P<input_sqnr>[^)]*)\))?(?:, (?P<remark>.*))?"
)
"""What the quantizing passes say of a layer; what reads differently is shown as it is."""


def write(report: Report, path: str | Path, *, changed: Report | None = None) -> None:
    """Write :func:`render`'s page; what was at ``path`` stays until the new page is complete.

    Raises:
        InputError: it cannot be written there.
    """
    write_text(path, render(report, changed=changed))


def render(report: Report, *, changed: Report | None = None) -> str:
    """The page of any verb's report.

    ``changed``: what :func:`graphopt.report.regions.changed_regions` says of the two models, to draw where they differ.
    """
    # Whatever JSON cannot hold (numpy scalars, NaN) becomes what the JSON report has in its place.
    plain = json.loads(json.dumps(report, default=_basic), parse_constant=lambda _: None)
    models = [m for m in plain.get("models") or (plain.get("input"), plain.get("output")) if isinstance(m, dict)]
    operators = {name for one in models for name in one.get("operators", ())}
    page = {**_EMPTY, **_page(plain), "changed": _regions(changed, operators)}
    page["sections"] = list(_sections(page))
    return _template().render(page)


def _basic(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


@cache
def _template() -> Template:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    loader = FunctionLoader(lambda name: files("graphopt.report").joinpath(name).read_text(encoding="utf-8"))
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["plural"] = plural
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()
    return environment.get_template("template.html")


_SECTIONS = {
    "gates": "Gates",
    "tuning": "Configurations",
    "models": "Models",
    "size": "Size",
    "changed": "Graph",
    "passes": "Passes",
    "layers": "Layers",
    "activations": "Activations",
    "sensitivity": "Sensitivity",
    "outputs": "Outputs",
    "layerwise": "Layer by layer",
    "latency": "Latency",
    "notes": "Notes",
    "made": "Made with",
}
"""The parts of a page in their order, as its table of contents calls them."""

_EMPTY: Report = {
    **{name: [] for name in ("warnings", "notes", "cards", "gates", "files", "models", "operators", "kept", "tables")},
    **{name: [] for name in ("by_type", "by_pass", "ledger", "layers", "activations", "outputs", "latency", "data")},
    **dict.fromkeys(("verdict", "sensitivity", "layerwise", "tuning", "changed", "options")),
    "machine": "",
    "names": ("A", "B"),
    "versions": {"graphopt": version("graphopt")},
}
"""A page with nothing on it."""


def _sections(page: Report) -> Iterable[tuple[str, str]]:
    """What the page has: where it is, and what it is called."""
    shown = {"size": page["by_type"] or page["by_pass"], "passes": page["ledger"], "made": True}
    for name, text in _SECTIONS.items():
        if name == "passes":
            yield from ((part["id"], part["title"]) for part in page["tables"])
        if shown.get(name, page.get(name)):
            yield name, text


def _page(report: Report) -> Report:
    """What the page shows, by what kind of report it is; what is missing is left out of the page."""
    if "verb" not in report:
        return inspected(report.get("models", [report]))
    return differing(report) if report["verb"] == "diff" else _made(report)


def _regions(changed: Report | None, operators: Iterable[str]) -> Report | None:
    """The drawn regions with their captions; ``operators`` are those of both models."""
    if changed is None:
        return None
    counts = [f"{changed[what]} {what}" for what in ("added", "removed", "changed") if changed[what]]
    if not counts:
        return {"text": f"Not drawn: {changed['why']}.", "regions": []} if changed["why"] else None
    more = f" {plural(changed['left_out'], 'more kind')} of place not drawn." if changed["left_out"] else ""
    found = []
    for region in changed["regions"]:
        names, places = region["names"], region["places"]
        title = region["operator"] + (f" in {places} places" if places > 1 else "")
        others = f" and {places - len(names)} more" if places > len(names) else ""
        also = f"; alike: {', '.join(names[1:])}{others}" if places > 1 else ""
        hidden = f"; {plural(region['hidden'], 'more node')} of it not drawn" if region["hidden"] else ""
        label = "; ".join(f"{n['kind']} {n['operator']}" for n in region["nodes"] if n["kind"] != "same")
        found.append({**region, "heading": title, "caption": f"{names[0]}{also}{hidden}", "label": label})
    text = f"Nodes: {', '.join(counts)}. Places that look alike are drawn once, what there is most of first.{more}"
    if {"If", "Loop", "Scan"}.intersection(operators):
        text += " What stands in the bodies of If, Loop and Scan is neither counted nor drawn here."
    return {"text": text, "regions": found}


def _made(report: Report) -> Report:
    """A report of a verb that makes or compares models; an empty value leaves its section out."""
    before, after = report["models"] if "models" in report else (report["input"], report.get("output"))
    names = ("A", "B") if "models" in report else ("original", "result")
    ledger = report.get("ledger") or []
    notes = [text.plain for text in result.notes(report)]
    latency = report.get("latency") or {}
    return {
        "verb": report["verb"],
        "title": _title(report, before, after),
        "machine": _machine(report),
        "verdict": _verdict(report),
        "warnings": [n.removeprefix("WARNING: ") for n in notes if n.startswith("WARNING")],
        "notes": [n.removeprefix("note: ") for n in notes if not n.startswith("WARNING")],
        "cards": figures.cards(report, before, after),
        "gates": report.get("gates") or [],
        "names": names,
        "files": _files(before, after, names),
        "models": _models(before, after),
        "operators": result.changed_operators(before["operators"], after["operators"]) if after else [],
        "kept": _kept(before, after) if after else [],
        "by_type": figures.by_type(before, after),
        "by_pass": figures.by_pass(before, after, ledger),
        "ledger": [_entry(entry) for entry in ledger],
        "ledger_time": seconds(sum(entry["seconds"] for entry in ledger)),
        "layers": [_layers(entry) for entry in ledger if _quantizing(entry)],
        "tables": ports(report),
        "activations": list(filter(None, map(measurements.activations, ledger))),
        "sensitivity": measurements.sensitivity(report),
        "layerwise": measurements.layerwise(report),
        "tuning": tuning.page(report.get("tuning")),
        "outputs": [figures.output_cells(o) for o in (report.get("comparison") or {}).get("outputs", [])],
        "compared": (report.get("comparison") or {}).get("samples"),
        "latency": figures.latencies(latency),
        "latency_remark": _latency_remark(report),
        "data": _data(report),
        "versions": report["versions"],
        "options": list(_flat(report["options"])),
        "schema": report["schema_version"],
    }


def _name(model: Report | None, fallback: str) -> str:
    path = (model or {}).get("path")
    return "stdout" if path == "-" else Path(path).name if path else fallback


def _title(report: Report, before: Report, after: Report | None) -> tuple[str, str, str]:
    """(what, sign, what)."""
    if "models" in report:
        return _name(before, "A"), "against", _name(after, "B")
    if report["verb"] == "sensitivity":
        return _name(before, "model"), "", ""
    return _name(before, "model"), "→", _name(after, "nothing written" if report.get("exit_code") else "result")


def _machine(report: Report) -> str:
    machine, versions = report["machine"], report["versions"]
    cpu = f"{machine['cpu']}{' with VNNI' if machine.get('vnni') else ''}"
    return f"{report['options'].get('target', '')}, ONNX Runtime {versions['onnxruntime']}, {cpu}".removeprefix(", ")


def _verdict(report: Report) -> tuple[str, str, str]:
    """(tone, the word, why)."""
    if report["verb"] == "sensitivity":
        return measurements.blame(report)
    gates = report.get("gates") or []
    failed = [gate for gate in gates if not gate["passed"]]
    error, comparing = report.get("error"), "models" in report
    if failed:
        what = "1 gate failed" if len(failed) == 1 else f"{len(failed)} gates failed"
        return "bad", what + ("" if comparing else ": nothing was written"), error or ""
    if error:
        return "bad", "Nothing was done" if report.get("exit_code") == 3 else "Failed: nothing was written", error
    written = (report.get("output") or {}).get("path")
    place = f"written: {written}" if written and written != "-" else ""
    compared = (report.get("comparison") or {}).get("samples")
    if compared:
        place = "; ".join(filter(None, (place, f"compared on {plural(compared, 'sample')}")))
    if gates:
        return (
            "good",
            {1: "The gate holds", 2: "Both gates hold"}.get(len(gates), f"All {len(gates)} gates hold"),
            place,
        )
    outputs = (report.get("comparison") or {}).get("outputs") or []
    if outputs and all(output["identical"] for output in outputs):
        return "good", "The outputs are identical", place
    if report["verb"] == "extract":
        return "plain", f"{report['output']['nodes']} of {plural(report['input']['nodes'], 'node')}", place
    return "plain", "No tolerance was asked for" if comparing else "No gate was asked for", place


def _files(before: Report, after: Report | None, names: tuple[str, str]) -> list[tuple[str, str, list[str]]]:
    """(role, remark, file and hash)."""
    rows = [(names[0], "", [before["path"] or "(model)", f"sha256:{before['sha256'] or '?'}"])]
    if after is not None:
        place = {None: "not written", "-": "stdout"}.get(after["path"], after["path"])
        rows.append((names[1], "", [place, f"sha256:{after['sha256'] or '?'}"]))
    return rows


def _models(before: Report, after: Report | None) -> list[tuple[str, str, str, str]]:
    """(what, before, after, ratio), one a row."""
    rows = []
    for title, key in (("file size", "bytes"), ("weights", "bytes_by_type"), ("nodes", "nodes")):
        shown = str if key == "nodes" else size
        a, b = (sum(m[key].values()) if key == "bytes_by_type" else m[key] for m in (before, after or before))
        rows.append((title, shown(a), shown(b) if after else "", ratio(b, a) if after else ""))
    for title, key in (("opset", "opset"), ("IR version", "ir_version")):
        rows.append((title, str(before[key]), str(after[key]) if after else "", ""))
    return rows


def _kept(before: Report, after: Report) -> list[str]:
    a, b = before["operators"], after["operators"]
    return [f"{a[name]} {name}" for name in sorted(a) if b.get(name) == a[name]]


def _entry(entry: Report) -> dict[str, Any]:
    """A pass of the ledger; skips for the same reason are together."""
    groups: dict[str, list[str]] = {}
    for skip in entry["skipped"]:
        groups.setdefault(skip["reason"], []).append(skip["site"])
    (nodes, nodes_after), (weights, weights_after) = entry["nodes"], entry["weight_bytes"]
    summary = [plural(len(entry["changes"]), "change")] if entry["changes"] else []
    summary += [plural(len(entry["skipped"]), "skip")] if entry["skipped"] else []
    summary += [f"{nodes} → {nodes_after} nodes"] if nodes != nodes_after else []
    summary += [f"{size(weights)} → {size(weights_after)}"] if abs(weights_after - weights) > weights / 100 else []
    reason = entry["reason"] or (next(iter(groups), None) if not entry["changes"] else None)
    return {
        "name": entry["pass"],
        "status": entry["status"],
        "tone": _TONES.get(entry["status"], "plain"),
        "contract": entry["contract"],
        "summary": [*summary, seconds(entry["seconds"])],
        "reason": reason,
        "changes": entry["changes"][:ROWS],
        "count": len(entry["changes"]),
        "skips": sorted(groups.items(), key=lambda group: -len(group[1])),
        "facts": [
            *_flat(entry["options"]),
            *_flat({k: v for k, v in entry["metrics"].items() if not k.startswith("ranges")}),
        ],
        "reproducer": entry["reproducer"],
    }


def _told(metrics: Report) -> Report:
    """The metrics that are numbers; ranges are pictures of their own."""
    return {key: value for key, value in metrics.items() if not key.startswith("ranges")}


def _quantizing(entry: Report) -> bool:
    return entry["pass"].startswith("quantize-") and any(c["action"] == "quantize" for c in entry["changes"])


def _layers(entry: Report) -> dict[str, Any]:
    """What a quantizing pass did, layer by layer; columns that nothing was said for are left out.

    What is no layer with weights of its own is told below them.
    """
    rows: list[dict[str, Any]] = []
    others: dict[str, list[tuple[str, str]]] = {}
    for change in (c for c in entry["changes"] if c["action"] == "quantize"):
        match = _LAYER.fullmatch(change["detail"])
        if match:
            rows.append({"site": change["site"], **match.groupdict("")})
        else:
            operator, _, what = change["detail"].rpartition(": ")
            others.setdefault(what, []).append((change["site"], operator))
    best = max(
        (figures.number(r[key]) for r in rows for key in ("weight_sqnr", "input_sqnr") if _finite(r[key])), default=0.0
    )
    for row in rows:
        for key in ("weight_sqnr", "input_sqnr"):
            row[f"{key}_bar"] = (
                min(100.0, figures.Scale(0, best).at(figures.number(row[key]))) if _finite(row[key]) else None
            )
            row[f"{key}_value"] = figures.number(row[key]) if row[key] else ""
    covered = result.coverage(entry)
    return {
        "name": entry["pass"],
        "rows": rows,
        "others": list(others.items()),
        "shown": {key: any(row[key] for row in rows) for key in _LAYER.groupindex},
        "coverage": covered.plain if covered else "",
        "left": len(entry["skipped"]),
    }


def _finite(text: str) -> bool:
    return text != "" and figures.number(text) != float("inf")


def _latency_remark(report: Report) -> str:
    found = report.get("latency_ratio")
    if not found:
        return ""
    return (
        f"Timed by turns. The ratio is the median over pairs of runs: {found['median']:.3f}x, and in 90 % of resamples "
        f"from {found['low']:.3f}x to {found['high']:.3f}x. A bar goes from the first quartile to the third, its line "
        "is the median."
    )


def _data(report: Report) -> list[tuple[str, str, list[str]]]:
    """(role, how many, source and hash)."""
    rows = []
    for key, role in (("data", "data" if "models" in report else "calibration"), ("eval_data", "evaluation")):
        found = report.get(key)
        if found:
            left_out = f", {len(found['skipped'])} left out" if found["skipped"] else ""
            kind = ", synthetic" if found["synthetic"] else ""
            digest = [f"sha256:{found['sha256']}"] if found["sha256"] else []
            rows.append((role, f"{plural(found['samples'], 'sample')}{left_out}{kind}", [found["source"], *digest]))
    return rows


def _flat(values: Report, prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is None or value in ([], ""):
            yield prefix + key, "not given"
        elif isinstance(value, list):
            yield prefix + key, ", ".join(map(str, value))
        else:
            yield prefix + key, str(value).lower() if isinstance(value, bool) else str(value)
