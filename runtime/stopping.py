"""Stop strings: text is passed on as it comes, but never a part of what may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from v4c.errors import InputError


class StopStrings:
    """Watches a text that arrives in pieces; a stop string may begin in one piece and end in a later one.

    Args:
        strings: any of these ends the text, and is left out of it.

    Attributes:
        found: the string that ended the text, None so far.

    Raises:
        InputError: one of them is empty, or no string.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = checked_stop(strings)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """What can be passed on now that ``text`` has come; nothing after a stop string was found."""
        if self.found is not None:
            return ""
        held = self._held + text
        ends = [(held.find(string) + len(string), -len(string), string) for string in self._strings if string in held]
        if ends:  # the first to be complete, and of those the longest: however the text was cut, the end is the same
            end, length, self.found = min(ends)
            self._held = ""
            return held[: end + length]
        keep = max((_overlap(held, string) for string in self._strings), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def checked_stop(strings: Sequence[str]) -> tuple[str, ...]:
    """``strings`` as a tuple; a single string is one.

    Raises:
        InputError: one of them is empty, or no string.
    """
    strings = (strings,) if isinstance(strings, str) else tuple(strings)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise InputError(f"stop: expected strings that are not empty, found {string!r}")
    return strings


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of ``text`` that ``string`` begins with, the whole of it excepted."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
