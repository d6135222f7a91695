"""Operations as the host graph calls them, the launch plan that tells of them, and what their costs add up to."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from tests.targets.ascend.requirements import DEVICES as DEVICES_TESTED
from tests.targets.ascend.requirements import needs_compiler, needs_mlir
from v4c.custom_ops import OPS, TensorSpec
from v4c.errors import ArtifactError, UnsupportedError
from v4c.targets.ascend.devices import DEVICES
from v4c.targets.ascend.gates import GateError
from v4c.targets.ascend.library import simulation_objects
from v4c.targets.ascend.lowering import AscendKernels
from v4c.targets.ascend.operation import example_arrays, example_dims, scalars_of
from v4c.targets.ascend.partition import Partition, check_operation
from v4c.targets.ascend.plan import launch_plan, launches, plan_files, program_of
from v4c.targets.ascend.report import describe, read_plan

LIMITS = DEVICES["Ascend910B1"].limits


@pytest.fixture
def kernels():
    return AscendKernels(LIMITS)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("V4C_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def only(kernel):
    return kernel.arguments[0]


def test_one_operation_for_equal_sizes(kernels):
    first, again = kernels.linear((40,), 24, "float16", None), kernels.linear((40,), 24, "float16", None)
    other = kernels.linear((40,), 24, "float32", None)
    assert first == again
    assert list(kernels.operations) == ["mat_mul", "mat_mul1"]
    assert other.factory.__name__ == "mat_mul1"
    assert [p.op for p in only(other).programs] == ["MatMul"] * 2, "a router is not rounded"


def test_programs_that_differ_have_names_that_differ(kernels):
    """Their names tell the sizes, not an epsilon."""
    (a,), (b,) = (only(kernels.rms_norm(64, eps, True)).programs for eps in (1e-6, 1e-5))
    assert a.name != b.name
    assert f"@{b.name}(" in b.text
    assert a.text.replace(a.name, "") != b.text.replace(b.name, "")


def test_no_program_for_fused_products(kernels):
    with pytest.raises(UnsupportedError, match="merged"):
        kernels.linear((8, 8), 16, "float16", None)
    with pytest.raises(UnsupportedError, match="normalising"):
        kernels.linear((8,), 16, "float16", 1e-6)


def test_rows_too_wide_for_the_device_are_the_hosts(kernels):
    operation = only(kernels.rms_norm(1 << 20, 1e-6, False))
    assert "unified buffer" in kernels.too_large[operation.name]
    partition = Partition.of({operation.name: operation}, kernels.too_large, DEVICES["Ascend910B1"])
    assert operation.name in partition.fallbacks
    assert not partition.reports
    with pytest.raises(GateError, match="unified buffer"):
        Partition.of({operation.name: operation}, kernels.too_large, DEVICES["Ascend910B1"], strict=True)


def built(kernels, tmp_path):
    """The operations' host functions in a library, as the target links them."""
    import tvm

    module = tvm.IRModule({name: only_function(o) for name, o in kernels.operations.items()})
    library = tmp_path / "k.so"
    objects = simulation_objects(kernels.operations, tmp_path)
    tvm.compile(module, target="llvm").export_library(str(library), addons=objects, options=["-lm"])
    return tvm.runtime.load_module(str(library))


def only_function(operation):
    from v4c.targets.ascend.host_function import host_function

    return host_function(operation).with_attr("global_symbol", operation.name)


@needs_mlir
def test_the_host_graph_calls_the_programs(kernels, tmp_path):
    """Few rows and many, integers narrowed and widened, a fault told."""
    import tvm

    kernels.linear((40,), 24, "float16", None)
    hashes = [
        ("input_ids", (2, 3), "int64"), ("lookup", (64,), "int64"), ("multipliers", (3,), "int64"),
        ("primes", (8,), "int64"), ("offsets", (8,), "int64"), ("history", (2, 2), "int64"),
        ("positions", (2,), "int64"), ("lengths", (2,), "int64"),
    ]  # fmt: skip
    kernels.custom(OPS["EngramHash"], [TensorSpec(s, d) for _, s, d in hashes], {"pad_id": 2})
    library = built(kernels, tmp_path)
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((40, 24)).astype(np.float16)
    for rows in (1, 16, 17, 70):
        x, y = generator.standard_normal((rows, 24), np.float32), tvm.runtime.empty((rows, 40), "float32")
        library["mat_mul"](tvm.runtime.tensor(x), tvm.runtime.tensor(weight), y)
        expected = x.astype(np.float16).astype(np.float32) @ weight.T.astype(np.float32)
        assert np.abs(y.numpy() - expected).max() < 1e-4

    operation = kernels.operations["engram_hash"]
    arrays = example_arrays(operation, {**example_dims(operation), "chunk": 3})
    wide = {b.name: arrays[b.name].astype(b.host_dtype) for b in operation.borders if b.name in arrays}
    tensors = {name: tvm.runtime.tensor(array) for name, array in wide.items()}
    addresses = tvm.runtime.empty((2, 3, 8), "int64")
    library["engram_hash"](*tensors.values(), addresses)
    import torch

    from v4c.custom_ops.engram_hash import engram_hash

    expected, history = engram_hash(*(torch.from_numpy(a.astype(np.int64)) for a in wide.values()), 2)
    assert np.array_equal(addresses.numpy(), expected.numpy())
    assert np.array_equal(tensors["history"].numpy(), history.numpy())


@needs_mlir
def test_a_program_that_leaves_its_buffers_is_an_error(kernels, tmp_path, capfd):
    import tvm

    kernels.add(24)
    operation = kernels.operations["add"]
    (program,) = operation.programs
    text = program.text.replace("arith.constant 24 : index", "arith.constant 4800 : index")
    assert text != program.text
    wrong = dataclasses.replace(program, text=text)
    variants = (dataclasses.replace(operation.variants[0], programs=(wrong,)),)
    kernels.operations["add"] = dataclasses.replace(operation, variants=variants)
    library = built(kernels, tmp_path)
    x, y = tvm.runtime.tensor(np.zeros((16, 24), np.float32)), tvm.runtime.empty((16, 24), "float32")
    with pytest.raises(Exception, match="kernel add: a tile program leaves its buffers"):
        library["add"](x, x, y)
    assert "reads elements 38400 to" in capfd.readouterr().err


@needs_compiler
@needs_mlir
def test_what_a_gate_refuses_goes_to_the_host(kernels):
    kernels.add(24)
    kernels.rms_norm(32, 1e-6, False)
    operation = kernels.operations["add"]
    (program,) = operation.programs
    wrong = dataclasses.replace(program, text=program.text.replace("arith.addf", "arith.subx"))
    broken = dataclasses.replace(operation, variants=(dataclasses.replace(operation.variants[0], programs=(wrong,)),))
    operations = {**kernels.operations, "add": broken}
    told = []
    partition = Partition.of(
        operations, {}, DEVICES["Ascend910B1"], progress=lambda what, done, total: told.append(what)
    )
    assert list(partition.fallbacks) == ["add"]
    assert "Ascend910B1, compile" in partition.fallbacks["add"]
    assert any(line.startswith("add on the host: kernel") for line in told)
    plan = plan_of(operations, partition)
    assert [plan["operations"][n]["runs_on"] for n in ("add", "rms_normalization")] == ["host", "device"]
    files = plan_files(plan, operations, partition)
    assert [n for n in files if n.endswith(".mlir")] == [
        kernels.operations["rms_normalization"].programs[0].name + ".mlir"
    ]
    with pytest.raises(GateError, match="add_24_f32, Ascend910B1, compile"):
        Partition.of(operations, {}, DEVICES["Ascend910B1"], strict=True)


@pytest.mark.slow
@needs_compiler
@needs_mlir
@pytest.mark.parametrize("device", DEVICES_TESTED)
def test_routes_of_v4_flash(device):
    """Of 256 experts; a hash route that sums over all of them at once comes out wrong for the 950."""
    kernels = AscendKernels(DEVICES[device].limits)
    logits, ids = TensorSpec((1, 1, 256)), TensorSpec((1, 1), "int64")
    kernels.custom(OPS["HashRoute"], [logits, ids, TensorSpec((64, 6), "int64")], {"scaling": 1.5})
    kernels.custom(OPS["TopKRoute"], [logits, TensorSpec((256,))], {"scaling": 1.5, "top_k": 6})
    assert not Partition.of(kernels.operations, {}, DEVICES[device], strict=True).fallbacks


@needs_compiler
@needs_mlir
def test_reports_are_kept(kernels, monkeypatch):
    operation = only(kernels.rms_norm(48, 1e-6, True))
    first = check_operation(operation, DEVICES["Ascend910B1"])
    assert [r.passed[-1] for r in first] == ["scheduled numerics"]
    monkeypatch.setattr("v4c.targets.ascend.partition.check", lambda *_: pytest.fail("checked again"))
    assert check_operation(operation, DEVICES["Ascend910B1"]) == first


def plan_of(operations, partition, functions=None):
    import tvm

    plan = launch_plan(tvm.IRModule(), operations, partition, DEVICES["Ascend910B1"])
    return json.loads(json.dumps({**plan, "functions": functions or {}}))


@needs_compiler
def test_launches_and_costs(kernels, tmp_path):
    kernels.linear((40,), 24, "float16", None)
    kernels.rms_norm(24, 1e-6, True)
    rows = [[2.0, ["batch", "chunk"]]]
    functions = {
        "main": [{"host": "take"}, {"function": "layer"}, {"function": "layer"}],
        "layer": [
            {"operation": "rms_normalization", "dims": {"rows": rows}},
            {"operation": "mat_mul", "dims": {"rows": rows}},
        ],
    }  # fmt: skip
    plan = plan_of(kernels.operations, Partition(), functions)
    few, many = (list(launches(plan, "main", {"batch": 1, "chunk": n})) for n in (8, 9))
    assert [launch.operation for launch in few] == ["rms_normalization", "mat_mul", "mat_mul"] * 2
    assert {launch.scalars["rows"] for launch in few} == {16}
    assert few[2].program != many[2].program, "tiles of many rows from 17 on"
    for operation in kernels.operations.values():
        for program in operation.programs:
            read = program_of(plan, program.name, program.op)
            assert read == dataclasses.replace(program, text="")

    described = describe(plan, {"prefill": "main", "decode": "main"})
    assert described["host"] == {"fallbacks": {}, "operators": ["take"]}
    assert all(figure["source"] for figure in described["rates"].values())
    decode = described["decode"]
    assert decode["total"]["launches"] == 6
    assert decode["ops"]["MatMul"]["cube"] == 2 * 16 * 48 * 32, "whole tiles: of 16 rows, 16 columns, 16 inputs"
    assert decode["total"]["bytes"] == sum(op["bytes"] for op in decode["ops"].values())

    (tmp_path / "plan.json").write_text(json.dumps({**plan, "format": 9}))
    with pytest.raises(ArtifactError, match="format 9"):
        read_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("[")
    with pytest.raises(ArtifactError, match=r"plan\.json"):
        read_plan(tmp_path / "plan.json")


def test_scratch_is_what_is_not_at_the_border(kernels):
    operation = only(kernels.linear((40,), 24, "float16", None))
    scratch = operation.scratch(operation.variants[0])
    assert [a.name for a in scratch] == ["x_half"]
    scalars = scalars_of({"rows": 3})
    assert operation.workspace(operation.variants[0], scalars) == 192, "3 x 24 x 2 bytes, up to 64"
    assert operation.variant({"rows": 16}).most_rows == 16
    assert operation.variant({"rows": 17}).most_rows is None
