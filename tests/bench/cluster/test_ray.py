"""A bench by Ray: on two nodes of which one is killed, on a cluster that is started for it, and at wrong addresses."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benches import options, outcome, words
from click.testing import CliRunner

from ssl3d.bench.cluster import ray_engine
from ssl3d.bench.plan import bench_of
from ssl3d.cli import main
from ssl3d.errors import ConfigError
from ssl3d.signals import RESUMABLE

WAIT_S = 540.0
"""For what takes seconds: a test that waits for a busy machine must not fail by that."""


def until(seen: Callable[[], Any], while_: Callable[[], bool] = lambda: True) -> Any:
    """Return what ``seen`` returns as soon as that is something."""
    last = time.monotonic() + WAIT_S
    while not (found := seen()):
        assert time.monotonic() < last and while_(), "it has not come"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one core each on the loopback, with a token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_AUTH_MODE", "token")
        ray_engine.prepare_environment(local=True)
        from ray.cluster_utils import Cluster

        # A node whose raylet is gone is given up after 3 s instead of 15.
        system = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
        node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args={**node, "_system_config": system})
        made.second = made.add_node(**node)
        yield made
        made.shutdown()


def children(process: int) -> list[int]:
    with suppress(OSError):
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return []


def title(process: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text()
    return ""


def at_work(raylet: int) -> list[int]:
    """Return the processes of a node that pretrain or evaluate."""
    return [
        child for child in children(raylet) if title(child).startswith(("ray::_pretrain", "ray::_evaluate"))
    ]


def test_a_node_that_is_killed_loses_nothing_and_repeats_nothing(cluster: Any, tmp_path: Path) -> None:
    command = words(tmp_path / "store", tmp_path / "cache", "--seeds", "0,1", "--ray", cluster.address)
    raylet = cluster.second.all_processes["raylet"][0].process.pid
    killed: list[int] = []

    def kill() -> None:
        killed.extend(until(lambda: at_work(raylet)))
        cluster.remove_node(cluster.second, allow_graceful=False)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    result = CliRunner().invoke(main, command)
    thread.join(WAIT_S)
    assert killed, "the second node has never had any work"
    assert result.exit_code == 0, result.output
    serial = bench_of(options(tmp_path / "serial", tmp_path / "cache", seeds=(0, 1)))
    assert len(list(serial.run())) == 8
    assert outcome(tmp_path / "store") == outcome(tmp_path / "serial")
    lines = [line for line in result.output.splitlines() if "(cell " in line]
    assert len(lines) == 8 and len({line.partition(":")[0] for line in lines}) == 8
    assert "(cell 8 of 8)" in lines[-1] and any(" left)" in line for line in lines)
    until(lambda: not any(title(process).startswith("ray::") for process in killed))


def test_ctrl_c_saves_a_checkpoint_ends_ray_and_the_same_command_goes_on(tmp_path: Path) -> None:
    more = ("--methods", "denoising", "--modes", "linear", "--set", "pretrain.steps=200")
    more = (*more, "--set", "pretrain.checkpoint_every=1000", "--ray")
    command = words(tmp_path / "store", tmp_path / "cache", *more)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "ssl3d", *command], stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    until(lambda: list(tmp_path.glob("store/runs/*/tensorboard")), lambda: process.poll() is None)
    time.sleep(0.5)  # within the steps
    started = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == RESUMABLE and "It goes on where it stopped with" in said, said
    assert "Traceback" not in said
    assert started and until(lambda: not [child for child in started if title(child)])
    assert not (tmp_path / "store" / "cluster").exists()
    (run,) = (tmp_path / "store" / "runs").iterdir()
    steps = [int(path.stem.partition("-")[2]) for path in run.glob("state-*.safetensors")]
    assert 0 < max(steps) < 200 and not (run / "backbone.safetensors").exists()
    again = CliRunner().invoke(main, [*command[:-1], "--jobs", "1"])  # without Ray: the store is the same
    assert again.exit_code == 0 and len(outcome(tmp_path / "store")) == 1, again.output


@pytest.mark.parametrize("address", ["nowhere", "ray://127.0.0.1:10001", "127.0.0.1:99999", "127.0.0.1:"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=f'--ray "{address}" is no HOST:PORT'):
        ray_engine.check_address(address)


def test_an_address_at_which_no_cluster_answers_is_refused_in_bounded_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ray_engine, "_ANSWER_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        result = CliRunner().invoke(main, words(tmp_path / "store", tmp_path / "cache", "--ray", address))
        assert (
            result.exit_code == 2
            and f"--ray {address}: nobody answers there (Connection refused)" in result.output
        )
        silent.listen()
        with pytest.raises(ConfigError, match=f"--ray {address}: no answer within 0 s"):
            ray_engine.check_address(address)

        def http() -> None:
            connection, _ = silent.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

        threads = [threading.Thread(target=silent.accept), threading.Thread(target=http)]
        threads[0].start()
        threads[0].join()  # that of the connection before
        threads[1].start()
        with pytest.raises(ConfigError, match="what answers there is no Ray cluster"):
            ray_engine.check_address(address)
        threads[1].join()
    assert not (tmp_path / "store").exists()


def nodes(*resources: dict[str, float]) -> Any:
    """Return what the engine needs of Ray: its nodes."""
    return SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": dict(some)} for some in resources])


@pytest.mark.parametrize(
    ("gpus", "threads", "device", "cluster", "jobs", "computes"),
    [
        (None, 1, "auto", [{"CPU": 2}, {"CPU": 4}], 6, "cpu"),
        (None, 3, "auto", [{"CPU": 2}, {"CPU": 7}], 2, "cpu"),  # the first has too few
        (None, 1, "auto", [{"CPU": 16, "GPU": 2}, {"CPU": 4}], 2, "cuda"),
        (None, 1, "cpu", [{"CPU": 16, "GPU": 2}], 16, "cpu"),
        (0.1, 1, "auto", [{"CPU": 16, "GPU": 1}], 10, "cuda"),
        (0.1, 2, "cuda", [{"CPU": 16, "GPU": 1}, {"CPU": 4, "GPU": 1}], 10, "cuda"),
        (0.0, 1, "auto", [{"CPU": 3, "GPU": 1}, {}], 3, "cpu"),
    ],
)  # fmt: skip
def test_a_task_gets_what_it_asks_for(
    gpus: float | None, threads: int, device: str, cluster: list[dict[str, float]], jobs: int, computes: str
) -> None:
    engine = ray_engine.RayEngine("local", gpus, threads, device)
    engine._nodes = engine._usable(nodes(*cluster))
    assert (engine.jobs, engine.device) == (jobs, computes)


def test_a_cluster_without_what_a_run_asks_for_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"2 cores \(--threads\) and 0.5 GPUs .* Its largest has 8 cores, and 0 GPUs"
    ):
        ray_engine.RayEngine("local", 0.5, 2, "auto")._usable(nodes({"CPU": 8}, {"CPU": 1}))
    with pytest.raises(ConfigError, match="--device cuda: no node of the Ray cluster has a GPU"):
        ray_engine.RayEngine("local", None, 1, "cuda")._usable(nodes({"CPU": 8}))


def test_without_a_token_no_cluster_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="no token to prove"):
        ray_engine.prepare_environment(local=False)
    assert os.environ["RAY_AUTH_MODE"] == "token"
    monkeypatch.delenv("RAY_AUTH_MODE")
    ray_engine.prepare_environment(local=True)
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64 and os.environ["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--ray", "--jobs", "2"], "--jobs 2 starts processes on this machine, and --ray hands out the cells itself"),
        (["--slurm", "time=1", "--jobs", "2"], "--jobs 2 starts processes on this machine, and --slurm hands out"),
        (["--ray", "--slurm", "time=1"], "--ray and --slurm both hand out the cells"),
        (["--gpus-per-run", "1"], "--gpus-per-run says what a task of --ray or a job of --slurm gets"),
        (["--ray", "--gpus-per-run", "1.5", "--device", "cuda"], "--gpus-per-run 1.5: a part of a GPU, or whole ones"),
        (["--ray", "--gpus-per-run", "1", "--device", "cpu"], "--gpus-per-run 1 with --device cpu"),
        (["--ray", "--device", "cuda:1"], "--device cuda:1: on a cluster, each task is given its GPU"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(more: list[str], said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["bench", "--store", str(tmp_path / "store"), *more])
    assert result.exit_code == 2 and said in result.output, result.output
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("option", "module"), [("--ray", "ray"), ("--slurm=time=1", "submitit")])
def test_an_extra_that_is_not_installed_is_named(
    option: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    result = CliRunner().invoke(main, ["bench", "--store", str(tmp_path / "store"), option])
    assert result.exit_code == 2, result.output
    assert f"pip install 'ssl3d[{option.strip('-').partition('=')[0]}]'" in result.output.replace("\n", " ")
