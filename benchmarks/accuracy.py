"""Largest logit differences of compiled and exported models against `transformers`, over random configurations.

Run ``python -m benchmarks.accuracy``; the tests in ``tests/parity`` hold the bounds, this prints what is reached.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import numpy as np
import torch

import v4c
from tests.parity.margins import clear_model
from tests.parity.onnx_session import decode_differences
from tests.parity.reference import random_chunks, random_hf_config

LENGTH = 263


@click.command(help=__doc__)
@click.option("--models", default=4, show_default=True, help="random configurations to measure")
@click.option("--seed", default=0, show_default=True)
def main(models: int, seed: int) -> None:
    for number in range(models):
        figures = measure(seed + 100 * number, published_ratios=number % 2 == 0)
        click.echo(f"model {number}: " + ", ".join(f"{k} {v:.1e}" for k, v in figures.items()))


def measure(seed: int, published_ratios: bool) -> dict[str, float]:
    """Largest absolute differences of one random model."""
    config = random_hf_config(seed, published_ratios)
    reference, source, ids, rng = clear_model(config, seed, batch=2, length=LENGTH)
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids), use_cache=False).logits.numpy()
    with tempfile.TemporaryDirectory() as folder:
        v4c.compile(source, Path(folder) / "m")
        v4c.export(source, Path(folder) / "m.onnx")
        session = v4c.load(Path(folder) / "m").new_session(batch=2, max_context=LENGTH)
        prefill = session.prefill(ids, all_logits=True)
        session.reset()
        chunks, start = [], 0
        for length in random_chunks(rng, LENGTH):
            chunks.append(session.prefill(ids[:, start : start + length], all_logits=True))
            start += length
        session.reset()
        decode = np.stack([session.decode(ids[:, t]) for t in range(LENGTH)], axis=1)
        onnxruntime = decode_differences(Path(folder) / "m.onnx", ids[:, :127], expected[:, :127], prompt=77)

    def largest(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(a - b).max())

    return {
        "logits std": float(expected.std()),
        "other argmax": float((decode.argmax(-1) != expected.argmax(-1)).mean()),
        "one shot": largest(prefill, expected),
        "chunks": largest(np.concatenate(chunks, axis=1), expected),
        "token by token": largest(decode, expected),
        "decode against prefill": largest(decode, prefill),
        "ONNX Runtime": onnxruntime,
    }


if __name__ == "__main__":
    main()
