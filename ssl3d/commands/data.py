"""``ssl3d data``: make and inspect data."""

from __future__ import annotations

from pathlib import Path

import click

from ssl3d.commands.common import Group, preset_option, quiet_libraries, settings_of


@click.group(cls=Group)
def data() -> None:
    """Make and inspect data."""


@data.command()
@click.option(
    "--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write to."
)
@preset_option
def phantoms(out: Path, preset: str, overrides: tuple[str, ...]) -> None:
    """Write the phantom cohorts in the layouts of MM-WHS, ASOCA, CANDI and STOIC."""
    quiet_libraries()
    settings = settings_of(preset, overrides)
    from ssl3d.data.sources import make_phantoms

    make_phantoms(out, settings.phantoms)
    click.echo(f"Phantom cohorts: {out}")
