"""The item type of all datasets of the package."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Sample(NamedTuple):
    """One image with its ground truth; the default collate function of PyTorch batches it field by field.

    Attributes:
        image: float32 (3, H, W), values in [0, 1].
        mask: bool (1, H, W), True where the image is defective.
        label: 1 when the image has a defect, else 0.
        name: path of the file, or texture, split and number.
        kind: the kind of defect, "good" when there is none.
    """

    image: torch.Tensor
    mask: torch.Tensor
    label: int
    name: str
    kind: str
