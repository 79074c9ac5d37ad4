"""How a step is run: in parts, with activations computed twice, compiled. What it computes stays the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cohorts import noise_cohort, sphere_cohort
from test_pretrain import CPU, Restore, run, same_weights, settings
from torch import Tensor, nn

import ssl3d
from ssl3d.config import BackboneConfig, PretrainConfig, validate
from ssl3d.device import convolutions
from ssl3d.errors import ConfigError
from ssl3d.models.factory import build_backbone
from ssl3d.models.regions import compile_blocks, recompute_blocks, take_in_turn
from ssl3d.pretrain.loop import _arrange, backpropagate, check_run, pretrain
from ssl3d.pretrain.method import Method
from ssl3d.pretrain.source import training_source
from ssl3d.pretrain.spec import MethodSpec, resolve_method
from ssl3d.registry.registry import registry
from ssl3d.rng import BatchRng

METHODS = sorted(entry.name for entry in registry().methods if entry.load().trains != "none")
OPTIONS = {"deepcluster": {"clusters": 4}}
Gradients = dict[str, Tensor]


def built(name: str, options: dict[str, dict[str, Any]] = OPTIONS) -> tuple[Method, dict[str, Tensor]]:
    """Return a method and a step's views of five items or more, in float64."""
    method = resolve_method(name, options).build(build_backbone(settings().backbone, 0), 0)
    items = max(5, method.items_per_step((8,) * 3, 2))
    source = training_source(sphere_cohort(24), (8, 8, 8), items, method.volumes_per_item, 0, 1)
    method.setup(source)
    method.on_epoch_start(source, 0)
    batch = source.batch(0)
    views = method.views(batch.x, BatchRng(0, 0, batch.items, volumes=batch.volumes))
    return method.double().train(), {k: v.double() if v.is_floating_point() else v for k, v in views.items()}


def step(method: Method, views: dict[str, Tensor], parts: int = 1) -> tuple[dict[str, Tensor], Gradients]:
    losses = backpropagate(method, views, None, parts)
    found = {k: p.grad for k, p in method.named_parameters() if p.grad is not None}
    return losses, found


# In parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_step_in_parts_has_the_losses_gradient_and_buffers_of_the_whole(name: str) -> None:
    method, views = built(name)
    other = copy.deepcopy(method)
    losses, gradients = step(method, views)
    cfg = PretrainConfig(steps=1, crop=8, batch_size=5, accumulate=3)  # five items: parts of 2, 2 and 1
    parts, _ = _arrange(other, cfg, len(next(iter(views.values()))), CPU, None)
    assert parts == (3 if method.splits else 1)
    seen, own = step(other, views, parts)
    assert seen.keys() == losses.keys() and own.keys() == gradients.keys() and gradients
    for key in losses:
        torch.testing.assert_close(seen[key], losses[key], rtol=1e-10, atol=1e-12)
    for key in gradients:
        scale = float(gradients[key].abs().max())
        torch.testing.assert_close(own[key], gradients[key], rtol=1e-7, atol=1e-9 * scale + 1e-13)
    for key, buffer in method.named_buffers():
        torch.testing.assert_close(other.get_buffer(key), buffer, rtol=1e-10, atol=1e-12)


def test_methods_that_compare_or_normalise_samples_do_not_split_and_the_others_do() -> None:
    split = {name for name in METHODS if built(name)[0].splits}
    assert split == {
        "denoising", "inpainting", "models_genesis", "gvsl_without_zmatching", "gvsl_without_affine", "gvsl_released_head",
        "gvsl_affine_untrained",
    }  # fmt: skip
    assert not built("inpainting", {"inpainting": {"loss_over": "holes"}})[0].splits


def test_splitting_a_loss_that_compares_samples_would_be_noticed() -> None:
    """The test above can fail: NT-Xent of parts is another loss."""
    method, views = built("simclr")
    whole, _ = step(copy.deepcopy(method), views)
    parts, _ = step(method, views, 3)
    assert abs(float(whole["nt_xent"] - parts["nt_xent"])) > 0.1


@pytest.mark.parametrize("name", ["denoising", "gvsl", "simclr"])
def test_the_backbone_sees_few_volumes_at_a_time(name: str) -> None:
    """What the option is for: the largest batch that passes the backbone with gradient."""
    sizes = {}
    for accumulate in (1, 3):
        method, views = built(name)
        seen: list[int] = []
        for block in method.backbone.blocks():
            block.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(len(inputs[0])))
        cfg = PretrainConfig(steps=1, crop=8, batch_size=5, accumulate=accumulate)
        parts, _ = _arrange(method, cfg, len(next(iter(views.values()))), CPU, None)
        step(method, views, parts)
        sizes[accumulate] = max(seen)
    assert sizes[3] == -(-sizes[1] // 3)


def test_a_run_in_parts_ends_like_one_without(tmp_path: Path) -> None:
    spec = resolve_method("rotation", {})

    def weights(out: str, **options: Any) -> Tensor:
        pretrain(
            spec,
            noise_cohort(8),
            settings(steps=4, batch_size=4, optimizer="momentum", precision="float32", **options),
            0,
            tmp_path / out,
            CPU,
        )
        backbone = ssl3d.create_model(tmp_path / out)
        return torch.cat([p.flatten() for p in backbone.parameters()])

    whole, parts = weights("whole"), weights("parts", accumulate=2)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)
    assert (
        json.loads((tmp_path / "parts" / "run.json").read_text())["identity"]["pretrain"]["budget"][
            "accumulate"
        ]
        == 2
    )


def test_more_parts_than_crops_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"accumulate=4: a step has batch_size=2 crops.*use accumulate=2"):
        validate(PretrainConfig, {"batch_size": 2, "accumulate": 4}, "preset")


@pytest.mark.parametrize("name", ["genesis_unet3d", "batch norm"])
def test_a_backbone_that_normalises_over_the_batch_is_refused(name: str) -> None:
    if name == "genesis_unet3d":
        backbone = build_backbone(BackboneConfig.model_validate({"name": name, "width": 4}), 0)
    else:
        backbone = build_backbone(settings().backbone, 0)
        backbone.encoder[0][1] = nn.BatchNorm3d(8)  # type: ignore[index,operator]
    with pytest.raises(
        ConfigError, match=r"pretrain.accumulate=2: backbone .* normalises over .*checkpoint_activations=true"
    ):
        take_in_turn(backbone, 2)


@pytest.mark.parametrize("splits", [False, True])
def test_what_cannot_be_arranged_is_known_before_data_are_read(splits: bool) -> None:
    """Whoever takes the batch in parts: the loop, or the backbone."""

    class Parted(Restore):
        pass

    Parted.splits = splits
    genesis = settings(crop=16, accumulate=2).model_copy(
        update={"backbone": BackboneConfig.model_validate({"name": "genesis_unet3d", "width": 4})}
    )
    with pytest.raises(ConfigError, match="pretrain.accumulate=2: backbone genesis_unet3d"):
        check_run(MethodSpec("restore", Parted, Parted.Config(), "Restore"), genesis, 0)


# Activations computed twice -----------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_activations_computed_twice_give_the_same_gradient(name: str, accumulate: int) -> None:
    method, views = built(name)
    other = copy.deepcopy(method)
    cfg = PretrainConfig(steps=1, crop=8, batch_size=5, accumulate=accumulate)
    found = []
    for m, twice in ((method, False), (other, True)):
        parts, _ = _arrange(
            m,
            cfg.model_copy(update={"checkpoint_activations": twice}),
            len(next(iter(views.values()))),
            CPU,
            None,
        )
        found.append(step(m, views, parts))
    (losses, gradients), (seen, own) = found
    assert all(torch.equal(seen[key], losses[key]) for key in losses)
    assert own.keys() == gradients.keys() and all(torch.equal(own[key], gradients[key]) for key in gradients)
    assert all(torch.equal(other.get_buffer(key), buffer) for key, buffer in method.named_buffers())


def test_fewer_activations_are_kept() -> None:
    """Bytes that autograd holds for the backward pass of the U-Net."""

    def kept(twice: bool) -> int:
        backbone = build_backbone(settings().backbone, 0)
        if twice:
            recompute_blocks(backbone)
        held: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            output = backbone(torch.rand(1, 1, 16, 16, 16))[1]
        assert output.requires_grad
        return sum(held.values())

    assert kept(True) < kept(False) / 3


def test_a_run_with_activations_computed_twice_is_the_run_without(tmp_path: Path) -> None:
    run(tmp_path / "once")
    run(tmp_path / "twice", checkpoint_activations=True)
    assert same_weights(tmp_path / "once", tmp_path / "twice")
    once, twice = (json.loads((tmp_path / f / "run.json").read_text())["identity"] for f in ("once", "twice"))
    assert once == twice, "an option without effect"


def test_blocks_with_buffers_are_not_computed_twice() -> None:
    backbone = build_backbone(settings().backbone, 0)
    backbone.encoder[1][1] = nn.BatchNorm3d(16)  # type: ignore[index,operator]
    with pytest.raises(
        ConfigError,
        match="has buffers in its blocks .*running_mean.*move twice.*checkpoint_activations=false",
    ):
        recompute_blocks(backbone)


# Compiled -----------------------------------------------------------------------------------------


def test_compiled_blocks_give_the_gradient_of_those_that_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the tracer alone (aot_eager); the code generator has its own tests."""
    compile_, compiled = torch.compile, []

    def tracing(forward: Any, **options: Any) -> Any:
        compiled.append(forward)
        return compile_(forward, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", tracing)
    plain = build_backbone(settings().backbone, 0)
    other = copy.deepcopy(plain)
    x = torch.rand(2, 1, 8, 8, 8)
    assert compile_blocks(other, x, None, True) is None and len(compiled) == len(other.blocks()) == 3
    for backbone in (plain, other):
        backbone(x)[1].square().mean().backward()
    for (name, one), two in zip(plain.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-7, msg=name)
    assert list(other.state_dict()) == list(plain.state_dict())


def test_where_it_cannot_be_compiled_the_run_says_so_and_is_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(forward: Any, **options: Any) -> Any:
        def call(*inputs: Tensor) -> Tensor:
            raise RuntimeError("no compiler\nat all")

        return call

    run(tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", broken)
    assert run(tmp_path / "r", compile=True)["compiled"] is False
    assert (
        "pretrain.compile is off, since torch.compile failed: RuntimeError: no compiler\n"
        in capsys.readouterr().err
    )
    assert same_weights(tmp_path / "plain", tmp_path / "r")


# Convolutions -------------------------------------------------------------------------------------


def test_convolutions_are_repeatable_unless_the_option_says_otherwise(tmp_path: Path) -> None:
    cudnn, seen = torch.backends.cudnn, []

    class Looking(Restore):
        def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
            seen.append((cudnn.deterministic, cudnn.benchmark))
            return super().training_step(views)

    before = cudnn.deterministic, cudnn.benchmark
    run(tmp_path / "a", Looking, steps=1)
    run(tmp_path / "b", Looking, steps=1, deterministic=False)
    assert set(seen[: len(seen) // 2]) == {(True, False)} and set(seen[len(seen) // 2 :]) == {(False, True)}
    assert (cudnn.deterministic, cudnn.benchmark) == before
    with pytest.raises(ZeroDivisionError), convolutions(deterministic=False):
        1 / 0  # noqa: B018
    assert (cudnn.deterministic, cudnn.benchmark) == before
