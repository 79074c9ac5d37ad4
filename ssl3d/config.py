"""Typed, validated configuration; presets are YAML files in ``configs/``.

Every default lives once: a method's in its ``Config`` class, everything else in the preset.
Unknown keys are refused with the nearest valid one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ssl3d.errors import ConfigError, ReadError, nearest
from ssl3d.files import parse_yaml, read_yaml

__without_effect__ = "its values are in the identity"


class _WithoutEffect:
    """The type of :data:`WITHOUT_EFFECT`."""


WITHOUT_EFFECT: Final = _WithoutEffect()
"""Marks, in ``Annotated``, an option that changes no number: how fast a run is, what it keeps or says. Such an option
is in no identity, and another value of it makes nothing stale. An option of a method or a backbone can be marked, too."""


@dataclass(frozen=True)
class CountsFor:
    """Marks, in ``Annotated``, an option that only some kinds of tasks, or some modes of evaluation, read.

    Elsewhere no number depends on it, so it is in no identity there: another value makes no other cell.

    Attributes:
        kinds: of tasks (:data:`ssl3d.downstream.tasks.Kind`) that read it; empty: all.
        modes: of evaluation that read it; empty: all.
    """

    kinds: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()

    def __call__(self, kind: str, mode: str) -> bool:
        """Return whether a task of ``kind``, evaluated in ``mode``, reads the option."""
        return all(
            not allowed or given in allowed for allowed, given in ((self.kinds, kind), (self.modes, mode))
        )


VOXELS: Final = CountsFor(kinds=("segmentation",))
"""Marks what only tasks with a label per voxel read: windows over a volume, losses of voxels, surfaces."""
WHOLE_VOLUMES: Final = CountsFor(kinds=("classification", "multilabel", "regression"))
"""Marks what only tasks with one prediction a volume read."""


@dataclass(frozen=True)
class KeysAre:
    """Marks, in ``Annotated``, a mapping whose keys are names of registered things, such as methods.

    Attributes:
        kind: ``method``, ``task`` or ``dataset``.
    """

    kind: Literal["method", "task", "dataset"]


class Model(BaseModel):
    """Base of every configuration: frozen, unknown keys refused, fields documented."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class MethodConfig(Model):
    """Base of a method's ``Config``: one typed, documented field an option."""


def _three(value: Any) -> Any:
    return (value, value, value) if isinstance(value, int) else value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed, json_schema_input_type=str | tuple[str, ...])]
"""Names; a single one stands for a list of one."""

YAML_SUFFIXES: Final = (".yaml", ".yml")
"""Endings of presets and task files."""

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Edges = tuple[PositiveInt, PositiveInt, PositiveInt]
Shape = Annotated[Edges, BeforeValidator(_three, json_schema_input_type=PositiveInt | Edges)]
"""Edges (D, H, W) in voxels; one number stands for a cube."""


class PhantomConfig(Model):
    """The embedded cohorts, made when no data are given."""

    edge: int = Field(48, ge=24, le=512)
    """Edge of the cardiac and chest volumes in voxels."""
    spacing_mm: float = Field(3.2, gt=0)
    """Voxel spacing of the cardiac and brain volumes in mm; the chest's is twice that."""
    pretrain: int = Field(40, ge=2)
    """Unlabelled cardiac volumes for pretraining."""
    mmwhs: tuple[PositiveInt, PositiveInt] = (15, 20)
    """Cardiac volumes with heart labels: (training and validation, test)."""
    asoca: int = Field(30, ge=3)
    """Cardiac volumes with coronary arteries."""
    candi: int = Field(30, ge=3)
    """Brain volumes."""
    stoic: int = Field(60, ge=6)
    """Chest volumes, about half of them with COVID-19 lesions."""
    seed: int = 0
    """Seed of the cohorts; not the seed of a run, which must not change the data."""
    profile: Literal["benchmark", "development"] = "benchmark"
    """`development` has other seeds and other anatomy: make choices there, not on the benchmark."""
    appearance_variance: float = Field(1.0, ge=0, le=4)
    """Scale of the differences in appearance between subjects; 0 makes all alike."""
    isodensity: float = Field(0.0, ge=0, le=1)
    """How far structures of like tissue come to one intensity; at 1 only context tells them apart."""
    texture: float = Field(1.0, ge=0, le=10)
    """Amplitude of the texture within the tissues of heart and brain; 0: none."""
    vessel_width: float = Field(1.0, ge=1, le=4)
    """Width of the coronary vessels; at 1 they are one to three voxels wide, thinner ones fall between voxels."""
    lesion_size: float = Field(1.0, ge=0.5, le=3)
    """Factor of the radii of COVID-19 lesions, which are some 10 to 35 mm."""
    placement: float = Field(0.0, ge=0, le=1)
    """How far hearts and brains are turned (at 1 by up to 45 degrees about any axis) and shifted (by up to a tenth of the
    edge) in their volumes; at 0 a voxel's place alone tells most of what it shows."""
    shape_modes: float = Field(0.0, ge=0, le=1)
    """How far sizes differ beyond the healthy: at 1 a left ventricle's radius by up to 28 % either way and its wall by up
    to 65 % (dilated and hypertrophic hearts: Lang et al., JASE 2015), ventricles of the brain by 0.74 to 1.7."""
    variants: float = Field(0.0, ge=0, le=1)
    """Share of their frequency at which anatomical variants occur: missing coronary branches, left dominance (10 %),
    pericardial (12 %) and pleural fluid (17 %); foci of small vessel disease in the brain (50 %)."""
    protocols: float = Field(0.0, ge=0, le=1)
    """Share of patients scanned with another protocol: CT in the pulmonary or venous phase or without contrast, T1 with
    0.55 to 1.1 of the contrast between grey and white matter and up to 2.5 times the shading."""
    noise: float = Field(1.0, ge=1, le=6)
    """Largest factor of a patient's noise, log-uniform from 1; at 4 low-dose CT of up to 120 HU."""
    motion: float = Field(0.0, ge=0, le=1)
    """Share of patients with double contours (CT, up to 12 mm) or ghosts (MR, 5 to 15 % of the signal)."""
    metal: float = Field(0.0, ge=0, le=1)
    """Share of patients with a pacemaker's lead and its streaks (CT) or a void by dental metal (MR)."""
    field_of_view: float = Field(0.0, ge=0, le=0.5)
    """How much more or less of the body a volume shows, as a share of its edge."""
    slice_mm: float = Field(0.0, ge=0, le=10)
    """Thickest slices in mm; each patient's are between 0 and this, axial."""
    opacities: float = Field(0.0, ge=0, le=1)
    """Chest: share of patients without COVID-19 whose lungs are clouded by something else (lobar pneumonia, effusion,
    oedema) of the same amount and density; above 0, COVID-19 has the amount of these, too, at the periphery."""


class DataConfig(Model):
    """Preparation: from image files to volumes in [0, 1] with one orientation and spacing."""

    spacing_mm: float = Field(1.0, gt=0)
    """Isotropic spacing after preparation, in mm."""
    task_spacing_mm: Annotated[dict[str, float], KeysAre("task")] = {}
    """Spacing of single tasks where it differs, for example {ccc: 6.4}."""
    intensity_offset: Annotated[dict[str, float], KeysAre("dataset")] = {}
    """Added to stored values of a dataset so that air is near 0; overrides the adapter's."""
    affine: Annotated[dict[str, Literal["sform", "qform"]], KeysAre("dataset")] = {}
    """Dataset -> which of an sform and a qform that disagree is right; default: such files are refused."""
    channel: Annotated[dict[str, int | str], KeysAre("dataset")] = {}
    """Dataset -> the channel to read of images with several: its number from 0, or its name."""
    subject_pattern: dict[str, str] = {}
    """Dataset -> regular expression that takes the person from a case's id (its file's name without ending); under `*`
    for every folder that is given. What stands in parentheses is the person."""
    exclude: tuple[str, ...] = ()
    """Ids of cases that are left out of the volumes for pretraining; `--exclude-test` writes them here."""
    splits_file: Annotated[dict[str, str], KeysAre("task")] = {}
    """Task -> a file of nnU-Net's form (splits_final.json) whose folds take the place of splits that are drawn."""
    counts: Annotated[dict[str, tuple[PositiveInt, PositiveInt, PositiveInt]], KeysAre("task")] = {}
    """Cases for (training, validation, test) of single tasks; default: the task's own."""
    folds: int = Field(4, ge=2)
    """Folds of the cross-validation where test labels are not public."""
    split_seed: int = 0
    """Seed of the splits, which are the same for every method and every seed of a run."""


class PretrainConfig(Model):
    """The pretraining loop; the same for every method."""

    steps: NonNegativeInt = 200_000
    """Optimizer steps."""
    batch_size: PositiveInt = 2
    """Crops a step, by voxels: the same voxels pass the network in a step of every method. A method on pairs gets half as
    many pairs, one that compares small views more of these (see `Method.items_per_step`)."""
    crop: Shape = (128, 128, 128)
    """Crop (D, H, W) in voxels; smaller volumes are padded with zeros."""
    optimizer: str = "adam"
    """Any optimizer that timm knows."""
    lr: float = Field(1e-4, gt=0)
    """Learning rate after warm-up."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay, not applied to biases and norms."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Course of the learning rate after warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    clip_grad: float | None = Field(None, gt=0)
    """Largest norm of the gradient; off by default."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """`auto` takes bfloat16 autocast where the device computes it natively, else float32: other numbers under one name. On
    a CPU bfloat16 is refused, since oneDNN's gradients of 3D convolutions are wrong there."""
    accumulate: PositiveInt = 1
    """Parts in which a step takes its batch, to save memory; at most `batch_size`. The gradient is that of the whole batch
    up to rounding, for every method: where the loss is a mean over samples, part by part; where samples are compared or
    normalised together, the backbone alone works in parts, and does its forward pass twice."""
    compile: bool = False
    """Compile the blocks of the backbone (torch.compile) where gradients are wanted. It takes minutes at the start, and
    changes numbers by rounding. Off, with a word, where it fails."""
    deterministic: bool = True
    """Convolutions on CUDA in repeatable algorithms only. Off: the fastest by trial; a run then repeats up to rounding."""
    checkpoint_activations: Annotated[bool, WITHOUT_EFFECT] = False
    """Keep only the inputs of the backbone's blocks for the backward pass and compute the rest twice: less memory, a third
    more time, the same gradients."""
    checkpoint_every: Annotated[PositiveInt, WITHOUT_EFFECT] = 1000
    """Steps between two checkpoints."""
    keep: Annotated[PositiveInt, WITHOUT_EFFECT] = 2
    """Newest checkpoints that are kept; if one is damaged, the run goes on from the one before."""
    keep_checkpoints: Annotated[bool, WITHOUT_EFFECT] = False
    """Keep the backbone of every checkpoint, for curves over pretraining steps."""
    monitor_every: Annotated[PositiveInt, WITHOUT_EFFECT] = 500
    """Steps between two measurements of collapse (feature deviation, effective rank)."""
    log_every: Annotated[PositiveInt, WITHOUT_EFFECT] = 10
    """Steps between two lines of the log. Only then, and before each checkpoint and measurement, are the losses read from
    the device: one that is not finite ends the run by then, and is named with its step."""
    loggers: Annotated[Names, WITHOUT_EFFECT] = ("tensorboard",)
    """What is told the course of a run besides its `log.jsonl`: `tensorboard`, `wandb`, `mlflow` and what plugins
    register; `[]`: nothing. None opens a connection unless the environment variables of its program ask for one."""
    workers: Annotated[NonNegativeInt, WITHOUT_EFFECT] = 2
    """Threads that read crops ahead; the number never changes a result."""

    @model_validator(mode="after")
    def _parts_of_a_batch(self) -> PretrainConfig:
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate={self.accumulate}: a step has batch_size={self.batch_size} crops, and no more parts; use "
                f"accumulate={self.batch_size}"
            )
        return self


def _only_known(cls: type[Model], others: type[Model], values: Any, why: str) -> Any:
    """Return ``values``, unless they hold an option of ``others`` that ``cls`` does not have: then say ``why``."""
    if not isinstance(values, dict):
        return values
    strange = [key for key in values if key in others.model_fields.keys() - cls.model_fields.keys()]
    if strange:
        raise ValueError(f"{why} {strange[0]}; its options are {', '.join(cls.model_fields)}")
    return values


class LinearConfig(Model):
    """Linear evaluation: solved, so there are no steps and no learning rate; the same for every method.

    f^g, one vector a case: a logistic or ridge regression on features scaled to unit deviation, its penalty by
    cross-validation over training and validation cases. It has no options. f^l, one vector a voxel: the minimum
    of `loss` over the training cases, on whitened features.
    """

    loss: Annotated[Literal["dice", "dice_ce"], VOXELS] = "dice"
    """Segmentation loss: soft Dice as in GVSL's released code, or its sum with cross-entropy."""
    voxels: Annotated[PositiveInt, VOXELS] = 1000
    """Voxels of each structure of a training case, and of its background as many as of all structures; each stands
    for as many as its share."""
    penalty: Annotated[float, VOXELS] = Field(1e-4, gt=0)
    """Penalty on the weights of a voxel probe: penalty / 2 * |W|^2."""
    crop: Annotated[Shape | None, VOXELS] = None
    """Window of this mode in place of `downstream.crop`."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_trained(cls, values: Any) -> Any:
        return _only_known(
            cls, FinetuneConfig, values, "linear evaluation is solved, not trained, and has no"
        )


class FinetuneConfig(Model):
    """The budget of fine-tuning; the same for every method."""

    steps: PositiveInt = 40_000
    """Optimizer steps."""
    batch_size: Annotated[PositiveInt, VOXELS] = 1
    """Crops a step, where each voxel has a label."""
    volumes: Annotated[PositiveInt, WHOLE_VOLUMES] = 1
    """Volumes a step, where there is one prediction a volume. One volume says little of what sets classes apart: with one
    or two a step, 400 cases of CCC were not learned in 3000 steps, and in 600 with eight."""
    volumes_lr: Annotated[float | None, WHOLE_VOLUMES] = Field(None, gt=0)
    """Learning rate after warm-up where there is one prediction a volume; default: `lr`."""
    optimizer: str = "adam"
    """Any optimizer that timm knows."""
    lr: float = Field(1e-4, gt=0)
    """Learning rate after warm-up."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay, not applied to biases and norms."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Course of the learning rate after warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up. Adam's first steps are as long as the rate says, however small the gradient: without
    a warm-up a high rate wrecks the weights, and the rest of a short budget goes into repairing them."""
    clip_grad: float | None = Field(None, gt=0)
    """Largest norm of the gradient; off by default."""
    validate_every: PositiveInt = 200
    """Steps between two validations, or a multiple of them where these would cost more than `validation_share`."""
    validation_share: float = Field(0.1, gt=0)
    """Most that validations cost, as a share of training, counted in voxels that pass the network (of which a training
    step has three passes). The last step is always validated. Large: after every `validate_every` steps, at any cost."""
    weights: Literal["best", "last"] = "best"
    """What is tested: the weights with the best validation, or the last ones, for schedules that end at a rate of 0.
    The best of a few noisy validations is partly luck."""
    loss: Annotated[Literal["dice", "dice_ce"], VOXELS] = "dice"
    """Segmentation loss, as in linear evaluation."""
    augment: bool = False
    """Random deformation and appearance of the training crops, the same for every method."""
    crop: Annotated[Shape | None, VOXELS] = None
    """Crop and window of this mode in place of `downstream.crop`."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_frozen(cls, values: Any) -> Any:
        return _only_known(cls, LinearConfig, values, "fine-tuning changes the features, and has no")


class NeighboursConfig(Model):
    """The k-nearest-neighbour evaluation; the same for every method."""

    neighbours: PositiveInt = 20
    """Neighbours that vote."""
    temperature: float = Field(0.07, gt=0)
    """Temperature of the votes (Wu et al., CVPR 2018)."""
    voxels: Annotated[PositiveInt, VOXELS] = 100
    """Voxels of each structure and of the background that one training case gives to the bank."""
    standardize: bool = True
    """Centre and scale each feature over the training set."""


class DownstreamConfig(Model):
    """The downstream harness; the same for every method."""

    crop: Annotated[Shape, VOXELS] = (128, 128, 128)
    """Crop for training and window for inference (D, H, W) in voxels; smaller volumes are padded."""
    overlap: Annotated[float, VOXELS] = Field(0.5, ge=0, lt=1)
    """Overlap of the windows at inference."""
    windows: Annotated[PositiveInt | Literal["auto"], WITHOUT_EFFECT] = "auto"
    """Windows that pass the network together at inference; `auto`: 128,000 voxels of them on a CPU, 2,097,152 (128^3) on a
    GPU, one at least."""
    head_kernel: Annotated[
        Literal[1, 3], CountsFor(("segmentation",), ("linear", "multiscale", "finetune"))
    ] = 1
    """Kernel of the segmentation head: 1 (linear per voxel) or 3 (the released code's)."""
    feature_budget_mib: Annotated[int, WITHOUT_EFFECT] = Field(4096, ge=0)
    """Frozen features above this are memory-mapped (up to `feature_disk_mib`)."""
    feature_disk_mib: Annotated[int, WITHOUT_EFFECT] = Field(65536, ge=0)
    """Frozen features above this are computed on the fly, with the same result."""
    feature_precision: Annotated[
        Literal["float32", "bfloat16"], CountsFor(modes=("linear", "multiscale", "knn"))
    ] = "float32"
    """How frozen features are kept. `bfloat16` halves memory and disk; the probe reads the rounded values."""
    surface_tolerance_mm: Annotated[float, VOXELS] = Field(2.0, gt=0)
    """Tolerance of the normalised surface Dice, in mm."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """As in pretraining."""
    linear: LinearConfig = LinearConfig()
    """Linear evaluation: the whole backbone frozen."""
    multiscale: LinearConfig = LinearConfig(voxels=250)
    """Linear evaluation of all stages of the encoder together; the decoder is left out."""
    finetune: FinetuneConfig = FinetuneConfig()
    """Fine-tuning: every parameter trained."""
    knn: NeighboursConfig = NeighboursConfig()
    """Nearest neighbours: nothing trained at all."""

    def for_mode(self, mode: str) -> DownstreamConfig:
        """Return what evaluation in ``mode`` is run with: if the mode has a crop of its own, it is ``crop``."""
        own = getattr(self, mode)
        if getattr(own, "crop", None) is None:
            return self
        return self.model_copy(update={"crop": own.crop, mode: own.model_copy(update={"crop": None})})


class BackboneConfig(Model):
    """The backbone; every key but `name` is an option of that backbone."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)
    name: str = "unet3d"
    """A registered backbone."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


SHOWN_CHANGES = 4
"""So many options that `--set` changed are named above a table."""


class Settings(Model):
    """One preset: everything that decides a number, except method, task and seed."""

    preset: Annotated[str, WITHOUT_EFFECT] = "custom"
    """Name of the preset; what `--set` changed of it stands in `changed`."""
    changed: Annotated[tuple[str, ...], WITHOUT_EFFECT] = ()
    """What `--set` changed of the preset's numbers, as KEY=VALUE; filled in by `load_settings`."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], WITHOUT_EFFECT] = (0,)
    """Seeds of `ssl3d bench`, unless `--seeds` names others; one seed covers a whole run."""
    phantoms: PhantomConfig = PhantomConfig()
    data: DataConfig = DataConfig()
    backbone: BackboneConfig = BackboneConfig()
    pretrain: PretrainConfig = PretrainConfig()
    downstream: DownstreamConfig = DownstreamConfig()
    method_lr: Annotated[dict[str, Annotated[float, Field(gt=0)]], KeysAre("method")] = {}
    """Learning rates of single rows in place of `pretrain.lr`, for example {byol: 3.0e-3}; a variant is its own row."""
    methods: Annotated[dict[str, dict[str, Any]], KeysAre("method")] = {}
    """Options of single methods, for example {byol: {base_momentum: 0.99}}."""

    @property
    def title(self) -> str:
        """The preset as it is named above tables: with what `--set` has changed.

        >>> Settings(preset="quick", changed=("pretrain.steps=9",)).title
        'quick (pretrain.steps=9)'
        """
        more = len(self.changed) - SHOWN_CHANGES
        shown = ", ".join(self.changed[:SHOWN_CHANGES]) + (f" and {more} more" if more > 0 else "")
        return f"{self.preset} ({shown})" if shown else self.preset

    def for_method(self, name: str) -> Settings:
        """Return the settings that method ``name`` is pretrained with: its learning rate is ``pretrain.lr``."""
        pretraining = self.pretrain.model_copy(update={"lr": self.method_lr.get(name, self.pretrain.lr)})
        return self.model_copy(update={"pretrain": pretraining, "method_lr": {}})


def presets_folder() -> Path:
    """Return the folder of the presets: inside the wheel, or ``configs/`` of a source tree."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def preset_names() -> list[str]:
    """Return the names of the presets, sorted."""
    return sorted(path.stem for path in presets_folder().glob("*.yaml"))


def load_settings(
    preset: str,
    overrides: Collection[str] = (),
    methods: Collection[str] | None = None,
    tasks: Collection[str] | None = None,
    datasets: Collection[str] | None = None,
) -> Settings:
    """Load a preset and apply ``key=value`` overrides.

    Args:
        preset: a name (``demo``, ``smoke``, ``quick``, ``study``, ``paper``) or the path of a YAML file.
        overrides: ``section.option=value`` or ``method.option=value``; values are YAML. ``pretrain.lr`` takes the
            place of the preset's ``method_lr`` too, ``downstream.crop`` that of its crops of single modes.
        methods: names that may stand in the place of a section, and that options of single methods may be
            given for; None: no section, and these options are not checked.
        tasks, datasets: names that options of single tasks and data sets may be given for; None: not checked.

    Raises:
        ConfigError: unknown preset, key or value out of range; names the key and the nearest one.
    """
    path = _find_preset(preset)
    values = _read_preset(path)
    values.setdefault(
        "preset", path.stem if path.stem not in preset_names() or _is_bundled(path) else path.name
    )
    where = f"preset {path.stem}"
    plain = validate(Settings, values, where) if overrides else None
    named = {override.partition("=")[0].strip() for override in overrides}
    if "pretrain.lr" in named:  # who names one rate means it for every method,
        values["method_lr"] = {}
    if "downstream.crop" in named:  # and who names one crop for every mode
        for mode in values.get("downstream", {}).values():
            if isinstance(mode, dict):
                mode.pop("crop", None)
    paths = {override: _apply(values, override, methods or ()) for override in overrides}
    settings = validate(Settings, values, where)
    check_keys(settings, {"method": methods, "task": tasks, "dataset": datasets}, where)
    if plain is not None:
        settings = settings.model_copy(update={"changed": _changed(plain, settings, paths)})
    return settings


def _changed(plain: Settings, settings: Settings, paths: Mapping[str, list[str]]) -> tuple[str, ...]:
    """Return the overrides that changed what decides a number, in their order."""
    before, after = (s.model_dump(mode="json") for s in (plain, settings))

    def value(tree: Any, path: list[str]) -> Any:
        for part in path:
            tree = tree.get(part) if isinstance(tree, dict) else None
        return tree

    without_effect = options_without_effect()
    found = {}
    for override, path in paths.items():
        key, _, text = override.partition("=")
        shared = {"pretrain.lr": ["method_lr"], "downstream.crop": ["downstream"]}.get(".".join(path), path)
        if ".".join(path) in without_effect:
            continue
        if any(value(before, p) != value(after, p) for p in (path, shared)):
            found[".".join(path)] = f"{key.strip()}={text.strip()}"
    return tuple(found.values())


def check_keys(settings: Settings, known: Mapping[str, Collection[str] | None], where: str) -> None:
    """Refuse options of single methods, tasks and data sets that do not exist.

    Args:
        settings: of a preset.
        known: names by kind (see :class:`KeysAre`); those of a kind that is None are not checked.
        where: the preset, for the message.

    Raises:
        ConfigError: one line a name, with the nearest one.
    """
    lines = []
    for path, keys, kind in _keyed(settings):
        names = known.get(kind)
        if not names:
            continue
        for key in keys:
            if key not in names:
                files = " A task file has splits and spacing of its own." if kind == "task" else ""
                lines.append(f'{where}: {path}: unknown {kind} "{key}".{nearest(key, names)}{files}')
    if lines:
        raise ConfigError("\n".join(lines))


def _keyed(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, list[str], str]]:
    """Yield (path, keys, kind) of each mapping that is marked by :class:`KeysAre`."""
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        marks = [mark for mark in info.metadata if isinstance(mark, KeysAre)]
        if marks:
            yield prefix + name, list(value), marks[0].kind
        elif isinstance(value, BaseModel):
            yield from _keyed(value, f"{prefix}{name}.")


def _is_bundled(path: Path) -> bool:
    return path.resolve().parent == presets_folder().resolve()


def _find_preset(preset: str, folder: Path | None = None) -> Path:
    """Return the file of a preset, named by its name or by its path from ``folder`` (None: the working directory)."""
    named = preset.endswith(YAML_SUFFIXES)
    path = (folder or Path()) / Path(preset).expanduser() if named else presets_folder() / f"{preset}.yaml"
    if not path.is_file():
        looked = f" There is no {path}." if named else ""
        raise ConfigError(
            f'Unknown preset "{preset}".{looked}{nearest(preset, preset_names())} A path to a .yaml file works too.'
        )
    return path


def preset_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a preset file: its sections and options, their meaning, type and range.

    Names of methods, tasks, backbones and loggers, and the options of methods and backbones, are not in it: they depend on
    what is installed, and :func:`load_settings` looks at them.
    """
    schema = Settings.model_json_schema()
    meaning = "A preset by name, or by its path from this file; its values hold where this file has none."
    of_the_file = {"extends": {"type": "string", "description": meaning}}
    options = {name: option for name, option in schema["properties"].items() if name != "changed"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "ssl3d preset",
        "properties": of_the_file | options,
    }


def preset_chain(preset: str) -> list[tuple[Path, dict[str, Any]]]:
    """Return the files that make up a preset with their own values, the one that is extended first.

    Raises:
        ConfigError: as :func:`load_settings`.
    """
    return _chain(_find_preset(preset))


def _read_preset(path: Path) -> dict[str, Any]:
    """Return the values of a preset, over those of the one that it ``extends`` (a name, or a path from its folder)."""
    merged: dict[str, Any] = {}
    for _, values in _chain(path):
        merged = _merged(merged, values)
    return merged


def _chain(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    try:
        values = read_yaml(path) or {}
    except ReadError as error:
        raise ConfigError(str(error)) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not {type(values).__name__}.")
    if "extends" not in values:
        return [(path, values)]
    named = str(values.pop("extends"))
    try:
        base = _find_preset(named, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: extends = {named}: {error}") from None
    above = (*above, path.resolve())
    if base.resolve() in above:
        raise ConfigError(f"{path}: extends = {named} leads back to itself. Name another preset.")
    return [*_chain(base, above), (path, values)]


def _merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``values`` over it, section by section."""
    both = {
        key: _merged(base[key], value)
        for key, value in values.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return base | values | both


def _apply(values: dict[str, Any], override: str, methods: Collection[str]) -> list[str]:
    """Set one option in ``values``, and return its path."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f'--set "{override}" has no value; write --set key=value.')
    try:
        value = parse_yaml(f"[{text}]" if "," in text and not text.lstrip().startswith(("[", "{")) else text)
        # YAML reads 1e-3 as text (it wants 1.0e-3).
        value = float(value) if isinstance(value, str) and _is_number(value) else value
    except ValueError as error:
        raise ConfigError(f'--set {key}: "{text}" is not a value: {error}') from error
    parts = key.strip().split(".")
    if parts[0] not in Settings.model_fields:
        if len(parts) > 1 and parts[0] in methods:
            parts.insert(0, "methods")
        else:
            valid = list(option_paths(Settings)) + [f"{m}.<option>" for m in methods]
            raise ConfigError(
                f'Unknown key "{key}".{nearest(key, valid) if len(parts) > 1 else _by_leaf(key, valid)}'
            )
    node = values
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f'"{key}" goes below "{part}", which is a value, not a section.')
    node[parts[-1]] = value
    return parts


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _by_leaf(key: str, valid: list[str]) -> str:
    """A key without its section: name the full keys that end in it."""
    full = [name for name in valid if name.split(".")[-1] == key]
    return f" Did you mean {' or '.join(full)}?" if full else nearest(key, valid)


def option_paths(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Return every option's dotted path and its documentation."""
    paths: dict[str, str] = {}
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            paths |= option_paths(annotation, f"{prefix}{name}.")
        else:
            paths[prefix + name] = info.description or ""
    return paths


def identity_values(
    model: BaseModel, counts: Callable[[CountsFor], bool] = lambda mark: True
) -> dict[str, Any]:
    """Return the options of ``model`` that decide a number, as JSON values: all but the marked ones.

    Args:
        model: with the options.
        counts: says of an option that is marked by :class:`CountsFor` whether it counts here.

    >>> "workers" in PretrainConfig().model_dump(), "workers" in identity_values(PretrainConfig())
    (True, False)
    """
    marked: Any = _exclude(model, counts)
    return model.model_dump(mode="json", exclude=marked)


def _exclude(model: BaseModel, counts: Callable[[CountsFor], bool]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        marks = [mark for mark in info.metadata if isinstance(mark, CountsFor)]
        if WITHOUT_EFFECT in info.metadata or not all(map(counts, marks)):
            found[name] = True
        elif isinstance(value, BaseModel) and (below := _exclude(value, counts)):
            found[name] = below
    return found


def options_without_effect(model: type[BaseModel] = Settings, prefix: str = "") -> set[str]:
    """Return the dotted paths of the options below ``model`` that change no number.

    >>> "pretrain.workers" in options_without_effect(), "pretrain.lr" in options_without_effect()
    (True, False)
    """
    found: set[str] = set()
    for name, info in model.model_fields.items():
        if WITHOUT_EFFECT in info.metadata:
            found.add(prefix + name)
        elif isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found |= options_without_effect(info.annotation, f"{prefix}{name}.")
    return found


M = TypeVar("M", bound=BaseModel)


def validate(model: type[M], values: dict[str, Any], where: str) -> M:
    """Build ``model`` from ``values``.

    Raises:
        ConfigError: one line for every bad key or value, naming the nearest valid key.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [f"{where}: {_explain(model, problem)}" for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _explain(model: type[BaseModel], problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        owner: Any = model
        for part in path[:-1]:
            owner = owner.model_fields[part].annotation
        prefix = ".".join([*path[:-1], ""])
        return f'unknown key "{key}".{nearest(key, [prefix + name for name in owner.model_fields])}'
    message = problem["msg"].removeprefix("Value error, ")
    if key and isinstance(problem["input"], dict):  # a whole section
        return f"{key}: {message}."
    return f"{key} = {problem['input']!r}: {message}." if key else f"{message}."  # of several keys together
