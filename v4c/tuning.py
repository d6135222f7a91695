"""Tuning a model's kernels for a machine or device: which kernels there are, and the file that keeps what was found."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4c.errors import OutputError, UnsupportedError
from v4c.progress import Progress

if TYPE_CHECKING:
    from v4c.targets.ascend.tile_database import TileDatabase
    from v4c.targets.cpu.scheduling import Tunable
    from v4c.targets.cpu.target import CPUTarget
    from v4c.targets.cpu.tuning_database import Record, TuningDatabase


def tune(
    source: Any,
    path: str | os.PathLike[str],
    *,
    target: str = "cpu",
    dtype: str = "f32",
    quant: str = "none",
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
        target: ``cpu``, ``cpu:LEVEL``, ``ascend`` or ``ascend:DEVICE``.
        dtype, quant: storage of the weight matrices, as for `v4c.compile`.
        trials: candidates per kernel.
        time_limit: seconds that one candidate may take, compilation included; one that crashes or takes longer counts
            as failed.
        threads: threads per kernel; default as for `v4c.load`. CPU only, as is `time_limit`.
        ops: kernels to tune by name, such as ``merged_linear``; default all. CPU only.
        progress: called with (what, trials done, trials).

    Returns:
        ``database``, ``machine`` and ``kernels``: a list of ``op``, ``shape``, ``dtype``, ``level``, ``default_us`` and
        ``tuned_us`` (microseconds by row count), ``gain``, ``parameters`` (None: the default is kept), ``trials`` and
        ``failed`` (their numbers). For Ascend as `targets.ascend.tune.tune_file` has it.

    Raises:
        v4c.Error: bad input, a damaged database, a target that this machine cannot run, or Optuna missing.
    """
    from v4c.runtime.library import choose_threads
    from v4c.targets.cpu.levels import machine_features
    from v4c.targets.cpu.tune import Search
    from v4c.targets.cpu.tune import tune as search
    from v4c.targets.cpu.tune_process import Worker
    from v4c.targets.cpu.tuning_database import Machine, TuningDatabase

    file = Path(path)
    check_destination(file)
    if target.partition(":")[0] == "ascend":
        from v4c.targets.ascend.tune import tune_file

        if ops or quant != "none":
            found = f"op {min(ops)}" if ops else f"quant {quant}"
            raise UnsupportedError(f"target {target}: expected all products, not quantised, found {found}")
        return tune_file(source, file, target.partition(":")[2], dtype, trials, progress)
    choose_threads(threads)
    database = read_database(file) if file.exists() else TuningDatabase()
    device, kernels = model_kernels(source, target, dtype, quant, progress)
    missing = set(device.features) - machine_features()
    if missing:
        raise UnsupportedError(f"target {device.name}: expected a processor with {min(missing)}, found one without")
    names = sorted({k.key.op for k in kernels})
    for op in ops:
        if op not in names:
            raise UnsupportedError(f"op {op!r}: expected a kernel of this model: {', '.join(names)}")
    chosen = [k for k in kernels if not ops or k.key.op in ops]
    machine = Machine.this(threads or int(os.environ["TVM_NUM_THREADS"]))
    with Worker(machine.threads, time_limit) as worker:
        how = Search(trials, device.level, machine)
        records = search(chosen, database, worker, how, lambda: write_database(database, file), progress)
    write_database(database, file)
    return {"database": str(file), "machine": vars(machine), "kernels": [_row(r) for r in records]}


def read_database(path: Path) -> TuningDatabase:
    """A tuning database from its file.

    Raises:
        TuningError: it is missing, damaged or of another version.
    """
    from v4c.frontend.strict_json import read_object
    from v4c.targets.cpu.tuning_database import TuningDatabase, TuningError

    return TuningDatabase.from_document(read_object(path, TuningError), str(path))


def read_tuning(path: Path, target: str) -> TuningDatabase | TileDatabase:
    """What was found for the kind of target that `target` names; errors as of `read_database`."""
    if target.partition(":")[0] != "ascend":
        return read_database(path)
    from v4c.targets.ascend.tile_database import TileDatabase

    return TileDatabase.read(path)


def write_database(database: TuningDatabase, path: Path) -> None:
    """Write a tuning database beside its place and rename it: a reader sees the old one or the new one."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        beside.write_text(json.dumps(database.document(), indent=1, allow_nan=False) + "\n")
        os.replace(beside, path)
    except OSError as error:
        raise OutputError(f"{path}: expected to write it, found {error.strerror}") from error
    finally:
        beside.unlink(missing_ok=True)


def check_destination(path: Path) -> None:
    """Refuse, before any work is done, a destination that is a folder or in no folder."""
    if path.is_dir():
        raise OutputError(f"{path}: expected a file name, found a folder")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path}: expected an existing folder {path.parent}, found none")


def model_kernels(
    source: Any, target: str, dtype: str = "f32", quant: str = "none", progress: Progress | None = None
) -> tuple[CPUTarget, list[Tunable]]:
    """The CPU target, and the kernels with a schedule that compiling `source` would build; arguments as of `tune`."""
    from v4c import targets
    from v4c.api import open_source
    from v4c.compiler import graph, lower, storage_of
    from v4c.passes.pipeline import PassOptions
    from v4c.targets.cpu.target import CPUTarget

    device = targets.find(target)
    if not isinstance(device, CPUTarget):
        raise UnsupportedError(f"target {target!r}: expected cpu or cpu:LEVEL")
    options, storage = PassOptions.checked(()), storage_of(dtype, quant)
    model, _ = graph(open_source(source, weights=False), options, storage, progress)
    if progress:
        progress("collect kernels", 0, 0)
    lower(model, device, storage, options)
    return device, list(device.kernels.scheduler.tunable.values())


def _row(record: Record) -> dict[str, Any]:
    known = record.document()
    keys = ("op", "shape", "dtype", "level", "default_us", "tuned_us", "parameters")
    return {
        **{key: known[key] for key in keys},
        "gain": record.gain,
        "trials": len(record.trials),
        "failed": sum(t.failed is not None for t in record.trials),
    }
