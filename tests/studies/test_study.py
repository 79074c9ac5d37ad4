"""A study runs from its YAML, resumes from the store, and draws its figure."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from run_facts import finished_run
from scipy import stats

from ssl3d.config import load_settings
from ssl3d.data.phantoms import PhantomParameters, generate
from ssl3d.data.splits import Split
from ssl3d.downstream.metrics import dice_per_structure
from ssl3d.errors import ConfigError, SSL3DError
from ssl3d.models.factory import build_backbone
from ssl3d.models.unet import UNet3D
from ssl3d.results.store.store import ResultStore

STUDY = Path(__file__).parents[2] / "benchmarks" / "studies"


def study(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, STUDY / "run.py", *arguments], capture_output=True, text=True, env={**os.environ}
    )


def test_a_study_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    arguments = (
        STUDY / "levers" / "smoke.yaml",
        "--store",
        tmp_path / "store",
        "--cache",
        tmp_path / "cache",
    )
    first = study(*arguments)
    assert first.returncode == 0, first.stderr
    frame = pd.read_csv(tmp_path / "store" / "smoke.csv")
    # scratch and the two checkpoints of denoising in two modes and their correspondence, and the upper bound
    assert len(frame) == 3 * 3 + 1
    matches = frame["mode"] == "correspondence"
    assert frame[matches].score.between(0, 100).all() and frame[matches].validation.isna().all()
    assert frame[~matches & (frame["mode"] != "knn")].validation.between(0, 100).all()
    assert set(frame[frame.method == "denoising"].step) == {4, 8} and set(
        frame[frame.method == "scratch"].step
    ) == {0}
    assert (tmp_path / "store" / "smoke.png").stat().st_size > 10_000
    (tmp_path / "store" / "smoke.csv").unlink()
    again = study(*arguments)
    assert again.stderr.count("already in the store") == 7
    pd.testing.assert_frame_equal(frame, pd.read_csv(tmp_path / "store" / "smoke.csv"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("questoin: x", "question"),
        ("[1]", "mapping"),
        ("question: x\nmethods: [gvls]", 'Did you mean "gvsl"'),
    ],
)
def test_mistakes_in_a_study_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    result = study(path, "--store", tmp_path / "store")
    assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr


def module_of(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, STUDY / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    sys.path.insert(0, str(STUDY))  # as for a script that is run: they import each other
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(STUDY))
    return module


def test_blocked_anova_is_the_comparison_of_two_linear_models() -> None:
    """Least squares with and without the methods, in dummies; and seeds that shift all methods alike do not matter."""
    rng = np.random.default_rng(0)
    scores = (
        rng.normal(size=(5, 1)) + 3 * rng.normal(size=(1, 4)) + 0.5 * rng.normal(size=(5, 4))
    )  # (methods, seeds)
    method, seed = (axis.ravel() for axis in np.indices(scores.shape))
    seeds = np.eye(4)[seed]  # (20, 4)
    both = np.concatenate([seeds, np.eye(5)[method][:, 1:]], axis=1)  # (20, 8)
    error = [
        np.square(scores.ravel() - x @ np.linalg.lstsq(x, scores.ravel(), rcond=None)[0]).sum()
        for x in (seeds, both)
    ]
    statistic, p = module_of("separation").blocked_anova(scores)
    assert statistic == pytest.approx((error[0] - error[1]) / 4 / (error[1] / 12))
    assert p == pytest.approx(stats.f.sf(statistic, 4, 12)) and p < 0.01 < stats.f_oneway(*scores).pvalue
    shifted = module_of("separation").blocked_anova(scores + 10 * rng.normal(size=(1, 4)))
    assert shifted == pytest.approx((statistic, p))


def test_blocked_anova_finds_nothing_where_there_is_nothing() -> None:
    rng, separation = np.random.default_rng(1), module_of("separation")
    found = [
        separation.blocked_anova(rng.normal(size=(10, 3)) + rng.normal(size=3))[1] < 0.05 for _ in range(400)
    ]
    assert 0.02 < np.mean(found) < 0.09


def test_separation_finds_what_was_put_in() -> None:
    """Scratch at 40, others at 40.2, 50 and 60; cases differ by 4, seeds of a case by 2."""
    from test_statistics import made_up_model

    module = module_of("separation")
    frame = module.separation(made_up_model(cases=30, modes=("linear",)).tables[0]).set_index("Column")
    dice = frame.loc["Linear SHC DSC"]
    apart, low, high = (float(part.strip("[],")) for part in dice["Over scratch [95 %]"].split())
    assert dice["Best"].startswith("c ") and dice["Seeds"] == 3 and dice["Rows"] == 4
    assert 18.5 < apart < 21.5 and low < apart < high and high - low < 3
    assert float(dice["p"]) < 1e-6
    assert "Over random_labels [95 %]" not in frame
    levels = {"scratch": 40.0, "random_labels": 62.0, "a": 60.0, "b": 60.0}
    controlled = made_up_model(cases=30, modes=("linear",), levels=levels).tables[0]
    dice = module.separation(controlled).set_index("Column").loc["Linear SHC DSC"]
    assert dice["Best"][0] in "ab", "the control is no pretraining"
    assert float(dice["Over random_labels [95 %]"].split()[0]) == pytest.approx(-2, abs=0.8)
    assert float(dice["p"]) < 1e-6 and float(dice["p, no baselines"]) > 0.01
    two = made_up_model(cases=30, seeds=2, modes=("linear",)).tables[0]
    assert "[" not in module.difference(two, two.columns[0], "c", "scratch"), "two seeds have no interval"


def titles_in(pairs: list[Any]) -> set[str]:
    return {pair.title for pair in pairs}


def test_primary_comparisons_are_corrected_together(tmp_path: Path) -> None:
    """Scratch at 40, the control at 60, GVSL at 60, restoration at 50: what differs is found, and nothing else."""
    from test_statistics import made_up_model

    module = module_of("primary")
    levels = {"scratch": 40.0, "random_labels": 60.0, "gvsl": 60.0, "gvsl_without_zmatching": 50.0}
    table = made_up_model(cases=30, modes=("linear",), levels=levels).tables[0]
    # Not every column has few labels.
    fewer = replace(table, columns=tuple(column for column in table.columns if column.task != "sac"))
    columns = module.prepared([(1.0, table), (0.1, fewer)])
    pairs = module.compared(columns)
    dice = {(p.method, p.reference): p.comparison for p in pairs if p.column.task == "shc" and p.labels == 1}
    assert set(dice) == {
        ("random_labels", "scratch"), ("gvsl", "scratch"), ("gvsl_without_zmatching", "scratch"),
        ("gvsl", "random_labels"), ("gvsl_without_zmatching", "random_labels"), ("gvsl", "gvsl_without_zmatching"),
    }  # fmt: skip
    assert {pair for pair, c in dice.items() if c.significant} == set(dice) - {("gvsl", "random_labels")}
    alone = dice["gvsl", "gvsl_without_zmatching"]
    assert alone.low < 10 < alone.high and alone.high - alone.low < 3
    # Holm: the smallest p counts as often as there are comparisons, in all columns.
    smallest = min(pairs, key=lambda pair: pair.comparison.p).comparison
    assert smallest.p_holm == pytest.approx(min(1.0, smallest.p * len(pairs)))
    titles = {row.method: row.title for row in table.rows}
    could = module.shows(columns, len(pairs))
    text = module.markdown(titles, pairs, could)
    assert set(could) == set(titles_in(pairs)) and all(0 < points < 100 for points in could.values())
    # The simpler test: each difference over its own standard error.
    found = {(p.title, p.method, p.reference) for p in module.by_paired_t(pairs)}
    for pair in pairs:
        of = np.array(pair.differences)
        t = of.mean() / (of.std(ddof=1) / np.sqrt(len(of)))
        p = 2 * stats.t.sf(abs(t), len(of) - 1)
        assert len(of) == 3 and of.mean() == pytest.approx(pair.comparison.difference)
        if p * len(pairs) <= 0.05:  # Bonferroni's are among Holm's
            assert (pair.title, pair.method, pair.reference) in found
    assert f"with the same correction, finds {len(found)}:" in text and text.count("could have shown") == 1
    assert f"over all {len(pairs)} comparisons" in text and text.count("| Over ") == 3
    assert "Linear SHC DSC, 10 % of the labels" in text and "SAC DSC, 10 %" not in text
    levels.pop(
        "gvsl_without_zmatching"
    )  # columns with fewer rows have tables of their own, without empty cells
    few = made_up_model(cases=30, modes=("linear",), levels=levels).tables[0]
    pairs = module.compared(module.prepared([(1.0, table), (0.1, few)]))
    text = module.markdown(titles, pairs, could)
    assert text.count("| Over scratch |") == 2 and "|  |" not in text
    assert module.bands(pairs)[1] == [f"{title}, 10 % of the labels" for title in module.bands(pairs)[0]]
    module.draw(titles, pairs, tmp_path / "primary.png")
    assert (tmp_path / "primary.png").stat().st_size > 10_000


def test_tables_of_a_study_are_read_together(tmp_path: Path) -> None:
    """A column at each share of the labels, a task with a longer budget beside the others, and no two studies at once."""
    from test_statistics import made_up_records

    hearts = [r for r in made_up_records(cases=20, modes=("finetune",)) if r["identity"]["task"] == "shc"]
    brains = [
        {**r, "identity": {**r["identity"], "task": "sbm", "task_data": "sbm", "budget": {"steps": 9}}}
        for r in hearts
    ]  # fine-tuned for longer
    whole = hearts + brains
    store = ResultStore(tmp_path)
    for record in whole:
        identity = record["identity"]
        store.write(record)
        if identity["task"] == "shc" and identity["method"] in ("scratch", "a"):
            few = {**identity, "label_fraction": 0.1}
            store.write({**record, "identity": few, "score": record["score"] - 30})
    separation, stores = module_of("separation"), module_of("stores")
    tables = stores.tables_of(tmp_path)
    assert sorted(share for share, _ in tables) == [0.1, 1.0, 1.0]
    frame = separation.scores(tables).set_index("Method")
    assert set(frame.columns[:2]) == {"Fine-tune SHC DSC", "Fine-tune SBM DSC"}
    few = frame["Fine-tune SHC DSC, 10 % of the labels"]
    mean = statistics.fmean(
        r["score"] for r in whole if r["identity"]["task"] == "shc" and r["identity"]["method"] == "a"
    )
    assert few["a"].startswith(f"**{mean - 30:.1f}**") and few["c"] == ""
    assert frame["Fine-tune SHC DSC"]["c"].startswith("**")
    printed = subprocess.run(
        [sys.executable, STUDY / "separation.py", tmp_path, "--modes", "finetune"],
        capture_output=True,
        text=True,
    )
    assert printed.returncode == 0 and "Fine-tune SHC DSC, 10 % of the labels | 2 | 3 |" in printed.stdout

    for record in whole:  # the same columns by another budget
        store.write({**record, "identity": {**record["identity"], "budget": {"steps": 7}}})
    with pytest.raises(SSL3DError, match="holds several studies"):
        stores.tables_of(tmp_path)


def test_a_trend_over_steps_and_what_it_says_of_more() -> None:
    """The prediction interval holds a new seed's score in 95 % of studies; the gain is that of statsmodels' formula."""
    trend, rng = module_of("trend"), np.random.default_rng(0)
    steps = np.repeat([360, 1000, 3000, 10000], 2)
    held, slopes = 0, 0
    for _ in range(400):
        found = trend.trend(steps, 20 + 4 * np.log10(steps) + rng.normal(size=8), 200_000)
        new = 20 + 4 * np.log10(200_000) + rng.normal()
        held += abs(new - found.predicted[0]) <= found.predicted[1]
        slopes += abs(4 - found.gain[0]) <= found.gain[1]
    assert 0.92 < held / 400 < 0.98 and 0.92 < slopes / 400 < 0.98
    bent = trend.trend(steps, 20 + 4 * np.minimum(np.log10(steps), 3.2), 200_000)
    assert bent.bend < -0.3, "it has come to its end, and lies below the line"
    frame = pd.DataFrame({
        "task": "shc", "mode": "linear", "method": "gvsl", "seed": [0, 1] * 4, "step": steps,
        "score": 20 + 4 * np.log10(steps),
    })  # fmt: skip
    same = "| 30.2 | 32.0 | 33.9 | 36.0 | +4.0 ± 0.0 | +4.0, +4.0 | +0.0 | 41 [41, 41] |"
    assert same in trend.markdown(frame, 200_000)
    apart = frame.assign(score=20 + (3 + 2 * frame.seed) * np.log10(steps))
    assert " | +3.0, +5.0 | " in trend.markdown(apart, 200_000), "seeds that do not agree are seen"
    few = apart[(apart.seed == 0) | (apart.step > 1000)]
    assert list(trend.gains(few)) == [0], "two numbers of steps make no line"
    fewer = pd.concat([frame.iloc[:-1], frame.assign(method="mae")])
    assert "seeds (2 at 360, 2 at 1,000, 2 at 3,000, 1 to 2 at 10,000 steps)" in trend.markdown(
        fewer, 200_000
    )
    with pytest.raises(ValueError, match="2 scores at 2 numbers of steps"):
        trend.markdown(frame.iloc[::4], 200_000)


def test_a_trend_is_drawn_over_steps_that_a_row_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line of a row goes on over a number of steps that only another row was run at."""
    trend = module_of("trend")
    figure, curves = module_of("figure"), {}
    monkeypatch.setattr(trend, "draw", figure.draw)
    monkeypatch.setattr(
        figure, "_curve", lambda axis, x, by, colour, label, dashes: curves.update({label: (x, by)})
    )
    steps = [360, 1000, 3000, 10000] * 2
    frame = pd.DataFrame({
        "task": "shc", "mode": "linear", "method": ["gvsl"] * 4 + ["mae"] * 4, "seed": 0, "step": steps,
        "score": np.log10(steps),
    })  # fmt: skip
    frame = frame.drop(index=2)  # GVSL has no 3,000
    path, out = tmp_path / "study.csv", tmp_path / "steps.png"
    pd.concat([frame, frame.assign(seed=1)]).sort_values("step").to_csv(path, index=False)
    monkeypatch.setattr(sys, "argv", ["trend.py", str(path), "--out", str(out)])
    trend.main()
    assert out.is_file()
    for method, at in (("gvsl", [360, 1000, 10000]), ("mae", [360, 1000, 3000, 10000])):
        x, by = curves[method]
        assert list(x) == at and np.allclose(by["mean"], np.log10(at))


def test_a_run_of_a_store_is_chosen_by_its_identity(tmp_path: Path) -> None:
    matching = module_of("matching")
    plain = {**finished_run()["identity"], "seed": 3}
    identities = [{**plain, "pretrain": {"budget": {"steps": steps}}} for steps in (360, 1000)]
    for place, identity in enumerate(identities):
        folder = tmp_path / "runs" / f"gvsl-s3-{place}"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(finished_run(identity=identity)))
    assert [matching.run_in(tmp_path, identity, "gvsl") for identity in identities] == [
        tmp_path / "runs" / f"gvsl-s3-{place}" for place in (0, 1)
    ]
    assert matching.run_in(tmp_path, plain, "gvsl") is None
    assert matching.run_in(tmp_path, identities[0], "gvsl_released_head") is None


def test_mistakes_with_a_trend_are_named(tmp_path: Path) -> None:
    def said(text: str | None, *more: str) -> str:
        path = tmp_path / "study.csv"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        done = subprocess.run(
            [sys.executable, STUDY / "trend.py", path, *more], capture_output=True, text=True
        )
        assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    head = "task,mode,method,seed,step,score\n"
    assert "No such file" in said(None)
    assert "column step is missing" in said("task,mode,method,seed,score\n")
    assert "no score after pretraining" in said(head + "shc,linear,scratch,1,0,20\n")
    assert "gvsl, shc linear: 1 scores at 1 numbers of steps" in said(head + "shc,linear,gvsl,1,9,20\n")
    assert "--at 0: at least 1" in said(head, "--at", "0")


def test_every_seed_is_drawn(tmp_path: Path) -> None:
    from matplotlib.figure import Figure
    from test_statistics import made_up_model

    seeds = module_of("seeds")
    drawn: list[Figure] = []
    seeds.save = lambda figure, path: drawn.append(figure) or save(figure, path)
    save = module_of("figure").save
    table = made_up_model(seeds=3).tables[0]
    seeds.draw([(1.0, table), (0.1, table)], tmp_path / "new" / "seeds.png")
    assert (tmp_path / "new" / "seeds.png").stat().st_size > 10_000
    for axis in drawn[0].axes:
        dots = [line for line in axis.lines if line.get_marker() == "o"]
        assert [len(line.get_xdata()) for line in dots] == [3, 3, 3, 3]
        means = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "|"]
        np.testing.assert_allclose(means, [np.mean(line.get_xdata()) for line in dots])
    titles = [axis.get_title() for axis in drawn[0].axes]
    assert len(titles) == 8 and titles[4] == f"{titles[0]}, 10 % of the labels"
    nothing = subprocess.run(
        [sys.executable, STUDY / "seeds.py", tmp_path, "--out", tmp_path / "x.png"],
        capture_output=True,
        text=True,
    )
    assert nothing.returncode == 1 and "Traceback" not in nothing.stderr


def test_losses_are_put_beside_those_of_chance(tmp_path: Path) -> None:
    """Random labels stay at log 10, NT-Xent of two items is compared with log 3; a restoration has no such number."""
    command = [
        sys.executable,
        "-m",
        "ssl3d.cli",
        "bench",
        "--preset",
        "smoke",
        "--tasks",
        "shc",
        "--modes",
        "linear",
    ]
    more = [
        "--methods",
        "random_labels,simclr,denoising",
        "--store",
        str(tmp_path / "s"),
        "--cache",
        str(tmp_path / "c"),
    ]
    subprocess.run([*command, *more], check=True, capture_output=True)
    result = subprocess.run(
        [sys.executable, STUDY / "losses.py", tmp_path / "s"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    rows = {cells[3]: cells for cells in (line.split(" | ") for line in result.stdout.splitlines()[2:])}
    assert rows["nt_xent"][7].strip(" |") == "1.1" and rows["cross_entropy"][7].strip(" |") == "2.3"
    assert rows["mse"][7].strip(" |") == "" and rows["mse"][0] == "| Denoising"
    assert 1.5 < float(rows["cross_entropy"][6]) < 4
    assert rows["mse"][1:3] == ["2", "0.001"], "with the budget it belongs to"
    assert module_of("losses").chance("deepcluster", "cross_entropy", {"clusters": 16}, 2) == np.log(16)
    nothing = subprocess.run([sys.executable, STUDY / "losses.py", tmp_path], capture_output=True, text=True)
    assert nothing.returncode == 1 and "no finished run" in nothing.stderr


def test_location_alone_solves_what_always_lies_in_one_place() -> None:
    location = module_of("location")
    rng = np.random.default_rng(0)
    fixed = np.zeros((12, 12, 12), dtype=np.int32)
    fixed[3:7, 3:7, 3:7], fixed[8:11, 2:6, 5:9] = 1, 2
    anywhere = [np.roll(fixed, rng.integers(0, 12, 3), axis=(0, 1, 2)) for _ in range(9)]

    class Cohort:
        num_classes = 3

        def __init__(self, maps: list[np.ndarray]) -> None:
            self.maps = maps

        def index(self, case: str) -> int:
            return int(case)

        def label(self, case: int) -> np.ndarray:
            return self.maps[case]

    split = Split("one", ("0", "1", "2", "3", "4"), ("5", "6"), ("7", "8"))
    assert location.location_only(Cohort([fixed] * 9), split) == (100.0, 0.0)
    assert location.location_only(Cohort(anywhere), split)[0] < 30
    finer = [labels.repeat(2, 0).repeat(2, 1).repeat(2, 2) for labels in [fixed] * 2]
    assert location.location_only(Cohort([fixed] * 7 + finer), split)[0] == 100.0, (
        "places are relative to the volume"
    )


def test_placement_takes_the_place_out_of_the_phantoms() -> None:
    """Measured on few small subjects: from 72 to 22 DSC."""
    location = module_of("location")
    scores = []
    for placement in (0.0, 1.0):
        parameters = PhantomParameters(edge=32, spacing_mm=4.8, placement=placement)
        maps = []
        for i in range(16):
            labels = generate("mmwhs", i, parameters).labels
            assert labels is not None
            maps.append(np.searchsorted([0, 205, 420, 500, 550, 600, 820, 850], labels))
        guess = location.most_frequent(maps[:12], 8, 0.5)
        found = [
            dice_per_structure(torch.from_numpy(guess), torch.from_numpy(m), 8).nanmean() for m in maps[12:]
        ]
        scores.append(100 * float(np.mean(found)))
    print(scores)
    assert scores[0] > 50 and scores[1] < 0.6 * scores[0]


def test_a_silenced_stage_is_a_stage_of_zeros() -> None:
    transplant = module_of("transplant")
    backbone = UNet3D(UNet3D.Config(channels=(4, 8, 16))).eval()
    x = torch.rand(1, 1, 12, 8, 16, generator=torch.Generator().manual_seed(0))
    for stages in ([0], [1], [2], [1, 2], [0, 1, 2]):
        features = backbone.encode(x)
        for stage in stages:
            features[stage] = torch.zeros_like(features[stage])
        torch.testing.assert_close(
            transplant.silenced(backbone, stages)(x)[1], backbone.decode(features), msg=f"stages {stages}"
        )
    assert not torch.allclose(transplant.silenced(backbone, [2])(x)[1], backbone(x)[1])


def test_a_transplant_wants_one_run(tmp_path: Path) -> None:
    transplant, settings = module_of("transplant"), load_settings("smoke")
    title, backbone = transplant.network(tmp_path, "scratch", 1, settings)
    torch.testing.assert_close(
        next(backbone.parameters()), next(build_backbone(settings.backbone, 1).parameters())
    )
    assert title == "Scratch"
    with pytest.raises(ConfigError, match="holds no finished run of byol, seed 1"):
        transplant.network(tmp_path, "byol", 1, settings)
    for name in ("a", "b"):
        (tmp_path / "runs" / f"byol-s1-{name}").mkdir(parents=True)
        (tmp_path / "runs" / f"byol-s1-{name}" / "run.json").write_text(json.dumps(finished_run()))
    with pytest.raises(ConfigError, match=r"more than one.*name one, for example .*byol-s1-a"):
        transplant.network(tmp_path, "byol", 1, settings)


def test_a_transplant_takes_the_encoder_and_leaves_the_decoder() -> None:
    transplant = module_of("transplant")
    config = UNet3D.Config(channels=(4, 8))
    ours, theirs = UNet3D(config).eval(), UNet3D(config).eval()
    x = torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    mixed = transplant.transplanted(ours, theirs, [1])
    torch.testing.assert_close(mixed.encode(x)[0], ours.encode(x)[0])
    torch.testing.assert_close(
        transplant.transplanted(ours, theirs, [0, 1]).encode(x)[1], theirs.encode(x)[1]
    )
    assert not torch.allclose(mixed.encode(x)[1], ours.encode(x)[1])
    torch.testing.assert_close(mixed.decode(ours.encode(x)), ours(x)[1])
