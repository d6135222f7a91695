"""Artifacts whose writer was killed: another goes on where the checksums end, and the bytes are the same."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime import fake_model
from v4c.errors import ArtifactError
from v4c.runtime.artifact import Artifact
from v4c.runtime.manifest import WeightSpec
from v4c.runtime.partial import JOURNAL
from v4c.runtime.writer import ArtifactWriter

SPECS = [
    WeightSpec("a", "float32", (7, 5)),
    WeightSpec("scalar", "float32", ()),
    WeightSpec("empty", "int64", (0, 3)),
    WeightSpec("b", "uint8", (40, 33)),
    WeightSpec("c", "int64", (3,)),
    WeightSpec("last", "float32", (0,)),
]
SHARD_BYTES = 1500  # two files
ARRAYS = {s.name: np.random.default_rng(i).integers(0, 99, s.shape).astype(s.dtype) for i, s in enumerate(SPECS)}


def write(
    destination: Path, key: str | None = "key", step: int = 3, stop: int | None = None, specs: list[WeightSpec] = SPECS
) -> int:
    """Write the weights in slices of `step` rows; die of SIGKILL after `stop` slices. Returns the slices written."""
    written = 0
    with ArtifactWriter(destination, SHARD_BYTES) as writer:
        writer.write_library(b"code")
        writer.declare_weights(specs, resume_key=key)
        for spec in specs:
            array = ARRAYS[spec.name]
            there = writer.rows_written(spec.name)
            if there is None:
                continue
            for start in range(there, max(1, len(array)) if array.ndim else 1, step):
                if written == stop:
                    os.kill(os.getpid(), signal.SIGKILL)
                writer.write_rows(spec.name, array[start : start + step] if array.ndim else array)
                written += 1
        writer.finish(fake_model.manifest())
    return written


def killed(destination: Path, stop: int, key: str = "key") -> Path:
    """The folder that a writer leaves when it is killed after `stop` slices."""
    before = set(destination.parent.iterdir())
    child = os.fork()
    if child == 0:
        try:
            write(destination, key, stop=stop)
        finally:
            os._exit(1)  # never reached: it has been killed
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    (left,) = set(destination.parent.iterdir()) - before
    assert left.name.endswith(".partial")
    return left


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of an artifact written without interruption."""
    destination = tmp_path_factory.mktemp("whole") / "a.v4c"
    assert write(destination, key=None) == 21
    assert sorted(content(destination))[-2:] == ["weights-00001.safetensors", "weights-00002.safetensors"]
    return content(destination)


@settings(deadline=None, max_examples=20)
@given(stops=st.lists(st.integers(0, 20), min_size=1, max_size=3))
def test_killed_again_and_again(
    tmp_path_factory: pytest.TempPathFactory, whole: dict[str, bytes], stops: list[int]
) -> None:
    """Each attempt goes on in the same folder; together they write every slice once."""
    destination = tmp_path_factory.mktemp("killed") / "a.v4c"
    done = 0
    for stop in stops:
        if done + stop >= 21:
            break
        child = os.fork()
        if child == 0:
            try:
                write(destination, stop=stop)
            finally:
                os._exit(1)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        done += stop
    assert write(destination) == 21 - done
    assert content(destination) == whole
    Artifact(destination)
    assert [path.name for path in destination.parent.iterdir()] == ["a.v4c"]


def flip(file: str, place: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[place] ^= 1
        (folder / file).write_bytes(data)

    return damage


def shorten(file: str, by: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        os.truncate(folder / file, (folder / file).stat().st_size - by)

    return damage


def lengthen(folder: Path) -> None:
    """Bytes that were written and not yet recorded."""
    with (folder / "weights-00002.safetensors").open("ab") as file:
        file.write(b"half a slice")
    (folder / "stray").write_text("x")


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / JOURNAL).write_bytes(change((folder / JOURNAL).read_bytes()))

    return damage


def outside(text: bytes) -> bytes:
    return text.replace(b"weights-00002.safetensors", b"../outside.safetensors")


FIRST, SECOND = "weights-00001.safetensors", "weights-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "slices"),
    [
        (lambda folder: None, 9),
        (lengthen, 9),
        (flip(SECOND, -1), 10),  # the last slice
        (shorten(SECOND, 1), 10),
        (lambda folder: (folder / SECOND).unlink(), 16),
        (flip(FIRST, -1), 17),  # all of the second file with it
        (flip(FIRST, 20), 21),
        (rewrite(lambda text: text[:-20]), 10),
        (rewrite(lambda text: text.replace(b'"rows"', b'"lines"')), 21),
        (rewrite(lambda text: b""), 21),
        (rewrite(lambda text: b"\xff\n" + text), 21),
        (rewrite(outside), 16),
        (lambda folder: (folder / JOURNAL).unlink(), 21),
    ],
)
def test_only_what_is_intact_counts(
    damage: Callable[[Path], None], slices: int, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    left = killed(folder / "a.v4c", 12)
    (tmp_path / "outside.safetensors").write_text("mine")
    damage(left)
    written = write(folder / "a.v4c")
    assert content(folder / "a.v4c") == whole
    assert written == slices
    assert (tmp_path / "outside.safetensors").read_text() == "mine"


def test_other_weights_are_not_taken(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Another key, another destination, other specs; what is left for this destination goes when it is written."""
    killed(tmp_path / "a.v4c", 12, key="other")
    elsewhere = killed(tmp_path / "b.v4c", 12)
    assert write(tmp_path / "a.v4c") == 21
    assert content(tmp_path / "a.v4c") == whole
    assert {path.name for path in tmp_path.iterdir()} == {"a.v4c", elsewhere.name}


def test_a_folder_in_use_is_left_alone(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Two writers at once, for the same destination and weights."""
    with ArtifactWriter(tmp_path / "a.v4c", SHARD_BYTES) as first:
        first.declare_weights(SPECS, resume_key="key")
        first.write_rows("a", ARRAYS["a"][:3])
        assert write(tmp_path / "a.v4c") == 21
        first.write_rows("a", ARRAYS["a"][3:])
        assert first.rows_written("a") is None
        assert first.rows_written("b") == 0
        assert len(list(tmp_path.iterdir())) == 2
        first.__exit__(None, ArtifactError("stop"), None)
        first._finished = True
    assert content(tmp_path / "a.v4c") == whole


def test_a_failure_leaves_nothing_even_after_a_resume(tmp_path: Path) -> None:
    killed(tmp_path / "a.v4c", 12)

    def fail() -> None:
        with ArtifactWriter(tmp_path / "a.v4c", SHARD_BYTES) as writer:
            writer.declare_weights(SPECS, resume_key="key")
            assert writer.rows_written("a") is None
            raise ValueError("bad weights")

    with pytest.raises(ValueError, match="bad weights"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_the_check_is_told(tmp_path: Path) -> None:
    left = killed(tmp_path / "a.v4c", 12)
    sizes = [file.stat().st_size for file in left.glob("*.safetensors")]
    calls: list[tuple[int, int]] = []
    with ArtifactWriter(tmp_path / "a.v4c", SHARD_BYTES) as writer:
        writer.declare_weights(SPECS, resume_key="key", checked=lambda done, total: calls.append((done, total)))
        writer.__exit__(ValueError, ValueError(), None)
        writer._finished = True
    assert calls == sorted(calls)
    assert calls[-1] == (sum(sizes), sum(sizes))


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("a", np.zeros((8, 5), np.float32), r"expected a float32\[7, 5\], found a float32\[8, 5\]"),
        ("a", np.zeros((2, 4), np.float32), r"expected a float32\[2, 5\], found a float32\[2, 4\]"),
        ("a", np.zeros((2, 5)), r"expected a float32\[2, 5\], found a float64"),
        ("b", np.zeros((2, 5), np.float32), r"expected a float32\[2, 5\], found b"),
        ("a", np.zeros((), np.float32), r"expected a float32\[7, 5\], found a float32\[\]"),
    ],
)
def test_rows_that_do_not_fit(name: str, rows: np.ndarray, message: str, tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "a.v4c") as writer:
        writer.declare_weights(SPECS)
        with pytest.raises(ArtifactError, match=message):
            writer.write_rows(name, rows)
        writer.write_rows("a", ARRAYS["a"][:2])
        with pytest.raises(ArtifactError, match="expected a float32"):
            writer.write_weight("a", ARRAYS["a"])
        with pytest.raises(ArtifactError, match="expected the name of a declared weight"):
            writer.rows_written("nonsense")
        writer.__exit__(None, ArtifactError("stop"), None)
        writer._finished = True


def test_the_journal_says_how_far(tmp_path: Path) -> None:
    left = killed(tmp_path / "a.v4c", 12)
    lines = [json.loads(line) for line in (left / JOURNAL).read_text().splitlines()]
    assert len(lines) == 1 + 12
    assert lines[-1]["file"] == SECOND
    assert lines[-1]["size"] == (left / SECOND).stat().st_size
