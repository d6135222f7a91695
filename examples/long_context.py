"""Promise: capacity costs nothing until it is used, and a long prompt is paid for once.

`python examples/long_context.py [ARTIFACT]` reads a document in a session that could hold a million tokens, asks two
questions of forks of it, saves it, and continues the restored session bit for bit. The artifact, one CSA layer, is made
if it is not there.
"""

import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import v4c

MILLION = 1 << 20
DOCUMENT = 3000

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "long-context.v4c")
if not folder.exists():
    layer = {"num_hidden_layers": 1, "attention_types": ("csa",), "mlp_types": ("topk",)}
    v4c.compile(replace(v4c.preset("v4-nano"), **layer, max_position_embeddings=MILLION), folder)
model = v4c.load(folder)


def resident() -> int:
    """Memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


document = np.random.default_rng(0).integers(0, model.vocab_size, DOCUMENT)
model.new_session(max_context=DOCUMENT).prefill(document[None])  # weights and scratch are in memory now
before = resident()
with model.new_session(max_context=MILLION) as session:
    start = time.perf_counter()
    session.prefill(document[None])
    print(f"read {DOCUMENT} tokens of {MILLION} in {time.perf_counter() - start:.2f} s")
    full = sum(math.prod(cache.sizes(1, MILLION)) * 4 for cache in model.manifest.caches)
    print(f"memory grew by {(resident() - before) >> 20} MiB; full, the caches take {full >> 20} MiB")

    for question in ([1, 2, 3], [4, 5]):
        with session.fork() as branch:  # copies what was read
            print("question", question, "->", list(model.generate(question, 8, session=branch, eos=False)))

    saved = folder.with_name("document.session")
    session.save(saved)
    print(f"saved: {saved.stat().st_size / 2**20:.2f} MiB")
    expected = list(model.generate([1, 2, 3], 8, session=session, eos=False))

with model.restore_session(saved, max_context=DOCUMENT + 20) as restored:  # another capacity
    assert list(model.generate([1, 2, 3], 8, session=restored, eos=False)) == expected
print("the restored session gave the same tokens")
