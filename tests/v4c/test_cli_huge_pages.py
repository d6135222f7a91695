"""``--huge-pages`` as a user gives it: the same tokens, a note in measurements, one line where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.v4c.cli_harness import assert_one_line, invoke
from v4c.errors import UnsupportedError
from v4c.runtime import huge_pages

RUN = ("--tokens", "1,2,3", "--max-new-tokens", "6", "--ignore-eos", "--json")
BENCH = ("--context", "20", "--rounds", "1", "--prompt-tokens", "16")


@pytest.fixture
def advised() -> None:
    """A kernel that takes the advice."""
    try:
        huge_pages.check_huge_pages()
    except UnsupportedError as error:
        pytest.skip(f"this machine has no huge pages to give: {error}")


@pytest.mark.usefixtures("advised")
def test_run_prints_the_same(tiny_artifact: Path) -> None:
    mapped, copied = (invoke("run", tiny_artifact, *RUN, *more) for more in ((), ("--huge-pages",)))
    assert (mapped.exit_code, copied.exit_code) == (0, 0), copied.stderr
    ours, theirs = (json.loads(result.stdout)["token_ids"] for result in (copied, mapped))
    assert ours == theirs
    assert len(ours) == 6


@pytest.mark.usefixtures("advised")
def test_bench_says_so(tiny_artifact: Path) -> None:
    text = invoke("bench", tiny_artifact, *BENCH, "--huge-pages")
    assert text.exit_code == 0, text.stderr
    assert text.stdout.splitlines()[0].endswith("threads; weights in huge pages")
    for more, expected in (((), False), (("--huge-pages",), True)):
        assert json.loads(invoke("bench", tiny_artifact, *BENCH, "--json", *more).stdout)["huge_pages"] is expected


@pytest.mark.parametrize("command", [("run", RUN), ("bench", BENCH)])
def test_refusals(
    command: tuple[str, tuple[str, ...]], tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = command
    result = invoke(name, tiny_artifact, *options, "--huge-pages", "--weights-memory", "1GiB")
    assert_one_line(result, "huge_pages: expected no weights_memory with them, found 1073741824 bytes")
    monkeypatch.setattr(huge_pages, "_SETTING", tmp_path / "enabled")
    assert_one_line(invoke(name, tiny_artifact, *options, "--huge-pages"), "huge_pages: expected 'madvise' or 'always'")
