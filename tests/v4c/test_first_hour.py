"""The guides can be followed: every command of a page has the options it is shown with, and the first hour's run."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.v4c.cli_harness import V4C
from v4c.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shown(page: Path) -> list[str]:
    """Commands that a page shows behind a prompt."""
    return re.findall(r"^\$ (v4c .*)$", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if shown(page)], ids=lambda page: page.name)
def test_commands_have_the_options_they_are_shown_with(page: Path) -> None:
    for line in shown(page):
        _, name, *arguments = shlex.split(line, comments=True)
        if name.startswith("-"):
            continue
        command = main.commands[name]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for argument in arguments:
            if re.match(r"--?[a-z]", argument):
                assert argument.partition("=")[0] in known | {"-h", "--help"}, line


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([\w.-]*\.md)?(#[\w-]+)?\)", page.read_text()):
            file = page.parent / target if target else page
            assert file.is_file(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                slugs = {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{page.name}: {target}{anchor}"


@pytest.mark.slow
def test_the_first_hour(tmp_path: Path) -> None:
    page = ROOT / "docs" / "first-hour.md"
    for line in shown(page):
        done = subprocess.run(
            [V4C, *shlex.split(line)[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    (program,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    done = subprocess.run(
        [V4C.with_name("python"), "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 10
