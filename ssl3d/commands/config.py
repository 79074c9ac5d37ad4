"""``ssl3d config``: every option with its meaning, default, value and source."""

from __future__ import annotations

import json
from typing import Any

import click

from ssl3d.commands.common import make_console, preset_option


@click.command()
@click.argument("pattern", default="")
@preset_option
@click.option("--json", "as_json", is_flag=True, help="One JSON list of options.")
@click.option("--schema", is_flag=True, help="The JSON schema of a preset file, for editors.")
def config(pattern: str, preset: str, overrides: tuple[str, ...], as_json: bool, schema: bool) -> None:
    """Print the options of a preset whose names contain PATTERN: meaning, default, value, and where it comes from."""
    from ssl3d.config import preset_schema
    from ssl3d.errors import ConfigError, nearest
    from ssl3d.options import list_options
    from ssl3d.registry.registry import registry

    if schema:
        click.echo(json.dumps(preset_schema(), indent=2))
        return
    every = list_options(preset, overrides, registry().methods.names())
    options = [option for option in every if pattern in option.path]
    if not options:
        raise ConfigError(
            f'No option contains "{pattern}".{nearest(pattern, [option.path for option in every])}'
        )
    if as_json:
        click.echo(json.dumps([o.as_dict() for o in options], indent=2, default=list))
        return
    console = make_console()
    for option in options:
        origin = option.source
        if origin != "default":
            origin += f"; default {_shown(option.default)}"
        line = f"[bold]{option.path}[/] = {_shown(option.value)}   [dim]({origin})[/]"
        console.print(line, highlight=False)
        console.print(f"    [dim]{_escaped(option.meaning)}[/]", highlight=False)


def _shown(value: Any) -> str:
    return _escaped(json.dumps(value, default=list))


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
