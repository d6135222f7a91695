"""The V4 model in torch: export-friendly, position-driven, with caches given from outside.

Parameter and buffer names are those of the Hugging Face checkpoint, so a state dict loads as it is. The same modules
are the reference that compiled models are verified against and, one layer of each kind, what is traced for export.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

import v4c.custom_ops  # noqa: F401  registers torch.ops.v4c
from v4c.errors import CheckpointError
from v4c.frontend.config import ModelConfig
from v4c.frontend.estimate import CacheDtype
from v4c.frontend.rope import inv_freq

from .attention import Attention, Caches
from .caches import allocate
from .engram import Engram
from .hyper_connection import HyperConnection, HyperHead
from .layers import Linear, RMSNorm
from .moe import MoE


class WeightSource(Protocol):
    """Anything that gives weights by Hugging Face name: a checkpoint folder or a random one."""

    @property
    def config(self) -> ModelConfig: ...

    def load(self, name: str, dtype: str | None = None) -> np.ndarray: ...


class DecoderLayer(nn.Module):
    """One block: (Engram,) attention and MoE, each between an mHC pre and post."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        if config.engram is not None and config.has_engram(layer):
            self.engram: Engram | None = Engram(config, config.engram, layer)
        else:
            self.engram = None
        self.self_attn = Attention(config, layer)
        self.mlp = MoE(config, layer)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn_hc = HyperConnection(config)
        self.ffn_hc = HyperConnection(config)

    def forward(
        self,
        streams: Tensor,
        input_ids: Tensor,
        positions: Tensor,
        lengths: Tensor,
        inv_freq: Tensor,
        engram_lookup: Tensor | None,
        caches: Caches,
    ) -> tuple[Tensor, Caches]:
        """``streams [B, S, M, D]`` through the block; returns the new streams and the updated caches."""
        new: Caches = {}
        if self.engram is not None:
            assert engram_lookup is not None
            streams, new = self.engram(streams, input_ids, engram_lookup, positions, lengths, caches)
        collapsed, post, comb = self.attn_hc.collapse(streams)
        out, attention_caches = self.self_attn(self.input_layernorm(collapsed), positions, lengths, inv_freq, caches)
        streams = self.attn_hc.expand(out, streams, post, comb)
        collapsed, post, comb = self.ffn_hc.collapse(streams)
        out = self.mlp(self.post_attention_layernorm(collapsed), input_ids)
        streams = self.ffn_hc.expand(out, streams, post, comb)
        return streams, attention_caches | new


class Embedding(nn.Module):
    """Token embedding, copied into every residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.streams = config.hc_mult

    def forward(self, input_ids: Tensor) -> Tensor:
        """``[B, S]`` ids -> ``[B, S, M, D]``."""
        return nn.functional.embedding(input_ids, self.weight).unsqueeze(2).expand(-1, -1, self.streams, -1)


class Head(nn.Module):
    """mHC head, final norm and output projection, of each row's last live token or of all tokens."""

    def __init__(self, config: ModelConfig, all_logits: bool = False) -> None:
        super().__init__()
        self.hc_head = HyperHead(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.all_logits = all_logits

    def forward(self, streams: Tensor, lengths: Tensor) -> Tensor:
        """``[B, S, M, D]`` -> ``[B, V]`` (or ``[B, S, V]``); a row without live tokens gives its first token's."""
        if self.all_logits:
            return self.lm_head(self.norm(self.hc_head(streams)))
        # Gathered before the output projection: it is the largest product of the step.
        return self.lm_head(self.norm(self.hc_head(last_live(streams, lengths)))).squeeze(1)


def last_live(streams: Tensor, lengths: Tensor) -> Tensor:
    """``[B, S, M, D]`` -> ``[B, 1, M, D]``: each row's last live token; the first one's of a row without any."""
    last = (lengths - 1).clamp(min=0)[:, None, None, None].expand(-1, 1, *streams.shape[2:])
    return torch.gather(streams, 1, last)


class V4Model(nn.Module):
    """The whole model on real weights, in float32 (or float64 through ``.double()``): the reference."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.head = Head(config)
        self.engram_lookup: Tensor | None
        lookup = None if config.engram is None else torch.empty(config.vocab_size, dtype=torch.int64)
        self.register_buffer("engram_lookup", lookup)

    @classmethod
    def from_source(cls, source: WeightSource, kv: CacheDtype = "f32") -> V4Model:
        """Build the model on the weights of a checkpoint; raises CheckpointError where one is missing or misshapen.

        With a narrow `kv`, rows of keys and values are rounded as caches of that format would keep them, which are
        float32 here all the same.
        """
        with torch.device("meta"):
            model = cls(source.config)
        state = {}
        for name, tensor in model.state_dict().items():
            array = source.load(checkpoint_name(name), "f32" if tensor.is_floating_point() else None)
            if array.shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"{checkpoint_name(name)}: expected shape {list(tensor.shape)}, found {list(array.shape)}"
                )
            state[name] = torch.from_numpy(np.array(array))
        model.load_state_dict(state, assign=True)
        for layer in model.layers:
            assert isinstance(layer, DecoderLayer)
            layer.self_attn.kv = kv
        for rotation in ("main", "compress"):
            model.register_buffer(
                f"inv_freq_{rotation}", torch.from_numpy(inv_freq(source.config, rotation)), persistent=False
            )
        return model.requires_grad_(False).eval()

    def forward(
        self, input_ids: Tensor, positions: Tensor, lengths: Tensor, caches: list[Caches], all_logits: bool = False
    ) -> tuple[Tensor, list[Caches]]:
        """One chunk of tokens.

        Args:
            input_ids: ``[B, S]`` int64.
            positions: ``[B]`` int64, where each row's chunk starts.
            lengths: ``[B]`` int64, live tokens of each row; the rest is padding.
            caches: as `allocate` made them or a former call returned them; never modified.
            all_logits: logits of every token rather than of each row's last live one.

        Returns:
            Logits ``[B, V]`` (``[B, S, V]``) and the new caches.
        """
        streams, new = self.hidden(input_ids, positions, lengths, caches)
        self.head.all_logits = all_logits
        return self.head(streams, lengths), new

    def hidden(
        self, input_ids: Tensor, positions: Tensor, lengths: Tensor, caches: list[Caches]
    ) -> tuple[Tensor, list[Caches]]:
        """Streams ``[B, S, M, D]`` before the head, which an MTP layer takes too, and the new caches; as `forward`."""
        streams, new = self.embed_tokens(input_ids), []
        for index, layer in enumerate(self.layers):
            rotation = rope_kind(self.config, index)
            frequencies = getattr(self, f"inv_freq_{rotation}")
            streams, updated = layer(
                streams, input_ids, positions, lengths, frequencies, self.engram_lookup, caches[index]
            )
            new.append(updated)
        return streams, new

    @torch.no_grad()
    def logits(self, token_ids: Tensor, capacity: int | None = None) -> Tensor:
        """Logits ``[B, S, V]`` of whole sequences ``[B, S]`` from empty caches."""
        batch, chunk = token_ids.shape
        positions, lengths = torch.zeros(batch, dtype=torch.int64), torch.full((batch,), chunk)
        caches = allocate(self.config, batch, capacity or chunk)
        return self(token_ids, positions, lengths, caches, all_logits=True)[0]


def rope_kind(config: ModelConfig, layer: int) -> str:
    """Which rotation a layer uses: plain ``main`` on sliding layers, ``compress`` (with YaRN) on CSA and HCA."""
    return "main" if config.attention_types[layer] == "sliding" else "compress"


def checkpoint_name(name: str) -> str:
    """Hugging Face tensor name of one of `V4Model`'s parameters or buffers."""
    if name.startswith("head.lm_head."):
        return name.removeprefix("head.")
    return "model." + name.removeprefix("head.")
