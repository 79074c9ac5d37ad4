"""Splits: no leakage, the same everywhere, and errors where a part would mean nothing."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from ssl3d.data.cohort import Case, Subset
from ssl3d.data.splits import Counts, Split, load_splits, make_splits, nested_fraction, save_splits
from ssl3d.errors import DataError

LABEL = Path("label.nii.gz")


def cohort(n: int, subset: Subset | None = None, labelled: bool = True, start: int = 0) -> list[Case]:
    return [
        Case(f"c{i:03d}", f"s{i:03d}", Path(f"{i}.nii.gz"), LABEL if labelled else None, None, subset)
        for i in range(start, start + n)
    ]


def classified(targets: list[int]) -> list[Case]:
    return [Case(f"c{i:03d}", f"s{i:03d}", Path("x.mha"), target=target) for i, target in enumerate(targets)]


def sizes(split: Split) -> tuple[int, int, int]:
    return len(split.train), len(split.val), len(split.test)


def assert_no_leakage(split: Split, cases: list[Case]) -> None:
    subject = {case.id: case.subject for case in cases}
    parts = [{subject[i] for i in ids} for ids in (split.train, split.val, split.test)]
    for a, b in itertools.combinations(parts, 2):
        assert not a & b
    ids = [*split.train, *split.val, *split.test]
    assert len(set(ids)) == len(ids) and min(sizes(split)) >= 1


@pytest.mark.parametrize(
    ("available", "counts"),
    [(40, (15, 5, 20)), (103, (40, 20, 43)), (2000, (1000, 400, 600)), (60, (15, 5, 40))],
)
def test_the_papers_counts_where_they_allow(available: int, counts: Counts) -> None:
    cases = cohort(available)
    (split,) = make_splits(cases, counts)
    assert sizes(split) == counts and split.name == "random"
    assert "wanted" not in split.note
    assert_no_leakage(split, cases)


@pytest.mark.parametrize(
    ("available", "counts", "expected"),
    [
        (20, (15, 5, 20), (8, 2, 10)),
        (30, (40, 20, 43), (12, 6, 12)),
        (3, (15, 5, 40), (1, 1, 1)),
        (6, (1000, 1, 1), (4, 1, 1)),
    ],
)
def test_fewer_cases_scale_the_counts_and_are_recorded(
    available: int, counts: Counts, expected: Counts
) -> None:
    (split,) = make_splits(cohort(available), counts)
    assert sum(sizes(split)) == available
    assert sizes(split) == expected
    assert "wanted: " + "/".join(map(str, counts)) in split.note


def test_official_test_subset_with_labels_is_the_test_set() -> None:
    cases = cohort(20, "train") + cohort(40, "test", start=100)
    (split,) = make_splits(cases, (15, 5, 40))
    assert split.name == "official" and sizes(split) == (15, 5, 40)
    assert set(split.test) == {case.id for case in cases if case.subset == "test"}
    assert_no_leakage(split, cases)


def test_hidden_test_labels_lead_to_cross_validation() -> None:
    cases = cohort(20, "train") + cohort(40, "test", labelled=False, start=100)
    splits = make_splits(cases, (15, 5, 40), folds=4)
    assert [split.name for split in splits] == ["fold0", "fold1", "fold2", "fold3"]
    tested = Counter(i for split in splits for i in split.test)
    assert tested == dict.fromkeys((case.id for case in cases[:20]), 1)  # each labelled case once, no other
    for split in splits:
        assert sizes(split) == (11, 4, 5)
        assert_no_leakage(split, cases)


def test_subjects_with_several_cases_stay_together() -> None:
    cases = [Case(f"s{s}-{k}", f"s{s}", Path("x"), LABEL) for s in range(12) for k in range(1 + s % 3)]
    for split in make_splits(cases, (6, 3, 3)) + make_splits(cases, (6, 3, 3), scheme="cv", folds=3):
        assert_no_leakage(split, cases)
        assert len(split.train) + len(split.val) + len(split.test) == len(cases)


def test_a_subject_in_both_official_subsets_is_refused() -> None:
    cases = [*cohort(5, "train"), Case("again", "s001", Path("x"), LABEL, None, "test")]
    with pytest.raises(DataError, match="s001 are in the release's training and test subsets"):
        make_splits(cases, (3, 2, 1))


def test_same_seed_same_split_whatever_the_order_of_the_cases() -> None:
    cases = cohort(30)
    (a,), (b,) = make_splits(cases, (10, 5, 15), seed=3), make_splits(cases[::-1], (10, 5, 15), seed=3)
    assert [set(p) for p in (a.train, a.val, a.test)] == [set(p) for p in (b.train, b.val, b.test)]
    (other,) = make_splits(cases, (10, 5, 15), seed=4)
    assert set(other.test) != set(a.test)


def test_a_known_split_never_changes() -> None:
    """A change of this would silently change every published number."""
    (split,) = make_splits(cohort(6), (3, 1, 2), seed=0)
    assert (split.train, split.val, split.test) == (("c002", "c004", "c005"), ("c003",), ("c000", "c001"))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scheme", ["random", "cv"])
def test_classes_are_spread_evenly(seed: int, scheme: str) -> None:
    cases = classified([1] * 30 + [0] * 70)
    target = {case.id: case.target for case in cases}
    for split in make_splits(cases, (50, 20, 30), seed, scheme):  # type: ignore[arg-type]
        for ids in (split.train, split.val, split.test):
            positive = sum(target[i] == 1 for i in ids)
            assert abs(positive - 0.3 * len(ids)) <= 1.5


def test_classes_that_do_not_exclude_each_other_are_spread_evenly() -> None:
    kinds = ((), (0,), (0, 1))
    cases = [Case(f"c{i}", f"s{i}", Path("x.mha"), classes=kinds[i % 3]) for i in range(30)]
    for seed in range(5):
        (split,) = make_splits(cases, (18, 6, 6), seed)
        known = {case.id: case.classes for case in cases}
        assert [Counter(known[i] for i in ids) for ids in (split.train, split.val, split.test)] == [
            dict.fromkeys(kinds, n) for n in (6, 2, 2)
        ]


def test_unlabelled_cases_are_left_out() -> None:
    cases = cohort(9) + cohort(9, labelled=False, start=50)
    (split,) = make_splits(cases, (3, 3, 3))
    assert {*split.train, *split.val, *split.test} == {case.id for case in cases[:9]}


@pytest.mark.parametrize(
    ("cases", "options", "message"),
    [
        (cohort(2), {}, "2 labelled subjects cannot be split .* at least 3"),
        (cohort(5, labelled=False), {}, "None of the 5 cases has a label"),
        (cohort(5), {"scheme": "official"}, "There is no test case with a label or a class"),
        (cohort(3), {"scheme": "cv", "folds": 4}, "4 folds needs at least 4 labelled subjects.*here are 3"),
        (cohort(1, "train") + cohort(5, "test", start=9), {}, "1 labelled subject cannot be split"),
        (classified([0] * 9), {}, "Every labelled case is of class 0"),
        (classified([0] * 20 + [1]), {"counts": (10, 5, 5)}, "hold no case of class 1"),
    ],
)  # fmt: skip
def test_impossible_splits_are_refused(cases: list[Case], options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_splits(cases, **options)


def test_messages_name_the_classes() -> None:
    names = {0: "healthy", 1: "ill"}
    with pytest.raises(DataError, match='Every labelled case is of class "ill"'):
        make_splits(classified([1] * 9), names=names)
    with pytest.raises(DataError, match='hold no case of class "ill"'):
        make_splits(classified([0] * 20 + [1]), (10, 5, 5), names=names)


def test_splits_are_stored(tmp_path: Path) -> None:
    splits = make_splits(cohort(20), (15, 5, 40), scheme="cv")
    save_splits(tmp_path / "a" / "splits.json", splits)
    assert load_splits(tmp_path / "a" / "splits.json") == splits
    (tmp_path / "bad.json").write_text('{"splits": [{"name": "x"}]}')
    for name in ("bad.json", "gone.json"):
        with pytest.raises(DataError, match=name):
            load_splits(tmp_path / name)


def test_fractions_are_nested_and_leave_validation_and_test_alone() -> None:
    cases = cohort(60)
    (split,) = make_splits(cases, (40, 5, 15))
    parts = [nested_fraction(split, cases, fraction, seed=1) for fraction in (0.01, 0.1, 0.25, 0.5, 1.0)]
    assert [len(part.train) for part in parts] == [1, 4, 10, 20, 40]
    assert all(set(a.train) < set(b.train) for a, b in itertools.pairwise(parts))
    assert {(part.name, part.val, part.test) for part in parts} == {(split.name, split.val, split.test)}
    assert nested_fraction(split, cases[::-1], 0.25, seed=1).train == parts[2].train
    assert nested_fraction(split, cases, 0.25, seed=2).train != parts[2].train
    assert "10 of 40 training subjects" in parts[2].note


def test_fractions_take_whole_patients() -> None:
    cases = [replace(case, subject=f"p{i // 3}") for i, case in enumerate(cohort(60))]
    split = Split("random", tuple(c.id for c in cases[:30]), tuple(c.id for c in cases[30:45]), ("c050",))
    part = nested_fraction(split, cases, 0.5)
    assert Counter(int(i[1:]) // 3 for i in part.train).keys() < set(range(10))
    assert set(Counter(int(i[1:]) // 3 for i in part.train).values()) == {3} and len(part.train) == 15


def test_fractions_keep_the_proportion_of_classes() -> None:
    cases = classified([int(i % 4 == 0) for i in range(80)])
    targets = {case.id: case.target or 0 for case in cases}
    (split,) = make_splits(cases, (40, 20, 20))
    for fraction in (0.2, 0.5):
        part = nested_fraction(split, cases, fraction)
        assert abs(sum(targets[i] for i in part.train) - len(part.train) / 4) <= 1
    with pytest.raises(DataError, match="hold no case of class"):
        nested_fraction(split, cases, 0.01)


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_impossible_fractions_are_refused(fraction: float) -> None:
    cases = cohort(10)
    with pytest.raises(DataError, match="Cannot take a fraction"):
        nested_fraction(make_splits(cases, (6, 2, 2))[0], cases, fraction)
