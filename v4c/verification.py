"""Checks a compiled model against the torch reference, along every path by which tokens can reach it.

The same random tokens are read in one chunk, in ragged chunks by two rows at different positions, and one by one; each
logit must agree with the reference, which reads the whole sequence at once on the weights as the artifact stores them.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from v4c.errors import CheckpointError, InputError
from v4c.progress import Progress
from v4c.targets.cpu.kernels.native_packing import BLOCK_BYTES
from v4c.targets.quantisation import QUANTISED, dequantised

if TYPE_CHECKING:
    from v4c.frontend.config import ModelConfig
    from v4c.frontend.estimate import CacheDtype
    from v4c.runtime.model import Model

__all__ = ["RELATIVE_TOLERANCE", "VerifyReport", "verify"]

RELATIVE_TOLERANCE = 1e-3
"""Largest difference allowed, in units of the reference logits' standard deviation or of 1, whichever is larger.

It holds for bfloat16 weights too: the reference rounds them likewise, and both sides compute in float32."""

HALF_TOLERANCES = {"float16": 2e-2, "bfloat16": 1e-1}
"""The same for half-precision arithmetic, that of the Ascend simulation, of a typical position: rounding to 11 bits, or
8, makes a router or an indexer choose otherwise now and then, and such a position is another computation."""

BFLOAT16_TOLERANCE = 8e-2
"""The same for bfloat16 arithmetic, that of a GPU's tensor cores, and for rows rounded to bfloat16 (which the reference
rounds likewise, but where the last bit of a float32 decides how, the two differ by a whole step)."""

QUANTISED_TOLERANCE = 1.0
"""The same for quantised weights, of a typical position; logits that have nothing to do with each other differ by six.

The reference has the quantised values and rounds the rows they are multiplied with, as the kernels do. But where the
last bit of a float32 decides how a row is rounded, the two differ by a whole step, layer after layer, and a router or
an indexer that was about to choose otherwise then does."""

NATIVE_TOLERANCE = 0.1
"""The same for FP8 and FP4 weights as the checkpoint has them, of a typical position: only the rows for FP4 experts are
rounded. And for all weights of 8 or 4 bits on a GPU, where no rows are rounded to 8 bits."""

NARROW_CACHE_TOLERANCES = {"f32": 0.0, "bf16": 5e-3, "fp8": 5e-2}
"""The same for narrow caches, of a typical position. The reference rounds rows as the caches do, but where the last bit
of a float32 decides how an element is rounded, the two differ by a whole step of it."""

_FIRST_CHUNKS = ((5, 3, 120, 1), (1, 126, 2, 4))
"""How the two rows of the ragged reading begin: across and exactly onto multiples of 4 and of 128."""
_LONGEST_CHUNK = 97


@dataclass(frozen=True)
class VerifyReport:
    """The outcome of `verify`.

    Attributes:
        max_abs_diff: largest difference of any logit from the reference; infinite where one is not finite.
        typical_diff: median over positions of each one's largest difference.
        argmax_agreement: share of positions whose largest logit is the reference's; near-ties may differ.
        tolerance: what `max_abs_diff` may reach, or `typical_diff` if `by_typical`.
        ok: whether it does not exceed it, and every logit is finite.
        positions: token positions compared, over all readings.
        by_typical: whether `typical_diff` decides: of quantised weights, narrow caches and half-precision arithmetic.
    """

    max_abs_diff: float
    typical_diff: float
    argmax_agreement: float
    tolerance: float
    ok: bool
    positions: int
    by_typical: bool


def verify(
    artifact: str | os.PathLike[str],
    source: Any,
    *,
    prompt_tokens: int = 250,
    decode_tokens: int = 12,
    seed: int = 0,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare an artifact with the model it was compiled from.

    Args:
        artifact: the folder `v4c.compile` wrote.
        source: the checkpoint folder it was compiled from, or an opened one.
        prompt_tokens: tokens read before decoding starts; by default decoding passes a multiple of 128.
        decode_tokens: tokens decoded one by one, after the prompt and again from the start.
        seed: of the random tokens.
        progress: called with (what is being done, readings done, readings in all).

    Raises:
        InputError: a count below 1, more tokens than the model can hold, or a source whose config is not the artifact's
            (the message names the key).
        ArtifactError, CheckpointError, ConfigError: either cannot be loaded, or the reference's logits are not finite.
    """
    from v4c.runtime.model import load

    for name, count in (("prompt_tokens", prompt_tokens), ("decode_tokens", decode_tokens)):
        if type(count) is not int or count < 1:
            raise InputError(f"{name}: expected a positive integer, found {count!r}")
    weights = open_source(source)
    model = load(artifact)
    check_configs(weights.config, model)
    if prompt_tokens + decode_tokens > model.max_context:
        raise InputError(
            f"prompt_tokens and decode_tokens: expected at most {model.max_context} together, "
            f"found {prompt_tokens + decode_tokens}"
        )
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, model.vocab_size, prompt_tokens + decode_tokens)

    report = progress or (lambda what, done, total: None)
    report("torch reference", 0, 5)
    expected = _reference(weights, model, tokens)
    relative, by_typical = _tolerance(model)
    tolerance = relative * max(1.0, float(expected.std()))
    readings = (
        ("one chunk", _one_chunk(model, tokens)),
        ("ragged chunks", _ragged_chunks(model, tokens, generator)),
        ("prompt, then single tokens", _decode(model, tokens, prompt_tokens)),
        ("single tokens from the start", _decode(model, tokens[:decode_tokens], 0)),
    )
    largest: list[float] = []
    same = 0
    for done, (what, reading) in enumerate(readings, start=1):
        report(what, done, 5)
        for start, logits in reading:
            wanted = expected[start : start + len(logits)]
            difference = np.abs(logits - wanted).max(axis=-1)
            largest += np.where(np.isfinite(difference), difference, math.inf).tolist()
            same += int((logits.argmax(axis=-1) == wanted.argmax(axis=-1)).sum())
    report("done", 5, 5)
    worst, typical = max(largest), statistics.median(largest)
    ok = math.isfinite(worst) and (typical if by_typical else worst) <= tolerance
    return VerifyReport(worst, typical, same / len(largest), tolerance, ok, len(largest), by_typical)


def _tolerance(model: Model) -> tuple[float, bool]:
    """What is allowed in units of the logits' deviation, and whether of a typical position rather than the worst."""
    weights, kv = model.manifest.dtypes.weights, _kv(model)
    if weights in QUANTISED and not _on_gpu(model):
        typical = QUANTISED_TOLERANCE
    elif weights in QUANTISED or weights == "native":
        typical = NATIVE_TOLERANCE
    elif model.manifest.target.name.startswith("ascend-sim"):  # whose activations are rounded as its weights are
        typical = HALF_TOLERANCES[weights]
    elif _rounds_rows(model) or (weights == "bfloat16" and _on_gpu(model)):
        typical = BFLOAT16_TOLERANCE
    else:
        typical = 0.0
    typical = max(typical, NARROW_CACHE_TOLERANCES[kv])
    return (typical, True) if typical else (RELATIVE_TOLERANCE, False)


def open_source(source: Any) -> Any:
    """The checkpoint behind a path, with its tensors checked; anything else is taken to be an opened one."""
    from v4c.frontend.checkpoint import Checkpoint

    if isinstance(source, str | os.PathLike):
        source = Checkpoint.open(os.fspath(source))
        source.check()
    return source


def check_configs(config: ModelConfig, model: Model) -> None:
    """Refuse a source that describes another model than the artifact's; the dtype it is stored in may differ.

    Raises:
        InputError: naming the first key that differs.
    """
    from v4c.frontend.config import ModelConfig

    ours = config.to_dict()
    theirs = ModelConfig.from_dict(dict(model.config), "artifact").to_dict()
    for key in sorted(ours.keys() | theirs.keys()):
        if key != "dtype" and ours.get(key) != theirs.get(key):
            raise InputError(
                f"{key}: expected the artifact's {_short(theirs.get(key))} in the checkpoint's config, "
                f"found {_short(ours.get(key))}"
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _AsStored:
    """A weight source whose tensors are rounded as the artifact stores them, so that only arithmetic is compared."""

    def __init__(self, source: Any, model: Model) -> None:
        from v4c.passes.relax.layouts import part_names

        self.config: ModelConfig = source.config
        self._source = source
        self._stored = {part: w.dtype for w in model.manifest.weights for part in part_names(w.name)}
        self._bits = QUANTISED.get(model.manifest.dtypes.weights)
        self._pairs = _rounds_rows(model)
        shapes = {part: w.shape for w in model.manifest.weights for part in part_names(w.name)}
        self._on_gpu = _on_gpu(model)
        native = model.manifest.dtypes.weights == "native" and not self._on_gpu
        self._fp4 = {name for name, shape in shapes.items() if native and shape[-1] == BLOCK_BYTES["fp4"]}

    def load(self, name: str, dtype: str | None = None) -> np.ndarray:
        stored = self._stored.get(name)
        if stored == "bfloat16" or self._paired(name):
            return self._source.load(name, "bf16").astype(np.float32)
        if stored == "float16":
            return self._source.load(name, "f32").astype(np.float16).astype(np.float32)
        if self.quantised(name):
            assert self._bits is not None
            return dequantised(self._source.load(name, "f32"), self._bits)
        return self._source.load(name, dtype or "f32")

    def rounds_rows(self, name: str) -> bool:
        """Whether the rows that a tensor is multiplied with are rounded."""
        return name in self._fp4 or (self.quantised(name) and not self._on_gpu) or self._paired(name)

    def _paired(self, name: str) -> bool:
        """Whether a tensor is bfloat16 in pairs, whose rows are rounded to bfloat16."""
        return self._pairs and self._stored.get(name) == "uint8"

    def quantised(self, name: str) -> bool:
        """Whether a tensor was quantised to 8 or 4 bits."""
        return self._bits is not None and self._stored.get(name) == "uint8"


def _on_gpu(model: Model) -> bool:
    """Whether it is code for a GPU, whose tensor cores round rows and weights to bfloat16; elsewhere nothing is."""
    return model.target.name.startswith("cuda")


def _rounds_rows(model: Model) -> bool:
    """Whether the rows of bfloat16 products are rounded to bfloat16."""
    return model.manifest.dtypes.activations == "bfloat16"


def _kv(model: Model) -> CacheDtype:
    """Format of the model's caches, where it is a narrow one; the simulation's float16 is no format of ours."""
    names: dict[str, CacheDtype] = {"bfloat16": "bf16", "fp8": "fp8"}
    return names.get(model.manifest.dtypes.kv, "f32")


def _reference(source: Any, model: Model, tokens: np.ndarray) -> np.ndarray:
    """Reference logits ``[tokens, vocab]``."""
    import torch

    from v4c.frontend.model.model import V4Model, checkpoint_name

    from .verification_quantised import QuantisedProducts, bfloat16_rows, rounded_rows

    stored = _AsStored(source, model)
    reference = V4Model.from_source(stored, _kv(model))
    with QuantisedProducts(
        [w for name, w in reference.named_parameters() if stored.rounds_rows(checkpoint_name(name))],
        bfloat16_rows if _rounds_rows(model) else rounded_rows,
    ):
        logits = reference.logits(torch.from_numpy(tokens)[None])[0].numpy()
    if not np.isfinite(logits).all():
        position = int(np.flatnonzero(~np.isfinite(logits).all(axis=-1))[0])
        raise CheckpointError(f"reference: expected finite logits, found others from token {position} on")
    return logits


Reading = Iterator[tuple[int, np.ndarray]]
"""Pairs of a position and the logits ``[n, vocab]`` from there on."""


def _one_chunk(model: Model, tokens: np.ndarray) -> Reading:
    with model.new_session(max_context=len(tokens)) as session:
        yield 0, session.prefill(tokens[None], all_logits=True, chunk=len(tokens))[0]


def _ragged_chunks(model: Model, tokens: np.ndarray, generator: np.random.Generator) -> Reading:
    """Two rows read the same tokens in chunks of their own, of which only the last logits are seen."""
    cuts = [_chunks(len(tokens), first, generator) for first in _FIRST_CHUNKS]
    with model.new_session(batch=2, max_context=len(tokens)) as session:
        for step in range(max(map(len, cuts))):
            lengths = np.array([row[step] if step < len(row) else 0 for row in cuts])
            starts = session.position
            chunk = np.zeros((2, lengths.max()), dtype=np.int64)
            for row in range(2):
                chunk[row, : lengths[row]] = tokens[starts[row] : starts[row] + lengths[row]]
            logits = session.prefill(chunk, lengths=lengths)
            for live in np.flatnonzero(lengths):
                yield int(starts[live] + lengths[live]) - 1, logits[live][None]


def _chunks(total: int, first: tuple[int, ...], generator: np.random.Generator) -> list[int]:
    """Chunk lengths that add up to `total`: `first`, then random ones."""
    lengths: list[int] = []
    left = total
    while left:
        wanted = first[len(lengths)] if len(lengths) < len(first) else int(generator.integers(1, _LONGEST_CHUNK + 1))
        lengths.append(min(wanted, left))
        left -= lengths[-1]
    return lengths


def _decode(model: Model, tokens: np.ndarray, prompt: int) -> Reading:
    """`prompt` tokens at once, then the others one by one."""
    with model.new_session(max_context=len(tokens)) as session:
        if prompt:
            yield prompt - 1, session.prefill(tokens[None, :prompt])
        for position in range(prompt, len(tokens)):
            yield position, session.decode(tokens[position : position + 1])
