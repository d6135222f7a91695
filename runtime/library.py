"""The TVM runtime and a compiled library, without TVM's compiler: no `import tvm`, and no torch.

`libtvm_runtime.so` is taken out of the installed apache-tvm package by path; tvm_ffi does the calls. A `Program` is
one loaded library shared by all sessions of a model; each session gets a virtual machine of its own, because a virtual
machine must not run in two threads at once.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from v4c.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from v4c.runtime.devices import Device

_lock = threading.Lock()
_chosen: int | None = None
_loaded = False


def choose_threads(threads: int | None = None) -> None:
    """Fix the number of threads for this process, once; later calls change nothing.

    ``threads``, else ``V4C_NUM_THREADS``, else ``TVM_NUM_THREADS``, else the number of CPUs this process may run on.
    TVM keeps a pool of workers per calling thread, made at the first parallel kernel and never grown: whoever imports
    TVM's compiler calls this before.

    Raises:
        InputError: the number is no positive integer.
    """
    global _chosen
    if threads is not None:
        _positive("threads", threads)
    with _lock:
        if _chosen is not None:
            return
        sources = {"threads": threads, **{key: os.environ.get(key) for key in ("V4C_NUM_THREADS", "TVM_NUM_THREADS")}}
        given = next(((source, value) for source, value in sources.items() if value is not None), None)
        _chosen = len(os.sched_getaffinity(0)) if given is None else _positive(*given)
        os.environ["TVM_NUM_THREADS"] = str(_chosen)
        # Left alone, TVM pins the calling thread and its workers to the first cores, whatever the process may use.
        os.environ.setdefault("TVM_BIND_THREADS", "0")


def start_runtime(threads: int | None = None) -> int:
    """Load the TVM runtime, once per process, and return how many threads a kernel uses.

    Args:
        threads: see `choose_threads`; TVM uses no more than the machine has cores.

    Raises:
        InputError: ``threads`` is not what the process runs with.
        ArtifactError: apache-tvm is not installed.
    """
    global _loaded
    choose_threads(threads)
    with _lock:
        ffi = import_ffi()
        if not _loaded:
            _load_shared_library()
            _loaded = True
    running = int(ffi.get_global_func("runtime.NumThreads")())
    if threads is not None and threads != running:
        raise InputError(
            f"threads: expected {running}, which TVM runs with in this process, found {threads}: "
            "it is fixed by the first load, and at most the number of cores"
        )
    return running


def _positive(source: str, value: int | str) -> int:
    # str() first: int() alone would take 2.5 for 2, and True for 1
    count = int(value) if re.fullmatch(r"[0-9]{1,9}", str(value)) else 0
    if count < 1:
        raise InputError(f"{source}: expected a positive integer, found {value!r}")
    return count


class _WithoutTorch(importlib.abc.MetaPathFinder):
    """Hides torch from the imports of one thread: tvm_ffi would import it, a second of work for nothing."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "torch" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError("torch is not needed to run an artifact", name=fullname)


def import_ffi() -> ModuleType:
    """The module tvm_ffi, imported without torch unless torch is there already."""
    if "tvm_ffi" in sys.modules or "torch" in sys.modules:
        return importlib.import_module("tvm_ffi")
    finder = _WithoutTorch()
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module("tvm_ffi")
    finally:
        sys.meta_path.remove(finder)


def installed_tvm_version() -> str | None:
    """Version of the installed apache-tvm, or None when it is present without its metadata."""
    try:
        return importlib.metadata.version("apache-tvm")
    except importlib.metadata.PackageNotFoundError:
        return None


def _load_shared_library() -> None:
    spec = importlib.util.find_spec("tvm")  # finds the folder; importing it would load the compiler
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    for folder in folders:
        library = Path(folder) / "lib" / "libtvm_runtime.so"
        if library.exists():
            # Global, because compiled libraries and tvm_ffi look its symbols up.
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return
    raise ArtifactError("libtvm_runtime.so: expected in the installed apache-tvm package, found none")


class Program:
    """A compiled library, loaded.

    Args:
        path: the verified library of an artifact.
        device: what it runs on; its libraries are loaded.

    Attributes:
        releases: how often scratch memory has been released, or taken for good; of all programs, whose pool is one.

    Raises:
        ArtifactError: it cannot be loaded, or holds no Relax executable.
    """

    releases = 0

    def __init__(self, path: Path, device: Device) -> None:
        ffi = import_ffi()
        self.device = device
        try:
            self._module = ffi.load_module(str(path))
            self._load_executable = self._module["vm_load_executable"]
        except Exception as error:
            raise ArtifactError(f"{path}: expected a compiled library, found {one_line(error)}") from error
        self._clear = ffi.get_global_func("vm.builtin.memory_manager.clear")

    def new_machine(self) -> Machine:
        """A virtual machine; it shares code with the others.

        Its constants are copied to the device, into memory out of the pool for as long as it lives. A recorded step may
        use that memory as scratch, so this counts as a release.
        """
        module = self._load_executable()
        with self.device.exclusive():
            module["vm_initialization"](*self.device.machine)
            self.device.settle()
            Program.releases += 1
        return Machine(module)

    def release_scratch(self) -> None:
        """Free the scratch memory that no call is using.

        TVM's pool keeps a buffer of every size it has seen, and prompts come in every length.
        """
        self._clear()
        Program.releases += 1

    def function(self, name: str) -> Callable[..., Any] | None:
        """A compiled function of the library outside the virtual machine, None where there is none of that name."""
        try:
            return self._module.get_function(name, query_imports=True)
        except AttributeError:
            return None


class Machine:
    """One virtual machine; to be used by one thread at a time."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def bind(self, function: str, arguments: Sequence[Any]) -> Callable[..., Any]:
        """``function`` with its last arguments fixed to ``arguments``, so that a call need not pass every weight.

        Raises:
            ArtifactError: the library has no such function.
        """
        name = f"{function}/bound"
        try:
            self._module["save_function"](function, name, 1, *arguments)
            return self._module[name]
        except Exception as error:
            raise ArtifactError(f"function {function!r}: expected in the library, found {one_line(error)}") from error

    def observe(self, callback: Callable[..., Any]) -> None:
        """Have ``callback(function, name, before, result, *arguments)`` called before and after every call it makes."""
        self._module["set_instrument"](import_ffi().convert_func(callback))


def one_line(error: BaseException) -> str:
    """The message of an error of another library, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
