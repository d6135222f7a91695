"""The type of the API's progress callbacks."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, bytes or steps done, total); a total of 0 is unknown."""
