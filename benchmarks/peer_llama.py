"""llama.cpp as a peer: a GGUF file of the same values, run through `llama-cpp-python`'s binding of the C library."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer_engine import CHUNK, Engine, State
from v4c.errors import Error

_ABORT_LINES = 8


class LlamaEngine(Engine):
    """A model loaded from a GGUF file, memory-mapped, as llama.cpp does by default."""

    def __init__(self, path: Path, threads: int, storage: str) -> None:
        import llama_cpp

        self.library, self.threads = llama_cpp, threads
        self._log: list[str] = []

        def keep(level: int, text: bytes, data: Any) -> None:
            self._log.append(text.decode(errors="replace").strip())
            del self._log[:-_ABORT_LINES]

        self._keep = llama_cpp.llama_log_callback(keep)  # the library holds no reference to it
        llama_cpp.llama_log_set(self._keep, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise Error(f"{path}: llama.cpp cannot load it: {self.last_line()}")
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model)))
        self.version = f"llama-cpp-python {llama_cpp.__version__}"

    def last_line(self) -> str:
        """The last thing llama.cpp reported."""
        return next((line for line in reversed(self._log) if line), "no reason given")

    def begin(self, capacity: int) -> State:
        return _LlamaState(self, capacity)


class _LlamaState(State):
    """A context with its caches: llama.cpp's defaults, chunks of `CHUNK` tokens at once."""

    def __init__(self, engine: LlamaEngine, capacity: int) -> None:
        library = engine.library
        options = library.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = capacity, CHUNK, CHUNK
        options.n_threads = options.n_threads_batch = engine.threads
        self._engine, self._library = engine, library
        self._context = library.llama_init_from_model(engine.model, options)
        if not self._context:
            raise Error(f"llama.cpp cannot make a context of {capacity} tokens: {engine.last_line()}")
        self._marked: ctypes.Array[ctypes.c_uint8] | None = None

    def read(self, tokens: np.ndarray) -> np.ndarray:
        ids = np.ascontiguousarray(tokens, np.int32)
        batch = self._library.llama_batch_get_one(ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), len(ids))
        status = self._library.llama_decode(self._context, batch)
        if status:
            raise Error(f"llama_decode: expected 0, found {status}: {self._engine.last_line()}")
        logits = self._library.llama_get_logits_ith(self._context, -1)  # waits until they are there
        return np.ctypeslib.as_array(logits, (self._engine.vocab_size,))

    def restart(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def mark(self) -> bool:
        size = self._library.llama_state_seq_get_size(self._context, 0)
        self._marked = (ctypes.c_uint8 * size)()
        return bool(self._library.llama_state_seq_get_data(self._context, self._marked, size, 0) == size)

    def rewind(self) -> None:
        assert self._marked is not None
        self.restart()
        if not self._library.llama_state_seq_set_data(self._context, self._marked, len(self._marked), 0):
            raise Error(f"llama.cpp cannot restore a state it saved: {self._engine.last_line()}")

    def close(self) -> None:
        self._library.llama_free(self._context)
