"""``v4c presets``: the sizes v4c knows by name."""

from __future__ import annotations

from typing import Any

import click

from .console import bytes_text, count_text, new_table, print_json, print_table
from .options import debug_option, json_option


@click.command()
@json_option
@debug_option
def presets(as_json: bool) -> None:
    """List the known sizes.

    Weight bytes are those of the published formats: FP4 experts, FP8 attention, the rest bf16.
    """
    rows = rows_of_presets()
    if as_json:
        print_json(rows)
        return
    columns = ("parameters", "active", "weights", "cache/token f32", "bf16", "fp8")
    table = new_table("name", *columns, numbers=columns)
    for row in rows:
        table.add_row(
            row["name"],
            count_text(row["parameters"]),
            count_text(row["active_parameters"]),
            bytes_text(row["weight_bytes"]),
            *(bytes_text(count) for count in row["cache_bytes_per_token"].values()),
        )
    print_table(table)


def rows_of_presets() -> list[dict[str, Any]]:
    """One JSON-able row per preset."""
    from v4c.frontend import estimate
    from v4c.frontend.presets import PRESETS

    return [
        {
            "name": name,
            "parameters": estimate.parameters(config),
            "active_parameters": estimate.active_parameters(config),
            "weight_bytes": estimate.weight_bytes(config),
            "cache_bytes_per_token": estimate.cache_bytes_per_token(config),
        }
        for name, config in PRESETS.items()
    ]
