"""The one pretraining loop, the same for every method."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssl3d import ranks, signals
from ssl3d.config import PretrainConfig, Settings, identity_values
from ssl3d.data.prepared.facts import preparation_facts
from ssl3d.device import PeakMemory, autocast_dtype, convolutions, to_device
from ssl3d.environment import device_name, environment
from ssl3d.errors import ConfigError, count
from ssl3d.geometry import full_precision
from ssl3d.marks import without_effect
from ssl3d.models.contract import check_class, check_contract
from ssl3d.models.factory import build_backbone
from ssl3d.models.norms import check_norms
from ssl3d.models.regions import check_samples_apart, compile_blocks, recompute_blocks, take_in_turn
from ssl3d.models.weights.checkpoint import weights_fingerprint
from ssl3d.optim import check_optimizer, make_optimizer
from ssl3d.pretrain.contract import HELD_BACK_SCORE, check_functions, check_losses, check_sizes, numbers
from ssl3d.pretrain.method import Method, Progress
from ssl3d.pretrain.monitor import collapse_measures
from ssl3d.pretrain.pretext import Score, held_back_score, summary
from ssl3d.pretrain.run_folder import RunFolder, opened
from ssl3d.pretrain.run_log import Log
from ssl3d.pretrain.source import CropSource, training_source
from ssl3d.pretrain.spec import MethodSpec
from ssl3d.pretrain.watch import Watch, check_weights
from ssl3d.progress import Track, say
from ssl3d.rng import BatchRng
from ssl3d.source_hash import pretraining_code

if TYPE_CHECKING:
    from ssl3d.data.prepared.volumes import Volumes

PROBE_CROPS = 16
HELD_BACK_CROPS = 16
"""The pretext task is scored on as many voxels as these crops have."""


def pretrain_identity(spec: MethodSpec, settings: Settings, data: str, seed: int) -> dict[str, Any]:
    """Return everything that decides the weights of a run; equal identities, equal weights."""
    budget = identity_values(settings.pretrain)
    return {
        "method": spec.identity(),
        "backbone": identity_values(settings.backbone),
        "pretrain": {"data": data, "budget": budget} if spec.cls.trains != "none" else None,
        "seed": seed,
    }


def build_method(spec: MethodSpec, settings: Settings, seed: int, device: torch.device) -> Method:
    """Build backbone and method on ``device``."""
    method = spec.build(build_backbone(settings.backbone, seed), seed)
    if method.trains != "none":
        crop = settings.pretrain.crop
        method.check(crop, check_sizes(method, crop, settings.pretrain.batch_size))
    freeze_untrained(method)
    to_device(method, device)
    return method


def freeze_untrained(method: Method) -> None:
    """Freeze the parts of the backbone that the method does not train."""
    if method.trains != "encoder+decoder":
        method.backbone.decoder.requires_grad_(False)
    if method.trains == "none":
        method.backbone.encoder.requires_grad_(False)


def check_run(spec: MethodSpec, settings: Settings, seed: int, processes: int = 1) -> None:
    """Raise ConfigError for whatever can be known to be wrong before any data are read.

    ``processes``: how many are to train together.

    Builds the method once on the CPU: a backbone option, a head that does not fit, an optimizer
    that does not exist or a crop too small for the depth all show here. So do a backbone that does not
    keep its contract and a function that a plugin lacks (PluginError).
    """
    check_optimizer(settings.pretrain.optimizer)
    check_functions(spec.cls)
    check_class(settings.backbone.name)
    cpu = torch.device("cpu")
    backbone = build_backbone(settings.backbone, seed)
    check_contract(backbone)
    method = build_method(spec, settings, seed, cpu)
    if spec.cls.trains != "none":
        _arrange(method, settings.pretrain.model_copy(update={"compile": False}), 1, cpu, None)
    if processes > 1:
        check_together(method, settings.pretrain, processes)
    least = backbone.minimum_edge()
    view = method.view_shape(settings.pretrain.crop)
    if spec.cls.trains != "none" and min(view) < least:
        views = f", of which {spec.name} makes views of {view}," if method.view_edge != 1 else ""
        raise ConfigError(
            f"pretrain.crop = {tuple(settings.pretrain.crop)}{views} is too small for the backbone "
            f"{settings.backbone.name}, whose depth needs edges of at least {least}: use a larger crop or fewer "
            "backbone.channels."
        )
    check_contract(backbone, [max(edge, least) for edge in view])


def check_together(method: Method, cfg: PretrainConfig, processes: int) -> None:
    """Raise ConfigError where so many processes cannot train the method together."""
    if method.trains == "none":
        raise ConfigError(f"{method.name} trains nothing: leave --devices and --nodes out.")
    items = method.items_per_step(cfg.crop, cfg.batch_size)
    if items < processes:
        raise ConfigError(
            f"A step of {method.name} has {count(items, 'item')} (pretrain.batch_size={cfg.batch_size}), fewer than the "
            f"{processes} devices: use {count(items, 'device')}, or a larger pretrain.batch_size (which is another run)."
        )
    check_norms(method, method.name, method.backbone)


def pretrain(
    spec: MethodSpec,
    cohort: Volumes | None,
    settings: Settings,
    seed: int,
    out: Path,
    device: torch.device,
    *,
    resume: bool = False,
    allow_code_change: bool = False,
) -> dict[str, Any]:
    """Pretrain a backbone and write it to ``out``.

    Where several processes have met (:mod:`ssl3d.pretrain.devices`), each calls this and trains on its share of every
    batch; the first one writes, monitors and scores.

    Args:
        spec: the method.
        cohort: unlabelled volumes; None only for a method that trains nothing.
        settings: the preset.
        seed: decides initialisation, order, crops and views.
        out: folder of the run, see :mod:`ssl3d.models.weights.checkpoint`.
        device: where to compute.
        resume: go on from the newest state in ``out``; the weights end bit for bit as without the
            interruption on the same machine.
        allow_code_change: go on even if the code has changed since; the run then names both (``code_by_step``).

    Returns:
        The provenance that was written to ``run.json``.

    Raises:
        CheckpointError: ``out`` holds a run and ``resume`` is off, or it is another run, or one of other code.
        BusyError: another process is pretraining in ``out``.
        WriteError: ``out`` cannot be written to, or its disk is full.
        Stopped: the process was asked to stop (:mod:`ssl3d.signals`); a state was saved.
        TrainingError: a loss, a gradient or a weight is not finite.
        DataError: there are fewer volumes than the method needs at once.
    """
    identity = pretrain_identity(spec, settings, cohort.fingerprint if cohort else "", seed)
    code = pretraining_code(spec.cls, settings.backbone.name)
    with opened(out, identity, code, resume=resume, allow_code_change=allow_code_change) as folder:
        finished: dict[str, Any] | None = ranks.first_ones(folder.previous if folder.finished else None)
        if finished is not None:
            return finished
        return _pretrain(spec, cohort, settings, seed, folder, device, identity)


def _pretrain(
    spec: MethodSpec,
    cohort: Volumes | None,
    settings: Settings,
    seed: int,
    folder: RunFolder,
    device: torch.device,
    identity: dict[str, Any],
) -> dict[str, Any]:
    cfg = settings.pretrain
    steps = cfg.steps if spec.cls.trains != "none" else 0
    memory = PeakMemory(device)
    method = build_method(spec, settings, seed, device)
    run: dict[str, Any] = {
        "status": "running",
        "steps": steps,
        "method_name": spec.name,
        "title": spec.title,
        "trains": spec.cls.trains,
        "preset": settings.preset,
        "backbone": settings.backbone.model_dump(mode="json"),
        "identity": identity,
        "environment": {**environment(), "processes": ranks.world()},
        "code": "+".join(folder.codes.values()),
        **({"code_by_step": folder.codes} if len(folder.codes) > 1 else {}),
        "volumes": None if cohort is None else {"cases": len(cohort), "taken_for": cohort.taken_for},
        "preparation": preparation_facts(cohort),
        "device": device_name(device, cfg.precision),
        **folder.progress(),
    }
    folder.begin(run)
    if steps:
        assert cohort is not None
        items = method.items_per_step(cfg.crop, cfg.batch_size)
        held_back = max(1, HELD_BACK_CROPS // cfg.batch_size)
        source = training_source(cohort, cfg.crop, items, method.volumes_per_item, seed, held_back)
        source.own = ranks.own(items)
        run |= {"padded": source.padded, "excluded": list(settings.data.exclude)}
        with convolutions(cfg.deterministic):
            _train(method, source, settings, seed, folder, device, run)
    check_weights(method, spec.name, steps)
    run |= {
        "step": steps,
        "voxels_seen": steps and steps * source.batch_size * method.voxels_per_item(cfg.crop),
        "parameters_trained": sum(p.numel() for p in method.parameters() if p.requires_grad),
        "peak_memory_mib": memory.mib(),
        "weights_sha256": weights_fingerprint(method.backbone),
    }
    return folder.finish(run, method.backbone)


def _train(
    method: Method, source: CropSource, settings: Settings, seed: int, folder: RunFolder, device: torch.device,
    run: dict[str, Any],
) -> None:  # fmt: skip
    cfg, name = settings.pretrain, run["method_name"]
    optimizer, scheduler = make_optimizer(method, cfg)
    dtype = autocast_dtype(cfg.precision, device)
    method.setup(source)
    to_device(method, device)  # the buffers that setup made
    start = ranks.share_state(folder.load(method, optimizer), method, optimizer)
    parts, more = _arrange(method, cfg, source.batch_size, device, dtype)
    run |= more
    began = time.monotonic() - run["seconds"]
    method.train()
    watch = Watch(name)
    track = Track(f"Pretraining {name}, seed {seed}", cfg.steps)
    with folder.log(start) as log, track, signals.listening():
        looking = Looking(method, source, seed, device, dtype, log)
        for step, batch in enumerate(source.batches(start, cfg.steps, cfg.workers, device), start):
            if source.starts_epoch(step):
                _start_epoch(method, source, step, watch)
            if step == 0:
                looking.score(0)
            rng = BatchRng(seed, step, batch.items, device, ("views",), batch.volumes)
            views = method.views(batch.x, rng)  # of crops (B, [V,] 1, D, H, W)
            scheduler.step_update(step)
            optimizer.zero_grad(set_to_none=True)
            with ranks.together(source.batch_size):
                losses = backpropagate(method, views, dtype, parts)
            ranks.add_gradients(method)
            watch.note(losses, limit_gradient(method, cfg.clip_grad), step)
            optimizer.step()
            done = step + 1
            method.on_step_end(Progress(done, cfg.steps))

            # Nothing above reads from the device; what is below does.
            log_now, measure_now, save_now = (
                done % every == 0 or done == cfg.steps
                for every in (cfg.log_every, cfg.monitor_every, cfg.checkpoint_every)
            )
            (asked,) = ranks.exchanged([signals.number()])  # one process that was asked to stop stops all
            save_now |= bool(asked)
            if log_now or measure_now or save_now:
                watch.look()
            if measure_now or save_now:
                check_weights(method, name, done)
                ranks.check_same(method, name)
            if measure_now:
                looking.measure(done)
            if log_now:
                log.write(done, {**watch.values, "lr": optimizer.param_groups[0]["lr"]})
            track.update(done, watch.values or None)
            if save_now:
                run |= {"step": done, "losses": watch.values, "seconds": round(time.monotonic() - began, 2)}
                log.flush()
                folder.save(run, method, optimizer, cfg)
                ranks.wait()
                if asked and done < cfg.steps:
                    raise signals.Stopped(asked)
        run["pretext"] = looking.summary()


def _start_epoch(method: Method, source: CropSource, step: int, watch: Watch) -> None:
    """Let the method begin a pass over the volumes; on every process, which then has what it came to on the first."""
    if type(method).on_epoch_start is Method.on_epoch_start:
        return
    watch.look()  # what begins here is no fault of the features, and names no step
    method.on_epoch_start(source, source.epoch_of(step))
    ranks.share_state(step, method)


@without_effect
class Looking:
    """How the method does, as the first process looks at it; the others do nothing here.

    Args:
        method: in training.
        source: with the held-back crops.
        seed: the run's.
        device, dtype: where to compute, and in what.
        log: where it is written.
    """

    def __init__(
        self, method: Method, source: CropSource, seed: int, device: torch.device, dtype: torch.dtype | None, log: Log
    ) -> None:  # fmt: skip
        self.method, self.source, self.seed, self.log = method, source, seed, log
        self._where = device, dtype
        self._last: Score | None = None
        self._idle = ranks.rank() > 0
        if not self._idle:
            crops = [source.fixed_crop(v) for v in range(min(PROBE_CROPS, len(source)))]
            self._probe = torch.stack(crops).to(device)  # (N, 1, D, H, W)

    def score(self, step: int, more: bool = False) -> None:
        """Write the score on held-back crops, and with ``more`` the measures of collapse."""
        if self._idle:
            return
        self._last = held_back_score(self.method, self.source.held_back, *self._where)
        measures = measure(self.method, self._probe, self.seed) if more and len(self._probe) > 1 else {}
        self.log.write(step, {HELD_BACK_SCORE: self._last.value, **measures})

    def measure(self, step: int) -> None:
        """Write both."""
        self.score(step, more=True)

    def summary(self) -> dict[str, Any]:
        """Return what ``run.json`` says of the pretext task."""
        if self._idle:
            return {}
        # Without a step to do (killed after the last state was saved), the score has to be taken anew.
        end = self._last or held_back_score(self.method, self.source.held_back, *self._where)
        return summary(self.method, self.log.before_training(HELD_BACK_SCORE), end, self.source.held_back_is)


def _arrange(
    method: Method, cfg: PretrainConfig, items: int, device: torch.device, dtype: torch.dtype | None
) -> tuple[int, dict[str, Any]]:
    """Arrange how the backbone is run, as the options say.

    Returns:
        In how many parts ``training_step`` is called, and what the run says of it.
    """
    backbone, more = method.backbone, {}
    here = ranks.counts(items)[ranks.rank()]
    splits = method.splits and items >= cfg.accumulate
    if cfg.accumulate > 1:
        check_samples_apart(backbone, cfg.accumulate)
    if cfg.compile:
        volumes = max(1, here * method.volumes_per_item * method.views_per_item // cfg.accumulate)
        x = torch.zeros(volumes, 1, *method.view_shape(cfg.crop), device=device)
        why = compile_blocks(backbone, x, dtype, method.trains == "encoder+decoder")
        if why:
            say(f"pretrain.compile is off, since torch.compile failed: {why}")
        more["compiled"] = why is None
    if cfg.checkpoint_activations:
        recompute_blocks(backbone)
    if cfg.accumulate > 1 and not splits:
        take_in_turn(backbone, cfg.accumulate)
    return min(cfg.accumulate, here) if splits else 1, more


def backpropagate(
    method: Method, views: dict[str, Tensor], dtype: torch.dtype | None, parts: int = 1
) -> dict[str, Tensor]:
    """Add the gradient of a step's losses to the parameters.

    Args:
        method: the method.
        views: what its ``views`` returned.
        dtype: of autocast; None: none.
        parts: of how many items at a time, for a method that ``splits``.

    Returns:
        The losses of the whole batch, of all processes, scalars on the device.

    Raises:
        TrainingError: it returned something else than scalar losses with a gradient.
    """
    losses: dict[str, Tensor] = {}
    device = next(method.parameters()).device
    for part in [views] if parts == 1 else _split(views, parts):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            found = method.training_step(part)
        check_losses(found, method)
        total = torch.stack([full_precision(loss) for loss in found.values()]).sum()
        share = ranks.share()
        if parts > 1:
            share *= len(next(iter(part.values()))) / len(next(iter(views.values())))
        (total if share == 1 else share * total).backward()
        for name, loss in found.items():
            losses[name] = share * loss.detach() + losses.get(name, 0)
    return ranks.added_losses(losses)


def _split(views: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """Return the views of a few items at a time."""
    split = [view.tensor_split(parts) for view in views.values()]
    return [dict(zip(views, part, strict=True)) for part in zip(*split, strict=True)]


def limit_gradient(module: nn.Module, most: float | None) -> Tensor:
    """Scale the gradient down to norm ``most``, if given, and return the norm that it had: a scalar on the device."""
    if most is not None:
        return nn.utils.clip_grad_norm_(module.parameters(), most)
    return nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


@without_effect
@torch.no_grad()
def measure(method: Method, probe: Tensor, seed: int) -> dict[str, float]:
    """Return the measures of collapse and the method's own, on fixed crops with fixed randomness.

    Args:
        method: the method in training.
        probe: crops of different volumes (N, 1, D, H, W), N >= 2.
        seed: the run's seed.
    """
    rng = BatchRng(seed, 0, range(len(probe)), probe.device, ("monitor",))
    return collapse_measures(method.backbone, probe) | numbers(method, "monitor", method.monitor(probe, rng))
