"""Runs what bishengir made of a kernel: its scheduled HIVM, with on-chip addresses and synchronisation decided.

Every buffer lies at the address bishengir planned, in a memory of the device's size, and flags are waited for. What a
core's pipes may do in another order than the text's, they do: a vector kernel runs three times, in program order and
with consumers, then producers as early as the flags let them; a mixed kernel runs with either core ahead. A missing
flag or an address planned twice thus changes numbers.

Not simulated: the device library's own code, order within one pipe, several blocks at once, time. For c310 the stage
is the one before vector functions become intrinsics.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np

from .devices import Device, find_device
from .hivm_memory import Buffer, HIVMError, LocalMemories
from .hivm_scalars import affine_map, evaluator, permutation  # noqa: F401
from .mlir_text import Block, MLIRTextError, Module, Operation, keyword, parse
from .program import Role, TileProgram, Work
from .tile_simulator import SimulationError, bind, prepared
from .toolchain import Compiled

ORDERS: dict[Work, tuple[str, ...]] = {
    Work.VECTOR: ("program", "consumers", "producers"),
    Work.CUBE: ("program",),
    Work.MIXED: ("cube first", "vector first"),
}
"""The orders a kernel is run in. A cube's flags are partly waited for inside its library calls: it has one order."""

_CONSUMERS_FIRST = ("PIPE_MTE3", "PIPE_FIX", "PIPE_V", "PIPE_M", "PIPE_MTE1", "PIPE_MTE2")
_DYNAMIC = -(2**63)
Env = dict[str, Any]
Waiting = Generator[None, None, None]
Step = Callable[[Env, "Core"], "Waiting | None"]


class Core:
    """One core at work on one block: memories, flags, and the queues of its pipes where these run by themselves."""

    def __init__(self, device: Device, kind: str, block: int, half: int, pipes: tuple[str, ...] | None) -> None:
        self.kind, self.block, self.half = kind, block, half
        self.memory = LocalMemories(device)
        self.partners: list[Core] = []
        self.flags: dict[tuple[str, ...], int] = {}
        self.cross: dict[int, int] = {}
        self._order = pipes
        self._queues: dict[str, list[tuple[str, Any]]] = {name: [] for name in pipes or ()}

    def issue(self, pipe: str, action: Callable[[], None]) -> None:
        if self._order is None or pipe not in self._queues:
            action()
        else:
            self._queues[pipe].append(("run", action))

    def set_flag(self, flag: tuple[str, str, str]) -> None:
        def add() -> None:
            self.flags[flag] = self.flags.get(flag, 0) + 1

        self.issue(flag[0], add)

    def wait_flag(self, flag: tuple[str, str, str]) -> None:
        if self._order is not None and flag[1] in self._queues:
            self._queues[flag[1]].append(("wait", flag))
            return
        self.drain(flag)
        self._take(flag)

    def _take(self, flag: tuple[str, str, str]) -> None:
        if not self.flags.get(flag):
            raise HIVMError(f"{flag[1]} waits for {flag[2]} of {flag[0]}, which nothing sets")
        self.flags[flag] -= 1

    def drain(self, until: tuple[str, str, str] | None = None) -> None:
        """Lets the pipes run, each as far as its flags allow, in the order of precedence; all of it without `until`."""
        while any(self._queues.values()) and not (until is not None and self.flags.get(until)):
            for pipe in self._order or ():
                queue = self._queues[pipe]
                if queue and (queue[0][0] == "run" or self.flags.get(queue[0][1])):
                    kind, content = queue.pop(0)
                    content() if kind == "run" else self._take(content)
                    break
            else:
                if until is None:
                    waits = next(queue[0][1] for queue in self._queues.values() if queue)
                    raise HIVMError(f"{waits[1]} waits for {waits[2]} of {waits[0]}, which nothing sets")
                return


class ScheduledKernel:
    """A compiled kernel's scheduled HIVM, ready to run."""

    def __init__(self, program: TileProgram, compiled: Compiled) -> None:
        self.program, self.device = program, find_device(compiled.device)
        self.module: Module = parse(compiled.scheduled)
        self._functions = self.module.functions
        self._steps = functools.cache(self._build)
        names = (program.name, f"{program.name}_mix_aic", f"{program.name}_mix_aiv")
        self.entries = [name for name in names if name in self._functions]
        if not self.entries:
            raise HIVMError(f"no function {program.name} in the scheduled module")

    def run(self, arrays: Mapping[str, np.ndarray], scalars: Mapping[str, int], order: str) -> None:
        """Runs the grid's programs one after another; writes into `arrays`. `order` is one of `ORDERS`."""
        grid = [axis(scalars) for axis in self.program.grid] or [1]
        grid += [1] * (3 - len(grid))
        blocks = int(np.prod(grid))
        space = np.full(max(64, self._workspace() * blocks), 0xFF, np.uint8).view(np.int8)
        bound = bind(self.program, arrays, scalars)
        for block in range(blocks):
            cores = self._cores(block, order)
            running = [
                (core, self._call(name, self._arguments(name, bound, space, scalars, grid), core))
                for name, core in cores
            ]
            while running:
                progress = False
                for item in list(running):
                    core, steps = item
                    before = sum(core.cross.values()), [dict(p.cross) for p in core.partners]
                    if next(steps, "done") == "done":
                        core.drain()
                        running.remove(item)
                        progress = True
                        continue
                    if before != (sum(core.cross.values()), [dict(p.cross) for p in core.partners]):
                        progress = True
                if not progress:
                    raise HIVMError(f"block {block}: {' and '.join(c.kind for c, _ in running)} wait for each other")

    def _cores(self, block: int, order: str) -> list[tuple[str, Core]]:
        pipes = {"consumers": _CONSUMERS_FIRST, "producers": _CONSUMERS_FIRST[::-1]}.get(order)
        if len(self.entries) == 1:
            function = self._functions[self.entries[0]]
            kind = keyword(function.attributes.get("hivm.func_core_type", "<AIV>"))
            return [(self.entries[0], Core(self.device, kind, block, 0, pipes))]
        cube = Core(self.device, "AIC", block, 0, None)
        vectors = [Core(self.device, "AIV", block, half, None) for half in (0, 1)]
        cube.partners = vectors
        for vector in vectors:
            vector.partners = [cube]
        cores = [(next(n for n in self.entries if n.endswith("aic")), cube)]
        cores += [(next(n for n in self.entries if n.endswith("aiv")), vector) for vector in vectors]
        return cores if order != "vector first" else cores[1:] + cores[:1]

    def _workspace(self) -> int:
        function = self._functions.get(f"{self.program.name}_infer_workspace_shape_function")
        if function is None:
            return 0
        values = [o for o in function.walk() if o.name == "arith.constant"]
        return max(int(o.attributes["value"].split(" ")[0]) for o in values)

    def _arguments(
        self, name: str, arrays: list[np.ndarray], space: np.ndarray, scalars: Mapping[str, int], grid: list[int]
    ) -> list[Any]:
        function = self._functions[name]
        block = function.regions[0][0]
        kinds = re.findall(r"\{([^{}]*)\}", function.attributes.get("arg_attrs", ""))
        buffers = iter(zip(self.program.arguments, arrays, strict=True))
        numbers = iter([*(int(scalars[s]) for s in self.program.scalars), *grid])
        values: list[Any] = []
        for i, (_, type_text) in enumerate(block.arguments):
            kind = kinds[i] if i < len(kinds) else ""
            if "ffts_base_address" in kind:
                values.append(0)
            elif "sync_block_lock" in kind:
                values.append(_global(np.zeros(4096, np.int8), "the lock"))
            elif "workspace" in kind:
                values.append(_global(space, "the workspace"))
            elif type_text.startswith("memref"):
                argument, array = next(buffers)
                flat = array.reshape(-1)
                if argument.role is Role.READ:
                    flat = flat.view()
                    flat.flags.writeable = False
                values.append(_global(flat, argument.name))
            else:
                values.append(next(numbers))
        return values

    def _call(self, name: str, values: list[Any], core: Core) -> Waiting:
        env: Env = dict(zip([n for n, _ in self._functions[name].regions[0][0].arguments], values, strict=True))
        yield from self._region(self._steps(name), env, core)

    @staticmethod
    def _region(steps: list[Step], env: Env, core: Core) -> Waiting:
        for step in steps:
            waiting = step(env, core)
            if waiting is not None:
                yield from waiting

    def _build(self, name: str) -> list[Step]:
        blocks = self._functions[name].regions[0]
        if len(blocks) != 1:
            raise HIVMError(f"function {name} branches between blocks")
        return self._block(blocks[0])

    def _block(self, block: Block) -> list[Step]:
        return [step for operation in block.operations if (step := self._step(operation)) is not None]

    def _step(self, operation: Operation) -> Step | None:
        from .hivm_steps import step

        return step(self, operation)


def _global(array: np.ndarray, name: str) -> Buffer:
    return Buffer(array, 0, (array.size,), (1,), "gm", name)


def simulate_scheduled(
    program: TileProgram,
    compiled: Compiled,
    inputs: Mapping[str, np.ndarray],
    scalars: Mapping[str, int] | None = None,
    order: str = "program",
) -> dict[str, np.ndarray]:
    """What the scheduled kernel writes, by argument name; SimulationError names kernel, device and cause."""
    scalars = dict(scalars or {})
    arrays = prepared(program, inputs, scalars)
    try:
        with np.errstate(all="ignore"):
            ScheduledKernel(program, compiled).run(arrays, scalars, order)
    except (HIVMError, MLIRTextError) as error:
        raise SimulationError(f"kernel {program.name}, {compiled.device}, scheduled HIVM: {error}") from None
    return {a.name: arrays[a.name] for a in program.arguments if a.role is not Role.READ}
