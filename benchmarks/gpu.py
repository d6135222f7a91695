"""CUDA kernels of a published size, and whole models, on this machine's GPU, against what the chip can do: one table.

Run ``python -m benchmarks.gpu`` where there is a GPU and nvcc; ``--size v4-pro`` for larger kernels. Times of kernels
are CUDA events, medians, over random inputs that do not stay in the cache; of models, those of `v4c bench`, tokens in
and logits out included. Bandwidth is that of a copy on the device, arithmetic that of a large bfloat16 product of
torch; both are measured here, and missing ("-") without a torch for CUDA.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

import v4c
from v4c.errors import Error
from v4c.frontend.initialise_native import initialise_native
from v4c.frontend.presets import preset
from v4c.passes.relax.kernels import Kernel
from v4c.runtime import cuda_library
from v4c.targets.cuda.architectures import Architecture
from v4c.targets.cuda.kernels import attention, experts, index, mhc, products
from v4c.targets.cuda.measure import Bench
from v4c.targets.cuda.schedule import AttentionSchedule, ExpertSchedule, IndexSchedule, MHCSchedule, ProductSchedule
from v4c.targets.cuda.target import CUDATarget

GOALS = {"decode": "at least 70 % of bandwidth", "prefill": "at least 50 % of bf16", "csa": "at least 5x torch"}

WEIGHT_BYTES = {"bfloat16": 2, "fp8": 1 + 1 / 128, "fp4": 1 / 2 + 1 / 32}
"""Of one weight, its share of a scale included."""


@dataclass(frozen=True)
class Case:
    """One line of the table: bytes and operations a call cannot do without, and torch's way where there is one."""

    name: str
    kernel: Kernel
    sizes: dict[str, int]
    nbytes: float
    operations: float
    goal: str = ""
    torch: Callable[[], Callable[[], Any]] | None = None


def cases(size: str, context: int, architecture: Architecture) -> list[Case]:
    """Kernels of a known size in bfloat16, decoding one token and reading 512, with `context` tokens behind them."""
    c = preset(size)
    d, f, heads, width, top_k = c.hidden_size, c.moe_intermediate_size, c.num_attention_heads, c.head_dim, c.index_topk
    rows = context // 4
    product, attend = ProductSchedule(), AttentionSchedule.suited(architecture.shared_bytes)
    found = []
    for n, k in ((c.q_lora_rank, d), (heads * width, c.q_lora_rank), (d, d)):
        for dtype in ("bfloat16", "fp8"):
            linear = Kernel(products.merged_linear, ((n,), k, dtype, None, product))
            for m in (1, 4, 512):
                goal = GOALS["decode"] if m == 1 else GOALS["prefill"] if m == 512 and n == k else ""
                moved = WEIGHT_BYTES[dtype] * n * k + 4 * m * (n + k)
                found.append(Case(f"product {m} x {n} x {k}, {dtype}", linear, {"m": m}, moved, 2 * m * n * k, goal))
    for dtype, shared in (("bfloat16", "bfloat16"), ("fp4", "fp8")):
        moe = Kernel(
            experts.mixture_of_experts,
            (c.n_routed_experts, d, f, c.num_experts_per_tok, 10.0, dtype, f, shared, ExpertSchedule()),
        )
        for tokens in (1, 512):
            used = min(c.n_routed_experts, tokens * c.num_experts_per_tok)
            moved = 3 * d * f * (used * WEIGHT_BYTES[dtype] + WEIGHT_BYTES[shared])
            work = 6 * tokens * (c.num_experts_per_tok + 1) * d * f
            found.append(Case(
                f"experts, {tokens} tokens, {dtype}", moe, {"b": 1, "s": tokens}, moved, work,
                GOALS["decode"] if tokens == 1 else "",
            ))  # fmt: skip
    for name, top, n, ratio in (("CSA", top_k, rows, 4), ("HCA", -1, context // 128, 128)):
        own = (width**-0.5, 64, "bfloat16", attend)
        if top > 0:
            kernel = Kernel(attention.compressed_sparse_attention, (heads, width, 128, top, *own))
        else:
            kernel = Kernel(attention.heavily_compressed_attention, (heads, width, 128, ratio, *own))
        for tokens in (1, 512):
            keys = 128 + (min(top, n) if top > 0 else n)
            work = 4 * tokens * heads * keys * width
            peer = partial(_torch_attention, tokens, heads, width, keys, n) if top > 0 else None
            found.append(Case(
                f"{name} attention, {tokens} tokens, {context} behind", kernel,
                {"b": 1, "s": tokens, "n": n, "ratio": ratio}, 4 * (keys + 2 * tokens * heads) * width, work,
                GOALS["csa"] if peer and tokens == 1 else "", peer,
            ))  # fmt: skip
    indexer = Kernel(
        index.lightning_index, (c.index_n_heads, c.index_head_dim, 4, top_k, 64, "bfloat16", IndexSchedule())
    )
    for tokens in (1, 512):
        found.append(Case(
            f"indexer, {tokens} tokens, {context} behind", indexer, {"b": 1, "s": tokens, "n": rows},
            4 * rows * c.index_head_dim, 2 * tokens * rows * c.index_n_heads * c.index_head_dim,
        ))  # fmt: skip
    step = Kernel(mhc.mhc_post_pre_norm, (4, d, 20, 1e-6, 1e-6, 1e-6, MHCSchedule()))
    for tokens in (1, 512):
        moved = 4 * (24 * 4 * d + tokens * 10 * d)
        found.append(Case(f"mHC step, {tokens} tokens", step, {"b": 1, "s": tokens}, moved, 2 * tokens * 28 * 4 * d))
    return found


def _torch() -> Any:
    """torch where it has CUDA, else None."""
    import torch

    return torch if torch.cuda.is_available() else None


def _torch_attention(tokens: int, heads: int, width: int, keys: int, rows: int) -> Callable[[], Any]:
    """Gather of each token's rows, then scaled dot product attention, the heads as queries of one key head.

    One token is read in float32, as the caches are; a prompt in bfloat16.
    """
    torch = _torch()
    dtype = torch.float32 if tokens == 1 else torch.bfloat16

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, width, device="cuda", dtype=dtype)

    q, near, held = normal(tokens, 1, heads), normal(tokens + 127), normal(rows)
    seen = torch.arange(tokens, device="cuda")[:, None] + torch.arange(128, device="cuda")
    chosen = torch.rand(tokens, rows, device="cuda").argsort(-1)[:, : keys - 128]

    def call() -> Any:
        every = torch.cat([near[seen], held[chosen]], 1)[:, None]
        return torch.nn.functional.scaled_dot_product_attention(q, every, every)

    return call


def ceilings(bench: Bench) -> tuple[float | None, float | None]:
    """Bytes and bfloat16 operations per second of the chip, as torch gets them."""
    torch = _torch()
    if torch is None:
        return None, None
    with torch.cuda.stream(torch.cuda.ExternalStream(bench.stream.handle.value)):
        source = torch.randn(1 << 28, device="cuda")
        target = torch.empty_like(source)
        copy = bench.milliseconds([lambda: target.copy_(source)])
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
        product = bench.milliseconds([lambda: torch.matmul(a, b)])
    return 2 * source.nbytes / copy * 1e3, 2 * 8192**3 / product * 1e3


MODELS = ("v4-mini:none", "flash-slice:none", "flash-slice:native")
"""Presets and what ``--quant`` is to be."""
PROMPT, CONTEXT = 4096, 1024


def model_rows(name: str, architecture: str, bandwidth: float | None, rate: float | None) -> list[list[str]]:
    """Lines of a whole model with random weights, in bfloat16 or as published: a decode step, and a prompt."""
    size, _, quant = name.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        path, source = Path(folder) / "model.v4c", preset(size)
        given: Any = source
        if quant == "native":
            given = Path(folder) / "published"
            initialise_native(source, given, seed=0)
        v4c.compile(given, path, target=f"cuda:{architecture}", dtype="bf16", quant=quant or "none", mtp=False)
        found = v4c.bench(path, contexts=(CONTEXT,), prompt_tokens=PROMPT)
    rows = []
    for what, part, goal in (
        (f"decode behind {CONTEXT}", found["decode"][0], GOALS["decode"]),
        (f"prompt of {PROMPT}", found["prefill"][0], GOALS["prefill"] if size == "flash-slice" else ""),
    ):
        moved, done = part["bytes_read"] / part["ms"] * 1e3, part["flops"] / part["ms"] * 1e3
        rows.append([
            f"{name}, {what}", f"{part['ms'] * 1e3:.1f}", f"{moved / 1e9:.0f}", _share(moved, bandwidth),
            f"{done / 1e12:.1f}", _share(done, rate), "-", "-", goal,
        ])  # fmt: skip
    return rows


@click.command(help=__doc__)
@click.option("--size", default="v4-flash", show_default=True)
@click.option("--context", default=131072, show_default=True)
@click.option("--only", default="", help="lines of kernels whose name holds this")
@click.option(
    "--model",
    "models",
    multiple=True,
    default=MODELS,
    show_default=True,
    metavar="PRESET:QUANT",
    help="whole models to measure; may be repeated",
)
@click.option("--no-models", is_flag=True, help="kernels alone")
def main(size: str, context: int, only: str, models: tuple[str, ...], no_models: bool) -> None:
    try:
        device = cuda_library.find_device()
        architecture = CUDATarget.parse("").architecture
        bench = Bench(architecture)
    except Error as error:
        raise click.ClickException(str(error)) from None
    from rich.console import Console
    from rich.table import Table

    bandwidth, rate = ceilings(bench)
    table = Table(title=f"{size}, {device.name}, {device.processors} processors")
    for heading in ("kernel", "us", "GB/s", "of copy", "TFLOP/s", "of bf16", "torch us", "times", "goal"):
        table.add_column(heading)
    for case in cases(size, context, architecture):
        if only not in case.name:
            continue
        ms = bench.milliseconds(bench.calls(case.kernel, case.sizes))
        torch_ms = None
        if case.torch is not None and (torch := _torch()) is not None:
            with torch.cuda.stream(torch.cuda.ExternalStream(bench.stream.handle.value)):
                torch_ms = bench.milliseconds([case.torch()])
        moved, done = case.nbytes / ms * 1e3, case.operations / ms * 1e3
        table.add_row(
            case.name, f"{ms * 1e3:.1f}", f"{moved / 1e9:.0f}", _share(moved, bandwidth), f"{done / 1e12:.1f}",
            _share(done, rate), "-" if torch_ms is None else f"{torch_ms * 1e3:.1f}",
            "-" if torch_ms is None else f"{torch_ms / ms:.1f}x", case.goal,
        )  # fmt: skip
    for name in () if no_models else models:
        for row in model_rows(name, bench.architecture.name, bandwidth, rate):
            table.add_row(*row)
    Console().print(table)


def _share(value: float, of: float | None) -> str:
    return "-" if of is None else f"{value / of:.0%}"


if __name__ == "__main__":
    main()
