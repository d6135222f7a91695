"""The reader of generic MLIR."""

import pytest

from v4c.targets.ascend.mlir_text import (
    MLIRTextError,
    integers,
    keyword,
    memory_space,
    parse,
    reassociation,
    shaped,
)

TEXT = """\
#map = affine_map<(d0) -> (d0 * 2)>
"builtin.module"() ({
  "func.func"() <{function_type = (i32, memref<4x?xf16, strided<[8, 1], offset: ?>, #hivm.address_space<ub>>) -> (), \
sym_name = "f"}> ({
  ^bb0(%arg0: i32, %arg1: memref<4x?xf16, strided<[8, 1], offset: ?>, #hivm.address_space<ub>>):
    %0 = "arith.constant"() <{value = dense<[1, 2]> : vector<2xi32>}> : () -> vector<2xi32>
    %1:2 = "scf.for"(%arg0, %arg0, %arg0) ({
    ^bb0(%arg2: i32):
      "test.inner"(%1#1) {said = "a } \\" string", unit} : (i32) -> ()
      "scf.yield"(%arg0, %arg2) : (i32, i32) -> ()
    }) : (i32, i32, i32) -> (i32, i32)
    "func.return"() : () -> ()
  }) {hacc.entry} : () -> ()
}) {target = #spec<#entry<"UB", 3 : i32>>} : () -> ()
"""


def test_reads_operations_regions_and_attributes():
    module = parse(TEXT)
    assert module.aliases == {"#map": "affine_map<(d0) -> (d0 * 2)>"}
    function = module.functions["f"]
    assert "hacc.entry" in function.attributes
    (block,) = function.regions[0]
    assert [name for name, _ in block.arguments] == ["%arg0", "%arg1"]
    constant, loop, end = block.operations
    assert constant.attributes["value"] == "dense<[1, 2]> : vector<2xi32>"
    assert loop.results == ("%1#0", "%1#1")
    assert loop.operands == ("%arg0",) * 3
    assert end.name == "func.return"
    inner = loop.regions[0][0].operations[0]
    assert inner.operands == ("%1#1",)
    assert inner.attributes == {"said": '"a } \\" string"', "unit": "unit"}
    assert [o.name for o in loop.walk()] == ["scf.for", "test.inner", "scf.yield"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("module {}", "line 1: expected an operation's name in quotes"),
        ('"a"(%0', "expected an operand"),
        ('"a"() : () -> (i32', "unclosed bracket"),
        ('"a"() {\n x = "open', "unclosed bracket"),
        ('"a"() ({\n "b"() }) : () -> ()', "line 2: expected ':'"),
    ],
)
def test_errors_say_where(text, message):
    with pytest.raises(MLIRTextError, match=message.replace("(", r"\(")):
        parse(text)


def test_operand_groups():
    module = parse('"a"(%0, %1, %2) <{operandSegmentSizes = array<i32: 1, 0, 2>}> : (i1, i1, i1) -> ()\n')
    assert module.operation.segments() == [("%0",), (), ("%1", "%2")]


def test_attribute_readers():
    assert integers("array<i64: 1, -9223372036854775808>") == [1, -(2**63)]
    assert integers("array<i64>") == []
    assert reassociation("[[0, 1], [2]]") == [[0, 1], [2]]
    assert reassociation("[]") == []
    assert keyword("#hivm.pipe<PIPE_V>") == "PIPE_V"


def test_types():
    kind = shaped("memref<4x?xf16, strided<[8, 1], offset: ?>, #hivm.address_space<ub>>")
    assert (kind.shape, kind.element, kind.space) == ((4, None), "f16", "ub")
    assert shaped("vector<f32>").shape == ()
    assert memory_space("memref<?xi8, #hivm.address_space<gm>>") == "gm"
    assert memory_space("i32") == ""
    with pytest.raises(MLIRTextError, match="type 'i32'"):
        shaped("i32")
