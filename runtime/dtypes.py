"""Element types an artifact may hold, and how NumPy carries the ones it does not know.

bfloat16 and the float8 formats travel as unsigned integers of the same width, so the runtime needs no extension types.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DType:
    """One element type.

    Attributes:
        name: the name TVM, ml_dtypes and the manifest use, such as ``"bfloat16"``.
        storage: the NumPy type of equal width that holds it in memory.
        safetensors: its code in a safetensors header.
    """

    name: str
    storage: np.dtype
    safetensors: str


DTYPES: dict[str, DType] = {
    name: DType(name, np.dtype(storage), code)
    for name, storage, code in (
        ("float64", "float64", "F64"),
        ("float32", "float32", "F32"),
        ("float16", "float16", "F16"),
        ("bfloat16", "uint16", "BF16"),
        ("float8_e4m3fn", "uint8", "F8_E4M3"),
        ("float8_e5m2", "uint8", "F8_E5M2"),
        ("float8_e8m0fnu", "uint8", "F8_E8M0"),
        ("int64", "int64", "I64"),
        ("int32", "int32", "I32"),
        ("int16", "int16", "I16"),
        ("int8", "int8", "I8"),
        ("uint64", "uint64", "U64"),
        ("uint32", "uint32", "U32"),
        ("uint16", "uint16", "U16"),
        ("uint8", "uint8", "U8"),
    )
}
"""Every element type of weights and caches by name; sub-byte formats are packed into ``uint8`` by the compiler."""
