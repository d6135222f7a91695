"""The sizes of a DeepSeek-V4 model: one frozen description that every other part of v4c reads.

Field names are those of Hugging Face's config; the per-layer schedule is spelled out, so nobody guesses defaults.
Reading and writing the JSON layouts is in `config_json`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from v4c.errors import ConfigError

from .engram_config import EngramConfig

__all__ = ["ATTENTION_TYPES", "DTYPES", "MLP_TYPES", "EngramConfig", "ModelConfig", "YarnScaling"]

ATTENTION_TYPES = ("sliding", "csa", "hca")
MLP_TYPES = ("hash", "topk")
DTYPES = ("float32", "bfloat16", "float16")

_POSITIVE_INTEGERS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "qk_rope_head_dim",
    "q_lora_rank", "o_groups", "o_lora_rank", "n_routed_experts", "num_experts_per_tok", "n_shared_experts",
    "moe_intermediate_size", "csa_ratio", "hca_ratio", "sliding_window", "index_n_heads", "index_head_dim",
    "index_topk", "hc_mult", "hc_sinkhorn_iters", "max_position_embeddings",
)  # fmt: skip
_POSITIVE_NUMBERS = ("routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps")
_LARGEST_INTEGER = 2**31 - 1
# Tensors are listed one by one, so a config must not be able to call for billions of them.
_LARGEST = {"num_hidden_layers": 2**12, "n_routed_experts": 2**14}


def _check_number(key: str, value: object, above: float) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or value <= above:  # type: ignore[arg-type,operator]
        raise ConfigError(f"{key}: expected a finite number above {above:g}, found {value!r}")


def _check_integer(key: str, value: object, minimum: int) -> None:
    maximum = _LARGEST.get(key, _LARGEST_INTEGER)
    if type(value) is not int or not minimum <= value <= maximum:
        raise ConfigError(f"{key}: expected an integer from {minimum} to {maximum}, found {value!r}")


@dataclass(frozen=True)
class YarnScaling:
    """YaRN for the compressed layers (arXiv 2309.00071); its amplitude is always 1.0 in V4.

    `truncate` rounds the correction range to whole dims. transformers 5.23 always truncates for this model.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_integer("original_max_position_embeddings", self.original_max_position_embeddings, 1)
        _check_number("beta_fast", self.beta_fast, 0)
        _check_number("beta_slow", self.beta_slow, 0)
        _check_number("factor", self.factor, 0)
        if self.factor < 1:
            raise ConfigError(f"factor: expected a YaRN factor of at least 1, found {self.factor!r}")
        if type(self.truncate) is not bool:
            raise ConfigError(f"truncate: expected true or false, found {self.truncate!r}")


@dataclass(frozen=True)
class ModelConfig:
    """One model. Checked on construction; `dataclasses.replace` makes variants.

    Attributes:
        attention_types: per layer ``"sliding"``, ``"csa"`` or ``"hca"``.
        mlp_types: per layer ``"hash"`` (experts from a table) or ``"topk"`` (experts by score).
        csa_ratio: tokens per compressed row on CSA layers; `hca_ratio` likewise on HCA layers.
        qk_rope_head_dim: trailing dims of each head that rotate; the same in the indexer.
        yarn: applies with `compress_rope_theta`, on CSA and HCA layers only.
        dtype: of the stored weight matrices, as ``config.json`` says it.

    Raises:
        ConfigError: a value out of range, or two that contradict each other.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    swiglu_limit: float
    attention_types: tuple[str, ...]
    csa_ratio: int
    hca_ratio: int
    mlp_types: tuple[str, ...]
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    yarn: YarnScaling | None
    max_position_embeddings: int
    num_nextn_predict_layers: int = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    dtype: str = "float32"
    engram: EngramConfig | None = None

    def __post_init__(self) -> None:
        for key in _POSITIVE_INTEGERS:
            _check_integer(key, getattr(self, key), 1)
        for key in _POSITIVE_NUMBERS:
            _check_number(key, getattr(self, key), 0)
        for key in ("rope_theta", "compress_rope_theta"):
            _check_number(key, getattr(self, key), 1)
        _check_integer("num_nextn_predict_layers", self.num_nextn_predict_layers, 0)
        self._check_schedule()
        self._check_relations()
        self._check_tokens()

    def ratio(self, layer: int) -> int:
        """Tokens per compressed row of `layer`; 0 on a sliding layer."""
        return {"sliding": 0, "csa": self.csa_ratio, "hca": self.hca_ratio}[self.attention_types[layer]]

    @property
    def compress_ratios(self) -> tuple[int, ...]:
        """`ratio` of every layer."""
        return tuple(self.ratio(layer) for layer in range(self.num_hidden_layers))

    def layers_of(self, kind: str) -> tuple[int, ...]:
        """Layers whose attention or MLP type is `kind`."""
        types = self.mlp_types if kind in MLP_TYPES else self.attention_types
        return tuple(layer for layer, found in enumerate(types) if found == kind)

    def has_engram(self, layer: int) -> bool:
        """Whether an Engram stands in front of `layer`."""
        return self.engram is not None and layer in self.engram.layer_ids

    def mtp_layer(self) -> ModelConfig:
        """An MTP layer's decoder layer as a model of one: sliding attention, experts by score, no Engram."""
        return replace(
            self,
            num_hidden_layers=1,
            attention_types=("sliding",),
            mlp_types=("topk",),
            num_nextn_predict_layers=0,
            engram=None,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, in the layout transformers 5.23 writes, plus ``"engram"`` when there is one."""
        from .config_json import config_to_dict

        return config_to_dict(self)

    @staticmethod
    def from_dict(values: dict[str, Any], source: str = "config.json") -> ModelConfig:
        """Read either JSON layout; `source` names the file in errors.

        Raises:
            ConfigError: a key that is missing, of the wrong type, or does not describe a V4 model.
            UnsupportedError: V4.1.
        """
        from .config_json import config_from_dict

        return config_from_dict(values, source)

    @staticmethod
    def from_file(path: str | Path) -> ModelConfig:
        """Read a ``config.json``, or the one in a folder. Raises as `from_dict`, and for unreadable files."""
        from .config_json import config_from_file

        return config_from_file(Path(path))

    def _check_schedule(self) -> None:
        for key, types, known in (
            ("attention_types", self.attention_types, ATTENTION_TYPES),
            ("mlp_types", self.mlp_types, MLP_TYPES),
        ):
            if len(types) != self.num_hidden_layers:
                raise ConfigError(f"{key}: expected {self.num_hidden_layers} entries, found {len(types)}")
            for layer, kind in enumerate(types):
                if kind not in known:
                    raise ConfigError(f"{key}[{layer}]: expected one of {', '.join(known)}, found {kind!r}")

    def _check_relations(self) -> None:
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ConfigError(
                f"num_experts_per_tok: expected at most n_routed_experts ({self.n_routed_experts}), "
                f"found {self.num_experts_per_tok}"
            )
        if self.n_shared_experts != 1:
            raise ConfigError(f"n_shared_experts: expected 1, found {self.n_shared_experts}")
        if self.num_attention_heads % self.o_groups:
            raise ConfigError(
                f"o_groups: expected a divisor of num_attention_heads ({self.num_attention_heads}), "
                f"found {self.o_groups}"
            )
        narrowest = min(self.head_dim, self.index_head_dim)
        if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim > narrowest:
            raise ConfigError(
                f"qk_rope_head_dim: expected an even number up to {narrowest} (head_dim and index_head_dim), "
                f"found {self.qk_rope_head_dim}"
            )
        if self.tie_word_embeddings is not False:
            raise ConfigError(f"tie_word_embeddings: expected false, found {self.tie_word_embeddings!r}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, found {self.dtype!r}")

    def _check_tokens(self) -> None:
        named: list[tuple[str, int | None]] = [("bos_token_id", self.bos_token_id), ("pad_token_id", self.pad_token_id)]
        named += [("eos_token_id", token) for token in self.eos_token_ids]
        if self.engram is not None:
            named.append(("engram.pad_id", self.engram.pad_id))
            if self.engram.layer_ids[-1] >= self.num_hidden_layers:
                raise ConfigError(
                    f"engram.layer_ids: expected layers below {self.num_hidden_layers}, "
                    f"found {self.engram.layer_ids[-1]}"
                )
        for key, token in named:
            if token is not None and (type(token) is not int or not 0 <= token < self.vocab_size):
                raise ConfigError(f"{key}: expected a token id below vocab_size ({self.vocab_size}), found {token!r}")
