"""A pretraining that takes a fraction of a second, and what the trials ask of its folder."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cohorts import noise_cohort
from torch import nn

import ssl3d
from ssl3d.config import Settings
from ssl3d.models.weights.checkpoint import load_tensors
from ssl3d.pretrain.loop import pretrain
from ssl3d.pretrain.spec import MethodSpec

CPU = torch.device("cpu")
STEPS, EVERY = 6, 2


class Plain(ssl3d.Method):
    """Restore noisy crops; ``hook`` is called with the number of each training step of this process, from 1."""

    hook: Callable[[int], None] | None = None
    calls = 0

    name = "plain"
    title = "Plain"

    class Config(ssl3d.MethodConfig):
        """Options."""

        sigma: float = 0.1
        """Noise."""

    def __init__(self, backbone: Any, config: Config) -> None:
        super().__init__(backbone, config)
        self.head = nn.Conv3d(self.backbone.local_channels, 1, 1)

    def views(self, x: torch.Tensor, rng: ssl3d.BatchRng) -> dict[str, torch.Tensor]:
        return {"noisy": x + self.config.sigma * rng.normal(x.shape[1:]), "x": x}

    def training_step(self, views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.training and Plain.hook is not None:
            self.calls += 1
            Plain.hook(self.calls)
        return {"mse": (self.head(self.backbone(views["noisy"])[1]) - views["x"]).square().mean()}


class Nothing(Plain):
    """Trains nothing."""

    name = "nothing"
    title = "Nothing"
    trains = "none"


def settings(**options: Any) -> Settings:
    given = {"steps": STEPS, "batch_size": 2, "crop": 8, "lr": 1e-3, "checkpoint_every": EVERY,
             "monitor_every": 3, "log_every": 1, "workers": 0}  # fmt: skip
    return Settings.model_validate({"backbone": {"channels": [4, 8]}, "pretrain": {**given, **options}})


def run(
    out: Path, cls: type[ssl3d.Method] = Plain, *, seed: int = 0, resume: bool = False, **options: Any
) -> dict[str, Any]:
    """Pretrain for a few steps, on one thread: a child's OpenMP must not wait for the threads of its parent."""
    torch.set_num_threads(1)
    spec = MethodSpec(cls.name, cls, cls.Config(), cls.title)
    return pretrain(spec, noise_cohort(4), settings(**options), seed, out, CPU, resume=resume)


def weights(out: Path, name: str = "backbone.safetensors") -> dict[str, torch.Tensor]:
    return load_tensors(out / name)


def same_weights(a: Path, b: Path, name: str = "backbone.safetensors") -> bool:
    first, second = weights(a, name), weights(b, name)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def states(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("state-*.safetensors"))


def forked(function: Callable[[], object], stderr: Path | None = None) -> int:
    """Run a function in a child process and return its status: 0, 1 with the traceback on stderr, or minus a signal."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if stderr is not None:
                descriptor = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(descriptor, 2)
                os.dup2(descriptor, 1)
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
