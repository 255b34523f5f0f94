"""Targets by name, and what is read off the processor."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphopt import target as module
from graphopt.errors import InputError
from graphopt.target import get_target, targets, this_cpu


def test_every_profile_is_complete() -> None:
    for name, target in targets().items():
        assert target.name == name
        assert target.description
        assert target.opset >= 13
        assert set(target.needs_integer_output) <= set(target.heavy)
        assert not set(target.shared_scale) & set(target.bridging)
        assert not set(target.heavy) & set(target.reasons)


def test_no_alias_means_two_targets() -> None:
    names = [n for t in targets().values() for n in (t.name, *t.aliases)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["ort-cpu", "ORT_CPU", "ort", "onnxruntime", "avx512_vnni", "AVX2"])
def test_names_are_forgiving(name: str) -> None:
    assert get_target(name).name == "ort-cpu"


@pytest.mark.parametrize(
    ("name", "hint"), [("ort-cpuu", "did you mean 'ort-cpu'"), ("onnxruntme", "did you mean"), ("zzz", "known targets")]
)
def test_an_unknown_name_gets_a_hint(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=f"unknown target '{name}'") as caught:
        get_target(name)
    assert hint in str(caught.value)


@pytest.fixture
def fresh() -> Iterator[None]:
    this_cpu.cache_clear()
    yield
    this_cpu.cache_clear()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("machine", "text", "vnni", "saturates"),
    [
        ("x86_64", "processor : 0\nmodel name\t: Old CPU @ 2GHz\nflags\t\t: fpu avx2 avx512f\n", False, True),
        ("x86_64", "model name\t: New CPU\nflags\t\t: fpu avx2 avx512f avx512_vnni\n", True, False),
        ("AMD64", "model name\t: Hybrid CPU\nflags\t\t: fpu avx2 avx_vnni\n", True, False),
        ("x86_64", "", False, True),
        ("x86_64", None, False, True),
        ("aarch64", "Features\t: fp asimd asimddp\n", False, False),
    ],
)
def test_this_cpu(
    machine: str, text: str | None, vnni: bool, saturates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    if text is not None:
        info.write_text(text)
    monkeypatch.setattr(module, "CPUINFO", info)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "processor", lambda: "")
    cpu = this_cpu()
    assert (cpu.vnni, cpu.saturates) == (vnni, saturates)
    expected = next((line.split(":")[1].strip() for line in (text or "").splitlines() if "model name" in line), machine)
    assert cpu.name == expected
