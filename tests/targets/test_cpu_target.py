"""Target strings and processor levels."""

from __future__ import annotations

import pytest

from v4c import targets
from v4c.errors import UnsupportedError
from v4c.targets.cpu import target as cpu


def test_plain_cpu_is_the_highest_level_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for level, features in cpu.LEVELS.items():
        monkeypatch.setattr(cpu, "machine_features", lambda f=features: frozenset(f) | {"unrelated"})
        assert targets.find("cpu").name == f"cpu:{level}"
        assert targets.find("cpu").features == features


def test_a_level_can_be_asked_for_whatever_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "machine_features", lambda: frozenset())
    assert targets.find("cpu:x86-64-v4").features[-1] == "avx512vl"
    assert targets.find("cpu:generic").features == ()


def test_only_a_level_with_vnni_gets_kernels_that_use_it() -> None:
    assert {level for level in cpu.LEVELS if targets.find(f"cpu:{level}").kernels.vnni} == {"x86-64-v4-vnni"}
    assert not targets.find("cpu:generic").kernels.vnni


def test_another_architecture_gets_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    assert targets.find("cpu").name == "cpu:generic"


@pytest.mark.parametrize("text", ["", "gpu", "cpu:avx", "cuda:sm_20", "metal"])
def test_unknown_targets_are_refused(text: str) -> None:
    with pytest.raises(UnsupportedError, match="expected one of"):
        targets.find(text)
