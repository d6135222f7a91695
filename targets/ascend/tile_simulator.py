"""Runs a tile program on this machine: the very text that bishengir is given, compiled for x86 by LLVM 19's MLIR.

It shows what the text means, apart from what bishengir makes of it (`hivm_simulator` shows that). Programs of the grid
run one after another. Local memory starts as NaN, so a value used before it is loaded shows in the result; a copy that
leaves its buffer in global memory is an error that names program and buffer.

FP8 elements are carried as float16, which holds them exactly; what is rounded to FP8 is rounded once, to nearest even.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import re
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 and FP8 with NumPy)
import numpy as np

from v4c.errors import Error

from .program import Argument, Role, TileProgram
from .toolchain import ToolMissing, run_limited, tool

PACKAGES = ("mlir-19-tools", "llvm-19")
"""Debian packages that hold the programs used here; a C compiler (package ``gcc``) is the third."""

_TIME_LIMIT = 120.0
_FP8 = {"float8_e4m3fn": "f8E4M3FN", "float8_e5m2": "f8E5M2"}


class SimulationError(Error):
    """A program that cannot be simulated, or that does what no device should: the message names kernel and cause."""


_BUFFERIZE = (
    "builtin.module(convert-elementwise-to-linalg,func.func(linalg-fuse-elementwise-ops),empty-tensor-to-alloc-tensor,"
    "one-shot-bufferize{allow-unknown-ops=true allow-return-allocs-from-loops=true},"
    "convert-bufferization-to-memref,canonicalize)"
)
_LOWER = (
    "builtin.module(func.func(convert-linalg-to-loops),canonicalize,cse,expand-strided-metadata,lower-affine,"
    "arith-expand{include-bf16=true},convert-scf-to-cf,convert-math-to-llvm,convert-math-to-libm,"
    "finalize-memref-to-llvm{use-generic-functions=true},convert-arith-to-llvm,convert-func-to-llvm,"
    "convert-cf-to-llvm,reconcile-unrealized-casts)"
)
_COPY = re.compile(r"^(\s*)memref\.copy (%[\w#-]+), (%[\w#-]+) : (memref<.*>) to (memref<.*>)$", re.M)
_ELEMENT = re.compile(r"memref<(?:(?:\d+|\?)x)*(\w+)")


_TO_FP8 = re.compile(r"^(\s*)(%\S+) = arith\.truncf (%\S+) : (\S+) to (\S*(?:f8E4M3FN|f8E5M2)\S*)$", re.M)


def _upstream(program: TileProgram) -> str:
    """The text without what only bishengir knows; FP8 as float16."""
    text = re.sub(r" \{(?:hacc|tt)\.[^{}]*\}(?=[,)])", "", program.text)
    text = re.sub(r"(func\.func @.*\)) attributes \{.*\} \{", r"\1 attributes {llvm.emit_c_interface} {", text)
    count = itertools.count()
    text = _TO_FP8.sub(lambda found: _rounded(program.name, found, next(count)), text)
    for fp8 in _FP8.values():
        if f"v4c_round_{fp8}" in text:
            text = text.replace("  func.func @", f"  func.func private @v4c_round_{fp8}(f32) -> f32\n  func.func @", 1)
        text = text.replace(f"x{fp8}", "xf16").replace(f": {fp8}", ": f16").replace(f"to {fp8}", "to f16")
    return re.sub(r"arith\.extf (%\S+ : )(\S+) to \2$", r"arith.bitcast \1\2 to \2", text, flags=re.M)


def _rounded(kernel: str, found: re.Match[str], n: int) -> str:
    """Rounding of a tensor to FP8, by a function of the runtime for each element."""
    indent, result, value, origin, target = found.groups()
    shape = re.fullmatch(r"tensor<((?:\d+x)+)(f32|f16|bf16)>", origin)
    if shape is None:
        raise SimulationError(f"kernel {kernel}: rounding {origin} to {target} is not simulated")
    rank, element = shape[1].count("x"), shape[2]
    fp8 = target.rpartition("x")[2].rstrip(">")
    dims = ", ".join(f"d{i}" for i in range(rank))
    identity = f"affine_map<({dims}) -> ({dims})>"
    kinds = ", ".join(['"parallel"'] * rank)
    wide = "%v4c_in" if element == "f32" else "%v4c_wide"
    widen = "" if element == "f32" else f"{indent}  %v4c_wide = arith.extf %v4c_in : {element} to f32\n"
    return (
        f"{indent}%v4c_e{n} = tensor.empty() : {target}\n"
        f"{indent}{result} = linalg.generic {{indexing_maps = [{identity}, {identity}], iterator_types = [{kinds}]}} "
        f"ins({value} : {origin}) outs(%v4c_e{n} : {target}) {{\n"
        f"{indent}^bb0(%v4c_in: {element}, %v4c_out: {fp8}):\n{widen}"
        f"{indent}  %v4c_r = func.call @v4c_round_{fp8}({wide}) : (f32) -> f32\n"
        f"{indent}  %v4c_h = arith.truncf %v4c_r : f32 to {fp8}\n"
        f"{indent}  linalg.yield %v4c_h : {fp8}\n"
        f"{indent}}} -> {target}"
    )


def _checked_copies(text: str) -> str:
    """Copies as calls of the runtime, which looks whether they stay inside their buffers."""
    count = itertools.count()
    elements = set()

    def call(found: re.Match[str]) -> str:
        indent, source, target, source_type, target_type = found.groups()
        match = _ELEMENT.match(source_type)
        assert match is not None
        element, n = match[1], next(count)
        elements.add(element)
        unranked = f"memref<*x{element}>"
        return (
            f"{indent}%v4c_s{n} = memref.cast {source} : {source_type} to {unranked}\n"
            f"{indent}%v4c_d{n} = memref.cast {target} : {target_type} to {unranked}\n"
            f"{indent}func.call @v4c_copy_{element}(%v4c_s{n}, %v4c_d{n}) : ({unranked}, {unranked}) -> ()"
        )

    text = _COPY.sub(call, text)
    declared = "".join(f"  func.func private @v4c_copy_{e}(memref<*x{e}>, memref<*x{e}>)\n" for e in sorted(elements))
    return text.replace("  func.func @", declared + "  func.func @", 1)


def _run(command: list[str], folder: Path, kernel: str) -> None:
    status, log = run_limited(command, folder, _TIME_LIMIT)
    if status == 0:
        return
    name = Path(command[0]).name
    if status is None:
        raise SimulationError(f"kernel {kernel}: {name} took more than {_TIME_LIMIT:g} s")
    line = next((line for line in log.splitlines() if "error" in line), log.strip().partition("\n")[0])
    raise SimulationError(f"kernel {kernel}: {name}: {line.partition('error: ')[2] or line}"[:400])


@functools.cache
def _compiler() -> str:
    import shutil

    for name in ("cc", "gcc", "clang"):
        if (path := shutil.which(name)) is not None:
            return path
    raise ToolMissing("simulating tile programs needs a C compiler: apt-get install gcc")


def compile_object(program: TileProgram, folder: Path, cpu: str = "native") -> Path:
    """``kernel.o`` in `folder`, an object for the x86 `cpu` as llc names it, with ``_mlir_ciface_<name>``.

    It needs what ``tile_runtime.c`` defines.

    Raises:
        SimulationError: a tool refuses the text.
        ToolMissing: a tool is not installed.
    """
    opt, llc = tool("opt", "llvm-19"), tool("llc", "llvm-19")
    mlir_opt, translate = tool("mlir-opt", "mlir-19-tools"), tool("mlir-translate", "mlir-19-tools")
    name = program.name
    (folder / "program.mlir").write_text(_upstream(program))
    _run([mlir_opt, "program.mlir", f"--pass-pipeline={_BUFFERIZE}", "-o", "buffers.mlir"], folder, name)
    (folder / "checked.mlir").write_text(_checked_copies((folder / "buffers.mlir").read_text()))
    _run([mlir_opt, "checked.mlir", f"--pass-pipeline={_LOWER}", "-o", "llvm.mlir"], folder, name)
    _run([translate, "--mlir-to-llvmir", "llvm.mlir", "-o", "kernel.ll"], folder, name)
    _run([opt, "-O2", "kernel.ll", "-o", "kernel.bc"], folder, name)
    llc_options = ["-O2", f"-mcpu={cpu}", "-relocation-model=pic", "-filetype=obj"]
    _run([llc, *llc_options, "kernel.bc", "-o", "kernel.o"], folder, name)
    return folder / "kernel.o"


def compile_c(source: Path, folder: Path, options: Sequence[str] = ()) -> Path:
    """The object of a C file in `folder`."""
    made = folder / f"{source.stem}.o"
    _run([_compiler(), "-O1", "-c", "-fPIC", *options, str(source), "-o", made.name], folder, source.stem)
    return made


def link_shared(folder: Path, objects: Sequence[str], library: str, kernel: str) -> None:
    """A shared library of objects in `folder` and of the run-time library; `kernel` is for messages."""
    runtime = str(Path(__file__).with_name("tile_runtime.c"))
    _run([_compiler(), "-O1", "-shared", "-fPIC", runtime, *objects, "-o", library, "-lm"], folder, kernel)


class TileKernel:
    """A tile program compiled for this machine. Calls may come from several threads; they take turns."""

    def __init__(self, program: TileProgram) -> None:
        self.program = program
        self._lock = threading.Lock()
        with tempfile.TemporaryDirectory(prefix="v4c-tile-") as temporary:
            folder = Path(temporary)
            compile_object(program, folder)
            link_shared(folder, ["kernel.o"], "k.so", program.name)
            self._library = ctypes.CDLL(str(folder / "k.so"))
        self._function = getattr(self._library, f"_mlir_ciface_{program.name}")
        self._function.restype = None
        self._library.v4c_fault.restype = ctypes.POINTER(ctypes.c_int64)

    def __call__(self, arrays: Mapping[str, np.ndarray], scalars: Mapping[str, int] | None = None) -> None:
        """Runs the whole grid; what the program writes is written into `arrays`.

        Args:
            arrays: one C-contiguous array per argument, of the argument's dtype and shape.
            scalars: values of ``program.scalars``.

        Raises:
            SimulationError: an array that does not fit, or an access outside one.
        """
        scalars = dict(scalars or {})
        bound = bind(self.program, arrays, scalars)
        carried = [_carried(argument, array) for argument, array in zip(self.program.arguments, bound, strict=True)]
        grid = [axis(scalars) for axis in self.program.grid] or [1]
        if len(grid) > 3:
            raise SimulationError(f"kernel {self.program.name}: expected at most 3 grid axes, found {len(grid)}")
        grid += [1] * (3 - len(grid))
        space = np.zeros(max(64, self.program.workspace * int(np.prod(grid))), np.int8)
        lock = np.zeros(4096, np.int8)
        descriptors = [_descriptor(a) for a in (lock, space, *carried)]
        numbers = [ctypes.c_int32(int(scalars[name])) for name in self.program.scalars]
        numbers += [ctypes.c_int32(n) for n in grid]
        with self._lock:
            pointers = (ctypes.c_void_p * len(carried))(*[a.ctypes.data for a in carried])
            sizes = (ctypes.c_int64 * len(carried))(*[a.size for a in carried])
            self._library.v4c_begin(ctypes.c_int64(len(carried)), pointers, sizes)
            try:
                for place in itertools.product(*map(range, grid)):
                    self._function(*descriptors, *numbers, *[ctypes.c_int32(p) for p in place])
                    self._library.v4c_end_program()
                    self._check(place, carried)
            finally:
                self._library.v4c_release()
        for argument, array, copy in zip(self.program.arguments, bound, carried, strict=True):
            if copy is not array and argument.role is not Role.READ:
                array[...] = copy.reshape(array.shape).astype(array.dtype)

    def _check(self, place: tuple[int, ...], arrays: list[np.ndarray]) -> None:
        buffer, low, high, written = self._library.v4c_fault()[:4]
        if buffer >= 0:
            argument = self.program.arguments[buffer]
            does = "writes" if written else "reads"
            where = ", ".join(map(str, place[: max(1, len(self.program.grid))]))
            raise SimulationError(
                f"kernel {self.program.name}: program {where} {does} elements {low} to {high} of {argument.name}, "
                f"which has {arrays[buffer].size}"
            )


def _carried(argument: Argument, array: np.ndarray) -> np.ndarray:
    return array.astype(np.float16) if argument.dtype in _FP8 else array


def _descriptor(array: np.ndarray) -> ctypes.Array[ctypes.c_int64]:
    """A rank-1 memref's descriptor."""
    return (ctypes.c_int64 * 5)(array.ctypes.data, array.ctypes.data, 0, array.size, 1)


def bind(program: TileProgram, arrays: Mapping[str, np.ndarray], scalars: Mapping[str, int]) -> list[np.ndarray]:
    """The arrays in the order of the program's arguments, checked against their dtypes and shapes."""
    if missing := [name for name in program.scalars if name not in scalars]:
        raise SimulationError(f"kernel {program.name}: scalar {missing[0]} has no value")
    bound = []
    for argument in program.arguments:
        if argument.name not in arrays:
            raise SimulationError(f"kernel {program.name}: argument {argument.name} has no array")
        array = arrays[argument.name]
        shape = argument.extents(scalars)
        if array.shape != shape or array.dtype != np.dtype(argument.dtype):
            raise SimulationError(
                f"kernel {program.name}: argument {argument.name}: expected {argument.dtype} {list(shape)}, "
                f"found {array.dtype} {list(array.shape)}"
            )
        if not array.flags.c_contiguous or (argument.role is not Role.READ and not array.flags.writeable):
            raise SimulationError(
                f"kernel {program.name}: argument {argument.name}: expected a contiguous"
                f"{'' if argument.role is Role.READ else ', writable'} array"
            )
        bound.append(array)
    return bound


_kernels: dict[str, TileKernel] = {}


def tile_kernel(program: TileProgram) -> TileKernel:
    """The compiled program, from this process's cache where the same text, name and arguments came before."""
    parts = repr((program.name, program.arguments, program.scalars, program.grid, program.workspace))
    key = hashlib.sha256(f"{parts}\0{program.text}".encode()).hexdigest()
    if key not in _kernels:
        _kernels[key] = TileKernel(program)
    return _kernels[key]


def simulate(
    program: TileProgram, inputs: Mapping[str, np.ndarray], scalars: Mapping[str, int] | None = None
) -> dict[str, np.ndarray]:
    """What the program writes, by argument name. Inputs are not changed; outputs that are not given start as NaN."""
    arrays = prepared(program, inputs, scalars or {})
    tile_kernel(program)(arrays, scalars)
    return {a.name: arrays[a.name] for a in program.arguments if a.role is not Role.READ}


def prepared(
    program: TileProgram, inputs: Mapping[str, np.ndarray], scalars: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Arrays for one run: inputs as they are, what is updated as a copy, what is only written full of NaN or -1."""
    arrays = {}
    for argument in program.arguments:
        given = inputs.get(argument.name)
        if argument.role is Role.READ and given is not None:
            arrays[argument.name] = given
        elif given is not None:
            arrays[argument.name] = np.array(given)
        elif argument.role is Role.WRITE:
            dtype = np.dtype(argument.dtype)
            empty = np.full(int(np.prod(argument.extents(scalars))) * dtype.itemsize, 0xFF, np.uint8)
            arrays[argument.name] = empty.view(dtype).reshape(argument.extents(scalars))
    return arrays
