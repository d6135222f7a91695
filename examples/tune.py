"""Promise: `v4c.tune` searches the schedules of the kernels on this machine, and `v4c.compile` takes what it found.

`python examples/tune.py [FOLDER]` tries two schedules of one kernel of a small model, which shows the way; a real
search takes all kernels and 40 trials each. The result stays the same up to the order of float32 sums.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import v4c
from v4c.frontend.initialise import RandomCheckpoint
from v4c.frontend.model.model import V4Model

# One sliding layer, which compiles in some seconds.
CONFIG = replace(v4c.preset("v4-nano"), num_hidden_layers=1, attention_types=("sliding",), mlp_types=("topk",))

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
found = v4c.tune(CONFIG, folder / "schedules.json", trials=2, ops=["grouped_linear"])
for kernel in found["kernels"]:
    times = {rows: f"{microseconds:.0f} us" for rows, microseconds in kernel["default_us"].items()}
    print(kernel["op"], kernel["shape"], times, "kept" if kernel["parameters"] is None else kernel["parameters"])

v4c.compile(CONFIG, folder / "tuned.v4c", tuning=folder / "schedules.json")
prompt = np.arange(1, 60)[None]
tuned = v4c.load(folder / "tuned.v4c").new_session().prefill(prompt)
expected = V4Model.from_source(RandomCheckpoint(CONFIG)).logits(torch.from_numpy(prompt))[:, -1].numpy()
print(f"largest difference from torch: {np.abs(tuned - expected).max():.1e}")
assert np.abs(tuned - expected).max() < 1e-4
