"""Opening an artifact: read its manifest, verify its files, and map its weights into memory.

Verification comes before anything is loaded, since a library is code. Weights are mapped, not read: pages come in when
a kernel touches them, and several processes share them. On request they are copied instead, into huge pages.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import platform
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from v4c.errors import ArtifactError, InputError, UnsupportedError
from v4c.runtime.cuda import check_device
from v4c.runtime.dtypes import DTYPES
from v4c.runtime.host_memory import HostTable
from v4c.runtime.huge_pages import copy_files
from v4c.runtime.library import installed_tvm_version, one_line
from v4c.runtime.manifest import MANIFEST_NAME, Manifest, StoredWeight, Target
from v4c.runtime.tensors import tensor_over
from v4c.runtime.weight_memory import WeightMemory

_MAP_NORESERVE = 0x4000  # Linux, x86 and Arm; Python's mmap names it from 3.13 on

VERIFY = ("all", "code")
"""What to hash before loading: every file, or the library alone (sizes are always checked)."""

DRIVEN = ("cpu", "cuda", "ascend-sim")
"""Targets whose libraries this runtime runs; all but ``cuda`` on the processor."""


class Artifact:
    """A folder that a compilation wrote, verified on opening.

    Args:
        path: the folder.
        verify: one of `VERIFY`.

    Raises:
        InputError: ``verify`` is something else.
        ArtifactError: the folder is no artifact, or is incomplete or altered; the message names the file.
    """

    def __init__(self, path: str | os.PathLike[str], verify: str = "all") -> None:
        if verify not in VERIFY:
            raise InputError(f"verify: expected one of {', '.join(VERIFY)}, found {verify!r}")
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        for name, stored in self.manifest.files.items():
            size = _size(self.path / name)
            if size != stored.size:
                raise ArtifactError(f"{self.path / name}: expected {stored.size} bytes, found {size}")
        self._verify(self.manifest.files if verify == "all" else (self.manifest.library,))

    @property
    def library(self) -> Path:
        """Path of the compiled library."""
        return self.path / self.manifest.library

    @property
    def tokenizer(self) -> Path | None:
        """Path of ``tokenizer.json``, or None."""
        return None if self.manifest.tokenizer is None else self.path / self.manifest.tokenizer

    @property
    def on_gpu(self) -> bool:
        """Whether the library runs on an NVIDIA GPU."""
        return self.manifest.target.name.partition(":")[0] == "cuda"

    def check_machine(self) -> None:
        """Refuse a machine, or a version of TVM, that the library is not for.

        Raises:
            UnsupportedError: it was compiled for a target that this runtime cannot drive, or for a GPU that is
                missing or too old.
            ArtifactError: this machine is of another kind, lacks CPU features, or has another version of TVM.
        """
        target = self.manifest.target
        if target.name.partition(":")[0] not in DRIVEN:
            drives = ", or ".join(DRIVEN)
            raise UnsupportedError(
                f"{self.path}: expected target {drives}, which this runtime drives, found {target.name}"
            )
        if self.on_gpu:
            check_device(target.name)
        if target.arch != platform.machine():
            raise ArtifactError(f"{self.path}: compiled for {target.arch}, this machine is {platform.machine()}")
        missing = missing_cpu_features(target)
        if missing:
            raise ArtifactError(f"{self.path}: compiled for a CPU with {', '.join(missing)}, which this one lacks")
        version = installed_tvm_version()
        if version not in (None, self.manifest.tvm_version):
            raise ArtifactError(
                f"{self.path}: compiled with TVM {self.manifest.tvm_version}, {version} is installed: recompile"
            )

    @property
    def weight_files(self) -> list[Path]:
        """Paths of the files that hold weights."""
        return sorted({self.path / weight.file for weight in self.manifest.weights if weight.file is not None})

    def map_weights(self) -> list[Any]:
        """All weights as TVM tensors over the mapped files, in manifest order, without a copy.

        Raises:
            ArtifactError: the artifact was compiled without weights, or a file cannot be mapped.
        """
        return [tensor_over(a, w.dtype) for a, w in zip(self._mapped[1], self.manifest.weights, strict=True)]

    @property
    def host_tables(self) -> list[HostTable | None]:
        """In manifest order, for weights that stay in host memory beside a GPU where they lie; None for the others."""
        return [
            HostTable(w.name, self.path / str(w.file), w.offset) if w.on_host else None for w in self.manifest.weights
        ]

    def copy_weights(self) -> list[Any]:
        """All weights as TVM tensors over copies of the files in huge pages of this process, in manifest order.

        Raises:
            ArtifactError: the artifact was compiled without weights, or a file cannot be read or is too short.
            InputError: less memory is free than they take.
        """
        self._check_weights()
        copies = copy_files({file: self.manifest.files[file.name].size for file in self.weight_files})
        weights = [(weight, copies[self.path / str(weight.file)]) for weight in self.manifest.weights]
        return [tensor_over(_array(weight, copy), weight.dtype) for weight, copy in weights]

    def bound_weights(self, limit: int) -> WeightMemory:
        """Keeps what mapped weights occupy within `limit` bytes.

        Raises:
            ArtifactError: as `map_weights`.
            InputError: the limit is too small.
        """
        return WeightMemory(self.manifest, self.path, *self._mapped, limit)

    @cached_property
    def _mapped(self) -> tuple[dict[str, mmap.mmap], list[np.ndarray]]:
        """The weight files by name, and the weights in them."""
        self._check_weights()
        maps: dict[str, mmap.mmap] = {}
        return maps, [self._map(weight, maps) for weight in self.manifest.weights]

    def _map(self, weight: StoredWeight, maps: dict[str, mmap.mmap]) -> np.ndarray:
        assert weight.file is not None
        if weight.file not in maps:
            maps[weight.file] = _map_file(self.path / weight.file)
        return _array(weight, maps[weight.file])

    def _check_weights(self) -> None:
        if not self.manifest.has_weights:
            raise ArtifactError(f"{self.path}: expected weights, found none: it was compiled without them")

    def _verify(self, names: Iterable[str]) -> None:
        # Hashing releases the interpreter lock: one thread per file keeps up with a fast disk.
        with ThreadPoolExecutor() as pool:
            for name, digest in zip(names, pool.map(lambda name: _sha256(self.path / name), names), strict=True):
                expected = self.manifest.files[name].sha256
                if digest != expected:
                    raise ArtifactError(f"{self.path / name}: expected SHA-256 {expected}, found {digest}")


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of the artifact at ``path``; nothing else is verified.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    file = Path(path) / MANIFEST_NAME
    try:
        text = file.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{file}: expected the manifest of an artifact, found {error.strerror}") from None
    return Manifest.from_json(text, str(file))


def cpu_features() -> frozenset[str]:
    """Feature flags of the first processor in ``/proc/cpuinfo``; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):  # x86, Arm
            return frozenset(value.split())
    return frozenset()


def missing_cpu_features(target: Target) -> list[str]:
    """The features ``target`` requires and this machine lacks, in the manifest's order."""
    present = cpu_features() if target.cpu_features else frozenset()
    return [feature for feature in target.cpu_features if feature not in present]


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise ArtifactError(f"{file}: expected a file, found {error.strerror}") from None


def _sha256(file: Path) -> str:
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{file}: expected a readable file, found {error.strerror}") from None


def _array(weight: StoredWeight, file: mmap.mmap | np.ndarray) -> np.ndarray:
    """A weight within the bytes of its file."""
    return np.ndarray(weight.shape, DTYPES[weight.dtype].storage, buffer=file, offset=weight.offset)


def _map_file(file: Path) -> mmap.mmap:
    # Private and writable: DLPack refuses read-only memory. Nothing writes, so no page is ever copied; without
    # NORESERVE a file larger than the free memory would be refused all the same.
    try:
        with open(file, "rb") as opened:
            return mmap.mmap(
                opened.fileno(), 0, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise ArtifactError(f"{file}: expected a file that can be mapped, found {one_line(error)}") from None
