"""``v4c init``: a checkpoint of random weights, in Hugging Face's layout or the published one."""

from __future__ import annotations

from pathlib import Path

import click

from .console import Progress, message
from .options import debug_option, output_option


@click.command()
@click.option("--preset", required=True, metavar="NAME", help="A known size; see v4c presets.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random weights.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["hf", "native"]),
    default="hf",
    show_default=True,
    help="Hugging Face's layout, or the published one: FP8 and FP4, upstream names.",
)
@click.option("--dtype", type=click.Choice(["f32", "bf16"]), help="Of the weight matrices (default: the preset's).")
@output_option("DIR", "Folder to create.")
@debug_option
def init(preset: str, seed: int, format_: str, dtype: str | None, output: Path) -> None:
    """Write a checkpoint with random weights.

    The same preset and seed give the same weights; --format native rounds them to FP8 and FP4.
    """
    if format_ == "native" and dtype is not None:
        raise click.UsageError("--dtype goes with --format hf: native formats are fixed.", click.get_current_context())
    from v4c.frontend.initialise import initialise
    from v4c.frontend.initialise_native import initialise_native
    from v4c.frontend.presets import preset as find

    config = find(preset)
    with Progress() as progress:

        def tell(done: int, total: int) -> None:
            progress("write weights", done, total)

        if format_ == "native":
            initialise_native(config, output, seed, progress=tell)
        else:
            wide = (dtype or config.dtype) not in ("bf16", "bfloat16")
            initialise(config, output, seed, "f32" if wide else "bf16", tell)
    message(f"wrote {output}")
