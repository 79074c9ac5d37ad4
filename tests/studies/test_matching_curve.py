"""The matching of a run is measured at every state that it keeps."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from ssl3d.bench.sources import task_cohort
from ssl3d.config import load_settings
from ssl3d.downstream.features.matching import evaluate_matching, matching_means
from ssl3d.models.weights.checkpoint import load_method
from ssl3d.pretrain.loop import build_method
from ssl3d.pretrain.spec import resolve_method
from ssl3d.registry.registry import registry

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"
sys.path.insert(0, str(STUDIES))

from matching import labelled_pairs, spread  # noqa: E402
from run import load_study, settings_of  # noqa: E402

YAML = """
question: Does it match?
preset: smoke
set: [pretrain.steps=4, pretrain.checkpoint_every=2, pretrain.keep=9]
methods: [gvsl]
tasks: [shc]
modes: [knn]
seeds: [0]
at_steps: [2, 4]
lever: {title: arm, values: {"A": [], "B": [methods.gvsl.damage=a]}}
"""


def script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, STUDIES / name, *arguments], capture_output=True, text=True)


def test_the_curve_is_that_of_the_states(tmp_path: Path) -> None:
    both, one = tmp_path / "both.yaml", tmp_path / "one.yaml"
    both.write_text(YAML)
    one.write_text(YAML.replace(', "B": [methods.gvsl.damage=a]', ""))
    store, cache, out = tmp_path / "store", tmp_path / "cache", tmp_path / "curve.json"
    places = ("--store", store, "--cache", cache)
    empty = script("matching_curve.py", both, *places, "--out", out)
    assert empty.returncode == 1 and "run run.py on it first" in empty.stderr and not out.exists()

    assert (done := script("run.py", one, *places)).returncode == 0, done.stderr
    picture = tmp_path / "curve.png"
    scores = ("--scores", store / "one.csv")
    done = script(
        "matching_curve.py", both, *places, *scores, "--out", out, "--pairs", "3", "--draw", picture
    )
    assert done.returncode == 0 and "B, seed 0: no finished run" in done.stderr, done.stderr
    assert picture.stat().st_size > 10_000
    kept = json.loads(out.read_text())
    (points,) = kept["arms"]["A"].values()
    assert [point["step"] for point in points] == [0, 2, 4] and list(kept["arms"]) == ["A"]
    frame = pd.read_csv(store / "one.csv").set_index("step").score
    assert [point.get("scores") for point in points] == [None, {"knn": frame[2]}, {"knn": frame[4]}]
    assert len({point["whole"]["ncc"] for point in points}) == 3, "the head moves"

    # The last state by the function that loads a finished run, the first by building the method anew.
    settings = settings_of(load_study(both), []).for_method("gvsl")
    cohort = task_cohort(registry().tasks.get("shc").load(), None, settings, cache)
    pairs, edges = labelled_pairs(cohort, 3), settings.pretrain.crop
    (folder,) = (store / "runs").iterdir()
    for point, trained in ((points[0], False), (points[-1], True)):
        method = build_method(resolve_method("gvsl", settings.methods), settings, 0, torch.device("cpu"))
        if trained:
            load_method(folder, method)
        means = matching_means(evaluate_matching(method, cohort, pairs, edges, torch.device("cpu")))
        assert point["whole"] == pytest.approx(means["predicted"], rel=1e-5)
        assert point["affine"] == pytest.approx(means["affine only"], rel=1e-5)
        assert point["spread"] == pytest.approx(spread(method, cohort, pairs, edges), rel=1e-4, abs=1e-7)
    assert kept["reference"]["not aligned"] == pytest.approx(means["not aligned"], rel=1e-5)

    shown = script("matching_curve.py", "--show", out, "--steps", "4")
    assert shown.returncode == 0 and shown.stdout.count("| A |") == 1 and "seeds 0" in shown.stdout
    assert f" {frame[4]:.1f} |\n" in shown.stdout and "knn SHC" in shown.stdout


def test_what_was_measured_is_kept_or_the_file_is_left_alone(tmp_path: Path) -> None:
    both, one, other = (tmp_path / f"{name}.yaml" for name in ("both", "one", "other"))
    both.write_text(YAML)
    one.write_text(YAML.replace(', "B": [methods.gvsl.damage=a]', ""))
    other.write_text(one.read_text().replace("pretrain.steps=4", "pretrain.steps=6").replace('"A"', '"C"'))
    store, nothing, cache, out = (tmp_path / name for name in ("store", "nothing", "cache", "curve.json"))
    for study, folder in ((one, store), (other, nothing)):
        done = script("run.py", study, "--store", folder, "--cache", cache)
        assert done.returncode == 0, done.stderr

    def again(study: Path, folder: Path, pairs: int, *more: str | Path) -> subprocess.CompletedProcess[str]:
        places = ("--store", folder, "--cache", cache, "--out", out, "--pairs", str(pairs))
        return script("matching_curve.py", study, *places, *more)

    # What is known of the same weights is kept, other pairs are measured anew.
    assert again(one, store, 3).returncode == 0
    kept = json.loads(out.read_text())
    points = kept["arms"]["A"]["0"]
    marked = {**kept, "arms": {"A": {"0": [{**points[0], "spread": 7.0}]}}}
    out.write_text(json.dumps(marked))
    assert "7.0000" in again(one, store, 3).stdout
    old = {name: marked[name] for name in ("cohort", "pairs", "reference", "arms", "weights")}
    out.write_text(json.dumps(old))  # from before pretrainings were written down
    assert "7.0000" in again(one, store, 3).stdout
    assert json.loads(out.read_text())["pretrainings"] == kept["pretrainings"]
    done = again(one, store, 2)
    assert done.returncode == 0 and "7.0000" not in done.stdout and "over 2 pairs" in done.stdout

    # A store without the run keeps what was measured of the same pretraining; scores of other runs are not its.
    out.write_text(json.dumps(kept))
    done = again(both, nothing, 3, "--scores", store / "one.csv")
    assert done.returncode == 0 and "before is kept" in done.stderr, done.stderr
    assert "B, seed 0: no finished run" in done.stderr and json.loads(out.read_text()) == kept

    # What would be lost is named, and the file stays as it is.
    for pairs in (3, 2):
        done = again(other, nothing, pairs)
        assert done.returncode == 1 and "A, seed 0: measured before" in done.stderr, done.stderr
        assert json.loads(out.read_text()) == kept
    done = again(other, tmp_path / "neither", 3)
    assert done.returncode == 1 and "left out" in done.stderr and json.loads(out.read_text()) == kept


def test_the_arms_of_the_study_are_settings() -> None:
    study = load_study(STUDIES / "levers" / "matching.yaml")
    assert study.lever is not None
    arms = {arm: settings_of(study, overrides) for arm, overrides in study.lever.values.items()}
    plain = load_settings(study.preset, study.set, registry().methods.names())
    assert arms["rate 1e-3"].for_method("gvsl").pretrain.lr == 1e-3 != plain.for_method("gvsl").pretrain.lr
    assert arms["crop 24"].pretrain.crop == (24, 24, 24) != plain.pretrain.crop
    assert len({json.dumps(s.methods.get("gvsl")) for s in arms.values()}) == 4
    assert all(set(study.at_steps) <= set(range(0, 5001, s.pretrain.checkpoint_every)) for s in arms.values())
