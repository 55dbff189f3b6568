# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Supervised fine-tuning
#
# Show the base model good conversations, until it answers instead of rambling on.
#
# Pretraining made a model that goes on with any text. Chapter 09 gave text a form in which somebody
# asks and somebody answers. Now the two meet: you train the base model a little longer, on
# conversations. This is the first of the three steps that turned GPT-3 into InstructGPT, and later
# into ChatGPT (Ouyang et al. 2022).
#
# The training loop stays the one of chapter 07.
#
# **What you will build**
#
# 1. **the mask** at work: only replies carry loss;
# 2. **packing**: several short conversations share a row, and don't see each other, except where one
#    goes on in the chat of another;
# 3. **gentle rates and few readings**, since few conversations are soon known by heart;
# 4. **a held-out set** that tells you when to stop, and what the model forgets meanwhile;
# 5. your own `sft` checkpoint, and a contest: is it better to *show* a model a task or to train it?
#
# **What you need:** chapters 07 (the training loop) and 09 (the template and the mask). The code
# takes a minute or two; reading it, about forty minutes.

# %% tags=["export"]
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tinychat.data.batch import Batch
from tinychat.dialogue import Rendered
from tinychat.gpt import GPT
from tinychat.pretraining import Progress, Result, TrainConfig, pretrain, processes
from tinychat.runtime.errors import ConfigError, DataError
from tinychat.runtime.state import load_state

# %% [markdown]
# ## The model to begin with
#
# If you worked through chapter 07, the base model is your own. If not, the shipped one is taken. If
# there is neither, or if you run the fast version of this chapter, a very small one is trained here
# for a few seconds. It knows little more than which words are common, and its replies will show it.
# What you see happen to it is the same.

# %%
import copy
import os
import re
import tempfile
import time
from collections import Counter
from dataclasses import replace
from itertools import islice

import torch.nn.functional as F

from tinychat.book.picture import picture
from tinychat.data import tokenizer_model
from tinychat.data.corpus import dialogues, explanations, stories
from tinychat.data.records import Message
from tinychat.data.split import split_of
from tinychat.dialogue import render, render_prompt
from tinychat.generation import Sampling, stream
from tinychat.gpt import load_model, nano, save_model
from tinychat.pretraining import LossFunction
from tinychat.runtime import checkpoint
from tinychat.runtime.device import set_threads
from tinychat.runtime.search import find_first
from tinychat.tokenizer import Tokenizer

FAST = os.environ.get("TINYCHAT_FAST") == "1"
set_threads()


def train_a_little(tokenizer: Tokenizer, seconds: float) -> GPT:
    """A plain training loop over our stories and explanations; chapter 07 has the real one."""
    torch.manual_seed(0)
    model = GPT(nano())
    texts = (stories() + explanations())[:: 4 if FAST else 1]
    ids = [id for one in texts for id in [tokenizer.bos_id, *tokenizer.encode(one.text)]]
    text = torch.tensor(ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    begin, steps = time.perf_counter(), 0
    while steps < 10 or time.perf_counter() - begin < seconds:
        starts_B1 = torch.randint(len(text) - 65, (4 if FAST else 8, 1))
        window_BT = text[starts_B1 + torch.arange(65)]
        logits_BTV = model(window_BT[:, :-1])
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), window_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    spent = time.perf_counter() - begin
    print(f"trained {model.config.parameters / 1e6:.1f} M weights here: {steps} steps in", end=" ")
    print(f"{spent:.0f} seconds, loss {loss.item():.2f}")
    return model.eval()


# The shipped model is several times larger than your own from chapter 07: too slow for seconds.
if found := find_first("runs/book/base", *([] if FAST else ["base"])):
    base, tokenizer, info = load_model(found)
    parent = str(info.path)
    print(f"beginning with {parent}: {info.parameters / 1e6:.1f} M weights")
else:
    tokenizer = Tokenizer(tokenizer_model())
    base = train_a_little(tokenizer, seconds=0.1 if FAST else 15)
    parent = "trained in chapter 10"

# %% [markdown]
# ## What a base does with a question
#
# Ask it something. First as plain text, as it has read text all its life. Then in the template of
# chapter 09, with the control tokens that mark the turns.

# %%
QUESTIONS = ("hi", "What is your name?", "What is the capital of France?", "Tell me about the sea.")
greedy = Sampling(temperature=0, max_tokens=12 if FAST else 30, repetition_penalty=1.2)


def say(model: GPT, question: str, pieces: Tokenizer = tokenizer) -> str:
    """The reply in the template, greedily."""
    context = model.config.context
    ids = render_prompt([Message("user", question)], pieces, context=context, reserve=64)
    return " ".join("".join(stream(model, pieces, ids, greedy)).split())


for question in QUESTIONS[:2]:
    plain = [tokenizer.bos_id, *tokenizer.encode(question)]
    told = "".join(stream(base, tokenizer, plain, greedy))
    print(f"{question!r} as text goes on: {told!r}{'' if told else ' (it ends at once)'}")
before = {question: say(base, question) for question in QUESTIONS}
for question, reply in before.items():
    print(f"{question!r} in the template:  {reply!r}")

# %% [markdown]
# Nothing is broken. The model does what it was trained for: it writes what often comes next in its
# texts. In a book, a question is followed by another question, by "said the fox", or by a new
# chapter, and seldom by its answer. A base that read conversations too (the shipped one did) comes
# nearer, but nobody has told it yet that *the answer* is its job.
#
# ## Only replies carry loss
#
# You know the mask from chapter 09. Now watch what it does to the loss. The cell takes real
# conversations and measures the same model twice: on every token, and on replies alone.

# %%
corpus = dialogues()
if FAST:
    corpus = corpus[::24]
parts: dict[str, list[Rendered]] = {"train": [], "validation": [], "test": []}
for dialogue in corpus:
    parts[split_of(dialogue.id)].append(render(dialogue, tokenizer, context=257))
print({name: len(some) for name, some in parts.items()}, "conversations")


def batch_of(one: Rendered, mask: Sequence[bool]) -> Batch:
    tokens_1T = torch.tensor([one.tokens])
    return Batch(tokens_1T[:, :-1], tokens_1T[:, 1:], torch.tensor([mask[1:]]).long())


def mean_loss(model: GPT, batches: Iterable[Batch]) -> float:
    """Nats a learned token."""
    loss, total, count = LossFunction(model, dtype=torch.float32, compiled=False), 0.0, 0
    with torch.no_grad():
        for batch in batches:
            learned = int(batch.mask_BT.sum())
            total += loss(batch).item() * learned
            count += learned
    return total / count


some = parts["validation"][: 2 if FAST else 12]
whole = mean_loss(base, [batch_of(one, [True] * len(one.tokens)) for one in some])
replies = mean_loss(base, [batch_of(one, one.loss_mask) for one in some])
tokens = sum(len(one.tokens) for one in some)
learned = sum(sum(one.loss_mask) for one in some)
print(f"without the mask: {tokens:5} tokens count, {whole:.2f} nats each")
print(f"with the mask:    {learned:5} tokens count, {replies:.2f} nats each")

# %% [markdown]
# Without the mask, all those other tokens pull at the weights as well. They teach the model to write
# questions, which it must never do. With the mask, a question is only *read*: it shapes the hidden
# vectors that the reply looks back at, and the gradient flows through it, but nobody asks the model
# to guess it.
#
# How much that matters depends on the data. Where questions are long and replies short, most of the
# training would go into questions.
#
# ## Packing
#
# Conversations are short and rows are long. Put one conversation in each row and fill up with
# padding, and most of the computing is spent on nothing. So let several share a row (Krell et al.
# 2021).
#
# Which go together? It's the problem of packing boxes into vans. A simple rule is good enough: take
# the conversations in random order and put each into the first row that still has room.


# %% tags=["export"]
def pack(
    lengths: Sequence[int], room: int, order: Sequence[int], open_rows: int = 64
) -> list[list[int]]:
    """Sort conversations into rows of `room` tokens; returns the conversations of each row.

    First fit in the given order: each conversation goes into the first row with enough room left.
    Only the newest `open_rows` rows stay open, which keeps the work linear and the order random.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for number in order:
        size = min(lengths[number], room)
        for row in range(max(0, len(rows) - open_rows), len(rows)):
            if left[row] >= size:
                rows[row].append(number)
                left[row] -= size
                break
        else:
            rows.append([number])
            left.append(room - size)
    return rows


# %%
ROOM = 256
lengths = [min(len(one.tokens) - 1, ROOM) for one in parts["train"]]
alone = [[number] for number in range(len(lengths))]
packed = pack(lengths, ROOM, range(len(lengths)))
used = sum(lengths)
padding = {}
for title, rows in (("one a row", alone), ("packed", packed)):
    padding[title] = 1 - used / (len(rows) * ROOM)
    print(f"{title:>10}: {len(rows):5} rows, {padding[title]:4.0%} of it padding")

# %% tags=["test"]
assert sorted(number for row in packed for number in row) == list(range(len(lengths)))
assert padding["packed"] < 0.1 < padding["one a row"]
assert pack([6, 5, 4, 5, 1], 10, [0, 1, 2, 3, 4]) == [[0, 2], [1, 3], [4]], "by hand"

# %% [markdown]
# The same as a picture: a bar is a conversation, and grey is computing for nothing.


# %%
# alt: Rows of tokens as bars. One conversation a row: mostly grey padding. Packed: hardly any.
def draw_packing(plt):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, title, rows in zip(axes, padding, (alone, packed), strict=True):
        for place, row in enumerate(rows[:12]):
            start = 0
            for number, one in enumerate(row):
                axis.barh(
                    place, lengths[one], left=start, color=f"C{number % 5}", edgecolor="white"
                )
                start += lengths[one]
            axis.barh(place, ROOM - start, left=start, color="#808080", alpha=0.3)
        axis.set_title(f"{title}: {padding[title]:.0%} padding", fontsize=10)
        axis.set(xlabel="token of the row", yticks=[], xlim=(0, ROOM))
        axis.invert_yaxis()
    axes[0].set_ylabel("the first rows")
    return figure


picture("10_packing", draw_packing)

# %% [markdown]
# One thing must not happen: that a conversation looks at its neighbour. For attention, a row is just
# a row, and the second conversation would read the first as its own past. So each gets a number, its
# **segment**, and tokens see only their own segment (chapter 06 built that in). Rotary positions
# need no repair: they only tell *distances*, and within a conversation these stay the same.
#
# The last token of a conversation gets no target either. What follows it in the row is a stranger.


# %% tags=["export"]
def packed_row(
    examples: Sequence[Rendered], room: int, pad: int, goes_on: Sequence[bool] = ()
) -> np.ndarray:
    """Lay conversations one behind another: returns `[4, room]` inputs, targets, mask, segments.

    A conversation of n tokens takes n - 1 places: its last token predicts nothing, because what
    follows it is another conversation. One that is too long loses its end. Segment 0 is padding.
    Where `goes_on` is true, a conversation goes on in the chat of the one before it: it shares its
    segment, and the other's last token stands in the place of its own first one.
    """
    row = np.zeros((4, room), dtype=np.int64)
    row[:2] = pad
    start, segment = 0, 0
    for number, example in enumerate(examples):
        size = min(len(example.tokens) - 1, room - start)
        part = slice(start, start + size)
        row[0, part] = example.tokens[:size]
        row[1, part] = example.tokens[1 : size + 1]
        row[2, part] = example.loss_mask[1 : size + 1]
        if number and number < len(goes_on) and goes_on[number]:
            row[0, start] = examples[number - 1].tokens[-1]  # <|end|>, where <|bos|> would be
        else:
            segment += 1
        row[3, part] = segment
        start += size
    return row


# %%
two = [
    render([Message("user", "hi"), Message("assistant", "Hello!")], tokenizer),
    render([Message("user", "2+2?"), Message("assistant", "4.")], tokenizer),
]
inputs, targets, mask, segments = packed_row(two, 18, tokenizer.pad_id).tolist()
print("   reads            predicts         loss  segment")
for read, wanted, counts, segment in zip(inputs, targets, mask, segments, strict=True):
    shown = f"{tokenizer.piece(wanted):16}" if segment else " " * 16
    print(f"   {tokenizer.piece(read):16} {shown} {counts}     {segment}")

# %% [markdown]
# Who sees whom in this row? The picture has a line for each token that asks, and a column for each
# that it may look at. Chapter 05's triangle has become two small ones. The names in green, on the left, are those
# whose guess of the *next* token counts: the highlighter of chapter 09, moved up by one place.


# %%
# alt: Two triangles on a diagonal: each conversation sees only its own past. Learned lines green.
def draw_segments(plt):
    segments_T = torch.tensor(segments)
    sees_TS = (segments_T[:, None] == segments_T).tril() & (segments_T > 0)
    names = [tokenizer.piece(one).strip() for one in inputs]
    figure, axis = plt.subplots(figsize=(6, 5.4))
    for asking, row in enumerate(sees_TS.tolist()):
        for seen, yes in enumerate(row):
            if yes:
                colour = f"C{segments[asking] - 1}"
                axis.add_patch(plt.Rectangle((seen - 0.45, asking - 0.45), 0.9, 0.9, color=colour))
    axis.set(xlim=(-0.6, len(names) - 0.4), ylim=(len(names) - 0.4, -0.6))
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    for label, counts in zip(axis.get_yticklabels(), mask, strict=True):
        label.set_color("C2" if counts else "#808080")
        label.set_fontweight("bold" if counts else "normal")
    axis.set(xlabel="may look at", ylabel="token")
    return figure


picture("10_segments", draw_segments)

# %% [markdown]
# Is it really the same as training on each alone? The test compares the losses.

# %% tags=["test"]
row_4T = torch.from_numpy(packed_row(two, 64, tokenizer.pad_id))
together = mean_loss(base, [Batch(*row_4T[:, None])])
apart = mean_loss(base, [batch_of(one, one.loss_mask) for one in two])
assert abs(together - apart) < 1e-4, (together, apart)

# %% [markdown]
# ## A chat that goes on
#
# Each conversation of our corpus is about one thing. A chat isn't: somebody says hello, wants a story
# about a fox, and then asks who painted *The Great Wave*. A model that has met its questions only at
# the head of a chat is lost there. What was said before spills over, and the painter becomes a fox. We
# didn't notice for a long time, because we asked it one question a chat; our
# [lab notes](lab_notes.md) have what it cost.
#
# The cure costs nothing, not even a token. Let some conversations *go on* in the chat of the one
# before them in the row. They share its segment, and where their `<|bos|>` would stand is the
# `<|end|>` of the last reply (that is what `goes_on` above is for).

# %%
chained = packed_row(two, 18, tokenizer.pad_id, goes_on=[False, True]).tolist()
for title, row in (("packed", [inputs, targets, mask, segments]), ("chained", chained)):
    print(f"{title:>8}: {''.join(tokenizer.piece(token) for token in row[0]).strip()}")
    print(f"          segments {''.join(map(str, row[3]))}, learned {sum(row[2])}")

# %% [markdown]
# The chained row is the same row, token for token, as if somebody had typed both questions into one
# chat. The test checks that. In training, dice decide which conversations go on (`chain`); those with a
# system message never do, since it must stand at the head of a chat. What has several turns about one
# thing keeps them together, so the model also learns when to look back, and when not to.

# %% tags=["test"]
one_chat = render(
    [
        Message("user", "hi"), Message("assistant", "Hello!"),
        Message("user", "2+2?"), Message("assistant", "4."),
    ],
    tokenizer,
)  # fmt: skip
size = len(one_chat.tokens) - 1
assert chained[0][:size] == one_chat.tokens[:-1]
assert chained[3] == [1] * size + [0] * (18 - size)
learned = [t for t, m in zip(one_chat.tokens, one_chat.loss_mask, strict=True) if m]
assert [t for t, m in zip(chained[1], chained[2], strict=True) if m] == learned

# %% [markdown]
# ## Gentle, and not for long
#
# The base model has learned something that took long, and a few hundred steps at full rate can wash
# it away. So the rates are lower than pretraining's, Muon's a third, and they fall from early on to
# zero.


# %% tags=["export"]
@dataclass(frozen=True)
class SFTConfig:
    """What decides a fine-tuning run besides the model and the conversations."""

    epochs: float = 4.0
    "readings of all conversations"
    batch: int = 16
    "packed rows a step"
    sequence: int = 512
    "tokens a row; several conversations share one"
    chain: float = 0.6
    "share of the conversations that go on in the chat of the one before them"
    matrix_lr: float = 6e-3
    "Muon's peak rate: well below pretraining's, to keep what the base has learned"
    vector_lr: float = 2e-3
    "AdamW's peak rate for embeddings and norms"
    warmup: float = 0.03
    "share of the steps in which the rates rise"
    decay: float = 0.9
    "share of the steps, at the end, in which the rates fall to zero"
    clip: float = 1.0
    "largest norm of the whole gradient"
    seed: int = 0
    "decides the order of the conversations"
    keep: float = 0.0
    "share of the base's weights in the mean that a finished run gives"
    precision: str = "auto"
    "bf16 or fp32 matrix products; auto takes bf16 where the machine computes it fast"
    compiled: bool = True
    "use torch.compile where a C++ compiler is installed"
    save_minutes: float = 3.0
    "time between saved states"
    evaluate_every: int = 50
    "steps between validations"

    def __post_init__(self) -> None:
        if not 0 < self.epochs < math.inf:
            raise ConfigError(f"epochs is {self.epochs}; it must be a number above 0.")
        if not 0 <= self.chain <= 1:
            raise ConfigError(f"chain is {self.chain}; it must be from 0 to 1.")
        if not 0 <= self.keep < 1:
            raise ConfigError(f"keep is {self.keep}; it must be 0 or more, and below 1.")
        for name in ("matrix_lr", "vector_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0.")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be 0 or more.")
        self.loop(steps=1)  # the loop refuses everything else that makes no sense

    def loop(self, steps: int) -> TrainConfig:
        """The same settings for the training loop of chapter 07."""
        return TrainConfig(
            steps=steps,
            batch=self.batch,
            sequence=self.sequence,
            matrix_lr=self.matrix_lr,
            vector_lr=self.vector_lr,
            warmup=self.warmup,
            decay=self.decay,
            clip=self.clip,
            seed=self.seed,
            precision=self.precision,
            compiled=self.compiled,
            save_minutes=self.save_minutes,
            evaluate_every=self.evaluate_every,
        )


# %% [markdown]
# Each epoch reads every conversation once, in a new order and packed anew. The order follows from
# the seed and the number of the epoch alone. That's why a run that was stopped at step n can go on:
# it makes the same list again and skips n batches.


# %% tags=["export"]
class PackedConversations:
    """An endless, repeatable stream of packed batches: each epoch in a new order."""

    def __init__(self, examples: Iterable[Rendered], config: SFTConfig, pad: int):
        # A conversation without a learned token would only take room.
        self.examples = [e for e in examples if any(e.loss_mask[1 : config.sequence + 1])]
        if not self.examples:
            raise DataError("There is no conversation with a reply to learn from; add some.")
        self.config = config
        self.pad = pad

    def rows(self, epoch: int) -> list[list[int]]:
        """Return which conversations share each row in this epoch."""
        order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.examples))
        lengths = [len(example.tokens) - 1 for example in self.examples]
        return pack(lengths, self.config.sequence, order.tolist())

    def steps(self, world: int = 1) -> int:
        """Optimizer steps for all epochs, where `world` processes read a batch each."""
        batch = self.config.batch * world
        return max(1, round(self.config.epochs * len(self.rows(0)) / batch))

    def batches(
        self, start: int = 0, total: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Yield batch number `start` and all that follow, for ever.

        Of `world` processes each takes a batch of a step's rows: process `rank` every world-th.
        """
        number, epoch = 0, 0
        waiting: list[list[int]] = []
        size = self.config.batch * world
        while True:
            waiting += self.rows(epoch)
            epoch += 1
            while len(waiting) >= size:
                now, waiting = waiting[:size], waiting[size:]
                if number >= start:
                    yield self.batch(now[rank::world], self.config.chain)
                number += 1

    def once(self) -> Iterator[Batch]:
        """Yield every conversation once and by itself, to measure; all batches of the same size."""
        rows, size = self.rows(0), self.config.batch
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            yield self.batch([*part, *[[]] * (size - len(part))])

    def batch(self, rows: Sequence[Sequence[int]], chain: float = 0.0) -> Batch:
        """Build the tensors of some rows; a share `chain` goes on in the chat of the one before."""
        data = np.stack([self._row(row, chain) for row in rows])
        inputs, targets, mask, segments = torch.from_numpy(data).unbind(1)
        return Batch(inputs, targets, mask, segments)

    def _row(self, row: Sequence[int], chain: float) -> np.ndarray:
        examples = [self.examples[n] for n in row]
        # The row itself seeds its dice, so a resumed run throws the same.
        dice = np.random.default_rng((self.config.seed, *row)).random(len(row))
        goes_on = [
            # A system message stands at the head of a chat, and only there.
            throw < chain and not example.system
            for throw, example in zip(dice, examples, strict=True)
        ]
        return packed_row(examples, self.config.sequence, self.pad, goes_on)


# %% [markdown]
# Fine-tuning takes a model away from its base, and some of what the base could do is lost on the way.
# There is a plain way to go part of the way back: the mean of the two, weight by weight. That it works
# at all is strange. It does because both lie in one valley of the loss: one run came out of the other.


# %% tags=["export"]
def blend(model: GPT, before: Mapping[str, torch.Tensor], share: float) -> None:
    """Move `model` the given share of the way back to the weights `before` (Wortsman et al. 2022).

    `before` holds its named parameters from the beginning of the fine-tuning.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.lerp_(before[name].to(weight), share)


# %% [markdown]
# Everything else is chapter 07's loop: rates, clipping, saving, resuming.


# %% tags=["export"]
def finetune(
    model: GPT,
    examples: Iterable[Rendered],
    config: SFTConfig,
    folder: str | Path,
    *,
    pad: int,
    minutes: float = 0.0,
    validation: Callable[[], Iterable[Batch]] | None = None,
    token_bytes_V: torch.Tensor | None = None,
    resume: bool = False,
    on_step: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Train `model` in place on conversations: pretraining's loop, but only replies carry loss.

    As many steps as `config.epochs` asks for or, with `minutes`, as fit into that time; a run that
    was begun with minutes keeps its number of steps when it is resumed without. `model` comes as
    the base, also to be resumed; a finished one is blended with it (`config.keep`), its saved
    state is not. Raises DataError where nothing is to be learned, ConfigError for rows longer than
    the model reads.
    """
    context = model.config.context
    if config.sequence > context:
        raise ConfigError(
            f"sequence is {config.sequence}; this model reads at most {context} tokens."
        )
    rank, world = processes()
    stream = PackedConversations(examples, config, pad)
    saved = load_state(folder) if resume and not minutes else None
    by_time = minutes or (saved is not None and not saved[1]["config"]["steps"])
    before = {name: w.detach().clone() for name, w in model.named_parameters() if config.keep}
    result = pretrain(
        model,
        partial(stream.batches, rank=rank, world=world),
        config.loop(0 if by_time else stream.steps(world)),
        folder,
        minutes=minutes,
        validation={"replies": validation} if validation else None,
        token_bytes_V=token_bytes_V,
        resume=resume,
        on_step=on_step,
        should_stop=should_stop,
    )
    if result.finished and before:
        blend(model, before, config.keep)
    return result


# %% [markdown]
# ## Learning by heart
#
# How often should the model read its conversations? Find out the hard way. Give it very few, let it
# read them again and again, and watch two losses: on what it reads, and on conversations that it
# never sees.

# %%
PLAIN = SFTConfig(batch=2, sequence=ROOM, chain=0, compiled=False)  # to compare losses: no dice


def held_out(count: int) -> list[Batch]:
    """The first unseen conversations, always the same."""
    return list(PackedConversations(parts["validation"][:count], PLAIN, tokenizer.pad_id).once())


few = parts["train"][: 4 if FAST else 16]
seen = PackedConversations(few, PLAIN, tokenizer.pad_id)
unseen = held_out(4 if FAST else 24)
student = copy.deepcopy(base).train()
# High rates and many readings on purpose: the point is to see it go wrong soon.
harsh = replace(PLAIN, batch=len(seen.rows(0)), matrix_lr=0.01, vector_lr=2e-3)
harsh = replace(harsh, epochs=8 if FAST else 60 if base.config.parameters < 4e6 else 20)
table = [(0, mean_loss(base, [seen.batch(seen.rows(0))]), mean_loss(base, unseen))]


def watch(progress: Progress) -> None:
    if progress.step in (1, 2) or progress.step % (progress.steps // (2 if FAST else 10)) == 0:
        table.append((progress.step, progress.loss, mean_loss(student, unseen)))


with tempfile.TemporaryDirectory() as folder:
    finetune(student, few, harsh, folder, pad=tokenizer.pad_id, on_step=watch)
student.eval()
print(f"{len(few)} conversations in {harsh.batch} rows: one step is one epoch")
print("epoch   read   unseen")
for epoch, read, other in table:
    print(f"{epoch:5} {read:6.2f} {other:8.2f}")
best = min(table, key=lambda line: line[2])
print(
    f"best on unseen conversations: epoch {best[0]}, {best[2]:.2f}; at the end {table[-1][2]:.2f}"
)


# %%
# alt: Loss against epochs: on the conversations that it reads it falls to zero, on unseen ones not.
def draw_by_heart(plt):
    figure, axis = plt.subplots()
    epochs = [line[0] for line in table]
    axis.plot(epochs, [line[1] for line in table], "o-", label="read again and again")
    axis.plot(epochs, [line[2] for line in table], "s-", label="unseen")
    axis.axvline(best[0], color="#808080", linestyle=":")
    axis.set(xlabel="epoch", ylabel="nats a learned token", ylim=(0, None))
    axis.legend()
    return figure


picture("10_by_heart", draw_by_heart)

# %% tags=["test"]
assert table[-1][1] < table[0][1] - 1, "what it reads, it must learn"
assert table[-1][2] > table[-1][1] + 1, "what it never read, it can't know by heart"

# %% [markdown]
# The loss on what it reads keeps falling. The loss on unseen conversations doesn't follow. It may
# fall at first, since the *form* of a reply is learned from any of them (a base that has met
# conversations knows the form already). Then it stays, or rises: the model stops learning how to
# answer and begins to learn these answers by heart. That is **overfitting**. The dotted line marks
# the epoch at which you should have stopped.
#
# So keep some conversations aside and look at them while you train. There is one more lesson here.
# Loss on unseen replies is a strict judge: it asks for the very words. InstructGPT's authors trained
# for sixteen epochs although that loss rose after the first one, because people still liked the
# replies better. Watch the number, but read the replies too.
#
# Now take the student that has learned too much by heart, and walk back towards the base.

# %%
way = {}
for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
    between = copy.deepcopy(student)
    blend(between, dict(base.named_parameters()), share)
    way[share] = mean_loss(between, [seen.batch(seen.rows(0))]), mean_loss(between, unseen)
print("share of the base   read   unseen")
for share, (read, other) in way.items():
    print(f"{share:17.1f} {read:6.2f} {other:8.2f}")

# %% tags=["test"]
assert way[0.0][1] == table[-1][2] and abs(way[1.0][1] - table[0][2]) < 1e-3
assert min(way[share][1] for share in (0.2, 0.4, 0.6, 0.8)) < way[0.0][1]

# %% [markdown]
# On unseen conversations some mean of the two is better than the student, and it has forgotten less of
# what it read than you would think. `train sft --set keep=0.15` does it when a run is finished. With an
# earlier chat model of ours it cut both ways: right answers to questions of fact fell from 34.7 to 31.4 %, and
# so did replies with a word that doesn't exist, from 13.0 to 7.3 %. For the shipped one it gained nothing,
# and was left out (lab notes).
#
# ## The run
#
# Now from all training conversations (the first tenth of an epoch of them, if the base is the shipped
# one), at gentle rates: the more a base has learned, the gentler.
# `TINYCHAT_MINUTES` gives it more time. What it makes goes to `runs/book/sft.safetensors`, and the
# next chapters go on from there.

# %%
minutes = float(os.environ.get("TINYCHAT_MINUTES") or 0)
model = copy.deepcopy(base).train()
log: list[Progress] = []
rows_an_epoch = len(PackedConversations(parts["train"], PLAIN, tokenizer.pad_id).rows(0))
judges = unseen if FAST else held_out(72)
large = base.config.parameters > 4e6
settings = replace(
    PLAIN,
    batch=1 if FAST else 4,
    chain=SFTConfig.chain,
    epochs=5 / rows_an_epoch if FAST else 0.1 if large else 1,
    matrix_lr=1e-3 if large else 4e-3,
    vector_lr=3e-4 if large else 1e-3,
)
with tempfile.TemporaryDirectory() as folder:
    result = finetune(
        model, parts["train"], settings, folder, pad=tokenizer.pad_id,
        minutes=minutes, on_step=log.append,
    )  # fmt: skip
model.eval()
epochs = result.steps * settings.batch / rows_an_epoch
print(f"{result.steps} steps, {epochs:.2f} readings of {len(parts['train'])} conversations")
batches = PackedConversations(parts["train"], settings, tokenizer.pad_id).batches
read_last = list(islice(batches(max(0, result.steps - 4)), min(4, result.steps)))
before_and_after = {
    "the last conversations that it read": (
        mean_loss(base, read_last),
        mean_loss(model, read_last),
    ),
    "unseen replies": (mean_loss(base, judges), mean_loss(model, judges)),
}
for name, (start_loss, end_loss) in before_and_after.items():
    print(f"loss on {name}: {start_loss:.3f} before, {end_loss:.3f} after")

saved = save_model(
    "runs/book/sft.safetensors",
    model,
    stage="sft",
    tokenizer=tokenizer,
    lineage={
        "parent": parent,
        "data": {"dialogues": {"licence": "CC0-1.0", "conversations": len(parts["train"])}},
        "tokens": result.tokens,
        "steps": result.steps,
        "minutes": round(result.seconds / 60, 2),
    },
    metrics={
        "loss": result.loss,
        "unseen_replies_loss": end_loss,
        "curve": [[progress.tokens, round(progress.loss, 4)] for progress in log],
    },
)
print(f"{saved.path}: {saved.bytes / 1e6:.1f} MB")

# %% tags=["test"]
start_read, end_read = before_and_after["the last conversations that it read"]
start_loss, end_loss = before_and_after["unseen replies"]
assert end_read < start_read, "the replies that it read must have become more likely"
if large:
    assert end_loss < start_loss + 0.05, "gentle rates must do no harm"
else:
    assert end_loss < start_loss, "unseen replies must have become more likely"

# %% [markdown]
# A small base that has hardly met a conversation gains on unseen replies too. The shipped base gains
# next to nothing there, and you can see why: it found the training conversations likelier than the
# unseen ones *before* this run. It has read them in pretraining, several times. The form is known to
# it, and what is left to learn from these few is mostly by heart: a good reason to know what your base
# has read.
#
# Each dot of the curves below is another handful of conversations, some easy, some hard. So it jumps, and
# only its trend tells you something. If a fine-tuned checkpoint is around that kept its curve, the cell
# draws that too: several readings of far more conversations. Look for stairs in it. A step down is a new
# reading, in which the model meets conversations that it has met before. The loss *falls because it
# remembers*, and this number alone would never warn you. (Where new
# conversations join a run, it would jump *up*: the loss on what it has never met is the true one.)

# %%
# alt: Loss against tokens read in this chapter's short run; beside it the shipped one's, if it has one.
shipped = find_first("sft")
card = checkpoint.read_info(shipped) if shipped else None
curves = {"this chapter's run": [[progress.tokens, progress.loss] for progress in log]}
if card and card.metrics.get("curve"):
    curves[f"{card.path.name}, as shipped"] = card.metrics["curve"]


def draw_curves(plt):
    figure, axes = plt.subplots(1, len(curves), figsize=(4.5 * len(curves), 3.5), squeeze=False)
    for axis, (title, curve) in zip(axes[0], curves.items(), strict=True):
        axis.plot([tokens / 1000 for tokens, _ in curve], [loss for _, loss in curve], ".-")
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="thousand tokens read", ylabel="nats a learned token")
    return figure


picture("10_curves", draw_curves)

# %% [markdown]
# ## What it forgets
#
# "Gentle" was a promise; check it. How well do the three models still tell *stories*, which none of
# the conversations asked for? The base can, the model of this run should, and the student who
# learned a few conversations by heart at high rates pays for it. This is **forgetting**: weights
# that are free to change for the new task don't know that the old one needed them.

# %%
tales = [one.text for one in stories() if split_of(one.id) == "validation"][: 2 if FAST else 8]


def story_loss(model: GPT) -> float:
    """Nats a token on stories that none of them has read."""
    rows = [[tokenizer.bos_id, *tokenizer.encode(text)][:ROOM] for text in tales]
    return mean_loss(model, [batch_of(Rendered(row, []), [True] * len(row)) for row in rows])


forgets = {
    "base": story_loss(base),
    "gentle": story_loss(model),
    "harsh, by heart": story_loss(student),
}
for name, loss in forgets.items():
    print(f"{name:>25}: {loss:.2f} nats a token of a story")

# %% tags=["test"]
if not FAST:
    as_base, gently, harshly = forgets.values()
    assert gently - as_base < harshly - as_base, "gentle rates forget less"

# %% [markdown]
# Before and after, the same questions:

# %%
for question in QUESTIONS:
    print(f"> {question}\n  base: {before[question]}\n  sft:  {say(model, question)}\n")

# %% [markdown]
# Judge for yourself, and be fair: it was a short run on a small model. The first things to come are the
# length and the tone of a reply. Facts come last or never. Fine-tuning shows a model *which* of its
# voices to use. What it never read in pretraining, a few conversations can't put there. Zhou et al.
# (2023) took this to its end: a thousand careful conversations were enough to turn a large base into
# a good assistant, because the base already knew the rest.
#
# If a real fine-tuned checkpoint is around, here is what it says of itself.

# %%
if card:
    print(f"{card.path}: {card.parameters / 1e6:.1f} M weights")
    for key in ("tokens", "steps", "minutes", "parent"):
        print(f"  {key}: {card.lineage.get(key, 'not recorded')}")
    print(f"  metrics: { {k: v for k, v in card.metrics.items() if k != 'curve'} }")
    big, its_tokenizer, _ = load_model(card.path)
    if its_tokenizer.vocab_size == tokenizer.vocab_size:
        print(f"  loss on the unseen replies of above: {mean_loss(big, judges):.3f} nats a token;")
        print(f"  the base of above: {mean_loss(base, judges):.3f}")
    for question in QUESTIONS[: 2 if FAST else None]:
        ids = render_prompt([Message("user", question)], its_tokenizer, context=256, reserve=64)
        print(f"> {question}\n  {''.join(stream(big, its_tokenizer, ids, greedy)).strip()}")
else:
    print("no shipped sft checkpoint here: `tinychat train sft` makes one")

# %% [markdown]
# Put two things side by side: the two losses on unseen replies, and the replies, the base's of above and
# these. How much of what you see do the two numbers tell? The loss asks for the very words of one reply
# among many good ones. That is the judge of InstructGPT's authors again, who
# trusted people more than this number. In chapter 11 you build a judge from people's choices.
#
# ## The same thing in many words
#
# A few conversations can't put facts there. Many can, if the same fact comes back in other words each
# time. Allen-Zhu and Li (2023) trained models on made-up biographies. A model that had read each of
# them in *one* wording, however often, could recite it and yet not answer a question about it. With
# five wordings it could. Repetition teaches the sentence, variation teaches the fact.
#
# So our corpus has a second part, the *basics*: short conversations about simple things, each thing
# in several wordings. Here is one fact of it.

# %%
from itertools import dropwhile

from tinychat.data.corpus import basics

for one in basics():
    question, reply = one.messages[0].content, one.messages[1].content
    if "capital of Peru" in reply:
        print(f"{split_of(one.id):>10}: {question} -> {reply}")
kinds = Counter(one.topic for one in basics())
print(f"{len(basics()):,} conversations of {len(kinds)} kinds, such as", end=" ")
print(", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(6)))

# %% [markdown]
# Some of the wordings are held out, as always. They ask, in words that were never trained on, for
# things that were. Whoever answers them has learned more than sentences. Capitals are easy to mark
# by a rule: the answer is the name that the written reply adds to its question. The run of this
# chapter has not read the basics, so it can only know a capital from its base. `tinychat train sft`,
# which made the shipped checkpoint, reads them too.

# %%
ORDINARY = {"The", "That", "Yes", "No", "It", "In", "Its", "This", "Would"}


def answer_of(question: str, reply: str) -> set[str]:
    """The names that the first sentence of a reply adds to its question; none if it asks back."""
    sentence = reply.split(". ")[0]
    found = set()
    for name in re.findall(r"[A-Z][a-z]+(?: [A-Z][a-z]+)*", sentence):  # whole ones: Kuwait City
        words = list(dropwhile(ORDINARY.__contains__, name.split()))
        found.add(" ".join(words))
    return {name for name in found if name.lower() not in question.lower() and "?" not in sentence}


def exam(parts: tuple[str, ...], count: int) -> list[tuple[str, set[str]]]:
    """Questions for capitals, and the names that a right reply must hold."""
    found = []
    for one in basics():
        if one.topic == "capitals" and split_of(one.id) in parts:
            question = one.messages[0].content
            names = answer_of(question, one.messages[1].content)
            found += [(question, names)] * bool(names)
    return found[:count]


sitters = {"this chapter's run": (model, tokenizer)}
if card:
    sitters[f"{card.path.name}, as shipped"] = big, its_tokenizer
for name, (one, pieces) in sitters.items():
    for wording, parts_of in (("trained", ("train",)), ("unseen", ("validation", "test"))):
        right, questions = 0, exam(parts_of, 2 if FAST else 30)
        for question, names in questions:
            reply = say(one, question, pieces)
            right += all(name in reply for name in names)
        print(f"{name:>30}, {wording} wordings: {right} of {len(questions)} capitals right")

# %% tags=["test"]
assert answer_of("capital of peru?", "The capital of Peru is Lima. It is large.") == {"Lima"}
assert answer_of("capital of mexico?", "That is Mexico City.") == {"Mexico City"}
assert not answer_of("quiz me", "Let me see: what is the capital of Canada?")
assert not {q for q, _ in exam(("train",), 999)} & {q for q, _ in exam(("validation", "test"), 999)}

# %% [markdown]
# ## Showing or training?
#
# There is another way to make a base model do a task: *show* it a few examples in the prompt, and
# change no weight at all. That is **in-context learning**. Large models do it amazingly well. Does
# ours?
#
# The task: is a word an animal or a food? The base gets a list of solved examples in front of each
# question. A copy of it is fine-tuned on the same examples. Both must then judge words that were
# among neither. To be fair to a small model, it needs no right sentence: we only look at which of
# the two answers it finds more likely.

# %%
ANIMALS = "dog horse cow bird mouse lion bear duck frog sheep rabbit wolf cat fox pig hen goat fish"
FOODS = (
    "cake soup rice milk cheese apple egg honey butter salt meat pie bread tea corn jam nut wine"
)
labelled = [
    pair
    for animal, food in zip(ANIMALS.split(), FOODS.split(), strict=True)
    for pair in ((animal, "animal"), (food, "food"))
]
shown, asked = labelled[:24], labelled[24 : 28 if FAST else None]
LABELS = {label: tokenizer.encode(f" {label}") for label in ("animal", "food")}


@torch.no_grad()
def likelier(model: GPT, ids: list[int], labels: dict[str, list[int]]) -> str:
    """The label that the model finds more likely after these tokens."""
    scores = {}
    for label, tokens in labels.items():
        logprobs_TV = model(torch.tensor([ids + tokens]))[0].log_softmax(-1)
        places = range(len(ids) - 1, len(ids) + len(tokens) - 1)
        scores[label] = sum(float(logprobs_TV[p, t]) for p, t in zip(places, tokens, strict=True))
    return max(scores, key=scores.__getitem__)


def few_shot(word: str, count: int) -> str:
    """The base's guess, with that many solved examples before the question."""
    lines = [f"{one}: {label}\n" for one, label in shown[:count]]
    ids = [tokenizer.bos_id, *tokenizer.encode("".join(lines) + f"{word}:")]
    return likelier(base, ids, LABELS)


def as_talk(word: str, label: str) -> list[Message]:
    return [Message("user", f"Animal or food: {word}?"), Message("assistant", label)]


specialist = copy.deepcopy(base).train()
task = [render(as_talk(word, label), tokenizer) for word, label in shown]
readings = 3 if FAST else 20 if base.config.parameters > 4e6 else 60
drill = replace(PLAIN, batch=5, sequence=64, epochs=readings, matrix_lr=1e-2, vector_lr=3e-3)
with tempfile.TemporaryDirectory() as folder:
    finetune(specialist, task, drill, folder, pad=tokenizer.pad_id)
specialist.eval()
ANSWERS = {label: tokenizer.encode(label) for label in LABELS}


def trained(word: str) -> str:
    """The specialist's guess."""
    ids = render_prompt(as_talk(word, "")[:1], tokenizer, context=256, reserve=16)
    return likelier(specialist, ids, ANSWERS)


for count in (0, 4, 24):
    guesses = [few_shot(word, count) for word, _ in asked]
    right = sum(guess == label for guess, (_, label) in zip(guesses, asked, strict=True))
    print(f"base, {count:2} examples in the prompt: {right:2} of {len(asked)} right", end=" ")
    print(f"({guesses.count('animal')} times it said 'animal')")
guesses = [trained(word) for word, _ in asked]
right = sum(guess == label for guess, (_, label) in zip(guesses, asked, strict=True))
known = sum(trained(word) == label for word, label in shown)
print(f"fine-tuned on 24 examples:    {right:2} of {len(asked)} right", end=" ")
print(f"({guesses.count('animal')} times)")
print(f"and on the examples themselves: {known} of {len(shown)}")

# %% tags=["test"]
assert FAST or known > 18, "examples that it read so often, it must know"

# %% [markdown]
# Guessing gets half of them, and so does a model that always gives the same answer: look at the
# numbers in brackets. With so few words to ask, a result has to stand well above half before it
# means anything, so don't read much into two more or less.
#
# Compare the last two lines instead. With enough readings, fine-tuning learns its *examples*.
# Whether it carries over to new words depends on what the base knows of them: if its vectors for
# *goat* and *horse* are alike (chapter 04), one lesson serves both.
#
# In-context learning asks for more. The model must find the pattern in the prompt by itself, and
# that ability only appears with far more training than a book chapter can give. So a small model is
# better trained, and a large one can often simply be shown.
#
# ## Exercises
#
# **1. Pack better.** First fit in random order leaves some padding. Sort the conversations by length,
# longest first, and let all rows stay open. How many rows does that save, and how far is it from the
# least number that could be possible at all? Why do we still pack in random order?


# %% tags=["solution"]
def pack_sorted(lengths: Sequence[int], room: int) -> list[list[int]]:
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    return pack(lengths, room, order, open_rows=len(lengths))


tight = pack_sorted(lengths, ROOM)
least = -(-used // ROOM)
print(f"random order {len(packed)}, sorted {len(tight)}, at least {least} rows")
assert least <= len(tight) <= len(packed)
# Sorted, the same conversations share a row in each epoch. Random order mixes them anew each time, for
# a little padding.

# %% [markdown]
# **2. Without segments.** With `row_4T = torch.from_numpy(packed_row(two, 64, tokenizer.pad_id))`, drop
# the segments (`row_4T[3]`) from the packed row of `two` and measure how much the
# scores change, for the first conversation and for the second. Which one must stay the same, and
# why?

# %% tags=["solution"]
with torch.no_grad():
    ids_1T, segments_1T = row_4T[0][None], row_4T[3][None]
    apart_TV = base(ids_1T, segments_BT=segments_1T)[0]
    mixed_TV = base(ids_1T)[0]
change_T = (apart_TV - mixed_TV).abs().amax(-1)
of_first, of_second = (float(change_T[segments_1T[0] == number].max()) for number in (1, 2))
print(f"largest change of a score: {of_first:.4f} in the first, {of_second:.4f} in the second")
# The first stands at the beginning of the row: causality already hides everything behind it.
assert of_first < 1e-3 < of_second

# %% [markdown]
# **3. Who decides?** Every learned token weighs the same, so long replies weigh more than short
# ones. Compute which share of all learned tokens comes from the longest tenth of the conversations.
# How would you give each conversation the same weight?

# %% tags=["solution"]
sizes = sorted((sum(one.loss_mask) for one in parts["train"]), reverse=True)
top_tenth = sum(sizes[: len(sizes) // 10]) / sum(sizes)
print(f"the longest tenth of the conversations holds {top_tenth:.0%} of the learned tokens")
alike = [[1 / sum(one.loss_mask) * marked for marked in one.loss_mask] for one in parts["train"]]
assert all(abs(sum(weights) - 1) < 1e-9 for weights in alike)
# Such weights in place of the mask's ones would do it: `LossFunction` divides by their sum. (The mask
# would have to hold fractions first; `packed_row` and `batch_of` make whole numbers of it.) Short
# replies would then decide the voice.

# %% [markdown]
# **4. A fair judge.** A base may prefer one of the two answers whatever you ask: "animal" may just be
# the likelier word. Zhao et al. (2021) subtract this taste: ask about no word at all ("it:"), and
# take from each label's score the score that it has there. Does showing work better now?


# %% tags=["solution"]
@torch.no_grad()
def label_scores(word: str, count: int) -> dict[str, float]:
    """The base's log-probability of each label, after that many examples."""
    lines = "".join(f"{one}: {label}\n" for one, label in shown[:count])
    ids = [tokenizer.bos_id, *tokenizer.encode(f"{lines}{word}:")]
    scores = {}
    for label, tokens in LABELS.items():
        logprobs_TV = base(torch.tensor([ids + tokens]))[0].log_softmax(-1)
        places = enumerate(tokens, len(ids) - 1)
        scores[label] = sum(float(logprobs_TV[place, token]) for place, token in places)
    return scores


for count in (0, 4):
    taste = label_scores("it", count)
    fair, margins = [], []
    for word, _label in asked:
        scores = label_scores(word, count)
        assert max(scores, key=scores.__getitem__) == few_shot(word, count)
        fair.append(max(scores, key=lambda label: scores[label] - taste[label]))
        margins.append(scores["animal"] - scores["food"])
    right = sum(guess == label for guess, (_, label) in zip(fair, asked, strict=True))
    print(f"{count} examples, taste taken away: {right} of {len(asked)} right", end=" ")
    print(f"({fair.count('animal')} times it said 'animal')")
    # All it does is to move the bar: words keep their order from the most animal to the least.
    bar = taste["animal"] - taste["food"]
    assert fair.count("animal") == sum(margin > bar for margin in margins)

# %% [markdown]
# ## Check yourself
#
# 1. Which tokens of a conversation carry loss, and what do the others do?
# 2. Two conversations share a row. What keeps the second from reading the first, and when should it?
# 3. The loss on the training conversations falls from epoch to epoch. Is the model getting better?
# 4. Why are the rates lower than in pretraining?
# 5. You have a task and thirty solved examples. When do you show them in the prompt, and when do you
#    train?
#
# <details markdown="1"><summary>Answers</summary>
#
# 1. The text of the replies and the `<|end|>` after each. The others are read: the reply looks back
#    at them, and gradients flow through them.
# 2. Its segment number: attention only joins tokens of the same segment. It should read the first
#    one sometimes, because a real chat has more than one thing in it.
# 3. You can't tell from this number. It may be learning them by heart; ask conversations that it
#    never reads.
# 4. The base has learned something that took long. Large steps on little data wash it away; the
#    chapter measured it on stories.
# 5. Show them to a large model, which finds the pattern by itself and needs no training. Train a
#    small one, or one that must do this task a million times with a short prompt.
#
# </details>
#
# ## What we left out
#
# - **Adapters (LoRA)** train a few small matrices beside the frozen weights. They save memory for
#   huge models; ours fits anyway.
# - **Replay**: mixing some pretraining text into fine-tuning, against forgetting.
# - **A warm optimizer.** nanochat takes up the optimizer's memory where pretraining left it; ours
#   begins anew, and its warm-up makes up for that.
# - **Tasks among the talk.** nanochat also mixes in school questions, sums and spelling, so that one
#   model learns them all. Ours has short sums and facts among its basics, and no spelling.
# - **Training only on the best replies**, chosen by a judge. Chapter 11 builds the judge.
# - **Many public conversations.** We tried. A small model then speaks as they do, and our own voice
#   drowns.
#
# ## Where this is in the package
#
# Everything tagged `export` here is `tinychat/sft.py`. `tinychat train sft` calls `finetune` with
# the whole corpus and the basics, the held-out loss on the screen, and your own conversations if you
# name a file.
#
# ## Sources
#
# - L. Ouyang et al.:
#   [Training language models to follow instructions with human feedback](https://arxiv.org/abs/2203.02155)
#   (2022). Step one of three; section 3.5 and appendix C: epochs, and overfitting that people don't
#   mind.
# - C. Zhou et al.: [LIMA: Less is more for alignment](https://arxiv.org/abs/2305.11206) (2023). A
#   thousand good conversations.
# - Z. Allen-Zhu, Y. Li:
#   [Physics of language models: part 3.1, knowledge storage and extraction](https://arxiv.org/abs/2309.14316)
#   (2023). The same fact in many words.
# - M. M. Krell, M. Kosec, S. P. Perez, A. Fitzgibbon:
#   [Efficient sequence packing without cross-contamination](https://arxiv.org/abs/2107.02027) (2021).
#   Packing with segments.
# - T. B. Brown et al.: [Language models are few-shot learners](https://arxiv.org/abs/2005.14165)
#   (2020). In-context learning.
# - T. Z. Zhao, E. Wallace, S. Feng, D. Klein, S. Singh:
#   [Calibrate before use](https://arxiv.org/abs/2102.09690) (2021). Exercise 4.
# - M. McCloskey, N. J. Cohen:
#   [Catastrophic interference in connectionist networks](https://doi.org/10.1016/S0079-7421(08)60536-8)
#   (1989). Forgetting.
# - M. Wortsman et al.: [Robust fine-tuning of zero-shot models](https://arxiv.org/abs/2109.01903)
#   (2022). The mean of before and after.
# - E. J. Hu et al.: [LoRA](https://arxiv.org/abs/2106.09685) (2022). The adapters that we left out.
