"""Which peers there are, what each is made from, and the files they load, which are kept from one run to the next."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.peer_costs import resident_bytes
from benchmarks.peer_engine import Engine
from v4c.errors import Error, InputError
from v4c.frontend.config import ModelConfig

ROOT = Path(__file__).parents[1]

BF16, Q8_0, Q4_0 = 2.0, 34 / 32, 18 / 32
"""Bytes of a weight; llama.cpp's blocks are 32 numbers and a float16 scale, and v4c's int8 and int4 are the same size
(`targets/cpu`: 32 inputs share a float16 scale)."""


@dataclass(frozen=True)
class Peer:
    """One way to run the model.

    Attributes:
        name: as it is listed.
        engine: ``v4c``, ``llama``, ``transformers`` or ``onnxruntime``.
        storage: what matrices are stored as, by the engine's own name.
        matrix_bytes: bytes of one of their weights.
        cache_bytes: bytes of one cached number.
        file: what it loads, a name within the folder of the model.
        longest: the longest context that is measured; None where any is.
        copies: how often the weights stand in memory.
        scratch: GiB beside them, for caches and what a prompt needs; seen with v4-mini.
        agreement: largest relative difference of its logits from v4c's that its storage explains.
        activations: what v4c rounds the rows to that matrices are multiplied with: ``f32`` (not at all) or ``bf16``.
    """

    name: str
    engine: str
    storage: str
    matrix_bytes: float
    cache_bytes: int
    file: str
    longest: int | None
    copies: float
    scratch: float
    agreement: float
    activations: str = "f32"

    def needs(self, config: ModelConfig) -> float:
        """Bytes of memory to count on."""
        return self.copies * resident_bytes(config, self.matrix_bytes) + self.scratch * (1 << 30)


_SHORT, _LONG = 1024, 16384
"""Contexts beyond which eager and llama.cpp prompts take too many minutes to read."""
_EXACT, _BF16, _8_BITS, _4_BITS = 0.02, 0.2, 0.5, 1.0
"""Relative difference of logits to expect at most, of random models, which amplify rounding; of unrelated logits it is
1.41. That the graph is the same one shows where least is rounded: float32 peers, and llama-f32."""

PEERS = {
    peer.name: peer
    for peer in (
        Peer("v4c-f32", "v4c", "f32", 4.0, 4, "f32.v4c", None, 1.0, 1.0, _EXACT),
        Peer("v4c-bf16", "v4c", "bf16", BF16, 4, "bf16.v4c", None, 1.0, 1.0, _EXACT),
        Peer("v4c-bf16-act", "v4c", "bf16", BF16, 4, "bf16-act.v4c", None, 1.0, 1.0, _BF16, "bf16"),
        Peer("v4c-int8", "v4c", "int8", Q8_0, 4, "int8.v4c", None, 1.0, 1.0, _8_BITS),
        Peer("v4c-int4", "v4c", "int4", Q4_0, 4, "int4.v4c", None, 1.0, 1.0, _4_BITS),
        Peer("llama-f32", "llama", "f32", 4.0, 2, "f32.gguf", _LONG, 1.0, 0.5, _EXACT),
        Peer("llama-bf16", "llama", "bf16", BF16, 2, "bf16.gguf", _LONG, 1.0, 0.5, _BF16),
        Peer("llama-q8_0", "llama", "q8_0", Q8_0, 2, "q8_0.gguf", _LONG, 1.0, 0.5, _8_BITS),
        Peer("llama-q4_0", "llama", "q4_0", Q4_0, 2, "q4_0.gguf", _LONG, 1.0, 0.5, _4_BITS),
        Peer("transformers-f32", "transformers", "f32", 4.0, 4, "checkpoint", _SHORT, 1.0, 1.0, _EXACT),
        Peer("transformers-bf16", "transformers", "bf16", BF16, 2, "checkpoint", _SHORT, 1.0, 1.0, _BF16),
        Peer("onnxruntime-f32", "onnxruntime", "f32", 4.0, 4, "f32.onnx", _SHORT, 2.0, 5.0, _EXACT),
    )
}

REFERENCE = PEERS["v4c-bf16"]
"""Always measured: it reads the checkpoint's own values with float32 arithmetic, so the others' logits are compared
with its; and its library measures the machine."""

SAME_BITS = (
    ("v4c-bf16", "llama-bf16"), ("v4c-int8", "llama-q8_0"), ("v4c-int4", "llama-q4_0"),
    ("v4c-bf16", "transformers-bf16"), ("v4c-bf16-act", "llama-bf16"), ("v4c-bf16-act", "transformers-bf16"),
    ("v4c-f32", "transformers-f32"), ("v4c-f32", "onnxruntime-f32"),
)  # fmt: skip
"""Pairs that are compared: v4c, and a peer that reads as many bits."""

DEFAULT = tuple(name for name in PEERS if name not in ("v4c-f32", "llama-f32"))


def chosen(names: Iterable[str]) -> list[Peer]:
    """The peers called `names`, in the order of `PEERS`, with the reference.

    Raises:
        InputError: no such peer; the message lists them.
    """
    wanted = {REFERENCE.name, *names}
    unknown = sorted(wanted - PEERS.keys())
    if unknown:
        raise InputError(f"--peers: expected some of {', '.join(PEERS)}, found {unknown[0]}")
    return [peer for name, peer in PEERS.items() if name in wanted]


def open_engine(peer: Peer, folder: Path, threads: int, huge_pages: bool = False) -> Engine:
    """Load `peer` from the folder of the model; v4c's weights into huge pages on request."""
    path = folder / peer.file
    if peer.engine == "v4c":
        from benchmarks.peer_v4c import V4cEngine

        return V4cEngine(path, threads, peer.storage, huge_pages)
    if peer.engine == "llama":
        from benchmarks.peer_llama import LlamaEngine as Kind
    elif peer.engine == "transformers":
        from benchmarks.peer_transformers import TransformersEngine as Kind  # type: ignore[assignment]
    else:
        from benchmarks.peer_onnxruntime import OnnxRuntimeEngine as Kind  # type: ignore[assignment]
    return Kind(path, threads, peer.storage)


def prepare_checkpoint(config: ModelConfig, folder: Path) -> None:
    """Write the random checkpoint that every peer is made from, unless it is there: bfloat16, seed 0.

    In bfloat16, float32 peers get exactly the values that bfloat16 ones get.

    Raises:
        InputError: the folder holds a checkpoint of other sizes.
    """
    from v4c.frontend.initialise import initialise

    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        initialise(config, checkpoint, dtype="bf16")
    if ModelConfig.from_file(checkpoint) != replace(config, dtype="bfloat16"):
        raise InputError(f"{checkpoint}: expected the preset in bfloat16, found another config: remove the folder")


def prepare(peer: Peer, folder: Path) -> None:
    """Make what `peer` loads from the checkpoint, unless it is there and was made by the same sources.

    Raises:
        v4c.Error: it cannot be made.
    """
    import v4c
    from v4c.frontend.checkpoint import Checkpoint

    if peer.engine == "transformers":
        return
    path, checkpoint = folder / peer.file, folder / "checkpoint"
    note, digest = folder / f".{peer.file}.made-by", _digest(peer, checkpoint)
    if path.exists() and note.exists() and note.read_text() == digest:
        return
    note.unlink(missing_ok=True)
    _remove(path)
    if peer.engine == "v4c":
        quantised = peer.storage in ("int8", "int4")
        dtype, quant = ("bf16", peer.storage) if quantised else (peer.storage, "none")
        rounded = {} if peer.activations == "f32" else {"activations": peer.activations}
        v4c.compile(checkpoint, path, dtype=dtype, quant=quant, **rounded)
    elif peer.engine == "llama":
        from benchmarks.peer_gguf import write_gguf

        write_gguf(Checkpoint.open(checkpoint), path, peer.storage)
    else:
        v4c.export(checkpoint, path)
    note.write_text(digest)


def _remove(path: Path) -> None:
    """Remove an artifact, or a file with the data beside it, that an older version of the sources made."""
    if path.is_dir():
        import shutil

        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
        path.with_name(path.name + ".data").unlink(missing_ok=True)


def _digest(peer: Peer, checkpoint: Path) -> str:
    """Of everything that decides what `prepare` writes: the checkpoint's sizes and headers, and the sources."""
    if peer.engine == "llama":
        sources = [Path(__file__).with_name("peer_gguf.py")]
    else:
        rooms = ("frontend", "custom_ops", "passes", "targets")
        sources = sorted(file for room in rooms for file in (ROOT / room).rglob("*.py"))
        sources += [ROOT / "v4c" / "compiler.py", ROOT / "runtime" / "writer.py", ROOT / "runtime" / "manifest.py"]
    found = hashlib.sha256()
    for file in [checkpoint / "config.json", *sources]:
        found.update(file.read_bytes())
    for file in sorted(checkpoint.glob("*.safetensors")):
        found.update(json.dumps([file.name, file.stat().st_size, file.stat().st_mtime_ns]).encode())
    return found.hexdigest()


def free_memory() -> float:
    """Bytes that can be had without swapping."""
    import psutil

    return float(psutil.virtual_memory().available)


def environment(threads: int) -> dict[str, str]:
    """Variables for a peer's process; libraries read them when they are first loaded."""
    count = str(threads)
    names = ("OMP_NUM_THREADS", "TVM_NUM_THREADS", "V4C_NUM_THREADS", "MKL_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, count), "HF_HUB_OFFLINE": "1", "GGML_NO_BACKTRACE": "1"}


def one_line(error: BaseException) -> str:
    """An error as one line; those that are not v4c's with their kind."""
    text = " ".join(str(error).split())
    return text if isinstance(error, Error) else f"{type(error).__name__}: {text}"
