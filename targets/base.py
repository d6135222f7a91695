"""What a target is: the small protocol that the compile driver asks, whatever the device.

A target chooses kernels (through the importer's `Kernels` protocol), packs weights for them and builds the library.
Adding a target is one folder with an object of this protocol and an entry in `targets.find`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from v4c.passes.pipeline import PassOptions
from v4c.passes.relax.kernels import Kernels
from v4c.passes.relax.layouts import Storage, WeightSpec


class Target(Protocol):
    """One device v4c compiles for."""

    @property
    def name(self) -> str:
        """The full target string, as written into the manifest, e.g. ``cpu:x86-64-v4``."""

    @property
    def features(self) -> tuple[str, ...]:
        """Processor features (names as in ``/proc/cpuinfo``) that a machine must have to load the library."""

    @property
    def kernels(self) -> Kernels:
        """Kernel factories and packed shapes."""

    @property
    def notes(self) -> dict[str, Any]:
        """What the manifest's build notes say about the kernels that were asked for so far; may be empty."""

    def pack(self, weight: WeightSpec, array: np.ndarray) -> np.ndarray:
        """A weight as the kernels read it: converted to its storage dtype and packed; `array` joins merged parts."""

    def build(self, module: Any, library: Path, options: PassOptions) -> dict[str, list[Any]]:
        """Lower and compile a Relax module into a shared library; returns its `kernel_table`."""


@runtime_checkable
class Simulated(Protocol):
    """A target with needs of its own: its kernels set storage and passes, and more than a library comes out."""

    @property
    def without_passes(self) -> tuple[str, ...]:
        """Passes that make operators for which it has no kernel."""

    @property
    def cache_dtypes(self) -> Mapping[str, str]:
        """Storage of caches that is not the graph's, by the last part of their names."""

    def storage(self, asked: Storage) -> Storage:
        """What weights are stored as for what was asked; UnsupportedError where its kernels read nothing like it."""

    @property
    def plan_file(self) -> str:
        """Name of the launch plan among `attachments`."""

    @property
    def attachments(self) -> Mapping[str, bytes]:
        """After `build`: further files of the artifact by name."""


@runtime_checkable
class StorageChecks(Protocol):
    """A target that reads weights of some dtypes only, and says so before anything is made."""

    def check_storage(self, storage: Storage) -> None:
        """UnsupportedError where its kernels read no weights stored so."""


@runtime_checkable
class HostTables(Protocol):
    """A target with memory of its own, whose kernels also read some weights in the host's."""

    def on_host(self, weight: WeightSpec) -> bool:
        """Whether a weight stays in host memory."""
