"""Patient-level splits: seeded, stored, the same for every method and every seed of a run.

All cases of one subject are in one part. Counts are counts of subjects (in the four releases every
subject has one case).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from ssl3d.errors import DataError, ReadError, are, count
from ssl3d.files import MOST_JSON_BYTES, parse_json, read_bytes, read_json, write_json

logger = logging.getLogger(__name__)

Counts = tuple[int, int, int]
Scheme = Literal["auto", "official", "random", "cv", "file"]
SPLITS_FINAL = "splits_final.json"
"""Name of nnU-Net's file of folds."""
PARTS = ("train", "val", "test")
_Target = int | tuple[int, ...] | None  # a class, or those that do not exclude each other


class SplitCase(Protocol):
    """What a split needs to know: :class:`ssl3d.data.cohort.Case` and ``PreparedCase`` have it."""

    @property
    def id(self) -> str: ...
    @property
    def subject(self) -> str: ...
    @property
    def subset(self) -> str | None: ...
    @property
    def target(self) -> int | None: ...
    @property
    def classes(self) -> tuple[int, ...] | None: ...
    @property
    def labelled(self) -> bool: ...


@dataclass(frozen=True)
class Split:
    """One division of a cohort.

    Attributes:
        name: "random", "official", or "fold0", "fold1", ...
        train, val, test: ids of cases.
        note: how it came about, in particular counts that differ from the wanted ones.
    """

    name: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    note: str = ""


def make_splits(
    cases: Sequence[SplitCase],
    counts: Counts | None = (15, 5, 40),
    seed: int = 0,
    scheme: Scheme = "auto",
    folds: int = 4,
    names: Mapping[int, str] | None = None,
) -> list[Split]:
    """Split the labelled cases of a cohort.

    Schemes:
        official: test on the labelled cases of the release's test subset; training and validation
            come from the other cases. A release with a validation subset is taken as it is.
        random: no official test subset: ``counts`` drawn from all.
        cv: each labelled case is tested once; validation is taken from the rest of each fold, in the
            proportion of ``counts``.
        auto: official if the release's test cases have labels; cv if it has test cases without
            labels (then they are not used); else random.

    Where there are fewer subjects than ``counts`` want, the counts are scaled in proportion, at least
    one each, and the note says so. Where there are more, exactly ``counts`` are taken. Classes (cases
    with targets) are spread evenly over the parts.

    Args:
        cases: of one cohort; those without label and target are left out.
        counts: wanted subjects for (training, validation, test); None: all there are, three fifths, one
            fifth and one fifth where the release does not say.
        seed: the same seed gives the same splits on every machine.
        scheme: see above.
        folds: of the cross-validation.
        names: of the classes, for messages.

    Returns:
        One split, or one a fold.

    Raises:
        DataError: too few subjects, or a part without any case of some class.
    """
    labelled = [case for case in cases if case.labelled]
    if not labelled:
        raise DataError(
            f"None of the {count(len(cases), 'case')} has a label or a class, so there is nothing to evaluate."
        )
    test = [case for case in labelled if case.subset == "test"]
    if scheme == "file":
        raise ValueError('splits of the scheme "file" are read by splits_of_file')
    if scheme == "auto":
        hidden = any(case.subset == "test" and not case.labelled for case in cases)
        scheme = "official" if test else "cv" if hidden else "random"
    if scheme == "official" and not test:
        raise DataError(
            "There is no test case with a label or a class. Fix: mark some as test cases, or let cases be drawn "
            "(in a task file splits: {folds: 4}, or no splits)."
        )
    if scheme == "official":
        splits = [_official(labelled, counts, seed)]
    elif scheme == "cv":
        splits = _cross_validation(labelled, counts, seed, folds)
    else:
        splits = [_random(labelled, counts, seed)]
    for split in splits:
        _check_classes(split, labelled, names)
    return splits


def _fifths(available: int, parts: int) -> Counts:
    """Return three fifths, one fifth and one fifth of ``available`` (of two parts: four and one)."""
    fifth = max(1, round(available / 5))
    return (max(1, available - (parts - 1) * fifth), fifth, fifth)


def _random(cases: Sequence[SplitCase], counts: Counts | None, seed: int) -> Split:
    order = _spread(_subject_targets(cases), seed, "random")
    counts = counts or _fifths(len(order), 3)
    train, val, test = _scale(counts, len(order))
    return Split(
        name="random",
        train=_ids(cases, order[:train]),
        val=_ids(cases, order[train : train + val]),
        test=_ids(cases, order[train + val : train + val + test]),
        note=_note(counts, (train, val, test), len(order)),
    )


def _official(cases: Sequence[SplitCase], counts: Counts | None, seed: int) -> Split:
    parts: dict[str, list[SplitCase]] = {"train": [], "val": [], "test": []}
    for case in cases:
        parts[case.subset or "train"].append(case)
    inside = parts["test"]
    for one, other in (("train", "test"), ("val", "test"), ("train", "val")):
        shared = sorted({case.subject for case in parts[one]} & {case.subject for case in parts[other]})
        if shared:
            names = {"train": "training", "val": "validation", "test": "test"}
            raise DataError(
                f"Subjects {', '.join(shared[:5])} are in the release's {names[one]} and {names[other]} "
                'subsets. Fix: correct the subjects, or use the scheme "cv".'
            )
    if parts["val"]:
        if not parts["train"]:
            raise DataError("The release's training subset has no labelled case. Fix: add some.")
        ids = {part: tuple(case.id for case in members) for part, members in parts.items()}
        note = f"as given: {_text([len(members) for members in parts.values()])} cases"
        return Split("official", ids["train"], ids["val"], ids["test"], note)
    outside = parts["train"]
    order = _spread(_subject_targets(outside), seed, "official")
    tested = _spread(_subject_targets(inside), seed, "official test")
    counts = counts or (*_fifths(len(order), 2)[:2], len(tested))
    tested = tested[: counts[2]]
    train, val = _scale(counts[:2], len(order))
    return Split(
        name="official",
        train=_ids(outside, order[:train]),
        val=_ids(outside, order[train : train + val]),
        test=_ids(inside, tested),
        note=_note(counts, (train, val, len(tested)), len(order) + len(_subject_targets(inside))),
    )


def _cross_validation(
    cases: Sequence[SplitCase], counts: Counts | None, seed: int, folds: int
) -> list[Split]:
    targets = _subject_targets(cases)
    order = _spread(targets, seed, "cv")
    counts = counts or (3, 1, 1)  # only the proportion of the first two is used
    if folds < 2 or len(order) < max(folds, 3):
        raise DataError(
            f"Cross-validation with {count(folds, 'fold')} needs at least {max(folds, 3)} labelled subjects, "
            f"and 2 folds; here {are(len(order))} {count(len(order), 'subject')}. Fix: change data.folds, or add cases."
        )
    splits = []
    for fold in range(folds):
        low, high = len(order) * fold // folds, len(order) * (fold + 1) // folds
        others = {subject: targets[subject] for subject in sorted(order[:low] + order[high:])}
        rest = _spread(others, seed, "cv", fold)
        train, val = _scale(counts[:2], len(rest), fill=True)
        got = (train, val, high - low)
        split = Split(
            name=f"fold{fold}",
            train=_ids(cases, rest[val:]),
            val=_ids(cases, rest[:val]),
            test=_ids(cases, order[low:high]),
            note=f"fold {fold + 1} of {folds}: {_note(counts, got, len(order))}",
        )
        splits.append(split)
    return splits


def splits_of_file(
    cases: Sequence[SplitCase],
    path: Path,
    counts: Counts | None = None,
    seed: int = 0,
    names: Mapping[int, str] | None = None,
    skipped: Collection[str] = (),
) -> list[Split]:
    """Return the splits of a file of nnU-Net's form: a list of folds ``{"train": [ids], "val": [ids]}``.

    nnU-Net scores the ``val`` part of a fold, so it is tested here; validation is taken from the ``train`` part, whole
    subjects, in the proportion of ``counts``. Where a fold has a part ``test`` as well, all three are taken as they are.

    Args:
        cases: of one cohort; those that the file does not mention are not used, and named in a warning.
        path: the file (``splits_final.json``).
        counts: see :func:`make_splits`; only the proportion of the first two matters.
        seed: decides which training subjects are for validation.
        names: of the classes, for messages.
        skipped: ids of bad cases that were left out.

    Raises:
        DataError: no such file, ids of no labelled case, a person in two parts of a fold, an empty part, or a part
            without any case of some class.
    """
    labelled = {case.id: case for case in cases if case.labelled}
    folds = _read_folds(path)
    listed = {case_id for fold in folds for ids in fold.values() for case_id in ids}
    unknown = sorted(listed - labelled.keys() - set(skipped))
    if unknown:
        raise DataError(
            f"{path} names {count(len(unknown), 'case')} that the data do not have, or not with a label: "
            f"{', '.join(unknown[:10])}{', ...' * (len(unknown) > 10)}. Fix: give the file that belongs to these data."
        )
    others = sorted(labelled.keys() - listed)
    if others:
        shown = ", ".join(others[:5]) + ", ..." * (len(others) > 5)
        logger.warning(
            "%s does not mention %s, not used: %s", path, count(len(others), "labelled case"), shown
        )
    splits = []
    for number, fold in enumerate(folds):
        ids = {part: tuple(i for i in fold.get(part, ()) if i in labelled) for part in PARTS}
        note = f"fold {number + 1} of {len(folds)} of {path.name}"
        _check_people(ids, labelled, f"{path}, fold {number}")
        if "test" not in fold:
            known = [labelled[i] for i in ids["train"]]
            order = _spread(_subject_targets(known), seed, "file", number)
            train, val = _scale((counts or (3, 1, 1))[:2], len(order), fill=True)
            note = f"{note}; {train} and {val} of {len(order)} training subjects for training and validation"
            ids = {"train": _ids(known, order[val:]), "val": _ids(known, order[:val]), "test": ids["val"]}
        for part in PARTS:
            if not ids[part]:
                raise DataError(f"{path}: fold {number} has no case for {part}. Fix: correct the file.")
        splits.append(Split(f"fold{number}", ids["train"], ids["val"], ids["test"], note))
        _check_classes(splits[-1], list(labelled.values()), names)
    return splits


def _read_folds(path: Path) -> list[dict[str, list[str]]]:
    """Read a list of ``{"train": [ids], "val": [ids]}``, perhaps with ``test``."""
    try:
        folds = parse_json(read_bytes(path, MOST_JSON_BYTES))
    except ReadError as error:
        raise DataError(f"{error} Fix: name nnU-Net's {SPLITS_FINAL}.") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}. Fix: correct it.") from error
    sound = isinstance(folds, list) and bool(folds) and all(
        isinstance(fold, dict) and {"train", "val"} <= fold.keys() <= set(PARTS)
        and all(isinstance(ids, list) and all(isinstance(i, str) for i in ids) for ids in fold.values())
        for fold in folds
    )  # fmt: skip
    if not sound:
        raise DataError(
            f'{path} is not a list of folds {{"train": [case ids], "val": [case ids]}}. '
            f"Fix: name nnU-Net's {SPLITS_FINAL}."
        )
    return [dict(fold) for fold in folds]


def _check_people(parts: Mapping[str, Sequence[str]], cases: Mapping[str, SplitCase], where: str) -> None:
    """Refuse parts that share a person."""
    place: dict[str, tuple[str, str]] = {}
    shared = []
    for part, ids in parts.items():
        for case_id in ids:
            other, case = place.setdefault(cases[case_id].subject, (part, case_id))
            if other != part:
                shared.append(f"{cases[case_id].subject} ({case} for {other}, {case_id} for {part})")
    if shared:
        raise DataError(
            f"{where}: {count(len(shared), 'image')} of a person who is in another part, too: "
            f"{'; '.join(shared[:5])}{'; ...' * (len(shared) > 5)}. Fix: correct the file, or leave it out: "
            "splits that are drawn keep each person in one part."
        )


def _subject_targets(cases: Sequence[SplitCase]) -> dict[str, _Target]:
    """Return subject -> class or classes, sorted by subject.

    Of several images the highest class (a patient once positive), and all classes that do not exclude
    each other.
    """
    targets: dict[str, _Target] = {}
    for case in sorted(cases, key=lambda case: (case.subject, case.id)):
        known = targets.get(case.subject)
        if case.classes is not None:
            targets[case.subject] = tuple(
                sorted({*case.classes, *(known if isinstance(known, tuple) else ())})
            )
        else:
            both = [target for target in (known, case.target) if isinstance(target, int)]
            targets[case.subject] = max(both) if both else known
    return targets


def _spread(targets: Mapping[str, _Target], seed: int, *keys: int | str) -> list[str]:
    """Return the subjects in random order with the classes evenly spread.

    Any stretch of the result holds every class in the proportion of the whole, give or take one: the
    j-th of n subjects of a class stands at position (j + 1/2) / n of the whole.
    """
    from ssl3d.rng import derive_seed  # imports torch, which listings must not pay for

    # Sorted by hash, not shuffled by a generator: the order is the same under every version of NumPy.
    draw = {subject: derive_seed(seed, "split", *keys, subject) for subject in targets}
    groups: dict[_Target, list[str]] = {}
    for subject in sorted(targets, key=lambda subject: draw[subject]):
        groups.setdefault(targets[subject], []).append(subject)
    places = [
        ((j + 0.5) / len(group), draw[subject], subject)
        for group in groups.values()
        for j, subject in enumerate(group)
    ]
    return [subject for _, _, subject in sorted(places)]


def _scale(counts: Sequence[int], available: int, fill: bool = False) -> list[int]:
    """Return ``counts``, scaled down in proportion where there are fewer; at least one each.

    Args:
        counts: wanted.
        available: subjects.
        fill: scale up too, so that the sum is ``available``.

    Raises:
        DataError: fewer subjects than parts.
    """
    if available < len(counts):
        raise DataError(
            f"{count(available, 'labelled subject')} cannot be split into {' and '.join(PARTS[: len(counts)])} "
            f"({_text(counts)} wanted): there must be at least {len(counts)}. Fix: add cases."
        )
    if sum(counts) <= available and not fill:
        return list(counts)
    shares = [available * count / sum(counts) for count in counts]
    scaled = [max(1, int(share)) for share in shares]
    while sum(scaled) > available:  # the minimum of one was too much somewhere: take from the largest part
        scaled[scaled.index(max(scaled))] -= 1
    while sum(scaled) < available:  # largest remainder
        behind = [share - have for share, have in zip(shares, scaled, strict=True)]
        scaled[behind.index(max(behind))] += 1
    return scaled


def _ids(cases: Sequence[SplitCase], subjects: Sequence[str]) -> tuple[str, ...]:
    wanted = set(subjects)
    return tuple(case.id for case in cases if case.subject in wanted)


def _text(counts: Sequence[int]) -> str:
    return "/".join(map(str, counts))


def _note(wanted: Sequence[int], got: Sequence[int], available: int) -> str:
    text = f"{_text(got)} of {available} subjects"
    return text if tuple(wanted) == tuple(got) else f"{text} (wanted: {_text(wanted)})"


def _check_classes(split: Split, cases: Sequence[SplitCase], names: Mapping[int, str] | None = None) -> None:
    """Refuse a part that lacks a class: its score would mean nothing."""

    def name(number: int) -> str:
        return f'"{names[number]}"' if names and number in names else str(number)

    several = {case.id: set(case.classes) for case in cases if case.classes is not None}
    for number in sorted(set().union(*several.values())):
        for part in PARTS:
            having = [number in several[case_id] for case_id in getattr(split, part) if case_id in several]
            if not any(having) or all(having):
                lack = "no case of" if not any(having) else "no case without"
                raise DataError(
                    f"{split.name}: the {len(having)} cases for {part} hold {lack} class {name(number)} "
                    f"({split.note}). Fix: add such cases, use fewer folds, or leave the class out."
                )
    targets = {case.id: case.target for case in cases if case.target is not None}
    classes = set(targets.values())
    if not classes:
        return
    if len(classes) == 1:
        raise DataError(
            f"Every labelled case is of class {name(classes.pop())}. Fix: add cases of another class."
        )
    for part in PARTS:
        ids = getattr(split, part)
        absent = sorted(classes - {targets[case_id] for case_id in ids if case_id in targets})
        if absent:
            raise DataError(
                f"{split.name}: the {len(ids)} cases for {part} hold no case of class {name(absent[0])} "
                f"({split.note}). Fix: add cases of that class, or use fewer folds."
            )


def nested_fraction(split: Split, cases: Sequence[SplitCase], fraction: float, seed: int = 0) -> Split:
    """Return ``split`` with a part of its training subjects, for label efficiency.

    Smaller parts lie within larger ones; validation and test stay as they are.

    Args:
        split: the whole.
        cases: of the cohort; for their subjects and classes.
        fraction: of the training subjects, in (0, 1]; at least one is kept.
        seed: another seed, another choice.

    Raises:
        DataError: a fraction outside (0, 1], or a part without any case of some class.
    """
    if not 0 < fraction <= 1:
        raise DataError(f"Cannot take a fraction of {fraction} of the labels. Fix: give 0 < fraction <= 1.")
    if fraction == 1:
        return split
    trained = set(split.train)
    known = [case for case in cases if case.id in trained]
    order = _spread(_subject_targets(known), seed, "fraction")
    kept = max(1, round(fraction * len(order)))
    train = set(_ids(known, order[:kept]))
    part = replace(
        split,
        train=tuple(i for i in split.train if i in train),
        note=f"{split.note}; {kept} of {len(order)} training subjects",
    )
    _check_classes(part, [case for case in cases if case.labelled])
    return part


def save_splits(path: Path, splits: Sequence[Split]) -> None:
    """Write splits as JSON, atomically; a file that says the same already is left alone, and may be read-only."""
    with suppress(DataError):
        if load_splits(path) == list(splits):
            return
    write_json(Path(path), {"format": 1, "splits": [asdict(split) for split in splits]})


def load_splits(path: Path) -> list[Split]:
    """Read what :func:`save_splits` wrote.

    Raises:
        DataError: missing, or not such a file.
    """
    try:
        stored = read_json(Path(path))["splits"]
        return [
            Split(s["name"], tuple(s["train"]), tuple(s["val"]), tuple(s["test"]), s["note"]) for s in stored
        ]
    except (ReadError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} does not hold splits ({error}). Fix: delete it; it will be made again."
        ) from error
