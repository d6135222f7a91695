"""Which file of a checkpoint folder holds which tensor: the single file, or the shards that the index names.

The index comes from outside: it may name no file beyond the folder, and each tensor must stand in the shard it says.
"""

from __future__ import annotations

from pathlib import Path

from v4c.errors import CheckpointError

from .safetensors_reader import StoredTensor, read_header
from .strict_json import read_object, show

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the folder by the file's names. The single file wins over an index, as in transformers.

    Raises:
        CheckpointError: a file that is missing, damaged or outside the folder; a tensor not where the index says.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists():
        return read_header(_inside(folder, SINGLE_FILE, str(single)))
    if not index.exists():
        raise CheckpointError(f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither")
    weight_map = read_object(index, CheckpointError).get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise CheckpointError(
            f"{index}: weight_map: expected an object of tensor and file names, found {show(weight_map)}"
        )
    shards: dict[str, dict[str, StoredTensor]] = {}
    for name, file in weight_map.items():
        if type(file) is not str or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name}: expected the name of a .safetensors file, found {show(file)}")
        if file not in shards:
            shards[file] = read_header(_inside(folder, file, f"{index}: {name}"))
    for name, file in weight_map.items():
        if name not in shards[file]:
            others = [other for other, tensors in shards.items() if name in tensors]
            found = f"it in {others[0]}" if others else "it nowhere"
            raise CheckpointError(f"{index}: {name}: expected in {file}, found {found}")
    return {name: shards[file][name] for name, file in weight_map.items()}


def _inside(folder: Path, file: str, source: str) -> Path:
    """The path of `file`, which must be a file in `folder` even after following links.

    Hugging Face's download cache is the one exception: its snapshots are links into ``blobs`` two folders up.
    """
    path = folder / file
    try:
        resolved, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as failure:  # a loop of links; a null byte
        raise CheckpointError(
            f"{source}: expected a file in the checkpoint folder, found {show(file)}: {failure}"
        ) from None
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    if Path(file).is_absolute() or ".." in Path(file).parts or not any(resolved.is_relative_to(top) for top in roots):
        raise CheckpointError(f"{source}: expected a file in the checkpoint folder, found {show(file)} outside it")
    if not resolved.is_file():
        raise CheckpointError(f"{source}: expected the file {path}, found none")
    return path
