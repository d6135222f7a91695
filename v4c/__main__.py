"""``python -m v4c`` is the command `v4c`."""

from v4c.cli import main

main()
