"""Which device each process of ``ssl3d bench --jobs`` gets, on a machine without any."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from ssl3d.bench.run import Conduct
from ssl3d.cli import main
from ssl3d.device import select_device, spread
from ssl3d.errors import ConfigError


@dataclass(frozen=True)
class Job:
    """A bench of five cells that ends where it would begin to compute."""

    device: torch.device
    conduct: Conduct = field(default_factory=Conduct)

    def cells(self) -> list[Any]:
        return [SimpleNamespace(identity=number) for number in range(5)]

    def run(self, waiting: Any = None) -> Iterator[Any]:
        raise ConfigError(f"the first process computes on {self.device}")


class Context:
    """Starts no process, and writes down what each would have been given."""

    def __init__(self) -> None:
        self.devices: list[str] = []

    Pipe, Value = staticmethod(multiprocessing.Pipe), staticmethod(multiprocessing.Value)

    def Process(self, target: Any, args: tuple[Any, ...], daemon: bool) -> Any:
        self.devices.append(args[0].device)
        names = ("start", "terminate", "join", "kill")
        return SimpleNamespace(**dict.fromkeys(names, lambda *_: None), is_alive=lambda: False, pid=None,
                               exitcode=None, sentinel=os.pipe()[0])  # fmt: skip


@pytest.mark.parametrize(
    ("gpus", "device", "more", "first", "others"),
    [
        (2, "cuda", [], "cuda:0", ["cuda:1"]),
        (2, "cuda", ["--jobs", "4"], "cuda:0", ["cuda:1", "cuda:0", "cuda:1"]),
        (3, "cuda:1", ["--jobs", "2"], "cuda:1", ["cuda:1"]),
        (1, "cuda", ["--jobs", "2"], "cuda", ["cuda"]),
        (4, "cuda", ["--jobs", "9"], "cuda:0", ["cuda:1", "cuda:2", "cuda:3", "cuda:0"]),  # of five cells
        (0, "cpu", ["--jobs", "3"], "cpu", ["cpu", "cpu"]),
    ],
)
def test_processes_take_the_visible_gpus_in_turn_by_number(
    gpus: int, device: str, more: list[str], first: str, others: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    context = Context()
    monkeypatch.delenv("SSL3D_JOBS", raising=False)  # of the one who runs the tests
    monkeypatch.setattr("ssl3d.device.visible_gpus", lambda: gpus)
    monkeypatch.setattr("ssl3d.bench.plan.bench_of", lambda options: Job(torch.device(device)))
    monkeypatch.setattr("ssl3d.bench.whole.Whole", lambda job: None)
    monkeypatch.setattr("ssl3d.commands.workers.multiprocessing.get_context", lambda kind: context)
    result = CliRunner().invoke(main, ["bench", "--store", str(tmp_path / "s"), "--device", device, *more])
    assert result.exit_code == 2 and f"computes on {first}" in result.output.split("\n")[0], result.output
    assert context.devices == others


def test_a_process_computes_on_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setattr("ssl3d.device.visible_gpus", lambda: 2)
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
    try:
        assert [select_device(str(one)).index for one in spread(torch.device("cuda"), 3)] == [0, 1, 0]
        with pytest.raises(ConfigError, match="torch sees 2 GPUs, cuda:0 to cuda:1"):
            select_device("cuda:2")
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = before
    assert chosen == [0, 1, 0]


@pytest.mark.parametrize(
    ("words", "found", "absent"),
    [
        ("ssl3d pretrain --method gv", ["gvsl", "gvsl_released_head"], ["byol"]),
        ("ssl3d bench --methods scratch,by", ["scratch,byol"], ["scratch,gvsl"]),
        ("ssl3d bench --tasks s", ["shc", "sac", "sbm"], ["ccc"]),
        ("ssl3d config --preset s", ["smoke", "study"], ["quick"]),
        ("ssl3d check wan", ["wandb"], ["gvsl"]),
    ],
)
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_names_complete_in_the_shell(shell: str, words: str, found: list[str], absent: list[str]) -> None:
    number = len(words.split()) - 1
    variables = {"COMP_WORDS": words, "COMP_CWORD": str(number), "_SSL3D_COMPLETE": f"{shell}_complete"}
    lines = (
        CliRunner().invoke(main, prog_name="ssl3d", env=variables).output.replace("plain,", "").splitlines()
    )
    assert set(found) <= set(lines) and not set(absent) & set(lines), lines
