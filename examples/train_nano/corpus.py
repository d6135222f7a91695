"""The text: documentation that every Python installation carries (licence: PSF-2.0), split into training and held-out.

It is the reference manual's topics (what ``help("while")`` prints) and the longer docstrings of the standard library.
"""

from __future__ import annotations

import ast
import hashlib
import pydoc_data.topics
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

SHORTEST = 200
"""Characters of the shortest docstring that is taken."""

_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}
_HELD_OUT_SHARE = 24


@cache
def documents() -> Mapping[str, str]:
    """Every document by name, in a fixed order; no text twice. The library is read once in a process."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    for name, text in _all():
        text = text.strip() + "\n"
        if text not in seen:
            seen.add(text)
            found[name] = text
    return found


def split(every: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """(training, held-out) texts. A document's name alone decides, so that another version of Python splits alike."""
    parts: tuple[list[str], list[str]] = ([], [])
    for name, text in every.items():
        digest = hashlib.sha256(name.encode()).digest()
        parts[int.from_bytes(digest[:4], "big") % _HELD_OUT_SHARE == 0].append(text)
    return parts


def _all() -> Iterator[tuple[str, str]]:
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        yield f"topic:{topic}", text
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if not _LEFT_OUT.intersection(inside.parts):
            yield from _docstrings(path, inside.as_posix())


def _docstrings(path: Path, name: str) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # the library holds a few files that are wrong on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= SHORTEST:
                yield f"{name}:{getattr(node, 'name', '')}", text
