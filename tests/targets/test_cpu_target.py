"""Target strings and processor levels."""

from __future__ import annotations

import pytest

from v4c import targets
from v4c.errors import UnsupportedError
from v4c.passes.relax.layouts import PAIRS
from v4c.targets.cpu import target as cpu
from v4c.targets.cpu.levels import dot_level


def test_plain_cpu_is_the_highest_level_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for level, features in cpu.LEVELS.items():
        monkeypatch.setattr(cpu, "machine_features", lambda f=features: frozenset(f) | {"unrelated"})
        assert targets.find("cpu").name == f"cpu:{level}"
        assert targets.find("cpu").features == features


def test_a_level_can_be_asked_for_whatever_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "machine_features", lambda: frozenset())
    assert targets.find("cpu:x86-64-v4").features[-1] == "avx512vl"
    assert targets.find("cpu:generic").features == ()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4", "fp8", "fp4", PAIRS])
def test_only_a_level_with_the_instruction_gets_kernels_that_use_it(dtype: str) -> None:
    """The product's last argument but the schedule."""
    levels = {"int8": 2, "int4": 2, "fp4": 2, PAIRS: 1}.get(dtype, 0)
    uses = {
        level: targets.find(f"cpu:{level}").kernels.linear((64,), 64, dtype, None).arguments[-2]
        for level in (*cpu.LEVELS, cpu.GENERIC)
    }
    assert [level for level, used in uses.items() if used] == ["x86-64-v4-vnni", "x86-64-v4-bf16"][2 - levels :]


def test_a_schedule_is_looked_up_by_the_lowest_level_of_the_same_code() -> None:
    assert {d: dot_level("x86-64-v4-bf16", d) for d in ("float32", "int8", PAIRS)} == {
        "float32": "x86-64-v4",
        "int8": "x86-64-v4-vnni",
        PAIRS: "x86-64-v4-bf16",
    }
    assert dot_level("x86-64-v4-vnni", PAIRS) == "x86-64-v4"
    assert dot_level("generic", "int8") == "generic"


def test_another_architecture_gets_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    assert targets.find("cpu").name == "cpu:generic"


@pytest.mark.parametrize("text", ["", "gpu", "cpu:avx", "cuda:sm_20", "metal"])
def test_unknown_targets_are_refused(text: str) -> None:
    with pytest.raises(UnsupportedError, match="expected one of"):
        targets.find(text)
