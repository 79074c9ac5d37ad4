"""What would more steps of pretraining give, if the trend held? A line through scores over the logarithm of the steps.

Usage: ``python benchmarks/studies/trend.py benchmarks/studies/results/study_steps.csv [--at 200000] [--out PNG]``; the CSV
is that of ``run.py`` on a study whose lever is the number of steps.

Printed for each method and column: the gain of ten times the steps with its 95 % interval, and a new seed's score after
--at steps with its 95 % prediction interval (least squares, one score a seed and number of steps, independent errors of
equal variance). A line that bends is no line, and seeds may not agree: the residual at the longest pretraining and the
gain of each seed are printed, too. The figure has the mean and the range of the seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from figure import draw
from scipy import stats

LEAST = 4
"""Scores that a line needs, at :data:`LEAST_STEPS` numbers of steps or more."""
LEAST_STEPS = 3


@dataclass(frozen=True)
class Trend:
    """A line over the decimal logarithm of the steps.

    Attributes:
        gain: of ten times the steps, in the unit of the scores, and half its 95 % interval.
        predicted: score of a new seed, and half its 95 % interval.
        bend: mean residual at the most steps; positive where the scores lie above the line.
    """

    gain: tuple[float, float]
    predicted: tuple[float, float]
    bend: float


def trend(steps: np.ndarray, scores: np.ndarray, at: float) -> Trend:
    """Fit a line to ``scores`` (N,) over ``steps`` (N,), and go on with it to ``at`` steps.

    Raises:
        ValueError: fewer than :data:`LEAST` scores, or than :data:`LEAST_STEPS` numbers of steps.
    """
    if len(scores) < LEAST or len(np.unique(steps)) < LEAST_STEPS:
        raise ValueError(
            f"{len(scores)} scores at {len(np.unique(steps))} numbers of steps: {LEAST} at {LEAST_STEPS} are needed"
        )
    x, n = np.log10(steps), len(scores)
    line = stats.linregress(x, scores)
    residuals = scores - (line.intercept + line.slope * x)
    t = float(stats.t.ppf(0.975, n - 2))
    error = math.sqrt(float(np.square(residuals).sum()) / (n - 2))
    away = (math.log10(at) - float(x.mean())) ** 2 / float(np.square(x - x.mean()).sum())
    return Trend(
        (float(line.slope), t * float(line.stderr)),
        (float(line.intercept + line.slope * math.log10(at)), t * error * math.sqrt(1 + 1 / n + away)),
        float(residuals[steps == steps.max()].mean()),
    )


def gains(part: pd.DataFrame) -> dict[int, float]:
    """Return the gain of ten times the steps by seed; of those with :data:`LEAST_STEPS` numbers of steps."""
    return {
        int(seed): float(stats.linregress(np.log10(own.step), own.score).slope)
        for seed, own in part.groupby("seed")
        if own.step.nunique() >= LEAST_STEPS
    }


def markdown(frame: pd.DataFrame, at: int) -> str:
    """Return a row for each method and column of a study's scores.

    Raises:
        ValueError: a method has too few scores in a column.
    """
    if frame.empty:
        raise ValueError("no score after pretraining")
    counts = sorted(int(step) for step in frame.step.unique())
    head = " | ".join(f"{step:,}" for step in counts)
    lines = [
        f"| method | column | {head} | ten times the steps | in each seed | above the line at its most steps "
        f"| after {at:,} steps |",
        "|:--|:--|" + "--:|" * (len(counts) + 4),
    ]
    for (task, mode, method), part in frame.groupby(["task", "mode", "method"], sort=False):
        means = part.groupby("step").score.mean()
        shown = " | ".join(f"{means[step]:.1f}" if step in means else "" for step in counts)
        try:
            found = trend(part.step.to_numpy(), part.score.to_numpy(), at)
        except ValueError as error:
            raise ValueError(f"{method}, {task} {mode}: {error}") from None
        each = ", ".join(f"{gain:+.1f}" for gain in gains(part).values())
        low, high = (found.predicted[0] + sign * found.predicted[1] for sign in (-1, 1))
        lines.append(
            f"| {method} | {task.upper()} {mode} | {shown} | {found.gain[0]:+.1f} ± {found.gain[1]:.1f} "
            f"| {each} | {found.bend:+.1f} | {found.predicted[0]:.0f} [{low:.0f}, {high:.0f}] |"
        )
    seeds = frame.groupby(["step", "method"]).seed.nunique().groupby("step")
    fewest, most = seeds.min(), seeds.max()
    named = (
        f"{fewest[step]}{f' to {most[step]}' if most[step] > fewest[step] else ''} at {step:,}"
        for step in counts
    )
    lines += [
        "",
        f"Means over seeds ({', '.join(named)} steps). ± and [ ]: 95 %, of a line through single scores over the logarithm "
        "of the steps; the last is for a new seed.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("--at", type=int, default=200_000, help="steps to go on to [200000]")
    parser.add_argument("--out", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    if arguments.at < 1:
        parser.error(f"--at {arguments.at}: at least 1")
    try:
        frame = pd.read_csv(arguments.csv)
        if missing := [
            name for name in ("task", "mode", "method", "seed", "step", "score") if name not in frame
        ]:
            raise ValueError(f"column {missing[0]} is missing: give the CSV of run.py")
        frame = frame[frame.step > 0]  # scratch has none
        shown = markdown(frame, arguments.at)
    except (OSError, ValueError) as error:
        sys.exit(f"Error: {arguments.csv}: {error}.")
    print(shown)
    if arguments.out:
        title = "Scores over steps of pretraining: mean and range of the seeds"
        try:
            draw(frame.assign(value=frame.step.astype(str)), title, "steps", arguments.out)
        except OSError as error:
            sys.exit(f"Error: {arguments.out}: {error}.")


if __name__ == "__main__":
    main()
