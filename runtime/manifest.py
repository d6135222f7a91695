"""``manifest.json``: what an artifact is, what its compiled functions take, and every file with size and SHA-256.

The compile driver fills a `Manifest`; the writer adds what it stored and writes it; loading reads it back strictly.
The manifest carries a checksum of itself, so that accidental damage to any file of an artifact is noticed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from v4c.errors import ArtifactError
from v4c.runtime.cache_specs import CacheSpec, caches_json, read_caches, read_dtype
from v4c.runtime.dtypes import DTYPES
from v4c.runtime.fields import Fields

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
ALIGNMENT = 64
"""Bytes; every weight, cache and input starts on such a boundary: one cache line, one AVX-512 register."""

ENTRY_POINTS = ("prefill", "prefill_all", "decode")
DECODE_ONE = "decode_one"
"""An entry point a library may have besides `ENTRY_POINTS`: ``decode`` of a batch of one row."""
"""Logits of each row's last live token [B, V]; of all positions [B, S, V]; and [B, V] with the chunk bound to 1."""

PREFILL_STREAMS, VERIFY, DRAFT = "prefill_streams", "verify", "draft"
"""Functions of an artifact with a multi-token-prediction layer, see `MTP`: ``prefill`` and ``prefill_all`` that return
the residual streams [B, S, M, D] before the head after the logits, and the layer itself."""

PARAMETERS = ("input_ids", "positions", "lengths", "caches", "weights")
"""Argument order of every entry point: int64 [B, S], [B], [B], then all caches and all weights in manifest order.
Each returns a tuple: float32 logits, then the caches, which it has updated in place."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HOST = "host"
"""What a weight's ``memory`` says where it stays in host memory; artifacts without such weights have no such key."""


@dataclass(frozen=True)
class WeightSpec:
    """Name, dtype and shape of one packed weight, in the order the compiled functions take them.

    `on_host` is a table that stays in host memory when the other weights go to a GPU.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    on_host: bool = field(default=False, kw_only=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].storage.itemsize


@dataclass(frozen=True)
class StoredWeight(WeightSpec):
    """A weight and where it lies: byte ``offset`` from the start of ``file``; no file when compiled without weights."""

    file: str | None
    offset: int


@dataclass(frozen=True)
class StoredFile:
    """Size in bytes and SHA-256 (hexadecimal) of one file of the artifact."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Target:
    """The machine the library is for.

    Attributes:
        name: ``"cpu:x86-64-v4"``, or ``"ascend-sim:Ascend910B1"`` for a simulation, and so on.
        arch: as `platform.machine` names it, such as ``"x86_64"``.
        cpu_features: flags that ``/proc/cpuinfo`` must list, such as ``"avx512f"`` (the kernel's names, not LLVM's).
    """

    name: str
    arch: str
    cpu_features: tuple[str, ...] = ()


@dataclass(frozen=True)
class DTypes:
    """Main element types: of the packed weights (``"int8"`` when quantised), the activations, and the caches."""

    weights: str
    activations: str
    kv: str


@dataclass(frozen=True)
class MTP:
    """The multi-token-prediction layer: functions `PREFILL_STREAMS`, `VERIFY` and `DRAFT` of the library.

    `DRAFT` takes int64 [B, S], [B], [B] (the tokens after those that the streams belong to; positions and lengths of
    the streams), float32 streams [B, S, M, D], then `caches` and `weights`. It returns float32 logits [B, V] of the
    token after each row's last live one, then its caches, updated in place.

    Attributes:
        caches: the layer's, in argument order.
        weights: names of the weights `DRAFT` takes, in argument order; some are the model's too.
        own_weights: those that only `DRAFT` takes; they are the last of the manifest's.
    """

    caches: tuple[CacheSpec, ...]
    weights: tuple[str, ...]
    own_weights: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything about an artifact. The compile driver sets the fields up to ``build``; the writer sets the others.

    Attributes:
        v4c_version: version that compiled it.
        tvm_version: version of apache-tvm that compiled it; the runtime must be the same.
        target: machine it runs on.
        dtypes: main element types.
        config: the model's configuration in Hugging Face layout.
        vocab_size: token ids are below this.
        max_context: largest context of a session, in tokens.
        eos_token_ids: ids that end a generation; may be empty.
        caches: caches in argument order.
        entry_points: entry point (`ENTRY_POINTS`, perhaps `DECODE_ONE`) to the name of its function in the library.
        build: free notes on how it was compiled (options, passes), for `v4c inspect`.
        plan: file name of the launch plan of a simulated device, or None.
        mtp: the layer that guesses a token ahead, or None.
        weights: weights in argument order.
        library: file name of the compiled library.
        tokenizer: file name of the tokenizer, or None.
        files: every file but the manifest itself.
    """

    v4c_version: str
    tvm_version: str
    target: Target
    dtypes: DTypes
    config: Mapping[str, Any]
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    caches: tuple[CacheSpec, ...]
    entry_points: Mapping[str, str]
    build: Mapping[str, Any] = field(default_factory=dict)
    plan: str | None = None
    mtp: MTP | None = None
    weights: tuple[StoredWeight, ...] = ()
    library: str = ""
    tokenizer: str | None = None
    files: Mapping[str, StoredFile] = field(default_factory=dict)

    @property
    def has_weights(self) -> bool:
        """False for an artifact compiled without weights: it can be inspected, not run."""
        return all(weight.file is not None for weight in self.weights)

    @property
    def all_caches(self) -> tuple[CacheSpec, ...]:
        """The model's caches, then the MTP layer's."""
        return self.caches if self.mtp is None else (*self.caches, *self.mtp.caches)

    @property
    def main_weights(self) -> int:
        """How many weights the entry points take: all but the MTP layer's own, which come last."""
        return len(self.weights) - (0 if self.mtp is None else len(self.mtp.own_weights))

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        document = {
            "format_version": FORMAT_VERSION,
            "v4c_version": self.v4c_version,
            "tvm_version": self.tvm_version,
            "target": {**vars(self.target), "cpu_features": list(self.target.cpu_features)},
            "dtypes": vars(self.dtypes),
            "config": dict(self.config),
            "vocab_size": self.vocab_size,
            "max_context": self.max_context,
            "eos_token_ids": list(self.eos_token_ids),
            "caches": caches_json(self.caches),
            "entry_points": {
                name: {"function": function, "parameters": list(PARAMETERS)}
                for name, function in self.entry_points.items()
            },
            "build": dict(self.build),
            **({"plan": self.plan} if self.plan is not None else {}),
            **({"mtp": _mtp_json(self.mtp)} if self.mtp is not None else {}),
            "weights": [_weight_json(weight) for weight in self.weights],
            "library": self.library,
            "tokenizer": self.tokenizer,
            "files": {name: vars(stored) for name, stored in sorted(self.files.items())},
        }
        return json.dumps({**document, "checksum": _checksum(document)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Read and check ``manifest.json``; ``where`` names it in messages.

        Raises:
            ArtifactError: it is damaged, incomplete, contradicts itself, or is of another format version.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{where}: expected JSON, found {_one_line(error)}") from None
        top = Fields(document, where)
        version = top.count("format_version")
        if version != FORMAT_VERSION:
            raise ArtifactError(
                f"{where}: artifact format {version}, this v4c reads format {FORMAT_VERSION}: recompile"
            )
        checksum = top.text("checksum")
        if checksum != _checksum({key: value for key, value in document.items() if key != "checksum"}):
            raise ArtifactError(f"{where}: its content does not match its checksum: damaged or edited")
        files = _files(top.section("files"))
        manifest = cls(
            v4c_version=top.text("v4c_version"),
            tvm_version=top.text("tvm_version"),
            target=_target(top.section("target")),
            dtypes=_dtypes(top.section("dtypes")),
            config=top.mapping("config"),
            vocab_size=top.count("vocab_size", 1),
            max_context=top.count("max_context", 1),
            eos_token_ids=tuple(top.items("eos_token_ids", int, "token ids")),
            caches=read_caches(top),
            entry_points=_entry_points(top.section("entry_points")),
            build=top.mapping("build"),
            plan=_listed(top, "plan", top.optional_text("plan") if "plan" in document else None, files),
            mtp=_mtp(top.section("mtp")) if "mtp" in document else None,
            weights=tuple(
                _weight(Fields(weight, f"{where}: weights[{i}]"), files)
                for i, weight in enumerate(top.take("weights", list, "a list"))
            ),
            library=_listed(top, "library", top.text("library"), files),
            tokenizer=_listed(top, "tokenizer", top.optional_text("tokenizer"), files),
            files=files,
        )
        top.done()
        _unique(top, "caches", (cache.name for cache in manifest.all_caches))
        _unique(top, "weights", (weight.name for weight in manifest.weights))
        _check_mtp(top, manifest)
        for token in manifest.eos_token_ids:
            if not 0 <= token < manifest.vocab_size:
                raise top.fail("eos_token_ids", f"ids below {manifest.vocab_size}", token)
        return manifest


def _checksum(document: Mapping[str, Any]) -> str:
    """SHA-256 of the document's canonical JSON: layout does not count, content does."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _unique(fields: Fields, key: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise fields.fail(key, "unique names", name)
        seen.add(name)


def _listed(fields: Fields, key: str, name: Any, files: Mapping[str, StoredFile]) -> Any:
    if name is not None and name not in files:
        raise fields.fail(key, "a file listed under files", name)
    return name


def _files(fields: Fields) -> dict[str, StoredFile]:
    files = {}
    for name in fields.remaining():
        # Plain names only: nothing an artifact says may reach outside its folder.
        if not _PLAIN_NAME.fullmatch(name) or name == MANIFEST_NAME:
            raise ArtifactError(f"{fields.where}: expected plain file names, found {name!r}")
        entry = fields.section(name)
        files[name] = StoredFile(entry.count("size"), entry.text("sha256"))
        if not _SHA256.fullmatch(files[name].sha256):
            raise entry.fail("sha256", "64 hexadecimal digits", files[name].sha256)
        entry.done()
    return files


def _target(fields: Fields) -> Target:
    target = Target(fields.text("name"), fields.text("arch"), tuple(fields.items("cpu_features", str, "flag names")))
    fields.done()
    return target


def _dtypes(fields: Fields) -> DTypes:
    dtypes = DTypes(fields.text("weights"), fields.text("activations"), fields.text("kv"))
    fields.done()
    return dtypes


def _mtp(fields: Fields) -> MTP:
    names = (tuple(fields.items(key, str, "names of weights")) for key in ("weights", "own_weights"))
    mtp = MTP(read_caches(fields), *names)
    fields.done()
    return mtp


def _mtp_json(mtp: MTP) -> dict[str, Any]:
    return {"caches": caches_json(mtp.caches), "weights": list(mtp.weights), "own_weights": list(mtp.own_weights)}


def _check_mtp(fields: Fields, manifest: Manifest) -> None:
    """The names an MTP layer gives are weights; its own are the last ones."""
    if manifest.mtp is None:
        return
    names = [weight.name for weight in manifest.weights]
    for name in manifest.mtp.weights:
        if name not in names:
            raise fields.fail("mtp", "names of weights", name)
    if tuple(names[max(manifest.main_weights, 0) :]) != manifest.mtp.own_weights:
        raise fields.fail("mtp", "own_weights to be the last weights", list(manifest.mtp.own_weights)[:1])


def _weight_json(weight: StoredWeight) -> dict[str, Any]:
    """A weight's entry; its place in memory is said only where it is not where the program runs."""
    entry = {**vars(weight), "shape": list(weight.shape)}
    if entry.pop("on_host"):
        entry["memory"] = _HOST
    return entry


def _weight(fields: Fields, files: Mapping[str, StoredFile]) -> StoredWeight:
    shape = tuple(fields.items("shape", int, "sizes"))
    if any(size < 0 for size in shape):
        raise fields.fail("shape", "sizes of at least 0", shape)
    file = _listed(fields, "file", fields.optional_text("file"), files)
    memory = fields.text("memory") if "memory" in fields.remaining() else ""
    if memory not in ("", _HOST):
        raise fields.fail("memory", f"{_HOST!r} or no such key", memory)
    on_host = memory == _HOST
    weight = StoredWeight(fields.text("name"), read_dtype(fields), shape, file, fields.count("offset"), on_host=on_host)
    fields.done()
    if weight.offset % ALIGNMENT:
        raise fields.fail("offset", f"a multiple of {ALIGNMENT}", weight.offset)
    if file is not None and weight.offset + weight.nbytes > files[file].size:
        raise fields.fail("offset", f"{weight.nbytes} bytes within the {files[file].size} of {file}", weight.offset)
    return weight


def _entry_points(fields: Fields) -> dict[str, str]:
    functions = {}
    for name in (*ENTRY_POINTS, *(n for n in fields.remaining() if n == DECODE_ONE)):
        entry = fields.section(name)
        functions[name] = entry.text("function")
        parameters = tuple(entry.items("parameters", str, "names"))
        if parameters != PARAMETERS:
            raise entry.fail("parameters", str(list(PARAMETERS)), list(parameters))
        entry.done()
    fields.done()
    return functions
