"""The model on whole sequences, written for training: dense, differentiable, without caches.

The same parameters give the same logits as the cache-driven model in `v4c.frontend.model` (a test holds them to 1e-5).
Top-k choices have no gradient, so the indexer is trained by a loss of its own (`index_loss`), and the experts'
correction bias by the loads that are counted here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.train_nano.streams import Mixer, collapse_head
from v4c.custom_ops.engram_gate_conv import engram_gate_conv
from v4c.custom_ops.engram_hash import engram_hash
from v4c.custom_ops.hash_route import hash_route
from v4c.custom_ops.topk_route import topk_route
from v4c.custom_ops.trailing_rope import rotate
from v4c.frontend.config import ModelConfig
from v4c.frontend.rope import inv_freq

Weights = dict[str, Tensor]
Product = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Output:
    """What a pass over ``ids [B, S]`` gives.

    Attributes:
        logits: ``[B, S, V]``.
        mtp_logits: ``[B, S, V]`` of the token after the next; None without an MTP layer or without `next_ids`.
        index_losses: one scalar per CSA layer, see `index_loss`.
        loads: by the name of a correction bias, how many tokens chose each expert, ``[E]``.
    """

    logits: Tensor
    mtp_logits: Tensor | None = None
    index_losses: list[Tensor] = field(default_factory=list)
    loads: dict[str, Tensor] = field(default_factory=dict)


class Forward:
    """The forward pass of one model.

    Args:
        config: the model.
        weights: parameters and buffers by checkpoint name; each expert's matrix is a tensor of its own, called
            ``<stack>.<expert>``.
        plain_residual: one residual stream instead of hyper-connections; `config.hc_mult` is 1.
        sparse: whether CSA layers read the indexer's choice, as the model is meant, or every compressed row.
        half: products in bfloat16, from float32 operands to float32 results: four times as fast on a processor that
            multiplies bfloat16. Everything else stays in float32.
        masked: whether compressed rows are hidden from every layer: what the sliding windows alone can do.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        plain_residual: bool = False,
        sparse: bool = True,
        masked: bool = False,
        half: bool = False,
    ) -> None:
        self.config, self.weights, self.sparse, self.masked = config, weights, sparse, masked
        self.linear, self.matmul = (_linear_half, _matmul_half) if half else (F.linear, torch.matmul)
        self.mixer = Mixer(config, plain_residual)
        self.frequencies = {kind: torch.from_numpy(inv_freq(config, kind)) for kind in ("main", "compress")}  # type: ignore[arg-type]

    def __call__(self, ids: Tensor, next_ids: Tensor | None = None) -> Output:
        """``ids [B, S]`` and, for the MTP layer, the tokens after them ``next_ids [B, S]``."""
        w, config, out = self.weights, self.config, Output(ids)
        embedding = w["model.embed_tokens.weight"]
        streams = F.embedding(ids, embedding).unsqueeze(2).expand(-1, -1, config.hc_mult, -1)
        for layer in range(config.num_hidden_layers):
            streams = self._layer(config, layer, f"model.layers.{layer}.", streams, ids, out)
        out.logits = self._head(streams, "model.")
        if next_ids is not None and config.num_nextn_predict_layers:
            joined = self.linear(self._norm(streams, "mtp.0.hnorm"), w["mtp.0.h_proj.weight"])
            ahead = self._norm(F.embedding(next_ids, embedding), "mtp.0.enorm")
            joined = joined + self.linear(ahead, w["mtp.0.e_proj.weight"]).unsqueeze(2)
            out.mtp_logits = self._head(self._layer(config.mtp_layer(), 0, "mtp.0.", joined, next_ids, out), "mtp.0.")
        return out

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weights[f"{name}.weight"], self.config.rms_norm_eps)

    def _head(self, streams: Tensor, prefix: str) -> Tensor:
        row = collapse_head(self.mixer, self.weights, prefix + "hc_head.", streams)
        return self.linear(self._norm(row, prefix + "norm"), self.weights["lm_head.weight"])

    def _layer(self, config: ModelConfig, layer: int, prefix: str, streams: Tensor, ids: Tensor, out: Output) -> Tensor:
        if config.has_engram(layer):
            streams = self._engram(config, prefix + "engram.", streams, ids)
        row, post, comb = self.mixer.collapse(self.weights, prefix + "attn_hc.", streams)
        row = self._norm(row, prefix + "input_layernorm")
        attended = self._attention(config, layer, prefix + "self_attn.", row, out)
        streams = self.mixer.expand(attended, streams, post, comb)
        row, post, comb = self.mixer.collapse(self.weights, prefix + "ffn_hc.", streams)
        row = self._norm(row, prefix + "post_attention_layernorm")
        return self.mixer.expand(self._moe(config, layer, prefix + "mlp.", row, ids, out), streams, post, comb)

    def _engram(self, config: ModelConfig, prefix: str, streams: Tensor, ids: Tensor) -> Tensor:
        w, engram = self.weights, config.engram
        assert engram is not None
        batch, chunk = ids.shape
        start, lengths = ids.new_zeros(batch), ids.new_full((batch,), chunk)
        constants = (w[prefix + name] for name in ("multipliers", "primes", "offsets"))
        history = ids.new_zeros(batch, engram.max_ngram - 1)
        addresses, _ = engram_hash(
            ids, w["model.engram_lookup"], *constants, history, start, lengths, engram.pad_id
        )  # fmt: skip
        memory = F.embedding(addresses, w[prefix + "embedding.weight"]).flatten(2)
        keys = self.linear(memory, w[prefix + "key_proj.weight"]).unflatten(-1, (config.hc_mult, config.hidden_size))
        norms = (w[f"{prefix}{name}_norm.weight"] for name in ("key", "stream", "conv"))
        state = streams.new_zeros(batch, (engram.kernel_size - 1) * engram.dilation, keys[0, 0].numel())
        return engram_gate_conv(
            keys, self.linear(memory, w[prefix + "value_proj.weight"]), streams, *norms, w[prefix + "conv.weight"],
            state, start, lengths, engram.dilation, config.rms_norm_eps,
        )[0]  # fmt: skip

    def _attention(self, config: ModelConfig, layer: int, prefix: str, x: Tensor, out: Output) -> Tensor:
        w, kind, heads, width = self.weights, config.attention_types[layer], config.num_attention_heads, config.head_dim
        frequencies = self.frequencies["main" if kind == "sliding" else "compress"]
        positions = torch.arange(x.shape[1])
        low = self._norm(self.linear(x, w[prefix + "q_a_proj.weight"]), prefix + "q_a_norm")
        q = self.linear(low, w[prefix + "q_b_proj.weight"]).unflatten(-1, (heads, width))
        q = rotate(F.rms_norm(q, (width,), None, config.rms_norm_eps), positions[:, None], frequencies, 1.0)
        kv = self._norm(self.linear(x, w[prefix + "kv_proj.weight"]), prefix + "kv_norm")
        kv = rotate(kv, positions, frequencies, 1.0)
        scale = width**-0.5
        logits, window = window_logits(q, kv, config.sliding_window, scale, self.matmul)
        if kind == "sliding" or self.masked or x.shape[1] < config.ratio(layer):
            rows, visible, row_logits = None, None, None
        else:
            ratio = config.ratio(layer)
            rows = self._compress(prefix + "compressor.", x, ratio, width, kind == "csa", frequencies)
            row_logits = self.matmul(q.flatten(1, 2), rows.transpose(1, 2)).unflatten(1, q.shape[1:3]) * scale
            ready = torch.arange(rows.shape[1]) < (positions[:, None] + 1) // ratio  # [S, N]
            visible = ready.expand(len(x), -1, -1)
            if kind == "csa":
                scores = self._index_scores(config, prefix + "compressor.indexer.", x, low, frequencies, positions)
                scores = scores.masked_fill(~ready, -torch.inf)
                out.index_losses.append(index_loss(scores, row_logits, logits, w[prefix + "sinks"], ready))
                if self.sparse and rows.shape[1] > config.index_topk:
                    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : config.index_topk]
                    visible = visible & torch.zeros_like(visible).scatter(-1, best, True)
            row_logits = row_logits.masked_fill(~visible.unsqueeze(2), -torch.inf)
        attended = attend(logits, window, row_logits, rows, w[prefix + "sinks"], self.matmul)
        attended = rotate(attended, positions[:, None], frequencies, -1.0)
        grouped = attended.unflatten(2, (config.o_groups, heads // config.o_groups)).flatten(3)
        o_a = w[prefix + "o_a_proj.weight"].unflatten(0, (config.o_groups, -1))
        low_rank = [self.linear(grouped[:, :, group], o_a[group]) for group in range(config.o_groups)]
        return self.linear(torch.cat(low_rank, -1), w[prefix + "o_b_proj.weight"])

    def _compress(
        self, prefix: str, x: Tensor, ratio: int, width: int, overlap: bool, frequencies: Tensor
    ) -> Tensor:  # fmt: skip
        """``x [B, S, D]`` -> the rows of all complete windows ``[B, S // ratio, width]``."""
        w, windows = self.weights, x.shape[1] // ratio
        x = x[:, : windows * ratio]
        values = self.linear(x, w[prefix + "kv_proj.weight"]).unflatten(1, (windows, ratio))
        gates = self.linear(x, w[prefix + "gate_proj.weight"]).unflatten(1, (windows, ratio))
        gates = gates + w[prefix + "position_bias"]
        if overlap:  # the first halves of the window before, then the second halves of this one
            values = torch.cat([F.pad(values[:, :-1, :, :width], (0, 0, 0, 0, 1, 0)), values[..., width:]], dim=2)
            before = F.pad(gates[:, :-1, :, :width], (0, 0, 0, 0, 1, 0), value=-torch.inf)
            gates = torch.cat([before, gates[..., width:]], dim=2)
        rows = self._norm((values * gates.softmax(2)).sum(2), prefix + "kv_norm")
        return rotate(rows, torch.arange(windows) * ratio, frequencies, 1.0)

    def _index_scores(
        self, config: ModelConfig, prefix: str, x: Tensor, low: Tensor, frequencies: Tensor, positions: Tensor
    ) -> Tensor:
        """The indexer's scores ``[B, S, N]``; its inputs are detached, for its loss is its own."""
        w, heads, width = self.weights, config.index_n_heads, config.index_head_dim
        x, low = x.detach(), low.detach()
        keys = self._compress(prefix, x, config.csa_ratio, width, True, frequencies)
        q = self.linear(low, w[prefix + "q_b_proj.weight"]).unflatten(-1, (heads, width))
        q = rotate(q, positions[:, None], frequencies, 1.0)
        scores = self.matmul(q.flatten(1, 2), keys.transpose(1, 2)).relu().unflatten(1, q.shape[1:3])
        by_head = self.linear(x, w[prefix + "scorer.weights_proj.weight"]).unsqueeze(2)
        return self.matmul(by_head, scores).squeeze(2) * (width * heads) ** -0.5

    def _moe(self, config: ModelConfig, layer: int, prefix: str, x: Tensor, ids: Tensor, out: Output) -> Tensor:
        w, scaling = self.weights, config.routed_scaling_factor
        logits = F.linear(x, w[prefix + "gate.weight"])  # in float32: it makes choices
        if config.mlp_types[layer] == "hash":
            shares, chosen = hash_route(logits, ids, w[prefix + "gate.tid2eid"], scaling)
        else:
            name = prefix + "gate.e_score_correction_bias"
            shares, chosen = topk_route(logits, w[name], config.num_experts_per_tok, scaling)
            out.loads[name] = torch.bincount(chosen.flatten(), minlength=config.n_routed_experts)
        shared = (w[f"{prefix}shared_experts.{part}_proj.weight"] for part in ("gate", "up", "down"))
        gate_matrix, up_matrix, down_matrix = shared
        result = swiglu(self.linear(x, gate_matrix), self.linear(x, up_matrix), config.swiglu_limit)
        result = self.linear(result, down_matrix).flatten(0, 1)
        flat, per_token = x.flatten(0, 1), chosen.shape[-1]
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=config.n_routed_experts).tolist()
        tokens = order.div(per_token, rounding_mode="floor")
        parts = []
        for expert, mine in enumerate(flat[tokens].split(counts)):
            both = self.linear(mine, w[f"{prefix}experts.gate_up_proj.{expert}"])
            inner = swiglu(*both.chunk(2, dim=-1), config.swiglu_limit)
            parts.append(self.linear(inner, w[f"{prefix}experts.down_proj.{expert}"]))
        routed = torch.cat(parts) * shares.flatten()[order, None]
        return result.index_add(0, tokens, routed).view(x.shape)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """SwiGLU with the gate clamped above and the up branch on both sides."""
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def window_logits(
    q: Tensor, kv: Tensor, window: int, scale: float, matmul: Product = torch.matmul
) -> tuple[Tensor, Tensor]:
    """Attention logits over the sliding window, in blocks of `window` queries against two blocks of keys.

    Args:
        q: ``[B, S, H, C]``.
        kv: ``[B, S, C]``.
        window: tokens a query sees, its own included.
        scale: factor on ``q . key``.
        matmul: how to multiply.

    Returns:
        Logits ``[B, S, H, 2 window]``, -inf where a key is not visible, and the keys of each block
        ``[B, S / window (rounded up), 2 window, C]``.
    """
    length, heads = q.shape[1:3]
    rest = -length % window
    q, kv = F.pad(q, (0, 0, 0, 0, 0, rest)), F.pad(kv, (0, 0, 0, rest))
    blocks = kv.unflatten(1, (-1, window))
    keys = torch.cat([F.pad(blocks[:, :-1], (0, 0, 0, 0, 1, 0)), blocks], dim=2)
    logits = matmul(q.unflatten(1, (-1, window)).flatten(2, 3), keys.transpose(2, 3)) * scale
    logits = logits.unflatten(2, (window, heads))  # [B, blocks, window, H, 2 window]
    query, key = torch.arange(window)[:, None], torch.arange(2 * window)
    visible = (key > query) & (key <= query + window)
    first = torch.arange(keys.shape[1])[:, None, None] == 0
    visible = visible & ~(first & (key < window))
    logits = logits.masked_fill(~visible[:, :, None], -torch.inf)
    return logits.flatten(1, 2)[:, :length], keys


def attend(
    logits: Tensor,
    window: Tensor,
    row_logits: Tensor | None,
    rows: Tensor | None,
    sinks: Tensor,
    matmul: Product = torch.matmul,
) -> Tensor:
    """One softmax over window, compressed rows and the head's sink, which takes a share and gives nothing.

    `logits` and `window` are `window_logits`'s; `row_logits` ``[B, S, H, N]`` and `rows` ``[B, N, C]``. Returns
    ``[B, S, H, C]``.
    """
    batch, length, heads, near = logits.shape
    sink = sinks[:, None].expand(batch, length, heads, 1)
    every = [logits, sink] if row_logits is None else [logits, row_logits, sink]
    shares = torch.cat(every, dim=-1).softmax(-1)
    size = near // 2
    mine = F.pad(shares[..., :near], (0, 0, 0, 0, 0, -length % size)).unflatten(1, (-1, size))
    out = matmul(mine.flatten(2, 3), window).unflatten(2, (size, heads)).flatten(1, 2)[:, :length]
    if rows is not None:
        out = out + matmul(shares[..., near:-1].flatten(1, 2), rows).unflatten(1, (length, heads))
    return out


def index_loss(scores: Tensor, row_logits: Tensor, logits: Tensor, sinks: Tensor, ready: Tensor) -> Tensor:
    """How far the indexer's scores are from where attention looks (DeepSeek-V3.2, arXiv 2512.02556, eqs. 3 and 4).

    The target of a query is its attention mass on each ready compressed row, summed over heads and normalised; the loss
    is the KL divergence of ``softmax(scores)`` from it, weighted by the share of attention that rows get at all, so
    that queries that look at nothing but their window teach nothing. The target has no gradient.

    Args:
        scores: ``[B, S, N]``, -inf where a row is not ready.
        row_logits: ``[B, S, H, N]`` of every row.
        logits: ``[B, S, H, n]`` of the window.
        sinks: ``[H]``.
        ready: ``[S, N]`` bool.
    """
    with torch.no_grad():
        hidden = row_logits.masked_fill(~ready[:, None], -torch.inf)
        sink = sinks[:, None].expand(*hidden.shape[:3], 1)
        mass = torch.cat([hidden, logits, sink], dim=-1).softmax(-1)[..., : hidden.shape[-1]].sum(2)
        total = mass.sum(-1, keepdim=True)
        target = mass / total.clamp_min(1e-9)
        weight = (total.squeeze(-1) / row_logits.shape[2]) * ready.any(-1)
    got = scores.masked_fill(~ready.any(-1)[:, None], 0.0).log_softmax(-1).masked_fill(~ready, 0.0)
    divergence = (torch.special.xlogy(target, target) - target * got).sum(-1)
    return (divergence * weight).sum() / weight.sum().clamp_min(1e-6)


def _linear_half(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.bfloat16(), weight.bfloat16()).float()


def _matmul_half(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a.bfloat16(), b.bfloat16()).float()
