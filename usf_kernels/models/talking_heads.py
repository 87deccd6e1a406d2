"""Attention of CaiT, with which U-Flow's transformers spend most of their time. Imports timm."""

from __future__ import annotations

import math

import torch
from timm.models.cait import TalkingHeadAttn
from torch import Tensor, nn

from usf_kernels import _core
from usf_kernels.nn.conditioner_layers import hooked
from usf_kernels.ops import native, products

CACHED = 1 << 20  # bytes of attention scores computed at a time, so that they stay in the cache


class CachedTalkingHeads(TalkingHeadAttn):
    """timm's `TalkingHeadAttn` for inference on the CPU, some queries at a time.

    Talking heads (arXiv:2003.02436) mix the heads of every score twice, before and after the softmax. timm
    does so in passes over the scores of all queries, and moves the heads to the last dimension and back for
    each. Here the scores of a few queries stay in the cache, heads first, where the mixing is a small matrix
    times a wide one. A softmax does not see the bias of the first mixing; that of the second adds a multiple
    of the sum of all values. The extension does this in float32, and in bfloat16 where it multiplies that
    without AMX, which PyTorch uses well; PyTorch does it in other dtypes. timm's own code runs in all other
    cases.
    """

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether a module is such an attention, as timm made it."""
        return type(module) is TalkingHeadAttn and _mixes_plainly(module)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to (B, N, C)."""
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters()))
        drops = self.training and self.attn_drop.p > 0
        if not x.is_cpu or native.is_observed() or recorded or drops or not _mixes_plainly(self):
            return super().forward(x)
        qkv = self.qkv(x)
        weights = self.proj_l.weight, self.proj_w.weight, self.proj_w.bias
        attend = _extension if _fits(qkv, self.num_heads) else _pytorch
        y = attend(qkv, self.num_heads, self.scale, *(w.to(qkv.dtype) for w in weights))
        return self.proj_drop(self.proj(y))


def _mixes_plainly(attention: TalkingHeadAttn) -> bool:
    """Whether heads are mixed by linear layers that nobody watches."""
    mixes = attention.proj_l, attention.proj_w
    plain = all(type(mix) is nn.Linear and mix.bias is not None for mix in mixes)
    return plain and not any(hooked(part) for part in (*mixes, attention.attn_drop))


def _fits(qkv: Tensor, heads: int) -> bool:
    """Whether the extension computes the attention of queries, keys and values (B, N, 3 C)."""
    if not products.MULTIPLIES or qkv.numel() == 0 or not native.accepts(qkv, dtype=qkv.dtype):
        return False
    if qkv.dtype == torch.bfloat16:
        whole = qkv.shape[-1] // (3 * heads) % 16 == 0
        return whole and products.MULTIPLIES_BFLOAT16 and not products.has_amx()
    return qkv.dtype == torch.float32


def _extension(qkv: Tensor, heads: int, scale: float, before: Tensor, after: Tensor, bias: Tensor) -> Tensor:
    batch, tokens, channels = qkv.shape
    channels //= 3
    qkv, y = qkv.contiguous(), qkv.new_empty(batch, tokens, channels)
    before, after, bias = (w.float().contiguous() for w in (before, after, bias))
    before = before * (scale * math.log2(math.e))
    _core.talking_heads(
        batch,
        (tokens, heads, channels // heads),
        qkv.data_ptr(),
        qkv.dtype == torch.bfloat16,
        *(t.data_ptr() for t in (before, after, bias, y)),
        products.threads_for(2 * batch * tokens**2 * channels),
    )
    return y


def _pytorch(qkv: Tensor, heads: int, scale: float, before: Tensor, after: Tensor, bias: Tensor) -> Tensor:
    batch, tokens, channels = qkv.shape
    width = channels // (3 * heads)
    # (B, heads, N, channels of a head)
    queries, keys, values = qkv.view(batch, tokens, 3, heads, width).permute(2, 0, 3, 1, 4).contiguous()
    before = before * scale
    constant = values.sum(2) * bias[:, None]
    y = values.new_empty(batch, tokens, heads, width)
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
    return y.flatten(2)
