"""The safetensors reader: headers that lie, files that are cut, and agreement with the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from v4c.errors import CheckpointError
from v4c.frontend.safetensors_reader import read_header


def raw_file(path: Path, header: Any, data: bytes = bytes(16), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ({"a": entry("F32", [4], 0, 16), "b": entry("F32", [2], 8, 16)}, "found an overlap"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [2], 8, 16)}, "found a hole"),
        ({"a": entry("F32", [2], 0, 8)}, "expected its data to end at byte"),
        ({"a": entry("F32", [5], 0, 20)}, "out of bounds or truncated"),
        ({"a": entry("F32", [4], 16, 0)}, "out of bounds or truncated"),
        ({"a": entry("F32", [4], -16, 0)}, "expected two data_offsets"),
        ({"a": entry("F32", [4], 0)}, "expected two data_offsets"),
        ({"a": entry("F32", [4], 0.0, 16)}, "expected two data_offsets"),
        ({"a": entry("F32", [3], 0, 16)}, r"expected 12 bytes for F32 \[3\], found 16"),
        ({"a": entry("F32", [2**63, 2**63], 0, 16)}, "expected a shape"),
        ({"a": entry("F32", [2**47, 2**47, 2**47], 0, 16)}, "found 16"),
        ({"a": entry("F32", [True, 4], 0, 16)}, "expected a shape"),
        ({"a": entry("F32", [-4, -1], 0, 16)}, "expected a shape"),
        ({"a": entry("F32", 4, 0, 16)}, "expected a shape"),
        ({"a": entry("Q4_0", [4], 0, 16)}, "expected a known dtype, found 'Q4_0'"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "expected dtype, shape and data_offsets"),
        ({"a": 4}, "expected dtype, shape and data_offsets"),
        (b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "a": 1}', "found 'a' twice"),
        (b"[1]", "expected a JSON object"),
        (b"{", "expected valid JSON"),
        (b"\xff", "expected UTF-8"),
    ],
)
def test_bad_headers(header: Any, found: str, tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x.safetensors", header)
    with pytest.raises(CheckpointError, match=found) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [10**6, 2**63, 2**64 - 1])
def test_header_length_beyond_the_file(length: int, tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x.safetensors", {"a": entry("F32", [4], 0, 16)}, length=length)
    with pytest.raises(CheckpointError, match=f"found a length of {length}"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 7])
def test_shorter_than_a_length(size: int, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match=f"found only {size} bytes"):
        read_header(tmp_path / "x.safetensors")


GOOD = {"__metadata__": {"format": "pt"}, "a": entry("F32", [3], 0, 12), "b": entry("BF16", [1, 2], 12, 16)}


@settings(deadline=None, max_examples=200)
@given(cut=st.integers(0, 300), position=st.integers(0, 299), value=st.integers(0, 255))
def test_mutated_files(tmp_path_factory: pytest.TempPathFactory, cut: int, position: int, value: int) -> None:
    """A cut or changed byte anywhere: a clean error, or a reading that the safetensors library shares."""
    path = raw_file(tmp_path_factory.mktemp("mutated") / "x.safetensors", GOOD)
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data[: max(0, len(data) - cut)] if cut < 100 else data)
    try:
        tensors = read_header(path)
    except CheckpointError:
        return
    with safetensors.safe_open(path, "np") as reference:
        assert set(reference.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert tuple(reference.get_slice(name).get_shape()) == tensor.shape
            assert reference.get_slice(name).get_dtype() == tensor.dtype
