"""The side stream in a module of a few kernels: what is moved, where the calls stand, and whose memory is whose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from v4c.passes.cost import INPUTS_ATTRIBUTE, OP_ATTRIBUTE
from v4c.runtime.cuda_side_stream import FORK, JOIN, LEAVE
from v4c.targets.cuda import side_stream
from v4c.targets.cuda.launch import Launch, prim_func

IDS, ROWS = (("b", "s", 4), "int64"), (("b", "s", 32), "float32")
TABLE = ((100, 8), "float32")


def kernel(name: str, op: str, **buffers: Any) -> Any:
    """A kernel whose last buffer is its output; nobody runs it."""
    function = prim_func(name, buffers, [Launch(f"v4c::{name}", list(buffers), ("b * s",), 32)])
    return function.with_attrs({OP_ATTRIBUTE: op, INPUTS_ATTRIBUTE: len(buffers) - 1})


def module(static: bool, late: bool = True, op: str = "EngramLookup") -> Any:
    """Two lookups, the first read after other work that needs as much memory, the second returned.

    Args:
        static: with sizes known at compile time, as in a decode step.
        late: the first stands right before its reader; otherwise right behind its hash.
        op: what they are said to compute.
    """
    from tvm import relax, tirx

    builder = relax.BlockBuilder()
    b, s = (1, 1) if static else (tirx.Var("b", "int64"), tirx.Var("s", "int64"))

    def tensor(buffer: Any) -> Any:
        sizes = {"b": b, "s": s}
        return relax.TensorType([sizes.get(d, d) for d in buffer[0]], buffer[1])

    made = {
        "hashed": kernel("hashed", "EngramHash", x=IDS, y=IDS),
        "lookup": kernel("lookup", op, table=TABLE, x=IDS, y=ROWS),
        "count": kernel("count", "Counts", x=IDS, y=IDS),
        "work": kernel("work", "Works", x=ROWS, y=ROWS),
        "both": kernel("both", "Both", x=ROWS, counts=IDS, rows=ROWS, y=ROWS),
    }
    variables = {name: builder.add_func(f.without_attr("global_symbol"), name) for name, f in made.items()}

    def call(name: str, *arguments: Any) -> Any:
        out = IDS if name in ("hashed", "count") else ROWS
        return builder.emit(relax.op.call_tir(variables[name], list(arguments), tensor(out)))

    ids, x = relax.Var("ids", tensor(IDS)), relax.Var("x", tensor(ROWS))
    tables = [relax.Var(f"table{i}", relax.TensorType(*TABLE)) for i in range(2)]
    with builder.function("main", [ids, x, *tables]):
        with builder.dataflow():
            addresses = call("hashed", ids)
            early = None if late else call("lookup", tables[0], addresses)
            second = call("hashed", ids)
            counts = call("count", call("count", ids))
            worked = call("work", call("work", x))
            rows = early if early is not None else call("lookup", tables[0], addresses)
            others = call("lookup", tables[1], second)
            out = builder.emit_output(relax.Tuple([call("both", worked, counts, rows), others]))
        builder.emit_func_output(out)
    return builder.finalize()


def unplanned(module: Any) -> Any:
    """`module` as the pass takes it."""
    from tvm import relax

    for transform in ("ToNonDataflow", "RemovePurityChecking", "CallTIRRewrite"):
        module = getattr(relax.transform, transform)()(module)
    return module


def planned(module: Any, alive: bool = True) -> Any:
    """`module` with the side stream and its memory planned; without `alive` the joins hold no tensors."""
    from tvm import relax

    module = side_stream.run_beside(unplanned(module))
    if not alive:
        (variable,) = [v for v in module.get_global_vars() if v.name_hint == "main"]
        main = module[variable]
        stripped = [side_stream._call(JOIN, b.value.args[0]) if called(b) == JOIN else b for b in bindings(module)]
        body = relax.SeqExpr([relax.BindingBlock(stripped)], main.body.body)
        module[variable] = relax.Function(main.params, body, main.ret_ty, main.is_pure, main.attrs)
    return relax.transform.StaticPlanBlockMemory()(module)


def bindings(module: Any) -> list[Any]:
    return [b for block in module["main"].body.blocks for b in block.bindings]


def called(binding: Any) -> str:
    """What a binding calls, by name."""
    op = getattr(binding.value, "op", None)
    return str(getattr(op, "global_symbol", "") or getattr(op, "name_hint", ""))


def storages(module: Any) -> dict[Any, Any]:
    """The storage of every tensor that has one planned, under all names of the tensor."""
    found: dict[Any, Any] = {}
    for binding in bindings(module):
        if getattr(getattr(binding.value, "op", None), "name", "") == "relax.memory.alloc_tensor":
            found[binding.var] = binding.value.args[0]
        elif binding.value in found:
            found[binding.var] = found[binding.value]
    return found


def shared_while_forked(module: Any) -> Iterator[str]:
    """Kernels of the main stream that get memory of a lookup between its fork and its join."""
    order, owner = bindings(module), storages(module)
    for leave in (i for i, b in enumerate(order) if called(b) == LEAVE):
        lookup = order[leave - 1].value
        number = int(order[leave].value.args[0])
        join = next(i for i, b in enumerate(order) if called(b) == JOIN and int(b.value.args[0]) == number)
        side = [owner[a] for a in lookup.args if a in owner]
        for binding in order[leave + 1 : join]:
            if called(binding) in ("hashed", "count", "work", "both"):
                arguments = [owner[a] for a in binding.value.args if a in owner]
                yield from (called(binding) for s in side if any(s.same_as(a) for a in arguments))


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_lookups_stand_behind_their_hash_and_are_joined_before_their_reader(static: bool, late: bool) -> None:
    names = [name for name in map(called, bindings(planned(module(static, late)))) if name]
    side = [FORK, "lookup", LEAVE]
    assert names == [
        "hashed", *side, "hashed", *side, "count", "count", "work", "work", JOIN, "both", JOIN,
    ]  # fmt: skip


@pytest.mark.parametrize("static", [True, False])
def test_memory_of_a_lookup_is_its_own_until_it_is_joined(static: bool) -> None:
    assert not list(shared_while_forked(planned(module(static))))


@pytest.mark.parametrize("static", [True, False])
def test_without_tensors_in_the_join_it_would_not_be(static: bool) -> None:
    assert "count" in list(shared_while_forked(planned(module(static), alive=False)))


def test_a_module_without_lookups_is_left_alone() -> None:
    before = unplanned(module(static=True, op="Gather"))
    text = before.script()
    assert side_stream.run_beside(before).script() == text
