"""Find out whether a model got better, how sure you may be, and what the number doesn't see.

Generated from chapters/13_evaluation.py: edit that file,
then run `python -m tinychat.book export`.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinychat.data.corpus import dialogues
from tinychat.data.onpolicy import RULES
from tinychat.data.probes import Probe
from tinychat.data.records import Dialogue, Document, Message
from tinychat.data.split import split_of
from tinychat.dialogue import render, render_prompt
from tinychat.generation import (
    Sampling,
    generate_batch,
    make_generator,
    sentence_ends,
    stop_ids,
)
from tinychat.gpt import GPT
from tinychat.ppo import PPOConfig, distinct, lay_out, repetition, reply_logprobs, sample_replies
from tinychat.reward_model import RewardModel, score
from tinychat.runtime.checkpoint import CheckpointInfo
from tinychat.runtime.errors import ConfigError
from tinychat.runtime.files import file_sha256
from tinychat.tokenizer import Tokenizer


@torch.inference_mode()
def surprise(
    model: GPT, tokenizer: Tokenizer, text: Document | Dialogue, longest: int = 512
) -> tuple[float, int]:
    """Bits that the model needs for a text, and its bytes; of a dialogue, the replies alone.

    Of at most `longest` tokens: models that read less and more must be asked about the same.
    """
    longest = min(longest, model.config.context)
    if isinstance(text, Dialogue):
        rendered = render(text, tokenizer, context=longest)
        tokens, counted = rendered.tokens, rendered.loss_mask[1:]
    else:
        tokens = [tokenizer.bos_id, *tokenizer.encode(text.text)][:longest]
        counted = [True] * (len(tokens) - 1)
    sizes = [len(tokenizer.token_bytes(token)) for token in tokens[1:]]
    asked = [n for n, size in enumerate(sizes) if counted[n] and size]
    if not asked:
        return 0.0, 0
    ids_1T = torch.tensor([tokens], device=model.device)
    h_ND = model.hidden(ids_1T[:, :-1])[0, asked].float()
    logprobs_NV = (h_ND @ model.embed.weight.float().T).log_softmax(-1)
    nats = -float(logprobs_NV.gather(1, ids_1T[0, 1:][asked, None]).sum())
    return nats / math.log(2), sum(sizes[n] for n in asked)


FIRST = 48  # tokens within which most replies are over


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt."""

    text: str
    tokens: tuple[int, ...]
    "of the reply, without the one that ended it"
    ended: bool
    "True where the model itself said that it was done"


def answer_all(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Message]],
    sampling: Sampling,
    *,
    rows: int = 50,
) -> list[Answer]:
    """Let a model reply to each prompt; the same dice for every model that is asked.

    Most replies are short. So all are written up to `FIRST` tokens, and then the few that have not
    ended go on by themselves: the long ones don't keep the others waiting. With several drafts of
    each sentence, or a penalty for repeating, every reply is written in one go.
    """
    asked = [
        render_prompt(p, tokenizer, context=model.config.context, reserve=sampling.max_tokens)
        for p in prompts
    ]
    stop, pauses = stop_ids(tokenizer), sentence_ends(tokenizer)
    dice = make_generator(sampling.seed, model.device)
    replies: list[list[int]] = [[] for _ in asked]
    unfinished, begin = list(range(len(asked))), 0
    whole = sampling.side_by_side > 1 or sampling.repetition_penalty != 1  # it looks at all before
    first = sampling.max_tokens if whole else min(FIRST, sampling.max_tokens)
    for limit in (first, sampling.max_tokens):
        if not unfinished or limit == begin:
            break
        found = generate_batch(
            model,
            [asked[n] + replies[n] for n in unfinished],
            replace(sampling, max_tokens=limit - begin),
            stop=stop,
            pauses=pauses,
            keep_stop=True,
            rows=rows,
            pad_id=tokenizer.pad_id,
            generator=dice,
        )
        for number, more in zip(unfinished, found, strict=True):
            replies[number] += more
        unfinished, begin = [n for n in unfinished if replies[n][-1] not in stop], limit
    answers = []
    for reply in replies:
        body = reply[:-1] if reply[-1] in stop else reply
        text = tokenizer.decode(body).strip()
        answers.append(Answer(text, tuple(body), reply[-1] == tokenizer.end_id))
    return answers


class Interval(NamedTuple):
    """A measured value, and the range in which the true one lies in 95 of 100 such measurements."""

    value: float
    low: float
    high: float

    def show(self, form: str = ".1%") -> str:
        """`66.7% [61.1%, 71.8%]`"""
        value, low, high = (f"{number:{form}}" for number in self)
        return f"{value} [{low}, {high}]"


def wilson(points: float, count: int, z: float = 1.96) -> Interval:
    """The share `points / count` with its interval (Wilson 1927); half points are allowed."""
    if not 0 <= points <= count or count < 1:
        raise ConfigError(f"{points:g} points of {count} make no share; give at least one trial.")
    share, spread = points / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    reach = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    # At the ends one limit is the share itself; rounding must not put it on the wrong side.
    return Interval(
        share, min(max(0.0, middle - reach), share), max(min(1.0, middle + reach), share)
    )


def bootstrap(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean, or sum of values / sum of weights, with its interval (Efron 1979).

    Draws as many entries as there are, with repeats, again and again: how much does the result
    move? An entry is a prompt or a text, never a token: tokens of one text aren't independent.
    """
    if not len(values):
        raise ConfigError("There is nothing to average; give at least one value.")
    values_N = np.asarray(values, dtype=np.float64)
    weights_N = np.ones(len(values_N)) if weights is None else np.asarray(weights, dtype=np.float64)
    picks_DN = np.random.default_rng(seed).integers(len(values_N), size=(draws, len(values_N)))
    means_D = values_N[picks_DN].sum(axis=1) / weights_N[picks_DN].sum(axis=1)
    low, high = np.quantile(means_D, (0.025, 0.975))
    return Interval(float(values_N.sum() / weights_N.sum()), float(low), float(high))


def bits_per_byte(
    model: GPT, tokenizer: Tokenizer, texts: Sequence[Document | Dialogue]
) -> Interval:
    """Bits per byte on held-out texts, with the interval over texts."""
    found = [surprise(model, tokenizer, text) for text in texts]
    found = [(bits, size) for bits, size in found if size]
    return bootstrap([bits for bits, _ in found], [size for _, size in found])


def teachers(lineage: Mapping[str, Any]) -> set[str]:
    """The sha256 of every reward model that trained a checkpoint or an ancestor of it."""
    found = {lineage["reward_sha256"]} if "reward_sha256" in lineage else set()
    return found.union(*(teachers(ancestor) for ancestor in lineage.get("ancestors", [])))


def check_judge(judge: CheckpointInfo, models: Iterable[CheckpointInfo]) -> None:
    """Raise ConfigError unless the judge has a half of its own and taught none of the models."""
    digest = file_sha256(judge.path)
    for model in models:
        if digest in teachers(model.lineage):
            raise ConfigError(
                f"{model.path} was trained to please {judge.path}, so that one can't judge it; "
                "make another with `tinychat train reward --judge --run judge`."
            )
    half = judge.lineage.get("half", "unknown")
    if half != "judge":
        raise ConfigError(
            f"{judge.path} is no judge: it learned from the half of the prompts named {half!r}, "
            "like the models that it would judge; "
            "make one with `tinychat train reward --judge --run judge`."
        )


def give_marks(
    judge: RewardModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Message]],
    answers: Sequence[Answer],
) -> list[float]:
    """The judge's mark of each answer. It reads the words, whatever tokens they were made of."""
    context, texts = judge.gpt.config.context, []
    for prompt, answer in zip(prompts, answers, strict=True):
        body = [*tokenizer.encode(answer.text), *[tokenizer.end_id] * answer.ended]
        texts.append([*render_prompt(prompt, tokenizer, context=context, reserve=len(body)), *body])
    return score(judge, texts, tokenizer.pad_id).tolist()


@dataclass(frozen=True)
class WinRate:
    """How often one model's replies beat another's to the same prompts."""

    wins: int
    ties: int
    losses: int

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> "WinRate":
        """Compare marks, prompt by prompt."""
        pairs = list(zip(ours, theirs, strict=True))
        wins, losses = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
        return cls(wins, len(pairs) - wins - losses, losses)

    @property
    def pairs(self) -> int:
        return self.wins + self.ties + self.losses

    @property
    def rate(self) -> Interval:
        """The share of wins, a tie as half a win, with its interval."""
        return wilson(self.wins + self.ties / 2, self.pairs)


def form(answers: Sequence[Answer]) -> dict[str, float]:
    """What replies look like, whatever they say: lengths in tokens, shares from 0 to 1."""
    tokens = [answer.tokens for answer in answers]
    return {
        "length": sum(map(len, tokens)) / len(tokens),
        "ended": sum(answer.ended for answer in answers) / len(answers),
        "distinct_1": distinct(tokens, 1),
        "distinct_2": distinct(tokens, 2),
        "repetition": repetition(tokens),
    }


def broken_rules(
    prompts: Sequence[Sequence[Message]], answers: Sequence[Answer]
) -> dict[str, float]:
    """The share of answers that break each of chapter 11's rules."""
    pairs = list(zip(prompts, answers, strict=True))
    return {
        name: sum(rule(prompt, a.text, a.ended) for prompt, a in pairs) / len(pairs)
        for name, rule in RULES.items()
    }


def draw_replies(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    seed: int = 0,
    rows: int = 50,
) -> list[list[int]]:
    """Replies from the whole distribution at temperature 1: only such may measure a KL."""
    config = PPOConfig(max_tokens=max_tokens)
    dice = make_generator(seed, model.device)
    replies: list[list[int]] = []
    for start in range(0, len(prompts), rows):
        part = prompts[start : start + rows]
        replies += sample_replies(
            model, part, config, stop=stop_ids(tokenizer), pad=tokenizer.pad_id, generator=dice
        )[0]
    return replies


@torch.no_grad()
def kl_nats(
    policy: GPT,
    reference: GPT,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    *,
    pad: int,
    rows: int = 50,
) -> list[float]:
    """log policy - log reference of each reply that the policy drew, in nats.

    Single ones may be negative; their mean estimates the KL of the policy from the reference.
    """
    config, found = PPOConfig(), []
    for start in range(0, len(replies), rows):
        part = replies[start : start + rows]
        laid_out = lay_out(prompts[start : start + rows], part, pad, policy.device)
        ours_N, theirs_N = (
            reply_logprobs(gpt, *laid_out, config)[0] for gpt in (policy, reference)
        )
        found += [float(nats_T.sum()) for nats_T in (ours_N - theirs_N).split([*map(len, part)])]
    return found


def best_of(n: int, teacher_PN: Tensor, others_PN: Tensor) -> list[float]:
    """For each of P prompts the mean `others` mark of the best of n replies by the teacher's marks.

    The mean over all choices of n among the N replies whose marks are given, `[P, N]`. Raises
    ConfigError unless 1 <= n <= N.
    """
    N = teacher_PN.shape[1]
    if not 1 <= n <= N:
        raise ConfigError(f"The best of {n} among {N} replies is unknown; n goes from 1 to {N}.")
    chance_N = torch.tensor([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)])
    in_order_PN = others_PN.gather(1, teacher_PN.argsort(dim=1))
    return (in_order_PN * chance_N).sum(dim=1).tolist()


def examine(probes: Sequence[Probe], answers: Sequence[Answer]) -> dict[str, Counter[str]]:
    """How many replies of each set of questions are good, bad and unclear by their rules."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for probe, answer in zip(probes, answers, strict=True):
        found[probe.set][probe.verdict(answer.text)] += 1
    return dict(found)


def words_of(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.casefold())


def word_odds(bad: Iterable[str], good: Iterable[str], smoothing: float = 0.3) -> dict[str, float]:
    """How much likelier each word is in bad texts than in good ones, as a log ratio."""
    counts = [Counter(w for text in texts for w in set(words_of(text))) for texts in (bad, good)]
    every = counts[0].keys() | counts[1].keys()
    size_0, size_1 = (count.total() + smoothing * len(every) for count in counts)
    return {
        word: math.log((counts[0][word] + smoothing) / size_0)
        - math.log((counts[1][word] + smoothing) / size_1)
        for word in every
    }


def sounds_bad(text: str, odds: Mapping[str, float]) -> bool:
    """True where the words of a text speak for "bad" more than against it (naive Bayes)."""
    return sum(odds.get(word, 0.0) for word in set(words_of(text))) > 0


def rude_odds() -> dict[str, float]:
    """Word odds of our corpus's rude replies against its good ones, of the training part."""
    train = [one for one in dialogues() if split_of(one.id) == "train"]
    rude = [reply.content for one in train for reply in one.rejected if reply.flaw == "rude"]
    kind = [turn.content for one in train for turn in one.messages if turn.role == "assistant"]
    return word_odds(rude, kind)
