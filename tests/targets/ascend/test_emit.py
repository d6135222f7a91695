"""The builder of tile programs: its text, its arithmetic at build time, and what it counts."""

import numpy as np
import pytest

from tests.targets.ascend.chain import run
from tests.targets.ascend.requirements import needs_mlir
from v4c.targets.ascend.emit import TileBuilder
from v4c.targets.ascend.program import GridAxis, Polynomial, Role, Work

ROWS = GridAxis(Polynomial.of(1, "rows"), 4)


def doubled():
    b = TileBuilder("doubled", "Test")
    x, y = b.argument("x", ("rows", 8), "float16"), b.argument("y", ("rows", 8), "float32", Role.WRITE)
    first = b.program_id(0) * 4
    live = b.minimum(b.scalar("rows") - first, 4)
    tile = b.load(x, first * 8, (4, 8), valid=(live, 8))
    b.store(b.cast(tile, "float32") * 2.0, y, first * 8, valid=(live, 8))
    return b.finish([ROWS])


def test_the_abi():
    program = doubled()
    head = program.text.splitlines()[1]
    assert head.startswith("  func.func @doubled(%sync: memref<?xi8> {hacc.arg_type = #hacc.arg_type<sync_block_lock>}")
    assert "%x: memref<?xf16> {tt.divisibility = 16 : i32}, %y: memref<?xf32>" in head
    assert "%rows: i32, %gx: i32, %gy: i32, %gz: i32, %px: i32, %py: i32, %pz: i32)" in head
    assert 'mix_mode = "aiv"' in head
    assert program.scalars == ("rows",)
    assert [(a.name, a.role) for a in program.arguments] == [("x", Role.READ), ("y", Role.WRITE)]


def test_what_is_counted():
    program = doubled()
    known = program.launch({"rows": 9})
    assert known["grid0"] == 3
    assert program.reads(known) == 3 * 4 * 8 * 2
    assert program.writes(known) == 3 * 4 * 8 * 4
    assert program.vector(known) == 3 * 2 * 4 * 8
    assert program.cube(known) == 0


def test_loops_multiply_and_products_count():
    b = TileBuilder("product", "Test", Work.CUBE)
    x = b.argument("x", (16, 64), "float16")
    with b.loop(64, 16, carried=[b.fill(0.0, (16, 16))]) as step:
        tile = b.load(x, step.index, (16, 16), (64, 1))
        step.next = [b.matmul(tile, tile, step.carried[0])]
    with b.loop(b.scalar("n"), 8, trips=Polynomial.of(1 / 8, "n")) as step:
        b.load(x, step.index, (1, 8))
    program = b.finish([GridAxis(Polynomial.of(2))])
    assert program.cube(program.launch({"n": 0})) == 2 * 4 * 16**3
    assert program.reads(program.launch({"n": 80})) == 2 * (4 * 16 * 16 * 2 + 10 * 16)


def test_numbers_are_folded_and_identities_dropped():
    b = TileBuilder("folded", "Test")
    index = b.program_id(0)
    assert b.binary("add", 2, 3) == 5
    assert b.binary("min", 2, 3) == 2
    assert index + 0 is index
    assert index * 1 is index
    assert 1 * index is index


@needs_mlir
def test_a_program_runs():
    x = np.arange(72, dtype=np.float16).reshape(9, 8)
    assert np.array_equal(run([doubled()], {"rows": 9}, {"x": x})["y"], 2 * x.astype(np.float32))


@needs_mlir
@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_loop_that_does_not_begin_at_0(count):
    b = TileBuilder("late", "Test")
    y = b.argument("y", (1,), "float32", Role.WRITE)
    start = b.constant(3)
    with b.loop(start + b.scalar("n"), 2, start, carried=[b.fill(0.0, (1,))]) as step:
        number = b.cast(b.cast(step.index, "int32"), "float32")
        step.next = [step.carried[0] + number]
    b.store(step.results[0], y, 0)
    found = run([b.finish([GridAxis(Polynomial.of(1))])], {"n": count}, {})["y"]
    assert found[0] == sum(range(3, 3 + count, 2))


@needs_mlir
def test_extremes_of_every_float():
    b = TileBuilder("extremes", "Test")
    for dtype in ("float16", "bfloat16", "float32"):
        y = b.argument(dtype, (2, 8), dtype, Role.WRITE)
        for row, value in enumerate((np.inf, -np.inf)):
            b.store(b.fill(value, (8,), dtype), y, row * 8)
    after = run([b.finish([GridAxis(Polynomial.of(1))])], {}, {})
    for dtype in ("float16", "bfloat16", "float32"):
        assert np.array_equal(after[dtype].astype(np.float64), np.repeat([[np.inf], [-np.inf]], 8, 1))
