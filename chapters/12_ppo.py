# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # PPO
#
# Let the model try, mark what it said, and make the good tries more likely, but not too fast.
#
# So far the model learned by imitation. It was shown a good reply and asked to say the very same
# words. Now nobody shows it anything. It answers as it likes, somebody gives the answer a mark, and
# the model is changed so that well-marked answers come more often. Think of a cook who has read
# all the books and now, for the first time, watches the faces of the guests.
#
# The marks come from the reward model of chapter 11. The method is **PPO**, proximal policy
# optimization (Schulman et al. 2017). It is the third step of InstructGPT, and the one with the
# most ways to go quietly wrong. So in this chapter you build it slowly:
#
# 1. the naive rule, **REINFORCE**, on a toy that you can see through;
# 2. a **baseline**, against the noise;
# 3. the **ratio** and its **clipping**, so that one batch of tries can be used several times;
# 4. the whole loop in ten numbered steps;
# 5. a box of switches with which you **break** each detail and watch what happens;
# 6. a reward with a hole, and a model that finds it;
# 7. your own chatbot.
#
# **What you need:** chapters 08 (drawing replies), 10 (the model to begin with) and 11 (the marks).
# The code takes about two minutes; reading it, an hour and a half.

# %% tags=["export"]
import copy
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tinychat.data.batch import Batch
from tinychat.generation import draw_tokens, drop_stopped, make_generator
from tinychat.gpt import GPT
from tinychat.pretraining import (
    Budget,
    LossFunction,
    average,
    largest,
    pack_state,
    processes,
    schedule,
    unpack_state,
)
from tinychat.runtime.device import has_compiler
from tinychat.runtime.errors import ConfigError, DataError, TinychatError
from tinychat.runtime.metrics import MetricsWriter
from tinychat.runtime.state import load_state, save_state
from tinychat.sft import blend

RewardFunction = Callable[[list[list[int]], list[list[int]]], Tensor]

# %% [markdown]
# ## A toy that you can see through
#
# A language model with 32 tokens and a single small block. A prompt is a few tokens of no meaning.
# A reply has at most twelve tokens and is over when the token `END` comes. The mark is the count of
# one token, the `WANTED` one: eight of them are enough and give a mark of one. A reply that
# doesn't end by itself loses half a mark.
#
# So the best possible mark is known: eight wanted tokens or more, then `END`. The fresh model knows
# nothing of that.

# %%
import itertools
import os
import tempfile
from dataclasses import replace

from tinychat.book.picture import picture
from tinychat.gpt import GPTConfig

FAST = os.environ.get("TINYCHAT_FAST") == "1"
CPU = torch.device("cpu")
PAD, END, WANTED, LENGTH, ENOUGH = 0, 1, 5, 12, 8
PROMPTS = [[2 + n % 30, 2 + 7 * n % 30, 3][: 1 + n % 3] for n in range(64)]
STOPS: dict[str, Any] = {"stop": {PAD, END}, "end": END, "pad": PAD}


def toy_gpt() -> GPT:
    """The same fresh model each time."""
    torch.manual_seed(0)
    shape = GPTConfig(
        width=32, layers=1, heads=2, kv_heads=1, head_width=16, hidden=64, vocab_size=32, context=32
    )
    return GPT(shape)


def wanted(prompts: list[list[int]], replies: list[list[int]]) -> Tensor:
    """The toy's reward function: one mark a reply."""
    return torch.tensor([min(reply.count(WANTED), ENOUGH) / ENOUGH for reply in replies])


print(wanted([[2], [2]], [[5, 9, 5, END], [5] * 8 + [END]]))

# %% [markdown]
# A reward function takes a list of prompts and a list of replies, all as tokens, and returns a mark
# for each. PPO needs to know nothing else about it. It may count tokens, run a reward model, or ask
# a person.
#
# Reinforcement learning has words of its own. Here they are, once for all:
#
# | word | what it means here |
# | --- | --- |
# | **policy** | the model that is trained; it acts by choosing a token |
# | **reference** | the frozen model that it began as |
# | **episode** | a prompt with a whole reply to it |
# | **rollout** | the episodes of one step, with all that the update must know of them |
# | **score** | the mark of a whole reply, from the reward function |
# | **reward** | what a single token earns; the score lands on one of them |
# | **return** | all rewards from a token on, added up |
# | **value** | the return that is expected before a token is chosen |
# | **advantage** | how much better it came than expected |
#
# ## Throwing the dice
#
# First the model must talk. Chapter 08 has a fine `generate_batch`, but here we need something from
# each draw that a chat never asks for: **how likely was the token that came?**
#
# And there is a rule about the dice. A chat cuts the tail off, with top-p or top-k. Here that is
# forbidden. Say that the model gives a token a chance of one in five, and the filter cuts away half
# of all probability: then it comes with two in five. The log-probs in all formulas below would
# be those of a distribution that nobody drew from, and the token's true chance would even change
# from step to step with what the filter removes. So draw from the **whole** softmax. A temperature
# is allowed, since dividing by it can be repeated exactly. It must then stand in every log-prob: the
# old ones, the new ones and the reference's.
#
# All settings stand in one dataclass again. Most of its lines will mean something to you only further
# down, where they are used; come back then.


# %% tags=["export"]
@dataclass(frozen=True)
class PPOConfig:
    """Everything that decides a PPO run besides the model, the prompts and the reward."""

    steps: int = 0
    "rollouts in all, each with its updates; 0 lets the budget in minutes decide"
    episodes: int = 64
    "replies a step"
    samples: int = 1
    "of them to each prompt; from 2 on, a score counts by what it is above its siblings'"
    max_tokens: int = 64
    "longest reply in tokens"
    temperature: float = 1.0
    "of the rollouts, and so of all log-probs; never with top-k or top-p"
    epochs: int = 4
    "times that each rollout is learned from"
    minibatch: int = 16
    "episodes an optimizer step"
    lr: float = 3e-5
    "AdamW's peak rate for the policy"
    value_lr: float = 1e-3
    "AdamW's peak rate for the value head"
    warmup: float = 0.03
    "share of the steps in which the rates rise"
    decay: float = 1.0
    "share of the steps, at the end, in which the rates fall to zero"
    gamma: float = 1.0
    "discount of later rewards; 1 because a reply is short"
    lam: float = 0.95
    "GAE's lambda: 0 trusts the value head, 1 only what was seen"
    clip: float = 0.2
    "the ratio of new to old probability stops paying beyond 1 - clip and 1 + clip"
    value_clip: float = 0.2
    "how far a value may move from the rollout's in one step's updates"
    beta: float = 0.05
    "price of a nat of KL to the reference"
    kl_target: float = 0.0
    "nats a reply that beta is steered to (Ziegler et al. 2019); 0 keeps beta fixed"
    kl_stop: float = 0.05
    "nats a token between old and new policy at which the epochs end early"
    end_penalty: float = 1.0
    "subtracted from the score of a reply that doesn't end by itself"
    grad_clip: float = 1.0
    "largest norm of the policy's gradient, and of the value head's"
    ptx: float = 0.0
    "weight of the loss on conversations beside PPO's own, where there are any (PPO-ptx)"
    keep: float = 0.0
    "share of the reference in the finished policy: it has forgotten less, and learned less"
    seed: int = 0
    "decides the order of the prompts and the dice"
    precision: str = "fp32"
    "bf16 or fp32 matrix products; logits are always fp32"
    compiled: bool = False
    "use torch.compile where a C++ compiler is installed: pays in runs of many minutes"
    save_minutes: float = 3.0
    "time between saved states"

    def __post_init__(self) -> None:
        rules = (
            (("episodes", "samples", "max_tokens"), 1, math.inf, "at least 1"),
            (("epochs", "minibatch"), 1, math.inf, "at least 1"),
            (("steps", "seed", "lr", "value_lr", "beta", "kl_target", "ptx"), 0, 1e12, "0 or more"),
            (("warmup", "decay", "gamma", "lam", "keep"), 0, 1, "from 0 to 1"),
            (("temperature", "clip", "value_clip", "kl_stop"), 1e-6, math.inf, "above 0"),
            (("grad_clip", "save_minutes"), 1e-12, math.inf, "above 0"),
            (("end_penalty",), 0, 1e12, "0 or more"),
        )
        for names, low, high, wanted in rules:
            for name in names:
                if not low <= getattr(self, name) <= high:
                    raise ConfigError(f"{name} is {getattr(self, name)}; it must be {wanted}.")
        if self.precision not in ("bf16", "fp32"):
            raise ConfigError(f"precision is {self.precision!r}; choose bf16 or fp32.")
        if self.episodes % self.samples:
            raise ConfigError(
                f"{self.episodes} episodes can't be {self.samples} samples of each prompt; make "
                "episodes a multiple of samples."
            )

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


# %% tags=["export"]
def draw(logits_BV: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a token from each row's softmax; returns tokens and their log-probs, both `[B]`."""
    probs_BV = logits_BV.softmax(-1)
    tokens_B = draw_tokens(probs_BV, generator)
    return tokens_B, probs_BV.gather(1, tokens_B[:, None])[:, 0].log()


# %% [markdown]
# `draw_tokens` is chapter 08's ladder. The test counts many draws.

# %% tags=["test"]
dice = make_generator(0, CPU)
shares_V = torch.tensor([0.5, 0.25, 0.125, 0.125])
drawn_N, _ = draw(shares_V.log().expand(4000, 4), dice)
counted_V = drawn_N.bincount(minlength=4) / 4000
assert (counted_V - shares_V).abs().max() < 0.03

# %% [markdown]
# Then the batch. Short prompts are filled up on the left, so that all replies begin in one column.
# Replies end at different times. A row that has ended needs no more work, so when half of the rows
# are done, they leave.


# %% tags=["export"]
def pad_left(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the prompts as `[B, P]`, filled up on the left, and their segments (0 is filling)."""
    longest = max(len(prompt) for prompt in prompts)
    rows = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    segments = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(segments, device=device)


def lay_out(
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    pad: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, segments and the replies' mask, `[B, T]`; replies begin in one column."""
    tokens_BT, segments_BT = pad_left(prompts, pad, device)
    longest = max(map(len, replies))
    filled = [[*reply, *[pad] * (longest - len(reply))] for reply in replies]
    lengths_B = torch.tensor([len(reply) for reply in replies], device=device)
    inside_BT = torch.arange(longest, device=device) < lengths_B[:, None]
    return (
        torch.cat((tokens_BT, torch.tensor(filled, device=device)), dim=1),
        nn.functional.pad(segments_BT, (0, longest), value=1),
        nn.functional.pad(inside_BT, (tokens_BT.shape[1], 0)),
    )


# %% tags=["export"]
@torch.inference_mode()
def sample_replies(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    config: PPOConfig,
    *,
    stop: Collection[int],
    pad: int,
    generator: torch.Generator,
) -> tuple[list[list[int]], list[list[float]]]:
    """Return a reply to each prompt, with the token of `stop` that ended it, and its log-probs.

    From the whole distribution at `config.temperature`: no top-k, no top-p. Rows that have stopped
    leave the batch as soon as they are half of it.
    """
    unread_BT, segments_BT = pad_left(prompts, pad, model.device)
    longest = unread_BT.shape[1]
    if longest + config.max_tokens > model.config.context:
        raise ConfigError(
            f"A prompt of {longest} tokens and a reply of {config.max_tokens} don't fit into the "
            f"{model.config.context} that this model reads; lower max_tokens or cut the prompts."
        )
    cache = model.new_cache(len(prompts), longest + config.max_tokens)
    weight_VD = model.embed.weight.float()
    replies: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the replies that the batch still holds
    running = set(rows)
    plain = bool(segments_BT.all())
    for step in range(config.max_tokens):
        known = None if plain or step else segments_BT
        h_BD = model.hidden(unread_BT, cache=cache, segments_BT=known)[:, -1]
        logits_BV = (h_BD.float() / config.temperature) @ weight_VD.T
        tokens_B, logprobs_B = draw(logits_BV, generator)
        for row, token, logprob in zip(rows, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
            if row in running:
                replies[row].append(token)
                logprobs[row].append(logprob)
                if token in stop:
                    running.remove(row)
        if not running:
            break
        unread_BT = tokens_B[:, None]
        if len(running) <= len(rows) // 2:
            rows, places_B = drop_stopped(cache, rows, running, model.device)
            unread_BT = unread_BT[places_B]
    return replies, logprobs


# %%
TOY = PPOConfig(
    steps=3 if FAST else 60, minibatch=32, max_tokens=LENGTH, lr=8e-3, value_lr=8e-3, warmup=0,
    decay=0.3, beta=0.001, kl_stop=0.1, end_penalty=0.5,
)  # fmt: skip
speaker = {"stop": {PAD, END}, "pad": PAD}
replies, _ = sample_replies(toy_gpt(), PROMPTS, TOY, **speaker, generator=make_generator(1, CPU))
for prompt, reply in zip(PROMPTS[:4], replies, strict=False):
    print(f"{prompt!s:>12} -> {reply}")
print(f"mean mark of {len(replies)} replies: {wanted(PROMPTS, replies).mean():.3f}")

# %% [markdown]
# ## REINFORCE: the naive rule
#
# Williams (1992) gave the simplest rule. Draw a reply. Then move the weights so that its log-prob
# grows, *in proportion to its mark*. Replies with a high mark are pushed up strongly, poor ones
# hardly. It is plain supervised learning on the model's own replies, each weighted by its mark.
#
# Why does that raise the expected mark? Write $p(y)$ for the probability of the reply $y$ and $r(y)$
# for its mark. The slope of a logarithm is the slope divided by the value, so
# $\nabla p = p \, \nabla \log p$, and
#
# $$\nabla \sum_y p(y) \, r(y) = \sum_y p(y) \, r(y) \, \nabla \log p(y).$$
#
# On the right stands a mean over replies that the model itself draws. So drawing and averaging gives
# the right direction, whatever the mark is made of. You never differentiate the mark itself.
#
# The next cells read the model's log-probs for given replies. They compute *logits* only where a reply
# token stands, since the vocabulary is the largest matrix of a small model. As in chapter 07's
# `ChunkedCrossEntropy`, the gradient is written by hand, in chunks that fit into the processor's cache. You
# may skip the class: it returns what `log_softmax` and `gather` would.


# %% tags=["export"]
class TokenLogprobs(torch.autograd.Function):
    """Log-probs of chosen tokens, in chunks, with the gradient by hand.

    The logits and their softmax are float32 whatever `dtype` is: a rounded logit would be a
    wrong ratio. What the backward pass keeps and multiplies may be bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight_VD: Tensor,
        ids_N: Tensor,
        temperature: float,
        dtype: torch.dtype,
        chunk: int = 128,
    ) -> Tensor:
        logprobs_N = torch.empty(len(h_ND), device=h_ND.device)
        keep = ctx.needs_input_grad[0]
        probs_NV = h_ND.new_empty(len(h_ND) if keep else 0, len(weight_VD), dtype=dtype)
        for start in range(0, len(h_ND), chunk):
            part = slice(start, start + chunk)
            all_NV = ((h_ND[part] / temperature) @ weight_VD.T).log_softmax(-1)
            logprobs_N[part] = all_NV.gather(1, ids_N[part, None])[:, 0]
            if keep:
                probs_NV[part] = all_NV.exp_()
        ctx.save_for_backward(h_ND, weight_VD, ids_N)
        ctx.probs_NV, ctx.temperature = probs_NV, temperature
        return logprobs_N

    @staticmethod
    def backward(ctx: Any, slope_N: Tensor) -> Any:
        h_ND, weight_VD, ids_N = ctx.saved_tensors
        slope_NV, ctx.probs_NV = ctx.probs_NV, None
        # d log p(id) / d logits = onehot(id) - softmax
        slope_N1 = (slope_N / ctx.temperature)[:, None].to(slope_NV.dtype)
        slope_NV.mul_(-slope_N1).scatter_add_(1, ids_N[:, None], slope_N1)
        h_grad_ND = slope_NV @ weight_VD.to(slope_NV.dtype)
        weight_grad_VD = slope_NV.T @ h_ND.to(slope_NV.dtype)
        return h_grad_ND.float(), weight_grad_VD.float(), None, None, None, None


# %% tags=["export"]
@lru_cache(maxsize=4)
def compiled_hidden(gpt: GPT) -> Callable[..., Tensor]:
    """`gpt.hidden`, compiled once for each model and each shape."""
    return torch.compile(gpt.hidden, dynamic=False)


def reply_logprobs(
    gpt: GPT,
    tokens_BT: Tensor,
    segments_BT: Tensor,
    mask_BT: Tensor,
    config: PPOConfig,
) -> tuple[Tensor, Tensor]:
    """Return the log-probs of the tokens under the mask, `[N]`, at the rollout's temperature.

    And the vectors `[N, D]` that these tokens were chosen from. Prompts are read, but no logits are
    computed for them; columns in which all rows are only filled up are not even read.
    """
    hidden = gpt.hidden
    if config.compiled and has_compiler():
        hidden = compiled_hidden(gpt)  # made for one shape: nothing is cut off
    else:
        begin = int(segments_BT.any(0).int().argmax())
        stop = int(mask_BT.any(0).nonzero().max()) + 1
        tokens_BT, segments_BT, mask_BT = (
            part_BT[:, begin:stop] for part_BT in (tokens_BT, segments_BT, mask_BT)
        )
    segments = None if bool(segments_BT.all()) else segments_BT[:, :-1]
    with torch.autocast(tokens_BT.device.type, config.dtype, enabled=config.precision != "fp32"):
        h_BTD = hidden(tokens_BT[:, :-1], segments_BT=segments)
    h_ND = h_BTD[mask_BT[:, 1:]].float()
    logprobs_N = TokenLogprobs.apply(
        h_ND, gpt.embed.weight, tokens_BT[mask_BT], config.temperature, config.dtype
    )
    return logprobs_N, h_ND


# %%
def naive(steps: int, baseline: bool) -> tuple[list[float], float]:
    """REINFORCE; returns the marks, and how much of the first gradients is signal."""
    gpt, dice = toy_gpt(), make_generator(1, CPU)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=TOY.lr, weight_decay=0.0)
    marks, gradients = [], []
    for step in range(8 + steps):
        replies, _ = sample_replies(gpt, PROMPTS, TOY, **speaker, generator=dice)
        marks_B = wanted(PROMPTS, replies) - 0.5 * torch.tensor([r[-1] != END for r in replies])
        weight_B = marks_B - marks_B.mean() if baseline else marks_B
        tokens_BT, segments_BT, mask_BT = lay_out(PROMPTS, replies, PAD, CPU)
        logprobs_N, _ = reply_logprobs(gpt, tokens_BT, segments_BT, mask_BT, TOY)
        logprobs_BT = torch.zeros(mask_BT.shape).masked_scatter(mask_BT, logprobs_N)
        (-(weight_B * logprobs_BT.sum(1)).mean()).backward()
        if step < 8:  # only look: eight gradients of the same model
            gradients.append(torch.cat([w.grad.flatten() for w in gpt.parameters()]))
        else:
            optimizer.step()
            marks.append(float(marks_B.mean()))
        optimizer.zero_grad()
    stacked = torch.stack(gradients)
    return marks, float(stacked.mean(0).norm() / stacked.norm(dim=1).mean())


STEPS = 3 if FAST else 40
for baseline in (False, True):
    marks, signal = naive(STEPS, baseline)
    title = "minus the mean mark" if baseline else "the mark itself"
    shown = "  ".join(f"{mark:5.2f}" for mark in marks[:: max(1, STEPS // 6)])
    print(f"{title:>20}: {shown}   agreement of eight gradients {signal:.2f}")

# %% [markdown]
# ## A baseline against the noise
#
# In the first line, all depends on whether a mark is above zero. At first hardly any is, since a reply
# without an end loses half a mark, and three in four replies are pushed down; later all are pushed *up*,
# poor ones too. Only the differences between them teach anything. The second line subtracts the mean
# mark. Now the better half goes up and the worse half goes down.
#
# The last column compares eight gradients of one and the same model: 1 would mean that all point
# the same way, and pure noise has $1 / \sqrt 8 = 0.35$. The baseline is allowed because it doesn't
# depend on the reply (a batch's mean does a little; exercise 2 mends that). Put a constant $b$ in
# the place of $r(y)$ in the formula: the left side is the slope of $b$ times the sum of all
# probabilities. That sum is always 1, so its slope is zero. On average nothing changes but the noise.
#
# A better baseline knows more. Half-way through a reply that is going well, the expected mark is
# higher than at its start. A small network can learn that: the **value head**. And then each token
# gets its own question: *after this token, do I expect more or less than before it?* The answer is its
# **advantage**.
#
# ## Using a try twice: the ratio
#
# REINFORCE throws its replies away after one step. Drawing them is expensive, so it would be good to
# take several steps with each batch. But after the first step, the replies come from a model that is
# no more. The cure is a weight: the **ratio** of the new probability of a token to the old one. If
# the new model says a token twice as often, each time it was drawn counts for two.
#
# The ratio must not be trusted far. Raise a token's probability a hundredfold, and one lucky draw
# decides everything. So PPO **clips**: beyond 1.2, or below 0.8, a token earns nothing more. With the
# ratio $\rho$, the advantage $A$ and the clip $\varepsilon = 0.2$, a token pays
#
# $$\min\big(\rho A, \; \text{clip}(\rho, 1 - \varepsilon, 1 + \varepsilon) \, A\big).$$


# %% tags=["export"]
def policy_loss(ratio_N: Tensor, advantages_N: Tensor, clip: float) -> Tensor:
    """The clipped surrogate (Schulman et al. 2017, equation 7), as a loss."""
    clipped_N = ratio_N.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N).mean()


# %%
# alt: What a ratio pays: flat above 1.2 for a good token, flat below 0.8 for a bad one.
def draw_clip(plt):
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
    ratio = torch.linspace(0, 2, 201)
    for axis, sign in zip(axes, (1.0, -1.0), strict=True):
        gain = [-float(policy_loss(r[None], torch.tensor([sign]), 0.2)) for r in ratio]
        axis.plot(ratio, gain, color="#177245")
        axis.axvline(1, color="grey", linewidth=0.5)
        axis.set(title=f"advantage {sign:+.0f}", xlabel="ratio new / old")
    axes[0].set_ylabel("what it pays")
    return figure


picture("12_clip", draw_clip)

# %% tags=["test"]
one = torch.tensor([1.0])
assert policy_loss(1.5 * one, one, 0.2) == -1.2, "a good token earns no more than 1.2"
assert policy_loss(1.5 * one, -one, 0.2) == 1.5, "a bad one that became likelier costs all of it"
assert policy_loss(0.5 * one, -one, 0.2) == 0.8, "and its fall pays down to 0.8 only"

# %% [markdown]
# Clipping is *one-sided*: it takes away the reward for going too far, but never the punishment. If a
# token with a bad mark became more likely, the full gradient pulls it back.
#
# ## The ten steps
#
# Now the whole method. The same numbers stand in the code.
#
# 1. **Rollouts**: the policy answers a batch of prompts.
# 2. **Scores**: the reward function marks each reply.
# 3. **Log-probs** of every reply token, under the policy as it was (the *old* one) and under the
#    frozen SFT model (the *reference*), at the rollout's temperature.
# 4. **Values**: what the value head expected before each token.
# 5. **Rewards** a token: a KL penalty everywhere, the score at the end.
# 6. **Advantages** by GAE.
# 7. **Whitening** of the advantages.
# 8. **Update**: a few epochs of minibatches with the clipped losses.
# 9. **beta**, the price of KL, may be steered.
# 10. **Report**.
#
# ### Steps 3 and 4: who said what, and what was expected
#
# The value head is a small network on top of the policy's own vectors. InstructGPT used a second
# whole model for it, which began as a copy of the reward model. We share the trunk: that halves the
# work of the update. But shared weights let the value loss pull at the policy, and then a coefficient
# has to balance the two. So our value head *reads* the trunk, and its gradient stops there. Nothing
# is to be balanced. The price: its guesses are as good as the policy's vectors allow, and no better.


# %% tags=["export"]
class ActorCritic(nn.Module):
    """A policy and its value head, which reads the policy's vectors but never changes them.

    One trunk costs half of two. The gradient of the value loss stops at the trunk: what helps to
    guess scores must not pull at how the policy speaks.
    """

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = gpt
        width = gpt.config.width
        self.value = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, 1))
        self.value.to(gpt.device)
        self.expect(0.0)

    @torch.no_grad()
    def expect(self, score: float) -> None:
        """Set the last layer so that the value is this score everywhere."""
        last = self.value[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, score)

    def forward(
        self, tokens_BT: Tensor, segments_BT: Tensor, mask_BT: Tensor, config: PPOConfig
    ) -> tuple[Tensor, Tensor]:
        """Return log-probs and values for the tokens under the mask, `[N]` each."""
        logprobs_N, h_ND = reply_logprobs(self.gpt, tokens_BT, segments_BT, mask_BT, config)
        return logprobs_N, self.value(h_ND.detach())[:, 0]


# %% [markdown]
# `expect` matters at the start. A fresh value head would say zero. If the mean score is two, then
# every reply looks like a wonderful surprise, and most so at its end, where the mark arrives. Whitening
# (step 7) takes away what all tokens have in common, but not that late tokens look better than early
# ones. So the head starts at the mean score of a first look.
#
# ### Step 5: the reward of a token
#
# The reward model judges whole replies, and only such as it has seen. Far away from them its marks
# mean nothing. So each token pays for how far it strays from the reference: **beta** times the
# difference of the two log-probs (Ziegler et al. 2019; Stiennon et al. 2020). Summed over a reply
# and averaged over many, that difference is the **KL divergence** of the policy from the reference.
#
# The score itself is one number for the whole reply. It lands on the *last* token, the one that ends
# the reply. One place too early or too late, and the end is praised or blamed for another's deed.
#
# And a reply that doesn't end by itself? The reward model has hardly seen such ones and may like them.
# So they pay a fixed `end_penalty` (Ziegler et al. 2019 gave them a fixed low score), and the policy
# learns to finish.
#
# Some recipes put the KL not into the rewards but into the loss, beside the clipped part (GRPO and
# minimind do). Then each token pays for its own distance only. In the reward, a token also pays, by
# way of the returns, for where it *leads*.


# %% tags=["export"]
def kl_terms(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k3 estimate of the KL to the reference, a term a token: never below 0.

    exp(d) - 1 - d with d = log reference - log policy (Schulman 2020). Its mean is the same as that
    of -d (k1); near the reference, with far less noise.
    """
    d = ref_logprobs - logprobs
    return torch.expm1(d) - d


# %% tags=["export"]
def place_rewards(
    logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor, scores_B: Tensor, beta: float
) -> Tensor:
    """Each token pays beta x (log policy - log reference); the last one also gets the score."""
    rewards_BT = -beta * (logprobs_BT - ref_logprobs_BT) * mask_BT
    places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = (places_T * mask_BT).argmax(dim=1)
    rewards_BT[torch.arange(len(last_B)), last_B] += scores_B
    return rewards_BT


# %% tags=["test"]
mask_BT = torch.tensor([[False, True, True, False], [False, True, True, True]])
logprobs_BT = torch.tensor([[0.0, -1.0, -2.0, 0.0], [0.0, -1.0, -1.0, -1.0]])
ref_logprobs_BT = torch.tensor([[0.0, -2.0, -2.0, 0.0], [0.0, -1.0, -1.0, -1.0]])
rewards_BT = place_rewards(logprobs_BT, ref_logprobs_BT, mask_BT, torch.tensor([3.0, 5.0]), 0.1)
# The first token of the first reply is a nat likelier than in the reference: it pays 0.1.
torch.testing.assert_close(rewards_BT, torch.tensor([[0, -0.1, 3.0, 0], [0, 0, 0, 5.0]]))

# %% [markdown]
# There are several ways to *estimate* a KL from drawn tokens (Schulman 2020). **k1** is the plain
# difference of log-probs. Its mean is right, but single ones may be negative. **k3** is never
# negative, and near the reference it is far less noisy. The report shows both. Further down you
# will see one of them fail.
#
# One more word on the score. Some prompts are easy and some are hopeless, and a value head that is as
# young as the run can't tell them apart yet: most of what it calls a surprise was the prompt's doing.
# But if the model answers each prompt a few times, the siblings tell what was to be expected. Take the
# mean score of the *other* replies off each score (REINFORCE with a leave-one-out baseline, Kool et al.
# 2019; Ahmadian et al. 2024 align language models with it). It is a baseline that doesn't depend on the
# reply itself, so nothing is distorted. And where all siblings score alike, their scores push nothing.


# %% tags=["export"]
def minus_siblings(scores_B: Tensor, samples: int) -> Tensor:
    """Each score less the mean of the other replies' to the same prompt, `[B]` (Kool et al. 2019).

    The `samples` replies to one prompt are neighbours. An only child's score stays as it is.
    """
    if samples == 1:
        return scores_B
    scores_PS = scores_B.view(-1, samples)
    above_PS = scores_PS - scores_PS.mean(1, keepdim=True)
    return (above_PS * samples / (samples - 1)).flatten()


# %% tags=["test"]
# 3 is 1.5 above the mean of 0 and 3, and so on; the second prompt was equally easy for all three.
assert minus_siblings(torch.tensor([3.0, 0.0, 3.0, 5.0, 5.0, 5.0]), 3).tolist() == [
    1.5, -3.0, 1.5, 0.0, 0.0, 0.0,
]  # fmt: skip

# %% [markdown]
# ### Step 6: whose merit was it?
#
# A reply of fifty tokens got a good mark. Which token deserves it? The value head helps: if the
# expectation jumps after a token, that token was the good one. One such jump is
# `reward + value after - value before`, the *surprise*.
#
# Trust the value head fully, and a token's advantage is its own surprise alone. Don't trust it at
# all, and the advantage is everything that came after, minus the value before. **GAE** (generalised
# advantage estimation, Schulman et al. 2016) mixes: later surprises count, each step away by a factor
# lambda less. With the surprises $\delta_t$,
#
# $$A_t = \delta_t + \gamma \lambda \delta_{t+1} + (\gamma \lambda)^2 \delta_{t+2} + \dots$$
#
# $$\delta_t = r_t + \gamma V_{t+1} - V_t$$
#
# The runs of this chapter take $\lambda = 0.95$, so mostly what was seen; `tinychat train ppo` takes 1, for
# the reason in brackets below. The **discount** $\gamma$ makes later rewards worth
# less, for endless games. A reply is short, and its end counts as much as its beginning: $\gamma = 1$.
# (Below 1, lambda helps only if the value head knows something. Beside one that expects the same
# everywhere, it just takes blame and praise away from the first tokens: of thirty, the first gets
# $0.95^{29}$, a quarter. The report's `explained_variance` tells; where it is about 0, take 1.)
# The sum looks long, but from the last token backwards each $A_t$ needs only the one after it.


# %% tags=["export"]
def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016): advantages and returns, `[B, T]`.

    Nothing comes after a reply: its last token's next value is 0, also where the reply was cut
    for its length.
    """
    advantages_BT = torch.zeros_like(rewards_BT)
    next_value_B = next_advantage_B = torch.zeros_like(rewards_BT[:, 0])
    for t in range(rewards_BT.shape[1] - 1, -1, -1):
        inside_B = mask_BT[:, t].float()
        surprise_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        next_advantage_B = (surprise_B + gamma * lam * next_advantage_B) * inside_B
        next_value_B = values_BT[:, t] * inside_B
        advantages_BT[:, t] = next_advantage_B
    return advantages_BT, advantages_BT + values_BT * mask_BT


# %% tags=["test"]
# By hand: two tokens, values 1 and 2, a score of 5 at the end, lambda 1/2.
rewards_BT, values_BT = torch.tensor([[0.0, 0.0, 5.0]]), torch.tensor([[0.0, 1.0, 2.0]])
inside_BT = torch.tensor([[False, True, True]])
by_hand_BT, returns_BT = gae(rewards_BT, values_BT, inside_BT, gamma=1.0, lam=0.5)
# last token: 5 - 2 = 3; the one before: (0 + 2 - 1) + 1/2 x 3 = 2.5
assert by_hand_BT.tolist() == [[0.0, 2.5, 3.0]] and returns_BT.tolist() == [[0.0, 3.5, 5.0]]

# %% [markdown]
# ### Step 7: one scale for all
#
# Marks may come in thousandths or in hundreds. Whitening gives the advantages mean zero and
# deviation one, so that the learning rate means the same everywhere. Over the mask only: the rows
# are full of zeros from prompts and filling, which are no advantages at all.


# %% tags=["export"]
def whiten(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Shift and scale the entries under the mask to mean 0 and deviation 1; the others become 0.

    Mean and deviation are those of all processes' entries, where several train together.
    """
    x_N = x_BT[mask_BT]
    count, total = mask_BT.sum().float(), x_N.sum()
    average((count, total))
    mean = total / count
    squares = ((x_N - mean) ** 2).sum()
    average((squares,))
    return (x_BT - mean) / ((squares / count).sqrt() + 1e-8) * mask_BT


# %% [markdown]
# ### Step 8: the value's own loss
#
# The value head learns the returns. Its steps are clipped like the policy's: it may not leave its old
# guess by more than a fixed distance within one update. (Huang et al. 2024 list it among the
# details of the original code. Whether it helps is open; below you can switch it off.)
#
# Both losses go through the rollout a few times (`epochs`), in small groups of episodes
# (`minibatch`), and each group makes one step of the optimizer. The prompts of a rollout stand in
# order of length, and a group is made of neighbours: so little of the work goes into filling. If the
# policy has moved too far from the one that spoke, the rest of the epochs is left out (`kl_stop`): its
# tries are no longer worth much.


# %% tags=["export"]
def value_loss(values_N: Tensor, old_N: Tensor, returns_N: Tensor, clip: float) -> Tensor:
    """Half the squared error, of the value or of the value held near the old one: the worse."""
    clipped_N = old_N + (values_N - old_N).clamp(-clip, clip)
    errors_N = torch.maximum((values_N - returns_N) ** 2, (clipped_N - returns_N) ** 2)
    return 0.5 * errors_N.mean()


# %% [markdown]
# ### Step 9: a price that steers itself
#
# How high should beta be? It depends on the scale of the scores. Ziegler et al. turned the question
# round: say how many nats you want to be away, and let beta rise when you are further and fall when
# you are nearer. Or keep it fixed, which is easier to reason about. Both are here.


# %% tags=["export"]
class KLController:
    """beta, and how it is steered to a target of nats a reply (Ziegler et al. 2019, 2.2)."""

    def __init__(self, beta: float, target: float, gain: float = 0.1):
        self.beta, self.target, self.gain = beta, target, gain

    def update(self, kl: float) -> None:
        """Raise beta when the policy is further away than wanted, else lower it; 2 % at most."""
        if self.target:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + self.gain * error


# %%
controller = KLController(beta=0.1, target=6.0)
for kl in (0.5, 3.0, 12.0, 30.0, 6.0):
    before = controller.beta
    controller.update(kl)
    print(f"{kl:4.1f} nats a reply, wanted 6: beta {before:.4f} -> {controller.beta:.4f}")

# %% [markdown]
# Look at the first two lines. At the start of a run the policy is still near home, so beta *sinks*, and
# when the policy sets out, the price is low. In a long run that is made up for. In our short ones it gave
# the policy a running start (the lab notes tell of it), so `PPOConfig` keeps `beta` fixed. `tinychat train ppo`
# steers it, to one nat a reply (`kl_target=1`); `--set kl_target=0` keeps it fixed there, too.
#
# ### Steps 1 to 5 together
#
# What one batch of episodes is, and how it is collected:


# %% tags=["export"]
@dataclass(frozen=True)
class Rollout:
    """The episodes of one step. Entry t of every `_BT` tensor speaks of token t of the row.

    A row is a prompt, filled up on the left, and its reply, filled up on the right. Numbers of
    tokens that aren't under the mask are zero.
    """

    tokens_BT: Tensor
    segments_BT: Tensor
    "0 where the row was filled up on the left"
    mask_BT: Tensor
    "True on the reply, with the token that ends it"
    logprobs_BT: Tensor
    "of the policy that spoke (the old one)"
    ref_logprobs_BT: Tensor
    values_BT: Tensor
    "what the value head expected before the token was chosen"
    rewards_BT: Tensor
    scores_B: Tensor
    "as the reward function gave them, without any penalty"
    ended_B: Tensor
    "True where the reply ended by itself"
    replies: list[list[int]]
    sampled_BT: Tensor
    "log-probs as they were at the draw, with the KV cache: `logprobs_BT` must agree"


# %% tags=["export"]
def collect(
    policy: ActorCritic,
    reference: GPT,
    prompts: list[list[int]],
    reward: RewardFunction,
    config: PPOConfig,
    *,
    beta: float,
    stop: Collection[int],
    end: int,
    pad: int,
    generator: torch.Generator,
) -> Rollout:
    """Let the policy answer, and gather all that the update needs to know (steps 1 to 5)."""
    device = policy.gpt.device
    # 1. rollouts
    speaker = policy.gpt
    if config.precision == "bf16":
        speaker = copy.deepcopy(speaker).bfloat16()
    replies, sampled = sample_replies(
        speaker, prompts, config, stop=stop, pad=pad, generator=generator
    )
    # 2. scores
    scores_B = torch.as_tensor(reward(prompts, replies), dtype=torch.float32, device=device)
    if scores_B.shape != (len(prompts),) or not bool(scores_B.isfinite().all()):
        raise TinychatError(
            f"The reward function returned {scores_B.shape} with "
            f"{int((~scores_B.isfinite()).sum())} values that are no number; "
            f"it must give one finite score to each of the {len(prompts)} replies."
        )
    ended_B = torch.tensor([reply[-1] == end for reply in replies], device=device)
    tokens_BT, segments_BT, mask_BT = lay_out(prompts, replies, pad, device)
    zeros_BT = torch.zeros(mask_BT.shape, device=device)
    flat_N = torch.tensor([logprob for row in sampled for logprob in row], device=device)
    sampled_BT = zeros_BT.masked_scatter(mask_BT, flat_N)
    # 3. log-probs of policy and reference, and 4. values: with the code and in the minibatches of
    # the update, so that the first ratio is 1 to the last bit. (No `no_grad`: under it, attention
    # takes another kernel.)
    logprobs_BT, ref_logprobs_BT, values_BT = (zeros_BT.clone() for _ in range(3))
    for rows_b in torch.arange(len(prompts), device=device).split(config.minibatch):
        mask_bT = mask_BT[rows_b]
        some = (tokens_BT[rows_b], segments_BT[rows_b], mask_bT, config)
        found = (*policy(*some), reply_logprobs(reference, *some)[0])
        for tensor_BT, found_N in zip(
            (logprobs_BT, values_BT, ref_logprobs_BT), found, strict=True
        ):
            tensor_BT[rows_b] = tensor_BT[rows_b].masked_scatter(mask_bT, found_N.detach())
    # 5. rewards: KL a token, and the score where the reply is over
    penalised_B = minus_siblings(scores_B - config.end_penalty * ~ended_B, config.samples)
    rewards_BT = place_rewards(logprobs_BT, ref_logprobs_BT, mask_BT, penalised_B, beta)
    return Rollout(
        tokens_BT, segments_BT, mask_BT, logprobs_BT, ref_logprobs_BT, values_BT, rewards_BT,
        scores_B, ended_B, replies, sampled_BT,
    )  # fmt: skip


# %% [markdown]
# Look at the remark in step 3. On the very first minibatch, the new policy *is* the old one, so every
# ratio must be one. If it isn't, something is wrong: another temperature, another mask, a place off
# by one, dropout. It is the best single test of a PPO, and cheap. (Dropout we have none anyway.)

# %%
gpt = toy_gpt()
reference = toy_gpt().requires_grad_(False)
policy = ActorCritic(gpt)
rollout = collect(
    policy, reference, PROMPTS, wanted, TOY, beta=0.1, **STOPS, generator=make_generator(2, CPU)
)
again_N, _ = policy(rollout.tokens_BT, rollout.segments_BT, rollout.mask_BT, TOY)
ratio_N = (again_N - rollout.logprobs_BT[rollout.mask_BT]).exp()
print(f"ratios of {len(ratio_N)} tokens: {ratio_N.min():.7f} to {ratio_N.max():.7f}")
drift = (rollout.sampled_BT - rollout.logprobs_BT).abs().max()
print(f"log-probs when drawn (with the KV cache) and when read again differ by {drift:.1e} at most")

# %% tags=["test"]
assert (ratio_N - 1).abs().max() < 1e-5 and drift < 1e-5
assert (rollout.logprobs_BT == rollout.ref_logprobs_BT).all(), "the same model: no KL at all"

# %% [markdown]
# ### Steps 6 to 8 together


# %% tags=["export"]
def advantages(rollout: Rollout, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """Return whitened advantages, and the returns that the value head must learn, `[B, T]`."""
    advantages_BT, returns_BT = gae(
        rollout.rewards_BT, rollout.values_BT, rollout.mask_BT, config.gamma, config.lam
    )
    return whiten(advantages_BT, rollout.mask_BT), returns_BT


def update(
    policy: ActorCritic,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    config: PPOConfig,
    generator: torch.Generator,
    conversations: Sequence[Batch] = (),
) -> dict[str, float]:
    """Learn from one rollout (steps 6 to 8); returns what happened, as means.

    Of `conversations` each minibatch takes one, and adds `config.ptx` times the loss on it.
    """
    remember = LossFunction(policy.gpt, dtype=config.dtype, compiled=False)
    reading = iter(conversations)
    # 6. advantages and 7. whitening
    advantages_BT, returns_BT = advantages(rollout, config)
    seen: list[dict[str, float]] = []
    epochs = 0
    for epoch in range(config.epochs):
        # 8. a few epochs over minibatches in random order
        groups = torch.arange(len(rollout.replies)).split(config.minibatch)
        order = torch.randperm(len(groups), generator=generator, device=generator.device).double()
        # The first process's order is that of all: long rows at a time, and short ones.
        order *= processes()[0] == 0
        average((order,))
        for rows_b in (groups[n] for n in order.argsort(stable=True).tolist()):
            mask_bT = rollout.mask_BT[rows_b]
            old_N, old_values_N, advantages_N, returns_N = (
                tensor_BT[rows_b][mask_bT]
                for tensor_BT in (
                    rollout.logprobs_BT, rollout.values_BT, advantages_BT, returns_BT
                )
            )  # fmt: skip
            logprobs_N, values_N = policy(
                rollout.tokens_BT[rows_b], rollout.segments_BT[rows_b], mask_bT, config
            )
            ratio_N = (logprobs_N - old_N).exp()
            of_policy = policy_loss(ratio_N, advantages_N, config.clip)
            of_values = value_loss(values_N, old_values_N, returns_N, config.value_clip)
            # The two share no weight: their sum needs no coefficient, and each is clipped alone.
            (of_policy + of_values).backward()
            read = 0.0
            if (batch := next(reading, None)) is not None:
                of_reading = remember(batch)
                (config.ptx * of_reading).backward()
                read = of_reading.item()
            average(p.grad for p in policy.parameters() if p.grad is not None)
            norm, value_norm = (
                nn.utils.clip_grad_norm_(part.parameters(), config.grad_clip).item()
                for part in (policy.gpt, policy.value)
            )
            if not math.isfinite(norm + value_norm):
                raise TinychatError(
                    f"The gradient became {norm + value_norm:g}; resume with a lower rate, "
                    f"for instance --set lr={config.lr / 2:g}."
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                seen.append(
                    {
                        "policy_loss": of_policy.item(),
                        "value_loss": of_values.item(),
                        "clip_fraction": ((ratio_N - 1).abs() > config.clip).float().mean().item(),
                        "ratio": ratio_N.mean().item(),
                        "ratio_max": ratio_N.max().item(),
                        "old_kl": kl_terms(old_N, logprobs_N).mean().item(),
                        "norm": norm,
                    }
                    | ({"ptx_loss": read} if conversations else {})
                )
        epochs = epoch + 1
        # All processes stop together, when one must.
        if largest(seen[-1]["old_kl"], policy.gpt.device) > config.kl_stop:
            break
    last_ratio = max(row["ratio_max"] for row in seen)
    means = {key: sum(row[key] for row in seen) / len(seen) for key in seen[0]}
    unexplained = (returns_BT - rollout.values_BT)[rollout.mask_BT].var()
    spread = returns_BT[rollout.mask_BT].var()
    return means | {
        "ratio_first": seen[0]["ratio_max"],
        "ratio_max": last_ratio,
        "explained_variance": float(1 - unexplained / spread.clamp(min=1e-8)),
        "epochs": epochs,
    }


# %% [markdown]
# ### Step 10: what to look at
#
# The score alone tells little, because a model that found a hole in the reward has a wonderful score.
# So the report also says how far the policy is (KL), whether it still hesitates (entropy), whether
# replies end, how long they are, and whether they repeat themselves.


# %% tags=["export"]
def distinct(replies: Sequence[Sequence[int]], n: int = 2) -> float:
    """The share of different runs of n tokens among all of all replies (Li et al. 2016)."""
    runs = [tuple(r[start : start + n]) for r in replies for start in range(len(r) - n + 1)]
    return len(set(runs)) / max(1, len(runs))


def repetition(replies: Sequence[Sequence[int]], n: int = 3) -> float:
    """The share of runs of n tokens that came before in the same reply."""
    runs = repeated = 0
    for reply in replies:
        counts = Counter(tuple(reply[start : start + n]) for start in range(len(reply) - n + 1))
        runs += counts.total()
        repeated += counts.total() - len(counts)
    return repeated / max(1, runs)


def summary(rollout: Rollout) -> dict[str, float]:
    """What the replies of a rollout are like; KL and length a reply, entropy a token."""
    mask_BT = rollout.mask_BT
    k1_BT = rollout.logprobs_BT - rollout.ref_logprobs_BT  # 0 outside the mask
    k3_BT = kl_terms(rollout.logprobs_BT, rollout.ref_logprobs_BT)
    return {
        "score": rollout.scores_B.mean().item(),
        "kl": k1_BT.sum(1).mean().item(),
        "kl_k3": k3_BT.sum(1).mean().item(),
        # The mean of -log p over what was drawn from p is p's entropy.
        "entropy": -rollout.logprobs_BT[mask_BT].mean().item(),
        "length": mask_BT.sum(1).float().mean().item(),
        "ended": rollout.ended_B.float().mean().item(),
        "distinct_2": distinct(rollout.replies),
        "repetition": repetition(rollout.replies),
        "mismatch": (rollout.sampled_BT - rollout.logprobs_BT)[mask_BT].abs().mean().item(),
    }


# %% [markdown]
# ## The loop
#
# All steps in a row, in a folder that a killed run can be taken up from. The dice of each step come
# from the seed and the step's number. So a resumed run throws the same dice, and no generator has to
# be saved.
#
# `processes`, `average` and `largest` are chapter 7's: several processes can share a run. Each has
# episodes of its own. Advantages are whitened over all of them, and gradients, KL and beta are the
# mean's, so the policies stay one. Alone, a process is the mean, and nothing changes.
#
# The optimizer is AdamW alone. Muon, which trained our base, makes all directions of a step equally
# strong. With the noisy gradients of PPO, it would amplify the noise. AdamW has the same weakness in
# small: it divides by the size of past gradients, so a weight that hardly ever gets one takes a large
# step on the first small noise. A larger `eps` in the divisor keeps it still (Huang et al. 2024).


# %% tags=["export"]
def averaged(figures: dict[str, float], device: torch.device) -> dict[str, float]:
    """Return each figure's mean over all processes, which beta and the report then go by."""
    values_F = torch.tensor(list(figures.values()), dtype=torch.float64, device=device)
    average((values_F,))
    return dict(zip(figures, values_F.tolist(), strict=True))


class PPOProgress(NamedTuple):
    """Where a run stands after a step, and what the step was like."""

    step: int
    steps: int
    tokens: int
    "drawn so far, in replies"
    seconds: float
    seconds_left: float
    metrics: dict[str, float]

    @property
    def finished(self) -> bool:
        return self.step >= self.steps


# %% tags=["export"]
def prompts_of_step(count: int, episodes: int, step: int, seed: int) -> list[int]:
    """Which of `count` prompts a step uses: each once, in random order, before any comes again."""
    numbers = range(step * episodes, (step + 1) * episodes)
    orders = {n // count: np.empty(0, dtype=np.int64) for n in numbers}
    for epoch in orders:
        orders[epoch] = np.random.default_rng((seed, epoch)).permutation(count)
    return [int(orders[n // count][n % count]) for n in numbers]


def make_optimizer(policy: ActorCritic, config: PPOConfig) -> torch.optim.Optimizer:
    """AdamW for everything: Muon makes every direction of a step equally strong, noise too.

    The larger epsilon keeps weights with tiny gradients still (Huang et al. 2024).
    """
    groups = [
        {"params": list(policy.gpt.parameters()), "lr": config.lr, "peak_lr": config.lr},
        {"params": list(policy.value.parameters()), "lr": config.value_lr},
    ]
    groups[1]["peak_lr"] = config.value_lr
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)


# %% tags=["export"]
def train_ppo(
    policy: ActorCritic,
    reference: GPT,
    prompts: Sequence[list[int]],
    reward: RewardFunction,
    config: PPOConfig,
    folder: str | Path,
    *,
    stop: Collection[int],
    end: int,
    pad: int,
    minutes: float = 0.0,
    judge: RewardFunction | None = None,
    conversations: Callable[[int], Iterator[Batch]] | None = None,
    resume: bool = False,
    on_step: Callable[[PPOProgress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> PPOProgress:
    """Train `policy` in place to score higher, and keep the run's state in `folder`.

    A reply ends at a token of `stop`; only `end` among them counts as ending by itself. As many
    steps as `config.steps` or fit into `minutes`. The `judge` only looks on: its mean mark of each
    step stands in the metrics, and where it falls while the score climbs, the policy has found a
    hole in the reward (Gao et al. 2023). `conversations(n)` yields batches of what the model was
    fine-tuned on, from number n on, for ever; with `config.ptx` it goes on reading them, so that it
    doesn't forget. A run killed at any moment and called again with
    `resume=True` goes on from its last saved state, to the same numbers. Under torchrun each
    process has `config.episodes` episodes of its own, of prompts of its own, and all take the mean
    of their gradients. A finished policy is blended with the reference (`config.keep`), its saved
    state is not. Raises ConfigError when `folder` holds another run, DataError without
    prompts.
    """
    folder = Path(folder)
    rank, world = processes()
    device = policy.gpt.device
    if not prompts:
        raise DataError("There is no prompt to answer; give at least one.")
    saved = load_state(folder)
    if saved is not None and not resume:
        raise ConfigError(
            f"{folder} already holds a run; add --resume to go on with it, "
            "or choose another name with --run."
        )
    reference.requires_grad_(False)
    optimizer = make_optimizer(policy, config)
    controller = KLController(config.beta, config.kl_target)
    started, step, tokens, before, metrics = time.monotonic(), 0, 0, 0.0, {}
    budget_steps = config.steps
    if saved is not None:
        tensors, scalars = saved
        unpack_state(tensors, policy, [optimizer])  # type: ignore[arg-type]
        step, before, metrics = scalars["step"], scalars["seconds"], scalars["metrics"]
        controller.beta, tokens = scalars["beta"], scalars["tokens"]
        if not config.steps and not minutes:
            budget_steps = scalars["steps"]
    budget = Budget(minutes, budget_steps)
    first_step, last_save = step, time.monotonic()

    def spent() -> float:
        return time.monotonic() - started

    def prompts_at(step: int) -> list[list[int]]:
        count = config.episodes // config.samples * world
        numbers = prompts_of_step(len(prompts), count, step, config.seed)
        # Neighbours share a minibatch: of similar length, they need little filling.
        asked = sorted((prompts[n] for n in numbers), key=len)[rank::world]
        return [prompt for prompt in asked for _ in range(config.samples)]

    def rollout_of(step: int, generator: torch.Generator) -> Rollout:
        return collect(
            policy, reference, prompts_at(step), reward, config,
            beta=controller.beta, stop=stop, end=end, pad=pad, generator=generator,
        )  # fmt: skip

    def save() -> None:
        if rank:
            return
        scalars: dict[str, Any] = {"step": step, "steps": budget.steps, "seconds": before + spent()}
        scalars |= {
            "beta": controller.beta,
            "tokens": tokens,
            "metrics": metrics,
            "config": asdict(config),
        }
        save_state(folder, pack_state(policy, [optimizer]), scalars)  # type: ignore[arg-type]

    updates = config.epochs * -(-config.episodes // config.minibatch)  # of one step
    reading = conversations(step * updates) if conversations and config.ptx else iter(())
    policy.train()
    recent: deque[float] = deque(maxlen=20)
    log = MetricsWriter(folder / "metrics.jsonl", resume_step=step) if rank == 0 else nullcontext()
    with log as writer:
        if step == 0:
            # The value head starts at the mean of what a reply pays, so that the first advantages
            # aren't all of one sign.
            look = rollout_of(0, make_generator(config.seed + rank, device))
            paid = look.rewards_BT.sum(1).mean()
            average((paid,))
            policy.expect(float(paid))
            with torch.no_grad():
                average(policy.parameters())  # the value heads began at random
        stopped = False
        while step < budget.steps and not stopped:
            step_started = time.monotonic()
            # Dice of their own for each step: a resumed run throws the same ones.
            generator = make_generator(config.seed + 1_000_003 * (step + 1) + rank, device)
            factor = min(1.0, (step + 1) / 20)
            if budget.known:
                factor = schedule(step, budget.steps, config.warmup, config.decay)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            rollout = rollout_of(step, generator)
            batches = list(islice(reading, updates))
            learned = update(policy, optimizer, rollout, config, generator, batches)
            metrics = summary(rollout) | learned | {"beta": controller.beta, "lr": factor}
            if judge is not None:
                metrics["judge"] = float(judge(prompts_at(step), rollout.replies).mean())
            metrics = averaged(metrics, device)
            # 9. steer beta
            controller.update(metrics["kl"])
            step += 1
            tokens += round(metrics["length"] * config.episodes * world)
            # 10. report
            seconds = time.monotonic() - step_started
            if writer is not None:
                writer.write({"step": step} | metrics | {"seconds": seconds})
            settled = budget.known and step - first_step > 2
            recent.append(seconds)
            left = (budget.steps - step) * float(np.median(recent)) if settled else math.nan
            on_step(PPOProgress(step, budget.steps, tokens, before + spent(), left, metrics))
            stopped = largest(should_stop(), device) > 0
            if not budget.known:
                budget.times.append(largest(seconds, device))
                if stopped or len(budget.times) == budget.TRIAL:
                    budget.settle(step, largest(spent(), device))
            if budget.known and time.monotonic() - last_save > config.save_minutes * 60:
                save()
                last_save = time.monotonic()
    save()
    if step >= budget.steps:
        blend(policy.gpt, dict(reference.named_parameters()), config.keep)
    return PPOProgress(step, budget.steps, tokens, before + spent(), 0.0, metrics)


# %% [markdown]
# And now the toy:


# %%
def play(reward: RewardFunction = wanted, **changes: Any) -> list[dict[str, float]]:
    """A whole PPO run on the toy with some settings changed; returns the metrics of each step."""
    config, rows = replace(TOY, **changes), []
    with tempfile.TemporaryDirectory() as folder:
        train_ppo(
            ActorCritic(toy_gpt()), toy_gpt(), PROMPTS, reward, config, folder, **STOPS,
            on_step=lambda progress: rows.append(progress.metrics),
        )  # fmt: skip
    return rows


def net(row: dict[str, float]) -> float:
    """The mark with its penalty for replies that don't end; the best possible one is 1."""
    return row["score"] - TOY.end_penalty * (1 - row["ended"])


def last(rows: list[dict[str, float]], key: Callable[[dict[str, float]], float]) -> float:
    """The mean over the last steps."""
    return sum(map(key, rows[-5:])) / len(rows[-5:])


begin = time.perf_counter()
good = play()
print(f"{len(good)} steps in {time.perf_counter() - begin:.0f} s")
print("step    mark  ended  length  entropy     KL  clipped  value explains")
for number, row in list(enumerate(good, 1))[:: max(1, len(good) // 10)]:
    print(
        f"{number:4}  {net(row):6.2f} {row['ended']:6.0%} {row['length']:7.1f} {row['entropy']:8.2f}"
        f" {row['kl']:6.1f} {row['clip_fraction']:8.0%} {row['explained_variance']:10.2f}"
    )
print(f"mean of the last five steps: {last(good, net):.1%} of the best possible mark")

# %% tags=["test"]
assert FAST or last(good, net) > 0.95
assert abs(good[0]["ratio_first"] - 1) < 1e-5

# %% [markdown]
# Nobody told the model what the wanted token is, nor that a reply should end. It found both by trying.
# This is the instrument panel of a run. Get used to reading it as a whole: a mark that climbs is good
# news only if you can explain what the other needles do.


# %%
# alt: Six curves of the toy run: the mark, shares of ended and clipped, length, entropy and KL.
def draw_dashboard(plt):
    figure, axes = plt.subplots(2, 3, figsize=(9, 4.5), sharex=True)
    panels: dict[str, Callable[[dict[str, float]], float]] = {
        "mark (1 is the best)": net,
        "share that ends by itself": lambda row: row["ended"],
        "tokens a reply": lambda row: row["length"],
        "entropy, nats a token": lambda row: row["entropy"],
        "KL to the reference, nats a reply": lambda row: row["kl"],
        "share of clipped ratios": lambda row: row["clip_fraction"],
    }
    for axis, (title, key) in zip(axes.flat, panels.items(), strict=True):
        axis.plot(range(1, len(good) + 1), [key(row) for row in good])
        axis.set_title(title, fontsize=9, loc="left")
    for axis in axes[1]:
        axis.set_xlabel("step")
    return figure


picture("12_dashboard", draw_dashboard)

# %% [markdown]
# In a full run, the needles tell a story. First the policy learns to end early: short replies save the
# penalty, and that is quickly found. Then it finds that longer ones hold more of the wanted token, and
# for a while fewer of them end. At last it can do both. Meanwhile the entropy falls, for the policy
# makes up its mind, and the KL grows: that is what learning costs.
#
# ## An estimate that fails
#
# The report estimates the KL from the tokens that were drawn. On the toy you can compute it exactly,
# since there are few tokens: at each place, sum over all of them.


# %%
def exact_kl(policy: GPT, reference: GPT, rollout: Rollout) -> float:
    """KL a reply from the whole distributions."""
    segments = rollout.segments_BT[:, :-1]
    with torch.no_grad():
        p, q = (
            m(rollout.tokens_BT[:, :-1], segments_BT=segments).log_softmax(-1)
            for m in (policy, reference)
        )
    kl_BT = (p.exp() * (p - q)).sum(-1) * rollout.mask_BT[:, 1:]
    return float(kl_BT.sum(1).mean())


def compare_estimates(steps: int) -> None:
    policy, reference = ActorCritic(toy_gpt()), toy_gpt()
    config = replace(TOY, steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        train_ppo(policy, reference, PROMPTS, wanted, config, folder, **STOPS)
    dice = make_generator(5, CPU)
    look = collect(policy, reference, PROMPTS, wanted, config, beta=0, **STOPS, generator=dice)
    report = summary(look)
    exact = exact_kl(policy.gpt, reference, look)
    print(f"{steps:4} {exact:9.2f} {report['kl']:8.2f} {report['kl_k3']:8.2f}")


print("steps  exact KL      k1       k3")
for steps in (1, 2) if FAST else (3, 10, 40):
    compare_estimates(steps)

# %% [markdown]
# Near the reference, k3 is the better one. Far away it misleads. Its mean is made by rare tokens that
# the policy hardly ever says and the reference often does. A policy that is nearly sure of itself
# never draws them, so the estimate comes out too low, and once in a while much too high. That is
# why our `kl` is k1, the mean of what was really drawn, and why beta is steered by it.
#
# ## Break it
#
# Every detail can be left out or done wrong, and the program will still run. That is the trouble with
# PPO: nothing crashes. The box below holds wrong versions. A function in it replaces the right one of
# the same name for one run, and a number replaces a setting. Add your own.


# %%
def whiten_everything(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Prompts and filling, all zeros, count as advantages."""
    return (x_BT - x_BT.mean()) / (x_BT.std() + 1e-8) * mask_BT


def score_in_last_column(logprobs_BT, ref_logprobs_BT, mask_BT, scores_B, beta) -> Tensor:
    """Right for the longest replies only."""
    rewards_BT = -beta * (logprobs_BT - ref_logprobs_BT) * mask_BT
    rewards_BT[:, -1] += scores_B
    return rewards_BT


def score_on_first_token(logprobs_BT, ref_logprobs_BT, mask_BT, scores_B, beta) -> Tensor:
    rewards_BT = -beta * (logprobs_BT - ref_logprobs_BT) * mask_BT
    rewards_BT[torch.arange(len(scores_B)), mask_BT.float().argmax(1)] += scores_B
    return rewards_BT


right_logprobs = reply_logprobs


def other_temperature(gpt, tokens_BT, segments_BT, mask_BT, config) -> tuple[Tensor, Tensor]:
    """Drawn at one temperature, judged at another."""
    return right_logprobs(gpt, tokens_BT, segments_BT, mask_BT, replace(config, temperature=2.0))


def loss_without_clip(ratio_N: Tensor, advantages_N: Tensor, clip: float) -> Tensor:
    return -(ratio_N * advantages_N).mean()


BREAKS: dict[str, dict[str, Any]] = {
    "whitened over padding too": {"whiten": whiten_everything},
    "score in the last column": {"place_rewards": score_in_last_column},
    "score on the first token": {"place_rewards": score_on_first_token},
    "judged at another temperature": {"reply_logprobs": other_temperature},
    "no KL penalty": {"beta": 0.0},
    "no penalty for no end": {"end_penalty": 0.0},
    "no clipping, no early stop": {"policy_loss": loss_without_clip, "kl_stop": 1e9},
    "value not clipped": {"value_clip": 1e9},
    "rates ten times higher": {"lr": 10 * TOY.lr, "kl_stop": 1e9},
}


def broken(changes: dict[str, Any]) -> list[dict[str, float]]:
    """Play with some functions of this chapter replaced and some settings changed."""
    functions = {name: value for name, value in changes.items() if callable(value)}
    kept = {name: globals()[name] for name in functions}
    globals().update(functions)
    try:
        return play(**{name: v for name, v in changes.items() if name not in functions})
    except TinychatError as error:
        print(f"  stopped by itself: {error}")
        return []
    finally:
        globals().update(kept)


def curve(rows: list[dict[str, float]], width: int = 25) -> str:
    """A line of bars, one every few steps: the mark from 0 to 1."""
    bars = " ▁▂▃▄▅▆▇█"
    marks = [net(row) for row in rows[:: max(1, len(rows) // width)]]
    return "".join(bars[min(8, max(0, round(8 * mark)))] for mark in marks)


results = {"nothing broken": good}
for name, changes in itertools.islice(BREAKS.items(), 2 if FAST else None):
    results[name] = broken(changes)
print(f"{'broken':>30}  mark at the end  ended  curve")
for name, rows in results.items():
    if rows:
        mark, ended = last(rows, net), last(rows, lambda row: row["ended"])
        verdict = "" if mark > 0.95 else "fails"
        print(f"{name:>30} {mark:10.2f} {verdict:>5} {ended:6.0%}  {curve(rows)}")


# %%
# alt: Score over steps: the whole recipe reaches the top, some of the runs with a broken detail stay below.
def draw_breaks(plt):
    figure, axis = plt.subplots(figsize=(8, 4.5))
    styles = itertools.cycle(("-", "--", ":", "-."))
    for (name, rows), style in zip(results.items(), styles, strict=False):
        width = 2.5 if name == "nothing broken" else 1.2
        axis.plot([net(row) for row in rows], style, label=name, linewidth=width)
    axis.axhline(0.95, color="grey", linewidth=0.5)
    axis.set(xlabel="step", ylabel="mark, 1 is the best possible", ylim=(-0.6, 1.05))
    axis.legend(fontsize=7)
    return figure


picture("12_breaks", draw_breaks)

# %% [markdown]
# Read the table with care, for it has two lessons. Some mistakes ruin the run, above all those about
# *where the score lands*: the end of a reply can't learn what it is never paid for. Leave out the
# penalty for a missing end, and nothing tells the model to stop. Judge at another temperature than
# you drew at, and every gradient is a little wrong.
#
# Others do no harm here at all. That doesn't make them right. A toy with short prompts has little
# padding to whiten over. A mark that can't be cheated needs no KL penalty. Values between zero and
# one rarely meet the clip of the value loss. A mistake that a toy forgives can cost a night on the
# real model, which is why the tests of this chapter check each detail by its number and not by its
# curve (`tests/test_ppo.py`).
#
# ## A reward with a hole
#
# Now the KL penalty gets its task. What do we really want? Let's say: *a few* of the wanted tokens,
# in a reply with variety. But a reward model only knows what it has seen. Ours has seen ordinary
# replies, in which more of the wanted tokens was always better. So its mark, the **proxy**, just
# counts them. Among ordinary replies the two agree. At the far end they don't.
#
# The proxy is what PPO sees. The truth is only written down beside it.


# %%
def truth(reply: list[int]) -> float:
    """What we meant: three wanted tokens, and no token said again and again."""
    words = [token for token in reply if token != END]
    variety = len(set(words)) / max(1, len(words))
    return min(words.count(WANTED), 3) / 3 * min(1.0, variety / 0.5)


def hack(beta: float) -> list[tuple[float, float, float]]:
    """(KL, proxy, truth) of each step."""
    true_marks: list[float] = []

    def proxy(prompts: list[list[int]], replies: list[list[int]]) -> Tensor:
        true_marks.append(sum(map(truth, replies)) / len(replies))
        return torch.tensor([reply.count(WANTED) / (LENGTH - 1) for reply in replies])

    rows = play(proxy, beta=beta)
    # The first entry is the look before the first step.
    return [(r["kl"], r["score"], t) for r, t in zip(rows, true_marks[1:], strict=True)]


hacked = {beta: hack(beta) for beta in ((0.0,) if FAST else (0.0, 0.1))}
for beta, curve_of in hacked.items():
    best = max(range(len(curve_of)), key=lambda n: curve_of[n][2])
    print(f"beta {beta}: step   KL  proxy  truth")
    for number in sorted({0, best, len(curve_of) - 1}):
        kl, proxy_mark, true_mark = curve_of[number]
        note = "  <- truth is best here" if number == best else ""
        print(f"     {number + 1:10} {kl:5.1f} {proxy_mark:6.2f} {true_mark:6.2f}{note}")

# %% [markdown]
# This is **over-optimization**, and it has the same shape at every size (Gao et al. 2023): plotted
# against the distance from the reference, the proxy climbs on and on, while the truth climbs, turns
# and falls. *When a measure becomes a target, it ceases to be a good measure* (Goodhart's law).
#
# What helps? A higher beta stops the policy earlier. So does stopping in time. Both need somebody
# who looks at the truth: another judge, kept out of the training, or people.
#
# It helps, too, not to make everything a goal. A *condition* can be met and then pays nothing more, so
# there is nothing to run after. One such condition is fit: a reply that fits its question worse than
# written replies do (`question_fit`, chapter 11) loses marks; one that fits better gains none. We began
# with it when a policy of ours found that "I don't know. Tell me what you'd like." pleases the reward model
# everywhere. But it orders readers' pairs no better than a coin (lab notes), so it is off unless you give
# `--fit X`. The rules of chapter 11 are a condition that is on: who makes up a word, never ends or says
# one thing over and over loses marks once, however often. Our reward model does not see that a word doesn't exist (58 % of
# such pairs right where it learned them, 45 % elsewhere: lab notes), and a rule does. OpenAI's models
# get **rule-based rewards** beside a learned one, too, with a model as the grader (Mu et al. 2024).
#
# A **stock phrase** hides from whoever reads one reply at a time, and shows in many. So `tinychat train ppo`
# counts how many replies of a step, to different questions, begin a sentence with the same words, and how
# many written replies do. The logarithm of that ratio, times `--stock`, is the fine. ("I'm sorry"
# begins a sentence in two of a thousand written replies; without the fine, after thirty steps, in 12 of 40
# of the policy's: lab notes.)
#
# PPO also costs what its replies never practise: the **alignment tax** (Ouyang et al. 2022). The first
# policy of ours that paid the fine told whole stories when asked first thing, and in the middle of a chat
# could tell none any more ("Fern the pain was gone. She stuck out every word of thecastle."). InstructGPT's
# remedy is simple: beside each minibatch, read some old text again, with the old loss (**PPO-ptx**). Ours
# reads the conversations of the fine-tuning, at weight 0.3 (`ptx`). And whoever asks for a story must leave
# room for one: a fine for every reply that isn't done after so many tokens teaches to tell none.
# `tinychat train ppo` asks for nothing that was answered in writing with more than `max_tokens`.
#
# A reward that is earned only at the head of a chat is learned there. So every third prompt stands behind
# another conversation, as chapter 10's chats that go on do.
#
# And one more guard is chapter 10's `blend`, back towards the reference (Ramé et al. 2024b do this, too).
# Readers preferred a policy of ours in 60 % of the cases where they saw a difference, and it answered fewer
# questions of fact right, 42.5 for 49.2 % of 240. Half-way back (`--set keep=0.5`) these were 56 % and 47.9 %
# (lab notes, 2026-11-23).
#
# Best of all is a mark that can't be fooled. The basics hold thousands of questions with one right answer
# ("what is the capital of Peru?"), and a dozen lines of code can check one (`tinychat/data/facts.py`). Half
# of our prompts are such questions: right earns a mark, wrong loses one, whatever the reward model thinks
# of it. Lambert et al. (2024) call that **verifiable rewards**; models that learn to reason are trained
# with little else. For ours it is a guard: without it, PPO makes the replies smoother and the facts fewer,
# because the reward model hears tone better than truth. (On in `tinychat train ppo` unless you say
# otherwise: the rules, the checked facts, the fine on stock phrases, PPO-ptx, and a little of the first
# model's own log-prob, `--sure`. Off: `--fit` and `keep`. The quick run below, under "Your own chatbot", is
# paid by the mark alone: look out for what it finds.)
#
# Even the reward model that begins with what the chat model knows (chapter 11) has its hole. Most of its
# mark is how likely each token is, and nothing is as likely as a **stock phrase**. Held near its
# start (0.4 nats a reply), a policy that was paid so said things that readers liked a little better. Let
# loose (4 nats), it was sorry about everything: a broken thing ("I'm sorry about that break. What
# happened?"), a frozen pipe, a lone full stop. 115 of its 300 replies began with "I'm sorry" or "I'm so", 52 before.
# Its mark had risen from 0.9 to 1.6, the share of good replies not at all (lab notes, 2026-11-23). Two
# numbers of the report had known: the KL, and distinct-2, down by an eighth.
#
# Here are the real runs of our lab notes, with a chat model and a reward model of ours. Drag the step
# along the run, then drag beta: how far would the run have gone if each nat had cost that much?
#
# <!-- widget: ppo -->
#
# ## Best of n
#
# There is a way to raise marks without training anything: draw n replies, keep the best one. It costs
# n times as much at each answer. And it has a distance too: at most log n - (n - 1) / n nats, whatever
# the rewards are (Stiennon et al. 2020; Beirami et al. 2024 show that it is a bound). Where many replies
# have the same mark, as with our toy's whole numbers, it is nearer than that.


# %%
def best_of(n: int) -> tuple[float, float, float]:
    """(KL bound, proxy, truth) of choosing the best of n by the proxy."""
    dice, proxy_marks, true_marks = make_generator(3, CPU), [], []
    drawn = [
        sample_replies(toy_gpt(), PROMPTS, TOY, **speaker, generator=dice)[0] for _ in range(n)
    ]
    for choices in zip(*drawn, strict=True):
        best = max(choices, key=lambda reply: reply.count(WANTED))
        proxy_marks.append(best.count(WANTED) / (LENGTH - 1))
        true_marks.append(truth(best))
    distance = math.log(n) - (n - 1) / n
    return distance, sum(proxy_marks) / len(PROMPTS), sum(true_marks) / len(PROMPTS)


chosen = {n: best_of(n) for n in ((1, 4) if FAST else (1, 4, 16, 64))}
print("   n  KL <=  proxy  truth")
for n, (distance, proxy_mark, true_mark) in chosen.items():
    print(f"{n:4} {distance:6.2f} {proxy_mark:6.2f} {true_mark:6.2f}")


# %%
# alt: Mark against KL: PPO lifts the proxy while the true mark falls back; best of n stays near.
def draw_hack(plt):
    figure, axis = plt.subplots(figsize=(7, 4))
    points = hacked[0.0]
    axis.plot([p[0] for p in points], [p[1] for p in points], "-", label="PPO, proxy")
    axis.plot([p[0] for p in points], [p[2] for p in points], "--", label="PPO, truth")
    kept = list(chosen.values())
    axis.plot([p[0] for p in kept], [p[1] for p in kept], "o-", label="best of n, proxy")
    axis.plot([p[0] for p in kept], [p[2] for p in kept], "s--", label="best of n, truth")
    axis.set(
        xlabel="KL to the reference, nats a reply (best of n: at most)",
        ylabel="mark",
        ylim=(0, 1.05),
    )
    axis.legend()
    return figure


picture("12_hack", draw_hack)

# %% [markdown]
# Best of n can only pick what the reference already says now and then, so it stays near. It is a
# strong and honest opponent: before you trust a PPO run, ask whether it beats the best of four.
#
# ## Your own chatbot
#
# Now the real thing, at your size. You need two files that you made yourself: the fine-tuned model of
# chapter 10 and the reward model of chapter 11. If they aren't in `runs/book/`, shipped ones are taken,
# where there are any. The prompts are questions of the training part of our conversations.

# %%
from tinychat.data.corpus import dialogues
from tinychat.data.split import split_of
from tinychat.dialogue import render_prompt, split_system
from tinychat.generation import stop_ids
from tinychat.gpt import load_model, save_model
from tinychat.reward_model import load_reward, score
from tinychat.runtime.search import find_first


def answer_all(
    gpt: GPT, tokenizer, prompts: list[list[int]], reward_of, config
) -> tuple[Rollout, dict]:
    """The same dice each time, so that before and after can be compared."""
    look = collect(
        ActorCritic(gpt), sft, prompts, reward_of, config, beta=0.0, stop=stop_ids(tokenizer),
        end=tokenizer.end_id, pad=tokenizer.pad_id, generator=make_generator(9, CPU),
    )  # fmt: skip
    return look, summary(look)


sft_path, reward_path = find_first("runs/book/sft", "sft"), find_first("runs/book/reward", "reward")
if sft_path and reward_path:
    sft, tokenizer, _ = load_model(sft_path)
    judge, _, _ = load_reward(reward_path)
    print(f"policy and reference: {sft_path}, reward: {reward_path}")
    asked: dict[str, list[list[int]]] = {"train": [], "validation": [], "test": []}
    for dialogue in dialogues():
        _, turns = split_system(dialogue.messages)
        ids = render_prompt(turns[:1], tokenizer, context=sft.config.context, reserve=96)
        if len(ids) <= 40:
            asked[split_of(dialogue.id)].append(ids)

    def by_judge(prompts: list[list[int]], replies: list[list[int]]) -> Tensor:
        texts = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
        return score(judge, texts, tokenizer.pad_id)

    minutes = float(os.environ.get("TINYCHAT_MINUTES") or 0.5)
    config = PPOConfig(
        steps=1 if FAST else 0, episodes=8 if FAST else 32, minibatch=8, max_tokens=16 if FAST else 48,
    )  # fmt: skip
    unseen = asked["validation"][: 8 if FAST else 32]
    before, before_report = answer_all(sft, tokenizer, unseen, by_judge, config)
    policy = ActorCritic(copy.deepcopy(sft).requires_grad_(True))
    with tempfile.TemporaryDirectory() as folder:
        done = train_ppo(
            policy, sft, asked["train"], by_judge, config, folder, stop=stop_ids(tokenizer),
            end=tokenizer.end_id, pad=tokenizer.pad_id, minutes=minutes,
        )  # fmt: skip
    # Stored weights are rounded to 127 steps of each row's largest. PPO moves most of them by less than
    # half such a step, and on the grid that they came from they would all be rounded back: so another
    # grid, and what is measured is what was stored.
    saved = save_model(
        "runs/book/rlhf.safetensors",
        policy.gpt,
        stage="rlhf",
        tokenizer=tokenizer,
        lineage={"parent": str(sft_path), "reward": str(reward_path), "steps": done.step},
        metrics={"before": before_report},
        levels=120,
    )
    stored, _, _ = load_model(saved.path)
    after, after_report = answer_all(stored, tokenizer, unseen, by_judge, config)
    print(f"{done.step} steps of {config.episodes} replies; on {len(unseen)} unseen questions:")
    for key in ("score", "kl", "length", "ended", "distinct_2", "repetition"):
        print(f"  {key:>10}: {before_report[key]:6.2f} before, {after_report[key]:6.2f} after")
    for prompt, old, new in list(zip(unseen, before.replies, after.replies, strict=True))[:3]:
        question = tokenizer.decode(prompt).strip()
        print(f"> {question}\n  sft:  {tokenizer.decode(old)}\n  rlhf: {tokenizer.decode(new)}")
    print(f"{saved.path}: {saved.bytes / 1e6:.1f} MB. Talk to it:")
    print("tinychat chat --ckpt runs/book/rlhf.safetensors")
else:
    print("An sft and a reward checkpoint are needed here: run chapters 10 and 11 first, then")
    print("this cell makes runs/book/rlhf.safetensors, for `tinychat chat --ckpt`.")

# %% [markdown]
# That file is a chatbot, and you made every part of it: the tokenizer, the network, the base, the
# manners, the taste.
#
# ## Round and round
#
# One round is not the end. The reward model learned from replies of the *old* model. Now there is a
# new one with new habits, and among its replies are some that the reward model rates wrongly. So
# real projects go on: let the **new** model answer, let people rank these answers, train the reward
# model on all rankings so far, and run PPO again. That is **iterated RLHF**: steps two and three,
# repeated. Ouyang et al. did some of it, and Bai et al. (2022) refreshed theirs about every week.
#
# A hole as in our toy is closed in just this way. Once people have seen a reply that is nothing but
# the wanted token, and ranked it last, the next reward model knows.
#
# ## Your own taste
#
# So far you raised somebody else's marks. Now take your own. One round, from your votes to your
# chatbot:
#
# ```
# tinychat duel sft --count 50 --votes votes.jsonl
# tinychat train reward --from sft --votes votes.jsonl
# tinychat train ppo --from sft --reward runs/reward/reward.safetensors --minutes 30
# tinychat duel runs/ppo/rlhf.safetensors sft --votes check.jsonl
# ```
#
# The first line shows you two replies of one model, in an order that you don't know. You press A or B
# for the better one, T for a tie, X where both are bad. The last line is the blind test: new against
# old, on questions that no training has read, and at its end who won how often. In a chat, `/vote`
# asks the same about the last reply, and `/why` shows how its mark came about, word by word.
#
# The next round begins with the new model's replies. Your old votes still count, in the same file:
#
# ```
# tinychat duel runs/ppo/rlhf.safetensors --count 50 --votes votes.jsonl
# tinychat train reward --run reward2 --from sft --votes votes.jsonl --sampler runs/ppo/rlhf.safetensors
# tinychat train ppo --run ppo2 --from sft --reward runs/reward2/reward.safetensors --minutes 30
# ```
#
# What can you expect from 50 votes? They have two jobs. As a **measure**, they compete with luck: if
# two models were equally good, how often would one of them still get so many of 50 wins? As
# **teachers**, they sit in a large class: how many ranked prompts does the reward model read besides?

# %%
from tinychat.data.preferences import by_part, corpus_ranked, for_judge

VOTES = 50
for wins in (28, 30, 33, 36):
    one_side = sum(math.comb(VOTES, n) for n in range(wins, VOTES + 1)) / 2**VOTES
    print(f"{wins} of {VOTES} or more, for either of two equals: {2 * one_side:.1%} of all duels")
others = [group for group in by_part(corpus_ranked())["train"] if not for_judge(group.prompt)]
pairs = sum(len(group.pairs) for group in others)
print(f"\nof our corpus the reward model reads {len(others)} prompts, and {pairs} pairs of replies")
print(f"beside those alone, your votes would be {VOTES / (VOTES + len(others)):.1%} of the prompts")

# %% [markdown]
# (The command adds thousands of prompts of other kinds, and keeps some of your votes for measuring, so
# that the true share is smaller still.)
#
# So a small lead in one sitting proves nothing: `tinychat duel --report check.jsonl` prints the
# interval, and says when chance could have done it. And one sitting doesn't make a new taste. It bends
# the old one a little, and only where your votes agree with each other: a wish that shows in nearly
# every pair ("shorter", "ask me back") has a chance, "true" has none in a model that knows so little.
# Vote on, round by round, on replies of the model of that day. That is all that the large ones do, too,
# with more people.
#
# ## Exercises
#
# **1. The two ends of lambda.** Show with random numbers that GAE with lambda 1 is "all that came,
# minus the value", and with lambda 0 the single surprise.

# %% tags=["solution"]
dice = make_generator(0, CPU)
rewards_BT, values_BT = torch.rand(2, 3, 5, generator=dice)
all_BT = torch.ones(3, 5, dtype=torch.bool)
seen_BT, _ = gae(rewards_BT, values_BT, all_BT, 1.0, 1.0)
to_come_BT = rewards_BT.flip(1).cumsum(1).flip(1)
torch.testing.assert_close(seen_BT, to_come_BT - values_BT)
trusted_BT, _ = gae(rewards_BT, values_BT, all_BT, 1.0, 0.0)
next_BT = torch.cat((values_BT[:, 1:], torch.zeros(3, 1)), dim=1)
torch.testing.assert_close(trusted_BT, rewards_BT + next_BT - values_BT)

# %% [markdown]
# **2. No value head.** Draw k replies to each prompt. The baseline of each is the mean of the *other*
# k - 1 (RLOO, Ahmadian et al. 2024). Write `leave_one_out(scores_PK)`. Why the others, and not all k?
# Then train the toy with it: REINFORCE, four replies to each of 16 prompts a step, as many steps as
# PPO had. Which of the two learns more from the same number of replies? (If yours stops half-way up,
# look at what its replies have in common.) What becomes of a group whose
# replies all have the same mark? (GRPO, Shao et al. 2024, takes all k, divides by their deviation, and
# clips as PPO does.)


# %% tags=["solution"]
def leave_one_out(scores_PK: Tensor) -> Tensor:
    k = scores_PK.shape[1]
    return scores_PK - (scores_PK.sum(1, keepdim=True) - scores_PK) / (k - 1)


torch.testing.assert_close(
    leave_one_out(torch.tensor([[1.0, 2.0, 6.0]])), torch.tensor([[-3.0, -1.5, 4.5]])
)
# A baseline may not depend on the reply that it judges. The mean of all k does: a k-th of each reply's
# own score is subtracted from itself. That makes every push (k - 1) / k as large, and does no other
# harm, which is why `minus_siblings` can begin with it.


def in_groups(steps: int, k: int = 4) -> list[float]:
    """REINFORCE with k replies a prompt and no value head; returns the mark of each step."""
    gpt, dice, marks = toy_gpt(), make_generator(1, CPU), []
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=TOY.lr, weight_decay=0.0)
    each = len(PROMPTS) // k
    for step in range(steps):
        first = step * each % len(PROMPTS)
        asked_k = [prompt for prompt in PROMPTS[first : first + each] for _ in range(k)]
        replies, _ = sample_replies(gpt, asked_k, TOY, **speaker, generator=dice)
        marks_B = wanted(asked_k, replies) - 0.5 * torch.tensor([r[-1] != END for r in replies])
        weight_B = leave_one_out(marks_B.view(each, k)).flatten()
        tokens_BT, segments_BT, mask_BT = lay_out(asked_k, replies, PAD, CPU)
        logprobs_N, _ = reply_logprobs(gpt, tokens_BT, segments_BT, mask_BT, TOY)
        logprobs_BT = torch.zeros(mask_BT.shape).masked_scatter(mask_BT, logprobs_N)
        (-(weight_B * logprobs_BT.sum(1)).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        marks.append(float(marks_B.mean()))
    return marks


in_steps = in_groups(TOY.steps)
for name, curve_of in (("PPO", [net(row) for row in good]), ("in groups", in_steps)):
    print(f"{name:>10}: " + "  ".join(f"{m:5.2f}" for m in curve_of[:: max(1, len(curve_of) // 8)]))
assert FAST or in_steps[-1] > in_steps[0] + 0.3
# One optimizer step a batch against many: the ratio lets PPO use each reply several times. And a
# group whose replies are all alike has only zeros for weights. A mark of 0.50 is just that trap:
# every reply is full of the wanted token, none ends, and no difference is left to learn from. On the
# other hand, nothing here has to learn what to expect, and half of the program is gone.

# %% [markdown]
# **3. Three estimates.** For two coins, one with 50 % heads and one with 60 %, compute the exact KL.
# Then draw 10,000 times and compare mean and deviation of k1 and k3.

# %% tags=["solution"]
p_2, q_2 = torch.tensor([0.5, 0.5]), torch.tensor([0.6, 0.4])
exact = float((p_2 * (p_2 / q_2).log()).sum())
faces_N = torch.multinomial(p_2, 10_000, replacement=True, generator=dice)
k1_N = (p_2 / q_2).log()[faces_N]
k3_N = kl_terms(p_2.log()[faces_N], q_2.log()[faces_N])
for name, k_N in (("k1", k1_N), ("k3", k3_N)):
    print(f"{name}: mean {k_N.mean():.4f}, deviation {k_N.std():.4f}; exact {exact:.4f}")
assert k3_N.std() < 0.2 * k1_N.std() and (k3_N >= 0).all()
assert abs(float(k3_N.mean()) - exact) < 0.002

# %% [markdown]
# **4. Without rollouts.** Which policy would be the best of all, if a nat of KL costs $\beta$? For each
# reply, marks pull up and distance holds back, and the balance is
#
# $$\pi^*(y) \propto \pi_{\text{ref}}(y) \, e^{r(y)/\beta}$$
#
# Solve it for the reward, and you can read it backwards: every policy is the best one for *some*
# reward, this one.
#
# $$r(y) = \beta \log \frac{\pi^*(y)}{\pi_{\text{ref}}(y)} + \text{a constant}$$
#
# Rafailov et al. (2023) put that reward into the Bradley-Terry loss of chapter 11, where the constant
# falls out, and train the policy on ranked pairs directly: **direct preference optimization**, DPO. No
# reward model, no rollouts, no value head.
#
# Write `dpo_loss(better_N, worse_N, ref_better_N, ref_worse_N, beta)` from the log-probs of whole
# replies. Then check the claim in a world of three replies (reference 0.5, 0.3, 0.2; rewards 0, 1, 2;
# $\beta$ 0.5): minimise the loss over all pairs, each weighted by how often it would be ranked so, and
# compare with the formula, which gives 0.037, 0.163 and 0.801.


# %% tags=["solution"]
def dpo_loss(
    better_N: Tensor, worse_N: Tensor, ref_better_N: Tensor, ref_worse_N: Tensor, beta: float
) -> Tensor:
    """The surprise that the better one won, a loss for each pair."""
    hidden_reward_N = beta * ((better_N - ref_better_N) - (worse_N - ref_worse_N))
    return -nn.functional.logsigmoid(hidden_reward_N)


ref_3, reward_3, price = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 1.0, 2.0]), 0.5
best_3 = (ref_3.log() + reward_3 / price).softmax(0)
pairs_M2 = torch.tensor(list(itertools.permutations(range(3), 2)))
better_M, worse_M = pairs_M2.T
share_M = (reward_3[better_M] - reward_3[worse_M]).sigmoid()  # how often people rank them so
logits_3 = ref_3.log().clone().requires_grad_()
optimizer = torch.optim.Adam([logits_3], lr=0.05)
for _ in range(800):
    p_3 = logits_3.log_softmax(0)
    sides = (p_3[better_M], p_3[worse_M], ref_3.log()[better_M], ref_3.log()[worse_M])
    (share_M * dpo_loss(*sides, price)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
found_3 = logits_3.softmax(0).detach()
for name, some_3 in (("reference", ref_3), ("formula", best_3), ("by DPO", found_3)):
    print(f"{name:>10}: " + "  ".join(f"{share:.3f}" for share in some_3.tolist()))
torch.testing.assert_close(found_3, best_3, atol=2e-3, rtol=0)
# The same goal as PPO's. But pairs are ranked once, and the policy moves on: DPO never hears what
# people think of its new replies, and PPO asks (a model of) them at every step.

# %% [markdown]
# ## Check yourself
#
# 1. Why no top-p in the rollout?
# 2. The first ratio of a step is 1.3. What do you look for?
# 3. The score rises and the KL is at forty nats. Are you happy?
# 4. Why does the score land on the last token?
# 5. Why the minimum, and not just the clipped ratio?
# 6. What does the value head do that a mean over other replies can't?
#
# <details markdown="1"><summary>Answers</summary>
#
# 1. The log-probs in the ratio must be those of the distribution that was drawn from.
# 2. Another temperature, mask, place or kernel in one of the two readings; dropout; weights that
#    changed in between.
# 3. No. Read the replies, and ask a judge that was not trained on.
# 4. Only the whole reply was judged. GAE carries it back to the tokens that earned it.
# 5. So that a token which went the wrong way is always pulled back.
# 6. It has an expectation in the middle of a reply, so it can tell which token made things better. And
#    it needs one reply a prompt.
#
# </details>
#
# ## What we left out
#
# - **A second model for the values**, begun from the reward model. Better guesses, at twice the cost.
# - **Texts of the pretraining in PPO-ptx.** InstructGPT reads those again; ours reads the conversations of
#   the fine-tuning.
# - **Marks that can be checked, and no others.** Where an answer is right or wrong, as in sums or programs, a few lines
#   of code are the reward, and no reward model can be fooled. Our checked questions are a guard beside
#   a learned mark. nanochat trains on school sums alone, with the groups of exercise 2 and no KL at
#   all, and counts how often one of k tries is right (pass@k).
# - **Whitened rewards and capped scores.** TRL offers both, against marks of wild size. Our reward model
#   has its yardstick (chapter 11), and the advantages are whitened anyway.
# - **Entropy bonus.** Games pay the policy for hesitating, so that it goes on trying. Here the KL does
#   that: the reference hesitates.
# - **One model for two.** With adapters (LoRA), the reference is the policy with its adapter off.
# - **Drawing and learning on different machines**, at the same time. Then the ratio must also make up
#   for replies that are a few steps old, and for kernels that round differently.
# - **Dropout.** Our models have none. Where there is some, it must be off, or the first ratio isn't one.
#
# ## Where this is in the package
#
# Everything tagged `export` here is `tinychat/ppo.py`. `tinychat train ppo --from sft.safetensors
# --reward reward.safetensors` calls `train_ppo`, and reports on held-out prompts before and after.
#
# ## Sources
#
# - R. J. Williams: *Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement
#   Learning* (1992). REINFORCE and the baseline.
# - J. Schulman, P. Moritz, S. Levine, M. Jordan, P. Abbeel: [High-Dimensional Continuous Control Using
#   Generalized Advantage Estimation](https://arxiv.org/abs/1506.02438) (2016).
# - J. Schulman, F. Wolski, P. Dhariwal, A. Radford, O. Klimov: [Proximal Policy Optimization
#   Algorithms](https://arxiv.org/abs/1707.06347) (2017).
# - D. M. Ziegler et al.: [Fine-Tuning Language Models from Human
#   Preferences](https://arxiv.org/abs/1909.08593) (2019). The KL penalty and its controller.
# - A. Ramé et al.: [WARP: On the Benefits of Weight Averaged Rewarded
#   Policies](https://arxiv.org/abs/2406.16768) (2024b). Back towards the reference when it is done.
# - N. Stiennon et al.: [Learning to summarize from human feedback](https://arxiv.org/abs/2009.01325)
#   (2020). Best of n, and its distance.
# - A. Beirami et al.: [Theoretical guarantees on the best-of-n alignment
#   policy](https://arxiv.org/abs/2401.01879) (2024). That this distance is an upper bound.
# - J. Schulman: [Approximating KL Divergence](http://joschu.net/blog/kl-approx.html) (2020). k1 and k3.
# - L. Ouyang et al.: [Training language models to follow instructions with human
#   feedback](https://arxiv.org/abs/2203.02155) (2022).
# - L. Gao, J. Schulman, J. Hilton: [Scaling Laws for Reward Model
#   Overoptimization](https://arxiv.org/abs/2210.10760) (2023).
# - S. Huang et al.: [The N+ Implementation Details of RLHF with
#   PPO](https://arxiv.org/abs/2403.17031) (2024).
# - Y. Bai et al.: [Training a Helpful and Harmless Assistant with Reinforcement Learning from Human
#   Feedback](https://arxiv.org/abs/2204.05862) (2022). Iterated RLHF.
# - W. Kool, H. van Hoof, M. Welling: [Buy 4 REINFORCE Samples, Get a Baseline for
#   Free!](https://openreview.net/forum?id=r1lgTGL5DE) (2019). Siblings as the baseline.
# - A. Ahmadian et al.: [Back to Basics](https://arxiv.org/abs/2402.14740) (2024). RLOO.
# - N. Lambert et al.: [Tulu 3](https://arxiv.org/abs/2411.15124) (2024). Rewards that can be verified.
# - Z. Shao et al.: [DeepSeekMath](https://arxiv.org/abs/2402.03300) (2024). GRPO.
# - T. Mu et al.: [Rule Based Rewards for Language Model
#   Safety](https://arxiv.org/abs/2411.01111) (2024).
# - R. Rafailov et al.: [Direct Preference Optimization](https://arxiv.org/abs/2305.18290) (2023).
# - J. Li et al.: [A Diversity-Promoting Objective Function for Neural Conversation
#   Models](https://arxiv.org/abs/1510.03055) (2016). Distinct-n.
# - A. Karpathy: [nanochat](https://github.com/karpathy/nanochat) (2025), `scripts/chat_rl.py`; J. Gong:
#   [minimind](https://github.com/jingyaogong/minimind), `trainer/train_ppo.py`; Hugging Face:
#   [TRL](https://github.com/huggingface/trl). Three other ways to write this chapter.
