"""Do the published tables follow from committed records that are current? ``make check-results`` runs it.

A published result stands in README.md, in docs/ or in the page on speed between two comments::

    <!-- result: ssl3d table --store benchmarks/studies/demo --format markdown -->
    (what that command prints)
    <!-- end of result -->

The command is an ``ssl3d`` command or a script below ``benchmarks/``. It is run from the project's root, and what it prints
has to be what stands there. Every record of the store that it names (``--store DIR``) has to be current.

Usage: ``python benchmarks/check_results.py [--write] [FILE ...]``; ``--write`` puts in what the commands print.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "speed" / "README.md",
]
BLOCK = re.compile(r"<!-- result: (?P<command>.+?) -->\n(?P<text>.*?)<!-- end of result -->", re.DOTALL)


@dataclass(frozen=True)
class Result:
    """One published result.

    Attributes:
        page: where it stands.
        command: what prints it.
        text: what stands there.
    """

    page: Path
    command: str
    text: str

    @property
    def store(self) -> Path | None:
        """The store that the command names."""
        words = shlex.split(self.command)
        return Path(words[words.index("--store") + 1]) if "--store" in words else None


def published(page: Path) -> list[Result]:
    """Return the results on a page."""
    return [Result(page, m["command"], m["text"]) for m in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def printed(command: str, root: Path = ROOT) -> str:
    """Return what ``command`` prints, in the environment of this interpreter.

    Raises:
        ValueError: it is neither ``ssl3d ...`` nor ``python benchmarks/...``, or it fails.
    """
    words = shlex.split(command)
    if words[0] == "ssl3d":
        run = [sys.executable, "-m", "ssl3d", *words[1:]]
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        run = [sys.executable, *words[1:]]
    else:
        raise ValueError(f"{command}: begin with ssl3d, or with python benchmarks/...")
    done = subprocess.run(run, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{command}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def stale_in(store: Path) -> list[str]:
    """Return what is not current in a store, one line a record."""
    from ssl3d.bench.stale import stale_records
    from ssl3d.errors import DataError
    from ssl3d.results.store.store import ResultStore

    try:
        records, problems = ResultStore(store).records()
    except DataError as error:
        return [str(error)]
    found = [str(problem) for problem in problems]
    for place, reasons in stale_records(records).items():
        if reasons is None or reasons:
            i = records[place]["identity"]
            why = "cannot tell what made it" if reasons is None else "; ".join(reasons)
            found.append(f"{store}: {i['method']}, {i['task']} {i['mode']}, seed {i['seed']}: {why}")
    return found


def problems_of(results: list[Result], root: Path = ROOT) -> list[str]:
    """Return what is wrong with published results."""
    found: list[str] = []
    stores = {result.store for result in results if result.store is not None}
    for store in sorted(stores):
        found += stale_in(root / store)
    for result in results:
        try:
            now = printed(result.command, root)
        except ValueError as error:
            found.append(f"{result.page.name}: {error}")
            continue
        if now.strip() != result.text.strip():
            found.append(f"{result.page.name}: not what is printed by: {result.command}")
    return found


def rewrite(page: Path, root: Path = ROOT) -> None:
    """Put into ``page`` what the commands of its results print."""

    def renewed(match: re.Match[str]) -> str:
        text = printed(match["command"], root).strip()
        return f"<!-- result: {match['command']} -->\n{text}\n<!-- end of result -->"

    page.write_text(BLOCK.sub(renewed, page.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "pages", nargs="*", type=Path, help="default: README.md, docs/*.md, benchmarks/speed/README.md"
    )
    parser.add_argument("--write", action="store_true", help="put in what the commands print")
    args = parser.parse_args()
    pages = args.pages or PAGES
    if args.write:
        for page in pages:
            if published(page):
                rewrite(page)
    results = [result for page in pages for result in published(page)]
    problems = problems_of(results)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(results)} published results, {len(problems)} problems.")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
