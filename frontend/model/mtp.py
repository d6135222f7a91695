"""The multi-token-prediction (MTP) layer: from the model's streams and the next token it predicts the token after that.

It is a sliding layer of its own behind two projections that join both inputs, and before an mHC head and a norm of its
own; embedding and output projection are the model's (DeepSeek-V3 paper, arXiv 2412.19437, section 2.2; V4 keeps the
residual streams instead of one hidden state). transformers leaves the layer out.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from v4c.errors import CheckpointError, InputError
from v4c.frontend.config import ModelConfig
from v4c.frontend.rope import inv_freq

from .attention import Caches
from .caches import CacheSpec, layer_caches
from .hyper_connection import HyperHead
from .layers import Linear, RMSNorm
from .model import DecoderLayer, WeightSource, last_live


class MTPLayer(DecoderLayer):
    """One MTP layer, without the embedding and the output projection; parameters as in ``mtp.N.*``."""

    def __init__(self, config: ModelConfig) -> None:
        """`config` is the whole model's."""
        super().__init__(config.mtp_layer(), 0)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.e_proj, self.h_proj = Linear(hidden, hidden), Linear(hidden, hidden)
        self.enorm, self.hnorm, self.norm = (RMSNorm(hidden, eps) for _ in range(3))
        self.hc_head = HyperHead(config)

    def join(self, streams: Tensor, embedding: Tensor) -> Tensor:
        """The layer's input ``[B, S, M, D]`` from the model's streams ``[B, S, M, D]`` of tokens t, taken before the
        head, and the embeddings ``[B, S, D]`` of tokens t + 1."""
        return join(self, streams, embedding)

    def predict(
        self,
        streams: Tensor,
        embedding: Tensor,
        next_ids: Tensor,
        positions: Tensor,
        lengths: Tensor,
        frequencies: Tensor,
        caches: Caches,
    ) -> tuple[Tensor, Caches]:
        """Streams ``[B, S, M, D]`` of the layer, which a further layer or the head takes, and the updated caches.

        `positions` and `lengths` ``[B]`` are those of `streams`; `frequencies` are the plain ones (``"main"``).
        """
        joined = self.join(streams, embedding)
        return self(joined, next_ids, positions, lengths, frequencies, None, caches)

    def collapse(self, streams: Tensor) -> Tensor:
        """``[B, S, M, D]`` -> ``[B, S, D]``, what the model's output projection takes."""
        return self.norm(self.hc_head(streams))


class MTPEntry(nn.Module):
    """What stands before an MTP layer's block, from token ids: a part that is traced by itself."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, hidden))
        self.e_proj, self.h_proj = Linear(hidden, hidden), Linear(hidden, hidden)
        self.enorm, self.hnorm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)

    def forward(self, streams: Tensor, input_ids: Tensor) -> Tensor:
        """``[B, S, M, D]`` and the ids ``[B, S]`` of the tokens after them -> ``[B, S, M, D]``."""
        return join(self, streams, nn.functional.embedding(input_ids, self.embed_tokens))


def join(layer: MTPLayer | MTPEntry, streams: Tensor, embedding: Tensor) -> Tensor:
    """``e_proj(enorm(embedding)) + h_proj(hnorm(stream))`` for each stream: ``[B, S, M, D]``."""
    return layer.e_proj(layer.enorm(embedding)).unsqueeze(2) + layer.h_proj(layer.hnorm(streams))


class MTPModel(nn.Module):
    """An MTP layer with the model's embedding and output projection, in float32."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layer = MTPLayer(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @classmethod
    def from_source(cls, source: WeightSource, depth: int = 0) -> MTPModel:
        """Build layer ``mtp.<depth>`` on the weights of a checkpoint.

        Raises:
            InputError: the model has no such layer.
            CheckpointError: a tensor is missing or misshapen.
        """
        count = source.config.num_nextn_predict_layers
        if not 0 <= depth < count:
            raise InputError(f"MTP layer: expected one below num_nextn_predict_layers ({count}), found {depth}")
        with torch.device("meta"):
            model = cls(source.config)
        state = {}
        for name, tensor in model.state_dict().items():
            array = source.load(mtp_name(name, depth), "f32")
            if array.shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"{mtp_name(name, depth)}: expected shape {list(tensor.shape)}, found {list(array.shape)}"
                )
            state[name] = torch.from_numpy(np.array(array))
        model.load_state_dict(state, assign=True)
        model.register_buffer("inv_freq", torch.from_numpy(inv_freq(source.config, "main")), persistent=False)
        return model.requires_grad_(False).eval()

    def forward(
        self,
        streams: Tensor,
        next_ids: Tensor,
        positions: Tensor,
        lengths: Tensor,
        caches: Caches,
        all_logits: bool = False,
    ) -> tuple[Tensor, Tensor, Caches]:
        """Logits of the token after the next.

        Args:
            streams: ``[B, S, M, D]``, `V4Model.hidden`'s of tokens t (or a former MTP layer's).
            next_ids: ``[B, S]`` int64, tokens t + 1.
            positions: ``[B]`` int64, position of the first token t.
            lengths: ``[B]`` int64, live tokens of each row.
            caches: as `mtp_caches` lists them; never modified.
            all_logits: of every token rather than of each row's last live one.

        Returns:
            Logits ``[B, V]`` (``[B, S, V]``) of tokens t + 2, the layer's streams ``[B, S, M, D]`` and the new caches.
        """
        embedding = nn.functional.embedding(next_ids, self.embed_tokens)
        where = (positions, lengths, self.inv_freq)
        streams, new = self.layer.predict(streams, embedding, next_ids, *where, caches)
        if all_logits:
            return self.lm_head(self.layer.collapse(streams)), streams, new
        return self.lm_head(self.layer.collapse(last_live(streams, lengths))).squeeze(1), streams, new


def mtp_name(name: str, depth: int = 0) -> str:
    """Checkpoint name of one of `MTPModel`'s parameters."""
    if name == "embed_tokens":
        return "model.embed_tokens.weight"
    return name if name.startswith("lm_head.") else f"mtp.{depth}." + name.removeprefix("layer.")


def mtp_caches(config: ModelConfig, depth: int = 0) -> list[CacheSpec]:
    """The caches of an MTP layer; their layer number follows those of the model."""
    return [
        CacheSpec(config.num_hidden_layers + depth, spec.name, spec.rows, spec.width, spec.ratio, spec.dtype)
        for spec in layer_caches(config.mtp_layer(), 0)
    ]


def allocate_mtp(config: ModelConfig, batch: int, capacity: int) -> Caches:
    """Zeroed caches of one MTP layer, for `capacity` tokens."""
    return {s.name: torch.zeros(s.shape(batch, capacity), dtype=getattr(torch, s.dtype)) for s in mtp_caches(config)}
