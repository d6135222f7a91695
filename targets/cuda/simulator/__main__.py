"""``python -m v4c.targets.cuda.simulator``: compile a checkpoint for the simulated GPU, and compare it with torch.

It is the target ``cuda`` in everything but the compiler of its kernels, for machines without a GPU. Slow: models of a
few layers and some dozen tokens.
"""

from __future__ import annotations

from pathlib import Path

import click

from v4c.errors import Error

from ...quantisation import QUANTISED
from ..architectures import ARCHITECTURES, DEFAULT, find
from ..target import CUDATarget
from .build import compile_simulated, load_driver


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(["f32", "bf16"]), default="f32", show_default=True)
@click.option("--quant", type=click.Choice(["none", *QUANTISED, "native"]), default="none", show_default=True)
@click.option("--arch", type=click.Choice(list(ARCHITECTURES)), default=DEFAULT, show_default=True)
@click.option("--prompt", default=20, show_default=True, help="Tokens read before decoding.")
@click.option("--decode", default=8, show_default=True, help="Tokens decoded one by one.")
def main(checkpoint: Path, artifact: Path, dtype: str, quant: str, arch: str, prompt: int, decode: int) -> None:
    """Compile CHECKPOINT into ARTIFACT, unless it is there, and print how far it is from torch; exit 1 if too far."""
    load_driver()
    from v4c.compiler import compile_for, storage_of
    from v4c.frontend.checkpoint import Checkpoint
    from v4c.runtime import cuda_graph
    from v4c.verification import verify

    replays: list[int] = []
    replay = cuda_graph.Stream.replay

    def counted(stream: cuda_graph.Stream, graph: object) -> None:
        replays.append(1)
        replay(stream, graph)  # type: ignore[arg-type]

    cuda_graph.Stream.replay = counted  # type: ignore[method-assign, assignment]
    try:
        source = Checkpoint.open(str(checkpoint))
        source.check()
        if not artifact.exists():
            compile_for(
                CUDATarget(find(arch), None, compile_simulated), source, artifact, storage=storage_of(dtype, quant),
                weights=True,
            )  # fmt: skip
        report = verify(artifact, source, prompt_tokens=prompt, decode_tokens=decode)
    except Error as error:
        raise click.ClickException(str(error)) from None
    click.echo(
        f"max_abs_diff {report.max_abs_diff:.3e} typical_diff {report.typical_diff:.3e} "
        f"tolerance {report.tolerance:.3e} replayed_steps {len(replays)}"
    )
    raise SystemExit(0 if report.ok else 1)


if __name__ == "__main__":
    main()
