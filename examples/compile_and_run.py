"""Promise: compile once, then read a prompt, decode, and branch a session without reading the prompt again.

`python examples/compile_and_run.py [FOLDER]` compiles the trained model of examples/train_nano into FOLDER, unless
it is there already, lets it go on with this file, and checks that every way to the same tokens gives the same logits.
"""

import sys
from pathlib import Path

import numpy as np

import v4c

CHECKPOINT = Path(__file__).parent / "train_nano" / "checkpoint"

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "nano.v4c")
if not folder.exists():
    v4c.compile(CHECKPOINT, folder, target="cpu")
model = v4c.load(folder)

prompt = model.tokenizer.encode(Path(__file__).read_text())[None, :300]
with model.new_session(batch=1, max_context=512) as session:
    logits = session.prefill(prompt)  # float32 [1, vocab], of the last token
    likeliest, second = np.argsort(-logits[0])[:2]

    branch = session.fork()  # copies what was read, not the whole capacity
    first_logits = session.decode([likeliest])
    other_logits = branch.decode([second])
    print("positions", session.position.tolist(), branch.position.tolist())

    for token, logits in ((likeliest, first_logits), (second, other_logits)):
        session.reset()  # position 0 again; no memory is cleared
        whole = session.prefill(np.append(prompt, [[token]], axis=1), chunk=64)
        difference = np.abs(whole - logits).max()
        print(f"token {token}: largest difference from reading everything again: {difference:.1e}")
        assert difference < 1e-4

print("generated", repr(model.tokenizer.decode(list(model.generate(prompt, max_new_tokens=24)))))
