"""Tile shapes of products for a device, searched with the cost model, with bishengir's gates as the judge.

No device is at hand, so nothing is timed: candidates are ordered by their estimated time at the device's peaks, and the
first that the compiler takes is kept. What the model cannot tell apart (equal bytes, equal rounds of cores) is decided
for the default, and so is a gain below a hundredth.

    python -m v4c.targets.ascend.tune --preset v4-nano --device Ascend910B1 -o tiles.json
    v4c compile --preset v4-nano --target ascend:Ascend910B1 --tuning tiles.json -o nano.v4c
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from v4c.errors import Error
from v4c.progress import Progress

from .cost import Rates, estimate, rates
from .devices import Device, find_device
from .emit import BYTES
from .gates import check
from .kernels.products import linear
from .library import cache_folder
from .lowering import FEW_ROWS, Product
from .program import DeviceLimits, TileProgram
from .tile_database import Found, TileDatabase
from .tiles import ProductTiles, product_tiles
from .toolchain import find as find_toolchain

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
    products: Iterable[Product], device: Device, peaks: Rates | None = None, trials: int = 8,
    progress: Progress | None = None,
) -> TileDatabase:  # fmt: skip
    """A database of all `products`; arguments as of `search`."""
    wanted, database = list(products), TileDatabase(device.name, find_toolchain().version)
    for number, product in enumerate(wanted):
        if progress:
            progress("search tiles", number, len(wanted))
        database.found[product] = search(product, device, peaks or rates(device), trials)
    return database


def model_products(preset: str, device: Device) -> list[Product]:
    """The products of a known size, as compiling it asks for them."""
    from v4c.compiler import graph, lower, settings, storage_of
    from v4c.frontend.presets import preset as config_of
    from v4c.passes.pipeline import PassOptions

    from .target import AscendTarget

    target = AscendTarget(device)
    disabled, storage = settings(target, (), storage_of("f32", "none"))
    options = PassOptions.checked(disabled)
    model, _ = graph(config_of(preset), options, storage, None)
    lower(model, target, storage, options)
    return target.kernels.products


@click.command()
@click.option("--preset", required=True, metavar="NAME", help="A known size; see v4c presets.")
@click.option("--device", default="", help="As for v4c compile --target ascend:DEVICE.")
@click.option("--trials", type=click.IntRange(min=1), default=8, show_default=True, help="Candidates compiled each.")
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="For the tiles.")
def main(preset: str, device: str, trials: int, output: Path) -> None:
    """Search the tiles of a model's products by estimated time, and keep those that the compiler takes."""
    try:
        found = find_device(device)
        find_toolchain()
        database = tune(model_products(preset, found), found, trials=trials)
        database.write(output)
    except Error as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
    for product, one in database.found.items():
        tiles = f"{one.tiles.m} x {one.tiles.n} x {one.tiles.k}"
        rows = f"up to {FEW_ROWS} rows" if product.few else "many rows"
        click.echo(
            f"{product.groups} x {product.n} x {product.k} {product.dtype}, {rows}: {tiles}, estimated "
            f"{one.seconds * 1e6:.2f} us, default {one.default_seconds * 1e6:.2f} us, {len(one.refused)} refused"
        )
    click.echo(f"wrote {output}", err=True)


if __name__ == "__main__":
    main()
