"""Scaled dot-product attention: its mask, and the way to compute it that is fastest on this device.

Shapes: B batch, H heads, T queries, S keys, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from humptygpt.nn.layers import drop

# What is added to the scores, broadcasts to (B, H, T, S), or None; and whether instead, with T = S, no query attends to
# a later key, for which SDPA has fast kernels
Mask = tuple[Tensor | None, bool]
# Elements of the scores up to which explicit attention is used: 64 MB a block in bfloat16
EXPLICIT_SCORES = 2**25


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v: the mean of the values, weighted by how well each key answers the query.

    q: (B, H, T, D); k, v: (B, H or fewer, S, D), inputs by groups of neighbouring queries where they are fewer.
    Returns (B, H, T, D). Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
    """
    bias, is_causal = mask
    if bias is not None:
        bias = bias.to(q.dtype)
    grouped = q.shape[1] != k.shape[1]
    if not prefers_explicit(q, k, dropout):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=is_causal, enable_gqa=grouped
        )
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, T, S)
    if is_causal:
        scores += scores.new_full(scores.shape[-2:], -torch.inf).triu(1)
    if bias is not None:
        scores += bias
    return drop(scores.softmax(dim=-1), dropout) @ v


def prefers_explicit(q: Tensor, k: Tensor, dropout: float) -> bool:
    """Return whether the formula as it stands trains faster than SDPA.

    On a CPU the backward pass of SDPA in bfloat16 takes three times as long; but it does not keep all the scores. With
    dropout it does, and draws its masks more slowly than drop() and for the rows of its own process alone.
    """
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    return dropout > 0 or (torch.is_autocast_enabled("cpu") and scores <= EXPLICIT_SCORES)


def attention_mask(
    T: int,
    S: int,
    device: torch.device,
    *,
    causal: bool = False,
    window: int = 0,
    bias: Tensor | None = None,
    padding: Tensor | None = None,
) -> Mask:
    """What is added to the scores of T queries and S keys: -inf where a query must not attend, and bias.

    The queries are the last T of the S positions. causal: no query attends to a later key. window: none to a key that
    is window or more positions away; 0: no limit. bias: (H, T, S). padding: (B, S), True where a key is no token.
    """
    limited = 0 < window < S
    if causal and T == S and not limited and bias is None and padding is None:
        return None, True
    allowed = None  # broadcasts to (B, H, T, S)
    if (causal and T > 1) or limited:
        distance = distances(T, S, device)
        allowed = distance.abs() < (window or S)
        if causal:
            allowed &= distance >= 0
    if padding is not None:
        tokens = ~padding[:, None, None, :]
        # softmax over no key at all is nan: each position may at least attend to itself
        allowed = tokens if allowed is None else (allowed & tokens) | (distance == 0)
    if bias is not None:
        bias = bias[None]  # SDPA fuses masks of four dimensions only
    if allowed is None:
        return bias, False
    mask = torch.zeros_like(allowed, dtype=torch.float32) if bias is None else bias
    return mask.masked_fill(~allowed, -torch.inf), False


def distances(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S) int64: positions from each key to each query, the last T of S; negative where the key is later."""
    key = torch.arange(S, device=device)
    return key[S - T :, None] - key
