"""The checks of a pretext method."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl3d.config import Settings
from ssl3d.data.splits import Split
from ssl3d.downstream.harness import Evaluation, evaluate
from ssl3d.downstream.problems.problem import MODES
from ssl3d.downstream.tasks import Task
from ssl3d.errors import ConfigError, SSL3DError
from ssl3d.models.backbone import Backbone
from ssl3d.models.factory import build_backbone
from ssl3d.models.weights.checkpoint import BACKBONE, load_state, load_tensors, save_state
from ssl3d.pretrain.contract import RESERVED
from ssl3d.pretrain.loop import backpropagate, freeze_untrained, measure, pretrain
from ssl3d.pretrain.method import Method, Progress
from ssl3d.pretrain.pretext import clearly_below, held_back_score
from ssl3d.pretrain.source import Batch, CropSource, training_source
from ssl3d.pretrain.spec import MethodSpec
from ssl3d.rng import BatchRng
from ssl3d.testing.checks import Checks, Fault, demand, hint_of, is_finite, needs
from ssl3d.testing.declarations import check_declarations, check_functions
from ssl3d.testing.networks import plain
from ssl3d.testing.settings import conformance_settings
from ssl3d.testing.volumes import _Hearts, _Volumes
from ssl3d.testing.watch import changed, disturbed, generators_left_alone, overlap, same, snapshot

CPU = torch.device("cpu")
LEARN_VOLUMES = 40
LEARN_STEPS = conformance_settings().pretrain.steps
"""Optimizer steps of the run that shows whether a method learns."""
USE_RNG = "draw from the rng that views is given; what a step needs of it, put into the views"
USE_BUFFERS = "keep whatever a later step needs in parameters or buffers: self.register_buffer(name, tensor)"


class Suite(Checks):
    """The checks of one method.

    Args:
        spec: the method with its configuration.
        collapse_steps: optimizer steps of the short run that looks for collapse.
        learn_steps: optimizer steps of the run that looks for learning; default: the settings'.
        settings: of the checks, see :func:`ssl3d.testing.settings.conformance_settings`.

    Raises:
        ConfigError, PluginError: the backbone of the settings cannot be built.
    """

    kind = "method"
    order = (
        "declarations_make_sense",
        "its_functions_can_be_called",
        "it_can_be_built",
        "views_are_a_dictionary_of_tensors",
        "views_depend_on_seed_and_step_only",
        "losses_are_finite_scalars",
        "nothing_is_changed_in_place",
        "a_step_depends_on_weights_and_views_only",
        "gradient_reaches_every_trainable_parameter",
        "parts_of_a_batch_give_its_gradient",
        "the_network_is_used_as_declared",
        "scoring_changes_nothing",
        "one_batch_can_be_overfitted",
        "target_networks_follow_by_momentum",
        "stop_gradients_stop",
        "a_checkpoint_gives_the_same_next_step",
        "the_backbone_loads_into_the_harness",
        "any_backbone_will_do",
        "sizes_work_or_are_refused",
        "a_crop_of_air_gives_finite_losses",
        "no_label_reaches_the_method",
        "features_do_not_collapse",
        "learns",
    )
    essential = (
        "its_functions_can_be_called",
        "it_can_be_built",
        "views_are_a_dictionary_of_tensors",
        "losses_are_finite_scalars",
    )

    def __init__(
        self,
        spec: MethodSpec,
        collapse_steps: int = 40,
        learn_steps: int | None = None,
        settings: Settings | None = None,
    ) -> None:
        settings = settings or conformance_settings()
        if learn_steps is not None:
            settings = settings.model_copy(
                update={"pretrain": settings.pretrain.model_copy(update={"steps": learn_steps})}
            )
        self.spec, self.collapse_steps, self.settings = spec, collapse_steps, settings.for_method(spec.name)
        self.crop = settings.pretrain.crop
        self.batch_size = max(min(4, settings.pretrain.batch_size), spec.cls.minimum_items)
        self.network = build_backbone(settings.backbone, 0)  # what is wrong with it is no fault of the method

    @property
    def subject(self) -> Any:
        return self.spec.cls

    def chosen(self) -> Sequence[str]:
        if self.spec.cls.trains == "none":
            return (*self.order[:3], "the_backbone_loads_into_the_harness")
        return self.order

    # -- pieces -----------------------------------------------------------------------------------

    def method(self, seed: int = 0, backbone: Backbone | None = None) -> Method:
        method = self.spec.build(backbone or build_backbone(self.settings.backbone, seed), seed)
        freeze_untrained(method)
        return method.train()

    def source(self, batch_size: int | None = None, shape: tuple[int, int, int] | None = None) -> CropSource:
        shape = shape or self.crop
        volumes = _Volumes(8, tuple(max(20, s + 1) for s in shape))  # type: ignore[arg-type]
        items, cls = batch_size or self.batch_size, self.spec.cls
        return training_source(volumes, shape, items, cls.volumes_per_item, 0, held_back_batches=1)

    @staticmethod
    def rng(batch: Batch, seed: int = 0, step: int = 0) -> BatchRng:
        return BatchRng(seed, step, batch.items, CPU, ("views",), batch.volumes)

    @classmethod
    def views(cls, method: Method, source: CropSource, seed: int = 0, step: int = 0) -> dict[str, Tensor]:
        batch = source.batch(step)
        return cls.sound_views(method.views(batch.x.clone(), cls.rng(batch, seed, step)))

    @staticmethod
    def sound_views(views: Any) -> dict[str, Tensor]:
        """Return what ``views`` returned, after a look at what it is."""
        hint = 'return a dictionary: {"name": tensor}'
        demand(isinstance(views, dict) and bool(views), f"views returns {_kind(views)}", "views", hint)
        for name, view in views.items():
            demand(isinstance(view, Tensor), f"the view {name!r} is {_kind(view)}, no tensor", "views", hint)
            demand(view.dtype not in (torch.float64, torch.float16), f"the view {name} is {_kind(view.dtype)}", "views",
                   "make it float32, as the crops are: view.float()")  # fmt: skip
            demand(bool(view.isfinite().all()), f"the view {name} has values that are not finite", "views",
                   "look for divisions by 0 and logarithms of it")  # fmt: skip
        found: dict[str, Tensor] = views
        return found

    @staticmethod
    def losses(method: Method, views: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = method.training_step(views)
        demand(isinstance(losses, dict) and bool(losses),
               f"training_step must return a dict of named losses, not {_kind(losses)}", "training_step",
               'return {"loss": tensor}')  # fmt: skip
        for name, loss in losses.items():
            demand(isinstance(name, str) and name not in RESERVED, f"a loss is called {name!r}", "training_step",
                   f"give it a name of its own; the log has {', '.join(RESERVED)}")  # fmt: skip
            demand(isinstance(loss, Tensor) and loss.dim() == 0, f"{name} is no scalar tensor", "training_step",
                   "reduce it, .mean() for example, and leave it a tensor")  # fmt: skip
            value = float(loss.detach())
            demand(math.isfinite(value), f"{name} = {value}", "training_step",
                   "look for divisions by 0, logarithms of it, and roots at 0")  # fmt: skip
        return losses

    def started(
        self,
        batch_size: int | None = None,
        shape: tuple[int, int, int] | None = None,
        backbone: Backbone | None = None,
    ) -> tuple[Method, CropSource]:
        method, source = self.method(backbone=backbone), self.source(batch_size, shape)
        method.check(source.crop, source.batch_size)
        method.setup(source)
        method.on_epoch_start(source, 0)
        return method, source

    def trained(
        self, method: Method, source: CropSource, optimizer: torch.optim.Optimizer, step: int
    ) -> list[float]:
        """Do one whole step of training as the loop does it, and return the losses."""
        if step and source.starts_epoch(step):
            method.on_epoch_start(source, source.epoch_of(step))
        losses = self.losses(method, self.views(method, source, step=step))
        optimizer.zero_grad()
        _backward(losses)
        optimizer.step()
        method.on_step_end(Progress(step + 1, 10))
        return [float(v.detach()) for v in losses.values()]

    # -- checks: each returns what was seen, or raises Fault ----------------------------------------

    def declarations_make_sense(self) -> str:
        """Names, title, trained parts and options are what the framework can use."""
        return check_declarations(self.spec)

    def its_functions_can_be_called(self) -> str:
        """What must be written is, and has the arguments that the framework gives."""
        return check_functions(self.spec.cls)

    def it_can_be_built(self) -> str:
        """The initial weights depend on the seed only, the backbone is left whole, and what is declared is there."""
        with disturbed(1):
            method = self.method()
        with disturbed(2):
            again = self.method()
        differ = changed(method, snapshot(again))
        demand(not differ, f"{', '.join(differ[:3])} differ although the seed is the same", "__init__",
               "torch's generator is seeded around __init__; numpy's and Python's are not")  # fmt: skip
        given, kept = self.network.state_dict(), method.backbone.state_dict()
        odd = sorted(n for n in given.keys() ^ kept.keys()) + [
            n for n in given.keys() & kept.keys() if given[n].shape != kept[n].shape
        ]
        demand(not odd, f"the method changes the parts of the backbone: {', '.join(odd[:3])}", "__init__",
               "leave self.backbone as it is given: only its weights are kept; heads are the method's own")  # fmt: skip
        names = [name for name, _ in method.named_parameters()]
        prefixes = self.spec.cls.untrained
        for prefix in prefixes if isinstance(prefixes, tuple | list) else ():
            demand(any(n.startswith(prefix) for n in names), f'no parameter begins with the declared "{prefix}"',
                   "untrained", "give prefixes of names of parameters")  # fmt: skip
        modules = dict(method.named_modules())
        for name in self.spec.cls.stop_gradients:
            demand(name in modules, f'there is no module "{name}"', "stop_gradients",
                   "name a ssl3d.StopGradient() that __init__ makes")  # fmt: skip
        edge = method.view_edge
        demand(
            is_finite(edge) and 0 < edge <= 1,
            f"view_edge = {edge!r}; it is a share of the crop's edge",
            "view_edge",
        )
        return f"{sum(p.numel() for p in method.parameters()):,} parameters"

    def views_are_a_dictionary_of_tensors(self) -> str:
        """Views are named, finite tensors."""
        method, source = self.started()
        views = self.views(method, source)
        return ", ".join(f"{k} {tuple(v.shape)}" for k, v in views.items())

    def views_depend_on_seed_and_step_only(self) -> str:
        """The same (seed, step) gives the same views whatever the global generators hold; others differ."""
        method, source = self.started()
        batch = source.batch(0)  # the same crops: only the views may change

        def draw(disturbance: int, seed: int, step: int) -> dict[str, Tensor]:
            with disturbed(disturbance):
                return method.views(batch.x.clone(), self.rng(batch, seed, step))

        first, again = draw(1, 0, 0), draw(2, 0, 0)
        different = [k for k in first if not same(first[k], again[k])]
        demand(
            not different, f"views {different} change although seed and step do not: use the rng that is given", "views",
            "draw from rng alone: rng.normal(), rng.uniform(), rng.integers(); rng.fork(name) for another stream",
        )  # fmt: skip
        with generators_left_alone("views", USE_RNG):
            draw_here = method.views(batch.x.clone(), self.rng(batch))
        demand(all(same(first[k], draw_here[k]) for k in first), "views change with the number of calls", "views",
               USE_BUFFERS)  # fmt: skip
        for what, other in (("seed", draw(1, 1, 0)), ("step", draw(1, 0, 1))):
            demand(any(not same(first[k], other[k]) for k in first), f"no view changes with the {what}", "views",
                   "draw from rng: a method that sees the same views in every epoch learns them by heart")  # fmt: skip
        return f"{', '.join(first)} change with seed and step"

    def nothing_is_changed_in_place(self) -> str:
        """Crops and views are left as they were, and no view is another one under a second name."""
        method, source = self.started()
        batch = source.batch(0)
        given = batch.x.clone()
        views = method.views(given, self.rng(batch))
        demand(same(given, batch.x), "views changes the crops that it is given, in place", "views",
               "begin with x = x.clone(), or leave out the underscore: x + noise, not x.add_(noise)")  # fmt: skip
        names = list(views)
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                demand(
                    not overlap(views[a], views[b]),
                    f'the views "{a}" and "{b}" share memory: what is done to one is done to the other', "views",
                    "x.clone() before it is changed; a tensor that is needed twice, return once",
                )  # fmt: skip
        before = {name: view.clone() for name, view in views.items()}
        self.losses(method, views)
        demand(views.keys() == before.keys(), "training_step adds or removes views", "training_step",
               "leave the dictionary as it is: chance() and pretext_score() are given it, too")  # fmt: skip
        moved = [name for name in before if not same(views[name], before[name])]
        demand(not moved, f"training_step changes the views {moved} in place", "training_step",
               "clone a view before it is changed: chance() is given it, too")  # fmt: skip
        return "crops and views are left as they were"

    def losses_are_finite_scalars(self) -> str:
        """Every loss is a finite scalar tensor."""
        method, source = self.started()
        losses = self.losses(method, self.views(method, source))
        return ", ".join(f"{k} {float(v.detach()):.4g}" for k, v in losses.items())

    def a_step_depends_on_weights_and_views_only(self) -> str:
        """Two methods of equal weights have equal losses on equal views, and no weight moves until the optimizer steps."""
        found = []
        views = self.views(*self.started())
        for disturbance in (1, 2):
            with disturbed(disturbance):
                method, source = self.method(), self.source()
                with generators_left_alone("setup", "use ssl3d.rng.torch_rng(volumes.seed, name)"):
                    method.setup(source)
                with generators_left_alone(
                    "on_epoch_start", "use ssl3d.rng.torch_rng(volumes.seed, name, epoch)"
                ):
                    method.on_epoch_start(source, 0)
                before = {name: p.detach().clone() for name, p in method.named_parameters()}
                losses = self.losses(method, copy.deepcopy(views))
                found.append({name: float(loss.detach()) for name, loss in losses.items()})
        differ = [name for name in found[0] if found[0][name] != found[1].get(name)]
        demand(
            not differ,
            f"the losses {differ} differ although weights and views are equal",
            "training_step",
            USE_RNG,
        )
        with generators_left_alone("training_step", USE_RNG):
            self.losses(method, views)
        moved = [n for n, p in method.named_parameters() if not same(p.detach(), before[n])]
        demand(not moved, f"training_step moves {', '.join(moved[:3])}", "training_step",
               "move a target network in on_step_end: the pretext task is scored by training_step, too")  # fmt: skip
        graded = [n for n, p in method.named_parameters() if p.grad is not None]
        demand(not graded, f"training_step calls backward: {', '.join(graded[:3])} have a gradient", "training_step",
               "return the losses; the loop calls backward")  # fmt: skip
        with generators_left_alone("on_step_end", USE_BUFFERS):
            method.on_step_end(Progress(1, 10))
        return "equal twice, to the bit"

    def gradient_reaches_every_trainable_parameter(self) -> str:
        """One backward pass leaves a non-zero gradient everywhere, declared exceptions apart."""
        method, source = self.started()
        losses = self.losses(method, self.views(method, source))
        demand(
            _total(losses).requires_grad,
            "no loss has a gradient",
            "training_step",
            "look for .detach(), .item() and no_grad()",
        )
        _backward(losses)
        declared, missing, count = [], [], 0
        for name, parameter in method.named_parameters():
            reached = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
            if self.spec.cls.untrained and name.startswith(tuple(self.spec.cls.untrained)):
                declared.append(name)
            elif parameter.requires_grad:
                count += 1
                if not reached:
                    missing.append(name)
        hint = "look for .detach() on its way to the loss; what gets none on purpose, name in `untrained`"
        if missing and all(name.startswith("backbone.decoder") for name in missing):
            hint = 'the decoder is not used: trains = "encoder"'
        demand(
            not missing,
            f"no gradient in {', '.join(missing[:5])}" + f" and {len(missing) - 5} more" * (len(missing) > 5),
            "training_step", hint,
        )  # fmt: skip
        note = (
            f"; declared without: {', '.join(self.spec.cls.untrained)} ({len(declared)})" if declared else ""
        )
        return f"{count} parameter tensors{note}"

    @needs("gradient_reaches_every_trainable_parameter", "a_step_depends_on_weights_and_views_only")
    def parts_of_a_batch_give_its_gradient(self) -> str:
        """With `splits`, the gradient of a batch is the mean of those of its parts."""
        method, source = self.started(batch_size=4)
        if not method.splits:
            return "not declared"
        if not self.network.samples_apart:
            return f"the backbone {self.network.name} compares the volumes of a batch"
        views = self.views(method, source)
        found = []
        for parts in (1, 2):
            method, _ = self.started(batch_size=4)
            losses = backpropagate(method, dict(views), None, parts)
            grads = torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])
            found.append((float(_total(losses)), grads))
        (whole, first), (parted, second) = found
        gap = float((first - second).norm() / first.norm())
        demand(
            gap < 1e-3, f"in two parts, the loss is {parted:.5g} instead of {whole:.5g} and the gradient another one",
            "splits", "splits = False: the loss compares items, or normalises over them",
        )  # fmt: skip
        return f"gradients differ by {gap:.0e}"

    def the_network_is_used_as_declared(self) -> str:
        """No more voxels pass the network than `views_per_item` says, and the decoder is called if it is trained."""
        method, source = self.started()
        views = self.views(method, source)
        seen = _Use()
        encode, decode = method.backbone.encode, method.backbone.decode
        method.backbone.encode = seen.watched(encode)  # type: ignore[method-assign]
        method.backbone.decode = seen.called(decode)  # type: ignore[method-assign]
        self.losses(method, views)
        if self.spec.cls.trains == "encoder":
            demand(not seen.decoded, 'trains = "encoder", and training_step calls the decoder, which stays random', "trains",
                   'trains = "encoder+decoder", or use self.backbone.encode only')  # fmt: skip
        told = method.voxels_per_item(source.crop)
        passed = seen.voxels / source.batch_size
        demand(
            passed <= 1.01 * told,
            f"{passed:.0f} voxels of an item pass the network, and {told} are declared: a step would see more than that of "
            "other methods", "training_step",
            "declare views_per_item (views of each volume) and view_edge (their edge over the crop's)",
        )  # fmt: skip
        return f"{passed:.0f} voxels an item" + ", and the decoder" * bool(seen.decoded)

    @needs(
        "nothing_is_changed_in_place",
        "views_depend_on_seed_and_step_only",
        "a_step_depends_on_weights_and_views_only",
    )
    def scoring_changes_nothing(self) -> str:
        """The held-back score and the monitor are finite, the same twice, and leave the method as it was."""
        method, source = self.started()
        before = snapshot(method)
        found = []
        for disturbance in (1, 2):
            with disturbed(disturbance):
                score = held_back_score(method, source.held_back, CPU)
                probe = torch.stack([source.fixed_crop(v) for v in range(min(4, len(source)))])
                found.append((score, measure(method, probe, 0)))
        moved = changed(method, before)
        demand(
            not moved, f"scoring the pretext task changes {', '.join(moved[:3])}", "training_step",
            "change buffers in on_step_end, or `if self.training`: weights must not depend on how often a run is scored",
        )  # fmt: skip
        (score, monitored), (again, _) = found
        chance = score.chance
        demand(chance is None or is_finite(chance), f"chance = {chance}", "chance",
               "return a number, or None where there is no such level")  # fmt: skip
        demand(
            (score.value, chance) == (again.value, again.chance),
            f"the held-back score is {score.value} once and {again.value} the second time", "pretext_score", USE_RNG,
        )  # fmt: skip
        wrong = [name for name, value in monitored.items() if not isinstance(value, int | float)]
        demand(not wrong, f"monitor returns {wrong} that are no numbers", "monitor", "float(...)")
        level = "" if chance is None else f", {chance:.4g} without a look at the input"
        return f"untrained {score.value:.4g}{level}"

    @needs("gradient_reaches_every_trainable_parameter", "nothing_is_changed_in_place")
    def one_batch_can_be_overfitted(self) -> str:
        """Thirty steps on one fixed batch lower the loss."""
        method, source = self.started()
        views = self.views(method, source)
        optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=2e-3)
        curve = []
        for step in range(30):
            losses = self.losses(method, views)
            optimizer.zero_grad()
            _backward(losses)
            optimizer.step()
            method.on_step_end(Progress(step + 1, 30))
            curve.append(float(_total(losses).detach()))
        best = min(curve[-5:])
        demand(best < curve[0] - 1e-6, f"the loss went from {curve[0]:.4g} to {best:.4g}", "training_step",
               "look at the sign of the loss: it is minimised")  # fmt: skip
        return f"loss {curve[0]:.4g} -> {best:.4g}"

    def target_networks_follow_by_momentum(self) -> str:
        """A target network gets no gradient and moves to m target + (1 - m) online; none moves that is not declared."""
        pairs = self.spec.cls.targets
        method, source = self.started()
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
        _start_as_copies(method, pairs)
        # A first step so that online and target differ, then one that is looked at.
        for step in range(2):
            before = {n: p.detach().clone() for n, p in method.named_parameters()}
            optimizer.zero_grad()
            _backward(self.losses(method, self.views(method, source, step=step)))
            reached = [n for n in _below(before, pairs) if method.get_parameter(n).grad is not None]
            demand(not reached, f"a gradient reaches the target network: {(reached or [''])[0]}", "training_step",
                   "target.requires_grad_(False), and torch.no_grad() around it")  # fmt: skip
            optimizer.step()
            after_step = {n: p.detach().clone() for n, p in method.named_parameters()}
            method.on_step_end(Progress(step + 1, 10))
        after = {n: p.detach() for n, p in method.named_parameters()}
        frozen = {n for n, p in method.named_parameters() if not p.requires_grad}
        moved = [n for n in after if n in frozen and not same(after[n], after_step[n])]
        _demand_declared([n for n in moved if n not in _below(moved, pairs)], after)
        if not pairs:
            return "none"
        return _momentum(pairs, before, after_step, after)

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
            demand(
                bool(flags),
                f"{name} is never called",
                "training_step",
                f"self.{name}(...), or do not declare it",
            )
            demand(
                not any(flags),
                f"a gradient passes {name}",
                "training_step",
                "let it be a ssl3d.StopGradient()",
            )
        return ", ".join(names)

    @needs(
        "a_step_depends_on_weights_and_views_only",
        "views_depend_on_seed_and_step_only",
        "target_networks_follow_by_momentum",
    )
    def a_checkpoint_gives_the_same_next_step(self) -> str:
        """Saved, loaded into a fresh method and stepped, losses and weights are equal to the bit."""
        method, source = self.started()
        optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=1e-3)
        done = 3  # an epoch has begun in the meantime
        for step in range(done):
            self.trained(method, source, optimizer, step)
        other = self.method(seed=1)
        other.setup(source)
        fresh = torch.optim.Adam([p for p in other.parameters() if p.requires_grad], lr=1e-3)
        with tempfile.TemporaryDirectory() as folder:
            try:
                save_state(Path(folder), done, method, optimizer)
                load_state(Path(folder), other, fresh)
            except (RuntimeError, SSL3DError) as error:
                raise Fault(
                    f"its state cannot be saved and loaded: {str(error).strip().splitlines()[0]}", "__init__",
                    "copy.deepcopy a network that is used twice; make buffers in __init__ or setup",
                ) from error  # fmt: skip
        for step in range(done, done + 2):
            first = self.trained(method, source, optimizer, step)
            try:
                second = self.trained(other, source, fresh, step)
            except (AttributeError, TypeError, KeyError, IndexError) as error:
                raise Fault(f"after a checkpoint the next step stops: {type(error).__name__}: {error}", "training_step",
                            USE_BUFFERS) from error  # fmt: skip
            demand(
                first == second,
                "the next losses differ after a checkpoint was loaded",
                "training_step",
                USE_BUFFERS,
            )
        differ = changed(method, snapshot(other))
        demand(not differ, f"after the next step {differ[:3]} differ", "on_step_end", USE_BUFFERS)
        return f"{len(method.state_dict())} tensors"

    def the_backbone_loads_into_the_harness(self) -> str:
        """Linear, fine-tune and nearest neighbours run on the backbone, for segmentation and classification."""
        method, _ = self.started() if self.spec.cls.trains != "none" else (self.method(), None)
        seen = []
        for kind, metric in (("segmentation", "dsc"), ("classification", "auc")):
            task = Task("check", "Check", kind, "conformance", metric, (2, 2, 2))  # type: ignore[arg-type]
            for name in MODES:
                seen.append(f"{name} {metric} {evaluated(method.backbone, task, name, self.settings):.0f}")
        return ", ".join(seen)

    def any_backbone_will_do(self) -> str:
        """The method trains on a backbone of one stage and odd widths, in bfloat16 too, or refuses it."""
        try:
            method, source = self.started(backbone=plain())
            views = self.views(method, source)
            _backward(self.losses(method, dict(views)))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                losses = self.losses(method, views)
            _backward(losses)
        except ConfigError as error:
            return f"refused ({str(error).splitlines()[0][:80]})"
        return "two convolutions, float32 and bfloat16"

    def sizes_work_or_are_refused(self) -> str:
        """Batches of 1 and 3, non-cubic crops and edges that are no multiple of 16 run, or are refused clearly."""
        seen = []
        e = max(self.crop)
        for batch, shape in (
            (1, self.crop), (3, self.crop), (2, (e, e * 5 // 4, e * 3 // 4)), (2, (e + 1, e * 19 // 16, e * 13 // 16)),
        ):  # fmt: skip
            what = f"batch {batch} of {'x'.join(map(str, shape))}"
            try:
                if batch < self.spec.cls.minimum_items:
                    raise ConfigError("below the declared minimum")
                method, source = self.started(batch, shape)
                _backward(self.losses(method, self.views(method, source)))
            except SSL3DError as error:
                seen.append(f"{what} refused ({str(error).splitlines()[0][:60]})")
            except Fault as fault:
                raise Fault(f"{what}: {fault}", fault.at, fault.hint) from fault
            except Exception as error:
                raise Fault(
                    f"{what}: {type(error).__name__}: {error}", error,
                    "make it work, or refuse it: def check(self, crop, items): raise ssl3d.errors.ConfigError",
                ) from error  # fmt: skip
        return "; ".join(seen) or "all run"

    def a_crop_of_air_gives_finite_losses(self) -> str:
        """Crops that are one value throughout, as beside the body, leave losses and gradients finite."""
        method, source = self.started()
        batch = source.batch(0)
        views = self.sound_views(method.views(torch.zeros_like(batch.x), self.rng(batch)))
        losses = self.losses(method, views)
        _backward(losses)
        broken = [
            n for n, p in method.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
        ]
        demand(not broken, f"the gradient of {', '.join(broken[:3])} is not finite on a crop of one value", "training_step",
               "add a small number to deviations and norms that are divided by, before a root")  # fmt: skip
        return ", ".join(f"{k} {float(v.detach()):.4g}" for k, v in losses.items())

    def no_label_reaches_the_method(self) -> str:
        """Epoch start, views and step run on volumes that raise when a label is asked for."""
        method, source = self.started()
        self.losses(method, self.views(method, source))
        held = [n for n, v in vars(method).items() if isinstance(v, _Volumes)]
        demand(
            not held, f"the method keeps the data set in {held}", "setup", "keep what setup is given instead"
        )
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
            losses = self.losses(method, self.views(method, source, step=step))
            optimizer.zero_grad()
            _backward(losses)
            optimizer.step()
            method.on_step_end(Progress(step + 1, self.collapse_steps))
        end = measure(method, probe, 0)
        demand(all(map(is_finite, end.values())), f"measures that are not finite: {end}", "training_step")
        seen = ", ".join(f"{k} {start[k]:.3g} -> {end[k]:.3g}" for k in end)
        demand(
            end["feature_std"] > 0.05 * start["feature_std"] and end["effective_rank"] > 1.2, f"collapsed: {seen}",
            "training_step", "something must keep the features of different volumes apart",
        )  # fmt: skip
        return seen

    @needs("gradient_reaches_every_trainable_parameter", "scoring_changes_nothing")
    def learns(self) -> str:
        """A short run on the embedded cohort moves the encoder, and brings the score on held-back volumes below chance."""
        steps = self.settings.pretrain.steps
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            hearts = _Hearts(LEARN_VOLUMES, max(24, *(e * 3 // 2 for e in self.crop)))
            run = pretrain(self.spec, hearts, self.settings, 0, out, CPU)
            after = load_tensors(out / BACKBONE)
        before = self.network.state_dict()
        moved = [n for n in before if n.startswith("encoder.") and not torch.equal(before[n], after[n])]
        demand(
            bool(moved), "no weight of the encoder moves: its features never get a gradient", "training_step"
        )
        pretext = run["pretext"]
        start, end, chance = pretext["start"], pretext["end"], pretext["chance"]
        demand(
            chance is not None,
            "no level to compare with: define chance(views), the score of an output that ignores its input", None,
            "the variance of what is restored, the logarithm of the number of classes",
        )  # fmt: skip
        seen = (
            f"held-back score {start:.3f} -> {end:.3f} in {steps} steps, {chance:.3f} without a look at "
            f"the input ({pretext['held_back']})"
        )
        if self.spec.cls.control:
            demand(
                not clearly_below(end, chance),
                f"a control has something to learn after all: {seen}",
                "control",
            )
            return f"nothing, as a control should: {seen}"
        demand(
            pretext["learned"],
            f"{seen}. A head on pooled features needs a norm (ssl3d.models.heads.PooledLinear); a loss that compares "
            "samples needs many (views_per_item, view_edge).", "training_step",
        )  # fmt: skip
        return seen


# -- parts of checks --------------------------------------------------------------------------------


@dataclass
class _Use:
    """What passes a backbone with a gradient."""

    voxels: int = 0
    decoded: list[bool] = field(default_factory=list)

    def watched(self, encode: Any) -> Any:
        def watching(x: Tensor) -> Any:
            self.voxels += x.numel() * torch.is_grad_enabled()
            return encode(x)

        return watching

    def called(self, decode: Any) -> Any:
        def calling(features: Any) -> Any:
            self.decoded.append(True)
            return decode(features)

        return calling


def _total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([loss.float() for loss in losses.values()]).sum()


def _backward(losses: dict[str, Tensor]) -> None:
    """Call backward on the sum; losses without a gradient are told by the check that looks at gradients."""
    total = _total(losses)
    if not total.requires_grad:
        return
    try:
        total.backward()
    except RuntimeError as error:
        raise Fault(f"backward stops: {error}", "training_step", hint_of(error)) from error


def _kind(value: Any) -> str:
    """Return what a value is, in words.

    >>> _kind([1]), _kind(None), _kind(torch.float64)
    ('a list', 'None', 'float64')
    """
    if value is None:
        return "None"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _below(names: Any, targets: Any) -> list[str]:
    """Return the names that stand below one of the target networks."""
    return [name for name in names if any(name.startswith(target + ".") for target in targets)]


def _start_as_copies(method: Method, pairs: dict[str, str]) -> None:
    """Demand that each target network starts as a copy of its online network."""
    state = dict(method.named_parameters())
    for target, online in pairs.items():
        names = [n for n in state if n.startswith(target + ".")]
        demand(bool(names), f'no parameter below the declared target "{target}"', "targets",
               "name the submodule; copy.deepcopy the online network, for one and the same module is no target")  # fmt: skip
        for name in names:
            source_name = online + name[len(target) :]
            demand(source_name in state, f"{name} has no counterpart {source_name}", "targets")
            demand(same(state[name], state[source_name]), f"{name} does not start as a copy of {source_name}",
                   "__init__", "copy.deepcopy the online network")  # fmt: skip


def _demand_declared(moved: list[str], parameters: dict[str, Tensor]) -> None:
    """Demand that no frozen parameter moves that belongs to no declared target network."""
    if not moved:
        return
    name = moved[0]
    parts = name.split(".")
    for place in range(1, len(parts)):
        target, rest = ".".join(parts[:place]), ".".join(parts[place:])
        online = [
            other[: -len(rest) - 1] for other, value in parameters.items()
            if other.endswith("." + rest) and other not in moved and value.shape == parameters[name].shape
        ]  # fmt: skip
        if online:
            raise Fault(f"on_step_end moves {target}, a copy of {online[0]}, which no `targets` declares", "on_step_end",
                        f'targets = {{"{target}": "{online[0]}"}}, so that it can be checked')  # fmt: skip
    raise Fault(f"on_step_end moves {', '.join(moved[:3])}, which get no gradient and are no declared target",
                "on_step_end", 'declare targets = {"target": "online"}, or keep them in buffers')  # fmt: skip


def _momentum(
    pairs: dict[str, str], before: dict[str, Tensor], after_step: dict[str, Tensor], after: dict[str, Tensor]
) -> str:
    """Demand that all targets move by one share of what parts them from their online networks; returns the momentum."""
    moves, gaps = [], []
    for target, online in pairs.items():
        for name in _below(after, [target]):
            demand(same(before[name], after_step[name]), f"the optimizer moves {name}", "__init__",
                   "target.requires_grad_(False)")  # fmt: skip
            moves.append((after[name] - before[name]).flatten())
            gaps.append((after_step[online + name[len(target) :]] - before[name]).flatten())
    move, gap = torch.cat(moves).double(), torch.cat(gaps).double()
    demand(bool(gap.abs().max() > 0), "online and target never differ", "targets")
    rate = float(move @ gap / (gap @ gap))
    residual = float((move - rate * gap).norm() / gap.norm())
    demand(
        0 < rate <= 1 and residual < 1e-4,
        f"target moves by {rate:.4g} of the gap with residual {residual:.2g}: no moving average", "on_step_end",
        "target.lerp_(online, 1 - momentum), under torch.no_grad()",
    )  # fmt: skip
    return f"momentum {1 - rate:.4f}"


def evaluated(backbone: nn.Module, task: Task, mode: Any, settings: Settings) -> float:
    """Return the score of a task on six made-up volumes."""
    volumes = _Volumes(6, settings.downstream.crop, labelled=True)
    split = Split("test", ("c0", "c1"), ("c2", "c3"), ("c4", "c5"))
    evaluation = Evaluation(task, volumes, split, mode, settings.downstream, 0, CPU)  # type: ignore[arg-type]
    return evaluate(copy.deepcopy(backbone), evaluation).score  # type: ignore[arg-type]
