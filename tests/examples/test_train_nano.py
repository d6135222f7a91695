"""The training example: its forward pass is the model's, batches say what they claim, and a run continues exactly."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.train_nano import corpus, vocabulary
from examples.train_nano.__main__ import main
from examples.train_nano.batches import QUESTION_WEIGHT, Batches
from examples.train_nano.config import BOS, NANO, VARIANTS, VOCABULARY
from examples.train_nano.forward import Forward
from examples.train_nano.run import Plan, Run
from examples.train_nano.state import load_state
from examples.train_nano.streams import Mixer
from examples.train_nano.weights import initial, join_experts, split_experts
from v4c.custom_ops.mhc_post import mhc_post
from v4c.custom_ops.mhc_pre import mhc_pre
from v4c.errors import CheckpointError
from v4c.frontend.checkpoint import Checkpoint
from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise import RandomCheckpoint
from v4c.frontend.model.caches import allocate
from v4c.frontend.model.model import V4Model
from v4c.frontend.model.mtp import MTPModel, allocate_mtp
from v4c.recall import Facts

torch.set_num_threads(1)

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_nano"

assert NANO.engram is not None
SMALL = replace(
    NANO, vocab_size=97, hidden_size=64, engram=replace(NANO.engram, table_rows=50), index_topk=8, hc_mult=2
)


def weights_of(source: Any) -> dict[str, torch.Tensor]:
    names = [*source.specs, *source.mtp_specs]
    return split_experts({name: torch.from_numpy(np.array(source.load(name))) for name in names})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts, _ = corpus.split(corpus.documents())
    return vocabulary.train_tokenizer(texts[:200])


def facts_of(tokenizer: Any) -> Facts:
    return Facts.of(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)


@torch.no_grad()
@pytest.mark.parametrize("config", [NANO, SMALL], ids=["nano", "small"])
@pytest.mark.parametrize("length", [3, 261])
def test_forward_is_the_models(config: ModelConfig, length: int) -> None:
    """Logits of the model and of the MTP layer, on random weights, to 1e-5 of their spread (which is near 1)."""
    source = RandomCheckpoint(config, seed=2)
    rng = np.random.default_rng(length)
    ids = torch.from_numpy(rng.integers(0, config.vocab_size, (2, length + 1)))
    out = Forward(config, weights_of(source))(ids[:, :-1], ids[:, 1:])
    model, mtp = V4Model.from_source(source), MTPModel.from_source(source)
    where = torch.zeros(2, dtype=torch.int64), torch.full((2,), length)
    streams, _ = model.hidden(ids[:, :-1], *where, allocate(config, 2, length))
    ahead, _, _ = mtp(streams, ids[:, 1:], *where, allocate_mtp(config, 2, length), all_logits=True)
    assert out.mtp_logits is not None
    for got, wanted in ((out.logits, model.logits(ids[:, :-1])), (out.mtp_logits, ahead)):
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
        assert (got - wanted).abs().mean() < 1e-5 * wanted.std()


@torch.no_grad()
def test_masked_forward_is_the_model_with_hidden_rows() -> None:
    source = RandomCheckpoint(SMALL, seed=3)
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, SMALL.vocab_size, (1, 200)))
    model = V4Model.from_source(source)
    whole = model.logits(ids)
    for layer in model.layers:
        layer.self_attn.hide_rows = True
    masked = Forward(SMALL, weights_of(source), masked=True)(ids).logits
    torch.testing.assert_close(masked, model.logits(ids), rtol=0, atol=2e-5)
    assert (masked - whole).abs().max() > 0.1


@settings(max_examples=20, deadline=None)
@given(streams=st.integers(2, 5), tokens=st.integers(1, 9), seed=st.integers(0, 999))
def test_mixing_and_its_gradients(streams: int, tokens: int, seed: int) -> None:
    """The hand-written Sinkhorn and mixing against the op's reference and autograd, in float64."""
    config = replace(SMALL, hc_mult=streams, hc_sinkhorn_iters=4)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    rows, width = (2 + streams) * streams, 6
    x, output = draw(1, tokens, streams, width), draw(1, tokens, width)
    weights = {"fn": draw(rows, streams * width), "base": draw(rows), "scale": draw(3)}
    leaves = [x, output, *weights.values()]
    mixer = Mixer(config, plain=False)
    row, post, comb = mixer.collapse(weights, "", x)
    mine = [row, mixer.expand(output, x, post, comb)]
    row, post, comb = mhc_pre(x, *weights.values(), 4, config.hc_eps, config.rms_norm_eps)
    theirs = [row, mhc_post(output, x, post, comb)]
    pull = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in mine]
    for got, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    gradients = (torch.autograd.grad(values, leaves, pull) for values in (mine, theirs))
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7)


def test_indexer_learns_from_its_own_loss_alone() -> None:
    """Its weights get a gradient from the index loss only, and nothing else gets one from it."""
    weights = weights_of(RandomCheckpoint(SMALL, seed=4))
    for tensor in weights.values():
        if tensor.is_floating_point():
            tensor.requires_grad_()
    ids = torch.from_numpy(np.random.default_rng(4).integers(0, SMALL.vocab_size, (1, 64)))

    def touched(loss: torch.Tensor) -> set[str]:
        leaves = {name: tensor for name, tensor in weights.items() if tensor.requires_grad}
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, retain_graph=True)
        return {name for name, g in zip(leaves, found, strict=True) if g is not None and g.abs().max() > 0}

    out = Forward(SMALL, weights)(ids)
    taught = touched(sum(out.index_losses, torch.zeros(())))
    assert taught
    assert all(".indexer." in name for name in taught)
    assert not any(".indexer." in name for name in touched(out.logits.square().mean()))


def test_documents_are_split_by_name() -> None:
    every = corpus.documents()
    training, held_out = corpus.split(every)
    assert len(training) + len(held_out) == len(every)
    assert 0.01 < sum(map(len, held_out)) / sum(map(len, training)) < 0.1
    assert not set(training) & set(held_out)
    name = next(name for name, text in every.items() if text in held_out)
    assert corpus.split({name: "another text"}) == ([], ["another text"])


def test_tokenizer(tokenizer: Any) -> None:
    assert tokenizer.get_vocab_size() == VOCABULARY
    text = "naïve → 東京 \N{GRINNING FACE}\n"
    ids = tokenizer.encode(text).ids
    assert ids[0] == BOS
    assert tokenizer.decode(ids) == text
    facts = facts_of(tokenizer)
    assert {len(value) for value in facts.values} == {1}
    assert tokenizer.encode(" The otter likes plum.", add_special_tokens=False).ids in [
        facts.statement(key, value) for key in range(len(facts.opening)) for value in range(len(facts.values))
    ]
    lookup = vocabulary.compressed_ids(tokenizer)
    same = [tokenizer.token_to_id(token) for token in ("the", "Ġthe", "ĠThe")]
    assert len({int(lookup[token]) for token in same}) == 1
    assert lookup.max() < VOCABULARY - 100
    assert len(set(lookup[:3].tolist())) == 3


@settings(max_examples=25, deadline=None)
@given(step=st.integers(0, 10**6), length=st.integers(70, 400))
def test_questions_can_be_answered(tokenizer: Any, step: int, length: int) -> None:
    """Every value that counts as asked was told before in the same sequence, and a batch depends on its step alone."""
    facts = facts_of(tokenizer)
    text = np.random.default_rng(1).integers(3, 200, 3000)
    batch = Batches(text, facts, 0, 32).draw(step, 2, length, 0.999)
    again = Batches(text, facts, 0, 32).draw(step, 2, length, 0.999)
    assert np.array_equal(batch.ids, again.ids)
    assert np.array_equal(batch.weights, again.weights)
    assert batch.ids.shape == batch.weights.shape == (2, length + 2)
    for ids, weights in zip(batch.ids.tolist(), batch.weights, strict=True):
        for place in np.flatnonzero(weights == QUESTION_WEIGHT):
            told = ids[place - 3 : place + 1]
            earlier = [ids[start : start + 4] for start in range(place - 32)]
            assert told in earlier


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_variant_learns(variant: str, tokenizer: Any, tmp_path: Path) -> None:
    """A few steps lower the loss, and what is written is a checkpoint of the variant (but for a plain residual, which
    is no V4 model)."""
    run = Run(Plan(variant, steps=60, tokens=256), tokenizer)
    figures = [run.advance() for _ in range(8)]
    assert all(np.isfinite(list(one.values())).all() for one in figures)
    assert figures[-1]["loss"] < figures[0]["loss"]
    if not VARIANTS[variant].plain_residual:
        run.export(tmp_path / "out")
        checkpoint = Checkpoint.open(tmp_path / "out")
        checkpoint.check()
        assert checkpoint.unused == []
        assert set(checkpoint.mtp_specs) == {name for name in join_experts(run.weights) if name.startswith("mtp.")}


def test_command_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Six steps at once and with a stop after the third give the same files; a finished run is not overwritten."""
    runner = CliRunner()
    common = ["--steps", "6", "--tokens", "256", "--save-every", "2"]
    for arguments in (
        ["-o", tmp_path / "whole", *common],
        ["-o", tmp_path / "parts", *common, "--stop-at", "3"],
        ["-o", tmp_path / "parts", "--resume"],
    ):
        result = runner.invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    for name in ("checkpoint/model.safetensors", "checkpoint/tokenizer.json", "state/moments.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    assert (tmp_path / "whole" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    left = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert left == ["checkpoint", "log.csv", "loss.png", "state"]
    assert len((tmp_path / "whole" / "log.csv").read_text().splitlines()) == 7
    result = runner.invoke(main, ["-o", str(tmp_path / "whole")])
    assert result.exit_code == 2
    assert "expected no finished run, found one" in result.output


@pytest.mark.slow
def test_retraining_gives_the_recorded_loss(tmp_path: Path) -> None:
    """The first 200 steps again, some minutes: the mean loss of each 50 is the recorded one within 5 %."""
    arguments = ["-o", str(tmp_path / "again"), "--stop-at", "200", "--save-every", "200"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    recorded, again = (losses(path) for path in (EXAMPLE / "log.csv", tmp_path / "again" / "log.csv"))
    assert len(again) == 200
    for start in range(0, 200, 50):
        wanted = np.mean(recorded[start : start + 50])
        assert np.mean(again[start : start + 50]) == pytest.approx(wanted, rel=0.05)


def losses(path: Path) -> list[float]:
    with path.open(encoding="utf-8") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_damaged_state(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected the saved state of a run"):
        Run.resume(tmp_path / "nothing")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="expected the saved state of a run"):
        load_state(tmp_path / "state")


def test_weights_begin_alike(tokenizer: Any) -> None:
    lookup = vocabulary.compressed_ids(tokenizer)
    first, second = (initial(VARIANTS["full"], lookup, 0) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other) for name, other in initial(VARIANTS["full"], lookup, 1).items())
