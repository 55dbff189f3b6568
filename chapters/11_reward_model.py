# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Reward model
#
# Turn "this reply is better than that one" into a number that a program can raise.
#
# After chapter 10 the model answers. But fine-tuning only ever showed it *good* replies. It was never
# told that a reply is rude, or made up, or beside the point. And nobody can write down a formula for
# "pleasant and honest".
#
# People can do something else: look at two replies and say which one they like better. That is much
# easier than writing a good one, just as you can tell which of two singers is in tune without being
# able to sing. In this chapter you train a model on such comparisons, until it can take the place of
# the people: the **reward model**. It is the second of the three steps from GPT-3 to InstructGPT
# (Ouyang et al. 2022; for summaries first: Stiennon et al. 2020). Chapter 12 then trains the chat
# model to please it.
#
# **What you will build**
#
# 1. **a formula** that turns "who won" into numbers;
# 2. **a head** that reads one number off a reply, and a loss for all pairs of a prompt at once;
# 3. **a way to judge a judge**: held-out pairs, flaw by flaw, beside an opponent that only knows
#    words;
# 4. **a second opinion** beside the network's;
# 5. **a better start**: what the chat model knows about its own replies;
# 6. **three checks** of the marks: do they mean what they say, do they like long replies, where is
#    their zero?
# 7. your own `reward` checkpoint.
#
# **What you need:** chapters 07 (the training loop), 09 (the template) and 10 (the model to begin
# with). The code takes about two minutes; reading it, an hour.

# %% tags=["export"]
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from tinychat.data.groups import Group, GroupBatches
from tinychat.gpt import GPT, build_model
from tinychat.pretraining import (
    Budget,
    Progress,
    Result,
    TrainConfig,
    make_optimizers,
    pack_state,
    schedule,
    train_step,
    unpack_state,
)
from tinychat.runtime import checkpoint
from tinychat.runtime.checkpoint import Checkpoint, CheckpointInfo
from tinychat.runtime.errors import CheckpointError, ConfigError, DataError
from tinychat.runtime.metrics import MetricsWriter
from tinychat.runtime.state import load_state, save_state
from tinychat.tokenizer import Tokenizer

# %% [markdown]
# ## The model to begin with
#
# A reward model has to understand what it reads, so it begins with the weights of the fine-tuned
# model. If you worked through chapter 10, they are your own. If not, the shipped ones are taken.

# %%
import copy
import os
import tempfile
import zlib
from collections import Counter

from tinychat.book.picture import picture
from tinychat.data import tokenizer_model
from tinychat.data.corpus import basics
from tinychat.data.exchange import mismatched, near_misses, refusals
from tinychat.data.groups import tokenize_groups
from tinychat.data.onpolicy import RULES, flaw_of, sample_ranked
from tinychat.data.preferences import (
    Ranked,
    Reply,
    by_part,
    corpus_answered,
    corpus_flawed,
    corpus_graded,
    corpus_ranked,
    for_judge,
    prompt_key,
)
from tinychat.data.records import Message
from tinychat.data.split import by_split
from tinychat.dialogue import render_prompt
from tinychat.generation import Sampling
from tinychat.gpt import load_model, nano
from tinychat.runtime.search import find_first

FAST = os.environ.get("TINYCHAT_FAST") == "1"
torch.manual_seed(0)


if found := find_first("runs/book/sft", *([] if FAST else ["sft"])):
    sft, tokenizer, info = load_model(found)
    parent = str(info.path)
    print(f"beginning with {parent}: {info.parameters / 1e6:.1f} M weights")
else:
    tokenizer = Tokenizer(tokenizer_model())
    sft, parent = GPT(nano()), "random weights"
    print("beginning with random weights: what follows runs, but the numbers mean little")
PAD = tokenizer.pad_id
LARGE = sft.config.parameters > 4e6  # slower here, so it gets less to do


def amount(normal: int, large: int, fast: int) -> int:
    """How much of something this machine's reader has the time for."""
    return fast if FAST else large if LARGE else normal


# %% [markdown]
# ## Ranked replies
#
# Our corpus holds conversations in which somebody wrote, beside the good reply, one or more worse
# ones, and the name of what is wrong with each.

# %%
everything = corpus_ranked()
one = next(group for group in everything if len(group.replies) == 4)
for said in one.prompt:
    print(f"{said.role}: {said.content}")
for reply in one.replies:
    print(f"  {reply.rank}. {reply.flaw or 'good':12} {reply.text}")
counts: dict[str, int] = defaultdict(int)
for group in everything:
    for reply in group.replies[1:]:
        counts[reply.flaw] += 1
print(f"{len(everything)} prompts; the flaws of the worse replies:")
print(", ".join(f"{flaw} {n}" for flaw, n in sorted(counts.items(), key=lambda pair: -pair[1])))

# %% [markdown]
# Short everyday messages have flawed replies, too, three to each: among the basics of chapter 10. The
# writers, language models, were told which flaw to write, so that the rare ones are there, and to be as long as the good
# reply; among themselves these have no order. `tinychat train reward` learns from these as well; here
# the first kind is enough.

# %%
flawed = corpus_flawed()
print(
    f"{len(flawed):,} prompts, {sum(len(group.replies) - 1 for group in flawed):,} flawed replies"
)
print(f"> {flawed[0].prompt[-1].content}")
for reply in flawed[0].replies:
    print(f"  {reply.rank}. {reply.flaw or 'good':12} {reply.text}")

# %% [markdown]
# Some prompts must be kept aside, to find out what was learned and what was only memorised. There is
# a trap here. If you cut the *pairs* into two heaps, one prompt has pairs in both, and the model can
# recognise its good reply. So whole **prompts** go to one side. And a prompt that is written twice,
# with another comma or a capital letter, is still one prompt.

# %%
parts = by_part(everything)
print({name: len(groups) for name, groups in parts.items()}, "prompts")
print(repr(prompt_key([Message("user", "Hi,  THERE!")])))

# %% tags=["test"]
keys = {name: {prompt_key(group.prompt) for group in groups} for name, groups in parts.items()}
assert not keys["train"] & (keys["validation"] | keys["test"])
assert not keys["validation"] & keys["test"]

# %% [markdown]
# ## From comparisons to a number
#
# Chess players are only ever compared with each other, and still each has a number. Bradley and Terry
# (1952) had the idea (and Zermelo in 1929, for chess itself), long before the chess federation: give
# everybody a number so that the *difference* of two numbers tells who wins how often. With a difference of 0 it's a coin toss.
#
# $$P(a \text{ beats } b) = \frac{1}{1 + e^{-(s_a - s_b)}}$$
#
# Here $s_a$ and $s_b$ are the numbers of the two. The function on the right is the **sigmoid**: it
# presses any difference into a probability between 0 and 1, as `tanh` did in chapter 01 between −1
# and 1.

# %%
for difference in (0.0, 0.5, 1.0, 2.0, 4.0):
    chance = torch.tensor(difference).sigmoid().item()
    print(
        f"difference {difference:.1f}: the better one wins in {chance:4.0%} {'#' * int(30 * chance)}"
    )

# %% [markdown]
# For us, the players are replies and the number is their **reward**. Training turns the formula
# around. We know who won. So the loss is the surprise about it: minus the logarithm of the
# probability that the model gave to the winner. The naive version takes one pair at a time:


# %%
def naive_loss(better: Tensor, worse: Tensor) -> Tensor:
    """The surprise that `better` won."""
    return -F.logsigmoid(better - worse)


for better, worse in ((0.0, 0.0), (2.0, 0.0), (0.0, 2.0), (102.0, 100.0)):
    loss = naive_loss(torch.tensor(better), torch.tensor(worse))
    print(f"winner {better:5.1f}, loser {worse:5.1f}: loss {loss:.3f}")

# %% [markdown]
# Knowing nothing costs ln 2, as every fair coin does. Being wrong costs more than being right saves.
# And look at the last line: only the difference counts. A reward model has no zero of its own, so
# you will have to set one at the end.
#
# ## A head on the last token
#
# Where does the number come from? The chat model turns its last vector into scores for the next
# token. Take that away, and put a single row of weights in its place: the vector goes in, one number
# comes out. It is read at the reply's **last token**, the only one that has seen all of the reply.
#
# The row starts at random, with weights of a size of one over the root of their number. The first
# marks are then neither all alike nor far apart (Stiennon et al. 2020 do the same).
#
# The class already holds what later sections add: `words` ("Two opinions"), `surety`, with which the row
# starts at zero ("What the writer knows"), and `mean`, `deviation` and `length_slope` ("A zero and a
# yardstick"). Until then they change nothing. On a first reading, `__init__` and `forward` are enough.


# %% tags=["export"]
class RewardModel(nn.Module):
    """A GPT that gives a mark in place of a next token: how good is the reply that ends here?

    A linear head reads the last layer's vector at the reply's final token. `mean`, `deviation` and
    `length_slope` turn its raw number into a mark that is 0 for an average good reply, 1 for one
    a standard deviation better, and doesn't grow with length alone; `normalize` sets them.
    `words` is a second opinion, a weight for each token `[V]`; `add_words` sets it.
    `surety` is what a nat of the GPT's own mean log-prob of the reply's tokens counts beside the
    head; with it the head begins at zero, so that the first marks are the GPT's own opinion.
    `opener` is the token `<|assistant|>`, behind which the reply begins.
    """

    mean: Tensor
    deviation: Tensor
    length_slope: Tensor
    surety: Tensor
    words: Tensor
    chunk = 1024  # tokens whose scores are held at once

    def __init__(self, gpt: GPT, opener: int = 6, surety: float = 0.0):
        super().__init__()
        self.gpt = gpt
        self.opener = opener
        # No bias: only differences of marks are learned, and `mean` sets the level.
        self.head = nn.Linear(gpt.config.width, 1, bias=False, dtype=torch.float32)
        nn.init.normal_(self.head.weight, std=0.0 if surety else (gpt.config.width + 1) ** -0.5)
        self.register_buffer("surety", torch.tensor(surety))
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("deviation", torch.tensor(1.0))
        self.register_buffer("length_slope", torch.tensor(0.0))
        self.register_buffer("words", torch.zeros(gpt.config.vocab_size))
        self.to(gpt.device)

    @property
    def device(self) -> torch.device:
        return self.gpt.device

    def forward(
        self, ids_BT: Tensor, segments_BT: Tensor | None = None, last_B: Tensor | None = None
    ) -> Tensor:
        """Return the mark of each row, `[B]`: read at index `last_B`, or at the end of the row.

        What stands behind that index (padding) can't be seen from it, so it changes nothing.
        """
        B, T = ids_BT.shape
        if last_B is None:
            last_B = torch.full((B,), T - 1, device=ids_BT.device)
        h_BTD = self.gpt.hidden(ids_BT, segments_BT=segments_BT)
        h_BD = h_BTD[torch.arange(B, device=h_BTD.device), last_B].float()
        with torch.autocast(h_BD.device.type, enabled=False):  # marks are compared finely
            raw_B = self.head(h_BD)[:, 0] + self.word_marks(ids_BT, last_B)
            if self.surety:
                raw_B = raw_B + self.surety * self.reply_logprobs(h_BTD.float(), ids_BT, last_B)
        raw_B = raw_B - self.length_slope * self.log_lengths(ids_BT, last_B)
        return (raw_B - self.mean) / self.deviation

    def in_reply(self, ids_BT: Tensor, last_B: Tensor) -> Tensor:
        """Return True on the reply's tokens, `[B, T]`: behind the last opener, up to `last_B`.

        An opener at `last_B` itself opens nothing: it is a slip of whoever wrote this reply.
        """
        places_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        before_BT = places_T < last_B[:, None]
        opener_B = ((ids_BT == self.opener) & before_BT).mul(places_T).amax(dim=1)
        return (places_T <= last_B[:, None]) & (places_T > opener_B[:, None])

    def reply_logprobs(self, h_BTD: Tensor, ids_BT: Tensor, last_B: Tensor) -> Tensor:
        """Return the mean log-prob of each reply's tokens, `[B]`, by the model's own GPT.

        `h_BTD` are the last layer's vectors; the one at a place predicts the token at the next.
        """
        next_BT = self.in_reply(ids_BT, last_B)[:, 1:]
        rows_N, _ = next_BT.nonzero(as_tuple=True)

        def nats(h_ND: Tensor, ids_N: Tensor) -> Tensor:
            logits_NV = F.linear(h_ND, self.gpt.embed.weight)
            return F.cross_entropy(logits_NV.float(), ids_N, reduction="none")

        # The scores of a hundred replies are gigabytes. Those of a chunk are forgotten, and
        # computed again when their gradient is asked for (Chen et al. 2016).
        chosen = (h_BTD[:, :-1][next_BT], ids_BT[:, 1:][next_BT])
        parts = zip(*(one.split(self.chunk) for one in chosen), strict=True)
        nats_N = torch.cat([recomputed(nats, *part, use_reentrant=False) for part in parts])
        sums_B = torch.zeros(len(ids_BT), device=nats_N.device).index_add(0, rows_N, nats_N)
        return -sums_B / next_BT.sum(dim=1).clamp(min=1)

    def log_lengths(self, ids_BT: Tensor, last_B: Tensor) -> Tensor:
        """Return ln(1 + tokens of the reply) of each row, `[B]`."""
        return self.in_reply(ids_BT, last_B).sum(dim=1).float().log1p()

    def word_marks(self, ids_BT: Tensor, last_B: Tensor) -> Tensor:
        """Return what the words of each reply say by themselves, `[B]`, as `bag_scores` does."""
        reply_BT = self.in_reply(ids_BT, last_B)
        has_BV = self.words.new_zeros(len(ids_BT), len(self.words))
        has_BV.scatter_reduce_(1, ids_BT, reply_BT.to(has_BV.dtype), "amax")
        return has_BV @ self.words / has_BV.sum(dim=1).clamp(min=1).sqrt()


# %% tags=["export"]
def right_padded(token_lists: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return ids `[B, T]` filled up with `pad` on the right, and the last real index `[B]`."""
    if not all(token_lists):
        raise ConfigError("A text to score is empty; give it at least one token.")
    longest = max(len(tokens) for tokens in token_lists)
    ids_BT = torch.tensor([[*tokens, *[pad] * (longest - len(tokens))] for tokens in token_lists])
    return ids_BT, torch.tensor([len(tokens) - 1 for tokens in token_lists])


# %% tags=["export"]
@torch.no_grad()
def score(
    model: RewardModel, token_lists: Sequence[Sequence[int]], pad: int, batch: int = 32
) -> Tensor:
    """Return the mark of each text `[N]`, in order; a text ends with its reply's last token.

    Texts of similar length share a batch, and the shorter ones are padded on the right.
    """
    marks_N = torch.zeros(len(token_lists))
    order = sorted(range(len(token_lists)), key=lambda number: len(token_lists[number]))
    for start in range(0, len(order), batch):
        numbers = order[start : start + batch]
        ids_BT, last_B = right_padded([token_lists[number] for number in numbers], pad)
        marks_B = model(ids_BT.to(model.device), last_B=last_B.to(model.device))
        marks_N[numbers] = marks_B.float().cpu()
    return marks_N


# %% [markdown]
# Texts have different lengths, and rows of a batch must not. So the shorter ones are filled up on the
# right. A token never looks to its right, so the filling can't change anything. Rather believe the
# test:

# %% tags=["test"]
probe = RewardModel(copy.deepcopy(sft)).eval()
texts = [
    [2, 5, 40, 41, 3, 6, 50, 3],
    [2, 5, 40, 3, 6, 3],
    [2, 5, 40, 41, 42, 43, 3, 6, 50, 51, 52, 3],
]
together = score(probe, texts, PAD)
alone = torch.cat([score(probe, [text], PAD) for text in texts])
backwards = score(probe, texts[::-1], PAD, batch=2).flip(0)
torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
torch.testing.assert_close(together, backwards, atol=1e-5, rtol=0)

# %% [markdown]
# ## All pairs at once
#
# A prompt with $K$ ranked replies gives $K(K-1)/2$ pairs. With the naive loss, each pair is an example
# of its own, and each reply is read once for every pair that it is in.

# %%
for K in (2, 4, 9):
    pairs = K * (K - 1) // 2
    print(f"{K} replies: {pairs:2} pairs; naive {2 * pairs:2} readings, all at once {K}")

# %% [markdown]
# That is a waste, and worse: one prompt's pairs are almost copies of each other. Spread over an epoch,
# they make the model see the same reply again and again, and learn it by heart. Ouyang et al. found
# that a single epoch of such shuffled pairs overfits.
#
# Their remedy: all replies of a prompt go through the model **in one batch**, each once. All pairs are
# formed from these few numbers, and a prompt's loss is the mean over its pairs. A prompt with many
# replies then counts no more than one with two.


# %% tags=["export"]
def bradley_terry(scores_N: Tensor, better_P: Tensor, worse_P: Tensor, share_P: Tensor) -> Tensor:
    """Return -ln P(the better one wins), weighted by each pair's share of the whole.

    Bradley and Terry (1952): a reply with mark a beats one with mark b with the probability
    sigmoid(a - b). `better_P` and `worse_P` are places in `scores_N`.
    """
    return -(F.logsigmoid(scores_N[better_P] - scores_N[worse_P]) * share_P).sum() / share_P.sum()


# %% tags=["export"]
class RewardBatch(NamedTuple):
    """All replies of some prompts: ids `[B, T]`, where to read, and the pairs among the rows."""

    ids_BT: Tensor
    last_B: Tensor
    better_P: Tensor
    worse_P: Tensor
    share_P: Tensor


def collate(groups: Sequence[Group], pad: int) -> RewardBatch:
    """Put every reply into one row; pairs become pairs of rows."""
    ids_BT, last_B = right_padded([tokens for group in groups for tokens in group.tokens], pad)
    better: list[int] = []
    worse: list[int] = []
    share: list[float] = []
    first = 0
    for group in groups:
        better += [first + one for one, _ in group.pairs]
        worse += [first + two for _, two in group.pairs]
        share += group.weights
        first += len(group.tokens)
    return RewardBatch(
        ids_BT, last_B, torch.tensor(better), torch.tensor(worse), torch.tensor(share)
    )


# %% [markdown]
# `Group` and `tokenize_groups` come from `tinychat/data/groups.py`: the prompt in the template of
# chapter 09, and each reply behind it up to its `<|end|>`.

# %% tags=["test"]
three = torch.tensor([1.0, 0.5, -1.0])  # best first: the pairs differ by 0.5, 2.0 and 1.5
by_hand = sum(math.log(1 + math.exp(-d)) for d in (0.5, 2.0, 1.5)) / 3
pairs = torch.tensor([[0, 1], [0, 2], [1, 2]])
ours = bradley_terry(three, pairs[:, 0], pairs[:, 1], torch.full((3,), 1 / 3))
assert abs(ours.item() - by_hand) < 1e-6

# %% [markdown]
# ## Replies of our own model
#
# The rejected replies of the corpus are what somebody wrote as bad *on purpose*. Our model makes other
# mistakes: it repeats itself, never ends, or hands the question back. A judge that has never seen such
# replies may well like them, and chapter 12 would find that out at once. So let the model answer some
# prompts itself, several times each. These are **on-policy** samples. (*Policy* is what reinforcement
# learning calls a model that acts, chapter 12. On-policy means: its own doing, and not somebody
# else's.)
#
# Who ranks them? The written reply is better, that much is safe. Among the samples, a few plain rules
# decide. You find them in `tinychat/data/onpolicy.py`, and you can disagree with each. And among those
# that break no rule, the one that was drawn at the lowest temperature stands first: the words that a
# model itself holds for unlikely are where its replies fall apart.
#
# Each rule is there because a reward model went without it. One of ours had seen few samples, all from
# one temperature, and of sixteen replies it picked *"The oldricx cream barked"*: it had never learned
# that "oldricx" is no word, since nobody who writes a bad reply on purpose would make it up.

# %%
print("rules, worst first:", ", ".join(RULES))
asked = [Message("user", "what do cats eat for breakfast")]
for text, ended in (
    ("Mostly cat food, and now and then a mouse.", True),
    ("What do cats eat for breakfast", True),
    ("Cats eat cats eat cats eat cats eat cats eat.", True),
    ("Cats eat many things, and then they", False),
    ("Cats eat mousefish and catterpies.", True),
    ("<|user|> and dogs?", True),
    ("...", True),
):
    print(f"  {flaw_of(asked, text, ended) or 'fine':12} {text}")

# %%
sampled_from = parts["train"][: amount(40, 16, 4)] + parts["validation"][: amount(40, 16, 4)]
ways = [
    Sampling(temperature=temperature, max_tokens=amount(40, 32, 12), seed=0)
    for temperature in (0.3, 0.7, 1.0)
]
sampled = sample_ranked(sft, tokenizer, sampled_from, ways)
shown = sampled[0]
print(f"the user: {shown.prompt[-1].content}")
for reply in shown.replies:
    kind = "written" if reply.rank == 0 else reply.flaw or "breaks no rule"
    print(f"  {reply.rank}. {kind:14} {reply.text!r}")
kinds: dict[str, int] = defaultdict(int)
for group in sampled:
    for reply in group.replies[1:]:
        kinds[reply.flaw or "breaks no rule"] += 1
print(dict(kinds))

# %% [markdown]
# Rules don't read. "What nice weather, the cake is a friend." breaks none of them. So readers marked
# replies of our chat model, from 0 (nonsense) to 4 (fully good): what a labelling company does for
# the large models, `tinychat/data/corpus/graded.jsonl` is for this one. (Its readers were large
# language models that followed a written guide, as in Bai et al. 2022; the data card says how.)
# Where the marks of two replies differ, one is better. These are prompts whose replies differ at all.

# %%
marked = corpus_graded()
print(f"{len(marked):,} prompts, {sum(len(group.pairs) for group in marked):,} pairs")
fresh = [group for group in marked if group.id.startswith("d15_fresh")]
for group in fresh[:3]:
    print(f"the user: {group.prompt[-1].content}")
    for reply in group.replies:
        print(f"  {reply.rank}. {reply.text}")

# %% [markdown]
# ## The right answer to another question
#
# One sort of bad reply is missing, and it is the most dangerous one. "I don't know. Tell me what you'd
# like." is polite, honest and whole, and a good reply to *some* questions. A judge that looks at the
# reply alone will like it everywhere. Then chapter 12 makes a model that says it to everything. (It
# did: the lab notes have the transcript.)
#
# So the judge must be made to read the question. Put under each prompt its own reply, and beside it
# the replies to two *other* prompts. Each reply is the better one as often as the worse one. Nothing in
# the reply itself can tell; only together with the prompt does it fit or not.

# %%
answered = by_part(corpus_answered())
foreign = mismatched([one for one in answered["train"] if not for_judge(one.prompt)])
unseen_foreign = mismatched(answered["validation"] + answered["test"])
print(f"{len(foreign)} prompts to learn from, {len(unseen_foreign)} held out")
for one in foreign[:2]:
    print(f"> {one.prompt[-1].content}")
    for reply in one.replies:
        print(f"  {reply.rank} {reply.flaw:8} {reply.text[:70]!r}")

# %% [markdown]
# The harder sort is a *near miss*: a reply of the same kind to another question, the capital of
# another country, the sound of another animal. It has the right form, the right length and a true
# sentence, and is wrong. The basics of chapter 10 give such pairs by a rule: the good reply takes up
# a rare word of its question ("Peru"), and the worse one of the same topic does not hold it.

# %%
simple = by_split(basics())["train"]
near = near_misses(simple)
for one in near[:3]:
    print(f"> {one.prompt[-1].content}")
    for reply in one.replies:
        print(f"  {reply.rank} {reply.flaw:8} {reply.text[:70]!r}")

# %% [markdown]
# A near miss is always an answer. So a judge can still learn that a *refusal* is never wrong, and a run
# of chapter 12 ended in "I can't know that." behind every other question. The cure is the same once
# more: a refusal and an answer change places. Each of the two is right behind its own question and
# wrong behind the other one, and each loses as often as it wins.

# %%
exchanged = refusals(simple)
print(f"{len(exchanged)} prompts")
for one in exchanged[:2]:
    print(f"> {one.prompt[-1].content}")
    for reply in one.replies:
        print(f"  {reply.rank} {reply.flaw:9} {reply.text[:70]!r}")

# %% tags=["test"]
for some in (foreign, exchanged):
    better, worse = Counter(), Counter()
    for one in some:
        for good, bad in one.pairs:
            better[one.replies[good].text] += 1
            worse[one.replies[bad].text] += 1
    assert sum(abs(better[text] - worse[text]) for text in better) <= 0.02 * better.total()

# %% [markdown]
# ## How good is a judge?
#
# Before you train anything, decide how you will measure it. The simplest number is the share of
# held-out pairs in the right order. Guessing gets half. But one number hides which faults the judge
# sees and which it doesn't, so there is also a table by flaw.


# %% tags=["export"]
class Judged(NamedTuple):
    """What a model said of one pair."""

    margin: float
    "mark of the better reply minus mark of the worse one: right where it is above 0"
    flaw: str
    "of the worse reply, where the better one has none"
    source: str


def score_groups(model: RewardModel, groups: Sequence[Group], pad: int) -> list[list[float]]:
    """Return the mark of every reply, group by group."""
    return regroup(score(model, [t for group in groups for t in group.tokens], pad), groups)


def regroup(marks_N: Tensor, groups: Sequence[Group]) -> list[list[float]]:
    """Cut one long list of marks into those of each group."""
    marks = iter(marks_N.tolist())
    return [list(islice(marks, len(group.tokens))) for group in groups]


def judge(groups: Sequence[Group], marks: Sequence[Sequence[float]]) -> list[Judged]:
    """Compare every pair of every group."""
    return [
        Judged(
            one[better] - one[worse],
            "" if group.ranked.replies[better].flaw else group.ranked.replies[worse].flaw,
            group.ranked.source,
        )
        for group, one in zip(groups, marks, strict=True)
        for better, worse in group.pairs
    ]


def accuracy(judged: Iterable[Judged]) -> float:
    """Return the share of pairs in the right order; equal marks are half right."""
    points = [0.5 if pair.margin == 0 else float(pair.margin > 0) for pair in judged]
    return sum(points) / len(points) if points else math.nan


def accuracy_by(
    judged: Iterable[Judged], key: Callable[[Judged], str]
) -> dict[str, tuple[float, int]]:
    """Return (accuracy, number of pairs) under each key, the largest number first."""
    sorted_by: dict[str, list[Judged]] = defaultdict(list)
    for pair in judged:
        sorted_by[key(pair)].append(pair)
    names = sorted(sorted_by, key=lambda name: -len(sorted_by[name]))
    return {name: (accuracy(sorted_by[name]), len(sorted_by[name])) for name in names}


def calibration(margins: Iterable[float], bins: int = 5) -> list[tuple[float, float, int]]:
    """Return (predicted, true, pairs) of each bin: how often does its favourite really win?

    A margin m says that the favourite wins with the probability sigmoid(|m|), from 0.5 up to 1.
    It must be a difference of raw marks, before normalising.
    """
    found: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for margin in margins:
        sure = 1 / (1 + math.exp(-min(abs(margin), 50.0)))
        won = 0.5 if margin == 0 else float(margin > 0)
        found[min(bins - 1, int((sure - 0.5) * 2 * bins))].append((sure, won))
    means = {number: np.mean(pairs, axis=0) for number, pairs in sorted(found.items())}
    return [(float(m[0]), float(m[1]), len(found[number])) for number, m in means.items()]


def length_correlation(groups: Sequence[Group], marks: Sequence[Sequence[float]]) -> float:
    """Return the correlation of mark and log length among the best replies of all prompts.

    They are equally good, so a model that looks at quality alone comes to about 0.
    """
    best = [
        (one[n], math.log1p(len(group.tokens[n]) - group.start))
        for group, one in zip(groups, marks, strict=True)
        for n, reply in enumerate(group.ranked.replies)
        if reply.rank == 0
    ]
    values = np.array(best).T
    if len(best) < 2 or not values.std(axis=1).all():
        return 0.0
    return float(np.corrcoef(values)[0, 1])


# %% [markdown]
# A number needs something to stand beside it. How far do you get with *words alone*? The next cell
# gives each token a weight, and a reply the sum of the weights of the tokens in it (a **bag of
# words**). Each token counts once, and the sum is divided by the root of their number, so that a long
# reply is less ahead by its length. No order, no prompt, no network. What that reaches is no achievement
# of your reward model.


# %% tags=["export"]
def bag_of_words(
    groups: Sequence[Group], vocab_size: int, *, decay: float = 3e-3, steps: int = 200
) -> Tensor:
    """Return a weight for each token `[V]`: the best that words alone can do (a baseline).

    Logistic regression on which tokens a reply has. It sees no order and no prompt.
    """
    batch = collate(groups, pad=0)
    weight_V = torch.zeros(vocab_size, requires_grad=True)
    optimizer = torch.optim.Adam([weight_V], lr=0.02)
    bags = Bags.of(groups)
    for _ in range(steps):
        scores_N = bags.scores(weight_V)
        loss = bradley_terry(scores_N, batch.better_P, batch.worse_P, batch.share_P)
        (loss + decay * weight_V.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weight_V.detach()


class Bags(NamedTuple):
    """Which tokens the N replies of some groups have: M pairs of a token and a reply."""

    tokens_M: Tensor
    rows_M: Tensor
    share_M: Tensor
    "one over the root of the number of different tokens in the reply"
    replies: int

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Self:
        replies = [set(tokens[group.start :]) for group in groups for tokens in group.tokens]
        sizes_N = torch.tensor([len(reply) for reply in replies])
        rows_M = torch.arange(len(replies)).repeat_interleave(sizes_N)
        tokens_M = torch.tensor([token for reply in replies for token in sorted(reply)])
        return cls(tokens_M, rows_M, sizes_N.float().rsqrt()[rows_M], len(replies))

    def scores(self, weight_V: Tensor) -> Tensor:
        """Return the sum of each reply's weights over the root of their number, `[N]`."""
        parts_M = weight_V[self.tokens_M] * self.share_M
        return torch.zeros(self.replies).index_add(0, self.rows_M, parts_M)


def bag_scores(weight_V: Tensor, groups: Sequence[Group]) -> list[list[float]]:
    """Return the baseline's mark of every reply, group by group."""
    return regroup(Bags.of(groups).scores(weight_V), groups)


# %%
SEQUENCE = 256


def tokenized(ranked: Sequence[Ranked]) -> list[Group]:
    return tokenize_groups(ranked, tokenizer, sequence=SEQUENCE)


mine = [group for group in parts["train"] if not for_judge(group.prompt)]
train = tokenized(mine[: amount(3000, 3000, 40)])
held_out = tokenized((parts["validation"] + parts["test"])[: amount(240, 80, 12)])
words = bag_of_words(train, tokenizer.vocab_size)
by_words = judge(held_out, bag_scores(words, held_out))
print(f"{len(train)} prompts to learn from, {len(held_out)} held out")
print(f"words alone: {accuracy(judge(train, bag_scores(words, train))):.0%} of the training pairs")
print(f"             {accuracy(by_words):.0%} of {len(by_words)} held-out pairs")
order = words.argsort()
print("bad signs: ", ", ".join(repr(tokenizer.piece(int(id))) for id in order[:12]))
print("good signs:", ", ".join(repr(tokenizer.piece(int(id))) for id in order.flip(0)[:12]))

# %% [markdown]
# Surprised? Look at the signs. Whoever writes a bad reply on purpose writes it in another manner, and
# the manner shows. That is a weakness of every preference set that was made up rather than collected:
# a model may learn the manner in place of the matter. Keep the line in mind when you read your own
# model's result below.
#
# ## The training loop
#
# The parts come from chapter 07: the optimizers, the schedule, a state that survives being killed. New
# is only what a batch is, and its loss.


# %% tags=["export"]
@dataclass(frozen=True)
class RewardConfig:
    """What decides a reward model's training besides the model and the ranked replies."""

    epochs: float = 1.0
    "readings of all prompts; more are soon learned by heart"
    batch: int = 16
    "prompts a step, each with all its replies"
    sequence: int = 384
    "longest prompt and reply in tokens"
    replies: int = 6
    "most replies of one prompt"
    matrix_lr: float = 1e-3
    "Muon's peak rate"
    vector_lr: float = 3e-4
    "AdamW's peak rate for embeddings, norms and the head"
    warmup: float = 0.05
    "share of the steps in which the rates rise"
    decay: float = 0.9
    "share of the steps, at the end, in which the rates fall to zero"
    clip: float = 1.0
    "largest norm of the whole gradient"
    words: float = 0.3
    "how loudly the word weights speak beside the network; 0 silences them"
    surety: float = 2.0
    "what a nat a token of the network's own log-probability counts; 0 leaves it out"
    seed: int = 0
    "decides the head's first weights and the order of the prompts"
    precision: str = "auto"
    "bf16 or fp32 matrix products; auto takes bf16 where the machine is fast at it"
    save_minutes: float = 3.0
    "time between saved states"
    evaluate_every: int = 50
    "steps between looks at held-out pairs"

    def __post_init__(self) -> None:
        if not 0 < self.epochs < math.inf:
            raise ConfigError(f"epochs is {self.epochs}; it must be a number above 0.")
        if self.replies < 2:
            raise ConfigError(f"replies is {self.replies}; a comparison needs at least 2.")
        if not 0 <= self.words < math.inf:
            raise ConfigError(f"words is {self.words}; it must be 0 or a number above it.")
        if not 0 <= self.surety < math.inf:
            raise ConfigError(f"surety is {self.surety}; it must be 0 or a number above it.")
        self.loop()  # the loop refuses everything else that makes no sense

    def loop(self) -> TrainConfig:
        """The same settings for the parts of chapter 07's loop."""
        shared = asdict(self)
        for name in ("epochs", "replies", "words", "surety"):
            del shared[name]
        return TrainConfig(**shared, compiled=False)


# %% tags=["export"]
def neutral(model: RewardModel) -> None:
    """Let the model give its raw numbers: what training compares."""
    model.mean.fill_(0.0)
    model.deviation.fill_(1.0)
    model.length_slope.fill_(0.0)


# %% tags=["export"]
class RewardLoss:
    """The loss of a batch, in the form that chapter 07's `train_step` calls."""

    def __init__(self, model: RewardModel, dtype: torch.dtype):
        self.model, self.dtype = model, dtype

    def __call__(self, batch: RewardBatch) -> Tensor:
        here = RewardBatch(*(part.to(self.model.device) for part in batch))
        with torch.autocast(
            self.model.device.type, self.dtype, enabled=self.dtype != torch.float32
        ):
            scores_B = self.model(here.ids_BT, last_B=here.last_B)
        return bradley_terry(scores_B, here.better_P, here.worse_P, here.share_P)


def fit_reward(
    model: RewardModel,
    groups: Sequence[Group],
    config: RewardConfig,
    folder: str | Path,
    *,
    pad: int,
    minutes: float = 0.0,
    validation: Sequence[Group] = (),
    resume: bool = False,
    on_step: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Train `model` in place on ranked replies, and keep the run's state in `folder`.

    Runs for `config.epochs` or, where `minutes` end sooner, as many steps as fit into them. A run
    that was killed and is called again with `resume=True` goes on to the same numbers. The
    validation accuracy goes into metrics.jsonl. Raises ConfigError when `folder` holds a run.
    """
    folder, started = Path(folder), time.monotonic()
    stream = GroupBatches(groups, config.batch, config.seed)
    all_steps = max(1, round(config.epochs * len(groups) / config.batch))
    # 1. The optimizers of chapter 07; the head joins the vectors.
    optimizers = make_optimizers(model.gpt, config.loop())
    head: dict[str, Any] = {"params": [model.head.weight], "weight_decay": 0.0}
    optimizers[1].add_param_group(head | {"lr": config.vector_lr, "peak_lr": config.vector_lr})
    loss_function: Any = RewardLoss(model, config.loop().dtype)
    inside = cast(Any, model)  # the state is packed by parameter names, whatever the module
    # 2. Take up the saved state, or begin.
    saved = load_state(folder)
    if saved is not None and not resume:
        raise ConfigError(
            f"{folder} already holds a run; add --resume to go on with it, "
            "or choose another name with --run."
        )
    step, tokens, before, loss, steps = 0, 0, 0.0, math.nan, all_steps
    if saved is not None:
        unpack_state(saved[0], inside, optimizers)
        step, tokens, before = saved[1]["step"], saved[1]["tokens"], saved[1]["seconds"]
        loss = saved[1]["loss"]
        steps = steps if minutes or not saved[1]["by_time"] else saved[1]["steps"]
    budget = Budget(minutes, 0 if minutes else steps)
    neutral(model)

    def save() -> None:
        scalars: dict[str, Any] = {"step": step, "steps": budget.steps, "tokens": tokens}
        scalars |= {"seconds": before + time.monotonic() - started, "config": asdict(config)}
        scalars |= {"loss": loss, "by_time": budget.steps < all_steps}
        save_state(folder, pack_state(inside, optimizers), scalars)

    last_save, stopped = time.monotonic(), False
    recent: deque[float] = deque(maxlen=50)
    with MetricsWriter(folder / "metrics.jsonl", resume_step=step) as writer:
        batches = stream.batches(step)
        while step < min(budget.steps, steps) and not stopped:
            begun = time.monotonic()
            # 3. One step.
            factor = min(1.0, (step + 1) / 100)
            if budget.known:
                factor = schedule(step, budget.steps, config.warmup, config.decay)
            batch = collate(next(batches), pad)
            loss, norm = train_step(
                loss_function, optimizers, cast(Any, [batch]), factor=factor, clip=config.clip
            )
            step += 1
            read = int(batch.last_B.sum()) + len(batch.last_B)
            tokens += read
            seconds = time.monotonic() - begun
            # 4. Measure and report.
            row: dict[str, Any] = {"step": step, "loss": loss, "tokens": tokens, "norm": norm}
            row |= {"lr": factor, "seconds": seconds}
            if validation and (step % config.evaluate_every == 0 or step == budget.steps):
                row["accuracy"] = accuracy(judge(validation, score_groups(model, validation, pad)))
            writer.write(row)
            recent.append(seconds)  # batches differ in length
            typical = float(np.median(recent))
            left = (budget.steps - step) * typical if budget.known else math.nan
            on_step(Progress(step, budget.steps, loss, tokens, read / seconds, left, {}))
            # 5. Stop when asked to, know the budget, save.
            stopped = should_stop()
            if not budget.known:
                budget.times.append(seconds)
                if stopped or len(budget.times) == budget.TRIAL:
                    budget.settle(step, time.monotonic() - started)
                    budget.steps = min(budget.steps, steps)
            if budget.known and time.monotonic() - last_save > config.save_minutes * 60:
                save()
                last_save = time.monotonic()
    budget.steps = min(budget.steps, steps)
    save()
    return Result(step, budget.steps, tokens, before + time.monotonic() - started, loss, {})


# %% [markdown]
# ## Shuffled pairs against whole prompts
#
# Is the remedy worth it? Train twice, on the same few prompts with many replies each (the written
# one, the corpus's worse ones, and the samples). Once each pair is an example of its own, with all
# pairs shuffled. Once all pairs of a prompt go together. Both see every pair the same number of times, in
# about as many steps.

# %%
by_id: dict[str, list[Ranked]] = defaultdict(list)
for group in sampled:
    by_id[group.id].append(group)


def many_replies(ranked: Sequence[Ranked]) -> list[Group]:
    """The corpus's replies and, below them, the samples: one order for all."""
    merged = []
    for group in ranked:
        for more in by_id[group.id]:
            worst = group.replies[-1].rank
            below = tuple(replace(reply, rank=reply.rank + worst) for reply in more.replies[1:])
            merged.append(replace(group, replies=group.replies + below))
    return tokenized(merged)


def as_pairs(groups: Sequence[Group]) -> list[Group]:
    """Every pair as a group of its own: the naive way."""
    return [
        replace(
            group,
            tokens=(group.tokens[better], group.tokens[worse]),
            ranked=replace(
                group.ranked, replies=(group.ranked.replies[better], group.ranked.replies[worse])
            ),
            pairs=((0, 1),),
            weights=(1.0,),
        )
        for group in groups
        for better, worse in group.pairs
    ]


def mean_loss(model: RewardModel, groups: Sequence[Group]) -> float:
    """The loss over all pairs, a prompt counting once."""
    marks = [mark for one in score_groups(model, groups, PAD) for mark in one]
    batch = collate(groups, PAD)
    return float(bradley_terry(torch.tensor(marks), batch.better_P, batch.worse_P, batch.share_P))


few, unseen = many_replies(parts["train"]), many_replies(parts["validation"])
PLAIN = RewardConfig(epochs=2, batch=4, sequence=SEQUENCE, precision="fp32", warmup=0.1)
EPOCHS = amount(2, 2, 1)


def watched(groups: list[Group], batch: int) -> list[tuple[int, float, float]]:
    """Train a fresh reward model; returns (epoch, loss on what it reads, loss on the unseen)."""
    torch.manual_seed(0)
    model = RewardModel(copy.deepcopy(sft), tokenizer.assistant_id)
    config = replace(PLAIN, batch=batch, epochs=EPOCHS, decay=0.0, warmup=0.0)
    found: list[tuple[int, float, float]] = []

    def look(progress: Progress) -> None:
        if progress.step * EPOCHS // progress.steps > len(found):
            found.append((len(found) + 1, mean_loss(model, few), mean_loss(model, unseen)))

    with tempfile.TemporaryDirectory() as folder:
        fit_reward(model, groups, config, folder, pad=PAD, on_step=look)
    return found


pairs_of_few = as_pairs(few)
replies_of_few = sum(len(group.tokens) for group in few)
print(
    f"{len(few)} prompts, {replies_of_few} replies, {len(pairs_of_few)} pairs; {len(unseen)} unseen"
)
alike = round(4 * len(pairs_of_few) / len(few))  # pairs a step, for as many steps as 4 prompts make
runs = {"shuffled pairs": watched(pairs_of_few, alike), "whole prompts": watched(few, 4)}
cost = {"shuffled pairs": 2 * len(pairs_of_few), "whole prompts": replies_of_few}
print("                 epoch  replies read  loss on read  on unseen  gap")
for name, table in runs.items():
    for epoch, read, other in table:
        print(
            f"{name:>15} {epoch:6} {epoch * cost[name]:13} {read:13.3f} {other:10.3f} {other - read:5.2f}"
        )

# %% [markdown]
# Compare the two after the same number of epochs. Look at the **gap** between the loss on what was
# read and the loss on unseen prompts: that is learning by heart. And look at what it cost, in replies
# read. With more data the first epoch's gap is smaller for both, but the cost stays.
#
# ## The run
#
# Now the reward model's half of the training prompts (the other half is kept for a second one, under
# "Somebody else to judge"), and the samples of the prompts among them.
# `TINYCHAT_MINUTES` gives it more time; two epochs are the most, since the gap grows with each.

# %%
minutes = float(os.environ.get("TINYCHAT_MINUTES") or (1 if FAST else 30) / 60)
torch.manual_seed(0)
model = RewardModel(copy.deepcopy(sft), tokenizer.assistant_id)
allowed = {group.id for group in mine}
data = train + tokenized([group for group in sampled if group.id in allowed])
data += tokenized(foreign[: amount(1600, 1600, 8)])
log: list[Progress] = []
config = replace(PLAIN, batch=8)
with tempfile.TemporaryDirectory() as folder:
    result = fit_reward(
        model, data, config, folder, pad=PAD, minutes=minutes, on_step=log.append
    )  # fmt: skip
model.eval()
tenth = max(1, len(log) // 10)
print(f"{result.steps} steps, {result.steps * config.batch / len(data):.2f} readings of the data")
for number in range(0, len(log), tenth):
    some = [progress.loss for progress in log[number : number + tenth]]
    mean = sum(some) / len(some)
    print(f"step {log[number].step:4}: loss {mean:.3f} {'#' * round(40 * mean)}")

# %%
marks = score_groups(model, held_out, PAD)
judged = judge(held_out, marks)
table = accuracy_by((pair for pair in judged if pair.flaw), lambda pair: pair.flaw)
baseline = accuracy_by((pair for pair in by_words if pair.flaw), lambda pair: pair.flaw)
print(f"{'':14} pairs  model  words")
print(f"{'all pairs':14} {len(judged):5} {accuracy(judged):6.0%} {accuracy(by_words):6.0%}")
for flaw, (share, count) in table.items():
    print(f"{flaw:14} {count:5} {share:6.0%} {baseline[flaw][0]:6.0%}")
others = tokenized(unseen_foreign[: amount(120, 60, 12)])
fits = judge(others, score_groups(model, others, PAD))
by_bag = judge(others, bag_scores(words, others))
print(f"{'own or foreign':14} {len(fits):5} {accuracy(fits):6.0%} {accuracy(by_bag):6.0%}")

# %% [markdown]
# Read it with its counts: a line with five pairs says next to nothing. The faults of *form* are easy
# (rude, rambling, repetitive). `wrong` is another matter. To see that a reply is wrong, a judge must
# know what is right, and a small model knows little. Where it does well there, ask the last column
# whether it was knowledge. The last line tells whether the question was read: words alone must stay
# near 50 % there.
#
# And where words alone are ahead, they are ahead. A short run of a small network on a small set loses
# to a good baseline more often than books admit.
#
# ## Two opinions
#
# So is the network of no use? Ask *where* each of the two is wrong. If they fail on different pairs,
# one can outvote the other's mistakes. That is the idea of an **ensemble**, and it needs nothing but
# mistakes that differ. Ours have reason to: one reads order and question, the other sees neither and
# is hard to confuse. (Cheng et al. 2016 put a wide, simple part beside a deep one for the same reason;
# Coste et al. 2023 use ensembles against reward hacking.)

# %%
both = [
    (mine.margin > 0, its.margin > 0) for mine, its in zip(judged, by_words, strict=True)
]  # fmt: skip
print("            words right  words wrong")
for name, right in (("model right", True), ("model wrong", False)):
    counts = [sum(pair == (right, words_right) for pair in both) for words_right in (True, False)]
    print(f"{name:11} {counts[0]:12} {counts[1]:12}")

# %% [markdown]
# Where one is right and the other wrong, the surer one should win. So the two marks are added, after
# both were put on one scale: the deviation of their marks over good replies. The word weights get
# less than the network (0.6 here, 0.3 in `tinychat train reward`), since words are easily put into a reply
# by a policy that looks for high marks.


# %% tags=["export"]
def add_words(
    model: RewardModel,
    weight_V: Tensor,
    references: Sequence[Sequence[int]],
    pad: int,
    *,
    share: float = 0.6,
) -> None:
    """Let word weights `[V]` have a say in the mark, beside the network's.

    Over `references`, good replies that were not trained on, their deviation becomes `share` times
    the network's. Call `normalize` afterwards.
    """
    neutral(model)
    model.words.zero_()
    of_network_N = score(model, references, pad)
    model.words.copy_(weight_V)
    ids_BT, last_B = (t.to(model.device) for t in right_padded(references, pad))
    of_words_N = model.word_marks(ids_BT, last_B)
    model.words *= share * float(of_network_N.std()) / max(float(of_words_N.std()), 1e-6)


# %%
strangers = tokenized([g for g in parts["train"] if for_judge(g.prompt)][: amount(150, 60, 12)])
good_ones = [group.tokens[0] for group in strangers]
print("words' share  held-out pairs right  correlation with length")
for share in (0, 0.6, 2):
    add_words(model, words, good_ones, PAD, share=share)
    blended = score_groups(model, held_out, PAD)
    right, length = accuracy(judge(held_out, blended)), length_correlation(held_out, blended)
    print(f"{share:12} {right:21.1%} {length:+24.2f}")
add_words(model, words, good_ones, PAD)
marks = score_groups(model, held_out, PAD)
judged = judge(held_out, marks)

# %% tags=["test"]
ids_BT, last_B = right_padded([group.tokens[0] for group in held_out], PAD)
torch.testing.assert_close(
    model.word_marks(ids_BT, last_B),
    torch.tensor([one[0] for one in bag_scores(model.words, held_out)]),
    atol=1e-4,
    rtol=1e-4,
)

# %% [markdown]
# From here on, `model` is the two together.
#
# A second *network* is another opinion too, if it saw other samples or the same ones in another order.
# But asking two costs twice the time, on every reply of chapter 12. There is a cheaper way that works
# surprisingly often: average their **weights**, each with its twin, and ask the one network that comes
# out (Ramé et al. 2024). That would be nonsense for two networks from different starts: weight 17 of
# one has nothing to do with weight 17 of the other. But both of ours begin with the same chat model
# and the same head, and a short training moves them not far apart. On the way they learn what the
# data say, in common, and each its own noise. The average keeps the first and halves the second.


# %% tags=["export"]
def average_weights(model: RewardModel, others: Sequence[RewardModel]) -> None:
    """Give `model` the mean of its own weights and those of `others` (Ramé et al. 2024).

    All must have begun with the same weights. Call `add_words` and `normalize` afterwards. Raises
    ConfigError where the shapes differ.
    """
    sizes = {one.gpt.config for one in (model, *others)}
    if len(sizes) > 1:
        raise ConfigError("Only reward models that began with the same chat model can be averaged.")
    with torch.no_grad():
        for weight, *theirs in zip(*(one.parameters() for one in (model, *others)), strict=True):
            weight.copy_(torch.stack([weight, *(t.to(weight) for t in theirs)]).mean(dim=0))


# %%
def trained(order: int) -> RewardModel:
    """A short training, from the same chat model and head, in an order of its own."""
    torch.manual_seed(0)
    fresh = RewardModel(copy.deepcopy(sft), tokenizer.assistant_id)
    settings = replace(config, epochs=1, seed=order)
    with tempfile.TemporaryDirectory() as folder:
        some = data[:8] if FAST else data
        fit_reward(fresh, some, settings, folder, pad=PAD, minutes=(0.2 if FAST else 4) / 60)
    return fresh.eval()


one, two = trained(1), trained(2)
mean = copy.deepcopy(one)
average_weights(mean, [two])
theirs = {"one": one, "the other": two, "mean of the weights": mean}
fewer = held_out[:80]
marks_of = {name: score_groups(network, fewer, PAD) for name, network in theirs.items()}
marks_of["mean of the marks"] = [
    [(a + b) / 2 for a, b in zip(*pair, strict=True)]
    for pair in zip(marks_of["one"], marks_of["the other"], strict=True)
]
for name, its_marks in marks_of.items():
    print(f"{name:20} {accuracy(judge(fewer, its_marks)):6.1%} of held-out pairs right")
for a, b in (("one", "the other"), ("mean of the weights", "mean of the marks")):
    together = torch.stack([torch.tensor(sum(marks_of[name], [])) for name in (a, b)])
    print(f"{a} and {b}: correlation {float(torch.corrcoef(together)[0, 1]):.3f}")

# %% [markdown]
# A few seconds teach such networks next to nothing, so don't read much into the upper lines. Compare the
# last two: one network with averaged weights says nearly what the two say on average, more nearly than
# the two agree with each other. `tinychat train reward --average FILE` does this with an earlier reward model, so that a
# new round of training doesn't forget what the last one knew.
#
# It pays most where the two have learned different things. One of our reward models had read eight thousand
# exchanged replies: it put 90 % of near misses in order, and 74 % of the pairs that readers had marked. Its
# twin had read nine hundred: 84 % and 77 %. The mean of their weights has 88 % and 78 % (lab notes,
# 2026-11-23; `--exchanged N` sets how many).
#
# ## Does it fit the question?
#
# Look back at the line *own or foreign*. A small reward model hardly learns to read the question, even
# from examples that ask for nothing else. But you have a model that was trained on exactly this: the
# chat model. It knows which reply is *likely* behind which question. How much likelier is a reply
# behind its own question than behind a blank one? In nats a token, that estimates the **pointwise mutual
# information** of question and reply (Li et al. 2016). "I don't know. Tell me what you'd like." is as
# likely behind anything, and gets about zero.


# %% tags=["export"]
@torch.no_grad()
def mean_logprobs(
    gpt: GPT,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    pad: int,
    batch: int = 32,
) -> Tensor:
    """Return the mean log-prob of each reply's tokens behind its prompt, `[N]`, in float32."""
    order = sorted(range(len(replies)), key=lambda n: len(prompts[n]) + len(replies[n]))
    mean_N = torch.zeros(len(replies))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        ids_BT, last_B = right_padded([[*prompts[n], *replies[n]] for n in rows], pad)
        places_T = torch.arange(ids_BT.shape[1])
        first_B = torch.tensor([len(prompts[n]) for n in rows])
        # The vector at one place predicts the token at the next.
        asked_BT = (places_T >= first_B[:, None] - 1) & (places_T < last_B[:, None])
        rows_N, _ = asked_BT.nonzero(as_tuple=True)
        h_ND = gpt.hidden(ids_BT.to(gpt.device))[asked_BT.to(gpt.device)].float()
        next_N = ids_BT.roll(-1, 1)[asked_BT].to(gpt.device)
        logprobs_NV = (h_ND @ gpt.embed.weight.float().T).log_softmax(-1)
        logprobs_N = logprobs_NV.gather(1, next_N[:, None])[:, 0].cpu()
        sums_B = torch.zeros(len(rows)).index_add(0, rows_N, logprobs_N)
        mean_N[rows] = sums_B / (last_B - first_B + 1)
    return mean_N


def prompts_and_replies(
    groups: Sequence[Group],
) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """Return the prompt and the reply of every text, in order; `regroup` puts numbers back."""
    prompts: list[Sequence[int]] = [
        group.tokens[0][: group.start] for group in groups for _ in group.tokens
    ]
    replies: list[Sequence[int]] = [
        tokens[group.start :] for group in groups for tokens in group.tokens
    ]
    return prompts, replies


def group_logprobs(gpt: GPT, groups: Sequence[Group], pad: int) -> list[list[float]]:
    """Return `gpt`'s mean log-prob a token of every reply, group by group."""
    return regroup(mean_logprobs(gpt, *prompts_and_replies(groups), pad), groups)


def question_fit(
    gpt: GPT,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    blank: Sequence[int],
    pad: int,
    batch: int = 32,
) -> Tensor:
    """Return how well each reply fits its prompt, `[N]`, in nats a token of the reply.

    By a chat model: log p(reply | prompt) - log p(reply | blank prompt) (Li et al. 2016).
    """
    behind_blank_N = mean_logprobs(gpt, [blank] * len(replies), replies, pad, batch)
    return mean_logprobs(gpt, prompts, replies, pad, batch) - behind_blank_N


# %%
blank = render_prompt((Message("user", "..."),), tokenizer, context=SEQUENCE, reserve=8)


def fits_in(groups: Sequence[Group]) -> list[list[float]]:
    """The fit of every reply, group by group."""
    return regroup(question_fit(sft, *prompts_and_replies(groups), blank, PAD), groups)


fit_of = fits_in(others)
own_fit = torch.tensor([one[0] for one in fit_of])
foreign_fit = torch.tensor([value for one in fit_of for value in one[1:]])
print(f"nats a token: own replies {own_fit.mean():+.2f}, foreign ones {foreign_fit.mean():+.2f}")
print(
    f"own or foreign: {accuracy(judge(others, fit_of)):.0%} right by fit, {accuracy(fits):.0%} by marks"
)
print(f"ranked replies: {accuracy(judge(fewer, fits_in(fewer))):.0%} right by fit")

# %% tags=["test"]
some = others[0]
alone = question_fit(
    sft, [some.tokens[0][: some.start]], [some.tokens[0][some.start :]], blank, PAD
)
assert abs(float(alone) - fit_of[0][0]) < 1e-4, "neighbours in the batch change nothing"
assert question_fit(sft, [blank], [some.tokens[0][some.start :]], blank, PAD).abs() < 1e-4

# %% [markdown]
# Fit tells whether a reply belongs to the question, and next to nothing about how good it is. So it must
# not become a goal: the best-fitting reply hands the question back. Chapter 12 shows it as a *condition*
# (`--fit`, off unless asked for): a reply that fits worse than written ones do loses marks, and one that
# fits better gains nothing.
#
# ## What the writer knows
#
# There is a last exam, and we found it late. Most of the pairs above were written on purpose, or set a
# written reply against one of our model's. Chapter 12 will ask for something else: of several replies of the
# *same model*, which is the best? The readers' marks can tell, on prompts that were held out. Let three
# sit the exam: words alone, the marks that you have just trained, and the chat model, which never saw a
# pair. Its opinion of a reply is the mean log-prob of the reply's tokens: how sure it would have been.

# %%
of_readers = by_part(marked)
exam = tokenized((of_readers["validation"] + of_readers["test"])[: amount(138, 60, 8)])
exam_marks = {
    "words alone": bag_scores(words, exam),
    "our marks": score_groups(model, exam, PAD),
    "log-prob of the chat model": group_logprobs(sft, exam, PAD),
}
print(f"{len(exam)} held-out prompts, in the readers' order:")
for name, its_marks in exam_marks.items():
    print(f"{name:30} {accuracy(judge(exam, its_marks)):6.1%} of pairs")

# %% [markdown]
# The writer beats the judge that was trained to judge (with our shipped model at any rate, lab notes). A
# language model gets a lesson from every token of every text. A reward model gets one bit from a pair
# of replies, and there are few of them. Whatever makes a reply fall apart, the writer has felt it
# already, in the tokens that surprised it.
#
# So let the judge begin there. Chapter 10 left a network that can *predict* replies, and we kept its
# body and threw that skill away. Keep it: the mark becomes
#
# $$\text{raw} = \text{head}(h_\text{last}) + \text{words} + \frac{\text{surety}}{n} \sum_{t=1}^{n} \log p(\text{token}_t \mid \text{prompt}, \text{token}_{<t})$$
#
# with the head at zero when training starts, `surety` a fixed number, and `words` the second opinion of
# above, zero while the network trains. The first marks are then the chat
# model's own opinion, and pairs teach what to change about it: in the head and, through p, in every
# weight. That a language model is a reward model in disguise is the idea of Rafailov et al. 2023, and
# Meng et al. 2024 take the mean over the tokens, as here, so that length alone earns nothing.

# %% tags=["test"]
beginner = RewardModel(copy.deepcopy(sft), tokenizer.assistant_id, surety=2.0).eval()
some = exam[:4]
pairs_of_marks = zip(score_groups(beginner, some, PAD), group_logprobs(sft, some, PAD), strict=True)
for first, sure in pairs_of_marks:
    torch.testing.assert_close(torch.tensor(first), 2 * torch.tensor(sure), atol=1e-3, rtol=0)

# %%
lessons = tokenized(
    [g for g in of_readers["train"] if not for_judge(g.prompt)][: amount(1500, 1500, 24)]
)
print(f"{len(lessons)} prompts to learn from")
print("begins with    before    after")
for name, surety in (("a random head", 0.0), ("its log-prob", 2.0)):
    torch.manual_seed(0)
    pupil = RewardModel(copy.deepcopy(sft), tokenizer.assistant_id, surety)
    first = accuracy(judge(exam, score_groups(pupil.eval(), exam, PAD)))
    once = replace(config, epochs=1)
    with tempfile.TemporaryDirectory() as folder:
        fit_reward(pupil.train(), lessons, once, folder, pad=PAD, minutes=minutes / 2)
    last = accuracy(judge(exam, score_groups(pupil.eval(), exam, PAD)))
    print(f"{name:13} {first:7.1%} {last:8.1%}")

# %% [markdown]
# A start that good leaves little to win in seconds. `tinychat train reward` trains with `surety=2`
# for longer, and reads the readers' marks twice, the rest once. It also takes no more than 300 of each kind
# of exchanged replies unless you say otherwise: with eight thousand of them, they drowned the marks (lab
# notes). The shipped one was made with `--exchanged 5000`: it reads the question more closely, and pays
# with a few points of the readers' marks. At its end the judge sits
# this exam, and another one with questions whose answer is written down: of the chat model's own answers,
# does it put the right ones first? Earlier reward models of ours did worse there than the log-prob, and PPO
# with them lost facts (lab notes). A good mark on last year's papers is no proof that you can do
# tomorrow's.
#
# ## Does it mean what it says?
#
# A difference of two marks stands for a probability: that is how the loss reads it. So you can ask: of
# all pairs where the model is about 80 % sure, is it right in 80 %? That is **calibration**. A model that
# is surer than it is right will mislead chapter 12, which takes every mark at its word. (Ours has two
# opinions in its mark, and their scale was chosen and not trained. All the more reason to look.)

# %%
bins = calibration(pair.margin for pair in judged)
print("says  is right  pairs")
for says, right, count in bins:
    print(f"{says:4.0%} {right:9.0%} {count:6} {'#' * round(30 * right)}")
error = sum(abs(says - right) * count for says, right, count in bins) / len(judged)
print(f"mean distance: {error:.1%}")


# %%
# alt: How often the model is right against how sure it is, beside the diagonal of a perfect judge.
def draw_calibration(plt: Any) -> Any:
    figure, axes = plt.subplots(figsize=(5, 4))
    axes.plot([0.5, 1], [0.5, 1], color="#808080", linestyle="--", label="as sure as right")
    says, right, sizes = zip(*bins, strict=True)
    axes.plot(says, right, color="C0", zorder=1)
    axes.scatter(says, right, s=[20 + 2 * size for size in sizes], color="C0", zorder=2)
    axes.set(xlabel="what the model says", ylabel="how often it is right", ylim=(0.3, 1.03))
    axes.legend()
    return figure


picture("11_calibration", draw_calibration)

# %% [markdown]
# *In the picture:* the share of pairs that the model got right, against the probability that it gave
# to its favourite; a larger dot stands for more pairs. On the dashed diagonal a judge is exactly as
# sure as it is right. Below it, it is too sure of itself; the table above has the same numbers.
#
# ## Longer is not better
#
# People who compare replies tend to like the longer one, and reward models learn it from them faster
# than anything else. Then a chat model that is trained on the marks writes longer and longer. Before you
# trust a judge, look at replies that are *equally good*: those that were written as the best for
# their prompts. Their marks should have nothing to do with their length.

# %%
print(
    f"correlation of mark and length, written replies: {length_correlation(held_out, marks):+.2f}"
)

# %% [markdown]
# Our corpus is nearly balanced: the better reply is the longer one in about half of its pairs. To see
# the disease properly, make it worse on purpose. The next cell keeps few of the pairs in which the
# shorter reply wins, then tries two cures.
#
# 1. **Balanced pairs**: while training, pairs with a shorter winner weigh so much more that both kinds
#    weigh the same in total.
# 2. **Regression**: train as always. Then draw a straight line through mark against log length, over
#    good replies, and take the line off every mark.


# %%
def longer_wins(group: Group, pair: tuple[int, int]) -> bool:
    return len(group.tokens[pair[0]]) > len(group.tokens[pair[1]])


def biased(groups: Sequence[Group], keep: float = 0.15) -> list[Group]:
    """Only some of the pairs with a shorter winner stay."""
    found = []
    for group in groups:
        pairs = tuple(
            pair
            for pair in group.pairs
            if longer_wins(group, pair) or zlib.crc32(repr(group.tokens[pair[0]]).encode()) % 100 < 100 * keep
        )  # fmt: skip
        if pairs:
            found.append(replace(group, pairs=pairs, weights=(1 / len(pairs),) * len(pairs)))
    return found


def balanced(groups: Sequence[Group]) -> list[Group]:
    """The same pairs; those with a longer and those with a shorter winner weigh the same."""
    total = {True: 0.0, False: 0.0}
    for group in groups:
        for pair, weight in zip(group.pairs, group.weights, strict=True):
            total[longer_wins(group, pair)] += weight
    return [
        replace(
            group,
            weights=tuple(
                weight / max(total[longer_wins(group, pair)], 1e-9)
                for pair, weight in zip(group.pairs, group.weights, strict=True)
            ),
        )
        for group in groups
    ]


# %% tags=["export"]
def normalize(
    model: RewardModel, references: Sequence[Sequence[int]], pad: int, *, cure_length: bool = True
) -> None:
    """Set the model's three numbers, so that good replies have mean 0 and deviation 1.

    `references` are texts with good replies that the model was not trained on. With `cure_length`,
    what their marks owe to their length (the slope of a straight line through mark against log
    length) is taken off first. Raises DataError for fewer than two.
    """
    if len(references) < 2:
        raise DataError("Normalising takes at least two reference replies; give more.")
    neutral(model)
    raw_N = score(model, references, pad).double()
    x_N = model.log_lengths(*right_padded(references, pad)).double()
    spread = float(x_N.var())
    if cure_length and spread > 0:
        slope = float(((x_N - x_N.mean()) * (raw_N - raw_N.mean())).sum() / (len(x_N) - 1) / spread)
        model.length_slope.fill_(slope)
        raw_N = raw_N - slope * x_N
    model.mean.fill_(float(raw_N.mean()))
    model.deviation.fill_(max(float(raw_N.std()), 1e-6))


# %%
def learned(groups: Sequence[Group]) -> RewardModel:
    """A short training from the same start."""
    torch.manual_seed(0)
    fresh = RewardModel(copy.deepcopy(sft), tokenizer.assistant_id)
    with tempfile.TemporaryDirectory() as folder:
        fit_reward(fresh, groups, replace(config, epochs=1), folder, pad=PAD, minutes=SHORT)
    return fresh.eval()


SHORT = (0.2 if FAST else 6) / 60
sick_data = biased(train[: amount(600, 120, 24)])
share = sum(longer_wins(g, p) for g in sick_data for p in g.pairs) / sum(
    len(g.pairs) for g in sick_data
)
print(f"the longer reply wins in {share:.0%} of the biased training pairs")
sick, treated = learned(sick_data), learned(balanced(sick_data))
found = {"biased": score_groups(sick, held_out, PAD)}
found["1. balanced pairs"] = score_groups(treated, held_out, PAD)
normalize(sick, good_ones, PAD)
found["2. regression"] = score_groups(sick, held_out, PAD)
print(f"{'':20} correlation with length   held-out pairs right")
for name, its_marks in found.items():
    right = accuracy(judge(held_out, its_marks))
    print(f"{name:20} {length_correlation(held_out, its_marks):+23.2f} {right:22.0%}")

# %% [markdown]
# Regression does what it says by construction: on the replies that the line was fitted to, the
# correlation is exactly zero, and on others it is small. It costs no training and works on whatever
# data you have. Balancing only takes the reason away, and what the model began with stays. So the
# package uses the regression. The price: where length *is* the fault (`toolong`, `tooshort`), the
# judge becomes a little blinder. Look at both columns.
#
# ## A zero and a yardstick
#
# Only differences were learned, so the marks of a fresh model may lie anywhere, and their spread
# depends on how long you trained. Chapter 12 wants numbers that mean the same every time. `normalize`,
# which you have just used, sets both: over good replies that were not trained on, the marks get mean
# 0 and deviation 1. A reply with 0 then has the mark of an average good one. (That is no verdict on
# replies of other kinds: with `surety` in the mark, a model's own fluent nonsense can have more, since
# people don't write what it expects.) All that happens to the raw number, in one line:
#
# $$\text{mark} = \frac{\text{raw} - \text{slope} \cdot \ln(1 + \text{tokens}) - \text{mean}}{\text{deviation}}$$

# %%
raw_deviation = float(score(model, good_ones, PAD).std())
normalize(model, good_ones, PAD)
good_marks = score(model, good_ones, PAD)
print(
    f"good replies, not trained on: mean {good_marks.mean():+.3f}, deviation {good_marks.std():.3f}"
)
marks = score_groups(model, held_out, PAD)
after = judge(held_out, marks)
print(f"held-out pairs right: {accuracy(judged):.1%} before, {accuracy(after):.1%} after")
print(f"correlation with length: {length_correlation(held_out, marks):+.2f}")
best = torch.tensor([one[0] for one in marks])
worse = torch.tensor([mark for one in marks for mark in one[1:]])
print(f"held-out replies: written {best.mean():+.2f}, rejected {worse.mean():+.2f} on average")

# %% tags=["test"]
assert abs(good_marks.mean().item()) < 1e-3 and abs(good_marks.std().item() - 1) < 1e-3

# %% [markdown]
# An average hides how much the two heaps overlap. So look at all marks.


# %%
# alt: Two overlapping heaps of marks of held-out replies: the written ones and the rejected ones.
def draw_marks(plt: Any) -> Any:
    figure, axes = plt.subplots(figsize=(7, 3.2))
    low, high = float(min(best.min(), worse.min())), float(max(best.max(), worse.max()))
    edges = np.linspace(low, high, 25)
    for heap, label in ((best, "written as good"), (worse, "rejected")):
        axes.hist(heap, edges, density=True, alpha=0.5, label=label)
    axes.set(xlabel="mark; 0 is an average good reply", ylabel="share", yticks=[])
    axes.legend()
    return figure


picture("11_marks", draw_marks)

# %% [markdown]
# Where the heaps overlap, a mark alone tells you little: a good reply to one question may have the mark
# of a bad one to another. The judge was only ever asked to compare replies to the *same* question. Keep
# that in mind when you read a single mark.

# %% [markdown]
# ## Somebody else to judge
#
# Chapter 12 will push the chat model towards high marks, and it will find every weakness of this
# judge. Marks from the same judge then prove nothing, as little as an exam that the pupil has seen
# before. So all training prompts were cut into two halves by a hash of the prompt. You trained on one.
# From the other, `tinychat train reward --judge` makes a second reward model that the chat model is
# never trained on. It only ever measures.

# %% tags=["test"]
for_the_judge = {prompt_key(g.prompt) for g in parts["train"] if for_judge(g.prompt)}
assert not for_the_judge & {prompt_key(group.prompt) for group in mine}
print(
    f"{len(mine)} prompts for the reward model, {len(for_the_judge)} for the judge, none for both"
)

# %% [markdown]
# ## Keep it
#
# A reward checkpoint is an SFT checkpoint with three more tensors: the head, the word weights, and four
# numbers: the three that `normalize` set, and `surety`. You can't chat with it: it reads and gives marks, and has nothing to say.


# %% tags=["export"]
def save_reward(
    path: str | Path,
    model: RewardModel,
    *,
    tokenizer: Tokenizer,
    lineage: Mapping[str, Any],
    metrics: Mapping[str, Any],
    quantize: Literal["int8", "bf16", "fp32"] = "int8",
) -> CheckpointInfo:
    """Write a checkpoint of the stage "reward": the GPT's weights and three more tensors."""
    extra = {
        "reward.head": model.head.weight[0],  # a vector, so that it stays float32 in int8 files
        "reward.words": model.words,
        "reward.numbers": torch.stack(
            [model.mean, model.deviation, model.length_slope, model.surety]
        ),
    }
    return checkpoint.save(
        path,
        stage="reward",
        config=asdict(model.gpt.config),
        state={**model.gpt.state_dict(), **extra},
        tokenizer=tokenizer.model,
        lineage=dict(lineage),
        metrics=dict(metrics),
        quantize=quantize,
    )


def load_reward(path: str | Path) -> tuple[RewardModel, Tokenizer, CheckpointInfo]:
    """Read a reward checkpoint; the model is in float32 and in evaluation mode.

    Raises CheckpointError in one sentence for whatever is wrong with the file.
    """
    loaded = checkpoint.load(path)
    info = loaded.info
    if info.stage != "reward":
        raise CheckpointError(
            f"{path} is of the stage {info.stage}, which gives no marks; "
            "name a reward checkpoint, or make one with `tinychat train reward`."
        )
    state = dict(loaded.state)
    head_D = state.pop("reward.head", torch.empty(0))
    numbers = state.pop("reward.numbers", torch.empty(0))
    words_V = state.pop("reward.words", torch.empty(0))
    shapes = head_D.shape, words_V.shape
    wanted = (info.config["width"],), (info.config["vocab_size"],)
    if shapes != wanted or numbers.shape != (4,) or not numbers[1] > 0:
        raise CheckpointError(
            f"{path}: the reward model's head is missing or misshapen; "
            "get or train the checkpoint again."
        )
    extra = sum(tensor.numel() for tensor in (head_D, numbers, words_V))
    rest = replace(info, parameters=info.parameters - extra)
    gpt, tokenizer = build_model(Checkpoint(rest, state, loaded.tokenizer))
    model = RewardModel(gpt, tokenizer.assistant_id)
    with torch.no_grad():
        model.head.weight.copy_(head_D)
    for buffer, value in zip(
        (model.mean, model.deviation, model.length_slope, model.surety), numbers, strict=True
    ):
        buffer.copy_(value)
    model.words.copy_(words_V)
    return model.eval(), tokenizer, info


# %%
saved = save_reward(
    "runs/book/reward.safetensors",
    model,
    tokenizer=tokenizer,
    lineage={
        "parent": parent,
        "data": {"dialogues": {"licence": "CC0-1.0", "prompts": len(train)}},
        "tokens": result.tokens,
        "steps": result.steps,
        "minutes": round(result.seconds / 60, 2),
    },
    metrics={
        "accuracy": accuracy(after),
        "pairs": len(after),
        "baseline": accuracy(by_words),
        "length_correlation": length_correlation(held_out, marks),
    },
)
print(f"{saved.path}: {saved.bytes / 1e6:.1f} MB")
again, _, _ = load_reward(saved.path)
drift = (score(again, good_ones, PAD) - good_marks).abs().max()
print(f"largest change of a mark by storing it in eight bits: {drift:.3f}")

# %% [markdown]
# Let it mark a few replies to one question. It is a small model and a short run, so be fair, and don't
# expect to agree.


# %%
def mark(question: str, replies: Sequence[str]) -> list[float]:
    """The reward of each reply to a question."""
    ranked = Ranked(
        (Message("user", question),),
        tuple(Reply(text, n) for n, text in enumerate(replies)),
        source="here",
        id="here",
    )
    return score_groups(again, tokenized([ranked]), PAD)[0]


SAID = [
    "Bake it at 180 degrees for half an hour. What kind of cake is it?",
    "Why would you even ask that? Everybody knows it.",
    "cake cake cake cake cake cake cake cake",
    "I had cake once and I was there and it was nice and then I was there and it was a cake.",
]
for text, its in sorted(
    zip(SAID, mark("how long do i bake a cake", SAID), strict=True), key=lambda p: -p[1]
):
    print(f"{its:+.2f}  {text}")

# %% [markdown]
# If a real reward checkpoint is around, here is what it says of itself.

# %%
if shipped := find_first("reward"):
    card = checkpoint.read_info(shipped)
    print(f"{card.path}: {card.parameters / 1e6:.1f} M weights, from {card.lineage.get('parent')}")
    for key in ("accuracy", "pairs", "baseline", "length_correlation"):
        print(f"  {key}: {card.metrics.get(key, 'not recorded')}")
    for flaw, line in card.metrics.get("by_flaw", {}).items():
        print(f"  {flaw:14} {line}")
else:
    print("no shipped reward checkpoint here: `tinychat train reward` makes one")

# %% [markdown]
# ## Your own taste
#
# All of this learned the taste of whoever wrote the corpus. It can learn yours: compare replies in the
# terminal (`tinychat duel`), and give the file to `tinychat train reward --votes FILE`. Ties teach
# nothing: the loss only knows winners.
#
# ## Exercises
#
# **1. Intransitive tastes.** Bradley and Terry give each player one number. Suppose that A beats B, B
# beats C and C beats A, each in 90 of 100 games. Fit three numbers by gradient descent. What comes out,
# and what is the loss?

# %% tags=["solution"]
strength = torch.randn(3, generator=torch.Generator().manual_seed(0)).requires_grad_()
for _ in range(300):
    wins, alike = torch.tensor([[0, 1], [1, 2], [2, 0]]), torch.ones(3)
    loss = 0.9 * bradley_terry(strength, wins[:, 0], wins[:, 1], alike)
    loss = loss + 0.1 * bradley_terry(strength, wins[:, 1], wins[:, 0], alike)
    (gradient,) = torch.autograd.grad(loss, strength)
    strength = (strength - gradient).detach().requires_grad_()
print(f"numbers {[round(s, 3) for s in (strength - strength.mean()).tolist()]}, loss {loss:.3f}")
assert abs(loss.item() - math.log(2)) < 1e-3, "a coin toss: no numbers can tell this story"

# %% [markdown]
# **2. Which token?** We read the mark at the last token. Try the mean of the vectors over the whole
# reply instead: keep the model, and change only what the head reads. How far do the marks of the
# trained model agree with those at the end? Why could the mean be worse, even if you train for it?

# %% tags=["solution"]
some = held_out[: amount(40, 20, 6)]
at_end, on_average = [], []
with torch.no_grad():
    for group in some:
        h_TD = model.gpt.hidden(torch.tensor([group.tokens[0]]))[0]
        at_end.append(float(model.head(h_TD[-1])))
        on_average.append(float(model.head(h_TD[group.start :].mean(dim=0))))
agreement = float(np.corrcoef(at_end, on_average)[0, 1])
print(f"correlation of the two marks: {agreement:.2f}")
# Vectors in the middle were never asked for a verdict, and the early ones have seen almost nothing of
# the reply. Averaging lets them vote all the same; a "not" near the end would hardly count.

# %% [markdown]
# **3. How many people?** Two people agree on 75 % of pairs. Suppose that there is a true order, and
# that each person finds it with the same probability, independently. What is that probability? How
# often is the majority of three right?

# %% tags=["solution"]
# They agree if both are right or both are wrong: p² + (1 - p)² = 0.75.
p = (1 + math.sqrt(2 * 0.75 - 1)) / 2
majority = p**3 + 3 * p**2 * (1 - p)
print(f"each is right in {p:.0%}, three together in {majority:.0%}")
assert abs(p * p + (1 - p) ** 2 - 0.75) < 1e-9 and majority > p

# %% [markdown]
# ## Check yourself
#
# 1. All marks of a reward model grow by 100. What happens to its loss?
# 2. Why is the mark read at the last token and not at the first one of the reply?
# 3. Nine replies to a prompt are ranked. How many times does each go through the model?
# 4. A judge gets 80 % of pairs right, words alone 82 %. What have you shown?
#
# <details markdown="1"><summary>Answers</summary>
#
# 1. Nothing: it only sees differences. That is why `normalize` has to set the zero.
# 2. A token sees only what stands before it. The first one has seen nothing of the reply yet.
# 3. Once; the 36 pairs are made of nine numbers.
# 4. Not yet that the judge understands anything that the words don't give away.
#
# </details>
#
# ## What we left out
#
# - **Where judges disagree**, none of them knows. Ours adds two opinions up; it could also lower the
#   mark where they part (Coste et al. 2023).
# - **Marks for parts of a reply** (process rewards): a long solution can be right up to one line.
# - **By how much.** People can also say "much better" or "a little". Touvron et al. (2023) ask for a
#   larger difference of marks where they did.
# - **A chat model in place of the people.** Bai et al. (2022) let a large one compare the replies, by
#   written principles. It's cheap, and its taste becomes your model's.
# - **Rules in the mark.** Some projects add points for a fitting length, or subtract them for
#   repetition. Our rules rank samples for training instead, so that the mark stays one opinion. Where
#   an answer can be *checked*, as in sums, a rule may replace the judge altogether (chapter 12).
# - **No reward model at all.** Direct preference optimisation (Rafailov et al. 2023) puts the same
#   Bradley-Terry loss on the chat model itself. It is simpler, and there is no mark to look at. An
#   exercise of chapter 12 builds it.
# - **People.** Hired ones, many, with guidelines and checks. Even Ouyang's labelers agreed with each
#   other in only about three of four pairs. That bounds how good a model can be *measured* to be
#   (exercise 3 says where).
#
# ## Where this is in the package
#
# Everything tagged `export` here is `tinychat/reward_model.py`. The ranked replies come from
# `tinychat/data/preferences.py`, the rules for samples from `tinychat/data/onpolicy.py`.
# `tinychat train reward` calls `fit_reward` with the whole corpus, with public comparisons if you
# have them, and with your votes.
#
# ## Sources
#
# - R. A. Bradley, M. E. Terry:
#   [Rank Analysis of Incomplete Block Designs](https://doi.org/10.2307/2334029) (1952).
# - N. Stiennon et al.:
#   [Learning to summarize from human feedback](https://arxiv.org/abs/2009.01325) (2020). The head on
#   the last token, starting from the fine-tuned model, normalised to mean 0 for reference texts.
# - L. Ouyang et al.:
#   [Training language models to follow instructions with human feedback](https://arxiv.org/abs/2203.02155)
#   (2022). All pairs of a prompt in one batch, section 3.5.
# - P. Singhal, T. Goyal, J. Xu, G. Durrett:
#   [A Long Way to Go: Investigating Length Correlations in RLHF](https://arxiv.org/abs/2310.03716)
#   (2023). How much of the gain is length.
# - H.-T. Cheng et al.: [Wide & deep learning](https://arxiv.org/abs/1606.07792) (2016). A simple part
#   beside a deep one.
# - M. Henderson et al.: [Efficient Natural Language Response Suggestion for Smart
#   Reply](https://arxiv.org/abs/1705.00652) (2017). Other people's replies as the wrong ones.
# - J. Li et al.: [A diversity-promoting objective function for neural conversation
#   models](https://arxiv.org/abs/1510.03055) (2016). Mutual information against "I don't know".
# - T. Coste, U. Anwar, R. Kirk, D. Krueger: [Reward model ensembles help mitigate
#   overoptimization](https://arxiv.org/abs/2310.02743) (2023).
# - A. Ramé et al.: [WARM: On the benefits of weight averaged reward
#   models](https://arxiv.org/abs/2401.12187) (2024).
# - H. Touvron et al.: [Llama 2](https://arxiv.org/abs/2307.09288) (2023). Two reward models, and a margin
#   in the loss.
# - Y. Bai et al.: [Constitutional AI](https://arxiv.org/abs/2212.08073) (2022). A chat model as the judge.
# - R. Rafailov et al.:
#   [Direct Preference Optimization](https://arxiv.org/abs/2305.18290) (2023). A language model as a
#   reward model.
# - Y. Meng, M. Xia, D. Chen: [SimPO](https://arxiv.org/abs/2405.14734) (2024). The mean log-prob a token
#   as the reward.
