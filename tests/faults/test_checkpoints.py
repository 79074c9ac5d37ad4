"""Checkpoints: killed at any operation, damaged in any way, of another run, or used by two: never lost, never mixed."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ssl3d
from faults.damage import EVERY_WAY, FULL, damage, flip
from faults.kills import Counter, kill
from faults.runs import EVERY, STEPS, Nothing, Plain, forked, log_of, run, same_weights, states, weights
from ssl3d.errors import BusyError, CheckpointError, TrainingError
from ssl3d.files import parse_json
from ssl3d.locks import Held
from ssl3d.models.weights.checkpoint import load_backbone, load_method, read_run
from ssl3d.pretrain.run_folder import LOCK, check_folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(out, keep_checkpoints=True)
    return out


def hooked(function: Callable[[], object], hook: Callable[[int], None]) -> Callable[[], object]:
    """Return the function with a hook in its training steps, for a child process."""

    def call() -> object:
        Plain.hook = staticmethod(hook)
        return function()

    return call


def stop_at(step: int) -> Callable[[int], None]:
    def hook(call: int) -> None:
        if call == step:
            kill()

    return hook


def stopped(out: Path) -> None:
    """Leave a run that was killed after its second state; made once, and copied."""
    if _stopped and _stopped[0].is_dir():
        shutil.copytree(_stopped[0], out)
        return
    assert forked(hooked(lambda: run(out, keep_checkpoints=True), stop_at(2 * EVERY + 1))) == -9
    assert states(out) == ["state-00000002.safetensors", "state-00000004.safetensors"]
    kept = Path(tempfile.mkdtemp()) / "run"
    atexit.register(shutil.rmtree, kept.parent, ignore_errors=True)
    shutil.copytree(out, kept)
    _stopped[:] = [kept]


_stopped: list[Path] = []


def ends_as(out: Path, whole: Path) -> None:
    """Whether a run has ended as one that nothing happened to: weights, kept weights, log and provenance."""
    assert same_weights(out, whole)
    for kept in whole.glob("backbone-*.safetensors"):
        assert same_weights(out, whole, kept.name), kept.name
    assert log_of(out) == log_of(whole)
    mine, theirs = read_run(out), read_run(whole)
    for key in ("status", "step", "losses", "identity", "weights_sha256", "code"):
        assert mine[key] == theirs[key], key
    assert not list(out.glob(".*.tmp")) and not (out / LOCK).exists()


def operations(tmp_path: Path) -> int:
    """Return how many operations on the disk a whole run makes."""
    with Counter(tmp_path, 0, kill) as counter:
        run(tmp_path / "counted", keep_checkpoints=True)
    return counter.seen


def killed_at(point: int, folder: Path) -> Path:
    """Return the folder of a run that was killed at its n-th operation on the disk."""
    out = folder / f"killed-{point}"

    def child() -> None:
        with Counter(folder, point, kill):
            run(out, keep_checkpoints=True)

    assert forked(child) == -9, point
    return out


@pytest.mark.timeout(3600 if FULL else 600)
def test_killed_at_any_operation_the_same_command_or_resume_ends_the_same(
    tmp_path: Path, whole: Path, record_property: Callable[[str, object], None]
) -> None:
    count = operations(tmp_path)
    points = range(1, count + 1) if FULL else {3, count // 3, count // 2, count - 4}
    record_property("trials", len(points))
    for point in points:
        out = killed_at(point, tmp_path)
        run(out, resume=bool(states(out)), keep_checkpoints=True)
        ends_as(out, whole)


NEWEST, BEFORE = "state-00000004.safetensors", "state-00000002.safetensors"


def digest_of(text: str) -> Callable[[Path], object]:
    """Write another digest beside the newest state."""
    return lambda out: (out / f"{NEWEST}.sha256").write_text(text)


def from_before(*endings: str) -> Callable[[Path], None]:
    """Give the newest state what belongs to the one before."""

    def replace(out: Path) -> None:
        for ending in endings:
            (out / f"{NEWEST}{ending}").write_bytes((out / f"{BEFORE}{ending}").read_bytes())

    return replace


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(out: Path) -> None:
        (out / name).unlink()
        make(out / name)

    return replace


DAMAGE: dict[str, Callable[[Path], object]] = {
    **{name: lambda out, way=way: damage(out / NEWEST, way) for name, way in EVERY_WAY.items()},  # type: ignore[misc]
    "digest missing": lambda out: (out / f"{NEWEST}.sha256").unlink(), "digest empty": digest_of(""),
    "digest wrong": digest_of(f"{'0' * 64}  {NEWEST}\n"),
    "digest cut": lambda out: damage(out / f"{NEWEST}.sha256", EVERY_WAY["cut at a quarter"]),
    "digest flipped": lambda out: damage(out / f"{NEWEST}.sha256", EVERY_WAY["first byte flipped"]),
    "digest of zeros": lambda out: damage(out / f"{NEWEST}.sha256", EVERY_WAY["all zeroed"]),
    "digest of the one before": from_before(".sha256"), "tensors of the one before": from_before(""),
    "the one before under its name": from_before("", ".sha256"),
    "a folder": replaced(NEWEST, Path.mkdir), "a pipe": replaced(NEWEST, os.mkfifo),
    "digest a folder": replaced(f"{NEWEST}.sha256", Path.mkdir), "digest a pipe": replaced(f"{NEWEST}.sha256", os.mkfifo),
}  # fmt: skip
SOME_DAMAGE = (
    DAMAGE if FULL else ("middle flipped", "tail cut", "digest wrong", "the one before under its name")
)


@pytest.mark.parametrize("name", SOME_DAMAGE)
def test_a_damaged_state_is_named_and_the_run_goes_on_from_the_one_before(
    tmp_path: Path, whole: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    stopped(out)
    DAMAGE[name](out)
    run(out, resume=True, keep_checkpoints=True)
    said = capfd.readouterr().err
    assert f"{out / NEWEST}" in said and f"{NEWEST}.damaged" in said and "begins again" not in said
    assert (out / f"{NEWEST}.damaged").exists()
    ends_as(out, whole)


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 0 * x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * torch.nan


class Explodes(Plain):
    """Is not finite in one place after some steps."""

    what, at = "loss", 1

    def training_step(self, views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        losses = super().training_step(views)
        if self.training:
            self.count = getattr(self, "count", 0) + 1
            if self.count == self.at and self.what == "loss":
                losses["mse"] = losses["mse"] * torch.nan
            if self.count == self.at and self.what == "gradient":
                losses["mse"] = losses["mse"] + _NanGradient.apply(self.head.weight.sum())
        return losses

    def on_step_end(self, progress: ssl3d.Progress) -> None:
        weights = {"head": self.head.bias, "backbone": next(self.backbone.parameters())}.get(self.what)
        if progress.step == self.at and weights is not None:
            with torch.no_grad():
                weights.fill_(torch.inf)

    def pretext_score(self, views: dict[str, torch.Tensor]) -> float:
        wrong = self.what == "score" and getattr(self, "count", 0) >= self.at
        return torch.nan if wrong else super().pretext_score(views)

    def monitor(self, probe: torch.Tensor, rng: ssl3d.BatchRng) -> dict[str, float]:
        return {
            "extra": torch.nan if self.what == "monitor" and getattr(self, "count", 0) >= self.at else 1.0
        }


@pytest.mark.parametrize("what", ["loss", "gradient", "head", "backbone", "score"])
def test_what_is_not_finite_is_named_and_never_kept(
    tmp_path: Path, what: str, record_property: Callable[[str, object], None]
) -> None:
    steps = range(1, STEPS + 1) if FULL else (3, STEPS)
    record_property("trials", len(steps))
    for step in steps:
        out = tmp_path / str(step)
        cls = type("Explodes", (Explodes,), {"what": what, "at": step, "__module__": __name__})
        with pytest.raises(TrainingError, match="plain: .*(nan|inf|not finite)"):
            run(out, cls)
        assert all(tensor.isfinite().all() for name in states(out) for tensor in weights(out, name).values())
        assert not (out / "backbone.safetensors").exists() and read_run(out)["status"] == "running"


def test_a_measure_that_is_not_finite_stops_nothing_and_is_told_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cls = type("Explodes", (Explodes,), {"what": "monitor", "at": 2, "__module__": __name__})
    run(tmp_path / "run", cls)
    assert capfd.readouterr().err.count("extra = nan at step 3") == 1
    lines = [parse_json(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["extra"] for line in lines if "extra" in line] == [None, None]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_without_any_whole_state_the_run_begins_again_and_says_so(
    tmp_path: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    stopped(out)
    for path in out.glob("state-*.safetensors"):
        damage(path, flip)
    run(out, resume=True, keep_checkpoints=True)
    assert "keeps no state that is whole: the run begins again at step 0" in capfd.readouterr().err
    ends_as(out, whole)


def test_a_state_that_cannot_be_read_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    stopped(out)
    before, real = states(out), os.open

    def refused(path: object, *args: object, **kwargs: object) -> int:
        if str(path).endswith("4.safetensors"):
            raise OSError(5, "Input/output error")
        return real(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(
        CheckpointError, match="state-00000004.safetensors cannot be read.*Input/output error"
    ):
        run(out, resume=True, keep_checkpoints=True)
    assert states(out) == before


def test_a_damaged_backbone_is_refused_and_restored_by_resume(
    tmp_path: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(out, keep_checkpoints=True)
    damage(out / "backbone.safetensors", flip)
    with pytest.raises(CheckpointError, match="backbone.safetensors is damaged"):
        load_backbone(out)
    run(out, resume=True, keep_checkpoints=True)
    assert "is not what the run ended with; it is written again" in capfd.readouterr().err
    ends_as(out, whole)
    # Of another run, with a digest that fits it.
    run(tmp_path / "other", seed=1)
    for name in ("backbone.safetensors", "backbone.safetensors.sha256"):
        (out / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(CheckpointError, match="the weights are not those that its run.json describes"):
        load_backbone(out)
    damage(out / "backbone-00000002.safetensors", flip)
    with pytest.raises(CheckpointError, match="backbone-00000002.safetensors is damaged"):
        load_backbone(out, step=2)
    damage(out / "state-00000006.safetensors", flip)
    with pytest.raises(CheckpointError, match="state-00000006.safetensors is damaged"):
        load_method(out, Plain(load_backbone(whole), Plain.Config()))


def test_a_state_is_of_one_run(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        stop = hooked(lambda seed=seed, name=name: run(tmp_path / name, seed=seed), stop_at(5))  # type: ignore[misc]
        assert forked(stop) == -9
    a, b = tmp_path / "a", tmp_path / "b"
    for path in b.glob("state-00000004*"):
        (a / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="state-00000004.safetensors is of another run"):
        run(a, resume=True)
    (b / "run.json").unlink()
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=r"holds state-\*.safetensors without the run.json"):
            run(b, resume=resume)


@pytest.mark.parametrize(
    "content",
    ["", "[", "[" * 100_000, "3", "{}", '{"step": NaN}', '{"status": "running"}', "\xff"],
    ids=range(8),
)
def test_a_damaged_run_json_is_named(tmp_path: Path, content: str) -> None:
    out = tmp_path / "run"
    stopped(out)
    (out / "run.json").write_text(content, encoding="latin-1")
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=r"run.json is damaged.*Restore it"):
            run(out, resume=resume)


@pytest.mark.parametrize("cls", [Plain, Nothing], ids=lambda cls: cls.name)
def test_what_fails_before_the_first_state_is_begun_again_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cls: type[Plain]
) -> None:
    """A crash at the first line of the log, or anywhere in a method that trains nothing."""
    from ssl3d.pretrain import loop, run_folder

    out = tmp_path / "run"

    def crash(*_: object, **__: object) -> None:
        raise RuntimeError("crash")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="crash"):
        patch.setattr(loop.Log, "write", crash)
        patch.setattr(run_folder, "save_tensors", crash)
        run(out, cls)
    assert (
        run(out, cls, lr=2e-3)["status"] == "finished"
    )  # nothing is lost if the failure led to other settings


def test_two_on_one_folder(tmp_path: Path, whole: Path) -> None:
    """While one process is at work, another is refused by name; the first ends as if alone."""
    out = tmp_path / "run"
    read, write = os.pipe()

    def hook(call: int) -> None:
        if call == 3:
            os.read(read, 1)  # until the other one was refused

    import threading

    first = threading.Thread(
        target=lambda: done.append(forked(hooked(lambda: run(out, keep_checkpoints=True), hook)))
    )
    done: list[int] = []
    first.start()
    while not states(out):
        assert first.is_alive()
        os.sched_yield()
    for resume in (False, True):
        with pytest.raises((BusyError, CheckpointError), match="is at work on|already holds a run"):
            run(out, resume=resume, keep_checkpoints=True)
    with pytest.raises(BusyError, match=r"process \d+ on .* is at work on the run in"):
        run(out, resume=True, keep_checkpoints=True)
    os.write(write, b"1")
    first.join()
    assert done == [0]
    ends_as(out, whole)


def test_a_lock_is_no_link_and_no_pipe(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "link.lock").symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / "pipe.lock")
    for name in ("link.lock", "pipe.lock"):
        with pytest.raises(Exception, match=f"{name}.*Fix: "), Held(tmp_path / name, wait=False):
            pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_what_is_known_before_the_data_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    check_folder(out, resume=True)
    assert f"{out} holds no run yet: --resume has nothing to go on with" in capfd.readouterr().err
    stopped(out)
    with pytest.raises(CheckpointError, match="already holds a run at step 4: add --resume"):
        check_folder(out, resume=False)
    check_folder(out, resume=True)
    assert not capfd.readouterr().err
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "backbone.safetensors").write_text("of somebody else")
    with pytest.raises(CheckpointError, match="not empty and holds no run"):
        check_folder(tmp_path / "thesis", resume=False)


def test_a_log_of_junk_costs_no_run(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    stopped(out)
    lines = (out / "log.jsonl").read_text().splitlines()
    (out / "log.jsonl").write_bytes("\n".join([*lines[:3], '["step"]', "[" * 100_000]).encode() + b"\xff\n")
    run(out, resume=True, keep_checkpoints=True)
    assert same_weights(out, whole)
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] == STEPS


def test_the_digest_is_what_sha256sum_checks(whole: Path) -> None:
    import subprocess

    for digest in sorted(whole.glob("*.sha256")):
        subprocess.run(
            ["sha256sum", "--check", "--strict", digest.name], cwd=whole, check=True, capture_output=True
        )
    assert len(list(whole.glob("*.sha256"))) == len(list(whole.glob("*.safetensors"))) == 6
