"""Presets: the published sizes, the development sizes, and that each name comes with an Engram variant."""

from __future__ import annotations

from dataclasses import replace

import pytest

from v4c.errors import ConfigError
from v4c.frontend.estimate import parameters
from v4c.frontend.presets import PRESETS, preset, with_engram

BASES = ["v4-flash", "v4-pro", "v4-mini", "v4-nano", "flash-slice"]


def test_names() -> None:
    assert set(PRESETS) == {*BASES, *(f"{name}-engram" for name in BASES)}
    with pytest.raises(ConfigError, match=r"expected one of v4-flash, v4-pro, .*, found 'v4-huge'"):
        preset("v4-huge")


@pytest.mark.parametrize(
    ("name", "millions", "tolerance"),
    [("v4-flash", 284e3, 500), ("v4-pro", 1.6e6, 5e4), ("v4-mini", 186.5, 0.05), ("flash-slice", 6470, 5)],
)
def test_parameter_counts(name: str, millions: float, tolerance: float) -> None:
    assert parameters(preset(name)) / 1e6 == pytest.approx(millions, abs=tolerance)


def test_published_schedules() -> None:
    flash, pro = preset("v4-flash"), preset("v4-pro")
    assert [len(flash.layers_of(kind)) for kind in ("sliding", "csa", "hca", "hash")] == [2, 21, 20, 3]
    assert [len(pro.layers_of(kind)) for kind in ("sliding", "csa", "hca", "hash")] == [0, 30, 31, 3]
    assert (pro.index_topk, pro.routed_scaling_factor, pro.o_groups, pro.q_lora_rank) == (1024, 2.5, 16, 1536)


def test_nano_has_every_kind_of_layer() -> None:
    nano = preset("v4-nano")
    assert parameters(nano) < 10e6
    assert set(nano.attention_types) == {"sliding", "csa", "hca"}
    assert set(nano.mlp_types) == {"hash", "topk"}
    assert nano.index_n_heads >= 16
    assert (nano.csa_ratio, nano.hca_ratio, nano.sliding_window) == (4, 128, 128)


@pytest.mark.parametrize("name", BASES)
def test_engram_variants_change_nothing_else(name: str) -> None:
    engram = preset(f"{name}-engram")
    assert engram.engram is not None
    assert replace(engram, engram=None) == preset(name)
    assert parameters(engram) > parameters(preset(name))


def test_with_engram_follows_the_pad_token() -> None:
    config = with_engram(replace(preset("v4-nano"), pad_token_id=7))
    assert config.engram is not None
    assert config.engram.pad_id == 7
