"""Published FP8 and FP4 weights as the CPU kernels read them: their codes and scales as they are, in panels of outputs.

Elements are E4M3 and E2M1, scales E8M0 (OCP Microscaling specification v1.0). As in `quant_packing`, a panel is one
sequential stream of blocks, one block per group of inputs; every output has a scale of its own there, though published
FP8 blocks of 128 x 128 share theirs::

    fp8, 128 inputs   32 scales, 32 bytes of nothing; for every input the codes of 32 outputs         4160 bytes
    fp4, 32 inputs    32 scales; for every 4 inputs 64 bytes, output by output, 4 inputs each: the    544 bytes
                      low nibbles are outputs 0-15, the high nibbles 16-31

Missing inputs and outputs have code 0 and scale 1.
"""

from __future__ import annotations

import numpy as np

from ...native_rows import NATIVE_GROUPS, ONE, NativeRows
from .packing import PANEL, panels

SCALE_BYTES = {"fp8": 64, "fp4": PANEL}
"""What stands before the codes of a block."""

BLOCK_BYTES = {"fp8": 64 + 128 * PANEL, "fp4": PANEL + 16 * PANEL}


def native_packed_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """Shape of a packed weight: ``[..., N, K]`` becomes ``[..., ceil(N / PANEL), ceil(K / group), block]``."""
    *lead, n, k = shape
    return (*lead, panels(n), -(-k // NATIVE_GROUPS[dtype]), BLOCK_BYTES[dtype])


def native_packed_gate_up_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """Shape of `native_pack_gate_up`'s result for a weight of shape ``[..., 2F, D]``."""
    *lead, rows, k = shape
    return (*lead, 2 * panels(rows // 2), -(-k // NATIVE_GROUPS[dtype]), BLOCK_BYTES[dtype])


def native_pack_rows(weight: NativeRows, dtype: str) -> np.ndarray:
    """Pack rows into panels; uint8 `native_packed_shape`, C-contiguous."""
    *lead, n, _ = weight.codes.shape
    group, groups, count = NATIVE_GROUPS[dtype], weight.scales.shape[-1], panels(n)
    flat = weight.reshaped(-1, n)
    packed = np.zeros((len(flat.codes), count, groups, BLOCK_BYTES[dtype]), np.uint8)
    packed[..., :PANEL] = ONE
    width = groups * group // (2 if dtype == "fp4" else 1)
    for i, (codes, scales) in enumerate(zip(flat.codes, flat.scales, strict=True)):
        codes = np.pad(codes, ((0, count * PANEL - n), (0, width - codes.shape[1])))
        scales = np.pad(scales, ((0, count * PANEL - n), (0, 0)), constant_values=ONE)
        packed[i, ..., :PANEL] = scales.reshape(count, PANEL, groups).swapaxes(1, 2)
        blocks = codes.reshape(count, PANEL, groups, -1).swapaxes(1, 2)
        held = _nibbles(blocks) if dtype == "fp4" else blocks.swapaxes(2, 3)
        packed[i, ..., SCALE_BYTES[dtype] :] = held.reshape(count, groups, -1)
    return packed.reshape(*lead, *packed.shape[1:])


def _nibbles(blocks: np.ndarray) -> np.ndarray:
    """Blocks ``[P, G, PANEL, 16]`` of pairs of inputs as ``[P, G, 8, 16, 4]``: pairs of outputs, 4 inputs each."""
    apart = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:2], 2, PANEL // 2, 8, 4)
    return (apart[:, :, 0] | apart[:, :, 1] << 4).swapaxes(2, 3)


def native_pack_gate_up(weight: NativeRows, dtype: str) -> np.ndarray:
    """Pack a merged gate and up projection so that matching gate and up panels are neighbours, as `pack_gate_up`."""
    *lead, rows, _ = weight.codes.shape
    halves = native_pack_rows(weight.reshaped(*lead, 2, rows // 2), dtype)
    shape = (*lead, 2 * panels(rows // 2), *halves.shape[-2:])
    return np.ascontiguousarray(halves.swapaxes(-4, -3)).reshape(shape)
