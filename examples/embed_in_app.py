"""Promise: an application that runs an artifact needs `v4c.load` and NumPy arrays; neither torch nor a compiler loads.

`python examples/embed_in_app.py FOLDER` serves three requests of different length in one batch, from an artifact such
as examples/compile_and_run.py writes.
"""

import sys

import numpy as np

import v4c

REQUESTS = ("Return the", "If the file is not", "The otter likes plum. The otter likes")
NEW_TOKENS = 8

model = v4c.load(sys.argv[1])
requests = [model.tokenizer.encode(request) for request in REQUESTS]
lengths = np.array([len(request) for request in requests])
prompts = np.zeros((len(requests), lengths.max()), dtype=np.int64)
for row, request in enumerate(requests):
    prompts[row, : len(request)] = request  # padded on the right with anything

with model.new_session(batch=len(requests), max_context=256) as session:
    logits = session.prefill(prompts, lengths=lengths)
    answers = [logits.argmax(axis=-1)]
    while len(answers) < NEW_TOKENS:
        logits = session.decode(answers[-1])  # rows stand at different positions
        answers.append(logits.argmax(axis=-1))

for row, request in enumerate(requests):
    answer = [int(tokens[row]) for tokens in answers]
    alone = list(model.generate(request, max_new_tokens=NEW_TOKENS, eos=False))
    print(REQUESTS[row], "->", repr(model.tokenizer.decode(answer)))
    assert answer == alone  # a row does not see its neighbours

loaded = {"torch", "tvm", "onnx", "onnxscript"} & sys.modules.keys()
assert not loaded, f"loaded without need: {loaded}"
