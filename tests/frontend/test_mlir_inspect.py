"""The text reader behind ``v4c inspect FILE.mlir``: MLIR of any origin, and files that are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.v4c.cli_harness import assert_one_line, invoke
from v4c.errors import CheckpointError
from v4c.inspection import inspect

MODULE = """\
#map = affine_map<(d0) -> (d0)>
module {
  func.func @run(%x: tensor<?x4xf32> {some.note = "a, (b"}, %odd.name-2: tensor<2xbf16>) -> (tensor<?x4xf32>, i64) {
    %c = arith.constant 3 : i64
    %0 = call @twice(%x) : (tensor<?x4xf32>) -> tensor<?x4xf32>
    %1 = func.call @twice(%0) : (tensor<?x4xf32>) -> tensor<?x4xf32>
    return %1, %c : tensor<?x4xf32>, i64
  }
  func.func private @twice(%x: tensor<?x4xf32>) -> tensor<?x4xf32> {
    %0 = "arith.addf"(%x, %x) : (tensor<?x4xf32>, tensor<?x4xf32>) -> tensor<?x4xf32>
    %1:2 = call @inner(%0) : (tensor<?x4xf32>) -> (tensor<?x4xf32>, i1)
    cf.assert %1#1, "message with arith.mulf inside"
    return %1#0 : tensor<?x4xf32>
  }
  func.func private @inner(%x: tensor<?x4xf32>) -> (tensor<?x4xf32>, i1) {
    %t = arith.constant true
    return %x, %t : tensor<?x4xf32>, i1
  }
}
"""


def test_a_module_of_another_origin(tmp_path: Path) -> None:
    path = tmp_path / "m.mlir"
    path.write_text(MODULE)
    description = inspect(path)
    assert (description["kind"], description["problem"], "config" in description) == ("mlir", None, False)
    assert description["entry_points"]["run"] == {
        "inputs": [
            {"name": "x", "dtype": "float32", "shape": ["?", 4]},
            {"name": "odd.name-2", "dtype": "bfloat16", "shape": [2]},
        ],
        "outputs": [
            {"name": "", "dtype": "float32", "shape": ["?", 4]},
            {"name": "", "dtype": "int64", "shape": []},
        ],
    }
    assert description["functions"] == {"twice": 2, "inner": 2}
    assert description["ops"] == {
        "arith": {"arith.addf": {"nodes": 1, "calls": 2}, "arith.constant": {"nodes": 2, "calls": 3}},
        "cf": {"cf.assert": {"nodes": 1, "calls": 2}},
        "func": {"func.call": {"nodes": 3, "calls": 4}, "func.return": {"nodes": 3, "calls": 5}},
    }
    shown = invoke("inspect", path)
    assert shown.exit_code == 0
    assert "inputs of @run" in shown.stdout
    assert "? x 4" in shown.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "found no func.func"),
        ("hello", "found no func.func"),
        ("func.func @f(%x: tensor<4xf32>", "a parenthesis that is never closed"),
        ("func.func @f() {\n  call @f() : () -> ()\n  return\n}\n", "found a call of itself"),
        ("func.func @f() {\n  call @g() : () -> ()\n  return\n}\n", "expected the function @g"),
        ("// v4c.caches = [\nfunc.func @f() {\n}\n", "comment v4c.caches: expected JSON"),
        ("// v4c.caches = {}\nfunc.func @f() {\n}\n", "comment v4c.caches: expected a known key and type"),
        ("// v4c.other = {}\nfunc.func @f() {\n}\n", "comment v4c.other: expected a known key and type"),
        (
            '// v4c.mlir = {"weights_file": "../x"}\n'
            'util.global private @"w" = #flow.parameter.named<"model"::"w"> : tensor<4xf32>\nfunc.func @f() {\n}\n',
            "expected the name of a file beside, found '../x'",
        ),
    ],
)
def test_what_is_not_a_module_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "m.mlir"
    path.write_text(content)
    with pytest.raises(CheckpointError) as caught:
        inspect(path)
    assert message in str(caught.value)
    assert_one_line(invoke("inspect", path), str(path), message)


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "m.mlir"
    path.write_bytes(b"ML\xefR\x01\xff\xfe")
    assert_one_line(invoke("inspect", path), "expected MLIR as text")


def test_a_header_that_does_not_fit_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "m.mlir"
    header = '// v4c.inputs = [{"name": "x", "dtype": "float32", "shape": ["batch", 5]}]\n// v4c.outputs = []\n'
    path.write_text(header + "func.func @main(%x: tensor<?x4xf32>) {\n  return\n}\n")
    assert "comment v4c.inputs: expected what @main takes" in inspect(path)["problem"]
