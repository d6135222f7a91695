"""``v4c eval``: bits per byte on a text and recall by distance, of compiled models and their references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .console import Progress, new_table, print_json, print_table
from .options import debug_option, json_option, threads_option


@click.command("eval")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", type=click.Path(path_type=Path))
@click.option(
    "--text", metavar="FILE", type=click.Path(path_type=Path), help="Text to read (default: the one v4c carries)."
)
@click.option(
    "--tokenizer", metavar="FILE", type=click.Path(path_type=Path),
    help="A tokenizer.json (default: of the model, or of the first that has one).",
)  # fmt: skip
@click.option("--context", default=512, show_default=True, metavar="N", help="Tokens of each piece of the text.")
@click.option("--max-tokens", type=int, metavar="N", help="Read the text's first tokens only.")
@click.option(
    "--distance", "distances", type=int, multiple=True, metavar="N",
    help="Ask for facts N tokens back; may be repeated (default: 24 to 900).",
)  # fmt: skip
@click.option("--questions", default=32, show_default=True, metavar="N", help="For each distance.")
@click.option("--no-recall", is_flag=True, help="Read the text only.")
@click.option("--hide-rows", is_flag=True, help="Hide compressed rows, as a control; of checkpoints.")
@click.option("--seed", default=0, show_default=True, help="Of the questions.")
@threads_option
@json_option
@debug_option
def eval_command(
    models: tuple[Path, ...], text: Path | None, tokenizer: Path | None, context: int, max_tokens: int | None,
    distances: tuple[int, ...], questions: int, no_recall: bool, hide_rows: bool, seed: int, threads: int | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure the quality of models: bits per byte on a text, and recall of facts by distance.

    MODEL is an artifact, a checkpoint folder (torch computes it), or an ONNX file that v4c exported (ONNX Runtime
    does). Several are shown beside each other, with how their bits per byte differ from the first's.
    """
    if no_recall and distances:
        raise click.UsageError("Expected one of --distance and --no-recall.", click.get_current_context())
    import v4c
    from v4c.recall import DISTANCES

    words = tokenizer if tokenizer is not None else _tokenizer(models)
    read = None if text is None else _read(text)
    asked: tuple[int, ...] = () if no_recall else distances or DISTANCES
    results = []
    with Progress() as progress:
        for model in models:
            results.append(
                v4c.evaluate(
                    model, text=read, tokenizer=words, context=context, max_tokens=max_tokens, distances=asked,
                    questions=questions, seed=seed, hide_rows=hide_rows, threads=threads, progress=progress,
                )
            )  # fmt: skip
    if as_json:
        print_json(results)
    else:
        _show(results)


def _read(path: Path) -> str:
    from v4c.errors import InputError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        reason = failure.strerror if isinstance(failure, OSError) else "other bytes than UTF-8"
        raise InputError(f"{path}: expected a text, found: {reason}") from failure


def _tokenizer(models: tuple[Path, ...]) -> Path | None:
    """The first tokenizer that lies in one of the folders, for models that have none."""
    return next((folder / "tokenizer.json" for folder in models if (folder / "tokenizer.json").is_file()), None)


def _show(results: list[dict[str, Any]]) -> None:
    asked = [f"at {row['distance']}" for row in results[0]["recall"]]
    numbers = ("bits per byte", "to the first", *asked)
    table = new_table("model", "computed by", "weights", *numbers, numbers=numbers)
    first = results[0]["text"]["bits_per_byte"]
    for result in results:
        bits = result["text"]["bits_per_byte"]
        table.add_row(
            result["model"], result["target"], result["weights"], f"{bits:.5f}", f"{bits / first - 1:+.3%}",
            *(f"{row['accuracy']:.0%}" for row in result["recall"]),
        )  # fmt: skip
    print_table(table)
    measured = results[0]["text"]
    click.echo(f"\n{measured['tokens']} tokens, {measured['bytes']} bytes, in pieces of {measured['context']} tokens")
    if asked:
        count, chance = results[0]["recall"][0]["questions"], results[0]["chance"]
        click.echo(f"recall: {count} questions at each distance in tokens; {chance:.1%} of guesses are right")
