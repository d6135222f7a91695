"""Promise: the exported file is a whole model, which ONNX Runtime continues token by token without v4c.

`python examples/export_onnx.py [FILE.onnx]` writes the trained model of examples/train_nano, reads a prompt, decodes 5
tokens, and checks that the caches give the same logits as reading all tokens at once.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

import v4c

CAPACITY = 128  # tokens the caches hold
CHECKPOINT = Path(__file__).parent / "train_nano" / "checkpoint"


def empty_caches(model: ort.InferenceSession) -> dict[str, np.ndarray]:
    """Zeroed caches of one row, as the file's metadata describes them: ``rows4`` is one row per 4 tokens."""
    sizes = {"batch": 1, "rows4": CAPACITY // 4, "rows128": CAPACITY // 128}
    specs = json.loads(model.get_modelmeta().custom_metadata_map["v4c.caches"])
    return {f"past.{s['name']}": np.zeros([sizes.get(d, d) for d in s["shape"]], s["dtype"]) for s in specs}


def read(model: ort.InferenceSession, ids: np.ndarray, position: int, caches: dict[str, np.ndarray]) -> np.ndarray:
    """Feed a chunk that starts at `position`; returns the last token's logits and renews `caches`."""
    where = {"positions": np.array([position]), "lengths": np.array([ids.shape[1]])}
    logits, *present = model.run(None, {"input_ids": ids, **where, **caches})
    caches.update(zip(caches, present, strict=True))
    return logits[0]


path = Path(sys.argv[1] if len(sys.argv) > 1 else "nano.onnx")
v4c.export(CHECKPOINT, path)
model = ort.InferenceSession(path)

caches = empty_caches(model)
words = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
ids = np.array([words.encode("If the value is not").ids])
logits = read(model, ids, 0, caches)
for _ in range(5):
    token = int(logits.argmax())
    logits = read(model, np.array([[token]]), ids.shape[1], caches)
    ids = np.append(ids, [[token]], axis=1)
print("tokens", ids[0].tolist(), repr(words.decode(ids[0].tolist())))

difference = np.abs(logits - read(model, ids, 0, empty_caches(model))).max()
print(f"largest difference from reading all {ids.shape[1]} tokens at once: {difference:.1e}")
assert difference < 1e-4
