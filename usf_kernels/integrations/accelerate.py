"""One call that makes a model of anomalib faster and corrects what it gets wrong; one call undoes it."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module

from torch import nn

from usf_kernels.integrations.replacement import Replacement, check_module, replace_blocks, replace_known


def accelerate(model: nn.Module, *, exact: bool = False, one_step: bool = False) -> Replacement:
    """Make a model faster, in place, and correct it: anomalib's Fastflow, Cflow, Uflow, or one of blocks.

    It calls `replace_blocks`, then gives all other known modules a faster class, in Lightning modules and
    torch models alike. Parameters stay the same objects and checkpoints go both ways;
    `usf_kernels.restore_blocks` undoes all of it.

    - In evaluation mode and without gradients, all flows run in their inference form, U-Flow's graph too.
    - Cflow takes all positions at once, and computes the contribution of their encoding once per size.
    - With convolutional backbones images may have any height and width, not only multiples of the strides.
    - Scores and maps are the original's up to rounding. Unless `exact`, three errors are corrected: Cflow's
      score of an image depended on the others in its batch (now it is `sigmoid(-log p)`, in [0, 1], so
      normalisation and thresholds that were fitted to the old values must be fitted again); U-Flow's mask
      was the complement of a test of blocks (now `pred_mask` is the component tree's, which raises ValueError
      for latents that are not finite); U-Flow's loss summed one of its terms over the batch (now it is the
      mean over images).

    Args:
        model: any module; changed in place.
        exact: keep the original's values even where they are wrong.
        one_step: train Cflow with one optimiser step per batch of images instead of one per
            `fiber_batch_size` positions: far faster, but fewer steps of another size.

    Returns:
        Report of what was replaced, and what was left and why.

    Raises:
        TypeError: if it is not a module.
        ValueError: if nothing in it could be replaced; the model is unchanged.

    Warns:
        UserWarning: for a Cflow whose post-processor was fitted to the original's scores.
    """
    check_module(model)
    classes = _models()
    found = [(name, module) for name, module in model.named_modules() if type(module) in classes]
    report = (replace_known if found else replace_blocks)(model)
    for name, module in model.named_modules():
        known = next((known for known in classes if isinstance(module, known)), None)
        if known is not None and type(module) not in classes and not _is_ours(module):
            report.left[name or type(module).__name__] = (
                f"a subclass of {known.__name__}, which may compute something else"
            )
    for name, module in found:
        fast, title = classes[type(module)], name or type(module).__name__
        report.replaced.append(title)
        if fast.correction and not exact:
            report.notes[title] = fast.correction
        module.__class__ = fast
        module.begin_fast(exact=exact, one_step=one_step)
    if any(module.outdated for _, module in found):
        warnings.warn(
            "accelerate: this Cflow's normalisation and thresholds were fitted to scores on another scale, "
            "and clamp the corrected ones to 0 or 1: fit them again with Engine.validate, or keep the scores "
            "with exact=True",
            stacklevel=2,
        )
    return report


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("usf_kernels.")


def _models() -> dict[type, type]:
    """Map original classes to faster ones; empty if anomalib was never imported."""
    if "anomalib" not in sys.modules:
        return {}
    return import_module("usf_kernels.integrations.anomalib_models").MODELS
