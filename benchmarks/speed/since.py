"""How fast a step of pretraining is against another checkout of ssl3d, by the processor time of whole commands.

Each tree pretrains for a few steps and for more; the difference is that of the steps alone. The trees take turns, with one
thread and the same environment, and each has a cache of its own.

Usage: ``git worktree add --detach ../then COMMIT`` and ``python benchmarks/speed/since.py ../then [--method gvsl]
[--preset quick] [--set pretrain.precision=float32]``
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from compare import processor_seconds

HERE = Path(__file__).parents[2]


def environment_of(tree: Path, place: Path) -> dict[str, str]:
    """Return the environment in which Python imports ``tree`` and finds its entry points, whatever is installed.

    Args:
        tree: a checkout.
        place: a folder for its entry points and its cache.
    """
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    facts = place / f"ssl3d-{project['version']}.dist-info"
    facts.mkdir(parents=True, exist_ok=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ssl3d\nVersion: {project['version']}\n")
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())])
        for group, entries in project["entry-points"].items()
    ]
    (facts / "entry_points.txt").write_text("\n\n".join(groups) + "\n")
    path = os.pathsep.join(map(str, (place, tree, tree / "plugins")))
    own = {"PYTHONPATH": path, "SSL3D_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own}


def seconds(tree: Path, environment: dict[str, str], steps: int, options: list[str]) -> float:
    """Return the processor time of a pretraining of so many steps.

    Args:
        tree: a checkout.
        environment: see :func:`environment_of`.
        steps: of the pretraining.
        options: of the command.

    Raises:
        SystemExit: it failed; its last lines are shown.
    """
    command = [
        sys.executable,
        "-c",
        "from ssl3d.cli import main; main()",
        "pretrain",
        *options,
    ]
    command += ["--set", f"pretrain.steps={steps}", "--set", "pretrain.warmup_steps=1"]
    with tempfile.TemporaryDirectory() as folder:
        before = processor_seconds()
        done = subprocess.run(
            [*command, "--out", str(Path(folder) / "run")],
            cwd=tree,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        took = processor_seconds() - before
    if done.returncode:
        sys.exit(
            f"Error: {tree}: {' '.join(command[3:])} ended with {done.returncode}:\n{done.stdout[-2000:]}"
        )
    return took


def compare(then: Path, rounds: int, steps: tuple[int, int], options: list[str]) -> list[tuple[float, float]]:
    """Return the processor seconds of a step, there and here, of every round."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        trees = [
            (tree, environment_of(tree, Path(folder) / name))
            for name, tree in (("then", then), ("here", HERE))
        ]
        for tree, environment in trees:
            seconds(tree, environment, 1, options)  # makes the phantoms
        for _ in range(rounds):
            few, more = (
                [seconds(tree, environment, n, options) for tree, environment in trees] for n in steps
            )
            there, here = ((b - a) / (steps[1] - steps[0]) for a, b in zip(few, more, strict=True))
            if min(there, here) <= 0:
                sys.exit(
                    f"Error: {steps[1]} steps took no longer than {steps[0]}: give --steps further apart."
                )
            found.append((there, here))
            print(f"{there:.3f} s a step there, {here:.3f} s here: {there / here:.2f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("then", type=Path, help="another checkout")
    parser.add_argument("--method", default="gvsl")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option, for both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs=2, default=(2, 17), help="of the two pretrainings [2 17]")
    arguments = parser.parse_args()
    then = arguments.then.absolute()
    if not (then / "ssl3d" / "cli.py").is_file():
        parser.error(f"{then} is no checkout of ssl3d: it has no ssl3d/cli.py")
    if not 0 < arguments.steps[0] < arguments.steps[1]:
        parser.error(
            f"--steps {arguments.steps[0]} {arguments.steps[1]}: give a small number and a larger one"
        )
    options = ["--method", arguments.method, "--preset", arguments.preset]
    options += [word for option in arguments.set for word in ("--set", option)]
    found = compare(then, arguments.rounds, tuple(arguments.steps), options)
    ratios = [there / here for there, here in found]
    print(
        f"A step here is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})."
    )


if __name__ == "__main__":
    main()
