"""Quantised weights: 8 or 4 bits each with one scale per output and group of inputs, packed for VNNI products.

A weight is ``scale * code``, `code` an integer of 8 or 4 bits, `scale` a float16 shared by `GROUP` consecutive inputs
of one output. Weights lie in panels as in `packing`, every panel one sequential stream of blocks, one block per group::

    32 float16 scales, little-endian                    64 bytes
    for every 4 consecutive inputs, of 32 outputs:      int8: 128 bytes, output by output, 4 inputs each
                                                        int4: 64 bytes, output by output, 4 inputs each: the low
                                                              nibbles are outputs 0-15, the high nibbles 16-31

Codes are stored unsigned, as ``vpdpbusd`` takes them: ``code + 128`` or ``code + 8``. Missing inputs of the last group
and missing outputs of the last panel have weight zero.
"""

from __future__ import annotations

import numpy as np

from ...quantisation import CHUNK, GROUP, each_chunk, groups, quantise
from .packing import PANEL, panels

SCALE_BYTES = 2 * PANEL


def block_bytes(bits: int) -> int:
    """Bytes of one group of one panel."""
    return SCALE_BYTES + PANEL * GROUP * bits // 8


def quant_packed_shape(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    """Shape of a packed weight: ``[..., N, K]`` becomes ``[..., ceil(N / PANEL), ceil(K / GROUP), block]``."""
    *lead, n, k = shape
    return (*lead, panels(n), groups(k), block_bytes(bits))


def _blocks(panel: np.ndarray, bits: int) -> np.ndarray:
    """Packed blocks ``[P, G, block]`` of weights ``[P, PANEL, G, GROUP]`` float32."""
    codes, scales = quantise(panel, bits)
    count, _, g, _ = codes.shape
    packed = np.empty((count, g, block_bytes(bits)), np.uint8)
    packed[..., :SCALE_BYTES] = np.ascontiguousarray(scales[..., 0].swapaxes(1, 2)).astype("<f2").view(np.uint8)
    # Four inputs of an output move together, as one 32-bit word.
    words = codes.view(np.uint32).reshape(count, PANEL, -1).swapaxes(1, 2)
    if bits == 4:
        words = words[..., : PANEL // 2] | words[..., PANEL // 2 :] << np.uint32(4)
    packed[..., SCALE_BYTES:] = np.ascontiguousarray(words).view(np.uint8).reshape(count, g, -1)
    return packed


def _rows_at_a_time(k: int) -> int:
    """Rows of whole panels with about `_CHUNK` weights."""
    return max(1, CHUNK // (groups(k) * GROUP * PANEL)) * PANEL


def quant_pack_rows(weight: np.ndarray, bits: int) -> np.ndarray:
    """Quantise a weight and pack its rows into panels.

    Args:
        weight: ``[..., N, K]`` of any float dtype, row n holding the weights of output n.
        bits: 8 or 4.

    Returns:
        uint8 `quant_packed_shape`, C-contiguous.
    """
    *lead, n, k = weight.shape
    flat = weight.reshape(-1, n, k)
    packed = np.empty(quant_packed_shape(flat.shape, bits), np.uint8)

    def pack(i: int, first: int, rows: np.ndarray) -> None:
        missing = -len(rows) % PANEL
        if missing:
            rows = np.pad(rows, ((0, missing), (0, 0), (0, 0)))
        blocks = _blocks(rows.reshape(-1, PANEL, *rows.shape[1:]), bits)
        packed[i, first // PANEL : first // PANEL + len(blocks)] = blocks

    each_chunk(flat, _rows_at_a_time(k), pack)
    return packed.reshape(*lead, *packed.shape[1:])


def quant_pack_gate_up(weight: np.ndarray, bits: int) -> np.ndarray:
    """Quantise a merged gate and up projection and pack it so that matching gate and up panels are neighbours.

    Args:
        weight: ``[..., 2F, D]``; rows [0, F) are the gate, rows [F, 2F) the up projection.
        bits: 8 or 4.

    Returns:
        uint8 `quant_packed_gate_up_shape`; panel 2i holds gate rows, panel 2i + 1 the up rows of the same outputs.
    """
    *lead, rows, k = weight.shape
    halves = quant_pack_rows(weight.reshape(*lead, 2, rows // 2, k), bits)
    return np.ascontiguousarray(halves.swapaxes(-4, -3)).reshape(quant_packed_gate_up_shape(weight.shape, bits))


def quant_packed_gate_up_shape(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    """Shape of `quant_pack_gate_up`'s result for a weight of shape ``[..., 2F, D]``."""
    *lead, rows, k = shape
    return (*lead, 2 * panels(rows // 2), groups(k), block_bytes(bits))
