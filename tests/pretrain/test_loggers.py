"""Loggers: told what is written, without effect on it, whatever they do; W&B and MLflow without a network."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner
from cohorts import noise_cohort

import ssl3d
from ssl3d.cli import main
from ssl3d.config import PretrainConfig, Settings
from ssl3d.errors import PluginError, TrainingError
from ssl3d.models.weights.checkpoint import read_run
from ssl3d.pretrain.loop import pretrain
from ssl3d.pretrain.run_log import check_loggers, logged_by
from ssl3d.pretrain.spec import MethodSpec, resolve_method
from ssl3d.registry.registry import Entry, registry
from ssl3d.testing import check_logger

CALLS: list[tuple[str, Any]] = []


class Recorder(ssl3d.Logger):
    """Writes down what it is told."""

    name = "recorder"

    def start(self, folder: Path, run: Mapping[str, Any], step: int) -> None:
        CALLS.append(("start", (folder.name, run["method_name"], step)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        CALLS.append(("write", {**values, "step": step}))

    def flush(self) -> None:
        CALLS.append(("flush", None))

    def finish(self, end: str) -> None:
        CALLS.append(("finish", end))


@contextmanager
def installed(*classes: type[ssl3d.Logger]) -> Iterator[None]:
    """Register loggers, and have runs inside told to them."""
    CALLS.clear()
    with ExitStack() as stack:
        for cls in classes:
            stack.enter_context(registry().loggers.lent(Entry(cls.name, "tests", lambda cls=cls: cls)))  # type: ignore[misc]
        stack.enter_context(logged_by([cls.name for cls in classes]))
        yield


def run(out: Path, steps: int = 4, **more: Any) -> dict[str, Any]:
    options = {
        "steps": steps, "batch_size": 1, "crop": 8, "checkpoint_every": 2, "monitor_every": 2, "log_every": 1,
    }  # fmt: skip
    settings = Settings.model_validate({"backbone": {"channels": [4, 8]}, "pretrain": options})
    spec = more.pop("spec", None) or resolve_method("denoising", {})
    return pretrain(spec, noise_cohort(3), settings, 0, out, torch.device("cpu"), **more)


def ending(error: type[BaseException]) -> MethodSpec:
    """Return a method that raises in its third step, behind the state of the second."""
    spec = resolve_method("denoising", {})

    class Ends(spec.cls):  # type: ignore[misc, name-defined]
        def on_step_end(self, progress: ssl3d.Progress) -> None:
            if progress.step == 3:
                raise error("asked to")

    return MethodSpec(spec.name, Ends, spec.config, spec.title)


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def told() -> list[dict[str, Any]]:
    return [values for name, values in CALLS if name == "write"]


# --- Any logger --------------------------------------------------------------------------------------


def test_a_logger_is_told_what_the_log_says_and_changes_no_number(tmp_path: Path) -> None:
    with installed(Recorder):
        with_it = run(tmp_path / "a")
    assert told() == log_of(tmp_path / "a") and len(told()) == 7
    assert CALLS[0] == ("start", ("a", "denoising", 0)) and CALLS[-1] == ("finish", "finished")
    assert [name for name, _ in CALLS].count("flush") == 2, "with each checkpoint"
    with logged_by([]):
        without = run(tmp_path / "b")
    assert not (tmp_path / "b" / "tensorboard").exists()
    assert (
        with_it["weights_sha256"] == without["weights_sha256"] and with_it["identity"] == without["identity"]
    )


def test_the_end_of_a_run_is_told_as_it_is_and_a_resumed_one_is_told_from_its_state_on(
    tmp_path: Path,
) -> None:
    for error, end in ((KeyboardInterrupt, "stopped"), (TrainingError, "failed")):
        with installed(Recorder), pytest.raises(error):
            run(tmp_path / end, spec=ending(error))
        assert CALLS[-1] == ("finish", end)
    with installed(Recorder):
        run(tmp_path / "stopped", resume=True, allow_code_change=True)
    assert CALLS[0] == ("start", ("stopped", "denoising", 2)) and CALLS[-1] == ("finish", "finished")
    assert {values["step"] for values in told()} == {3, 4}


def raising(function: str, error: type[BaseException]) -> type[ssl3d.Logger]:
    class Faulty(Recorder):
        name = "faulty"

    def fails(self: Any, *given: Any) -> None:
        CALLS.append((f"faulty {function}", None))
        raise error("the server\nis gone")

    setattr(Faulty, function, fails)
    return Faulty


@pytest.mark.parametrize(
    ("function", "error"),
    [("__init__", OSError), ("start", SystemExit), ("write", ValueError), ("flush", OSError), ("finish", KeyError)],
)  # fmt: skip
def test_a_logger_that_raises_is_named_once_and_the_run_and_the_others_go_on(
    function: str, error: type[BaseException], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with installed(raising(function, error), Recorder):
        assert run(tmp_path / "r")["status"] == "finished"
    said = [line for line in capsys.readouterr().err.splitlines() if "logger" in line]
    assert len(said) == 1 and said[0].startswith(
        f"The logger faulty fails, and the run goes on without it: {error.__name__}: "
    )
    assert [name for name, _ in CALLS].count(f"faulty {function}") == 1, "asked no more"
    mine = [values for name, values in CALLS if name == "write"]
    assert all(values in mine for values in log_of(tmp_path / "r")) and CALLS[-1] == ("finish", "finished")


class Lacking(Recorder):
    """Needs what nobody has."""

    name = "lacking"
    requires: ClassVar[Mapping[str, str]] = {"no_such_module.part": "ssl3d[nosuch]", "json": "json"}


@pytest.mark.parametrize(
    ("loggers", "message"),
    [
        ("lacking", "The logger lacking needs a package that is not installed. Fix: pip install 'ssl3d[nosuch]', or"),
        ("tensorboard,wand", 'Unknown logger "wand". Did you mean "wandb"?'),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "command", ["pretrain --method denoising --out", "bench --methods scratch,denoising --store"]
)
def test_a_logger_that_is_not_there_is_an_error_before_anything_is_done(
    command: str, loggers: str, message: str, tmp_path: Path
) -> None:
    with registry().loggers.lent(Entry("lacking", "tests", lambda: Lacking)):
        result = CliRunner().invoke(
            main,
            [*command.split(), str(tmp_path / "x"), "--preset", "smoke", "--set", f"pretrain.loggers={loggers}"],
        )  # fmt: skip
    assert result.exit_code == 2 and message in result.output, result.output
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("run.json"))


def test_the_default_is_tensorboard_and_one_name_is_a_list_of_one(tmp_path: Path) -> None:
    assert PretrainConfig().loggers == ("tensorboard",)
    assert PretrainConfig(loggers="wandb").loggers == ("wandb",)  # type: ignore[arg-type]
    run(tmp_path / "r", steps=1)
    assert list((tmp_path / "r" / "tensorboard").iterdir())


# --- Conformance -------------------------------------------------------------------------------------


def planted(**functions: Callable[..., Any]) -> type[ssl3d.Logger]:
    return type("Planted", (Recorder,), {"name": "planted", "__module__": __name__, **functions})


def keeps(self: Any, step: int, values: Any) -> None:
    values["seen"] = 1.0


def draws(self: Any, step: int, values: Any) -> None:
    torch.rand(1)


def twice(self: Any, folder: Path, run: Any, step: int) -> None:
    (folder / "mine").mkdir()


FAULTS: list[tuple[type[ssl3d.Logger], str, str]] = [
    (type("Bare", (ssl3d.Logger,), {"name": "bare"}), "declarations make sense", "start is not written"),
    (Lacking, "declarations make sense", "pip install 'ssl3d[nosuch]'"),
    (planted(requires=("wandb",)), "declarations make sense", "write {module: what pip installs}"),
    (planted(write=lambda self, values: None), "declarations make sense", "write cannot be called"),
    (raising("write", ValueError), "a run is told", "ValueError: the server"),
    (planted(start=twice), "a run that was stopped is told on", "FileExistsError"),
    (planted(write=keeps), "what it is told stays as it was", "write changes the values"),
    (planted(write=draws), "global generators are left alone", "draws from or seeds torch's"),
]


@pytest.mark.parametrize(("cls", "check", "message"), FAULTS, ids=lambda value: getattr(value, "name", None))
def test_a_mistake_of_a_logger_is_told_once(cls: type[ssl3d.Logger], check: str, message: str) -> None:
    failed = [found for found in check_logger(cls).checks if found.failed]
    assert [found.name for found in failed] == [check] and message in failed[0].told(), failed


@pytest.mark.parametrize("cls", ["tensorboard", "wandb", Recorder])
def test_sound_loggers_pass(cls: Any) -> None:
    check_logger(cls).assert_passed()


def test_the_command_checks_loggers() -> None:
    result = CliRunner().invoke(main, ["check", "tensorboard"])
    assert result.exit_code == 0 and "pass  a run is told" in result.output, result.output
    result = CliRunner().invoke(main, ["check", "tensorboard", "--set", "pretrain.lr=1"])
    assert result.exit_code == 2 and "a logger has no options" in result.output, result.output


# --- Without a network -------------------------------------------------------------------------------


@contextmanager
def proxy() -> Iterator[tuple[str, list[bytes]]]:
    """Yield the address of a proxy that answers nothing, and what it was asked for."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    asked.append(connection.recv(200))

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked


SCRIPT = """
import sys
from pathlib import Path
from test_loggers import ending, logged_by, run
out = Path(sys.argv[1])
with logged_by(["wandb", "mlflow"]):
    try:
        run(out, spec=ending(KeyboardInterrupt))
    except KeyboardInterrupt:
        run(out, resume=True, allow_code_change=True)
"""


def test_wandb_and_mlflow_are_told_the_log_and_ask_nobody(tmp_path: Path) -> None:
    """A run that is stopped and resumed. Whoever would open a connection would ask the proxy; W&B has a program of its own
    beside Python."""
    chosen = ("WANDB", "MLFLOW", "NO_PROXY", "DO_NOT_TRACK")
    environment = {key: value for key, value in os.environ.items() if not key.upper().startswith(chosen)}
    out = tmp_path / "r"
    with proxy() as (address, asked):
        environment |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), address)
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(out)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0 and "fails" not in done.stderr, done.stderr
        assert not asked
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as caller:
            caller.sendall(b"CONNECT")
            assert caller.recv(1) == b"" and asked == [b"CONNECT"], "it notices who asks"
    parts = [*(out / "wandb").glob("offline-run-*/*.wandb")]
    assert {part.name for part in parts} == {f"run-{(out / 'wandb' / 'ssl3d-run-id').read_text()}.wandb"}, (
        "one run"
    )
    content = b"".join(part.read_bytes() for part in parts)
    for line in log_of(out):
        for name, value in line.items():
            assert name.encode() in content and json.dumps(value).encode() in content, (name, value)
    _check_mlflow(out)


def _check_mlflow(out: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{out / 'mlflow' / 'mlflow.db'}")
    known = client.get_run((out / "mlflow" / "ssl3d-run-id").read_text())
    assert len(client.search_runs([known.info.experiment_id])) == 1, "the resumed run is the same"
    assert known.info.status == "FINISHED" and known.info.run_name == "r"
    assert known.data.params["method_name"] == "denoising"
    assert known.data.params["identity.seed"] == str(read_run(out)["identity"]["seed"])
    found = {
        (metric.step, name, metric.value)
        for name in known.data.metrics for metric in client.get_metric_history(known.info.run_id, name)
    }  # fmt: skip
    assert found == {
        (line["step"], name, value) for line in log_of(out) for name, value in line.items() if name != "step"
    }


def test_what_is_asked_for_must_exist() -> None:
    with pytest.raises(PluginError, match='Unknown logger "jsonl"'):
        check_loggers(["jsonl"])
