"""What commands print: JSON and tables on stdout; progress and messages on stderr."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Collection
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from .interrupt import Interrupts

if TYPE_CHECKING:
    from rich.table import Table

_PATIENCE = 2.0
"""Seconds of work before a progress bar appears."""
_REMINDER = 10.0
"""Seconds between lines about the same step, where there are lines instead of a bar."""
_BYTES = 1 << 20
"""A total from here on is one of bytes; no work has so many steps."""


def message(text: str) -> None:
    """One line on stderr."""
    click.echo(text, err=True)


def print_json(document: Any) -> None:
    """One JSON document on stdout; a number that is not finite is an error, JSON has none."""
    click.echo(json.dumps(document, indent=1, allow_nan=False))


def print_table(table: Table) -> None:
    """A table on stdout, whole also where the output is no terminal."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=200)
    with console.capture() as capture:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def new_table(*columns: str, numbers: Collection[str] = ()) -> Table:
    """An unboxed table; the columns in `numbers` are right-aligned."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=column in numbers)
    return table


def bytes_text(count: float) -> str:
    """A number of bytes in binary units, to four digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:,.4g} TiB"


def count_text(count: float) -> str:
    """A count in thousands, millions and so on, to four digits."""
    for unit in ("", " k", " M", " G"):
        if count < 1000:
            return f"{count:.4g}{unit}"
        count /= 1000
    return f"{count:,.4g} T"


class Progress:
    """The `progress` callback of the API, shown on stderr.

    On a terminal a bar appears once the work has taken two seconds, with bytes and time left where the work is counted
    in bytes; elsewhere nothing does. With `verbose` there are plain lines instead, one per step, and one every ten
    seconds on how far a step of many bytes is. An interrupt that Python lost is raised by the next call.
    """

    def __init__(self, verbose: bool = False) -> None:
        self._verbose = verbose
        self._bar: Any = None
        self._task: Any = None
        self._lock = threading.Lock()
        self._last: tuple[str, int, int] = ("working", 0, 0)
        self._rate = _Rate()
        self._told = 0.0
        self._timer = threading.Timer(_PATIENCE, self._appear)
        self._timer.daemon = True
        self._interrupts = Interrupts()

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` (bytes or steps; total 0: unknown) of `what`."""
        self._interrupts.check()
        with self._lock:
            changed = what != self._last[0]
            self._last = (what, done, total)
            if changed:
                self._rate = _Rate(done)
            if self._verbose:
                self._tell(changed)
            if self._bar is not None:
                self._show()

    def __enter__(self) -> Progress:
        self._interrupts.__enter__()
        if sys.stderr.isatty() and not self._verbose:
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        with self._lock:
            if self._bar is not None:
                self._bar.stop()
        self._interrupts.__exit__()
        if error is not None:
            self._interrupts.check()  # libraries turn an interrupt into errors of their own

    def _tell(self, changed: bool) -> None:
        what, done, total = self._last
        now = time.monotonic()
        if changed:
            message(what)
        elif total >= _BYTES and now - self._told >= _REMINDER:
            message(f"{what}: {self._rate.text(done, total)}")
        else:
            return
        self._told = now

    def _appear(self) -> None:
        from rich import progress
        from rich.console import Console

        with self._lock:
            if self._timer.finished.is_set():  # the work ended in the meantime
                return
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.TextColumn("{task.fields[left]}", markup=False),
                progress.TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("", left="")
            self._show()
            self._bar.start()

    def _show(self) -> None:
        what, done, total = self._last
        left = self._rate.text(done, total) if total >= _BYTES else ""
        self._bar.update(self._task, description=what, completed=done, total=total or None, left=left)


class _Rate:
    """How fast a step gets on: what had been done when it began does not count, as when it goes on where another ended.

    Args:
        done: bytes at the beginning.
    """

    def __init__(self, done: int = 0) -> None:
        self._start, self._begun = done, time.monotonic()

    def text(self, done: int, total: int) -> str:
        """Bytes done and in all, and the time that is left at the average rate so far."""
        far = f"{bytes_text(done)} of {bytes_text(total)}"
        elapsed, moved = time.monotonic() - self._begun, done - self._start
        if moved <= 0 or elapsed <= 0:
            return far
        seconds = round((total - done) * elapsed / moved)
        minutes, hours = seconds // 60, seconds // 3600
        left = f"{hours}:{minutes % 60:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
        return f"{far}, {left} left"
