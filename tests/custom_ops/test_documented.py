"""docs/ops.md and docs/fused-ops.md hold every operator: each input and output with its shape, attributes, a source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from v4c.custom_ops import MODULES, OPS

DOCS = Path(__file__).parents[2] / "docs"


def sections() -> dict[str, str]:
    """Text below the heading of each operator."""
    found = {}
    for page in ("ops.md", "fused-ops.md"):
        parts = re.split(r"^## (\w+)$", (DOCS / page).read_text(), flags=re.MULTILINE)
        found |= dict(zip(parts[1::2], parts[2::2], strict=True))
    return found


def built_in() -> list[str]:
    """The operators of v4c, not those that tests declare."""
    return [name for name, op in OPS.items() if op.reference.__module__.rpartition(".")[2] in MODULES]


@pytest.mark.parametrize("name", built_in())
def test_every_operator_has_a_page_of_its_own(name: str) -> None:
    op, text = OPS[name], sections()[name]
    listed = [
        (kind, names, cell) for kind, names, cell in re.findall(r"^\| ([\w, ]+) \| (.+?) \| (.+) \|$", text, re.M)
    ]

    def cells(kind: str) -> dict[str, str]:
        return {n: cell for k, names, cell in listed if k.startswith(kind) for n in re.findall(r"`(\w+)`", names)}

    assert list(cells("input")) == list(op.inputs)
    assert all("`[" in cell for cell in cells("input").values()), "shapes"
    assert list(cells("output")) == list(op.outputs)
    assert list(cells("attribute")) == list(op.attributes)
    for attribute, kind in op.attributes.items():
        assert cells("attribute")[attribute].startswith(kind.__name__)
    for output, source in op.writes.items():
        if output in cells("input, state"):
            assert cells("output")[output].startswith(("over ", "over the inputs")), source
    assert re.search(r"paper,\s+(section|eq|on)", text), "where it comes from"
    assert "`" in re.sub(r"^\|.*$", "", text, flags=re.M), "an equation"


def test_nothing_else_is_documented() -> None:
    assert set(sections()) == set(built_in())
