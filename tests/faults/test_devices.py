"""Two processes by the command line: one is killed; and what is refused before any are started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ssl3d.cli import main
from ssl3d.errors import ConfigError
from ssl3d.pretrain.devices import Devices

CPU = torch.device("cpu")
OPTIONS = [
    "--method", "denoising", "--preset", "smoke", "--device", "cpu", "--devices", "2", "--set", "backbone.channels=[4,8]",
    "--set", "pretrain.crop=8", "--set", "pretrain.steps=3000", "--set", "pretrain.checkpoint_every=20", "--set",
    "pretrain.monitor_every=3000", "--set", "pretrain.warmup_steps=0",
]  # fmt: skip


def children(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    found = [int(child) for child in text.split()]
    return [child for child in found if b"pretrain" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("victim", ["first", "second"])
def test_when_one_process_is_killed_the_other_ends_and_says_so_and_resume_goes_on(
    victim: str, tmp_path: Path, volume_folder: Path
) -> None:
    out, said = tmp_path / "run", tmp_path / "said.txt"
    command = [
        sys.executable,
        "-m",
        "ssl3d",
        "pretrain",
        *OPTIONS,
        "--data",
        str(volume_folder),
        "--out",
        str(out),
    ]
    with said.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        while not list(out.glob("state-*.safetensors")):
            assert process.poll() is None, said.read_text()
            time.sleep(0.05)
        (second,) = children(process.pid)
        os.kill(process.pid if victim == "first" else second, signal.SIGKILL)
        began = time.monotonic()
        status = process.wait(60)
        while Path(f"/proc/{second}").exists() and Path(f"/proc/{second}/cmdline").read_bytes():
            assert time.monotonic() - began < 60, "the other process has not ended"
            time.sleep(0.1)
    assert status in ((-signal.SIGKILL,) if victim == "first" else (2, -signal.SIGKILL))
    text = said.read_text()
    assert "has ended" in text and "--resume goes on from it" in text and "Traceback" not in text, text
    if victim == "first":
        return
    before = json.loads((out / "run.json").read_text())["step"]
    with said.open("w") as file:
        again = subprocess.Popen([*command, "--resume"], stdout=file, stderr=file)
        while (step := json.loads((out / "run.json").read_text())["step"]) <= before:
            assert again.poll() is None, said.read_text()
            time.sleep(0.05)
        again.send_signal(signal.SIGTERM)  # to the first alone
        assert again.wait(60) == 75, said.read_text()
    assert step > before and said.read_text().count("It goes on where it stopped with") == 1
    assert not list(out.glob("*.lock"))


def refusal(*options: str) -> str:
    result = CliRunner().invoke(main, ["pretrain", *OPTIONS, "--out", "nowhere", *options])
    assert result.exit_code == 2 and "Traceback" not in result.output
    return result.output


def test_more_devices_than_there_are_are_refused() -> None:
    cores = os.cpu_count()
    assert f"--devices {cores + 1}: this machine has a CPU of {cores} core" in refusal(
        "--devices", f"{cores + 1}"
    )
    assert "use 1 at least" in refusal("--devices", "0")


def test_gpus_are_counted_and_one_of_them_is_not_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl3d.pretrain.devices.visible_gpus", lambda: 2)
    Devices(2).check(torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"--devices 4: this machine has 2 GPUs; use --devices 2 or fewer"):
        Devices(4).check(torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"--device cuda:1 is one GPU.*use --device cuda"):
        Devices(2).check(torch.device("cuda:1"))


@pytest.mark.parametrize("devices", [Devices(), Devices(2), Devices(4, 2)])
def test_what_torchrun_has_started_must_be_what_is_asked_for(
    devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "a"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError, match=r"torchrun started 4: 4 on each of 1 machine. Fix: .* --devices 4 --nodes 1"
    ):
        devices.check(CPU)


def test_without_fabric_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssl3d.pretrain.devices import started

    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(ConfigError, match=r"pip install 'ssl3d\[devices\]'"), started(Devices(2), CPU):
        pass
    with started(Devices(), CPU) as device:
        assert device == CPU, "one device asks for nothing"
