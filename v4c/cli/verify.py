"""``v4c verify``: a compiled model against the torch reference."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import click

from .console import Progress, print_json
from .options import debug_option, json_option

_KEYS = ("max_abs_diff", "typical_diff", "argmax_agreement", "tolerance", "ok")


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "-m", "--model", required=True, metavar="CHECKPOINT", type=click.Path(path_type=Path), help="What it was made from."
)
@click.option(
    "--prompt-tokens",
    default=250,
    show_default=True,
    help="Tokens read before decoding. The indexer chooses among rows only past index_topk * 4 tokens.",
)
@click.option("--seed", default=0, show_default=True, help="Of the random tokens.")
@json_option
@debug_option
@click.pass_context
def verify(ctx: click.Context, artifact: Path, model: Path, prompt_tokens: int, seed: int, as_json: bool) -> None:
    """Compare a compiled model with the torch reference.

    Exits with 1 when a logit differs by more than the tolerance. With quantised weights or float16 arithmetic that is
    asked of a typical position only.
    """
    import v4c

    with Progress() as progress:
        report = v4c.verify(artifact, model, prompt_tokens=prompt_tokens, seed=seed, progress=progress)
    if as_json:
        document = {key: value for key, value in asdict(report).items() if key in _KEYS}
        if not math.isfinite(report.max_abs_diff):
            document["max_abs_diff"] = None  # JSON has no infinity
        print_json(document)
    else:
        if report.by_typical:
            click.echo(f"typical difference  {report.typical_diff:.3g} (tolerance {report.tolerance:.3g})")
            click.echo(f"largest difference  {report.max_abs_diff:.3g}")
        else:
            click.echo(f"largest difference  {report.max_abs_diff:.3g} (tolerance {report.tolerance:.3g})")
        click.echo(f"same argmax         {report.argmax_agreement:.2%} of {report.positions} positions")
        click.echo("ok" if report.ok else "FAILED")
    ctx.exit(0 if report.ok else 1)
