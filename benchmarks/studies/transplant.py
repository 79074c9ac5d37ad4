"""Which stage of the encoder decides a linear score?

Two rows of one seed share their random decoder where pretraining trains the encoder alone, so that stages of one can be
put into the other. Linear scores of

- both networks as they are;
- both with stages *silenced*: their features are 0 wherever the decoder reads them, and as they were for the stages below;
- the first with one stage, or all, of the second.

Usage: ``python benchmarks/studies/transplant.py STORE --first scratch --second random_labels
--set phantoms.placement=1 > benchmarks/studies/results/transplant.md``
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
from separation import markdown
from stores import finished_runs
from torch import nn

from ssl3d.bench.sources import task_cohort, task_splits
from ssl3d.config import Settings, load_settings
from ssl3d.device import select_device
from ssl3d.downstream.harness import Evaluation, evaluate
from ssl3d.errors import ConfigError, SSL3DError
from ssl3d.models.factory import build_backbone
from ssl3d.models.unet import UNet3D
from ssl3d.models.weights.checkpoint import load_backbone, read_run
from ssl3d.registry.registry import registry


@torch.no_grad()
def silenced(backbone: UNet3D, stages: Sequence[int]) -> UNet3D:
    """Return a copy whose decoder sees 0 in place of the features of ``stages`` (0: the finest)."""
    copied = copy.deepcopy(backbone)
    widths = backbone.config.channels
    coarsest = len(widths) - 1
    for stage in stages:
        # A block joins the skip's channels and, behind them, those from below.
        block = copied.decoder[0 if stage == coarsest else coarsest - 1 - stage]
        channels = slice(widths[stage - 1], None) if stage == coarsest else slice(0, widths[stage])
        convolution = next(block.children())
        assert isinstance(convolution, nn.Conv3d)
        convolution.weight[:, channels] = 0
    return copied


def transplanted(recipient: UNet3D, donor: UNet3D, stages: Sequence[int]) -> UNet3D:
    """Return a copy of ``recipient`` with the encoder's ``stages`` of ``donor``."""
    copied = copy.deepcopy(recipient)
    for stage in stages:
        copied.encoder[stage].load_state_dict(donor.encoder[stage].state_dict())
    return copied


def variants(first: UNet3D, second: UNet3D, names: tuple[str, str]) -> Iterator[tuple[str, UNet3D]]:
    """Yield every network that is compared, with what to call it."""
    stages = len(first.config.channels)
    for name, backbone in zip(names, (first, second), strict=True):
        yield name, backbone
        for kept in range(stages - 1, 0, -1):
            silent = range(kept, stages)
            yield (
                f"{name}, without stage{'s' * (len(silent) > 1)} {', '.join(str(k + 1) for k in silent)}",
                silenced(backbone, silent),
            )
    for stage in range(stages):
        yield f"{names[0]} with stage {stage + 1} of {names[1]}", transplanted(first, second, [stage])
    yield f"{names[0]} with all stages of {names[1]}", transplanted(first, second, range(stages))


def network(store: Path, row: str, seed: int, settings: Settings) -> tuple[str, UNet3D]:
    """Return title and backbone of a row: a method's one finished run with ``seed``, that of a run's folder, or scratch.

    Raises:
        ConfigError: no such run, several of them, or another backbone than unet3d.
    """
    if row == "scratch":
        title, backbone = "Scratch", build_backbone(settings.backbone, seed)
    else:
        named = Path(row).is_dir()
        folders = [Path(row)] if named else [folder for folder, _ in finished_runs(store, f"{row}-s{seed}-*")]
        of = f"finished run of {row}, seed {seed}"
        if not folders:
            raise ConfigError(f"{store}/runs holds no {of}: pretrain with ssl3d bench --store {store}.")
        if len(folders) > 1:
            raise ConfigError(f"{store}/runs holds more than one {of}: name one, for example {folders[0]}.")
        folder = folders[0]
        title, backbone = read_run(folder)["title"], load_backbone(folder, expected=settings.backbone)
    if not isinstance(backbone, UNet3D):
        raise ConfigError(f"backbone.name={settings.backbone.name}: only stages of unet3d can be exchanged.")
    return title, backbone


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--first", default="scratch", help="a method, or a run's folder [scratch]")
    parser.add_argument(
        "--second", default="random_labels", help="a method, or a run's folder [random_labels]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of both runs, and of the probe [0]")
    parser.add_argument("--tasks", nargs="+", default=["shc", "sbm"], help="[shc sbm]")
    parser.add_argument("--preset", default="study")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override an option")
    parser.add_argument("--cache", type=Path, help="prepared volumes [~/.cache/ssl3d]")
    arguments = parser.parse_args()
    try:
        settings = load_settings(arguments.preset, arguments.set)
        (name, first), (other, second) = (
            network(arguments.store, method, arguments.seed, settings)
            for method in (arguments.first, arguments.second)
        )
        data = []
        for task in (registry().tasks.get(task).load() for task in arguments.tasks):
            cohort = task_cohort(task, None, settings, arguments.cache)
            data.append((task, cohort, task_splits(task, cohort, settings)[0]))
        rows = []
        for title, backbone in variants(first, second, (name, other)):
            row = {"Encoder": title}
            for task, cohort, split in data:
                outcome = evaluate(
                    backbone, Evaluation(task, cohort, split, "linear", settings.downstream, arguments.seed,
                    select_device("auto")), label=f"{title}, {task.name}",
                )  # fmt: skip
                row[task.title] = f"{outcome.score:.1f}"
            rows.append(row)
    except SSL3DError as error:
        sys.exit(f"Error: {error}")
    print(markdown(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
