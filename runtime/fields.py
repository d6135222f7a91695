"""Strict reading of JSON objects: every key is asked for once, with its type, and nothing may be left over."""

from __future__ import annotations

from typing import Any, TypeVar

from v4c.errors import ArtifactError

T = TypeVar("T")


class Fields:
    """A JSON object under inspection.

    Args:
        value: the parsed object.
        where: what to call it in messages, such as ``model.v4c/manifest.json: target``.

    Raises:
        ArtifactError: from every method, in one line, when a key is missing or its value is of another kind.
    """

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ArtifactError(f"{where}: expected an object, found {type(value).__name__}")
        self._left = dict(value)
        self.where = where

    def fail(self, key: str, expected: str, found: object) -> ArtifactError:
        """The error that says what ``key`` should have been; the caller raises it."""
        return ArtifactError(f"{self.where}: {key}: expected {expected}, found {found!r}")

    def take(self, key: str, kind: type[T], expected: str) -> T:
        """The value of ``key``, which must be of ``kind``; ``expected`` names that kind in the message."""
        if key not in self._left:
            raise ArtifactError(f"{self.where}: key {key!r} is missing")
        value = self._left.pop(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.fail(key, expected, value)
        return value

    def text(self, key: str) -> str:
        """A non-empty string."""
        value = self.take(key, str, "a string")
        if not value:
            raise self.fail(key, "a non-empty string", value)
        return value

    def optional_text(self, key: str) -> str | None:
        """A non-empty string, or null."""
        if key in self._left and self._left[key] is None:
            return self._left.pop(key)
        return self.text(key)

    def count(self, key: str, minimum: int = 0) -> int:
        """An integer of at least ``minimum``."""
        value = self.take(key, int, "an integer")
        if value < minimum:
            raise self.fail(key, f"at least {minimum}", value)
        return value

    def items(self, key: str, kind: type[T], expected: str) -> list[T]:
        """A list whose items are all of ``kind``; ``expected`` names an item in the message."""
        values = self.take(key, list, "a list")
        for value in values:
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise self.fail(key, f"a list of {expected}", value)
        return values

    def mapping(self, key: str) -> dict[str, Any]:
        """An object with any content."""
        return self.take(key, dict, "an object")

    def section(self, key: str) -> Fields:
        """An object to be read as strictly as this one."""
        return Fields(self.mapping(key), f"{self.where}: {key}")

    def remaining(self) -> tuple[str, ...]:
        """The keys not asked for yet, for objects whose keys are free."""
        return tuple(self._left)

    def done(self) -> None:
        """Refuse whatever has not been asked for."""
        if self._left:
            raise ArtifactError(f"{self.where}: unknown key {min(self._left)!r}")
