"""v4-nano with Engram, from checkpoint to simulated logits, on one device of each architecture."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import v4c
from tests.parity.margins import smallest_margin
from tests.targets.ascend.requirements import DEVICES, needs_compiler, needs_mlir
from tests.v4c.cli_harness import V4C, shell
from v4c.cli.root import main as root
from v4c.errors import ArtifactError
from v4c.frontend.checkpoint import Checkpoint
from v4c.frontend.model.model import V4Model
from v4c.runtime.artifact import read_manifest
from v4c.targets.ascend import partition
from v4c.targets.ascend.gates import GATES, Failure, GateReport
from v4c.targets.ascend.partition import check_operation

pytestmark = [pytest.mark.slow, needs_compiler, needs_mlir]

TOKENS = 100
TOLERANCE = 2e-2
"""On a logit, of float16 arithmetic against float32, where the standard deviation of logits is 1."""
CLEAR = 514
"""Seed of tokens on which no choice of the reference is near a tie: gaps are above 5e-4 of the largest score."""
UNCLEAR = 1
FLIPS = 4
"""Tokens at which rounding may change a choice: two experts, or two rows of the index, score almost alike.

What follows a changed choice differs by more than rounding. Rounding the weights alone, with all arithmetic in float32,
changes as many.
"""
HOST = {"take", "astype", "broadcast_to", "subtract", "maximum", "gather_elements"}
"""Operators of the embedding lookup, and of the choice of each row's last token."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ascend") / "nano"
    result = shell(["init", "--preset", "v4-nano-engram", "--seed", "3", "-o", str(folder)], cwd=folder.parent)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module", params=DEVICES)
def artifact(request, checkpoint):
    folder = checkpoint.parent / request.param
    target = f"ascend:{request.param}"
    command = [str(V4C), "compile", "-m", str(checkpoint), "--target", target, "--strict", "-o", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def reference(checkpoint):
    """The checkpoint, and its model in float32 torch."""
    source = Checkpoint.open(checkpoint)
    return source, V4Model.from_source(source)


def expected(reference, seed):
    """Tokens ``[TOKENS]``, and their logits in float32 torch."""
    source, model = reference
    tokens = np.random.default_rng(seed).integers(0, source.config.vocab_size, TOKENS)
    with torch.no_grad():
        return tokens, model.logits(torch.from_numpy(tokens)[None])[0].numpy()


def test_every_program_passed_every_gate(artifact):
    manifest = read_manifest(artifact)
    assert manifest.target.name == f"ascend-sim:{artifact.name}"
    assert manifest.build["host_fallbacks"] == {}
    assert manifest.plan is not None
    plan = json.loads((artifact / manifest.plan).read_text())
    assert plan["device"] == artifact.name
    assert {tuple(p["gates_passed"]) for p in plan["programs"].values()} == {GATES}
    for program in plan["programs"].values():
        assert (artifact / program["tile_program"]).read_text().startswith("module {")
        assert "hivm" in (artifact / program["hivm"]).read_text()
    assert {s["host"] for steps in plan["functions"].values() for s in steps if "host" in s} <= HOST
    assert set(manifest.entry_points.values()) <= set(plan["functions"])


def close(found, wanted):
    """Tokens within the tolerance, and of equal best logit."""
    assert np.isfinite(found).all()
    near = np.abs(found - wanted).max(axis=-1) <= TOLERANCE * max(1.0, float(wanted.std()))
    return int(near.sum()), int((found.argmax(axis=-1) == wanted.argmax(axis=-1)).sum())


def test_logits_where_choices_are_clear(artifact, reference):
    """Every position within the tolerance and of the same best logit, as a prompt and one by one."""
    tokens, wanted = expected(reference, CLEAR)
    assert smallest_margin(reference[0], tokens[None]) > 5e-4
    best = np.sort(wanted, axis=-1)
    assert (best[:, -1] - best[:, -2]).min() > 5e-3
    for found in simulated(v4c.load(artifact), tokens):
        assert np.abs(found - wanted).max() <= TOLERANCE
        assert (found.argmax(axis=-1) == wanted.argmax(axis=-1)).all()


def simulated(model, tokens):
    """Logits of all positions, of the prompt and of decoding one by one."""
    with model.new_session(max_context=TOKENS) as session:
        whole = session.prefill(tokens[None], all_logits=True, chunk=TOKENS)[0]
    with model.new_session(max_context=TOKENS) as session:
        single = np.concatenate([session.decode(tokens[i : i + 1]) for i in range(TOKENS)])
    return whole, single


def test_logits_of_any_tokens(artifact, reference):
    tokens, wanted = expected(reference, UNCLEAR)
    model = v4c.load(artifact)
    whole, single = simulated(model, tokens)
    with model.new_session(batch=2, max_context=TOKENS) as session:
        for start, lengths in ((0, [37, 20]), (37, [63, 0])):
            rows = np.stack([np.resize(tokens[start : start + max(lengths)], max(lengths))] * 2)
            ragged = session.prefill(rows, lengths=np.array(lengths))
    for found in (whole, single):
        near, same = close(found, wanted)
        assert near >= TOKENS - FLIPS
        assert same >= TOKENS - FLIPS
    # Whatever is chosen, it is chosen alike in chunks and one by one.
    assert (np.abs(whole - single).max(axis=-1) <= TOLERANCE).sum() >= TOKENS - 1
    assert np.abs(ragged[0] - whole[-1]).max() <= TOLERANCE


def test_verify_command(artifact, checkpoint):
    result = shell(["verify", str(artifact), "-m", str(checkpoint), "--json"], cwd=checkpoint.parent)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["ok"]


def test_runs_without_torch_tvm_or_tools(artifact):
    code = (
        "import sys, v4c; model = v4c.load(sys.argv[1]); session = model.new_session(max_context=64);"
        "logits = session.prefill([[1, 2, 3]]); assert logits.shape == (1, 4096);"
        "print([m for m in ('torch', 'tvm', 'onnx', 'ascendnpuir') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(artifact)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env={"PATH": "/nowhere"})
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


def test_an_altered_plan_is_refused(artifact, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    plan = copy / str(read_manifest(copy).plan)
    plan.write_bytes(plan.read_bytes().replace(b'"grid"', b'"gird"', 1))
    with pytest.raises(ArtifactError, match="SHA-256"):
        v4c.load(copy)


def test_inspect_tells_plan_and_costs(artifact):
    result = shell(["inspect", str(artifact)], cwd=artifact.parent)
    assert result.returncode == 0, result.stderr
    for text in ("launch plan", artifact.name, "decode step of 1 token", "GroupedExperts", "not measured", "bandwidth"):
        assert text in result.stdout
    described = json.loads(shell(["inspect", str(artifact), "--json"], cwd=artifact.parent).stdout)["plan"]
    assert described["host"]["fallbacks"] == {}
    # 16 rows of a tile share a weight: a decode step reads 2 bytes for every 16 multiply-adds of the cube.
    products = described["decode"]["ops"]["MatMul"]
    assert products["bytes"] > 2 * products["cube"] / 16


def test_finishing_without_cann_says_so(artifact, tmp_path):
    command = [sys.executable, "-m", "v4c.targets.ascend.finish", str(artifact), "--device", artifact.name, "-o", "out"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env={"PATH": "/nowhere"}
    )
    assert result.returncode == 2
    assert "hivmc" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_bfloat16_weights(checkpoint, tmp_path):
    """Products in bf16, whose rounding is eight times float16's: what is typical is checked, and by `v4c verify`."""
    folder = tmp_path / "bf16"
    arguments = ["-m", str(checkpoint), "--target", "ascend:Ascend950PR_9599", "--dtype", "bf16", "--strict"]
    result = shell(["compile", *arguments, "-o", str(folder)], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    result = shell(["verify", str(folder), "-m", str(checkpoint), "--json"], cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_refused_program_is_left_to_the_host(checkpoint, artifact, tmp_path, monkeypatch):
    """With its reason on stderr, in the manifest and in `v4c inspect`; the logits stay what they are."""

    def refusing(operation, device, seed=0):
        reports = check_operation(operation, device, seed)
        if "swiglu" in reports[0].kernel:
            failure = Failure(reports[0].kernel, device.name, "compile", "ub overflow, planted")
            reports[0] = GateReport(reports[0].kernel, device.name, (), (failure,))
        return reports

    monkeypatch.setattr(partition, "check_operation", refusing)
    target = f"ascend:{artifact.name}"
    arguments = ["compile", "-m", str(checkpoint), "--target", target, "-o", str(tmp_path / "host")]
    strict = CliRunner().invoke(root, [*arguments, "--strict"])
    assert strict.exit_code != 0
    assert "ub overflow, planted" in strict.stderr
    assert not (tmp_path / "host").exists()
    result = CliRunner().invoke(root, arguments)
    assert result.exit_code == 0, result.output
    fallbacks = read_manifest(tmp_path / "host").build["host_fallbacks"]
    assert fallbacks
    assert all("planted" in reason for reason in fallbacks.values())
    lines = [line for line in result.stderr.splitlines() if "planted" in line]
    assert len(lines) == len(fallbacks)
    tokens = np.arange(1, 9)[None]
    logits = [v4c.load(a).new_session(max_context=16).prefill(tokens) for a in (artifact, tmp_path / "host")]
    assert np.array_equal(*logits)
