"""A step waits for nothing: no value is read back between two looks, and what was not finite is named all the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from cohorts import noise_cohort, sphere_cohort
from test_pretrain import CPU, Restore, lines, run, same_weights, settings
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ssl3d
from ssl3d.config import PretrainConfig
from ssl3d.device import Copies, to_device
from ssl3d.errors import TrainingError
from ssl3d.models.factory import build_backbone
from ssl3d.optim import follow, has_fused, make_optimizer
from ssl3d.pretrain.loop import backpropagate, limit_gradient, pretrain
from ssl3d.pretrain.method import Progress
from ssl3d.pretrain.source import CropSource, training_source
from ssl3d.pretrain.spec import resolve_method
from ssl3d.pretrain.watch import Watch
from ssl3d.registry.registry import registry
from ssl3d.rng import BatchRng

METHODS = sorted(
    entry.name for entry in registry().methods if entry.load().trains != "none" and not entry.overrides
)
READING = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique", "_unique2")
OPTIONS = {"deepcluster": {"clusters": 4}}


class Reads(TorchDispatchMode):
    """Counts operations whose result, or its shape, the host must wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READING or (name == "index" and any(_is_mask(i) for i in args[1])):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def test_reads_are_counted() -> None:
    x = torch.ones(3)
    with Reads() as reads:
        float(x.sum()), bool(x.any()), x[x > 0], x.nonzero()
    assert reads.seen == ["_local_scalar_dense", "_local_scalar_dense", "index", "nonzero"]


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_read_back_between_two_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Over the whole of the loop's steps 1 and 2; the optimizer has no counters of its own (momentum)."""
    counts, looks, reads = [], [], Reads()
    note, look = Watch.note, Watch.look

    def noting(self: Watch, *args: Any) -> None:
        note(self, *args)
        counts.append(len(reads.seen))

    def looking(self: Watch) -> dict[str, float]:
        looks.append(len(counts))
        return look(self)

    monkeypatch.setattr(Watch, "note", noting)
    monkeypatch.setattr(Watch, "look", looking)
    every = dict.fromkeys(("log_every", "monitor_every", "checkpoint_every"), 100)
    options = settings(
        steps=4, crop=8, optimizer="momentum", workers=0, clip_grad=1, schedule="cosine", **every
    )
    with reads:
        pretrain(resolve_method(name, OPTIONS), noise_cohort(120, (9, 9, 9)), options, 0, tmp_path, CPU)
    assert counts[0] == counts[2], reads.seen
    assert [at for at in looks if 0 < at < 4] == [], "no epoch begins in these steps"


@pytest.mark.parametrize("name", METHODS)
def test_a_step_on_a_device_reads_nothing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Views, losses, gradient and what follows a step, in the forms that a GPU gets: on tensors that have no values
    (the device "meta"), so that whatever asks for one raises."""
    monkeypatch.setattr(
        torch, "autocast", lambda *args, **kwargs: nullcontext()
    )  # there is none for this device
    method = resolve_method(name, OPTIONS).build(build_backbone(settings().backbone, 0), 0)
    source = training_source(
        sphere_cohort(24), (16, 16, 16), method.items_per_step((16,) * 3, 4), method.volumes_per_item, 0, 1
    )
    method.setup(source)
    method.on_epoch_start(source, 0)
    device = torch.device("meta")
    batch = source.batch(0)
    known = {key: method.on_host(key) for key in ("labels", "clustered")} if name == "deepcluster" else {}
    to_device(method, device)
    for key, values in known.items():  # read after the clustering
        method._host[key] = method.get_buffer(key), method.get_buffer(key)._version, values
    rng = BatchRng(0, 0, batch.items, device, ("views",), batch.volumes)
    losses = backpropagate(method, method.views(batch.x.to(device), rng), None)
    watch = Watch(name)
    watch.note(losses, limit_gradient(method, 1.0), 0)
    method.on_step_end(Progress(1, 9))
    with pytest.raises(RuntimeError, match="meta"):
        watch.look()


# What was not finite --------------------------------------------------------------------------


class Explodes(Restore):
    """Finite losses and gradients, but for one step and one of these."""

    at: int = 4
    what: str = "loss"

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = super().training_step(views)
        if self.training and self.at == self.count and self.what == "loss":
            losses["zero"] = losses["zero"] + torch.inf
        if self.training and self.at == self.count and self.what == "gradient":
            losses["zero"] = losses["mse"] * 0 + _NanGradient.apply(self.head.weight.sum())
        return losses

    count = 0

    def on_step_end(self, progress: ssl3d.Progress) -> None:
        if self.at == self.count and self.what == "weights":
            with torch.no_grad():
                self.head.bias.fill_(torch.inf)
        self.count += 1


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 0 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.nan


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("loss", r"restore: loss zero = inf at step 4; all losses: \{'mse': 0\.\d+, 'zero': inf\}"),
        (
            "gradient",
            r"restore: norm of the gradient = nan at step 4; all losses: \{'mse': 0\.\d+, 'zero': 0\.0\}",
        ),
        ("weights", r"restore: loss mse = inf, zero = nan at step 5"),
    ],
)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_first_bad_step_is_named_at_the_next_look_and_nothing_is_written_after_it(
    tmp_path: Path, kind: str, said: str, clip: float | None
) -> None:
    class Bad(Explodes):
        what = kind

    every = {"log_every": 50, "monitor_every": 50, "checkpoint_every": 3, "keep_checkpoints": True}
    with pytest.raises(TrainingError, match=said + ".*pretrain.lr.*last checkpoint is untouched"):
        run(tmp_path / "r", Bad, steps=12, clip_grad=clip, **every)
    assert sorted(p.name for p in (tmp_path / "r").glob("*.safetensors")) == [
        "backbone-00000003.safetensors", "state-00000003.safetensors",
    ]  # fmt: skip
    assert "mse" not in str(lines(tmp_path / "r")), "no line of a step after it"
    run(tmp_path / "r", resume=True, steps=12, clip_grad=clip, **every)


@pytest.mark.parametrize("at", [2, 6])  # the weights of a checkpoint, and of the end
def test_weights_that_are_not_finite_are_never_written(tmp_path: Path, at: int) -> None:
    class Bad(Explodes):
        what = "weights"

    Bad.at = at
    with pytest.raises(
        TrainingError, match=rf"restore: weights of head.bias are not finite after {at + 1} steps"
    ):
        run(tmp_path / "r", Bad, log_every=50, monitor_every=50)
    states = sorted(p.name for p in (tmp_path / "r").glob("*.safetensors"))
    assert states == ([] if at == 2 else ["state-00000003.safetensors", "state-00000006.safetensors"])


def test_losses_may_change_their_names(tmp_path: Path) -> None:
    class Changing(Restore):
        def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
            losses = super().training_step(views)
            if self.training and int(self.steps_seen) % 2:
                losses["odd"] = losses["mse"] * (torch.nan if int(self.steps_seen) == 5 else 1)
            return losses

    run(tmp_path / "r", Changing, steps=5, log_every=1)
    assert ["odd" in line for line in lines(tmp_path / "r") if "mse" in line] == [
        False,
        True,
        False,
        True,
        False,
    ]
    with pytest.raises(TrainingError, match="restore: loss odd = nan at step 5"):
        run(tmp_path / "s", Changing, steps=8, log_every=50, monitor_every=50, checkpoint_every=50)


def test_a_loss_that_is_no_scalar_is_named(tmp_path: Path) -> None:
    class Shaped(Restore):
        def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"mse": super().training_step(views)["mse"][None]}

    with pytest.raises(TrainingError, match=r"restore: loss mse has shape \(1,\)"):
        run(tmp_path / "r", Shaped)


def test_how_often_is_looked_changes_neither_weights_nor_lines(tmp_path: Path) -> None:
    run(tmp_path / "a", log_every=1)
    run(tmp_path / "b", log_every=4, checkpoint_every=7, monitor_every=7)
    assert same_weights(tmp_path / "a", tmp_path / "b")
    own = {line["step"]: line["mse"] for line in lines(tmp_path / "a") if "mse" in line}
    seen = {line["step"]: line["mse"] for line in lines(tmp_path / "b") if "mse" in line}
    assert list(seen) == [4, 7] and all(own[step] == value for step, value in seen.items())


# Moving averages, copies --------------------------------------------------------------------------


def test_a_target_follows_as_one_tensor_after_the_other_would() -> None:
    torch.manual_seed(0)
    online = nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.PReLU())
    target = nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.PReLU()).requires_grad_(False)
    online(torch.rand(2, 1, 5, 5, 5))
    expected = {k: v.clone().lerp_(online.get_parameter(k), 0.3) for k, v in target.named_parameters()}
    follow(target, online, 0.3)
    assert all(torch.equal(v, expected[k]) for k, v in target.named_parameters())
    assert all(torch.equal(v, online.get_buffer(k)) for k, v in target.named_buffers())
    assert int(target[1].num_batches_tracked) == 1


def test_crops_are_copied_ahead_on_another_stream_and_waited_for_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The order of calls, on a stand-in for CUDA: pinned, copied on the side stream, awaited by the one that computes."""
    done: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name if isinstance(name, str) else "side"

        def record_event(self) -> str:
            done.append(f"event of {self.name}")
            return "event"

        def wait_event(self, event: str) -> None:
            done.append(f"{self.name} waits for the {event}")

    @contextmanager
    def inside(stream: Stream) -> Iterator[None]:
        done.append(f"in {stream.name}")
        yield
        done.append("out")

    def to(x: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        done.append(f"copy to {device}, {non_blocking}")
        return x.clone()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: done.append("pinned") or x)
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: done.append(f"kept for {stream.name}"))
    source = CropSource(noise_cohort(3), (8, 8, 8), 1, 1, seed=0)
    batches = source.batches(0, 2, 0, "cuda")
    first = next(batches)
    sending = ["pinned", "in side", "copy to cuda, True", "event of side", "out"]
    assert done == [*sending, "main waits for the event", "kept for main"]
    assert torch.equal(first.x, source.batch(0).x)
    done.clear()
    copies = Copies(torch.device("cpu"))
    x = torch.ones(2)
    monkeypatch.undo()
    assert copies.receive(copies.send(x)) is x, "on the host nothing is copied"


def test_the_optimizer_is_fused_on_cuda_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert [has_fused(name, cuda) for name in ("adam", "adamw", "momentum", "lamb", "lars")] == [True] * 3 + [
        False
    ] * 2
    assert not has_fused("adam", CPU)
    module = nn.Linear(3, 2)
    assert not make_optimizer(module, PretrainConfig(steps=4))[0].defaults["fused"]
    monkeypatch.setattr("ssl3d.optim.has_fused", lambda *args: True)
    assert make_optimizer(module, PretrainConfig(steps=4))[0].defaults["fused"]
