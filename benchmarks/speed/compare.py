"""How fast, against what: every row of the table a ratio against a peer of the same run, and a share of the machine's limit.

Ours and its peers run turn by turn in one process on one thread, so that a busy machine disturbs all alike; a time is the
median over rounds of processor time. Beside it stands what the machine could do at best, measured in the same run: the
larger rate of a matrix product and a large convolution, the memory's bandwidth, or a program that does the least there is
to do.

    make speed
    python benchmarks/speed/compare.py --only ncc,unet --rounds 7
    python benchmarks/speed/compare.py --quick          # every row at tiny sizes: a check that all of them run
    python benchmarks/speed/compare.py --show FILE ...  # the table of earlier runs, one kind of machine beside the other

A peer that is not installed stands in its line of the table, with the command that installs it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv3d

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
sys.path.insert(0, str(FOLDER))

ROWS = {
    "ncc": "losses", "ntxent": "losses",
    "shuffle": "transforms", "paint": "transforms", "spatial": "transforms",
    "unet": "networks", "gvsl": "networks", "memory": "networks",
    "finetune": "evaluation", "inference": "evaluation", "linear": "evaluation",
    "crop": "data", "phantom": "data",
    "table": "results", "report": "results", "bench": "results", "process": "results",
}  # fmt: skip
"""Row -> module of ``rows`` whose function of that name yields its cases."""
SHORTEST = 0.02
"""Seconds that are timed at least; a shorter function is called several times."""
INSTALL = "pip install -e '.[speed]'"


# --- What is measured -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Missing:
    """A peer that cannot be run here, and why."""

    why: str


@dataclass(frozen=True)
class Value:
    """A figure that a function has measured itself, in place of the time that it took."""

    value: float


Run = Callable[[], Any]
"""Does what is timed once. Its result is a number or a tensor to compare, a :class:`Value`, or of no interest."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        what: is measured, with its sizes.
        ours: our form.
        peers: the others, by name.
        flops: floating-point operations of ours, of which the limit is the best rate of the machine.
        bytes: that any program must read and write, of which the limit is the memory's bandwidth.
        bound: a program that does the least, by name; its time is the limit.
        close: relative tolerance within which peers of ``same`` must give what ours gives.
        same: peers that compute the same quantity.
        unit: of the figures.
        rounds: at most, for what takes long or does not vary.
        note: what a reader must know.
    """

    what: str
    ours: Run
    peers: Mapping[str, Run | Missing]
    flops: float = 0.0
    bytes: float = 0.0
    bound: tuple[str, Run] | None = None
    close: float = 1e-3
    same: tuple[str, ...] = ()
    unit: str = "ms"
    rounds: int = 1000
    note: str = ""


@dataclass(frozen=True)
class Setting:
    """What a row is asked for.

    Attributes:
        quick: tiny sizes, for a check that it runs.
    """

    quick: bool = False

    def of(self, full: Any, quick: Any) -> Any:
        """Return the size of this setting."""
        return quick if self.quick else full


def peer(make: Callable[[], Run]) -> Run | Missing:
    """Return what ``make`` makes, which imports the peer's package; Missing where that is not installed."""
    try:
        return make()
    except ModuleNotFoundError as error:
        return Missing(f"peer not installed: {INSTALL} ({error.name})")
    except ImportError as error:
        return Missing(f"peer cannot be imported: {str(error).splitlines()[0]}")


# --- Measuring ---------------------------------------------------------------------------------------


def processor_seconds() -> float:
    """Return the processor time of this process and of those that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def timed(run: Run, times: int) -> tuple[float, Any]:
    """Return (seconds of one call out of ``times``, the last result); the figure itself of a :class:`Value`."""
    began = processor_seconds()
    for _ in range(times):
        result = run()
    seconds = (processor_seconds() - began) / times
    return (result.value if isinstance(result, Value) else seconds), result


@dataclass
class Limits:
    """What the machine does at best, in this run.

    Attributes:
        product, convolution: rates in operations a second: a matrix product of 1024^3, and a 3x3x3 convolution of 128
            channels.
        bandwidth: bytes a second that a copy of 256 MiB reads and writes.
    """

    product: float = 0.0
    convolution: float = 0.0
    bandwidth: float = 0.0

    def measure(self, quick: bool = False) -> None:
        """Measure, and keep the better of this and of before."""
        n, edge, mib = (256, 8, 16) if quick else (1024, 24, 256)
        a, x = (
            torch.rand(n, n),
            torch.rand(2, 128, edge, edge, edge).contiguous(memory_format=torch.channels_last_3d),
        )
        weight = torch.rand(128, 128, 3, 3, 3).contiguous(memory_format=torch.channels_last_3d)
        source = torch.zeros(mib * 2**18)
        target = torch.zeros_like(source)
        with torch.no_grad():
            self.product = max(self.product, 2 * n**3 / best(lambda: a @ a))
            work = 2 * 27 * 128 * 128 * 2 * edge**3
            self.convolution = max(self.convolution, work / best(lambda: conv3d(x, weight, padding=1)))
        self.bandwidth = max(self.bandwidth, 2 * source.numel() * 4 / best(lambda: target.copy_(source)))

    @property
    def flops(self) -> float:
        """The better rate of the two."""
        return max(self.product, self.convolution)

    def written(self) -> dict[str, float]:
        """Return the rates for the file."""
        return {
            "matrix product, GFLOP/s": round(self.product / 1e9, 1),
            "convolution, GFLOP/s": round(self.convolution / 1e9, 1),
            "bandwidth, GB/s": round(self.bandwidth / 1e9, 1),
        }


def best(run: Run, rounds: int = 5) -> float:
    """Return the least seconds of a call after the first."""
    run()
    return min(timed(run, 1)[0] for _ in range(rounds))


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Run ours and the peers turn by turn.

    Returns:
        The figures of each by name (``ours``, the peers, ``bound``), their medians, and who is missing.

    Raises:
        Disagreement: a peer that should compute the same gives something else.
    """
    runs: dict[str, Run] = {"ours": case.ours}
    runs |= {name: run for name, run in case.peers.items() if not isinstance(run, Missing)}
    if case.bound:
        runs["bound"] = case.bound[1]
    rounds, once = min(rounds, case.rounds), case.rounds == 1
    found: dict[str, list[float]] = {name: [] for name in runs}
    times, results = {}, {}
    for name, run in runs.items():  # the first call allocates and chooses algorithms: not counted
        figure, results[name] = timed(run, 1)
        measured = isinstance(results[name], Value)
        times[name] = 1 if measured else max(1, math.ceil(SHORTEST / max(figure, 1e-6)))
        if once:
            found[name].append(figure)
    for name in case.same:
        if name in results:
            check(case, name, results["ours"], results[name])
    for _ in range(0 if once else rounds):
        for name, run in runs.items():
            found[name].append(timed(run, times[name])[0])
    return {
        "figures": found,
        "median": {name: statistics.median(values) for name, values in found.items()},
        "missing": {name: run.why for name, run in case.peers.items() if isinstance(run, Missing)},
    }


class Disagreement(Exception):
    """Two forms of one quantity of which at least one is wrong."""


def check(case: Case, name: str, ours: Any, theirs: Any) -> None:
    """Refuse to time two forms of which one is wrong."""
    a, b = (np.asarray(x.detach() if isinstance(x, Tensor) else x, dtype=np.float64) for x in (ours, theirs))
    scale = max(np.abs(b).max(), 1e-12)
    if a.shape != b.shape or np.abs(a - b).max() > case.close * scale:
        raise Disagreement(
            f"{case.what}: {name} gives {b.ravel()[:3]}, ours {a.ravel()[:3]}: they do not compute the same."
        )


def share(case: Case, median: Mapping[str, float], limits: Limits) -> tuple[float | None, str]:
    """Return the share of the limit that ours reaches, and of which limit."""
    if case.bound:
        return median["bound"] / median["ours"], case.bound[0]
    if case.flops:
        return case.flops / median["ours"] / limits.flops, "arithmetic"
    if case.bytes:
        return case.bytes / median["ours"] / limits.bandwidth, "bandwidth"
    return None, ""


# --- The machine, the table ------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Return the kind of processor and what it computes with; no name of a host."""
    from ssl3d.environment import environment, instruction_set

    flags = instruction_set().split()
    widest = next((name for name in ("amx_tile", "avx512f", "avx2") if name in flags), platform.machine())
    found = environment()
    return {
        "processor": found["cpu"],
        "widest": widest,
        "versions": found["versions"],
        "python": found["python"],
        "threads": torch.get_num_threads(),
        "load": load(),
    }


def load() -> list[float]:
    """Return how many processes wanted a processor over the last 1, 5 and 15 minutes."""
    return [round(number, 2) for number in os.getloadavg()]


@dataclass
class Table:
    """Lines as they come, and what goes into the file."""

    limits: Limits
    lines: list[str] = field(default_factory=list)
    cases: list[dict[str, Any]] = field(default_factory=list)

    def say(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)

    def begin(self) -> None:
        self.say("| row | what | ours | peer | peer takes | ratio | share of the limit |")
        self.say("|---|---|--:|---|--:|--:|---|")

    def add(self, row: str, case: Case, found: dict[str, Any]) -> None:
        """Print a line for each peer, missing ones too."""
        median = found["median"]
        reached, limit = share(case, median, self.limits)
        shown = share_written(reached, limit)
        ours, first = written(median["ours"], case.unit), [row, case.what]
        for name in case.peers:
            if name in found["missing"]:
                theirs, ratio = found["missing"][name], "–"
            else:
                theirs, ratio = written(median[name], case.unit), f"{median[name] / median['ours']:.2f}"
            self.say("| " + " | ".join([*first, ours, name, theirs, ratio, shown]) + " |")
            first, shown = ["", ""], ""
        self.cases.append(
            {
                "row": row, "what": case.what, "unit": "s" if case.unit == "ms" else case.unit, **found,
                "ratio": {name: median[name] / median["ours"] for name in case.peers if name in median},
                "share": reached, "limit": limit, "flops": case.flops, "bytes": case.bytes, "note": case.note,
                "limits": self.limits.written(), "load": load(),
            }
        )  # fmt: skip


def written(figure: float, unit: str) -> str:
    """Return a figure for the table; seconds as ms below 10 s."""
    if unit != "ms":
        return f"{figure:.3g} {unit}" if figure < 100 else f"{figure:.0f} {unit}"
    return (
        f"{1000 * figure:.3g} ms"
        if figure < 0.1
        else f"{figure:.3g} s"
        if figure >= 10
        else f"{1000 * figure:.0f} ms"
    )


def share_written(reached: float | None, limit: str) -> str:
    """Return a share of a limit for the table; nothing where there is none."""
    return "" if reached is None else f"{100 * reached:.0f} % of {limit}"


def side_by_side(files: Sequence[Path]) -> str:
    """Return the table of earlier runs: for each file what ours takes, the peer's ratio and the share of the limit."""
    runs = [json.loads(file.read_text()) for file in files]
    names = [f"{run['machine']['processor']}, {run['machine']['widest']}" for run in runs]
    lines = [
        "| what | peer | "
        + " | ".join(f"{name}: ours | ratio | share of the limit" for name in names)
        + " |",
        "|---|---|" + "--:|--:|---|" * len(runs),
    ]
    # A memory's exponent is part of what was measured, and differs from run to run.
    kinds = [{case["what"].partition(", edge^")[0]: case for case in run["cases"]} for run in runs]
    for what in dict.fromkeys(what for found in kinds for what in found):
        peers = dict.fromkeys(
            name
            for found in kinds
            if what in found
            for name in (*found[what]["ratio"], *found[what]["missing"])
        )
        for place, name in enumerate(peers):
            cells = [cell for found in kinds for cell in _shown(found.get(what), name, place == 0)]
            lines.append("| " + " | ".join([what if place == 0 else "", name, *cells]) + " |")
    return "\n".join(lines)


def _shown(case: dict[str, Any] | None, name: str, first: bool) -> list[str]:
    """Return (ours, ratio, share) of a case against a peer, ours and the share in its first line alone."""
    if case is None:
        return ["", "", ""]
    ratio = f"{case['ratio'][name]:.2f}" if name in case["ratio"] else "–"
    share = share_written(case["share"], case["limit"])
    ours = written(case["median"]["ours"], "ms" if case["unit"] == "s" else case["unit"])
    return [ours, ratio, share] if first else ["", ratio, ""]


def cases(row: str, setting: Setting) -> Iterator[Case]:
    """Yield the cases of a row."""
    yield from getattr(importlib.import_module(f"rows.{ROWS[row]}"), row)(setting)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of which the medians are taken (default: 5)")
    parser.add_argument("--only", metavar="ROW,...", help=f"of {', '.join(ROWS)}")
    parser.add_argument(
        "--quick", action="store_true", help="one round at tiny sizes: a check that every row runs"
    )
    parser.add_argument(
        "--add", action="store_true", help="keep the other rows of the file, each with its run's limits"
    )
    parser.add_argument(
        "--out", type=Path, help="JSON file; all rows at full size go to results/ without being told"
    )
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="print what earlier runs found")
    options = parser.parse_args(arguments)
    if options.show:
        print(side_by_side(options.show))
        return
    chosen = options.only.split(",") if options.only else list(ROWS)
    if unknown := [row for row in chosen if row not in ROWS]:
        parser.error(f"--only {unknown[0]}: no such row; choose from {', '.join(ROWS)}")
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1")
    torch.set_num_threads(1)
    setting, limits, began = Setting(options.quick), Limits(), time.monotonic()
    start = machine()
    kind = "-".join(f"{start['processor']} {start['widest']}".lower().split())
    standing = not (options.only or options.quick)
    out = options.out or (RESULTS / f"speed-{kind}.json" if standing or options.add else None)
    before = json.loads(out.read_text())["cases"] if options.add and out and out.is_file() else []
    limits.measure(options.quick)
    table, failed = Table(limits), {}
    table.begin()
    for row in chosen:
        try:
            with warnings.catch_warnings(action="ignore"):
                for case in cases(row, setting):
                    table.add(row, case, measure(case, 1 if options.quick else options.rounds))
        except Exception as error:  # the other rows still count
            traceback.print_exc()
            failed[row] = f"{type(error).__name__}: {error}"
        if out:  # after each row: what is there stays
            kept = [case for case in before if case["row"] not in chosen]
            found = sorted(kept + table.cases, key=lambda case: list(ROWS).index(case["row"]))
            seconds = {
                "seconds": round(time.monotonic() - began, 1),
                "processor_seconds": round(processor_seconds(), 1),
            }
            facts = {"machine": start, "rounds": options.rounds, "quick": options.quick, **seconds}
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(
                json.dumps({**facts, "limits": limits.written(), "failed": failed, "cases": found}, indent=1)
                + "\n"
            )
    print(", ".join(f"{name}: {value}" for name, value in limits.written().items()))
    print(f"{time.monotonic() - began:.0f} s{f'; written to {out}' if out else ''}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    from compare import main as run  # the module that the rows import, not a second one

    run()
