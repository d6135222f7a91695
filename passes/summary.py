"""The summary in a ``--dump-ir`` folder, read back; it is what makes a folder one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from v4c.errors import InputError

SUMMARY = "summary.json"


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a dump folder: ``context`` and ``stages``, each with the keys of `Figures.to_dict`.

    Raises:
        InputError: it is missing or not what `Dump` writes.
    """
    path = folder / SUMMARY
    try:
        summary = json.loads(path.read_text())
        known = {"stage", "nodes", "launches", "launches_by_function", "bytes", "flops"}
        if all(known <= stage.keys() for stage in summary["stages"]) and isinstance(summary["context"], int):
            return dict(summary)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: expected the summary of a --dump-ir folder, found {error}") from error
    raise InputError(f"{path}: expected the summary of a --dump-ir folder, found other keys")
