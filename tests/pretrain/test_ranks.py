"""Two processes train as one does: the loop, in float64, over gloo. One pair of processes does all the jobs."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cohorts import sphere_cohort
from test_pretrain import CPU, Restore, spec
from torch import Tensor, nn

import ssl3d
from ssl3d import ranks, signals
from ssl3d.config import Settings
from ssl3d.errors import ConfigError, SSL3DError
from ssl3d.models.factory import build_backbone
from ssl3d.models.norms import BatchNorm3d, check_norms
from ssl3d.models.weights.checkpoint import load_tensors
from ssl3d.pretrain import loop
from ssl3d.pretrain.spec import MethodSpec, resolve_method
from ssl3d.registry.registry import registry

METHODS = sorted(entry.name for entry in registry().methods if entry.load().trains != "none")
WHOLE_VIEWS = {"views": {"edge": 1.0}}
OPTIONS: dict[str, dict[str, Any]] = {
    "deepcluster": {"clusters": 4, "recluster_every": 1, **WHOLE_VIEWS},
    "inpainting": {"loss_over": "holes"},
    "gvsl": {"shuffle_boxes": 20, "spatial": False},
    "models_genesis": {"shuffle_boxes": 20},
    **dict.fromkeys(("byol", "simclr", "simsiam"), WHOLE_VIEWS),
}
STEPS = 3


class Normed(Restore):
    """A head with batch norm over volumes."""

    name = "normed"

    def __init__(self, backbone: Any, config: Any) -> None:
        super().__init__(backbone, config)
        self.head = nn.Sequential(BatchNorm3d(backbone.local_channels), self.head)


class Bad(Restore):
    """A loss that is not finite on the second process alone."""

    name = "bad"

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = super().training_step(views)
        if ranks.rank() == 1 and int(self.steps_seen) == 1:
            losses["mse"] = losses["mse"] * torch.nan
        return losses


class Apart(Restore):
    """A buffer of this process's items alone."""

    name = "apart"

    def __init__(self, backbone: Any, config: Any) -> None:
        super().__init__(backbone, config)
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        self.seen += views["x"].mean().detach()
        return super().training_step(views)


class Asked(Restore):
    """The last process is asked to stop in the second step."""

    name = "restore"
    now = True

    def on_step_end(self, progress: ssl3d.Progress) -> None:
        super().on_step_end(progress)
        if self.now and progress.step == 2 and ranks.rank() == ranks.world() - 1:
            signals._asked = 15


def settings(backbone: dict[str, Any] | None = None, **options: Any) -> Settings:
    # Momentum, since Adam's steps are the same for a gradient of any size.
    given = {"steps": STEPS, "batch_size": 7, "crop": 8, "optimizer": "momentum", "lr": 1e-2, "log_every": 1,
             "checkpoint_every": STEPS, "workers": 0, "precision": "float32", **options}  # fmt: skip
    return Settings.model_validate({"backbone": backbone or {"channels": [4, 8]}, "pretrain": given})


DEFORMED = "gvsl deformed"
"""Its views are float32, and so is the NCC of them, whose last digit is another one in a batch of another size."""
ROUNDED = {
    DEFORMED: 1e-6, **dict.fromkeys(("byol", "simclr", "simsiam", "simclr in parts", "evenly"), 1e-6), "recomputed": 1e-4,
}  # fmt: skip
"""What is above 1e-9: what these views are drawn with is float32, computed for all items of a process at once, and a vector
of another length may round otherwise (with AVX2, not with AVX-512). Adam makes the most of it."""
GENESIS = {"name": "genesis_unet3d", "width": 2}
#: Name -> method, settings: what both ways must come to the same with. Batches of 7 are 4 and 3 items, or 2 and 1 pairs.
JOBS: dict[str, tuple[MethodSpec, Settings]] = {
    **{name: (resolve_method(name, OPTIONS), settings()) for name in METHODS},
    DEFORMED: (resolve_method("gvsl", {"gvsl": {"shuffle_boxes": 20}}), settings()),
    "evenly": (resolve_method("simclr", {}), settings(batch_size=4, clip_grad=0.5)),
    "simclr in parts": (resolve_method("simclr", OPTIONS), settings(accumulate=3)),
    "denoising in parts": (resolve_method("denoising", OPTIONS), settings(accumulate=4)),
    "recomputed": (
        resolve_method("byol", OPTIONS),
        settings(checkpoint_activations=True, optimizer="adam", lr=1e-3),
    ),
    "genesis": (resolve_method("denoising", {}), settings(GENESIS, crop=16, batch_size=3, steps=2)),
    "batch norm": (spec(Normed), settings()),
}


@contextmanager
def in_float64() -> Iterator[None]:
    """Let the loop train in float64, where two ways to add differ by 1e-16 and not by 1e-7."""
    build, measure = loop.build_method, loop.measure

    def doubled(*args: Any) -> Any:
        method = build(*args).double()
        views, encode = method.views, method.backbone.encode

        def in_double(x: Tensor, rng: ssl3d.BatchRng) -> dict[str, Tensor]:
            return {k: v.double() if v.is_floating_point() else v for k, v in views(x, rng).items()}

        method.views, method.backbone.encode = in_double, lambda x: encode(x.double())
        return method

    loop.build_method, loop.measure = doubled, lambda *_: {}
    try:
        yield
    finally:
        loop.build_method, loop.measure = build, measure


def train(job: MethodSpec, chosen: Settings, out: Path, resume: bool = False) -> dict[str, Any]:
    torch.set_num_threads(1)
    with in_float64():
        return loop.pretrain(
            job, sphere_cohort(24, 10 if chosen.pretrain.crop[0] == 8 else 16), chosen, 0, out, CPU, resume=resume,
            allow_code_change=resume,
        )  # fmt: skip


def told(function: Callable[[], Any]) -> str:
    """Return what a job ended with, in words."""
    try:
        return str(function()["status"])
    except (SSL3DError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return traceback.format_exc()
    finally:
        signals._asked = None


def _process(rank: int, root: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=2)
    ranks.begin()
    folder, ends = Path(root), {}
    for name, (job, chosen) in JOBS.items():
        ends[name] = told(
            lambda job=job, chosen=chosen, name=name: train(job, chosen, folder / f"two {name}")
        )
    for cls in (Bad, Apart):
        ends[cls.name] = told(lambda cls=cls: train(spec(cls), settings(), folder / cls.name))
    ends["asked"] = told(lambda: train(spec(Asked), settings(steps=4), folder / "two then one"))
    Asked.now = False
    ends["go on"] = told(lambda: train(spec(Asked), settings(steps=4), folder / "one then two", resume=True))
    ends["again"] = told(lambda: train(spec(Asked), settings(steps=4), folder / "one then two", resume=True))
    real, ranks.gather = ranks.gather, lambda x: x
    ssl3d.losses.contrastive.gather = ssl3d.losses.contrastive.mine = lambda x: x
    ends["not gathered"] = told(lambda: train(*JOBS["evenly"], folder / "not gathered"))
    ranks.gather = real
    (folder / f"{rank}.json").write_text(json.dumps(ends))
    ranks.end()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """The folder of all runs, and how each job ended on each of two processes."""
    root = tmp_path_factory.mktemp("ranks")
    assert "Stopped" in told(lambda: train(spec(Asked), settings(steps=4), root / "one then two"))
    mp.spawn(_process, args=(str(root),), nprocs=2)
    return root, [json.loads((root / f"{rank}.json").read_text()) for rank in range(2)]


Ended = tuple[Path, list[dict[str, str]]]


def weights(run: Path, step: int = STEPS) -> dict[str, Tensor]:
    """Return all that a run keeps of its last step: parameters, buffers and the optimizer's state."""
    return load_tensors(run / f"state-{step:08d}.safetensors")


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a if a[k].numel())


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_come_to_the_weights_of_one(ended: Ended, name: str) -> None:
    root, (first, second) = ended
    assert (first[name], second[name]) == ("finished", "running"), first[name] + second[name]
    job, chosen = JOBS[name]
    run = train(job, chosen, root / f"one {name}")
    one, two = (weights(root / f"{n} {name}", chosen.pretrain.steps) for n in ("one", "two"))
    rounding = ROUNDED.get(name, 1e-9)
    assert largest_difference(one, two) < rounding
    other = json.loads((root / f"two {name}" / "run.json").read_text())
    assert other["identity"] == run["identity"], "the number of devices is no part of what the run is"
    assert (run["environment"]["processes"], other["environment"]["processes"]) == (1, 2)
    assert other["losses"] == pytest.approx(run["losses"], rel=rounding)
    assert other["pretext"]["end"] == pytest.approx(run["pretext"]["end"], rel=1e-6)
    lines = [(root / f"{n} {name}" / "log.jsonl").read_text().splitlines() for n in ("one", "two")]
    assert len(lines[0]) == len(lines[1])


def test_without_the_other_process_s_embeddings_it_would_be_noticed(ended: Ended) -> None:
    """The test above can fail."""
    root, (first, _) = ended
    assert first["not gathered"] == "finished"
    assert largest_difference(weights(root / "two evenly"), weights(root / "not gathered")) > 1e-5


def test_a_loss_that_is_not_finite_on_one_process_stops_both_and_is_named(ended: Ended) -> None:
    for end in ended[1]:
        assert end["bad"].startswith("TrainingError: bad: loss mse = nan at step 1;")


def test_a_buffer_of_one_process_s_items_alone_is_named(ended: Ended) -> None:
    for end in ended[1]:
        assert end["apart"].startswith("TrainingError: apart: seen is not the same in all 2 processes")
        assert "ssl3d.ranks.gather(x)" in end["apart"]


def test_asked_to_stop_on_one_process_both_stop_and_another_number_goes_on(ended: Ended) -> None:
    root, ends = ended
    for end in ends:
        assert end["asked"] == "Stopped: SIGTERM"
    assert (ends[0]["go on"], ends[1]["go on"]) == ("finished", "running")
    assert ends[0]["again"] == ends[1]["again"] == "finished", "nothing is left to do, and both know"
    assert json.loads((root / "two then one" / "run.json").read_text())["step"] == 2
    Asked.now = False
    try:
        train(spec(Asked), settings(steps=4), root / "two then one", resume=True)
        train(spec(Asked), settings(steps=4), root / "one")
    finally:
        Asked.now = True
    whole = weights(root / "one", 4)
    assert largest_difference(weights(root / "two then one", 4), whole) < 1e-9
    assert largest_difference(weights(root / "one then two", 4), whole) < 1e-9


def test_on_one_process_nothing_is_exchanged() -> None:
    x = torch.rand(4, 2, requires_grad=True)
    with ranks.together(4):
        assert ranks.gather(x) is x and ranks.mine(x) is x and ranks.total(x) is x and ranks.share() == 1
    assert (
        ranks.own(5) == slice(0, 5) and ranks.exchanged([True, 3]) == [1, 3] and ranks.first_ones("a") == "a"
    )


def test_norms_of_one_device_s_items_are_refused_by_name() -> None:
    backbone = build_backbone(settings().backbone, 0)
    method = spec().build(backbone, 0)
    check_norms(method, "restore", backbone)
    method.head = nn.BatchNorm3d(1)
    with pytest.raises(ConfigError, match=r"--devices: head of restore is a BatchNorm3d.*ssl3d.models.norms"):
        check_norms(method, "restore", backbone)
    method.head = nn.Identity()
    type(backbone).samples_apart = False
    try:
        with pytest.raises(ConfigError, match=r"backbone unet3d normalises over the volumes of a batch"):
            check_norms(method, "restore", backbone)
    finally:
        type(backbone).samples_apart = True


@pytest.mark.parametrize(
    ("name", "processes", "message"),
    [
        ("scratch", 2, "scratch trains nothing: leave --devices and --nodes out"),
        (
            "gvsl",
            4,
            r"A step of gvsl has 3 items \(pretrain.batch_size=7\), fewer than the 4 devices: use 3 devices",
        ),
    ],
)
def test_what_several_devices_cannot_train_is_refused_before_data_are_read(
    name: str, processes: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        loop.check_run(resolve_method(name, {}), settings(), 0, processes)
