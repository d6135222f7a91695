"""Sessions of an artifact on the simulated GPU, in a process of its own: saved and restored, forked, tokens taken back.

``python -m tests.targets.cuda.session_run ARTIFACT FOLDER`` prints one JSON document: what was equal bit for bit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from v4c.errors import ArtifactError
from v4c.runtime import Model, Session, load
from v4c.runtime.generation import Options
from v4c.targets.cuda.simulator.build import load_driver

RANDOM = np.random.default_rng(4)
LENGTHS = [21, 6]


def tokens(model: Model, *shape: int) -> np.ndarray:
    return RANDOM.integers(2, model.vocab_size, shape)


def steps(session: Session, given: np.ndarray) -> np.ndarray:
    """Logits of tokens [n, B] read one after the other."""
    return np.stack([session.decode(row) for row in given])


def saved(model: Model, folder: Path) -> dict[str, bool]:
    """A batch of rows at different positions, restored into another capacity, after steps that were recorded."""
    found = {}
    more = tokens(model, 9, 2)
    with model.new_session(2, 64) as session:
        session.prefill(tokens(model, 2, 21), lengths=LENGTHS, chunk=8)
        steps(session, tokens(model, 3, 2))
        session.save(folder / "state", pending=[5, 6])
        session.save(folder / "again", pending=[5, 6])
        with session.fork() as forked, model.restore_session(folder / "state", max_context=40) as restored:
            expected = steps(session, more)
            found["restored"] = np.array_equal(steps(restored, more), expected)
            found["forked"] = np.array_equal(steps(forked, more), expected)
            found["positions"] = np.array_equal(restored.position, session.position)
            found["pending"] = restored.pending is not None and restored.pending.tolist() == [5, 6]
    found["same_file"] = (folder / "state").read_bytes() == (folder / "again").read_bytes()
    with model.new_session(2, 64) as empty, model.new_session(2, 64) as never_saved:
        empty.save(folder / "empty")
        with model.restore_session(folder / "empty") as restored:
            found["empty"] = np.array_equal(steps(restored, more[:2]), steps(never_saved, more[:2]))
    damaged = bytearray((folder / "state").read_bytes())
    damaged[-1] ^= 1
    (folder / "state").write_bytes(damaged)
    try:
        model.restore_session(folder / "state")
    except ArtifactError as error:
        found["damaged"] = "SHA-256" in str(error)
    return found


def two_models(model: Model, artifact: Path) -> dict[str, bool]:
    """A recorded step, while another model in the same memory reads a prompt, steps, and makes sessions."""
    prompt, more = tokens(model, 1, 12), tokens(model, 8, 1)
    with model.new_session(1, 64) as alone:
        alone.prefill(prompt)
        expected = steps(alone, more)
    other = load(artifact, verify="code")
    with model.new_session(1, 64) as session, other.new_session(1, 64) as beside:
        session.prefill(prompt)
        found = [steps(session, more[:3])]
        beside.prefill(tokens(model, 1, 12))
        found.append(steps(session, more[3:5]))
        with beside.fork() as forked:
            found.append(steps(session, more[5:7]))
            steps(beside, more[:2])
            found.append(steps(session, more[7:]))
            same = np.array_equal(steps(forked, more[:2])[0], steps(other.new_session(1, 64), more[:2])[0])
    return {"same": np.array_equal(np.concatenate(found), expected), "forked_is_not_empty": not same}


def taken_back(model: Model) -> dict[str, bool]:
    """Every second token wrong and taken back: neither logits nor what follows differ from plain decoding."""
    found = {"logits": True}
    with model.new_session(2, 160) as plain, model.new_session(2, 160) as taken:
        prompt = tokens(model, 2, 21)
        for session in (plain, taken):
            session.prefill(prompt, lengths=LENGTHS)
        for _ in range(12):
            token, wrong = tokens(model, 2), tokens(model, 2)
            mark = taken.mark()
            logits, _ = taken.read_streams(np.stack([token, wrong], 1), np.array([2, 2]), all_logits=True)
            taken.rewind(mark, np.array([True, True]))
            found["logits"] &= np.array_equal(logits[:, 0], plain.decode(token))
        found["positions"] = np.array_equal(plain.position, taken.position)
        more = tokens(model, 6, 2)
        found["after"] = np.array_equal(steps(plain, more), steps(taken, more))
    return found


def speculative(model: Model) -> dict[str, bool]:
    """Greedy and drawn, the tokens of plain decoding."""
    found = {}
    prompt = tokens(model, 17)
    for name, temperature in (("greedy", 0.0), ("drawn", 0.9)):
        ids = [
            model.complete([prompt], Options(20, temperature, seed=3, eos=False, speculative=ahead))[0].token_ids
            for ahead in (False, True)
        ]
        found[name] = list(ids[0]) == list(ids[1]) and len(ids[0]) == 20
    return found


def main(artifact: Path, folder: Path) -> None:
    load_driver()
    model = load(artifact, verify="code")
    found = {"saved": saved(model, folder), "two_models": two_models(model, artifact)}
    if model.manifest.mtp is not None:
        found |= {"taken_back": taken_back(model), "speculative": speculative(model)}
    print(json.dumps({name: {k: bool(v) for k, v in part.items()} for name, part in found.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
