"""v4c, the compiler for DeepSeek-V4-family models: checkpoint to ONNX to a compiled module.

``import v4c`` is light: names are loaded when first used, and `load` never imports torch or a compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from v4c.errors import (
    ArtifactError,
    CheckpointError,
    ConfigError,
    Error,
    InputError,
    OutputError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from v4c.api import compile, export, load
    from v4c.benchmark import bench
    from v4c.evaluation import evaluate
    from v4c.frontend.config import ModelConfig
    from v4c.frontend.presets import preset
    from v4c.inspection import inspect
    from v4c.tuning import tune
    from v4c.verification import verify

_LAZY = {
    "compile": "v4c.api",
    "export": "v4c.api",
    "load": "v4c.api",
    "bench": "v4c.benchmark",
    "evaluate": "v4c.evaluation",
    "inspect": "v4c.inspection",
    "tune": "v4c.tuning",
    "verify": "v4c.verification",
    "preset": "v4c.frontend.presets",
    "ModelConfig": "v4c.frontend.config",
}

__all__ = [
    "ArtifactError",
    "CheckpointError",
    "ConfigError",
    "Error",
    "InputError",
    "ModelConfig",
    "OutputError",
    "UnsupportedError",
    "bench",
    "compile",
    "evaluate",
    "export",
    "inspect",
    "load",
    "preset",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'v4c' has no attribute {name!r}")
