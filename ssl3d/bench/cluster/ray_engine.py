"""A bench by Ray: every pretraining and every cell is a task; where, when and what a lost worker leaves to others is Ray's.

Ray is closed to others: its dashboard is off, one that is started here listens on the loopback only, and its token
authentication is on unless the user has turned it off (``RAY_AUTH_MODE``).
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ssl3d import signals
from ssl3d.bench.cluster.work import Order, Result, Run
from ssl3d.errors import ConfigError, SSL3DError, count
from ssl3d.process import cores
from ssl3d.progress import Board, Message, say, sending

LOCAL = "local"
"""Stands for a cluster that is started here, of this machine's cores and GPUs, and ended with the bench."""

RETRIES = 3
"""How often a task is done again whose worker was lost."""

_ANSWER_S = 10.0
# Ray ends the process, without an exception, where it reaches something that does not speak gRPC, so that is asked before.
_SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SETTINGS
_FRAME_BYTES = 9
_GREETING_S = 600.0
_LOOK_S = 0.5
_SMALL_STORE = 100 * 2**20  # bytes; records are small, and Ray takes 30 % of the memory otherwise


def prepare_environment(local: bool) -> None:
    """Set what Ray reads when it is imported or started, where the user has not.

    Raises:
        ConfigError: a cluster that runs already is wanted, and no token is there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent unasked
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # else for ever, of one that fits nowhere
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # a task without GPUs sees none
    os.environ.setdefault(
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S", "300"
    )  # of what starts beside it, on a busy machine
    if local:
        # Its name tells of other systems; it decides whether a cluster of one machine is on the loopback.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    elif os.environ["RAY_AUTH_MODE"] == "token" and not _has_token():
        raise ConfigError(
            "--ray: no token to prove to the cluster who this is. Put the one that its nodes were started with into "
            "~/.ray/auth_token, RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN (ray get-auth-token --generate makes one); "
            "RAY_AUTH_MODE=disabled does without, which lets everybody who reaches the cluster run code on it."
        )


def _has_token() -> bool:
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    places = [Path(given)] if given else [Path.home() / ".ray" / "auth_token"]
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or any(place.is_file() for place in places)


def check_address(address: str) -> None:
    """Refuse an address at which nobody answers, in bounded time.

    Raises:
        ConfigError: it is malformed, or nobody answers.
    """
    found = re.fullmatch(r"\[?([^\[\]/]+?)\]?:([0-9]{1,5})", address)
    if found is None or int(found[2]) > 65535:
        raise ConfigError(
            f'--ray "{address}" is no HOST:PORT, as "ray start --head" prints it. Without an address, a cluster of this '
            "machine alone is started. (ray:// is not supported: start bench on a machine of the cluster.)"
        )
    fix = "Start one: ray start --head, or leave the address out for a cluster of this machine alone."
    try:
        with socket.create_connection((found[1], int(found[2])), timeout=_ANSWER_S) as connection:
            connection.settimeout(_ANSWER_S)
            connection.sendall(_HTTP2_PREFACE)
            greeting = connection.recv(_FRAME_BYTES) if _plain() else _SETTINGS
    except TimeoutError:
        raise ConfigError(f"--ray {address}: no answer within {_ANSWER_S:.0f} s. {fix}") from None
    except OSError as error:
        raise ConfigError(
            f"--ray {address}: nobody answers there ({error.strerror or error}). {fix}"
        ) from None
    if greeting[3:4] != _SETTINGS[3:4]:
        raise ConfigError(f"--ray {address}: what answers there is no Ray cluster. {fix}")


def _plain() -> bool:
    return os.environ.get("RAY_USE_TLS", "0") == "0"


class RayEngine:
    """Connects to a Ray cluster, or starts one of this machine, while the block runs.

    Args:
        address: ``HOST:PORT``, or :data:`LOCAL`.
        gpus: of each task, as 0.1; None: 1 where the cluster has any, unless ``device`` is ``cpu``.
        threads: CPU cores of each task.
        device: as ``--device`` has it.
    """

    name = "ray"

    def __init__(self, address: str, gpus: float | None, threads: int, device: str) -> None:
        self.address, self.gpus, self.threads, self.asked = address, gpus, threads, device
        self.device = "cpu"

    def __enter__(self) -> Self:
        local = self.address == LOCAL
        if not local:
            check_address(self.address)
        prepare_environment(local)
        try:
            import ray
        except ImportError as error:
            raise ConfigError(f"--ray needs Ray ({error}): pip install 'ssl3d[ray]'") from None
        before = signal.getsignal(signal.SIGTERM)
        try:
            _connect(ray, self.address)
        finally:
            if threading.current_thread() is threading.main_thread():  # Ray has put its own there
                signal.signal(signal.SIGTERM, before)
        try:
            self._nodes = self._usable(ray)
        except BaseException:
            ray.shutdown()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        ray.shutdown()

    @property
    def jobs(self) -> int:
        """Tasks that run at once on the nodes that were there at the start."""
        return sum(self._slots(node) for node in self._nodes)

    def _slots(self, node: dict[str, Any]) -> int:
        has = node["Resources"]
        by_cores = int(has.get("CPU", 0) // self.threads)
        return min(by_cores, int(has.get("GPU", 0) / self.gpus + 1e-6)) if self.gpus else by_cores

    def _usable(self, ray: Any) -> list[dict[str, Any]]:
        """Return the nodes that have what a task asks for, and decide where it computes.

        Raises:
            ConfigError: none has, so that every task would wait for ever.
        """
        nodes = [node for node in ray.nodes() if node["Alive"]]
        most = {kind: max((n["Resources"].get(kind, 0) for n in nodes), default=0) for kind in ("CPU", "GPU")}
        if self.gpus is None:
            self.gpus = 1.0 if most["GPU"] and self.asked != "cpu" else 0.0
        if self.asked == "cuda" and not self.gpus:
            raise ConfigError("--device cuda: no node of the Ray cluster has a GPU.")
        self.device = "cuda" if self.gpus else "cpu"
        if usable := [node for node in nodes if self._slots(node)]:
            return usable
        raise ConfigError(
            f"No node of the Ray cluster has what one run asks for: {count(self.threads, 'core')} (--threads) and "
            f"{self.gpus:g} GPUs (--gpus-per-run). Its largest has {most['CPU']:g} cores, and {most['GPU']:g} GPUs."
        )

    # --- The work ---

    def results(self, order: Order, runs: Sequence[Run]) -> Generator[Result, None, None]:
        """See :class:`ssl3d.bench.cluster.work.Engine`."""
        import ray

        post = _pinned(ray.remote(num_cpus=0)(Post)).remote()
        with Board(()) as board, sending(board.mine):
            show = _Show(post, board)
            order = order | {"carry": self._greeted(order, show)}
            refs = self._submitted(order, runs, post)
            try:
                yield from _as_they_come(refs, show)
            finally:
                if refs:
                    _cancel(list(refs))
                show()

    def _greeted(self, order: Order, show: Callable[[], None]) -> bool:
        """Ask every node whether it fits the bench, and to prepare its data; return whether runs must be carried to nodes.

        Raises:
            ConfigError: some do not; names them all.
        """
        greetings = self._asked_of_all("greet", order, show, _GREETING_S)
        self._asked_of_all("prepare", order, show, None)
        return not all(answer["shared"] for answer in greetings)

    def _asked_of_all(
        self, what: str, order: Order, show: Callable[[], None], limit: float | None
    ) -> list[dict[str, Any]]:
        """Return the answers of all nodes to a function of :mod:`ssl3d.bench.cluster.worker`.

        Raises:
            ConfigError: there are none within ``limit`` seconds, or nodes refuse.
        """
        import ray

        task = ray.remote(num_cpus=0, max_retries=0)(_ask)
        waiting = {
            task.options(scheduling_strategy=_on(node["NodeID"])).remote(what, order): _title(node)
            for node in self._nodes
        }
        answers, problems, began = [], [], time.monotonic()
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=_LOOK_S)
            show()
            for ref in done:
                answer = _value(ref, f"node {waiting.pop(ref)}")
                answers.append(answer)
                problems += [answer[kind] for kind in ("lost", "refused") if kind in answer]
            if waiting and limit is not None and time.monotonic() - began > limit:
                problems.append(f"no answer from {', '.join(waiting.values())} for {limit:.0f} s")
                break
        if problems:
            raise ConfigError("--ray: nodes do not fit this bench:\n" + "\n".join(dict.fromkeys(problems)))
        return answers

    def _submitted(self, order: Order, runs: Sequence[Run], post: Any) -> dict[Any, tuple[str, str | None]]:
        """Hand everything to Ray at once: it lets each cell wait for its pretraining and for nothing else."""
        import ray

        from ssl3d.bench.cluster.worker import finished_files

        asked: dict[str, Any] = {"num_cpus": self.threads, "num_gpus": self.gpus, "max_retries": RETRIES}
        pretrain, evaluate = ray.remote(**asked)(_pretrain), ray.remote(**asked)(_evaluate)
        told = ray.put(order)
        refs: dict[Any, tuple[str, str | None]] = {}
        for run in runs:
            finished = finished_files(order, run.name) if order["carry"] else None
            first = pretrain.remote(told, run.name, finished, post)
            refs[first] = (run.name, None)
            refs |= {evaluate.remote(told, cell, first, post): (run.name, cell) for cell in run.cells}
        return refs


def _connect(ray: Any, address: str) -> None:
    """Start a local cluster, or connect to one.

    Raises:
        ConfigError: it is none, or another version of Ray or Python, or it does not take our token.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if address == LOCAL:
        ray.init(
            address=LOCAL,
            include_dashboard=False,
            num_cpus=cores(),
            object_store_memory=_SMALL_STORE,
            **quiet,
        )
        return
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ConfigError(
            f"--ray {address}: no cluster that can be used ({reason}). It must run the same versions of Ray and Python, "
            "on this machine too, and have been started with the same token."
        ) from None


def _pinned(actor: Any) -> Any:
    """Return the actor's class so that it lives on the driver's node, which is not lost without the driver."""
    import ray

    return actor.options(scheduling_strategy=_on(ray.get_runtime_context().get_node_id()))


def _on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def _title(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _as_they_come(refs: dict[Any, tuple[str, str | None]], show: Callable[[], None]) -> Iterator[Result]:
    """Yield answers, taking each out of ``refs``."""
    import ray

    while refs:
        done, _ = ray.wait(list(refs), num_returns=1, timeout=_LOOK_S)
        show()
        for ref in done:
            run, cell = refs.pop(ref)
            yield Result(run, cell, _value(ref, run))


def _value(ref: Any, what: str) -> dict[str, Any]:
    """Return a task's answer; of one whose workers were lost, that."""
    import ray

    try:
        answer: dict[str, Any] = ray.get(ref)
    except (ray.exceptions.RayError, ImportError) as error:  # the node's Python may lack ssl3d
        if isinstance(cause := getattr(error, "cause", None), SSL3DError):
            raise cause from None
        reason = " ".join(str(error).split())[-300:]
        return {"lost": f"{what}: {type(error).__name__}: {reason}"}
    return answer


def _cancel(refs: list[Any]) -> None:
    """End what is running, after a checkpoint where there is one to save, and forget what is waiting."""
    import ray

    for ref in refs:
        with suppress(ray.exceptions.RayError, ValueError):
            ray.cancel(ref, force=False)
    with suppress(ray.exceptions.RayError):
        ray.wait(refs, num_returns=len(refs), timeout=signals.GRACE_S, fetch_local=False)


# --- Progress ------------------------------------------------------------------------------------------


class Post:
    """An actor on the driver's node that keeps what workers say until the driver fetches it."""

    def __init__(self) -> None:
        self._messages: deque[tuple[str, tuple[Any, ...]]] = deque(maxlen=10_000)

    def put(self, who: str, message: tuple[Any, ...]) -> None:
        """Keep a message."""
        self._messages.append((who, message))

    def take(self) -> list[tuple[str, tuple[Any, ...]]]:
        """Return what has come since the last time."""
        found = list(self._messages)
        self._messages.clear()
        return found


class _Show:
    """Shows what workers say, each in a line of its own.

    Args:
        post: the actor.
        board: where.
    """

    def __init__(self, post: Any, board: Board) -> None:
        self._post, self._board = post, board
        self._places: dict[str, int] = {}
        self._asked: Any = None

    def __call__(self) -> None:
        import ray

        if self._asked is None:
            self._asked = self._post.take.remote()
        done, _ = ray.wait([self._asked], timeout=0)
        if not done:
            return
        with suppress(ray.exceptions.RayError):
            for who, message in ray.get(self._asked):
                self._board.show(self._places.setdefault(who, len(self._places) + 1), Message(*message))
        self._asked = None


# --- What a worker runs --------------------------------------------------------------------------------


def _ask(what: str, order: Order) -> dict[str, Any]:
    from ssl3d.bench.cluster import worker

    answer: dict[str, Any] = getattr(worker, what)(order)
    return answer


def _pretrain(order: Order, run: str, finished: Any, post: Any) -> dict[str, Any]:
    from ssl3d.bench.cluster import worker

    return _told(post, lambda: worker.pretrain(order, run, finished))


def _evaluate(order: Order, cell: str, pretraining: dict[str, Any], post: Any) -> dict[str, Any]:
    from ssl3d.bench.cluster import worker

    if "run" not in pretraining:  # it failed; the driver knows, and what its cells come to
        return {
            "failure": pretraining.get("failure")
            or {"error": {"type": "WorkerLost", "message": "its pretraining"}}
        }
    return _told(post, lambda: worker.evaluate(order, cell, pretraining["files"]))


def _told(post: Any, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do the work, its progress sent to the driver and signals minded.

    A worker that is told to end by another than the driver ends when its checkpoint is saved, so that Ray does the task
    again elsewhere; Ray itself takes an interrupt for a cancelled task.
    """
    who = f"{socket.gethostname()} {os.getpid()}"
    with sending(lambda message: post.put.remote(who, tuple(message))):
        try:
            with signals.handled(started=True):
                return work()
        except signals.Stopped as stopped:
            if stopped.number == signal.SIGINT:
                raise KeyboardInterrupt from None
            say(
                f"{who} was told to end by {signal.Signals(stopped.number).name}; its task is left to the others."
            )
            os._exit(1)
