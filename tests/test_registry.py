"""Names, options and plug-ins."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest

from graphopt import registry
from graphopt.base import Pass
from graphopt.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", registry.PASSES)
def test_key_name_file_and_class_agree(name: str) -> None:
    kind = registry.get(name)
    assert kind.name == name
    assert kind.contract in ("exact", "approximate")
    assert kind.__module__ == f"graphopt.passes.{name.replace('-', '_')}"
    assert (ROOT / "passes" / f"{name.replace('-', '_')}.py").is_file()
    assert kind.__name__ == "".join(part.capitalize() for part in name.split("-"))
    assert kind.__doc__
    assert not kind.__doc__.startswith(f"{kind.__name__}(")  # what dataclass writes where there is none
    assert importlib.import_module(kind.__module__).__doc__


@pytest.mark.parametrize("name", registry.PASSES)
def test_a_pass_is_a_frozen_dataclass(name: str) -> None:
    made = registry.create(name, {})
    assert dataclasses.is_dataclass(made)
    assert made.options() == {}
    assert str(made) == name
    for field in dataclasses.fields(made):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, None)


def test_every_file_in_passes_is_registered() -> None:
    files = {p.stem.replace("_", "-") for p in (ROOT / "passes").glob("*.py") if not p.stem.startswith("_")}
    assert files == set(registry.PASSES)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fold-constant", {}, r"^unknown pass 'fold-constant'; did you mean 'fold-constants'\?$"),
        ("xyzzy", {}, r"^unknown pass 'xyzzy'; known passes: upgrade-opset, fold-overridable"),
        ("simplify", {"timeut": 3}, r"^pass 'simplify' has no option 'timeut'; did you mean 'timeout'\?$"),
        ("fold-constants", {"zzz": 3}, r"no option 'zzz'; it has: allow-growth, max-result$"),
        ("remove-unused", {"zzz": 3}, r"no option 'zzz'; it has: none$"),
        ("simplify", {"timeout": "3"}, r"^pass 'simplify': option 'timeout' is '3', it must be a number \(default 300"),
        ("simplify", {"timeout": True}, "it must be a number"),
        ("upgrade-opset", {"to": 13.0}, "option 'to' is 13.0, it must be a whole number"),
        ("upgrade-opset", {"to": True}, "it must be a whole number"),
        ("fold-constants", {"allow-growth": 1}, "it must be true or false"),
        ("quantize-static", {"observer": 3}, "it must be a string"),
        ("quantize-static", {"exclude": "Conv"}, "it must be a list .each item a string."),
        ("quantize-static", {"exclude": ["Conv", 1]}, "it must be a list .each item a string."),
        ("quantize-static", {"observer": "mean"}, "observer is 'mean'; one of"),
        ("fold-constants", {"max-result": 1, "max_result": 2}, "given twice"),
    ],
)
def test_mistakes_get_one_line_with_the_remedy(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        registry.create(name, options)
    assert "\n" not in str(caught.value)


def test_options_in_either_spelling() -> None:
    for spelling in ("max-result", "max_result"):
        assert registry.create("fold-constants", {spelling: 5}).options() == {"max-result": 5}
    assert registry.create("simplify", {"timeout": 3}).options() == {"timeout": 3}
    assert registry.create("quantize-static", {"exclude": ["a", "b"]}).options() == {"exclude": ["a", "b"]}


# --- plug-ins ---

PLUGIN = '''
"""An example plug-in."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from graphopt.base import Change, Context, Contract, Pass, PassResult


@dataclass(frozen=True)
class NameNodes(Pass):
    """Gives every node a name."""

    prefix: str
    start: int | None = None
    style: Literal["plain", "upper"] = "plain"
    extra: tuple[float, ...] = field(default_factory=tuple)
    name: ClassVar[str] = "name-nodes"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: Any, context: Context) -> PassResult:
        result = PassResult()
        for index, node in enumerate(model.graph):
            node.name = f"{self.prefix}{index}"
            result.changes.append(Change("name", node.name))
        return result


@dataclass(frozen=True)
class Misnamed(NameNodes):
    name: ClassVar[str] = "something-else"


class Plain(Pass):
    name = "plain"


def function():
    pass
'''
ENTRIES = """[graphopt.passes]
name-nodes = graphopt_example.passes:NameNodes
other-name = graphopt_example.passes:Misnamed
plain = graphopt_example.passes:Plain
function = graphopt_example.passes:function
missing = graphopt_example.passes:Missing
broken = graphopt_example.broken:Any
fold-constants = graphopt_example.passes:NameNodes
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``pip install graphopt-example`` leaves behind."""
    package = tmp_path / "graphopt_example"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "passes.py").write_text(PLUGIN)
    (package / "broken.py").write_text("1 / 0\n")
    info = tmp_path / "graphopt_example-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: graphopt-example\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("graphopt_example", "graphopt_example.passes"):
        monkeypatch.delitem(importlib.import_module("sys").modules, name, raising=False)


@pytest.mark.usefixtures("plugin")
def test_installed_plugins_are_found() -> None:
    assert registry.available()["name-nodes"] == "graphopt_example.passes:NameNodes"
    made = registry.create("name-nodes", {"prefix": "n", "start": 3, "style": "upper", "extra": [1, 2.5]})
    assert isinstance(made, Pass)
    assert made.options() == {"prefix": "n", "start": 3, "style": "upper", "extra": [1, 2.5]}


@pytest.mark.usefixtures("plugin")
def test_a_plugin_cannot_replace_one_of_ours() -> None:
    assert registry.available()["fold-constants"] == registry.PASSES["fold-constants"]
    assert registry.get("fold-constants").__module__ == "graphopt.passes.fold_constants"


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("name-node", {}, "did you mean 'name-nodes'"),
        ("name-nodes", {}, "^pass 'name-nodes' needs the option 'prefix'; add prefix = ...$"),
        ("name-nodes", {"prefix": "n", "start": "3"}, "must be a whole number .default None.$"),
        ("name-nodes", {"prefix": "n", "style": "lower"}, "must be one of 'plain', 'upper'"),
        ("name-nodes", {"prefix": 4}, "option 'prefix' is 4, it must be a string$"),
        ("other-name", {}, "calls itself 'something-else'; its entry point must say so too"),
        ("plain", {}, "is no graphopt Pass: subclass graphopt.base.Pass, a dataclass"),
        ("function", {}, "is no graphopt Pass"),
        ("missing", {}, "cannot be imported from graphopt_example.passes:Missing: AttributeError.*package whole"),
        ("broken", {}, "cannot be imported from .*ZeroDivisionError: division by zero"),
    ],
)
def test_a_plugin_that_does_not_work_is_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        registry.create(name, options)
    assert "\n" not in str(caught.value)
