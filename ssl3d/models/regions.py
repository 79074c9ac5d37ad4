"""How a backbone is run: its blocks compiled, or computed twice to save memory, or its volumes a few at a time.

Nothing here renames, adds or changes a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl3d.errors import ConfigError
from ssl3d.models.backbone import Backbone, Features


def recompute_blocks(backbone: Backbone) -> None:
    """Keep only the inputs of each block for the backward pass, and compute the rest again there.

    The gradients are those without it, to the bit where the operations are repeatable.

    Raises:
        ConfigError: a block has buffers, which a second pass would move twice.
    """
    for block in backbone.blocks():
        if moved := [name for name, _ in block.named_buffers()]:
            raise ConfigError(
                f"pretrain.checkpoint_activations=true: backbone {backbone.name} has buffers in its blocks ({moved[0]}), "
                "which a second pass would move twice. Use pretrain.checkpoint_activations=false, and a smaller "
                "pretrain.crop or pretrain.batch_size."
            )
        block.forward = partial(_again, block.forward)


def _again(forward: Callable[..., Any], *inputs: Tensor) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False) if torch.is_grad_enabled() else forward(*inputs)


def check_samples_apart(backbone: Backbone, parts: int) -> None:
    """Refuse a backbone of which parts of a batch have other features than the whole.

    Args:
        backbone: the network.
        parts: in how many it is to see a batch, whoever parts it.

    Raises:
        ConfigError: a volume's features depend on the others of its batch.
    """
    norms = (nn.modules.batchnorm._BatchNorm,)
    if not backbone.samples_apart or any(isinstance(part, norms) for part in backbone.modules()):
        raise ConfigError(
            f"pretrain.accumulate={parts}: backbone {backbone.name} normalises over the volumes of a batch, so that parts "
            "of it have other features. Use pretrain.accumulate=1 and pretrain.checkpoint_activations=true."
        )


def take_in_turn(backbone: Backbone, parts: int) -> None:
    """Let ``encode`` and ``decode`` take the volumes of a batch in ``parts`` parts, one after the other.

    Of each part only the features are kept, and the rest is computed again in the backward pass (gradient caching: Gao et
    al., RepL4NLP 2021). What a method computes of the features, it computes of all: losses that compare samples and
    norms over the batch are those without it.

    Raises:
        ConfigError: see :func:`check_samples_apart`.
    """
    check_samples_apart(backbone, parts)
    encode, decode = backbone.encode, backbone.decode

    def encode_in_turn(x: Tensor) -> Features:
        found = [_again(encode, part) for part in x.tensor_split(min(parts, len(x)))]
        return Features([torch.cat(stage) for stage in zip(*found, strict=True)], found[0].size)

    def decode_in_turn(features: Features) -> Tensor:
        sizes = [len(part) for part in features[-1].tensor_split(min(parts, len(features[-1])))]

        def one(*part: Tensor) -> Tensor:
            return decode(Features(part, features.size))

        stages = (stage.split(sizes) for stage in features)
        return torch.cat([_again(one, *part) for part in zip(*stages, strict=True)])

    backbone.encode, backbone.decode = encode_in_turn, decode_in_turn  # type: ignore[method-assign]


def compile_blocks(backbone: Backbone, x: Tensor, dtype: torch.dtype | None, decoded: bool) -> str | None:
    """Compile each block where gradients are wanted (torch.compile), and try it.

    Block by block: blocks of one shape share their code, and a method's own part may be anything. Passes without
    gradient, whose shapes differ, stay as they are.

    Args:
        backbone: the network.
        x: a batch (B, 1, D, H, W) of the shape that a step has.
        dtype: of autocast; None: none.
        decoded: whether the decoder is trained, too.

    Returns:
        Why nothing is compiled, in one line; None where it is.
    """
    plain = [(block, block.forward) for block in backbone.blocks()]
    for block, forward in plain:
        block.forward = partial(_compiled, torch.compile(forward, dynamic=False), forward)
    try:
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None), torch.enable_grad():
            features = backbone.encode(x)
            output = backbone.decode(features) if decoded else features[-1]
        output.float().sum().backward()
    except Exception as error:  # of the compiler, whatever it is: training is possible without it
        for block, forward in plain:
            block.forward = forward
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    finally:
        backbone.zero_grad(set_to_none=True)
    return None


def _compiled(compiled: Callable[..., Any], forward: Callable[..., Any], *inputs: Tensor) -> Any:
    return (compiled if torch.is_grad_enabled() else forward)(*inputs)
