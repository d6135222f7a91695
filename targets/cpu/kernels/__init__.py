"""CPU kernels: factories of TVM PrimFuncs, one module per op, static sizes captured by closure."""

import inspect

# TVMScript compiles each expression under the file name "<ast>", and every macro call walks the stack; without this
# entry `inspect` searches all loaded modules for that file each time, which is two thirds of the parsing time.
inspect.modulesbyfile["<ast>"] = "builtins"  # type: ignore[attr-defined]
