"""Options and checks that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from v4c.frontend.config import ModelConfig

DEBUG = "v4c.debug"
"""Key in the context's `meta`, which all commands of one call share, once ``--debug`` was given."""

Command = TypeVar("Command", bound=Callable[..., Any])


def _set_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[DEBUG] = True


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Show a traceback with errors."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
threads_option = click.option("--threads", type=int, metavar="N", help="Threads per kernel (default: every CPU).")
activations_option = click.option(
    "--activations", type=click.Choice(["f32", "bf16"]), default="f32", show_default=True,
    help="bf16 rounds the rows that bfloat16 matrices are multiplied with.",
)  # fmt: skip
weights_memory_option = click.option(
    "--weights-memory", metavar="SIZE", help="Memory that weights may take, such as 4GiB; experts stay on disk."
)

huge_pages_option = click.option(
    "--huge-pages", is_flag=True, help="Copy the weights into 2 MiB pages of this process: faster, if they fit."
)


def output_option(metavar: str, help: str) -> Callable[[Command], Command]:
    """``-o``, required."""
    return click.option("-o", "--output", required=True, metavar=metavar, type=click.Path(path_type=Path), help=help)


def model_options(metavar: str) -> Callable[[Command], Command]:
    """``-m`` or ``--preset``, and ``--no-weights``; `model_source` reads them."""

    def add(command: Command) -> Command:
        for option in (
            click.option("--no-weights", is_flag=True, help="Leave the weights out."),
            click.option("--preset", metavar="NAME", help="A known size with random weights; see v4c presets."),
            click.option("-m", "--model", metavar=metavar, type=click.Path(path_type=Path), help="The model to read."),
        ):
            command = option(command)
        return command

    return add


def model_source(model: Path | None, preset: str | None) -> Path | ModelConfig:
    """What ``-m`` or ``--preset`` names; exactly one of them must be given."""
    if (model is None) == (preset is None):
        raise click.UsageError("Expected one of -m and --preset.", click.get_current_context())
    if model is not None:
        return model
    from v4c.frontend.presets import preset as find

    assert preset is not None
    return find(preset)
