"""Running artifacts: no torch and no compiler here, only NumPy, tvm_ffi and TVM's runtime library."""

from v4c.runtime.model import Model, load
from v4c.runtime.session import Session

__all__ = ["Model", "Session", "load"]
