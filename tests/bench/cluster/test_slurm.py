"""A bench by Slurm, whose jobs run here as processes of submitit's local executor."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from benches import options, outcome, words
from click.testing import CliRunner

from ssl3d.bench.cluster.slurm_engine import SlurmEngine, minutes, parse
from ssl3d.bench.plan import bench_of
from ssl3d.cli import main
from ssl3d.errors import ConfigError

WAIT_S = 540.0
STEPS = (
    "pretrain.steps=60",
    "pretrain.checkpoint_every=1000",
    "pretrain.log_every=1",
    "downstream.linear.voxels=50",
)


def until(seen: Callable[[], Any]) -> Any:
    """Return what ``seen`` returns as soon as that is something."""
    last = time.monotonic() + WAIT_S
    while not (found := seen()):
        assert time.monotonic() < last, "it has not come"
        time.sleep(0.01)
    return found


def at_work(store: Path, seed: int) -> int:
    """Return the process that is in the middle of the pretraining of a seed; 0: none yet."""
    for lock in store.glob(f"runs/*-s{seed}-*/run.lock"):
        with suppress(OSError, IndexError):
            if (lock.parent / "tensorboard").exists():
                return int(lock.read_text().split()[1])
    return 0


def states(store: Path, seed: int) -> list[Path]:
    return list(store.glob(f"runs/*-s{seed}-*/state-*.safetensors"))


def said(store: Path) -> str:
    return "".join(path.read_text() for path in store.glob("cluster/jobs/*_log.*"))


def test_jobs_that_are_preempted_save_a_checkpoint_are_queued_again_and_go_on(tmp_path: Path) -> None:
    store = tmp_path / "store"
    asked: dict[str, Any] = {
        "methods": ("denoising",),
        "modes": ("linear",),
        "seeds": (0, 1),
        "options": STEPS,
    }
    seen: list[str] = []

    def preempt(seed: int, number: signal.Signals) -> None:
        process = until(lambda: at_work(store, seed))
        time.sleep(0.5)  # within the steps
        os.kill(process, number)
        until(lambda: states(store, seed))
        if number == signal.SIGUSR1:
            until(lambda: "Requeued job" in said(store))
        seen.append(number.name)

    threads = [
        threading.Thread(target=preempt, args=told, daemon=True)
        for told in ((0, signal.SIGUSR1), (1, signal.SIGTERM))
    ]
    for thread in threads:
        thread.start()
    sets = [word for option in STEPS for word in ("--set", option)]
    more = (
        "--methods",
        "denoising",
        "--modes",
        "linear",
        "--seeds",
        "0,1",
        *sets,
        "--slurm",
        "cluster=local,time=60",
    )
    result = CliRunner().invoke(main, words(store, tmp_path / "cache", *more))
    for thread in threads:
        thread.join(1.0)
    assert result.exit_code == 0, result.output
    assert sorted(seen) == ["SIGTERM", "SIGUSR1"], result.output
    assert result.output.count("ended without an answer and is submitted again") == 1, result.output
    assert "(cell 2 of 2)" in result.output
    assert not (store / "cluster").exists()
    serial = bench_of(options(tmp_path / "serial", tmp_path / "cache", **asked))
    assert len(list(serial.run())) == 2
    assert outcome(store) == outcome(tmp_path / "serial")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", '"" is no KEY=VALUE'),
        ("partition", '"partition" is no KEY=VALUE'),
        ("partition=gpu,,time=1", '"" is no KEY=VALUE'),
        ("time=1,time=2", "has time twice"),
        ("partition=gpu", "without time="),
        ("time=soon", 'time="soon" is no time; write time=90'),
        ("time=0", 'time="0" leaves no time'),
        ("cluster=lokal,time=1", 'cluster="lokal". Did you mean "local"'),
        ("time=1,parallel=many", 'parallel="many" is no whole number above 0'),
    ],
)  # fmt: skip
def test_text_that_is_malformed_is_refused(text: str, fault: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["bench", "--store", str(tmp_path / "store"), "--slurm", text])
    assert result.exit_code == 2 and fault in result.output, result.output


def test_times_are_those_of_slurm() -> None:
    times = {"90": 90, "4:00:00": 240, "90:30": 91, "2-0": 2880, "1-12:30": 2190, "0:00:01": 1}
    assert {text: minutes(text) for text in times} == times
    assert parse("partition=a, time=1:00:00") == {"partition": "a", "time": "1:00:00"}


def test_what_cannot_be_submitted_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = SlurmEngine("cluster=local,time=1,qosx=1", None, 1, "cpu")
    with pytest.raises(ConfigError, match='"qosx" is no parameter. Did you mean "qos"'), unknown:
        pass
    with pytest.raises(ConfigError, match="Slurm hands out whole GPUs; write --gpus-per-run 1"):
        SlurmEngine("time=1", 0.1, 1, "cuda")
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(ConfigError, match="there is no sbatch on this machine"),
        SlurmEngine("time=1", None, 1, "cpu"),
    ):
        pass


def test_a_node_that_does_not_see_the_store_is_refused(tmp_path: Path) -> None:
    from ssl3d.bench.cluster.slurm_engine import Job

    answer = Job({"store": str(tmp_path), "mark": "cluster/none"}, "run", None)()
    assert "does not see the store" in answer["refused"]
