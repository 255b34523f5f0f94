"""The gates of a report as JUnit XML, which every CI system shows: one test case a gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from graphopt.storage import write_text

_NO_XML = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 127, 65534, 65535), "?")


def write(report: dict[str, Any], path: str | Path) -> None:
    """Write :func:`render`'s document; what was at ``path`` stays until it is complete.

    Raises:
        InputError: it cannot be written there.
    """
    write_text(path, render(report))


def render(report: dict[str, Any]) -> str:
    """One suite named after the verb; a gate that does not hold is a failure, any other error an error.

    The case ``done`` is there always, so that a run without gates counts as one test.
    """
    gates = report.get("gates") or []
    failed = [gate for gate in gates if not gate["passed"]]
    error = report.get("error") if report.get("exit_code") and not failed else None
    models = report.get("models") or [report.get("input") or {}]
    where = " ".join(str(model.get("path") or "model") for model in models)
    suite = f"graphopt {report.get('verb', '')}".strip()
    cases = [_case(where, f"{gate['gate']} {gate['asked']}", gate["measured"], gate["passed"]) for gate in gates]
    body = f"      <error message={_quoted(error)}/>\n" if error else ""
    cases.append(f"    <testcase classname={_quoted(where)} name={_quoted('done')}>\n{body}    </testcase>\n")
    counts = f'tests="{len(cases)}" failures="{len(failed)}" errors="{int(bool(error))}"'
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<testsuites {counts}>\n  <testsuite name={_quoted(suite)} {counts}>\n"
        f"{''.join(cases)}  </testsuite>\n</testsuites>\n"
    )


def _case(where: str, name: str, measured: str, passed: bool) -> str:
    said = f"      <system-out>{escape(measured.translate(_NO_XML))}</system-out>\n"
    said = said if passed else f"      <failure message={_quoted(measured)}/>\n"
    return f"    <testcase classname={_quoted(where)} name={_quoted(name)}>\n{said}    </testcase>\n"


def _quoted(text: str) -> str:
    return quoteattr(text.translate(_NO_XML))
