# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Evaluation
#
# Find out whether a model got better, how sure you may be, and what the number doesn't see.
#
# You have changed something: more data, another reward, a night of PPO. You chat a little, and the
# new model seems nicer. Does it? You knew which one it was. You asked the questions that you always
# ask. And you remember the good answers.
#
# A baker who changes the recipe doesn't taste his own bread and nod. He puts old and new loaves on
# one table, without labels, and lets people choose who don't know what he hopes for. Then he
# counts, and asks himself whether twelve against eight could be luck. This chapter is that table.
#
# 1. What the **loss** tells, and what it can't.
# 2. **Questions** that no training has seen.
# 3. **Win rates**, and how sure you may be of them: intervals, worked out and simulated.
# 4. Why the **judge** must be another one than the teacher.
# 5. The **form** of the replies, and the **distance** from where you began.
# 6. **Reading blind**, with your own eyes.
# 7. **Helpful, honest, harmless**; made-up things; nice and mean instructions.
# 8. A **report card** of whatever models you have.
#
# **What you need:** chapters 07 (bits per byte), 11 (the judge) and 12 (KL). From statistics, nothing:
# what isn't clear is simulated. The code takes a minute or two; reading it, an hour.

# %% tags=["export"]
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


# %%
import copy
import itertools
import os
import tempfile
from pathlib import Path

from tinychat.book.picture import picture
from tinychat.data import tokenizer_model
from tinychat.data.groups import tokenize_groups
from tinychat.data.preferences import by_part, corpus_ranked, for_judge, prompt_key
from tinychat.data.probes import SHARED, TONES, probes
from tinychat.data.unseen import unseen_prompts, unseen_texts
from tinychat.gpt import load_model, nano
from tinychat.reward_model import (
    RewardConfig,
    accuracy,
    fit_reward,
    judge,
    load_reward,
    normalize,
    save_reward,
    score_groups,
)
from tinychat.runtime import checkpoint
from tinychat.runtime.search import find_first

FAST = os.environ.get("TINYCHAT_FAST") == "1"
torch.manual_seed(0)


models: dict[str, GPT] = {}
infos: dict[str, CheckpointInfo] = {}
tokenizer = Tokenizer(tokenizer_model())
for stage in ("rlhf", "sft", "base"):
    path = find_first(f"runs/book/{stage}", stage)
    if path is None:
        print(f"{stage}: not here")
        continue
    gpt, its_tokenizer, info = load_model(path)
    if its_tokenizer.sha256 == tokenizer.sha256:
        models[stage], infos[stage] = gpt.requires_grad_(False), info
        print(f"{stage}: {path}, {info.parameters / 1e6:.1f} M weights")
if not models:
    models["untrained"] = GPT(nano()).requires_grad_(False)
    print("only random weights: what follows runs, but the numbers mean little")
MAIN = next(iter(models))
LARGE = models[MAIN].config.parameters > 4e6  # slower here, so it gets less to do


def amount(normal: int, large: int, fast: int) -> int:
    """How much of something this machine's reader has the time for."""
    return fast if FAST else large if LARGE else normal


# %% [markdown]
# ## What the loss tells
#
# All training so far was steered by one number: how surprised is the model by the next token? On
# text that it has never read, this number is honest and cheap, and it needs no opinion. In bits
# per byte it can be compared between models with different tokenizers (chapter 02).


# %% tags=["export"]
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


# %%
held_out = unseen_texts(amount(20, 8, 2))
read: dict[tuple[str, str], list[tuple[float, int]]] = {}  # (bits, bytes) of each text
for name, gpt in models.items():
    line = []
    for source, texts in held_out.items():
        read[name, source] = [surprise(gpt, tokenizer, text) for text in texts]
        bits, size = np.sum(read[name, source], axis=0)
        line.append(f"{source} {bits / size:.3f}")
    print(f"{name:>10}, bits per byte: {', '.join(line)}")

# %% [markdown]
# Three habits keep the number honest.
#
# - The texts come from a part that **no training step has seen**. All data was divided by a hash of
#   its names before anything else was done (chapter 03), and that is why.
# - One number **for each source**. A model that learned to chat may tell worse stories, and an
#   average would hide it.
# - **The same texts** for every model, cut at the same place.
#
# ## What the loss doesn't tell
#
# Low surprise means: people write like this. It doesn't mean: this is a good answer. Let's ask the
# model itself. Our corpus has good replies and worse ones to the same message. How often is the
# *good* one the less surprising?

# %%
parts = by_part(corpus_ranked())
ranked = parts["validation"] + parts["test"]


def likes_good(gpt: GPT, groups: Sequence[Any]) -> dict[str, list[bool]]:
    """For each flaw: was the good reply less surprising, per byte, than the flawed one?"""
    found: dict[str, list[bool]] = defaultdict(list)
    for group in groups:
        bits = []
        for reply in group.replies:
            turns = (*group.prompt, Message("assistant", reply.text))
            of_reply, size = surprise(gpt, tokenizer, Dialogue("?", "", turns, train_on="last"))
            bits.append(of_reply / max(size, 1))
        for reply, its in zip(group.replies[1:], bits[1:], strict=True):
            found[reply.flaw].append(bits[0] < its)
    return found


preferred = likes_good(models[MAIN], ranked[: amount(150, 60, 3)])
everything = [good for found in preferred.values() for good in found]
print(
    f"{MAIN} finds the good reply less surprising in {sum(everything)} of {len(everything)} pairs"
)
for flaw, found in sorted(preferred.items(), key=lambda item: -len(item[1]))[:8]:
    print(f"  against {flaw:12} {sum(found):3} of {len(found)}")

# %% [markdown]
# Half would be a coin toss. So the loss is a poor judge of flaws that people wrote on purpose, and what
# it thinks of a flaw depends on the flaw: a rambling, repeating reply is quite *predictable*. (Of a
# model's *own* replies it is a better judge, as chapter 11 showed: there an unlikely reply is often a
# slip.) A better loss makes a better model of text. Whether it makes a better partner to talk to is
# another question, and it needs another measurement.
#
# ## Questions that nobody has seen
#
# First the questions. They come from the validation and test parts of our corpus: every user turn,
# with what was said before it. A prompt that also stands in some training part, with other commas or
# capitals, is left out. With public data there are more (`--data`).

# %%
COUNT = amount(60, 24, 4)
MAX_TOKENS = 12 if FAST else 48
asked = unseen_prompts(COUNT, fits=lambda p: sum(len(m.content) for m in p) < 240)
for prompt in asked[:3]:
    print(" / ".join(message.content for message in prompt))

# %% tags=["test"]
trained_on = {prompt_key(group.prompt) for group in parts["train"]}
assert not {prompt_key(prompt) for prompt in asked} & trained_on

# %% [markdown]
# Then the answers. Every model gets the same prompts, the same dice and the same settings: the chat's
# temperature and top-p, but one draft, and short replies.


# %% tags=["export"]
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


# %%
SAMPLING = Sampling(max_tokens=MAX_TOKENS, seed=0)
answers = {name: answer_all(gpt, tokenizer, asked, SAMPLING) for name, gpt in models.items()}
for number in range(2):
    print(f"> {asked[number][-1].content}")
    for name, some in answers.items():
        print(f"  {name:>10}: {some[number].text[:90]}")

# %% [markdown]
# ## How sure may you be?
#
# Before anybody judges, think about the counting. Suppose that the new model wins 12 of 20 pairs. That
# is 60 %. Would you bet on it?
#
# The true rate is what you would find with endless prompts. Twenty prompts are a sample, and a
# sample has luck. So a measured rate needs an **interval**: the range in which the true one lies, in
# 95 of 100 such measurements.
#
# The textbook says: the rate, plus or minus 1.96 standard errors. Try it on a rate near the end.


# %%
def naive_interval(points: float, count: int) -> tuple[float, float]:
    """The textbook's: wrong for few trials and for rates near 0 or 1."""
    share = points / count
    error = 1.96 * math.sqrt(share * (1 - share) / count)
    return share - error, share + error


for won, of in ((12, 20), (19, 20), (20, 20)):
    low, high = naive_interval(won, of)
    print(f"{won} of {of}: {low:.0%} to {high:.0%}")

# %% [markdown]
# More than 100 %? And after twenty wins out of twenty you would be *certain*? The mistake: the error
# was computed as if the measured rate were the true one. Wilson (1927) asked the other way round.
# *Which true rates would make what I saw no great surprise?* Call the measured rate $m$ and the true
# one $p$. A true rate makes its measurements spread by $\sqrt{p(1-p)/n}$. The most surprising rates
# that we still allow are just $z = 1.96$ such spreads away:
#
# $$|m - p| = z \sqrt{\frac{p(1-p)}{n}}$$
#
# Take the square of both sides, and you have a quadratic equation for $p$. Its two solutions are the
# ends of the interval.


# %% tags=["export"]
class Interval(NamedTuple):
    """A measured value, and the range in which the true one lies in 95 of 100 such measurements."""

    value: float
    low: float
    high: float

    def show(self, form: str = ".1%") -> str:
        """`66.7% [61.1%, 71.8%]`"""
        value, low, high = (f"{number:{form}}" for number in self)
        return f"{value} [{low}, {high}]"


# %% tags=["export"]
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


# %% tags=["test"]
by_hand = 1.96**2 / (10 + 1.96**2)  # nothing of ten: the equation becomes p = z² / (n + z²)
assert wilson(0, 10).low == 0 and abs(wilson(0, 10).high - by_hand) < 1e-12
assert abs(wilson(8, 10).low - 0.4902) < 1e-4 and abs(wilson(8, 10).high - 0.9433) < 1e-4

# %%
for won, of in ((12, 20), (19, 20), (20, 20), (60, 100), (180, 300), (600, 1000)):
    print(f"{won:4} of {of:4}: {wilson(won, of).show()}")

# %% [markdown]
# Twelve of twenty: a coin could do that. Only from about a hundred pairs on does the same 60 % stand
# clear of a coin toss, and barely. To halve the interval, you need four times as many pairs.
#
# Never believe an interval because somebody has a formula for it. Simulate! Take a known true
# rate, let it play many matches, and count how often the interval holds the truth. It should be
# 95 %.


# %%
def coverage(interval: Any, truth: float, count: int, matches: int = 2000) -> float:
    """How often the interval holds the true rate."""
    wins_M = np.random.default_rng(0).binomial(count, truth, size=matches)
    holds = 0
    for won, times in Counter(wins_M.tolist()).items():
        low, high = interval(won, count)[-2:]
        holds += times * (low <= truth <= high)
    return holds / matches


print("true rate  pairs  textbook  Wilson")
for truth, count in itertools.product((0.5, 0.65, 0.95), (10, 50, 300)):
    line = [coverage(interval, truth, count) for interval in (naive_interval, wilson)]
    print(f"{truth:9.0%} {count:6} {line[0]:9.1%} {line[1]:7.1%}")

# %% [markdown]
# The textbook's interval promises 95 %. It keeps less where the pairs are few, and far less where the
# rate is near an end. Wilson's stays near its promise.
#
# **How many pairs do you need?** It depends on how large the difference is that you want to see. So
# turn it around: if the true rate is this, how often will the interval leave 50 % behind?


# %%
def power(truth: float, count: int, matches: int = 1000) -> float:
    """How often a match shows that the better model is better."""
    wins_M = np.random.default_rng(1).binomial(count, truth, size=matches)
    times = Counter(wins_M.tolist())
    return sum(n for won, n in times.items() if wilson(won, count).low > 0.5) / matches


SIZES = (20, 50, 100, 300, 1000)
print("true rate " + "".join(f"{count:7}" for count in SIZES) + "  pairs")
for truth in (0.52, 0.55, 0.6, 0.65, 0.75):
    print(f"{truth:9.0%} " + "".join(f"{power(truth, count):7.0%}" for count in SIZES))


# %%
# alt: The interval of a measured 60 % gets narrower with the pairs, like one over the square root.
def draw_width(plt):
    figure, axis = plt.subplots(figsize=(7, 3.5))
    counts = [10 * 2**n for n in range(9)]
    ends = [wilson(0.6 * count, count) for count in counts]
    axis.fill_between(counts, [e.low for e in ends], [e.high for e in ends], alpha=0.3)
    axis.plot(counts, [e.value for e in ends], color="C0", label="60 % of pairs won")
    axis.axhline(0.5, color="grey", linestyle="--", label="a coin toss")
    axis.set(xscale="log", xlabel="pairs", ylabel="win rate", ylim=(0.2, 0.9))
    axis.legend()
    return figure


picture("13_width", draw_width)

# %% [markdown]
# With 300 pairs, a model that wins 65 % of the time is nearly always found out, and one that wins 52 %
# hardly ever. That is no flaw of the method. It is the price of small differences, and whoever reports
# them from fifty pairs is reporting luck.
#
# ### Means, by drawing again
#
# A rate is a count of yes and no. A mean of marks has a formula too, one that trusts large samples, and
# a ratio such as bits per byte needs more algebra. Efron (1979) had a bold idea that serves all of
# them, the **bootstrap**. Let the sample play the part of the world: draw from it, with repeats, as many values as you had, and take
# their mean. Do that two thousand times. The spread of these means is about the spread that your own
# mean had.


# %% tags=["export"]
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


# %% tags=["export"]
def bits_per_byte(
    model: GPT, tokenizer: Tokenizer, texts: Sequence[Document | Dialogue]
) -> Interval:
    """Bits per byte on held-out texts, with the interval over texts."""
    found = [surprise(model, tokenizer, text) for text in texts]
    found = [(bits, size) for bits, size in found if size]
    return bootstrap([bits for bits, _ in found], [size for _, size in found])


# %% tags=["test"]
values = np.random.default_rng(3).normal(5, 2, size=400)
drawn, error = bootstrap(values), 1.96 * values.std(ddof=1) / 20
assert abs(drawn.value - values.mean()) < 1e-9, "the mean itself is just the mean"
assert abs((drawn.high - drawn.low) / (2 * error) - 1) < 0.1, "here the textbook knows it too"


# %%
def interval_of(name: str, source: str) -> Interval:
    """What `bits_per_byte` does, with the texts that were read above."""
    return bootstrap(*zip(*read[name, source], strict=True))


for source, name in itertools.product(held_out, models):
    print(f"{source:>12} {name:>10}: {interval_of(name, source).show('.3f')}")

# %% [markdown]
# One trap: **what is drawn must be independent**. A thousand tokens of one text are not a thousand
# witnesses. If the text is about bees, they are all about bees. So we draw whole texts, and whole
# prompts. With tokens, the interval would look wonderfully narrow and be wrong.
#
# And one gift: **pairs**. Both models answer the *same* prompts, and some prompts are hard for both.
# The difference on each prompt doesn't have that noise.

# %%
dice = np.random.default_rng(4)
hardness_N = dice.normal(0, 2, size=200)  # of each prompt, the same for both models
old_N = dice.normal(0, 0.5, size=200) - hardness_N
new_N = dice.normal(0.3, 0.5, size=200) - hardness_N
unpaired = bootstrap(new_N).low - bootstrap(old_N).high
print(f"old {bootstrap(old_N).show('.2f')}, new {bootstrap(new_N).show('.2f')}")
print(f"difference, prompt by prompt: {bootstrap(new_N - old_N).show('.2f')}")

# %% tags=["test"]
assert unpaired < 0 < bootstrap(new_N - old_N).low, "only the pairs see it"

# %% [markdown]
# ## Who judges?
#
# People, best of all. But you can't ask people after every run. So a reward model gives marks to both
# replies, and the higher one wins. **Which** reward model is the question on which everything hangs.
#
# *When a measure becomes a target, it ceases to be a good measure.* That is Goodhart's law, as
# Marilyn Strathern put it. Chapter 12 pushed the policy towards the marks of one reward model. Part
# of those marks is quality. The rest are the model's own mistakes, and the policy has learned these
# as eagerly. Ask the same reward model, and it will praise its own mistakes.
#
# You can see it in ten lines. Each reply has a true quality. The teacher sees it with an error, and the
# judge with another error of the same size. Then we choose the best of n replies by the teacher's
# marks, which is the simplest form of optimising.


# %%
def goodhart(n: int, shared: float, trials: int = 4000) -> tuple[float, float, float]:
    """(teacher's mark, judge's mark, truth) of the reply that the teacher likes best."""
    dice = np.random.default_rng(n)
    truth, of_teacher, of_judge, common = dice.normal(size=(4, trials, n))
    teacher = truth + math.sqrt(1 - shared) * of_teacher + math.sqrt(shared) * common
    other = truth + math.sqrt(1 - shared) * of_judge + math.sqrt(shared) * common
    best = teacher.argmax(axis=1)
    rows = np.arange(trials)
    return tuple(float(marks[rows, best].mean()) for marks in (teacher, other, truth))


STRENGTHS = (1, 4, 16) if FAST else (1, 2, 4, 16, 64, 256)
print("shared error  best of  teacher  judge  truth")
optimised = {s: [goodhart(n, s) for n in STRENGTHS] for s in (0.0, 0.5)}
for shared, found in optimised.items():
    for n, (teacher, other, truth) in zip(STRENGTHS, found, strict=True):
        print(f"{shared:12.0%} {n:8} {teacher:8.2f} {other:6.2f} {truth:6.2f}")


# %%
# alt: The teacher's marks rise twice as fast as the truth; an independent judge stays on the truth.
def draw_goodhart(plt):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for axis, (shared, found) in zip(axes, optimised.items(), strict=True):
        for name, values, style in zip(
            ("teacher", "judge", "truth"), zip(*found, strict=True), ("-", "--", ":"), strict=True
        ):
            axis.plot(STRENGTHS, values, style, label=name)
        axis.set(xscale="log", xlabel="best of n", title=f"errors shared: {shared:.0%}")
    axes[0].set_ylabel("mark of the chosen reply")
    axes[0].legend()
    return figure


picture("13_goodhart", draw_goodhart)

# %% tags=["test"]
teacher, other, truth = optimised[0.0][-1]
assert teacher > 1.5 * truth and abs(other - truth) < 0.1
assert optimised[0.5][-1][1] > optimised[0.5][-1][2] + 0.3, "a relative is too kind"

# %% [markdown]
# On the left, the teacher's marks promise twice what is true. A judge with mistakes *of its own* is on
# average right about the chosen replies, though it is no better than the teacher. On the right, half
# of the error is shared, and the judge overrates too.
#
# So a judge must share as little as possible with the teacher. Ours learns from the other half of the
# prompts, with another seed (`tinychat train all` does the same; by hand it is `--judge --set seed=1`).
# Yet it starts from the same chat model, with the same surety, and reads the same people's taste, so it
# is a near cousin and no stranger. Its verdict is better than the teacher's, and worse than yours.
#
# A checkpoint knows who taught it (its lineage), so the program can refuse.


# %% tags=["export"]
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


# %% [markdown]
# You need such a judge. If none is around, a short training makes one here, from the half of the
# prompts that chapter 11 put aside for it.

# %%
JUDGE = Path("runs/book/judge.safetensors")
known = [] if FAST else [path for path in (find_first("judge", "runs/judge/reward"),) if path]
if known:
    marker, its_tokenizer, judge_info = load_reward(known[0])
    print(f"judge: {known[0]}")
else:
    mine = [group for group in parts["train"] if for_judge(group.prompt)]
    config = RewardConfig(
        sequence=128 if FAST else 192, batch=8, precision="fp32", epochs=1, seed=1
    )

    def tokenized(groups: Sequence[Any]) -> list[Any]:
        return tokenize_groups(groups, tokenizer, sequence=config.sequence)

    start = copy.deepcopy(models.get("sft", models[MAIN])).requires_grad_(True)
    marker = RewardModel(start, tokenizer.assistant_id).train()
    train = tokenized(mine[: amount(1500, 600, 24)])
    with tempfile.TemporaryDirectory() as folder:
        minutes = 0.5 / 60 if FAST else float(os.environ.get("TINYCHAT_MINUTES") or 0.4)
        result = fit_reward(marker, train, config, folder, pad=tokenizer.pad_id, minutes=minutes)
    strangers = [group for group in parts["train"] if not for_judge(group.prompt)]
    good_ones = [group.tokens[0] for group in tokenized(strangers[: amount(150, 60, 12)])]
    normalize(marker.eval(), good_ones, tokenizer.pad_id)
    judge_info = save_reward(
        JUDGE,
        marker,
        tokenizer=tokenizer,
        lineage={"half": "judge", "steps": result.steps, "tokens": result.tokens},
        metrics={},
    )
    marker, its_tokenizer, judge_info = load_reward(JUDGE)
    print(f"a judge of our own: {result.steps} steps, {JUDGE}")
test_groups = tokenize_groups(ranked[: amount(200, 80, 6)], its_tokenizer, sequence=256)
marks = score_groups(marker, test_groups, its_tokenizer.pad_id)
by_prompt = [judge([group], [some]) for group, some in zip(test_groups, marks, strict=True)]
sizes = [len(pairs) for pairs in by_prompt]
right = bootstrap([accuracy(pairs) for pairs in by_prompt], sizes)
print(f"it finds the better of two held-out replies in {right.show()} of {sum(sizes)} pairs")

# %% [markdown]
# (Pairs of one prompt share their replies, so that the prompts are drawn, and not the pairs.) Mind that
# last line. If its interval holds 50 %, this judge knows nothing yet, and what follows is
# practice only. Give it more minutes (`TINYCHAT_MINUTES=10`), or make one with `tinychat train reward
# --judge --run judge --set seed=1`.
#
# Even a fair judge blurs. A pair goes to your model when it is better and the judge is right, or when it
# is worse and the judge is wrong.

# %%
for truth, right_in in itertools.product((0.6, 0.8, 0.95), (0.7, 0.9)):
    seen = truth * right_in + (1 - truth) * (1 - right_in)
    print(f"better in {truth:.0%} of pairs, judge right in {right_in:.0%}: it seems {seen:.0%}")

# %% [markdown]
# Mistakes at random make differences smaller. They don't make them up.

# %% tags=["test"]
check_judge(judge_info, infos.values())
teacher_path = find_first("runs/book/reward", "reward")
if teacher_path:
    try:
        check_judge(checkpoint.read_info(teacher_path), infos.values())
    except ConfigError as refusal:
        print(f"refused: {refusal}")
    else:
        raise AssertionError("a teacher was let through")

# %% [markdown]
# Now the marks. The judge reads the *words*, behind the prompt, just as it was trained.


# %% tags=["export"]
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


# %% tags=["export"]
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


# %%
marks = {name: give_marks(marker, its_tokenizer, asked, some) for name, some in answers.items()}
for name, its in marks.items():
    print(f"{name:>10}: mean mark {bootstrap(its).show('.2f')}")
for one, two in itertools.combinations(models, 2):
    won = WinRate.of(marks[one], marks[two])
    print(f"{one} against {two}: {won.wins} won, {won.ties} tied, {won.losses} lost,", end=" ")
    print(f"win rate {won.rate.show()}")

# %% tags=["test"]
a, b = [1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 5.0, -1.0]
assert WinRate.of(a, b) == WinRate(2, 1, 1) and WinRate.of(a, b).rate.value == 2.5 / 4
assert WinRate.of(b, a).rate.value == 1 - 2.5 / 4, "from the other side it is the rest"

# %% [markdown]
# A tie counts as half a win for both. So the two rates of a match always sum to one, whoever is named
# first.
#
# ### A chatbot as a judge
#
# Many projects ask a large chat model: *which answer is better, A or B?* Zheng et al. (2023) found
# that a strong one agrees with people about as often as people agree with each other. They also
# found its vices: it prefers the answer that it reads **first**, the **longer** one, and the one
# that it could have written **itself**. So each pair must be shown in both orders. Our reward model
# marks each reply alone, so it has no order to prefer. Its weakness for length was measured and cured
# in chapter 11, and the report below shows the length beside the win rate. Always look at both.
#
# ## The form of the replies
#
# Some things need no judge: length, whether a reply ends by itself, how many different words there are,
# how much is said twice. They say nothing of quality. But when one of them *jumps*, the policy has
# found a trick, and you know where to look.


# %% tags=["export"]
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


# %%
shape = {name: form(some) for name, some in answers.items()}
print(f"{'':>10}" + "".join(f"{key:>12}" for key in next(iter(shape.values()))))
for name, found in shape.items():
    print(f"{name:>10}" + "".join(f"{value:12.2f}" for value in found.values()))
for name, some in answers.items():
    found = broken_rules(asked, some)
    print(
        f"{name:>10} breaks: " + ", ".join(f"{rule} {share:.0%}" for rule, share in found.items())
    )

# %% [markdown]
# `distinct_2` is the share of different pairs of neighbouring tokens (Li et al. 2016). It falls with
# the amount of text, because common pairs must come again. So compare it only between models that
# answered the same prompts at about the same length.
#
# ## How far from home?
#
# PPO pays for its marks in **KL**: how far has the policy moved from the model where it began? Draw
# replies from the policy, and add up, token by token, how much likelier each was to it than to the
# reference. This must be done with the whole distribution at temperature 1. Top-p cuts away just
# the unlikely tokens that matter.


# %% tags=["export"]
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


# %%
home = "sft" if MAIN == "rlhf" and "sft" in models else next(reversed(models))
prompt_ids = [render_prompt(p, tokenizer, context=512, reserve=MAX_TOKENS) for p in asked]
drawn = draw_replies(models[MAIN], tokenizer, prompt_ids, max_tokens=MAX_TOKENS)
nats = kl_nats(models[MAIN], models[home], prompt_ids, drawn, pad=tokenizer.pad_id)
print(f"KL({MAIN} || {home}): {bootstrap(nats).show('.2f')} nats a reply")

# %% tags=["test"]
same = kl_nats(models[MAIN], models[MAIN], prompt_ids[:4], drawn[:4], pad=tokenizer.pad_id)
assert max(map(abs, same)) < 1e-3, "no distance from oneself"

# %% [markdown]
# What is a nat worth? Choosing the best of n costs at most log n - (n - 1) / n nats (chapter 12). So
# any policy can be set beside an n: did training do more than drawing a few replies and keeping the
# best?
#
# To know what the best of n is worth, you needn't draw n replies again and again. Draw N once, and
# average over *all* ways to take n of them. Sorted by the teacher's marks, the reply with i others
# below it is the best of n where the n - 1 others all come from those i. So it is chosen with the
# probability C(i, n - 1) / C(N, n) (Nakano et al. 2021).


# %% tags=["export"]
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


# %%
taught = load_reward(teacher_path) if teacher_path else None
if taught and taught[1].sha256 == tokenizer.sha256:
    several = amount(16, 8, 2)
    few = prompt_ids[: amount(24, 12, 3)]
    drawn = draw_replies(models[home], tokenizer, few * several, max_tokens=amount(48, 32, 6))
    texts = [prompt + reply for prompt, reply in zip(few * several, drawn, strict=True)]
    of_teacher_PN, of_judge_PN = (
        score(one, texts, tokenizer.pad_id).view(several, len(few)).T for one in (taught[0], marker)
    )
    print(f"{home}: best of n by the teacher's marks, {len(few)} prompts")
    print("  n  nats at most  teacher                judge")
    for n in [2**power for power in range(several.bit_length())]:
        teacher, other = (
            bootstrap(best_of(n, of_teacher_PN, of_whom))
            for of_whom in (of_teacher_PN, of_judge_PN)
        )
        nats_N = math.log(n) - (n - 1) / n
        print(f"{n:3} {nats_N:13.2f}  {teacher.show('.2f'):22} {other.show('.2f')}")

# %% [markdown]
# The teacher's column must climb: that is what was chosen for. Whether the judge's column climbs with
# it tells how much of the teacher's taste is real. `tinychat eval sft --judge judge --reward reward
# --best-of 64` draws the whole curve, and `tinychat train ppo --judge judge` writes the judge's mark
# of every step beside the teacher's, so that the two ways can be compared at equal distance.

# %% tags=["test"]
four_PN = torch.tensor([[3.0, 1.0, 2.0, 4.0]])
other_PN = torch.tensor([[30.0, 10.0, 20.0, 0.0]])
assert best_of(1, four_PN, other_PN) == [15.0] and best_of(4, four_PN, other_PN) == [0.0]
# Of the six ways to take two, the best has mark 2 once, 3 twice, 4 three times.
assert abs(best_of(2, four_PN, other_PN)[0] - (20 + 2 * 30 + 3 * 0) / 6) < 1e-5

# %% [markdown]
# ## Read for yourself
#
# All this was arithmetic. Now read. Fifty pairs take half an hour, and you will learn more from them
# than from any table: the win rate says *that* something changed, and your eyes see *what*.
#
# Read **blind**. If you know which reply is from the new model, you can't unknow it. And people have a
# weakness for a side, just as chat models do. Here is a reader who takes the left one whenever in
# doubt.


# %%
def lazy_reader(shuffled: bool, pairs: int = 4000) -> float:
    """The win rate of a model that is no better, by a reader who prefers the left side."""
    dice = np.random.default_rng(5)
    new, old = dice.normal(size=(2, pairs))
    new_is_left = dice.random(pairs) < 0.5 if shuffled else np.ones(pairs, dtype=bool)
    chooses_new = new - old + np.where(new_is_left, 0.7, -0.7) > 0
    return float(chooses_new.mean())


print(f"new model always on the left: it wins {lazy_reader(False):.0%}")
print(f"sides tossed for each pair:   it wins {lazy_reader(True):.0%}")

# %% tags=["test"]
assert lazy_reader(False) > 0.6 and abs(lazy_reader(True) - 0.5) < 0.03

# %% [markdown]
# The reader is as lazy as before. But now his laziness helps both models alike. What is left of it is
# noise, and noise is what the interval is for.
#
# `tinychat eval ppo sft --judge judge --pairs pairs.txt` writes such a page, with the key in another
# file. You write A, B, tie or bad under each pair, and `tinychat eval --count pairs.txt` counts: your win rate,
# how often the judge agrees with you, and in which pairs it doesn't. Read *those* again. There the
# reward model is wrong, or you are.
#
# ## Helpful, honest, harmless
#
# A single number for "better" hides what kind of better. Askell et al. (2021) asked for three things: a
# reply should **help**, be **honest** about the world and about itself, and do no **harm**. They pull in
# different directions. A model that refuses everything is perfectly harmless, and useless.
#
# `tinychat/data/probes.jsonl` holds questions of our own for each, and beside each a rule: a pattern
# that a good reply matches, and one for a bad reply. Rules are blunt. But you can read them, quarrel
# with them and mend them, and they give the same verdict tomorrow.


# %% tags=["export"]
def examine(probes: Sequence[Probe], answers: Sequence[Answer]) -> dict[str, Counter[str]]:
    """How many replies of each set of questions are good, bad and unclear by their rules."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for probe, answer in zip(probes, answers, strict=True):
        found[probe.set][probe.verdict(answer.text)] += 1
    return dict(found)


# %%
some_probes = [probe for probe in probes() if probe.set != "manners"]
some_probes = some_probes[:: amount(1, 2, 24)]


def shown(pattern: str) -> str:
    """The pattern with the names of its shared parts."""
    for name, part in SHARED.items():
        pattern = pattern.replace(f"(?:{part})", f"@{name}")
    return pattern


for probe in some_probes[:: max(1, len(some_probes) // 6)]:
    print(f"{probe.set:>9}: {probe.prompt}")
    for name in ("good", "bad", "unclear"):
        if rule := getattr(probe, name):
            print(f"{name:>18}: {shown(rule)}")
print(f"@asks is {SHARED['asks']}, and @admits is {SHARED['admits'][:60]} ...")

# %%
SHORT = replace(SAMPLING, max_tokens=min(MAX_TOKENS, 40))
replied = {
    name: answer_all(gpt, tokenizer, [(Message("user", p.prompt),) for p in some_probes], SHORT)
    for name, gpt in models.items()
}
verdicts = {name: examine(some_probes, some) for name, some in replied.items()}
for name, sets in verdicts.items():
    for kind, counts in sets.items():
        share = wilson(counts["good"], counts.total())
        print(f"{name:>10} {kind:>9}: good {share.show('.0%')} of {counts.total()}")

# %% [markdown]
# Trust rules as far as you have checked them. So check: here are replies that were called good. How many
# of them would *you* call good?

# %%
passed = [
    (probe.prompt, answer.text)
    for probe, answer in zip(some_probes, replied[MAIN], strict=True)
    if probe.verdict(answer.text) == "good"
]
for question, text in passed[:5]:
    print(f"> {question}\n  {text[:110]}")

# %% [markdown]
# A small model often says the right word by accident, in a sentence without sense. The rule sees
# the word, and misses a good reply in other words. So these shares are for *comparing* two models, not
# for boasting.
#
# ## Making things up
#
# What does a model say about things that it can't know? The set `unknown` asks about countries, books
# and battles that we invented, and about your neighbor's goldfish. The only good answer says so. The
# set `known` asks what any schoolbook tells.
#
# Neither alone means anything. A model that always says "I don't know" never makes anything up. So look
# at the pair: *admits what it can't know* and *knows what it could*. Lin et al. (2022) built a whole
# test, TruthfulQA, of questions that people often answer wrongly, and found that larger models,
# trained to imitate people, did worse at it.

# %%
for name, sets in verdicts.items():
    known_ones, unknown = sets["known"], sets["unknown"]
    silent = wilson(unknown["bad"], unknown.total())
    print(f"{name:>10}: doesn't admit it for {silent.show('.0%')} of what it can't know,")
    print(f"{'':>12}knows {known_ones['good']} of {known_ones.total()}, admits", end=" ")
    print(f"ignorance of {known_ones['unclear']} that it could know")

# %% [markdown]
# Here too the rule is blunt. "There is no such mountain" passes, and so does "I don't know, it's 300
# meters", since an admission counts wherever it stands.
#
# ## Nice and mean instructions
#
# Ouyang et al. (2022, section 4.2) had a clever test. Tell the model to be respectful, tell it nothing,
# tell it to be offensive, and measure how toxic its replies are. It shows two things at once: whether the
# model follows instructions, and what it does when instructions are bad. Their InstructGPT was *less*
# toxic than GPT-3 when told to be respectful, and *more* when told to be toxic: it had learned to obey.
#
# They used a service to measure toxicity. We count words. Which words are rude? The corpus can tell:
# it has replies that somebody wrote to be rude, and good ones. Words that are commoner among the rude
# get a plus, the others a minus, and the sum decides (naive Bayes).


# %% tags=["export"]
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


# %%
odds = rude_odds()
held_rude = [r.text for group in ranked for r in group.replies if r.flaw == "rude"]
held_good = [group.replies[0].text for group in ranked]
caught = sum(sounds_bad(text, odds) for text in held_rude)
alarms = sum(sounds_bad(text, odds) for text in held_good)
print(f"unseen rude replies found: {wilson(caught, len(held_rude)).show('.0%')}")
print(f"unseen good ones called rude: {wilson(alarms, len(held_good)).show('.0%')}")

# %% tags=["test"]
assert caught / len(held_rude) > 0.5 > 10 * alarms / len(held_good) / 2

# %%
for tone, instruction in TONES.items():
    print(f"{tone}: {instruction or '(nothing)'}")
everyday = [Message("user", probe.prompt) for probe in probes() if probe.set == "manners"]
everyday = everyday[:: amount(1, 2, 8)]
for name, gpt in models.items():
    line = []
    for tone, instruction in TONES.items():
        system = (Message("system", instruction),) if instruction else ()
        told = answer_all(gpt, tokenizer, [(*system, turn) for turn in everyday], SHORT)
        rude = sum(sounds_bad(answer.text, odds) for answer in told)
        line.append(f"{tone} {wilson(rude, len(told)).show('.0%')}")
    print(f"{name:>10}, rude replies: {', '.join(line)}")

# %% [markdown]
# Look at the intervals before you tell a story about the differences. With so few prompts they
# overlap, unless a model changes its tone completely. And a small model that has seen few system
# messages may not notice the instruction at all.
#
# ## The report card
#
# Everything on one page, for whatever models were found. `tinychat eval` prints the same and more, on
# three hundred prompts, and writes it down as JSON.


# %%
def report_card() -> str:
    """A Markdown table: a row a measurement, a column a model."""
    reference = models[home]
    rows: dict[str, list[str]] = defaultdict(list)
    for name, gpt in models.items():
        sets = verdicts[name]
        its = WinRate.of(marks[name], marks[home])
        texts = draw_replies(gpt, tokenizer, prompt_ids, max_tokens=MAX_TOKENS)
        far = kl_nats(gpt, reference, prompt_ids, texts, pad=tokenizer.pad_id)
        rows["bits per byte, replies"].append(interval_of(name, "dialogues").show(".2f"))
        rows[f"win rate over {home}"].append("-" if name == home else its.rate.show(".0%"))
        rows["mean mark"].append(bootstrap(marks[name]).show(".2f"))
        rows[f"KL to {home}, nats"].append("-" if name == home else bootstrap(far).show(".1f"))
        rows["tokens a reply"].append(f"{shape[name]['length']:.1f}")
        rows["ended by itself"].append(f"{shape[name]['ended']:.0%}")
        rows["distinct-2"].append(f"{shape[name]['distinct_2']:.2f}")
        for kind, counts in sets.items():
            rows[f"{kind}: good"].append(wilson(counts["good"], counts.total()).show(".0%"))
    lines = [f"| {len(asked)} prompts | " + " | ".join(models) + " |"]
    lines.append("| --- " * (1 + len(models)) + "|")
    lines += [f"| {key} | " + " | ".join(cells) + " |" for key, cells in rows.items()]
    return "\n".join(lines)


print(report_card())
for missing in ("rlhf", "sft", "base"):
    if missing not in models:
        print(f"no {missing} checkpoint was found: its column is left out")

# %% [markdown]
# ## Exercises
#
# **1. How many pairs?** A model wins exactly 55 % of its pairs. Find the smallest number of pairs from
# which Wilson's interval leaves 50 % behind. Compare with a rule of thumb: near one half, a rate
# spreads by $1 / (2\sqrt{n})$, and 1.96 of that must be less than the lead of 0.05. Solve for n.

# %% tags=["solution"]
smallest = next(n for n in itertools.count(1) if wilson(0.55 * n, n).low > 0.5)
thumb = (1.96 / (2 * 0.05)) ** 2
print(f"{smallest} pairs; the rule of thumb says {thumb:.0f}")
assert abs(smallest / thumb - 1) < 0.05

# %% [markdown]
# **2. Peeking.** Two models are equally good. You look after every 10 pairs and stop as soon as the
# interval leaves 50 % behind, at most at 300 pairs. How often do you announce a winner? How often if
# you look only once, at the end?


# %% tags=["solution"]
def announced(looks: Sequence[int], matches: int = 400) -> float:
    """How often equal models get a winner."""
    dice = np.random.default_rng(6)
    found = 0
    for wins_N in dice.integers(2, size=(matches, max(looks))).cumsum(axis=1):
        ends = [wilson(int(wins_N[count - 1]), count) for count in looks]
        found += any(end.low > 0.5 or end.high < 0.5 for end in ends)
    return found / matches


once, often = announced([300]), announced(range(10, 301, 10))
print(f"looking once: a winner in {once:.0%} of matches; after every ten pairs: {often:.0%}")
assert once < 0.1 < 0.2 < often, "decide how many pairs you read before you read the first"

# %% [markdown]
# **3. Agreement beyond luck.** A reader and a judge agree in 80 % of pairs, and both choose the new
# model in 90 % of them. Cohen's kappa (1960) asks how much of the agreement is left when you take
# away what two dice with these habits would reach, as a share of what could be left at most. Write
# `kappa(agreed, one, two)`.


# %% tags=["solution"]
def kappa(agreed: float, one: float, two: float) -> float:
    """1 is perfect agreement, 0 what chance gives; `one` and `two` are shares of "new"."""
    by_chance = one * two + (1 - one) * (1 - two)
    return (agreed - by_chance) / (1 - by_chance)


print(f"80 % of agreement with habits of 90 %: kappa {kappa(0.8, 0.9, 0.9):.2f}")
print(f"with even habits: kappa {kappa(0.8, 0.5, 0.5):.2f}")
assert kappa(0.8, 0.9, 0.9) < 0 < kappa(0.8, 0.5, 0.5) and kappa(1, 0.7, 0.7) == 1

# %% [markdown]
# ## Check yourself
#
# 1. The loss on unseen text fell. Is the chatbot better?
# 2. Your model wins 60 % of 20 pairs. What do you do?
# 3. Why not ask the reward model that PPO used?
# 4. The judge is right in only 70 % of pairs. Can a win rate of 65 % by it be luck?
# 5. A model never invents anything. Is it honest?
# 6. Why are the sides tossed for each pair?
#
# <details markdown="1"><summary>Answers</summary>
#
# 1. At modelling text, yes. Whether it answers better is not known yet.
# 2. Collect more pairs. A coin does that often.
# 3. It praises its own mistakes, which the policy has learned.
# 4. Not if its interval is above 50 %. Wrong verdicts at random pull the rate towards 50 %, not away
#    from it. Shared weaknesses of judge and teacher are another matter.
# 5. Ask what it knows, too. Who always says "I don't know" invents nothing.
# 6. So that a liking for one side helps both models alike.
#
# </details>
#
# ## What we left out
#
# - **People**, many and paid, with guidelines. Everything here is a stand-in for them.
# - **Benchmarks**: thousands of school and trivia questions with known answers. A model of our size
#   would score like a coin, and the questions of famous ones stand in many training texts by now.
# - **Fluency by a stranger**: how surprised is *another* language model by the replies? `tinychat eval
#   --fluency FILE` asks one, if you have it and the package `transformers`.
# - **Red teams**: people who try hard to make the model say something bad. Our few harmless questions
#   are not even a beginning.
# - **Points from a chat model.** Instead of A or B, one can ask a large model for points from 0 to 100
#   (the LLMs-from-scratch book does). The points drift with the wording; a comparison is steadier.
# - **One of k.** For tasks that can be checked, count how often at least one of k tries is right
#   (pass@k). It tells what more training could bring out.
# - **Many tests at once.** Each 95 % interval misses in one of twenty. A report card with forty numbers
#   has, on average, two that are off.
#
# ## Where this is in the package
#
# Everything tagged `export` here is `tinychat/evaluation.py`. The prompts come from
# `tinychat/data/unseen.py`, the questions and their rules from `tinychat/data/probes.py`.
#
# ```
# tinychat eval ppo sft base --judge judge --out report.json
# tinychat eval ppo sft --judge judge --pairs pairs.txt     # then read, and write your verdicts
# tinychat eval --count pairs.txt
# tinychat eval sft --judge judge --reward reward --best-of 64
# ```
#
# ## Sources
#
# - E. B. Wilson: [Probable Inference, the Law of Succession, and Statistical
#   Inference](https://doi.org/10.1080/01621459.1927.10502953) (1927).
# - B. Efron: [Bootstrap Methods: Another Look at the
#   Jackknife](https://doi.org/10.1214/aos/1176344552) (1979).
# - J. Cohen: [A Coefficient of Agreement for Nominal
#   Scales](https://doi.org/10.1177/001316446002000104) (1960).
# - C. Goodhart: *Problems of Monetary Management* (1975), and M. Strathern: *Improving ratings* (1997),
#   who gave the law its usual words.
# - J. Li et al.: [A Diversity-Promoting Objective Function for Neural Conversation
#   Models](https://arxiv.org/abs/1510.03055) (2016).
# - A. Askell et al.: [A General Language Assistant as a Laboratory for
#   Alignment](https://arxiv.org/abs/2112.00861) (2021). Helpful, honest, harmless.
# - L. Ouyang et al.: [Training language models to follow instructions with human
#   feedback](https://arxiv.org/abs/2203.02155) (2022). Win rates, and the respectful and the toxic
#   instruction.
# - Y. Bai et al.: [Training a Helpful and Harmless Assistant with Reinforcement Learning from Human
#   Feedback](https://arxiv.org/abs/2204.05862) (2022). A held-out half to test the reward model.
# - R. Nakano et al.: [WebGPT](https://arxiv.org/abs/2112.09332) (2021). The best of n without drawing
#   n again and again.
# - S. Lin, J. Hilton, O. Evans: [TruthfulQA](https://arxiv.org/abs/2109.07958) (2022).
# - L. Gao, J. Schulman, J. Hilton: [Scaling Laws for Reward Model
#   Overoptimization](https://arxiv.org/abs/2210.10760) (2023).
# - L. Zheng et al.: [Judging LLM-as-a-Judge with MT-Bench and Chatbot
#   Arena](https://arxiv.org/abs/2306.05685) (2023).
