"""A child process for tests of the tuner: answers at once, as its schedule says, or misbehaves.

The candidate's time is ``row_block / 7`` of the default's. With `row_block` 1 it crashes, with 2 it never answers, with
3 it reports a failure. Every start is a line in the file that ``TUNE_STUB_LOG`` names.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

with open(os.environ["TUNE_STUB_LOG"], "a") as log:
    log.write("started\n")
for line in sys.stdin:
    request = json.loads(line)
    rows, block = request["rows"], request["candidate"]["row_block"]
    if block == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if block == 2:
        time.sleep(3600)
    answer = {
        "default_us": {str(r): 100.0 for r in rows},
        "candidate_us": {str(r): 100.0 * block / 7 for r in rows},
        "ratio": {str(r): block / 7 for r in rows},
        "wins": {str(r): 1.0 for r in rows},
    }
    print(json.dumps({"failed": "no kernel"} if block == 3 else answer), flush=True)
