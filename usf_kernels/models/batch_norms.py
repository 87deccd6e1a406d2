"""Folding batch norms into the convolutions before them, for the inference of frozen networks."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


@torch.no_grad()
def fold_batch_norms(network: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy in which batch norms that directly follow a convolution are folded into it.

    The pairs are found by running the network on an `example`. The maps stay the same up to rounding. Where a
    convolution's result is also used elsewhere, folding would change them; then `network` itself is returned.

    Args:
        network: module in evaluation mode, from images to a sequence of maps.
        example: images that it takes.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    pairs, expected = _watch(network, example)
    folded = deepcopy(network)
    for norm_name, convolution_name in pairs.items():
        convolution, norm = folded.get_submodule(convolution_name), folded.get_submodule(norm_name)
        folded.set_submodule(convolution_name, fuse_conv_bn_eval(convolution, norm))
        folded.set_submodule(norm_name, _without_norm(norm))
    return folded if _close(folded(example), expected) else network


def _watch(network: nn.Module, example: Tensor) -> tuple[dict[str, str], Sequence[Tensor]]:
    """Map each batch norm to the convolution feeding it, by name; also return the network's maps."""
    names = {module: name for name, module in network.named_modules()}
    returned: dict[int, tuple[nn.Module, Tensor]] = {}  # by id; holding the tensor keeps its id unique
    pairs = {}

    def after(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        returned[id(output)] = module, output

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in returned:
            pairs[names[module]] = names[returned[id(inputs[0])][0]]

    hooks = [
        module.register_forward_hook(after)
        if isinstance(module, nn.Conv2d)
        else module.register_forward_pre_hook(before)
        for module in names
        if isinstance(module, nn.Conv2d)
        or (isinstance(module, nn.BatchNorm2d) and module.running_var is not None)
    ]
    try:
        return pairs, network(example)
    finally:
        for hook in hooks:
            hook.remove()


def _without_norm(norm: nn.Module) -> nn.Module:
    """Return the dropout and activation that timm's batch norms apply after the norm; else an identity."""
    rest = [part for name in ("drop", "act") if (part := getattr(norm, name, None)) is not None]
    return nn.Sequential(*rest) if rest else nn.Identity()


def _close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether the maps agree up to rounding, with room for its growth over a hundred layers."""
    return all(
        bool((ours - truth).abs().max() <= 1e3 * torch.finfo(truth.dtype).eps * truth.abs().max())
        for ours, truth in zip(found, expected, strict=True)
    )
