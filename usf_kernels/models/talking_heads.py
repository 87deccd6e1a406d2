"""Attention of CaiT, with which U-Flow's transformers spend most of their time. Imports timm."""

from __future__ import annotations

import torch
from timm.models.cait import TalkingHeadAttn
from torch import Tensor, nn

from usf_kernels.nn.conditioner_layers import hooked
from usf_kernels.ops.native import is_observed

CACHED = 1 << 20  # bytes of the scores of some queries, of all heads and keys


class CachedTalkingHeads(TalkingHeadAttn):
    """timm's `TalkingHeadAttn` for inference on the CPU, some queries at a time.

    Talking heads (arXiv:2003.02436) mix the heads of every score twice, before and after the softmax. timm
    does so in passes over the scores of all queries, and moves the heads to the last dimension and back for
    each. Here the scores of a few queries stay in the cache, heads first, where the mixing is a small matrix
    times a wide one. A softmax does not see the bias of the first mixing; that of the second adds a multiple
    of the sum of all values. timm's own code runs in all other cases.
    """

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether a module is such an attention, as timm made it."""
        return type(module) is TalkingHeadAttn and _mixes_plainly(module)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to (B, N, C)."""
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters()))
        drops = self.training and self.attn_drop.p > 0
        if not x.is_cpu or is_observed() or recorded or drops or not _mixes_plainly(self):
            return super().forward(x)
        batch, tokens, channels = x.shape
        heads = self.num_heads
        qkv = self.qkv(x).view(batch, tokens, 3, heads, channels // heads)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4).contiguous()  # (B, heads, N, channels of a head)
        before, after = (mix.weight.to(values.dtype) for mix in (self.proj_l, self.proj_w))
        before = before * self.scale
        constant = values.sum(2) * self.proj_w.bias.to(values.dtype)[:, None]
        y = values.new_empty(batch, tokens, heads, channels // heads)
        some = max(1, CACHED // (values.element_size() * heads * tokens))
        memory = values.new_empty(2, heads * min(some, tokens) * tokens)
        for image in range(batch):
            for first in range(0, tokens, some):
                seen = queries[image, :, first : first + some]
                numbers = heads * seen.shape[1] * tokens
                scores, mixed = (m[:numbers].view(heads, -1, tokens) for m in memory)
                torch.bmm(seen, keys[image].mT, out=scores)
                torch.mm(before, scores.flatten(1), out=mixed.view(heads, -1))
                torch.softmax(mixed, 2, out=scores)
                torch.mm(after, scores.flatten(1), out=mixed.view(heads, -1))
                found = torch.bmm(mixed, values[image]) + constant[image, :, None]
                y[image, first : first + some] = found.transpose(0, 1)
        return self.proj_drop(self.proj(y.flatten(2)))


def _mixes_plainly(attention: TalkingHeadAttn) -> bool:
    """Whether heads are mixed by linear layers that nobody watches."""
    mixes = attention.proj_l, attention.proj_w
    plain = all(type(mix) is nn.Linear and mix.bias is not None for mix in mixes)
    return plain and not any(hooked(part) for part in (*mixes, attention.attn_drop))
