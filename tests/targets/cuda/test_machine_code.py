"""Every kernel as machine code, without a GPU: it compiles for each architecture, matrix kernels use tensor cores, and
none takes more of a processor than is stated here."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.targets.cuda.harness import real
from v4c.errors import Error
from v4c.targets.cuda import architectures, nvrtc, toolchain
from v4c.targets.cuda.device_module import machine_code
from v4c.targets.cuda.kernels import attention, compress, engram, experts, index, mhc, products, routing, rows
from v4c.targets.cuda.machine_code import (
    ASYNC_COPY,
    GLOBAL_LOAD,
    GLOBAL_STORE,
    MATRIX_LOAD,
    TENSOR_CORE,
    compile_cubin,
    instructions,
    opcodes,
)
from v4c.targets.cuda.schedule import (
    AttentionSchedule,
    ExpertSchedule,
    IndexSchedule,
    MHCSchedule,
    ProductSchedule,
)
from v4c.targets.cuda.simulator.build import load_driver
from v4c.targets.cuda.target import CUDATarget

pytestmark = pytest.mark.skipif(
    toolchain.nvcc() is None and not nvrtc.available(),
    reason="no nvcc in CUDA_HOME, PATH and /usr/local/cuda, and no NVRTC (extra cuda)",
)

PRODUCT, ATTENTION, WIDE_TILES = ProductSchedule(), AttentionSchedule(tile_keys=32), AttentionSchedule(tile_keys=64)
MATRIX = {
    "linear": (products.merged_linear, ((1024, 512), 4096, "bfloat16", None, PRODUCT)),
    "norm_linear": (products.merged_linear, ((4096,), 1024, "bfloat16", 1e-6, PRODUCT)),
    "grouped": (products.grouped_linear, (8, 1024, 4096, "bfloat16", PRODUCT)),
    "moe": (experts.mixture_of_experts, (256, 4096, 2048, 6, 10.0, "bfloat16", 2048, "bfloat16", ExpertSchedule())),
    "linear_fp8": (products.merged_linear, ((1024, 512), 4096, "fp8", None, PRODUCT)),
    "norm_linear_fp8": (products.merged_linear, ((4096,), 1024, "fp8", 1e-6, PRODUCT)),
    "grouped_fp8": (products.grouped_linear, (8, 1024, 4096, "fp8", PRODUCT)),
    "moe_native": (experts.mixture_of_experts, (256, 4096, 2048, 6, 10.0, "fp4", 2048, "fp8", ExpertSchedule())),
    "linear_int8": (products.merged_linear, ((1024, 512), 4096, "int8", None, PRODUCT)),
    "linear_int4": (products.merged_linear, ((1024, 512), 4096, "int4", None, PRODUCT)),
    "moe_int4": (experts.mixture_of_experts, (256, 4096, 2048, 6, 10.0, "int4", 2048, "int4", ExpertSchedule())),
    "csa_tiles": (attention.compressed_sparse_attention, (64, 512, 128, 512, 0.044, 64, "bfloat16", WIDE_TILES)),
    "hca_tiles": (attention.heavily_compressed_attention, (128, 512, 128, 128, 0.044, 64, "bfloat16", ATTENTION)),
    "sliding_tiles": (attention.sliding_window_attention, (48, 512, 128, 0.044, 0, "bfloat16", WIDE_TILES)),
    "index_tiles": (index.lightning_index, (64, 128, 4, 512, 64, "bfloat16", IndexSchedule())),
}
OTHERS = {
    "linear_f32": (products.merged_linear, ((512,), 4096, "float32", None, PRODUCT)),
    "experts_f32": (experts.grouped_experts, (16, 128, 64, 4, 10.0, "float32", ExpertSchedule())),
    "csa": (attention.compressed_sparse_attention, (64, 512, 128, 512, 0.044, 64, "float32", ATTENTION)),
    "hca": (attention.heavily_compressed_attention, (64, 512, 128, 128, 0.044, 64, "float32", ATTENTION)),
    "sliding": (attention.sliding_window_attention, (64, 512, 128, 0.044, 0, "float32", ATTENTION)),
    "index_512": (index.lightning_index, (64, 128, 4, 512, 64, "float32", IndexSchedule())),
    "index_1024": (index.lightning_index, (64, 128, 4, 1024, 0, "float32", IndexSchedule())),
    "compress_pair": (compress.kv_compress_pair, (1024, 512, 256, 128, 64, 4, 1e-6)),
    "compress": (compress.kv_compress, (512, 512, 64, 128, 1e-6)),
    "mhc_pre": (mhc.mhc_pre, (4, 4096, 20, 1e-6, 1e-6, MHCSchedule())),
    "mhc_pre_norm": (mhc.mhc_pre_norm, (4, 4096, 20, 1e-6, 1e-6, 1e-6, MHCSchedule())),
    "mhc_post_pre_norm": (mhc.mhc_post_pre_norm, (4, 7168, 20, 1e-6, 1e-6, 1e-6, MHCSchedule())),
    "mhc_post": (mhc.mhc_post, (4, 4096)),
    "mhc_head": (mhc.mhc_head, (4, 4096, 1e-6, 1e-6, MHCSchedule())),
    "rms_norm": (rows.rms_norm, (4096, 1e-6, True)),
    "add": (rows.add, (4096,)),
    "swiglu": (rows.swiglu, (2048, 10.0)),
    "rope": (rows.trailing_rope, (64, 512, 64, 1.0)),
    "rotary_query_kv": (rows.rotary_query_kv, (64, 512, 64, 1e-6, 1e-6)),
    "topk_route": (routing.topk_route, (384, 6, 1.5)),
    "topk_router": (routing.topk_router, (256, 4096, 6, 1.5, "float32", PRODUCT)),
    "hash_route": (routing.hash_route, (256, 6, 1.5)),
    "hash_router": (routing.hash_router, (256, 4096, 6, 1.5)),
    "engram_hash": (engram.engram_hash, (3, 16, 2)),
    "engram_lookup": (engram.engram_lookup, (16, 64, "bfloat16")),
    "engram_gate_conv": (engram.engram_gate_conv, (4, 4096, 4, 3, 1e-6)),
}

REGISTERS = dict.fromkeys(("csa", "hca", "sliding", "csa_tiles", "hca_tiles", "sliding_tiles"), 255)
"""Limits of kernels that hold much on purpose; 128 for all others, so that two blocks of 256 threads fit."""
STACK_BYTES = 64  # sine and cosine of large angles, and nothing else
SPILLED_BYTES = 16


@cache
def source(*names: str) -> str:
    """TVM's CUDA source of kernels of `MATRIX` and `OTHERS`."""
    import tvm

    every: dict[str, Any] = {**MATRIX, **OTHERS}
    functions = {}
    for name in names:
        factory, arguments = every[name]
        functions[name] = factory(*arguments).with_attr("global_symbol", name)
    written: list[str] = []

    def keep(text: str) -> toolchain.Binary:
        written.append(text)
        return toolchain.Binary(b"", "cubin", {}, "none")

    if not real():
        load_driver()  # before stand-ins take its place for the rest of the process, where kernels are run after this
    with machine_code(keep):
        tvm.compile(tvm.IRModule(functions), target=CUDATarget(architectures.find("sm_90a")).tvm_target())
    (text,) = written
    return text


@cache
def compiled(architecture: str, *names: str) -> tuple[Any, Any]:
    """Opcodes and resources by kernel."""
    cubin, log = compile_cubin(toolchain.nvcc(), source(*names), architectures.find(architecture))
    return opcodes(cubin), dict(toolchain.resources(log))


def of(name: str, kernels: dict[str, Any]) -> dict[str, Any]:
    """The kernels that PrimFunc `name` launches."""
    return {k: v for k, v in kernels.items() if k.startswith(f"{name}_kernel")}


@pytest.mark.parametrize(
    "architecture", ["sm_90a", *(pytest.param(a, marks=pytest.mark.slow) for a in ("sm_80", "sm_100a"))]
)
def test_matrix_kernels_use_tensor_cores(architecture: str) -> None:
    # Of attention, the kernel of few tokens rounds its keys on their way: they pass through registers.
    tiles = {"csa_tiles": (2, 1), "hca_tiles": (2, 1), "sliding_tiles": (2, 1), "index_tiles": (1, 1)}
    expected = {"linear": (2, 2), "moe": (4, 4), "linear_fp8": (2, 2), "moe_native": (4, 4), **tiles}
    found, taken = compiled(architecture, *expected)
    for name, (least, copying) in expected.items():
        matrix = {k: v for k, v in of(name, found).items() if v[TENSOR_CORE]}
        assert len(matrix) == least, sorted(matrix)
        assert all(used[MATRIX_LOAD] for used in matrix.values()), matrix
        assert sum(used[ASYNC_COPY] > 0 for used in matrix.values()) == copying, matrix
    check_resources(taken)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", list(architectures.ARCHITECTURES))
def test_every_kernel_compiles(architecture: str) -> None:
    names = (*MATRIX, *OTHERS)
    found, taken = compiled(architecture, *names)
    for name in names:
        assert of(name, found), name
    for name in OTHERS:
        assert not any(v[TENSOR_CORE] for v in of(name, found).values()), f"{name}: float32 is not to be rounded"
    check_resources(taken)


@pytest.mark.parametrize("architecture", list(architectures.ARCHITECTURES))
def test_a_lookup_has_all_its_rows_on_their_way_at_once(architecture: str) -> None:
    cubin, _ = compile_cubin(toolchain.nvcc(), source("engram_lookup"), architectures.find(architecture))
    (order,) = instructions(cubin).values()
    loads = [i for i, opcode in enumerate(order) if opcode == GLOBAL_LOAD]
    stores = [i for i, opcode in enumerate(order) if opcode == GLOBAL_STORE]
    # Four addresses and four pieces of 16 bytes, each of which makes eight floats, two stores.
    assert (len(loads), len(stores)) == (8, 8)
    assert max(loads) < min(stores)


def check_resources(taken: dict[str, Any]) -> None:
    assert taken
    for kernel, resources in taken.items():
        limit = REGISTERS.get(kernel.partition("_kernel")[0], 128)
        assert resources.registers <= limit, f"{kernel}: {resources}"
        assert resources.spilled <= SPILLED_BYTES, f"{kernel}: {resources}"
        assert resources.stack <= STACK_BYTES, f"{kernel}: {resources}"
        assert resources.shared <= 48 << 10, f"{kernel}: {resources}"


def test_every_factory_is_compiled_here() -> None:
    from v4c.targets.cuda import lowering

    factories = {
        f for f in vars(lowering).values() if getattr(f, "__module__", "").startswith("v4c.targets.cuda.kernels.")
    }
    assert {factory for factory, _ in (*MATRIX.values(), *OTHERS.values())} == {f for f in factories if callable(f)}


@pytest.mark.skipif(not nvrtc.available(), reason="no NVRTC: extra cuda is not installed")
def test_without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "nvcc", lambda: None)
    made = toolchain.compile_source(source("linear_fp8", "rms_norm"), architectures.find("sm_90a"))
    assert (made.kind, made.data[:4]) == ("fatbin", b"\x50\xed\x55\xba")
    assert made.compiler.startswith("nvrtc 13.")
    assert {k.partition("_kernel")[0] for k in made.resources} == {"linear_fp8", "rms_norm"}
    check_resources(made.resources)
    with pytest.raises(Error, match=r"NVRTC: expected sm_90a code, found: .*error"):
        toolchain.compile_source('extern "C" __global__ void broken() { nothing }', architectures.find("sm_90a"))
