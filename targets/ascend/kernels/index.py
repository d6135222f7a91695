"""Lightning indexer: scores of compressed rows (V4 paper, section 2.3, CSA).

Scores are a product per token, its heads as rows, with everything behind it on the vector unit; `top_k` chooses.
"""

from __future__ import annotations

from ..emit import TileBuilder
from ..program import DeviceLimits, GridAxis, Polynomial, Role, TileProgram, Work
from ..tiles import power_below
from .common import BATCH, CHUNK, clamp, fixed, program_name

_OP = "LightningIndex"


def index_scores(
    heads: int, width: int, ratio: int, limits: DeviceLimits, *, dtype: str = "float16", splits: int = 1
) -> TileProgram:
    """``q [B, S, J, I]``, ``weights [B, S, J]`` float32 and ``index_rows [B, N, I]`` to ``scores [B, S, N]`` float32.

    ``score_n = sum_h weights_h . relu(q_h . row_n)``, of ready rows; what stands for others is not touched, nor are
    those rows read. The positive factors of the paper change no order and are left out, as in the op.

    Args:
        heads, width: J and I.
        ratio: tokens per row.
        limits: of the device.
        dtype: of `q` and the rows.
        splits: programs that share a token's rows.
    """
    keys = power_below(limits.unified_buffer * 0.8 / (heads * 4 * 4), 256)
    b = TileBuilder(program_name("index_scores", heads, width, ratio, dtype, splits), _OP, Work.MIXED)
    q = b.argument("q", ("batch", "chunk", heads, width), dtype)
    weights = b.argument("weights", ("batch", "chunk", heads), "float32")
    rows = b.argument("index_rows", ("batch", "capacity", width), dtype)
    positions, lengths = (b.argument(n, ("batch",), "int32") for n in ("positions", "lengths"))
    scores = b.argument("scores", ("batch", "chunk", "capacity"), "float32", Role.WRITE)
    b.scalar("batch")
    chunk, capacity = b.scalar("chunk"), b.scalar("capacity")
    row, token = b.program_id(0), b.program_id(1)
    place, position = row * chunk + token, b.read(positions, row)
    last = b.minimum(position + token + 1, position + b.read(lengths, row))
    ready = clamp(b, last // ratio, 0, capacity)
    queries = b.load(q, place * (heads * width), (heads, width))
    shape = (heads, keys)
    weight = b.load(weights, place * heads, (heads,))
    trips = Polynomial.of(1 / (keys * splits * ratio), "context")
    with b.loop(ready, keys * splits, b.program_id(2) * keys if splits > 1 else 0, trips=trips) as step:
        live = b.minimum(ready - step.index, keys)
        start = (row * capacity + step.index) * width
        tile = b.load(rows, start, (keys, width), valid=(live, width))
        product = b.maximum(b.matmul(queries, b.transpose(tile)), 0.0)
        total = b.reduce(product * b.broadcast(weight, shape, 1), 0)
        b.store(total, scores, place * capacity + step.index, valid=(live,))
    return b.finish([GridAxis(BATCH), GridAxis(CHUNK), *([fixed(splits)] if splits > 1 else [])])
