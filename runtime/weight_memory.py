"""Bounds what mapped weights occupy in memory: experts stay on disk, and the ones used last are kept.

Weights are mapped from their files, so any page may be dropped at any time and comes back when it is touched; what is
kept is only a matter of speed. Before a kernel reads experts, its indices are known: experts that are not held are
asked for, after the least recently used ones were dropped to make room. Hash-routed layers choose by token id alone, so
their experts are asked for when a step begins, as are the rows of Engram tables once their addresses are worked out.
"""

from __future__ import annotations

import mmap
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from v4c.errors import InputError
from v4c.runtime.dtypes import DTYPES
from v4c.runtime.manifest import Manifest, StoredWeight

_AROUND = 2 << 20
"""A page fault may map its neighbours too, up to the ends of an aligned block of this size: Linux maps what the page
cache holds in one piece as a whole, and such pieces are no larger."""

_PAGE = mmap.PAGESIZE
_STACKS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_ENGRAM_TABLE = "engram.embedding.weight"
_TABLES = ("embed_tokens.weight", _ENGRAM_TABLE)
_EXPERT_OPS = ("GroupedExperts", "MixtureOfExperts")
_INDICES, _GATE_UP = 2, 3
"""Places of the experts chosen and of the stack of gate and up projections among the arguments of `_EXPERT_OPS`."""
_HASH_OP = "EngramHash"
Maps = Mapping[str, mmap.mmap]
"""Mapped files by name."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_bytes(value: int | str, name: str) -> int:
    """A positive number of bytes, from an integer or from text such as ``4GiB``, ``512MiB`` or ``2.5 GB``.

    Raises:
        InputError: it is neither; the message begins with `name`.
    """
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,6})?)\s*([A-Za-z]*)\s*", str(value))
    unit = _UNITS.get(found[2].upper()) if found else None
    count = int(float(found[1]) * unit) if found and unit else 0
    if isinstance(value, bool) or count < 1:
        raise InputError(f"{name}: expected a size such as 4GiB, found {value!r}")
    return count


@dataclass
class WeightTraffic:
    """What the bound has cost so far.

    Attributes:
        uses: experts that kernels were about to read, counted once per call.
        hits: those that were held, or had been asked for ahead.
        prefetched: experts asked for when a step began.
        rows_prefetched: rows of Engram tables asked for ahead.
        bytes_read: bytes of the experts that were asked for.
    """

    uses: int = 0
    hits: int = 0
    prefetched: int = 0
    rows_prefetched: int = 0
    bytes_read: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of uses that were hits; 1 before there were any."""
        return self.hits / self.uses if self.uses else 1.0


@dataclass(frozen=True)
class _Range:
    """Bytes of a mapped file."""

    mapped: mmap.mmap
    start: int
    nbytes: int

    def part(self, start: int, nbytes: int) -> _Range:
        return _Range(self.mapped, self.start + start, nbytes)

    def advise(self, advice: int, around: int) -> None:
        """Advise the kernel on the pages, and those up to multiples of `around`."""
        first = self.start // around * around
        last = min(-(-(self.start + self.nbytes) // around) * around, len(self.mapped))
        self.mapped.madvise(advice, first, last - first)

    def want(self) -> None:
        """Ask for the pages; they come while the caller goes on."""
        self.advise(mmap.MADV_WILLNEED, _PAGE)

    def drop(self) -> None:
        """Let the pages go, and what was mapped with them."""
        self.advise(mmap.MADV_DONTNEED, _AROUND)

    @property
    def charge(self) -> int:
        """Bytes that the pages may occupy, neighbours included."""
        return self.nbytes + 2 * _AROUND


@dataclass
class _Layer:
    """The stacks of routed experts of a layer.

    Attributes:
        experts: how many there are.
        stacks: gate and up, and down projections.
        by_token: experts by token id, of a hash-routed layer.
    """

    experts: int = 0
    stacks: list[_Range] = field(default_factory=list)
    by_token: np.ndarray | None = None

    def expert(self, index: int) -> list[_Range]:
        """Where an expert lies."""
        return [s.part(index * (s.nbytes // self.experts), s.nbytes // self.experts) for s in self.stacks]

    @property
    def nbytes(self) -> int:
        """Of one expert."""
        return sum(s.nbytes // self.experts for s in self.stacks)

    @property
    def charge(self) -> int:
        """Bytes that one expert may occupy."""
        return sum(r.charge for r in self.expert(0))


class WeightMemory:
    """The bound for the weights of one model; its sessions take turns.

    Attributes:
        limit: bytes that mapped weights may occupy.
        traffic: what it has cost.

    Raises:
        InputError: the limit is too small for what is always held and the experts of one token.
    """

    def __init__(self, manifest: Manifest, folder: Path, maps: Maps, arrays: Sequence[np.ndarray], limit: int) -> None:
        self.limit = limit
        self.traffic = WeightTraffic()
        self._lock = threading.RLock()
        self._held: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._files = [folder / name for name in maps]
        self._layers: dict[str, _Layer] = {}
        self._by_address: dict[int, str] = {}
        self._tables: list[tuple[_Range, int]] = []
        self._engram: list[_Range] = []
        self._engram_row_bytes: list[int] = []
        self._top_k = int(manifest.config["num_experts_per_tok"])
        self._table_tokens = 0
        self._hashes = 0
        kernels = manifest.build.get("kernels", {})
        self._ops = {name: row[0] for name, row in kernels.items() if row[0] in (*_EXPERT_OPS, _HASH_OP)}
        self._dense: list[np.ndarray] = []
        for weight, array in zip(manifest.weights, arrays, strict=True):
            self._place(manifest, weight, maps, array)
        dense = sum(array.nbytes for array in self._dense) + _AROUND
        self._baseline = _mapped_bytes()
        for layer in self._layers.values():
            assert len(layer.stacks) == len(_STACKS)
        largest = max((layer.charge for layer in self._layers.values()), default=0)
        self._table_bytes = max(limit // 32, self._tables_touched(1))
        self._experts_from_start = limit - dense - self._table_bytes
        if self._experts_from_start < self._top_k * largest:
            least = (dense + self._top_k * largest + self._tables_touched(1)) * 32 // 31 + 1
            raise InputError(
                f"weights_memory: expected at least {least} bytes, for {dense} that are always held and {self._top_k} "
                f"experts, found {limit}"
            )
        self.tokens_per_call = self._most_tokens(largest)

    def _place(self, manifest: Manifest, weight: StoredWeight, maps: Maps, array: np.ndarray) -> None:
        """Note where a weight lies."""
        assert weight.file is not None
        nbytes = prod(weight.shape) * DTYPES[weight.dtype].storage.itemsize
        place = _Range(maps[weight.file], weight.offset, nbytes)
        if weight.name.endswith(_STACKS):
            name = weight.name.rpartition(".mlp.experts.")[0]
            layer = self._layers.setdefault(name, _Layer())
            layer.experts = weight.shape[0]
            if weight.name.endswith(_STACKS[0]):
                self._by_address[array.ctypes.data] = name
            layer.stacks.append(place)
        elif weight.name.endswith(_TABLES):
            rows = 1
            if weight.name.endswith(_ENGRAM_TABLE):
                engram = manifest.config["engram"]
                rows = engram["heads_per_ngram"] * (engram["max_ngram"] - 1)
                self._engram.append(place)
                self._engram_row_bytes.append(nbytes // weight.shape[0])
            self._tables.append((place, rows))
        else:
            self._dense.append(array)
            if weight.name.endswith("mlp.gate.tid2eid"):
                self._layers.setdefault(weight.name.removesuffix(".mlp.gate.tid2eid"), _Layer()).by_token = array

    def _tables_touched(self, tokens: int) -> int:
        """Bytes of tables that may come into memory with so many tokens."""
        return sum(min(place.charge, tokens * rows * 2 * _AROUND) for place, rows in self._tables)

    def _most_tokens(self, largest: int) -> int:
        """Tokens whose experts and rows have room at once."""
        experts = max((layer.experts for layer in self._layers.values()), default=0)
        room = self._experts_from_start // largest if largest else 0
        tokens = 1 << 30 if room >= experts else room // self._top_k
        while tokens > 1 and self._tables_touched(tokens) > self._table_bytes:
            tokens //= 2
        return tokens

    def check_batch(self, batch: int) -> None:
        """Refuse a batch of which not even single tokens have room.

        Raises:
            InputError: naming the largest batch.
        """
        if batch > self.tokens_per_call:
            raise InputError(
                f"batch: expected at most {self.tokens_per_call} rows within weights_memory, found {batch}"
            )

    @contextmanager
    def step(self, tokens: np.ndarray) -> Iterator[None]:
        """Around a call of the compiled functions with ``tokens [B, S]``."""
        with self._lock:
            self._hashes = 0
            self._table_tokens += tokens.size
            if self._tables_touched(self._table_tokens) > self._table_bytes:
                for place, _ in self._tables:
                    place.drop()
                self._table_tokens = tokens.size
            for array in self._dense:  # always held, so taken in at once: the rest is then what experts may take
                array.reshape(-1).view(np.uint8)[::_PAGE].max(initial=0)
            self._dense = []
            free = self._experts_from_start
            for name, layer in self._layers.items():
                if layer.by_token is not None:
                    chosen = np.unique(layer.by_token[tokens.reshape(-1)])
                    free -= len(chosen) * layer.charge
                    if free < 0:
                        break
                    self._hold(name, chosen, ahead=True)
            yield

    def observe(self, function: Any, name: str, before: bool, result: Any, *arguments: Any) -> None:
        """The callback for `Machine.observe`."""
        op = self._ops.get(name)
        if op is None:
            return
        if op == _HASH_OP:
            if not before:
                self._want_rows(np.from_dlpack(arguments[-1]))
        elif before:
            layer = self._by_address.get(arguments[_GATE_UP].data_ptr())
            if layer is not None:
                chosen = np.unique(np.from_dlpack(arguments[_INDICES]))
                self._hold(layer, chosen[(chosen >= 0) & (chosen < self._layers[layer].experts)], ahead=False)

    def _hold(self, name: str, chosen: Iterable[Any], ahead: bool) -> None:
        """Make room for experts of a layer and ask for those that are not held."""
        layer = self._layers[name]
        keys = [(name, int(expert)) for expert in chosen]
        missing = [key for key in keys if key not in self._held]
        if ahead:
            self.traffic.prefetched += len(missing)
        else:
            self.traffic.uses += len(keys)
            self.traffic.hits += len(keys) - len(missing)
        for key in keys:
            if key in self._held:
                self._held.move_to_end(key)
        # Whole experts that are missing, and the neighbours of any.
        room = len(missing) * layer.nbytes + len(keys) * (layer.charge - layer.nbytes)
        needed = frozenset(keys)
        while self._occupied() + room > self.limit - self._table_bytes and self._drop_oldest(needed):
            pass
        for key in missing:
            self._held[key] = None
            self.traffic.bytes_read += layer.nbytes
            for place in layer.expert(key[1]):
                place.want()

    def _occupied(self) -> int:
        """About what the weights occupy: mapped memory of the process without what it had before."""
        return _mapped_bytes() - self._baseline

    def _drop_oldest(self, needed: Collection[tuple[str, int]]) -> bool:
        """Let the expert go that was not used for longest; whether there was one."""
        key = next((key for key in self._held if key not in needed), None)
        if key is None:  # other files have been mapped meanwhile
            self._baseline = _mapped_bytes() - resident_bytes(self._files)
            return False
        for place in self._layers[key[0]].expert(key[1]):
            place.drop()
        del self._held[key]
        return True

    def _want_rows(self, addresses: np.ndarray) -> None:
        """Ask for rows of the next Engram table; hashes are worked out in the order of their layers."""
        table, row = self._engram[self._hashes], self._engram_row_bytes[self._hashes]
        self._hashes += 1
        rows = np.unique(addresses)
        self.traffic.rows_prefetched += len(rows)
        pages = np.unique((table.start + np.concatenate([rows * row, rows * row + row - 1])) // _PAGE)
        for first in np.split(pages, np.flatnonzero(np.diff(pages) > 1) + 1):
            table.mapped.madvise(mmap.MADV_WILLNEED, int(first[0]) * _PAGE, len(first) * _PAGE)


def _mapped_bytes() -> int:
    """Resident bytes of all files that this process has mapped, from counters of the kernel."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * _PAGE


def resident_bytes(files: Iterable[str | os.PathLike[str]]) -> int:
    """Bytes of mapped files that are in this process's memory, from ``/proc/self/smaps``."""
    names = {str(Path(file).resolve()) for file in files}
    total, counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):
            counted = line.split(maxsplit=5)[-1] in names
        elif counted and key == "Rss:":
            total += int(rest.split()[0]) << 10
    return total
