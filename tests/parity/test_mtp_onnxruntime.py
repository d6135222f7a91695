"""The exported MTP layer in ONNX Runtime, fed with the streams the exported model gives, against torch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import v4c
from tests.parity.onnx_session import empty_caches, metadata, open_session
from tests.v4c.cli_harness import assert_one_line, invoke
from v4c.errors import CheckpointError, UnsupportedError
from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise import RandomCheckpoint
from v4c.frontend.model.caches import allocate
from v4c.frontend.model.model import V4Model
from v4c.frontend.model.mtp import MTPModel, allocate_mtp
from v4c.onnx_source import OnnxSource

TOLERANCE = 2e-4
TOKENS = 150
"""Some more than the window."""


@pytest.fixture(scope="module")
def source(tiny_config: ModelConfig) -> RandomCheckpoint:
    return RandomCheckpoint(replace(tiny_config, num_nextn_predict_layers=1), seed=5)


@pytest.fixture(scope="module")
def exported(source: RandomCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mtp") / "model.onnx"
    v4c.export(source, path, mtp=True)
    return path


def test_chunks_and_single_tokens(source: RandomCheckpoint, exported: Path) -> None:
    ids = np.random.default_rng(0).integers(0, source.config.vocab_size, (2, TOKENS))
    whole = torch.from_numpy(ids)
    where = torch.zeros(2, dtype=torch.int64), torch.full((2,), TOKENS)
    with torch.no_grad():
        streams, _ = V4Model.from_source(source).hidden(whole, *where, allocate(source.config, 2, TOKENS))
        pairs = torch.zeros(2, dtype=torch.int64), torch.full((2,), TOKENS - 1)
        expected, _, _ = MTPModel.from_source(source)(
            streams[:, :-1], whole[:, 1:], *pairs, allocate_mtp(source.config, 2, TOKENS), all_logits=True
        )
    layer = exported.with_name("model.mtp.onnx")
    main, mtp = open_session(exported, False, True), open_session(layer, False, True)
    caches, own = empty_caches(exported, 2, TOKENS), empty_caches(layer, 2, TOKENS)
    for start, stop in ((0, 70), (70, 135), *((t, t + 1) for t in range(135, TOKENS - 1))):
        feed = {"positions": np.full(2, start), "lengths": np.full(2, stop - start)}
        _, given, *present = main.run(None, {"input_ids": ids[:, start:stop], **feed, **caches})
        caches = dict(zip(caches, present, strict=True))
        np.testing.assert_allclose(given, streams[:, start:stop].numpy(), atol=TOLERANCE)
        feed["streams"] = given
        logits, *present = mtp.run(None, {"input_ids": ids[:, start + 1 : stop + 1], **feed, **own})
        own = dict(zip(own, present, strict=True))
        np.testing.assert_allclose(logits, expected[:, stop - 1].numpy(), atol=TOLERANCE)


def test_the_files_describe_themselves(exported: Path, source: RandomCheckpoint) -> None:
    names = [cache["name"] for cache in json.loads(metadata(exported.with_name("model.mtp.onnx"), "v4c.caches"))]
    assert names == [f"{source.config.num_hidden_layers}.window"]
    opened = OnnxSource(exported)
    assert [v.name for v in opened.model.graph.outputs if v.name == "streams"] == []
    assert opened.model.graph.outputs[0].name == "logits"


def test_an_mtp_layer_alone_is_no_model(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"model\.mtp\.onnx: expected a model, found an MTP layer"):
        v4c.compile(exported.with_name("model.mtp.onnx"), tmp_path / "a")


def test_what_has_no_layer_is_refused(tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path) -> None:
    for source in (tiny_checkpoint, tiny_config):
        with pytest.raises(CheckpointError, match="expected an MTP layer"):
            v4c.export(source, tmp_path / "model.onnx", mtp=True)
    result = invoke("export", "-m", tiny_checkpoint, "--mtp", "--format", "mlir", "-o", tmp_path / "m.mlir")
    assert_one_line(result, "mtp: expected format onnx, found mlir")
    assert list(tmp_path.iterdir()) == []
