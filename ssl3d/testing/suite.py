"""The checks of the conformance suite."""

from __future__ import annotations

import copy
import math
import random
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssl3d.config import BackboneConfig, DownstreamConfig, FinetuneConfig, Settings
from ssl3d.data.splits import Split
from ssl3d.downstream.harness import Evaluation, evaluate
from ssl3d.downstream.problems.problem import MODES
from ssl3d.downstream.tasks import Task
from ssl3d.errors import SSL3DError
from ssl3d.models.factory import build_backbone
from ssl3d.models.weights.checkpoint import BACKBONE, load_state, load_tensors, save_state
from ssl3d.pretrain.loop import freeze_untrained, measure, pretrain
from ssl3d.pretrain.method import Method, Progress
from ssl3d.pretrain.pretext import clearly_below
from ssl3d.pretrain.source import CropSource
from ssl3d.pretrain.spec import MethodSpec
from ssl3d.rng import BatchRng, derive_seed
from ssl3d.testing.volumes import _Hearts, _Volumes

CPU = torch.device("cpu")


CHANNELS = (8, 16, 32)


EDGE = 16


@dataclass(frozen=True)
class Check:
    """The result of one check: its name, whether it passed, and what was seen."""

    name: str
    passed: bool
    seen: str = ""


LEARN_VOLUMES = 40


LEARN_STEPS = 240


LEARN = {
    "batch_size": 8, "crop": EDGE, "lr": 3e-3, "schedule": "cosine", "warmup_steps": 10,
    "checkpoint_every": 10_000, "monitor_every": 10_000, "log_every": 10_000, "workers": 0, "precision": "float32",
}  # fmt: skip
"""The run that shows whether a method learns: about half a minute on one core."""


class Suite:
    """The checks of one method.

    Args:
        spec: the method with its configuration.
        collapse_steps: optimizer steps of the short run that looks for collapse.
        learn_steps: optimizer steps of the run that looks for learning.
    """

    def __init__(self, spec: MethodSpec, collapse_steps: int = 40, learn_steps: int = LEARN_STEPS) -> None:
        self.spec, self.collapse_steps, self.learn_steps = spec, collapse_steps, learn_steps
        self.batch_size = max(4, spec.cls.minimum_items)
        self.volumes = _Volumes(8)

    # -- pieces -----------------------------------------------------------------------------------

    def method(self, seed: int = 0) -> Method:
        backbone = build_backbone(BackboneConfig.model_validate({"channels": list(CHANNELS)}), seed)
        method = self.spec.build(backbone, seed)
        freeze_untrained(method)
        return method.train()

    def source(self, batch_size: int | None = None, shape: tuple[int, int, int] = (EDGE,) * 3) -> CropSource:
        volumes = _Volumes(8, tuple(max(20, s + 1) for s in shape))  # type: ignore[arg-type]
        cls = self.spec.cls
        return CropSource(volumes, shape, batch_size or self.batch_size, cls.volumes_per_item, 0)

    @staticmethod
    def views(method: Method, source: CropSource, seed: int = 0, step: int = 0) -> dict[str, Tensor]:
        batch = source.batch(step)
        return method.views(
            batch.x.clone(), BatchRng(seed, step, batch.items, CPU, ("views",), batch.volumes)
        )

    def losses(self, method: Method, views: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = method.training_step(views)
        assert isinstance(losses, dict) and losses, "training_step must return a dict of named losses"
        return losses

    def started(
        self, batch_size: int | None = None, shape: tuple[int, int, int] = (EDGE,) * 3
    ) -> tuple[Method, CropSource]:
        method, source = self.method(), self.source(batch_size, shape)
        method.check(shape, source.batch_size)
        method.setup(source)
        method.on_epoch_start(source, 0)
        return method, source

    # -- checks: each returns what was seen, or raises AssertionError ------------------------------

    def views_depend_on_seed_and_step_only(self) -> str:
        """The same (seed, step) gives the same views whatever the global generators hold; others differ."""
        method, source = self.started()

        def draw(disturbance: int, seed: int, step: int) -> dict[str, Tensor]:
            with _disturbed(disturbance):
                batch = source.batch(0)  # the same crops: only the views may change
                return method.views(
                    batch.x.clone(), BatchRng(seed, step, batch.items, CPU, ("views",), batch.volumes)
                )

        first, again = draw(1, 0, 0), draw(2, 0, 0)
        different = [k for k in first if not torch.equal(first[k], again[k])]
        assert not different, (
            f"views {different} change although seed and step do not: use the rng that is given"
        )
        for what, other in (("seed", draw(1, 1, 0)), ("step", draw(1, 0, 1))):
            assert any(
                first[k].shape != other[k].shape or not torch.equal(first[k], other[k]) for k in first
            ), f"no view changes with the {what}"
        return ", ".join(f"{k} {tuple(v.shape)}" for k, v in first.items())

    def losses_are_finite_scalars(self) -> str:
        """Every loss is a finite scalar tensor."""
        method, source = self.started()
        losses = self.losses(method, self.views(method, source))
        for name, loss in losses.items():
            assert isinstance(loss, Tensor) and loss.dim() == 0, f"{name} is no scalar tensor"
            assert math.isfinite(float(loss.detach())), f"{name} = {float(loss.detach())}"
        return ", ".join(f"{k} {float(v.detach()):.4g}" for k, v in losses.items())

    def gradient_reaches_every_trainable_parameter(self) -> str:
        """One backward pass leaves a non-zero gradient everywhere, declared exceptions apart."""
        method, source = self.started()
        sum(self.losses(method, self.views(method, source)).values()).backward()  # type: ignore[union-attr]
        declared, missing, count = [], [], 0
        for name, parameter in method.named_parameters():
            reached = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
            if name.startswith(self.spec.cls.untrained) and self.spec.cls.untrained:
                declared.append(name)
            elif parameter.requires_grad:
                count += 1
                if not reached:
                    missing.append(name)
        assert not missing, f"no gradient in {', '.join(missing[:5])}" + (
            f" and {len(missing) - 5} more" * (len(missing) > 5)
        )
        note = (
            f"; declared without: {', '.join(self.spec.cls.untrained)} ({len(declared)})" if declared else ""
        )
        return f"{count} parameter tensors{note}"

    def one_batch_can_be_overfitted(self) -> str:
        """Thirty steps on one fixed batch lower the loss."""
        method, source = self.started()
        views = self.views(method, source)
        optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=2e-3)
        curve = []
        for step in range(30):
            total = torch.stack(list(self.losses(method, views).values())).sum()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            method.on_step_end(Progress(step + 1, 30))
            curve.append(float(total.detach()))
        best = min(curve[-5:])
        assert best < curve[0] - 1e-6, f"the loss went from {curve[0]:.4g} to {best:.4g}"
        return f"loss {curve[0]:.4g} -> {best:.4g}"

    def target_networks_follow_by_momentum(self) -> str:
        """A declared target network gets no gradient and moves to m target + (1 - m) online."""
        pairs = self.spec.cls.targets
        if not pairs:
            return "none declared"
        method, source = self.started()
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
        state = dict(method.named_parameters())
        for target, online in pairs.items():
            names = [n for n in state if n.startswith(target + ".")]
            assert names, f'no parameter below the declared target "{target}"'
            for name in names:
                source_name = online + name[len(target) :]
                assert torch.equal(state[name], state[source_name]), (
                    f"{name} does not start as a copy of {source_name}"
                )
        # A first step so that online and target differ, then one that is looked at.
        for step in range(2):
            before = {n: p.detach().clone() for n, p in method.named_parameters()}
            optimizer.zero_grad()
            sum(self.losses(method, self.views(method, source, step=step)).values()).backward()  # type: ignore[union-attr]
            for target in pairs:
                with_grad = [
                    n
                    for n, p in method.named_parameters()
                    if n.startswith(target + ".") and p.grad is not None
                ]
                assert not with_grad, f"a gradient reaches the target network: {with_grad[0]}"
            optimizer.step()
            after_step = {n: p.detach().clone() for n, p in method.named_parameters()}
            method.on_step_end(Progress(step + 1, 10))
        after = {n: p.detach() for n, p in method.named_parameters()}
        moves, gaps = [], []
        for target, online in pairs.items():
            for name in (n for n in after if n.startswith(target + ".")):
                assert torch.equal(before[name], after_step[name]), f"the optimizer moves {name}"
                moves.append((after[name] - before[name]).flatten())
                gaps.append((after_step[online + name[len(target) :]] - before[name]).flatten())
        move, gap = torch.cat(moves).double(), torch.cat(gaps).double()
        assert gap.abs().max() > 0, "online and target never differ"
        rate = float(move @ gap / (gap @ gap))
        residual = float((move - rate * gap).norm() / gap.norm())
        assert 0 < rate <= 1 and residual < 1e-4, (
            f"target moves by {rate:.4g} of the gap with residual {residual:.2g}: no moving average"
        )
        return f"momentum {1 - rate:.4f}"

    def stop_gradients_stop(self) -> str:
        """The output of every declared stop-gradient module carries no gradient."""
        names = self.spec.cls.stop_gradients
        if not names:
            return "none declared"
        method, source = self.started()
        seen: dict[str, list[bool]] = {name: [] for name in names}
        for name in names:
            method.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: seen[name].append(output.requires_grad)
            )
        self.losses(method, self.views(method, source))
        for name, flags in seen.items():
            assert flags, f"{name} is never called"
            assert not any(flags), f"a gradient passes {name}"
        return ", ".join(names)

    def a_checkpoint_gives_the_same_next_step(self) -> str:
        """Saved, loaded into a fresh method and stepped, losses and weights are equal to the bit."""
        method, source = self.started()

        def step(m: Method, o: torch.optim.Optimizer, k: int) -> list[float]:
            losses = self.losses(m, self.views(m, source, step=k))
            o.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            o.step()
            m.on_step_end(Progress(k + 1, 10))
            return [float(v.detach()) for v in losses.values()]

        optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=1e-3)
        step(method, optimizer, 0)
        with tempfile.TemporaryDirectory() as folder:
            save_state(Path(folder), 1, method, optimizer)
            other = self.method(seed=1)
            other.setup(source)
            fresh = torch.optim.Adam([p for p in other.parameters() if p.requires_grad], lr=1e-3)
            assert load_state(Path(folder), other, fresh) == 1
        assert step(method, optimizer, 1) == step(other, fresh, 1), "the next losses differ"
        a, b = method.state_dict(), other.state_dict()
        different = [k for k in a if not torch.equal(a[k], b[k])]
        assert not different, (
            f"after the next step {different[:3]} differ: keep everything in parameters and buffers"
        )
        return f"{len(a)} tensors"

    def the_backbone_loads_into_the_harness(self) -> str:
        """Linear and fine-tune run on the trained backbone, for segmentation and classification."""
        method, _ = self.started()
        volumes = _Volumes(6, labelled=True)
        split = Split("test", ("c0", "c1"), ("c2", "c3"), ("c4", "c5"))
        config = DownstreamConfig(
            crop=(EDGE,) * 3, finetune=FinetuneConfig(steps=1, validate_every=1), feature_budget_mib=64
        )
        seen = []
        for kind, metric in (("segmentation", "dsc"), ("classification", "auc")):
            task = Task("check", "Check", kind, "conformance", metric, (2, 2, 2))  # type: ignore[arg-type]
            for name in MODES:
                outcome = evaluate(
                    copy.deepcopy(method.backbone),
                    Evaluation(task, volumes, split, name, config, 0, CPU),  # type: ignore[arg-type]
                )
                seen.append(f"{name} {metric} {outcome.score:.0f}")
        return ", ".join(seen)

    def sizes_work_or_are_refused(self) -> str:
        """Batches of 1 and 3, non-cubic crops and edges that are no multiple of 16 run, or are refused clearly."""
        seen = []
        for batch, shape in ((1, (EDGE,) * 3), (3, (EDGE,) * 3), (2, (16, 20, 12)), (2, (17, 19, 13))):
            what = f"batch {batch} of {'x'.join(map(str, shape))}"
            try:
                if batch < self.spec.cls.minimum_items:
                    raise SSL3DError("below the declared minimum")
                method, source = self.started(batch, shape)
                losses = self.losses(method, self.views(method, source))
                assert all(math.isfinite(float(v.detach())) for v in losses.values()), f"{what}: {losses}"
                sum(losses.values()).backward()  # type: ignore[union-attr]
            except SSL3DError as error:
                seen.append(f"{what} refused ({str(error).splitlines()[0][:60]})")
            except AssertionError:
                raise
            except Exception as error:
                raise AssertionError(
                    f"{what}: {type(error).__name__}: {error}; refuse it with ssl3d.errors.ConfigError"
                ) from error
        return "; ".join(seen) or "all run"

    def no_label_reaches_the_method(self) -> str:
        """Epoch start, views and step run on volumes that raise when a label is asked for."""
        method, source = self.started()
        self.losses(method, self.views(method, source))
        allowed = {id(source.cohort)}
        held = [n for n, v in vars(method).items() if id(v) in allowed or isinstance(v, _Volumes)]
        assert not held, f"the method keeps the data set in {held}"
        return "labels raise when asked for, and were not"

    def features_do_not_collapse(self) -> str:
        """A short run on phantoms leaves features that differ between volumes."""
        method, source = self.started()
        probe = torch.stack([source.fixed_crop(v) for v in range(len(source))])
        start = measure(method, probe, 0)
        optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=2e-3)
        for step in range(self.collapse_steps):
            if step and source.starts_epoch(step):
                method.on_epoch_start(source, source.epoch_of(step))
            total = torch.stack(
                list(self.losses(method, self.views(method, source, step=step)).values())
            ).sum()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            method.on_step_end(Progress(step + 1, self.collapse_steps))
        end = measure(method, probe, 0)
        assert all(math.isfinite(v) for v in end.values()), f"measures that are not finite: {end}"
        seen = ", ".join(f"{k} {start[k]:.3g} -> {end[k]:.3g}" for k in end)
        assert end["feature_std"] > 0.05 * start["feature_std"] and end["effective_rank"] > 1.2, (
            f"collapsed: {seen}"
        )
        return seen

    def learns(self) -> str:
        """A short run on the embedded cohort moves the encoder, and brings the score on held-back volumes below chance."""
        channels = BackboneConfig.model_validate({"channels": list(CHANNELS)})
        settings = Settings.model_validate({
            "preset": "conformance", "backbone": channels, "pretrain": {**LEARN, "steps": self.learn_steps},
        })  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            run = pretrain(self.spec, _Hearts(LEARN_VOLUMES), settings, 0, out, CPU)
            after = load_tensors(out / BACKBONE)
        before = build_backbone(channels, 0).state_dict()
        moved = [
            name
            for name in before
            if name.startswith("encoder.") and not torch.equal(before[name], after[name])
        ]
        assert moved, "no weight of the encoder moves: its features never get a gradient"
        pretext = run["pretext"]
        start, end, chance = pretext["start"], pretext["end"], pretext["chance"]
        assert chance is not None, (
            "no level to compare with: define chance(views), the score of an output that ignores its input"
        )
        seen = (
            f"held-back score {start:.3f} -> {end:.3f} in {self.learn_steps} steps, {chance:.3f} without a look at "
            f"the input ({pretext['held_back']})"
        )
        if self.spec.cls.control:
            assert not clearly_below(end, chance), f"a control has something to learn after all: {seen}"
            return f"nothing, as a control should: {seen}"
        assert pretext["learned"], (
            f"{seen}. A head on pooled features needs a norm (ssl3d.models.heads.PooledLinear); a loss that compares "
            "samples needs many (views_per_item, view_edge)."
        )
        return seen

    def run(self, only: Collection[str] = (), skip: Collection[str] = ()) -> Iterator[Check]:
        """Yield the result of one check after another.

        Args:
            only: names of the checks to run; empty: all.
            skip: names of checks to leave out.
        """
        checks: list[Callable[[], str]] = [
            self.views_depend_on_seed_and_step_only,
            self.losses_are_finite_scalars,
            self.gradient_reaches_every_trainable_parameter,
            self.one_batch_can_be_overfitted,
            self.target_networks_follow_by_momentum,
            self.stop_gradients_stop,
            self.a_checkpoint_gives_the_same_next_step,
            self.the_backbone_loads_into_the_harness,
            self.sizes_work_or_are_refused,
            self.no_label_reaches_the_method,
            self.features_do_not_collapse,
            self.learns,
        ]
        if self.spec.cls.trains == "none":
            checks = [self.the_backbone_loads_into_the_harness]
        for check in checks:
            name = check.__name__.replace("_", " ")
            if name in skip or (only and name not in only):
                continue
            try:
                yield Check(name, True, check())
            except AssertionError as error:
                yield Check(name, False, str(error))
            except Exception as error:
                yield Check(name, False, f"{type(error).__name__}: {error}")


@contextmanager
def _disturbed(number: int) -> Iterator[None]:
    """Put every global generator into another state, and back afterwards."""
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    torch.manual_seed(derive_seed(number, "disturbance"))
    np.random.seed(number)  # noqa: NPY002
    random.seed(number)
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])  # noqa: NPY002
        random.setstate(state[2])
