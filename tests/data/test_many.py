"""Cohorts of many volumes: the same from an index as from a manifest, damage noticed, only what is new prepared."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_prepare import CT, Hearts, build, write_heart

from ssl3d.bench import sources
from ssl3d.config import Settings
from ssl3d.data.cohort import Case
from ssl3d.data.layouts.releases import Folder
from ssl3d.data.prepared import arrays, index, stored
from ssl3d.data.prepared.build import prepare
from ssl3d.data.prepared.cohort import PreparedCohort
from ssl3d.data.prepared.index import Index, stream
from ssl3d.data.prepared.many import IndexedCohort, find_prepared, grown_from, open_prepared
from ssl3d.data.prepared.steps import Preparation
from ssl3d.errors import ConfigError, DataError
from ssl3d.pretrain.source import training_source


@pytest.fixture
def hearts(tmp_path: Path) -> Path:
    for i in range(5):
        write_heart(tmp_path / "data", f"heart{i}", shape=(20, 21 + i, 24), seed=i)
    return tmp_path / "data"


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two cases are many, and a shard has two."""
    monkeypatch.setattr(index, "MANY", 1)
    monkeypatch.setattr(index, "ROWS", 2)
    arrays._verified.clear()
    yield


def told_apart(root: Path) -> list[Case]:
    """Cases with everything that a case can have, and without."""
    known: list[dict[str, object]] = [
        {"target": 1, "subset": "train"}, {"classes": (0, 2)}, {"value": 1.5}, {"label": None}, {"classes": ()},
    ]  # fmt: skip
    cases = zip(Hearts().cases(root), known, strict=True)
    return [Case(**{**vars(case), "subject": f"s{i}", **more}) for i, (case, more) in enumerate(cases)]


def test_a_cohort_with_an_index_is_the_one_of_a_manifest(
    hearts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = told_apart(hearts)
    plain = prepare(cases, Hearts(), CT, tmp_path / "plain")
    monkeypatch.setattr(index, "MANY", 1)
    monkeypatch.setattr(index, "ROWS", 2)
    prepare(cases, Hearts(), CT, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    indexed = open_prepared(folder)
    assert isinstance(indexed, IndexedCohort) and type(plain) is PreparedCohort
    assert len(list(folder.glob("cases-*.parquet"))) == 3 and "cases" not in json.loads(
        (folder / "manifest.json").read_text()
    )
    for name in ("dataset", "fingerprint", "label_names", "label_values", "preparation", "intensity", "skipped",
                 "target_names", "num_classes", "taken_for"):  # fmt: skip
        assert getattr(indexed, name) == getattr(plain, name), name
    assert list(indexed.records) == plain.records == list(stream(indexed.records))
    assert [indexed.records[i] for i in (-1, 0)] == [plain.records[i] for i in (-1, 0)]
    assert [case.id for case in indexed.cases[1:3]] == ["heart1", "heart2"] and len(indexed) == 5
    for i, (ours, theirs) in enumerate(zip(indexed.cases, plain.cases, strict=True)):
        for name in ("id", "subject", "subset", "target", "classes", "value", "has_label", "labelled", "shape",
                     "spacing_mm", "source", "native_shape"):  # fmt: skip
            assert getattr(ours, name) == getattr(theirs, name), name
            assert type(getattr(ours, name)) is type(getattr(theirs, name)), name
        np.testing.assert_array_equal(ours.affine, theirs.affine)
        np.testing.assert_array_equal(ours.native_affine, theirs.native_affine)
        assert indexed.source_digests(i) == plain.source_digests(i) and indexed.index(ours.id) == i
        box = (slice(2, 9), slice(0, 5), slice(3, 24))
        np.testing.assert_array_equal(indexed.image(i, box), plain.image(i, box))
        if theirs.has_label:
            np.testing.assert_array_equal(indexed.label(i), plain.label(i))
    with pytest.raises(DataError, match=r"Case heart3 of hearts has no label"):
        indexed.label(3)
    with pytest.raises(DataError, match=r'no case "heart9".* Did you mean'):
        indexed.index("heart9")
    with pytest.raises(IndexError):
        indexed.cases[5]
    crops = [training_source(c, (8, 8, 8), 2, 2, 3, 1) for c in (indexed, plain)]
    for step in range(4):
        ours, theirs = (source.batch(step) for source in crops)
        assert (
            ours.items == theirs.items and ours.volumes == theirs.volumes and bool((ours.x == theirs.x).all())
        )
    again = PreparedCohort(folder)  # whoever opens it as before sees the same
    assert list(again.records) == plain.records and again.cases[1].classes == (0, 2)
    found = find_prepared(plain.fingerprint, tmp_path / "cache")
    assert isinstance(found, IndexedCohort) and find_prepared("0" * 64, tmp_path / "cache") is None


def test_opening_looks_at_no_array_and_reads_no_column(
    hearts: Path, tmp_path: Path, many: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(hearts, tmp_path / "cache").folder
    for path in folder.glob("*.b2nd"):
        path.unlink()
    columns: list[str] = []
    read = Index._read
    monkeypatch.setattr(
        Index,
        "_read",
        lambda self, shard, names=None: columns.extend(names or ["all"]) or read(self, shard, names),
    )
    cohort = open_prepared(folder)
    assert len(cohort) == 5 and columns == []
    assert cohort.cases[2].shape == (20, 23, 24) and set(columns) == {"shape"}


@pytest.mark.parametrize("damage", ["missing", "cut", "one bit"])
def test_a_damaged_array_is_noticed_when_read_and_built_again_by_the_next_call(
    hearts: Path, tmp_path: Path, many: None, damage: str
) -> None:
    cohort = build(hearts, tmp_path / "cache")
    expected = [np.array(cohort.image(i)) for i in range(5)]
    path, when = (
        cohort.folder / "00003-heart3.image.b2nd",
        (cohort.folder / "00001-heart1.image.b2nd").stat().st_mtime_ns,
    )
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[:-9] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
    arrays._verified.clear()
    opened = open_prepared(cohort.folder)
    np.testing.assert_array_equal(opened.image(2), expected[2])
    with pytest.raises(DataError, match="it is prepared anew"):
        opened.image(3)
    with pytest.raises(DataError, match="not a complete prepared cohort"):
        open_prepared(cohort.folder)
    again = build(hearts, tmp_path / "cache")
    for i in range(5):
        np.testing.assert_array_equal(again.image(i), expected[i])
    assert (again.folder / "00001-heart1.image.b2nd").stat().st_mtime_ns == when, "the others stay"
    assert (
        isinstance(open_prepared(again.folder), IndexedCohort)
        and not (again.folder / arrays.LOOK_AGAIN).exists()
    )


@pytest.mark.parametrize("damage", ["missing", "cut", "another's"])
def test_a_damaged_shard_is_made_again(hearts: Path, tmp_path: Path, many: None, damage: str) -> None:
    cohort = build(hearts, tmp_path / "cache")
    shards = sorted(cohort.folder.glob("cases-*.parquet"))
    if damage == "missing":
        shards[1].unlink()
    else:
        shards[1].write_bytes(shards[1].read_bytes()[:-20] if damage == "cut" else shards[0].read_bytes())
    with pytest.raises(DataError, match="not a complete prepared cohort"):
        open_prepared(cohort.folder)
    calls: list[str] = []
    again = build(hearts, tmp_path / "cache", progress=lambda done, total, what: calls.append(what))
    assert list(again.records) == list(cohort.records) and "preparing hearts" in calls


def test_touched_files_and_skipped_entries_are_noted_in_an_index(
    hearts: Path, tmp_path: Path, many: None
) -> None:
    build(hearts, tmp_path / "cache")
    os.utime(hearts / "images" / "heart0.nii.gz", ns=(1, 1))
    cohort = build(hearts, tmp_path / "cache")
    assert open_prepared(cohort.folder).records[0]["sources"]["image"]["mtime_ns"] == 1
    assert len(list(cohort.folder.glob("cases-*.parquet"))) == 3, "none of before is left"
    (hearts / "images" / "heart1.nii.gz").write_text("not an image")
    part = build(hearts, tmp_path / "cache", policy="skip")
    opened = open_prepared(part.folder)
    assert [case["id"] for case in opened.skipped] == ["heart1"] and len(opened) == 4


def test_without_pyarrow_it_is_said_before_any_work(
    hearts: Path, tmp_path: Path, many: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(hearts, tmp_path / "cache").folder
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'ssl3d\[parquet\]'"):
        index.check_room_for(2)
    with pytest.raises(ConfigError, match=r"5 cases has an index.*pip install 'ssl3d\[parquet\]'"):
        open_prepared(folder)
    index.check_room_for(1)


def test_a_manifest_of_many_cases_of_an_earlier_version_is_read(
    hearts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = build(hearts, tmp_path / "cache")
    monkeypatch.setattr(index, "MANY", 1)
    calls: list[str] = []
    again = build(hearts, tmp_path / "cache", progress=lambda done, total, what: calls.append(what))
    assert again.records == plain.records and set(calls) == {"hashing"}
    assert type(open_prepared(plain.folder)) is PreparedCohort


# --- Only what is new ---------------------------------------------------------------------------------


def test_manifests_of_other_data_are_not_read(
    hearts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("a", "b"):
        write_heart(tmp_path / other, "heart0", seed=7)
        build(tmp_path / other, tmp_path / "cache")
    build(hearts, tmp_path / "cache")
    read: list[Path] = []
    sealed = stored._sealed
    monkeypatch.setattr(stored, "_sealed", lambda path: read.append(path) or sealed(path))
    hashed: list[Path] = []
    from ssl3d.data.prepared import identity

    digest = identity._digest
    monkeypatch.setattr(identity, "_digest", lambda volume: hashed.append(volume.path) or digest(volume))
    write_heart(hearts, "new")
    cohort = build(hearts, tmp_path / "cache")
    old = {path.parent for path in read if path.name == "manifest.json"} - {cohort.folder}
    assert (
        len(old) == 1
        and json.loads(next(iter(old)).joinpath("manifest.json").read_text())["cases"][0]["id"] == "heart0"
    )
    assert len(json.loads(next(iter(old)).joinpath("manifest.json").read_text())["cases"]) == 5
    assert sorted(path.name for path in hashed) == ["new.nii.gz", "new.nii.gz"], (
        "image and label of the new one"
    )


def images_only(root: Path) -> list[Case]:
    return [Case(case.id, case.subject, case.image) for case in Folder().cases(root / "images")]


@pytest.mark.parametrize("indexed", [False, True])
def test_volumes_that_are_prepared_are_taken_over_when_files_are_added(
    hearts: Path, tmp_path: Path, indexed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if indexed:
        monkeypatch.setattr(index, "MANY", 1)
    cache, ct = tmp_path / "cache", Folder().with_facts(modality="ct", intensity_offset=1024.0)

    def grow(cases: list[Case], preparation: Preparation = CT) -> PreparedCohort:
        return prepare(cases, ct, preparation, cache, built=grown_from(cases, ct, preparation, cache))

    before = grow(images_only(hearts))
    assert grown_from(images_only(hearts), ct, CT, cache) is None, "it is there"
    write_heart(hearts, "new")
    write_heart(hearts, "heart2", seed=99)  # and one has changed
    cases = images_only(hearts)
    after, alone = grow(cases), prepare(cases, ct, CT, tmp_path / "other")
    assert after.fingerprint == alone.fingerprint != before.fingerprint
    for i, case in enumerate(after.cases):
        np.testing.assert_array_equal(after.image(i), alone.image(i))
        ours = after.folder / after.records[i]["arrays"]["image"]["name"]
        old = [before.folder / r["arrays"]["image"]["name"] for r in before.records if r["id"] == case.id]
        assert bool(old) == (case.id != "new")
        assert [ours.samefile(path) for path in old] == [case.id != "heart2"] * bool(old)
    known = [{k: v for k, v in record.items() if k != "arrays"} for record in after.records]
    assert known == [{k: v for k, v in record.items() if k != "arrays"} for record in alone.records]
    people = [Case(case.id, "another", case.image) for case in cases]
    assert grown_from(people, ct, CT, cache) is None, "who is on it is part of the record"
    assert grown_from(cases, ct, Preparation(spacing_mm=2.5), cache) is None
    assert grown_from(cases, ct.with_facts(channel=1), CT, cache) is None
    assert grown_from(Hearts().cases(hearts), Hearts(), CT, cache) is None, "labels"


def test_a_prepared_cohort_is_pretrained_on_without_its_files(
    hearts: Path, tmp_path: Path, many: None
) -> None:
    settings = Settings.model_validate({"data": {"spacing_mm": 2.0}})
    first = sources.pretraining_cohort(str(hearts / "images"), settings, tmp_path)
    for path in (hearts / "images").iterdir():
        path.unlink()
    cohort = sources.pretraining_cohort(str(first.folder), settings, tmp_path)
    assert isinstance(cohort, IndexedCohort) and cohort.fingerprint == first.fingerprint
    np.testing.assert_array_equal(cohort.image(4), first.image(4))
    for change, message in (
        ({"spacing_mm": 1.0}, r"prepared at 2 mm.*data\.spacing_mm=2"),
        ({"spacing_mm": 2.0, "exclude": ["heart0"]}, r"1 case cannot be left out"),
    ):
        with pytest.raises(ConfigError, match=message):
            sources.pretraining_cohort(str(first.folder), Settings.model_validate({"data": change}), tmp_path)
    labelled = build(tmp_path / "l", tmp_path / "cache", Preparation(spacing_mm=2, crop="label")) if write_heart(
        tmp_path / "l", "a") is None else None  # fmt: skip
    assert labelled is not None
    with pytest.raises(ConfigError, match="cropped by its labels"):
        sources.pretraining_cohort(str(labelled.folder), settings, tmp_path)
