"""Tiles of products that `tune` found for a device, as a JSON file that ``v4c compile --tuning`` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from v4c.errors import Error, UnsupportedError
from v4c.runtime.whole_file import write_json

from .devices import Device
from .lowering import Product
from .tiles import ProductTiles

FORMAT = 1
KIND = "v4c ascend tiles"


class TileDatabaseError(Error):
    """A database of tiles that is missing, damaged or of another format."""


@dataclass(frozen=True)
class Found:
    """The outcome for one product.

    Attributes:
        tiles: the best that the compiler takes.
        seconds, default_seconds: estimates at the device's peaks, of `tiles` and of those the limits give.
        refused: better ones by estimate that the gates refuse, with the reason.
    """

    tiles: ProductTiles
    seconds: float
    default_seconds: float
    refused: tuple[tuple[ProductTiles, str], ...] = ()


@dataclass
class TileDatabase:
    """Found tiles of one device.

    Attributes:
        device: its name.
        compiler: that accepted them.
        found: by product.
    """

    device: str
    compiler: str
    found: dict[Product, Found] = field(default_factory=dict)

    def tiles(self, device: Device) -> dict[Product, ProductTiles]:
        """What was found; UnsupportedError for another device than it was found for."""
        if device.name != self.device:
            raise UnsupportedError(f"tuning: expected tiles for {device.name}, found those of {self.device}")
        return {product: found.tiles for product, found in self.found.items()}

    def document(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "kind": KIND, "format": FORMAT, "device": self.device, "compiler": self.compiler,
            "products": [
                {
                    **asdict(product), "tiles": asdict(found.tiles), "seconds": found.seconds,
                    "default_seconds": found.default_seconds,
                    "refused": [{"tiles": asdict(t), "reason": reason} for t, reason in found.refused],
                }
                for product, found in self.found.items()
            ],
        }  # fmt: skip

    @classmethod
    def read(cls, path: Path) -> TileDatabase:
        """From a file; TileDatabaseError names what is wrong with it."""
        try:
            document = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise TileDatabaseError(f"{path}: expected a database of tiles, found {error}") from None
        if not isinstance(document, dict) or (document.get("kind"), document.get("format")) != (KIND, FORMAT):
            raise TileDatabaseError(f"{path}: expected {KIND} of format {FORMAT}, found something else")
        try:
            found = dict(map(_row, document["products"]))
            return cls(str(document["device"]), str(document["compiler"]), found)
        except (KeyError, TypeError, ValueError) as error:
            raise TileDatabaseError(f"{path}: damaged: {type(error).__name__} {error}") from None

    def write(self, path: Path) -> None:
        """Replace the file; OutputError where it cannot be written."""
        write_json(path, self.document())


def _row(row: Mapping[str, Any]) -> tuple[Product, Found]:
    n, k, groups = (_count(row[name]) for name in ("n", "k", "groups"))
    product = Product(n, k, str(row["dtype"]), groups, bool(row["few"]))
    refused = tuple((_tiles(r["tiles"]), str(r["reason"])) for r in row["refused"])
    return product, Found(_tiles(row["tiles"]), float(row["seconds"]), float(row["default_seconds"]), refused)


def _tiles(tiles: Mapping[str, Any]) -> ProductTiles:
    return ProductTiles(*(_count(tiles[name]) for name in ("m", "n", "k")))


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"expected a positive integer, found {value!r}")
    return value
