"""Tiles of products: searched by estimate, judged by the compiler, kept in a file that compiling reads."""

from __future__ import annotations

import dataclasses
import json

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.ascend.requirements import needs_compiler, needs_mlir
from v4c.cli.tune import tune as tune_command
from v4c.errors import Error, OutputError, UnsupportedError
from v4c.targets.ascend import tune
from v4c.targets.ascend.cost import Figure, rates
from v4c.targets.ascend.devices import DEVICES
from v4c.targets.ascend.gates import Failure, GateReport
from v4c.targets.ascend.lowering import AscendKernels, Product
from v4c.targets.ascend.tile_database import Found, TileDatabase, TileDatabaseError
from v4c.targets.ascend.tiles import ProductTiles, product_tiles

DEVICE = DEVICES["Ascend910B1"]
WIDE = Product(4096, 1024, "float16", 1, True)
NARROW = Product(64, 4096, "float16", 1, False)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("V4C_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from(["float16", "float32"]))
def test_candidates_fit_and_have_no_needless_columns(n, k, dtype):
    found = list(tune.candidates(Product(n, k, dtype, 1, False), DEVICE.limits))
    size = 4 if dtype == "float32" else 2
    assert found
    assert all(4 * t.m * t.n <= DEVICE.limits.l0c for t in found)
    assert all((t.m + t.n) * t.k * size <= DEVICE.limits.l1 for t in found)
    assert all(t.k <= k and (t.n < 2 * n or t.n == 16) for t in found)


def judged(monkeypatch, refuses):
    """The compiler replaced: `refuses` of the tiles, in the order they are tried."""
    tried = []

    def check(program, device, cache):
        tried.append(program.name)
        failure = Failure(program.name, device.name, "compile", "ub overflow")
        refused = refuses(len(tried))
        return GateReport(program.name, device.name, () if refused else ("compile",), (failure,) if refused else ())

    monkeypatch.setattr(tune, "check", check)
    return tried


def slow_memory():
    """So slow that reads alone count, which larger tiles save."""
    return dataclasses.replace(rates(DEVICE), bandwidth=Figure(1e9, "invented"))


def test_the_first_that_the_compiler_takes(monkeypatch):
    tried = judged(monkeypatch, lambda count: count < 3)
    product = NARROW
    found = tune.search(product, DEVICE, slow_memory())
    default = product_tiles(DEVICE.limits, 64, 4096, "float16")
    assert len(tried) == 3
    assert [reason for _, reason in found.refused] == ["compile: ub overflow"] * 2
    assert found.seconds < found.default_seconds
    assert found.tiles != default


def test_the_default_stays_where_all_better_ones_are_refused(monkeypatch):
    judged(monkeypatch, lambda count: True)
    product = NARROW
    found = tune.search(product, DEVICE, slow_memory(), trials=4)
    assert found.tiles == product_tiles(DEVICE.limits, 64, 4096, "float16")
    assert (found.seconds, len(found.refused)) == (found.default_seconds, 4)


def test_no_compilation_without_a_better_estimate(monkeypatch):
    tried = judged(monkeypatch, lambda count: False)
    product = Product(16, 16, "float16", 1, True)
    found = tune.search(product, DEVICE, slow_memory())
    assert not tried
    assert found.tiles == product_tiles(DEVICE.limits, 16, 16, "float16", 16)


@needs_compiler
def test_with_the_compiler():
    found = tune.search(WIDE, DEVICE, slow_memory(), trials=3)
    assert found.seconds <= found.default_seconds
    assert all(reason.partition(":")[0] in ("compile", "link", "sanity") for _, reason in found.refused)


def test_found_tiles_are_used():
    tiles = ProductTiles(16, 32, 64)
    kernels = AscendKernels(DEVICE.limits, {Product(128, 64, "float16", 1, True): tiles})
    operation = kernels.linear((128,), 64, "float16", None).arguments[0]
    few, many = (v.programs[-1] for v in operation.variants)
    assert few.grid[1].tile == 32
    assert many.grid[1].tile == 128
    assert kernels.products == [Product(128, 64, "float16", 1, few) for few in (True, False)]


def test_the_file(tmp_path):
    path = tmp_path / "tiles.json"
    refused = ((ProductTiles(16, 512, 64), "compile: cbuf overflow"),)
    database = TileDatabase(DEVICE.name, "1.2.0", {WIDE: Found(ProductTiles(16, 64, 256), 1e-6, 2e-6, refused)})
    database.write(path)
    assert TileDatabase.read(path) == database
    assert database.tiles(DEVICE) == {WIDE: ProductTiles(16, 64, 256)}
    with pytest.raises(UnsupportedError, match="expected tiles for Ascend950PR_9599, found those of Ascend910B1"):
        database.tiles(DEVICES["Ascend950PR_9599"])
    with pytest.raises(OutputError, match="missing"):
        database.write(tmp_path / "missing" / "tiles.json")
    stored = json.loads(path.read_text())
    for damage in ({"kind": "x"}, {"format": 2}, {"products": [{}]}, {"products": 3}):
        path.write_text(json.dumps({**stored, **damage}))
        with pytest.raises(TileDatabaseError, match=r"tiles\.json"):
            TileDatabase.read(path)
    stored["products"][0]["tiles"]["n"] = -1
    path.write_text(json.dumps(stored))
    with pytest.raises(TileDatabaseError, match="positive integer"):
        TileDatabase.read(path)


def command(*arguments):
    return CliRunner().invoke(tune_command, ["--preset", "v4-nano", "--trials", "2", *map(str, arguments)])


@needs_compiler
@needs_mlir
def test_the_command(tmp_path, monkeypatch):
    """Every product is searched once: a second call, and one after Ctrl-C, take what the file has."""
    monkeypatch.setattr(tune, "model_products", lambda *arguments: [WIDE, NARROW, WIDE])
    searched, path = [], tmp_path / "t.json"

    def search(product, *arguments):
        if len(searched) == 1:
            searched.append(None)
            raise KeyboardInterrupt
        searched.append(product)
        return Found(ProductTiles(16, 64, 256), 1e-6, 2e-6)

    monkeypatch.setattr(tune, "search", search)
    assert command("--target", "ascend:Ascend910B1", "-o", path).exit_code != 0
    assert list(TileDatabase.read(path).found) == [WIDE]
    result = command("--target", "ascend:Ascend910B1", "-o", path, "--json")
    assert result.exit_code == 0, result.output
    assert searched == [WIDE, None, NARROW]
    document = json.loads(result.stdout)
    assert document["machine"]["device"] == "Ascend910B1"
    assert [row["shape"]["n"] for row in document["kernels"]] == [WIDE.n, NARROW.n]
    assert document["kernels"][0]["gain"] == pytest.approx(2)
    result = command("--target", "ascend:Ascend910B1", "-o", path)
    assert "groups=1 n=4096 k=1024" in result.stdout.replace("\n", " ")
    assert len(searched) == 3


@needs_compiler
@needs_mlir
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "ascend:910X"), "device '910X'"),
        (("--target", "ascend", "--quant", "int8"), "not quantised, found quant int8"),
        (("--target", "ascend", "--dtype", "bf16", "--activations", "bf16"), "not quantised, found activations bf16"),
        (("--target", "ascend", "--op", "linear"), "expected all products, not quantised, found op linear"),
        (("--target", "ascend:Ascend950PR_9599"), "expected tiles for Ascend950PR_9599, found those of Ascend910B1"),
    ],
)
def test_bad_input(tmp_path, arguments, message):
    path = tmp_path / "t.json"
    TileDatabase("Ascend910B1", "1.2.0").write(path)
    before = path.read_bytes()
    result = command(*arguments, "-o", path)
    assert isinstance(result.exception, Error)
    assert message in str(result.exception)
    assert path.read_bytes() == before
