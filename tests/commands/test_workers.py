"""Who is waited for in vain: named, and ended after a stated time."""

from __future__ import annotations

import os
import signal
import time
from ctypes import c_ulong
from threading import Event, Thread

import pytest

from ssl3d import signals
from ssl3d.commands import workers
from ssl3d.locks import this_process


class Process:
    """What :class:`ssl3d.commands.workers.Silence` needs of a process."""

    def __init__(self, pid: int) -> None:
        self.pid, self.running = pid, True

    def is_alive(self) -> bool:
        return self.running

    def kill(self) -> None:
        self.running = False


class Scene:
    """Two processes, of which the first beats as it is told and the second always, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.said = 0.0, []
        monkeypatch.setattr("ssl3d.commands.workers.time.monotonic", lambda: self.now)
        monkeypatch.setattr("ssl3d.progress.say", self.said.append)
        self.first, self.second = Process(11), Process(12)
        self.beats = [c_ulong(1), c_ulong(1)]
        self.silence = workers.Silence([self.first, self.second], self.beats)  # type: ignore[list-item]

    def wait(self, seconds: float, held: dict[str, str], beating: bool = False, every: float = 0.5) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += every
            self.beats[1].value += 1
            self.beats[0].value += beating
            self.silence.look(held)


HELD = {this_process(11): "gvsl, shc linear, seed 0, test", this_process(12): "another"}


def test_one_that_is_silent_and_waited_for_is_named_and_then_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.wait(300, HELD, beating=True)
    assert not scene.said
    scene.wait(59, HELD)
    assert scene.first.running and scene.said == [
        "Process 11, which holds gvsl, shc linear, seed 0, test, has shown no sign of life for 10 s. Where it is suspended, "
        "kill -CONT 11 lets it go on; after 60 s it is killed, and what it holds is done here."
    ]
    scene.wait(3, HELD)
    assert not scene.first.running and scene.second.running
    assert len(scene.said) == 2 and scene.said[1].endswith(
        "for 60 s. It is killed, and what it holds is done here."
    )


def test_one_that_goes_on_again_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    for _ in range(3):
        scene.wait(50, HELD)
        scene.wait(1, HELD, beating=True)
    assert scene.first.running and len(scene.said) == 3


def test_one_that_holds_nothing_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.wait(300, {this_process(12): "another"})
    assert scene.first.running and not scene.said


def test_time_in_which_this_process_was_suspended_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.wait(5, HELD)
    scene.wait(3600, HELD, every=3600)
    assert scene.first.running and not scene.said


@pytest.mark.parametrize("started, second, stopped", [
    (True, signals.PASSED_ON, False), (True, signal.SIGINT, True), (False, signal.SIGTERM, True),
])  # fmt: skip
def test_a_signal_that_comes_by_two_ways_is_one_request(started: bool, second: int, stopped: bool) -> None:
    with signals.handled(started), signals.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked()
        if stopped:
            with pytest.raises(signals.Stopped):
                os.kill(os.getpid(), second)
        else:
            os.kill(os.getpid(), second)


@pytest.mark.parametrize("threads", [0, 1])
def test_a_signal_that_is_put_off_comes_later(threads: int) -> None:
    """Also where another thread, which blocks nothing, is the one that the system gives it to."""
    done = Event()
    others = [Thread(target=done.wait) for _ in range(threads)]
    for other in others:
        other.start()
    try:
        with signals.handled(), signals.listening():
            with signals.put_off():
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.2)  # the other thread has to wake up for it
                assert not signals.asked()
            assert signals.asked()
    finally:
        done.set()
        for other in others:
            other.join()
