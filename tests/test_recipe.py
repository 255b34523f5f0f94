"""Recipes: what is written is what is read, and every mistake is one line that names its place."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import registry
from graphopt.base import VERIFY, Gates, Pass, Repeat
from graphopt.errors import InputError
from graphopt.foreign import ForeignPass, foreign
from graphopt.observers import OBSERVERS
from graphopt.recipe import Recipe, parse, read, write

CHOICES: dict[str, list[Any]] = {
    "observer": [o for o in OBSERVERS if o != "mse"],
    "weights": ["s8", "s7", "u8"],
    "of": ["size", "channels", "macs"],
    "importance": ["l2", "l1", "loss"],
    "optimizer": ["sgd"],
    "scales": ["none", "all"],
    "loss": ["kl", "mse:0.5", "cross-entropy", "own.onnx:2"],
    "match": ["a=b", "c=d=e"],
    "repair": ["none", "asymmetric", "symmetric", "moments", "auto"],
    "format": ["uint4", "fp16", "palette8"],
    "round_to": ["nearest", "fitted", "data"],
    "block": [16, 32, 128, 256],
    "sparsity": ["0.3", 0.25, "2:4"],
    "update": ["none", "data"],
    "kernel": ["ort"],
    "max_drop": ["1%", "0.01", 0.02],
    "assign": ["embedding=int8", "w=uint4", "a=b=float"],
}
BOUNDS: dict[str, tuple[float, float]] = {
    "percentile": (50.5, 100.0),
    "to": (1, 30),
    "left": (0.01, 0.99),
    "margin": (1, 100),
    "multiple": (1, 64),
    "steps": (1, 10**6),
    "batch": (1, 512),
    "patience": (1, 99),
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def surgery(proto: onnx.ModelProto) -> onnx.ModelProto:
    return proto


def values(name: str, hint: Any) -> st.SearchStrategy[Any]:
    """Values of an option, as its annotation and what we know of it allow."""
    if name in CHOICES and typing.get_origin(hint) is not tuple:
        return st.sampled_from(CHOICES[name])
    if hint is bool:
        return st.booleans()
    if hint is int:
        low, high = BOUNDS.get(name, (0, 2**40))
        return st.integers(int(low), int(high))
    if hint is float:
        low, high = BOUNDS.get(name, (0.001, 1e6))
        return st.floats(low, high)
    if hint is str:
        return TEXT
    if typing.get_origin(hint) is tuple:
        return st.lists(values(name, typing.get_args(hint)[0]), max_size=3).map(tuple)
    raise AssertionError(f"no strategy for {name}: {hint}; add one here")


def passes(name: str) -> st.SearchStrategy[Pass]:
    kind = registry.get(name)
    hints = typing.get_type_hints(kind)
    options = {f.name: values(f.name, hints[f.name]) for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return st.fixed_dictionaries({}, optional=options).map(lambda chosen: kind(**chosen))


any_pass = st.one_of(
    *(passes(name) for name in registry.PASSES),
    st.sampled_from(["exact", "approximate"]).map(lambda c: foreign(surgery, contract=c)),  # type: ignore[arg-type]
)
any_gates = st.builds(
    Gates,
    max_drop=st.none() | st.sampled_from(["1%", "0.01"]),
    min_sqnr=st.none() | st.floats(0, 90),
    min_speedup=st.none() | st.floats(0, 10),
    max_size=st.none() | st.sampled_from(["25MB", "0.3"]),
    certify=st.booleans(),
)
any_recipe = st.builds(
    Recipe,
    passes=st.lists(
        any_pass | st.builds(Repeat, st.lists(any_pass, min_size=1, max_size=3).map(tuple), st.integers(1, 32)),
        max_size=4,
    ).map(tuple),
    model=st.none() | TEXT,
    output=st.none() | TEXT,
    data=st.none() | TEXT,
    eval_data=st.none() | TEXT,
    metric=st.none() | TEXT,
    target=TEXT,
    verify=st.sampled_from(VERIFY),
    seed=st.integers(-(2**40), 2**40),
    this_cpu=st.booleans(),
    gates=any_gates,
)


@settings(deadline=None, max_examples=200)
@given(any_recipe)
def test_what_is_written_is_read_back(made: Recipe) -> None:
    text = write(made)
    tomllib.loads(text)
    assert parse(text) == made
    assert write(parse(text)) == text


@pytest.mark.parametrize("name", registry.PASSES)
def test_every_pass_with_every_option_set(name: str) -> None:
    """Each option in turn, and all at once, at a value that is not its default."""
    kind = registry.get(name)
    hints = typing.get_type_hints(kind)
    other: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        hint = hints[field.name]
        default = field.default
        if field.name in CHOICES:
            first = CHOICES[field.name][0]
            other[field.name] = (first,) if typing.get_origin(hint) is tuple else first
        elif hint is bool:
            other[field.name] = not default
        elif hint in (int, float):
            other[field.name] = hint(default - 1) if default >= 1 else hint(default / 2) if default else hint(10)
        elif field.name in ("teacher", "checkpoint", "resume"):
            other[field.name] = "a file"
        elif typing.get_origin(hint) is tuple:
            other[field.name] = ("re:^a.*\\d$", 'quote " and ö 漢')
        else:
            raise AssertionError(f"no other value for {name}.{field.name}: {hint}; add one here")
    for chosen in ({}, other, *({k: v} for k, v in other.items())):
        made = Recipe(passes=(kind(**chosen),))
        assert parse(write(made)) == made
        assert parse(write(made)).passes[0].options().keys() == {k.replace("_", "-") for k in chosen}  # type: ignore[union-attr]


def test_a_recipe_reads_as_one_would_write_it() -> None:
    made = parse(
        """
        target = "ort-cpu"
        verify = "each"
        seed = 3
        this-cpu = true

        [gates]
        max-drop = 0.01
        min-sqnr = 0
        max-size = 0.3

        [[pass]]
        repeat = 4
        [[pass.pass]]
        use = "fold-constants"
        allow-growth = true
        [[pass.pass]]
        use = "remove-unused"

        [[pass]]
        use = "quantize-static"
        observer = "min-max"
        percentile = 99
        exclude = ["Gemm"]
        """
    )
    assert made.gates == Gates(max_drop="0.01", min_sqnr=0, max_size="0.3")
    assert made.gates.asked() == {"max_drop": "0.01", "min_sqnr": 0, "max_size": "0.3"}
    repeat, last = made.passes
    assert isinstance(repeat, Repeat)
    assert (repeat.times, [p.name for p in repeat.passes]) == (4, ["fold-constants", "remove-unused"])
    assert isinstance(last, Pass)
    assert last.options() == {"observer": "min-max", "percentile": 99, "exclude": ["Gemm"]}
    assert (made.verify, made.seed, made.this_cpu) == ("each", 3, True)
    assert parse("") == Recipe()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("target = ", "^FILE: not valid TOML: "),
        ("tagret = 'x'", r"^FILE: unknown key 'tagret' in the recipe; did you mean 'target'\?$"),
        ("xyzzy = 1", "unknown key 'xyzzy' in the recipe; known keys: model, "),
        ("seed = 'x'", "'seed' in the recipe is 'x'; it must be a whole number"),
        ("seed = true", "'seed' in the recipe is True; it must be a whole number"),
        ("this-cpu = 1", "must be true or false"),
        ("model = 3", "'model' in the recipe is 3; it must be a string"),
        ("verify = 'sometimes'", "verify is 'sometimes'; one of end, each, off"),
        ("gates = 3", "'gates' in the recipe is 3; it must be a table"),
        ("[gates]\nmin-snqr = 3", r"unknown key 'min-snqr' in \[gates\]; did you mean 'min-sqnr'"),
        ("[gates]\nmin-sqnr = '30'", r"'min-sqnr' in \[gates\] is '30'; it must be a number"),
        ("[gates]\nmax-drop = true", r"'max-drop' in \[gates\] is True; it must be a string"),
        ("[gates]\ncertify = 'yes'", "must be true or false"),
        ("[pass]\nuse = 'simplify'", r"'pass' in the recipe is .*; it must be a list of tables: write \[\[pass\]\]"),
        ("pass = ['simplify']", r"pass 1 is 'simplify', not a table; write \[\[pass\]\]"),
        ("[[pass]]\n[[pass]]\nuse = 'simplify'", "pass 1 has no 'use'"),
        ("[[pass]]\nuse = 3", "pass 1 has no 'use'"),
        ("[[pass]]\nuse = 'simplfy'", "unknown pass 'simplfy'; did you mean 'simplify'"),
        ("[[pass]]\nuse = 'simplify'\ntimeout = 'long'", "pass 'simplify': option 'timeout' is 'long'"),
        (
            "[[pass]]\nuse = 'simplify'\ntime-out = 3",
            "pass 'simplify' has no option 'time-out'; did you mean 'timeout'",
        ),
        ("[[pass]]\nrepeat = 0\n[[pass.pass]]\nuse = 'simplify'", "'repeat' in pass 1 is 0; .* from 1 to 32"),
        ("[[pass]]\nrepeat = 33\n[[pass.pass]]\nuse = 'simplify'", "'repeat' in pass 1 is 33"),
        ("[[pass]]\nrepeat = true\n[[pass.pass]]\nuse = 'simplify'", "it must be a whole number"),
        ("[[pass]]\nrepeat = 3", r"the repeat in pass 1 holds no passes; add \[\[pass.pass\]\] tables"),
        ("[[pass]]\nrepeat = 3\nuse = 'simplify'", r"unknown key 'use' in pass 1 \(a repeat\)"),
        (
            "[[pass]]\nrepeat = 3\n[[pass.pass]]\nrepeat = 2\n[[pass.pass.pass]]\nuse = 'simplify'",
            "pass 1.1 is a repeat within a repeat; list its passes instead",
        ),
        ("[[pass]]\nuse = 'no_such_module:f'", "cannot import pass 'no_such_module:f'"),
    ],
)
def test_mistakes_are_one_line_that_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message.replace("FILE", str(path))) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such recipe: .*missing\.toml; check the path"):
        read(tmp_path / "missing.toml")
    with pytest.raises(InputError, match="cannot read recipe"):
        read(tmp_path)
    (tmp_path / "latin.toml").write_bytes("target = 'ä'".encode("latin-1"))
    with pytest.raises(InputError, match=r"cannot read recipe .*latin\.toml"):
        read(tmp_path / "latin.toml")
    (tmp_path / "bom.toml").write_bytes(b"\xef\xbb\xbfseed = 3\n")  # as Windows' Notepad saves it
    assert read(tmp_path / "bom.toml").seed == 3


@pytest.mark.parametrize("folder", ["plain", "with spaces", "漢字 と かな", 'quote\'s "double"'])
def test_paths_are_relative_to_the_recipe(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / folder
    home.mkdir()
    made = Recipe(
        model="in put.onnx",
        output="結果/out.onnx",
        data="random_samples.npz",
        eval_data="../shared/eval.npz",
        metric="judge.py:score",
    )
    (home / "r.toml").write_text(write(made), encoding="utf-8")
    found = read(home / "r.toml")
    assert found.model == str(home / "in put.onnx")
    assert found.output == str(home / "結果" / "out.onnx")
    assert found.data == str(home / "random_samples.npz")
    assert found.eval_data == str(home / ".." / "shared" / "eval.npz")
    assert found.metric == f"{home / 'judge.py'}:score"
    monkeypatch.chdir(home)
    assert read("r.toml").model == "in put.onnx"
    # What was read may be written elsewhere and still names the same files.
    assert parse(write(found), tmp_path) == found


def test_what_is_no_path_stays_as_it_is(tmp_path: Path) -> None:
    text = 'model = "-"\noutput = "/abs/out.onnx"\ndata = "random:8"\neval-data = "random"\nmetric = "accuracy"\n'
    found = parse(text, tmp_path)
    assert (found.model, found.output, found.data) == ("-", "/abs/out.onnx", "random:8")
    assert (found.eval_data, found.metric) == ("random", "accuracy")


def test_a_pass_class_can_be_named_by_module() -> None:
    found = parse('[[pass]]\nuse = "graphopt.passes.simplify:Simplify"\ntimeout = 3\n')
    assert found.passes == (registry.create("simplify", {"timeout": 3}),)
    assert 'use = "simplify"' in write(found)
    with pytest.raises(InputError, match="has no option 'view'"):
        parse('[[pass]]\nuse = "graphopt.passes.simplify:Simplify"\nview = "ir"\n')


def test_foreign_functions_are_written_with_view_and_contract() -> None:
    made = Recipe(passes=(foreign(surgery, contract="approximate"),))
    text = write(made)
    assert f'use = "{__name__}:surgery"\nview = "proto"\ncontract = "approximate"' in text
    again = parse(text).passes[0]
    assert isinstance(again, ForeignPass)
    assert again.function is surgery


@given(TEXT)
def test_any_string_survives(text: str) -> None:
    assert parse(write(Recipe(metric=text))).metric == text
