"""transformers' reference model as a peer, run eagerly, from the same safetensors files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peer_engine import Engine, State

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class TransformersEngine(Engine):
    """``DeepseekV4ForCausalLM`` in eager mode."""

    def __init__(self, path: Path, threads: int, storage: str) -> None:
        import transformers

        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.model = transformers.DeepseekV4ForCausalLM.from_pretrained(
            path, dtype=_DTYPES[storage], attn_implementation="eager", local_files_only=True
        ).eval()
        self.vocab_size = int(self.model.config.vocab_size)
        self.version = f"transformers {transformers.__version__}"

    def begin(self, capacity: int) -> State:
        return _TransformersState(self.model)


class _TransformersState(State):
    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None
        self._marked: Any = None

    @torch.inference_mode()
    def read(self, tokens: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(np.ascontiguousarray(tokens, np.int64))[None]
        output = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        return output.logits[0, -1].float().numpy()

    def restart(self) -> None:
        self._cache = None

    def mark(self) -> bool:
        self._marked = copy.deepcopy(self._cache)
        return True

    def rewind(self) -> None:
        self._cache = copy.deepcopy(self._marked)
