"""The other processes of ``ssl3d bench --jobs``: started, watched while they work, told to stop, and never left behind."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from ssl3d.commands.common import keep_freed_memory, quiet_libraries, set_threads
from ssl3d.commands.failures import SOFTWARE, USER, report
from ssl3d.errors import SSL3DError
from ssl3d.locks import this_process

if TYPE_CHECKING:
    from ctypes import c_ulong

    from ssl3d.bench.plan import BenchOptions

Look = Callable[[Mapping[str, str]], None]
"""Called with what each process holds, by its name, whenever there is nothing to do but to wait for these."""

_END_S, _WATCH_S = 5.0, 0.5
_FAULTS = (1, USER, SOFTWARE)
_BEAT_S, _LONGEST_LOOK_S = 1.0, 5.0
_SAY_SILENT_S, _KILL_SILENT_S = 10.0, 60.0


@contextmanager
def others(devices: Sequence[str], threads: int, options: BenchOptions) -> Iterator[Look | None]:
    """Run one more process of this bench for each of ``devices`` while the block runs, and show the progress of all in one
    place.

    One that dies leaves its cell to the others, which is said. When this process is asked to stop, so are they. None is
    left when the block ends: they have the grace of :mod:`ssl3d.signals` to save what they have, and are killed then.

    Yields:
        What :meth:`ssl3d.bench.run.Bench.run` calls while it waits: see :class:`Silence`. None without other processes.
    """
    if not devices:
        yield None
        return
    from ssl3d import signals
    from ssl3d.progress import Board, sending

    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    pipes = [context.Pipe(duplex=False) for _ in devices]
    beats = [context.Value("L", 0, lock=False) for _ in devices]
    processes = [
        context.Process(
            target=_work, args=(replace(options, device=device), threads, sender, beat), daemon=True
        )
        for device, (_, sender), beat in zip(devices, pipes, beats, strict=True)
    ]
    resource_tracker.ensure_running()  # else with the first of them, and then it takes the signals that are put off
    ending, started, watched = threading.Event(), [], False
    try:
        with signals.put_off():
            for process, (_, sender) in zip(processes, pipes, strict=True):
                process.start()
                started.append(process)
                sender.close()  # here; so that the other end tells when the process has ended
        pids = [process.pid for process in processes if process.pid is not None]
        with (
            Board([receiver for receiver, _ in pipes]) as board,
            sending(board.mine),
            signals.passed_on(pids),
        ):
            threading.Thread(target=_say_who_died, args=(processes, ending), daemon=True).start()
            watched = True
            yield Silence(processes, beats).look
    finally:  # daemons would go with this process only, which in a test lives on
        ending.set()
        # A second signal would end them at once, before they have saved what they have.
        told = watched and signals.asked()
        _end(started, signals.GRACE_S if told else _END_S, told)


class Silence:
    """Which processes show no sign of life while this one waits for what they hold, such as one that is suspended.

    It is said after ten seconds of waiting. After a minute such a process is killed, which frees its cell: this process
    goes on with it. Time in which this process was suspended itself does not count, nor any in which it had work to do.

    Args:
        processes: the others.
        beats: numbers that they change every second.
    """

    def __init__(self, processes: Sequence[BaseProcess], beats: Sequence[c_ulong]) -> None:
        self._processes, self._beats = processes, beats
        self._heard = [0] * len(processes)
        self._silent = [0.0] * len(processes)
        self._said = [False] * len(processes)
        self._looked = time.monotonic()

    def look(self, held: Mapping[str, str]) -> None:
        """Look after the others, once; ``held`` says what each holds, by its name (:func:`ssl3d.locks.this_process`)."""
        from ssl3d.progress import say

        now = time.monotonic()
        passed, self._looked = min(now - self._looked, _LONGEST_LOOK_S), now
        for place, process in enumerate(self._processes):
            if self._heard[place] != (beat := self._beats[place].value):
                self._heard[place], self._silent[place], self._said[place] = beat, 0.0, False
                continue
            self._silent[place] += passed
            cell = held.get(this_process(process.pid))
            if cell is None or not process.is_alive():
                continue
            silent = f"Process {process.pid}, which holds {cell}, has shown no sign of life for"
            if self._silent[place] > _KILL_SILENT_S:
                say(f"{silent} {_KILL_SILENT_S:.0f} s. It is killed, and what it holds is done here.")
                process.kill()
            elif self._silent[place] > _SAY_SILENT_S and not self._said[place]:
                self._said[place] = True
                say(
                    f"{silent} {_SAY_SILENT_S:.0f} s. Where it is suspended, kill -CONT {process.pid} lets it go on; after "
                    f"{_KILL_SILENT_S:.0f} s it is killed, and what it holds is done here."
                )


def _end(processes: Sequence[BaseProcess], grace: float, told: bool) -> None:
    """End processes: ask them to, unless they are ``told`` already, and kill those that are there after the grace.

    One that is suspended goes on, to end.
    """
    for process in processes:
        if not told:
            process.terminate()
        if hasattr(signal, "SIGCONT") and process.is_alive() and process.pid is not None:
            with suppress(OSError):  # it has ended
                os.kill(process.pid, signal.SIGCONT)
    last = time.monotonic() + grace
    for process in processes:
        process.join(max(0.0, last - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _say_who_died(processes: Sequence[BaseProcess], ending: threading.Event) -> None:
    """Say of each process that ends by a signal or a fault, before it is told to, that others take over."""
    from ssl3d.progress import say

    left = {process.sentinel: process for process in processes}
    while left and not ending.is_set():
        for sentinel in wait(list(left), timeout=_WATCH_S):
            process = left.pop(sentinel)  # type: ignore[call-overload, arg-type]
            process.join()  # it has closed its files, and is about to end
            code = process.exitcode or 0
            if code < 0 and not ending.is_set():
                name = signal.Signals(-code).name
                say(
                    f"Process {process.pid} was killed by {name}; the cell that it was at work on is left to the others."
                )
            elif code in _FAULTS and not ending.is_set():
                say(
                    f"Process {process.pid} ended by a fault (status {code}); its cell is left to the others."
                )


def _work(options: BenchOptions, threads: int, sender: Connection, beat: c_ulong) -> None:
    """Compute cells of the bench with ``options`` until there are none left, or the process that started this one is."""
    threading.Thread(target=_live_with_parent, args=(beat,), daemon=True).start()
    quiet_libraries()
    keep_freed_memory()
    set_threads(threads)
    from ssl3d import signals
    from ssl3d.bench.plan import bench_of
    from ssl3d.bench.whole import Whole, line
    from ssl3d.errors import CellsFailed
    from ssl3d.progress import quiet, say, sending

    with sending(sender.send), signals.handled(started=True):
        try:
            signals.receive()
            with quiet(), redirect_stderr(io.StringIO()):  # what there is to say of the data has been said
                job = bench_of(options)
            whole = Whole(job)
            for record, computed in job.run():
                if computed:
                    say(line(record, whole.said()))
        except CellsFailed:
            pass  # written down; the process that prints the table says so
        except SSL3DError as error:
            say(f"Process {os.getpid()} stopped: {error}")
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(signals.RESUMABLE)
        except Exception as error:
            status = report(error, ("bench",), debug=bool(os.environ.get("SSL3D_DEBUG")))
            say(f"Process {os.getpid()} stopped by an error: {type(error).__name__}")
            sys.exit(status)


def _live_with_parent(beat: c_ulong) -> None:
    """Show signs of life, and end this process when its parent has ended, however that did: a killed one tells nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while parent.is_alive():
        beat.value += 1
        parent.join(_BEAT_S)
    os._exit(1)  # at once: cells, checkpoints and locks are made for that
