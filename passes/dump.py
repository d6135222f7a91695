"""The folder that ``--dump-ir`` fills: the graph or module after every pass, and what each one costs.

``v4c inspect`` reads the same folder through `summary`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from v4c.errors import OutputError

from .measure import CONTEXT
from .pipeline import Stage
from .summary import SUMMARY


class Dump:
    """Writes every stage it is shown into `folder`, which is made when there is something to write.

    Raises:
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stages: list[dict[str, Any]] = []

    def __call__(self, stage: Stage) -> None:
        self.stages.append({"stage": stage.name, **stage.figures().to_dict()})
        summary = {"context": CONTEXT, "stages": self.stages}
        self._write(stage.name + stage.suffix, stage.text())
        self._write(SUMMARY, json.dumps(summary, indent=1) + "\n")

    def _write(self, name: str, text: str) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(text)
        except OSError as error:
            raise OutputError(f"{self.folder / name}: expected to write it, found {error.strerror}") from error
