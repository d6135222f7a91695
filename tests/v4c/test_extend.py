"""Extensions from outside: names are their own, passes run where they say, and a package that fails to load is named.

What they do to a compiled model is in tests/examples: ``add_custom_op.py``, ``add_pass.py``, ``add_target.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any

import onnx_ir as ir
import pytest

from v4c import extend, targets
from v4c.errors import UnsupportedError
from v4c.passes.onnx.rewriting import PassReport
from v4c.passes.pipeline import ONNX_PASSES, PassOptions, run_onnx_passes
from v4c.targets.cpu.lowering import CPUKernels

runs: list[str] = []


class Mine:
    pass_name = "my-pass"

    def run(self, model: ir.Model) -> PassReport:
        runs.append(self.pass_name)
        return PassReport(self.pass_name, 3)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Leave the process as it was."""
    runs.clear()
    yield
    extend.remove_onnx_pass("my-pass")
    targets._added.clear()


def empty_model() -> ir.Model:
    return ir.Model(ir.Graph([], [], nodes=[], name="g", opset_imports={"": 23}), ir_version=11)


@pytest.mark.parametrize("before", [None, "fuse-swiglu", ONNX_PASSES[0].pass_name])
def test_a_pass_runs_where_it_says(before: str | None) -> None:
    extend.add_onnx_pass(Mine, before)
    names = [report.name for report in run_onnx_passes(empty_model(), PassOptions())]
    ours = [p.pass_name for p in ONNX_PASSES]
    place = len(ours) if before is None else ours.index(before)
    assert names == [*ours[:place], "my-pass", *ours[place:]]
    assert runs == ["my-pass"]


def test_a_pass_can_be_switched_off_and_removed() -> None:
    extend.add_onnx_pass(Mine)
    run_onnx_passes(empty_model(), PassOptions.checked(["my-pass"]))
    extend.remove_onnx_pass("my-pass")
    run_onnx_passes(empty_model(), PassOptions())
    assert runs == []
    with pytest.raises(UnsupportedError, match="pass 'my-pass': cannot be disabled"):
        PassOptions.checked(["my-pass"])
    extend.remove_onnx_pass("fuse-swiglu")
    assert len(run_onnx_passes(empty_model(), PassOptions())) == len(ONNX_PASSES), "those of v4c stay"


def test_names_of_passes_are_their_own() -> None:
    extend.add_onnx_pass(Mine)
    for name in ("my-pass", "fuse-swiglu", "share-layers", "fuse-elementwise"):
        taken = type("Taken", (Mine,), {"pass_name": name})
        with pytest.raises(UnsupportedError, match=f"pass '{name}': expected a name of its own"):
            extend.add_onnx_pass(taken)
    other = type("Other", (Mine,), {"pass_name": "other"})
    with pytest.raises(UnsupportedError, match="pass 'nothing': expected one of fuse-rms-norm, "):
        extend.add_onnx_pass(other, before="nothing")


def test_a_target_is_found_by_its_name() -> None:
    asked: list[str] = []

    def parse(variant: str) -> Any:
        asked.append(variant)
        return f"mychip of {variant}"

    extend.add_target("mychip", parse)
    assert targets.find("mychip:v2") == "mychip of v2"
    assert targets.find("mychip") == "mychip of "
    assert asked == ["v2", ""]
    with pytest.raises(UnsupportedError, match=r"target 'nochip': expected one of cpu, .*, mychip "):
        targets.find("nochip")
    for name in ("cpu", "ascend", "mychip", "a:b", ""):
        with pytest.raises(UnsupportedError, match="expected a name of its own"):
            extend.add_target(name, parse)


def test_a_kernel_of_v4c_is_not_replaced() -> None:
    for name in ("ClampedSwiGLU", "GroupedExperts"):
        with pytest.raises(UnsupportedError, match=f"operator {name}: expected one without a CPU kernel"):
            extend.add_kernel(name, lambda inputs, attributes: extend.Kernel(CPUKernels, ()))


def test_installed_packages_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("tests.v4c.test_extend.register", lambda: calls.append(1), raising=False)
    entry = EntryPoint("mine", "tests.v4c.test_extend:register", extend.GROUP)
    monkeypatch.setattr(extend, "entry_points", lambda group: [entry] if group == extend.GROUP else [])
    extend.load_installed.cache_clear()
    assert extend.load_installed() == extend.load_installed() == ("mine",)
    assert calls == [1]
    broken = EntryPoint("broken", "tests.v4c.nothing:register", extend.GROUP)
    monkeypatch.setattr(extend, "entry_points", lambda group: [broken])
    extend.load_installed.cache_clear()
    with pytest.raises(UnsupportedError) as caught:
        extend.load_installed()
    assert str(caught.value).startswith("extension broken (tests.v4c.nothing:register): expected it to load, found ")
    monkeypatch.undo()
    extend.load_installed.cache_clear()
