"""Small tile programs, written out by hand, for the tests of the toolchain and the gates."""

from __future__ import annotations

from v4c.targets.ascend.program import Argument, GridAxis, Polynomial, Role, TileProgram, Work

MLIR = {
    "float16": "f16",
    "bfloat16": "bf16",
    "float32": "f32",
    "int8": "i8",
    "int32": "i32",
    "int64": "i64",
    "float8_e4m3fn": "f8E4M3FN",
    "float8_e5m2": "f8E5M2",
}
_MODE = {Work.VECTOR: "aiv", Work.CUBE: "aic", Work.MIXED: "mix"}


def argument(name: str, shape: tuple[int | str, ...], dtype: str, role: Role = Role.READ) -> Argument:
    return Argument(name, shape, dtype, role)


def module(name: str, work: Work, arguments: tuple[Argument, ...], body: str, scalars: tuple[str, ...] = ()) -> str:
    """MLIR text with the ABI of Triton's kernels; `body` finds the program's number as ``%p``."""
    buffers = "".join(f", %{a.name}: memref<?x{MLIR[a.dtype]}> {{tt.divisibility = 16 : i32}}" for a in arguments)
    numbers = "".join(f", %{s}: i32" for s in scalars)
    return f"""module {{
  func.func @{name}(%sync: memref<?xi8> {{hacc.arg_type = #hacc.arg_type<sync_block_lock>}}, \
%ws: memref<?xi8> {{hacc.arg_type = #hacc.arg_type<workspace>}}{buffers}{numbers}, \
%gx: i32, %gy: i32, %gz: i32, %px: i32, %py: i32, %pz: i32) attributes {{SyncBlockLockArgIdx = 0 : i64, \
WorkspaceArgIdx = 1 : i64, hacc.entry, hacc.function_kind = #hacc.function_kind<DEVICE>, \
mix_mode = "{_MODE[work]}", global_kernel = "local"}} {{
    %p = arith.index_cast %px : i32 to index
{body}    return
  }}
}}
"""


def load(value: str, buffer: str, offset: str, rows: int, columns: int, stride: int, dtype: str) -> str:
    """A ``[rows, columns]`` tile of `buffer` as a tensor."""
    t = MLIR[dtype]
    tile, view = f"memref<{rows}x{columns}x{t}>", f"memref<{rows}x{columns}x{t}, strided<[{stride}, 1], offset: ?>>"
    return f"""\
    %{value}_v = memref.reinterpret_cast %{buffer} to offset: [{offset}], sizes: [{rows}, {columns}], \
strides: [{stride}, 1] : memref<?x{t}> to {view}
    %{value}_l = memref.alloc() : {tile}
    memref.copy %{value}_v, %{value}_l : {view} to {tile}
    %{value} = bufferization.to_tensor %{value}_l restrict writable : {tile}
"""


def store(value: str, buffer: str, offset: str, rows: int, columns: int, stride: int, dtype: str) -> str:
    t = MLIR[dtype]
    view = f"memref<{rows}x{columns}x{t}, strided<[{stride}, 1], offset: ?>>"
    return f"""\
    %{value}_s = memref.reinterpret_cast %{buffer} to offset: [{offset}], sizes: [{rows}, {columns}], \
strides: [{stride}, 1] : memref<?x{t}> to {view}
    bufferization.materialize_in_destination %{value} in writable %{value}_s \
: (tensor<{rows}x{columns}x{t}>, {view}) -> ()
"""


def constants(*values: int) -> str:
    return "".join(f"    %c{v} = arith.constant {v} : index\n" for v in sorted(set(values)))


def axis(count: int, tile: int = 1) -> GridAxis:
    return GridAxis(Polynomial(((float(count), ()),)), tile)


def program(
    name: str,
    work: Work,
    arguments: tuple[Argument, ...],
    body: str,
    programs: int,
    scalars: tuple[str, ...] = (),
) -> TileProgram:
    text = module(name, work, arguments, body, scalars)
    return TileProgram(name, "Test", text, work, arguments, scalars, (axis(programs),))


def rms_norm(rows: int = 24, width: int = 256, tile: int = 8, dtype: str = "float16") -> TileProgram:
    """``y = x / sqrt(mean(x^2) + 1e-6) * w`` over rows of `width`."""
    t = MLIR[dtype]
    wide, row, narrow = f"tensor<{tile}x{width}xf32>", f"tensor<{tile}xf32>", f"tensor<{tile}x{width}x{t}>"
    body = (
        constants(0, tile * width)
        + f"    %o = arith.muli %p, %c{tile * width} : index\n    %zero = arith.constant 0.0 : f32\n"
        + load("x", "x_in", "%o", tile, width, width, dtype)
        + load("w", "w_in", "%c0", 1, width, width, dtype)
        + f"""\
    %n = arith.constant dense<{1 / width:.9e}> : {row}
    %eps = arith.constant dense<1.0e-06> : {row}
    %xf = arith.extf %x : {narrow} to {wide}
    %sq = arith.mulf %xf, %xf : {wide}
    %re = tensor.empty() : {row}
    %we = tensor.empty() : {wide}
    %r0 = linalg.fill ins(%zero : f32) outs(%re : {row}) -> {row}
    %sum = linalg.reduce ins(%sq : {wide}) outs(%r0 : {row}) dimensions = [1] (%u: f32, %v: f32) {{
      %uv = arith.addf %u, %v : f32
      linalg.yield %uv : f32 }}
    %mean = arith.mulf %sum, %n : {row}
    %shifted = arith.addf %mean, %eps : {row}
    %rs = math.rsqrt %shifted : {row}
    %rb = linalg.broadcast ins(%rs : {row}) outs(%we : {wide}) dimensions = [1]
    %y0 = arith.mulf %xf, %rb : {wide}
    %wf = arith.extf %w : tensor<1x{width}x{t}> to tensor<1x{width}xf32>
    %w1 = tensor.collapse_shape %wf [[0, 1]] : tensor<1x{width}xf32> into tensor<{width}xf32>
    %wb = linalg.broadcast ins(%w1 : tensor<{width}xf32>) outs(%we : {wide}) dimensions = [0]
    %y1 = arith.mulf %y0, %wb : {wide}
    %y = arith.truncf %y1 : {wide} to {narrow}
"""
        + store("y", "y_out", "%o", tile, width, width, dtype)
    )
    arguments = (
        argument("x_in", (rows, width), dtype),
        argument("w_in", (width,), dtype),
        argument("y_out", (rows, width), dtype, Role.WRITE),
    )
    return program("rms_norm", Work.VECTOR, arguments, body, rows // tile)


def exponential(tile: int = 256) -> TileProgram:
    """``y = exp(x)`` over `n` elements, `n` a scalar; the last program's tail is cut off."""
    t = f"memref<{tile}xf32>"
    view, part = f"memref<{tile}xf32, strided<[1], offset: ?>>", "memref<?xf32, strided<[1], offset: ?>>"
    body = (
        constants(0, tile)
        + f"""\
    %nn = arith.index_cast %n : i32 to index
    %o = arith.muli %p, %c{tile} : index
    %rest = arith.subi %nn, %o : index
    %m0 = arith.minsi %rest, %c{tile} : index
    %m = arith.maxsi %m0, %c0 : index
    %v = memref.reinterpret_cast %x to offset: [%o], sizes: [{tile}], strides: [1] : memref<?xf32> to {view}
    %l = memref.alloc() : {t}
    %sv = memref.subview %v[0] [%m] [1] : {view} to {part}
    %sl = memref.subview %l[0] [%m] [1] : {t} to memref<?xf32, strided<[1]>>
    memref.copy %sv, %sl : {part} to memref<?xf32, strided<[1]>>
    %a = bufferization.to_tensor %l restrict writable : {t}
    %b = math.exp %a : tensor<{tile}xf32>
    %bs = tensor.extract_slice %b[0] [%m] [1] : tensor<{tile}xf32> to tensor<?xf32>
    %w = memref.reinterpret_cast %y to offset: [%o], sizes: [{tile}], strides: [1] : memref<?xf32> to {view}
    %ws_ = memref.subview %w[0] [%m] [1] : {view} to {part}
    bufferization.materialize_in_destination %bs in writable %ws_ : (tensor<?xf32>, {part}) -> ()
"""
    )
    arguments = (argument("x", ("n",), "float32"), argument("y", ("n",), "float32", Role.WRITE))
    text = module("exponential", Work.VECTOR, arguments, body, ("n",))
    grid = (GridAxis(Polynomial(((1.0, ("n",)),)), tile),)
    return TileProgram("exponential", "Test", text, Work.VECTOR, arguments, ("n",), grid)


def product(
    m: int = 64, k: int = 128, n: int = 64, tile: tuple[int, int, int] = (32, 64, 64), dtype: str = "float16"
) -> TileProgram:
    """``c = a @ b`` in float32, `a` [m, k], `b` [k, n]."""
    tm, tn, tk = tile
    t, acc = MLIR[dtype], f"tensor<{tm}x{tn}xf32>"
    body = (
        constants(0, tk, tn, k, n, tm * k, tm * n, n // tn)
        + f"""\
    %zero = arith.constant 0.0 : f32
    %pm = arith.divsi %p, %c{n // tn} : index
    %pn = arith.remsi %p, %c{n // tn} : index
    %ao = arith.muli %pm, %c{tm * k} : index
    %bo = arith.muli %pn, %c{tn} : index
    %cr = arith.muli %pm, %c{tm * n} : index
    %co = arith.addi %cr, %bo : index
    %e = tensor.empty() : {acc}
    %i = linalg.fill ins(%zero : f32) outs(%e : {acc}) -> {acc}
    %r = scf.for %kk = %c0 to %c{k} step %c{tk} iter_args(%s = %i) -> ({acc}) {{
      %ak = arith.addi %ao, %kk : index
      %kb = arith.muli %kk, %c{n} : index
      %bk = arith.addi %bo, %kb : index
"""
        + load("at", "a", "%ak", tm, tk, k, dtype)
        + load("bt", "b", "%bk", tk, tn, n, dtype)
        + f"""\
      %mm = linalg.matmul ins(%at, %bt : tensor<{tm}x{tk}x{t}>, tensor<{tk}x{tn}x{t}>) outs(%s : {acc}) -> {acc}
      scf.yield %mm : {acc}
    }}
"""
        + store("r", "c", "%co", tm, tn, n, "float32")
    )
    arguments = (
        argument("a", (m, k), dtype),
        argument("b", (k, n), dtype),
        argument("c", (m, n), "float32", Role.WRITE),
    )
    return program("product", Work.CUBE, arguments, body, (m // tm) * (n // tn))


def _gather_rows(target: str, count: int, width: int) -> str:
    """Copies row ``ids[%i0 + j]`` of `table` into row j of `target`, a local buffer ``[count, width]``."""
    row = f"memref<1x{width}xf16, strided<[{width}, 1], offset: ?>>"
    return f"""\
    scf.for %j = %c0 to %c{count} step %c1 {{
      %ij = arith.addi %i0, %j : index
      %iv = memref.reinterpret_cast %ids to offset: [%ij], sizes: [1], strides: [1] \
: memref<?xi32> to memref<1xi32, strided<[1], offset: ?>>
      %id = memref.load %iv[%c0] : memref<1xi32, strided<[1], offset: ?>>
      %ix = arith.index_cast %id : i32 to index
      %ro = arith.muli %ix, %c{width} : index
      %rv = memref.reinterpret_cast %table to offset: [%ro], sizes: [1, {width}], strides: [{width}, 1] \
: memref<?xf16> to {row}
      %sv = memref.subview %{target}[%j, 0] [1, {width}] [1, 1] : memref<{count}x{width}xf16> to {row}
      memref.copy %rv, %sv : {row} to {row}
    }} {{ExtractedLoadOrStore}}
"""


def gather(rows: int = 100, count: int = 48, tile: int = 16, width: int = 128) -> TileProgram:
    """``y[i] = table[ids[i]]``."""
    body = (
        constants(0, 1, tile, width, tile * width)
        + f"    %i0 = arith.muli %p, %c{tile} : index\n    %o = arith.muli %p, %c{tile * width} : index\n"
        + f"    %l = memref.alloc() : memref<{tile}x{width}xf16>\n"
        + _gather_rows("l", tile, width)
        + f"    %g = bufferization.to_tensor %l restrict writable : memref<{tile}x{width}xf16>\n"
        + store("g", "y", "%o", tile, width, width, "float16")
    )
    arguments = (
        argument("ids", (count,), "int32"),
        argument("table", (rows, width), "float16"),
        argument("y", (count, width), "float16", Role.WRITE),
    )
    return program("gather", Work.VECTOR, arguments, body, count // tile)


def _softmax_rows(rows: int, columns: int) -> str:
    wide, row = f"tensor<{rows}x{columns}xf32>", f"tensor<{rows}xf32>"
    return f"""\
    %ninf = arith.constant 0xFF800000 : f32
    %re = tensor.empty() : {row}
    %m0 = linalg.fill ins(%ninf : f32) outs(%re : {row}) -> {row}
    %m = linalg.reduce ins(%s : {wide}) outs(%m0 : {row}) dimensions = [1] (%u: f32, %v: f32) {{
      %uv = arith.maximumf %u, %v : f32
      linalg.yield %uv : f32 }}
    %mb = linalg.broadcast ins(%m : {row}) outs(%se : {wide}) dimensions = [1]
    %d = arith.subf %s, %mb : {wide}
    %x = math.exp %d : {wide}
    %z0 = linalg.fill ins(%zero : f32) outs(%re : {row}) -> {row}
    %z = linalg.reduce ins(%x : {wide}) outs(%z0 : {row}) dimensions = [1] (%u: f32, %v: f32) {{
      %uv = arith.addf %u, %v : f32
      linalg.yield %uv : f32 }}
    %zb = linalg.broadcast ins(%z : {row}) outs(%se : {wide}) dimensions = [1]
    %pr = arith.divf %x, %zb : {wide}
    %ph = arith.truncf %pr : {wide} to tensor<{rows}x{columns}xf16>
"""


def attention(
    tokens: int = 2, heads: int = 32, keys: int = 64, width: int = 128, gathered: bool = False
) -> TileProgram:
    """Softmax attention of `heads` queries per token over shared rows that are keys and values.

    With `gathered` the rows come from a table by index, in the same kernel: bishengir drops that gather on 910B.
    """
    scores = f"tensor<{heads}x{keys}xf32>"
    body = (
        constants(0, 1, keys, width, heads * width, keys * width)
        + f"    %zero = arith.constant 0.0 : f32\n    %qo = arith.muli %p, %c{heads * width} : index\n"
        + f"    %scale = arith.constant dense<{width**-0.5:.9e}> : {scores}\n"
    )
    if gathered:
        body += f"    %i0 = arith.muli %p, %c{keys} : index\n    %k_l = memref.alloc() : memref<{keys}x{width}xf16>\n"
        body += _gather_rows("k_l", keys, width)
        body += f"    %k = bufferization.to_tensor %k_l restrict writable : memref<{keys}x{width}xf16>\n"
    else:
        body += f"    %ko = arith.muli %p, %c{keys * width} : index\n"
        body += load("k", "kv", "%ko", keys, width, width, "float16")
    body += load("q", "q_in", "%qo", heads, width, width, "float16")
    body += f"""\
    %te = tensor.empty() : tensor<{width}x{keys}xf16>
    %kt = linalg.transpose ins(%k : tensor<{keys}x{width}xf16>) \
outs(%te : tensor<{width}x{keys}xf16>) permutation = [1, 0]
    %se = tensor.empty() : {scores}
    %s0 = linalg.fill ins(%zero : f32) outs(%se : {scores}) -> {scores}
    %s1 = linalg.matmul ins(%q, %kt : tensor<{heads}x{width}xf16>, tensor<{width}x{keys}xf16>) \
outs(%s0 : {scores}) -> {scores}
    %s = arith.mulf %s1, %scale : {scores}
"""
    body += _softmax_rows(heads, keys)
    out = f"tensor<{heads}x{width}xf32>"
    body += f"""\
    %oe = tensor.empty() : {out}
    %o0 = linalg.fill ins(%zero : f32) outs(%oe : {out}) -> {out}
    %o = linalg.matmul ins(%ph, %k : tensor<{heads}x{keys}xf16>, tensor<{keys}x{width}xf16>) outs(%o0 : {out}) -> {out}
"""
    body += store("o", "y", "%qo", heads, width, width, "float32")
    rows = (argument("ids", (tokens, keys), "int32"), argument("table", (100, width), "float16"))
    arguments = (
        argument("q_in", (tokens, heads, width), "float16"),
        *(rows if gathered else (argument("kv", (tokens, keys, width), "float16"),)),
        argument("y", (tokens, heads, width), "float32", Role.WRITE),
    )
    return program("gathered_attention" if gathered else "attention", Work.MIXED, arguments, body, tokens)


def rounding(rows: int = 16, width: int = 64, source: str = "float32", target: str = "float8_e4m3fn") -> TileProgram:
    """``y`` is ``x`` rounded to `target`."""
    body = constants(0) + load("x", "x_in", "%c0", rows, width, width, source)
    body += (
        f"    %y = arith.truncf %x : tensor<{rows}x{width}x{MLIR[source]}> to tensor<{rows}x{width}x{MLIR[target]}>\n"
    )
    body += store("y", "y_out", "%c0", rows, width, width, target)
    arguments = (argument("x_in", (rows, width), source), argument("y_out", (rows, width), target, Role.WRITE))
    return program("rounding", Work.VECTOR, arguments, body, 1)


def rotated(rows: int = 8, width: int = 128) -> TileProgram:
    """Rows of a ring from its `n`-th on, then those before it, by way of one local buffer that was filled with zeros.

    bishengir for 910B moves the fill behind the first of the two copies.
    """
    view = f"memref<{rows}x{width}xf32, strided<[{width}, 1], offset: ?>>"
    part, local = f"memref<?x{width}xf32, strided<[{width}, 1], offset: ?>>", f"memref<{rows}x{width}xf32>"
    body = constants(0, rows, width)
    body += f"""\
    %nn = arith.index_cast %n : i32 to index
    %rest = arith.subi %c{rows}, %nn : index
    %zero = arith.constant 0.0 : f32
    %l = memref.alloc() : {local}
    linalg.fill ins(%zero : f32) outs(%l : {local})
    %start = arith.muli %nn, %c{width} : index
"""
    at_front = part.replace(", offset: ?", "")
    for name, begin, to, count in (("a", "%start", "0", "%rest"), ("b", "%c0", "%rest", "%nn")):
        target = at_front if to == "0" else part
        body += f"""\
    %{name} = memref.reinterpret_cast %ring to offset: [{begin}], sizes: [{rows}, {width}], strides: [{width}, 1] \
: memref<?xf32> to {view}
    %{name}_f = memref.subview %{name}[0, 0] [{count}, {width}] [1, 1] : {view} to {part}
    %{name}_t = memref.subview %l[{to}, 0] [{count}, {width}] [1, 1] : {local} to {target}
    memref.copy %{name}_f, %{name}_t : {part} to {target}
"""
    body += f"    %t = bufferization.to_tensor %l restrict writable : {local}\n"
    body += store("t", "y", "%c0", rows, width, width, "float32")
    arguments = (argument("ring", (rows, width), "float32"), argument("y", (rows, width), "float32", Role.WRITE))
    text = module("rotated", Work.VECTOR, arguments, body, ("n",))
    return TileProgram("rotated", "Test", text, Work.VECTOR, arguments, ("n",), (axis(1),))


def set_row(rows: int = 8, width: int = 64) -> TileProgram:
    """Writes `x` into row `n` of `state`; the other rows stay."""
    body = (
        constants(0, width)
        + f"    %nn = arith.index_cast %n : i32 to index\n    %o = arith.muli %nn, %c{width} : index\n"
    )
    body += load("x", "x_in", "%c0", 1, width, width, "float32") + store("x", "state", "%o", 1, width, width, "float32")
    arguments = (argument("x_in", (1, width), "float32"), argument("state", (rows, width), "float32", Role.UPDATE))
    text = module("set_row", Work.VECTOR, arguments, body, ("n",))
    return TileProgram("set_row", "Test", text, Work.VECTOR, arguments, ("n",), (axis(1),))
