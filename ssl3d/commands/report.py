"""``ssl3d report``: a store as one HTML file."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ssl3d.errors import are, count


@click.command()
@click.option("--store", required=True, type=click.Path(path_type=Path), help="Folder of the records.")
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The file to write."
)
@click.option("--title", default="Self-supervised learning in 3D", show_default=True, help="Heading.")
@click.option(
    "--cases", type=click.IntRange(min=0), default=1, show_default=True, metavar="N",
    help="Cases a column in the 3D viewer, the worst first; see bench --keep-predictions.",
)  # fmt: skip
@click.option(
    "--viewer-mib",
    type=click.FloatRange(min=0),
    default=12.0,
    show_default=True,
    help="Bound on their weight.",
)
def report(store: Path, out: Path, title: str, cases: int, viewer_mib: float) -> None:
    """Write a store as one HTML file that works offline."""
    from ssl3d.files import write_bytes
    from ssl3d.registry.registry import registry
    from ssl3d.report.data import report_data
    from ssl3d.report.page import render
    from ssl3d.results.store.store import ResultStore

    data, problems = report_data(ResultStore(store), registry().methods.titles(), cases, viewer_mib)
    page = render(data, title).encode()
    write_bytes(out, page)
    click.echo(f"{out}: {count(len(data['records']), 'record')}, {len(page) / 2**20:.1f} MiB")
    if left_out := data["viewer"]["left_out"]:
        click.echo(
            f"{count(left_out, 'case')} {are(left_out)} not in the viewer: raise --viewer-mib.", err=True
        )
    for problem in problems:
        click.echo(f"Left out: {problem}", err=True)
    if problems:
        sys.exit(1)
