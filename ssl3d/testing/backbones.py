"""The checks of a backbone."""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl3d.config import Model, Settings, validate
from ssl3d.device import to_device
from ssl3d.downstream.problems.problem import MODES
from ssl3d.downstream.tasks import Task
from ssl3d.errors import ConfigError
from ssl3d.models.backbone import Backbone
from ssl3d.models.contract import WRITE_BOTH, Breach, check_parts, check_shapes, missing_functions
from ssl3d.models.factory import seeded
from ssl3d.models.regions import recompute_blocks
from ssl3d.models.weights.checkpoint import load_tensors, load_weights, save_tensors, weights_fingerprint
from ssl3d.models.weights.create import create_model
from ssl3d.models.weights.export import export
from ssl3d.pretrain.loop import pretrain
from ssl3d.pretrain.spec import MethodSpec
from ssl3d.registry.registry import Entry, registry
from ssl3d.rng import numpy_rng
from ssl3d.source_hash import reference_of
from ssl3d.testing.checks import Checks, Fault, demand, needs
from ssl3d.testing.declarations import check_name
from ssl3d.testing.networks import Restore
from ssl3d.testing.suite import CPU, evaluated
from ssl3d.testing.volumes import _Volumes
from ssl3d.testing.watch import changed, disturbed, overlap, same, snapshot

REPEATABLE = "leave out dropout and whatever else draws numbers: a resumed run would draw others"


class BackboneChecks(Checks):
    """The checks of one backbone.

    Args:
        cls: the class; it need not be registered.
        settings: of the checks, with its options under ``backbone``.

    Raises:
        ConfigError: an option that it does not have.
    """

    kind = "backbone"
    order = (
        "declarations_make_sense",
        "it_can_be_built",
        "its_parts_are_there",
        "features_have_the_declared_shapes",
        "sizes_work_or_are_refused",
        "features_depend_on_the_volume_only",
        "nothing_is_changed_in_place",
        "encoder_and_decoder_hold_their_own_weights",
        "blocks_can_be_computed_again",
        "copies_are_independent",
        "weights_are_saved_and_loaded",
        "bfloat16_and_channels_last_work",
        "it_is_pretrained_evaluated_and_exported",
    )
    essential = (
        "declarations_make_sense",
        "it_can_be_built",
        "its_parts_are_there",
        "features_have_the_declared_shapes",
    )

    def __init__(self, cls: type[Backbone], settings: Settings) -> None:
        self.cls, self.settings = cls, settings

    @property
    def subject(self) -> Any:
        return self.cls

    # -- pieces -----------------------------------------------------------------------------------

    def build(self, seed: int = 0) -> Backbone:
        options = validate(self.cls.Config, self.settings.backbone.options, f"backbone {self.cls.name}")
        with seeded(seed, "backbone"):
            return self.cls(options)  # type: ignore[call-arg]

    def crop(self, backbone: Backbone) -> tuple[int, int, int]:
        """Return the crop of the settings, or the smallest that the backbone accepts where that is larger."""
        least = backbone.minimum_edge()
        demand(
            isinstance(least, int) and least >= 1,
            f"minimum_edge returns {least!r}",
            "minimum_edge",
            "a number of voxels",
        )
        d, h, w = (max(edge, least) for edge in self.settings.pretrain.crop)
        return d, h, w

    def volumes(self, backbone: Backbone, n: int = 2) -> Tensor:
        """Return made-up volumes (n, 1, D, H, W), all different."""
        drawn = numpy_rng(0, "backbone").random((n, 1, *self.crop(backbone)), dtype="float32")
        return torch.from_numpy(drawn)

    def ready(self, seed: int = 0) -> tuple[Backbone, Tensor]:
        """Return the backbone in ``eval`` mode with two volumes."""
        backbone = self.build(seed).eval()
        return backbone, self.volumes(backbone)

    @staticmethod
    @torch.no_grad()
    def both(backbone: Backbone, x: Tensor) -> tuple[Tensor, Tensor]:
        features = backbone.encode(x.clone())
        return features[-1], backbone.decode(features)

    # -- checks -----------------------------------------------------------------------------------

    def declarations_make_sense(self) -> str:
        """Name, options and functions are what the framework can use."""
        cls = self.cls
        check_name(getattr(cls, "name", None), "backbone")
        config = getattr(cls, "Config", None)
        demand(isinstance(config, type) and issubclass(config, Model), f"Config = {config!r}", "Config",
               "class Config(ssl3d.config.Model): one typed field an option")  # fmt: skip
        missing = missing_functions(cls)
        demand(not missing, missing, None, WRITE_BOTH)
        try:
            validate(cls.Config, {}, f"backbone {cls.name}")
        except ConfigError as error:
            raise Fault(str(error), "Config", "give every option a default") from error
        for name, arguments in (("encode", ("x",)), ("decode", ("features",)), ("minimum_edge", ())):
            try:
                inspect.signature(getattr(cls, name)).bind("self", *arguments)
            except TypeError as error:
                raise Fault(f"{name} cannot be called: {error}", name,
                            f"write def {name}({', '.join(('self', *arguments))})") from error  # fmt: skip
        return f"options {', '.join(cls.Config.model_fields) or 'none'}"

    def it_can_be_built(self) -> str:
        """The initial weights depend on options and seed only."""
        with disturbed(1):
            backbone = self.build()
        with disturbed(2):
            again = self.build()
        differ = changed(backbone, snapshot(again))
        demand(not differ, f"{', '.join(differ[:3])} differ although the seed is the same", "__init__",
               "torch's generator is seeded around __init__; numpy's and Python's are not")  # fmt: skip
        learnt = [name for name, p in backbone.named_parameters() if p.dim() > 1]
        other = changed(backbone, snapshot(self.build(seed=1)))
        demand(not learnt or bool(set(learnt) & set(other)), "no weight changes with the seed", "__init__",
               "do not seed a generator in it")  # fmt: skip
        return f"{sum(p.numel() for p in backbone.parameters()):,} parameters"

    def its_parts_are_there(self) -> str:
        """`encoder` and `decoder` are modules, and both numbers of channels are declared."""
        backbone = self.build()
        with _breaches():
            check_parts(backbone)
        return f"global_channels {backbone.global_channels}, local_channels {backbone.local_channels}"

    def features_have_the_declared_shapes(self) -> str:
        """`encode` and `decode` return the channels that are declared, f^l on the grid of the volume, in either mode."""
        backbone, x = self.ready()
        for training in (False, True):
            with _breaches():
                check_shapes(backbone.train(training), x)
        grids = " ".join("x".join(map(str, f.shape[2:])) for f in backbone.eval().encode(x))
        return f"stages of {grids}"

    def sizes_work_or_are_refused(self) -> str:
        """Odd and unequal edges and the smallest one work; what does not is refused with a ConfigError."""
        backbone, x = self.ready()
        d, h, w = x.shape[2:]
        least = backbone.minimum_edge()
        seen = []
        for shape in (
            (d, h + h // 4, max(least, w - w // 4)), (d + 1, h + 3, max(least, w - 3)), (least,) * 3, (1, 1, 1)
        ):  # fmt: skip
            told = "x".join(map(str, shape))
            try:
                with _breaches():
                    check_shapes(
                        backbone,
                        torch.linspace(0, 1, 2 * shape[0] * shape[1] * shape[2]).reshape(2, 1, *shape),
                    )
            except ConfigError:
                demand(shape != (least,) * 3, f"a volume of {told} is refused, and minimum_edge() = {least}",
                       "minimum_edge", "return the smallest edge that encode accepts")  # fmt: skip
                seen.append(f"{told} refused")
            except Fault:
                raise
            except Exception as error:
                raise Fault(f"a volume of {told}: {type(error).__name__}: {error}", error,
                            "pad and crop (ssl3d.models.padding), or raise ssl3d.errors.ConfigError") from error  # fmt: skip
        return "; ".join(seen) or "all work"

    def features_depend_on_the_volume_only(self) -> str:
        """Equal volumes have equal features, in any batch, and others have others; `eval` moves no statistics."""
        backbone, x = self.ready()
        before = snapshot(backbone)
        found = []
        for number in (1, 2):
            with disturbed(number):
                found.append(self.both(backbone, x))
        moved = changed(backbone, before)
        demand(
            not moved,
            f"a pass in eval mode changes {', '.join(moved[:3])}",
            "encode",
            "change buffers if self.training",
        )
        for what, first, second in zip(("encode", "decode"), *found, strict=True):
            demand(same(first, second), f"{what} returns something else the second time", what, REPEATABLE)
        with disturbed(1):
            first = self.both(copy.deepcopy(backbone).train(), x)
        with disturbed(2):
            second = self.both(copy.deepcopy(backbone).train(), x)
        for what, a, b in zip(("encode", "decode"), first, second, strict=True):
            demand(
                same(a, b), f"{what} returns something else the second time, in train mode", what, REPEATABLE
            )
        mixing = [
            what for what, both, alone in zip(("encode", "decode"), found[0], self.both(backbone, x[:1]), strict=True)
            if not _near(both[:1], alone)
        ]  # fmt: skip
        for what, both in zip(("encode", "decode"), found[0], strict=True):
            demand(not _near(both[:1], both[1:]), f"{what} returns the same features of different volumes", what,
                   "look for what cancels its input: a norm over one voxel, a ReLU that is always 0")  # fmt: skip
        demand(
            not mixing or not backbone.samples_apart,
            f"{' and '.join(mixing)} gives a volume other features when another one is in the batch", "encode",
            "normalise each volume by itself, or with stored statistics in eval mode; on purpose: samples_apart = False",
        )  # fmt: skip
        if mixing:
            return (
                "in eval and train mode; those of one volume change with the others of its batch, as declared"
            )
        return "in eval and train mode, alone and in a batch"

    def nothing_is_changed_in_place(self) -> str:
        """The volume and the features are left as they were."""
        backbone, x = self.ready()
        given = x.clone()
        with torch.no_grad():
            features = backbone.encode(given)
            demand(same(given, x), "encode changes the volume in place", "encode", "clone it first")
            kept = [feature.clone() for feature in features]
            backbone.decode(features)
        untouched = len(features) == len(kept) and all(
            same(a, b) for a, b in zip(features, kept, strict=True)
        )
        demand(untouched, "decode changes the features that it is given", "decode",
               "read them: a method uses f^g after decode; no pop(), no inplace=True on them")  # fmt: skip
        return "volume and features are left as they were"

    def encoder_and_decoder_hold_their_own_weights(self) -> str:
        """What `encode` trains is below `encoder`, what `decode` alone trains below `decoder`, and nothing is unused."""
        backbone, x = self.ready()
        backbone.train()
        backbone.encode(x.clone())[-1].square().mean().backward()
        encoding = {name for name, p in backbone.named_parameters() if p.grad is not None}
        odd = sorted(name for name in encoding if not name.startswith("encoder."))
        demand(not odd, f"encode uses {', '.join(odd[:3])}, which is not below `encoder`", "__init__",
               "put it into self.encoder: methods copy and follow that")  # fmt: skip
        backbone.zero_grad()
        backbone(x.clone())[1].square().mean().backward()
        decoding = {name for name, p in backbone.named_parameters() if p.grad is not None} - encoding
        odd = sorted(name for name in decoding if not name.startswith("decoder."))
        demand(not odd, f"decode alone uses {', '.join(odd[:3])}, which is not below `decoder`", "__init__",
               "put it into self.decoder: methods that train the encoder only freeze that")  # fmt: skip
        unused = sorted(
            {name for name, p in backbone.named_parameters() if p.requires_grad} - encoding - decoding
        )
        demand(not unused, f"no feature depends on {', '.join(unused[:3])}", "__init__", "leave it out")
        return f"{len(encoding)} tensors of the encoder, {len(decoding)} of the decoder"

    def blocks_can_be_computed_again(self) -> str:
        """`pretrain.checkpoint_activations` gives the same gradient, or refuses the backbone."""
        gradients = []
        for again in (False, True):
            backbone, x = self.ready()
            backbone.train()
            blocks = backbone.blocks()
            demand(isinstance(blocks, list) and all(isinstance(block, nn.Module) for block in blocks),
                   "blocks returns something else than a list of modules", "blocks",
                   "return the modules that encode and decode call with tensors")  # fmt: skip
            try:
                if again:
                    recompute_blocks(backbone)
            except ConfigError as error:
                return f"refused ({str(error).splitlines()[0][:80]})"
            backbone(x)[1].square().mean().backward()
            gradients.append({n: p.grad for n, p in backbone.named_parameters() if p.grad is not None})
        first, second = gradients
        odd = [n for n in first if n not in second or not _near(first[n], second[n])]
        demand(not odd, f"computed again, the gradient of {', '.join(odd[:3])} is another one", "blocks",
               "return the modules that encode and decode call with tensors")  # fmt: skip
        return f"{len(blocks)} blocks"

    def copies_are_independent(self) -> str:
        """`copy.deepcopy` gives a network with the same features and memory of its own, as momentum networks need."""
        backbone, x = self.ready()
        other = copy.deepcopy(backbone)
        for what, first, second in zip(
            ("encode", "decode"), self.both(backbone, x), self.both(other, x), strict=True
        ):
            demand(
                same(first, second),
                f"a copy's {what} returns something else",
                what,
                "keep its state in parameters and buffers",
            )
        mine, its = dict(backbone.named_parameters()), dict(other.named_parameters())
        shared = [name for name in mine if overlap(mine[name], its[name])]
        demand(
            not shared,
            f"a copy shares {', '.join(shared[:3])}",
            "__init__",
            "leave out __deepcopy__ and class attributes",
        )
        return f"{len(mine)} tensors"

    def weights_are_saved_and_loaded(self) -> str:
        """Saved after a pass in train mode and loaded into a fresh network, they give the same features."""
        backbone, x = self.ready()
        self.both(backbone.train(), x)  # moves running statistics, where there are any
        other = self.build(seed=1)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weights.safetensors"
            try:
                save_tensors(path, backbone.state_dict())
                load_weights(other, load_tensors(path), path)
            except Exception as error:
                raise Fault(f"its weights cannot be saved and loaded: {str(error).splitlines()[0]}", "__init__",
                            "make all parts in __init__, and none twice: tied weights need one name") from error  # fmt: skip
        pairs = zip(
            ("encode", "decode"), self.both(backbone.eval(), x), self.both(other.eval(), x), strict=True
        )
        for what, first, second in pairs:
            demand(same(first, second), f"after loading, {what} returns something else", what,
                   "keep all state in parameters and buffers (register_buffer, persistent)")  # fmt: skip
        plain = weights_fingerprint(backbone)
        to_device(backbone, CPU)  # channels_last
        demand(
            weights_fingerprint(backbone) == plain, "its fingerprint depends on the memory format", "__init__"
        )
        return f"fingerprint {plain[:12]}"

    def bfloat16_and_channels_last_work(self) -> str:
        """As runs compute: in channels_last on the CPU, and in mixed precision."""
        backbone, x = self.ready()
        plain = self.both(backbone, x)
        to_device(backbone, CPU)
        for what, a, b in zip(("encode", "decode"), plain, self.both(backbone, x), strict=True):
            demand(
                _near(a, b), f"{what} returns something else in channels_last", what, "use reshape, not view"
            )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = self.both(backbone, x[:1])
        for what, a in zip(("encode", "decode"), mixed, strict=True):
            demand(
                bool(a.isfinite().all()),
                f"{what} is not finite in bfloat16",
                what,
                "compute norms in float32",
            )
        return "finite"

    @needs("weights_are_saved_and_loaded", "features_depend_on_the_volume_only")
    def it_is_pretrained_evaluated_and_exported(self) -> str:
        """Two steps of pretraining, resumed, evaluated for segments and classes, exported and loaded again."""
        crop = self.crop(self.build())
        pretraining = {"steps": 2, "batch_size": 2, "crop": crop, "checkpoint_every": 1, "warmup_steps": 0}
        settings = self.settings.model_copy(update={
            "pretrain": self.settings.pretrain.model_copy(update=pretraining),
            "downstream": self.settings.downstream.model_copy(update={"crop": crop}),
        })  # fmt: skip
        spec = MethodSpec(Restore.name, Restore, Restore.Config(), Restore.title)
        cohort = _Volumes(4, tuple(e + 1 for e in crop))  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as folder, self.registered():
            run, exported = Path(folder) / "run", Path(folder) / "exported"
            told = pretrain(spec, cohort, settings, 0, run, CPU)
            again = pretrain(spec, cohort, settings, 0, run, CPU, resume=True)
            demand(
                told["weights_sha256"] == again["weights_sha256"], "a finished run changes when it is resumed"
            )
            export(run, "safetensors", exported)
            backbone = create_model(exported)
            demand(
                weights_fingerprint(backbone) == told["weights_sha256"],
                "the exported weights are others",
                "__init__",
            )
            seen = []
            for kind, metric in (("segmentation", "dsc"), ("classification", "auc")):
                task = Task("check", "Check", kind, "conformance", metric, (2, 2, 2))  # type: ignore[arg-type]
                seen += [f"{mode} {metric} {evaluated(backbone, task, mode, settings):.0f}" for mode in MODES]
        return ", ".join(seen)

    @contextmanager
    def registered(self) -> Iterator[None]:
        """Let the framework find the class by its name."""
        catalogue = registry().backbones
        if self.cls.name in catalogue and catalogue.get(self.cls.name).load() is self.cls:
            yield
            return
        entry = Entry(self.cls.name, "", partial(_itself, self.cls), source=reference_of(self.cls))
        with catalogue.lent(entry):
            yield


def _itself(cls: type[Backbone]) -> type[Backbone]:
    return cls


@contextmanager
def _breaches() -> Iterator[None]:
    """Turn what the contract finds into a fault."""
    try:
        yield
    except Breach as breach:
        raise Fault(str(breach), breach.at, breach.fix) from None


def _near(a: Tensor, b: Tensor) -> bool:
    """Whether two features are equal up to rounding."""
    a, b = a.float(), b.float()
    return a.shape == b.shape and float((a - b).norm()) <= 1e-3 * float(a.norm() + b.norm())
