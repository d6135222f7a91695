"""Schedules: the numbers by which the CPU kernels cut their work, one frozen class per family of kernels.

What a result is does not depend on them beyond the order of float32 sums; how fast it is made does. Defaults follow
the x86-64 level, because a level has a number of registers: a vector of `VECTOR` floats is one of 32 with AVX-512, two
of 16 with AVX2, and four of 16 with SSE. The tuner (`tune`) searches among the choices that each number names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from ..schedule import Schedule, knob
from .levels import psabi
from .stack import STACK_BYTES

VECTOR_BYTES = 64
BUFFER_VECTORS = STACK_BYTES // VECTOR_BYTES
"""Vectors that one buffer of sums may have. With one more it is too large for the stack (`stack`), and LLVM writes
every sum back to memory after every multiply-add, which is three times slower."""

PANEL_VECTORS = 2
"""Vectors per row of a packed panel (`kernels.packing`)."""


@dataclass(frozen=True)
class LeveledSchedule(Schedule):
    """A schedule whose defaults depend on the x86-64 level."""

    @classmethod
    def of(cls, level: str) -> Self:
        """The default for an x86-64 level, by its name (`levels.LEVELS`), or for ``generic``."""
        return cls(**cls.by_level(psabi(level)))

    @classmethod
    def by_level(cls, level: str) -> dict[str, int]:
        """What differs from the defaults of the class, which are those with AVX-512."""
        return {}


@dataclass(frozen=True)
class PanelSchedule(LeveledSchedule):
    """Register blocks of products with packed panels (`kernels.panel_product`, `kernels.quant_product`).

    Attributes:
        row_block: rows that are multiplied with a panel at once; what remains is done in blocks of 4, 2 and 1.
        accumulators: vectors of float32 sums that stay in registers.
        chains: sums of each output for a single row, which cover the latency of the multiply-add; a power of two.
    """

    row_block: int = knob(7, 1, 2, 3, 4, 5, 6, 7)
    accumulators: int = knob(15, 3, 4, 6, 8, 15)
    chains: int = knob(4, 1, 2, 4)

    @classmethod
    def by_level(cls, level: str) -> dict[str, int]:
        if level == "x86-64-v4":
            return {}
        return {"row_block": 6, "accumulators": 6} if level == "x86-64-v3" else {"row_block": 2, "accumulators": 3}

    def problem(self) -> str | None:
        most = BUFFER_VECTORS // PANEL_VECTORS
        if self.row_block > most:
            return f"row_block: expected at most {most}, found {self.row_block}"
        if self.accumulators > BUFFER_VECTORS:
            return f"accumulators: expected at most {BUFFER_VECTORS}, found {self.accumulators}"
        if self.chains & (self.chains - 1):
            return f"chains: expected a power of two, found {self.chains}"
        return None

    def columns(self, rows: int) -> int:
        """Vectors of a panel that are taken at once for a block of `rows` rows: all of them if the sums find room."""
        sums = rows * (self._chains() if rows == 2 else 1)
        return PANEL_VECTORS if sums * PANEL_VECTORS <= self.accumulators else 1

    def partial_sums(self, rows: int, k: int) -> int:
        """Partial sums of each output for a block of `rows` rows: as many as help and find room, a divisor of `k`.

        Two rows have as many as one, so that both are summed in the same order: a token and a guess of the next one,
        read together, give the same bits as one after the other (speculative decoding).
        """
        return min(self._chains() if rows <= 2 else 1, k & -k)

    def _chains(self) -> int:
        """Partial sums for a single row: a power of two, for which there is room with all vectors at once."""
        room = max(1, min(self.chains, self.accumulators // PANEL_VECTORS))
        return 1 << (room.bit_length() - 1)


@dataclass(frozen=True)
class ProductSchedule(PanelSchedule):
    """Projections with packed weights: dense, merged, grouped, and the router's.

    Attributes:
        block_bytes: bytes of a panel, as float32, per block of the reduction: they stay in a core's L2 cache while
            blocks of rows pass over them. A power of two.
        rows_per_task: rows that share one reading of a panel.
    """

    block_bytes: int = knob(1 << 17, 1 << 14, 1 << 15, 1 << 16, 1 << 17, 1 << 18, 1 << 19)
    rows_per_task: int = knob(256, 8, 16, 32, 64, 128, 256)

    def problem(self) -> str | None:
        if self.block_bytes < 4096 or self.block_bytes & (self.block_bytes - 1):
            # A group of quantised weights is about 1 KiB; partial sums share out the inputs of a block evenly.
            return f"block_bytes: expected a power of two of at least 4096, found {self.block_bytes}"
        return super().problem()

    def for_shape(self, panels: int, k: int) -> ProductSchedule:
        """The same with the default `rows_per_task` of a product with `panels` panels of outputs and `k` inputs."""
        if panels < NARROW_PANELS:
            return replace(self, rows_per_task=NARROW_ROWS)
        whole_blocks = INPUTS_PER_TASK // k // self.row_block * self.row_block
        return replace(self, rows_per_task=max(NARROW_ROWS, min(ROWS_PER_TASK, whole_blocks)))


ROWS_PER_TASK = 256
INPUTS_PER_TASK = 1 << 20
"""Most rows of a task by default, and the elements of `x` they may have: all threads' `x` must stay in L3."""

NARROW_PANELS = 16
NARROW_ROWS = 32
"""Outputs of fewer panels than these are by default shared out among the threads by rows as well, and no task has fewer
rows."""


@dataclass(frozen=True)
class ExpertSchedule(PanelSchedule):
    """Routed and shared experts."""


@dataclass(frozen=True)
class UnpackedSchedule(LeveledSchedule):
    """Products with weights that lie as the checkpoint has them.

    Attributes:
        outputs: dot products at a time, each a vector of sums.
    """

    outputs: int = knob(4, 1, 2, 4, 8)

    @classmethod
    def by_level(cls, level: str) -> dict[str, int]:
        return {} if level in ("x86-64-v3", "x86-64-v4") else {"outputs": 2}

    def problem(self) -> str | None:
        return None if self.outputs <= BUFFER_VECTORS else f"outputs: expected at most {BUFFER_VECTORS}"


@dataclass(frozen=True)
class AttentionSchedule(LeveledSchedule):
    """The three kernels of attention.

    Attributes:
        row_tile: rows whose scores are accumulated at once, a vector of heads each.
        panel_tiles: such tiles in a panel of rows: five of 13 are 130 KiB at the published width of 512, and a window
            of 128 rows is two panels.
        head_tile: heads of a tile of the weighted sum,
        column_vectors: times its column vectors; powers of two. Four times four are 16 accumulators for 8 loads.
        shares: parts that the rows of a token are cut into, where tokens are too few to feed the threads; each has one
            set of outputs, which merging reads.
        enough_tokens: from here on tokens feed the threads. At least 3: a token and a guess of the next one, read
            together, are then summed as a token alone is (speculative decoding).
    """

    row_tile: int = knob(13, 2, 4, 6, 8, 13, 15)
    panel_tiles: int = knob(5, 2, 3, 5, 8, 11)
    head_tile: int = knob(4, 1, 2, 4, 8)
    column_vectors: int = knob(4, 1, 2, 4)
    shares: int = knob(4, 1, 2, 4, 8)
    enough_tokens: int = knob(8, 4, 8, 16)

    @classmethod
    def by_level(cls, level: str) -> dict[str, int]:
        if level == "x86-64-v4":
            return {}
        if level == "x86-64-v3":
            return {"row_tile": 6, "panel_tiles": 11, "head_tile": 2, "column_vectors": 2}
        return {"row_tile": 2, "panel_tiles": 32, "head_tile": 2, "column_vectors": 1}

    def problem(self) -> str | None:
        if self.row_tile > BUFFER_VECTORS:
            return f"row_tile: expected at most {BUFFER_VECTORS}, found {self.row_tile}"
        if self.enough_tokens < 3:
            return f"enough_tokens: expected at least 3, found {self.enough_tokens}"
        for name in ("head_tile", "column_vectors"):
            value = getattr(self, name)
            if value > 8 or value & (value - 1):
                return f"{name}: expected 1, 2, 4 or 8, found {value}"
        return None


@dataclass(frozen=True)
class IndexSchedule(LeveledSchedule):
    """The lightning indexer.

    Attributes:
        accumulators: vectors of dot products that stay in registers.
        head_vectors: vectors of heads in a group, at most; the rows scored at once are as many as then find room.
        items: work items to make from few tokens: enough for the threads of a desktop, few enough to merge quickly.
        range_rows: rows below which a range is not worth another transposition of the queries.
    """

    accumulators: int = knob(15, 2, 3, 4, 6, 8, 12, 15)
    head_vectors: int = knob(4, 1, 2, 4)
    items: int = knob(16, 4, 8, 16, 32)
    range_rows: int = knob(512, 128, 256, 512, 1024)

    @classmethod
    def by_level(cls, level: str) -> dict[str, int]:
        if level == "x86-64-v4":
            return {}
        if level == "x86-64-v3":
            return {"accumulators": 6, "head_vectors": 2}
        return {"accumulators": 2, "head_vectors": 1}

    def problem(self) -> str | None:
        if not self.head_vectors <= self.accumulators <= BUFFER_VECTORS:
            return f"accumulators: expected head_vectors to {BUFFER_VECTORS}, found {self.accumulators}"
        return None


@dataclass(frozen=True)
class MHCSchedule(LeveledSchedule):
    """Hyper-connections.

    Attributes:
        part_vectors: vectors of one stream per part: with six rows of `fn` and four tokens, 64 are 40 KiB, which stays
            in L1. It must be one run of addresses, for streams lie a power of two apart, so in the same cache sets.
        rows_per_task: tokens that share one reading of a part of `fn`: mixing four streams, 16 touch 576 KiB, which
            stays in L2.
        min_tasks: with fewer tasks than these, a task is cut into one for each stream, so that no thread is idle.
        row_block: tokens per register block.
        output_block: rows of `fn` per register block at most. All 24 at once would thrash: they lie a power of two
            apart, so in the same cache sets. Six fit an L1 of 12 ways.
        serial_rows: up to so many tokens, what is left to do per token takes as long as to launch threads for it.
    """

    part_vectors: int = knob(64, 16, 32, 64, 128)
    rows_per_task: int = knob(16, 4, 8, 16, 32)
    min_tasks: int = knob(4, 1, 2, 4, 8, 16)
    row_block: int = knob(2, 1, 2, 3, 4)
    output_block: int = knob(6, 2, 3, 4, 6, 8, 12)
    serial_rows: int = knob(2, 1, 2, 4, 8)

    @classmethod
    def by_level(cls, level: str) -> dict[str, int]:
        if level == "x86-64-v4":
            return {}
        return {"output_block": 3} if level == "x86-64-v3" else {"row_block": 1, "output_block": 3}

    def problem(self) -> str | None:
        if self.row_block * self.output_block > BUFFER_VECTORS:
            return (
                f"row_block * output_block: expected at most {BUFFER_VECTORS}, "
                f"found {self.row_block} * {self.output_block}"
            )
        return None
