# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Embeddings and positions
#
# Turn token numbers into vectors, and tell the model where each token stands.
#
# Chapter 03 turned text into numbers: each token is a row number in a vocabulary. A number is only
# a name, though. Token 3000 isn't twice token 1500, and neighbours in the list have nothing in
# common. A neural network needs numbers that *mean* something: similar things must have similar
# numbers. This chapter makes them.
#
# You will build three things:
#
# 1. **a table of vectors**, one row a token, and a way to ask who is near whom;
# 2. **token vectors learned from text**, by counting who stands next to whom;
# 3. **positions**: waves, learned rows, and the rotation that our GPT uses.
#
# You need chapter 03. The computing takes seconds.

# %% tags=["export"]
import torch
import torch.nn.functional as F
from torch import Tensor

# %% [markdown]
# ## From a name to a row
#
# The plainest way to give a name to a network is **one-hot**: a vector as long as the vocabulary,
# all zeros, with a single one in the place of the token. Every token is then equally far from every
# other. That is honest: we haven't said anything about them yet.
#
# The first layer multiplies this vector with a matrix. Look at what happens. All rows are multiplied
# by zero, except one, which is multiplied by one. The product *is* that row.

# %%
torch.manual_seed(0)
V, D = 6, 4  # six tokens, four numbers for each
table_VD = torch.randn(V, D)

one_hot_V = F.one_hot(torch.tensor(2), V).float()
print("one-hot:      ", one_hot_V.tolist())
print("times a table:", [round(x, 2) for x in (one_hot_V @ table_VD).tolist()])
print("row 2 of it:  ", [round(x, 2) for x in table_VD[2].tolist()])

# %% tags=["test"]
torch.testing.assert_close(one_hot_V @ table_VD, table_VD[2])

# %% [markdown]
# So nobody multiplies. You look the row up. This is all that `nn.Embedding` does, and the table is a
# set of weights like any other: the gradient changes the rows of those tokens that were read.
#
# A row is called the token's **embedding**. Think of a map. A town's name tells you nothing about
# where it lies; its two coordinates tell you which other towns are near. Embeddings are coordinates
# on a map with a few hundred directions instead of two.

# %%
embed = torch.nn.Embedding(V, D)
ids_T = torch.tensor([2, 5, 2])
embed(ids_T).sum().backward()
print("rows that a gradient reached:", embed.weight.grad.abs().sum(1).nonzero()[:, 0].tolist())

# %% tags=["test"]
assert torch.equal(embed(ids_T), embed.weight[ids_T])
assert embed.weight.grad[2].tolist() == [2.0] * D, "token 2 was read twice"

# %% [markdown]
# ## Who is near whom
#
# To compare two vectors, multiply them place by place and add up: the **dot product**. It is large
# when both are large in the same places, zero when they have nothing to do with each other, negative
# when they pull in opposite ways. Remember it well: attention, the next chapter, is made of it.
#
# The dot product also grows with the lengths of the vectors. If you only want to know whether two
# arrows point the same way, divide by both lengths. This is the **cosine** of the angle between
# them: 1 for the same direction, 0 for a right angle, -1 for opposite.

# %%
a, b, c = torch.tensor([3.0, 4.0]), torch.tensor([30.0, 40.0]), torch.tensor([-4.0, 3.0])
for name, other in (("a · b", b), ("a · c", c), ("a · -a", -a)):
    cosine = a @ other / (a.norm() * other.norm())
    print(f"{name:>7}: dot product {float(a @ other):6.1f}, cosine {float(cosine):5.2f}")

# %% [markdown]
# With this you can search a whole table: compare a vector with every row, and take the best.


# %% tags=["export"]
def nearest(table_VD: Tensor, query_D: Tensor, count: int) -> list[tuple[int, float]]:
    """Return the `count` rows that point most nearly where the query points, best first.

    Each as (row number, cosine from -1 to 1). Lengths don't count; a row of zeros scores 0.
    """
    scores_V = F.normalize(table_VD, dim=-1) @ F.normalize(query_D, dim=-1)
    best = scores_V.topk(min(count, len(table_VD)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


# %% tags=["test"]
towns = torch.tensor([[1.0, 0.0], [7.0, 7.0], [0.0, -2.0]])
assert [row for row, _ in nearest(towns, torch.tensor([1.0, 0.2]), 3)] == [0, 1, 2]

# %% [markdown]
# ## Learning from the company
#
# Where do good coordinates come from? From an idea of linguists (Harris 1954, Firth 1957): **you
# know a word by the company it keeps**. "Dog" and "cat" stand near "fed", "tail" and "asleep".
# "Tuesday" doesn't. Two words that can stand in the same places mean similar things.
#
# You can take this literally and count. For every pair of tokens, how often does one stand at most
# four places from the other? The cell does so for the most frequent whole-word tokens of our corpus.

# %%
import math
import os
import re

from tinychat.data import tokenizer_model
from tinychat.data.corpus import dialogues, explanations, stories
from tinychat.tokenizer import Tokenizer

FAST = os.environ.get("TINYCHAT_FAST") == "1"
tokenizer = Tokenizer(tokenizer_model())

texts = [one.text for one in [*stories(), *explanations()]]
texts += [message.content for one in dialogues() for message in one.messages]
if FAST:
    texts = texts[:3000]
texts_ids = tokenizer.encode_batch([text.lower() for text in texts], threads=1)
# Between two texts stand as many "nothing" tokens as the window is wide, so that no pair crosses.
WINDOW = 4
ids_T = torch.tensor([id for ids in texts_ids for id in [*ids, *[tokenizer.pad_id] * WINDOW]])

# Words only: a space (shown as the mark "▁") and then letters, and seldom a piece
# after it that goes on with the same word.
V = tokenizer.vocab_size
goes_on_V = torch.tensor([bool(re.match("[a-z]", tokenizer.piece(id))) for id in range(V)])
frequency_V = torch.bincount(ids_T, minlength=V)
broken_V = torch.bincount(ids_T[:-1][goes_on_V[ids_T[1:]]], minlength=V)
words = {}
for id in frequency_V.argsort(descending=True, stable=True).tolist():
    piece = tokenizer.piece(id)
    if re.fullmatch("▁[a-z]{2,}", piece) and frequency_V[id] >= max(10, 3 * broken_V[id]):
        words[piece[1:]] = id
words = dict(list(words.items())[: 1000 if FAST else 2000])
print(f"{len(ids_T):,} tokens, {len(words):,} frequent words")


# %%
def count_pairs(ids_T: Tensor, chosen: list[int], window: int) -> Tensor:
    """How often chosen tokens s and t stand at most `window` places apart, `[S, S]`."""
    S = len(chosen)
    row_V = torch.full((tokenizer.vocab_size,), S)  # all others share one row, dropped at the end
    row_V[chosen] = torch.arange(S)
    rows_T = row_V[ids_T]
    counts = torch.zeros((S + 1) * (S + 1))
    for distance in range(1, window + 1):
        pairs = rows_T[:-distance] * (S + 1) + rows_T[distance:]
        counts += torch.bincount(pairs, minlength=len(counts))
    counts_SS = counts.view(S + 1, S + 1)[:S, :S]
    return counts_SS + counts_SS.T


counts_SS = count_pairs(ids_T, list(words.values()), WINDOW)
row_of = {word: row for row, word in enumerate(words)}
names = list(words)
for word in ("mother", "red"):
    best = counts_SS[row_of[word]].topk(8).indices.tolist()
    print(f"most often near {word!r}: {', '.join(names[row] for row in best)}")

# %% [markdown]
# Not helpful: "the" and "and" keep company with everyone. What counts is standing together *more
# often than by chance*. If two words didn't care about each other, the count of the pair would be
# the product of their shares. So divide by that, and take the logarithm: **pointwise mutual
# information**. Negative values mostly mean "too rare to say", so they become zero.
#
# This gives each word a long vector: its score with every other word. Most of it is noise and
# repetition. The **singular value decomposition** finds the few directions that explain most of the
# table (it is the best possible compression of a matrix into so many columns). What is left are
# short, dense vectors. Levy and Goldberg showed in 2014 that the famous *word2vec* learns, by
# gradient descent, nearly the same thing.

# %%
total = counts_SS.sum()
share_S = counts_SS.sum(1) / total
chance_SS = share_S[:, None] * share_S[None, :]
information_SS = (counts_SS / total / chance_SS).log().clamp(min=0).nan_to_num(0, 0, 0)
torch.manual_seed(0)
u_SD, size_D, _ = torch.svd_lowrank(information_SS, q=64, niter=3)
vectors_SD = u_SD * size_D.sqrt()
print("from", tuple(information_SS.shape), "to", tuple(vectors_SD.shape))

for word in ("mother", "red", "seven", "morning", "cat", "sang"):
    if word in row_of:
        found = nearest(vectors_SD, vectors_SD[row_of[word]], 6)[1:]
        print(f"{word:>8}: " + ", ".join(f"{names[row]} {score:.2f}" for row, score in found))

# %% [markdown]
# Nobody told this program what a number, a family or a color is. It read a few hundred thousand
# tokens, no more than a shelf of children's books, so expect odd guests among the neighbours.
#
# Don't trust a few well-chosen words. Measure. The next cell has a list of related pairs, written
# down before looking, and asks how often the partner is nearer than a random word. Chance is one
# half.

# %%
PAIRS = """mother father; red blue; one two; three four; morning evening; dog cat; hot cold;
    he she; his her; king queen; bread butter; salt sugar; night day; sun moon; river lake;
    brother sister; left right; big small; happy sad; table chair; winter summer; boy girl;
    seven eight; eyes ears; walk run; said asked; tree leaves; question answer; old young"""
pairs = [pair.split() for pair in PAIRS.split(";")]
pairs = [pair for pair in pairs if set(pair) <= row_of.keys()]
unit_SD = F.normalize(vectors_SD, dim=-1)
wins = []
for left, right in pairs:
    scores_S = unit_SD @ unit_SD[row_of[left]]
    wins.append(float((scores_S < scores_S[row_of[right]]).float().mean()))
score = sum(wins) / len(wins)
print(f"{len(pairs)} pairs: the partner is nearer than {score:.0%} of all words (chance: 50%)")

# %% tags=["test"]
assert score > 0.8

# %% [markdown]
# ## How a GPT learns its table
#
# Our GPT doesn't count. It starts from random rows and learns them together with everything else, by
# guessing the next token: rows that help to guess well survive. The force behind it is the same.
# Tokens after which the same things follow are pushed to the same place, since the same guess is
# right after both.
#
# ## A bag of words
#
# Now you have a vector for each token. What about a sentence? The simplest way is to average, and
# for searching that's not bad at all. But watch what gets lost.


# %%
def pooled(sentence: str) -> Tensor:
    """The mean of the vectors of the words that we know."""
    return vectors_SD[[row_of[word] for word in sentence.split() if word in row_of]].mean(0)


one, two = "the cat saw the dog", "the dog saw the cat"
cosine = F.cosine_similarity(pooled(one), pooled(two), dim=0)
print(f"{one!r} and {two!r}: cosine {cosine:.4f}")

# %% tags=["test"]
assert {"cat", "dog", "saw"} <= row_of.keys()
torch.testing.assert_close(pooled(one), pooled(two))

# %% [markdown]
# Identical. An average doesn't know who came first, and neither does attention, which is an average
# too, as you will see. Language depends on order. So the position must be put into the vectors.
#
# ## Positions as waves
#
# You could add the position itself: 0, 1, 2, 3 ... But large numbers would drown the meaning, and
# the network would meet numbers in long texts that it never saw in training.
#
# The first transformer (Vaswani et al. 2017) used a clock instead. A clock tells many seconds apart
# with only three hands, because each turns at its own speed. Here a position becomes a set of hands:
# sines and cosines, from fast to very slow. All values stay between -1 and 1.


# %% tags=["export"]
def sinusoidal_positions(length: int, width: int) -> Tensor:
    """Return the fixed position vectors of Vaswani et al. 2017, section 3.5, as `[length, width]`.

    Even columns hold sines, odd columns cosines, of wavelengths from 2π to 10000 · 2π tokens.
    Raises ValueError for an odd width.
    """
    if width % 2:
        raise ValueError(f"width {width} is odd; sines and cosines come in pairs")
    position_T1 = torch.arange(length, dtype=torch.float32)[:, None]
    frequency_D = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    table_TD = torch.empty(length, width)
    table_TD[:, 0::2] = torch.sin(position_T1 * frequency_D)
    table_TD[:, 1::2] = torch.cos(position_T1 * frequency_D)
    return table_TD


# %%
waves_TD = sinusoidal_positions(512, 64)
for column in (0, 16, 32):
    marks = "".join(" ░▒▓█"[round(2 * x + 2)] for x in waves_TD[:72, column].tolist())
    print(f"column {column:2}: {marks}")

# %% [markdown]
# Each row of the picture is one column of the table, along 72 positions: a fast hand, a slower one,
# and one that has hardly moved.
#
# The waves have a lovely property. The dot product of two positions depends only on *how far apart*
# they are, not on where they stand.

# %%
for distance in (0, 1, 2, 8, 32):
    here = float(waves_TD[40] @ waves_TD[40 + distance])
    there = float(waves_TD[400] @ waves_TD[400 + distance])
    print(f"{distance:2} apart: {here:6.2f} at position 40, {there:6.2f} at position 400")

# %% tags=["test"]
torch.testing.assert_close(waves_TD[40] @ waves_TD[43], waves_TD[400] @ waves_TD[403])

# %% [markdown]
# ## Positions as learned rows
#
# GPT-1 to GPT-3 took the shortest way: a second table, one row a position, added to the token's row
# and learned like it. It works as well, with one flaw: a position beyond the longest training text
# has no row at all.

# %%
learned = torch.nn.Embedding(512, 64)
try:
    learned(torch.tensor([512]))
except IndexError as error:
    print("position 512:", error)
print("the waves go on:", tuple(sinusoidal_positions(100_000, 64).shape))

# %% [markdown]
# ## Positions as turns
#
# Both ways *add* something to the token. Adding mixes what a token is with where it stands: after
# multiplying two such sums you get four products, and only one of them is pure meaning.
#
# **Rotary positions** (Su et al. 2021) add nothing. They *turn* the vector. Take two numbers of it as
# an arrow on paper, and turn the arrow by an angle that grows with the position. A turn changes no
# length, so no meaning is drowned. And when you compare two arrows, only the angle *between* them
# counts: turn both by the same amount and nothing changes.
#
# That's the whole trick. Three places further along, both tokens have turned by the same extra
# angle. So their dot product only knows the distance.


# %%
def turned(arrow: Tensor, angle: float) -> Tensor:
    """An arrow [x, y] turned by an angle: school trigonometry."""
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = arrow.tolist()
    return torch.tensor([x * cos - y * sin, y * cos + x * sin])


q, k = torch.tensor([1.0, 0.5]), torch.tensor([0.3, 1.0])
for q_at, k_at in ((5, 2), (15, 12), (905, 902), (5, 3)):
    product = float(turned(q, 0.1 * q_at) @ turned(k, 0.1 * k_at))
    print(f"query at {q_at:3}, key at {k_at:3}: {product:.4f}")

# %% [markdown]
# The first three lines agree: the distance is three each time. The last one differs.
#
# A vector has more than two numbers, so it is cut into pairs, and each pair turns at its own speed:
# the hands of the clock again. The angles depend on nothing but the position, so their cosines and
# sines are computed once and kept as tables.


# %% tags=["export"]
def rotary_tables(length: int, head_width: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for rotary positions, each `[length, head_width / 2]`, float32.

    Pair number i of a head turns by `theta ** (-2i / head_width)` radians a token
    (Su et al. 2021, RoFormer, equation 15).
    """
    pair = torch.arange(0, head_width, 2, dtype=torch.float32)
    speed = theta ** (-pair / head_width)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * speed
    return angle.cos(), angle.sin()


# %%
cos_TK, sin_TK = rotary_tables(1024, 64)
print("tokens for one full turn:")
for pair in (0, 8, 16, 24, 31):
    print(f"  pair {pair:2}: {2 * math.pi / (10000.0 ** (-2 * pair / 64)):10,.0f}")

# %% [markdown]
# Fast pairs tell neighbours apart. The slowest don't finish one turn in any text that our model
# reads; they hardly notice positions and are free for pure meaning.
#
# Now the turning itself, for all tokens and heads at once. The shape suffix `_BHTK` says what each
# axis is: batch, heads, time, and the K numbers of one head (chapter 05 explains heads).


# %% tags=["export"]
def apply_rotary(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotate the vector of each token by its position; lengths stay, shapes stay.

    Component i pairs with component i + K/2 (the layout of GPT-NeoX, Llama and Qwen), not with
    its neighbour as in the paper: a permutation of the head's columns, so equally expressive,
    and two contiguous halves are faster to read.
    """
    left, right = x_BHTK.chunk(2, dim=-1)
    return torch.cat((left * cos_TK - right * sin_TK, right * cos_TK + left * sin_TK), dim=-1)


# %% [markdown]
# Check all three promises: position 0 stays, lengths stay, and the product knows the distance only.
# The last line shows the other way for comparison: with *added* waves, the same two tokens give
# another product at another place.

# %%
torch.manual_seed(1)
q_K, k_K = torch.randn(2, 64)


def product(q_at: int, k_at: int) -> float:
    """The dot product after turning each vector to its position."""
    q_turned = apply_rotary(q_K, cos_TK[q_at], sin_TK[q_at])
    return float(q_turned @ apply_rotary(k_K, cos_TK[k_at], sin_TK[k_at]))


for q_at, k_at in ((7, 3), (107, 103), (1007, 1003), (7, 2)):
    print(f"rotary, query at {q_at:4}, key at {k_at:4}: {product(q_at, k_at):8.4f}")
waves_TD = sinusoidal_positions(1024, 64)
for q_at, k_at in ((7, 3), (1007, 1003)):
    added = float((q_K + waves_TD[q_at]) @ (k_K + waves_TD[k_at]))
    print(f"added waves, at {q_at:4} and {k_at:4}: {added:8.4f}")

# %% tags=["test"]
assert torch.equal(apply_rotary(q_K, cos_TK[0], sin_TK[0]), q_K), "position 0 doesn't turn"
torch.testing.assert_close(apply_rotary(q_K, cos_TK[99], sin_TK[99]).norm(), q_K.norm())
assert abs(product(7, 3) - product(1007, 1003)) < 1e-3
assert abs(product(7, 3) - product(7, 2)) > 1e-2
assert abs(added - float((q_K + waves_TD[7]) @ (k_K + waves_TD[3]))) > 1, "adding knows the place"

# %% [markdown]
# ## What we left out
#
# - **word2vec and GloVe** themselves (Mikolov et al. 2013, Pennington et al. 2014): they learn such
#   vectors step by step instead of counting, and so can read billions of words.
# - **Analogies** ("king - man + woman") and **a map in two dimensions**. Our corpus is small for the
#   first one.
# - **Longer texts than in training.** Rotary tables have no end, but a model that never saw such
#   angles guesses badly. Slowing the turns helps (Chen et al. 2023; YaRN, Peng et al. 2023).
# - **ALiBi** (Press et al. 2022): no position vectors at all; attention scores fall with distance.
#
# ## Where this is in the package
#
# Everything tagged `export` here is `tinychat/embeddings.py`. `GPT` in chapter 06 keeps the rotary
# tables; attention in chapter 05 turns queries and keys with them. The token table itself is
# `model.embed`, an ordinary `nn.Embedding`.
#
# ## Exercises
#
# **1. The odd one out.** Write `odd_one_out(words)`: the word whose mean cosine with the others is
# lowest. Try it on `["mother", "father", "brother", "seven"]`.


# %% tags=["solution"]
def odd_one_out(group: list[str]) -> str:
    unit_ND = F.normalize(vectors_SD[[row_of[word] for word in group]], dim=-1)
    return group[int((unit_ND @ unit_ND.T).sum(1).argmin())]


print(odd_one_out(["mother", "father", "brother", "seven"]))
assert odd_one_out(["mother", "father", "brother", "seven"]) == "seven"
assert odd_one_out(["two", "three", "morning", "four"]) == "morning"

# %% [markdown]
# **2. Waves turn too.** Vaswani et al. chose waves because a step of n positions is a *linear* map:
# one matrix brings every position vector to the one n further on. Build this matrix for n = 5 from
# 2×2 rotations and check it on the whole table. What does that have to do with rotary positions?


# %% tags=["solution"]
def step_matrix(n: int, width: int) -> Tensor:
    matrix_DD = torch.zeros(width, width)
    for pair in range(width // 2):
        angle = n * 10000.0 ** (-2 * pair / width)
        cos, sin = math.cos(angle), math.sin(angle)
        # sin(a + n) = sin a cos n + cos a sin n, and the like for the cosine
        matrix_DD[2 * pair, 2 * pair : 2 * pair + 2] = torch.tensor([cos, sin])
        matrix_DD[2 * pair + 1, 2 * pair : 2 * pair + 2] = torch.tensor([-sin, cos])
    return matrix_DD


moved = sinusoidal_positions(100, 32) @ step_matrix(5, 32).T
torch.testing.assert_close(moved[:-5], sinusoidal_positions(100, 32)[5:], atol=1e-5, rtol=1e-4)
# A step is a rotation of each pair. Rotary positions apply this very rotation to the token's own
# vector, instead of adding the rotated wave to it.

# %% [markdown]
# **3. A slower clock.** Models for long texts raise `theta`. Write `still_pairs(theta, context)`: how
# many of the 32 pairs of a head don't finish one turn within the context? Compare 10,000 with
# 1,000,000 at 1,024 tokens.


# %% tags=["solution"]
def still_pairs(theta: float, context: int, head_width: int = 64) -> int:
    speeds = [theta ** (-2 * pair / head_width) for pair in range(head_width // 2)]
    return sum(speed * context < 2 * math.pi for speed in speeds)


for theta in (10_000.0, 1_000_000.0):
    print(f"theta {theta:9,.0f}: {still_pairs(theta, 1024)} of 32 pairs never come round")
assert still_pairs(10_000.0, 1024) < still_pairs(1_000_000.0, 1024) < 32

# %% [markdown]
# ## Sources
#
# - Z. Harris: *Distributional Structure* (1954); J. R. Firth: *A Synopsis of Linguistic Theory*
#   (1957). The company a word keeps.
# - O. Levy, Y. Goldberg: *Neural Word Embedding as Implicit Matrix Factorization* (2014). Why
#   counting and word2vec meet.
# - A. Vaswani et al.: *Attention Is All You Need* (2017), section 3.5. Positions as waves.
# - J. Su et al.: *RoFormer: Enhanced Transformer with Rotary Position Embedding* (2021).
