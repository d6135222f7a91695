"""What storing weights in fewer bits does to the logits of a random model, against the same model in float32.

Run ``python -m benchmarks.quantisation``. Every storage reads the same random tokens. A random model has routers and
indexers that choose among nearly equal scores: the slightest change of a weight makes some of them choose otherwise,
and what follows is another computation. Two yardsticks show how much of a difference that is: bfloat16 weights, and a
second model of the same sizes without such choices (all layers hash-routed, every compressed row chosen).
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

import v4c
from benchmarks.timing import machine
from v4c.frontend.config import ModelConfig
from v4c.frontend.presets import preset

STORAGES = {
    "bf16": {"dtype": "bf16"},
    "bf16, rows too": {"dtype": "bf16", "activations": "bf16"},
    "int8": {"dtype": "bf16", "quant": "int8"},
    "int4": {"dtype": "bf16", "quant": "int4"},
}
TOP = 5


@click.command(help=__doc__)
@click.option("--preset", "name", default="v4-mini", show_default=True)
@click.option("--tokens", default=2048, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(name: str, tokens: int, as_json: bool) -> None:
    config = preset(name)
    choiceless = replace(
        config, mlp_types=("hash",) * config.num_hidden_layers, index_topk=config.max_position_embeddings
    )
    rows = [
        row for label, c in ((name, config), (f"{name} without choices", choiceless)) for row in _rows(label, c, tokens)
    ]
    if as_json:
        click.echo(json.dumps({"machine": machine(), "tokens": tokens, "rows": rows}))
        return
    click.echo(f"{tokens} random tokens against float32; {machine()}")
    click.echo("| model | weights | same argmax | argmax among the five largest | error / deviation of logits |")
    click.echo("|---|---|---|---|---|")
    for row in rows:
        click.echo(
            f"| {row['model']} | {row['weights']} | {row['argmax']:.1%} | {row['top5']:.1%} | {row['error']:.4f} |"
        )


def _rows(label: str, config: ModelConfig, tokens: int) -> list[dict[str, object]]:
    """A row per storage: shares of positions, and the root mean square error of a typical position's logits."""
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, tokens))
    with tempfile.TemporaryDirectory() as folder:

        def logits(storage: str, **options: str) -> np.ndarray:
            artifact = v4c.compile(config, Path(folder) / storage, **options)
            assert isinstance(artifact, Path)
            with v4c.load(artifact).new_session(max_context=tokens) as session:
                return session.prefill(ids, all_logits=True)[0]

        expected = logits("f32")
        best, deviation = expected.argmax(-1), float(expected.std())
        rows = []
        for storage, options in STORAGES.items():
            found = logits(storage, **options)
            top = np.argpartition(found, -TOP, axis=-1)[:, -TOP:]
            rows.append({
                "model": label, "weights": storage,
                "argmax": float((found.argmax(-1) == best).mean()),
                "top5": float((top == best[:, None]).any(-1).mean()),
                "error": float(np.median(np.sqrt(((found - expected) ** 2).mean(-1)))) / deviation,
            })  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
