"""The steps that the hyper-connection kernels are made of.

The product of the streams with `fn` is cut into parts, ranges of one stream's columns, so that a single token keeps all
threads busy. The parts are added in a fixed order, so the result depends neither on the threads nor on how many tokens
there are.
"""

# mypy: ignore-errors
# ruff: noqa: B023
# (TVMScript: the macros below are parsed by TVM, not run by Python.)

from __future__ import annotations

from tvm.script import tirx as T

from ..schedule import MHCSchedule
from .common import exp, sigmoid, sum_lanes, vector_width

DEFAULT = MHCSchedule()


def part_count(m: int, d: int, schedule: MHCSchedule) -> int:
    """Parts that `m` streams of `d` floats are cut into; the `m` parts of the same columns are neighbours."""
    return -(-(d // vector_width(d)) // schedule.part_vectors) * m


def output_block(outputs: int, schedule: MHCSchedule) -> int:
    """Rows of `fn` per register block: the largest divisor of `outputs` up to the schedule's."""
    return max(size for size in range(1, schedule.output_block + 1) if outputs % size == 0)


@T.macro
def project_block(streams, fn, parts, row, height, part, start, steps, group, size, vector):
    """Products of `height` tokens with the `group`-th `size` rows of `fn`, over `steps` vectors from `start`."""
    lanes = T.alloc_buffer((height * size, vector), "float32", scope="local")
    for a in T.unroll(height * size):
        for v in T.vectorized(vector):
            lanes[a, v] = T.float32(0)
    for j in range(steps):
        for o in T.unroll(size):
            for r in T.unroll(height):
                for v in T.vectorized(vector):
                    lanes[r * size + o, v] = (
                        lanes[r * size + o, v]
                        + streams[row + r, (start + j) * vector + v] * fn[group * size + o, (start + j) * vector + v]
                    )
    for r in T.unroll(height):
        for o in T.unroll(size):
            sum_lanes(lanes, r * size + o, vector)
            parts[row + r, part, group * size + o] = lanes[r * size + o, 0]


@T.macro
def project_parts(prepare, streams, fn, parts, rows, outputs, m, d, schedule):
    """Per token and part: `prepare`, then the products with the rows of `fn`.

    A task has all streams of its columns, for `prepare` to find in L1 what it reads for each of them; where that would
    leave threads idle, it has one stream.

    Args:
        prepare: ``prepare(row, part, k, first, steps)`` leaves in ``parts[row, part, outputs]`` the sum of squares of
            stream k over `steps` vectors from its `first`; it may also be what fills the stream there.
        streams: ``[rows, m * d]``.
        fn: ``[outputs, m * d]``.
        parts: ``[rows, part_count(m, d, schedule), outputs + 1]``, written.
        outputs, m, d, schedule: static.
    """
    vector = T.meta_var(vector_width(d))
    ranges = T.meta_var(part_count(m, d, schedule) // m)
    groups: T.int64 = (rows + (schedule.rows_per_task - 1)) // schedule.rows_per_task
    split: T.int64 = T.if_then_else(
        rows <= schedule.serial_rows or groups * ranges < schedule.min_tasks, T.int64(m), T.int64(1)
    )
    for task in T.parallel(ranges * groups * split):
        shared: T.int64 = T.truncdiv(task, split)
        span: T.int64 = T.truncdiv(T.int64(m), split)
        lowest: T.int64 = T.truncmod(task, split) * span
        row: T.int64 = T.truncmod(shared, groups) * schedule.rows_per_task
        count: T.int64 = T.min(rows - row, T.int64(schedule.rows_per_task))
        columns: T.int64 = T.truncdiv(shared, groups)
        first: T.int64 = columns * schedule.part_vectors
        steps: T.int64 = T.min(d // vector - first, T.int64(schedule.part_vectors))
        for i in range(count):
            for j in range(span):
                prepare(row + i, columns * m + lowest + j, lowest + j, first, steps)
        for j in range(span):
            for group in range(T.int64(outputs // output_block(outputs, schedule))):

                @T.inline
                def block(row, height):
                    project_block(
                        streams,
                        fn,
                        parts,
                        row,
                        height,
                        columns * m + lowest + j,
                        (lowest + j) * (d // vector) + first,
                        steps,
                        group,
                        output_block(outputs, schedule),
                        vector,
                    )

                for i in range(count // schedule.row_block):
                    block(row + i * schedule.row_block, schedule.row_block)
                for i in range(count % schedule.row_block):
                    block(row + count // schedule.row_block * schedule.row_block + i, 1)


@T.macro
def square_part(streams, parts, row, part, k, first, steps, output, d):
    """A `prepare` of `project_parts`: the sum of squares."""
    vector = T.meta_var(vector_width(d))
    lanes = T.alloc_buffer((1, vector), "float32", scope="local")
    for v in T.vectorized(vector):
        lanes[0, v] = T.float32(0)
    for j in range(steps):
        for v in T.vectorized(vector):
            lanes[0, v] = (
                lanes[0, v]
                + streams[row, k * d + (first + j) * vector + v] * streams[row, k * d + (first + j) * vector + v]
            )
    sum_lanes(lanes, 0, vector)
    parts[row, part, output] = lanes[0, 0]


@T.macro
def load_mixing(mixing, at, post, comb, row, k, m):
    """``mixing[at, :]`` = what new stream k is made with: the weight of the sublayer's output, then of each stream."""
    mixing[at, 0] = post[row, k]
    for j in T.unroll(m):
        mixing[at, j + 1] = comb[row, j * m + k]


@T.macro
def mix_vector(total, mixing, at, x, streams, row, step, m, d):
    """``total[:]`` = the `step`-th vector of the new stream that ``mixing[at]`` is for (mHC paper, section 4.2)."""
    vector = T.meta_var(vector_width(d))
    for v in T.vectorized(vector):
        total[v] = mixing[at, 0] * x[row, step * vector + v]
    for j in T.unroll(m):
        for v in T.vectorized(vector):
            total[v] = total[v] + mixing[at, j + 1] * streams[row, j * d + step * vector + v]


@T.macro
def each_row(body, rows, schedule):
    """``body(row)`` for every row, on all threads where that pays."""
    if rows <= schedule.serial_rows:
        for row in range(rows):
            body(row)
    else:
        for row in T.parallel(rows):
            body(row)


@T.macro
def normed_sums(logits, parts, row, outputs, m, d, eps, schedule):
    """``logits[:outputs]`` = the products of `project_parts` as if the streams had been RMS-normed first."""
    for o in range(outputs + 1):
        logits[o] = T.float32(0)
    for part in range(T.int64(part_count(m, d, schedule))):
        for o in range(outputs + 1):
            logits[o] = logits[o] + parts[row, part, o]
    logits[outputs] = T.float32(1) / T.sqrt(logits[outputs] / T.float32(m * d) + T.float32(eps))
    for o in range(outputs):
        logits[o] = logits[o] * logits[outputs]


@T.macro
def normalise(comb, sums, m, outer, inner, eps):
    """Divide every ``comb[a * outer + b * inner]`` by its sum over b, plus `eps`."""
    for a in T.unroll(m):
        sums[a] = T.float32(0)
        for b in T.unroll(m):
            sums[a] = sums[a] + comb[a * outer + b * inner]
    for a in T.unroll(m):
        for b in T.unroll(m):
            comb[a * outer + b * inner] = comb[a * outer + b * inner] / (sums[a] + T.float32(eps))


@T.macro
def sinkhorn(comb, m, iterations, eps):
    """Softmax of the rows of logits `comb`, then Sinkhorn-Knopp: columns, then `iterations` - 1 times rows, columns."""
    sums = T.alloc_buffer((m,), "float32", scope="local")
    for j in T.unroll(m):
        sums[j] = comb[j * m]
        for k in T.unroll(m):
            sums[j] = T.max(sums[j], comb[j * m + k])
        for k in T.unroll(m):
            comb[j * m + k] = exp(comb[j * m + k] - sums[j])
        sums[j] = T.float32(0)
        for k in T.unroll(m):
            sums[j] = sums[j] + comb[j * m + k]
        for k in T.unroll(m):
            comb[j * m + k] = comb[j * m + k] / sums[j] + T.float32(eps)
    normalise(comb, sums, m, 1, m, eps)
    for _ in range(iterations - 1):
        normalise(comb, sums, m, m, 1, eps)
        normalise(comb, sums, m, 1, m, eps)


@T.macro
def sublayer_weights(pre, post, comb, parts, base, scale, row, m, d, iterations, hc_eps, norm_eps, schedule):
    """A token's weights of one sublayer, from `parts`: local ``pre[:m]``, ``post[row, :m]``, ``comb[row, :m * m]``."""
    outputs = T.meta_var((2 + m) * m)
    logits = T.alloc_buffer((outputs + 1,), "float32", scope="local")
    mix = T.alloc_buffer((m * m,), "float32", scope="local")
    normed_sums(logits, parts, row, outputs, m, d, norm_eps, schedule)
    for i in T.unroll(m):
        pre[i] = sigmoid(logits[i] * scale[0] + base[i]) + T.float32(hc_eps)
        post[row, i] = T.float32(2) * sigmoid(logits[m + i] * scale[1] + base[m + i])
    for i in T.unroll(m * m):
        mix[i] = logits[2 * m + i] * scale[2] + base[2 * m + i]
    sinkhorn(mix, m, iterations, hc_eps)
    for i in T.unroll(m * m):
        comb[row, i] = mix[i]


@T.macro
def collapse(collapsed, streams, pre, row, m, d):
    """``collapsed[row]`` = sum_i ``pre[i] * streams[row, i]``."""
    vector = T.meta_var(vector_width(d))
    total = T.alloc_buffer((vector,), "float32", scope="local")
    for step in range(T.int64(d // vector)):
        for v in T.vectorized(vector):
            total[v] = T.float32(0)
        for i in T.unroll(m):
            for v in T.vectorized(vector):
                total[v] = total[v] + pre[i] * streams[row, i * d + step * vector + v]
        for v in T.vectorized(vector):
            collapsed[row, step * vector + v] = total[v]
