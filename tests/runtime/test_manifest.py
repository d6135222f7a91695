"""The manifest: round trips, and a one-line refusal for every way it can be wrong."""

from __future__ import annotations

import json
import string
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime import fake_model
from v4c.errors import ArtifactError
from v4c.runtime.cache_specs import CacheSpec, Rows
from v4c.runtime.dtypes import DTYPES
from v4c.runtime.manifest import Manifest, StoredFile, StoredWeight, WeightSpec, _checksum

NAMES = st.text(string.ascii_letters + "._é", min_size=1, max_size=12)
SIZES = st.integers(1, 1 << 20)


def complete() -> Manifest:
    """A manifest as the writer completes it."""
    return fake_model.manifest(
        weights=(StoredWeight("embed", "bfloat16", (24, 8), "weights-00001.safetensors", 64),),
        library="model-0123.so",
        files={
            "model-0123.so": StoredFile(9, "0" * 64),
            "weights-00001.safetensors": StoredFile(64 + 384, "1" * 64),
        },
    )


def signed(document: dict[str, Any]) -> str:
    """JSON with a fitting checksum: what a wrong compiler, rather than a damaged disk, would leave."""
    document.pop("checksum", None)
    return json.dumps({**document, "checksum": _checksum(document)})


def refusal(text: str) -> str:
    with pytest.raises(ArtifactError) as caught:
        Manifest.from_json(text, "M")
    message = str(caught.value)
    assert message.startswith("M: ")
    assert "\n" not in message
    return message


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_round_trip(data: st.DataObject) -> None:
    dtypes = st.sampled_from(sorted(DTYPES))
    names = data.draw(st.lists(NAMES, unique=True, max_size=6))
    caches = tuple(
        CacheSpec(
            name,
            data.draw(dtypes),
            ("batch", data.draw(st.builds(Rows, SIZES) | SIZES), *data.draw(st.lists(SIZES, max_size=2))),
        )
        for name in names
    )
    specs = [WeightSpec(name, data.draw(dtypes), tuple(data.draw(st.lists(SIZES, max_size=3)))) for name in names]
    files = {"m.so": StoredFile(data.draw(SIZES), "a" * 64), "w": StoredFile(1 << 70, "b" * 64)}
    weights = tuple(
        StoredWeight(s.name, s.dtype, s.shape, "w", 64 * data.draw(SIZES), on_host=data.draw(st.booleans()))
        for s in specs
    )
    manifest = fake_model.manifest(
        caches=caches, weights=weights, library="m.so", files=files, build={"quant": "int8", "é": [1, None]}
    )
    assert Manifest.from_json(manifest.to_json(), "M") == manifest


def test_only_weights_in_host_memory_have_a_key_for_it() -> None:
    """So manifests without such weights are what they were before there were any, and old ones are read."""
    plain = complete()
    assert "memory" not in json.loads(plain.to_json())["weights"][0]
    held = replace(plain, weights=(replace(plain.weights[0], on_host=True),))
    document = json.loads(held.to_json())
    assert document["weights"][0]["memory"] == "host"
    del document["weights"][0]["memory"]
    assert Manifest.from_json(signed(document), "M") == plain


def test_cache_sizes_follow_batch_and_context() -> None:
    grows = CacheSpec("rows", "float32", ("batch", Rows(128), 512))
    assert grows.ratio == 128
    assert grows.sizes(3, 1024) == (3, 8, 512)
    assert grows.sizes(1, 1151) == (1, 8, 512)  # an unfinished window has no row
    assert grows.sizes(1, 100) == (1, 1, 512)  # never empty
    ring = CacheSpec("window", "float32", ("batch", 128, 512))
    assert ring.ratio is None
    assert ring.sizes(2, 10**6) == (2, 128, 512)


def test_other_format_version() -> None:
    document = json.loads(complete().to_json())
    document["format_version"] = 2
    document["future_key"] = True
    assert refusal(json.dumps(document)) == "M: artifact format 2, this v4c reads format 1: recompile"


def test_every_missing_key_is_named() -> None:
    document = json.loads(complete().to_json())
    paths: list[tuple[Any, ...]] = [(key,) for key in document]
    paths += [("target", key) for key in document["target"]]
    paths += [("dtypes", key) for key in document["dtypes"]]
    paths += [("caches", 0, key) for key in document["caches"][0]]
    paths += [("weights", 0, key) for key in document["weights"][0]]
    paths += [("files", "model-0123.so", key) for key in ("size", "sha256")]
    paths += [("entry_points", name) for name in document["entry_points"]]
    paths += [("entry_points", "decode", key) for key in ("function", "parameters")]
    for path in paths:
        damaged = json.loads(complete().to_json())
        holder = damaged
        for step in path[:-1]:
            holder = holder[step]
        del holder[path[-1]]
        text = json.dumps(damaged) if path == ("checksum",) else signed(damaged)
        assert f"key {path[-1]!r} is missing" in refusal(text)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("extra",), 1, "unknown key 'extra'"),
        (("target", "extra"), 1, "target: unknown key 'extra'"),
        (("vocab_size",), 0, "vocab_size: expected at least 1, found 0"),
        (("vocab_size",), True, "vocab_size: expected an integer, found True"),
        (("vocab_size",), "9", "vocab_size: expected an integer, found '9'"),
        (("max_context",), 1.5, "max_context: expected an integer, found 1.5"),
        (("tvm_version",), "", "tvm_version: expected a non-empty string, found ''"),
        (("config",), [], "config: expected an object, found []"),
        (("eos_token_ids",), [24], "eos_token_ids: expected ids below 24, found 24"),
        (("eos_token_ids",), [True], "eos_token_ids: expected a list of token ids, found True"),
        (("target", "cpu_features"), [1], "target: cpu_features: expected a list of flag names, found 1"),
        (("caches", 0), 7, "caches[0]: expected an object, found int"),
        (("caches", 0, "dtype"), "float31", "caches[0]: dtype: expected one of"),
        (("caches", 0, "shape"), [], "caches[0]: shape: expected a list that begins"),
        (("caches", 0, "shape"), [5, 5], "caches[0]: shape: expected"),
        (("caches", 0, "shape"), ["batch", 5, {"rows": 4}], "caches[0]: shape: expected"),
        (("caches", 0, "shape"), ["batch", {"rows": 0}], "caches[0]: shape[1]: rows: expected at least 1"),
        (("caches", 0, "shape"), ["batch", 0], "caches[0]: shape: expected"),
        (("caches", 1, "name"), "layers.0.window", "caches: expected unique names, found 'layers.0.window'"),
        (("weights", 0, "offset"), 32, "weights[0]: offset: expected a multiple of 64, found 32"),
        (("weights", 0, "offset"), 128, "weights[0]: offset: expected 384 bytes within the 448 of weights"),
        (("weights", 0, "offset"), -64, "weights[0]: offset: expected at least 0"),
        (("weights", 0, "shape"), [-1, -384], "weights[0]: shape: expected sizes of at least 0"),
        (("weights", 0, "file"), "other", "weights[0]: file: expected a file listed under files, found 'other'"),
        (("library",), "../m.so", "library: expected a file listed under files, found '../m.so'"),
        (("tokenizer",), "t.json", "tokenizer: expected a file listed under files, found 't.json'"),
        (("files", "../x"), {"size": 1, "sha256": "0" * 64}, "files: expected plain file names, found '../x'"),
        (("files", "/etc/x"), {"size": 1, "sha256": "0" * 64}, "files: expected plain file names, found '/etc/x'"),
        (("files", ".."), {"size": 1, "sha256": "0" * 64}, "files: expected plain file names, found '..'"),
        (("files", "manifest.json"), {"size": 1, "sha256": "0" * 64}, "files: expected plain file names"),
        (("files", "a"), {"size": 1, "sha256": "0" * 63}, "files: a: sha256: expected 64 hexadecimal digits"),
        (("entry_points", "decode", "parameters"), ["weights"], "entry_points: decode: parameters: expected"),
        (("entry_points", "verify"), {}, "entry_points: unknown key 'verify'"),
        (("weights", 0, "memory"), "gpu", "weights[0]: memory: expected 'host' or no such key, found 'gpu'"),
    ],
)
def test_wrong_values_are_named(path: tuple[Any, ...], value: Any, message: str) -> None:
    document = json.loads(complete().to_json())
    holder = document
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value
    assert refusal(signed(document)).startswith(f"M: {message}")


@pytest.mark.parametrize("text", ["", "[", "[]", "null", "{", '"x"', "[" * 100_000])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    assert "expected" in refusal(text)


def test_edits_break_the_checksum() -> None:
    document = json.loads(complete().to_json())
    document["config"]["vocab_size"] += 1
    assert refusal(json.dumps(document)) == "M: its content does not match its checksum: damaged or edited"
