"""The command group: global options, and how every outcome becomes an exit code and at most one line on stderr.

Exit codes: 0 done; 1 a check failed; 2 bad usage or bad input; 130 interrupted; 141 the reader of stdout went away; 143
terminated.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import click

from v4c.errors import Error

from .bench import bench
from .eval import eval_command
from .init import init
from .inspect import inspect
from .interrupt import Terminated
from .make import compile_command, export
from .options import DEBUG, debug_option
from .presets import presets
from .run import run
from .tune import tune
from .verify import verify

BAD_INPUT, INTERRUPTED, BROKEN_PIPE, TERMINATED = 2, 130, 141, 143


class Root(click.Group):
    """A group that reports errors on one line; with ``--debug`` the traceback comes first."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command line and exit the process with its code."""
        # Usage errors surface here; what a command raises has been dealt with in `invoke`.
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except click.ClickException as error:
            _complain(_usage(error))
            code = BAD_INPUT
        except click.Abort:
            _complain("interrupted")
            code = INTERRUPTED
        except OSError as error:  # of the help text itself
            _complain(f"stdout: expected to write to it, found {error.strerror}")
            code = BAD_INPUT
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command; returns its exit code when it failed."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a reader that is gone is noticed here rather than at exit
            return result
        except (click.ClickException, click.exceptions.Exit):
            raise
        except KeyboardInterrupt as error:
            _trace(ctx)
            terminated = isinstance(error, Terminated)
            _complain("terminated" if terminated else "interrupted")
            return TERMINATED if terminated else INTERRUPTED
        except BrokenPipeError:
            # Python flushes stdout once more at exit, and would complain again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        except Error as error:
            _trace(ctx)
            _complain(str(error))
            return BAD_INPUT
        except Exception as error:
            _trace(ctx)
            hint = "" if DEBUG in ctx.meta else " (run with --debug for the traceback)"
            first_line = f"{error}".strip().partition("\n")[0]  # libraries write essays
            _complain(f"unexpected {type(error).__name__}: {first_line[:200]}{hint}")
            return BAD_INPUT


def _complain(message: str) -> None:
    click.echo(f"v4c: error: {' '.join(message.split())}", err=True)


def _trace(ctx: click.Context) -> None:
    if DEBUG in ctx.meta:
        traceback.print_exc()


def _usage(error: click.ClickException) -> str:
    message = error.format_message()
    ctx = getattr(error, "ctx", None)
    return f"{message} (see {ctx.command_path} -h)" if ctx is not None else message


@click.group(
    "v4c",
    cls=Root,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    commands=[presets, init, export, compile_command, run, verify, eval_command, bench, inspect, tune],
)
@click.version_option(package_name="v4c", prog_name="v4c", message="%(prog)s %(version)s")
@debug_option
def main() -> None:
    """Compile DeepSeek-V4-family models: checkpoint to ONNX to a module that runs."""
