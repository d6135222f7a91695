"""Speculative decoding against plain decoding of the same artifact: the same tokens, how many steps, how long.

`python -m benchmarks.speculative ARTIFACT --tokens 1,2,3 [--max-new-tokens N] [--rounds N]` generates greedily both
ways, interleaved, and prints one JSON document. The artifact must have a multi-token-prediction layer.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from v4c.cli.run import parse_tokens
from v4c.runtime import Model, load
from v4c.runtime.generation import Options


def compare(model: Model, prompt: np.ndarray, count: int, rounds: int = 3) -> dict[str, Any]:
    """Generate `count` tokens behind `prompt` [S] with and without guesses, `rounds` times in turn.

    Returns:
        ``equal`` (whether the tokens are), ``tokens``, ``plain`` and ``speculative`` (``steps`` after the prompt and
        the median ``ms`` per token), ``acceptance``, ``gain`` (of the two times).
    """
    times: dict[bool, list[float]] = {False: [], True: []}
    tokens, counts = {}, {}
    for _ in range(rounds):
        for speculative in (False, True):
            start = time.perf_counter()
            stream = model.stream([prompt], Options(count, eos=False, speculative=speculative))
            found = [token.id for token in stream]
            times[speculative].append((time.perf_counter() - start) / count * 1e3)
            tokens[speculative], counts[speculative] = found, stream.counts
    plain, guessed = (median(times[key]) for key in (False, True))
    return {
        "equal": tokens[False] == tokens[True],
        "tokens": count,
        "plain": {"steps": counts[False].calls, "ms": plain},
        "speculative": {"steps": counts[True].calls, "ms": guessed},
        "acceptance": counts[True].acceptance,
        "gain": plain / guessed,
    }


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--tokens", default="1,2,3,4", show_default=True, metavar="IDS", help="The prompt.")
@click.option("--max-new-tokens", type=click.IntRange(min=2), default=2000, show_default=True, metavar="N")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, metavar="N")
def main(artifact: Path, tokens: str, max_new_tokens: int, rounds: int) -> None:
    """Compare both ways on one artifact."""
    found = compare(load(artifact), np.array(parse_tokens(tokens)), max_new_tokens, rounds)
    click.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
