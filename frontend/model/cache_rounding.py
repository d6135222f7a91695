"""What a row loses when a cache keeps it in fewer bits, as torch arithmetic: the reference of narrow caches.

Values are those that deployed rows give back (V4 paper, section 2.3; number formats of the OCP Microscaling
specification v1.0): a group shares the smallest power of two with which no element exceeds the largest code, at least
2**-100, and elements are rounded to nearest, ties to even. Rounding a rounded row changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from v4c.frontend.estimate import FP4_GROUP, FP8_ROW_GROUP, CacheDtype

_SMALLEST_EXPONENT = -100


def rounded_row(x: Tensor, kv: CacheDtype, rope_dims: int) -> Tensor:
    """Key-value rows ``[..., C]`` as the cache gives them back; the last `rope_dims` dims are the rotated ones."""
    if kv == "f32":
        return x
    if kv == "bf16":
        return _bfloat16(x)
    plain, rope = x[..., : x.shape[-1] - rope_dims], x[..., x.shape[-1] - rope_dims :]
    return torch.cat([_scaled(plain, FP8_ROW_GROUP, 448.0, _e4m3), _bfloat16(rope)], dim=-1)


def rounded_index_row(x: Tensor, kv: CacheDtype) -> Tensor:
    """The indexer's rows ``[..., I]`` as the cache gives them back: FP4 where the others are FP8."""
    if kv == "f32":
        return x
    return _bfloat16(x) if kv == "bf16" else _scaled(x, FP4_GROUP, 6.0, _e2m1)


def _bfloat16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


def _e4m3(x: Tensor) -> Tensor:
    return x.to(torch.float32).to(torch.float8_e4m3fn).to(x.dtype)


def _e2m1(x: Tensor) -> Tensor:
    """Steps of 1/2 below 2, of 1 below 4, of 2 above; where steps meet, both round alike."""
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0)).to(x.dtype)
    return torch.round(x / step) * step


def _scaled(x: Tensor, group: int, largest: float, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Groups of `group` elements of the last axis rounded in units of their scale; the last may be smaller."""
    width = x.shape[-1]
    groups = F.pad(x, (0, -width % group)).unflatten(-1, (-1, group))
    # 448 = 0.875 * 2**9 and 6 = 0.75 * 2**3: one more where the mantissa is above that.
    fraction, exponent = torch.frexp(groups.abs().amax(-1, keepdim=True))
    end, shift = torch.frexp(torch.tensor(largest, dtype=x.dtype))
    scale = (exponent - shift + (fraction > end)).clamp(min=_SMALLEST_EXPONENT)
    values = torch.ldexp(rounded(torch.ldexp(groups, -scale)), scale)
    return values.flatten(-2)[..., :width]
