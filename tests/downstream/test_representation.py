"""Measures of local features against obvious second forms, and on features whose answer is known."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from cohorts import MemoryCohort, sphere_cohort
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from ssl3d.cli import main
from ssl3d.config import NeighboursConfig
from ssl3d.downstream.features.maps import draw, embed
from ssl3d.downstream.features.matching import evaluate_matching, matching_means
from ssl3d.downstream.features.measures import (
    Correspondence,
    correspondence_accuracy,
    correspondences,
    draw_pairs,
    label_transfer,
    make_plan,
    map_sample,
    sample_voxels,
    sampled,
    silhouette,
    standardized,
)
from ssl3d.errors import DataError
from ssl3d.geometry import identity_coords
from ssl3d.report.data import report_data
from ssl3d.results.store.store import ResultStore


def subject(seed: int, n: int = 400, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Return features (n, 7) that know a little of the labels (n,), and those; channels of all scales."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, n, p=np.arange(classes, 0, -1) / (classes * (classes + 1) / 2))
    features = rng.normal(size=(n, 7)) + 0.5 * np.eye(classes, 7)[labels]
    return features * 10.0 ** np.arange(-3, 4) + 5, labels


def brute_force(
    a: np.ndarray, la: np.ndarray, b: np.ndarray, lb: np.ndarray, w: np.ndarray
) -> Correspondence:
    """One voxel after the other, in float64."""
    both = np.concatenate([a, b])
    mean, std = both.mean(0), both.std(0)
    hits: dict[int, list[float]] = {}
    numerator = denominator = chance = 0.0
    for query, label, weight in zip((a - mean) / std, la, w, strict=True):
        if label == 0 or label not in lb:
            continue
        best, answer = -np.inf, -1
        for candidate, other in zip((b - mean) / std, lb, strict=True):
            similarity = query @ candidate / np.sqrt(query @ query) / np.sqrt(candidate @ candidate)
            if similarity > best:
                best, answer = similarity, other
        hits.setdefault(int(label), []).append(float(answer == label))
        numerator += weight * (answer == label)
        denominator += weight
        chance += weight * np.mean(lb == label)
    structures = {k: float(np.mean(v)) for k, v in sorted(hits.items())}
    return Correspondence(
        numerator / denominator, chance / denominator,
        float(np.mean(list(structures.values()))), float(np.mean([np.mean(lb == k) for k in structures])),
        structures, sum(map(len, hits.values())),
    )  # fmt: skip


def tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(a) for a in arrays]


def test_correspondence_is_that_of_a_loop_over_voxels() -> None:
    (a, la), (b, lb) = subject(0), subject(1, n=150)
    weights = np.random.default_rng(2).uniform(1, 50, len(a))
    ours = correspondence_accuracy(*tensors(a, la, b, lb, weights))
    theirs = brute_force(a, la, b, lb, weights)
    assert ours.queries == theirs.queries and ours.structures == pytest.approx(theirs.structures)
    for name in ("accuracy", "chance", "balanced", "balanced_chance"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-12)
    assert ours.accuracy > ours.chance


def test_planted_features_find_their_structure_and_noise_finds_it_by_chance() -> None:
    rng = np.random.default_rng(0)
    labels = [rng.choice(6, 3000, p=[0.3, 0.3, 0.2, 0.1, 0.05, 0.05]) for _ in range(2)]
    planted = [np.eye(6)[y] + rng.normal(0, 0.01, (3000, 6)) for y in labels]
    found = correspondence_accuracy(*tensors(planted[0], labels[0], planted[1], labels[1]))
    assert found.accuracy == found.balanced == 1.0
    noise = [rng.normal(size=(3000, 6)) for _ in labels]
    found = correspondence_accuracy(*tensors(noise[0], labels[0], noise[1], labels[1]))
    assert found.accuracy == pytest.approx(found.chance, abs=0.03)
    assert found.balanced == pytest.approx(found.balanced_chance, abs=0.03)
    assert found.balanced_chance == pytest.approx(0.7 / 5, abs=0.01)


def test_scale_of_channels_and_constant_channels_do_not_matter() -> None:
    (a, la), (b, lb) = subject(3), subject(4)
    first = correspondence_accuracy(*tensors(a, la, b, lb))
    scaled = [np.concatenate([1e4 * x - 7, np.full((len(x), 1), 0.1)], axis=1) for x in (a, b)]
    assert correspondence_accuracy(*tensors(scaled[0], la, scaled[1], lb)) == first
    constant = standardized(torch.full((50, 1), 0.1), torch.full((9, 1), 0.1))
    assert all(not part.any() for part in constant)


def test_structures_that_the_other_subject_lacks_are_no_queries() -> None:
    (a, la), (b, lb) = subject(5), subject(6)
    lb[lb == 4] = 0
    found = correspondence_accuracy(*tensors(a, la, b, lb))
    assert 4 not in found.structures and found.queries == int(((la > 0) & (la < 4)).sum())
    with pytest.raises(DataError, match="no structure in common"):
        correspondence_accuracy(*tensors(a, la, b, np.zeros_like(lb)))
    with pytest.raises(ValueError, match="give \\(N, C\\)"):
        correspondence_accuracy(*tensors(a, la[:-1], b, lb))


# --- Voxels, pairs, transfer ------------------------------------------------------------------------


def test_sampled_voxels_are_balanced_seeded_and_stand_for_the_whole_volume() -> None:
    label = np.random.default_rng(0).choice(4, (9, 8, 7), p=[0.8, 0.15, 0.04, 0.01]).astype(np.uint8)
    voxels = sample_voxels(label, 30, 0, "case")
    flat = label.ravel()
    assert (flat[voxels.positions] == voxels.labels.numpy()).all()
    assert len(set(voxels.positions.tolist())) == len(voxels.positions)
    for k in range(4):
        assert int((voxels.labels == k).sum()) == min(30, int((flat == k).sum()))
        assert float(voxels.weights[voxels.labels == k].sum()) == pytest.approx((flat == k).sum())
    again, other = sample_voxels(label, 30, 0, "case"), sample_voxels(label, 30, 0, "another")
    assert torch.equal(again.positions, voxels.positions)
    assert not torch.equal(other.positions, voxels.positions)


def test_pairs_are_of_different_subjects_and_distinct() -> None:
    subjects = ["a", "a", "b", "c"]
    pairs = draw_pairs(subjects, 100)
    assert len(pairs) == len(set(pairs)) == 10 and all(subjects[i] != subjects[j] for i, j in pairs)
    assert draw_pairs(subjects, 4) == pairs[:4]
    with pytest.raises(DataError, match="one subject"):
        draw_pairs(["a", "a"], 3)


class Planted(dict[int, Tensor]):
    """In the place of a FeatureStore: f^l of each case is one-hot of its label, and noise."""

    def __init__(self, cohort: MemoryCohort, noise: float, signal: float = 1.0) -> None:
        rng = torch.Generator().manual_seed(0)
        for case in range(len(cohort)):
            one_hot = torch.nn.functional.one_hot(torch.from_numpy(cohort.label(case)).long(), 3)
            planted = signal * one_hot.movedim(-1, 0)[None].float()  # (1, 3, D, H, W)
            self[case] = planted + noise * torch.randn(planted.shape, generator=rng)


def test_labels_are_transferred_through_planted_features_and_not_through_noise() -> None:
    cohort = sphere_cohort(4)
    plan = make_plan(cohort, range(4), pairs=5, cap=40)  # type: ignore[arg-type]
    for planted, low, high in ((Planted(cohort, 0.05), 1.0, 1.0), (Planted(cohort, 1.0, 0.0), 0.0, 0.3)):
        samples = sampled(planted, plan)  # type: ignore[arg-type]
        dice = label_transfer(planted, samples, plan, cohort, NeighboursConfig())  # type: ignore[arg-type]
        assert len(dice) == len(plan.pairs) == 5 and all(low <= d <= high for d in dice)
        for found in correspondences(samples, plan):
            assert found.balanced >= low and (low or found.balanced == pytest.approx(1 / 3, abs=0.25))


def test_transferred_labels_are_those_of_a_second_implementation() -> None:
    """scikit-learn's nearest neighbours on features standardised by the labelled subject, in float64."""
    cohort = sphere_cohort(2, edge=12)
    features = Planted(cohort, 0.8)
    plan = make_plan(cohort, [0, 1], pairs=1, cap=50)  # type: ignore[arg-type]
    ((a, b),) = plan.pairs
    config = NeighboursConfig(neighbours=7, temperature=0.1)
    (ours,) = label_transfer(features, sampled(features, plan), plan, cohort, config)  # type: ignore[arg-type]
    bank = features[b][0].flatten(1).T.double().numpy()[plan.voxels[b].positions]
    queries = features[a][0].flatten(1).T.double().numpy()
    mean, std = bank.mean(0), bank.std(0)
    vote = KNeighborsClassifier(7, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.1))
    predicted = vote.fit((bank - mean) / std, plan.voxels[b].labels.numpy()).predict((queries - mean) / std)
    truth = cohort.label(a).ravel()
    dices = [
        2 * ((predicted == k) & (truth == k)).sum() / ((predicted == k).sum() + (truth == k).sum())
        for k in (1, 2)
    ]
    assert ours == pytest.approx(np.mean(dices), abs=2e-3)


def test_silhouette_is_that_of_its_definition() -> None:
    (x, labels), values = subject(7, n=80, classes=3), []
    for i in range(len(x)):
        distance = np.sqrt(((x - x[i]) ** 2).sum(1))
        own = (labels == labels[i]) & (np.arange(len(x)) != i)
        inside = distance[own].mean()
        outside = min(distance[labels == k].mean() for k in set(labels.tolist()) - {labels[i]})
        values.append((outside - inside) / max(inside, outside))
    assert silhouette(*tensors(x, labels)) == pytest.approx(np.mean(values), abs=1e-9)
    assert silhouette(*tensors(x, np.ones_like(labels))) is None


def test_a_map_shows_equally_many_voxels_of_each_structure_and_case() -> None:
    cohort = sphere_cohort(3)
    plan = make_plan(cohort, range(3), pairs=1, cap=40)  # type: ignore[arg-type]
    points, labels = map_sample(sampled(Planted(cohort, 0.1), plan), plan, 60)  # type: ignore[arg-type]
    assert labels.bincount().tolist() == [0, 30, 30] and points.shape == (60, 3)
    assert points.mean(0) == pytest.approx([0, 0, 0], abs=1e-5)
    separate = embed(points, "tsne")
    assert separate.shape == (60, 2) and silhouette(torch.from_numpy(separate), labels) > 0.5
    png = draw([("A $x_ method", separate, labels.numpy())] * 7, ["bright", "dark"], "Map")
    assert png.startswith(b"\x89PNG") and png == draw(
        [("A $x_ method", separate, labels.numpy())] * 7, ["bright", "dark"], "Map"
    )


# --- Matching ---------------------------------------------------------------------------------------


def test_a_known_shift_is_scored_as_perfect_and_a_mirror_as_folded() -> None:
    cohort = sphere_cohort(2)
    size = (16, 16, 16)
    cohort.images[1], cohort.labels[1] = (np.roll(v[0], 3, axis=0) for v in (cohort.images, cohort.labels))

    class Shift:
        sign = 1.0

        def match(self, moving: Tensor, fixed: Tensor) -> Shift:
            self.coords = self.sign * identity_coords(size, fixed)
            self.coords[:, 0] -= 3
            self.matrix = torch.eye(3, 4)[None]
            return self

    rows = evaluate_matching(Shift(), cohort, [(0, 1)], size, torch.device("cpu"))  # type: ignore[arg-type]
    means = matching_means(rows)
    assert means["predicted"]["dice"] == 1 and means["predicted"]["folded"] == 0
    assert means["not aligned"] == means["affine only"] and means["not aligned"]["dice"] < 0.8
    Shift.sign = -1.0
    folded = evaluate_matching(Shift(), cohort, [(0, 1)], size, torch.device("cpu"))  # type: ignore[arg-type]
    assert folded["predicted"][0]["folded"] == 1


# --- Command ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smoke bench of scratch and GVSL."""
    folder = tmp_path_factory.mktemp("bench")
    command = ["bench", "--preset", "smoke", "--methods", "scratch,gvsl", "--tasks", "shc", "--modes", "linear",
               "--set", "pretrain.steps=2", "--set", "downstream.linear.voxels=50",
               "--set", "phantoms.stoic=6", "--set", "phantoms.candi=3", "--set", "phantoms.asoca=3",
               "--store", str(folder / "store"), "--cache", str(folder / "cache")]  # fmt: skip
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    return folder


def test_a_store_is_mapped_and_measured_and_the_report_shows_it(bench: Path) -> None:
    store = bench / "store"
    command = ["represent", str(store), "--map-voxels", "100", "--cache", str(bench / "cache")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    made = json.loads((store / "representation" / "shc.json").read_text())
    scratch, gvsl = made["methods"]
    assert [m["title"] for m in (scratch, gvsl)] == ["Scratch", "GVSL"]
    assert scratch["matching"] is None and 0 < gvsl["matching"]["predicted"]["dice"] <= 1
    assert len(gvsl["correspondence"]) == len(made["pairs"]) == 2
    for picture in made["pictures"].values():
        assert (store / "representation" / picture).read_bytes().startswith(b"\x89PNG")
    lines = list(csv.DictReader((store / "representation" / "representation.csv").open()))
    assert [line["method"] for line in lines] == ["scratch", "gvsl"] and lines[0]["dice_predicted"] == ""
    assert float(lines[1]["correspondence"]) == pytest.approx(
        np.mean([c["accuracy"] for c in gvsl["correspondence"]])
    )
    data, problems = report_data(ResultStore(store))
    (shown,) = data["representation"]
    assert not problems and [row["title"] for row in shown["rows"]] == ["Scratch", "GVSL"]
    assert all(picture["png"] for picture in shown["pictures"])
    (store / "representation" / "torn.json").write_text('{"schema": 1')
    data, problems = report_data(ResultStore(store))
    assert len(data["representation"]) == 1 and "torn.json" in problems[0]


def test_runs_are_compared_without_a_store(bench: Path, tmp_path: Path) -> None:
    runs = sorted(str(p) for p in (bench / "store" / "runs").iterdir())
    command = ["represent", *runs, "--preset", "smoke", "--cache", str(bench / "cache"), "--map-voxels", "50"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2 and "Give --out" in result.output
    result = CliRunner().invoke(main, [*command, "--out", str(tmp_path)])
    assert result.exit_code == 0 and "GVSL" in result.output, result.output
    assert (tmp_path / "shc-tsne.png").is_file()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tasks", "ccc"], 'no segmentation "ccc"'),
        (["--seed", "7"], "no record of shc with seed 7"),
        (["--set", "pretrain.steps=1"], "brings its own settings"),
    ],
)
def test_what_a_store_does_not_have_is_said(bench: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["represent", str(bench / "store"), *options])
    assert result.exit_code == 2 and message in result.output
