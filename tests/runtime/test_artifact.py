"""Opening artifacts: damage in any file is noticed before anything is loaded, and so is the wrong machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime import fake_model
from v4c.errors import ArtifactError, InputError, UnsupportedError
from v4c.runtime import load
from v4c.runtime.artifact import Artifact, cpu_features, read_manifest
from v4c.runtime.manifest import Target

FILES = ("manifest.json", "tokenizer.json", "library", "weights-00001.safetensors", "weights-00002.safetensors")


@pytest.fixture(scope="module")
def whole(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with a file of every kind."""
    from v4c.runtime.writer import ArtifactWriter

    folder = tmp_path_factory.mktemp("whole")
    (folder / "t.json").write_text('{"version": "1.0"}')
    with ArtifactWriter(folder / "a.v4c", shard_bytes=64) as writer:
        writer.write_library(library)
        writer.copy_tokenizer(folder / "t.json")
        writer.declare_weights(fake_model.WEIGHTS)
        for name, array in fake_model.weights().items():
            writer.write_weight(name, array)
        writer.finish(fake_model.manifest())
    return folder / "a.v4c"


def file_of(artifact: Path, name: str) -> Path:
    return artifact / (read_manifest(artifact).library if name == "library" else name)


def refused(artifact: Path, verify: str = "all") -> str:
    with pytest.raises(ArtifactError) as caught:
        Artifact(artifact, verify)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
@settings(deadline=None, max_examples=15)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_noticed(whole: Path, name: str, where: float, bit: int) -> None:
    file = file_of(whole, name)
    content = file.read_bytes()
    damaged = bytearray(content)
    damaged[int(where * len(content))] ^= 1 << bit
    if name == "manifest.json" and content.split() == bytes(damaged).split():
        return  # one kind of white space for another
    file.write_bytes(damaged)
    try:
        assert file.name in refused(whole)
    finally:
        file.write_bytes(content)
    Artifact(whole)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", ["truncated", "longer", "missing"])
def test_files_of_another_size_are_refused(whole: Path, tmp_path: Path, name: str, change: str) -> None:
    damaged = shutil.copytree(whole, tmp_path / "a.v4c")
    file = file_of(damaged, name)
    content = file.read_bytes()
    if change == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-2] if change == "truncated" else content + b"x")
    for verify in ("all", "code"):
        message = refused(damaged, verify)
        assert file.name in message
        assert "expected" in message or "checksum" in message


def test_code_is_verified_even_when_weights_are_not(whole: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(whole, tmp_path / "a.v4c")
    for name in ("weights-00002.safetensors", "tokenizer.json"):
        file = damaged / name
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        Artifact(damaged, "code")
        assert f"{name}: expected SHA-256" in refused(damaged)
    library = file_of(damaged, "library")
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)
    assert f"{library.name}: expected SHA-256" in refused(damaged, "code")


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    assert "manifest.json: expected the manifest of an artifact, found No such file" in refused(tmp_path)
    assert "found No such file" in refused(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    assert "found Not a directory" in refused(tmp_path / "file")
    with pytest.raises(InputError, match="verify: expected one of all, code, found 'none'"):
        Artifact(tmp_path, "none")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"target": Target("cpu", "x86_64", ("fpu", "sse99", "avx1024"))},
            ArtifactError,
            "compiled for a CPU with sse99, avx1024, which this one lacks",
        ),
        ({"target": Target("cpu", "vax")}, ArtifactError, "compiled for vax, this machine is"),
        ({"target": Target("tpu", "x86_64")}, UnsupportedError, "expected target cpu, .* found tpu"),
        ({"tvm_version": "0.1"}, ArtifactError, "compiled with TVM 0.1, .* is installed: recompile"),
    ],
)
def test_the_wrong_machine_is_refused(
    library: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    artifact = fake_model.write(tmp_path / "a.v4c", library, **changes)
    with pytest.raises(error, match=message):
        load(artifact)


def test_a_library_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.so"
    file.write_bytes(b"not a shared object")
    with pytest.raises(ArtifactError, match=r"model-[0-9a-f]{16}\.so: expected a compiled library, found") as caught:
        load(fake_model.write(tmp_path / "a.v4c", file))
    assert "\n" not in str(caught.value)


def test_a_missing_function_is_named(library: Path, tmp_path: Path) -> None:
    functions = {"prefill": "prefill", "prefill_all": "prefill_all", "decode": "decode_one"}
    model = load(fake_model.write(tmp_path / "a.v4c", library, entry_points=functions))
    with pytest.raises(ArtifactError, match="function 'decode_one': expected in the library, found"):
        model.new_session().decode([1])


def test_features_of_this_machine_are_listed() -> None:
    assert "fpu" in cpu_features()
