"""Who is on which image: patterns given by a user, and guesses from names."""

from __future__ import annotations

import random

import pytest

from ssl3d.data.people import guess_people, subject_of, subjects_of
from ssl3d.errors import ConfigError, DataError

VISITS = {
    "two digits each": [f"study_{p:02d}{v:02d}" for p in range(8) for v in range(3)],
    "visit": [f"P{p:03d}_visit{v}" for p in range(5) for v in (1, 2)],
    "one has one": ["p1_v1", "p1_v2", "p2_v1", "p3_v1"],
    "frames": [f"patient{p:03d}_frame{f:02d}" for p, f in ((1, 1), (1, 12), (2, 1), (2, 9), (3, 1), (3, 15))],
    "dates": ["002_S_0295_20060418", "002_S_0295_20070501", "002_S_0413_20060502", "002_S_0413_2007-06-01"],
    "days": ["OAS30001_MR_d0129", "OAS30001_MR_d0757", "OAS30002_MR_d0371", "OAS30003_MR_d0558"],
    "words": [f"{p:03d}_{w}" for p in range(6) for w in ("baseline", "followup")],
    "contrasts": [f"case{p:02d}_{w}" for p in range(6) for w in ("T1", "T2", "FLAIR")],
    "sides": [f"knee{p:02d}_{w}" for p in range(6) for w in ("left", "right")],
    "brats": [f"BraTS-GLI-{p:05d}-{v:03d}" for p in range(40) for v in range(1 + (p % 4 == 0))],
    "letters": [f"{p:03d}{letter}" for p in range(6) for letter in "ab"],
    "folders": [f"pat{p:02d}/{name}" for p, name in enumerate(["x", "y", "z", "u"])] + ["pat00/w", "pat01/k"],
    "some unmarked": ["p01", "p01_followup", "p02", "p02_followup", "p03"],
    "contrasts of visits": [f"p{p}_ses{v}_{w}" for p in range(3) for v in (1, 2) for w in ("T1", "FLAIR")],
    "bids": ["sub-01_ses-1_T1w", "sub-01_ses-2_T1w", "sub-02_ses-1_T1w", "sub-02_T2w"],
}  # fmt: skip
PEOPLE = dict(zip(VISITS, (8, 5, 3, 3, 2, 3, 6, 6, 6, 40, 6, 4, 3, 3, 2), strict=True))

NO_VISITS = {
    "decathlon": [f"liver_{i}" for i in range(131)],
    "padded": [f"{i:04d}" for i in range(130)],
    "five": [f"case{i}" for i in range(5)],
    "from eight": [f"s{i}" for i in range(8, 23)],
    "mmwhs": [f"ct_train_{i}" for i in range(1001, 1021)],
    "groups": [f"{g}_{i}" for g in ("Normal", "Diseased") for i in range(1, 21)],
    "candi": [f"{g}_{i:03d}" for g in ("HC", "SS", "BPDwithPsy") for i in range(1, 20)],
    "sites": [f"site{s}_{i:03d}" for s in (1, 2, 3) for i in range(40)],
    "flare": [f"FLARE22_{part}_{i:04d}" for part in ("Tr", "Ts") for i in range(50)],
    "folders of sites": [f"site{s}/{i:03d}" for s in (1, 2) for i in range(30)],
    "one": ["a"],
    "none": [],
    "brats once": [f"BraTS-GLI-{p:05d}-000" for p in range(20)],
    "identifiers": ["a8f3", "77c2", "9d01", "b6e5", "c0d4"],
}


@pytest.mark.parametrize("kind", VISITS)
def test_names_that_look_like_visits_and_the_remedy_works(kind: str) -> None:
    names = VISITS[kind]
    guess = guess_people(names)
    assert guess is not None and guess.people == PEOPLE[kind], guess
    assert len(guess.pattern) < 60, "what is printed can be read"
    people = subjects_of(names, guess.pattern)  # the pattern that is printed matches every name
    assert len(set(people)) == guess.people
    mixed = random.Random(0).sample(names, len(names))
    assert guess_people(mixed) is not None and set(guess.example) <= set(names) and len(guess.example) > 1


@pytest.mark.parametrize("kind", NO_VISITS)
def test_names_that_do_not(kind: str) -> None:
    assert guess_people(NO_VISITS[kind]) is None


def test_random_numbers_are_no_visits() -> None:
    for seed in range(50):
        numbers = random.Random(seed).sample(range(1000, 10_000), 30)
        assert guess_people([f"scan_{n}" for n in numbers]) is None, seed


def test_groups_of_a_pattern() -> None:
    assert subject_of("study_0102", r"study_(\d\d)") == "01"
    assert subject_of("x12_y3", r"(?P<subject>x\d+)_(y\d)") == "x12"
    assert subject_of("a_12", ".+") == "a_12" and subject_of("a", r"(\d)?a") is None


def test_a_pattern_that_does_not_fit_is_refused_with_one_that_does() -> None:
    with pytest.raises(ConfigError, match="is not a regular expression"):
        subjects_of(["a"], "(")
    with pytest.raises(
        DataError, match=r"no person from 10 names of 10: P000_visit1, .*visit1, \.\.\.|P000"
    ) as caught:
        subjects_of(VISITS["visit"], r"^(X\d+)")
    assert "matches all of them" in str(caught.value)
