"""From an operation of scheduled HIVM to a step of the simulator: control flow, views, memory, flags between pipes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from . import hivm_ops
from .hivm_memory import Buffer, HIVMError, contiguous, dtype_of, private
from .hivm_scalars import evaluator, permutation
from .mlir_text import Operation, integers, keyword, memory_space, reassociation, shaped

if TYPE_CHECKING:
    from .hivm_simulator import Core, Env, ScheduledKernel, Step, Waiting

_DYNAMIC = -(2**63)
_RESULT = "the values of a yield"


def step(kernel: ScheduledKernel, operation: Operation) -> Step | None:
    """The step of one operation, None where it has no effect; HIVMError names an operation that is not known."""
    name = operation.name
    if name in ("annotation.mark", "memref.dealloc", "memref.assume_alignment"):
        return None
    if name.startswith("hivm.hir."):
        return _hivm(operation)
    if name in _CONTROL:
        return _CONTROL[name](kernel, operation)
    if name in _MEMORY:
        return _MEMORY[name](operation)
    view = _view(operation)
    if view is not None:
        return _value(operation, _of_both(view))
    function = evaluator(operation, kernel.module.aliases)
    if function is not None:
        return _value(operation, function)
    if name.startswith("vector.transfer"):
        return _transfer(operation, kernel.module.aliases)
    raise HIVMError(f"operation {name} is not simulated")


def _value(operation: Operation, function: Callable[..., Any]) -> Step:
    operands, results = operation.operands, operation.results

    def run(env: Env, core: Core) -> None:
        value = function(*[env[name] for name in operands])
        env.update(zip(results, (value,) if len(results) == 1 else value, strict=True))

    return run


# Control flow.


def _yield(kernel: ScheduledKernel, operation: Operation) -> Step:
    def run(env: Env, core: Core) -> None:
        env[_RESULT] = [env[name] for name in operation.operands]

    return run


def _for(kernel: ScheduledKernel, operation: Operation) -> Step:
    (block,) = operation.regions[0]
    steps = kernel._block(block)
    (index, _), *carried = block.arguments
    low, high, stride, *initial = operation.operands

    def run(env: Env, core: Core) -> Waiting:
        values = [env[name] for name in initial]
        for i in range(env[low], env[high], env[stride]):
            env[index] = i
            env.update(zip([name for name, _ in carried], values, strict=True))
            yield from kernel._region(steps, env, core)
            values = env[_RESULT]
        env.update(zip(operation.results, values, strict=True))

    return run


def _if(kernel: ScheduledKernel, operation: Operation) -> Step:
    branches = [[s for block in region for s in kernel._block(block)] for region in operation.regions]

    def run(env: Env, core: Core) -> Waiting:
        env[_RESULT] = []
        taken = 0 if env[operation.operands[0]] else 1
        if taken < len(branches):
            yield from kernel._region(branches[taken], env, core)
        env.update(zip(operation.results, env[_RESULT], strict=True))

    return run


def _while(kernel: ScheduledKernel, operation: Operation) -> Step:
    (before,), (after,) = operation.regions
    test, body = kernel._block(before), kernel._block(after)

    def run(env: Env, core: Core) -> Waiting:
        values = [env[name] for name in operation.operands]
        while True:
            env.update(zip([n for n, _ in before.arguments], values, strict=True))
            yield from kernel._region(test, env, core)
            goes_on, *values = env[_RESULT]
            if not goes_on:
                break
            env.update(zip([n for n, _ in after.arguments], values, strict=True))
            yield from kernel._region(body, env, core)
            values = env[_RESULT]
        env.update(zip(operation.results, values, strict=True))

    return run


def _call(kernel: ScheduledKernel, operation: Operation) -> Step:
    """A vector function: it runs on PIPE_V as a whole and does not wait for anything."""
    callee = hivm_ops.callee(operation)
    if operation.results:
        raise HIVMError(f"function {callee} returns values")

    def run(env: Env, core: Core) -> None:
        values = [env[name] for name in operation.operands]

        def work() -> None:
            with np.errstate(all="ignore"):
                for _ in kernel._call(callee, values, core):
                    raise HIVMError(f"function {callee} waits for another core")

        core.issue("PIPE_V", work)

    return run


_CONTROL: dict[str, Callable[[ScheduledKernel, Operation], Step]] = {
    "scf.yield": _yield,
    "scf.condition": _yield,
    "func.return": _yield,
    "scf.for": _for,
    "scf.if": _if,
    "scf.while": _while,
    "func.call": _call,
}


# Views.


def _mixed(values: Iterator[Any], fixed: str) -> list[int]:
    return [int(next(values)) if n == _DYNAMIC else n for n in integers(fixed)]


def _sizes(operation: Operation, values: list[Any]) -> tuple[list[int], list[int], list[int]]:
    """Offsets, sizes and strides, static and dynamic merged."""
    dynamic = iter(values)
    offsets, sizes, strides = (
        _mixed(dynamic, operation.attributes[f"static_{part}"]) for part in ("offsets", "sizes", "strides")
    )
    return offsets, sizes, strides


def _of_both(view: Callable[..., Any]) -> Callable[..., Any]:
    """A view of a buffer, or of the pair of buffers that the cube sees where the vector cores' UB is meant."""

    def applied(*values: Any) -> Any:
        if values and isinstance(values[0], tuple):
            return tuple(view(source, *values[1:]) for source in values[0])
        return view(*values)

    return applied


def _view(operation: Operation) -> Callable[..., Buffer] | None:
    name = operation.name
    if not name.startswith("memref.") or not operation.results:
        return None
    result, attributes = operation.result_types[0], operation.attributes
    if name in ("memref.cast", "memref.memory_space_cast"):
        return lambda source: source
    if name == "memref.reinterpret_cast":

        def reinterpret(source: Buffer, *values: Any) -> Buffer:
            offsets, sizes, strides = _sizes(operation, list(values))
            return source.reinterpret(offsets[0], tuple(sizes), tuple(strides))

        return reinterpret
    if name == "memref.subview":
        rank = shaped(result).rank
        unit = [n == 1 for n in integers(attributes["static_sizes"])]

        def part(source: Buffer, *values: Any) -> Buffer:
            return source.subview(*_sizes(operation, list(values)), rank, unit)

        return part
    if name == "memref.collapse_shape":
        groups = reassociation(attributes["reassociation"])
        return lambda source: source.collapse(groups)
    if name == "memref.expand_shape":
        groups = reassociation(attributes["reassociation"])
        fixed = attributes["static_output_shape"]
        return lambda source, *values: source.expand(groups, tuple(_mixed(iter(values), fixed)))
    if name == "memref.view":
        kind = shaped(result)

        def typed_view(source: Buffer, start: int, *extents: int) -> Buffer:
            dynamic = iter(extents)
            shape = tuple(int(next(dynamic)) if n is None else n for n in kind.shape)
            data = source.view()[start:]
            dtype = dtype_of(kind.element)
            base = data[: data.size // dtype.itemsize * dtype.itemsize].view(dtype)
            return Buffer(base, 0, shape, contiguous(shape), source.space, source.name)

        return typed_view
    if name in ("memref.alloc", "memref.alloca"):
        if "address_space<gm" in result or "address_space<ub" in result or "address_space<c" in result:
            raise HIVMError(f"a buffer without an address: {result}")
        return lambda: private(result)
    return None


# Memory.


def _load(operation: Operation) -> Step:
    result = operation.result_types[0]

    def get(source: Buffer, *place: int) -> Any:
        array = source.view()
        if any(not 0 <= i < n for i, n in zip(place, array.shape, strict=True)):
            raise HIVMError(f"memref.load of {source.name} at {list(place)}, which has extents {list(array.shape)}")
        value = array[tuple(place)]
        return int(value) if result.startswith("i") and result != "i1" else value

    return _value(operation, get)


def _store(operation: Operation) -> Step:
    def run(env: Env, core: Core) -> None:
        value, target, *place = (env[name] for name in operation.operands)
        target.view()[tuple(place)] = value

    return run


_MEMORY: dict[str, Callable[[Operation], Step]] = {"memref.load": _load, "memref.store": _store}


def _transfer(operation: Operation, aliases: dict[str, str]) -> Step:
    """vector.transfer_read and _write, with masks, padding, and dimensions of 1 where the map broadcasts."""
    order = permutation(operation.attributes["permutation_map"], aliases)
    writes = operation.name == "vector.transfer_write"
    groups = operation.segments()
    vector = shaped(operation.operand_types[0] if writes else operation.result_types[0])
    shape = tuple(n or 0 for n in vector.shape)

    def window(memory: np.ndarray, starts: list[int]) -> tuple[np.ndarray, tuple[slice, ...]]:
        """The part of memory under the vector, in the vector's order, and which part of the vector it covers."""
        spans: list[Any] = [slice(s, s + 1) for s in starts]
        covered: list[Any] = [slice(None)] * len(order)
        for i, d in enumerate(order):
            if d is not None:
                count = max(0, min(shape[i], memory.shape[d] - starts[d]))
                spans[d], covered[i] = slice(starts[d], starts[d] + count), slice(0, count)
        used = [d for d in order if d is not None]
        rest = [d for d in range(memory.ndim) if d not in used]
        part = memory[(*spans, ...)].transpose(*used, *rest)
        part = part.reshape(part.shape[: len(used)]) if rest else part
        for i, d in enumerate(order):
            if d is None:
                part = np.expand_dims(part, i)
        return part, tuple(covered)

    def read(env: Env, core: Core) -> None:
        (source,), starts, (padding,), mask = [[env[n] for n in group] for group in groups]
        part, covered = window(source.view(), starts)
        value = np.full(shape, padding, dtype_of(vector.element))
        value[covered] = part
        if mask:
            value = np.where(mask[0], value, np.asarray(padding, value.dtype))
        env[operation.results[0]] = value

    def write(env: Env, core: Core) -> None:
        (value,), (target,), starts, mask = [[env[n] for n in group] for group in groups]
        part, covered = window(target.view(), starts)
        if mask:
            np.copyto(part, value[covered], where=mask[0][covered])
        else:
            part[...] = value[covered]

    return write if writes else read


# HIVM.


def _flag(operation: Operation) -> tuple[str, str, str]:
    attributes = operation.attributes
    if "static_event_id" not in attributes or operation.operands:
        raise HIVMError(f"{operation.name} with an event known only at run time")
    return keyword(attributes["set_pipe"]), keyword(attributes["wait_pipe"]), keyword(attributes["static_event_id"])


def _cross(operation: Operation) -> Step:
    """sync_block_set and sync_block_wait: a flag to the other core, or from it; from two vector cores, both."""
    if "static_flag_id" not in operation.attributes:
        raise HIVMError(f"{operation.name} with a flag known only at run time")
    flag = int(operation.attributes["static_flag_id"].split(" ")[0])

    def signal(env: Env, core: Core) -> None:
        for partner in core.partners:
            partner.cross[_key(flag, core)] = partner.cross.get(_key(flag, core), 0) + 1

    def wait(env: Env, core: Core) -> Waiting:
        keys = [_key(flag, partner) for partner in core.partners]
        while not all(core.cross.get(key) for key in keys):
            yield
        for key in keys:
            core.cross[key] -= 1

    return signal if operation.name.endswith("set") else wait


def _key(flag: int, sender: Core) -> int:
    return 2 * flag + sender.half


def _pointer(operation: Operation) -> Step:
    if len(operation.operands) != 1:
        raise HIVMError("hivm.hir.pointer_cast of several addresses")
    (name,), (result,), type_text = operation.operands, operation.results, operation.result_types[0]
    space = memory_space(type_text)

    def run(env: Env, core: Core) -> None:
        # On c310 the cube writes into the UB of both its vector cores, and these into its L1.
        if core.kind == "AIC" and space == "ub":
            env[result] = tuple(partner.memory.at(env[name], type_text) for partner in core.partners)
        elif core.kind == "AIV" and space != "ub" and core.partners:
            env[result] = core.partners[0].memory.at(env[name], type_text)
        else:
            env[result] = core.memory.at(env[name], type_text)

    return run


def _hivm(operation: Operation) -> Step | None:
    name = operation.name.removeprefix("hivm.hir.")
    if name == "pointer_cast":
        return _pointer(operation)
    if name in ("get_block_idx", "get_sub_block_idx", "get_block_num", "get_sub_block_num"):
        if name == "get_block_num":
            raise HIVMError("hivm.hir.get_block_num: programs that loop over blocks are not simulated")
        place = {
            "get_block_idx": lambda core: core.block,
            "get_sub_block_idx": lambda core: core.half,
            "get_sub_block_num": lambda core: 2,
        }[name]

        def number(env: Env, core: Core) -> None:
            env[operation.results[0]] = place(core)

        return number
    if name == "set_flag":
        flag = _flag(operation)
        return lambda env, core: core.set_flag(flag)
    if name == "wait_flag":
        flag = _flag(operation)
        return lambda env, core: core.wait_flag(flag) if core.kind == "AIV" else None
    if name in ("sync_block_set", "sync_block_wait"):
        return _cross(operation)
    if name == "pipe_barrier":
        everything = keyword(operation.attributes["pipe"]) == "PIPE_ALL"
        return (lambda env, core: core.drain()) if everything else None
    if name in hivm_ops.IGNORED:
        return None
    effect = hivm_ops.effect(operation)
    if effect is None:
        raise HIVMError(f"operation {operation.name} is not simulated")
    pipe, groups = hivm_ops.pipe(operation), operation.segments()

    def run(env: Env, core: Core) -> None:
        values = [[env[n] for n in group] for group in groups]
        core.issue(pipe, lambda: effect(values))

    return run
