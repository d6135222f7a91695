"""``v4c run``: continue a prompt, printing tokens as they come; it loads the runtime only."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from v4c.errors import InputError

from .console import bytes_text, message
from .options import debug_option, threads_option, weights_memory_option

_LARGEST_TOKEN = 2**63 - 1


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="Text to continue; the artifact must hold a tokenizer.")
@click.option("--tokens", metavar="IDS", help="Token ids to continue, such as 1,2,3.")
@click.option("--max-new-tokens", type=int, default=64, show_default=True, metavar="N", help="Most tokens to make.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: always the likeliest token.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Draw from this much of the probability.")
@click.option("--seed", type=int, metavar="N", help="Of the random choices (default: another each time).")
@click.option("--max-context", type=int, metavar="N", help="Tokens the caches can hold (default: what is needed).")
@weights_memory_option
@threads_option
@debug_option
def run(
    artifact: Path,
    prompt: str | None,
    tokens: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    max_context: int | None,
    weights_memory: str | None,
    threads: int | None,
) -> None:
    """Continue a prompt with a compiled model.

    Text is printed where the artifact holds a tokenizer, else token ids; the speed follows on stderr.
    """
    if (prompt is None) == (tokens is None):
        raise click.UsageError("Expected one of --prompt and --tokens.", click.get_current_context())
    given = None if tokens is None else parse_tokens(tokens)
    from v4c.runtime.model import load
    from v4c.runtime.text import Detokenizer

    model = load(artifact, threads=threads, weights_memory=weights_memory)
    ids = model.tokenizer.encode(prompt) if prompt is not None else given
    detokenizer = Detokenizer(model.tokenizer) if model.manifest.tokenizer is not None else None

    start = time.perf_counter()
    stream = model.generate(
        ids, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, max_context=max_context
    )
    times: list[float] = []
    try:
        for token in stream:
            times.append(time.perf_counter())
            if detokenizer is not None:
                _write(detokenizer.push(token))
            else:
                _write(f"{token}" if len(times) == 1 else f",{token}")
        if detokenizer is not None:
            _write(detokenizer.flush())
    finally:
        if times:
            _write("\n")
    message(speed(len(ids) if ids is not None else 0, start, times))
    if model.weight_memory is not None:
        traffic = model.weight_memory.traffic
        message(
            f"experts held {traffic.hit_rate:.1%} of {traffic.uses} uses, read {bytes_text(traffic.bytes_read)}; "
            f"weights in memory {bytes_text(model.resident_weight_bytes)}"
        )


def parse_tokens(text: str) -> list[int]:
    """Token ids from ``1,2,3``.

    Raises:
        InputError: an entry is no non-negative integer.
    """
    ids = []
    for entry in text.split(","):
        digits = entry.strip()
        if not (digits.isascii() and digits.isdigit()) or len(digits) > 19 or int(digits) > _LARGEST_TOKEN:
            raise InputError(f"--tokens: expected token ids separated by commas, found {entry[:40]!r}")
        ids.append(int(digits))
    return ids


def speed(prompt: int, start: float, times: list[float]) -> str:
    """One line on tokens per second: the prompt until the first token, then the tokens after it.

    Args:
        prompt: number of prompt tokens.
        start: when the work began, in seconds.
        times: when each token came.
    """
    if not times:
        return "no tokens"
    text = f"prefill {prompt} tokens, {prompt / max(times[0] - start, 1e-9):.1f} tokens/s"
    steps = len(times) - 1
    if steps:
        text += f"; decode {steps} tokens, {steps / max(times[-1] - times[0], 1e-9):.1f} tokens/s"
    return text


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
