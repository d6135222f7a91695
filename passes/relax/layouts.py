"""How weights are laid out for a target, decided from how the graph uses them.

A weight that only feeds a product is packed for that product; an expert stack for the grouped experts; a table that is
only gathered from keeps its shape but may be stored in half precision; everything else stays as it is, in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import onnx_ir as ir

from v4c.custom_ops import DOMAIN
from v4c.passes.onnx.rewriting import constant


class Layout(StrEnum):
    """What a weight is used as."""

    PLAIN = "plain"  # any shape, float32 or int64
    TABLE = "table"  # rows are gathered
    ENGRAM_TABLE = "engram_table"  # rows are gathered by EngramLookup alone, at addresses known from the tokens
    ROWS = "rows"  # [N, K] as it is: rows are gathered, and y = x @ w.T
    LINEAR = "linear"  # [N, K], y = x @ w.T
    LINEAR_KN = "linear_kn"  # [K, N], y = x @ w
    GROUPED_LINEAR = "grouped_linear"  # [G * N, K], block-diagonal
    GATE_UP = "gate_up"  # [..., 2F, D], gate and up projection of an expert, or of each of a stack
    EXPERTS_DOWN = "experts_down"  # [..., D, F]
    ROUTER = "router"  # [E, D], a product like LINEAR, kept in float32: rounding would change the choice
    CONVOLUTION = "convolution"  # [D, taps], one filter per channel, float32


PRODUCT_LAYOUTS = frozenset(
    (Layout.LINEAR, Layout.LINEAR_KN, Layout.GROUPED_LINEAR, Layout.GATE_UP, Layout.EXPERTS_DOWN)
)
"""Layouts that products read whole: what quantisation is for."""

TABLE_LAYOUTS = frozenset((Layout.TABLE, Layout.ENGRAM_TABLE, Layout.ROWS))
"""Layouts whose rows are read one by one."""


PAIRS = "bf16_pairs"
"""Storage dtype of bfloat16 matrices whose products take rows rounded to bfloat16: inputs lie in pairs, for there are
instructions that take two at a time."""

CacheFormat = Literal["f32", "bf16", "fp8"]


@dataclass(frozen=True)
class Storage:
    """What weights are stored as; routers, norms, mHC weights, sinks and biases are always float32.

    Attributes:
        tables: dtype of tables that rows are taken from: ``float32``, ``bfloat16`` or ``float16``.
        products: dtype of the matrices of products: one of these, or ``int8`` or ``int4``. Both may be ``native``: as
            the checkpoint has them, FP8 and FP4 included.
        activations: dtype of the rows that bfloat16 products take: ``float32`` or ``bfloat16``, which rounds them.
        kv: format of the caches: ``f32``, ``bf16`` or ``fp8``.
    """

    tables: str = "float32"
    products: str = "float32"
    kv: CacheFormat = "f32"
    activations: str = "float32"

    def of(self, layout: Layout) -> str:
        """Dtype of a weight of floating point numbers."""
        if layout in PRODUCT_LAYOUTS:
            return PAIRS if self.activations == "bfloat16" else self.products
        return self.tables if layout in TABLE_LAYOUTS else "float32"


def native_storage(layout: Layout, stored: Collection[str]) -> str:
    """What a weight is stored as that stays as the checkpoint has it.

    Args:
        layout: its layout. FP8 and FP4 stay in matrices of products; what else is so stored becomes float32.
        stored: what its tensors are stored as there; if they differ, it becomes float32.
    """
    found = next(iter(stored)) if len(set(stored)) == 1 else "float32"
    kept = layout in PRODUCT_LAYOUTS and layout != Layout.LINEAR_KN
    return "float32" if found in ("fp8", "fp4") and not kept else found


@dataclass(frozen=True)
class WeightSpec:
    """One weight a compiled function takes: where it comes from and how it is stored.

    Attributes:
        name: tensor name in the checkpoint or ONNX file; of a merged weight, its parts' names in one.
        layout: how it is packed.
        shape: shape before packing.
        groups: number of diagonal blocks (`Layout.GROUPED_LINEAR` only, else 1).
        dtype: storage dtype: ``float32``, ``bfloat16``, ``float16``, ``int64``, or ``int8``, ``int4``,
            ``fp8`` or ``fp4`` with scales; `PAIRS` of bfloat16.
        parts: of a weight merged from several tensors along axis 0, their names and shapes; otherwise empty.
    """

    name: str
    layout: Layout
    shape: tuple[int, ...]
    groups: int
    dtype: str
    parts: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def tensors(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names and shapes of the tensors it is made from."""
        return self.parts or ((self.name, self.shape),)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows that each tensor contributes."""
        return tuple(shape[0] for _, shape in self.tensors)


def merged_name(names: Iterable[str]) -> str:
    """One name for a merged weight: what the parts share outside the braces, what tells them apart inside.

    >>> merged_name(["layers.0.q_a_proj.weight", "layers.0.kv_proj.weight"])
    'layers.0.{q_a_proj,kv_proj}.weight'
    """
    split = [name.split(".") for name in names]
    shortest = min(len(s) for s in split)
    first = next((i for i in range(shortest) if len({s[i] for s in split}) > 1), shortest - 1)
    last = next((i for i in range(shortest - first) if len({s[-1 - i] for s in split}) > 1), shortest - first - 1)
    inner = ",".join(".".join(s[first : len(s) - last]) for s in split)
    return ".".join([*split[0][:first], f"{{{inner}}}", *split[0][len(split[0]) - last :]])


def part_names(name: str) -> list[str]:
    """The names that `merged_name` made one of; of any other name, itself."""
    before, brace, rest = name.partition("{")
    inner, _, after = rest.partition("}")
    return [f"{before}{part}{after}" for part in inner.split(",")] if brace else [name]


def uses(nodes: Iterable[ir.Node]) -> dict[str, list[tuple[ir.Node, int]]]:
    """Consumers of every value by name: (node, input index)."""
    found: dict[str, list[tuple[ir.Node, int]]] = {}
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value is not None and value.name is not None:
                found.setdefault(value.name, []).append((node, index))
    return found


Consumers = Mapping[str, list[tuple[ir.Node, int]]]


@dataclass(frozen=True)
class Callee:
    """A model-local function and the consumers of its values."""

    function: ir.Function
    consumers: Consumers


Callees = Mapping[tuple[str, str], Callee]
"""(domain, name) to model-local function."""


def layout_of(value: str, consumers: Consumers, functions: Callees) -> tuple[Layout, int]:
    """Layout and number of groups for weight `value`; PLAIN where its uses disagree or are not recognised.

    Args:
        value: name of the weight in this graph.
        consumers: as `uses` gives them.
        functions: for weights handed on to a model-local function.
    """
    found = {_one(node, index, consumers, functions) for node, index in consumers.get(value, [])}
    if found == {(Layout.TABLE, 1), (Layout.LINEAR, 1)}:  # tied embeddings
        return Layout.ROWS, 1
    if found == {(Layout.TABLE, 1), (Layout.ENGRAM_TABLE, 1)}:
        return Layout.TABLE, 1
    return found.pop() if len(found) == 1 else (Layout.PLAIN, 1)


_BY_INPUT: dict[tuple[str, str], dict[int, Layout]] = {
    ("", "MatMul"): {1: Layout.LINEAR_KN},
    ("", "Gather"): {0: Layout.TABLE},
    (DOMAIN, "EngramLookup"): {0: Layout.ENGRAM_TABLE},
    (DOMAIN, "EngramHash"): {1: Layout.TABLE},
    (DOMAIN, "HashRoute"): {2: Layout.TABLE},
    (DOMAIN, "EngramGateConv"): {6: Layout.CONVOLUTION},
    (DOMAIN, "GroupedExperts"): {3: Layout.GATE_UP, 4: Layout.EXPERTS_DOWN},
    (DOMAIN, "MixtureOfExperts"): {
        3: Layout.GATE_UP, 4: Layout.EXPERTS_DOWN, 5: Layout.GATE_UP, 6: Layout.EXPERTS_DOWN,
    },
    (DOMAIN, "RMSNormLinear"): {2: Layout.LINEAR},
    (DOMAIN, "TopKRouter"): {1: Layout.ROUTER},
}  # fmt: skip
"""Nodes that read a weight directly: (domain, op) to the layout of each input that is packed."""


_ROUTES = {(DOMAIN, "TopKRoute"), (DOMAIN, "HashRoute")}


def _one(node: ir.Node, index: int, consumers: Consumers, functions: Callees) -> tuple[Layout, int]:
    key = (node.domain, node.op_type)
    plain = (Layout.PLAIN, 1)
    if key in functions and node.domain != DOMAIN:
        callee = functions[key]
        name = callee.function.inputs[index].name
        assert name is not None
        return layout_of(name, callee.consumers, functions)
    if key == ("", "Cast"):
        return _through(node, consumers, functions)
    if key in _BY_INPUT:
        return _BY_INPUT[key].get(index, Layout.PLAIN), 1
    if key == ("", "Transpose") and list(node.attributes["perm"].value) == [1, 0]:
        if not _feeds_matmul(node, consumers):
            return plain
        return (Layout.ROUTER if _feeds_routes(node, consumers) else Layout.LINEAR), 1
    if key == ("", "Reshape") and index == 0:
        shape = constant(node.inputs[1])
        transposes = consumers.get(str(node.outputs[0].name), [])
        if shape is not None and len(shape) == 3 and len(transposes) == 1:
            transpose = transposes[0][0]
            grouped = transpose.op_type == "Transpose" and list(transpose.attributes["perm"].value) == [0, 2, 1]
            if grouped and _feeds_matmul(transpose, consumers):
                return Layout.GROUPED_LINEAR, int(shape[0])
    return plain


def _through(node: ir.Node, consumers: Consumers, functions: Callees) -> tuple[Layout, int]:
    name = node.outputs[0].name
    assert name is not None
    return layout_of(name, consumers, functions)


def _feeds_routes(transpose: ir.Node, consumers: Consumers) -> bool:
    """Whether the products with a transposed weight are the logits of routes."""
    products = [n for n, _ in consumers[str(transpose.outputs[0].name)]]
    readers = [n for p in products for n, _ in consumers.get(str(p.outputs[0].name), [])]
    return bool(readers) and all((n.domain, n.op_type) in _ROUTES for n in readers)


def _feeds_matmul(node: ir.Node, consumers: Consumers) -> bool:
    readers = consumers.get(str(node.outputs[0].name), [])
    return bool(readers) and all(n.op_type == "MatMul" and i == 1 for n, i in readers)
