"""Muon for the matrices, AdamW for everything else, a step of the correction bias for the loads of the experts."""

from __future__ import annotations

import torch
from torch import Tensor

BIAS_STEP = 0.002
"""What an expert's correction bias moves in a step (V3 paper, arXiv 2408.15664: auxiliary-loss-free balancing)."""

_ADAMW = ("embed", "lm_head", ".fn", ".hc_fn", "gate.weight", "scorer", "conv.weight", "position_bias")


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak rate: a warm-up of 40 steps, then constant, and over the last 40 % down to a twentieth."""
    remaining = (steps - step) / max(1, 0.4 * steps)
    return min((step + 1) / 40, 1.0, max(0.05, remaining))


class Optimiser:
    """Both optimisers over the trainable tensors.

    Args:
        weights: by name, as `weights.initial` gives them; float tensors become leaves that ask for a gradient, except
            the correction biases.
        muon_rate: peak rate of Muon, in AdamW's terms (``match_rms_adamw``).
        adamw_rate: peak rate of AdamW.
    """

    def __init__(self, weights: dict[str, Tensor], muon_rate: float, adamw_rate: float) -> None:
        matrices, others = {}, {}
        for name, tensor in weights.items():
            if tensor.is_floating_point() and not name.endswith("e_score_correction_bias"):
                group = matrices if tensor.ndim == 2 and not any(part in name for part in _ADAMW) else others
                group[name] = tensor.requires_grad_()
        self.parameters = matrices | others
        self.peaks = (muon_rate, adamw_rate)
        self.muon = torch.optim.Muon(matrices.values(), lr=muon_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(
            [
                {"params": [t for t in others.values() if t.ndim == 2], "weight_decay": 0.02},
                {"params": [t for t in others.values() if t.ndim != 2], "weight_decay": 0.0},
            ],
            lr=adamw_rate,
            betas=(0.9, 0.98),
            eps=1e-10,
            foreach=True,
        )
        self.groups = {"muon": matrices, "adamw": others}

    def step(self, share: float) -> float:
        """Apply the gradients at `share` of the peak rates, and clear them; returns their norm before clipping to 1."""
        for tensor in self.parameters.values():
            if tensor.grad is not None and not tensor.grad.is_contiguous():
                # Muon's momentum takes the gradient's layout, and a saved one is contiguous: both have to round alike.
                tensor.grad = tensor.grad.contiguous()
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
        for optimiser, peak in zip((self.muon, self.adamw), self.peaks, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = peak * share
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return float(norm)

    def state(self) -> dict[str, Tensor]:
        """Every moment by ``<parameter>/<what>``, for saving."""
        out = {}
        for kind, optimiser in (("muon", self.muon), ("adamw", self.adamw)):
            for name, tensor in self.groups[kind].items():
                for key, value in optimiser.state[tensor].items():
                    out[f"{name}/{key}"] = torch.as_tensor(value)
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        """Take `state` back, as it was saved."""
        for key, value in state.items():
            name, what = key.rsplit("/", 1)
            kind, optimiser = ("muon", self.muon) if name in self.groups["muon"] else ("adamw", self.adamw)
            optimiser.state[self.groups[kind][name]][what] = value


def balance(weights: dict[str, Tensor], loads: dict[str, Tensor]) -> None:
    """Move each expert's correction bias one step towards an equal load."""
    for name, counts in loads.items():
        counts = counts.float()
        weights[name] += BIAS_STEP * (counts.mean() - counts).sign()
