"""Schedules: what they refuse, that defaults fit their level's registers, and that results do not depend on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled
from v4c.errors import UnsupportedError
from v4c.passes.relax.kernels import Kernel
from v4c.targets.cpu.levels import LEVELS, psabi
from v4c.targets.cpu.schedule import (
    AttentionSchedule,
    IndexSchedule,
    MHCSchedule,
    PanelSchedule,
    ProductSchedule,
    Schedule,
)
from v4c.targets.cpu.scheduling import BY_NAME, FAMILIES, scheduler, tunable
from v4c.targets.cpu.tune_data import Calls
from v4c.targets.scheduler import Tunable, named
from v4c.targets.tuning_database import Machine, Record, TuningDatabase, TuningError

ALL_LEVELS = (*LEVELS, "generic")
HERE = Machine("a processor", 2, 2)
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "merged_linear": ((40, 33), 72, "float32", 1e-6, False),
    "grouped_linear": (2, 40, 70, "bfloat16", False),
    "topk_router": (40, 64, 3, 1.5, "float32"),
    "linear_unpacked": (37, 48, "float32"),
    "sliding_window_attention": (8, 32, 20, 0.2),
    "compressed_sparse_attention": (8, 32, 20, 9, 0.2, 8),
    "heavily_compressed_attention": (8, 32, 20, 16, 0.2),
    "lightning_index": (40, 16, 4, 7, 8),
    "grouped_experts": (5, 40, 36, 2, 2.0, "float32", False),
    "mixture_of_experts": (5, 40, 36, 2, 2.0, "int8", 33, False),
    "mhc_pre": (4, 80, 3, 1e-4, 1e-5),
    "mhc_pre_norm": (4, 80, 3, 1e-4, 1e-5, 1e-6),
    "mhc_post_pre_norm": (4, 80, 3, 1e-4, 1e-5, 1e-6),
    "mhc_head": (4, 80, 1e-4, 1e-5),
    "mhc_post": (4, 80),
}
"""A small case of every kernel that has a schedule."""


def small(name: str, level: str = "x86-64-v4") -> Tunable:
    found = tunable(Kernel(BY_NAME[name], ARGUMENTS[name]), level)
    assert found is not None
    return found


def results(known: Tunable, schedule: Schedule, rows: int) -> list[np.ndarray]:
    """All arguments after a call with fixed random ones: outputs, and state that was updated in place."""
    kernel = known.scheduled(schedule)
    calls = Calls(kernel.build(), named(known.kernel), rows)
    arrays = [tensor.numpy() for tensor in calls.next()]
    tensors = [tvm.runtime.tensor(a) for a in arrays]
    compiled(kernel.factory, *kernel.arguments)["main"](*tensors)
    return [t.numpy() for t in tensors]


def test_every_family_has_a_case() -> None:
    assert set(ARGUMENTS) == {factory.__name__ for factory in FAMILIES}


QUICK = {"grouped_linear", "grouped_experts", "compressed_sparse_attention", "lightning_index", "mhc_post_pre_norm"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(ARGUMENTS)]
)
def test_results_do_not_depend_on_the_schedule(name: str) -> None:
    ours, other = small(name), small(name, "x86-64-v3").default
    if other == ours.default:
        other = small(name, "x86-64-v2").default
    for found, known in zip(results(ours, other, 21), results(ours, ours.default, 21), strict=True):
        if found.dtype == np.int64:
            np.testing.assert_array_equal(found, known)
        else:
            np.testing.assert_allclose(found.astype("f4"), known.astype("f4"), rtol=2e-5, atol=2e-6)


@settings(deadline=None, max_examples=5)
@given(st.data())
def test_products_by_any_schedule(data: st.DataObject) -> None:
    known = small("merged_linear")
    chosen = {name: data.draw(st.sampled_from(values), name) for name, values in known.choices.items()}
    rows = data.draw(st.integers(1, 20), "rows")
    found = results(known, known.schedule(chosen), rows)
    for y, expected in zip(found, results(known, known.default, rows), strict=True):
        np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("level", ALL_LEVELS)
def test_sums_of_a_block_fit_the_registers(level: str) -> None:
    vector, registers = {"x86-64-v4": (1, 32), "x86-64-v3": (2, 16)}.get(psabi(level), (4, 16))
    product = PanelSchedule.of(level)
    for rows in {product.row_block, 4, 2, 1} - set(range(product.row_block + 1, 8)):
        sums = rows * product.columns(rows) * product.partial_sums(rows, 4096)
        assert sums * vector < registers
    index, mhc, attention = IndexSchedule.of(level), MHCSchedule.of(level), AttentionSchedule.of(level)
    for sums in (
        index.accumulators, mhc.row_block * mhc.output_block, attention.row_tile,
        attention.head_tile * attention.column_vectors,
    ):  # fmt: skip
        assert sums * vector < registers


@given(rows=st.integers(1, 7), k=st.integers(1, 5000), level=st.sampled_from(ALL_LEVELS))
def test_partial_sums_divide_the_reduction(rows: int, k: int, level: str) -> None:
    assert k % PanelSchedule.of(level).partial_sums(rows, k) == 0


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        (ProductSchedule, {"row_block": 8}), (ProductSchedule, {"row_block": 0}), (ProductSchedule, {"chains": 3}),
        (ProductSchedule, {"accumulators": 16}), (ProductSchedule, {"block_bytes": 5000}),
        (ProductSchedule, {"row_block": True}), (ProductSchedule, {"row_block": 2.0}),
        (MHCSchedule, {"row_block": 4}), (IndexSchedule, {"accumulators": 3}), (AttentionSchedule, {"head_tile": 3}),
        (AttentionSchedule, {"row_tile": 16}),
    ],
)  # fmt: skip
def test_numbers_that_no_knowncan_have_are_refused(kind: type[Schedule], numbers: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=f"{kind.__name__}: .*expected"):
        kind(**numbers)


def test_parameters_must_be_those_of_the_class() -> None:
    known = ProductSchedule().parameters
    assert ProductSchedule.from_parameters(known, "here") == ProductSchedule()
    for wrong in ({}, {**known, "more": 1}, {k: v for k, v in known.items() if k != "chains"}):
        with pytest.raises(UnsupportedError, match="here: expected the numbers row_block, accumulators"):
            ProductSchedule.from_parameters(wrong, "here")


def test_the_default_follows_level_and_shape() -> None:
    wide = Kernel(BY_NAME["merged_linear"], ((1024,), 64, "float32", None, False))
    for level, rows in (("x86-64-v4", 7), ("x86-64-v3", 6), ("x86-64-v2", 2), ("generic", 2)):
        known = tunable(wide, level)
        assert known is not None
        assert known.default.parameters["row_block"] == rows
        assert known.default.parameters["rows_per_task"] == 256
    assert small("merged_linear").default.parameters["rows_per_task"] == 32  # few panels: rows are shared out as well


def test_a_key_leaves_out_what_makes_no_difference() -> None:
    plain = Kernel(BY_NAME["merged_linear"], ((64,), 64, "float32", None, False))
    normed = Kernel(BY_NAME["merged_linear"], ((64,), 64, "float32", 1e-6, True))
    quantised = Kernel(BY_NAME["merged_linear"], ((64,), 64, "int8", None, True))
    keys = {k: tunable(kernel, "x86-64-v4-vnni").key for k, kernel in enumerate((plain, normed, quantised))}  # type: ignore[union-attr]
    assert keys[0] == keys[1]
    assert keys[0].level == "x86-64-v4"
    assert keys[2].level == "x86-64-v4-vnni"
    assert str(keys[0]) == "merged_linear k=64 sizes=64 float32 x86-64-v4"


def test_a_record_takes_the_defaults_place() -> None:
    kernel = Kernel(BY_NAME["merged_linear"], ARGUMENTS["merged_linear"])
    known = small("merged_linear")
    numbers = {**known.default.parameters, "row_block": 3}
    database = TuningDatabase([Record(known.key, HERE, numbers, finished=True)])
    schedules = scheduler("x86-64-v4", database)
    assert schedules.scheduled(kernel).arguments[-1] == known.schedule(numbers)
    assert schedules.scheduled(Kernel(BY_NAME["mhc_post"], (4, 80))).arguments[-1] == MHCSchedule()
    notes = schedules.notes()
    assert (notes["kernels"], notes["records"]) == (2, 1)
    assert len(notes["sha256"]) == 64
    # Another level, another kernel: the record is not for it. One whose default was kept changes nothing.
    assert (
        scheduler("x86-64-v3", database).scheduled(kernel).arguments[-1] == small("merged_linear", "x86-64-v3").default
    )
    kept = TuningDatabase([Record(known.key, HERE, None, finished=True)])
    assert scheduler("x86-64-v4", kept).scheduled(kernel).arguments[-1] == known.default


def test_a_record_of_other_numbers_is_an_error() -> None:
    known = small("merged_linear")
    database = TuningDatabase([Record(known.key, HERE, {"tile": 3}, finished=True)])
    with pytest.raises(TuningError, match=r"merged_linear .*: expected the numbers .*, found tile; tune again"):
        scheduler("x86-64-v4", database).scheduled(known.kernel)
