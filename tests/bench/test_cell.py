"""A score is what its record says: given weights, code that changed, cells that fail, processes that share them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from ssl3d.cli import main
from ssl3d.errors import CheckpointError, TrainingError
from ssl3d.models.weights.checkpoint import weights_fingerprint
from ssl3d.pretrain.watch import Watch
from ssl3d.progress import Board, Message
from ssl3d.results.formats.format import BUILTIN_FORMATS
from ssl3d.results.store.store import ResultStore
from ssl3d.results.table.build import build_table

SMALL = (
    "--preset", "smoke", "--set", "phantoms.asoca=3", "--set", "phantoms.candi=3", "--set", "phantoms.stoic=6",
    "--set", "pretrain.steps=2",
)  # fmt: skip


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), env={"COLUMNS": "160"})


def bench(folder: Path, store: Path, *more: str | Path) -> Result:
    return run(
        "bench",
        *SMALL,
        "--tasks",
        "shc",
        "--modes",
        "linear",
        "--cache",
        folder / "cache",
        "--store",
        store,
        *more,
    )


def records(store: Path) -> dict[str, dict[str, Any]]:
    """By the sigma of denoising, or the method's name."""
    found, problems = ResultStore(store).records()
    assert not problems
    names = [str(r["identity"]["method_config"].get("sigma", r["identity"]["method"])) for r in found]
    assert len(set(names)) == len(names)
    return dict(zip(names, found, strict=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of denoising with two configurations, and one of byol."""
    folder = tmp_path_factory.mktemp("runs")
    for name, method, more in (
        ("plain", "denoising", ()),
        ("strong", "denoising", ("--set", "denoising.sigma=0.9")),
        ("byol", "byol", ()),
    ):
        result = run(
            "pretrain", "--method", method, *SMALL, *more, "--cache", folder / "cache", "--out", folder / name
        )
        assert result.exit_code == 0, result.output
    return folder


# --- Given weights --------------------------------------------------------------------------------


def test_each_run_that_is_given_has_its_own_cell_and_says_what_it_is(runs: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    rows = ("--methods", "scratch,denoising", "--checkpoint")
    for name in ("plain", "strong"):
        result = bench(runs, store, *rows, f"denoising={runs / name}")
        assert result.exit_code == 0, result.output
        assert result.output.count("already in the store") == (name == "strong"), "scratch alone is known"
    by_sigma = records(store)
    assert set(by_sigma) == {"0.1", "0.9", "scratch"}
    for sigma, name in (("0.1", "plain"), ("0.9", "strong")):
        record, made = by_sigma[sigma], json.loads((runs / name / "run.json").read_text())
        assert record["identity"]["weights"] == record["fingerprint_of_weights"] == made["weights_sha256"]
        assert record["identity"]["method_config"] == made["identity"]["method"]["config"]
        assert record["identity"]["pretrain"] == made["identity"]["pretrain"]
        assert record["code"]["pretrain"] == made["code"] and record["checkpoint"] == str(runs / name)
    assert by_sigma["0.9"]["method"]["notes"] == [
        "weights of a run with sigma = 0.9",
        *by_sigma["0.1"]["method"]["notes"],
    ]
    shown = run("table", "--store", store, "--format", "markdown").output
    assert "sigma=0.1" in shown and "sigma=0.9" in shown and "weights of a run with sigma = 0.9" in shown
    # What is given is not what the bench makes: a plain bench computes its own cell.
    plain = bench(runs, store, "--methods", "denoising")
    assert plain.exit_code == 0 and "already in the store" not in plain.output, plain.output
    made = [r for r in ResultStore(store).records()[0] if "weights" not in r["identity"]]
    assert {r["identity"]["method"] for r in made} == {"scratch", "denoising"}
    # The same weights, from the same seeds: the same number on one machine.
    (own,) = (r for r in made if r["identity"]["method"] == "denoising")
    assert own["score"] == by_sigma["0.1"]["score"]
    again = run(
        "reproduce", ResultStore(store).path_for(by_sigma["0.9"]["identity"]), "--cache", runs / "cache"
    )
    assert again.exit_code == 0 and "bit for bit" in again.output, again.output


def test_a_run_of_another_method_is_refused_with_its_own_row_as_the_remedy(
    runs: Path, tmp_path: Path
) -> None:
    result = bench(
        runs, tmp_path / "s", "--methods", "denoising", "--checkpoint", f"denoising={runs / 'byol'}"
    )
    assert result.exit_code == 2 and not (tmp_path / "s" / "records").exists()
    remedy = f"--methods byol --checkpoint byol={runs / 'byol'}"
    assert "of the method byol, not denoising" in result.output and remedy in result.output
    mended = bench(runs, tmp_path / "s", *remedy.split())
    assert mended.exit_code == 0 and set(records(tmp_path / "s")) == {"byol"}, mended.output


def test_two_runs_of_one_configuration_are_two_rows(runs: Path, tmp_path: Path) -> None:
    import shutil

    other = shutil.copytree(runs / "plain", tmp_path / "other")
    made = json.loads((other / "run.json").read_text())
    from ssl3d.models.weights.checkpoint import load_backbone, save_tensors

    backbone = load_backbone(other)
    with torch.no_grad():
        next(backbone.parameters()).mul_(3)
    save_tensors(other / "backbone.safetensors", backbone.state_dict())
    command = ("--methods", "denoising", "--checkpoint", f"denoising={other}")
    replaced = bench(runs, tmp_path / "s", *command)
    assert replaced.exit_code == 2 and "not those that its run.json describes" in replaced.output
    made["weights_sha256"] = weights_fingerprint(backbone)  # as of a run on another machine
    (other / "run.json").write_text(json.dumps(made))
    for name in (other, runs / "plain"):
        assert bench(runs, tmp_path / "s", *command[:3], f"denoising={name}").exit_code == 0
    (table,) = build_table(ResultStore(tmp_path / "s").records()[0]).tables
    assert len(table.rows) == 2
    assert all("(weights " in row.title for row in table.rows)


# --- Code -----------------------------------------------------------------------------------------


def test_a_run_is_not_resumed_under_other_code_unless_both_are_recorded(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["pretrain", "--method", "denoising", *SMALL, "--set", "pretrain.checkpoint_every=1",
               "--cache", runs / "cache", "--out", tmp_path / "run"]  # fmt: skip
    assert run(*command).exit_code == 0
    path = tmp_path / "run" / "run.json"
    made = json.loads(path.read_text())
    # As it was after its first step, with the code of that time.
    path.write_text(json.dumps({**made, "status": "running", "step": 1, "code": "older"}))
    for state in sorted((tmp_path / "run").glob("state-*.safetensors*"))[2:]:
        state.unlink()
    assert [state.name for state in (tmp_path / "run").glob("state-*.safetensors")] == [
        "state-00000001.safetensors"
    ]
    refused = run(*command, "--resume")
    assert (
        refused.exit_code == 2 and "hash older" in refused.output and "--allow-code-change" in refused.output
    )
    assert json.loads(path.read_text())["code"] == "older", "nothing was overwritten"
    allowed = run(*command, "--resume", "--allow-code-change")
    assert allowed.exit_code == 0, allowed.output
    both = json.loads(path.read_text())
    assert both["code"] == f"older+{made['code']}"
    assert both["code_by_step"] == {"0": "older", "1": made["code"]}
    scored = bench(
        runs, tmp_path / "s", "--methods", "denoising", "--checkpoint", f"denoising={tmp_path / 'run'}"
    )
    assert scored.exit_code == 0, scored.output
    (record,) = records(tmp_path / "s").values()
    assert (
        record["code"]["pretrain"] == both["code"]
        and record["code"]["pretrain_by_step"] == both["code_by_step"]
    )


def test_a_record_has_the_code_of_the_run_that_it_scores(runs: Path, tmp_path: Path) -> None:
    assert bench(runs, tmp_path / "s", "--methods", "denoising").exit_code == 0
    (path,) = (tmp_path / "s" / "runs").glob("*/run.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "code": "older"}))
    (record,) = records(tmp_path / "s").values()
    ResultStore(tmp_path / "s").path_for(record["identity"]).unlink()
    assert bench(runs, tmp_path / "s", "--methods", "denoising").exit_code == 0
    (again,) = records(tmp_path / "s").values()
    assert again["code"] == {**record["code"], "pretrain": "older"}
    listed = run("store", "ls", "--store", tmp_path / "s", "--stale").output
    assert "1 of 1 record; 1 stale" in listed and "code of pretraining" in " ".join(listed.split())
    changed = {**json.loads(path.read_text())}
    changed["identity"]["seed"] = 5
    path.write_text(json.dumps(changed))
    ResultStore(tmp_path / "s").path_for(record["identity"]).unlink()
    result = bench(runs, tmp_path / "s", "--methods", "denoising")
    assert result.exit_code == 1 and "CheckpointError" in result.output, (
        "a run that says something else of itself"
    )


# --- Failures -------------------------------------------------------------------------------------


def test_a_failing_pretraining_fails_its_cells_once_and_no_others(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, note = [], Watch.note

    def diverging(self: Watch, losses: dict[str, torch.Tensor], norm: torch.Tensor, step: int) -> None:
        if self.method == "byol":
            tried.append(step)
            raise TrainingError("byol: loss = nan at step 0.")
        note(self, losses, norm, step)

    store = tmp_path / "s"
    arguments = ("--methods", "scratch,byol,denoising", "--modes", "linear,knn")
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "note", diverging)
        result = bench(runs, store, *arguments)
    assert result.exit_code == 1, result.output
    assert tried == [0], "not pretrained again for its second cell"
    assert (
        result.output.count("TrainingError: byol: loss = nan at step 0.") == 2
        and "2 cells failed" in result.output
    )
    failures = ResultStore(store).failures()
    assert {(f["identity"]["method"], f["identity"]["mode"]) for f in failures} == {
        ("byol", "linear"),
        ("byol", "knn"),
    }
    assert failures[0]["error"] == {"type": "TrainingError", "message": "byol: loss = nan at step 0."}
    found, problems = ResultStore(store).records()
    assert (
        not problems
        and {r["identity"]["method"] for r in found} == {"scratch", "denoising"}
        and len(found) == 4
    )
    for known in BUILTIN_FORMATS:
        text = known.render(build_table(found, failures=failures))
        assert text.count("failed") == 2, known.name
    listed = run("store", "ls", "--store", store).output
    assert "2 cells failed" in listed and "byol shc linear seed 0" in listed
    assert "failed" in run("table", "--store", store).output
    again = bench(runs, store, *arguments)
    assert again.exit_code == 0 and again.output.count("already in the store") == 4, again.output
    assert ResultStore(store).failures() == [] and "failed" not in again.output


def test_a_failing_evaluation_is_one_failed_cell(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssl3d.bench import run as module

    true = module.evaluate

    def failing(backbone: Any, evaluation: Any, *others: Any, **more: Any) -> Any:
        if evaluation.mode == "linear":
            raise TrainingError("loss = inf at step 3.")
        return true(backbone, evaluation, *others, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", failing)
        result = bench(
            runs, tmp_path / "s", "--methods", "scratch", "--modes", "linear,knn", "--seeds", "0,1"
        )
    assert result.exit_code == 1 and "2 cells failed" in result.output, result.output
    alone = run("table", "--store", tmp_path / "s", "--format", "markdown")
    assert alone.exit_code == 0 and "failed" in alone.output
    for path in (tmp_path / "s" / "records").glob("*.json"):
        path.unlink()
    only = run("table", "--store", tmp_path / "s", "--format", "csv")
    assert only.exit_code == 0 and only.output.count("failed") == 1, "a store of nothing but failures"
    # One seed of two: the mean of the other, with a mark.
    assert bench(runs, tmp_path / "s", "--methods", "scratch", "--seeds", "1").exit_code == 0
    part = run("table", "--store", tmp_path / "s", "--format", "markdown").output
    assert "without 1 of 2 runs, which failed" in part


# --- Several processes ----------------------------------------------------------------------------


def test_a_cell_has_one_thread_unless_others_are_asked_for(runs: Path, tmp_path: Path) -> None:
    """With --jobs, too: tests/commands/test_cli.py."""
    torch.set_num_threads(2)  # of whoever calls: it must not matter
    try:
        for name, threads, more in (("alone", 1, ()), ("two", 2, ("--threads", "2"))):
            result = bench(runs, tmp_path / name, "--methods", "scratch", *more)
            assert result.exit_code == 0, result.output
            assert {r["environment"]["threads"] for r in records(tmp_path / name).values()} == {threads}
    finally:
        torch.set_num_threads(1)


def test_the_progress_of_several_processes_is_told_in_one_place(capsys: pytest.CaptureFixture[str]) -> None:
    from multiprocessing import Pipe

    from ssl3d import progress

    receiver, sender = Pipe(duplex=False)
    with Board([receiver]) as board:
        board._printed = -1e9  # a line is due
        board.mine(Message(title="Pretraining byol, seed 0", done=3, total=9))
        sender.send(Message(title="scratch, shc linear", done=1, total=8))
        sender.send(Message(line="scratch  shc linear: 40.0"))
        with progress.sending(board.mine):
            progress.say("a line of this process")
            assert board._last[0].title == "Pretraining byol, seed 0"
            with progress.Track("job", 2) as track:
                track.update(1)
            assert 0 not in board._last, "a job that has ended is told no more"
        sender.close()
    shown = capsys.readouterr().err
    assert "Pretraining byol, seed 0: 3/9" in shown
    assert "scratch  shc linear: 40.0" in shown and "a line of this process" in shown


def test_a_weights_hash_that_is_not_there_is_refused(runs: Path, tmp_path: Path) -> None:
    from ssl3d.bench.cell import given_weights
    from ssl3d.config import load_settings
    from ssl3d.pretrain.spec import resolve_method

    with pytest.raises(CheckpointError, match="holds no run.json"):
        given_weights(resolve_method("denoising", {}), tmp_path, load_settings("smoke").backbone)
