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
# **What you will build**
#
# 1. **a table of vectors**, one row a token, and a way to ask who is near whom;
# 2. **token vectors learned from text**, by counting who stands next to whom;
# 3. a map of the shipped model's own table, and a test of its analogies, *dog* to *puppy* as *cat* to
#    *kitten*, with an honest score;
# 4. **sentence vectors**, and a search for the sentence that means nearly the same;
# 5. **positions**: waves, learned rows, and the rotation that our GPT uses, in a race.
#
# **What you need:** chapters 01 to 03. The code runs in well under a minute; take an hour to read.

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

from tinychat.book.picture import picture
from tinychat.data import tokenizer_model
from tinychat.data.corpus import dialogues, explanations, stories
from tinychat.data.split import split_of
from tinychat.runtime import checkpoint
from tinychat.runtime.device import set_threads
from tinychat.tokenizer import Tokenizer

set_threads()
FAST = os.environ.get("TINYCHAT_FAST") == "1"
tokenizer = Tokenizer(tokenizer_model())

# What chapter 02 holds out stays unread here, too.
read = [one for one in [*stories(), *explanations()] if split_of(one.id) == "train"]
texts = [one.text for one in read]
talks = [one for one in dialogues() if split_of(one.id) == "train"]
texts += [message.content for one in talks for message in one.messages]
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
frequency_V[tokenizer.pad_id] = 0  # it only keeps the texts apart
tokens_read = int(frequency_V.sum())
broken_V = torch.bincount(ids_T[:-1][goes_on_V[ids_T[1:]]], minlength=V)
words = {}
for id in frequency_V.argsort(descending=True, stable=True).tolist():
    piece = tokenizer.piece(id)
    if re.fullmatch("▁[a-z]{2,}", piece) and frequency_V[id] >= max(10, 3 * broken_V[id]):
        words[piece[1:]] = id
words = dict(list(words.items())[: 1000 if FAST else 2000])
print(f"{tokens_read:,} tokens, {len(words):,} frequent words")


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
# often than by chance*. If two words didn't care about each other, the share of the pair among all
# pairs would be the product of their two shares. So divide by that, and take the logarithm:
# **pointwise mutual information**. Negative values mostly mean "too rare to say", so they become zero.
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
# Nobody told this program what a number, a family or a colour is. It read the tokens that were
# counted above, no more than a shelf of children's books, so expect odd guests among the neighbours.
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
# The shipped base model has read far more than this chapter can. So borrow its table for the rest of
# this part. (How it was trained is chapter 07.)

# %%
shipped = checkpoint.load(checkpoint.find("base"))
base_tokenizer = Tokenizer(shipped.tokenizer)
assert base_tokenizer.sha256 == tokenizer.sha256, "else an id would mean another token"
everything_VD = shipped.state["embed.weight"]
base_pieces = [base_tokenizer.piece(id) for id in range(base_tokenizer.vocab_size)]
base_words = [
    (piece[1:], id) for id, piece in enumerate(base_pieces) if re.fullmatch("▁[a-z]{2,}", piece)
]
base_names = [word for word, _ in base_words]
base_row = {word: row for row, word in enumerate(base_names)}
base_VD = everything_VD[[id for _, id in base_words]]
print(f"it read {shipped.info.lineage['tokens'] / tokens_read:,.0f} times as many tokens")
print(f"{tuple(everything_VD.shape)} numbers, {len(base_names):,} of the rows are whole words")

mean_D = base_VD.mean(dim=0)
print(f"a row is {base_VD.norm(dim=1).mean():.2f} long, their mean {mean_D.norm():.2f}")
base_VD = base_VD - mean_D
for word in ("mother", "red", "seven", "morning", "cat", "sang"):
    found = nearest(base_VD, base_VD[base_row[word]], 6)[1:]
    print(f"{word:>8}: " + ", ".join(f"{base_names[row]} {score:.2f}" for row, score in found))

# %% [markdown]
# One thing had to be done first. All rows share a large common part, which says nothing about any
# of them, and with it every cosine is high. So subtract the mean (Mu and Viswanath 2018).
#
# The same list of pairs, and both tables on the words that both know:

# %%
both = [pair for pair in pairs if set(pair) <= base_row.keys()]
shared = [name for name in names if name in base_row]
by_table = {}
for title, table_SD, rows in (
    ("counted here", vectors_SD, row_of),
    ("the shipped model's", base_VD, base_row),
):
    unit = {name: F.normalize(table_SD[rows[name]], dim=0) for name in shared}
    unit_SD = torch.stack(list(unit.values()))
    wins = []
    for left, right in both:
        scores_S = unit_SD @ unit[left]
        wins.append(float((scores_S < unit[left] @ unit[right]).float().mean()))
    by_table[title] = sum(wins) / len(wins)
    print(f"{title:>19}: the partner is nearer than {by_table[title]:.1%} of {len(shared):,} words")

# %% tags=["test"]
assert by_table["the shipped model's"] > 0.9

# %% [markdown]
# ## A map
#
# You can't look at hundreds of directions. But you can ask for the two along which a handful of words
# lies spread out most, and draw those. This is **principal component analysis**, and it is the
# singular value decomposition once more. The squares of its sizes say how much of the spread each
# direction holds. Most of what there is gets lost, as on any map.

# %%
GROUPS = {
    "family": "mother father sister brother uncle aunt daughter son grandmother grandfather",
    "colours": "red blue green yellow black white brown pink",
    "numbers": "two three four five six seven eight nine ten twelve",
    "animals": "dog cat bird mouse horse rabbit bear fox duck fish",
    "past": "walked ran jumped went came looked climbed turned",
    "time": "morning evening night day week month year hour minute",
}
grouped = {
    group: [word for word in words.split() if word in base_row] for group, words in GROUPS.items()
}
chosen = [word for group in grouped.values() for word in group]
chosen_ND = base_VD[[base_row[word] for word in chosen]]
chosen_ND = chosen_ND - chosen_ND.mean(dim=0)
_, sizes_K, axes_KD = torch.linalg.svd(chosen_ND, full_matrices=False)
map_N2 = chosen_ND @ axes_KD[:2].T
kept = (sizes_K[:2] ** 2).sum() / (sizes_K**2).sum()
print(
    f"two directions of {chosen_ND.shape[1]} keep {kept:.0%} of the spread of {len(chosen)} words"
)

group_of = {word: group for group, members in grouped.items() for word in members}
neighbours = torch.cdist(map_N2, map_N2).fill_diagonal_(float("inf")).argmin(dim=1).tolist()
same_group = [
    group_of[chosen[one]] == group_of[chosen[other]] for one, other in enumerate(neighbours)
]
on_the_map = sum(same_group) / len(same_group)
by_luck = sum(len(group) * (len(group) - 1) for group in grouped.values()) / len(chosen)
by_luck /= len(chosen) - 1
print(f"{on_the_map:.0%} have a neighbour of their own group on the map (by luck: {by_luck:.0%})")

# %% tags=["test"]
assert on_the_map > 0.5 > by_luck


# %%
# alt: Words as points in two dimensions: family, colours, numbers, animals, verbs form clusters.
def draw_map(plt):
    figure, axis = plt.subplots(figsize=(8, 6))
    for number, (group, members) in enumerate(grouped.items()):
        rows = [chosen.index(word) for word in members]
        across, up = map_N2[rows].T.tolist()
        axis.scatter(across, up, s=14, color=f"C{number}", label=group)
        for x, y, word in zip(across, up, members, strict=True):
            axis.annotate(word, (x, y), xytext=(3, 3), textcoords="offset points", fontsize=8)
    axis.set_axis_off()
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


picture("04_map", draw_map)

# %% [markdown]
# The groups are ours; the computer only got the words. Nobody had told the model either.
#
# ## Dog is to puppy as cat is to ...
#
# If places mean something, do *directions*? Go from *dog* to *puppy*: that step should mean "the
# young one of". Take the same step from *cat*, and see where you land (Mikolov and others 2013):
#
# $$\text{puppy} - \text{dog} + \text{cat} \approx \; ?$$
#
# The three words of the question themselves are not allowed as an answer. Mind that this is a gift:
# you mostly land next to *cat* and *puppy*.

# %%
unit_VD = F.normalize(base_VD, dim=-1)


def analogy(a: str, b: str, c: str, count: int = 5) -> list[str]:
    """What is to c as b is to a: the nearest words to b - a + c."""
    scores_V = unit_VD @ (unit_VD[base_row[b]] - unit_VD[base_row[a]] + unit_VD[base_row[c]])
    scores_V[[base_row[a], base_row[b], base_row[c]]] = -torch.inf
    return [base_names[row] for row in scores_V.topk(count).indices.tolist()]


for a, b, c in (
    ("dog", "puppy", "cat"),
    ("cat", "kitten", "dog"),
    ("man", "woman", "king"),
    ("big", "bigger", "old"),
    ("walk", "walked", "jump"),
    ("tree", "trees", "child"),
    ("hot", "cold", "big"),
):
    print(f"{a} : {b} :: {c} : {', '.join(analogy(a, b, c))}")

# %% [markdown]
# A few examples prove nothing, above all if someone has chosen them. So take lists of pairs, written
# down before looking, and ask each pair about each other pair of its list. The baseline is a lazy
# answer that ignores the first two words: the nearest neighbour of the third. Chance is one in some
# thousands.

# %%
RELATIONS = {
    "young": "dog puppy; cat kitten",
    "family": """father mother; brother sister; son daughter; uncle aunt; grandfather grandmother;
        husband wife; king queen; prince princess; man woman; boy girl; he she; him her""",
    "more": """big bigger; small smaller; old older; fast faster; long longer; strong stronger;
        high higher; large larger; young younger; late later""",
    "past": """walk walked; jump jumped; look looked; play played; want wanted; help helped;
        call called; go went; run ran; see saw; take took; come came; give gave; find found""",
    "many": """tree trees; bird birds; house houses; book books; hand hands; flower flowers;
        star stars; child children; friend friends; door doors""",
    "opposite": """hot cold; big small; day night; up down; in out; happy sad; good bad;
        left right; open closed; old young""",
}
analogies: dict[str, tuple[int, int, int]] = {}
print(f"{'':>10} {'asked':>6} {'right':>6} {'lazy':>6}")
for relation, listed in RELATIONS.items():
    known = [pair.split() for pair in listed.split(";")]
    known = [pair for pair in known if set(pair) <= base_row.keys()]
    right = lazy = asked = 0
    for a, b in known:
        for c, d in known:
            if a != c:
                asked += 1
                right += analogy(a, b, c, 1) == [d]
                # a and b are not allowed here either
                near = [row for row, _ in nearest(base_VD, base_VD[base_row[c]], 4)]
                lazy += [base_names[row] for row in near if base_names[row] not in (a, b, c)][
                    0
                ] == d
    analogies[relation] = asked, right, lazy
    print(f"{relation:>10} {asked:6} {right / asked:6.0%} {lazy / asked:6.0%}")
asked, right, lazy = (sum(row[column] for row in analogies.values()) for column in range(3))
print(
    f"{'all':>10} {asked:6} {right / asked:6.0%} {lazy / asked:6.0%}   chance 1 / {len(base_names):,}"
)

# %% tags=["test"]
assert right / asked > 0.4 and right > lazy + 0.1 * asked
questions, by_step, by_neighbour = analogies["more"]
assert by_step > by_neighbour + 0.3 * questions
for relation in ("past", "more"):
    questions, by_step, by_neighbour = analogies[relation]
    assert by_step > 0.9 * by_neighbour  # the past stands so near to its verb that lazy does well
    assert by_step / questions > analogies["opposite"][1] / analogies["opposite"][0] + 0.2


# %%
# alt: Share right for six relations, beside the lazy answer; opposites are far behind the others.
def draw_analogies(plt):
    figure, axis = plt.subplots()
    places = torch.arange(len(analogies)).tolist()
    axis.bar(
        [x - 0.2 for x in places], [r / n for n, r, _ in analogies.values()], 0.4, label="step"
    )
    axis.bar(
        [x + 0.2 for x in places], [z / n for n, _, z in analogies.values()], 0.4, label="lazy"
    )
    axis.set_xticks(places, list(analogies))
    axis.set(ylabel="right", ylim=(0, 1))
    axis.legend()
    return figure


picture("04_analogies", draw_analogies)

# %% [markdown]
# Read it honestly. *Big* to *bigger* is a direction: the step finds most of these words, and their
# neighbours hardly any. In *family*, *past* and *many*, look how near the lazy answer comes: where the
# partner simply lives next door, the step adds little or nothing. And opposites are no direction at all.
# Why should they be? From *hot* to *cold* and from *big* to *small*: what do these two steps have in
# common?
#
# ## A bag of words
#
# Now you have a vector for each token. What about a sentence? The simplest way is to average its
# tokens (**pooling**), and for searching that's not bad at all. But watch what gets lost.


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
# Identical: an average doesn't know who came first. We come back to that.
#
# First use it. Cut the book's explanations into sentences, pool each, and search: the nearest vector
# should be the sentence that is about the same. *The* and *is* stand everywhere and say nothing, so
# the better average lets rare tokens count more: a token with the share p of all tokens gets the
# weight a / (a + p) (Arora and others 2017; a is a thousandth).

# %%
sentences, source = [], []
for number, one in enumerate(explanations()[:80] if FAST else explanations()):
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", one.text):
        if 6 <= len(sentence.split()) <= 40:
            sentences.append(" ".join(sentence.split()))
            source.append(number)
source_N = torch.tensor(source)
share_V = frequency_V / frequency_V.sum()
weight_V = 1e-3 / (1e-3 + share_V)
centred_VD = everything_VD - everything_VD.mean(dim=0)


def sentence_vectors(texts: list[str], weights: Tensor) -> Tensor:
    """The weighted mean of each text's token vectors, `[N, D]`, each of length 1."""
    rows = base_tokenizer.encode_batch([f" {text}".lower() for text in texts], threads=1)
    offsets = torch.tensor([0, *map(len, rows[:-1])]).cumsum(dim=0)
    ids = torch.tensor([id for row in rows for id in row])
    sums_ND = F.embedding_bag(ids, centred_VD, offsets, mode="sum", per_sample_weights=weights[ids])
    return F.normalize(sums_ND, dim=-1)


plain_ND = sentence_vectors(sentences, torch.ones_like(weight_V))
weighted_ND = sentence_vectors(sentences, weight_V)
print(f"{len(sentences):,} sentences from {int(source_N.max()) + 1} explanations")
for query in (
    "Why do stars shine?",
    "How does the heart move blood through the body?",
    "Bread dough needs yeast to rise.",
):
    print(query)
    for row, score in nearest(weighted_ND, sentence_vectors([query], weight_V)[0], 2):
        print(f"  {score:.2f} {sentences[row]}")

# %% [markdown]
# Measure it. Take each sentence as a question and look for its nearest other sentence. If the search
# is any good, it comes from the same explanation far more often than by luck. For comparison, search
# with the tokens themselves: a vector as long as the vocabulary that says which tokens are in the
# sentence, without any embedding.


# %%
def found_at_home(vectors_ND: Tensor) -> float:
    """How often the nearest other sentence is from the same explanation."""
    home = 0
    for start in range(0, len(vectors_ND), 500):
        scores_NN = vectors_ND[start : start + 500] @ vectors_ND.T
        here = torch.arange(len(scores_NN))
        scores_NN[here, start + here] = -1
        home += int((source_N[scores_NN.argmax(dim=1)] == source_N[start + here]).sum())
    return home / len(vectors_ND)


rows = base_tokenizer.encode_batch([f" {text}".lower() for text in sentences], threads=1)
bags_NV = torch.zeros(len(rows), base_tokenizer.vocab_size)
for row, ids in enumerate(rows):
    bags_NV[row, ids] = 1
same_NN = source_N[:, None] == source_N
searches = {
    "luck": float((same_NN.sum() - len(rows)) / (len(rows) * (len(rows) - 1))),
    "which tokens": found_at_home(F.normalize(bags_NV, dim=-1)),
    "which tokens, weighted": found_at_home(F.normalize(bags_NV * weight_V, dim=-1)),
    "mean of vectors": found_at_home(plain_ND),
    "weighted mean": found_at_home(weighted_ND),
}
for name, share in searches.items():
    print(f"{name:>22}: {share:.1%} of the nearest sentences come from the same explanation")

# %% tags=["test"]
assert searches["weighted mean"] > searches["mean of vectors"] > 3 * searches["luck"]
assert searches["weighted mean"] > searches["which tokens"]
assert searches["which tokens, weighted"] > searches["weighted mean"]

# %% [markdown]
# The weights matter more than the vectors. With them the mean finds its way home far more often; but
# counting shared *rare* tokens does better still, since two sentences of one explanation use the
# same words. Vectors help where the words differ and the meaning is the same.
#
# Systems that look something up before they answer (chapter 14) begin with a search like this.
#
# Back to the cat and the dog. An average doesn't know who came first, and neither does attention,
# which is an average too, as you will see. Language depends on order. So the position must be put
# into the vectors.
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


# %%
# alt: Left, the waves as a striped table; right, two equal curves of the product against distance.
def draw_waves(plt):
    figure, (table, curve) = plt.subplots(1, 2, figsize=(8, 3.2))
    table.imshow(waves_TD[:100].T.tolist(), cmap="coolwarm", aspect="auto")
    table.set(xlabel="position", ylabel="column")
    for at, line in ((100, "-"), (300, "--")):
        products = waves_TD[at - 64 : at + 65] @ waves_TD[at]
        curve.plot(range(-64, 65), products.tolist(), line, label=f"from position {at}")
    curve.set(xlabel="distance", ylabel="dot product", ylim=(6, 34))
    curve.legend(loc="lower center")
    return figure


picture("04_waves", draw_waves)

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
# angle. So their dot product only knows the distance. (In the cell, the token that compares is called
# the *query*, and the one that it looks at the *key*; chapter 05 says why.)


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
# ## The race
#
# Let all three do the same work, the simplest that needs positions: *look three places back*. Each
# token gives every other a score, as in attention, and the highest should go to the one that stands
# three before it. What the tokens *are* doesn't matter here, so all of them are the same.
#
# - **Waves**: a learned matrix between the two position vectors.
# - **Learned rows**: the same, and the rows are learned too.
# - **Rotary**: one learned query, one learned key, each turned to its place.
#
# All practise on the first 64 positions. Then they are asked at 64 further ones, where they have
# never been.

# %%
NEAR, FAR, BACK, WIDTH = 64, 128, 3, 32
far_cos_TK, far_sin_TK = rotary_tables(FAR, WIDTH)
far_waves_TD = sinusoidal_positions(FAR, WIDTH)


def race(kind: str, seed: int) -> tuple[Tensor, float, float]:
    """Scores `[FAR, FAR]`, and the shares of right places, near and far."""
    torch.manual_seed(seed)
    matrix_DD = (torch.randn(WIDTH, WIDTH) / WIDTH).requires_grad_()
    rows_TD = (0.5 * torch.randn(FAR, WIDTH)).requires_grad_()
    pair_2D = torch.randn(2, WIDTH).requires_grad_()
    learned_weights = {"waves": [matrix_DD], "learned": [matrix_DD, rows_TD], "rotary": [pair_2D]}

    def all_scores() -> Tensor:
        if kind == "rotary":
            query_TD = apply_rotary(pair_2D[0].expand(FAR, -1), far_cos_TK, far_sin_TK)
            key_TD = apply_rotary(pair_2D[1].expand(FAR, -1), far_cos_TK, far_sin_TK)
            return query_TD @ key_TD.T
        places_TD = far_waves_TD if kind == "waves" else rows_TD
        return places_TD @ matrix_DD @ places_TD.T

    optimizer = torch.optim.Adam(learned_weights[kind], lr=0.03)
    truth_T = torch.arange(FAR) - BACK
    for _step in range(200 if FAST else 500):
        scores_TT = all_scores()[BACK:NEAR, :NEAR]
        loss = F.cross_entropy(scores_TT, truth_T[BACK:NEAR])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores_TT = all_scores()
        near_T = scores_TT[BACK:NEAR, :NEAR].argmax(dim=1) == truth_T[BACK:NEAR]
        far_T = scores_TT[NEAR:].argmax(dim=1) == truth_T[NEAR:]
    return scores_TT, float(near_T.float().mean()), float(far_T.float().mean())


kinds = ("waves", "learned", "rotary")
races = {kind: [race(kind, seed) for seed in range(1 if FAST else 3)] for kind in kinds}
print("          near (practised)      far (never seen)")
for kind, runs in races.items():
    near = ", ".join(f"{share:4.0%}" for _, share, _ in runs)
    far = ", ".join(f"{share:4.0%}" for _, _, share in runs)
    print(f"{kind:>8}  {near:20}  {far}")

# %% tags=["test"]
for run in range(len(races["rotary"])):
    assert races["rotary"][run][1:] == (1.0, 1.0), "turns know distances, wherever they are"
    assert races["learned"][run][1] > 0.9 and races["learned"][run][2] < 0.2


# %%
# alt: Three heat maps of scores: learned rows are noise beyond 64, rotary draws one straight band.
def draw_race(plt):
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.3))
    for axis, kind in zip(axes, kinds, strict=True):
        scores_TT = races[kind][0][0]
        axis.imshow(scores_TT.softmax(dim=1).tolist(), cmap="Oranges", vmin=0, vmax=1)
        axis.plot([-0.5, NEAR, NEAR], [NEAR, NEAR, -0.5], color="grey", linestyle="--", linewidth=1)
        axis.set(title=kind, xlabel="is looked at", xticks=(0, 64, 127), yticks=(0, 64, 127))
    axes[0].set_ylabel("looks")
    return figure


picture("04_race", draw_race)

# %% [markdown]
# The dashed corner is where they practised. A learned row that was never practised is noise. Waves
# fade: there is *one* matrix that steps three back everywhere (exercise 2 builds it), but what was
# found by practice on the first positions is only near it. Turns don't even notice the border, and
# need a fraction of the weights. The distance is built in, so nobody has to learn it.

# %% [markdown]
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
# **4. How flat is the map?** The two axes of the map keep little of the spread. Write
# `directions_for(share, table_VD)`: how many principal directions does the whole table of words need
# to keep that share? What does that say about the width of a model?


# %% tags=["solution"]
def directions_for(share: float, table_VD: Tensor) -> int:
    spread_D = torch.linalg.eigvalsh(table_VD.T @ table_VD).flip(0).clamp(min=0)
    kept_D = spread_D.cumsum(0) / spread_D.sum()
    return int((kept_D < share).sum()) + 1


needed = {share: directions_for(share, base_VD) for share in (0.25, 0.5, 0.9)}
for share, count in needed.items():
    print(f"{share:.0%} of the spread: {count} of {base_VD.shape[1]} directions")
# It is used in its whole width: nearly all directions carry something.
assert needed[0.25] < needed[0.5] < needed[0.9] <= base_VD.shape[1]
assert needed[0.9] > base_VD.shape[1] / 4
assert directions_for(0.9, torch.outer(torch.arange(5.0), torch.ones(7))) == 1

# %% [markdown]
# ## Check yourself
#
# 1. Why is looking a row up the same as multiplying with a matrix?
# 2. Two vectors point the same way, one is ten times as long. What is their cosine?
# 3. Why divide a pair's count by what chance would give?
# 4. The analogy *man : woman :: king* gives *queen*. Why is that alone no proof of a direction?
# 5. You turn query and key by the same extra angle. What happens to their dot product?
#
# <details markdown="1"><summary>Answers</summary>
#
# 1. A one-hot vector multiplies all rows by zero but one, and that one by one.
# 2. One. Lengths don't count.
# 3. Frequent words stand next to everything. What tells is standing together more often than that.
# 4. *Queen* may simply be the nearest neighbour of *king*. Compare with the lazy answer, on a list.
# 5. Nothing: only the angle between them counts.
#
# </details>
#
# ## What we left out
#
# - **word2vec and GloVe** themselves (Mikolov et al. 2013, Pennington et al. 2014): they learn such
#   vectors step by step instead of counting, and so can read billions of words.
# - **One word, one vector.** *Bank* has a single row here, whichever bank is meant. Chapter 05 mends
#   that.
# - **Trained sentence vectors** (Reimers and Gurevych 2019): a whole transformer, taught to bring
#   sentences of the same meaning together.
# - **Longer texts than in training.** Rotary tables have no end, but a model that never saw such
#   angles guesses badly. Slowing the turns helps (Chen et al. 2023; YaRN, Peng et al. 2023).
# - **ALiBi** (Press et al. 2022): no position vectors at all; attention scores fall with distance.
# - **Prejudice.** A table learns the company that people's texts keep, unfair company too
#   (Bolukbasi et al. 2016).
#
# ## Where this is in the package
#
# Everything tagged `export` here is `tinychat/embeddings.py`. `GPT` in chapter 06 keeps the rotary
# tables; attention in chapter 05 turns queries and keys with them. The token table itself is
# `model.embed`, an ordinary `nn.Embedding`.
#
# ## Sources
#
# - Z. Harris: [Distributional structure](https://doi.org/10.1080/00437956.1954.11659520) (1954);
#   J. R. Firth: *A synopsis of linguistic theory* (1957). The company a word keeps.
# - T. Mikolov, K. Chen, G. Corrado, J. Dean:
#   [Efficient estimation of word representations in vector space](https://arxiv.org/abs/1301.3781)
#   (2013). word2vec, and analogies as sums.
# - J. Pennington, R. Socher, C. D. Manning: [GloVe](https://aclanthology.org/D14-1162/) (2014).
# - O. Levy, Y. Goldberg:
#   [Neural word embedding as implicit matrix factorization](https://papers.nips.cc/paper/5477-neural-word-embedding-as-implicit-matrix-factorization)
#   (2014). Why counting and word2vec meet.
# - T. Linzen: [Issues in evaluating semantic spaces using word analogies](https://arxiv.org/abs/1606.07736)
#   (2016). The lazy answer.
# - S. Arora, Y. Liang, T. Ma:
#   [A simple but tough-to-beat baseline for sentence embeddings](https://openreview.net/forum?id=SyK00v5xx)
#   (2017). The weighted mean.
# - J. Mu, P. Viswanath: [All-but-the-top](https://arxiv.org/abs/1702.01417) (2018). Subtracting what
#   all rows share.
# - T. Bolukbasi et al.: [Man is to computer programmer as woman is to homemaker?](https://arxiv.org/abs/1607.06520)
#   (2016).
# - A. Vaswani et al.: [Attention is all you need](https://arxiv.org/abs/1706.03762) (2017), section
#   3.5. Positions as waves.
# - J. Su et al.: [RoFormer: enhanced transformer with rotary position embedding](https://arxiv.org/abs/2104.09864)
#   (2021).
# - O. Press, N. A. Smith, M. Lewis: [Train short, test long](https://arxiv.org/abs/2108.12409) (2022).
#   ALiBi.
