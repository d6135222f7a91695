"""Files that are whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from v4c.errors import OutputError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which takes its place at the end: readers see the old file or the new one.

    Raises:
        OutputError: the file cannot be written; the old one is as it was.
    """
    building = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        try:
            if path.is_dir():
                raise IsADirectoryError(0, "a folder of that name")
            yield building
            os.replace(building, path)
        finally:
            with contextlib.suppress(OSError):
                building.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: expected to write it, found {error.strerror or error}") from error


def write_json(path: Path, document: Any) -> None:
    """Write `document` as JSON; errors as of `replacing`."""
    with replacing(path) as building:
        building.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
