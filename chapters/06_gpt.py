# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # GPT
#
# Stack attention and feed-forward layers into the whole language model.
#
# You have tokens (chapter 03), vectors and positions (04) and attention (05). Two small parts are
# missing, and a plan to put everything together. At the end of this chapter stands a complete GPT:
# the same code that the shipped checkpoints were trained with.
#
# **What you will build**
#
# 1. the transformer of 2017, a reader and a writer that translate numbers from English to German;
# 2. the feed-forward layer and the block;
# 3. a whole GPT that learns one page by heart before your eyes, and translates the same numbers;
# 4. a model with switches that tells you which parts earn their place;
# 5. a row for your GPT in the table of chapter 02;
# 6. a file that holds a model with all that belongs to it, and a careful way to read it.
#
# **What you need:** chapters 02 to 05. The code takes a minute or two; reading it, more than an hour.

# %% tags=["export"]
import copy
import difflib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinychat.attention import Attention, LayerCache, RMSNorm, causal_mask
from tinychat.embeddings import rotary_tables
from tinychat.runtime import checkpoint
from tinychat.runtime.checkpoint import Checkpoint, CheckpointInfo
from tinychat.runtime.errors import CheckpointError, ConfigError
from tinychat.tokenizer import Tokenizer

# %% [markdown]
# ## First: a reader and a writer
#
# The transformer of 2017 was built to translate. It has two halves. The **encoder** reads the whole
# sentence in one language. The **decoder** writes in the other, one word after the other, and looks
# at what the encoder has read. Build it before you build a GPT: you'll know then what was left out,
# and why.
#
# You need a language pair that you can check. Take numbers in words, from English to German. German
# says *seven-and-forty*, so words change their places, and it's a real rule of a real language.
# There are a million numbers below a million. The model practises on a few thousand of them and is
# asked others.

# %%
import math
import os
import random
import tempfile
import time

from torch.utils.flop_counter import FlopCounterMode

from tinychat.attention import attend
from tinychat.book.picture import picture
from tinychat.data import tokenizer_model
from tinychat.data.corpus import stories
from tinychat.embeddings import sinusoidal_positions
from tinychat.runtime.device import set_threads

set_threads()
FAST = os.environ.get("TINYCHAT_FAST") == "1"
ENGLISH = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen""".split()
ENGLISH_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
GERMAN = """null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn
    fünfzehn sechzehn siebzehn achtzehn neunzehn""".split()
GERMAN_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()


def english(number: int) -> list[str]:
    """A number below a million in words."""
    for unit, name in ((1000, "thousand"), (100, "hundred")):
        if number >= unit:
            rest = english(number % unit) if number % unit else []
            return [*english(number // unit), name, *rest]
    if number < 20:
        return [ENGLISH[number]]
    return [ENGLISH_TENS[number // 10 - 2], *([ENGLISH[number % 10]] if number % 10 else [])]


def german_parts(number: int) -> list[str]:
    for unit, name in ((1000, "tausend"), (100, "hundert")):
        if number >= unit:
            rest = german_parts(number % unit) if number % unit else []
            return [*german_parts(number // unit), name, *rest]
    if number < 20:
        return [GERMAN[number]]
    return [*([GERMAN[number % 10], "und"] if number % 10 else []), GERMAN_TENS[number // 10 - 2]]


def german(number: int) -> list[str]:
    """The parts of a German number; written, they are one word. A last *ein* becomes *eins*."""
    parts = german_parts(number)
    return [*parts[:-1], "eins"] if parts[-1] == "ein" else parts


for number in (47, 101, 345_207):
    print(f"{number:>7,}: {' '.join(english(number))} → {''.join(german(number))}")

# %% tags=["test"]
assert "".join(german(21)) == "einundzwanzig" and "".join(german(1)) == "eins"
assert "".join(german(17)) == "siebzehn" and "".join(german(101)) == "einhunderteins"
assert "".join(german(999_999)) == "neunhundertneunundneunzigtausendneunhundertneunundneunzig"
assert " ".join(english(40_013)) == "forty thousand thirteen"

# %% [markdown]
# ## Attention between two texts
#
# How does the writer get at what was read? Before 2015, the encoder squeezed the sentence into one
# vector of fixed size, and the decoder unpacked it. You know that trouble from the LSTM of chapter
# 02: the longer the sentence, the less fits. Bahdanau, Cho and Bengio let the decoder look back at
# *all* vectors of the encoder, each time it writes a word. This was the first attention. (Their score
# of a pair came from a small network. The dot product is as good, once it is divided by the root, and
# one matrix product makes all scores at once.)
#
# In the terms of chapter 05, the **queries come from the text that is being written, and keys and
# values from the text that was read**. That is **cross-attention**. There's no future to hide: the
# whole sentence was read before the first word is written. One small class does for all three kinds:
#
# - the reader looks at the reader's text, in both directions;
# - the writer looks at what it has written (causal);
# - the writer looks at what was read (cross).


# %%
class Lookup(nn.Module):
    """Attention in which x asks and `source` answers; they may be the same text."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.v, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def split(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x_BTD: Tensor, source_BSD: Tensor, visible: Tensor) -> Tensor:
        q_BHTK, k_BHSK = self.split(self.q(x_BTD)), self.split(self.k(source_BSD))
        mixed_BHTK = attend(q_BHTK, k_BHSK, self.split(self.v(source_BSD)), visible)
        return self.out(mixed_BHTK.transpose(1, 2).flatten(2))

    def marks(self, x_BTD: Tensor, source_BSD: Tensor) -> Tensor:
        """Who looks where, `[B, H, T, S]`, where everything may be seen."""
        q_BHTK, k_BHSK = self.split(self.q(x_BTD)), self.split(self.k(source_BSD))
        return (q_BHTK @ k_BHSK.transpose(-2, -1) / q_BHTK.shape[-1] ** 0.5).softmax(dim=-1)


# %% [markdown]
# Around it goes what the rest of this chapter explains slowly: each part reads a normalised copy of
# a stream and *adds* its answer to it, and after looking comes thinking, a small network that widens
# each vector, bends it and narrows it again. The positions are the waves of chapter 04, added at the
# bottom, as in 2017.


# %%
def thinking(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))


class ReaderLayer(nn.Module):
    """One layer of the encoder: look at the whole sentence, then think."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(width, 1e-6) for _ in range(2))
        self.look, self.think = Lookup(width, heads), thinking(width)

    def forward(self, x_BSD: Tensor, real: Tensor) -> Tensor:
        normed_BSD = self.norms[0](x_BSD)
        x_BSD = x_BSD + self.look(normed_BSD, normed_BSD, real)
        return x_BSD + self.think(self.norms[1](x_BSD))


class WriterLayer(nn.Module):
    """One layer of the decoder: look at what is written, look at what was read, then think."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(width, 1e-6) for _ in range(3))
        self.look, self.cross = Lookup(width, heads), Lookup(width, heads)
        self.think = thinking(width)

    def ask(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The stream after looking at what is written, and the copy that asks the reader."""
        normed_BTD, T = self.norms[0](x_BTD), x_BTD.shape[1]
        x_BTD = x_BTD + self.look(normed_BTD, normed_BTD, causal_mask(T, T))
        return x_BTD, self.norms[1](x_BTD)

    def forward(self, x_BTD: Tensor, read_BSD: Tensor, real: Tensor) -> Tensor:
        x_BTD, asking_BTD = self.ask(x_BTD)
        x_BTD = x_BTD + self.cross(asking_BTD, read_BSD, real)
        return x_BTD + self.think(self.norms[2](x_BTD))


# %% [markdown]
# The whole translator. Sentences of a batch have different lengths, so short ones are filled up with
# a padding word that nobody may look at. With `one_vector` it does as people did before 2015: all
# that was read is averaged to a single vector.

# %%
PAD, BEGIN, END = 0, 1, 2
english_words = ["<pad>", *ENGLISH, *ENGLISH_TENS, "hundred", "thousand"]
german_words = ["<pad>", "<begin>", "<end>", *GERMAN, "eins", *GERMAN_TENS]
german_words += ["und", "hundert", "tausend"]
english_ids = {word: number for number, word in enumerate(english_words)}
german_ids = {word: number for number, word in enumerate(german_words)}


class Translator(nn.Module):
    """The transformer of 2017 in small: English words in, scores of the next German word out."""

    def __init__(self, width: int = 48, heads: int = 4, one_vector: bool = False):
        super().__init__()
        self.width, self.one_vector = width, one_vector
        self.read_table = nn.Embedding(len(english_words), width)
        self.write_table = nn.Embedding(len(german_words), width)
        self.reader, self.writer = ReaderLayer(width, heads), WriterLayer(width, heads)
        self.read_norm, self.write_norm = RMSNorm(width, 1e-6), RMSNorm(width, 1e-6)
        self.guess = nn.Linear(width, len(german_words))

    def encode(self, english_BS: Tensor) -> tuple[Tensor, Tensor]:
        """What was read, `[B, S, D]`, and which of it is real, `[B, 1, 1, S]`."""
        real_BS = english_BS != PAD
        x_BSD = self.read_table(english_BS)
        x_BSD = x_BSD + sinusoidal_positions(english_BS.shape[1], self.width)
        read_BSD = self.read_norm(self.reader(x_BSD, real_BS[:, None, None]))
        if self.one_vector:
            shares_B1S = (real_BS / real_BS.sum(dim=1, keepdim=True))[:, None]
            return shares_B1S @ read_BSD, torch.tensor(True)
        return read_BSD, real_BS[:, None, None]

    def start_writing(self, german_BT: Tensor) -> Tensor:
        x_BTD = self.write_table(german_BT)
        return x_BTD + sinusoidal_positions(german_BT.shape[1], self.width)

    def forward(self, english_BS: Tensor, german_BT: Tensor) -> Tensor:
        """Scores of the German word after each, `[B, T, words]`."""
        x_BTD = self.writer(self.start_writing(german_BT), *self.encode(english_BS))
        return self.guess(self.write_norm(x_BTD))


def filled_up(rows: list[list[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


def number_batch(numbers: list[int]) -> tuple[Tensor, Tensor]:
    read = [[english_ids[word] for word in english(number)] for number in numbers]
    written = [[BEGIN, *(german_ids[word] for word in german(number)), END] for number in numbers]
    return filled_up(read), filled_up(written)


# %% tags=["test"]
torch.manual_seed(0)
fresh = Translator()
read_BS, written_BT = number_batch([47, 345_207])
with torch.no_grad():
    scores_BTV = fresh(read_BS, written_BT)
    # Padding changes nothing, nor does what will be written later.
    alone_BTV = fresh(*number_batch([47]))
    torch.testing.assert_close(scores_BTV[:1, : alone_BTV.shape[1]], alone_BTV)
    other_BT = written_BT.clone()
    other_BT[:, 3:] = END
    torch.testing.assert_close(fresh(read_BS, other_BT)[:, :3], scores_BTV[:, :3])
    # But every word that is read can matter to the first word that is written.
    changed_BS = read_BS.clone()
    changed_BS[1, -1] = english_ids["nine"]
    assert not torch.allclose(fresh(changed_BS, written_BT)[1, 0], scores_BTV[1, 0], atol=1e-4)

# %% [markdown]
# In training, the writer is shown the right German words so far and must say the next one, at all
# places at once (**teacher forcing**). When it is asked for real, it must go on from its own words.
# A translation counts only if every word is right.


# %%
def train_translator(model: nn.Module, batch_loss, numbers: list[int], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, fused=True)
    fall = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    draw = random.Random(0)
    for _step in range(steps):
        loss = batch_loss(model, draw.sample(numbers, 32 if FAST else 64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fall.step()


def pair_loss(model: nn.Module, numbers: list[int]) -> Tensor:
    """The writer reads all words but the last and says all but the first: one further on."""
    read_BS, written_BT = number_batch(numbers)
    scores_BTV = model(read_BS, written_BT[:, :-1])
    return F.cross_entropy(scores_BTV.flatten(0, 1), written_BT[:, 1:].flatten(), ignore_index=PAD)


@torch.no_grad()
def translations(model: Translator, numbers: list[int]) -> list[list[str]]:
    """The best next word, again and again, for all numbers side by side."""
    read_BS, _ = number_batch(numbers)
    written_BT = torch.full((len(numbers), 1), BEGIN)
    for _ in range(16):
        next_B1 = model(read_BS, written_BT)[:, -1:].argmax(dim=-1)
        written_BT = torch.cat([written_BT, next_B1], dim=1)
    rows = [[german_words[word] for word in row[1:]] for row in written_BT.tolist()]
    return [row[: row.index("<end>")] if "<end>" in row else row for row in rows]


def exact(written: list[list[str]], numbers: list[int]) -> float:
    right = [row == german(number) for row, number in zip(written, numbers, strict=True)]
    return sum(right) / len(right)


numbers = random.Random(0).sample(range(10_000 if FAST else 1_000_000), 3500)
practice, held_out = numbers[:3000], numbers[3000 : 3060 if FAST else None]
STEPS = 45 if FAST else 400
exact_share: dict[str, float] = {}
for name, one_vector in (("one vector", True), ("cross-attention", False)):
    torch.manual_seed(0)
    translator = Translator(one_vector=one_vector)
    begin = time.perf_counter()
    steps = STEPS // 3 if FAST and one_vector else STEPS
    train_translator(translator, pair_loss, practice, steps)
    answers = translations(translator, held_out)
    exact_share[name] = exact(answers, held_out)
    weights = sum(weight.numel() for weight in translator.parameters())
    print(
        f"{name:>15}: {weights:,} weights, {exact_share[name]:.1%} of {len(held_out)} new numbers "
        f"exactly right after {steps} steps ({time.perf_counter() - begin:.0f} s)"
    )
    for number, row in zip(held_out, answers, strict=True):
        if row != german(number):
            print(f"    a mistake: {' '.join(english(number))} → {''.join(row)}")
            break
for number, row in zip(held_out[:3], answers[:3], strict=True):
    print(f"  {' '.join(english(number))} → {''.join(row)}")

# %% tags=["test"]
assert exact_share["cross-attention"] > exact_share["one vector"]
if not FAST:
    assert exact_share["cross-attention"] > max(0.95, exact_share["one vector"] + 0.1)

# %% [markdown]
# It has seen a few numbers in a thousand, and it translates the others: it has learned the rules. The
# one with the single vector gets less far with the same practice. Look at its mistake. Such words
# were there, but at other places: a vector of fixed size holds *what* was said more easily than
# *where*.
#
# Where does the writer look? Each row of the picture is a word that it is about to write.

# %%
shown = 47_362
read_BS, written_BT = number_batch([shown])
with torch.no_grad():
    read_BSD, _ = translator.encode(read_BS)
    _, asking_BTD = translator.writer.ask(translator.start_writing(written_BT[:, :-1]))
    marks_TS = translator.writer.cross.marks(asking_BTD, read_BSD)[0].mean(dim=0)


# %%
# alt: Heat map, German words against English ones: the marks cross where units precede tens.
def draw_alignment(plt):
    figure, axis = plt.subplots(figsize=(5, 4.5))
    axis.imshow(marks_TS.tolist(), cmap="Oranges", vmin=0, vmax=1)
    words, parts = english(shown), [*german(shown), "<end>"]
    axis.set_xticks(range(len(words)), words, rotation=45, ha="right")
    axis.set_yticks(range(len(parts)), parts)
    axis.set(xlabel="was read", ylabel="is being written")
    return figure


picture("06_alignment", draw_alignment)

# %% tags=["test"]
if not FAST:
    looked = [english(shown)[place] for place in marks_TS.argmax(dim=1).tolist()]
    assert looked[0] == "seven" and looked[2] == "forty", "German says the units first"
    assert looked[4] == "three" and looked[5] == "hundred"

# %% [markdown]
# The marks run from the upper left to the lower right, but where German puts the units before the
# tens, they cross. Nobody told the model which word belongs to which.
#
# ## How it was trained in 2017
#
# Your translator learned with plain means. The first transformer had three helpers. They are still
# about, so build each of them once.
#
# **Warm-up.** A fresh network takes large steps in wrong directions. So the learning rate rises in a
# straight line at first, and then falls like one over the root of the step. A wider network gets
# smaller steps. (Chapter 07 uses another shape.)
#
# **Label smoothing** (Szegedy and others 2016). The plain loss wants the probability one for the right
# word and is never content with less. So aim a little lower: take a tenth away, and share it out to
# all words alike. Then it costs to be too sure.
#
# **Dropout** (Srivastava and others 2014). While the network practises, a tenth of the numbers in a
# layer become zero, others each time. No neuron can rely on a single other one. The rest are made
# larger, so that the mean stays.


# %%
def rate_of_2017(step: int, width: int, warmup: int) -> float:
    """The learning rate of Vaswani et al. 2017, section 5.3."""
    return width**-0.5 * min(step**-0.5, step * warmup**-1.5)


def smoothed_loss(shares_V: Tensor, right: int, smoothing: float) -> float:
    """The mean surprise, where `smoothing` of the truth is shared out to all words alike."""
    truth_V = torch.full_like(shares_V, smoothing / len(shares_V))
    truth_V[right] += 1 - smoothing
    return -float((truth_V * shares_V.log()).sum())


losses_of: dict[str, list[float]] = {"plain": [], "smoothed": []}
sureness = [step / 200 for step in range(100, 200)]
for sure in sureness:
    shares_V = torch.full((len(german_words),), (1 - sure) / (len(german_words) - 1))
    shares_V[5] = sure
    for name, smoothing in (("plain", 0.0), ("smoothed", 0.1)):
        losses_of[name].append(smoothed_loss(shares_V, 5, smoothing))
for name, losses in losses_of.items():
    print(
        f"{name:>8} loss: lowest where the right word gets {sureness[losses.index(min(losses))]:.1%}"
    )

dropped = F.dropout(torch.ones(10_000), 0.1)
print(f"dropout: {(dropped == 0).float().mean():.0%} of the ones are 0, ", end="")
print(f"the others {dropped.max():.2f}, the mean {dropped.mean():.2f}")

# %% tags=["test"]
shares_V = torch.randn(9).softmax(dim=0)
theirs = F.cross_entropy(shares_V.log(), torch.tensor(3), label_smoothing=0.1)
torch.testing.assert_close(torch.tensor(smoothed_loss(shares_V, 3, 0.1)), theirs)
assert max(range(1, 9000), key=lambda step: rate_of_2017(step, 512, 4000)) == 4000


# %%
# alt: Left, rates that rise in a line, then fall; right, the smoothed loss rises again near one.
def draw_helpers(plt):
    figure, (rates, loss) = plt.subplots(1, 2, figsize=(8, 3.2))
    steps = range(1, 20_000, 50)
    for width, warmup, line in ((512, 4000, "-"), (512, 8000, "--"), (256, 4000, ":")):
        curve = [1e4 * rate_of_2017(step, width, warmup) for step in steps]
        rates.plot(steps, curve, line, label=f"width {width}, warm-up {warmup}")
    rates.set(xlabel="step", ylabel="learning rate, in ten-thousandths")
    for name, losses in losses_of.items():
        loss.plot(sureness, losses, label=name)
    loss.set(xlabel="probability of the right word", ylabel="loss in nats")
    for axis in (rates, loss):
        axis.legend(fontsize=8)
    return figure


picture("06_helpers", draw_helpers)

# %% [markdown]
# Label smoothing makes a model worse at saying how likely a text is, and its inventors found that it
# chooses better (exercise 5 looks at that). A language model is measured by its probabilities, so GPTs
# go without. They also go without dropout when they read each text only once or a few times: there
# is little danger of learning it by heart. Warm-up stayed.
#
# ## Why GPT has only the writer
#
# It works. Then why is your chatbot not built like this?
#
# 1. **Pairs are rare, text is not.** The encoder–decoder learns from pairs: a question here, an answer
#    there. And only the words of the answer give it something to learn from. A decoder on its own
#    learns from any text, at every word.
# 2. **Everything can be written as one text.** Put the question first and the answer after it. Then
#    reading is just the beginning of writing, and one kind of layer does both.
# 3. **A chat goes on.** An encoder that looks in both directions must read everything again when a
#    sentence is added, since each old vector may change. With causal attention the past stays as it
#    was, so its keys and values can be kept (chapter 08).
#
# What is lost is the look to the right: a word that is read doesn't know what comes after it. Further
# down, when your GPT stands, it gets the same numbers to translate, and you see what that costs.

# %%
pairs_read, pairs_written = number_batch(held_out)
words_read, words_written = int((pairs_read != PAD).sum()), int((pairs_written[:, 1:] != PAD).sum())
print(f"of {words_read + words_written:,} words, the encoder-decoder is asked to say ", end="")
print(f"{words_written / (words_read + words_written):.0%}; a decoder alone, nearly all")

# %% [markdown]
# ## The plan
#
# Now your GPT.
#
# ```
# token numbers ─ look up ─▶ vectors ──┬───────────────┬──▶ ... ──▶ norm ─ compare with ─▶ scores of
#                                      │   attention   │            every row of the      the next
#                                      │  feed-forward │            same table            token
#                                      └── one block ──┘  × layers
# ```
#
# The line in the middle is the **residual stream**: one vector for each token, as wide as the
# embedding. A block doesn't replace the vector. It reads it, computes something and *adds* that to
# it.
#
# Think of a patient's file that goes from doctor to doctor. Each reads what is in it and puts in a
# page. Nobody rewrites it. So the first page still reaches the last doctor, and (this matters more)
# the blame for a wrong verdict finds its way straight back to everyone who wrote something: in
# training, the gradient flows along the additions without being weakened.
#
# ## The shape in one place
#
# A handful of numbers decides what a GPT is. They stand in one frozen dataclass. It refuses shapes
# that can't work, and it knows how many weights there will be; we come back to this formula.


# %% tags=["export"]
@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT; the same names as in the checkpoint's metadata."""

    width: int
    "size D of the residual stream"
    layers: int
    "number of blocks"
    heads: int
    "query heads a layer"
    kv_heads: int
    "key and value heads a layer; divides `heads`"
    hidden: int
    "inner size of the feed-forward layers"
    head_width: int = 64
    "size K of one head; even, because rotary positions turn pairs"
    vocab_size: int = 8192
    "number V of tokens"
    context: int = 1024
    "longest text in tokens"
    rope_theta: float = 10000.0
    "base of the rotary wavelengths"
    norm_eps: float = 1e-6
    "keeps RMSNorm from dividing by zero"

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "kv_heads", "hidden", "vocab_size", "context"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        if not isinstance(self.head_width, int) or self.head_width < 2 or self.head_width % 2:
            raise ConfigError(f"head_width is {self.head_width!r}; it must be even and positive.")
        if self.context > 2**20:
            raise ConfigError(f"context is {self.context:,}; {2**20:,} tokens are the most.")
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"{self.heads} heads can't share {self.kv_heads} key heads; "
                "kv_heads must divide heads."
            )

    @property
    def parameters(self) -> int:
        """How many weights the model has; the tied embedding counts once."""
        attention = self.width * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        norms = 2 * self.width + 2 * self.head_width
        layer = attention + 3 * self.width * self.hidden + norms
        return self.vocab_size * self.width + self.layers * layer + self.width

    def flops_per_token(self, sequence: int) -> int:
        """Floating-point operations to train on one token: 6 a weight, plus attention's T²."""
        attention = 12 * self.layers * self.heads * self.head_width * sequence
        return 6 * self.parameters + attention


# %% [markdown]
# Four sizes have names. Climb them in order: `nano` for experiments, `mini` for a patient CPU, the
# others for a GPU. Further down you compute how patient.


# %% tags=["export"]
def nano() -> GPTConfig:
    """Seconds to minutes on a CPU: tests and live chapters."""
    return GPTConfig(width=128, layers=4, heads=2, kv_heads=1, hidden=384, context=512)


def mini() -> GPTConfig:
    """A few CPU hours: the checkpoint that everyone can rebuild."""
    return GPTConfig(width=256, layers=8, heads=4, kv_heads=2, hidden=704)


def small() -> GPTConfig:
    """Half an hour of one data-centre GPU."""
    return GPTConfig(width=512, layers=10, heads=8, kv_heads=4, hidden=1536)


def medium() -> GPTConfig:
    """The size of GPT-2's smallest: hours on one GPU."""
    return GPTConfig(width=768, layers=18, heads=12, kv_heads=6, hidden=2048)


PRESETS: dict[str, Callable[[], GPTConfig]] = {
    "nano": nano,
    "mini": mini,
    "small": small,
    "medium": medium,
}


def preset(name: str) -> GPTConfig:
    """Return the preset of that name; ConfigError names one that looks like it, and all."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? There are" if close else "there are"
        raise ConfigError(f"There is no preset {name!r}; {hint} {', '.join(PRESETS)}.")
    return PRESETS[name]()


# %%
try:
    preset("smal")
except ConfigError as error:
    print(error)

# %% [markdown]
# ## Thinking: the feed-forward layer
#
# Attention moves information between tokens. It is an average, so it can't do much *with* it. That
# is the job of the second part: a small network that looks at one token at a time. It makes the
# vector wider, bends it with a nonlinear function, and makes it narrow again. In all but the smallest
# models most of the weights are here, and much of what the model knows.
#
# Which bend? Chapter 01 used tanh, which is flat on both sides, so that hardly any gradient comes
# through there. **ReLU** cuts off what is negative and leaves the rest alone. **GELU** (GPT-2) and
# **SiLU** are smooth versions: x times its share of a bell curve, and x times its own sigmoid. And
# some models take the square of ReLU.
#
# The classical form is `down(relu(up(x)))`. Ours is **SwiGLU** (Shazeer 2020). There are two wide
# vectors, and one of them decides, by SiLU, how far each place of the other is let through, like a row
# of taps.

# %%
BENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "ReLU": F.relu,
    "GELU": F.gelu,
    "SiLU": lambda x: x * x.sigmoid(),
    "ReLU squared": lambda x: x.relu() ** 2,
}
for name, bend in BENDS.items():
    told = [round(y, 2) for y in bend(torch.tensor([-4.0, -1.0, 0.0, 1.0, 2.0])).tolist()]
    print(f"{name:>12}: {told}")


# %%
# alt: Four bends: ReLU has a kink at zero, GELU and SiLU dip below it, ReLU squared rises faster.
def draw_bends(plt):
    figure, axis = plt.subplots(figsize=(6, 3.2))
    x = torch.linspace(-4, 2, 121)
    for (name, bend), line in zip(BENDS.items(), ("-", "-", "-", ":"), strict=True):
        axis.plot(x.tolist(), bend(x).tolist(), line, label=name)
    axis.set(xlabel="in", ylabel="out")
    axis.legend()
    return figure


picture("06_bends", draw_bends)


# %% tags=["export"]
class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): one projection opens or shuts the gates of the other."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


# %% tags=["test"]
torch.manual_seed(0)
layer, x_BTD = FeedForward(8, 24), torch.randn(1, 5, 8)
opened = layer.gate(x_BTD)
by_hand = layer.down(opened * opened.sigmoid() * layer.up(x_BTD))
torch.testing.assert_close(layer(x_BTD), by_hand)
# Each token is on its own: changing one changes nobody else.
other = x_BTD.clone()
other[:, 2] += 1
assert (layer(other) != layer(x_BTD)).any(dim=-1).tolist() == [[False, False, True, False, False]]

# %% [markdown]
# ## One block
#
# First gather, then think; each adds to the stream. Both read a *normalised copy* (RMSNorm, chapter
# 05), while the stream itself goes on untouched. This is called **pre-norm**. The first transformer
# did it the other way round, adding first and normalising the sum (**post-norm**). It looks like a
# matter of taste. Further down you train both, and see that it isn't.


# %% tags=["export"]
class Block(nn.Module):
    """One layer: gather from other tokens, then think about each token on its own.

    Both halves read a normalised copy of the residual stream and add to the stream itself
    (pre-norm: Xiong et al. 2020).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(
            config.width, config.heads, config.kv_heads, config.head_width, config.norm_eps
        )
        self.feed_forward_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = FeedForward(config.width, config.hidden)

    def forward(
        self,
        x_BTD: Tensor,
        cos_TK: Tensor,
        sin_TK: Tensor,
        visible: Tensor | None,
        cache: LayerCache | None,
        start: int,
    ) -> Tensor:
        x_BTD = x_BTD + self.attention(
            self.attention_norm(x_BTD), cos_TK, sin_TK, visible, cache, start
        )
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))


# %% [markdown]
# ## A memory for chatting
#
# In chapter 05 each layer got a store for its keys and values. `KVCache` is one such store for every
# layer, together with the number of tokens stored. It can forget from the end (`truncate`), which is
# what "try that answer again" needs.
#
# It also knows who may see whom when the texts of a batch have different lengths. Texts are then
# filled up on the left with padding. Each token has a **segment** number, and a token sees only
# earlier tokens of its own segment. The same numbers let several short conversations be packed into
# one row without reading each other.


# %% tags=["export"]
class KVCache:
    """What the model keeps of the tokens it has read, so that it never reads them twice.

    `length` tokens are stored. `segments_BS` is kept only when the rows of a batch have padding.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        shape = (batch, config.kv_heads, capacity, config.head_width)
        self.layers = [LayerCache(shape, device, dtype) for _ in range(config.layers)]
        self.segments_BS: Tensor | None = None
        self.batch = batch
        self.capacity = capacity
        self.length = 0

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"can't truncate {self.length} stored tokens to {length}")
        self.length = length
        if self.segments_BS is not None:
            self.segments_BS = self.segments_BS[:, :length]

    def copies(self, rows: int, capacity: int) -> "KVCache":
        """Return a cache with room for `capacity` tokens and `rows` times this one's single row."""
        many = copy.copy(self)
        many.batch, many.capacity, many.layers = rows, capacity, []
        for layer in self.layers:
            _, heads, _, width = layer.k.shape
            wide = LayerCache((rows, heads, capacity, width), layer.k.device, layer.k.dtype)
            wide.extend(0, *(part.expand(rows, -1, -1, -1) for part in layer.held(0, self.length)))
            many.layers.append(wide)
        if self.segments_BS is not None:
            many.segments_BS = self.segments_BS.expand(rows, -1)
        return many

    def follow(self, other: "KVCache", row: int, length: int) -> None:
        """Hold what a row of `other` holds, up to `length` tokens; both must begin alike."""
        for mine, its in zip(self.layers, other.layers, strict=True):
            k, v = its.held(self.length, length)
            mine.extend(self.length, k[row : row + 1], v[row : row + 1])
        self.length = length

    def keep(self, rows_B: Tensor) -> None:
        """Drop all other rows: replies that are over need no more work."""
        for layer in self.layers:
            layer.k, layer.v = layer.k[rows_B], layer.v[rows_B]
        if self.segments_BS is not None:
            self.segments_BS = self.segments_BS[rows_B]
        self.batch = len(rows_B)

    def visible(
        self, length: int, segments_BT: Tensor | None, device: torch.device
    ) -> Tensor | None:
        """Take in `length` new tokens; return who sees whom, or None for plain causal."""
        if self.length + length > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} tokens; {self.length} + {length} don't fit"
            )
        if segments_BT is None and self.segments_BS is None:
            return None
        old = self.segments_BS
        if old is None:
            old = torch.ones(self.batch, self.length, dtype=torch.long, device=device)
        if segments_BT is None:
            segments_BT = torch.ones(self.batch, length, dtype=torch.long, device=device)
        self.segments_BS = torch.cat((old, segments_BT), dim=1)
        same_BTS = segments_BT[:, :, None] == self.segments_BS[:, None, :]
        causal_TS = causal_mask(length, self.length + length, device)
        return (same_BTS & causal_TS)[:, None]


# %% [markdown]
# ## The whole model
#
# Read `hidden` from top to bottom; it is the plan from above. Three things are worth knowing.
#
# **Tied embeddings.** At the end, the last vector is compared, by dot product, with every row of a
# table. The token whose row fits best gets the highest score. Our model uses the very table from
# which the tokens were read (Press and Wolf 2017). A token that means something similar coming in and
# going out needs only one row, and in small models this saves a large part of all weights. In large
# ones it saves little, and many keep two tables.
#
# **No position is added.** The rotary tables go into each attention layer instead.
#
# **The beginning is silence.** `reset_parameters` sets the matrices that write into the stream to
# zero. So at first, every block adds nothing, and training decides what is worth saying.


# %% tags=["export"]
class GPT(nn.Module):
    """A decoder-only transformer in the shape of Qwen3: tokens in, scores of the next token out.

    `segments_BT` holds a number for each token: tokens see only earlier tokens of their own
    segment. Packing gives each conversation its own number; left padding has a number of its own.
    """

    cos_TK: Tensor
    sin_TK: Tensor

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        # The table is given, so that nn.Embedding does not fill it twice.
        table_VD = torch.empty(config.vocab_size, config.width)
        self.embed = nn.Embedding(config.vocab_size, config.width, _weight=table_VD)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        with torch.device("cpu"):  # computed, not learned: real in an empty model too
            cos_TK, sin_TK = rotary_tables(config.context, config.head_width, config.rope_theta)
        self.register_buffer("cos_TK", cos_TK, persistent=False)
        self.register_buffer("sin_TK", sin_TK, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights: small embeddings, so that every next token starts equally likely.

        The matrices that write into the residual stream start at zero: each block begins as
        "change nothing" and the gradient decides what it adds (Zhang et al. 2019, Fixup).
        """
        if self.embed.weight.is_meta:
            return  # an empty model: a checkpoint's weights will take these places
        # A token's score for itself starts at width x std, because rows are read and written by one
        # table; the second bound keeps wide models from guessing "the same token again".
        width = self.config.width
        nn.init.normal_(self.embed.weight, std=min(0.2 * width**-0.5, 4.6 / width))
        for block in self.blocks:
            assert isinstance(block, Block)
            for linear in (block.attention.q, block.attention.k, block.attention.v):
                nn.init.normal_(linear.weight, std=width**-0.5)
            for linear in (block.feed_forward.gate, block.feed_forward.up):
                nn.init.normal_(linear.weight, std=width**-0.5)
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.feed_forward.down.weight)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def new_cache(self, batch: int = 1, capacity: int | None = None) -> KVCache:
        """Return an empty cache for `capacity` tokens a row (the whole context by default)."""
        capacity = min(capacity or self.config.context, self.config.context)
        return KVCache(self.config, batch, capacity, self.device, self.embed.weight.dtype)

    def hidden(
        self,
        ids_BT: Tensor,
        *,
        cache: KVCache | None = None,
        segments_BT: Tensor | None = None,
    ) -> Tensor:
        """Return the last layer's normalised vectors, `[B, T, D]`.

        Raises ConfigError when the text, with what the cache holds, is longer than the context, and
        ValueError when the cache has no room for it.
        """
        B, T = ids_BT.shape
        start = cache.length if cache is not None else 0
        if start + T > self.config.context:
            raise ConfigError(
                f"The text is {start + T} tokens long; this model reads {self.config.context}."
            )
        if cache is not None:
            visible = cache.visible(T, segments_BT, ids_BT.device)
        elif segments_BT is not None:
            same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
            visible = (same_BTS & causal_mask(T, T, ids_BT.device))[:, None]
        else:
            visible = None
        x_BTD = self.embed(ids_BT)
        cos_TK = self.cos_TK[start : start + T].to(x_BTD.dtype)
        sin_TK = self.sin_TK[start : start + T].to(x_BTD.dtype)
        for number, block in enumerate(self.blocks):
            layer = cache.layers[number] if cache is not None else None
            x_BTD = block(x_BTD, cos_TK, sin_TK, visible, layer, start)
        if cache is not None:
            cache.length += T
        return self.norm(x_BTD)

    def forward(
        self,
        ids_BT: Tensor,
        *,
        cache: KVCache | None = None,
        segments_BT: Tensor | None = None,
    ) -> Tensor:
        """Return the scores of every possible next token, `[B, T, V]`, float32."""
        h_BTD = self.hidden(ids_BT, cache=cache, segments_BT=segments_BT)
        return F.linear(h_BTD, self.embed.weight).float()


# %% [markdown]
# ## Where the weights are
#
# Count the weights of each preset by part. With the formulas from `GPTConfig.parameters`:
#
# - the embedding: one row of `width` numbers for each token;
# - attention, in each layer: queries and the way out (`heads` each), keys and values (`kv_heads`
#   each), times the width of a head, times `width`;
# - feed-forward, in each layer: three matrices of `width` times `hidden`;
# - norms: next to nothing.
#
# The models are built on PyTorch's *meta* device: all the shapes, no memory.

# %%
print(f"{'':8} {'embedding':>12} {'attention':>12} {'feed-forward':>13} {'norms':>7} ", end="")
print(f"{'total':>12} {'at 4 bytes each':>16}")
for name in PRESETS:
    shape = preset(name)
    with torch.device("meta"):
        model = GPT(shape)
    counts = dict.fromkeys(("embed", "attention", "feed_forward", "norm"), 0)
    for weight_name, weight in model.named_parameters():
        part = "norm" if "norm" in weight_name else weight_name.split(".")[0]
        if part == "blocks":
            part = weight_name.split(".")[2]
        counts[part] += weight.numel()
    row = [counts["embed"], counts["attention"], counts["feed_forward"], counts["norm"]]
    print(f"{name:8} {row[0]:12,} {row[1]:12,} {row[2]:13,} {row[3]:7,} ", end="")
    print(f"{sum(row):12,} {4 * sum(row) / 1e6:13,.0f} MB")
    assert sum(row) == shape.parameters
    assert counts["embed"] == shape.vocab_size * shape.width
    assert counts["feed_forward"] == shape.layers * 3 * shape.width * shape.hidden

# %% [markdown]
# ## What a fresh model should know: nothing
#
# Before training, all next tokens should be equally likely: one in V. The loss is minus the logarithm
# of the probability that the right token got, so it must be ln V. That is your first test of any
# language model. Much more means that it begins with strong wrong opinions. Less means that it
# cheats and sees the answer.

# %%
torch.manual_seed(0)
model = GPT(nano())
ids_BT = torch.randint(model.config.vocab_size, (4, 65))
with torch.no_grad():
    logits_BTV = model(ids_BT[:, :-1])
loss = F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
print(f"loss {loss:.3f}, ln {model.config.vocab_size} = {math.log(model.config.vocab_size):.3f}")

# %% tags=["test"]
assert abs(float(loss) - math.log(model.config.vocab_size)) < 0.05
# Silent blocks: what comes out is the normalised embedding.
with torch.no_grad():
    torch.testing.assert_close(model.hidden(ids_BT), model.norm(model.embed(ids_BT)))

# %% [markdown]
# ## Does it keep its promises?
#
# Three promises must hold for any weights, but zeros would hide mistakes. So give a copy random ones
# and check:
#
# 1. **Causality.** Change the later tokens: the earlier scores stay the same, to the last bit.
# 2. **Memory.** Read in pieces with a cache: the same scores.
# 3. **Segments.** Pack two texts into one row: the same scores as for each alone.

# %% tags=["test"]
torch.manual_seed(1)
tiny = GPTConfig(
    width=32, layers=2, heads=4, kv_heads=2, head_width=8, hidden=64, vocab_size=50, context=32
)
lively = GPT(tiny)
for weight in lively.parameters():
    if weight.dim() == 2:
        nn.init.normal_(weight, std=0.2)
ids_BT = torch.randint(50, (1, 20))
with torch.no_grad():
    logits_BTV = lively(ids_BT)

    changed_BT = ids_BT.clone()
    changed_BT[:, 12:] = 7
    assert torch.equal(lively(changed_BT)[:, :12], logits_BTV[:, :12])

    cache = lively.new_cache()
    pieces = [lively(piece_BT, cache=cache) for piece_BT in ids_BT.split([9, 1, 1, 9], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), logits_BTV, atol=1e-5, rtol=1e-5)

    segments_BT = torch.tensor([[0] * 8 + [1] * 12])
    packed_BTV = lively(ids_BT, segments_BT=segments_BT)
    torch.testing.assert_close(packed_BTV[:, 8:], lively(ids_BT[:, 8:]), atol=1e-5, rtol=1e-5)
print("causal; the same with a cache; packed texts don't see each other")

# %% [markdown]
# There is a fourth check that a chapter can't do alone: an independent witness. Our model has the
# shape of Qwen3, so the tests load the same weights into the `transformers` library's Qwen3 and
# compare all scores.
#
# ## How much work is a token?
#
# Each weight of a matrix takes part in one multiplication and one addition for each token: two
# floating-point operations (FLOPs). The way back, in training, costs twice the way forward: once for
# the gradient of the weights and once for that of the inputs. That makes **six a weight and token**.
# Attention comes on top: its scores and its mixing cost 4 · K · T a token and head on the way
# forward, three times that in all.
#
# PyTorch can count what really happens. Compare.

# %%
T = 64
ids_BT = torch.randint(8192, (1, T))
with FlopCounterMode(display=False) as counter:
    model(ids_BT).sum().backward()
counted, formula = counter.get_total_flops() / T, model.config.flops_per_token(T)
print(f"a token of nano: counted {counted:,.0f}, formula {formula:,} FLOPs")

# How fast is this machine, here and now, with whatever else it does? (Chapter 07 is faster.)
ids_BT, seconds = torch.randint(8192, (8, T)), math.inf
for _repeat in range(1 if FAST else 3):
    begin = time.perf_counter()
    F.cross_entropy(model(ids_BT).flatten(0, 1), ids_BT.flatten()).backward()
    seconds = min(seconds, time.perf_counter() - begin)
speed = ids_BT.numel() * formula / seconds
print(f"this machine, with {torch.get_num_threads()} threads: {speed / 1e9:.0f} billion a second")
for name in PRESETS:
    work = preset(name).flops_per_token(256) * 300e6
    print(f"{name:>7}: 300 million tokens take {work:.1e} FLOPs, {work / speed / 3600:.1f} hours")

# %% tags=["test"]
assert abs(counted / formula - 1) < 0.01

# %% [markdown]
# ## Learn one page by heart
#
# Now let it learn. The best first experiment with any new network: give it *one* small batch again
# and again. It must be able to learn it by heart. If it can't, something is broken, and no amount of
# data will help.
#
# What is there to learn on a page? At each place the same question: which token comes next? So the
# model reads all tokens but the last, and its answers are compared with all tokens but the first.

# %%
tokenizer = Tokenizer(tokenizer_model())
LINE = 17 if FAST else 33
page = [tokenizer.encode(story.text)[:LINE] for story in stories()[: 2 if FAST else 4]]
page_BT = torch.tensor(page)
for place in range(4):
    read, following = page[0][: place + 1], page[0][place + 1]
    print(f"after {tokenizer.decode(read)!r} comes {tokenizer.decode([following])!r}")
print(f"... {page_BT[:, 1:].numel()} questions on one small page")

# %% [markdown]
# Before it learns, let it speak. `continue_text` always takes the best token; chapter 08 has better
# rules.

# %%
torch.manual_seed(0)
model = GPT(nano())


@torch.no_grad()
def continue_text(model: GPT, ids: list[int], count: int) -> str:
    """Add the best next token `count` times."""
    cache, unread_BT = model.new_cache(), torch.tensor([ids])
    reply: list[int] = []
    for _ in range(count):
        reply.append(int(model(unread_BT, cache=cache)[0, -1].argmax()))
        unread_BT = torch.tensor([[reply[-1]]])
    return tokenizer.decode([*ids, *reply])


def throw_dice(model: GPT, ids: list[int], count: int) -> str:
    """Draw each next token by its probability."""
    ids, draw = list(ids), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(count):
            shares_V = model(torch.tensor([ids]))[0, -1].softmax(dim=-1)
            ids.append(int(torch.multinomial(shares_V, 1, generator=draw)))
    return tokenizer.decode(ids)


print("before:", repr(throw_dice(model, page[0][:6], 20)))

# %%
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0, fused=True)
for step in range(200):
    logits_BTV = model(page_BT[:, :-1])
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), page_BT[:, 1:].flatten())
    if step % 10 == 0:
        print(f"step {step:3}: loss {loss.item():.3f}")
    if loss.item() < (0.04 if FAST else 0.03):
        break
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print("after: ", repr(continue_text(model, page[0][:6], LINE - 6)))

# %% tags=["test"]
assert loss.item() < 0.05
assert continue_text(model, page[0][:6], LINE - 6) == tokenizer.decode(page[0])

# %% [markdown]
# Word for word. This isn't understanding; a parrot does as much. With so many weights and so few
# words, learning by heart is the shortest way. To be right about sentences that it has *not* seen, a
# model needs so much text that it can't memorise it all. That is chapter 07.

# %% [markdown]
# ## One text in place of two
#
# Remember the numbers. Your GPT has no encoder, so write each pair as one text: the English words, a
# mark, the German words, an end. Now translating is going on with a text. The model has about as many
# weights as the translator had, sees the same numbers in the same order, for the same steps.

# %%
SHIFT = len(english_words)  # German words get the ids after the English ones


def as_one_text(number: int) -> list[int]:
    written = [german_ids["<begin>"], *(german_ids[word] for word in german(number)), END]
    return [english_ids[word] for word in english(number)] + [SHIFT + word for word in written]


def text_loss(model: nn.Module, numbers: list[int]) -> Tensor:
    ids_BT = filled_up([as_one_text(number) for number in numbers])
    scores_BTV = model(ids_BT[:, :-1])
    return F.cross_entropy(scores_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), ignore_index=PAD)


@torch.no_grad()
def texts_continued(model: GPT, numbers: list[int]) -> list[list[str]]:
    """What the model writes after the mark; texts of the same length go side by side."""
    found: dict[int, list[str]] = {}
    for length in {len(english(number)) for number in numbers}:
        rows = [number for number in numbers if len(english(number)) == length]
        ids_BT = torch.tensor([as_one_text(number)[: length + 1] for number in rows])
        for _ in range(16):
            ids_BT = torch.cat([ids_BT, model(ids_BT)[:, -1:].argmax(dim=-1)], dim=1)
        for number, ids in zip(rows, ids_BT[:, length + 1 :].tolist(), strict=True):
            ids = ids[: ids.index(SHIFT + END)] if SHIFT + END in ids else ids
            found[number] = [german_words[max(0, word - SHIFT)] for word in ids]
    return [found[number] for number in numbers]


torch.manual_seed(0)
one_stack = GPT(
    GPTConfig(
        width=48,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=12,
        hidden=112,
        vocab_size=SHIFT + len(german_words),
        context=48,
    )
)
begin = time.perf_counter()
train_translator(one_stack, text_loss, practice, STEPS // 3 if FAST else STEPS)
exact_share["one text"] = exact(texts_continued(one_stack, held_out), held_out)
print(f"GPT: {one_stack.config.parameters:,} weights, {time.perf_counter() - begin:.0f} s")
for name, share in exact_share.items():
    print(f"{name:>15}: {share:.1%} of new numbers exactly right")

# %% tags=["test"]
if not FAST:
    assert exact_share["one text"] > 0.8

# %% [markdown]
# It comes near, with half of the parts. Some of its practice went into a question that nobody needs
# answered: how an English number goes on. (Chapter 09 has a remedy, a mask that says which words to
# learn from.)

# %% [markdown]
# ## Does each part earn its place?
#
# Chapters like this one tell you that RMSNorm is as good as LayerNorm, SwiGLU better than ReLU,
# rotary positions better than learned ones. Don't believe it, try it. Such a trial is called an
# **ablation**: change one thing, leave all else as it is, and give everyone the same budget.
#
# What has changed since 2017, and what stands in nanochat (Karpathy 2025), a model of today of about
# the size that one good machine can train:
#
# | part | 2017 | GPT-2 | ours, like Qwen3 | nanochat |
# | --- | --- | --- | --- | --- |
# | norm | LayerNorm, post | LayerNorm, pre | RMSNorm, pre | RMSNorm, pre |
# | bend | ReLU | GELU | SwiGLU | ReLU squared |
# | positions | waves | learned rows | rotary | rotary |
# | QK-norm | no | no | yes | yes |
# | query heads a key head | 1 | 1 | 2 | 1 |
# | table in and out | one | one | one | two |
# | biases, dropout | yes | yes | no | no |
# | first answers into the stream | random | random, smaller in deep models | zero | zero |
#
# Here is a small model with switches. It reads bytes, as in chapter 02, so that you can use the
# measure of that chapter, bits per byte.
#
# - `norm`: RMSNorm, or LayerNorm.
# - `think`: SwiGLU with three matrices, or another bend with two that are half as wide again, so that
#   all have the same number of weights.
# - `positions`: rotary, learned rows that are added at the bottom, or none.
# - `wiring`: **pre** (normalise a copy, add the answer), **post** (add, then normalise the sum, as in
#   2017), or **chain**: no addition at all, each half passes on only what it has computed.


# %%
from tinychat.language_models import add_row, bits_per_byte, documents, held_out_text


@dataclass(frozen=True)
class Parts:
    """A small model's switches."""

    norm: Literal["rms", "layer"] = "rms"
    think: Literal["swiglu", "ReLU", "GELU", "ReLU squared"] = "swiglu"
    positions: Literal["rotary", "learned", "none"] = "rotary"
    wiring: Literal["pre", "post", "chain"] = "pre"
    layers: int = 2
    width: int = 64

    def new_norm(self) -> nn.Module:
        return RMSNorm(self.width, 1e-6) if self.norm == "rms" else nn.LayerNorm(self.width)


class TwoMatrices(nn.Module):
    """The classical feed-forward layer: widen, bend, narrow."""

    def __init__(self, width: int, hidden: int, bend: Callable[[Tensor], Tensor]):
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.bend = bend

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.bend(self.up(x_BTD)))


class SwitchedLayer(nn.Module):
    def __init__(self, parts: Parts):
        super().__init__()
        width, hidden = parts.width, 3 * parts.width
        self.wiring = parts.wiring
        self.norms = nn.ModuleList([parts.new_norm(), parts.new_norm()])
        self.attention = Attention(width, width // 16, width // 32, 16, 1e-6)
        self.think: nn.Module = FeedForward(width, hidden)
        if parts.think != "swiglu":
            self.think = TwoMatrices(width, 3 * hidden // 2, BENDS[parts.think])

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        halves = (lambda y_BTD: self.attention(y_BTD, cos_TK, sin_TK), self.think)
        for norm, half in zip(self.norms, halves, strict=True):
            if self.wiring == "pre":
                x_BTD = x_BTD + half(norm(x_BTD))
            elif self.wiring == "post":
                x_BTD = norm(x_BTD + half(x_BTD))
            else:
                x_BTD = norm(half(x_BTD))
        return x_BTD


class Switched(nn.Module):
    """A byte-level language model with the switches of `Parts`."""

    LONGEST = 64

    def __init__(self, parts: Parts):
        super().__init__()
        self.parts = parts
        self.embed = nn.Embedding(256, parts.width)
        self.places = nn.Embedding(self.LONGEST, parts.width)
        self.layers = nn.ModuleList(SwitchedLayer(parts) for _ in range(parts.layers))
        self.norm = parts.new_norm()
        self.guess = nn.Linear(parts.width, 256, bias=False)
        nn.init.normal_(self.places.weight, std=0.02)  # quiet beside the tokens, as in GPT-2
        if parts.positions != "learned":
            nn.init.zeros_(self.places.weight).requires_grad_(False)
        for weight in self.layers.parameters():
            if weight.dim() == 2:  # every sum starts about as loud as what it sums
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def streams(self, ids_BT: Tensor) -> list[Tensor]:
        """The stream before each layer and after the last, `[B, T, D]` each."""
        T = ids_BT.shape[1]
        cos_TK, sin_TK = rotary_tables(T, 16)
        if self.parts.positions != "rotary":  # a turn by nothing
            cos_TK, sin_TK = torch.ones_like(cos_TK), torch.zeros_like(sin_TK)
        found = [self.embed(ids_BT) + self.places.weight[:T]]
        for layer in self.layers:
            found.append(layer(found[-1], cos_TK, sin_TK))
        return found

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.guess(self.norm(self.streams(ids_BT)[-1]))


train_bytes = torch.tensor(list(b"\0".join(documents("train"))))
valid_bytes = torch.tensor(list(b"\0".join(documents("validation"))))


def stretches(text: Tensor, rows: int, length: int, draw: torch.Generator) -> Tensor:
    """Stretches of a text from random places, `[rows, length + 1]`."""
    starts_B1 = torch.randint(len(text) - length, (rows, 1), generator=draw)
    return text[starts_B1 + torch.arange(length + 1)]


def bits(model: nn.Module, rows_BT: Tensor) -> Tensor:
    """Bits per byte."""
    scores_BTV = model(rows_BT[:, :-1])
    nats = F.cross_entropy(scores_BTV.flatten(0, 1), rows_BT[:, 1:].flatten())
    return nats / math.log(2)


def try_out(
    parts: Parts,
    seed: int,
    steps: int,
    rows: int = 8,
    length: int = 64,
    build: type[Switched] = Switched,
) -> float:
    """Train for a fixed number of bytes; return bits per byte on text that it never saw."""
    torch.manual_seed(seed)
    model, draw = build(parts), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    fall = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _step in range(steps):
        loss = bits(model, stretches(train_bytes, rows, length, draw))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fall.step()
    with torch.no_grad():
        same_for_all = torch.Generator().manual_seed(1)
        return float(bits(model, stretches(valid_bytes, 16 if FAST else 256, length, same_for_all)))


# %% [markdown]
# ### Many layers
#
# Begin with the wiring. Stack more and more layers, train each stack for the same few steps, and look
# at what they reach on text that they haven't seen. The steps are large, and large from the beginning
# (no warm-up; chapter 07 has one).

# %%
FEW_STEPS = 4 if FAST else 60
reached: dict[str, dict[int, float]] = {}
depths = (2, 6) if FAST else (2, 6, 12)
print(f"bits per byte after {FEW_STEPS} steps, with {', '.join(map(str, depths))} layers:")
for wiring in ("pre", "post", "chain"):
    reached[wiring] = {
        layers: try_out(Parts(wiring=wiring, layers=layers, width=32), 0, FEW_STEPS, length=32)
        for layers in depths
    }
    print(f"{wiring:>6}: " + "  ".join(f"{value:.2f}" for value in reached[wiring].values()))

counts_V = torch.bincount(train_bytes, minlength=256) + 0.01
letters_only = float(-(counts_V / counts_V.sum()).log2()[valid_bytes].mean())
print(f"knowing only how frequent each letter is costs {letters_only:.2f}")

# %% tags=["test"]
if not FAST:
    assert reached["pre"][12] < min(reached["post"][12], reached["chain"][12]) - 0.2
    assert abs(reached["pre"][2] - reached["post"][2]) < 0.2


# %%
# alt: Bits per byte against layers: pre-norm stays low, post-norm and the chain rise with depth.
def draw_depths(plt):
    figure, axis = plt.subplots()
    for (wiring, by_depth), marker in zip(reached.items(), "os^", strict=True):
        axis.plot(list(by_depth), list(by_depth.values()), marker=marker, label=wiring)
    axis.axhline(letters_only, color="grey", linestyle=":", label="letter frequencies alone")
    axis.set(xlabel="layers", ylabel="bits per byte", xticks=depths)
    axis.legend()
    return figure


picture("06_depth", draw_depths)

# %% [markdown]
# With two layers, pre and post are alike. Only **pre** still learns when the stack is high. What ends
# near the dotted line knows the frequent letters, no more: its layers are in the way.
#
# How does the blame for wrong guesses get from the last layer to the first? Take fresh stacks, before
# any training, and compare the sizes of the gradient.

# %%
print("size of the gradient in the first layer, when it is 1 in the last:")
blame: dict[str, float] = {}
for wiring in reached:
    torch.manual_seed(0)
    fresh_stack = Switched(Parts(wiring=wiring, layers=depths[-1], width=32))
    draw = torch.Generator().manual_seed(0)
    bits(fresh_stack, stretches(train_bytes, 8, 32, draw)).backward()
    first, last = (
        layer.think.down.weight.grad.norm() for layer in fresh_stack.layers[:: depths[-1] - 1]
    )
    blame[wiring] = float(first / last)
    print(f"{wiring:>6}, {depths[-1]} layers: {blame[wiring]:.1f}")

# %% tags=["test"]
assert blame["chain"] > 2 * max(blame["pre"], blame["post"])
if not FAST:
    assert blame["chain"] > 20 > 6 > max(blame["pre"], blame["post"])

# %% [markdown]
# In the chain, whatever one layer garbles is lost to all that follow, and on its way back the gradient is
# multiplied by every one of them: it swells, or it fades. No size of step suits the first layer and the
# last. Where the layers add, it comes back at about the size that it had. That is true of post-norm,
# too. But there the norm stands *on* the road and rescales everything that comes by, again in each
# layer, so what an early layer wrote gets fainter and fainter. People did train such models, with a
# careful warm-up and weights that begin quietly (exercise 4). Pre-norm keeps the norms in the side
# roads, and forgives you a rough beginning (Xiong et al. 2020).
#
# ### One part at a time
#
# Now the other switches, each on its own, with two layers. Three seeds each, because a difference
# means nothing until you know how far two runs of the *same* model lie apart. That is the **spread**.

# %%
MINUTES = float(os.environ.get("TINYCHAT_MINUTES") or 1)
BUDGET = 2 if FAST else round(120 * max(1.0, MINUTES))
TRIALS = {
    "as it is": Parts(),
    "LayerNorm": Parts(norm="layer"),
    "ReLU": Parts(think="ReLU"),
    "GELU": Parts(think="GELU"),
    "ReLU squared": Parts(think="ReLU squared"),
    "learned positions": Parts(positions="learned"),
    "no positions": Parts(positions="none"),
}
trials: dict[str, list[float]] = {}
print(f"{BUDGET} steps of {8 * 64:,} bytes; bits per byte on text that no one saw")
print(f"{'':>17}   weights     mean   spread   against as it is")
for name, parts in TRIALS.items():
    trials[name] = [try_out(parts, seed, BUDGET) for seed in range(1 if FAST else 3)]
    mean, spread = sum(trials[name]) / len(trials[name]), max(trials[name]) - min(trials[name])
    usual = sum(trials["as it is"]) / len(trials["as it is"])
    switched = Switched(parts)
    weights = sum(weight.numel() for weight in switched.parameters() if weight.requires_grad)
    print(f"{name:>17}   {weights:,}   {mean:6.3f}   {spread:6.3f}   {mean - usual:+.3f}")


# %%
# alt: A row of dots a variant, a dot a seed: those without rotary positions stand far to the right.
def draw_trials(plt):
    figure, axis = plt.subplots()
    for row, values in enumerate(reversed(trials.values())):
        axis.plot(values, [row] * len(values), "o", alpha=0.7)
    axis.set_yticks(range(len(trials)), list(reversed(trials)))
    axis.set(xlabel="bits per byte after the same number of steps: left is better")
    axis.grid(axis="x", alpha=0.3)
    return figure


picture("06_ablation", draw_trials)

# %% tags=["test"]
if not FAST and BUDGET == 120:
    typical = {name: sum(values) / len(values) for name, values in trials.items()}
    widest = max(trials["as it is"]) - min(trials["as it is"])
    for name in ("learned positions", "no positions"):
        assert typical[name] > typical["as it is"] + widest
    assert abs(typical["LayerNorm"] - typical["as it is"]) < 0.1

# %% [markdown]
# Read the table with the spread in mind. A difference smaller than the spread is no difference. With
# so few steps only the large ones show: positions that know distances are worth a great deal, while
# learned rows have hardly begun to learn and do no better than none. Between the two norms you see
# nothing, and between the bends hardly anything. Whoever has the time starts Python with
# `TINYCHAT_MINUTES=10` and gets ten times the steps. And mind what even that can't tell: all
# variants share one learning rate, which may suit one better than the other, and what is true for a
# tiny model needn't be for a large one. Published ablations have the same weakness, only with more
# zeros.

# %% [markdown]
# ## A row for the table
#
# Chapter 02 began a table: bits per byte on texts from which no model of this book learns. Give your
# GPT its row. It gets what the LSTM got: bytes, the same texts for training, a zero byte before each
# text, and about as many weights. Its steps begin gently, as in 2017.
#
# One thing is new. The LSTM carried its state through a whole text. Your GPT has a window, and a text may
# be longer. So the window moves on in steps of half its size, and only the new half counts. So each byte
# is guessed from at least half a window, but for the first bytes of a text.

# %%
WINDOW = 64
torch.manual_seed(0)
byte_gpt = GPT(
    GPTConfig(
        width=32 if FAST else 96,
        layers=2,
        heads=3,
        kv_heads=1,
        head_width=32,
        hidden=192,
        vocab_size=256,
        context=WINDOW,
    )
)


@torch.no_grad()
def log_probability(text: bytes) -> float:
    """The natural logarithm of the probability of a whole text."""
    ids_T, half, nats = torch.tensor([0, *text]), WINDOW // 2, 0.0
    for start in range(0, len(text), half):
        stop = min(start + half, len(text))
        read_T = ids_T[max(0, start - half) : stop + 1]
        scores_TV = byte_gpt(read_T[None, :-1])[0]
        new = stop - start
        nats += float(F.cross_entropy(scores_TV[-new:], read_T[-new:], reduction="sum"))
    return -nats


test_texts = held_out_text()[: 2 if FAST else None]
steps, draw = (30 if FAST else round(1000 * max(1.0, MINUTES))), torch.Generator().manual_seed(0)
optimizer = torch.optim.AdamW(byte_gpt.parameters(), lr=5e-3, weight_decay=0.0, fused=True)
warm_up = torch.optim.lr_scheduler.LambdaLR(  # a tenth of the steps up, then down in a line
    optimizer, lambda step: min(10 * (step + 1) / steps, (1 - step / steps) / 0.9, 1.0)
)
untrained = bits_per_byte(log_probability, test_texts[:1])
begin = time.perf_counter()
for _step in range(steps):
    byte_loss = bits(byte_gpt, stretches(train_bytes, 8, WINDOW, draw))
    optimizer.zero_grad()
    byte_loss.backward()
    optimizer.step()
    warm_up.step()
row = bits_per_byte(log_probability, test_texts)
print(f"{byte_gpt.config.parameters:,} weights; it has read {8 * WINDOW * steps:,} bytes, ", end="")
print(
    f"{8 * WINDOW * steps / len(train_bytes):.1f} times the text ({time.perf_counter() - begin:.0f} s)"
)
print(f"before {untrained:.3f}, after {row:.3f} bits per byte")
if not FAST:  # which reads only a part of the texts
    for name, value in add_row("GPT of chapter 06, bytes", row).items():
        print(f"{name:>24} {value:6.3f} bits per byte")

# %% tags=["test"]
assert abs(untrained - 8) < 0.1 and row < (7 if FAST else 2.6)
# A text that fits into half a window is read in one go; a longer one, byte by byte, gives the same.
short, long = test_texts[0][: WINDOW // 2], test_texts[0][:90]
with torch.no_grad():
    read_T = torch.tensor([0, *short])
    told = F.cross_entropy(byte_gpt(read_T[None, :-1])[0], read_T[1:], reduction="sum")
    torch.testing.assert_close(log_probability(short), -float(told), atol=1e-3, rtol=0)
    one_by_one = 0.0
    for place, byte in enumerate(long):
        first = max(0, place - place % (WINDOW // 2) - WINDOW // 2)  # where its window begins
        before_T = torch.tensor([0, *long])[first : place + 1]
        one_by_one += float(byte_gpt(before_T[None])[0, -1].log_softmax(dim=-1)[byte])
    torch.testing.assert_close(log_probability(long), one_by_one, atol=1e-3, rtol=0)

# %% [markdown]
# If you ran chapter 02 before, its rows stand beside yours. Compare it with the LSTM's, which went
# through the text several times more, and with the best n-gram's. With so little text, counting is hard to
# beat, for this model too. But it has room where the others have none: more weights, a longer
# window, and above all more text. With `TINYCHAT_MINUTES=10` it reads ten times as much. In chapter 07
# you give it better pieces than bytes.
#
# ## One file
#
# A trained model is worth nothing if you can't find out later what it was. So a checkpoint holds
# everything: weights, shape, tokenizer, where it came from. Saving needs nothing but the model.


# %% tags=["export"]
def save_model(
    path: str | Path,
    model: GPT,
    *,
    stage: str,
    tokenizer: Tokenizer,
    lineage: Mapping[str, Any],
    metrics: Mapping[str, Any],
    quantize: Literal["int8", "bf16", "fp32"] = "int8",
    levels: int = 127,
) -> CheckpointInfo:
    """Write the model with its tokenizer and history as one self-describing file.

    `levels`: see `checkpoint.save`.
    """
    return checkpoint.save(
        path,
        stage=stage,
        config=asdict(model.config),
        state=model.state_dict(),
        tokenizer=tokenizer.model,
        lineage=dict(lineage),
        metrics=dict(metrics),
        quantize=quantize,
        levels=levels,
    )


# %% [markdown]
# Loading is more careful. A file may be cut off, damaged, of another version, or somebody else's. The
# container is checked in `tinychat.runtime.checkpoint`; here the weights are compared, name by name
# and shape by shape, with what the file's own config promises, before anything is built.


# %% tags=["export"]
def load_model(path: str | Path) -> tuple[GPT, Tokenizer, CheckpointInfo]:
    """Read a base, sft or rlhf checkpoint; the model is in float32 and in evaluation mode.

    Raises CheckpointError in one sentence for whatever is wrong with the file.
    """
    loaded = checkpoint.load(path)
    if loaded.info.stage == "reward":
        raise CheckpointError(
            f"{path} is a reward model, which gives marks and can't write; "
            "name a base, sft or rlhf checkpoint."
        )
    model, tokenizer = build_model(loaded)
    return model, tokenizer, loaded.info


# %% tags=["export"]
def build_model(loaded: Checkpoint) -> tuple[GPT, Tokenizer]:
    """Make the model that a file's config asks for, and give it the file's weights.

    Names and shapes are compared with an empty model on the "meta" device, which takes no memory.
    Raises CheckpointError where the two don't fit.
    """
    path = loaded.info.path
    config = config_from(loaded.info)
    # The formula first: a config that asks for a billion layers must not be built, even empty.
    if config.parameters != loaded.info.parameters:
        raise CheckpointError(
            f"{path} holds {loaded.info.parameters:,} weights, but its own config asks for "
            f"{config.parameters:,}; get or train the checkpoint again."
        )
    with torch.device("meta"):
        model = GPT(config)
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in loaded.state.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"{path}: the weight {name!r} has the shape {found.get(name, 'of nothing')}, but "
                f"the file's own config asks for {wanted.get(name, 'no such weight')}; "
                "get or train the checkpoint again."
            )
    model.load_state_dict(loaded.state, assign=True)
    tokenizer = Tokenizer(loaded.tokenizer)
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} pieces and the model "
            f"{config.vocab_size}; get or train the checkpoint again."
        )
    return model.eval(), tokenizer


# %% tags=["export"]
def config_from(info: CheckpointInfo) -> GPTConfig:
    """Return the checkpoint's model shape; CheckpointError if it has unknown or missing names."""
    names = {field.name for field in fields(GPTConfig)}
    unknown = set(info.config) - names
    if unknown:
        raise CheckpointError(
            f"{info.path}: the config has the unknown name {min(unknown)!r}; "
            "the file is from another version of tinychat."
        )
    try:
        return GPTConfig(**info.config)
    except TypeError as error:
        raise CheckpointError(f"{info.path}: the config is incomplete ({error}).") from None
    except ConfigError as error:
        raise CheckpointError(f"{info.path} has a wrong config: {error}") from None


# %%
with tempfile.TemporaryDirectory() as folder:
    written = save_model(
        Path(folder) / "page",
        model,
        stage="base",
        tokenizer=tokenizer,
        lineage={"data": "four beginnings of stories"},
        metrics={"loss": loss.item()},
    )
    again, _, info = load_model(written.path)
    print(f"{info.path.name}: {info.bytes / 1e6:.1f} MB for {info.parameters / 1e6:.1f} M weights")
    print("as", info.dtype, "with", info.metrics)
print("reads back:", repr(continue_text(again, page[1][:6], LINE - 6)))

# %% tags=["test"]
assert again.config == model.config
assert continue_text(again, page[1][:6], 27) == continue_text(model, page[1][:6], 27)

# %% [markdown]
# About one byte a weight: matrices are rounded to whole numbers from -127 to 127, each row with a
# scale of its own. The model still knows its page.

# %% [markdown]
# ## Exercises
#
# **1. Untied.** How many weights would each preset have with a second table for the output? Print
# the share that tying saves. Which model gains most, and why?


# %% tags=["solution"]
def saved_by_tying(shape: GPTConfig) -> float:
    table = shape.vocab_size * shape.width
    return table / (shape.parameters + table)


savings = [saved_by_tying(preset(name)) for name in PRESETS]
for name, saving in zip(PRESETS, savings, strict=True):
    print(f"{name:>7}: {saving:.0%} fewer weights than untied")
# The table grows with the width, the layers with its square, so the smallest gains most.
assert savings == sorted(savings, reverse=True)

# %% [markdown]
# **2. Listen at every layer.** The stream can be read anywhere: put the vector after each block
# through the final norm and compare it with the table ("logit lens", nostalgebraist 2020). Write
# `loss_by_layer(model, ids_BT)` and print it for the model that knows its page. Where does it know
# what comes next?


# %% tags=["solution"]
@torch.no_grad()
def loss_by_layer(model: GPT, ids_BT: Tensor) -> list[float]:
    x_BTD, losses = model.embed(ids_BT[:, :-1]), []
    T = x_BTD.shape[1]
    for block in [None, *model.blocks]:
        if block is not None:
            x_BTD = block(x_BTD, model.cos_TK[:T], model.sin_TK[:T], None, None, 0)
        logits_BTV = F.linear(model.norm(x_BTD), model.embed.weight)
        target_BT = ids_BT[:, 1:].flatten()
        losses.append(float(F.cross_entropy(logits_BTV.flatten(0, 1), target_BT)))
    return losses


heard = loss_by_layer(model, page_BT)
print("after 0, 1, 2 ... blocks:", [round(value, 2) for value in heard])
assert heard[-1] < 0.05 < heard[0]
torch.testing.assert_close(heard[-1], loss.item(), atol=1e-3, rtol=0)

# %% [markdown]
# **3. A budget of weights.** You may have ten million weights at `width=256`, four heads, two key
# heads and `hidden=704`. Write `deepest(budget)`: the `GPTConfig` with the most layers that fits.
# Don't build models; use the formula.


# %% tags=["solution"]
def deepest(budget: int) -> GPTConfig:
    def of(layers: int) -> GPTConfig:
        return GPTConfig(width=256, layers=layers, heads=4, kv_heads=2, hidden=704)

    per_layer = of(2).parameters - of(1).parameters
    return of((budget - of(1).parameters) // per_layer + 1)


found = deepest(10_000_000)
print(f"{found.layers} layers, {found.parameters:,} weights")
more = asdict(found) | {"layers": found.layers + 1}
assert found.parameters <= 10_000_000 < GPTConfig(**more).parameters

# %% [markdown]
# **4. A silent beginning.** Your GPT begins with zeros in the matrices that write into the stream.
# Begin the deepest stack in the same way. What does post-norm reach now? And pre-norm?


# %% tags=["solution"]
class Silent(Switched):
    """Every block begins by adding nothing."""

    def __init__(self, parts: Parts):
        super().__init__(parts)
        for layer in self.layers:
            nn.init.zeros_(layer.attention.out.weight)
            nn.init.zeros_(layer.think.down.weight)


silent: dict[str, float] = {}
for wiring in ("pre", "post"):
    deep = Parts(wiring=wiring, layers=depths[-1], width=32)
    silent[wiring] = try_out(deep, 0, FEW_STEPS, length=32, build=Silent)
    print(f"{wiring:>5}, {depths[-1]} layers: {reached[wiring][depths[-1]]:.2f}, ", end="")
    print(f"with a silent beginning {silent[wiring]:.2f}")
if not FAST:
    # Norms of "the stream plus nothing" do no harm, and the blocks come in one by one.
    assert silent["post"] < reached["post"][12] - 0.3
    assert silent["pre"] < reached["pre"][12]

# %% [markdown]
# **5. Not too sure.** Train the translator with the label smoothing of 2017 (`F.cross_entropy` has
# `label_smoothing`). How sure is it of its best word, on average, and how many numbers are right?


# %% tags=["solution"]
def smoothed_pair_loss(model: nn.Module, numbers: list[int]) -> Tensor:
    read_BS, written_BT = number_batch(numbers)
    scores_BTV = model(read_BS, written_BT[:, :-1])
    wanted = written_BT[:, 1:].flatten()
    return F.cross_entropy(scores_BTV.flatten(0, 1), wanted, ignore_index=PAD, label_smoothing=0.1)


@torch.no_grad()
def how_sure(model: Translator, numbers: list[int]) -> float:
    read_BS, written_BT = number_batch(numbers)
    best_BT = model(read_BS, written_BT[:, :-1]).softmax(dim=-1).amax(dim=-1)
    return float(best_BT[written_BT[:, 1:] != PAD].mean())


torch.manual_seed(0)
modest = Translator()
train_translator(modest, smoothed_pair_loss, practice, 5 if FAST else STEPS)
modest_share = exact(translations(modest, held_out), held_out)
print(
    f"   plain: {how_sure(translator, held_out):.1%} sure, {exact_share['cross-attention']:.1%} right"
)
print(f"smoothed: {how_sure(modest, held_out):.1%} sure, {modest_share:.1%} right")
assert how_sure(modest, held_out) < how_sure(translator, held_out)
if not FAST:
    assert 0.85 < how_sure(modest, held_out) < 0.95 and modest_share > 0.9

# %% [markdown]
# ## Check yourself
#
# 1. In cross-attention, which text do the queries come from, and which the keys and values?
# 2. Why may the encoder look to the right and the decoder not?
# 3. What is in the residual stream after the last block of a fresh model, and why?
# 4. A fresh model with a vocabulary of a thousand has a loss of 12. Is it well?
# 5. Variant A beats variant B by 0.02 bits, and two seeds of A differ by 0.05. Which is better?
# 6. A page has 33 tokens. How many questions does a GPT answer on it, in one go?
#
# <details markdown="1"><summary>Answers</summary>
#
# 1. Queries from the text that is being written; keys and values from the one that was read.
# 2. What the encoder reads is given, all of it. What the decoder will write is what it has to guess.
# 3. The embedding of each token, nothing else: the matrices that write into the stream are zero.
# 4. No. Knowing nothing costs the logarithm of a thousand, about 6.9. It begins with strong wrong
#    opinions.
# 5. You don't know. The difference is smaller than the spread; run more seeds.
# 6. 32: after each token but the last, which one comes next?
#
# </details>
#
# ## What we left out
#
# - **Where encoders live on.** Speech recognition (Whisper), translation, and models that read
#   pictures still pair a reader with a writer. BERT is an encoder alone (chapter 02).
# - **Translators' tools.** They write with beam search (chapter 08 says why a chatbot doesn't), average
#   the weights of the last few checkpoints, and count matching rows of words (BLEU), since a sentence
#   has more than one good translation. Ours has one, so we count what is exactly right.
# - **Mixture of experts**: many feed-forward layers, of which each token uses a few.
# - **Weight decay** as a brake on learning by heart: chapter 07.
# - **Other first weights.** GPT-2 made those that write into the stream smaller, the deeper the model,
#   so that the sum of all answers isn't too loud. Ours start at zero.
# - **Capped scores.** Some models press the last scores through a wide tanh, so that none grows beyond,
#   say, 15 (nanochat; Gemma 2 caps at 30).
# - **More roads.** nanochat mixes the embedding into the stream again before each layer, with learned
#   weights, and scales the stream by another. A norm right after the embedding makes all rows equally
#   loud; ours come in as they are.
#
# ## Where this is in the package
#
# Everything tagged `export` here is `tinychat/gpt.py`. Chapter 07 trains `GPT`, chapter 08 lets it
# write, and `tinychat chat` begins with `load_model`. The translator and the model with switches
# live in this chapter alone.
#
# ## Sources
#
# - D. Bahdanau, K. Cho, Y. Bengio:
#   [Neural machine translation by jointly learning to align and translate](https://arxiv.org/abs/1409.0473)
#   (2015). The first cross-attention, and the first picture of crossing marks.
# - A. Vaswani et al.: [Attention is all you need](https://arxiv.org/abs/1706.03762) (2017). Encoder
#   and decoder, and the learning rate.
# - C. Szegedy et al.: [Rethinking the Inception architecture](https://arxiv.org/abs/1512.00567)
#   (2016). Label smoothing.
# - N. Srivastava et al.: [Dropout](https://jmlr.org/papers/v15/srivastava14a.html) (2014).
# - P. J. Liu et al.: [Generating Wikipedia by summarizing long sequences](https://arxiv.org/abs/1801.10198)
#   (2018). The decoder alone.
# - A. Radford et al.:
#   [Language models are unsupervised multitask learners](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf)
#   (2019). GPT-2.
# - Qwen Team: [Qwen3 technical report](https://arxiv.org/abs/2505.09388) (2025). The shape that ours
#   follows.
# - R. Xiong et al.:
#   [On layer normalization in the transformer architecture](https://arxiv.org/abs/2002.04745) (2020).
#   Pre-norm.
# - B. Zhang, R. Sennrich: [Root mean square layer normalization](https://arxiv.org/abs/1910.07467)
#   (2019).
# - D. Hendrycks, K. Gimpel: [Gaussian error linear units](https://arxiv.org/abs/1606.08415) (2016).
#   GELU.
# - N. Shazeer: [GLU variants improve transformer](https://arxiv.org/abs/2002.05202) (2020). SwiGLU.
# - D. R. So et al.: [Primer](https://arxiv.org/abs/2109.08668) (2021). ReLU squared.
# - J. Su et al.: [RoFormer](https://arxiv.org/abs/2104.09864) (2021). Rotary positions.
# - O. Press, L. Wolf:
#   [Using the output embedding to improve language models](https://arxiv.org/abs/1608.05859) (2017).
#   Tying.
# - H. Zhang, Y. Dauphin, T. Ma: [Fixup initialization](https://arxiv.org/abs/1901.09321) (2019).
#   Starting as "change nothing".
# - J. Kaplan et al.: [Scaling laws for neural language models](https://arxiv.org/abs/2001.08361)
#   (2020). Six FLOPs a weight and token.
# - Gemma Team: [Gemma 2](https://arxiv.org/abs/2408.00118) (2024). Capped scores.
# - A. Karpathy: [nanochat](https://github.com/karpathy/nanochat) (2025).
