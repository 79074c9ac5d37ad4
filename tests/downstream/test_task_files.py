"""Own tasks: a YAML file in, a column of the table out; every kind; and files that make no sense."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from cohorts import MemoryCohort, sphere_cohort
from scipy import stats
from sklearn.metrics import mean_absolute_error, roc_auc_score

from ssl3d.bench.sources import open_dataset
from ssl3d.cli import main
from ssl3d.config import BackboneConfig, DownstreamConfig, FinetuneConfig
from ssl3d.data.checks.case import check_cases
from ssl3d.data.cohort import Case
from ssl3d.data.splits import Split, make_splits
from ssl3d.downstream.harness import Evaluation, Outcome, evaluate
from ssl3d.downstream.task_files import load_task
from ssl3d.downstream.tasks import Task
from ssl3d.errors import ConfigError, DataError
from ssl3d.models.factory import build_backbone
from ssl3d.results.statistics.annotate import with_statistics
from ssl3d.results.table.build import build_table


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "160"})


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


BALL = "name: ball\nkind: segmentation\ndataset: nnunet\n"


def test_every_key_arrives(tmp_path: Path) -> None:
    task = load_task(write(tmp_path / "t.yaml", BALL + (
        "data: ../scans\nlabels: {5: liver, 7: tumour}\nignore_labels: [9]\nempty_labels: true\nmodality: ct\n"
        "intensity_offset: 0\npreparation: {crop: foreground, spacing_mm: 2}\nsplits: {train: 6, val: 2, test: 3}\n"
    )))  # fmt: skip
    assert (task.name, task.title, task.metric, task.counts) == ("ball", "BALL", "dsc", (6, 2, 3))
    assert task.place == tmp_path.parent.resolve() / "scans" and task.preparation["crop"] == "foreground"
    assert task.facts == {
        "label_values": {5: "liver", 7: "tumour"}, "label_aliases": {}, "ignored_label_values": frozenset({9}),
        "empty_labels": True, "modality": "ct", "intensity_offset": 0.0,
    }  # fmt: skip
    folds = load_task(write(tmp_path / "f.yaml", BALL + "splits: {folds: 5}\nlabels: [a, b]\n"))
    assert (folds.scheme, folds.folds, folds.counts) == ("cv", 5, None)
    assert folds.facts["label_values"] == {1: "a", 2: "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BALL + "labls: [a]\n", 'unknown key "labls". Did you mean "labels"'),
        (BALL.replace("segmentation", "segment"), "kind = 'segment'"),
        (BALL + "metric: auc\n", "segmentation is scored by dsc, not by auc"),
        (BALL + "labels: [a, a]\n", "two labels have the same name"),
        (BALL + "preparation: {crp: none}\n", 'preparation: unknown key "crp"'),
        (BALL + "splits: {train: 3}\n", "give all three or none"),
        (BALL + "splits: {scheme: random, folds: 3}\n", "folds have no meaning"),
        (BALL.replace("ball", "my task"), "use letters, digits"),
        (BALL.replace("segmentation", "classification") + "labels: {1: a, 2: b}\n", "numbered 0, 1, 2"),
        (BALL.replace("segmentation", "classification") + "labels: [a, b, c]\nmetric: auc\n", "write metric: macro_auc"),
        (BALL.replace("segmentation", "regression") + "labels: [a]\n", "regression has no labels"),
        ("- a\n", "must hold keys and values"),
        ("a: [\n", "is not valid YAML"),
    ],
)  # fmt: skip
def test_files_that_make_no_sense(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_task(write(tmp_path / "t.yaml", text))
    assert message in str(refused.value)


# --- kinds in the harness -------------------------------------------------------------------------


def several_balls(n: int) -> MemoryCohort:
    """Boxes with a ball of one of three sizes, bright or dark: what a class, two labels and a number say."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(12)] * 3, indexing="ij"))
    images, targets, classes, values = [], [], [], []
    for i in range(n):
        size, bright = i % 3, i // 3 % 2
        inside = ((grid - rng.uniform(5, 7, (3, 1, 1, 1))) ** 2).sum(0) < (2 + 1.5 * size) ** 2
        image = np.where(inside, 0.9 if bright else 0.1, 0.5) + rng.normal(0, 0.02, inside.shape)
        images.append(image.astype(np.float32))
        targets.append(size)
        classes.append(tuple(k for k, applies in enumerate((size > 0, bright)) if applies))
        values.append(40.0 + 20 * size + rng.normal(0, 0.5))
    return MemoryCohort(
        images,
        [],
        targets,
        classes=classes,
        values=values,
        target_names={0: "small", 1: "middle", 2: "large"},
    )


def evaluated(kind: str, metric: str, cohort: MemoryCohort, mode: str = "linear") -> Outcome:
    budget = FinetuneConfig(steps=40, lr=0.003, volumes=4, validate_every=20, warmup_steps=10, clip_grad=1)
    config = DownstreamConfig.model_validate({"crop": 12, "finetune": budget})
    ids = [f"case{i}" for i in range(len(cohort))]
    split = Split("random", tuple(ids[:18]), tuple(ids[18:24]), tuple(ids[24:]))
    backbone = build_backbone(BackboneConfig(channels=[8, 16]), 0)  # type: ignore[call-arg]
    task = Task("mine", "Mine", kind, "memory", metric, None)  # type: ignore[arg-type]
    return evaluate(backbone, Evaluation(task, cohort, split, mode, config, 0, torch.device("cpu")))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["linear", "multiscale", "finetune", "knn"])
def test_several_classes(mode: str) -> None:
    outcome = evaluated("classification", "macro_auc", several_balls(36), mode)
    table = np.array([case["probabilities"] for case in outcome.per_case])
    np.testing.assert_allclose(table.sum(axis=1), 1, rtol=1e-5)
    truth = [case["classes"][0] for case in outcome.per_case]
    assert outcome.score == pytest.approx(
        100 * roc_auc_score(truth, table / table.sum(1, keepdims=True), multi_class="ovr")
    )
    assert outcome.score > 80  # fmt: skip


def test_classes_that_do_not_exclude_each_other() -> None:
    cohort = several_balls(36)
    cohort.target_names = {0: "not small", 1: "bright"}
    outcome = evaluated("multilabel", "macro_auc", cohort)
    table = np.array([case["probabilities"] for case in outcome.per_case])
    truth = np.array([[k in case["classes"] for k in range(2)] for case in outcome.per_case])
    each = [roc_auc_score(truth[:, k], table[:, k]) for k in range(2)]
    assert outcome.score == pytest.approx(100 * np.mean(each)) and outcome.score > 85


def test_a_number() -> None:
    outcome = evaluated("regression", "mae", several_balls(36))
    values, predicted = ([case[key] for case in outcome.per_case] for key in ("value", "prediction"))
    assert outcome.score == pytest.approx(mean_absolute_error(values, predicted), abs=1e-5)
    assert outcome.score < 0.7 * mean_absolute_error(values, np.full(len(values), 60.0)), (
        "better than the mean"
    )
    best = min(outcome.validation, key=lambda point: point["score"])
    assert outcome.best_step == best["step"], "the lowest error is chosen"


def test_a_number_in_a_large_unit_keeps_its_digits() -> None:
    """Litres of a billionth: errors far below 1e-6 are scores like others, not 0."""
    usual, small = several_balls(36), several_balls(36)
    small.values = [1e-9 * value for value in small.values]
    one, other = (evaluated("regression", "mae", cohort) for cohort in (usual, small))
    assert other.score == pytest.approx(1e-9 * one.score, rel=1e-3) and 0 < other.score < 1e-6
    errors = [[case["mae"] for case in outcome.per_case] for outcome in (one, other)]
    np.testing.assert_allclose(errors[1], 1e-9 * np.array(errors[0]), rtol=1e-3, atol=1e-13)


def record(method: str, score: float, errors: list[float], metric: str = "mae") -> dict:
    return {
        "schema": 1, "metric": metric, "score": score, "preset": "t",
        "per_case": [{"case": str(i), metric: e} if metric == "mae" else {"case": str(i)} for i, e in enumerate(errors)],
        "method": {"title": method, "trains": "none", "notes": []},
        "identity": {"method": method, "method_config": {}, "task": "age", "split": "random", "mode": "linear", "seed": 0},
    }  # fmt: skip


def test_of_errors_the_lowest_is_best_and_not_in_percent() -> None:
    records = [
        record("scratch", 6.0, [4.0, 8.0, 6.0]),
        record("a", 4.0, [3, 5, 4.0]),
        record("b", 5.0, [4, 6, 5.0]),
    ]
    (table,) = with_statistics(build_table(records), ["ci", "rank"]).tables
    cells = {row.method: row.cells["linear", "age"] for row in table.rows}
    assert (cells["a"].best, cells["b"].second, cells["scratch"].best) == (True, True, False)
    assert cells["a"].mean == 4.0 and cells["a"].delta == -2.0
    assert cells["a"].rank and cells["a"].rank.rank == 1
    shown, expected = cells["a"].interval, stats.ttest_1samp([3, 5, 4.0], 0).confidence_interval(0.95)
    assert shown and (shown.low, shown.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    (other,) = with_statistics(
        build_table([record("scratch", 70.0, [0, 0], "macro_auc")]), ["ci", "p", "rank"]
    ).tables
    assert "no intervals" in other.remarks[-1]


# --- splits ---------------------------------------------------------------------------------------


def case(i: int, subset: str | None = None, classes: tuple[int, ...] | None = None) -> Case:
    return Case(f"c{i}", f"s{i}", Path(f"{i}.nii"), target=None if classes is not None else i % 2, classes=classes,
                subset=subset)  # type: ignore[arg-type]  # fmt: skip


def test_splits_that_are_given_and_splits_by_proportion() -> None:
    given = [case(i, ("train", "val", "test")[i // 4]) for i in range(12)]
    (split,) = make_splits(given, None)
    assert [len(split.train), len(split.val), len(split.test)] == [
        4,
        4,
        4,
    ] and split.note == "as given: 4/4/4 cases"
    assert set(split.val) == {"c4", "c5", "c6", "c7"}
    (free,) = make_splits([case(i) for i in range(20)], None)
    assert [len(free.train), len(free.val), len(free.test)] == [12, 4, 4]
    (half,) = make_splits([case(i, "train" if i < 10 else "test") for i in range(15)], None)
    assert [len(half.train), len(half.val), len(half.test)] == [8, 2, 5]
    shared = [*given, Case("again", "s0", Path("x.nii"), target=0, subset="val")]
    with pytest.raises(DataError, match="s0 are in the release's training and validation"):
        make_splits(shared, None)


def test_a_part_without_a_positive_case_is_refused() -> None:
    cases = [case(i, ("train", "val", "test")[i // 4], (0,) if i % 2 else (1,)) for i in range(12)]
    make_splits(cases, None)
    cases[9], cases[11] = (case(i, "test", (1,)) for i in (9, 11))
    with pytest.raises(DataError, match="4 cases for test hold no case of class 0"):
        make_splits(cases, None)
    one_class = [Case(f"c{i}", f"s{i}", Path("x"), target=0) for i in range(9)]
    with pytest.raises(DataError, match="Every labelled case is of class 0"):
        make_splits(one_class, None)
    with pytest.raises(DataError, match="cannot be split"):
        make_splits([case(0), case(1)], None)


# --- the whole way --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve boxes with balls as NIfTI, a CSV with everything, and three task files."""
    root = tmp_path_factory.mktemp("own")
    cohort = sphere_cohort(12, edge=16)
    rows = ["subject,image,label,class,value,split"]
    for i, (image, label) in enumerate(zip(cohort.images, cohort.labels, strict=True)):
        for name, data in ((f"i{i}", (1000 * image).astype(np.int16)), (f"m{i}", label)):
            nibabel.save(nibabel.Nifti1Image(data, np.diag([4.0, 4, 4, 1])), root / f"{name}.nii.gz")
        kind = ("small", "big")[cohort.targets[i]]
        rows.append(f"p{i},i{i}.nii.gz,m{i}.nii.gz,{kind},{40 + 5 * i},{('train', 'val', 'test')[i // 4]}")
    write(root / "t.csv", "\n".join(rows) + "\n")
    common = "dataset: csv\ndata: t.csv\npreparation: {spacing_mm: 4, scaling: minmax}\n"
    write(
        root / "balls.yaml",
        "name: balls\nkind: segmentation\nlabels: [bright, dark]\nsplits: {folds: 3}\n" + common,
    )
    write(root / "size.yaml", "name: size\nkind: classification\nlabels: [small, big]\n" + common)
    write(root / "age.yaml", "name: age\nkind: regression\nsplits: {scheme: given}\n" + common)
    return root


def bench(
    own: Path,
    store: Path,
    *more: object,
    methods: str = "scratch",
    names: tuple[str, ...] = ("balls", "size", "age"),
) -> Result:
    tasks = ",".join(str(own / f"{name}.yaml") for name in names)
    arguments = ["--preset", "smoke", "--methods", methods, "--modes", "linear", "--cache", own / "cache"]
    return run("bench", *arguments, "--tasks", tasks, "--store", store, *more)


@pytest.mark.filterwarnings("ignore")
def test_own_tasks_become_columns(own: Path, tmp_path: Path) -> None:
    result = bench(own, tmp_path / "store")
    assert result.exit_code == 0, result.output
    for title in ("BALLS DSC", "SIZE AUC", "AGE MAE"):
        assert title in result.output
    records = [json.loads(path.read_text()) for path in (tmp_path / "store" / "records").glob("*.json")]
    assert sorted((r["identity"]["task"], r["identity"]["split"]) for r in records) == [
        ("age", "official"), ("balls", "fold0"), ("balls", "fold1"), ("balls", "fold2"), ("size", "official"),
    ]  # fmt: skip
    assert all(r["overlap"] == [] and r["left_out"] == {"task": [], "pretraining": []} for r in records)


@pytest.mark.filterwarnings("ignore")
def test_bad_files_are_refused_or_left_out_and_recorded(own: Path, tmp_path: Path) -> None:
    whole = (own / "i0.nii.gz").read_bytes()
    (own / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    write(own / "with_bad.csv", (own / "t.csv").read_text() + "p99,cut.nii.gz,,small,1,train\n")
    scans = tmp_path / "scans"
    scans.mkdir()
    (scans / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 1000, (16, 16, 16)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(noise, np.diag([4.0, 4, 4, 1])), scans / f"u{i}.nii.gz")
    arguments = ["bench", "--preset", "smoke", "--methods", "scratch,denoising", "--modes", "linear",
                 "--tasks", own / "size.yaml", "--task-data", f"size={own / 'with_bad.csv'}", "--data", scans,
                 "--cache", own / "cache", "--set", "data.spacing_mm=4", "--store", tmp_path / "store"]  # fmt: skip
    pretrain = ["pretrain", "--preset", "smoke", "--method", "denoising", "--data", scans, "--set", "data.spacing_mm=4",
                "--set", "pretrain.steps=1", "--cache", own / "cache", "--out", tmp_path / "run"]  # fmt: skip
    assert run(*pretrain).exit_code == 2 and not (tmp_path / "run").exists()
    made = run(*pretrain, "--policy", "skip")
    assert made.exit_code == 0 and "Left out: " in made.output, made.output
    assert [case["id"] for case in json.loads((tmp_path / "run" / "skipped.json").read_text())] == ["cut"]
    refused = run(*arguments)
    assert refused.exit_code == 2 and "cut.nii.gz is truncated" in refused.output, refused.output
    result = run(*arguments, "--policy", "skip")
    assert result.exit_code == 0, result.output
    assert result.output.count("Left out: ") == 2 and "bad cases left out: 1" in " ".join(
        result.output.split()
    )
    for path in (tmp_path / "store" / "records").glob("*.json"):
        stored = json.loads(path.read_text())
        assert [case["id"] for case in stored["left_out"]["task"]] == ["cut"]
        pretrained = stored["identity"]["method"] == "denoising"
        assert [case["id"] for case in stored["left_out"]["pretraining"]] == ["cut"] * pretrained


@pytest.mark.filterwarnings("ignore")
def test_test_images_in_the_pretraining_data_are_refused_or_marked(own: Path, tmp_path: Path) -> None:
    leak = ["--data", f"csv={own / 't.csv'}", "--set", "data.spacing_mm=4", "--set", "pretrain.crop=16"]
    refused = bench(own, tmp_path / "store", *leak, methods="denoising", names=("balls", "size"))
    assert refused.exit_code == 2 and "size: 4 of 4 test images are among" in refused.output, refused.output
    assert not (tmp_path / "store" / "runs").exists(), "nothing was trained"
    result = bench(
        own,
        tmp_path / "store",
        *leak,
        "--allow-overlap",
        "size",
        methods="scratch,denoising",
        names=("size",),
    )
    assert result.exit_code == 0, result.output
    assert "test images among the volumes for pretraining: 4" in " ".join(result.output.split())
    for path in (tmp_path / "store" / "records").glob("*.json"):
        stored = json.loads(path.read_text())
        assert len(stored["overlap"]) == (4 if stored["identity"]["method"] == "denoising" else 0)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_is_held_against_the_volumes_that_it_was_pretrained_on(
    own: Path, tmp_path: Path
) -> None:
    settings = ["--preset", "smoke", "--set", "data.spacing_mm=4", "--set", "pretrain.crop=16"]
    made = run("pretrain", "--method", "denoising", "--data", f"csv={own / 't.csv'}", "--out", tmp_path / "run",
               "--cache", own / "cache", *settings)  # fmt: skip
    assert made.exit_code == 0, made.output
    arguments = ["bench", "--methods", "denoising", "--modes", "linear", "--tasks", own / "size.yaml",
                 "--checkpoint", f"denoising={tmp_path / 'run'}", "--store", tmp_path / "store", *settings]  # fmt: skip
    refused = run(*arguments, "--cache", own / "cache")
    assert refused.exit_code == 2 and "size: 4 of 4 test images are among" in refused.output, refused.output
    elsewhere = run(*arguments, "--cache", tmp_path / "another")
    assert elsewhere.exit_code == 0, elsewhere.output
    assert "volumes for pretraining are not there to look for test images" in " ".join(
        elsewhere.output.split()
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["class,split", *["big,train"] * 8, *["big,test"] * 4], 'every labelled case is of class "big"'),
        (
            ["class,split", *["big,train", "small,train"] * 4, *["big,test"] * 4],
            'for test hold no case of class "small"',
        ),
        (
            ["class,split", *["big,train", "small,train"] * 4, *["big,val", "small,val"] * 2],
            "there is no test case",
        ),
        (["class,split", *["big,train", "small,test"] * 6], "for train hold no case"),
    ],
)
def test_a_part_that_is_empty_or_lacks_a_class_is_refused(
    own: Path, tmp_path: Path, columns: list[str], message: str
) -> None:
    rows = [f"p{i},{own / f'i{i}.nii.gz'},{row}" for i, row in enumerate(columns[1:])]
    write(tmp_path / "t.csv", "\n".join([f"subject,image,{columns[0]}", *rows]) + "\n")
    write(
        tmp_path / "kind.yaml",
        "name: kind\nkind: classification\ndataset: csv\ndata: t.csv\nsplits: {scheme: given}\n"
        "preparation: {spacing_mm: 4, scaling: minmax}\n",
    )
    result = run("bench", "--preset", "smoke", "--methods", "scratch", "--tasks", tmp_path / "kind.yaml",
                 "--cache", own / "cache", "--store", tmp_path / "store")  # fmt: skip
    assert result.exit_code == 2 and "task kind: " in result.output.lower(), result.output
    assert message.lower() in result.output.lower() and "Traceback" not in result.output


def test_mistakes_on_the_command_line(own: Path, tmp_path: Path) -> None:
    clash = write(tmp_path / "shc.yaml", "name: shc\nkind: segmentation\ndataset: csv\n")
    assert 'a task "shc" exists already' in run("bench", "--tasks", clash, "--store", tmp_path / "s").output
    unknown = write(tmp_path / "u.yaml", "name: u\nkind: segmentation\ndataset: cvs\n")
    assert (
        'Unknown dataset "cvs". Did you mean "csv"'
        in run("bench", "--tasks", unknown, "--store", tmp_path / "s").output
    )
    assert "does not exist" in run("bench", "--tasks", tmp_path / "no.yaml", "--store", tmp_path / "s").output
    result = bench(own, tmp_path / "s", "--allow-overlap", "shc")
    assert result.exit_code == 2 and '--allow-overlap names the task "shc"' in result.output
    neighbours = bench(own, tmp_path / "s", "--modes", "linear,knn")
    assert neighbours.exit_code == 2 and "The task age (regression) has no mode knn" in neighbours.output
    multi = write(tmp_path / "m.yaml", f"name: m\nkind: multilabel\ndataset: csv\ndata: {own / 't.csv'}\n")
    arguments = [
        "--preset",
        "smoke",
        "--methods",
        "scratch",
        "--cache",
        own / "cache",
        "--store",
        tmp_path / "s",
    ]
    lacking = run("bench", "--tasks", multi, *arguments)
    assert lacking.exit_code == 2 and "The task m (multilabel) needs a list of classes" in lacking.output


def test_a_task_file_says_what_a_dataset_json_cannot(tmp_path: Path) -> None:
    """Regions and "ignore" are refused with a remedy in the task file; it must not be read too late."""
    for i in range(2):
        for folder, name in (("imagesTr", f"c{i}_0000"), ("labelsTr", f"c{i}")):
            (tmp_path / folder).mkdir(exist_ok=True)
            data = np.random.default_rng(i).integers(0, 4 if folder == "labelsTr" else 99, (8, 8, 8))
            image = nibabel.Nifti1Image(data.astype(np.int16), np.eye(4))
            nibabel.save(image, tmp_path / folder / f"{name}.nii.gz")
    root = {"channel_names": {"0": "MR"}, "numTraining": 2, "file_ending": ".nii.gz"}
    head = "name: mine\nkind: segmentation\ndataset: nnunet\n"

    def index(labels: dict[str, object], lines: str) -> tuple[dict[int, int], tuple[str, ...]]:
        (tmp_path / "dataset.json").write_text(json.dumps({**root, "labels": labels}))
        (tmp_path / "mine.yaml").write_text(head + lines)
        dataset = open_dataset("nnunet", tmp_path, facts=load_task(tmp_path / "mine.yaml").facts)
        assert check_cases(dataset.cases(tmp_path), dataset) == []
        return dataset.label_index(), dataset.label_names()

    regions = {"background": 0, "whole": [1, 2, 3], "core": [2, 3]}
    with pytest.raises(DataError, match=r'"whole" is a region .*in a task file \(labels\)'):
        index(regions, "")
    assert index(regions, "labels: {1: a, 2: b, 3: c}\n") == ({0: 0, 1: 1, 2: 2, 3: 3}, ("a", "b", "c"))
    marked = {"background": 0, "a": 1, "b": 2, "ignore": 3}
    with pytest.raises(DataError, match=r"ignore_labels: \[3\]"):
        index(marked, "")
    assert index(marked, "ignore_labels: [3]\n") == ({0: 0, 1: 1, 2: 2, 3: 0}, ("a", "b"))
    plain = {"background": 0, "a": 1, "b": 2, "c": 3}
    assert index(plain, "ignore_labels: [3]\n") == ({0: 0, 1: 1, 2: 2, 3: 0}, ("a", "b"))
