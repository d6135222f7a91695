"""Writing artifacts: what is stored reads back, and whatever goes wrong leaves nothing behind."""

from __future__ import annotations

import errno
import hashlib
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tests.runtime import fake_model
from v4c.errors import ArtifactError, Error, OutputError
from v4c.runtime import load
from v4c.runtime.artifact import Artifact, read_manifest
from v4c.runtime.dtypes import DTYPES
from v4c.runtime.manifest import WeightSpec
from v4c.runtime.tensors import array_over
from v4c.runtime.writer import ArtifactWriter, _HashedFile


def random_array(spec: WeightSpec, seed: int) -> np.ndarray:
    """Random bits of the storage type of ``spec``."""
    random = np.random.default_rng(seed)
    return np.frombuffer(random.bytes(spec.nbytes), DTYPES[spec.dtype].storage).reshape(spec.shape)


def empty(folder: Path) -> bool:
    return not list(folder.iterdir())


SPECS = st.lists(
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 9), max_size=3).map(tuple)), max_size=8
)


@settings(deadline=None, max_examples=25)
@given(specs=SPECS, shard_bytes=st.sampled_from([1, 64, 500, 1 << 30]), seed=st.integers(0, 1000))
def test_weights_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    specs: list[tuple[str, tuple[int, ...]]],
    shard_bytes: int,
    seed: int,
) -> None:
    weights = [WeightSpec(f"w.{index}", *spec) for index, spec in enumerate(specs)]
    arrays = [random_array(spec, seed + index) for index, spec in enumerate(weights)]
    destination = tmp_path_factory.mktemp("writer") / "a.v4c"
    with ArtifactWriter(destination, shard_bytes) as writer:
        writer.declare_weights(weights)
        for spec, array in zip(weights, arrays, strict=True):
            writer.write_weight(spec.name, array)
        writer.write_library(b"code")
        writer.finish(fake_model.manifest())
    artifact = Artifact(destination)
    for tensor, spec, array in zip(artifact.map_weights(), weights, arrays, strict=True):
        assert (str(tensor.dtype), tensor.shape) == (spec.dtype, spec.shape)
        assert tensor.data_ptr() % 64 == 0 or array.size == 0
        if DTYPES[spec.dtype].storage.name == spec.dtype:  # NumPy knows no others
            assert array_over(tensor).tobytes() == array.tobytes()
    # Another reader finds the same bytes under the same names.
    files = sorted(destination.glob("weights-*.safetensors"))
    found = {}
    for file in files:
        with safe_open(file, "np") as opened:
            for name in opened.keys():  # noqa: SIM118  not a mapping
                if not name.startswith("padding."):
                    part = opened.get_slice(name)
                    found[name] = (part.get_dtype(), tuple(part.get_shape()))
        sizes = [spec.nbytes for spec in artifact.manifest.weights if spec.file == file.name]
        assert len(sizes) == 1 or sum(sizes) <= shard_bytes
    assert found == {spec.name: (DTYPES[spec.dtype].safetensors, spec.shape) for spec in weights}


def test_bfloat16_comes_as_ml_dtypes_or_as_bits(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(2, 3)
    for name, array in (("typed", values.T), ("bits", values.view(np.uint16).T)):
        with ArtifactWriter(tmp_path / name) as writer:
            writer.write_library(b"code")
            writer.declare_weights([WeightSpec("w", "bfloat16", (3, 2))])
            writer.write_weight("w", array)  # not contiguous
            writer.finish(fake_model.manifest())
    stored = [(tmp_path / name / "weights-00001.safetensors").read_bytes() for name in ("typed", "bits")]
    assert stored[0] == stored[1]
    assert stored[0].endswith(np.ascontiguousarray(values.T).tobytes())


def test_every_file_is_listed_with_its_hash(artifact: Path, library: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with ArtifactWriter(tmp_path / "a.v4c") as writer:
        writer.copy_tokenizer(tmp_path / "tokenizer.json")
        writer.write_library(library)
        writer.finish(fake_model.manifest())
    manifest = read_manifest(tmp_path / "a.v4c")
    assert manifest.tokenizer == "tokenizer.json"
    present = {file.name for file in (tmp_path / "a.v4c").iterdir()}
    assert present == {"manifest.json", "tokenizer.json", manifest.library}
    for name, stored in manifest.files.items():
        content = (tmp_path / "a.v4c" / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (stored.size, stored.sha256)
    assert (tmp_path / "a.v4c" / manifest.library).read_bytes() == library.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"a.v4c", "tokenizer.json"}


def test_an_artifact_without_weights_can_be_opened_but_not_run(library: Path, tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "a.v4c") as writer:
        writer.write_library(library)
        writer.declare_weights(fake_model.WEIGHTS, stored=False)
        writer.finish(fake_model.manifest())
    assert [weight.name for weight in Artifact(tmp_path / "a.v4c").manifest.weights] == ["bias", "table"]
    with pytest.raises(ArtifactError, match="expected weights, found none: it was compiled without them"):
        load(tmp_path / "a.v4c")


def test_an_empty_folder_is_taken_and_a_used_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    (tmp_path / "plain").write_text("mine")
    with ArtifactWriter(tmp_path / "empty") as writer:
        writer.write_library(b"code")
        writer.finish(fake_model.manifest())
    assert read_manifest(tmp_path / "empty").vocab_size == fake_model.VOCAB
    for name, found in (("used", "found files in it"), ("plain", "found a file"), ("empty", "found files in it")):
        with pytest.raises(OutputError, match=found), ArtifactWriter(tmp_path / name):
            pytest.fail("the destination is checked first")
    with pytest.raises(OutputError, match="expected to write it"), ArtifactWriter(tmp_path / "no" / "parent"):
        pytest.fail("the destination is checked first")
    assert (tmp_path / "used" / "file").read_text() == "mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "plain", "used"]


def test_a_destination_taken_meanwhile_is_kept(tmp_path: Path) -> None:
    def write() -> None:
        with ArtifactWriter(tmp_path / "a.v4c") as writer:
            writer.write_library(b"code")
            (tmp_path / "a.v4c").mkdir()
            (tmp_path / "a.v4c" / "file").write_text("mine")
            writer.finish(fake_model.manifest())

    with pytest.raises(OutputError, match="Directory not empty"):
        write()
    assert [file.name for file in tmp_path.rglob("*")] == ["a.v4c", "file"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", range(6))
def test_an_error_at_any_write_leaves_nothing(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int
) -> None:
    write = _HashedFile.write
    calls = iter(range(100))

    def failing(self: _HashedFile, data: Any) -> None:
        if next(calls) == at:
            raise error
        write(self, data)

    monkeypatch.setattr(_HashedFile, "write", failing)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OutputError
    with pytest.raises(expected) as caught:
        fake_model.write(tmp_path / "a.v4c", library)
    if expected is OutputError:
        assert str(caught.value).endswith("No space left on device")
    assert empty(tmp_path)


def test_a_full_disk_is_one_line(library: Path, tmp_path: Path) -> None:
    """A real limit of the kernel, hit in the middle of a weight."""
    program = f"""
import resource, numpy as np
from v4c.errors import OutputError
from v4c.runtime.manifest import WeightSpec
from v4c.runtime.writer import ArtifactWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    with ArtifactWriter({str(tmp_path / "a.v4c")!r}) as writer:
        writer.declare_weights([WeightSpec("w", "float32", (1000, 1000))])
        writer.write_weight("w", np.ones((1000, 1000), np.float32))
except OutputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("weights-00001.safetensors: expected to write it, found File too large\n")
    assert done.stdout.count("\n") == 1
    assert empty(tmp_path)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


def write_wrong_order(writer: ArtifactWriter) -> None:
    writer.declare_weights(fake_model.WEIGHTS)
    writer.write_weight("table", fake_model.weights()["table"])


def write_wrong_shape(writer: ArtifactWriter) -> None:
    writer.declare_weights(fake_model.WEIGHTS)
    writer.write_weight("bias", fake_model.weights()["bias"][1:])


def write_wrong_dtype(writer: ArtifactWriter) -> None:
    writer.declare_weights(fake_model.WEIGHTS)
    writer.write_weight("bias", fake_model.weights()["bias"].astype(np.float16))


def write_wrong_byte_order(writer: ArtifactWriter) -> None:
    writer.declare_weights([WeightSpec("w", "float32", (1,))])
    writer.write_weight("w", np.ones(1, ">f4"))


def write_too_many(writer: ArtifactWriter) -> None:
    writer.declare_weights([])
    writer.write_weight("w", np.ones(1))


def finish_early(writer: ArtifactWriter) -> None:
    writer.write_library(b"code")
    writer.declare_weights(fake_model.WEIGHTS)
    writer.write_weight("bias", fake_model.weights()["bias"])
    writer.finish(fake_model.manifest())


def finish_without_library(writer: ArtifactWriter) -> None:
    writer.finish(fake_model.manifest())


def finish_with_a_wrong_manifest(writer: ArtifactWriter) -> None:
    writer.write_library(b"code")
    writer.finish(fake_model.manifest(vocab_size=0))


def not_finish(writer: ArtifactWriter) -> None:
    writer.write_library(b"code")


def declare_twice(writer: ArtifactWriter) -> None:
    writer.declare_weights(fake_model.WEIGHTS)
    writer.declare_weights(fake_model.WEIGHTS)


def declare_unknown_dtype(writer: ArtifactWriter) -> None:
    writer.declare_weights([WeightSpec("w", "int4", (1,))])


def copy_nothing(writer: ArtifactWriter) -> None:
    writer.copy_tokenizer("/nowhere/tokenizer.json")


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (write_wrong_order, r"weight 0: expected bias bfloat16\[24\], found table float32\[24, 24\]"),
        (write_wrong_shape, r"weight 0: expected bias bfloat16\[24\], found bias bfloat16\[23\]"),
        (write_wrong_dtype, r"weight 0: expected bias bfloat16\[24\], found bias float16\[24\]"),
        (write_wrong_byte_order, r"weight 0: expected w float32\[1\], found"),
        (write_too_many, "weight w: expected no further weight"),
        (finish_early, "expected 2 weights, found 1: table comes next"),
        (finish_without_library, "expected a library, found none"),
        (finish_with_a_wrong_manifest, r"manifest\.json: vocab_size: expected at least 1, found 0"),
        (not_finish, r"nothing was written: finish\(\) was not called"),
        (declare_twice, "expected one declaration, found a second"),
        (declare_unknown_dtype, "weight w: expected dtype in .* found int4"),
        (copy_nothing, r"tokenizer\.json: expected a file to copy, found No such file"),
    ],
)
def test_misuse_is_refused_and_leaves_nothing(
    tmp_path: Path, misuse: Callable[[ArtifactWriter], None], message: str
) -> None:
    with pytest.raises(Error, match=message), ArtifactWriter(tmp_path / "a.v4c") as writer:
        misuse(writer)
    assert empty(tmp_path)


def test_a_recompiled_artifact_at_the_same_place_runs_the_new_code(library: Path, tmp_path: Path) -> None:
    """dlopen knows libraries by path, so equal paths would run the code loaded first."""
    other = fake_model.compile_library(tmp_path / "other.so", offset=5)
    destination = fake_model.write(tmp_path / "a.v4c", library)
    first = load(destination)
    old = first.new_session().decode([1])
    for file in destination.iterdir():
        file.unlink()
    second = load(fake_model.write(destination, other))
    np.testing.assert_array_equal(second.new_session().decode([1]), old + 5)
    np.testing.assert_array_equal(first.new_session().decode([1]), old)
