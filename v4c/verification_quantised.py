"""The torch reference with products as some stored weights have them: rows are rounded first, to 8 bits or bfloat16.

For 8 bits a row is cut into groups of 32 inputs, and a group stands in steps of a 127th of its largest magnitude; the
sums over groups are exact in the kernels, so only float32 arithmetic around them differs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from v4c.custom_ops.grouped_experts import grouped_experts
from v4c.targets.quantisation import GROUP


def rounded_rows(x: Tensor) -> Tensor:
    """``[..., K]`` float with every group of a row in steps of a 127th of its largest magnitude, ties to even."""
    k = x.shape[-1]
    groups = F.pad(x, (0, -k % GROUP)).unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    tiny = scale < 1.2e-38
    codes = torch.round(groups * torch.where(tiny, 0.0, 1.0 / scale.masked_fill(tiny, 1.0)))
    return (codes * scale.masked_fill(tiny, 0.0)).flatten(-2)[..., :k]


def bfloat16_rows(x: Tensor) -> Tensor:
    """``x`` rounded to bfloat16, ties to even, as float32."""
    return x.to(torch.bfloat16).to(x.dtype)


class QuantisedProducts(TorchFunctionMode):
    """While active, products with any of the given weights, or parts of them, take rounded rows.

    Args:
        weights: the parameters that are stored so that rows are rounded.
        rounding: of the rows.
    """

    def __init__(self, weights: Collection[Tensor], rounding: Callable[[Tensor], Tensor] = rounded_rows) -> None:
        super().__init__()
        self._rounding = rounding
        self._storages = {weight.untyped_storage().data_ptr() for weight in weights}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (F.linear, torch.matmul, Tensor.matmul) and self._quantised(args[1]):
            return func(self._rounding(args[0]), *args[1:], **(kwargs or {}))
        if func in (torch.ops.v4c.grouped_experts, torch.ops.v4c.grouped_experts.default):
            with self:  # the op's own products, which a registered op would hide
                return grouped_experts(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _quantised(self, weight: Tensor) -> bool:
        return weight.untyped_storage().data_ptr() in self._storages
