# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Language models
#
# Guess what comes next: by counting, with an LSTM, and why neither became a chatbot.
#
# A language model does one thing. It reads the beginning of a text and says how likely each
# continuation is. That is enough to write (choose one, append it, ask again), to judge (how likely
# is this sentence?) and, as the rest of this book shows, to talk.
#
# **What you will build**
#
# 1. a model that counts which letter follows which, and what to do about what it has never seen;
# 2. **bits per byte**, the measure that compares all models of this book on one text;
# 3. an LSTM, a network with a memory: first its cell by hand, then PyTorch's;
# 4. three measurements that say why people looked for something else: order, distance, waiting;
# 5. a masked model, which fills blanks instead of going on, and why it can't chat.
#
# **What you need:** chapter 01. The code takes a minute or two; reading it, about an hour.

# %% tags=["export"]
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinychat.data.corpus import explanations, stories
from tinychat.data.split import Split, split_of

# %% [markdown]
# ## The text
#
# You read the stories and short explanations that come with the book. Documents are dealt out by a
# hash of their names, once and for all: most are for training, a few for choosing settings
# (*validation*), and a few for the final measurement (*test*). Nothing may learn from the last.
#
# A computer keeps text as **bytes**, numbers from 0 to 255; in English, one for each letter. They
# are the alphabet of this chapter. (Better pieces come in chapter 03.)


# %% tags=["export"]
def documents(split: Split) -> list[bytes]:
    """Return the embedded stories and explanations of one part, as UTF-8."""
    return [text.text.encode() for text in stories() + explanations() if split_of(text.id) == split]


def held_out_text() -> list[bytes]:
    """Return the texts on which this book compares its language models; no chapter trains on them.

    Each document stands for itself: a model starts each with nothing read.
    """
    return documents("test")


# %%
import re
import time

from tinychat.book.picture import picture
from tinychat.runtime.device import set_threads

FAST = os.environ.get("TINYCHAT_FAST") == "1"
set_threads()
train_texts, valid_texts, test_texts = documents("train"), documents("validation"), held_out_text()
train_texts = train_texts[:80] if FAST else train_texts
for name, texts in (("train", train_texts), ("validation", valid_texts), ("test", test_texts)):
    print(f"{name:>10}: {len(texts):3} documents, {sum(map(len, texts)):7,} bytes")
print(train_texts[0][:90])

# %% tags=["test"]
assert not set(train_texts) & set(test_texts)

# %% [markdown]
# ## Counting
#
# What follows "th"? Look it up: go through the training text, and each time "th" comes up, note the
# next byte. Divide by how often you looked.

# %%
after: dict[int, int] = {}
for text in train_texts:
    for place in range(2, len(text)):
        if text[place - 2 : place] == b"th":
            after[text[place]] = after.get(text[place], 0) + 1
for byte, count in sorted(after.items(), key=lambda item: -item[1])[:6]:
    print(f"th → {chr(byte)!r}: {count:5} times, {count / sum(after.values()):6.1%}")

# %% [markdown]
# A model that looks at the last $n - 1$ bytes and guesses the next one is an **n-gram** model.
# Claude Shannon wrote texts in this way in 1948, by hand, with a book and a pencil.
#
# But what if "th" was never followed by "q"? Then the count says: impossible. One day it happens,
# and a model that said "impossible" is infinitely surprised. So pretend that after every
# context you saw each byte $k$ more times than you did; $k$ may be a small fraction. This is
# **add-k** smoothing:
#
# $$p(b \mid \text{context}) = \frac{\text{count} + k}{\text{total} + 256\,k}$$


# %% tags=["export"]
class NGram:
    """Guesses a byte from the `order - 1` bytes before it, by counts with add-k smoothing.

    Zero bytes stand before a text's beginning.
    """

    def __init__(self, texts: Iterable[bytes], order: int, k: float = 0.01) -> None:
        if order < 1 or k <= 0:
            raise ValueError(f"order {order} and k {k}: give an order of 1 or more, and k above 0")
        self.order, self.k = order, k
        self.counts: dict[bytes, dict[int, int]] = {}
        for text in texts:
            padded = bytes(order - 1) + text
            for place, byte in enumerate(text):
                following = self.counts.setdefault(padded[place : place + order - 1], {})
                following[byte] = following.get(byte, 0) + 1
        self.totals = {context: sum(seen.values()) for context, seen in self.counts.items()}

    def probability(self, context: bytes, byte: int) -> float:
        """Return p(byte | context); the context has `order - 1` bytes."""
        count = self.counts.get(context, {}).get(byte, 0)
        return (count + self.k) / (self.totals.get(context, 0) + 256 * self.k)

    def next_byte(self, text: bytes) -> Tensor:
        """Return the probability of each of the 256 bytes after a text."""
        padded = bytes(self.order - 1) + text
        context = padded[len(padded) - self.order + 1 :]
        return torch.tensor([self.probability(context, byte) for byte in range(256)])

    def log_probability(self, text: bytes) -> float:
        """Return the natural logarithm of the probability of a whole text."""
        padded = bytes(self.order - 1) + text
        return sum(
            math.log(self.probability(padded[place : place + self.order - 1], byte))
            for place, byte in enumerate(text)
        )


# %% tags=["test"]
# By hand: in "abab", "a" is followed by "b" twice; with k = 1, that is 3 of 2 + 256.
assert NGram([b"abab"], 2, k=1).probability(b"a", ord("b")) == 3 / 258
assert NGram([b"abab"], 2, k=1).probability(b"z", ord("b")) == 1 / 256
assert abs(NGram(train_texts[:20], 3).next_byte(b"th").sum() - 1) < 1e-5

# %% [markdown]
# The probability of a whole text is the product of the probabilities of its bytes, each given those
# before it. Products of thousands of small numbers vanish in a computer, so add logarithms.
#
# ## Writing
#
# To write, draw a byte from the guess, append it, ask again.


# %% tags=["export"]
def write(
    next_byte: Callable[[bytes], Tensor], start: bytes, length: int, draw: torch.Generator
) -> str:
    """Go on from `start` for `length` bytes, each drawn from the model's guess."""
    text = start
    for _ in range(length):
        text += bytes([int(torch.multinomial(next_byte(text), 1, generator=draw))])
    return text.decode("utf-8", errors="replace")


# %%
for order in (1, 2, 4, 6):
    model = NGram(train_texts, order, k=1e-7)  # next to nothing: it shall only write what it saw
    told = write(model.next_byte, b"The ", 60 if FAST else 120, torch.Generator().manual_seed(0))
    print(f"order {order}: {told!r}")

# %% [markdown]
# Letters, then syllables, then words. It looks as if understanding were only a matter of a longer
# context. Measure it.
#
# ## Bits per byte
#
# How surprised is a model by a text that it has never seen? In chapter 01 surprise was minus the
# logarithm of the probability. With logarithms to base 2 its unit is the **bit**, one yes-or-no
# question. Divide by the number of bytes, and texts of any length can be compared. Even models with
# different alphabets can: whatever pieces a model reads, in the end it gives the whole text a
# probability.
#
# It is also the size of a file. A good coder turns a model into a compressor that needs just so
# many bits (Shannon 1948). To predict well and to compress well are the same.


# %% tags=["export"]
def bits_per_byte(log_probability: Callable[[bytes], float], texts: Sequence[bytes]) -> float:
    """Return the mean surprise of a model, in bits for each byte of the texts.

    `log_probability` gives the natural logarithm of the probability of a whole text, so any model
    fits, whatever pieces it reads.
    """
    nats = -sum(log_probability(text) for text in texts)
    return nats / math.log(2) / sum(map(len, texts))


# %% tags=["test"]
def know_nothing(text: bytes) -> float:
    return len(text) * math.log(1 / 256)


assert abs(bits_per_byte(know_nothing, test_texts) - 8) < 1e-9  # 8 bits are a byte

# %%
print(f"knowing nothing: {bits_per_byte(know_nothing, valid_texts):.3f} bits per byte")
print("order" + "".join(f"   k = {k:<6}" for k in (1, 0.1, 0.01)))
add_k = {}
for order in (1, 2, 3, 4, 5, 6):
    counted = NGram(train_texts, order)
    for k in (1, 0.1, 0.01):
        counted.k = k
        add_k[order, k] = bits_per_byte(counted.log_probability, valid_texts)
    print(f"{order:5}" + "".join(f"{add_k[order, k]:13.3f}" for k in (1, 0.1, 0.01)))

# %% tags=["test"]
assert add_k[1, 0.01] > add_k[2, 0.01] > add_k[3, 0.01]
assert add_k[6, 0.01] > min(add_k.values())  # longer is not better for ever

# %% [markdown]
# The score improves with the order, and then gets *worse*. Most long contexts come up once or
# never, and for those, add-k knows nothing at all.
#
# ## Ask the shorter context
#
# A context that you have never seen still has an ending that you have. So mix: take a little away
# from every count of the long context (a **discount**), and hand what you saved to the guess of the
# next shorter one, which does the same, down to no context.
#
# Kneser and Ney (1995) added a fine idea. The shorter context counts most where the longer one
# knows little. So what matters there isn't how *often* a byte came, but after how many *different*
# contexts. Look at "h":

# %%
row = b" ".join(train_texts)
pairs_seen = [(row[i : i + 3], row[i + 3]) for i in range(len(row) - 3)]
contexts = set(pairs_seen)
print("letter   share of all bytes   share of all different contexts before it")
ratios = {}
for letter in b"ehsy":
    often = sum(byte == letter for _, byte in pairs_seen) / len(pairs_seen)
    various = sum(byte == letter for _, byte in contexts) / len(contexts)
    ratios[chr(letter)] = various / often
    print(f"{chr(letter):>6}{often:21.1%}{various:22.1%}")
assert ratios["h"] < 1 < ratios["y"]

# %% [markdown]
# "h" is frequent because "th" is frequent, and in new surroundings it is a worse guess than its
# frequency says. "y" is the other way round: it ends words of all kinds. So the shorter contexts
# count different predecessors. For the discount there is a formula of its own: with $n_1$ counts
# that are 1 and $n_2$ that are 2, take $n_1 / (n_1 + 2 n_2)$.


# %% tags=["export"]
class KneserNey(NGram):
    """Interpolated Kneser-Ney smoothing, with one discount for each length of context.

    Kneser and Ney 1995, in the interpolated form of Chen and Goodman 1998. The longest contexts
    keep their counts; a shorter one counts the different bytes that stood before it.
    """

    def __init__(self, texts: Iterable[bytes], order: int) -> None:
        super().__init__(texts, order)
        levels = [self.counts]
        for _ in range(order - 1):
            shorter: dict[bytes, dict[int, int]] = {}
            for context, seen in levels[0].items():
                following = shorter.setdefault(context[1:], {})
                for byte in seen:
                    following[byte] = following.get(byte, 0) + 1
            levels.insert(0, shorter)
        self.levels = []  # for each length of context: contexts, their totals, the discount
        for level in levels:
            counts = [count for seen in level.values() for count in seen.values()]
            once, twice = counts.count(1), counts.count(2)
            discount = once / (once + 2 * twice) if once and twice else 0.5
            totals = {context: sum(seen.values()) for context, seen in level.items()}
            self.levels.append((level, totals, discount))

    def probability(self, context: bytes, byte: int) -> float:
        """Return p(byte | context), from no context at all to the longest one that was seen."""
        p = 1 / 256
        for length, (level, totals, discount) in enumerate(self.levels):
            ending = context[len(context) - length :]
            seen = level.get(ending)
            if seen is None:
                break  # what was never seen has no longer version that was
            kept = max(seen.get(byte, 0) - discount, 0.0)
            p = (kept + discount * len(seen) * p) / totals[ending]
        return p


# %% tags=["test"]
small = KneserNey(train_texts[:20], 4)
for start in (b"", b"th", b"zzzz"):
    assert abs(float(small.next_byte(start).sum()) - 1) < 1e-5

# %%
kneser_ney = {}
orders = (2, 3, 4) if FAST else (2, 3, 4, 5, 6)
for order in orders:
    counted = KneserNey(train_texts, order)
    kneser_ney[order] = bits_per_byte(counted.log_probability, valid_texts)
    best_add_k = min(add_k[order, k] for k in (1, 0.1, 0.01))
    print(
        f"order {order}: {kneser_ney[order]:.3f} bits per byte; add-k at its best {best_add_k:.3f}"
    )
    if kneser_ney[order] == min(kneser_ney.values()):
        best_order, best_ngram = order, counted
print(f"the best order is {best_order}")

# %% tags=["test"]
assert all(kneser_ney[order] < add_k[order, 0.01] for order in orders)


# %%
# alt: Bits per byte against order: add-k falls, then rises again; Kneser-Ney falls and stays low.
def draw_orders(plt):
    figure, axis = plt.subplots(figsize=(7, 3.5))
    axis.plot(range(1, 7), [add_k[n, 0.01] for n in range(1, 7)], "o-", color="#d9663d")
    axis.plot(list(kneser_ney), list(kneser_ney.values()), "s-", color="#2a9d6f")
    axis.legend(["add-k, k = 0.01", "Kneser-Ney"])
    axis.set(xlabel="order", ylabel="bits per byte, validation")
    return figure


picture("02_orders", draw_orders)

# %% [markdown]
# Now a longer context does no harm, but each further byte brings less than the one before. Counting
# comes to its end: it can't use what it read a sentence ago.
#
# ## A network with a memory
#
# What would you do? You'd remember the gist, and change it with each letter that you read. So give
# a network two inputs: the next byte, and its own **state** from the step before. This is a
# **recurrent** network.
#
# The plain version forgets. At each step the state goes through a matrix and a squashing function,
# and after many squeezes little is left; and the slopes, on their way back, shrink in the same way.
# The **LSTM** (Hochreiter and Schmidhuber 1997; the forget gate is from Gers and others, 2000)
# keeps a notebook $c$ beside its state $h$, and three gates between 0 and 1 decide, line by line of
# the notebook:
#
# - the *forget* gate $f$: keep what is there?
# - the *input* gate $i$: write down the new note $g$?
# - the *output* gate $o$: which lines matter now?
#
# $$c' = f \cdot c + i \cdot g \qquad h' = o \cdot \tanh(c')$$
#
# (The dash marks the new value.) Look at the first formula. A line with $f = 1$ and $i = 0$ stays just as it is, for as long as you
# like, and its slope comes back unharmed. A squeezed state and its slope:

# %%
start = torch.tensor(1.0, requires_grad=True)
for steps in (1, 10, 50):
    h = start
    for _ in range(steps):
        h = (0.9 * h).tanh()
    (slope,) = torch.autograd.grad(h, start)
    print(f"after {steps:2} steps: state {h.item():.3f}, slope {slope.item():.0e}")

# %% tags=["test"]
assert h.item() < 0.2 and slope.item() < 0.01  # the notebook's line keeps both at 1


# %% tags=["export"]
def lstm_step(
    x_BI: Tensor, h_BD: Tensor, c_BD: Tensor, from_x: Tensor, from_h: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Read one input and return the new state and notebook (Hochreiter and Schmidhuber 1997).

    `from_x` is `[4 D, I]`, `from_h` `[4 D, D]`, `bias` `[4 D]`: the rows of the input gate, the
    forget gate, the note and the output gate, in PyTorch's order.
    """
    gates = x_BI @ from_x.T + h_BD @ from_h.T + bias
    write_BD, keep_BD, note_BD, show_BD = gates.chunk(4, dim=1)
    c_BD = keep_BD.sigmoid() * c_BD + write_BD.sigmoid() * note_BD.tanh()
    return show_BD.sigmoid() * c_BD.tanh(), c_BD


# %% tags=["test"]
torch.manual_seed(0)
theirs = nn.LSTM(5, 7, batch_first=True)
weights = theirs.weight_ih_l0, theirs.weight_hh_l0, theirs.bias_ih_l0 + theirs.bias_hh_l0
x_BTI = torch.randn(3, 10, 5)
with torch.no_grad():
    h_BD, c_BD = torch.zeros(2, 3, 7)
    for step in range(10):
        h_BD, c_BD = lstm_step(x_BTI[:, step], h_BD, c_BD, *weights)
    states_BTD, (last_1BD, notes_1BD) = theirs(x_BTI)
torch.testing.assert_close(h_BD, states_BTD[:, -1])
torch.testing.assert_close(c_BD, notes_1BD[0])
print("your cell and PyTorch's agree")

# %% [markdown]
# From here on PyTorch does by itself what you did by hand in chapter 01. `nn.Linear` is a layer of
# votes. An `nn.Module` is a network: it knows its parts and their weights. `loss.backward()` is
# backpropagation, and leaves each weight its slope. An **optimizer** takes the step (`step`), and
# forgets the old slopes before the next one (`zero_grad`). A list of all slopes is a **gradient**.
#
# The model around the LSTM is small: a table with a vector for each byte (`nn.Embedding`; chapter 04
# has more on such tables), the LSTM, and a layer that turns the state into 256 logits. A zero byte
# stands before each text. In the names, `T` is time, the places of a text, `D` the width of the state,
# and `V` the size of the alphabet.


# %% tags=["export"]
class LSTMModel(nn.Module):
    """Guesses the next byte from all bytes before it."""

    def __init__(self, width: int, embedding: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, embedding)
        self.lstm = nn.LSTM(embedding, width, batch_first=True)
        self.out = nn.Linear(width, 256)

    def forward(
        self, bytes_BT: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the logits `[B, T, 256]` of the byte after each byte, and the state at the end."""
        states_BTD, state = self.lstm(self.embed(bytes_BT), state)
        return self.out(states_BTD), state

    @torch.no_grad()
    def next_byte(self, text: bytes) -> Tensor:
        """Return the probability of each of the 256 bytes after a text."""
        return self(torch.tensor([[0, *text]]))[0][0, -1].softmax(dim=0)

    @torch.no_grad()
    def log_probability(self, text: bytes) -> float:
        """Return the natural logarithm of the probability of a whole text."""
        bytes_T = torch.tensor([0, *text])
        logits_1TV, _ = self(bytes_T[None, :-1])
        return -float(F.cross_entropy(logits_1TV[0], bytes_T[1:], reduction="sum"))


# %% [markdown]
# Training is chapter 01's loop. Three things are new. The texts stand in one long row, cut into
# strips that are read side by side, a stretch at a time. The state is carried from stretch to
# stretch, but the slopes are not: they go back to the beginning of the stretch and stop (`detach`).
# And the steps are Adam's, smaller and smaller ones, with a limit on how long a gradient may be;
# chapter 07 builds all of this.


# %% tags=["export"]
def train_lstm(
    model: LSTMModel,
    texts: Sequence[bytes],
    epochs: int,
    rate: float = 6e-3,
    strips: int = 16,
    stretch: int = 64,
) -> list[float]:
    """Read the texts `epochs` times, in a new order each time; return the loss of each step."""
    steps_a_time = (sum(len(text) + 1 for text in texts) - 1) // strips // stretch
    if steps_a_time < 1:
        raise ValueError(f"too little text: give at least {strips * stretch} bytes")
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    fall = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps_a_time * epochs)
    losses = []
    for epoch in range(epochs):
        order = random.Random(epoch).sample(list(texts), len(texts))
        row = torch.tensor(list(b"\0" + b"\0".join(order)))
        length = (len(row) - 1) // strips
        inputs_BL = row[: strips * length].view(strips, length)
        targets_BL = row[1 : strips * length + 1].view(strips, length)
        state = None
        for start in range(0, steps_a_time * stretch, stretch):
            logits_BTV, state = model(inputs_BL[:, start : start + stretch], state)
            state = (state[0].detach(), state[1].detach())
            targets_BT = targets_BL[:, start : start + stretch]
            loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            fall.step()
            losses.append(loss.item())
    return losses


# %%
torch.manual_seed(0)
lstm = LSTMModel(32 if FAST else 160)
begin = time.perf_counter()
lstm_losses = train_lstm(lstm, train_texts, epochs=1 if FAST else 6, rate=2e-2 if FAST else 6e-3)
print(f"{sum(p.numel() for p in lstm.parameters()):,} weights, {len(lstm_losses)} steps, ", end="")
print(f"{time.perf_counter() - begin:.0f} s")
print(repr(write(lstm.next_byte, b"The ", 60 if FAST else 200, torch.Generator().manual_seed(0))))
test_bits = {
    "nothing": bits_per_byte(know_nothing, test_texts),
    "1-gram": bits_per_byte(KneserNey(train_texts, 1).log_probability, test_texts),
    "3-gram, add-k": bits_per_byte(NGram(train_texts, 3).log_probability, test_texts),
    f"{best_order}-gram, Kneser-Ney": bits_per_byte(best_ngram.log_probability, test_texts),
    "LSTM": bits_per_byte(lstm.log_probability, test_texts),
}
for name, bits in test_bits.items():
    print(f"{name:>20}: {bits:.3f} bits per byte on the held-out text")

# %% tags=["test"]
assert test_bits["LSTM"] < test_bits["1-gram"] < test_bits["nothing"]

# %% [markdown]
# Who wins? With so little text and so little time, counting is hard to beat: it needs to see a word
# only once. The LSTM needs to see it many times, but it can carry something across a whole
# sentence. With far more text and time LSTMs won clearly (Jozefowicz and others 2016). Here, you
# have both, and exercise 2 lets them work together.
#
# ## Why not: order
#
# The simplest way to read a text is to throw all its words into a bag. But a bag can't tell who
# bites whom.

# %%
dog, man = "dog bites man".split(), "man bites dog".split()
print("the same bag:", sorted(dog) == sorted(man))

draw = random.Random(0)
sentences = [
    sentence
    for text in test_texts
    for sentence in re.split(r"(?<=[.!?])\s+", text.decode())
    if 6 <= len(sentence.split()) <= 20 and "\n" not in sentence
]
pairs = []
for sentence in sentences[: 40 if FAST else 200]:
    words = sentence.split()
    one, other = draw.sample(range(1, len(words) - 1), 2)
    if words[one] != words[other]:
        words[one], words[other] = words[other], words[one]
        pairs.append((sentence.encode(), " ".join(words).encode()))
print("for example:", *(text.decode() for text in pairs[0]), sep="\n  ")


def knows_order(log_probability: Callable[[bytes], float]) -> float:
    """How often the real sentence is likelier than the one with two words swapped; a tie is half."""
    points = 0.0
    for real, swapped in pairs:
        gap = log_probability(real) - log_probability(swapped)
        points += 0.5 if abs(gap) < 1e-6 else float(gap > 0)
    return points / len(pairs)


readers: dict[str, Callable[[bytes], float]] = {
    "1-gram": KneserNey(train_texts, 1).log_probability,
    "2-gram": KneserNey(train_texts, 2).log_probability,
    f"{best_order}-gram": best_ngram.log_probability,
    "LSTM": lstm.log_probability,
}
order_score = {name: knows_order(reader) for name, reader in readers.items()}
for name, score in order_score.items():
    print(f"{name:>8}: prefers the real sentence in {score:.0%} of {len(pairs)} pairs")

# %% tags=["test"]
assert order_score["1-gram"] == 0.5, "a bag of bytes has no order"
assert order_score[f"{best_order}-gram"] > 0.55

# %% [markdown]
# Two bytes are too few: where the words meet there is only a letter and a space, swapped or not. A
# longer n-gram knows order, but only within its window. The LSTM reads one byte after the other, so
# order is built in. That was not the problem.
#
# ## Why not: distance
#
# A game of memory. A text begins with one of four capital letters. Then come a number of small
# letters that mean nothing, then a question mark, and then the capital again. Who still knows it?

# %%
KEYS, LONGEST = b"ABCD", 24


def riddles(count: int, distance: int, draw: random.Random) -> list[bytes]:
    """Texts such as `Bxyxx?B`, with that many letters between the key and the question mark."""
    rows = []
    for _ in range(count):
        key = bytes([draw.choice(KEYS)])
        rows.append(key + bytes(draw.choices(b"xy", k=distance)) + b"?" + key)
    return rows


draw = random.Random(0)
torch.manual_seed(0)
player = LSTMModel(64, embedding=16)
optimizer = torch.optim.Adam(player.parameters(), lr=5e-3)
for _step in range(30 if FAST else 500):
    rows_BT = torch.tensor([list(row) for row in riddles(64, draw.randint(1, LONGEST), draw)])
    logits_BTV, _ = player(F.pad(rows_BT[:, :-1], (1, 0)))
    loss = F.cross_entropy(logits_BTV[:, -1], rows_BT[:, -1])
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(player.parameters(), 1.0)
    optimizer.step()
practice = [row for _ in range(100) for d in range(1, LONGEST + 1) for row in riddles(1, d, draw)]
counter = KneserNey(practice, 6)

memory = {}
print(f"letters between   6-gram    LSTM   (trained with 1 to {LONGEST})")
for distance in (1, 2, 3, 4, 8, 16, 24, 48, 96, 192):
    asked = riddles(100 if FAST else 400, distance, draw)
    counted = sum(int(counter.next_byte(row[:-1]).argmax()) == row[-1] for row in asked[:100])
    with torch.no_grad():
        rows_BT = torch.tensor([list(row) for row in asked])
        guess_B = player(F.pad(rows_BT[:, :-1], (1, 0)))[0][:, -1].argmax(dim=1)
    memory[distance] = counted / 100, float((guess_B == rows_BT[:, -1]).float().mean())
    print(f"{distance:15}{memory[distance][0]:9.0%}{memory[distance][1]:8.0%}")

# %% tags=["test"]
# A 6-gram sees five bytes: the question mark, three letters and the key.
assert memory[3][0] > 0.9 and memory[8][0] < 0.5
if not FAST:
    assert memory[8][1] > 0.9 > memory[8][0]


# %%
# alt: Right answers against distance: the 6-gram drops to chance after three letters, the LSTM stays.
def draw_memory(plt):
    figure, axis = plt.subplots(figsize=(7, 3.5))
    axis.plot(list(memory), [row[0] for row in memory.values()], "o-", color="#d9663d")
    axis.plot(list(memory), [row[1] for row in memory.values()], "s-", color="#2a9d6f")
    axis.axhline(0.25, color="#808080", linewidth=0.8, linestyle=":")
    axis.axvline(LONGEST, color="#808080", linewidth=0.8, linestyle="--")
    axis.legend(["6-gram", "LSTM", "guessing", "longest in training"])
    axis.set(xlabel="letters between", ylabel="right", xscale="log", ylim=(0, 1.05))
    return figure


picture("02_memory", draw_memory)

# %% [markdown]
# Beyond its window, an n-gram guesses. The LSTM holds on to its one letter for far longer: it has
# practised just this game, and learned that the key is all that matters.
#
# But in a real text nobody says beforehand what will matter. So let *everything* matter. A row of
# letters, a question mark, and then the same row again.

# %%
LETTERS, MOST = b"ABCDEFGH", 16


def echoes(count: int, length: int, draw: random.Random) -> Tensor:
    """Rows such as `CAFB?CAFB`, each after a zero byte."""
    rows = [bytes(draw.choices(LETTERS, k=length)) for _ in range(count)]
    return torch.tensor([[0, *row, ord("?"), *row] for row in rows])


torch.manual_seed(0)
player = LSTMModel(64, embedding=16)
optimizer = torch.optim.Adam(player.parameters(), lr=5e-3)
for _step in range(30 if FAST else 600):
    length = draw.randint(1, MOST)
    rows_BT = echoes(64, length, draw)
    logits_BTV = player(rows_BT[:, :-1])[0][:, length + 1 :]
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), rows_BT[:, length + 2 :].flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(player.parameters(), 1.0)
    optimizer.step()

echo = {}
for length in (1, 2, 4, 8, 16, 32):
    rows_BT = echoes(300, length, draw)
    with torch.no_grad():
        guess_BT = player(rows_BT[:, :-1])[0][:, length + 1 :].argmax(dim=2)
    echo[length] = float((guess_BT == rows_BT[:, length + 2 :]).float().mean())
    never = " (never practised)" if length > MOST else ""
    print(f"{length:2} letters to keep: {echo[length]:4.0%} right{never}")
print(f"guessing: {1 / len(LETTERS):.0%}")

# %% tags=["test"]
if not FAST:
    assert echo[1] > 0.5 > echo[MOST]

# %% [markdown]
# The longer the row, the less it can say again. (More practice or a larger notebook moves the limit;
# neither removes it.) All that an LSTM knows must fit into one notebook
# of fixed size, and each step writes on it. It must decide *while it reads* what will be needed
# later. Attention (chapter 05) keeps everything and decides later, *when it needs it*.
#
# ## Why not: waiting
#
# To know the state after a thousand bytes, you need the state after 999. However many processors
# you own, they stand in a queue. Compare: the same multiplications once step by step, and once for
# all places together, as a network without a memory could do them.

# %%
width = 256
cell = nn.LSTM(width, width, batch_first=True)
from_x, from_h = cell.weight_ih_l0.detach(), cell.weight_hh_l0.detach()
bias = (cell.bias_ih_l0 + cell.bias_hh_l0).detach()
joined = torch.cat([from_x, from_h], dim=1)


def step_by_step(x_TI: Tensor) -> None:
    h_BD = c_BD = torch.zeros(1, width)
    for t in range(len(x_TI)):
        h_BD, c_BD = lstm_step(x_TI[t : t + 1], h_BD, c_BD, from_x, from_h, bias)


ways: dict[str, Callable[[Tensor], object]] = {
    "your steps": step_by_step,
    "PyTorch's steps": lambda x_TI: cell(x_TI[None]),
    "side by side": lambda x_TI: torch.cat([x_TI, x_TI], dim=1) @ joined.T,
}
print("steps" + "".join(f"{name:>20}" for name in ways))
waiting: dict[int, list[float]] = {}
for length in (64, 256) if FAST else (64, 256, 512):
    x_TI = torch.randn(length, width)
    waiting[length] = []
    for way in ways.values():
        best = math.inf
        for _repeat in range(3):
            begin = time.perf_counter()
            with torch.no_grad():
                way(x_TI)
            best = min(best, time.perf_counter() - begin)
        waiting[length].append(1000 * best)
    print(f"{length:5}" + "".join(f"{milliseconds:17.2f} ms" for milliseconds in waiting[length]))

# %% tags=["test"]
assert waiting[256][0] > 2 * waiting[256][2]

# %% [markdown]
# PyTorch's LSTM does the half that needs no state in one go and wastes no time in Python, and still
# it has to wait for each step. This is on a processor with a few cores. A GPU has thousands, and
# there the queue costs far more. This, as much as memory, is why the transformer won: it learns
# from all places of a text side by side.
#
# ## Blanks instead of endings
#
# There is another way to learn from plain text. Cover a word in the middle, and guess it from
# *both* sides: "The quick brown [MASK] jumps over the lazy dog." A model that learns like this is a
# **masked** language model; BERT (Devlin and others 2019) is the famous one.
#
# Build a small one, with words in place of bytes. One LSTM reads from the left up to the blank,
# another from the right down to it, and both states together guess the word. Next to it trains a
# model that has only the left one: that is a next-word model. In training, each word takes its turn
# at being the blank, and now and then other words are covered too, so that the models know what a
# `[MASK]` means.

# %%
MASK, EDGE, UNKNOWN = 0, 1, 2  # the first rows of the list of words


def split_sentences(texts: Iterable[bytes]) -> list[list[str]]:
    """Sentences of small-letter words and marks, neither very short nor very long."""
    found = []
    for text in texts:
        for sentence in re.split(r"(?<=[.!?])\s+|\n+", text.decode().lower()):
            words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?|[.,!?]", sentence)
            if 4 <= len(words) <= 24:
                found.append(words)
    return found


train_sentences = split_sentences(train_texts)
frequency: dict[str, int] = {}
for sentence_words in train_sentences:
    for word in sentence_words:
        frequency[word] = frequency.get(word, 0) + 1
known = sorted((w for w in frequency if frequency[w] >= 4), key=lambda w: (-frequency[w], w))
vocabulary = ["[MASK]", "[EDGE]", "[UNKNOWN]", *known]
word_ids = {word: number for number, word in enumerate(vocabulary)}
print(f"{len(train_sentences):,} sentences, {len(known):,} words that come up four times or more")


def encode(words: Sequence[str]) -> list[int]:
    """Numbers of the words, with an edge on both sides."""
    return [EDGE, *(word_ids.get(word, UNKNOWN) for word in words), EDGE]


class BlankFiller(nn.Module):
    """Guesses each word from what stands left of it and, with `both`, right of it."""

    def __init__(self, words: int, both: bool, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.left = nn.LSTM(width, width, batch_first=True)
        self.right = nn.LSTM(width, width, batch_first=True) if both else None
        self.out = nn.Linear(2 * width if both else width, words)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits `[B, T - 2, words]` for all places but the two edges."""
        x_BTD = self.embed(ids_BT)
        gathered = [self.left(x_BTD)[0][:, :-2]]  # the state before the word, not after it
        if self.right is not None:
            gathered.append(self.right(x_BTD.flip(1))[0].flip(1)[:, 2:])
        return self.out(torch.cat(gathered, dim=-1))


# Sentences of the same length go together, so that no row needs filling up.
by_length: dict[int, list[list[int]]] = {}
for sentence_words in train_sentences:
    by_length.setdefault(len(sentence_words), []).append(encode(sentence_words))


def train_filler(both: bool, epochs: int) -> BlankFiller:
    torch.manual_seed(0)
    model = BlankFiller(len(vocabulary), both)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    draw = random.Random(0)
    for _epoch in range(epochs):
        batches = []
        for rows in by_length.values():
            draw.shuffle(rows)
            batches += [rows[start : start + 32] for start in range(0, len(rows), 32)]
        draw.shuffle(batches)
        for rows in batches:
            ids_BT = torch.tensor(rows)
            covered_BT = (torch.rand(ids_BT.shape) < 0.1) & (ids_BT != EDGE)
            logits_BTV = model(ids_BT.masked_fill(covered_BT, MASK))
            targets = ids_BT[:, 1:-1].flatten()
            loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets, ignore_index=UNKNOWN)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


begin = time.perf_counter()
fillers = {name: train_filler(name == "masked", 1 if FAST else 4) for name in ("next", "masked")}
print(f"trained in {time.perf_counter() - begin:.0f} s")

# %% [markdown]
# How good are they? Cover each word of the held-out sentences in turn (words only: full stops are
# too easy), and count how often the first guess is the very word. A word that is not in the list
# counts as missed. The baseline knows no context at all and always says the most frequent word.

# %%
test_sentences = split_sentences(test_texts)[: 60 if FAST else None]
most_frequent = next(word for word in known if word.isalpha())
hits, asked_words = {"most frequent": 0, "next": 0, "masked": 0}, 0
with torch.no_grad():
    for sentence_words in test_sentences:
        ids_1T = torch.tensor([encode(sentence_words)])
        guesses = {name: model(ids_1T)[0].argmax(dim=1) for name, model in fillers.items()}
        for place, word in enumerate(sentence_words):
            if not word[0].isalpha():
                continue
            asked_words += 1
            hits["most frequent"] += word == most_frequent
            for name, guess_T in guesses.items():
                hits[name] += vocabulary[int(guess_T[place])] == word
fill_score = {name: count / asked_words for name, count in hits.items()}
for name, score in fill_score.items():
    print(f"{name:>14}: {score:.1%} of {asked_words:,} blanks")

# %% tags=["test"]
assert fill_score["masked"] > fill_score["most frequent"]
if not FAST:
    assert fill_score["masked"] > fill_score["next"] > fill_score["most frequent"]


# %%
@torch.no_grad()
def fill(text: str, name: str, count: int) -> list[list[tuple[str, float]]]:
    """For each `[MASK]` of a text, the best guesses with their probabilities."""
    words = re.findall(r"\[MASK\]|[^\W\d_]+(?:'[^\W\d_]+)?|[.,!?]", text)
    words = [word if word == "[MASK]" else word.lower() for word in words]
    shares_TV = fillers[name](torch.tensor([encode(words)]))[0].softmax(dim=-1)
    answers = []
    for place, word in enumerate(words):
        if word == "[MASK]":
            best = shares_TV[place].topk(count)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            answers.append([(vocabulary[number], share) for number, share in pairs])
    return answers


for blank in (
    "The quick brown [MASK] jumps over the lazy dog.",
    "She opened the [MASK] and looked inside.",
    "He did not [MASK] what to say.",
    "They walked home [MASK] the rain.",
):
    print(blank)
    for name in fillers:
        guesses = ", ".join(f"{word} {share:.0%}" for word, share in fill(blank, name, 5)[0])
        print(f"  {name:>6}: {guesses}")

# %% [markdown]
# Don't expect the fox. A small model that has read so little knows what *kind* of word is missing
# before it knows which one.
#
# ## Then why not chat with it?
#
# Because in a chat nothing stands to the right of the blank. The reply does not exist yet. Ask the
# masked model for several words at once, and each blank is filled without knowing what the others
# will be.

# %%
print(
    [guess[0][0] for guess in fill("The man said that [MASK] [MASK] [MASK] [MASK].", "masked", 1)]
)

# %% [markdown]
# And one blank after the other? Then it writes in a situation for which it never practised: a right
# side that is empty, or full of blanks. Nor does it give a whole text a probability: what it
# learned is a guess for one word when all others are given, and such guesses don't multiply to the
# probability of the text. So it has no honest bits per byte, and no row in the table below.
#
# A next-word model has one blank, always at the end, and all that it ever needs stands to the left.
# It sees less, it scores less on blanks, and it can talk. Every chatbot is built on it.
#
# ## The table
#
# One text, one measure. The table lies in `runs/book/`, and chapters 06 and 07 add their rows. (A
# fast trial run of this chapter writes into a table of its own.)


# %% tags=["export"]
def add_row(
    name: str, bits: float, path: str | os.PathLike[str] = "runs/book/bits_per_byte.json"
) -> dict[str, float]:
    """Note a model's bits per byte on the held-out text; return the table so far, worst first."""
    path = Path(path)
    table: dict[str, float] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    table[name] = bits
    table = dict(sorted(table.items(), key=lambda row: -row[1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    return table


# %%
path = f"runs/book/bits_per_byte{'_fast' if FAST else ''}.json"
for name, bits in test_bits.items():
    table = add_row(name, bits, path)
for name, bits in table.items():
    print(f"{name:>24} {bits:6.3f} bits per byte, perplexity {2**bits:6.1f}")

# %% tags=["test"]
assert test_bits.items() <= table.items() and max(table.values()) == table["nothing"]

# %% [markdown]
# **Perplexity** is 2 to the power of the bits: as if the model had to choose each time between so
# many equally likely bytes.
#
# ## Exercises
#
# **1. Swap the discount.** In `KneserNey`, let the shorter contexts use plain counts in place of
# different predecessors. How much does it cost, and for which order most?


# %% tags=["solution"]
class PlainBackoff(KneserNey):
    """Absolute discounting: as Kneser-Ney, with ordinary counts for the shorter contexts."""

    def __init__(self, texts: Sequence[bytes], order: int) -> None:
        super().__init__(texts, order)
        for length in range(order):
            level = NGram(texts, length + 1)
            self.levels[length] = (level.counts, level.totals, self.levels[length][2])


plain_bits = {}
for order in (2, 4):
    plain = PlainBackoff(train_texts, order)
    plain_bits[order] = bits_per_byte(plain.log_probability, valid_texts)
    print(f"order {order}: {plain_bits[order]:.3f} plain, {kneser_ney[order]:.3f} Kneser-Ney")
    assert abs(float(plain.next_byte(b"th").sum()) - 1) < 1e-5
    assert abs(plain_bits[order] - kneser_ney[order]) < 0.5

# %% [markdown]
# **2. Two heads.** Give each byte the mean of the two probabilities, the n-gram's and the LSTM's.
# Can two models together be better than each alone? (With a share for each, chosen on the
# validation text, it gets better still.)

# %% tags=["solution"]


def byte_logprobs(text: bytes) -> tuple[Tensor, Tensor]:
    """The logarithm of each byte's probability, from the n-gram and from the LSTM."""
    before = best_ngram.order - 1
    padded = bytes(before) + text
    counted = [
        math.log(best_ngram.probability(padded[i : i + before], b)) for i, b in enumerate(text)
    ]
    with torch.no_grad():
        bytes_T = torch.tensor([0, *text])
        read_T = -F.cross_entropy(lstm(bytes_T[None, :-1])[0][0], bytes_T[1:], reduction="none")
    return torch.tensor(counted), read_T


def together(share: float) -> Callable[[bytes], float]:
    def log_probability(text: bytes) -> float:
        counted_T, read_T = byte_logprobs(text)
        return float((share * counted_T.exp() + (1 - share) * read_T.exp()).log().sum())

    return log_probability


by_share = {
    share: bits_per_byte(together(share), valid_texts[: 4 if FAST else None])
    for share in (0.5, 0.7, 0.9)
}
best_share = min(by_share, key=lambda share: by_share[share])
mixed_bits = bits_per_byte(together(best_share), test_texts)
print(
    f"n-gram {test_bits[f'{best_order}-gram, Kneser-Ney']:.3f}, LSTM {test_bits['LSTM']:.3f}, ",
    end="",
)
print(f"together {mixed_bits:.3f} (n-gram's share {best_share})")
assert mixed_bits < max(test_bits["LSTM"], test_bits[f"{best_order}-gram, Kneser-Ney"])
if not FAST:
    assert mixed_bits < min(test_bits["LSTM"], test_bits[f"{best_order}-gram, Kneser-Ney"])

# %% [markdown]
# **3. A sure forgetter.** Set the gates by hand: give `lstm_step` weights of zero and a bias that
# keeps everything and writes nothing. Put a number into the notebook and let a thousand steps go
# by. What is left? And with a forget gate of one half?

# %% tags=["solution"]
for keep in (20.0, 0.0):
    bias = torch.tensor([-20.0, keep, 0.0, 20.0])
    h_BD, c_BD = torch.zeros(1, 1), torch.ones(1, 1)
    for _step in range(1000 if keep else 10):
        h_BD, c_BD = lstm_step(
            torch.zeros(1, 1), h_BD, c_BD, torch.zeros(4, 1), torch.zeros(4, 1), bias
        )
    print(f"forget gate {torch.tensor(keep).sigmoid():.2f}: {c_BD.item():.6f} left")
    assert abs(c_BD.item() - (1 if keep else 0.5**10)) < 1e-3

# %% [markdown]
# ## Check yourself
#
# 1. A model gives each byte that comes the probability one half. How many bits per byte does it need?
# 2. Why do long n-grams with add-k get worse, and with Kneser-Ney hardly?
# 3. What does an n-gram of order 6 know about the word at the beginning of a long sentence?
# 4. Both have the same state size. Why can an LSTM remember where a plain recurrent network forgets?
# 5. A masked model sees more than a next-word model. Why is it no chatbot?
#
# <details markdown="1"><summary>Answers</summary>
#
# 1. One: a single yes-or-no question.
# 2. Most long contexts are new. Add-k then knows nothing; Kneser-Ney asks the shorter context.
# 3. Nothing. It sees the five bytes before the one that it guesses.
# 4. With the forget gate at one and the input gate at zero, a line of the notebook is handed on as it
#    is. A plain network squeezes everything through a matrix and tanh at each step.
# 5. Its guesses need the words that come after, and in a chat they are not written yet.
#
# </details>
#
# ## What we left out
#
# - **Words as pieces of n-grams.** Speech recognisers and translators used them for decades, with
#   five words and billions of counts. Ours count bytes, to be comparable.
# - **Modified Kneser-Ney** with three discounts (Chen and Goodman 1998): a little better still.
# - **Deeper LSTMs, dropout, weeks of training.** They made LSTMs the best language models until 2017.
# - **BERT itself**: a transformer in place of two LSTMs, so both sides meet in every layer.
# - **Encoder and decoder**: a masked-style reader joined to a next-word writer, for translation.
#   Chapter 06 builds one.
#
# ## Where this is in the package
#
# `tinychat/language_models.py` holds `NGram`, `KneserNey`, `lstm_step`, `LSTMModel`, and what later
# chapters use: `held_out_text`, `bits_per_byte` and `add_row`. The chatbot itself needs none of
# these models. It is a next-token model, as here; what changes is what stands between the text and
# the guess.
#
# ## Sources
#
# - C. E. Shannon: [A mathematical theory of communication](https://doi.org/10.1002/j.1538-7305.1948.tb01338.x)
#   (1948). Entropy, bits, and English written by n-grams.
# - C. E. Shannon: [Prediction and entropy of printed English](https://doi.org/10.1002/j.1538-7305.1951.tb01366.x)
#   (1951). How well people guess the next letter.
# - R. Kneser, H. Ney: [Improved backing-off for m-gram language modeling](https://doi.org/10.1109/ICASSP.1995.479394)
#   (1995).
# - S. F. Chen, J. Goodman: [An empirical study of smoothing techniques for language modeling](https://dash.harvard.edu/handle/1/25104739)
#   (1998). All of them, measured.
# - S. Hochreiter, J. Schmidhuber: [Long short-term memory](https://doi.org/10.1162/neco.1997.9.8.1735)
#   (1997).
# - F. A. Gers, J. Schmidhuber, F. Cummins: [Learning to forget](https://doi.org/10.1162/089976600300015015)
#   (2000). The forget gate.
# - Y. Bengio, R. Ducharme, P. Vincent, C. Jauvin: [A neural probabilistic language model](https://www.jmlr.org/papers/v3/bengio03a.html)
#   (2003). The first good language model that was a network.
# - R. Jozefowicz, O. Vinyals, M. Schuster, N. Shazeer, Y. Wu:
#   [Exploring the limits of language modeling](https://arxiv.org/abs/1602.02410) (2016). Large LSTMs
#   against the best n-grams.
# - O. Melamud, J. Goldberger, I. Dagan: [context2vec](https://aclanthology.org/K16-1006/) (2016). Two
#   LSTMs that meet at a blank, as ours.
# - J. Devlin, M.-W. Chang, K. Lee, K. Toutanova: [BERT](https://arxiv.org/abs/1810.04805) (2019).
