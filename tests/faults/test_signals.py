"""SIGTERM, SIGUSR1 and Ctrl-C: a checkpoint, a status that says resumable, and a command that goes on."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file

from faults.commands import ended, fork
from faults.runs import EVERY, Plain, forked, log_of, run, same_weights, states
from ssl3d import signals
from ssl3d.cli import main
from ssl3d.signals import GRACE_S, RESUMABLE

WAIT_S = 300.0


def until(true: Callable[[], object], running: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not true():
        assert running() and time.monotonic() < end
        time.sleep(0.02)


def start(*arguments: object, silence: float = 60.0) -> subprocess.Popen[str]:
    """Start a command in a process group of its own.

    Args:
        arguments: of ssl3d.
        silence: seconds after which a process without a sign of life is killed; a third of it, until that is said.
    """
    patient = (
        "from ssl3d.commands import workers; from ssl3d.cli import main; "
        f"workers._SAY_SILENT_S, workers._KILL_SILENT_S = {silence / 3}, {silence}; main(prog_name='ssl3d')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", patient, *map(str, arguments)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def goes_on_with(text: str) -> list[str]:
    words = shlex.split(text.split("It goes on where it stopped with:\n")[1].splitlines()[0])
    assert words[0] == "ssl3d"
    return words[1:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
def test_the_step_at_hand_ends_and_is_saved(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"

    def ask(call: int) -> None:
        if call == EVERY + 1:  # no step of a checkpoint
            os.kill(os.getpid(), number)

    def child() -> None:
        Plain.hook = staticmethod(ask)
        with signals.handled():
            try:
                run(out)
            except signals.Stopped as stopped:
                assert stopped.number == number
                return
        raise AssertionError("not stopped")

    assert forked(child) == 0
    assert states(out) == ["state-00000002.safetensors", "state-00000003.safetensors"]
    run(out, resume=True)
    run(tmp_path / "whole")
    assert same_weights(out, tmp_path / "whole") and log_of(out) == log_of(tmp_path / "whole")


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
def test_pretrain_saves_and_goes_on(volume_folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    out, said = tmp_path / "run", tmp_path / "said"
    command = [
        "pretrain", "--method", "denoising", "--data", volume_folder, "--preset", "smoke", "--cache", tmp_path / "cache",
        "--set", "pretrain.steps=40", "--set", "pretrain.checkpoint_every=40", "--set", "pretrain.log_every=1",
        "--set", "pretrain.monitor_every=40", "--set", "pretrain.crop=16", "--device", "cpu", "--out",
    ]  # fmt: skip
    torch.set_num_threads(1)
    whole = CliRunner().invoke(
        main, [*map(str, command), str(tmp_path / "whole")]
    )  # also warms what the children inherit
    assert whole.exit_code == 0, whole.output
    child = fork([*command, out], said)
    until(lambda: (out / "tensorboard").exists(), lambda: os.waitpid(child, os.WNOHANG)[0] == 0)
    time.sleep(0.1)
    sent = time.monotonic()
    os.kill(child, number)
    assert ended(child) == RESUMABLE, said.read_text()
    assert time.monotonic() - sent < GRACE_S
    assert "Traceback" not in said.read_text()
    states = sorted(out.glob("state-*.safetensors"))
    assert len(states) == 1 and states[0].name < "state-00000040", [s.name for s in states]
    words = goes_on_with(said.read_text())
    assert words == [*map(str, command), str(out), "--resume"]
    assert ended(fork(words, said)) == 0, said.read_text()
    weights, expected = (load_file(f / "backbone.safetensors") for f in (out, tmp_path / "whole"))
    assert all((weights[key] == expected[key]).all() for key in expected)


def test_the_grace_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that takes longer is given up; the state before it is whole."""
    monkeypatch.setattr(signals, "GRACE_S", 0.3)
    out = tmp_path / "run"

    def slow(call: int) -> None:
        if call == EVERY + 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    def child() -> None:
        Plain.hook = staticmethod(slow)
        with signals.handled():
            try:
                run(out)
            except signals.Stopped:
                return
        raise AssertionError("not stopped")

    began = time.monotonic()
    assert forked(child) == 0
    assert time.monotonic() - began < 30
    assert states(out) == ["state-00000002.safetensors"]


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    def child() -> None:
        with signals.handled(), signals.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.asked()
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            except signals.Stopped:
                return
        raise AssertionError("not stopped")

    assert forked(child) == 0


def children(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(word) for word in text.split()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def worker(process: subprocess.Popen[str]) -> int:
    """Return the id of a process that computes cells."""
    for child in children(process.pid):
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            return child
    return 0


def bench(tmp_path: Path, seeds: str = "0,1") -> list[object]:
    return [
        "bench", "--preset", "smoke", "--methods", "denoising", "--seeds", seeds, "--tasks", "ccc", "--modes", "linear",
        "--jobs", 2, "--threads", 1, "--store", tmp_path / "store", "--cache", tmp_path / "cache",
        "--set", "pretrain.steps=60", "--set", "pretrain.checkpoint_every=1000",
        "--set", "pretrain.log_every=1",
    ]  # fmt: skip


def run_of(process: int, tmp_path: Path) -> Path | None:
    """Return the folder of the run that a process is at work on."""
    for lock in tmp_path.glob("store/runs/*/run.lock"):
        with suppress(FileNotFoundError):
            if f"process {process} " in lock.read_text():
                return lock.parent
    return None


@pytest.mark.thorough
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT], ids=["to the parent", "by a terminal, to all"]
)
def test_bench_passes_the_signal_on_and_leaves_nobody(tmp_path: Path, number: signal.Signals) -> None:
    process = start(*bench(tmp_path), "--set", "pretrain.steps=300")
    until(
        lambda: (theirs := run_of(worker(process), tmp_path)) and (theirs / "tensorboard").exists(),
        lambda: process.poll() is None,
    )
    time.sleep(0.3)
    theirs = run_of(worker(process), tmp_path)
    assert theirs is not None
    everybody, workers = children(process.pid), [worker(process)]
    if number is signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == RESUMABLE, said
    assert not [child for child in workers if alive(child)]
    # What Python itself starts, to remove what processes share, ends when it notices.
    until(lambda: not [child for child in everybody if alive(child)], lambda: True)
    assert "Traceback" not in said
    # One that took the two signals, of the terminal and of its parent, for two requests would have saved nothing.
    assert list(theirs.glob("state-*.safetensors")) and not (theirs / "backbone.safetensors").exists()
    again = subprocess.run(
        [sys.executable, "-m", "ssl3d", *goes_on_with(said)],
        text=True,
        capture_output=True,
        timeout=2 * WAIT_S,
    )
    assert again.returncode == 0, again.stderr
    assert len(list((tmp_path / "store" / "records").glob("*.json"))) == 2


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda n: n.name)
def test_the_cell_of_a_worker_that_is_killed_or_suspended_is_done_by_another_and_said(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = start(*bench(tmp_path), silence=60.0 if number is signal.SIGKILL else 6.0)
    until(lambda: run_of(worker(process), tmp_path), lambda: process.poll() is None)
    os.kill(one := worker(process), number)
    said = process.communicate(timeout=2 * WAIT_S)[1]
    assert process.returncode == 0, said
    if number is signal.SIGSTOP:
        assert f"Waiting for process {one} on " in said, said
        held = r"denoising, ccc linear, seed \d, \w+"
        silent = rf"Process {one}, which holds {held}, has shown no sign of life for"
        assert re.search(rf"{silent} 2 s\. .*kill -CONT {one} ", said), said
        assert re.search(rf"{silent} 6 s\. It is killed", said), said
    assert (
        f"Process {one} was killed by SIGKILL; the cell that it was at work on is left to the others" in said
    )
    assert not alive(one)
    assert len(list((tmp_path / "store" / "records").glob("*.json"))) == 2
