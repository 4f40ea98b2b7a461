"""Attention by PyTorch's fused kernel, which keeps no scores, if it computes what attend() in model.py does."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from humptygpt import model as models
from humptygpt.model import Mask

# a CPU trains in bfloat16 with the formula for up to this many keys, because the kernel's backward pass is slow there
EXPLICIT_KEYS = 256


def use_fused_kernel(model: nn.Module) -> None:
    """Let each attention without a kernel of its own use faster_attend(), unless the user has edited attend()."""
    if agrees(models.attend, fused_attend):
        for module in model.modules():
            if getattr(module, "kernel", None) is models.attend:
                module.kernel = faster_attend


def faster_attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Compute attend(), with the fused kernel except where that is slower than the formula in model.py, or wrong."""
    few = k.shape[2] <= EXPLICIT_KEYS and v.dtype == torch.bfloat16
    slow = q.is_cpu and few and torch.is_grad_enabled()
    # Apple's kernel lets tokens of half precision see later ones (PyTorch issue 195910)
    if slow or (q.is_mps and v.dtype != torch.float32):
        return models.attend(q, k, v, mask)
    return fused_attend(q, k, v, mask)


def fused_attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Compute attend() with the fused kernel."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    if mask is not None:
        mask = mask.to(v.dtype)
    causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


@cache
@torch.no_grad()
def agrees(attend: Callable, kernel: Callable) -> bool:
    """True if both functions compute the same numbers, with many keys, large scores and heads that share keys, too."""
    random = torch.Generator().manual_seed(0)
    for T, H in ((70, 2), (70, 4), (1, 4)):
        shapes = (H, T, 64), (2, 70, 64), (2, 70, 64), (1, T, 70)
        q, k, v, mask = (torch.randn(1, *x, generator=random, device="cpu") for x in shapes)
        for each in (None, mask):
            found = attend(2 * q, k, v, each)
            if not torch.allclose(found, kernel(2 * q, k, v, each), atol=1e-4):
                return False
    return True
