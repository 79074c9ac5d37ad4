"""Types of the fields of records and failures: checked once, when a file is read, and relied upon from then on.

A field that is not named here may be there, too, and means nothing to a reader.
"""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

_STRICT = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, regex_engine="python-re")

Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Number = Annotated[float, Field(ge=-1e300, le=1e300)]
Plain = Number | Whole | str | bool | None
Text = Annotated[str, Field(max_length=4096)]
Share = Annotated[float, Field(gt=0, le=1)]
Share0 = Annotated[float, Field(ge=0, le=1)]
_FILE = (
    r"^(?!/)(?!.*(?:^|/)\.\.(?:/|$))[^\\\x00]+$"  # below the store: neither absolute, nor through a parent
)
Inside = Annotated[str, Field(pattern=_FILE, max_length=4096)]


@with_config(_STRICT)
class Named(TypedDict):
    """A backbone."""

    name: Text


@with_config(_STRICT)
class Budget(TypedDict):
    """Of a pretraining, as far as a table speaks of it."""

    lr: NotRequired[Number | None]
    steps: NotRequired[Whole | None]


@with_config(_STRICT)
class Pretraining(TypedDict):
    """What decides the weights besides method and backbone."""

    data: NotRequired[Text | None]
    budget: NotRequired[Budget]


@with_config(_STRICT)
class Match(TypedDict):
    """What methods with other steps each have in common."""

    by: Text
    steps: Whole


@with_config(_STRICT)
class Identity(TypedDict):
    """What decides a number."""

    method: Text
    method_config: dict[str, Any]
    task: Text
    split: Text
    mode: Text
    seed: Whole
    backbone: NotRequired[Named | None]
    pretrain: NotRequired[Pretraining | None]
    pretrain_seed: NotRequired[Whole | None]
    pretrain_step: NotRequired[Whole]
    task_data: NotRequired[Text | None]
    split_cases: NotRequired[Text | None]
    label_fraction: NotRequired[Share]
    budget: NotRequired[dict[str, Any]]
    match: NotRequired[Match | None]
    weights: NotRequired[Text | None]


@with_config(_STRICT)
class Row(TypedDict):
    """What a table says of a method."""

    title: Text
    trains: NotRequired[Text | None]
    notes: NotRequired[list[Text]]


@with_config(_STRICT)
class Kept(TypedDict):
    """Files of a kept segmentation."""

    case: str | Whole
    prediction: Inside
    image: Inside
    truth: Inside


@with_config(_STRICT)
class LeftOut(TypedDict):
    """Bad cases."""

    task: NotRequired[list[dict[str, Plain]]]
    pretraining: NotRequired[list[dict[str, Plain]]]


@with_config(_STRICT)
class Code(TypedDict):
    """Hashes of code."""

    pretrain: NotRequired[Text | None]
    downstream: NotRequired[Text | None]
    problem: NotRequired[Text | None]
    pretrain_by_step: NotRequired[dict[str, Text]]


@with_config(_STRICT)
class Point(TypedDict):
    """One validation."""

    step: Whole
    score: Number


@with_config(_STRICT)
class Cost(TypedDict):
    """What a number has cost."""

    pretrain_steps: NotRequired[Number | None]
    pretrain_seconds: NotRequired[Number | None]
    voxels_seen: NotRequired[Number | None]
    pretrain_parameters: NotRequired[Number | None]
    pretrain_device: NotRequired[Text | None]
    downstream_seconds: NotRequired[Number | None]
    peak_memory_mib: NotRequired[Number | None]
    parameters_trained: NotRequired[Number | None]
    device: NotRequired[Text | None]


@with_config(_STRICT)
class Environment(TypedDict):
    """Where a number came from."""

    versions: NotRequired[dict[str, Text | None] | None]
    git_commit: NotRequired[Text | None]


@with_config(_STRICT)
class Settings(TypedDict):
    """The preset with all that was given; more options stand beside these."""

    preset: Text
    data: dict[str, Any]
    phantoms: dict[str, Any]


@with_config(_STRICT)
class Call(TypedDict):
    """How the bench was called."""

    data: Text
    task_data: Text | None
    checkpoint: Text | None
    task_file: NotRequired[str | None]
    settings: Settings
    overrides: dict[str, Any]


@with_config(_STRICT)
class Pretext(TypedDict):
    """Whether the pretext task was learned."""

    learned: NotRequired[bool | None]
    start: NotRequired[Number | None]
    end: NotRequired[Number | None]
    chance: NotRequired[Number | None]
    held_back: NotRequired[Text | None]


@with_config(_STRICT)
class Head(TypedDict):
    """A record or a failure, without what was found out."""

    schema: Whole
    identity: Identity
    method: Row
    metric: Text
    preset: NotRequired[Text | None]


@with_config(_STRICT)
class RecordModel(Head):
    """A record without the metrics of its cases."""

    score: Number
    scored: NotRequired[Whole | None]
    excluded: NotRequired[dict[str, Whole] | None]
    constant_output: NotRequired[bool | None]
    left_out: NotRequired[LeftOut | None]
    overlap: NotRequired[list[dict[str, Any]] | None]
    twins: NotRequired[list[dict[str, Any]] | None]
    validation: NotRequired[list[Point] | None]
    best_step: NotRequired[Whole | None]
    cost: NotRequired[Cost | None]
    environment: NotRequired[Environment | None]
    pretrain_environment: NotRequired[Environment | None]
    code: NotRequired[Code | None]
    run: NotRequired[Call | None]
    created: NotRequired[Text | None]
    checkpoint: NotRequired[Text | None]
    fingerprint_of_weights: NotRequired[Text | None]
    pretext: NotRequired[Pretext | None]
    predictions: NotRequired[list[Kept] | None]


@with_config(_STRICT)
class ErrorModel(TypedDict):
    """What happened."""

    type: Text
    message: str


@with_config(_STRICT)
class FailureModel(Head):
    """Why a cell could not be computed."""

    error: ErrorModel
    session: Text
    run: Text | None
    created: Text


@with_config(_STRICT)
class CaseModel(TypedDict):
    """The metrics of one test case; of a structure, by name, where there are several."""

    case: str | Whole
    probability: NotRequired[Share0 | None]
    target: NotRequired[Whole | None]
    structures: NotRequired[dict[str, dict[str, Number | None]]]


RECORD, FAILURE = TypeAdapter(RecordModel), TypeAdapter(FailureModel)
CASES, CALL = TypeAdapter(list[CaseModel]), TypeAdapter(Call)


def problem_of(adapter: TypeAdapter[Any], value: Any) -> str | None:
    """Return what is wrong with a value, in words; None: nothing."""
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"] if not _is_branch(part))
        return f'the field "{place}": {first["msg"][0].lower()}{first["msg"][1:]}' if place else first["msg"]
    except (OverflowError, RecursionError) as error:
        return f"it holds what no record has ({type(error).__name__})"
    return None


def _is_branch(part: object) -> bool:
    """Whether a part of a place names a branch of a union instead of a field."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool", "none"))


def problem_of_cases(cases: Any, metric: str) -> str | None:
    """Return what is wrong with the metrics of the cases; None: nothing.

    Args:
        cases: ``per_case`` of a record.
        metric: its own, which must be a number wherever it is known.
    """
    found = problem_of(CASES, cases)
    if found is not None:
        return f"per_case: {found}"
    for case in cases:
        for name, value in case.items():
            if name == "structures" or value is None:
                continue
            if name == metric and not _is_number(value):
                return f'per_case: the field "{name}" of the case {str(case["case"])[:80]} is no number'
            if isinstance(value, float | int) and not isinstance(value, bool) and not _is_number(value):
                return f'per_case: the field "{name}" of the case {str(case["case"])[:80]} is too large'
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and -1e300 <= value <= 1e300


# --- Representation --------------------------------------------------------------------------------


@with_config(_STRICT)
class OfMethod(TypedDict):
    """What ``ssl3d represent`` says of a method."""

    title: Text
    method: Text
    not_matched: Text | None


@with_config(_STRICT)
class RepresentationModel(TypedDict):
    """A file of ``ssl3d represent``; its numbers are checked by making a table of them."""

    schema: Whole
    task: Text
    title: Text
    cases: list[Any]
    pairs: list[Any]
    voxels_per_structure: Whole | None
    methods: list[OfMethod]
    left_out: list[Text]
    pictures: dict[str, Inside]


REPRESENTATION = TypeAdapter(RepresentationModel)
