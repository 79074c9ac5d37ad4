"""Who is on which image: a pattern that takes the person from a name, and a guess where nobody gave one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ssl3d.errors import ConfigError, DataError, count

_VISIT_WORDS = (
    "visit|vis|v|session|sess|ses|time-?point|time|tp|t|scan|exam|series|run|rep|frame|phase|"
    "day|d|week|w|month|mon|mo|m|year|yr|y|follow-?up|fu"
)
_BARE_WORDS = (
    "baseline|base|bl|follow-?up|fu|pre-?op|post-?op|pre|post|initial|final|test|retest|prior|current|"
    "inspiration|expiration|insp|exp|arterial|venous|portal|native|delayed|"
    "t1w?|t2w?|t1c|t1n|t1gd|t1ce|t2f|flair|pdw?|dwi|adc|swi|ct|cta|mr|mri|pet|left|right|l|r"
)
_DATE = r"(?:19|20)\d\d[-_.]?[01]\d[-_.]?[0-3]\d"
_SEPARATOR = r"[_.\s/-]"

# Of the first the guess is surest. Each has one group, the person, which holds a digit (names of groups of patients,
# such as Normal_1, have none), except for a folder of its own.
_WORD = rf"{_SEPARATOR}?(?<![a-z])(?:{_VISIT_WORDS})(?=[-_]?\d)|{_SEPARATOR}(?:{_BARE_WORDS})$"
_MARKED = (
    r"^(sub-[^_/]+)",
    rf"^(.*?\d.*?){_SEPARATOR}{_DATE}",
    rf"(?i)^(.*?\d.*?)(?:{_WORD})",
)
_FOLDERS = (r"^([^/]*\d[^/]*)/.+$",)
_NUMBERED = (
    rf"^(.*\d.*){_SEPARATOR}[A-Za-z]*\d+$",
    r"^(.*\d)[A-Da-d]$",
)
_PLAIN = tuple(rf"^(.*\d)\d{{{width}}}$" for width in (3, 2, 1))


@dataclass(frozen=True)
class Guess:
    """What names of images look like.

    Attributes:
        pattern: takes the person from every one of the names.
        people: how many there are then.
        example: names of one person.
    """

    pattern: str
    people: int
    example: tuple[str, ...]


def subject_of(name: str, pattern: str) -> str | None:
    """Return the person that ``pattern`` takes from ``name``; None where it does not match.

    The group called ``subject``, else all groups joined by ``-``, else the whole match.

    >>> subject_of("study_0102", r"study_(\\d\\d)"), subject_of("a/s1_t2", r"^(\\w)/(s\\d)"), subject_of("x", r"\\d")
    ('01', 'a-s1', None)
    """
    found = re.search(pattern, name)
    if found is None:
        return None
    groups = found.groupdict()
    if "subject" in groups:
        return groups["subject"] or None
    return "-".join(part for part in found.groups() if part) or None if found.groups() else found[0] or None


def check_pattern(pattern: str) -> str:
    """Return ``pattern`` if it is a regular expression.

    Raises:
        ConfigError: it is none.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f'The subject pattern "{pattern}" is not a regular expression ({error}). '
            r'Write, for example, "^(sub-\d+)": what stands in parentheses is the person.'
        ) from error
    return pattern


def subjects_of(names: Sequence[str], pattern: str) -> list[str]:
    """Return the person of each name.

    Raises:
        DataError: lists the names that ``pattern`` does not match.
        ConfigError: ``pattern`` is no regular expression.
    """
    check_pattern(pattern)
    people = [subject_of(name, pattern) for name in names]
    missed = [name for name, person in zip(names, people, strict=True) if person is None]
    if missed:
        guess = guess_people(names)
        hint = f' "{guess.pattern}" matches all of them.' if guess else ""
        raise DataError(
            f'The subject pattern "{pattern}" takes no person from {count(len(missed), "name")} of {len(names)}: '
            f"{', '.join(missed[:10])}{', ...' * (len(missed) > 10)}. Fix: correct the pattern.{hint}"
        )
    return [person for person in people if person is not None]


def guess_people(names: Sequence[str]) -> Guess | None:
    """Return a pattern if names look like several images of one person (visits, contrasts, sides), else None.

    A pattern is believed where it matches every name, takes more than one person from them, and at least one person
    more than once; where nothing but digits speaks for it, only if the numbers of a person's images are few, begin
    alike and repeat from person to person, as consecutive numbers of people do not.
    """
    rules = ((_MARKED, _repeats), (_FOLDERS, _few), (_NUMBERED, _visits), (_PLAIN, _coded))
    for patterns, believable in rules:
        for pattern in patterns:
            people = [subject_of(name, pattern) for name in names]
            missed = sum(person is None for person in people)
            if patterns is _MARKED and 0 < missed < len(names):  # the others are people by their whole names
                pattern = f"{pattern}|^(.+)$"
                people = [subject_of(name, pattern) for name in names]
            elif missed:
                continue
            known = [person for person in people if person is not None]
            rests = [name[len(person) :] for name, person in zip(names, known, strict=True)]
            if believable(known, rests):
                most = Counter(known).most_common(1)[0][0]
                pattern = _shorter(pattern, names, known)
                example = tuple(n for n, person in zip(names, known, strict=True) if person == most)
                return Guess(pattern, len(set(known)), example)
    return None


def _shorter(pattern: str, names: Sequence[str], people: Sequence[str]) -> str:
    """Return a pattern that says the same of these names with those marks only that occur, or ``pattern``."""
    marks = []
    for name, person in zip(names, people, strict=True):
        found = re.match(rf"(?i){_SEPARATOR}{_DATE}|{_WORD}", name[len(person) :]) if name != person else None
        if found:
            dated = re.fullmatch(rf"{_SEPARATOR}{_DATE}", found[0])
            marks.append(rf"{re.escape(found[0][0])}(?:19|20)\d\d" if dated else re.escape(found[0].lower()))
    several = "|".join(dict.fromkeys(marks))
    for short in (rf"(?i)^(.+?)(?:{several})", rf"(?i)^(.+?)(?:{several})|^(.+)$"):
        if (
            marks
            and len(short) < len(pattern)
            and [subject_of(name, short) for name in names] == list(people)
        ):
            return short
    return pattern


def may_be_one_person(one: str, other: str) -> bool:
    """Whether two names differ in what marks a visit, a contrast or a side only.

    >>> may_be_one_person("p1_T1", "p1_T2"), may_be_one_person("p1_T1", "p2_T1"), may_be_one_person("p1", "p2")
    (True, False, False)
    """
    return any(
        person is not None and person == subject_of(other, pattern)
        for pattern in _MARKED
        for person in [subject_of(one, pattern)]
    )


def _repeats(people: Sequence[str], rests: Sequence[str]) -> bool:
    return 1 < len(set(people)) < len(people)


def _few(people: Sequence[str], rests: Sequence[str]) -> bool:
    """Whether there are at least as many people as images of one: sites and groups of patients hold more."""
    return _repeats(people, rests) and max(Counter(people).values()) <= len(set(people))


def _visits(people: Sequence[str], rests: Sequence[str]) -> bool:
    """Whether, besides, the same few endings come again and again."""
    return _few(people, rests) and len(set(rests)) <= len(people) / 2


def _coded(people: Sequence[str], rests: Sequence[str]) -> bool:
    """Whether the last digits count images and not people: few, from one number on, for almost everybody."""
    if not _visits(people, rests):
        return False
    digits = [int(rest) for rest in rests]
    first: dict[str, int] = {}
    for person, number in zip(people, digits, strict=True):
        first[person] = min(number, first.get(person, number))
    several = sum(number > 1 for number in Counter(people).values())
    start, agree = Counter(first.values()).most_common(1)[0]
    room = 10 ** len(rests[0]) / 2
    return (
        start <= 1
        and agree >= 0.8 * len(first)
        and several >= 0.5 * len(first)
        and len(set(digits)) <= room
        and max(digits) < room + 1
    )
