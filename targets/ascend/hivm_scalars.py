"""Semantics of the upstream MLIR operations in scheduled HIVM: ``arith``, ``math``, ``affine``, ``vector`` values.

Integers and indices are Python integers, wrapped to their width; floats are NumPy scalars; vectors are arrays. Element
arithmetic rounds to the element type after each operation, as written.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .hivm_memory import HIVMError, dtype_of
from .mlir_text import Operation, integers, keyword, shaped

Value = Any


def _element(type_text: str) -> str:
    return shaped(type_text).element if "<" in type_text else type_text


def typed(value: Value, type_text: str) -> Value:
    """A value as its type holds it: integers wrapped, floats rounded."""
    element = _element(type_text)
    if isinstance(value, np.ndarray):
        with np.errstate(over="ignore"):
            return value.astype(dtype_of(element), copy=False)
    if element == "i1":
        return bool(value)
    if element == "index":
        return int(value)
    if re.fullmatch(r"u?i\d+", element):
        width = int(element.lstrip("ui"))
        value = int(value) & ((1 << width) - 1)
        return value - (1 << width) if value >> (width - 1) else value
    with np.errstate(over="ignore"):
        return dtype_of(element).type(value)


def constant(text: str, type_text: str) -> Value:
    """An ``arith.constant``'s value: number, ``true``, bits of a float (``0xFF80``), or ``dense<...>``."""
    element = _element(type_text)
    dtype = dtype_of(element)
    if not text.startswith("dense<"):
        return typed(_number(text.partition(" : ")[0], dtype), type_text)
    body = text[len("dense<") : text.rindex("> :")]
    shape = tuple(n or 0 for n in shaped(type_text).shape)
    if body.startswith('"0x'):
        return np.frombuffer(bytes.fromhex(body[3:-1]), dtype).reshape(shape).copy()
    numbers = [_number(n, dtype) for n in re.findall(r"[^\s,\[\]]+", body)]
    return np.array(numbers if len(numbers) > 1 else np.full(shape, numbers[0]), dtype).reshape(shape)


def _number(text: str, dtype: np.dtype) -> Value:
    if text in ("true", "false"):
        return text == "true"
    if text.startswith("0x") and dtype.kind not in "iub":
        return np.frombuffer(int(text, 16).to_bytes(dtype.itemsize, "little"), dtype)[0]
    return int(text, 0) if dtype.kind in "iu" else float(text)


def _trunc_div(a: Value, b: Value) -> Value:
    if isinstance(a, np.ndarray):
        return np.where(b != 0, np.sign(a) * np.sign(b) * (abs(a) // np.where(b == 0, 1, abs(b))), 0)
    if b == 0:
        raise HIVMError("division by zero")
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _unsigned(value: Value, element: str) -> Value:
    return int(value) & ((1 << (64 if element == "index" else int(element[1:]))) - 1)


_BINARY: dict[str, Callable[[Value, Value], Value]] = {
    "addi": lambda a, b: a + b,
    "subi": lambda a, b: a - b,
    "muli": lambda a, b: a * b,
    "divsi": _trunc_div,
    "remsi": lambda a, b: a - _trunc_div(a, b) * b,
    "floordivsi": lambda a, b: a // b,
    "ceildivsi": lambda a, b: -(-a // b),
    "minsi": np.minimum,
    "maxsi": np.maximum,
    "andi": lambda a, b: a & b,
    "ori": lambda a, b: a | b,
    "xori": lambda a, b: a ^ b,
    "shli": lambda a, b: a << b,
    "shrsi": lambda a, b: a >> b,
    "addf": lambda a, b: a + b,
    "subf": lambda a, b: a - b,
    "mulf": lambda a, b: a * b,
    "divf": lambda a, b: a / b,
    "maximumf": np.maximum,
    "minimumf": np.minimum,
    "maxnumf": np.fmax,
    "minnumf": np.fmin,
    "powf": np.power,
}
_UNSIGNED = {"divui": "divsi", "remui": "remsi", "minui": "minsi", "maxui": "maxsi", "shrui": "shrsi"}


def _erf(x: Value) -> Value:
    return np.vectorize(math.erf, otypes=[np.float64])(np.asarray(x, np.float64))


UNARY: dict[str, Callable[[Value], Value]] = {
    "negf": lambda a: -a,
    "absf": np.abs,
    "absi": np.abs,
    "exp": np.exp,
    "exp2": np.exp2,
    "log": np.log,
    "log2": np.log2,
    "log1p": np.log1p,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
    "erf": _erf,
    "floor": np.floor,
    "ceil": np.ceil,
    "roundeven": np.rint,
}
_CONVERSIONS = {"extsi", "trunci", "index_cast", "sitofp", "extf", "truncf", "fptosi", "fptoui"}
_COMPARE: list[Callable[[Value, Value], Value]] = [
    lambda a, b: a == b,
    lambda a, b: a != b,
    lambda a, b: a < b,
    lambda a, b: a <= b,
    lambda a, b: a > b,
    lambda a, b: a >= b,
]
_COMPARE_FLOAT = {1: 0, 2: 4, 3: 5, 4: 2, 5: 3, 6: 1, 8: 0, 9: 4, 10: 5, 11: 2, 12: 3, 13: 1}
_REDUCTIONS: dict[str, Callable[..., Value]] = {
    "add": np.sum,
    "mul": np.prod,
    "maximumf": np.max,
    "minimumf": np.min,
    "maxnumf": np.fmax.reduce,
    "minnumf": np.fmin.reduce,
    "maxsi": np.max,
    "minsi": np.min,
}


def evaluator(operation: Operation, aliases: dict[str, str]) -> Callable[..., Value] | None:
    """A function of the operand values that gives the result, or None where this file does not know the operation."""
    dialect, _, name = operation.name.partition(".")
    result = operation.result_types[0] if operation.result_types else ""
    if dialect in ("arith", "math"):
        return _arithmetic(operation, name, result)
    if dialect == "affine" and name in ("apply", "min", "max"):
        function = affine_map(operation.attributes["map"], aliases)
        if name == "apply":
            return lambda *values: function(*values)[0]
        choose = min if name == "min" else max
        return lambda *values: choose(function(*values))
    if dialect == "vector":
        return _vector(operation, name, result)
    if operation.name == "builtin.unrealized_conversion_cast":
        return _registers(result)
    return None


def _registers(result: str) -> Callable[..., Value]:
    """Casts between registers and vectors of several: parts side by side, or the first lanes of a longer one."""
    if not result.startswith("vector"):
        return lambda a: a.reshape(-1)[0] if isinstance(a, np.ndarray) else a
    shape = tuple(n or 0 for n in shaped(result).shape)

    def cast(*parts: Value) -> Value:
        lanes = np.concatenate([np.asarray(part).reshape(-1) for part in parts])
        return lanes[: math.prod(shape)].reshape(shape)

    return cast


def _arithmetic(operation: Operation, name: str, result: str) -> Callable[..., Value] | None:
    if name == "constant":
        value = constant(operation.attributes["value"], result)
        return lambda: value
    if name in _BINARY:
        function = _BINARY[name]
        return lambda a, b: typed(function(a, b), result)
    if name in UNARY:
        unary = UNARY[name]
        return lambda a: typed(unary(a), result)
    if name in _UNSIGNED:
        function, element = _BINARY[_UNSIGNED[name]], _element(result)
        return lambda a, b: typed(function(_unsigned(a, element), _unsigned(b, element)), result)
    if name == "select":
        return lambda c, a, b: np.where(c, a, b) if isinstance(c, np.ndarray) else (a if c else b)
    if name in _CONVERSIONS:
        return _conversion(name, result)
    if name in ("extui", "index_castui", "uitofp"):
        element = _element(operation.operand_types[0])
        return lambda a: typed(a if isinstance(a, np.ndarray) else _unsigned(a, element), result)
    if name == "bitcast":
        target, origin = dtype_of(_element(result)), dtype_of(_element(operation.operand_types[0]))
        return lambda a: a.view(target) if isinstance(a, np.ndarray) else typed(origin.type(a).view(target), result)
    if name == "cmpi":
        predicate = int(operation.attributes["predicate"].split(" ")[0])
        compare, element = _COMPARE[predicate if predicate < 6 else predicate - 4], _element(operation.operand_types[0])
        if predicate < 6:
            return lambda a, b: typed(compare(a, b), result)
        return lambda a, b: typed(compare(_unsigned(a, element), _unsigned(b, element)), result)
    if name == "cmpf":
        compare = _COMPARE[_COMPARE_FLOAT[int(operation.attributes["predicate"].split(" ")[0])]]
        return lambda a, b: typed(compare(a, b), result)
    if name == "fma":
        return lambda a, b, c: typed(np.asarray(a, np.float64) * b + c, result)
    return None


def _conversion(name: str, result: str) -> Callable[[Value], Value]:
    if name in ("fptosi", "fptoui"):
        limits = np.iinfo(dtype_of(_element(result)))
        return lambda a: typed(np.clip(np.trunc(np.asarray(a, np.float64)), limits.min, limits.max), result)
    return lambda a: typed(a, result)


def _vector(operation: Operation, name: str, result: str) -> Callable[..., Value] | None:
    shape = tuple(n or 0 for n in shaped(result).shape) if "<" in result else ()
    attributes = operation.attributes
    if name == "shape_cast":
        return lambda a: a.reshape(shape)
    if name == "interleave":
        return lambda a, b: np.stack([a, b], axis=-1).reshape(shape)
    if name == "deinterleave":
        return lambda a: (a[..., 0::2].copy(), a[..., 1::2].copy())
    if name in ("broadcast", "splat"):
        dtype = dtype_of(_element(result))
        return lambda a: np.array(np.broadcast_to(np.asarray(a, dtype), shape))
    if name == "reduction":
        kind, merges = keyword(attributes["kind"]), "withoutInitMergeOp" not in attributes
        reduce = _REDUCTIONS[kind]
        # Without the merge the accumulator operand means nothing: bishengir leaves it there, unset.
        return lambda a, init=None: typed(
            reduce(np.append(a, a.dtype.type(init)) if merges and init is not None else a), result
        )
    if name == "multi_reduction":
        reduce = _REDUCTIONS[keyword(attributes["kind"])]
        axes = tuple(integers(attributes["reduction_dims"]))
        return lambda a, init: typed(reduce(np.stack([reduce(a, axis=axes), init]), axis=0), result)
    if name in ("create_mask", "constant_mask"):
        fixed = [int(n) for n in re.findall(r"\d+", attributes.get("mask_dim_sizes", "").split(":")[-1])]

        def mask(*sizes: int) -> np.ndarray:
            whole = np.zeros(shape, np.bool_)
            whole[tuple(slice(0, max(0, n)) for n in (sizes or fixed))] = True
            return whole

        return mask
    return None


def affine_map(text: str, aliases: dict[str, str]) -> Callable[..., list[int]]:
    """``affine_map<(d0)[s0] -> (d0 * 4 + s0)>`` as a function of its dimensions and symbols, in that order."""
    text = aliases.get(text, text)
    found = re.fullmatch(r"affine_map<\(([^()]*)\)(?:\[([^\]]*)\])? -> \((.*)\)>", text)
    if found is None:
        raise HIVMError(f"map {text}")
    names = [n.strip() for part in (found[1], found[2] or "") for n in part.split(",") if n.strip()]
    # The words have Python operators of the same precedence; @ stands for the rounding-up division.
    body = found[3].replace("floordiv", "//").replace("ceildiv", "@").replace("mod", "%")
    tree = ast.parse(f"[{body}]", mode="eval").body
    assert isinstance(tree, ast.List)

    def evaluate(node: ast.expr, values: dict[str, int]) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return values[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -evaluate(node.operand, values)
        if isinstance(node, ast.BinOp):
            a, b = evaluate(node.left, values), evaluate(node.right, values)
            operators: dict[type, Callable[[int, int], int]] = {
                ast.Add: lambda a, b: a + b,
                ast.Sub: lambda a, b: a - b,
                ast.Mult: lambda a, b: a * b,
                ast.FloorDiv: lambda a, b: a // b,
                ast.Mod: lambda a, b: a % b,
                ast.MatMult: lambda a, b: -(-a // b),
            }
            return operators[type(node.op)](a, b)
        raise HIVMError(f"map {text}")

    return lambda *numbers: [evaluate(e, dict(zip(names, numbers, strict=True))) for e in tree.elts]


def permutation(text: str, aliases: dict[str, str]) -> list[int | None]:
    """A transfer's map: for each dimension of the vector the memref's dimension, None where it is broadcast."""
    text = aliases.get(text, text)
    found = re.fullmatch(r"affine_map<\(([^()]*)\) -> \((.*)\)>", text)
    if found is None:
        raise HIVMError(f"map {text}")
    names = [n.strip() for n in found[1].split(",")]
    parts = [p.strip() for p in found[2].split(",") if p.strip()]
    return [None if part == "0" else names.index(part) for part in parts]
