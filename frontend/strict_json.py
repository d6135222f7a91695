"""Read JSON without JSON's traps: duplicate keys, NaN and Infinity, wrong encodings and runaway nesting are errors.

Configs, shard indexes and safetensors headers come from outside, and Python's own parser silently keeps the last of two
equal keys and accepts NaN; each caller names the error class that its users expect.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from v4c.errors import Error


class _Refused(ValueError):
    """Valid for Python's parser, not for us; carries the message to show."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _Refused(f"expected every key once, found {show(key)} twice")
        result[key] = value
    return result


def _no_constant(text: str) -> Any:
    raise _Refused(f"expected finite numbers, found {text}")


def show(value: Any) -> str:
    """`value` on one short line, for error messages."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def parse_object(data: bytes, source: str, error: type[Error]) -> dict[str, Any]:
    """Parse one UTF-8 JSON object; `source` names it in messages.

    Raises:
        error: with one line saying what was expected and what was found.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except _Refused as refusal:
        raise error(f"{source}: {refusal}") from None
    except UnicodeDecodeError as failure:
        raise error(
            f"{source}: expected UTF-8 text, found byte {data[failure.start]:#04x} at {failure.start}"
        ) from None
    except json.JSONDecodeError as failure:
        found = f"{failure.msg} at line {failure.lineno}, column {failure.colno}"
        raise error(f"{source}: expected valid JSON, found an error: {found}") from None
    except (ValueError, RecursionError) as failure:  # an integer of thousands of digits; thousands of brackets
        raise error(f"{source}: expected JSON of sane size and depth, found: {failure}") from None
    if not isinstance(value, dict):
        raise error(f"{source}: expected a JSON object, found {show(value)}")
    return value


def read_object(path: Path, error: type[Error]) -> dict[str, Any]:
    """`parse_object` of a file; a file that is missing or unreadable is the same `error`."""
    try:
        data = path.read_bytes()
    except OSError as failure:
        raise error(f"{path}: expected a readable JSON file, found: {failure.strerror or failure}") from None
    return parse_object(data, str(path), error)
