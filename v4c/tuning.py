"""Tuning a model's kernels for a machine or device: which kernels there are, and the file that keeps what was found."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4c.errors import OutputError, UnsupportedError
from v4c.progress import Progress
from v4c.runtime.whole_file import write_json

if TYPE_CHECKING:
    from v4c.targets.ascend.tile_database import TileDatabase
    from v4c.targets.schedule_search import Bench
    from v4c.targets.scheduler import Tunable
    from v4c.targets.tuning_database import Record, TuningDatabase


def tune(
    source: Any,
    path: str | os.PathLike[str],
    *,
    target: str = "cpu",
    dtype: str = "f32",
    quant: str = "none",
    activations: str = "f32",
    trials: int = 40,
    time_limit: float = 60.0,
    threads: int | None = None,
    ops: Collection[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Search the schedules of a model's kernels, for `v4c.compile(..., tuning=path)`.

    Kernels that the database has a finished record of for this machine are skipped, others continued. For an Ascend
    device, tiles of products are chosen by estimate out of those that its compiler takes; nothing is timed.

    Args:
        source: checkpoint folder, ``.onnx`` file written by `v4c.export`, or a `ModelConfig`; weights are not read.
        path: the database; it is created, or added to after every trial.
        target: ``cpu``, ``cpu:LEVEL``, ``cuda``, ``cuda:ARCH``, ``ascend`` or ``ascend:DEVICE``.
        dtype, quant, activations: storage of the weight matrices and rounding of rows, as for `v4c.compile`.
        trials: candidates per kernel.
        time_limit: seconds that one candidate may take, compilation included; one that crashes or takes longer counts
            as failed.
        threads: threads per kernel; default as for `v4c.load`. CPU only.
        ops: kernels to tune by name, such as ``merged_linear``; default all. Not for Ascend devices.
        progress: called with (what, trials done, trials).

    Returns:
        ``database``, ``machine`` and ``kernels``: a list of ``op``, ``shape``, ``dtype``, ``level``, ``default_us`` and
        ``tuned_us`` (microseconds by row count), ``gain``, ``parameters`` (None: the default is kept), ``trials`` and
        ``failed`` (their numbers). For Ascend as `targets.ascend.tune.tune_file` has it.

    Raises:
        v4c.Error: bad input, a damaged database, a target that this machine cannot run, or Optuna missing.
    """
    from v4c.runtime.library import choose_threads
    from v4c.targets.schedule_search import Search
    from v4c.targets.schedule_search import tune as search
    from v4c.targets.tune_process import Worker
    from v4c.targets.tuning_database import TuningDatabase

    file = Path(path)
    check_destination(file)
    if target.partition(":")[0] == "ascend":
        from v4c.targets.ascend.tune import tune_file

        asked = [f"op {op}" for op in sorted(ops)[:1]]
        asked += [f"quant {quant}"] * (quant != "none") + [f"activations {activations}"] * (activations != "f32")
        if asked:
            raise UnsupportedError(f"target {target}: expected all products, not quantised, found {asked[0]}")
        return tune_file(source, file, target.partition(":")[2], dtype, trials, progress)
    choose_threads(threads)
    threads = threads or int(os.environ["TVM_NUM_THREADS"])
    database = read_database(file) if file.exists() else TuningDatabase()
    bench = _bench(target, threads)
    kernels = model_kernels(source, target, dtype, quant, progress, activations)
    names = sorted({k.key.op for k in kernels})
    for op in ops:
        if op not in names:
            raise UnsupportedError(f"op {op!r}: expected a kernel of this model: {', '.join(names)}")
    chosen = [k for k in kernels if not ops or k.key.op in ops]
    with Worker(threads, time_limit, bench.command) as worker:
        how = Search(trials, bench.level, bench.machine)
        records = search(chosen, database, worker, how, lambda: write_database(database, file), progress)
    write_database(database, file)
    return {"database": str(file), "machine": vars(bench.machine), "kernels": [_row(r) for r in records]}


def _bench(target: str, threads: int) -> Bench:
    """What kernels of a measured target are timed on."""
    from v4c import targets
    from v4c.targets.cpu import tune as cpu
    from v4c.targets.cpu.target import CPUTarget
    from v4c.targets.cuda import tune as cuda
    from v4c.targets.cuda.target import CUDATarget

    device = targets.find(target)
    if isinstance(device, CPUTarget):
        return cpu.bench(device, threads)
    if isinstance(device, CUDATarget):
        return cuda.bench(device)
    raise UnsupportedError(f"target {target!r}: expected cpu[:LEVEL], cuda[:ARCH] or ascend[:DEVICE]")


def read_database(path: Path) -> TuningDatabase:
    """A tuning database from its file.

    Raises:
        TuningError: it is missing, damaged or of another version.
    """
    from v4c.frontend.strict_json import read_object
    from v4c.targets.tuning_database import TuningDatabase, TuningError

    return TuningDatabase.from_document(read_object(path, TuningError), str(path))


def read_tuning(path: Path, target: str) -> TuningDatabase | TileDatabase:
    """What was found for the kind of target that `target` names; errors as of `read_database`."""
    if target.partition(":")[0] != "ascend":
        return read_database(path)
    from v4c.targets.ascend.tile_database import TileDatabase

    return TileDatabase.read(path)


def write_database(database: TuningDatabase, path: Path) -> None:
    """Write a tuning database: a reader sees the old one or the new one."""
    write_json(path, database.document())


def check_destination(path: Path) -> None:
    """Refuse, before any work is done, a destination that is a folder or in no folder."""
    if path.is_dir():
        raise OutputError(f"{path}: expected a file name, found a folder")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path}: expected an existing folder {path.parent}, found none")


def model_kernels(
    source: Any,
    target: str,
    dtype: str = "f32",
    quant: str = "none",
    progress: Progress | None = None,
    activations: str = "f32",
) -> list[Tunable]:
    """The kernels with a schedule that compiling `source` for a measured target would build; arguments of `tune`."""
    from v4c import targets
    from v4c.api import open_source
    from v4c.compiler import graph, lower, settings, storage_of
    from v4c.passes.pipeline import PassOptions

    device: Any = targets.find(target)
    disabled, storage = settings(device, (), storage_of(dtype, quant, activations=activations))
    options = PassOptions.checked(disabled)
    model, _ = graph(open_source(source, weights=False), options, storage, progress)
    if progress:
        progress("collect kernels", 0, 0)
    lower(model, device, storage, options)
    return list(device.kernels.scheduler.tunable.values())


def _row(record: Record) -> dict[str, Any]:
    known = record.document()
    keys = ("op", "shape", "dtype", "level", "default_us", "tuned_us", "parameters")
    return {
        **{key: known[key] for key in keys},
        "gain": record.gain,
        "trials": len(record.trials),
        "failed": sum(t.failed is not None for t in record.trials),
    }
