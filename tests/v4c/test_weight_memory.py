"""Running a model in less memory than its weights take: the bound, measured in a process of its own, and the result."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import v4c
from tests.v4c.cli_harness import shell
from v4c.errors import InputError
from v4c.frontend.config import ModelConfig
from v4c.frontend.presets import preset, with_engram
from v4c.runtime.weight_memory import parse_bytes, resident_bytes

MIB = 1 << 20

CHILD = """
import json, sys, threading
import numpy as np
import v4c

path, bound = sys.argv[1], sys.argv[2]
model = v4c.load(path, weights_memory=None if bound == "none" else int(bound))
most, done = [0], threading.Event()

def watch():
    while not done.is_set():
        most[0] = max(most[0], model.resident_weight_bytes)
        done.wait(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
tokens = np.random.default_rng(0).integers(0, model.vocab_size, (1, 60))
with model.new_session(max_context=100) as session:
    logits = [session.prefill(tokens, chunk=1)[0]]  # a bound makes chunks smaller, which changes the order of sums
    for token in np.resize(tokens[0, :7], 30):
        logits.append(session.decode([token])[0])
        most[0] = max(most[0], model.resident_weight_bytes)
done.set()
watcher.join()
memory = model.weight_memory
traffic = None if memory is None else {**vars(memory.traffic), "hit_rate": memory.traffic.hit_rate}
digest = float(np.abs(np.stack(logits)).sum()), [float(x) for x in np.stack(logits).max(-1)]
print(json.dumps({"most": most[0], "logits": digest, "traffic": traffic}))
"""


def wide(config: ModelConfig) -> ModelConfig:
    """Experts of more than a megabyte, many of them, on a hash-routed and on other layers."""
    return replace(
        config,
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=3,
        attention_types=("sliding", "csa", "hca"),
        mlp_types=("hash", "topk", "topk"),
        n_routed_experts=48,
        num_experts_per_tok=2,
        moe_intermediate_size=384,
        max_position_embeddings=4096,
    )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = with_engram(wide(preset("v4-nano")), heads_per_ngram=4, table_rows=4096)
    path = v4c.compile(config, tmp_path_factory.mktemp("wide") / "wide.v4c")
    assert isinstance(path, Path)
    return path


def child(artifact: Path, bound: int | None) -> dict[str, Any]:
    command = [sys.executable, "-c", CHILD, str(artifact), "none" if bound is None else str(bound)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_the_bound_is_kept_and_changes_nothing(artifact: Path) -> None:
    weights = sum(file.stat().st_size for file in artifact.glob("weights*"))
    free = child(artifact, None)
    bound = 72 * MIB
    assert free["most"] > 1.5 * bound  # without one, the same tokens need much more
    assert weights > 2 * bound
    bounded = child(artifact, bound)
    assert 0 < bounded["most"] <= bound
    assert bounded["logits"] == free["logits"]
    traffic = bounded["traffic"]
    assert 0 < traffic["hit_rate"] < 1
    assert traffic["prefetched"] > 0
    assert traffic["rows_prefetched"] > 0
    assert traffic["bytes_read"] > 0


def test_hash_routed_experts_are_asked_for_before_the_step(artifact: Path) -> None:
    model = v4c.load(artifact, weights_memory=f"{100 * MIB}")
    memory = model.weight_memory
    assert memory is not None
    with model.new_session(max_context=8) as session:
        session.decode([5])
        table = memory._layers["model.layers.0"].by_token
        assert table is not None
        assert {("model.layers.0", int(e)) for e in table[5]} <= set(memory._held)
        assert memory.traffic.prefetched == len(set(table[5].tolist()))
        # All three layers used two experts; those of the first were there already.
        assert (memory.traffic.uses, memory.traffic.hits) == (6, 2)
        session.reset()
        session.decode([5])
        assert (memory.traffic.uses, memory.traffic.hits) == (12, 8)
        read = memory.traffic.bytes_read
        fork = session.fork()
        fork.decode([6])
        assert memory.traffic.uses == 18
        assert memory.traffic.bytes_read >= read


def test_a_bound_that_is_too_small_says_what_is_needed(artifact: Path) -> None:
    with pytest.raises(InputError, match=r"weights_memory: expected at least \d+ bytes, .* found 1048576"):
        v4c.load(artifact, weights_memory="1MiB")
    result = shell(["run", artifact, "--tokens", "1", "--weights-memory", "1MiB"])
    assert result.returncode == 2
    needed = int(result.stderr.split("at least ")[1].split()[0])
    model = v4c.load(artifact, weights_memory=needed)
    with model.new_session(max_context=70) as session:
        session.prefill(np.arange(60)[None])
    with pytest.raises(InputError, match="batch: expected at most 1 rows within weights_memory, found 2"):
        model.new_session(batch=2)


def test_the_commands_report_hits_and_bytes(artifact: Path) -> None:
    result = shell(["run", artifact, "--tokens", "1,2,3", "--max-new-tokens", "5", "--weights-memory", "72MiB"])
    assert result.returncode == 0, result.stderr
    assert "experts held" in result.stderr
    counts = ["--context", "16", "--prompt-tokens", "8", "--rounds", "4"]
    result = shell(["bench", artifact, *counts, "--weights-memory", "72MiB", "--json"])
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    for figures in (*document["decode"], *document["prefill"]):
        experts = figures["experts"]
        assert 0 <= experts["hit_rate"] <= 1
        assert experts["uses"] > 0
        assert 0 < experts["resident_bytes"] <= 72 * MIB


@pytest.mark.parametrize(
    ("text", "count"), [("4GiB", 4 << 30), ("1.5 MB", 1_500_000), ("700", 700), (12, 12), ("2kib", 2048)]
)
def test_sizes(text: str | int, count: int) -> None:
    assert parse_bytes(text, "x") == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "4 GiBs", "0", 0, -3, True, "1e9", "nan"])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(InputError, match=r"weights_memory: expected a size such as 4GiB, found "):
        parse_bytes(text, "weights_memory")


def test_what_is_not_mapped_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "none").write_bytes(b"x" * 5000)
    assert resident_bytes([tmp_path / "none"]) == 0
