"""A store, a cache, runs and a predictor, made once for all trials of the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from faults.commands import here

TINY = [
    "--preset", "smoke", "--device", "cpu", "--set", "backbone.channels=[4,8]", "--set", "pretrain.crop=8",
    "--set", "pretrain.steps=4", "--set", "pretrain.warmup_steps=0", "--set", "pretrain.checkpoint_every=2",
    "--set", "pretrain.monitor_every=4",
]  # fmt: skip
CELL = ["--methods", "scratch", "--tasks", "ccc", "--modes", "linear", "--seeds", "0"]


def words(text: str, world: Path, out: Path) -> list[object]:
    """Return the words of a command: WORLD stands for what was made before, OUT for a new place."""
    found: list[object] = []
    for word in text.split():
        if word in ("TINY", "CELL"):
            found += TINY if word == "TINY" else CELL
        else:
            found.append(word.replace("WORLD", str(world)).replace("OUT", str(out)))
    return found


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, volume_folder: Path) -> Path:
    """A store with a cell, a cache, a finished run, one that was stopped, and a predictor."""
    root = tmp_path_factory.mktemp("world")
    shutil.copytree(volume_folder, root / "volumes")
    for text in (
        "bench TINY CELL --store WORLD/store --cache WORLD/cache",
        "pretrain TINY --method denoising --data WORLD/volumes --out WORLD/run --cache WORLD/cache",
        "finetune TINY --checkpoint WORLD/run --task ccc --mode linear --out WORLD/predictor --cache WORLD/cache",
    ):
        here(*words(text, root, root))
    (root / "scans").mkdir()
    shutil.copy(next((root / "cache").rglob("stoic/data/mha/*.mha")), root / "scans")
    shutil.copytree(root / "run", root / "stopped")
    for name in ("backbone.safetensors", "state-00000004.safetensors"):  # as after the first state
        (root / "stopped" / name).unlink()
    text = (root / "stopped" / "run.json").read_text()
    (root / "stopped" / "run.json").write_text(text.replace('"finished"', '"running"', 1))
    return root
