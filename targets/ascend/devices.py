"""The Ascend devices v4c knows: what tile sizes are chosen from, and what the cube of each multiplies.

Source of every figure: the device specification that bishengir 1.2.0 (PyPI ``ascendnpu-ir``) writes into each module
it compiles, ``#hacc.target_device_spec``, where sizes are in bits; element types were found by compiling one product
per type. `read_limits` and `read_dtypes` ask the installed compiler again, and a test compares.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from v4c.errors import UnsupportedError

from .program import DeviceLimits

DEFAULT = "Ascend910B1"


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: as bishengir's ``--target`` takes it.
        architecture: of its cores: ``c220`` (910B and 910_93) or ``c310`` (950).
        limits: capacities, cores, element types.
    """

    name: str
    architecture: str
    limits: DeviceLimits


_KIB = 1024
_SIZES = {
    "c220": {"unified_buffer": 192 * _KIB, "l1": 512 * _KIB, "l0a": 64 * _KIB, "l0b": 64 * _KIB, "l0c": 128 * _KIB},
    "c310": {"unified_buffer": 248 * _KIB, "l1": 512 * _KIB, "l0a": 64 * _KIB, "l0b": 64 * _KIB, "l0c": 256 * _KIB},
}
_DTYPES = {
    "c220": frozenset({"float16", "bfloat16", "float32", "int8"}),
    "c310": frozenset({"float16", "bfloat16", "float32", "int8", "float8_e4m3fn", "float8_e5m2"}),
}
_NAMES = {
    ("c220", 24): "910B1 910B2 910_9381 910_9382 910_9391 910_9392",
    ("c220", 20): "910B3 910B4 910_9362 910_9372",
    ("c310", 4): "910_950z 950PR_950z",
    ("c310", 8): "950DT_950x 950DT_950y",
    ("c310", 28): (
        "910_9579 910_957b 910_957d 950PR_9579 950PR_957a 950PR_957b 950PR_957c 950PR_957d"
        " 950DT_9571 950DT_9572 950DT_9573 950DT_9574 950DT_9575 950DT_9576 950DT_9577 950DT_9578"
    ),
    ("c310", 32): (
        "910_9581 910_9589 910_958a 910_958b 950PR_9589 950PR_958a 950PR_958b 950PR_958c 950PR_958d"
        " 950DT_9581 950DT_9582 950DT_9583 950DT_9584 950DT_9585 950DT_9586 950DT_9587 950DT_9588"
    ),
    ("c310", 36): (
        "910_9599 950PR_9599 950PR_959a 950PR_959b 950DT_9591 950DT_9592 950DT_9595 950DT_9596 950DT_95A1 950DT_95A2"
    ),
}


def _device(name: str, architecture: str, cores: int) -> Device:
    # One cube core (AIC) comes with two vector cores (AIV) on every device.
    limits = DeviceLimits(
        name, cube_cores=cores, vector_cores=2 * cores, dtypes=_DTYPES[architecture], **_SIZES[architecture]
    )
    return Device(name, architecture, limits)


DEVICES: dict[str, Device] = {
    f"Ascend{name}": _device(f"Ascend{name}", architecture, cores)
    for (architecture, cores), names in _NAMES.items()
    for name in names.split()
}
"""Every device by name."""


def find_device(name: str = "") -> Device:
    """The device of a target string's variant, `DEFAULT` for ``""``; UnsupportedError lists the families."""
    name = name or DEFAULT
    if name in DEVICES:
        return DEVICES[name]
    near = [known for known in DEVICES if known.lower() == name.lower() or known == f"Ascend{name}"]
    families = "expected Ascend910B1 to B4, Ascend910_93.., Ascend950PR_.. or Ascend950DT_.."
    hint = f"did you mean {near[0]}" if near else families
    raise UnsupportedError(f"device {name!r}: {hint}")


_PROBE = """\
module {
  func.func @probe(%sync: memref<?xi8> {hacc.arg_type = #hacc.arg_type<sync_block_lock>},
      %ws: memref<?xi8> {hacc.arg_type = #hacc.arg_type<workspace>},
      %a: memref<?xf32> {tt.divisibility = 16 : i32}, %b: memref<?xf32> {tt.divisibility = 16 : i32},
      %gx: i32, %gy: i32, %gz: i32, %px: i32, %py: i32, %pz: i32)
      attributes {SyncBlockLockArgIdx = 0 : i64, WorkspaceArgIdx = 1 : i64, hacc.entry,
                  hacc.function_kind = #hacc.function_kind<DEVICE>, mix_mode = "aiv", global_kernel = "local"} {
    %from = memref.reinterpret_cast %a to offset: [0], sizes: [64], strides: [1]
        : memref<?xf32> to memref<64xf32, strided<[1]>>
    %local = memref.alloc() : memref<64xf32>
    memref.copy %from, %local : memref<64xf32, strided<[1]>> to memref<64xf32>
    %x = bufferization.to_tensor %local restrict writable : memref<64xf32>
    %y = math.exp %x : tensor<64xf32>
    %to = memref.reinterpret_cast %b to offset: [0], sizes: [64], strides: [1]
        : memref<?xf32> to memref<64xf32, strided<[1]>>
    bufferization.materialize_in_destination %y in writable %to
        : (tensor<64xf32>, memref<64xf32, strided<[1]>>) -> ()
    return
  }
}
"""

_PRODUCT = """\
module {{
  func.func @probe(%sync: memref<?xi8> {{hacc.arg_type = #hacc.arg_type<sync_block_lock>}},
      %ws: memref<?xi8> {{hacc.arg_type = #hacc.arg_type<workspace>}},
      %a: memref<?x{t}> {{tt.divisibility = 16 : i32}}, %b: memref<?x{t}> {{tt.divisibility = 16 : i32}},
      %c: memref<?x{acc}> {{tt.divisibility = 16 : i32}},
      %gx: i32, %gy: i32, %gz: i32, %px: i32, %py: i32, %pz: i32)
      attributes {{SyncBlockLockArgIdx = 0 : i64, WorkspaceArgIdx = 1 : i64, hacc.entry,
                  hacc.function_kind = #hacc.function_kind<DEVICE>, mix_mode = "aic", global_kernel = "local"}} {{
    %zero = arith.constant {zero} : {acc}
    %av = memref.reinterpret_cast %a to offset: [0], sizes: [64, 64], strides: [64, 1]
        : memref<?x{t}> to memref<64x64x{t}, strided<[64, 1]>>
    %al = memref.alloc() : memref<64x64x{t}>
    memref.copy %av, %al : memref<64x64x{t}, strided<[64, 1]>> to memref<64x64x{t}>
    %at = bufferization.to_tensor %al restrict writable : memref<64x64x{t}>
    %bv = memref.reinterpret_cast %b to offset: [0], sizes: [64, 64], strides: [64, 1]
        : memref<?x{t}> to memref<64x64x{t}, strided<[64, 1]>>
    %bl = memref.alloc() : memref<64x64x{t}>
    memref.copy %bv, %bl : memref<64x64x{t}, strided<[64, 1]>> to memref<64x64x{t}>
    %bt = bufferization.to_tensor %bl restrict writable : memref<64x64x{t}>
    %empty = tensor.empty() : tensor<64x64x{acc}>
    %init = linalg.fill ins(%zero : {acc}) outs(%empty : tensor<64x64x{acc}>) -> tensor<64x64x{acc}>
    %r = linalg.matmul ins(%at, %bt : tensor<64x64x{t}>, tensor<64x64x{t}>)
        outs(%init : tensor<64x64x{acc}>) -> tensor<64x64x{acc}>
    %cv = memref.reinterpret_cast %c to offset: [0], sizes: [64, 64], strides: [64, 1]
        : memref<?x{acc}> to memref<64x64x{acc}, strided<[64, 1]>>
    bufferization.materialize_in_destination %r in writable %cv
        : (tensor<64x64x{acc}>, memref<64x64x{acc}, strided<[64, 1]>>) -> ()
    return
  }}
}}
"""

_MLIR_TYPES = {
    "float16": "f16",
    "bfloat16": "bf16",
    "float32": "f32",
    "int8": "i8",
    "float8_e4m3fn": "f8E4M3FN",
    "float8_e5m2": "f8E5M2",
}


def read_limits(name: str) -> DeviceLimits:
    """Capacities and cores as the installed compiler has them (`dtypes` from the table); ToolMissing without it."""
    from .toolchain import compile_program

    device = find_device(name)
    text = compile_program("probe", _PROBE, device).final
    found = {key: int(value) for key, value in re.findall(r'#dlti\.dl_entry<"(\w+)", (\d+) : i32>', text)}
    return DeviceLimits(
        name,
        unified_buffer=found["UB_SIZE"] // 8,
        l1=found["L1_SIZE"] // 8,
        l0a=found["L0A_SIZE"] // 8,
        l0b=found["L0B_SIZE"] // 8,
        l0c=found["L0C_SIZE"] // 8,
        cube_cores=found["CUBE_CORE_COUNT"],
        vector_cores=found["VECTOR_CORE_COUNT"],
        dtypes=device.limits.dtypes,
    )


def read_dtypes(name: str) -> frozenset[str]:
    """Element types of which the installed compiler accepts and links a product; about a second."""
    from .link_check import missing_functions
    from .toolchain import Rejected, compile_program

    device = find_device(name)
    accepted = set()
    for dtype, mlir in _MLIR_TYPES.items():
        accumulator, zero = ("i32", "0") if dtype.startswith("int") else ("f32", "0.0")
        try:
            compiled = compile_program("probe", _PRODUCT.format(t=mlir, acc=accumulator, zero=zero), device)
        except Rejected:
            continue
        if not missing_functions(compiled.final):
            accepted.add(dtype)
    return frozenset(accepted)
