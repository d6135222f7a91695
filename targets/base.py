"""What a target is: the small protocol that the compile driver asks, whatever the device.

A target chooses kernels (through the importer's `Kernels` protocol), packs weights for them and builds the library.
Adding a target is one folder with an object of this protocol and an entry in `targets.find`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from v4c.passes.pipeline import PassOptions
from v4c.passes.relax.kernels import Kernels
from v4c.passes.relax.layouts import WeightSpec


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

    def pack(self, weight: WeightSpec, array: np.ndarray) -> np.ndarray:
        """A weight as the kernels read it: converted to its storage dtype and packed; `array` joins merged parts."""

    def build(self, module: Any, library: Path, options: PassOptions) -> dict[str, list[Any]]:
        """Lower and compile a Relax module into a shared library; returns its `kernel_table`."""
