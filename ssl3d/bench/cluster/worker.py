"""What a process of a cluster does for a bench: it checks that its code is the same, builds the bench, and does what it is
told, by the functions that every other bench calls.

Its records go to the driver as bytes. Where it sees the driver's store, the runs in there are its own; where it does not,
they lie in its cache, and finished ones are copied there once a node.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ssl3d.bench.cluster.work import (
    FOLDER,
    Order,
    cell_name,
    code_hash,
    options_of,
    release,
    run_name,
)
from ssl3d.errors import ConfigError, PluginError, SSL3DError

if TYPE_CHECKING:
    from ssl3d.bench.cell import Cell
    from ssl3d.bench.run import Bench

Files = Mapping[str, bytes]
"""Of a folder, by name."""

T = TypeVar("T")
_POLL_S = 0.5


@dataclass(frozen=True)
class Built:
    """A bench as this process has it.

    Attributes:
        mark: of the order that it was built from.
        job: the bench, in a store of this process's own.
        base: folder of the runs: the driver's store, or one in the cache.
        shared: whether that is the driver's store.
        cells: by name.
    """

    mark: str
    job: Bench
    base: Path
    shared: bool
    cells: dict[str, Cell]


_built: Built | None = None


# --- What a process is, and whether it fits -----------------------------------------------------------


def here() -> str:
    """Return the name of this machine, for messages."""
    return f"node {socket.gethostname()}"


def check(order: Order) -> None:
    """Refuse an order of another release or code of ssl3d; looks at nothing else, and imports nothing heavy.

    Raises:
        ConfigError: the code here is another one; names the node and what differs.
    """
    fix = "Install what the driver has on every node, and start the bench again."
    if (own := release()) != order["release"]:
        raise ConfigError(f"{here()} has ssl3d {own}, the driver {order['release']}. {fix}")
    for stage, name, backbone, code in order["code"]:
        try:
            own = code_hash(stage, name, backbone)
        except PluginError as error:
            raise ConfigError(f"{here()} cannot compute the {stage} of {name}: {error} {fix}") from None
        if own != code:
            raise ConfigError(
                f"{here()} has other code for the {stage} of {name} (hash {own}) than the driver ({code}). {fix}"
            )


def sees_store(order: Order) -> bool:
    """Return whether this node sees the driver's store, on a file system that both share."""
    return Path(order["store"], order["mark"]).is_file()


def build(order: Order) -> Built:
    """Return the bench of an order, built once a process: data prepared or found, everything checked.

    Raises:
        SSL3DError: the code is another one, or the data are not there, or differ.
    """
    global _built
    if _built is not None and _built.mark == order["mark"]:
        return _built
    check(order)
    from ssl3d.bench.plan import bench_of
    from ssl3d.process import keep_freed_memory, quiet_libraries, set_threads
    from ssl3d.progress import quiet
    from ssl3d.results.store.store import ResultStore

    quiet_libraries()
    keep_freed_memory()
    set_threads(order["threads"])
    shared = sees_store(order)
    options = options_of({**order["options"], "device": order["device"]})
    base = Path(order["store"]) if shared else _place_in_cache(options.cache, order)
    own = _own_store(base, order["kept"])
    try:
        with quiet():  # what there is to say of the data has been said
            job = bench_of(replace(options, store=own))
    except SSL3DError as error:
        raise type(error)(f"{here()}: {error}") from error
    job = replace(job, store=ResultStore(own))
    cells = {cell_name(job, cell): cell for cell in job.cells()}
    _built = Built(order["mark"], job, base, shared, cells)
    return _built


def _place_in_cache(cache: Path | None, order: Order) -> Path:
    """Return where the runs of a store lie on a node that does not see it; the same for every bench in that store."""
    from ssl3d.bench.sources import cache_folder

    name = hashlib.sha256(order["store"].encode()).hexdigest()[:12]
    return cache_folder(cache).absolute() / FOLDER / name


def _own_store(base: Path, kept: Mapping[str, str]) -> Path:
    """Make a store for this process alone, whose runs and locks are those of ``base``."""
    from ssl3d.files import write_bytes

    root = base / FOLDER / f"{socket.gethostname()}-{os.getpid()}"
    shutil.rmtree(root, ignore_errors=True)  # of a process of the same number that was killed
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    root.mkdir(parents=True)
    for name in ("runs", "locks"):
        (base / name).mkdir(exist_ok=True)
        (root / name).symlink_to(base / name)
    for name, text in kept.items():
        write_bytes(root / name, text.encode())
    return root


def greet(order: Order) -> dict[str, Any]:
    """Check the code and say whether this node sees the driver's store; the first thing that is asked of a node."""
    try:
        check(order)
    except SSL3DError as error:
        return {"refused": str(error)}
    return {"shared": sees_store(order)}


def prepare(order: Order) -> dict[str, Any]:
    """Prepare the data of the bench on this node, where they are not, and build the bench."""
    try:
        build(order)
    except SSL3DError as error:
        return {"refused": str(error)}
    return {}


# --- What it does -------------------------------------------------------------------------------------


def pretrain(order: Order, run: str, finished: Files | None = None) -> dict[str, Any]:
    """Do a pretraining, or go on with it, or find that it is finished.

    Args:
        order: see :func:`ssl3d.bench.cluster.work.order_of`.
        run: its name.
        finished: its files, where it is finished and this node may not have it.

    Returns:
        ``{"run": name, "files": its files, where others may not have it}``, ``{"failure": what is written down}`` or
        ``{"refused": why}``.

    Raises:
        Stopped: this process was asked to stop; a checkpoint is saved.
    """

    def work(built: Built) -> dict[str, Any]:
        cell = next((cell for cell in built.cells.values() if run_name(built.job, cell) == run), None)
        if cell is None:
            raise _unknown(run)

        def trained() -> dict[str, Any]:
            folder = _waited(lambda: built.job.pretrained(cell))
            carried = order.get("carry") and cell.weights.folder is None
            return {"run": run, "files": run_files(folder) if carried else None}

        return _answer(built, cell, finished, trained)

    return _done(order, work)


def evaluate(order: Order, name: str, finished: Files | None = None) -> dict[str, Any]:
    """Compute a cell, whose pretraining is finished.

    Args:
        order: see :func:`ssl3d.bench.cluster.work.order_of`.
        name: of the cell.
        finished: files of its pretraining, where this node may not have it.

    Returns:
        ``{"record": bytes of its file, "files": what it names, by place in a store}``, ``{"there": True}`` where another
        bench has computed it meanwhile, ``{"failure": what is written down}`` or ``{"refused": why}``.

    Raises:
        Stopped: this process was asked to stop.
    """

    def work(built: Built) -> dict[str, Any]:
        cell = built.cells.get(name)
        if cell is None:
            raise _unknown(name)
        return _answer(built, cell, finished, lambda: _record(built, cell))

    return _done(order, work)


def _done(order: Order, work: Callable[[Built], dict[str, Any]]) -> dict[str, Any]:
    try:
        built = build(order)
    except SSL3DError as error:
        return {"refused": str(error)}
    try:
        return work(built)
    except ConfigError as error:
        return {"refused": str(error)}


def _unknown(name: str) -> ConfigError:
    return ConfigError(
        f"{here()} has no {name} in this bench: its data, splits or settings are not the driver's. Remove its copy of the "
        "data and of the cache, or share these with the driver."
    )


def _answer(
    built: Built, cell: Cell, finished: Files | None, what: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return what ``what`` answers; of anything that fails, the failure."""
    from ssl3d.bench.run import Failed
    from ssl3d.results.store.store import failure_of

    try:
        if finished is not None:
            put_run(built.job.run_folder(cell.weights), finished)
        return what()
    except Failed as failed:
        return {"failure": failed.failure}
    except ConfigError:
        raise
    except Exception as error:  # the rest of the bench goes on
        at = traceback.extract_tb(error.__traceback__)[-1]
        text = (
            str(error) if isinstance(error, SSL3DError) else f"{error} ({Path(at.filename).name}:{at.lineno})"
        )
        known = {"type": type(error).__name__, "message": f"on {here()}: {text}"}
        return {"failure": failure_of(cell.head, known, built.job.conduct.session, None)}


def _record(built: Built, cell: Cell) -> dict[str, Any]:
    from ssl3d.results.store.store import ResultStore

    job = built.job
    if built.shared and not job.conduct.recompute and ResultStore(built.base).has(cell.identity):
        return {"there": True}
    record, _ = _waited(lambda: job.outcome(cell))
    path = job.store.path_for(cell.identity)
    names = [
        kept[kind] for kept in record.get("predictions", ()) for kind in ("prediction", "image", "truth")
    ]
    answer = {"record": path.read_bytes(), "files": {n: (job.store.root / n).read_bytes() for n in names}}
    path.unlink()  # it is the driver's now
    return answer


def _waited(work: Callable[[], T | None]) -> T:
    """Return what ``work`` returns, as soon as no other process is at work on it."""
    from ssl3d import signals

    while (found := work()) is None:
        signals.check()
        time.sleep(_POLL_S)
    return found


# --- Runs of nodes that do not see the driver's store -------------------------------------------------


def run_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a finished run that an evaluation needs, and its log; no states to go on from."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(("state-", ".")) and path.suffix != ".lock"
    }


def finished_files(order: Order, run: str) -> dict[str, bytes] | None:
    """Return the files of a run that is finished in the driver's store; None where it is not."""
    from ssl3d.bench.whole import run_facts

    folder = Path(order["store"]) / "runs" / run
    return run_files(folder) if run_facts(folder).get("status") == "finished" else None


def put_run(folder: Path, files: Files) -> None:
    """Write a finished run into ``folder`` unless it is there; its provenance last, which makes it whole."""
    from ssl3d.bench.whole import run_facts
    from ssl3d.files import write_bytes
    from ssl3d.locks import Held
    from ssl3d.models.weights.checkpoint import RUN

    weights = json.loads(files[RUN])["weights_sha256"]
    folder.mkdir(parents=True, exist_ok=True)
    with Held(folder / "copy.lock", wait=True, what=f"the copy of {folder.name}"):
        there = run_facts(folder)
        if there.get("status") == "finished" and there.get("weights_sha256") == weights:
            return
        for name in sorted(files, key=lambda name: name == RUN):
            write_bytes(folder / name, files[name])
