"""Let the model try, mark what it said, and make the good tries more likely, but not too fast.

Generated from chapters/12_ppo.py: edit that file,
then run `python -m tinychat.book export`.
"""

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


def draw(logits_BV: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a token from each row's softmax; returns tokens and their log-probs, both `[B]`."""
    probs_BV = logits_BV.softmax(-1)
    tokens_B = draw_tokens(probs_BV, generator)
    return tokens_B, probs_BV.gather(1, tokens_B[:, None])[:, 0].log()


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


def policy_loss(ratio_N: Tensor, advantages_N: Tensor, clip: float) -> Tensor:
    """The clipped surrogate (Schulman et al. 2017, equation 7), as a loss."""
    clipped_N = ratio_N.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N).mean()


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


def kl_terms(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k3 estimate of the KL to the reference, a term a token: never below 0.

    exp(d) - 1 - d with d = log reference - log policy (Schulman 2020). Its mean is the same as that
    of -d (k1); near the reference, with far less noise.
    """
    d = ref_logprobs - logprobs
    return torch.expm1(d) - d


def place_rewards(
    logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor, scores_B: Tensor, beta: float
) -> Tensor:
    """Each token pays beta x (log policy - log reference); the last one also gets the score."""
    rewards_BT = -beta * (logprobs_BT - ref_logprobs_BT) * mask_BT
    places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = (places_T * mask_BT).argmax(dim=1)
    rewards_BT[torch.arange(len(last_B)), last_B] += scores_B
    return rewards_BT


def minus_siblings(scores_B: Tensor, samples: int) -> Tensor:
    """Each score less the mean of the other replies' to the same prompt, `[B]` (Kool et al. 2019).

    The `samples` replies to one prompt are neighbours. An only child's score stays as it is.
    """
    if samples == 1:
        return scores_B
    scores_PS = scores_B.view(-1, samples)
    above_PS = scores_PS - scores_PS.mean(1, keepdim=True)
    return (above_PS * samples / (samples - 1)).flatten()


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


def value_loss(values_N: Tensor, old_N: Tensor, returns_N: Tensor, clip: float) -> Tensor:
    """Half the squared error, of the value or of the value held near the old one: the worse."""
    clipped_N = old_N + (values_N - old_N).clamp(-clip, clip)
    errors_N = torch.maximum((values_N - returns_N) ** 2, (clipped_N - returns_N) ** 2)
    return 0.5 * errors_N.mean()


class KLController:
    """beta, and how it is steered to a target of nats a reply (Ziegler et al. 2019, 2.2)."""

    def __init__(self, beta: float, target: float, gain: float = 0.1):
        self.beta, self.target, self.gain = beta, target, gain

    def update(self, kl: float) -> None:
        """Raise beta when the policy is further away than wanted, else lower it; 2 % at most."""
        if self.target:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + self.gain * error


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
