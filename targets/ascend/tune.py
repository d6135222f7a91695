"""Tile shapes of products for a device, searched with the cost model, with bishengir's gates as the judge.

No device is at hand, so nothing is timed: candidates are ordered by their estimated time at the device's peaks, and the
first that the compiler takes is kept. What the model cannot tell apart (equal bytes, equal rounds of cores) is decided
for the default, and so is a gain below a hundredth.

    v4c tune --preset v4-nano --target ascend:Ascend910B1 -o tiles.json
    v4c compile --preset v4-nano --target ascend:Ascend910B1 --tuning tiles.json -o nano.v4c
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4c.errors import UnsupportedError
from v4c.progress import Progress

from .cost import Rates, estimate, rates
from .devices import Device
from .emit import BYTES
from .gates import check
from .kernels.products import linear
from .library import cache_folder
from .lowering import FEW_ROWS, Product
from .program import DeviceLimits, TileProgram
from .tile_database import Found, TileDatabase
from .tiles import ProductTiles, product_tiles
from .toolchain import find as find_toolchain

if TYPE_CHECKING:
    from .target import AscendTarget

DECODE_ROWS, PROMPT_ROWS = 1, 512
"""Rows of the launches that are estimated, of products for few rows and for many."""
_GAIN = 0.01
_POWERS = (16, 32, 64, 128, 256, 512)


def candidates(product: Product, limits: DeviceLimits) -> Iterator[ProductTiles]:
    """Tiles whose operands and accumulator fit the device's memories by arithmetic; the compiler may want more room."""
    size = BYTES[product.dtype]
    for m in _POWERS:
        for n in _POWERS:
            if n >= 2 * product.n and n > _POWERS[0]:
                continue
            for k in _POWERS:
                if k >= 2 * product.k and k > _POWERS[0]:
                    continue
                if 4 * m * n <= limits.l0c and (m + n) * k * size <= limits.l1:
                    yield ProductTiles(m, n, min(k, product.k))


def program_of(product: Product, tiles: ProductTiles, limits: DeviceLimits) -> TileProgram:
    """The product's program with these tiles."""
    return linear(
        product.n, product.k, limits, dtype=product.dtype, out="float32", groups=product.groups, tiles=tiles,
        rows=FEW_ROWS if product.few else None,
    )  # fmt: skip


def search(product: Product, device: Device, peaks: Rates, trials: int = 8) -> Found:
    """The tiles of least estimated time that pass the gates up to sanity; the default's where none is better.

    Args:
        product: what is searched for.
        device: whose limits, and whose gates.
        peaks: its rates.
        trials: candidates that are compiled at most.
    """
    limits, rows = device.limits, DECODE_ROWS if product.few else PROMPT_ROWS

    def seconds(tiles: ProductTiles) -> tuple[float, float]:
        one = estimate(program_of(product, tiles, limits), {"rows": rows}, limits, peaks)
        return one.seconds, one.bytes

    default = product_tiles(limits, product.n, product.k, product.dtype, FEW_ROWS if product.few else None)
    usual = seconds(default)
    timed = sorted(
        ((seconds(t), t) for t in dict.fromkeys(candidates(product, limits))), key=lambda found: (found[0], -found[1].k)
    )
    refused: list[tuple[ProductTiles, str]] = []
    for (time, _), tiles in timed:
        if time > usual[0] * (1 - _GAIN) or len(refused) == trials:
            break
        report = check(program_of(product, tiles, limits), device, cache=cache_folder())
        if report.ok:
            return Found(tiles, time, usual[0], tuple(refused))
        refused.append((tiles, f"{report.failures[0].gate}: {report.failures[0].cause}"))
    return Found(default, usual[0], usual[0], tuple(refused))


def tune(
    products: Iterable[Product], device: Device, database: TileDatabase, trials: int = 8,
    save: Callable[[], None] = lambda: None, progress: Progress | None = None,
) -> None:  # fmt: skip
    """Add to `database` what `search` finds for those of `products` that it lacks.

    Args:
        products: what is searched for.
        device: whose tiles.
        database: of this device.
        trials: as of `search`.
        save: called after every product.
        progress: called with (what, products done, products).
    """
    wanted = list(dict.fromkeys(products))
    for number, product in enumerate(wanted):
        if progress:
            progress("search tiles", number, len(wanted))
        if product not in database.found:
            database.found[product] = search(product, device, rates(device), trials)
            save()


def tune_file(
    source: Any, path: Path, variant: str, dtype: str, trials: int, progress: Progress | None
) -> dict[str, Any]:
    """`v4c.tune` for ``ascend:variant``: the tiles of a model's products, in the file `path`.

    Args:
        source: as of `v4c.tune`.
        path: created, or added to after every product.
        variant: the device.
        dtype: storage of the weight matrices asked for: ``f32`` (half precision on the cube) or ``bf16``.
        trials: candidates that are compiled at most, per product.
        progress: called with (what, products done, products).

    Returns:
        ``database``, ``machine`` (``device`` and ``compiler``) and ``kernels``: a list of ``op``, ``shape``, ``dtype``,
        ``rows``, ``default_us`` and ``tuned_us`` (estimated microseconds), ``gain``, ``parameters`` (the tiles) and
        ``refused`` (how many the gates did not pass).

    Raises:
        v4c.Error: bad input, a database of another device or compiler, or something that is not installed.
    """
    from .target import AscendTarget

    target = AscendTarget.parse(variant)
    device, compiler = target.device, find_toolchain().version
    database = TileDatabase.read(path) if path.exists() else TileDatabase(device.name, compiler)
    database.tiles(device)
    if database.compiler != compiler:
        raise UnsupportedError(f"{path}: expected tiles that bishengir {compiler} took, found {database.compiler}'s")
    products = list(dict.fromkeys(model_products(source, target, dtype, progress)))
    tune(products, device, database, trials, lambda: database.write(path), progress)
    database.write(path)
    return {
        "database": str(path), "machine": {"device": device.name, "compiler": compiler},
        "kernels": [_row(product, database.found[product]) for product in products],
    }  # fmt: skip


def model_products(source: Any, target: AscendTarget, dtype: str, progress: Progress | None = None) -> list[Product]:
    """The products of a model, as compiling it asks for them; arguments as of `v4c.tune`."""
    from v4c.api import open_source
    from v4c.compiler import graph, lower, settings, storage_of
    from v4c.passes.pipeline import PassOptions

    disabled, storage = settings(target, (), storage_of(dtype, "none"))
    options = PassOptions.checked(disabled)
    model, _ = graph(open_source(source, weights=False), options, storage, progress)
    lower(model, target, storage, options)
    return target.kernels.products


def _row(product: Product, found: Found) -> dict[str, Any]:
    return {
        "op": "product",
        "shape": {"groups": product.groups, "n": product.n, "k": product.k},
        "dtype": product.dtype,
        "rows": f"1..{FEW_ROWS}" if product.few else "many",
        "default_us": found.default_seconds * 1e6,
        "tuned_us": found.seconds * 1e6,
        "gain": found.default_seconds / found.seconds,
        "parameters": vars(found.tiles),
        "refused": len(found.refused),
    }


if __name__ == "__main__":
    from v4c.cli.tune import main

    main("ascend")
