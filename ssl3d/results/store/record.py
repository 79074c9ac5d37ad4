"""Records: encoding, decoding and checks."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic_core import from_json

from ssl3d.errors import DataError
from ssl3d.results.store.model import CALL, RECORD, problem_of, problem_of_cases

Record = dict[str, Any]


SCHEMA = 2
"""Raised when records are kept in another way, or when all numbers change: 2 since Philox draws them."""


_HASH_KEY = "record_sha256"


_HASH_DIGITS = 20


_PREFIX = f'{{"{_HASH_KEY}":"'.encode()


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical_json(value: Any) -> str:
    """Return the one JSON text of ``value``: sorted keys, no spaces.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not have.

    >>> canonical_json({"b": [1, 2.0], "a": None})
    '{"a":null,"b":[1,2.0]}'
    """
    return _CANONICAL.encode(value)


def identity_hash(identity: Mapping[str, Any]) -> str:
    """Return 20 hexadecimal digits of the SHA-256 of ``identity`` in canonical JSON.

    >>> identity_hash({"task": "shc", "seed": 0}) == identity_hash({"seed": 0, "task": "shc"})
    True
    """
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:_HASH_DIGITS]


def encode_record(record: Mapping[str, Any]) -> bytes:
    """Return the bytes of a record's file, its content hash included.

    Raises:
        DataError: a field is missing or of the wrong type, or a number is NaN or infinite.
    """
    body = {key: value for key, value in record.items() if key != _HASH_KEY}
    problem = _problem(body)
    if problem:
        raise DataError(f"A record cannot be written: {problem}. {_describe(body)}")
    try:
        text = canonical_json(body)
    except ValueError:
        path = _first_not_finite(body)
        raise DataError(
            f"A record cannot be written: {path} is not a finite number. {_describe(body)} "
            "Write null for a metric that does not exist, for example for an empty structure."
        ) from None
    problem = _problem(json.loads(text), typed=True)  # as it will be read: a tuple is a list then
    if problem:
        raise DataError(f"A record cannot be written: {problem}. {_describe(body)}")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return _PREFIX + f'{digest}",{text[1:]}\n'.encode()


class Cases(Sequence[Any]):
    """The ``per_case`` list of a record, parsed when it is first looked at.

    It is nearly all of a record's text, and a table of means needs none of it. Only for the bytes of
    a record whose hash was checked; who wrote the hash may have written other cases, too.

    Args:
        data: JSON of the list.
        metric: of the record.

    Attributes:
        where: what an error names; set by who knows the file.
    """

    def __init__(self, data: bytes, metric: str) -> None:
        self._data: bytes | None = data
        self._cases: list[Any] = []
        self._metric, self.where = metric, "a record"

    def _parsed(self) -> list[Any]:
        """Return the cases.

        Raises:
            DataError: they are none.
        """
        if self._data is not None:
            cases = _loads(self._data, self.where)
            problem = problem_of_cases(cases, self._metric)
            if problem is not None:
                raise DataError(f"{self.where}: {problem}; delete it, and bench computes it again")
            self._cases, self._data = cases, None
        return self._cases

    def has_text_of(self, other: Cases) -> bool:
        """Whether both are the same text that was not parsed yet; what was may be equal all the same."""
        return self._data is not None and self._data == other._data

    def __getitem__(self, place: Any) -> Any:
        return self._parsed()[place]

    def __len__(self) -> int:
        return len(self._parsed())

    def __iter__(self) -> Iterator[Any]:
        return iter(self._parsed())

    def __eq__(self, other: object) -> bool:
        return self._parsed() == (other._parsed() if isinstance(other, Cases) else other)

    __hash__ = None  # type: ignore[assignment]


_CASES, _AFTER_LIST, _IDENTITY_TEXT = b'"per_case":[', b'],"', '"identity":{'
_AFTER_CASES = (b'],"preset":', b'],"predictions":')
_RUN_TEXT, _AFTER_RUN = '"run":{', ',"schema":'
_DECODER = json.JSONDecoder()
_APART = secrets.token_hex(16)
"""Stands in the place of a value that is parsed apart; nobody who writes a file knows it."""
_RUNS: dict[str, Any] = {}
"""Calls of a bench by their text, at most :data:`_MOST_RUNS`."""
_MOST_RUNS = 100


def _decode_without_cases(data: bytes) -> tuple[Record, str] | None:
    """Return the record in ``data``, checked, with :class:`Cases`, and the hash of its identity; None where that
    needs a whole look.

    The text between the first ``"per_case":[`` and the next ``],"``, which must go on with ``preset":`` or
    ``predictions":``, is set aside and a random text put in its place. What is left is JSON with that text as its
    top-level ``per_case`` only if what was set aside began as that very value and ended at the top level too: else
    brackets would not match, or the random text would stand elsewhere. It holds no ``],"``, so it does not reach over
    another key. Strings cannot deceive, since their quotes are escaped.

    The identity is set aside and checked in the same way; its own text, which is canonical in a file as
    :func:`encode_record` writes it, gives its hash without being encoded again. So is ``run``, of which thousands of
    records have the same text: they share one value.
    """
    stored = data[len(_PREFIX) : len(_PREFIX) + 64].decode("ascii", "replace")
    start = data.find(_CASES) + len(_CASES) - 1
    end = data.find(_AFTER_LIST, start) + 1
    if start < len(_CASES) or not data.startswith(_AFTER_CASES, end - 1):
        return None
    if not _hash_of_bytes_matches(data, stored):
        return None
    try:
        text = (data[:start] + f'"{_APART}"'.encode() + data[end:]).decode()
        place = text.find(_IDENTITY_TEXT) + len(_IDENTITY_TEXT) - 1
        identity, after = _DECODER.raw_decode(text, place)
        rest, run = _without_run(text[after:])
        record = from_json(f'{text[:place]}"{_APART}"{rest}', allow_inf_nan=False, cache_strings="keys")
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("per_case") != _APART or record.get("identity") != _APART:
        return None
    if record.get("schema") != SCHEMA or "scored" not in record:
        return None
    record["identity"], record["per_case"] = identity, Cases(data[start:end], str(record.get("metric")))
    if run is not None:
        if record.get("run") != _APART:
            return None
        record["run"] = None  # has been checked
    if _problem(record, typed=True) is not None:
        return None
    if run is not None:
        record["run"] = run
    return record, hashlib.sha256(text[place:after].encode()).hexdigest()[:_HASH_DIGITS]


def _without_run(text: str) -> tuple[str, Any]:
    """Return the end of a record with its ``run`` set aside, and that, checked, which nobody is to change; or all of
    the text, and None.

    Raises:
        ValueError: it is no JSON.
    """
    start = text.find(_RUN_TEXT) + len(_RUN_TEXT) - 1
    end = text.find(_AFTER_RUN, start)
    if start < len(_RUN_TEXT) or end < 0:
        return text, None
    own = text[start:end]
    run = _RUNS.get(own)
    if run is None:
        run = from_json(own, allow_inf_nan=False)
        if problem_of(CALL, run) is not None:
            return text, None
        if len(_RUNS) >= _MOST_RUNS:
            _RUNS.clear()
        _RUNS[own] = run
    return f'{text[:start]}"{_APART}"{text[end:]}', run


def _loads(data: bytes, where: str = "") -> Any:
    """Return what a JSON text says.

    Raises:
        DataError: it is none, or nested too deeply.
    """
    try:
        return from_json(data, allow_inf_nan=False)  # bounds how deep it is nested
    except ValueError as error:
        raise DataError(
            f"{where}{': ' if where else ''}not valid JSON, perhaps truncated ({error}); delete it, and bench computes it "
            "again"
        ) from None


def decode_record(data: bytes) -> Record:
    """Return the record in ``data``, checked: its hash, its schema and the fields that tables need.

    Args:
        data: of the file.

    Raises:
        DataError: what is wrong and what can be done, without the file's name.
    """
    record = _loads(data)
    if not isinstance(record, dict):
        raise DataError(f"a {type(record).__name__}, not a record; delete it")
    schema = record.get("schema")
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        fix = "update ssl3d to read it" if newer else "delete it, and bench computes it again"
        raise DataError(f"schema {schema!r}, but this ssl3d reads schema {SCHEMA}; {fix}")
    stored = record.get(_HASH_KEY)
    if not (isinstance(stored, str) and _hash_matches(data, record, stored)):
        raise DataError(
            f"its content does not match its {_HASH_KEY}, so it was altered after it was written; "
            "restore it, or delete it, and bench computes it again"
        )
    problem = _problem(record, typed=True)
    if problem:
        raise DataError(f"{problem}; delete it, and bench computes it again")
    return record


def _hash_of_bytes_matches(data: bytes, stored: str) -> bool:
    """Return whether ``data`` is a file as :func:`encode_record` writes it, its hash included."""
    if not data.startswith(_PREFIX):
        return False
    start = len(_PREFIX) + len(stored) + 2  # behind the closing quote and the comma
    digest = hashlib.sha256(b"{")
    digest.update(memoryview(data)[start : len(data) - data.endswith(b"\n")])
    return digest.hexdigest() == stored


def _hash_matches(data: bytes, record: Record, stored: str) -> bool:
    if _hash_of_bytes_matches(data, stored):
        return True
    try:
        text = canonical_json({key: value for key, value in record.items() if key != _HASH_KEY})
    except (ValueError, RecursionError):
        return False
    return hashlib.sha256(text.encode()).hexdigest() == stored


_IDENTITY_FIELDS: dict[str, type | tuple[type, ...]] = {
    "method": str, "method_config": dict, "task": str, "split": str, "mode": str, "seed": int,
}  # fmt: skip


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "identity": dict, "method": dict, "metric": str, "score": (int, float), "per_case": Sequence,
}  # fmt: skip


def _problem(record: Mapping[str, Any], typed: bool = False) -> str | None:
    """Return what keeps ``record`` from standing in a table, or None.

    Args:
        record: as it was parsed, or is to be written.
        typed: look at the types of all fields.
    """
    if record.get("schema") != SCHEMA:
        return f"schema is {record.get('schema')!r}, not {SCHEMA}"
    for field, kind in _FIELDS.items():
        if not isinstance(record.get(field), kind):
            return f'the field "{field}" is missing or not a {_kind(kind)}'
    for field, kind in _IDENTITY_FIELDS.items():
        if not isinstance(record["identity"].get(field), kind):
            return f'the field "identity.{field}" is missing or not a {_kind(kind)}'
    if not isinstance(record["method"].get("title"), str):
        return 'the field "method.title" is missing or not a str'
    cases = record["per_case"]
    if not isinstance(cases, Cases) and not all(isinstance(case, dict) and "case" in case for case in cases):
        return 'an entry of "per_case" has no "case"'
    if isinstance(record["score"], float) and not math.isfinite(record["score"]):
        return f"score = {record['score']}: not one test case could be scored"
    if not typed:
        return None
    return problem_of(RECORD, record) or (
        None if isinstance(cases, Cases) else problem_of_cases(cases, record["metric"])
    )


def _kind(kind: type | tuple[type, ...]) -> str:
    return " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))


def _describe(record: Mapping[str, Any]) -> str:
    identity = record.get("identity")
    if not isinstance(identity, dict):
        return "It has no identity."
    return (
        f"Cell: {', '.join(f'{k} {identity.get(k)}' for k in ('method', 'task', 'mode', 'seed', 'split'))}."
    )


def _first_not_finite(value: Any, path: str = "") -> str | None:
    if isinstance(value, float):
        return None if math.isfinite(value) else path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else ()
    )
    for key, item in items:
        found = _first_not_finite(item, f"{path}.{key}" if path else str(key))
        if found:
            return found
    return None


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Pause the collection of cycles: over millions of small objects that all stay, it frees nothing
    and takes as long as the work itself."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
