"""Let every token look back and gather what it needs from the tokens before it.

Generated from chapters/05_attention.py: edit that file,
then run `python -m tinychat.book export`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinychat.embeddings import apply_rotary


def causal_mask(length: int, total: int, device: torch.device | None = None) -> Tensor:
    """Return `[length, total]`, True where one of the last `length` of `total` tokens may look."""
    row = torch.arange(total - length, total, device=device)[:, None]
    return torch.arange(total, device=device) <= row


def attend(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, visible_TS: Tensor) -> Tensor:
    """Scaled dot-product attention, written out (Vaswani et al. 2017, equation 1).

    `visible_TS` (or anything that broadcasts to `[B, H, T, S]`) is True where token t may look at
    token s; every row needs at least one True. With fewer key heads than query heads, each key
    head serves a group of neighbouring query heads (Ainslie et al. 2023). Returns `[B, H, T, K]`.

    The softmax runs in float32 whatever the inputs' type, because a sum of hundreds of bfloat16
    numbers loses its small terms.
    """
    B, H, T, K = q_BHTK.shape
    groups = H // k_BHSK.shape[1]
    # The heads of one group are stacked along time, so that keys are never copied.
    q = q_BHTK.reshape(B, H // groups, groups * T, K)
    scores = (q @ k_BHSK.transpose(-2, -1)).view(B, H, T, -1)
    scores = (scores.float() * K**-0.5).masked_fill(~visible_TS, float("-inf"))
    weights = scores.softmax(dim=-1).to(v_BHSK.dtype)
    mixed = weights.view(B, H // groups, groups * T, -1) @ v_BHSK
    return mixed.view(B, H, T, K)


def attend_causal(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, visible: Tensor | None = None, block: int = 64
) -> Tensor:
    """`attend` for causal attention, in blocks of queries that never compute the far future.

    The T queries are the last of the S tokens. `visible`, `[..., T, S]`, may hide more than the
    future, never less; None means plain causal. Returns `[B, H, T, K]`.
    """
    T, S = q_BHTK.shape[2], k_BHSK.shape[2]
    if visible is None:
        visible = causal_mask(T, S, q_BHTK.device)
    mixed = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        seen = S - T + stop
        mixed.append(
            attend(
                q_BHTK[:, :, start:stop],
                k_BHSK[:, :, :seen],
                v_BHSK[:, :, :seen],
                visible[..., start:stop, :seen],
            )
        )
    return torch.cat(mixed, dim=2)


class LayerCache:
    """The keys and values of one layer's past tokens, `[B, kv heads, capacity, K]` each."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype):
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    def extend(self, start: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values at `start`; return all of them up to the newest."""
        stop = start + k_BHTK.shape[2]
        self.k[:, :, start:stop] = k_BHTK
        self.v[:, :, start:stop] = v_BHTK
        return self.held(0, stop)

    def held(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the tokens from `start` to `stop`."""
        return self.k[:, :, start:stop], self.v[:, :, start:stop]


class RMSNorm(nn.Module):
    """Scale each vector to unit root-mean-square, then each column by a learned weight.

    Zhang and Sennrich 2019: like LayerNorm without the mean, and just as good. The sum of squares
    runs in float32 inside `rms_norm`, also for bfloat16 vectors.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions, grouped key heads and QK-norm.

    QK-norm (Dehghani et al. 2023; Qwen3) gives each query and key unit root-mean-square before
    they meet, so that scores can't grow without bound and training stays calm at high rates.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, head_width: int, norm_eps: float):
        super().__init__()
        self.head_width = head_width
        self.q = nn.Linear(width, heads * head_width, bias=False)
        self.k = nn.Linear(width, kv_heads * head_width, bias=False)
        self.v = nn.Linear(width, kv_heads * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width, bias=False)
        self.q_norm = RMSNorm(head_width, norm_eps)
        self.k_norm = RMSNorm(head_width, norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        cos_TK: Tensor,
        sin_TK: Tensor,
        visible: Tensor | None = None,
        cache: LayerCache | None = None,
        start: int = 0,
    ) -> Tensor:
        """Return what each token gathered, `[B, T, D]`.

        `visible` is `[B, 1 or H, T, S]` and may hide more than the future, never less; None means
        plain causal. With a `cache`, the T new tokens stand at positions `start ...` and also see
        everything stored before.
        """
        B, T, _ = x_BTD.shape
        q = self.q_norm(self.q(x_BTD).view(B, T, -1, self.head_width)).transpose(1, 2)
        k = self.k_norm(self.k(x_BTD).view(B, T, -1, self.head_width)).transpose(1, 2)
        v = self.v(x_BTD).view(B, T, -1, self.head_width).transpose(1, 2)
        q, k = apply_rotary(q, cos_TK, sin_TK), apply_rotary(k, cos_TK, sin_TK)
        if cache is not None:
            k, v = cache.extend(start, k, v)
        if torch.is_grad_enabled() and x_BTD.device.type == "cpu":
            # Training on a CPU: plain matrix products beat the fused kernel, whose backward pass
            # took a third of the whole step (lab notes).
            mixed = attend_causal(q, k, v, visible)
        else:
            causal = visible is None and T > 1 and start == 0
            if visible is None and T > 1 and start > 0:
                visible = causal_mask(T, k.shape[2], x_BTD.device)
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
            )
        return self.out(mixed.transpose(1, 2).reshape(B, T, -1))
