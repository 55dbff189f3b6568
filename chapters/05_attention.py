# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Attention
#
# Let every token look back and gather what it needs from the tokens before it.
#
# "He sat on the bank of the river." "He took his money to the bank." The token *bank* is the same
# row of the embedding table both times. Which bank it is, the other tokens must say.
#
# Think of a **highlighter**. To understand one word of a text, you go through the words before it
# and mark those that help: *river* boldly, *sat* a little, *the* not at all. Then you read what you
# marked. Attention does this for every token at once. The strength of the marks are numbers that
# add up to one, and "reading" is an average, weighted by them.
#
# **What you will build**
#
# 1. a plain average of everything that came before, in three ways that give the same numbers;
# 2. queries, keys and values: marks that depend on the words;
# 3. many heads at once, grouped heads, and the tricks that keep it quick and calm;
# 4. three small models that you train and look into: one that finds a card, one that learns which
#    *bank* is meant, and one that needs two highlighters at once;
# 5. the price: how the work grows with the length of the text.
#
# **What you need:** chapters 01 and 04. The code runs in about a minute; take an hour to read.

# %% tags=["export"]
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinychat.embeddings import apply_rotary

# %% [markdown]
# ## Averaging the past
#
# Start with the dullest highlighter: mark everything that came before, equally. Each token gets the
# mean of itself and all tokens before it. It must not see what comes later, because later tokens are
# what the model has to guess.
#
# Shape suffixes name the axes from here on: `B` batch, `T` time, `D` width, `S` the tokens that are
# looked at, `H` heads, `K` the width of a head.

# %%
import os
import time

from tinychat.book.picture import picture
from tinychat.embeddings import rotary_tables
from tinychat.runtime.device import set_threads

set_threads()
FAST = os.environ.get("TINYCHAT_FAST") == "1"
torch.manual_seed(0)
B, T, D = 2, 5, 4
x_BTD = torch.randn(B, T, D)

mean_BTD = torch.zeros(B, T, D)
for b in range(B):
    for t in range(T):
        mean_BTD[b, t] = x_BTD[b, : t + 1].mean(dim=0)

# %% [markdown]
# Two loops in Python are slow. But a weighted sum of rows is what a matrix product does: row t of
# the left matrix holds the weights with which the rows on the right are added up. So put the shares
# into a triangle.

# %%
triangle_TT = torch.ones(T, T).tril()
weights_TT = triangle_TT / triangle_TT.sum(dim=1, keepdim=True)
print(weights_TT)

# %% tags=["test"]
torch.testing.assert_close(weights_TT @ x_BTD, mean_BTD)

# %% [markdown]
# There is a third way to write the same thing, and it's the one that leads on. Give every pair of
# tokens a **score**. Scores of the future become minus infinity. A softmax turns each row of scores
# into shares: e to the power of minus infinity is zero, and equal scores give equal shares.


# %% tags=["export"]
def causal_mask(length: int, total: int, device: torch.device | None = None) -> Tensor:
    """Return `[length, total]`, True where one of the last `length` of `total` tokens may look."""
    row = torch.arange(total - length, total, device=device)[:, None]
    return torch.arange(total, device=device) <= row


# %%
visible_TT = causal_mask(T, T)
scores_TT = torch.zeros(T, T).masked_fill(~visible_TT, float("-inf"))
print(visible_TT.int())

# %% tags=["test"]
torch.testing.assert_close(scores_TT.softmax(dim=1), weights_TT)

# %% [markdown]
# (The function takes two lengths because, when you chat, the newest few tokens look at a long past
# that was read before. You need it soon.)
#
# All scores were zero, so all marks were equal. Everything that follows is about better scores.
#
# ## Compare the tokens themselves?
#
# You know a score from chapter 04: the dot product says how well two vectors fit. So compare each
# token's vector with those of the others, as they are. Here are five tokens with random vectors.

# %%
own_TD = torch.randn(T, 16)
own_scores_TT = own_TD @ own_TD.T
own_marks_TT = own_scores_TT.masked_fill(~visible_TT, float("-inf")).softmax(dim=1)
print(own_marks_TT.round(decimals=2))

# %% tags=["test"]
assert torch.equal(own_marks_TT.argmax(dim=1), torch.arange(T)), "each marks itself most"
torch.testing.assert_close(own_scores_TT, own_scores_TT.T)

# %% [markdown]
# Two things are wrong. Among vectors of about the same length, nothing fits a token as well as the
# token itself, so everyone marks itself. And the score of a pair is the same both ways. But *bank*
# needs *river* more than *river* needs *bank*: what a token looks for and what it has to offer are
# two different things.
#
# ## Query, key, value
#
# Which earlier token helps? That depends on who asks, and on what the other one has to offer. So
# each token sends out two vectors:
#
# - a **query**: what am I looking for?
# - a **key**: what do I have?
#
# The score of a pair is the dot product of the one's query with the other's key. They fit well, the
# score is high. And what is handed over isn't the key but a third vector:
#
# - a **value**: this is what I tell you if you choose me.
#
# It's like a library. You come with a question (query), compare it with the labels on the spines
# (keys), and take home what is *in* the books (values).
#
# Here is *bank* with made-up vectors. The first number stands for "water", the second for "money".
# *Bank* asks for both; it doesn't know yet. The other words have only one to offer.

# %%
query_bank = torch.tensor([2.0, 2.0])
keys = {"the": [0.0, 0.0], "river": [2.0, 0.0], "money": [0.0, 2.0], "sat": [0.1, 0.0]}
values = {"the": [0.0, 0.0], "river": [1.0, 0.0], "money": [0.0, 1.0], "sat": [0.0, 0.0]}
for sentence in (["sat", "the", "river"], ["the", "money"]):
    key_SK = torch.tensor([keys[word] for word in sentence])
    value_SK = torch.tensor([values[word] for word in sentence])
    share_S = (key_SK @ query_bank).softmax(dim=0)
    print(", ".join(f"{word} {share:.0%}" for word, share in zip(sentence, share_S, strict=True)))
    print("  bank gathers water, money =", [round(x, 2) for x in (share_S @ value_SK).tolist()])

# %% [markdown]
# In a real model nobody makes these vectors up. Three learned matrices make a query, a key and a
# value out of each token's vector, and training decides what is worth asking.
#
# ## One head, written plainly
#
# One detail is missing. A dot product of K random numbers gets larger with K: its spread is the
# square root of K. Large scores make the softmax choose one token and ignore the rest, and then
# almost no gradient comes through. So divide by that root.

# %%
for K in (4, 64, 1024):
    products = (torch.randn(2000, K) * torch.randn(2000, K)).sum(dim=1)
    largest = (products.view(-1, 10)).softmax(dim=1).amax(dim=1).mean()
    calm = (products.view(-1, 10) / K**0.5).softmax(dim=1).amax(dim=1).mean()
    print(
        f"K = {K:4}: spread {products.std():5.1f}; the best of ten gets {largest:.0%}, "
        f"after dividing {calm:.0%}"
    )


# %% [markdown]
# All of it in one line, as it stands in the paper (Vaswani et al. 2017; their $d$ is our K):
#
# $$\text{attention}(Q, K, V) = \text{softmax}\!\left(\frac{Q K^\top}{\sqrt{d}}\right) V$$


# %%
def attend_naive(q_TK: Tensor, k_SK: Tensor, v_SK: Tensor) -> tuple[Tensor, Tensor]:
    """One head for one text: returns what each token gathered, and its marks."""
    scores_TS = q_TK @ k_SK.T / q_TK.shape[-1] ** 0.5
    visible_TS = causal_mask(*scores_TS.shape)
    weights_TS = scores_TS.masked_fill(~visible_TS, float("-inf")).softmax(dim=-1)
    return weights_TS @ v_SK, weights_TS


K = 4
q_TK, k_TK, v_TK = torch.randn(3, T, K)
gathered_TK, marks_TT = attend_naive(q_TK, k_TK, v_TK)
print(marks_TT.round(decimals=2))

# %% tags=["test"]
torch.testing.assert_close(marks_TT.sum(dim=1), torch.ones(T))
assert (marks_TT.triu(1) == 0).all(), "nobody sees the future"
torch.testing.assert_close(gathered_TK[0], v_TK[0], msg="the first token has only itself")
# Wiping out the future after the softmax gives the same marks, once the rest is shared out anew.
wiped_TT = (q_TK @ k_TK.T / K**0.5).softmax(dim=1) * visible_TT
assert float(wiped_TT.sum(dim=1).min()) < 0.99, "a part of the marks went to the future"
torch.testing.assert_close(wiped_TT / wiped_TT.sum(dim=1, keepdim=True), marks_TT)

# %% [markdown]
# The future is hidden *before* the softmax. You could also wipe it out afterwards. But then the marks of
# a row don't add up to one any more, and you have to share them out a second time, as the test does.
#
# ## Many heads
#
# One highlighter has one colour. But a word needs several things at once: which noun it belongs to,
# who is speaking, whether the sentence is a question. Marked with one colour, all of it would be
# averaged into one mush.
#
# So the model holds several highlighters. Each **head** has its own smaller queries, keys and
# values, does its own gathering, and the results are laid side by side. Four heads of a quarter of the
# width have as many weights as one wide head. The plain version is a loop over heads.
#
# **Grouped heads** (Ainslie et al. 2023) go one step further. In a chat, the keys and values of all
# past tokens must be kept in memory. Queries needn't be kept. So let several query heads share one
# key head: our presets use half as many key heads as query heads, and the memory halves as well.


# %%
def heads_naive(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor) -> Tensor:
    """A loop over texts and heads; neighbouring query heads share a key head."""
    group = q_BHTK.shape[1] // k_BHSK.shape[1]
    rows = []
    for q_HTK, k_HSK, v_HSK in zip(q_BHTK, k_BHSK, v_BHSK, strict=True):
        heads = [
            attend_naive(q_HTK[h], k_HSK[h // group], v_HSK[h // group])[0]
            for h in range(len(q_HTK))
        ]
        rows.append(torch.stack(heads))
    return torch.stack(rows)


# %% [markdown]
# Now without loops. PyTorch multiplies whole stacks of matrices at once; texts and heads are just
# more axes. The only trick: the query heads of one group are stacked on top of each other, as if
# they were one longer text, so that one key head serves them without being copied.


# %% tags=["export"]
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


# %% tags=["test"]
q_BHTK = torch.randn(2, 4, 7, 8)
for kv_heads in (4, 2, 1):
    k_BHSK, v_BHSK = torch.randn(2, 2, kv_heads, 7, 8)
    ours = attend(q_BHTK, k_BHSK, v_BHSK, causal_mask(7, 7))
    torch.testing.assert_close(ours, heads_naive(q_BHTK, k_BHSK, v_BHSK))
    # PyTorch has its own, which we use wherever it is faster.
    theirs = F.scaled_dot_product_attention(
        q_BHTK, k_BHSK, v_BHSK, is_causal=True, enable_gqa=kv_heads != 4
    )
    torch.testing.assert_close(ours, theirs)
print("loop, stacked product and PyTorch's own agree")

# %% [markdown]
# Half of the scores lie in the future: computed, then thrown away. Cut the queries into blocks, and
# let each block look only as far as its own last token. The smaller pieces also fit into the
# processor's cache. How much it brings to the whole training step is in the lab notes.

# %%
length, block = 256, 64
columns = [stop for stop in range(block, length + 1, block)]
share_left = sum(columns) / (len(columns) * length)
print(f"{length} tokens in blocks of {block}: {columns} columns, {share_left:.0%} of the scores")


# %% tags=["export"]
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


# %% tags=["test"]
for length, total in ((7, 7), (8, 8), (3, 7)):
    q, k, v = torch.randn(2, 4, length, 8), *torch.randn(2, 2, 2, total, 8)
    mask = causal_mask(length, total)
    blocks = attend_causal(q, k, v, block=3)
    torch.testing.assert_close(blocks, attend(q, k, v, mask))

# %% [markdown]
# ## Remembering keys and values
#
# A model that writes reads one new token at a time. The keys and values of the older ones don't
# change, since nobody looks into the future. So store them. Chapter 08 shows how much that saves.


# %% tags=["export"]
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


# %% [markdown]
# ## Calm numbers: RMSNorm and QK-norm
#
# Vectors in a deep network tend to grow. **RMSNorm** (Zhang and Sennrich 2019) brings each back to
# a standard size: square all its numbers, take the mean, take the root, divide by that. Then a
# learned weight scales each column. Its older sister **LayerNorm** (Ba, Kiros and Hinton 2016) subtracts
# the mean first, so that the numbers lie around zero, and adds a learned one at the end. By hand:

# %%
x_D = torch.tensor([3.0, 4.0, 0.0, 0.0])
root_mean_square = (x_D**2).mean().sqrt()
print("root mean square:", float(root_mean_square))
print("RMSNorm:         ", [round(x, 2) for x in (x_D / root_mean_square).tolist()])
around_zero_D = x_D - x_D.mean()
layer_normed_D = around_zero_D / (around_zero_D**2).mean().sqrt()
print("LayerNorm:       ", [round(x, 2) for x in layer_normed_D.tolist()])


# %% tags=["export"]
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


# %% tags=["test"]
torch.testing.assert_close(RMSNorm(4, eps=1e-6)(x_D), x_D / root_mean_square)
torch.testing.assert_close(RMSNorm(4, eps=1e-6)(1000 * x_D), x_D / root_mean_square)
torch.testing.assert_close(layer_normed_D, nn.LayerNorm(4)(x_D).detach())

# %% [markdown]
# Chapter 06 uses it everywhere. Attention uses it in one special place: on every query and key, just
# before they meet. This is **QK-norm**. Without it, a model trained with large steps can make its
# queries longer and longer, until the softmax is all or nothing and learning stops. With it, a score
# can't exceed the root of K (before the learned weights), however loud a token is.

# %%
norm = RMSNorm(64, eps=1e-6)
for loudness in (1, 10, 100):
    q_K, k_SK = loudness * torch.randn(64), loudness * torch.randn(10, 64)
    plain = (k_SK @ q_K / 8).softmax(dim=0).max()
    calm = (norm(k_SK) @ norm(q_K) / 8).softmax(dim=0).max()
    print(f"loudness {loudness:3}: best mark {plain:.0%} without, {calm:.0%} with QK-norm")

# %% [markdown]
# ## The whole layer
#
# Now put it together, in this order:
#
# 1. three matrices make queries, keys and values, cut into heads;
# 2. QK-norm (a turn changes no length, so some models do this after step 3);
# 3. rotary positions turn queries and keys (chapter 04), so that scores know distances; values are
#    not turned, because what a token says doesn't depend on where it stands;
# 4. the cache adds the past;
# 5. attention;
# 6. heads are laid side by side, and a last matrix mixes them.


# %% tags=["export"]
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


# %% [markdown]
# There are two ways through step 5, and they give the same numbers. `attend_causal` is ours, PyTorch's
# `scaled_dot_product_attention` is one fused kernel that never stores all scores. Which is faster
# depends on the machine. The tests compare both; so does this cell, together with the promise that
# matters most: change the future, and the past stays as it was.

# %% tags=["test"]
layer = Attention(width=32, heads=4, kv_heads=2, head_width=8, norm_eps=1e-6)
cos_TK, sin_TK = rotary_tables(12, 8)
x_BTD = torch.randn(1, 12, 32)
with torch.no_grad():
    fused_BTD = layer(x_BTD, cos_TK, sin_TK)
torch.testing.assert_close(layer(x_BTD, cos_TK, sin_TK), fused_BTD)

changed_BTD = x_BTD.clone()
changed_BTD[:, 8:] += 100
with torch.no_grad():
    assert torch.equal(layer(changed_BTD, cos_TK, sin_TK)[:, :8], fused_BTD[:, :8])

# One token at a time with a cache gives the same as all at once.
cache = LayerCache((1, 2, 12, 8), x_BTD.device, x_BTD.dtype)
with torch.no_grad():
    steps = [
        layer(x_BTD[:, t : t + 1], cos_TK[t : t + 1], sin_TK[t : t + 1], cache=cache, start=t)
        for t in range(12)
    ]
torch.testing.assert_close(torch.cat(steps, dim=1), fused_BTD)
print("causal, and the same with a cache")

# %% [markdown]
# Step 1 makes all queries with *one* matrix and cuts the result into heads. That is the same as a small
# matrix for each head. So more heads don't mean more weights; they only cut the width finer.

# %%
for heads in (1, 2, 4, 8):
    cut = Attention(width=32, heads=heads, kv_heads=heads, head_width=32 // heads, norm_eps=1e-6)
    weights = sum(weight.numel() for weight in cut.parameters() if weight.dim() == 2)
    print(f"heads: {heads}, each of width {32 // heads:2}: {weights:,} weights in the matrices")

# %% tags=["test"]
small_HKD = layer.q.weight.view(4, 8, 32)
by_head_BTHK = torch.stack([x_BTD @ matrix_KD.T for matrix_KD in small_HKD], dim=2)
torch.testing.assert_close(by_head_BTHK, layer.q(x_BTD).view(1, 12, 4, 8))
# Steps 2 and 3 may change places, as long as the norm's learned weights are all one.
q_HTK = by_head_BTHK[0].transpose(0, 1)
torch.testing.assert_close(
    apply_rotary(layer.q_norm(q_HTK), cos_TK, sin_TK),
    layer.q_norm(apply_rotary(q_HTK, cos_TK, sin_TK)),
)

# %% [markdown]
# ## Watch it learn to look
#
# Does training really find good questions? Here is a game that needs them. A text is a row of cards,
# each with a letter and a digit, all letters different. Then comes one more card with a letter and a
# question mark. Which digit stood with that letter?
#
# Each card's vector is the sum of a letter's row and a digit's row. The network is a single
# attention layer and a matrix that turns what was gathered into a guess. Beside it, the dull
# highlighter from the beginning plays the same game: it may only average.

# %%
LETTERS, DIGITS, CARDS = 26, 10, 8


class CardPlayer(nn.Module):
    """Guesses the digit; with `average` it marks all cards equally."""

    def __init__(self, average: bool):
        super().__init__()
        self.average = average
        self.letter = nn.Embedding(LETTERS, 32)
        self.digit = nn.Embedding(DIGITS + 1, 32)  # the last row is the question mark
        self.attention = Attention(width=32, heads=2, kv_heads=1, head_width=16, norm_eps=1e-6)
        self.guess = nn.Linear(32, DIGITS)

    def cards(self, letters_BT: Tensor, digits_BT: Tensor) -> Tensor:
        return self.letter(letters_BT) + self.digit(digits_BT)

    def forward(self, letters_BT: Tensor, digits_BT: Tensor) -> Tensor:
        x_BTD = self.cards(letters_BT, digits_BT)
        if self.average:
            return self.guess(x_BTD.mean(dim=1))
        cos_TK, sin_TK = rotary_tables(CARDS + 1, 16)
        return self.guess(self.attention(x_BTD, cos_TK, sin_TK)[:, -1])


def deal(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random cards: letters, digits (the last one hidden), and the answers."""
    letters_BT = torch.rand(rows, LETTERS).argsort(dim=1)[:, : CARDS + 1]
    digits_BT = torch.randint(DIGITS, (rows, CARDS + 1))
    asked_B1 = torch.randint(CARDS, (rows, 1))
    letters_BT[:, -1:] = letters_BT.gather(1, asked_B1)
    digits_BT[:, -1] = DIGITS
    return letters_BT, digits_BT, digits_BT.gather(1, asked_B1)[:, 0]


def practise(model: nn.Module, loss_of_batch, steps: int) -> None:
    """Chapter 01's loop with AdamW's steps (chapter 07), smaller and smaller ones."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    fall = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    for _step in range(steps):
        loss = loss_of_batch(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fall.step()


def card_loss(player: nn.Module) -> Tensor:
    letters_BT, digits_BT, answers_B = deal(64)
    return F.cross_entropy(player(letters_BT, digits_BT), answers_B)


players, scores = {}, {}
for average in (True, False):
    torch.manual_seed(0)
    player = CardPlayer(average)
    practise(player, card_loss, (60 if average else 140) if FAST else 1000)
    with torch.no_grad():
        letters_BT, digits_BT, answers_B = deal(1000)
        right = (player(letters_BT, digits_BT).argmax(dim=1) == answers_B).float().mean()
    name = "average" if average else "attention"
    players[name], scores[name] = player, float(right)
    print(f"{name:>9}: {right:.0%} right on new cards")

# %% tags=["test"]
assert scores["attention"] > 0.9 > 0.5 > scores["average"]

# %% [markdown]
# Look at its marks. The layer keeps none, so compute them once more from the layer's own matrices:
# steps 1, 2 and 3, and the softmax of step 5. To be sure that these are the marks that the layer
# really used, finish the job with them and compare.


# %%
def marks_of(layer: Attention, x_BTD: Tensor) -> Tensor:
    """The marks of every head, `[B, H, T, S]`; each row adds up to one."""
    B, T, _ = x_BTD.shape
    cos_TK, sin_TK = rotary_tables(T, layer.head_width)
    q = layer.q_norm(layer.q(x_BTD).view(B, T, -1, layer.head_width)).transpose(1, 2)
    k = layer.k_norm(layer.k(x_BTD).view(B, T, -1, layer.head_width)).transpose(1, 2)
    q, k = apply_rotary(q, cos_TK, sin_TK), apply_rotary(k, cos_TK, sin_TK)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores_BHTS = q @ k.transpose(-2, -1) / layer.head_width**0.5
    return scores_BHTS.masked_fill(~causal_mask(T, T), float("-inf")).softmax(dim=-1)


player = players["attention"]
torch.manual_seed(3)
letters_BT, digits_BT, answers_B = deal(1)
with torch.no_grad():
    cards_BTD = player.cards(letters_BT, digits_BT)
    marks_BHTS = marks_of(player.attention, cards_BTD)
    marks_S = marks_BHTS[0, :, -1].mean(dim=0)  # of the last card, the mean of both heads
for letter, digit, mark in zip(letters_BT[0], digits_BT[0], marks_S.tolist(), strict=True):
    card = chr(ord("A") + int(letter)) + ("?" if digit == DIGITS else str(int(digit)))
    print(f"  {card} {mark:5.0%} {'█' * round(40 * mark)}")
print("the answer was", int(answers_B[0]))

# %% tags=["test"]
place = int((letters_BT[0, :-1] == letters_BT[0, -1]).nonzero()[0, 0])
assert int(marks_S.argmax()) == place, "it looks at the card with its letter"
with torch.no_grad():
    layer = player.attention
    v_BHSK = layer.v(cards_BTD).view(1, CARDS + 1, -1, 16).transpose(1, 2)
    gathered_BHTK = marks_BHTS @ v_BHSK  # one key head serves both query heads
    by_hand_BTD = layer.out(gathered_BHTK.transpose(1, 2).flatten(2))
    torch.testing.assert_close(by_hand_BTD, layer(cards_BTD, *rotary_tables(CARDS + 1, 16)))

# %% [markdown]
# Nobody told the layer to compare letters. The loss did: the gradient of wrong guesses made queries
# and keys of equal letters fit each other.
#
# ## River bank, money bank
#
# Back to the bank. At the beginning of this chapter you made its query up. Now let training find it.
#
# Six words of English have a meaning in nature and another among things that people make: a *bank*
# has reeds or counters, a *bat* wings or a handle, a *mouse* whiskers or a cable. The model reads
# sentences like "anna saw the river and the keyboard . then ben drew the bank and the mouse ." and
# must say, for each of the two double words, whether it is **wild** or **made**. Sometimes nothing
# in the sentence tells. Then the right answer is **unclear**.
#
# Mind what makes this hard. The sentence above holds a hint for *wild* and a hint for *made*. So it
# isn't enough to gather hints: *bank* must look at *river* and leave *keyboard* alone, and *mouse*
# the other way round. And of the sentences that hold the same two hints and the same two double
# words, every fifth kind is kept apart. The model is measured on those alone.

# %%
import random
import zlib

HINTS = {  # for each double word: hints that it is wild, hints that it is made
    "bank": ("river stream lake".split(), "money loan coins".split()),
    "bat": ("cave night wings".split(), "ball game team".split()),
    "mouse": ("cheese fur whiskers".split(), "keyboard screen cable".split()),
    "crane": ("feathers nest marsh".split(), "tower builder concrete".split()),
    "seal": ("ice sea fish".split(), "letter wax stamp".split()),
    "trunk": ("leaves branches roots".split(), "luggage suitcase ticket".split()),
}
ANSWERS = ("wild", "made", "unclear")
PEOPLE, SEEN = "anna ben clara david emma felix".split(), "saw found liked drew noticed".split()
hint_words = [hint for kinds in HINTS.values() for kind in kinds for hint in kind]
vocabulary = sorted({*HINTS, *hint_words, *PEOPLE, *SEEN, "the", "and", "then", "."})
word_ids = {word: number for number, word in enumerate(vocabulary)}


def make_sentence(draw: random.Random, kinds: int = 3) -> tuple[list[str], list[tuple[str, str]]]:
    """A sentence, and for each of its double words the hint that was meant for it or "unclear"."""
    doubles = draw.sample(sorted(HINTS), 2)
    others = draw.sample(sorted(set(HINTS) - set(doubles)), 2)
    hints, told = [], []
    for double, other in zip(doubles, others, strict=True):
        kind = draw.randrange(kinds)
        # Where nothing shall tell, the hint is one for a word that isn't in the sentence.
        side = draw.randrange(2) if kind == 2 else kind
        hints.append(draw.choice(HINTS[other if kind == 2 else double][side]))
        told.append((double, "unclear" if kind == 2 else hints[-1]))
    one, two = draw.sample(hints, 2)
    first = [draw.choice(PEOPLE), draw.choice(SEEN), "the", one, "and", "the", two, "."]
    second = ["then", draw.choice(PEOPLE), draw.choice(SEEN), "the", doubles[0]]
    return [*first, *second, "and", "the", doubles[1], "."], told


def kept_apart(words: list[str]) -> bool:
    """Whether sentences with these hints and double words are for measuring only."""
    telling = sorted(word for word in words if word in HINTS or word in hint_words)
    return zlib.crc32(" ".join(telling).encode()) % 5 == 0


def sentence_batch(
    draw: random.Random, rows: int, apart: bool, kinds: int = 3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Word ids; places of the double words; places of their hints (-1: none); the answers."""
    ids, doubles_at, hints_at, answers = [], [], [], []
    while len(ids) < rows:
        words, told = make_sentence(draw, kinds)
        if kept_apart(words) != apart:
            continue
        ids.append([word_ids[word] for word in words])
        doubles_at.append([words.index(double) for double, _ in told])
        hints_at.append([words.index(hint) if hint in words else -1 for _, hint in told])
        answers.append(
            [2 if hint == "unclear" else int(hint in HINTS[double][1]) for double, hint in told]
        )
    return (
        torch.tensor(ids),
        torch.tensor(doubles_at),
        torch.tensor(hints_at),
        torch.tensor(answers),
    )


for seed in range(4):
    words, told = make_sentence(random.Random(seed))
    print(" ".join(words), "→", ", ".join(f"{double}: {hint}" for double, hint in told))

# %% [markdown]
# The model is as small as can be: a table, one attention layer, the word itself added to what it
# gathered, and three votes. To see what many heads are good for, we train it with one head of width
# 32 and with four heads of width 8. Both have the same number of weights, up to the few of QK-norm.
# Beside them again the dull highlighter, and everything with several seeds.


# %%
class SenseReader(nn.Module):
    """For each word: is it wild, made, or unclear? With no heads it only averages the past."""

    def __init__(self, heads: int):
        super().__init__()
        self.embed = nn.Embedding(len(vocabulary), 32)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.attention = Attention(32, heads, heads, 32 // heads, 1e-6) if heads else None
        self.guess = nn.Linear(32, len(ANSWERS))

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD, T = self.embed(ids_BT), ids_BT.shape[1]
        if self.attention is None:
            shares_TS = causal_mask(T, T) / torch.arange(1, T + 1)[:, None]
            return self.guess(x_BTD + shares_TS @ x_BTD)
        tables = rotary_tables(T, self.attention.head_width)
        return self.guess(x_BTD + self.attention(x_BTD, *tables))


def train_reader(heads: int, seed: int, kinds: int = 3) -> SenseReader:
    torch.manual_seed(seed)
    draw, reader = random.Random(seed), SenseReader(heads)

    def loss_of_batch(reader: nn.Module) -> Tensor:
        ids_BT, doubles_at_B2, _, answers_B2 = sentence_batch(draw, 64, False, kinds)
        logits_B2C = reader(ids_BT)[torch.arange(64)[:, None], doubles_at_B2]
        return F.cross_entropy(logits_B2C.flatten(0, 1), answers_B2.flatten())

    practise(reader, loss_of_batch, (120 if heads else 60) if FAST else 300)
    return reader


@torch.no_grad()
def measure_reader(reader: SenseReader, kinds: int = 3) -> tuple[float, float]:
    """The share of right answers, and of double words that mark their own hint most of all."""
    ids_BT, doubles_at_B2, hints_at_B2, answers_B2 = sentence_batch(
        random.Random(99), 500, True, kinds
    )
    rows_B1 = torch.arange(len(ids_BT))[:, None]
    right = (reader(ids_BT)[rows_B1, doubles_at_B2].argmax(dim=-1) == answers_B2).float().mean()
    if reader.attention is None:
        return float(right), 0.0
    marks_BTS = marks_of(reader.attention, reader.embed(ids_BT)).mean(dim=1)
    looks_B2 = marks_BTS[rows_B1, doubles_at_B2].argmax(dim=-1) == hints_at_B2
    return float(right), float(looks_B2[answers_B2 < 2].float().mean())


SEEDS = (0,) if FAST else (0, 1, 2)
readers: dict[tuple[int, int], SenseReader] = {}
measured: dict[tuple[int, int], tuple[float, float]] = {}
begin = time.perf_counter()
for heads in (0, 4) if FAST else (0, 1, 4):
    for seed in SEEDS:
        readers[heads, seed] = train_reader(heads, seed)
        measured[heads, seed] = measure_reader(readers[heads, seed])
        right, looks = measured[heads, seed]
        name = {0: "average", 1: "one head"}.get(heads, f"{heads} heads")
        print(f"{name:>8}, seed {seed}: {right:4.0%} right, {looks:4.0%} look at their hint most")
print(f"{time.perf_counter() - begin:.0f} s")

# %% tags=["test"]
for seed in SEEDS:
    assert measured[4, seed][0] > 0.95 and measured[4, seed][1] > 0.9
    assert measured[0, seed][0] < 0.7
    if not FAST:
        assert measured[0, seed][0] < measured[1, seed][0] < measured[4, seed][0] - 0.05

# %% [markdown]
# Four heads say it right where the average guesses. Now read their marks. Two sentences that differ
# in one word, with every word highlighted as strongly as *bank* marks it (the mean of four heads):

# %%
PAIR = [
    f"anna saw the {hint} and the keyboard . then ben drew the mouse and the bank ."
    for hint in ("river", "money")
]


@torch.no_grad()
def read_aloud(reader: SenseReader, text: str, word: str) -> tuple[Tensor, list[float]]:
    """The marks `[H, T, S]` for a sentence, and the three probabilities at one word."""
    words = text.split()
    ids_BT = torch.tensor([[word_ids[one] for one in words]])
    shares_C = reader(ids_BT)[0, words.index(word)].softmax(dim=-1)
    return marks_of(reader.attention, reader.embed(ids_BT))[0], shares_C.tolist()


for text in PAIR:
    print(text)
    for seed in SEEDS:
        marks_HTS, shares = read_aloud(readers[4, seed], text, "bank")
        marks_S = marks_HTS.mean(dim=0)[text.split().index("bank")]
        best = marks_S.topk(2)
        looked = ", ".join(
            f"{text.split()[place]} {mark:.0%}"
            for mark, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        )
        answer = ANSWERS[shares.index(max(shares))]
        print(f"  seed {seed}: bank looks at {looked}; it is {answer} ({max(shares):.0%})")

# %% tags=["test"]
for seed in SEEDS:
    for text, hint, answer in zip(PAIR, ("river", "money"), ("wild", "made"), strict=True):
        marks_HTS, shares = read_aloud(readers[4, seed], text, "bank")
        words = text.split()
        assert words[int(marks_HTS.mean(dim=0)[words.index("bank")].argmax())] == hint
        assert ANSWERS[shares.index(max(shares))] == answer
        marks_HTS, _ = read_aloud(readers[4, seed], text, "mouse")
        looked = words[int(marks_HTS.mean(dim=0)[words.index("mouse")].argmax())]
        assert looked == "keyboard"


# %%
# alt: Two sentences with bank's marks as a highlighter: river is bold in one, money in the other.
def draw_highlighter(plt):
    figure, axis = plt.subplots(figsize=(8, 1.3))
    for line, text in enumerate(PAIR):
        marks_HTS, _ = read_aloud(readers[4, 0], text, "bank")
        words = text.split()
        marks_S = marks_HTS.mean(dim=0)[words.index("bank")].tolist()
        column = 0
        for word, mark in zip(words, marks_S, strict=True):
            box = {"facecolor": "C4", "alpha": min(1.0, mark), "edgecolor": "none", "pad": 2}
            axis.text(column, -line, word, family="monospace", fontsize=9, bbox=box)
            column += len(word) + 1
    axis.set(xlim=(-1, 80), ylim=(-1.5, 0.8))
    axis.axis("off")
    return figure


picture("05_highlighter", draw_highlighter)


# %%
# alt: Two heat maps of who looks at whom: the row of bank is bright at river, then at money.
def draw_maps(plt):
    figure, axes = plt.subplots(1, 2, figsize=(10, 5.2))
    for axis, text in zip(axes, PAIR, strict=True):
        marks_HTS, _ = read_aloud(readers[4, 0], text, "bank")
        words = text.split()
        future_TS = ~causal_mask(len(words), len(words))
        marks_TS = marks_HTS.mean(dim=0).masked_fill(future_TS, float("nan"))  # left empty
        axis.imshow(marks_TS.tolist(), cmap="Oranges", vmin=0, vmax=1)
        axis.set_xticks(range(len(words)), words, rotation=90, fontsize=8)
        axis.set_yticks(range(len(words)), words, fontsize=8)
        axis.set(xlabel="is looked at", ylabel="looks")
    return figure


picture("05_bank", draw_maps)

# %% [markdown]
# Each row of a heat map belongs to the word that looks. Above the diagonal all is empty: nobody sees
# the future. Find the row of *bank*, and the row of *mouse*, which looks at *keyboard* both times.
# The rows of *the* and *and* mean nothing. No one asked these words for an answer, so their marks
# fell as they fell. (In a big model, too, many marks mean nothing. A heat map shows where a layer
# looked, not why the model said what it said; Jain and Wallace argued about that in 2019.)
#
# Then what about the single head? It has the same number of weights, and does worse. It looks with one
# pair of eyes. A likely reason: in the beginning all marks are random, and a word that happens to
# stare at a full stop hardly gets a gradient that says "look at the river instead". Four heads begin
# with four different stares, and one of them is near enough.
#
# <!-- widget: attention -->
#
# ## Two questions at once
#
# There is a stricter reason for several heads. One head makes *one* weighted average. A word that
# needs two different things gets both mixed in one glass.
#
# Play the card game once more, with a harder question: the last card names *two* letters, and the
# answer is the digit of the first and the digit of the second, in this order. The network stays as
# it was, one attention layer and a matrix.

# %%
ASKED = 8  # letters in this game


class DoublePlayer(nn.Module):
    """Guesses two digits, `[B, 2, DIGITS]`, with a layer of that many heads and width 32."""

    def __init__(self, heads: int):
        super().__init__()
        self.letter, self.digit = nn.Embedding(ASKED, 32), nn.Embedding(DIGITS, 32)
        self.first, self.second = nn.Embedding(ASKED, 32), nn.Embedding(ASKED, 32)
        self.attention = Attention(32, heads, heads, 32 // heads, 1e-6)
        self.guess = nn.Linear(32, 2 * DIGITS)

    def cards(self, letters_BT: Tensor, digits_BT: Tensor, asked_B2: Tensor) -> Tensor:
        question_BD = self.first(asked_B2[:, 0]) + self.second(asked_B2[:, 1])
        return torch.cat([self.letter(letters_BT) + self.digit(digits_BT), question_BD[:, None]], 1)

    def forward(self, letters_BT: Tensor, digits_BT: Tensor, asked_B2: Tensor) -> Tensor:
        x_BTD = self.cards(letters_BT, digits_BT, asked_B2)
        tables = rotary_tables(x_BTD.shape[1], self.attention.head_width)
        return self.guess(self.attention(x_BTD, *tables)[:, -1]).view(-1, 2, DIGITS)


def deal_double(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Six cards each; the two letters that are asked; their digits."""
    letters_BT = torch.rand(rows, ASKED).argsort(dim=1)[:, :6]
    digits_BT = torch.randint(DIGITS, (rows, 6))
    places_B2 = torch.rand(rows, 6).argsort(dim=1)[:, :2]
    return letters_BT, digits_BT, letters_BT.gather(1, places_B2), digits_BT.gather(1, places_B2)


def double_loss(player: nn.Module) -> Tensor:
    *cards, answers_B2 = deal_double(64)
    return F.cross_entropy(player(*cards).flatten(0, 1), answers_B2.flatten())


doubles: dict[tuple[int, int], float] = {}
for heads in (1, 2) if FAST else (1, 2, 4):
    for seed in SEEDS:
        torch.manual_seed(seed)
        double_player = DoublePlayer(heads)
        practise(double_player, double_loss, (150 if heads > 1 else 80) if FAST else 600)
        with torch.no_grad():
            *cards, answers_B2 = deal_double(2000)
            right_B2 = double_player(*cards).argmax(dim=-1) == answers_B2
        doubles[heads, seed] = float(right_B2.all(dim=1).float().mean())
        weights = sum(weight.numel() for weight in double_player.parameters())
        print(
            f"{heads} head(s), seed {seed}, {weights:,} weights: one digit right "
            f"{right_B2.float().mean():.0%}, both {doubles[heads, seed]:.0%}"
        )
        if heads == 2 and seed == SEEDS[0]:
            two_headed = double_player

# %% tags=["test"]
assert max(doubles[1, seed] for seed in SEEDS) < 0.3
assert min(doubles[2, seed] for seed in SEEDS) > 0.9

# %% [markdown]
# One head knows *one* of the digits, and guesses the other. It isn't for want of weights. If it marks
# both cards alike, their digits arrive in one sum, and a sum doesn't say which came first. If it marks
# one card more, that digit drowns out the other. With two heads each question gets a highlighter of
# its own. Look at the marks of the last card:

# %%
torch.manual_seed(1)
letters_BT, digits_BT, asked_B2, answers_B2 = deal_double(1)
with torch.no_grad():
    marks_HS = marks_of(two_headed.attention, two_headed.cards(letters_BT, digits_BT, asked_B2))[
        0, :, -1
    ]
names = [chr(ord("A") + letter) for letter in letters_BT[0].tolist()]
names = [f"{name}{digit}" for name, digit in zip(names, digits_BT[0].tolist(), strict=True)]
names.append("".join(chr(ord("A") + letter) for letter in asked_B2[0].tolist()) + "?")
for head, marks in enumerate(marks_HS.tolist()):
    told = "  ".join(f"{name} {mark:4.0%}" for name, mark in zip(names, marks, strict=True))
    print(f"head {head}: {told}")

# %% tags=["test"]
wanted = {int((letters_BT[0] == letter).nonzero()[0, 0]) for letter in asked_B2[0]}
assert set(marks_HS.argmax(dim=1).tolist()) == wanted, "one head for each question"


# %%
# alt: Marks of the question card, one row a head: each head is bright at another of two cards.
def draw_heads(plt):
    figure, axis = plt.subplots(figsize=(6, 1.8))
    axis.imshow(marks_HS.tolist(), cmap="Oranges", vmin=0, vmax=1)
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(marks_HS)), [f"head {head}" for head in range(len(marks_HS))])
    return figure


picture("05_heads", draw_heads)

# %% [markdown]
# Could one head help itself with a second layer behind it? Yes. Layers look one after the other,
# heads at the same time. A model has both.
#
# ## The price: everyone looks at everyone
#
# Attention compares each token with each earlier one. Twice as long a text has nearly four times
# as many pairs. The rest of a transformer treats each token on its own, so there, twice as long is
# only twice the work. Measure both: attention of four heads, and beside it two matrices that widen
# and narrow each token's vector, as chapter 06 will put after each attention layer.

# %%
widen, narrow = torch.randn(384, 128), torch.randn(128, 384)


def alone(x_TD: Tensor) -> Tensor:
    return F.silu(x_TD @ widen.T) @ narrow.T


def quickest(work, *inputs: Tensor) -> float:
    """Milliseconds, the best of five."""
    best = float("inf")
    for _repeat in range(5):
        begin = time.perf_counter()
        work(*inputs)
        best = min(best, time.perf_counter() - begin)
    return 1000 * best


price: dict[int, tuple[int, float, float]] = {}
print(f"{'tokens':>6} {'pairs that may look':>20} {'scores':>9} {'attention':>12} {'the rest':>11}")
for T in (64, 128, 256, 512) if FAST else (64, 128, 256, 512, 1024):
    q_BHTK, k_BHSK, v_BHSK = torch.randn(3, 1, 4, T, 32)
    visible_TT, x_TD = causal_mask(T, T), torch.randn(T, 128)
    price[T] = (
        int(visible_TT.sum()),
        quickest(attend, q_BHTK, k_BHSK, v_BHSK, visible_TT),
        quickest(alone, x_TD),
    )
    pairs, attending, thinking = price[T]
    megabytes = 4 * 4 * T * T / 1e6  # four heads, four bytes a score
    print(f"{T:6} {pairs:20,} {megabytes:6.1f} MB {attending:9.2f} ms {thinking:8.2f} ms")

# %% tags=["test"]
assert all(price[T][0] == T * (T + 1) // 2 for T in price)
assert 3.9 < price[512][0] / price[256][0] < 4


# %%
# alt: Milliseconds against tokens, both axes logarithmic: attention rises twice as steeply.
def draw_price(plt):
    figure, axis = plt.subplots()
    lengths = list(price)
    axis.loglog(lengths, [price[T][1] for T in lengths], "o-", label="attention")
    axis.loglog(lengths, [price[T][2] for T in lengths], "s-", label="the rest: each token alone")
    square = [price[lengths[-1]][1] * (T / lengths[-1]) ** 2 for T in lengths]
    axis.loglog(lengths, square, ":", color="grey", label="four times for twice as long")
    axis.set(xlabel="tokens", ylabel="milliseconds")
    axis.set_xticks(lengths, [str(T) for T in lengths])
    axis.minorticks_off()
    axis.legend()
    return figure


picture("05_price", draw_price)

# %% [markdown]
# For short texts the fixed effort of starting dominates. For long ones each doubling costs four
# times the time, and four times the memory for the scores. That is why a chatbot has a longest
# context, and why so many people look for ways around the square.
#
# And what do you get for the price? Any two tokens are *one* step apart, however far from each other
# they stand. In the LSTM of chapter 02, news from the first letter had to survive every step between.
# And no token waits for another: all rows of scores are computed side by side.

# %% [markdown]
# ## Exercises
#
# **1. A short memory.** Write `window_mask(length, total, window)`: like `causal_mask`, but a token
# sees only itself and the `window - 1` tokens before it (Mistral 7B did so). How does the number of
# pairs grow with the length now?


# %% tags=["solution"]
def window_mask(length: int, total: int, window: int) -> Tensor:
    older_TS = causal_mask(length, total) & ~causal_mask(length, total).tril(
        total - length - window
    )
    return older_TS


assert window_mask(4, 4, 2).int().tolist() == [
    [1, 0, 0, 0],
    [1, 1, 0, 0],
    [0, 1, 1, 0],
    [0, 0, 1, 1],
]
assert window_mask(1, 5, 3).int().tolist() == [[0, 0, 1, 1, 1]]
assert torch.equal(window_mask(6, 6, 6), causal_mask(6, 6))
for T in (256, 512, 1024):
    print(f"{T:5} tokens: {int(window_mask(T, T, 64).sum()):7,} pairs")

# %% [markdown]
# **2. Attention in pieces.** Suppose that the keys don't fit into memory at once. Write
# `attend_in_pieces(q_TK, k_SK, v_SK, size)` for one head without a mask: go through keys and values
# `size` at a time and keep only three things for each query: the largest score so far, the sum of
# the exponentials, and the weighted sum of the values. What must happen to the two sums when a larger
# score turns up? (Milakov and Gimelshein 2018; it is the heart of FlashAttention.)


# %% tags=["solution"]
def attend_in_pieces(q_TK: Tensor, k_SK: Tensor, v_SK: Tensor, size: int) -> Tensor:
    largest_T1 = torch.full((len(q_TK), 1), float("-inf"))
    sum_T1, mixed_TK = torch.zeros(len(q_TK), 1), torch.zeros(len(q_TK), v_SK.shape[1])
    for k_CK, v_CK in zip(k_SK.split(size), v_SK.split(size), strict=True):
        scores_TC = q_TK @ k_CK.T / q_TK.shape[1] ** 0.5
        new_T1 = torch.maximum(largest_T1, scores_TC.amax(dim=1, keepdim=True))
        shrink_T1 = (largest_T1 - new_T1).exp()  # everything so far was measured by the old one
        grown_TC = (scores_TC - new_T1).exp()
        sum_T1 = sum_T1 * shrink_T1 + grown_TC.sum(dim=1, keepdim=True)
        mixed_TK = mixed_TK * shrink_T1 + grown_TC @ v_CK
        largest_T1 = new_T1
    return mixed_TK / sum_T1


q_TK, k_SK, v_SK = torch.randn(3, 10), torch.randn(23, 10), torch.randn(23, 10)
whole_TK = attend(q_TK[None, None], k_SK[None, None], v_SK[None, None], torch.tensor(True))[0, 0]
for size in (1, 5, 23, 100):
    torch.testing.assert_close(attend_in_pieces(q_TK, k_SK, v_SK, size), whole_TK)

# %% [markdown]
# **3. Blind to order.** Show that attention without positions doesn't care in which order the past
# stands: shuffle all tokens but the last, with tables that turn nothing, and compare what the last
# one gathers. Then do the same with `rotary_tables`.


# %% tags=["solution"]
torch.manual_seed(0)
layer = Attention(width=32, heads=4, kv_heads=2, head_width=8, norm_eps=1e-6)
x_BTD = torch.randn(1, 10, 32)
shuffled_BTD = x_BTD[:, [3, 8, 0, 5, 1, 7, 2, 6, 4, 9]]
no_turn = torch.ones(10, 4), torch.zeros(10, 4)
with torch.no_grad():
    torch.testing.assert_close(layer(x_BTD, *no_turn)[:, -1], layer(shuffled_BTD, *no_turn)[:, -1])
    with_order = layer(x_BTD, *rotary_tables(10, 8))[:, -1]
    assert not torch.allclose(
        with_order, layer(shuffled_BTD, *rotary_tables(10, 8))[:, -1], atol=1e-3
    )

# %% [markdown]
# **4. Only two answers.** Train the reader with one head and `kinds=2`, so that every double word
# has its hint and "unclear" never comes up. How many answers are right, and how many double words
# look at their hint? What is the trick that it found?

# %% tags=["solution"]
lazy = train_reader(heads=1, seed=0, kinds=2)
lazy_right, lazy_looks = measure_reader(lazy, kinds=2)
print(f"{lazy_right:.0%} right, but only {lazy_looks:.0%} look at their hint")
# For some words it looks for one of the two meanings only. No river? Then it must be money.
assert lazy_right > 0.9 > lazy_looks

# %% [markdown]
# ## Check yourself
#
# 1. All scores of a token are equal. What does it gather?
# 2. Why is a score divided by the root of the head's width?
# 3. Why can the keys and values of past tokens be stored, and why needn't the queries be?
# 4. You double the text. How many times more scores are there? And the work of the rest?
# 5. Behind one head stands one matrix. Why can't the two fetch two digits in the right order?
#
# <details markdown="1"><summary>Answers</summary>
#
# 1. The plain average of all values that it may see.
# 2. The spread of a dot product grows with the root of the width. Large scores make the softmax all
#    or nothing, and then hardly any gradient comes through.
# 3. Nobody looks into the future, so what a past token offers never changes. Its own question was
#    asked and answered when it was read.
# 4. Nearly four times. The rest: twice.
# 5. What arrives is one weighted sum. Marked alike, two digits give the same sum in either order.
#    Marked unequally, the stronger digit wins in both of the answers that a matrix makes of the sum.
#
# </details>
#
# ## What we left out
#
# - **Cross-attention**: the queries come from one text and the keys from another. Chapter 06 begins
#   with it.
# - **FlashAttention** (Dao et al. 2022): the same numbers, computed in tiles that fit the fast memory
#   of a GPU, so that the T×T scores never exist as a whole. PyTorch's kernel is of this kind;
#   exercise 2 shows the idea.
# - **Sliding windows, sparse and linear attention**: ways around the square. Exercise 1 builds the
#   first. Many models mix: a few layers that see a window, then one that sees everything.
# - **One key head for all** (Shazeer 2019) is grouped heads at the extreme. **Compressed keys and
#   values** (DeepSeek-AI 2024) store a short vector, from which all heads make theirs.
# - **Other scores.** The first attention scored a pair with a small network in place of a dot product;
#   chapter 06 says why that went out of use.
# - **A short cut for values.** Some recent models add to each later layer's values those of the first
#   layer (Zhou et al. 2024), or a vector that is looked up by the token alone (nanochat), so that
#   late layers still know what was written.
# - **Biases**, added to queries, keys and values, can be left out without harm. **Dropout**, of marks
#   among others, is for texts that are read many times; chapter 06 shows it.
# - **The shipped model's own heads.** In the chat, `/attn` draws them.
#
# ## Where this is in the package
#
# Everything tagged `export` here is `tinychat/attention.py`. `Block` in chapter 06 puts one
# `Attention` into each layer; `KVCache` there holds one `LayerCache` a layer.
#
# ## Sources
#
# - D. Bahdanau, K. Cho, Y. Bengio:
#   [Neural machine translation by jointly learning to align and translate](https://arxiv.org/abs/1409.0473)
#   (2015). Where attention comes from.
# - A. Vaswani et al.: [Attention is all you need](https://arxiv.org/abs/1706.03762) (2017). Queries,
#   keys, values, heads, the root.
# - N. Shazeer: [Fast transformer decoding](https://arxiv.org/abs/1911.02150) (2019). One key head for
#   all query heads.
# - J. Ainslie et al.: [GQA: Training generalized multi-query transformer models from multi-head
#   checkpoints](https://arxiv.org/abs/2305.13245) (2023). Grouped heads.
# - DeepSeek-AI: [DeepSeek-V2](https://arxiv.org/abs/2405.04434) (2024). Compressed keys and values.
# - J. L. Ba, J. R. Kiros, G. E. Hinton: [Layer normalization](https://arxiv.org/abs/1607.06450) (2016).
# - B. Zhang, R. Sennrich: [Root mean square layer normalization](https://arxiv.org/abs/1910.07467)
#   (2019).
# - M. Dehghani et al.: [Scaling vision transformers to 22 billion parameters](https://arxiv.org/abs/2302.05442)
#   (2023). QK-norm.
# - T. Dao et al.: [FlashAttention](https://arxiv.org/abs/2205.14135) (2022); M. Milakov, N. Gimelshein:
#   [Online normalizer calculation for softmax](https://arxiv.org/abs/1805.02867) (2018).
# - Z. Zhou et al.: [Value residual learning](https://arxiv.org/abs/2410.17897) (2024).
# - S. Jain, B. C. Wallace: [Attention is not explanation](https://arxiv.org/abs/1902.10186) (2019).
#   What a heat map can't tell.
# - The same, told by others: [The Annotated Transformer](https://nlp.seas.harvard.edu/annotated-transformer/)
#   (A. Rush and others), line by line along the paper; chapter 3 of
#   [LLMs from scratch](https://github.com/rasbt/LLMs-from-scratch) (S. Raschka), in very small steps;
#   [nanochat](https://github.com/karpathy/nanochat) (A. Karpathy), as one fast file.
