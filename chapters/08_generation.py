# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Generation
#
# Turn the scores of a GPT into text: choose, remember, stream.
#
# A GPT doesn't write. It gives a score to every token that could come next, and stops there.
# This chapter is about everything after that: choosing one token from the scores, doing it again
# without reading the whole text again, and showing the result while it is still being made.
#
# **What you will build**
#
# 1. **choosing**: greedy, temperature, top-k, top-p, min-p and a penalty for repeating;
# 2. **remembering**: the KV cache, which makes a reply many times cheaper, and what it takes;
# 3. **many replies at once**, for judging a model and for reinforcement learning, and several
#    **drafts** of each sentence, of which the surest is said;
# 4. **streaming**: from tokens to bytes to characters, without ever showing half an emoji.
#
# **What you need:** chapters 03 (tokens and bytes), 05 (keys and values) and 06 (the network). The
# code takes under a minute; reading it, an hour.

# %% tags=["export"]
import codecs
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinychat.gpt import GPT, KVCache
from tinychat.runtime.errors import ConfigError
from tinychat.tokenizer import Tokenizer

# %% [markdown]
# ## A model to listen to
#
# The cells below want a model. If a trained `base` checkpoint is around (the shipped one, or yours
# from chapter 07), you get that one. If not, a very small one is trained here on our own stories. It
# will write nonsense in the rhythm of a story, and for this chapter that is enough: choosing works
# the same way for every model.

# %%
import os
import time
from dataclasses import replace

from tinychat.book.picture import picture
from tinychat.data import tokenizer_model
from tinychat.data.corpus import stories
from tinychat.gpt import load_model, nano
from tinychat.runtime.search import find_first

FAST = os.environ.get("TINYCHAT_FAST") == "1"


def train_a_little(tokenizer: Tokenizer, seconds: float) -> GPT:
    """A plain training loop; chapter 07 has the real one."""
    torch.manual_seed(0)
    model = GPT(nano())
    ids = [id for story in stories() for id in [tokenizer.bos_id, *tokenizer.encode(story.text)]]
    text = torch.tensor(ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    begin, steps = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        starts_B1 = torch.randint(len(text) - 65, (8, 1))
        window_BT = text[starts_B1 + torch.arange(65)]
        logits_BTV = model(window_BT[:, :-1])
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), window_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    print(f"no base checkpoint found: trained {model.config.parameters / 1e6:.1f} M weights here,")
    print(f"{steps} steps in {seconds:.0f} seconds, loss {loss.item():.2f}")
    return model.eval()


# The shipped checkpoint, else the one that chapter 07 left.
if path := find_first("base", "runs/book/base"):
    model, tokenizer, info = load_model(path)
    print(f"listening to {info.path}: {info.parameters / 1e6:.1f} M weights")
else:
    tokenizer = Tokenizer(tokenizer_model())
    model = train_a_little(tokenizer, seconds=2 if FAST else 20)

# %% [markdown]
# ## One step, looked at closely
#
# Give the model the beginning of a sentence. It returns one score (a *logit*) for each token of the
# vocabulary. The softmax turns the scores into probabilities. The cell draws the best of them as
# bars.


# %%
def show(probabilities_V: Tensor, title: str, count: int = 8) -> None:
    """Print the most likely tokens as bars of text."""
    best, ids = probabilities_V.topk(count)
    alive = int((probabilities_V > 0).sum())
    print(f"{title}: {alive:,} of {len(probabilities_V):,} tokens possible")
    for probability, id in zip(best.tolist(), ids.tolist(), strict=True):
        if probability > 0:
            bar = "█" * max(1, round(40 * probability))
            print(f"  {tokenizer.piece(id):>12} {probability:6.1%} {bar}")
    print()


prompt = [tokenizer.bos_id, *tokenizer.encode("The little fox looked at the")]
with torch.inference_mode():
    logits_1V = model(torch.tensor([prompt]))[:, -1]
show(logits_1V[0].softmax(-1), "the model itself")

# %% [markdown]
# ## Always the best one: greedy
#
# The simplest rule takes the token with the highest score, every time. It throws no dice, so it
# gives the same text on every run. Here it is, written as plainly as possible. It reads the whole
# text again for every new token; you will repair that later.


# %%
@torch.inference_mode()
def greedy_naive(ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        logits_1V = model(torch.tensor([ids]))[:, -1]
        ids.append(int(logits_1V.argmax()))
    return ids


def repeated(ids: list[int], n: int = 4) -> float:
    """The share of runs of n tokens that came before in the same text."""
    runs = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return 1 - len(set(runs)) / len(runs)


LENGTH = 40 if FAST else 120
greedy_text = greedy_naive(prompt, LENGTH)
print(tokenizer.decode(greedy_text))
print(f"\n{repeated(greedy_text):.0%} of its runs of four tokens were there before")

# %% [markdown]
# **Why greedy text loops.** Look at what happens when a phrase appears for the second time. A
# language model has learned that texts repeat themselves: after the second copy, a third is more
# likely than the second was. Each round makes the next one more certain, and greedy decoding never
# takes the chance to leave. The next cell measures this. It gives the model the same sentence one
# to five times and prints how likely the model finds each copy.

# %%
sentence = tokenizer.encode(" She ran down the hill.")
copies = 5
ids = [tokenizer.bos_id, *sentence * copies]
with torch.inference_mode():
    logprobs_TV = model(torch.tensor([ids]))[0].log_softmax(-1)
for copy in range(copies):
    places = range(copy * len(sentence), (copy + 1) * len(sentence))
    mean = sum(float(logprobs_TV[place, ids[place + 1]]) for place in places) / len(sentence)
    print(f"copy {copy + 1}: {math.exp(mean):6.1%} a token (geometric mean)")

# %% [markdown]
# A very small or very young model has not learned to copy yet, so its numbers may not rise. Its
# greedy text loops all the same, for a plainer reason: it looks at few tokens, so the same few
# tokens lead to the same next one.
#
# Holtzman et al. (2020) drew the conclusion that everyone follows since: text by people is *not*
# made of the most likely words. To sound alive, a model must throw dice.
#
# ## All the settings in one place
#
# Throwing dice needs settings. They stand in one frozen dataclass, with the reason for each one
# under it. A value without sense is refused at once, in a sentence that names it.


# %% tags=["export"]
MOST_DRAFTS = 64  # their notes take memory


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; raises ConfigError for values that make no sense."""

    temperature: float = 0.5
    "logits are divided by it: below 1 surer, above 1 wilder, 0 always takes the best token"
    top_k: int = 0
    "only the k best tokens stay; 0 switches it off"
    top_p: float = 0.95
    "the smallest set with at least this probability stays (Holtzman et al. 2020); 1 is off"
    min_p: float = 0.0
    "tokens below this share of the best one's probability go (Nguyen et al. 2024); 0 is off"
    repetition_penalty: float = 1.0
    "makes tokens of this reply less likely to come again (Keskar et al. 2019); 1 is off"
    drafts: int = 1
    "replies drawn side by side, of which the surest is said (Adiwardana et al. 2020); 1 is off"
    max_tokens: int = 200
    "longest reply in tokens"
    seed: int | None = None
    "same seed, same reply; None draws a fresh one"

    def __post_init__(self) -> None:
        rules = (
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (off) or a positive whole number"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (off) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0; 1 is off"),
            ("drafts", 1 <= self.drafts <= MOST_DRAFTS, f"from 1 (off) to {MOST_DRAFTS}"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "a whole number from 0 to 2^63"),
        )
        for name, holds, wanted in rules:
            if not holds:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {wanted}.")

    @property
    def greedy(self) -> bool:
        """True when no dice are thrown."""
        return self.temperature == 0

    @property
    def side_by_side(self) -> int:
        """How many drafts are written: one without dice, since they would all be the same."""
        return 1 if self.greedy else self.drafts


# %%
try:
    Sampling(top_p=1.5)
except ConfigError as error:
    print(error)

# %% [markdown]
# ## Temperature
#
# Divide all logits by a number before the softmax. Below one, differences grow and the favourites
# win more often. Above one, differences shrink and outsiders get their chance.
#
# In probabilities, dividing logits by *T* raises every probability to the power 1/*T* and makes the
# sum one again. So a temperature of one half squares them.

# %%
for temperature in (0.5, 1.0, 1.5):
    show((logits_1V[0] / temperature).softmax(-1), f"temperature {temperature}", count=5)

# %% tags=["test"]
p_V = logits_1V[0].softmax(-1)
torch.testing.assert_close((logits_1V[0] / 0.5).softmax(-1), p_V**2 / (p_V**2).sum())

# %% [markdown]
# ## The long tail
#
# Most tokens are nonsense in any given place. Each one is very unlikely, but there are thousands of
# them, and together they weigh something. The cell goes through the beginning of a story and adds up
# the tail at each place: all tokens but the best thousand. Then it asks how likely a reply of fifty
# tokens is to step into it at least once.

# %%
story = [tokenizer.bos_id, *tokenizer.encode(stories()[0].text)[: 40 if FAST else 120]]
with torch.inference_mode():
    p_TV = model(torch.tensor([story]))[0].softmax(-1)
tail = float(1 - p_TV.topk(1000).values.sum(-1).mean())
print(f"one draw comes from the tail in {tail:.1%} of cases")
print(f"at this rate, {1 - (1 - tail) ** 50:.0%} of replies of 50 tokens hold such a token")
far = p_TV[-1].argsort(descending=True)[2000:8000:1000]
print("from the tail after the last of these words:", [tokenizer.piece(id) for id in far.tolist()])

# %% [markdown]
# One wrong token is enough to derail a reply: the model goes on from it as if it were true. So cut
# the tail off before you draw. The next three filters differ in where they cut.
#
# ## Top-k and top-p
#
# **Top-k** keeps a fixed number of tokens. That is easy to grasp and a little blunt: after "New
# York is a" many words fit, after "Barack" few do, and k is the same in both places.
#
# **Top-p**, or *nucleus sampling* (Holtzman et al. 2020), keeps as many as it takes to reach a
# share p of the probability. Where the model is sure, that's one or two tokens; where it isn't,
# hundreds.
#
# Both start by sorting the scores, so one function does both. Work through it with the small
# example in the test below it.

# %% tags=["export"]
# Sorting all 8,192 scores takes longer than the whole nano model; the best few nearly always hold
# enough, and where they don't, everything is sorted after all.
SHORTLIST = 256


def keep_top(logits_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Keep the k best tokens, then of these the smallest set with `top_p` of their probability.

    Everything else becomes -inf. Ties are cut too, so that never more than k tokens stay; the
    best token always stays.
    """
    V = logits_BV.shape[-1]
    best_BK, ids_BK = logits_BV.topk(min(top_k or SHORTLIST, V))
    whole_B1 = (best_BK if top_k else logits_BV).logsumexp(dim=-1, keepdim=True)
    probabilities_BK = (best_BK - whole_B1).exp()
    if not top_k and best_BK.shape[1] < V and float(probabilities_BK.sum(-1).min()) <= top_p:
        best_BK, ids_BK = logits_BV.topk(V)
        probabilities_BK = (best_BK - whole_B1).exp()
    if top_p < 1:
        # A token goes when those before it already hold enough.
        before_BK = probabilities_BK.cumsum(dim=-1) - probabilities_BK
        too_many_BK = before_BK >= top_p
        too_many_BK[:, 0] = False
        best_BK = best_BK.masked_fill(too_many_BK, -math.inf)
    return torch.full_like(logits_BV, -math.inf).scatter(1, ids_BK, best_BK)


# %% tags=["test"]
shares = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
# Top-k 2 keeps the two best. They now share everything: 2/3 and 1/3.
torch.testing.assert_close(
    keep_top(shares.log(), 2, 1.0).softmax(-1), torch.tensor([[2 / 3, 1 / 3, 0, 0]])
)
# Top-p 0.7: a half is too little, a half and a quarter are enough.
torch.testing.assert_close(
    keep_top(shares.log(), 0, 0.7).softmax(-1), torch.tensor([[2 / 3, 1 / 3, 0, 0]])
)

# %% [markdown]
# <!-- widget: sampling -->
#
# ## Min-p
#
# Top-p has a weakness that shows at high temperature. When the distribution is flat, reaching p
# takes a great many tokens, nonsense among them. **Min-p** (Nguyen et al. 2024) asks another
# question: how does this token compare with the *best* one? Whatever falls below a fixed share of
# the best goes. If the best token is at one half and min-p is a tenth, the bar stands at a
# twentieth.


# %% tags=["export"]
def keep_likely(logits_BV: Tensor, min_p: float) -> Tensor:
    """Keep the tokens with at least `min_p` times the probability of the best one.

    A ratio of probabilities is a difference of logits, so this needs no softmax and no sorting.
    """
    floor_B1 = logits_BV.amax(dim=-1, keepdim=True) + math.log(min_p)
    return logits_BV.masked_fill(logits_BV < floor_B1, -math.inf)


# %%
hot_1V = logits_1V / 1.5
print("at temperature 1.5:")
for title, filtered_1V in (
    ("no filter", hot_1V),
    ("top-k 50", keep_top(hot_1V, 50, 1.0)),
    ("top-p 0.9", keep_top(hot_1V, 0, 0.9)),
    ("min-p 0.1", keep_likely(hot_1V, 0.1)),
):
    show(filtered_1V[0].softmax(-1), title, count=4)

# %% [markdown]
# ## A penalty for repeating
#
# Filters can't stop a loop, because in a loop the repeated token *is* the likely one. Keskar et al.
# (2019) divide the score of every token that was already used by a penalty. A negative score would rise
# by that, so it is multiplied, as in most programs today: the score goes down either way.
#
# The token history is that of *this reply* only. The prompt doesn't count: you may well want the
# model to use your own words, and the token that ends a turn stands in every prompt of a chat. A
# model that is punished for it would never stop talking.


# %% tags=["export"]
def penalize(logits_BV: Tensor, history_BT: Tensor, penalty: float) -> Tensor:
    """Push the scores of the tokens in `history_BT` down, whichever sign they have.

    A token counts once, however often it came (Keskar et al. 2019, section 4.1).
    """
    seen_BT = logits_BV.gather(1, history_BT)
    seen_BT = torch.where(seen_BT > 0, seen_BT / penalty, seen_BT * penalty)
    return logits_BV.scatter(1, history_BT, seen_BT)


# %% tags=["test"]
loop = penalize(torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[0, 1, 0]]), 2.0)
assert loop.tolist() == [[1.0, -4.0, 1.0]], "down, whatever the sign, and once only"

# %% [markdown]
# ## All together, in one order
#
# The order matters: top-p after a temperature keeps other tokens than before it. Libraries differ
# here, so ours is written down: **penalty, temperature, top-k, top-p, min-p**. Each filter sees
# only what the one before it left.


# %% tags=["export"]
def filter_logits(
    logits_BV: Tensor, sampling: Sampling, history_BT: Tensor | None = None
) -> Tensor:
    """Return new logits whose softmax is the distribution to draw from, always in this order.

    1. repetition penalty, 2. temperature, 3. top-k, 4. top-p, 5. min-p. Each filter sees what the
    one before left. Temperature 0 leaves the single best token.
    """
    # 1. repetition penalty
    if sampling.repetition_penalty != 1 and history_BT is not None:
        logits_BV = penalize(logits_BV, history_BT, sampling.repetition_penalty)
    # 2. temperature
    if sampling.greedy:
        return keep_top(logits_BV, 1, 1.0)
    if sampling.temperature != 1:
        # The best score moves to 0 first: a tiny temperature then can't overflow to inf.
        logits_BV = logits_BV - logits_BV.amax(dim=-1, keepdim=True)
        logits_BV = logits_BV / max(sampling.temperature, 1e-6)
    # 3. top-k and 4. top-p
    if sampling.top_k or sampling.top_p < 1:
        logits_BV = keep_top(logits_BV, sampling.top_k, sampling.top_p)
    # 5. min-p
    if sampling.min_p:
        logits_BV = keep_likely(logits_BV, sampling.min_p)
    return logits_BV


# %%
RECIPES = {
    "plain": Sampling(temperature=1.0, top_p=1.0),
    "careful": Sampling(temperature=0.5, top_p=0.9),
    "our default": Sampling(),
    "top-k 20": Sampling(temperature=1.0, top_k=20, top_p=1.0),
    "hot, min-p": Sampling(temperature=1.5, top_p=1.0, min_p=0.1),
    "greedy": Sampling(temperature=0),
}
distributions = {}
for name, recipe in RECIPES.items():
    p_V = filter_logits(logits_1V, recipe)[0].softmax(-1)
    distributions[name] = p_V
    possible = int((p_V > 0).sum())
    surprise = -float(torch.xlogy(p_V, p_V).sum()) / math.log(2) + 0.0
    print(f"{name:>12}: {possible:5,} tokens possible, {surprise:5.2f} bits of surprise in a draw")

# %% [markdown]
# The same as a picture: each row is one recipe, each column a token, best first. All rows have the
# same scale, except that greedy's single bar would dwarf the others and is cut.


# %%
# alt: Bars of next-token probabilities, a row a recipe: filters cut the tail, temperature bends it.
def draw_recipes(plt):
    order = distributions["plain"].argsort(descending=True)[:12]
    peaks = [float(p_V.max()) for p_V in distributions.values()]
    top = 1.15 * max([peak for peak in peaks if peak < 0.999], default=1.0)
    figure, axes = plt.subplots(len(RECIPES), 1, figsize=(8, 8), sharex=True)
    for axis, (name, p_V) in zip(axes, distributions.items(), strict=True):
        axis.bar(range(len(order)), p_V[order].tolist())
        axis.set_title(name, loc="left", fontsize=9)
        axis.set_ylim(0, top)
        axis.yaxis.set_major_formatter("{x:.0%}")
    labels = [tokenizer.decode([id]).strip() or "(space)" for id in order.tolist()]
    axes[-1].set_xticks(range(len(order)), labels, rotation=45, ha="right")
    figure.supylabel("probability")
    return figure


picture("08_recipes", draw_recipes)

# %% [markdown]
# ## The draw
#
# Now throw the dice. Greedy needs none and takes the short way. The dice live in a
# `torch.Generator` of their own: with a seed, the same reply comes again, and nothing else in your
# program that uses random numbers is disturbed.
#
# A draw stacks the probabilities into a ladder from 0 to 1, throws one number, and looks on which
# rung it fell. `torch.multinomial` draws fairly, too, but throws a number for each of the 8,192
# tokens: that was half of the time of a whole step with 128 replies side by side (lab notes).


# %% tags=["export"]
def draw_tokens(probabilities_BV: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw a token from each row, `[B]`; one of probability 0 never comes.

    The point on the row's cumulative sum is above 0 and at most the whole sum, so that the first
    rung that reaches it has a height. Rows need not add up to one.
    """
    sums_BV = probabilities_BV.cumsum(-1)
    dice_B1 = 1 - torch.rand(len(sums_BV), 1, generator=generator, device=sums_BV.device)
    return torch.searchsorted(sums_BV, dice_B1 * sums_BV[:, -1:])[:, 0]


def sample(
    logits_BV: Tensor,
    sampling: Sampling,
    *,
    history_BT: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose the next token of each row, `[B]`."""
    if sampling.greedy:
        if sampling.repetition_penalty != 1 and history_BT is not None:
            logits_BV = penalize(logits_BV, history_BT, sampling.repetition_penalty)
        return logits_BV.argmax(dim=-1)
    probabilities_BV = filter_logits(logits_BV, sampling, history_BT).softmax(dim=-1)
    return draw_tokens(probabilities_BV, generator)


def make_generator(seed: int | None, device: torch.device) -> torch.Generator:
    """Return dice for `device`: the same for the same seed, fresh ones for None."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


# %% tags=["test"]
ladder_V = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0])
many_N = draw_tokens(ladder_V.expand(4000, 6), make_generator(0, ladder_V.device))
shares_V = many_N.bincount(minlength=6) / 4000
assert (shares_V - ladder_V).abs().max() < 0.03 and not shares_V[ladder_V == 0].any()

# %%
for seed in (1, 1, 2, 3):
    dice = make_generator(seed, model.device)
    drawn = [int(sample(logits_1V, Sampling(), generator=dice)) for _ in range(6)]
    print(f"seed {seed}:", " ".join(tokenizer.decode([id]).strip() for id in drawn))

# %% [markdown]
# ## Don't read it all again: the KV cache
#
# Back to the slow part. `greedy_naive` gave the model the whole text for each new token. But
# attention looks only backwards: nothing that the model worked out for the old tokens changes when
# a new one comes. Their keys and values can be kept. Think of notes in the margin: you don't reread
# the book to write the next line.
#
# With the cache of chapter 06, the prompt goes in once, as a whole (servers call this *prefill*), and
# then one token at a time (*decode*). A second saving is hidden in `next_logits`: only the last
# token's scores are needed, and the product with the whole vocabulary is the largest in a small model.


# %% tags=["export"]
def next_logits(
    model: GPT, ids_BT: Tensor, cache: KVCache | None = None, segments_BT: Tensor | None = None
) -> Tensor:
    """Return the scores of the token after the last one, `[B, V]`, float32.

    The scores after the tokens before it would be thrown away, so they are never computed: the
    vocabulary is the largest matrix of a small model.
    """
    h_BTD = model.hidden(ids_BT, cache=cache, segments_BT=segments_BT)
    return F.linear(h_BTD[:, -1], model.embed.weight).float()


# %% [markdown]
# And here is the loop that the chat uses. It checks its input first, at the call and not at the
# first token. Then it yields each token as soon as it is chosen, so that a reader sees the reply
# grow. It ends at a stop token, after `max_tokens`, or when the context is full.


# %% tags=["export"]
def generate(
    model: GPT,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    stop: Collection[int] = (),
    pauses: Collection[int] = (),
    keep_stop: bool = False,
    cache: KVCache | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield the tokens of one reply to `ids`, each as soon as it is chosen.

    Several `sampling.drafts` are compared at every token of `pauses` (see `sentence_ends`), and
    what the surest of them says comes at once. Ends before a token of `stop` (which is yielded only
    with `keep_stop`), after `max_tokens`, or when prompt and reply fill the cache. A `cache` may
    hold a beginning of `ids` from earlier turns: only the rest is read (Pope et al. 2022); `rewind`
    makes sure that it is one. Afterwards it holds the prompt and the reply up to the last token but
    one. Raises ConfigError at once when the prompt is empty or leaves no room for a reply.
    """
    if not ids:
        raise ConfigError("The prompt is empty; give the model at least one token to go on from.")
    if cache is None:
        cache = model.new_cache(1, len(ids) + sampling.max_tokens)
    room = cache.capacity - len(ids)
    if room < 1:
        raise ConfigError(
            f"The prompt is {len(ids)} tokens long and the model reads {cache.capacity}; "
            "shorten it so that a reply fits too."
        )
    # At least one token must be read, because its scores choose the first of the reply.
    cache.truncate(min(cache.length, len(ids) - 1))
    if generator is None:
        generator = make_generator(sampling.seed, model.device)
    limit = min(sampling.max_tokens, room)
    reply = _decode(model, ids, sampling, stop, pauses, cache, generator, limit)
    return reply if keep_stop else takewhile(lambda token: token not in stop, reply)


@torch.inference_mode()
def _decode(
    model: GPT,
    ids: Sequence[int],
    sampling: Sampling,
    stop: Collection[int],
    pauses: Collection[int],
    cache: KVCache,
    generator: torch.Generator,
    limit: int,
) -> Iterator[int]:
    """The loop of `generate`, after its checks; the token that ends the reply comes, too."""
    unread_1T = torch.tensor([ids[cache.length :]], device=model.device)
    logits_1V = next_logits(model, unread_1T, cache)
    if sampling.side_by_side > 1:
        yield from _draft(model, logits_1V, sampling, stop, pauses, cache, generator, limit)
        return
    for _, drawn in _draw(model, logits_1V, sampling, stop, cache, generator, limit):
        yield drawn[0]


def _draw(
    model: GPT,
    logits_BV: Tensor,
    sampling: Sampling,
    stop: Collection[int],
    cache: KVCache,
    generator: torch.Generator,
    limit: int,
    begun: Sequence[int] = (),
    leave: bool = False,
) -> Iterator[tuple[Tensor, dict[int, int]]]:
    """Draw a token for each row and step, from the scores of the first on.

    Yields the scores, and the token of each row that has not stopped before. Ends when all have, or
    after `limit` steps; the last token of a row is drawn but never read. `begun` is what a reply
    that goes on said before: a penalty for repeating counts it. With `leave`, rows that have
    stopped leave the batch and the cache as soon as they are half of it.
    """
    begun_BT = torch.tensor([begun], dtype=torch.long).expand(len(logits_BV), -1)
    drawn_BT = F.pad(begun_BT, (0, limit)).to(model.device)
    rows = list(range(len(logits_BV)))  # what the batch still holds
    running = set(rows)
    for step in range(len(begun), len(begun) + limit):
        if step > len(begun):
            logits_BV = next_logits(model, drawn_BT[:, step - 1 : step], cache)
        history_BT = drawn_BT[:, :step] if step else None
        chosen_B = sample(logits_BV, sampling, history_BT=history_BT, generator=generator)
        drawn_BT[:, step] = chosen_B
        tokens = zip(rows, chosen_B.tolist(), strict=True)
        drawn = {row: token for row, token in tokens if row in running}
        yield logits_BV, drawn
        running -= {row for row, token in drawn.items() if token in stop}
        if not running:
            return
        if leave and len(running) <= len(rows) // 2:
            rows, places_B = drop_stopped(cache, rows, running, model.device)
            drawn_BT = drawn_BT[places_B]


def drop_stopped(
    cache: KVCache, rows: Sequence[int], running: Collection[int], device: torch.device
) -> tuple[list[int], Tensor]:
    """Keep only the `running` of the `rows` that a cache holds; return them and their places."""
    places = [place for place, row in enumerate(rows) if row in running]
    places_B = torch.tensor(places, device=device)
    cache.keep(places_B)
    return [rows[place] for place in places], places_B


def rewind(cache: KVCache, held: Sequence[int], ids: Sequence[int]) -> int:
    """Cut the cache back to what it shares with the new prompt `ids`; return how much that is.

    `held` are the tokens that were fed to the cache, in order (it may be longer than the cache:
    a reply's last token is chosen but never read).
    """
    shared = 0
    for old, new in zip(held[: cache.length], ids, strict=False):
        if old != new:
            break
        shared += 1
    cache.truncate(shared)
    return shared


# %% tags=["test"]
cached = list(generate(model, prompt, Sampling(temperature=0, max_tokens=LENGTH)))
assert prompt + cached == greedy_text, "with notes or by rereading: the same text"

# %% [markdown]
# How much does it save? The cell measures one more token after texts of growing length, both ways.
# Without the cache the price of a token grows with the text. With it, it hardly does.


# %%
@torch.inference_mode()
def milliseconds_per_token(length: int, use_cache: bool, tokens: int) -> float:
    ids = torch.tensor([(prompt * (length // len(prompt) + 1))[:length]])
    cache = model.new_cache(1, length + tokens) if use_cache else None
    if cache is not None:
        next_logits(model, ids, cache)
    begin = time.perf_counter()
    for _ in range(tokens):
        new = ids[:, -1:] if use_cache else ids
        next_logits(model, new, cache)
    return (time.perf_counter() - begin) / tokens * 1000


room = model.config.context
lengths = [length for length in (32, 64, 128, 256, 480, 960) if length < room - 16]
lengths = lengths[:3] if FAST else lengths
milliseconds_per_token(32, True, 3)  # the first call warms up
timings = []
for length in lengths:
    slow = milliseconds_per_token(length, False, 4)
    quick = milliseconds_per_token(length, True, 12)
    timings.append((length, slow, quick))
    print(
        f"{length:4} tokens before: {slow:7.1f} ms without, {quick:6.1f} ms with the cache", end=""
    )
    print(f" ({slow / quick:.1f} times)")


# %%
# alt: Milliseconds a token against its place: rising without the cache, nearly level with it.
def draw_timings(plt):
    figure, axis = plt.subplots(figsize=(7, 4))
    axis.plot([row[0] for row in timings], [row[1] for row in timings], "o-", label="reading again")
    axis.plot([row[0] for row in timings], [row[2] for row in timings], "s--", label="KV cache")
    axis.set(xlabel="tokens before", ylabel="milliseconds for the next token", ylim=(0, None))
    axis.legend()
    return figure


picture("08_cache", draw_timings)

# %% [markdown]
# ## What the notes take
#
# Nothing is free: the notes take memory. For every token, every layer keeps one key and one value
# for each key head, and each of them is a vector of the head's width. Work it out, then look at the
# cache's own tensors. Do they agree?

# %%
config = model.config
numbers = 2 * config.layers * config.kv_heads * config.head_width  # keys and values
print(
    f"2 x {config.layers} layers x {config.kv_heads} key heads x {config.head_width} wide", end=" "
)
print(f"= {numbers:,} numbers a token, 4 bytes each in float32")
room_for = 100
notes = [
    tensor
    for layer in model.new_cache(1, room_for).layers
    for tensor in vars(layer).values()
    if isinstance(tensor, Tensor)
]
taken = sum(tensor.numel() * tensor.element_size() for tensor in notes)
print(f"the cache holds {len(notes)} tensors, {taken / room_for:,.0f} bytes a token")
print(f"a full context of {config.context} tokens: {4 * numbers * config.context / 2**20:.1f} MiB")
print(f"the weights themselves: {4 * config.parameters / 2**20:.1f} MiB")

# %% tags=["test"]
assert taken == room_for * numbers * 4

# %% [markdown]
# For a small model that is little. For a large one it decides how many people can be served at once,
# because each conversation has a cache of its own. That is why **grouped heads** were invented
# (chapter 05): several heads ask, and share one set of keys and values. The cell compares the two for
# our model, and for the published shape of a large one, in two bytes a number.

# %%
LARGE_SHAPE = {"layers": 80, "heads": 64, "kv_heads": 8, "head_width": 128}  # Llama 2 70B
OURS = {name: getattr(config, name) for name in LARGE_SHAPE}


def bytes_a_token(shape: dict[str, int], grouped: bool, size: int) -> int:
    heads = shape["kv_heads"] if grouped else shape["heads"]
    return 2 * shape["layers"] * heads * shape["head_width"] * size


memory = {}
for name, shape in (("ours", OURS), ("70 billion weights", LARGE_SHAPE)):
    for grouped in (False, True):
        memory[name, grouped] = bytes_a_token(shape, grouped, size=2)
        label = "grouped heads" if grouped else "a key for each head"
        print(
            f"{name:>18}, {label:>19}: {memory[name, grouped] / 1024:8,.0f} KiB a token,", end=" "
        )
        print(f"{memory[name, grouped] * 4096 / 2**20:9,.0f} MiB for 4,096 tokens")


# %%
# alt: Cache memory against tokens for two models, log scale: grouped heads lie far below full ones.
def draw_memory(plt):
    figure, axis = plt.subplots(figsize=(8.5, 3.5))
    tokens = [2**power for power in range(7, 16)]
    for number, name in enumerate(("ours", "70 billion weights")):
        for grouped, line in ((False, "--"), (True, "-")):
            label = f"{name}, {'grouped' if grouped else 'a key for each head'}"
            sizes = [memory[name, grouped] * count / 2**20 for count in tokens]
            axis.plot(tokens, sizes, line, color=f"C{number}", label=label)
    axis.axhline(80 * 1024, color="#808080", linestyle=":", label="a GPU's 80 GiB")
    axis.set(xscale="log", yscale="log", xlabel="tokens of one conversation", ylabel="MiB")
    axis.set_xticks([128, 1024, 8192, 32768], ["128", "1,024", "8,192", "32,768"])
    axis.minorticks_off()
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


picture("08_memory", draw_memory)

# %% tags=["test"]
for name, shape in (("ours", OURS), ("70 billion weights", LARGE_SHAPE)):
    factor = shape["heads"] // shape["kv_heads"]
    assert memory[name, False] == factor * memory[name, True]

# %% [markdown]
# The cache also helps from one turn of a chat to the next: the conversation so far is the beginning
# of the next prompt. `rewind` keeps what is shared, `generate` reads only the rest.

# %%
turn = list(prompt)
cache = model.new_cache(1)
reply = list(generate(model, turn, Sampling(temperature=0, max_tokens=16), cache=cache))
held = turn + reply
longer = held + tokenizer.encode(" Then it")
shared = rewind(cache, held, longer)
print(f"the next prompt has {len(longer)} tokens, {shared} of them are already in the notes")
again = list(generate(model, longer, Sampling(temperature=0, max_tokens=16), cache=cache))
assert again == list(generate(model, longer, Sampling(temperature=0, max_tokens=16)))

# %% [markdown]
# ## Many replies at once
#
# To judge a model you want many replies, and reinforcement learning wants thousands. One at a time,
# the processor mostly waits for weights to arrive from memory; in a batch it uses each weight for
# all rows. Prompts have different lengths, though, and the newest token must be in the same column
# for every row. So the short ones are filled up on the *left*, and the filling gets a segment of its
# own that no real token looks at (chapter 06). That the tokens of a short prompt now stand further to
# the right does no harm: rotary positions only know distances (chapter 04).


# %% tags=["export"]
@torch.inference_mode()
def generate_batch(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop: Collection[int] = (),
    pauses: Collection[int] = (),
    keep_stop: bool = False,
    rows: int = 32,
    pad_id: int = 0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Return one reply a prompt, in their order; for evaluation and samples.

    Prompts of similar length share a batch of at most `rows`. The shorter ones are padded on the
    left in a segment of their own that no real token looks at. `keep_stop` leaves the token that
    ended a reply at its end. A row stops early when the longest of its batch fills the context.
    Replies with several `sampling.drafts`, compared at `pauses`, are written one after another:
    their drafts are a batch already.
    """
    if not all(prompts):
        raise ConfigError("A prompt is empty; give the model at least one token to go on from.")
    if generator is None:
        generator = make_generator(sampling.seed, model.device)
    replies: list[list[int]] = [[] for _ in prompts]
    if sampling.side_by_side > 1:
        for number, prompt in enumerate(prompts):
            said = generate(
                model,
                prompt,
                sampling,
                stop=stop,
                pauses=pauses,
                keep_stop=keep_stop,
                generator=generator,
            )
            replies[number] = list(said)
        return replies
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for start in range(0, len(order), rows):
        numbers = order[start : start + rows]
        group = [prompts[number] for number in numbers]
        found = _decode_batch(model, group, sampling, stop, pad_id, generator)
        for number, reply in zip(numbers, found, strict=True):
            ended = reply[-1] in stop and not keep_stop
            replies[number] = reply[:-1] if ended else reply
    return replies


def _decode_batch(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop: Collection[int],
    pad_id: int,
    generator: torch.Generator,
) -> list[list[int]]:
    """One batch of `generate_batch`."""
    longest = max(len(prompt) for prompt in prompts)
    cache = model.new_cache(len(prompts), longest + sampling.max_tokens)
    limit = min(sampling.max_tokens, cache.capacity - longest)
    if limit < 1:
        raise ConfigError(
            f"A prompt is {longest} tokens long and the model reads {cache.capacity}; "
            "shorten it so that a reply fits too."
        )
    # 1. pad on the left: the last token of every row must be its newest
    padding = [longest - len(prompt) for prompt in prompts]
    unread_BT = torch.tensor(
        [[pad_id] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)],
        device=model.device,
    )
    segments_BT = None
    if any(padding):
        starts_B1 = torch.tensor(padding, device=model.device)[:, None]
        segments_BT = (torch.arange(longest, device=model.device) >= starts_B1).long()
    # 2. one token a row and step, until every row has stopped
    logits_BV = next_logits(model, unread_BT, cache, segments_BT)
    replies: list[list[int]] = [[] for _ in prompts]
    steps = _draw(model, logits_BV, sampling, stop, cache, generator, limit, leave=True)
    for _, drawn in steps:
        for row, token in drawn.items():
            replies[row].append(token)
    return replies


# %%
prompts = [
    [tokenizer.bos_id, *tokenizer.encode(text)]
    for text in ("The", "Once there was a", "Every morning the old man went to", "A bear")
] * (2 if FAST else 4)
quick_reply = Sampling(temperature=0, max_tokens=12)
begin = time.perf_counter()
one_by_one = [list(generate(model, ids, quick_reply)) for ids in prompts]
middle = time.perf_counter()
together = generate_batch(model, prompts, quick_reply)
end = time.perf_counter()
print(f"{len(prompts)} replies one by one: {middle - begin:.2f} s, together: {end - middle:.2f} s")
same = sum(a == b for a, b in zip(one_by_one, together, strict=True))
print(f"{same} of {len(prompts)} replies are the same, token for token")

# %% [markdown]
# (Sums in another order round differently in the last bit. When two tokens are almost equally good,
# that bit can decide.)
#
# ## Think before you speak: drafts
#
# A reply goes wrong at one unlucky draw, and from then on the model writes to fit its own mistake. Cold
# dice avoid that, but only one token ahead. A better way costs little when a batch is nearly as fast as
# a single reply: write several **drafts** side by side, and say the one that the model holds for the
# likeliest. Google's Meena did it with twenty whole replies and called it **sample-and-rank** (Adiwardana
# et al. 2020). We compare *sentences*: each draft goes on to its next full stop, the surest is said, and
# all drafts of the next sentence begin behind it. A reader sees the first sentence while the second is
# being written, one bad sentence doesn't condemn the good ones around it, and of a long story every
# sentence is chosen, where whole drafts would leave one choice of eight for all of it.
#
# Three details matter. A product of probabilities falls with every token, so a sum of their logarithms
# would always choose the shortest draft: we take the *mean* a token. A draft that circles in a loop is
# very sure of itself, so those that come to an end go first. And whether the reply is over can't be
# found by comparing, since an end is one token, which is nearly always surer than a whole sentence. So
# that is drawn instead, once after every sentence.


# %% tags=["export"]
SENTENCE_END = re.compile(r"""[.!?。！？]["'”’)\]]*\s*$""")


def sentence_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end a sentence: a full stop, `!"` and their like."""
    pieces = (
        tokenizer.token_bytes(id).decode(errors="replace") for id in range(tokenizer.vocab_size)
    )
    return frozenset(id for id, piece in enumerate(pieces) if SENTENCE_END.search(piece))


class Draft(NamedTuple):
    """What may be said next, with the token that ended it, and the sum of its log-probs."""

    tokens: list[int]
    logprob: float


def surest(drafts: Sequence[Draft], ends: Collection[int]) -> Draft:
    """The likeliest a token, of those that say something and come to an end, if any do."""
    return max(
        drafts,
        key=lambda one: (
            one.tokens[0] not in ends,
            one.tokens[-1] in ends,
            one.logprob / len(one.tokens),
        ),
    )


def _draft(
    model: GPT,
    logits_1V: Tensor,
    sampling: Sampling,
    stop: Collection[int],
    pauses: Collection[int],
    cache: KVCache,
    generator: torch.Generator,
    limit: int,
) -> Iterator[int]:
    """Yield a reply sentence by sentence, the surest of several drafts of each."""
    reply: list[int] = []
    ends = {*stop, *pauses}
    while True:
        # 1. the notes of what is said already, one copy a draft
        begin = cache.length
        left = limit - len(reply)
        many = cache.copies(sampling.drafts, begin + left)
        # 2. one token a draft and step, until every draft has come to its end
        logits_DV = logits_1V.expand(sampling.drafts, -1)
        tokens: list[list[int]] = [[] for _ in logits_DV]
        logprobs = [0.0 for _ in logits_DV]
        for scores_DV, drawn in _draw(
            model, logits_DV, sampling, ends, many, generator, left, reply
        ):
            rows, chosen = list(drawn), list(drawn.values())
            sure = scores_DV[rows, chosen] - scores_DV.logsumexp(-1)[rows]
            for row, token, logprob in zip(rows, chosen, sure.tolist(), strict=True):
                tokens[row].append(token)
                logprobs[row] += logprob
        drafts = [Draft(*one) for one in zip(tokens, logprobs, strict=True)]
        said = surest(drafts, ends)
        # 3. the notes of the surest; its last token has been drawn, and not been read
        cache.follow(many, drafts.index(said), begin + len(said.tokens) - 1)
        reply += said.tokens
        yield from said.tokens
        if reply[-1] in stop or len(reply) == limit:
            return
        # 4. is this all? Drawn once; where it isn't, no draft may end before it begins
        logits_1V = next_logits(model, torch.tensor([reply[-1:]], device=model.device), cache)
        said_1T = torch.tensor([reply], device=model.device)
        last = int(sample(logits_1V, sampling, history_BT=said_1T, generator=generator))
        if last in stop:
            yield last
            return
        logits_1V[:, list(stop)] = -torch.inf


# %% [markdown]
# The prompt is read once, and its notes are copied for every draft. Here are a few whole drafts of one
# text, each with the mean log-prob of its tokens, and the one that is said.

# %%
opening = [tokenizer.bos_id, *tokenizer.encode("The little bear looked for")]
calm = Sampling(temperature=0.8, max_tokens=16, seed=5)
dice = make_generator(calm.seed, model.device)
found = {tuple(generate(model, opening, calm, generator=dice)) for _ in range(4 if FAST else 8)}


def sureness(reply: Sequence[int]) -> float:
    """The mean log-prob of the reply's tokens behind the opening."""
    with torch.inference_mode():
        scores_TV = model(torch.tensor([[*opening, *reply]]))[0].float().log_softmax(-1)
    places = range(len(opening) - 1, len(opening) + len(reply) - 1)
    return sum(float(scores_TV[t, id]) for t, id in zip(places, reply, strict=True)) / len(reply)


for reply in sorted(found, key=sureness):
    print(f"{sureness(reply):6.2f}  {tokenizer.decode(list(reply))!r}")
said = list(generate(model, opening, replace(calm, drafts=8)))
print(f"{sureness(said):6.2f}  {tokenizer.decode(said)!r}   <- said, of eight others")

# %% tags=["test"]
# The notes are those of the reply that was said: going on from them is going on from the text.
notes = model.new_cache(1, len(opening) + 40)
said = list(generate(model, opening, replace(calm, drafts=8), cache=notes))
further = [*opening, *said, *tokenizer.encode(" and")]
cold = Sampling(temperature=0, max_tokens=8)
fed = rewind(notes, [*opening, *said], further)
assert len(opening) < fed <= len(opening) + len(said)
assert list(generate(model, further, cold, cache=notes)) == list(generate(model, further, cold))

# %% [markdown]
# Now a longer text, sentence by sentence. The clock stops where a reader sees each sentence.

# %%
pauses = sentence_ends(tokenizer)
story = [tokenizer.bos_id, *tokenizer.encode("Once upon a time")]
long = Sampling(temperature=0.8, max_tokens=24 if FAST else 80, seed=5, drafts=8)
for name, ends in (("whole drafts", ()), ("sentence by sentence", pauses)):
    begin, sentence = time.perf_counter(), []
    print(f"{name}:")
    for token in generate(model, story, long, pauses=ends):
        sentence.append(token)
        if token in pauses:
            print(f"  {time.perf_counter() - begin:5.2f} s  {tokenizer.decode(sentence)!r}")
            sentence = []
    print(f"  {time.perf_counter() - begin:5.2f} s  {tokenizer.decode(sentence)!r}, and no more")

# %% [markdown]
# Does it help? For our chat model it does more than anything else that costs so little: the lab notes
# count the right answers and the readable replies, with one draft and with several.
#
# ## From tokens to characters
#
# One problem is left, and many chat programs get it wrong. A token is a piece of *bytes*, and in
# UTF-8 a character may take up to four. A rare character has no token of its own and comes as
# several. Decode them one by one, and you get this:

# %%
fox = tokenizer.encode("a 🦊!")
print("pieces:      ", [tokenizer.piece(id) for id in fox])
print("one by one:  ", "".join(tokenizer.decode([id]) for id in fox))
print("all together:", tokenizer.decode(fox))

# %% [markdown]
# The question marks are U+FFFD, the sign for "these bytes are no character". The cure is patience:
# hold bytes back until they make a whole character. Python's incremental decoder does exactly that.
# If a reply ends in the middle of a character, `flush` shows a single U+FFFD for it: the same as
# decoding all tokens at once, so that what you saw is what is stored.


# %% tags=["export"]
class TextStream:
    """Turns tokens into text as they come, and never shows half a character.

    A token holds bytes, and a character may span several tokens. The pieces joined are always
    exactly `tokenizer.decode` of all the tokens: bytes that can't become a character turn into
    U+FFFD, and an unfinished one at the end into a single U+FFFD, by `flush`.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Take one token; return the characters that it completes, perhaps none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """Return what is left at the end of the text, and be ready for the next one."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


# %%
text = TextStream(tokenizer)
print([text.push(id) for id in fox], repr(text.flush()))

# %% tags=["test"]
for sample_text in ("naïve café", "日本語 🦊👩‍👩‍👧 ünï", "", "\n\t mixed \u2581 \U0010ffff"):
    text = TextStream(tokenizer)
    pieces = [text.push(id) for id in tokenizer.encode(sample_text)]
    assert "".join(pieces) + text.flush() == sample_text
    assert "\ufffd" not in "".join(pieces)

# %% [markdown]
# Put the parts together, and you have what the terminal shows: pieces of text, as they come, until
# the model says that its turn is over.


# %% tags=["export"]
def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the control tokens: whichever of them comes, the reply is over.

    A good model ends with `<|end|>`. A poor one may start the next user turn by itself, and
    nobody wants to read that.
    """
    return frozenset(
        {
            tokenizer.pad_id,
            tokenizer.bos_id,
            tokenizer.end_id,
            tokenizer.system_id,
            tokenizer.user_id,
            tokenizer.assistant_id,
        }
    )


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    stop: Collection[int] | None = None,
    cache: KVCache | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[str]:
    """Yield the reply to `ids` as pieces of text, never empty and never half a character.

    `stop` is every control token when None; drafts are compared at the end of each sentence. The
    rest as in `generate`.
    """
    stop = stop_ids(tokenizer) if stop is None else stop
    pauses = sentence_ends(tokenizer)
    tokens = generate(
        model, ids, sampling, stop=stop, pauses=pauses, cache=cache, generator=generator
    )
    return _text_of(tokens, TextStream(tokenizer))


def _text_of(tokens: Iterator[int], text: TextStream) -> Iterator[str]:
    for token in tokens:
        if piece := text.push(token):
            yield piece
    if piece := text.flush():
        yield piece


# %%
for name in ("careful", "our default", "hot, min-p"):
    recipe = RECIPES[name]
    settings = Sampling(
        temperature=recipe.temperature, top_p=recipe.top_p, min_p=recipe.min_p, seed=3,
        max_tokens=LENGTH // 2,
    )  # fmt: skip
    print(f"--- {name}")
    begin, count = time.perf_counter(), 0
    for piece in stream(model, tokenizer, prompt, settings):
        print(piece, end="", flush=True)
        count += 1
    print(f"\n({count / (time.perf_counter() - begin):.0f} pieces a second)\n")

# %% [markdown]
# ## Exercises
#
# **1. Another filter.** *Top-nσ* (Tang et al. 2024) keeps every token whose logit is at least the
# best one minus n standard deviations of all logits. Write `top_n_sigma(logits_BV, n)`. What does it
# do when you divide all logits by a temperature first?


# %% tags=["solution"]
def top_n_sigma(logits_BV: Tensor, n: float) -> Tensor:
    floor_B1 = logits_BV.amax(-1, keepdim=True) - n * logits_BV.std(-1, keepdim=True)
    return logits_BV.masked_fill(logits_BV < floor_B1, -math.inf)


example = torch.tensor([[4.0, 2.0, 0.0, -2.0]])
sigma = float(example.std())
assert torch.isfinite(top_n_sigma(example, 2.1 / sigma)).sum() == 2
# A temperature scales the distance and the deviation alike: the set of tokens stays the same.
for temperature in (0.5, 2.0):
    before = torch.isfinite(top_n_sigma(logits_1V, 1.0))
    after = torch.isfinite(top_n_sigma(logits_1V / temperature, 1.0))
    assert (before != after).sum() <= 1, "one token may sit right on the border"

# %% [markdown]
# **2. No run twice.** Write `forbidden(history, n)`: the set of tokens that would complete a run of
# n tokens that is already in `history`. Use it in a greedy loop with n = 3 and measure `repeated`.


# %% tags=["solution"]
def forbidden(history: list[int], n: int) -> set[int]:
    if len(history) < n:
        return set()
    end = history[-(n - 1) :] if n > 1 else []
    starts = range(len(history) - n + 1)
    return {history[s + n - 1] for s in starts if history[s : s + n - 1] == end}


assert forbidden([1, 2, 3, 1, 2], 3) == {3}
assert forbidden([1, 2, 3, 1, 2], 2) == {3}
assert forbidden([1, 2], 1) == {1, 2}
assert forbidden([], 3) == set()


@torch.inference_mode()
def greedy_without_runs(ids: list[int], count: int, n: int) -> list[int]:
    cache, reply = model.new_cache(1), []
    unread = torch.tensor([ids])
    for _ in range(count):
        logits_1V = next_logits(model, unread, cache)
        logits_1V[0, list(forbidden(reply, n))] = -math.inf
        reply.append(int(logits_1V.argmax()))
        unread = torch.tensor([[reply[-1]]])
    return reply


free = greedy_without_runs(prompt, 40, 3)
assert repeated(free, 3) == 0
print(tokenizer.decode(free))

# %% [markdown]
# **3. Stop at words.** Stop *tokens* are easy, stop *words* aren't: "Human:" may come in three
# tokens, and its first half must not be shown until you know that the second doesn't follow. Write
# `until(pieces, stop)`: it passes on pieces of text, never shows any part of `stop`, and ends before
# it.


# %% tags=["solution"]
def until(pieces: Iterator[str], stop: str) -> Iterator[str]:
    held = ""
    for piece in pieces:
        held += piece
        if stop in held:
            held = held[: held.index(stop)]
            break
        # Hold back the longest end of the text that could still become the stop word.
        keep = next(n for n in range(len(stop) - 1, -1, -1) if n == 0 or held.endswith(stop[:n]))
        ready, held = held[: len(held) - keep], held[len(held) - keep :]
        if ready:
            yield ready
    if held:
        yield held


assert list(until(iter(["a H", "um", "an: b", "c"]), "Human:")) == ["a "]
assert "".join(until(iter("Hum Hum, Hu"), "Human:")) == "Hum Hum, Hu"
assert "".join(until(iter("aab"), "ab")) == "a"

# %% [markdown]
# ## Check yourself
#
# 1. Temperature 0.5 in a world of two tokens with probabilities 0.8 and 0.2. What are they now?
# 2. Top-k 40 keeps forty tokens. Name a place in a sentence where that is too many, and one where it
#    is too few.
# 3. Why does greedy decoding repeat itself, and why can't top-p stop a loop?
# 4. What does the KV cache keep, and why may it?
# 5. A program decodes token by token and shows "�" now and then. What went wrong?
#
# <details markdown="1"><summary>Answers</summary>
#
# 1. Square and divide by the sum: 0.64 and 0.04 make 0.94 and 0.06.
# 2. Too many after a first name that only one surname follows. Too few at the beginning of a story.
# 3. Every repetition makes the next one more likely. In a loop the repeated token *is* the likely one,
#    and top-p keeps likely tokens.
# 4. The keys and values of all tokens so far. Attention looks only backwards, so later tokens change
#    nothing about them.
# 5. It cut a character in two. Bytes must be held back until they make a whole one.
#
# </details>
#
# ## What we left out
#
# - **Beam search** keeps several texts, cuts the unlikely ones at every token and returns the most
#   likely of all. That helps translation, where one right answer exists. In open text it is
#   bland and repeats itself, as greedy decoding does (Holtzman et al. 2020); drafts are drawn, and only
#   then compared.
# - **Speculative decoding**: a small model guesses, the large one checks several tokens in one go.
#   Chapter 14 builds it.
# - **Paged caches and continuous batching**: servers with many users cut the cache into pages and
#   let rows join and leave a running batch. Our batch waits for its slowest row.
# - **Constrained decoding**: forbid every token that would break a grammar, such as JSON.
#
# ## Where this is in the package
#
# Everything tagged `export` here is `tinychat/generation.py`. The chat session calls `generate` with
# a cache that lives as long as the conversation; evaluation calls `generate_batch`.
#
# ## Sources
#
# - A. Holtzman, J. Buys, L. Du, M. Forbes, Y. Choi:
#   [The curious case of neural text degeneration](https://arxiv.org/abs/1904.09751) (2020). Top-p; why
#   the most likely text is not the best.
# - D. Adiwardana, M.-T. Luong, D. R. So et al.:
#   [Towards a human-like open-domain chatbot](https://arxiv.org/abs/2001.09977) (2020). Meena:
#   sample-and-rank.
# - M. N. Nguyen, A. Baker, C. Neo, A. Roush, A. Kirsch, R. Shwartz-Ziv:
#   [Turning up the heat: min-p sampling](https://arxiv.org/abs/2407.01082) (2024).
# - N. S. Keskar, B. McCann, L. R. Varshney, C. Xiong, R. Socher:
#   [CTRL](https://arxiv.org/abs/1909.05858) (2019). The repetition penalty.
# - A. Fan, M. Lewis, Y. Dauphin: [Hierarchical neural story generation](https://arxiv.org/abs/1805.04833)
#   (2018). Top-k.
# - R. Pope et al.: [Efficiently scaling transformer inference](https://arxiv.org/abs/2211.05102)
#   (2022). The cost of a token, the cache.
# - N. Shazeer: [Fast transformer decoding](https://arxiv.org/abs/1911.02150) (2019). One set of keys for
#   all heads; J. Ainslie et al.: [GQA](https://arxiv.org/abs/2305.13245) (2023). A few.
# - H. Touvron et al.: [Llama 2](https://arxiv.org/abs/2307.09288) (2023). The large shape.
# - C. Tang et al.: [Top-nσ](https://arxiv.org/abs/2411.07641) (2024). Exercise 1.
