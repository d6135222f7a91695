"""``v4c init``, ``v4c export`` and ``v4c compile``: what writes a checkpoint, an ONNX file or an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from .console import Progress, message, print_json
from .options import debug_option, model_options, model_source, output_option


@click.command()
@click.option("--preset", required=True, metavar="NAME", help="A known size; see v4c presets.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random weights.")
@click.option("--dtype", type=click.Choice(["f32", "bf16"]), help="Of the weight matrices (default: the preset's).")
@output_option("DIR", "Folder to create.")
@debug_option
def init(preset: str, seed: int, dtype: str | None, output: Path) -> None:
    """Write a checkpoint with random weights.

    The folder is in Hugging Face layout.
    """
    from v4c.frontend.initialise import initialise
    from v4c.frontend.presets import preset as find

    config = find(preset)
    stored: Literal["f32", "bf16"] = "bf16" if (dtype or config.dtype) in ("bf16", "bfloat16") else "f32"
    with Progress() as progress:
        initialise(config, output, seed, stored, lambda done, total: progress("write weights", done, total))
    message(f"wrote {output}")


@click.command()
@model_options("CHECKPOINT")
@click.option("--format", "format_", type=click.Choice(["onnx", "mlir"]), default="onnx", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["f32", "bf16", "f16"]),
    default="f32",
    show_default=True,
    help="Storage of the weight matrices.",
)
@click.option("--all-logits", is_flag=True, help="Logits of every token rather than of each row's last.")
@output_option("FILE", "File to write; weights go to FILE.data beside it.")
@debug_option
def export(
    model: Path | None,
    preset: str | None,
    no_weights: bool,
    format_: str,
    dtype: str,
    all_logits: bool,
    output: Path,
) -> None:
    """Write a model as one ONNX file.

    Custom operators carry bodies of standard ones, so any ONNX runtime can run it.
    """
    source = model_source(model, preset)
    import v4c

    with Progress() as progress:
        v4c.export(
            source,
            output,
            format=format_,
            dtype=dtype,
            weights=not no_weights,
            all_logits=all_logits,
            progress=progress,
        )
    message(f"wrote {output}")


@click.command("compile")
@model_options("CHECKPOINT|FILE.onnx")
@click.option(
    "--target", default="cpu", show_default=True, metavar="T", help="cpu, or cpu:LEVEL such as cpu:x86-64-v3."
)
@click.option(
    "--dtype",
    type=click.Choice(["f32", "bf16"]),
    default="f32",
    show_default=True,
    help="Storage of the weight matrices.",
)
@click.option(
    "--quant",
    type=click.Choice(["none", "int8", "int4", "native"]),
    default="none",
    show_default=True,
    help="Quantisation of the weight matrices.",
)
@click.option(
    "--kv", type=click.Choice(["f32", "bf16", "fp8"]), default="f32", show_default=True, help="Storage of the caches."
)
@click.option("--disable-pass", "disabled", multiple=True, metavar="NAME", help="Leave a pass out; may be repeated.")
@click.option("--dump-ir", metavar="DIR", type=click.Path(path_type=Path), help="Write the graph after each pass.")
@click.option("--dry-run", is_flag=True, help="Print what would be compiled, as JSON, and write nothing.")
@click.option("--verbose", is_flag=True, help="Print each step on stderr.")
@output_option("DIR", "Folder to create.")
@debug_option
def compile_command(
    model: Path | None,
    preset: str | None,
    no_weights: bool,
    target: str,
    dtype: str,
    quant: str,
    kv: str,
    disabled: tuple[str, ...],
    dump_ir: Path | None,
    dry_run: bool,
    verbose: bool,
    output: Path,
) -> None:
    """Compile a model into an artifact.

    The artifact is a folder that v4c run and v4c.load take.
    """
    source = model_source(model, preset)
    import v4c

    with Progress(verbose) as progress:
        made = v4c.compile(
            source,
            output,
            target=target,
            dtype=dtype,
            quant=quant,
            kv=kv,
            weights=not no_weights,
            disable_passes=disabled,
            dump_ir=dump_ir,
            dry_run=dry_run,
            progress=progress,
        )
    if dry_run:
        print_json(made)
    else:
        message(f"wrote {output}")
