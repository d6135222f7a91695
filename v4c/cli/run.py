"""``v4c run``: continue a prompt, printing tokens as they come; it loads the runtime only."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from v4c.errors import InputError, OutputError

from .console import bytes_text, message, print_json
from .continuation import Continuation
from .options import debug_option, huge_pages_option, json_option, threads_option, weights_memory_option

if TYPE_CHECKING:
    from v4c.runtime.generation import Token
    from v4c.runtime.model import Model

_LARGEST_TOKEN = 2**63 - 1


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="Text to continue; the artifact must hold a tokenizer.")
@click.option("--prompt-file", metavar="FILE", type=click.Path(path_type=Path), help="The same, read from a file.")
@click.option("--tokens", metavar="IDS", help="Token ids to continue, such as 1,2,3.")
@click.option("--max-new-tokens", type=int, default=64, show_default=True, metavar="N", help="Most tokens to make.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: always the likeliest token.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Draw from this much of the probability.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Draw from so many tokens; 0: from all.")
@click.option("--min-p", type=float, default=0.0, show_default=True, help="Least share of the likeliest's probability.")
@click.option("--seed", type=int, metavar="N", help="Of the random choices (default: another each time).")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times.")
@click.option("--ignore-eos", is_flag=True, help="Go on after a token that ends a text.")
@click.option("--logprobs", type=int, metavar="N", help="Log probability of each token and of the N likeliest.")
@click.option("--speculative", is_flag=True, help="Guess a token ahead with the MTP layer: same tokens, fewer steps.")
@click.option("--session", metavar="FILE", type=click.Path(path_type=Path), help="Continue a saved session.")
@click.option("--save-session", metavar="FILE", type=click.Path(path_type=Path), help="Save the session at the end.")
@click.option("--max-context", type=int, metavar="N", help="Tokens the caches can hold (default: what is needed).")
@weights_memory_option
@huge_pages_option
@json_option
@threads_option
@debug_option
def run(
    artifact: Path,
    prompt: str | None,
    prompt_file: Path | None,
    tokens: str | None,
    max_new_tokens: int,
    stop: tuple[str, ...],
    ignore_eos: bool,
    session: Path | None,
    save_session: Path | None,
    max_context: int | None,
    weights_memory: str | None,
    huge_pages: bool,
    as_json: bool,
    threads: int | None,
    **sampling: Any,
) -> None:
    """Continue a prompt with a compiled model.

    Text is printed where the artifact holds a tokenizer, else token ids; the speed follows on stderr.
    """
    prompts = [given for given in (prompt, prompt_file, tokens) if given is not None]
    if len(prompts) > 1 or (not prompts and session is None):
        more = "" if prompts else ", or --session"
        raise click.UsageError(
            f"Expected one of --prompt, --prompt-file and --tokens{more}.", click.get_current_context()
        )
    if tokens is not None:
        ids: Any = parse_tokens(tokens)
    else:
        ids = prompt if prompt_file is None else read_text(prompt_file)
    if save_session is not None and not save_session.absolute().parent.is_dir():
        raise OutputError(f"{save_session}: expected an existing folder {save_session.parent}, found none")
    from v4c.runtime.generation import Options
    from v4c.runtime.model import load

    options = Options(max_new_tokens, eos=not ignore_eos, stop=stop, **sampling)
    model = load(artifact, threads=threads, weights_memory=weights_memory, huge_pages=huge_pages)
    start = time.perf_counter()
    work = Continuation(model, ids, options, max_context, session, save_session is not None)
    shown = Shown(work, as_json, options.logprobs is not None)
    try:
        for token in work.tokens():
            shown.token(token, time.perf_counter())
    finally:
        shown.end()
    if save_session is not None:
        work.save(save_session)
    shown.summary(start)
    _tell_memory(model)


def _tell_memory(model: Model) -> None:
    """What was read for a bounded memory, if it is."""
    if model.weight_memory is None:
        return
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


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = error.strerror if isinstance(error, OSError) else "other bytes"
        raise InputError(f"{path}: expected text in UTF-8, found {found}") from None


class Shown:
    """What is printed of a continuation: text or ids as they come, a line per token, or one JSON document."""

    def __init__(self, work: Continuation, as_json: bool, logprobs: bool) -> None:
        self._work, self._as_json, self._logprobs = work, as_json, logprobs
        self._tokens: list[Token] = []
        self._times: list[float] = []

    def token(self, token: Token, now: float) -> None:
        """The next token, and when it came."""
        self._tokens.append(token)
        self._times.append(now)
        if self._as_json:
            return
        if self._logprobs:
            likely = " ".join(f"{other}:{value:.4f}" for other, value in token.top_logprobs)
            _write(f"{token.id}\t{token.logprob:.4f}\t{likely}\t{token.text!r}\n")
        elif self._work.has_text:
            _write(token.text)
        else:
            _write(f"{token.id}" if len(self._times) == 1 else f",{token.id}")

    def end(self) -> None:
        """No token comes any more."""
        if self._times and not self._as_json and not self._logprobs:
            _write("\n")

    def summary(self, start: float) -> None:
        """The speed on stderr, or the document on stdout."""
        counts = self._work.counts
        if not self._as_json:
            message(speed(self._work.prompt_tokens, start, self._times))
            if counts.drafted:
                message(
                    f"speculative: {counts.accepted} of {counts.drafted} guesses right ({counts.acceptance:.1%}), "
                    f"{counts.calls} steps"
                )
            return
        document: dict[str, Any] = {
            "prompt_tokens": self._work.prompt_tokens,
            "token_ids": [token.id for token in self._tokens],
            "text": "".join(token.text for token in self._tokens) if self._work.has_text else None,
            "finish": self._tokens[-1].finish if self._tokens else "length",
            "seconds": {
                "prefill": self._times[0] - start if self._times else time.perf_counter() - start,
                "decode": self._times[-1] - self._times[0] if self._times else 0.0,
            },
            "steps": counts.calls,
        }
        if self._logprobs:
            document["logprobs"] = [token.logprob for token in self._tokens]
            document["top_logprobs"] = [
                [{"id": other, "logprob": value} for other, value in token.top_logprobs] for token in self._tokens
            ]
        if self._work.speculative:
            document["speculative"] = {
                "drafted": counts.drafted, "accepted": counts.accepted, "acceptance": counts.acceptance
            }  # fmt: skip
        print_json(document)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
