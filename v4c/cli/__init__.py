"""The command `v4c`: `main` is its entry point.

Commands read options, call the Python API and print; whatever they need is imported when they run, so that ``v4c -h``
answers at once and ``v4c run`` never loads the compiler.
"""

from .root import main

__all__ = ["main"]
