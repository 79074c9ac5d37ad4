"""What to do when a pretraining or an evaluation does not fit into memory, with its sizes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

from ssl3d.config import Settings
from ssl3d.downstream.problems.problem import Mode
from ssl3d.memory import explained


def pretraining(method: str, settings: Settings) -> AbstractContextManager[None]:
    """Name sizes and options when a pretraining inside runs out of memory.

    Raises:
        MemoryFault: it did.
    """
    config = settings.pretrain
    what = f"Pretraining {method} with {config.batch_size} crops of {_edges(config.crop)} voxels a step"
    return explained(
        what,
        "the same numbers take less memory with --set pretrain.checkpoint_activations=true or "
        f"--set pretrain.accumulate={config.batch_size}; other numbers with a smaller pretrain.crop or "
        "pretrain.batch_size",
    )


def evaluation(task: str, mode: Mode, settings: Settings) -> AbstractContextManager[None]:
    """Name sizes and options when an evaluation inside runs out of memory.

    Raises:
        MemoryFault: it did.
    """
    config = settings.downstream.for_mode(mode)
    fix = f"a smaller downstream.{mode}.crop"
    if mode == "finetune":
        tuned = config.finetune
        fix += (
            f" or downstream.finetune.batch_size (now {tuned.batch_size}; of tasks with one prediction a volume: "
            f"downstream.finetune.volumes, now {tuned.volumes})"
        )
    return explained(
        f"{task} {mode} with windows of {_edges(config.crop)} voxels",
        f"{fix} (both are other numbers), downstream.feature_budget_mib, fewer --jobs",
    )


def _edges(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))
