"""Weights copied into huge pages: the same bytes on advised memory, the same tokens, and every refusal in one line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime import fake_model
from v4c.errors import ArtifactError, InputError, UnsupportedError
from v4c.runtime import Model, huge_pages, load
from v4c.runtime.artifact import Artifact
from v4c.runtime.huge_pages import check_huge_pages, copy_files

PIECE = 1000


@pytest.fixture
def advised() -> None:
    """A kernel that takes the advice."""
    try:
        check_huge_pages()
    except UnsupportedError as error:
        pytest.skip(f"this machine has no huge pages to give: {error}")


def flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds an address, from ``/proc/self/smaps``; ``hg`` is the advice."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.usefixtures("advised")
def test_a_model_computes_the_same(library: Path, tmp_path: Path, model: Model) -> None:
    """Two files of weights, both copied."""
    artifact = fake_model.write(tmp_path / "fake.v4c", library, shard_bytes=64)
    copied = load(artifact, huge_pages=True)
    files = list(artifact.glob("weights-*"))
    assert len(files) == 2
    assert copied.resident_weight_bytes == sum(file.stat().st_size for file in files)
    prompt = np.array([[5, 1, 7, 7, 2, 9]])
    with copied.new_session() as ours, model.new_session() as theirs:
        np.testing.assert_array_equal(ours.prefill(prompt), theirs.prefill(prompt))
        np.testing.assert_array_equal(ours.decode([4]), theirs.decode([4]))


@pytest.mark.usefixtures("advised")
def test_weights_are_not_mapped_files(artifact: Path) -> None:
    opened = Artifact(artifact)
    place = [weight.name for weight in opened.manifest.weights].index("table")
    for weights, advice in ((opened.copy_weights(), True), (opened.map_weights(), False)):
        table = np.from_dlpack(weights[place])
        assert ("hg" in flags_at(table.ctypes.data)) is advice
        np.testing.assert_array_equal(table, fake_model.weights()["table"])


@pytest.mark.usefixtures("advised")
@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(1, 5 * PIECE) | st.sampled_from([PIECE - 1, PIECE, PIECE + 1]), max_size=4))
def test_copies_are_the_files(sizes: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("files")
    contents = {folder / f"{i}": np.random.default_rng(i).bytes(size) for i, size in enumerate(sizes)}
    for file, content in contents.items():
        file.write_bytes(content)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(huge_pages, "_PIECE", PIECE)
        copies = copy_files({file: len(content) for file, content in contents.items()})
    assert copies.keys() == contents.keys()
    for file, copy in copies.items():
        assert copy.tobytes() == contents[file]
        assert copy.ctypes.data % (2 << 20) == 0
        assert "hg" in flags_at(copy.ctypes.data)


def test_a_file_that_ends_early_or_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_PIECE", PIECE)
    whole, short = tmp_path / "whole", tmp_path / "short"
    whole.write_bytes(b"x" * 3 * PIECE)
    short.write_bytes(b"x" * (2 * PIECE + 7))
    with pytest.raises(ArtifactError, match=rf"short: expected {3 * PIECE} bytes, found {2 * PIECE + 7}") as caught:
        copy_files({whole: 3 * PIECE, short: 3 * PIECE})
    assert "\n" not in str(caught.value)
    with pytest.raises(ArtifactError, match=r"gone: expected a file that can be read, found .*No such file"):
        copy_files({tmp_path / "gone": 3 * PIECE})


@pytest.mark.parametrize(
    ("setting", "found"), [("always madvise [never]\n", r"always madvise \[never\]"), (None, "nothing")]
)
def test_a_kernel_without_them_is_refused(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str | None, found: str
) -> None:
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
    monkeypatch.setattr(huge_pages, "_SETTING", tmp_path / "enabled")
    with pytest.raises(UnsupportedError, match=rf"^huge_pages: expected 'madvise' or 'always' in .*, found {found}$"):
        load(artifact, huge_pages=True)
    load(artifact)


@pytest.mark.usefixtures("advised")
def test_weights_must_fit(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:       1 kB\n")
    monkeypatch.setattr(huge_pages, "_MEMORY", tmp_path / "meminfo")
    with pytest.raises(InputError, match=r"huge_pages: expected \d+ bytes of free memory for the weights, found 1024"):
        load(artifact, huge_pages=True)
    monkeypatch.setattr(huge_pages, "_MEMORY", tmp_path / "none")  # it does not say: try
    load(artifact, huge_pages=True)


@pytest.mark.usefixtures("advised")
def test_not_with_experts_on_disk_and_not_for_a_gpu(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="huge_pages: expected no weights_memory with them, found 1024 bytes"):
        load(artifact, huge_pages=True, weights_memory="1KiB")
    monkeypatch.setattr(Artifact, "on_gpu", True)
    monkeypatch.setattr(Artifact, "check_machine", lambda self: None)
    with pytest.raises(InputError, match="huge_pages: expected a model for the processor, found target cpu"):
        load(artifact, huge_pages=True)
