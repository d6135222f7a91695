"""``v4c export`` and ``v4c compile``: what writes an ONNX or MLIR file, or an artifact."""

from __future__ import annotations

from pathlib import Path

import click

from .console import Progress, message, print_json
from .options import activations_option, debug_option, model_options, model_source, output_option


@click.command()
@model_options("CHECKPOINT")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["onnx", "mlir"]),
    default="onnx",
    show_default=True,
    help="mlir is linalg and needs the extra mlir.",
)
@click.option(
    "--dtype",
    type=click.Choice(["f32", "bf16", "f16"]),
    default="f32",
    show_default=True,
    help="Storage of the weight matrices.",
)
@click.option("--all-logits", is_flag=True, help="Logits of every token rather than of each row's last.")
@click.option(
    "--mtp", is_flag=True, help="Write the multi-token-prediction layer too, as NAME.mtp.onnx beside NAME.onnx."
)
@click.option("--dry-run", is_flag=True, help="Print what would be exported, as JSON, and write nothing.")
@output_option("FILE", "File to write; weights go beside it.")
@debug_option
def export(
    model: Path | None,
    preset: str | None,
    no_weights: bool,
    format_: str,
    dtype: str,
    all_logits: bool,
    mtp: bool,
    dry_run: bool,
    output: Path,
) -> None:
    """Write a model as one ONNX file, or as MLIR.

    Custom operators carry bodies of standard ones, so any ONNX runtime can run it. MLIR is linalg on tensors, with
    weights in FILE.safetensors.
    """
    source = model_source(model, preset)
    import v4c

    with Progress() as progress:
        made = v4c.export(
            source,
            output,
            format=format_,
            dtype=dtype,
            weights=not no_weights,
            all_logits=all_logits,
            mtp=mtp,
            dry_run=dry_run,
            progress=progress,
        )
    if dry_run:
        print_json(made)
    else:
        message(f"wrote {output}")


@click.command("compile")
@model_options("CHECKPOINT|FILE.onnx")
@click.option(
    "--target",
    default="cpu",
    show_default=True,
    metavar="T",
    help="cpu, or cpu:LEVEL such as cpu:x86-64-v3; cuda, or cuda:ARCH such as cuda:sm_90a; ascend, or ascend:DEVICE "
    "such as ascend:Ascend950PR_9599.",
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
@activations_option
@click.option("--disable-pass", "disabled", multiple=True, metavar="NAME", help="Leave a pass out; may be repeated.")
@click.option("--dump-ir", metavar="DIR", type=click.Path(path_type=Path), help="Write the graph after each pass.")
@click.option("--tuning", metavar="DB", type=click.Path(path_type=Path), help="Schedules that v4c tune found.")
@click.option("--no-mtp", is_flag=True, help="Leave the multi-token-prediction layer out: no --speculative.")
@click.option("--strict", is_flag=True, help="Fail where the device refuses a kernel, rather than use the host.")
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
    activations: str,
    disabled: tuple[str, ...],
    dump_ir: Path | None,
    tuning: Path | None,
    no_mtp: bool,
    strict: bool,
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
            activations=activations,
            weights=not no_weights,
            disable_passes=disabled,
            dump_ir=dump_ir,
            tuning=tuning,
            mtp=not no_mtp,
            strict=strict,
            dry_run=dry_run,
            progress=progress,
        )
    if dry_run:
        print_json(made)
    else:
        if target.partition(":")[0] == "ascend":
            _tell_fallbacks(output)
        message(f"wrote {output}")


def _tell_fallbacks(artifact: Path) -> None:
    """Name every kernel that the host runs in the device's place, with the reason."""
    from v4c.runtime.artifact import read_manifest

    for kernel, reason in read_manifest(artifact).build.get("host_fallbacks", {}).items():
        message(f"kernel {kernel} runs on the host: {reason}")
