# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Beyond
#
# Get more out of a finished model: show, think, look up, calculate, shrink, guess ahead.
#
# Your model is trained. Its weights are as they are. And yet the same weights can do better or
# worse, depending on what you put around them. A good cook with a recipe, a knife and a calculator
# beats the same cook with bare hands.
#
# This chapter puts six things around the model. Each one is measured, before and after, on models
# that you know. Some help a lot, some don't help a model of this size at all, and the numbers will
# say which.
#
# **What you will build**
#
# 1. **few-shot** prompts: what examples in the prompt teach, and what they don't;
# 2. **thinking in tokens**: why writing the steps down makes hard things easy;
# 3. **retrieval**: a search engine that puts the right page in front of the model;
# 4. a **calculator** that the model can call, and that nobody can misuse;
# 5. **quantization**: the weights in eight bits, in four, in two;
# 6. **speculative decoding**: several tokens a pass, and every text as likely as before.
#
# **What you need:** chapters 06 (the network), 08 (choosing tokens), 10 (in-context learning) and
# 13 (intervals). The code takes about two minutes; reading it, two hours.

# %% tags=["export"]
import copy
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from tinychat.evaluation import words_of
from tinychat.generation import Sampling, filter_logits, generate, make_generator, rewind
from tinychat.gpt import GPT
from tinychat.runtime.errors import ConfigError, TinychatError
from tinychat.tokenizer import Tokenizer


# %%
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from tinychat.book.picture import picture
from tinychat.data import tokenizer_model
from tinychat.data.corpus import explanations, stories
from tinychat.data.records import Dialogue, Document, Message
from tinychat.data.split import split_of
from tinychat.data.unseen import unseen_texts
from tinychat.dialogue import render_prompt
from tinychat.embeddings import nearest
from tinychat.evaluation import bootstrap, surprise, wilson
from tinychat.generation import generate_batch, stream
from tinychat.gpt import GPTConfig, load_model, nano, save_model
from tinychat.pretraining import TrainConfig, make_optimizers, schedule
from tinychat.runtime import checkpoint
from tinychat.runtime.search import find_first

FAST = os.environ.get("TINYCHAT_FAST") == "1"
torch.manual_seed(0)


def model_of(stage: str) -> tuple[GPT, Tokenizer]:
    """The shipped checkpoint of a stage, else the reader's own, else random weights."""
    if path := find_first(stage, f"runs/book/{stage}"):
        model, tokenizer, info = load_model(path)
        print(f"{stage}: {path.name}, {info.parameters / 1e6:.1f} M weights")
    else:
        model, tokenizer = GPT(nano()).eval(), Tokenizer(tokenizer_model())
        print(f"{stage}: not here, so random weights; the numbers below mean little")
    return model.requires_grad_(False), tokenizer


base, tokenizer = model_of("base")
chatty, chat_tokenizer = model_of("sft")

# %% [markdown]
# ## Show, don't tell
#
# You want the base model to do something: *walk* becomes *walking*. It was never trained to follow
# instructions. But it has learned to go on with patterns. So begin one, and let it go on. These are the **few-shot** prompts of GPT-3 (Brown et al. 2020).


# %%
def few_shot(examples: Iterable[tuple[str, str]], question: str) -> str:
    """A prompt of solved examples, one a line, that ends where the answer must come."""
    return "".join(f"{asked}{answer}\n" for asked, answer in examples) + question


# %%
ING = [("jump,", " jumping"), ("play,", " playing"), ("look,", " looking")]
prompt = few_shot(ING, "walk,")
print(prompt)
ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
greedy = Sampling(temperature=0, max_tokens=6)
print(f"{'':4}... and the model goes on: {tokenizer.decode(generate(base, ids, greedy))!r}")

# %% [markdown]
# One prompt proves nothing. You need many words, a fair question and a count.
#
# The naive way lets the model write and compares with the right answer. For a weak model that gives
# zero nearly always, and zero tells you nothing about *how* wrong it was. The usual way out is to
# offer a few options and see which one the model finds least surprising. It can't fail for a silly
# reason then, such as a line break in the wrong place.


# %%
@torch.inference_mode()
def option_bits(
    model: GPT, tokenizer: Tokenizer, prompt: str, options: Sequence[str]
) -> list[float]:
    """Bits that the model needs for each option after the prompt; the least is its choice."""
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    written = [tokenizer.encode(option) for option in options]
    longest = max(map(len, written))
    # Filling on the right: no token that counts looks at it.
    rows = [[*ids, *row, *[tokenizer.pad_id] * (longest - len(row))] for row in written]
    h_BTD = model.hidden(torch.tensor(rows, device=model.device))[:, len(ids) - 1 : -1]
    logprobs_BTV = F.linear(h_BTD, model.embed.weight).float().log_softmax(-1)
    return [
        -float(logprobs_TV[range(len(row)), row].sum()) / math.log(2)
        for logprobs_TV, row in zip(logprobs_BTV, written, strict=True)
    ]


# %%
for option, bits in zip(
    (" walking", " walked", " walks", " walk"),
    option_bits(base, tokenizer, prompt, (" walking", " walked", " walks", " walk")),
    strict=True,
):
    print(f"{option:>9}: {bits:5.1f} bits")

# %% tags=["test"]
together = option_bits(base, tokenizer, prompt, (" a", " a much longer option"))
alone = option_bits(base, tokenizer, prompt, (" a",))
assert abs(together[0] - alone[0]) < 1e-3, "the filling changes nothing"

# %% [markdown]
# Two tasks, chosen because they ask for different things:
#
# - **form**: *walk* → *walking*, against *walk*, *walks* and *walked*. The answer follows from the
#   examples, and without examples nobody could know what is wanted.
# - **fact**: a first name → *she* or *he*. The model may know that before it sees any example. And
#   the examples can't tell: the answer for *Rose* doesn't stand in the lines about *Tom* and
#   *Lily*.

# %%
VERBS = (
    "walk jump play look call talk help wash clean cook paint open climb pull push visit start ask "
    "answer want need work wait kick pick turn listen watch"
).split()
BOYS = "Tom Ben Max Sam Jack Tim Leo Paul Peter John Bob Henry Billy Mark".split()
GIRLS = "Lily Anna Mia Sue Emma Sara Jane Mary Lucy Amy Kate Ella Grace Rose".split()


def forms(verb: str) -> tuple[str, ...]:
    return tuple(f" {verb}{ending}" for ending in ("ing", "", "s", "ed"))


# Each: the question, then the options, the right one first.
TASKS = {
    "form": [(f"{verb},", forms(verb)) for verb in VERBS],
    "fact": [(f"{name} ->", (" he", " she")) for name in BOYS]
    + [(f"{name} ->", (" she", " he")) for name in GIRLS],
}
SHOTS = (0, 1, 4) if FAST else (0, 1, 4, 8)


def ask(task: str, count: int, number: int) -> list[float]:
    """Bits of each option of a question, after that many examples of other words."""
    questions = TASKS[task]
    question, options = questions[number]
    dice = random.Random(1000 * number + count)
    others = dice.sample([one for n, one in enumerate(questions) if n != number], count)
    shown = [(asked, answers[0]) for asked, answers in others]
    return option_bits(base, tokenizer, few_shot(shown, question), options)


few_shots: dict[tuple[str, int], list[list[float]]] = {}
for task, count in itertools.product(TASKS, SHOTS):
    asked = range(0, len(TASKS[task]), 9 if FAST else 1)
    few_shots[task, count] = [ask(task, count, number) for number in asked]
    found = few_shots[task, count]
    right = sum(bits[0] == min(bits) for bits in found)
    needed = bootstrap([bits[0] for bits in found])
    print(
        f"{task}, {count} examples: right {wilson(right, len(found)).show('.0%')}, "
        f"{needed.show('.1f')} bits for the right answer"
    )


# %%
# alt: Share of right answers and bits of the right answer against the examples shown, two tasks.
def draw_few_shot(plt):
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.4))
    for number, (task, chance) in enumerate((("form", 1 / 4), ("fact", 1 / 2))):
        colour, all_found = f"C{number}", [few_shots[task, count] for count in SHOTS]
        shares = [wilson(sum(b[0] == min(b) for b in found), len(found)) for found in all_found]
        left.plot(SHOTS, [share.value for share in shares], "o-", color=colour, label=task)
        left.fill_between(
            SHOTS, [s.low for s in shares], [s.high for s in shares], color=colour, alpha=0.2
        )
        left.axhline(chance, color=colour, linestyle=":")
        means = [sum(bits[0] for bits in found) / len(found) for found in all_found]
        right.plot(SHOTS, means, "o-", color=colour)
    left.set(xlabel="examples", ylabel="right answers (dotted: chance)", ylim=(0, 1.03))
    right.set(xlabel="examples", ylabel="bits for the right answer", ylim=(0, None))
    left.legend()
    return figure


picture("14_few_shot", draw_few_shot)

# %% [markdown]
# Read the two panels together. Where the bits fall with the examples, the model has noticed what
# sort of word follows. That is what examples teach first: the **form** of an answer.
#
# Now look at the shares, and at *fact* above all. If they are best with *no* example, the examples
# did harm. That happens with small models: they like to repeat the answer that they just read, more
# than they like to be right. Zhao et al. (2021) found the same with far larger ones, and chapter
# 10's exercise 4 has their cure. Min et al. (2022) went further and put *wrong* answers into the
# examples; large models of their day hardly minded. The examples had told them what sort of answer
# is wanted, and the rest they knew.
#
# So what you show is a costume, not knowledge. How well it fits depends on who wears it: Brown et
# al. saw the gain from examples grow with the size of the model.
#
# ## Thinking in tokens
#
# Here is a puzzle. A ball lies under the middle one of three cups. Swap the left two, the outer
# two, the right two, the left two ... where is it now?
#
# You solve it by following the ball. A GPT that must answer *at once* has little to follow it with.
# A token goes up through a fixed number of layers, and each swap depends on the one before. Twelve
# swaps are twelve steps one after another, and our students have two layers. (There are clever
# shortcuts, see Liu et al. 2023. To find them by training is another matter.)
#
# But a GPT has another place to put its steps: **the text**. What it writes, it reads again. A
# token a step, and each token gets all layers anew. That is **chain of thought** (Wei et al. 2022),
# and you can see the whole effect on a model that learns in seconds.
#
# Our shipped models never saw such puzzles, so train fresh ones. They need a tiny language of their
# own.


# %%
class Words:
    """A tokenizer for made-up languages: `pattern` cuts, every piece that comes up is a token."""

    pad_id, bos_id, end_id, unknown_id = range(4)

    def __init__(self, pattern: str, texts: Iterable[str]) -> None:
        self.pattern = re.compile(pattern)
        pieces = dict.fromkeys(piece for text in texts for piece in self.pattern.findall(text))
        self.pieces = ["", "", "", "?", *pieces]
        self.numbers = {piece: number for number, piece in enumerate(self.pieces)}
        self.vocab_size = len(self.pieces)

    def encode(self, text: str) -> list[int]:
        return [self.numbers.get(piece, self.unknown_id) for piece in self.pattern.findall(text)]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.pieces[id] for id in ids)


Part = tuple[str, bool]  # a piece of text, and whether the model must learn to write it


def practise(
    words: Words, exercise: Callable[[random.Random], list[Part]], steps: int, batch: int
) -> GPT:
    """Train a fresh, very small GPT on endless new exercises; chapter 07 explains each line."""
    torch.manual_seed(0)
    dice = random.Random(0)
    shape = GPTConfig(
        width=64, layers=2, heads=2, kv_heads=1, head_width=32, hidden=192, context=128,
        vocab_size=words.vocab_size,
    )  # fmt: skip
    model = GPT(shape)
    optimizers = make_optimizers(model, TrainConfig(vector_lr=5e-3))
    for step in range(steps):
        rows, learned = [], []
        for _ in range(batch):
            parts = [(words.encode(text), learn) for text, learn in exercise(dice)]
            rows.append([id for ids, _ in parts for id in ids] + [words.end_id])
            learned.append([learn for ids, learn in parts for _ in ids] + [True])
        longest = max(map(len, rows))
        ids_BT = torch.tensor([row + [words.pad_id] * (longest - len(row)) for row in rows])
        mask_BT = torch.tensor([row + [False] * (longest - len(row)) for row in learned])
        targets_BT = ids_BT.masked_fill(~mask_BT, -100)[:, 1:]
        logits_BTV = model(ids_BT[:, :-1])
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=-100)
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule(step, steps, 0.1, 0.5)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return model.eval().requires_grad_(False)


# %% [markdown]
# A puzzle is a letter for the cup, and then a letter for each swap. Three students get the same
# puzzles:
#
# - **at once**: the answer, nothing else;
# - **dots**: first as many dots as there are swaps, then the answer. It has the *time* to think,
#   but nothing to write down;
# - **steps**: the place of the ball after each swap, then the answer.

# %%
SWAPS = {"x": (0, 1), "y": (1, 2), "z": (0, 2)}  # the left two, the right two, the outer two
ROUNDS, BATCH = (4, 16) if FAST else (12, 64)


def cups(style: str) -> Callable[[random.Random], list[Part]]:
    """Puzzles of one student: what is asked, and what is to be written."""

    def exercise(dice: random.Random) -> list[Part]:
        place = dice.randrange(3)
        asked, steps = "abc"[place], ""
        for swap in dice.choices("xyz", k=ROUNDS):
            one, other = SWAPS[swap]
            place = {one: other, other: one}.get(place, place)
            asked, steps = asked + swap, steps + "abc"[place]
        before = {"at once": "", "dots": "." * ROUNDS, "steps": steps}[style]
        return [(asked, False), (f"{before}={'abc'[place]}", True)]

    return exercise


def written(model: GPT, words: Words, questions: Sequence[str]) -> list[str]:
    """What a model writes, always taking the best token."""
    settings = Sampling(temperature=0, max_tokens=2 * ROUNDS)
    asked = [words.encode(question) for question in questions]
    replies = generate_batch(model, asked, settings, stop={words.end_id}, rows=100)
    return [words.decode(reply) for reply in replies]


cup_words = Words(".", ["abcxyz.="])
scored = {}
print("learned from  right, of puzzles that nobody saw")
for style in ("at once", "dots", "steps"):
    begin = time.perf_counter()
    student = practise(cup_words, cups(style), steps=8 if FAST else 150, batch=BATCH)
    seconds = time.perf_counter() - begin
    dice = random.Random(1)  # the same puzzles for all three
    puzzles = [cups(style)(dice) for _ in range(20 if FAST else 300)]
    replies = written(student, cup_words, [puzzle[0][0] for puzzle in puzzles])
    right = sum(a[-1:] == p[1][0][-1] for a, p in zip(replies, puzzles, strict=True))
    scored[style] = wilson(right, len(puzzles))
    print(f"{style:>12}  {scored[style].show('.0%')}", end="  ")
    print(f"({seconds:.0f} s)  {puzzles[0][0][0]} -> {replies[0]}")

# %% tags=["test"]
assert FAST or scored["steps"].low > 0.9, "with the steps written down, this is easy"
assert FAST or scored["dots"].high < 0.6, "without them, more tokens don't help"


# %%
# alt: Right answers of the three students as bars with intervals, beside a dotted line at a third.
def draw_cups(plt):
    figure, axis = plt.subplots(figsize=(6, 2.4))
    for number, (style, share) in enumerate(scored.items()):
        reach = [[share.value - share.low], [share.high - share.value]]
        axis.barh(style, share.value, xerr=reach, color=f"C{number}", ecolor="grey")
    axis.axvline(1 / 3, color="grey", linestyle=":")
    axis.invert_yaxis()
    axis.set(xlabel="right answers (dotted: luck)", xlim=(0, 1.03))
    return figure


picture("14_cups", draw_cups)

# %% [markdown]
# A third of the answers is right by luck. Compare the three with that, and with each other. The
# network, the puzzles and the number of training steps are the same. The dots had the same number
# of tokens to compute in. What the third student has, and they don't, is a place to *keep* what was
# found.
#
# Three things to take with you.
#
# - **It costs.** A dozen tokens for one letter of answer. Models that think at length spend most of
#   their tokens on thinking.
# - **It has to be learned.** Our students were shown the steps. Large models learned from text in
#   which people explain. Wei et al. found that chains of thought helped only models of about a
#   hundred billion weights, and made the smaller ones rather worse.
# - **It can be rewarded.** Give points for right final answers, as chapter 12 gave points for good
#   replies, and a model finds out by itself which thoughts help. That is how today's *reasoning
#   models* are trained.
#
# How many steps can do without writing depends on the depth. Exercise 1 asks for it.
#
# Test the second point on our chat model. Small sums, asked plainly, and asked with the words that
# work wonders on large models (Kojima et al. 2022).

# %%
MAGIC = " Let's think step by step."
plus = [(a, b) for a in range(2, 9, 3 if FAST else 2) for b in range(3, 10, 3)]
heard: dict[str, list[str]] = {}
for extra in ("", MAGIC):
    asked = [
        render_prompt(
            [Message("user", f"What is {a} plus {b}?{extra}")],
            chat_tokenizer,
            context=chatty.config.context,
            reserve=48,
        )
        for a, b in plus
    ]
    quiet = Sampling(temperature=0, max_tokens=8 if FAST else 40)
    replies = generate_batch(chatty, asked, quiet, stop={chat_tokenizer.end_id})
    heard[extra] = [chat_tokenizer.decode(reply).strip() for reply in replies]
    right = sum(
        str(a + b) in words_of(text) for (a, b), text in zip(plus, heard[extra], strict=True)
    )
    print(f"{'step by step' if extra else 'plainly':>12}: {wilson(right, len(plus)).show('.0%')}")
    print(f"{'':12}  {plus[0][0]} + {plus[0][1]}: {heard[extra][0][:100]!r}")

# %% [markdown]
# Whatever the two shares are, read the replies. Thinking aloud helps a model that can think a step.
# Words in the *form* of thinking are only more words.
#
# ## Look it up
#
# Ask our chatbot how long the Amazon is. It has far too much to remember in a few megabytes, so it
# will probably make something up. But you have the page where it stands! Then don't ask it to
# remember. Ask it to *read*. An exam with open books is easier, and you can change a book
# overnight; you can't change weights overnight. This is **retrieval-augmented generation** (Lewis
# et al. 2020).
#
# The books: the explanations of our corpus. The exam: questions of our own, each asked twice, once
# in words that the page might use and once in quite other words. Half of them are about pages that
# no training run has read.

# %%
EXAM = (  # page, near question, far question, answer
    ("009", "Why are a beaver's teeth orange?",
     "What gives that rodent its rusty smile?",
     "There is iron in the outer layer of its teeth."),
    ("018", "How do the rings tell the age of a tree?",
     "How would I learn how old my felled oak is?",
     "Count the pairs of light and dark rings from the center to the bark."),
    ("023", "Why does a zebra have stripes?",
     "Why did nature paint that animal black and white?",
     "The stripes seem to keep biting flies from landing."),
    ("052", "Why is the sky blue?",
     "What makes heaven look azure on a clear afternoon?",
     "The air knocks the short blue waves about in all directions."),
    ("055", "Why does rust grow faster near salt?",
     "Why is my gate at the coast crumbling into orange flakes?",
     "Salty water carries electric charge more easily, and rust needs that."),
    ("065", "What stops an elevator if the ropes are cut?",
     "Could the lift in my hotel plunge into the basement?",
     "Wedges grab the steel rails on both sides and stop the car."),
    ("075", "How is an old aluminum can made into a new can?",
     "What becomes of my empty cola tin?",
     "It is shredded, melted, rolled into a sheet and punched out again."),
    ("086", "Is a tomato a fruit or a vegetable?",
     "Which group would a botanist put ketchup's main ingredient in?",
     "It is a fruit, because it grows from a flower and holds the seeds."),
    ("108", "How long is the Amazon River?",
     "What distance does Brazil's mightiest stream cover?",
     "It is about four thousand miles long."),
    ("121", "What turned the great lens in a lighthouse?",
     "How did a beacon for ships spin before electricity?",
     "A heavy weight sank and turned the lens by clockwork."),
    ("189", "Why do judges compare two answers instead of writing one?",
     "Why is a chatbot taught by people who pick a favorite?",
     "Comparing is easier than creating."),
    ("001", "Why do leaves turn yellow in autumn?",
     "How come maples change their coat before the frost?",
     "The tree stops making chlorophyll, and the yellow underneath shows."),
    ("006", "How do you tell an octopus from a squid?",
     "What sets the two ink throwers of the ocean apart?",
     "A squid has two long tentacles besides its eight arms."),
    ("011", "How do ants find the way to the jam?",
     "How do tiny picnic guests tell their sisters where the sweets are?",
     "The first ant leaves spots of a scent, and the others follow it."),
    ("022", "Why don't a penguin's feet freeze?",
     "How can that antarctic bird go barefoot all winter?",
     "The warm blood going down gives its heat to the cold blood coming up."),
    ("047", "Why do stars twinkle?",
     "What makes those faraway suns flicker?",
     "Pockets of moving air bend their light this way and that."),
    ("068", "What empties the bowl when you flush?",
     "How does a bathroom lever carry the waste away?",
     "The falling water pulls the rest along, like a siphon."),
    ("079", "Why do onions make you cry?",
     "Why do tears run when I chop vegetables?",
     "A gas rises from the broken cells and stings the eye."),
    ("085", "Is spicy a taste?",
     "Why does a jalapeno burn straight from the fridge?",
     "No, capsaicin switches on the nerves that warn you about heat."),
    ("111", "Why are there seashells on Mount Everest?",
     "How did sea creatures get up to a Himalayan summit?",
     "The rock up there was once the floor of a sea."),
    ("165", "Why does February get an extra day?",
     "What are leap years good for?",
     "A year is some hours longer than 365 days."),
    ("193", "Why does a language model make things up?",
     "Why would a chatbot lie about somebody's birthday?",
     "It always has a guess about the next token, even if it doesn't know."),
)  # fmt: skip
pages = explanations()
texts = [page.text for page in pages]
page_of = {page.id.rpartition("-")[2]: number for number, page in enumerate(pages)}
unread = {entry[0] for entry in EXAM if split_of(pages[page_of[entry[0]]].id) != "train"}
print(f"{len(pages)} pages, {len(EXAM)} facts, {len(unread)} of them on pages kept from training")

# %% [markdown]
# ### By counting words
#
# The naive search counts the words that question and page share. It falls for *the*, *do* and *a*,
# which every page has, and for long pages, which have a bit of everything.
#
# **BM25** (Robertson and Zaragoza 2009) repairs that with three ideas, and it is still the one to
# beat after thirty years.
#
# 1. A **rare** word tells more. Of $N$ pages, $n$ hold the word: its weight is
#    $\ln\left(1 + \frac{N - n + 0.5}{n + 0.5}\right)$.
# 2. The second time tells less than the first, and the tenth almost nothing. A word that comes $f$
#    times counts $\frac{f (k_1 + 1)}{f + k_1}$ times, and never more than $k_1 + 1$ times.
# 3. A **long** page needs more to convince: multiply the $k_1$ below the line by
#    $1 - b + b \cdot \frac{\text{length}}{\text{mean length}}$.


# %% tags=["export"]
class BM25:
    """Finds the texts that a question is about, by their words (Robertson and Zaragoza 2009).

    The weight of a word has the 1 inside the logarithm, so that none is negative.
    """

    def __init__(self, texts: Sequence[str], k1: float = 1.2, b: float = 0.75) -> None:
        counts = [Counter(words_of(text)) for text in texts]
        if not any(counts):
            raise ConfigError("There is no word to search for; give at least one text.")
        mean = sum(count.total() for count in counts) / len(counts)
        self.size = len(counts)
        self.places: dict[str, list[tuple[int, float]]] = defaultdict(list)
        "for each word: the texts that hold it, and how much it counts there"
        for number, count in enumerate(counts):
            length = 1 - b + b * count.total() / mean
            for word, times in count.items():
                self.places[word].append((number, times * (k1 + 1) / (times + k1 * length)))

    def best(self, question: str, count: int) -> list[tuple[int, float]]:
        """Return up to `count` texts as (number, score), best first; none that shares no word."""
        scores: dict[int, float] = defaultdict(float)
        for word in set(words_of(question)):
            places = self.places.get(word, ())
            rarity = math.log(1 + (self.size - len(places) + 0.5) / (len(places) + 0.5))
            for number, weight in places:
                scores[number] += rarity * weight
        return sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:count]


# %%
index = BM25(texts)
for number, score in index.best("How long is the Amazon River?", 3):
    print(f"{score:5.1f}  {texts[number].splitlines()[0]}")

# %% tags=["test"]
small = BM25(["red cat", "red dog", "red red cow"])
(first, score), *_ = small.best("the cow", 3)
assert first == 2 and len(small.best("red", 9)) == 3 and small.best("blue", 3) == []
by_hand = math.log(1 + 2.5 / 1.5) * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 3 / (7 / 3)))
assert abs(score - by_hand) < 1e-12

# %% [markdown]
# ### By meaning
#
# Words are blind to meaning: *lift* is not *elevator*. Chapter 04 made vectors for sentences, a
# mean of token vectors in which frequent tokens count less. Near vectors, near meaning? Take the
# table of the base model for it.

# %%
counts = Counter(id for row in tokenizer.encode_batch(texts) for id in row)
everything = counts.total()
table_VD = base.embed.weight.detach()


def sentence_vector(text: str) -> Tensor:
    """Chapter 04's weighted mean: a token of frequency f counts 0.001 / (0.001 + f)."""
    ids = tokenizer.encode(f" {text.lower()}")
    weights_N1 = torch.tensor([[1e-3 / (1e-3 + counts[id] / everything)] for id in ids])
    return (weights_N1 * table_VD[ids]).sum(0)


vectors_ND = torch.stack([sentence_vector(text) for text in texts])
words_in = [set(words_of(text)) for text in texts]


def overlap(question: str) -> list[int]:
    """The naive search: pages by the number of shared words."""
    asked = set(words_of(question))
    return sorted(range(len(texts)), key=lambda number: -len(asked & words_in[number]))


SEARCHES: dict[str, Callable[[str], list[int]]] = {
    "shared words": overlap,
    "vectors": lambda q: [n for n, _ in nearest(vectors_ND, sentence_vector(q), 10)],
    "BM25": lambda q: [n for n, _ in index.best(q, 10)],
}
for kind, column in (("near", 1), ("far", 2)):
    for name, search in SEARCHES.items():
        ranked = [search(entry[column])[:10] for entry in EXAM]
        hits = [
            sum(page_of[entry[0]] in found[:k] for entry, found in zip(EXAM, ranked, strict=True))
            for k in (1, 3, 10)
        ]
        first = wilson(hits[0], len(EXAM)).show(".0%")
        print(f"{kind:>4} words, {name:>12}: first {first}, in 3: {hits[1]}, in 10: {hits[2]}")

# %% [markdown]
# The share of questions whose page is among the first k is called **recall@k**. Two lessons,
# whatever the exact numbers are.
#
# With the page's own words, BM25 is hard to beat, and it needs no model at all. With other words,
# every search here gets lost far more often. A mean of vectors from a small table may know that
# *sky* and *heaven* are related, and then drowns it in all the other words. Real systems train a
# model *for searching*, on pairs of questions and pages (Karpukhin et al. 2020), cut pages into
# passages, and then mix its list with BM25's (exercise 3).
#
# ### Does reading help?
#
# Finding is half of it. Does the model *use* the page? Put it before the question, and measure how
# surprised the chat model is by the right answer: without a page, with the right one, and with a
# wrong one. The wrong page is the control. Without it you couldn't tell reading from being warmed
# up by any text.


# %%
def answer_bits(question: str, answer: str, page: str | None) -> float:
    """Bits a byte of the answer, for the chat model."""
    asked = f"{page}\n\n{question}" if page else question
    turns = (Message("user", asked), Message("assistant", answer))
    bits, size = surprise(chatty, chat_tokenizer, Dialogue("?", "", turns, train_on="last"))
    return bits / size


examined = EXAM[:: 11 if FAST else 1]
open_book: dict[str, list[float]] = defaultdict(list)
for page, question, _, answer in examined:
    right_page = texts[page_of[page]]
    wrong_page = texts[(page_of[page] + len(texts) // 3) % len(texts)]
    for name, shown in (("none", None), ("right", right_page), ("wrong", wrong_page)):
        open_book[name].append(answer_bits(question, answer, shown))
for name, found in open_book.items():
    print(f"{name:>5} page: {bootstrap(found).show('.2f')} bits a byte of the answer")
for name in ("none", "wrong"):
    gain = bootstrap([a - b for a, b in zip(open_book[name], open_book["right"], strict=True)])
    print(f"the right page against {name}, answer by answer: {gain.show('.2f')} bits saved")
split_gain: dict[bool, list[float]] = defaultdict(list)
for entry, before, after in zip(examined, open_book["none"], open_book["right"], strict=True):
    split_gain[entry[0] in unread].append(before - after)
for never, found in sorted(split_gain.items()):
    kind = "never read in training" if never else "known from training"
    print(f"  pages {kind}: {bootstrap(found).show('.2f')} bits saved")

# %% [markdown]
# Look at the paired lines: an interval above zero means that the page helped. A model copies rare
# words from its prompt if it has learned to look for them, and the right page holds the rare words
# of the answer.
#
# Now be strict. "Less surprised by the answer" isn't "gives the answer". Let it speak.

# %%
question, answer = EXAM[8][1], EXAM[8][3]
page = texts[index.best(question, 1)[0][0]]
for shown in ("", f"{page}\n\n"):
    turn = [Message("user", f"{shown}{question}")]
    ids = render_prompt(turn, chat_tokenizer, context=chatty.config.context, reserve=32)
    quiet = Sampling(temperature=0, max_tokens=8 if FAST else 32)
    print(f"{'with the page' if shown else 'without':>13}: ", end="")
    print("".join(stream(chatty, chat_tokenizer, ids, quiet)).strip())
print(f"{'it should be':>13}: {answer}")

# %% [markdown]
# Our conversations hold no pages to read, so the model was never taught what a page before a
# question is for. A larger one, fine-tuned on such prompts, answers from the page and says where.
# And there it can still go wrong in two ways, which must be measured apart: the *search* brings the
# wrong page, or the *reader* misreads the right one.
#
# ## A calculator
#
# What is 83 times 47? A language model *guesses* it, digit by digit, as it guesses everything. You
# would take a calculator. So let it take one: it writes the sum between two marks, a program works
# it out, and the result goes into the text as if the model had written it. Cobbe et al. (2021) did
# this for school problems; Toolformer (Schick et al. 2023) let the model find out by itself where a
# call helps.
#
# ### Never `eval`
#
# The naive calculator is one line of Python, and it is a disaster.

# %%
naive = eval("83*47")  # works. And so does everything else:
print(
    naive, "...", eval("__import__('os').getcwd()")[:1], "... it could read and delete your files"
)

# %% [markdown]
# A model's text is the text of a stranger: it may repeat what somebody wrote on a web page that it
# just read. Even with numbers alone, `9**9**9**9` keeps the machine busy until you pull the plug.
# So the calculator must know the little language of sums and *nothing else*:
#
# ```
# sum     = product, then any number of: + product, - product
# product = factor, then any number of: * factor, / factor
# factor  = - factor, or ( sum ), or a number
# ```
#
# Each line becomes a function that reads its part and calls the others: a **recursive-descent
# parser**. That "* before +" comes out right needs no further thought; it is how the lines are
# nested. Length, depth and size are limited, and fractions are exact, so that a tenth plus two
# tenths is three tenths.


# %% tags=["export"]
class CalculationError(TinychatError):
    """A sum that the calculator refuses, in one sentence that says why."""


LONGEST = 200  # characters
DEEPEST = 20  # brackets and minus signs inside each other
LARGEST = 10**15  # above the line or below it
NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?|\.[0-9]+")
OPEN, CLOSE = "<calc>", "</calc>"  # around a sum that a model wants to have worked out


class _Sum:
    """Reads an expression from left to right, by one method for each line of the grammar."""

    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0

    def refuse(self, reason: str) -> CalculationError:
        return CalculationError(f"The sum {self.text!r} {reason}.")

    def rest(self) -> str:
        """What is not read yet, without leading spaces."""
        rest = self.text[self.place :].lstrip()
        self.place = len(self.text) - len(rest)
        return rest

    def take(self, signs: str) -> str:
        """Read the next character if it is one of these."""
        found = self.rest()[:1]
        self.place += found in set(signs)
        return found if found in set(signs) else ""

    def checked(self, value: Fraction) -> Fraction:
        if max(abs(value.numerator), value.denominator) > LARGEST:
            raise self.refuse(f"needs a number beyond {LARGEST:,}, use smaller ones")
        return value

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while sign := self.take("+-"):
            other = self.product(depth)
            value = self.checked(value + other if sign == "+" else value - other)
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while sign := self.take("*/"):
            other = self.factor(depth)
            if sign == "/" and other == 0:
                raise self.refuse("divides by zero, which has no answer")
            value = self.checked(value * other if sign == "*" else value / other)
        return value

    def factor(self, depth: int) -> Fraction:
        if depth > DEEPEST:
            raise self.refuse(f"is nested more than {DEEPEST} deep, make it plainer")
        if self.take("-"):
            return -self.factor(depth + 1)
        if self.take("("):
            value = self.sum(depth + 1)
            if not self.take(")"):
                raise self.refuse("lacks a closing bracket, add it")
            return value
        found = NUMBER.match(rest := self.rest())
        if not found:
            where = f"at {rest[:12]!r}" if rest else "at its end"
            raise self.refuse(f"has no number {where}; it takes numbers, + - * / and ( )")
        self.place += found.end()
        return self.checked(Fraction(found[0]))


def calculate(text: str) -> Fraction:
    """Work out a sum with + - * / and brackets, exactly; raises CalculationError.

    Nothing is ever run: the text is data, and so may come from a model or from a stranger.
    """
    if len(text) > LONGEST:
        raise CalculationError(f"{len(text)} characters are too long a sum; at most {LONGEST}.")
    reading = _Sum(text)
    value = reading.sum(0)
    if rest := reading.rest():
        raise reading.refuse(f"can't go on with {rest[:12]!r}, put + - * / between numbers")
    return value


def show_number(value: Fraction) -> str:
    """`3`, `-0.5` or `0.333333`: rounded to six digits after the point."""
    return f"{Decimal(round(value * 10**6)).scaleb(-6).normalize():f}"


# %%
for text in ("83*47", "-(1 + 2) * 4 / 10", "0.1 + 0.2", "1/3", "2 +", "7 / (3-3)", "9**9**9",
             "__import__('os')", "(" * 50, "99999999 * 99999999"):  # fmt: skip
    try:
        print(f"{text[:20]:>20} = {show_number(calculate(text))}")
    except CalculationError as error:
        print(f"{text[:20]:>20}: {str(error)[:110]}")

# %% tags=["test"]
assert calculate("2+3*4") == 14 and calculate("(2+3)*4") == 20 and calculate("8-3-2") == 3
assert calculate("0.1+0.2") == Fraction(3, 10) and show_number(Fraction(-1, 2)) == "-0.5"

# %% [markdown]
# ### The loop
#
# Now the text must call it. Let the model write until the closing mark appears. Stop it there, work
# out what stands between the marks, put the result behind, and let the model go on *from the longer
# text*. The next token reads the result like any other.
#
# Only what the model itself writes is looked at, never the prompt, or a user could make calls by
# typing the marks. A sum that fails gives its error sentence in place of a number. And the number
# of calls is limited, because a model can go round in circles.


# %% tags=["export"]
def result_of(expression: str) -> str:
    """What goes behind a call: the number, or in brackets why there is none."""
    try:
        return show_number(calculate(expression))
    except CalculationError as error:
        return f"({error})"


def answer_with_calculator(
    model: GPT,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    stop: Collection[int] = (),
    calls: int = 4,
) -> str:
    """Return a reply in which every `<calc>...</calc>` is followed by its result.

    The results are not counted in `max_tokens`. After `calls` calls the reply is over.
    """
    cache = model.new_cache()
    generator = make_generator(sampling.seed, model.device)
    reply, held, left = "", list(ids), sampling.max_tokens
    while left and calls > 0:
        prompt = [*ids, *tokenizer.encode(reply)]
        if reply and len(prompt) >= cache.capacity:
            break  # the results have filled the context
        rewind(cache, held, prompt)
        tokens: list[int] = []
        said, limited = "", replace(sampling, max_tokens=left)
        for token in generate(model, prompt, limited, stop=stop, cache=cache, generator=generator):
            tokens.append(token)
            said = tokenizer.decode(tokens)
            if CLOSE in said:
                break
        held, left, calls = prompt + tokens, left - len(tokens), calls - 1
        said, closed, _ = said.partition(CLOSE)  # what a token holds behind the mark is dropped
        reply += said + closed
        if not closed:
            break
        _, opened, expression = said.rpartition(OPEN)
        reply += result_of(expression if opened else "")
    return reply


# %% [markdown]
# ### Learning to call
#
# Our chat model has never seen the marks, so it won't call. Who teaches it? Examples, as always.
# Here a tiny GPT learns school problems from scratch, and a twin learns the same ones with calls in
# them. One thing matters: the *result* carries no loss. The model shall learn to ask, not to guess
# what the calculator will say. It is the loss mask of chapter 09 again.

# %%
PEOPLE, THINGS = "Ann Ben Mia Tom Lily Max".split(), "nuts eggs pens caps cups toys".split()


def problem(dice: random.Random, tool: bool) -> tuple[list[Part], str]:
    """A school problem as parts to learn from, and the sentence that ends a right answer."""
    who, what = dice.choice(PEOPLE), dice.choice(THINGS)
    a, b, c = (dice.randint(2, 99) for _ in range(3))
    asked, expression = dice.choice(
        (
            (f"{who} has {a} boxes of {b} {what}.", f"{a}*{b}"),
            (f"{who} has {a} boxes of {b} {what} and {c} more.", f"{a}*{b}+{c}"),
            (f"{who} has {a} {what} and {b} bags of {c} more.", f"{a}+{b}*{c}"),
        )
    )
    ending = f"{show_number(calculate(expression))} {what}."
    if not tool:
        return [(asked, False), (ending, True)], ending
    result, rest = ending.split(" ")
    call = f"{OPEN}{expression}{CLOSE}"
    return [(asked, False), (call, True), (result, False), (f" {rest}", True)], ending


def plain(dice: random.Random) -> list[Part]:
    return problem(dice, tool=False)[0]


def with_calls(dice: random.Random) -> list[Part]:
    return problem(dice, tool=True)[0]


dice = random.Random(2)
lessons = ["".join(t for t, _ in lesson(dice)) for lesson in (with_calls, plain) * 500]
school_words = Words(r"</?calc>| ?[A-Za-z]+| ?\d|.", lessons)
print(f"{lessons[0]}\n{lessons[1]}\n{school_words.vocab_size} tokens in this little language")

# %%
unsolved = random.Random(3)
problems = [problem(unsolved, tool=False) for _ in range(3 if FAST else 100)]
solved = {}
for tool in (False, True):
    begin = time.perf_counter()
    lesson = with_calls if tool else plain
    pupil = practise(school_words, lesson, steps=5 if FAST else 200, batch=32)
    seconds = time.perf_counter() - begin
    shortly = Sampling(temperature=0, max_tokens=24)
    answers = [
        answer_with_calculator(
            pupil, school_words, school_words.encode(parts[0][0]), shortly, stop={Words.end_id}
        )
        for parts, _ in problems
    ]
    solved[tool] = sum(a.endswith(end) for a, (_, end) in zip(answers, problems, strict=True))
    name = "with the tool" if tool else "by itself"
    print(f"{name:>13}: {wilson(solved[tool], len(problems)).show('.0%')} right ({seconds:.0f} s)")
    for (parts, ending), text in list(zip(problems, answers, strict=True))[:2]:
        print(f"{'':15}{parts[0][0]} {text}   (right: {ending})")

# %% tags=["test"]
assert FAST or solved[True] > 50 > solved[False], "copying two numbers is easier than multiplying"

# %% [markdown]
# (A problem whose exact numbers came up in practice could be known by heart. Those with two numbers
# are only 98 × 98, and a few thousand were practised, so that it happens to a few of the hundred.)
#
# Both had the same problems, as many steps and the same network. With the tool, the model must only
# *find* the numbers and copy them in the right order, and attention is good at that. Multiplying
# takes steps that it has no place to write. More training or written-out steps would help the first
# pupil; the second needs neither.
#
# What did *not* come for free: it calls because every lesson had a call. A real assistant must also
# learn when *not* to. And a search engine, a calendar or a Python interpreter are the same loop
# with another function behind the mark.
#
# ## Fewer bits
#
# A weight in float32 takes four bytes. To write one token, a processor reads *every* weight once,
# and for a large model reading is what takes the time. Half the bytes can mean twice the speed, and
# a model that fits where it didn't.
#
# Our files already do a little of that: they hold int8, a whole number from -127 to 127 for each
# weight, and one scale a row.

# %%
full = {name: weight for name, weight in base.state_dict().items() if weight.ndim == 2}
weights_in_matrices = sum(weight.numel() for weight in full.values())
print(
    f"{len(full)} matrices hold {weights_in_matrices / base.config.parameters:.1%} of the weights"
)
if path := find_first("base", "runs/book/base"):
    info = checkpoint.read_info(path)
    print(f"{path.name}: stored as {info.dtype}, {info.bytes / info.parameters:.2f} bytes a weight")
    if (cost := info.metrics.get("storage_cost_percent")) is not None:
        print(f"that cost {cost:+.2f} % in bits per byte, measured when it was made")

# %% [markdown]
# How far can you go? With $b$ bits there are $2^{b-1} - 1$ steps on each side of zero: 127 with
# eight bits, 7 with four, a single one with two. Divide by the largest weight, multiply by the
# steps, **round to the nearest**. No weight moves by more than half a step.
#
# But how large is a step? *The largest weight decides*, for everyone who shares its scale. One
# scale for a whole matrix is the naive way: a single **outlier** makes the steps so coarse that all
# the small weights round to zero. So share with fewer: one scale a row, or one for each **group**
# of 32 neighbours. Each scale costs 16 bits, so a group of 32 pays half a bit more a weight.


# %% tags=["export"]
@dataclass(frozen=True)
class Quantized:
    """A matrix as small whole numbers, with a scale for each group of neighbours in a row."""

    steps: Tensor
    "int8, [rows, columns]"
    scales: Tensor
    "float16, [rows, columns / group]"
    bits: int

    def restore(self) -> Tensor:
        """The weights as float32: steps times scales."""
        rows, groups = self.scales.shape
        scaled = self.steps.float().view(rows, groups, -1) * self.scales.float()[..., None]
        return scaled.view(rows, -1)

    @property
    def bytes(self) -> float:
        """What it takes with the steps packed side by side."""
        return self.bits / 8 * self.steps.numel() + 2 * self.scales.numel()


def quantize(weights: Tensor, bits: int, group: int | None = None) -> Quantized:
    """Round a matrix to the nearest of 2^bits - 1 steps; `group` weights share a scale, or a row.

    Symmetric: the largest weight of a group becomes the last step, zero stays zero.
    """
    rows, columns = weights.shape
    group = group or columns
    if not 2 <= bits <= 8 or columns % group:
        raise ConfigError(f"{bits} bits in groups of {group}: take 2 to 8, a divisor of {columns}.")
    last = 2 ** (bits - 1) - 1
    grouped = weights.detach().float().reshape(rows, -1, group)
    scales = (grouped.abs().amax(-1) / last).half()
    if not scales.isfinite().all():
        raise ConfigError("A weight is too large for a scale in float16, or not a number.")
    # By the scale as it is stored: rounding must undo what restoring does. An empty group has 0.
    divisor = torch.where(scales > 0, scales, 1.0).float()[..., None]
    steps = (grouped / divisor).round().clamp(-last, last).to(torch.int8)
    return Quantized(steps.view(rows, columns), scales, bits)


def quantized_model(model: GPT, bits: int, group: int | None = None) -> tuple[GPT, float]:
    """A copy whose matrices were rounded and restored, and the bytes that they would take."""
    rounded, size = copy.deepcopy(model), 0.0
    with torch.no_grad():
        for weight in rounded.parameters():
            if weight.ndim == 2:
                quantized = quantize(weight, bits, group)
                weight.copy_(quantized.restore())
                size += quantized.bytes
            else:
                size += 4 * weight.numel()
    return rounded, size


# %% tags=["test"]
example = torch.tensor([[0.7, -0.1, 0.26, 0.0], [0.0, 0.0, 0.0, 0.0]])
rounded = quantize(example, 4)
assert rounded.steps.tolist() == [[7, -1, 3, 0], [0, 0, 0, 0]]  # steps of a tenth
assert (rounded.restore() - example).abs().max() <= 0.05 + 1e-3
assert rounded.bytes == 4 + 2 * 2  # eight weights of half a byte, two scales
# Eight bits a row is what our checkpoints do; theirs keep the scale in float32.
matrix = full["blocks.0.attention.q.weight"]
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "one.safetensors"
    save_model(file, base, stage="base", tokenizer=tokenizer, lineage={}, metrics={})
    from_file = checkpoint.load(file).state["blocks.0.attention.q.weight"]
step = matrix.abs().amax(1, keepdim=True) / 127
assert ((quantize(matrix, 8).restore() - from_file).abs() <= step).all()

# %% [markdown]
# First the outlier, on its own. A row of ordinary numbers, and then the same row with one of them
# twenty times as large. How well are the *others* kept, with four bits?

# %%
row = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
spoiled = row.clone()
spoiled[0, 100] = 20 * row.abs().mean()
others = torch.arange(256) != 100
for name, group in (("one scale", None), ("groups of 64", 64), ("groups of 32", 32)):
    errors = []
    for values in (row, spoiled):
        lost = (quantize(values, 4, group).restore() - values)[0, others]
        errors.append(float(lost.pow(2).mean().sqrt() / row.pow(2).mean().sqrt()))
    print(f"{name:>12}: error of the others {errors[0]:.0%}, beside an outlier {errors[1]:.0%}")

# %% [markdown]
# Small groups are walls: the damage stays inside. Does our model have such outliers? For each kind
# of matrix, how large is the largest weight, measured in the typical weight of its matrix and of
# its row?

# %%
kinds: dict[str, list[tuple[float, float]]] = defaultdict(list)
for name, weight in full.items():
    tops = weight.abs().amax(1) / weight.pow(2).mean(1).sqrt().clamp(min=1e-9)
    whole = weight.abs().max() / weight.pow(2).mean().sqrt().clamp(min=1e-9)
    kinds[re.sub(r"blocks\.\d+\.|\.weight", "", name)].append((float(whole), float(tops.median())))
print("largest weight, in typical ones:  of the matrix  of a row")
for name, found in kinds.items():
    whole, median = (sum(values) / len(values) for values in zip(*found, strict=True))
    print(f"{name:>32} {whole:15.1f} {median:9.1f}")

# %% [markdown]
# And now the model itself, on text that it never read. The three ways to share, from eight bits
# down to two.


# %%
held_out = unseen_texts(1 if FAST else 4)
unseen: list[Document | Dialogue] = [*held_out["stories"], *held_out["explanations"]]


def surprises(model: GPT) -> list[tuple[float, int]]:
    """Bits and bytes of each unseen text."""
    return [surprise(model, tokenizer, text, 64 if FAST else 256) for text in unseen]


def per_byte(found: Sequence[tuple[float, int]]) -> float:
    return sum(bits for bits, _ in found) / sum(size for _, size in found)


def one_scale(model: GPT, bits: int) -> tuple[GPT, float]:
    """The naive way: a whole matrix as a single row."""
    rounded = copy.deepcopy(model)
    for weight in rounded.parameters():
        if weight.ndim == 2:
            weight.copy_(quantize(weight.view(1, -1), bits).restore().view_as(weight))
    return rounded, bits / 8 * weights_in_matrices


WAYS: dict[str, Callable[[int], tuple[GPT, float]]] = {
    "one scale a matrix": lambda bits: one_scale(base, bits),
    "one a row": lambda bits: quantized_model(base, bits),
    "one for 32 weights": lambda bits: quantized_model(base, bits, 32),
}
BITS = (8, 4) if FAST else (8, 6, 5, 4, 3, 2)
as_it_is = surprises(base)
print(f"as it is: {per_byte(as_it_is):.3f} bits per byte")
curves: dict[str, list[float]] = defaultdict(list)
for name, make in WAYS.items():
    for bits in BITS:
        rounded_model, size = make(bits)
        found = surprises(rounded_model)
        curves[name].append(per_byte(found))
        worse = [(after - before) for (after, _), (before, _) in zip(found, as_it_is, strict=True)]
        cost = bootstrap(worse, [size_of for _, size_of in as_it_is])
        print(f"{name:>18}, {bits} bits: {size / 1e6:4.1f} MB, {per_byte(found):.3f}", end=" ")
        print(f"bits per byte, {cost.show('+.3f')}")


# %%
# alt: Bits per byte against bits a weight: flat from eight to five, then a cliff; groups fall last.
def draw_bits(plt):
    figure, axis = plt.subplots(figsize=(7, 3.5))
    for (name, values), line in zip(curves.items(), ("o:", "s--", "^-"), strict=True):
        axis.plot(BITS, values, line, label=name)
    axis.axhline(per_byte(as_it_is), color="grey", label="as it is")
    axis.set(xlabel="bits a weight", ylabel="bits per byte", xticks=BITS)
    axis.invert_xaxis()
    axis.legend()
    return figure


picture("14_bits", draw_bits)

# %% tags=["test"]
here = BITS.index(4)
if path:  # random weights have nothing to lose
    assert curves["one for 32 weights"][here] < curves["one scale a matrix"][here], "walls help"
    assert abs(curves["one a row"][0] - per_byte(as_it_is)) < 0.01, "the file has eight bits too"

# %% [markdown]
# Nearly flat at first, then a cliff. (At its foot all three are ruins, and which ruin stands higher
# means nothing.) Where the cliff stands depends on who shares a scale, and that is why every
# four-bit format in use has groups. A large model usually stands it better than a small one: it has
# more weights than it needs.
#
# Rounding to the nearest isn't the best you can do. **GPTQ** (Frantar et al. 2023) rounds one
# column after another, and lets the columns to come make up for the error. **AWQ** (Lin et al.
# 2024) looks which inputs are large, and protects the weights that meet them. If the *activations*
# shall be rounded too, their outliers are the worse ones: Dettmers et al. (2022) found a few
# columns in large models that must stay in 16 bits.
#
# One honest word about speed. Here the weights are restored to float32 before they are used, so
# this model gets *smaller* and not faster. Speed needs a kernel that multiplies the packed bits
# themselves, as llama.cpp has them.
#
# ## Guess ahead
#
# The last trick changes nothing about what the model says, only how fast it comes.
#
# A pass of the model for *one* token takes nearly as long as a pass for several, because the
# weights must be fetched either way. Measure it:

# %%
story = tokenizer.encode(texts[0])
PASS = (1, 2, 4, 5, 8, 16)


@torch.inference_mode()
def pass_time(model: GPT, count: int, tries: int = 4 if FAST else 12) -> float:
    """Milliseconds to read `count` more tokens after a hundred, at best."""
    cache, taken = model.new_cache(), []
    model.hidden(torch.tensor([story[:100]]), cache=cache)
    for _ in range(tries):
        begin = time.perf_counter()
        h_1TD = model.hidden(torch.tensor([story[100 : 100 + count]]), cache=cache)
        F.linear(h_1TD, model.embed.weight)
        taken.append((time.perf_counter() - begin) * 1000)
        cache.truncate(100)
    return min(taken)


pass_time(base, 1)  # the first one warms up
pass_ms = {count: pass_time(base, count) for count in PASS}
for count, ms in pass_ms.items():
    print(f"{count:2} tokens a pass: {ms:5.1f} ms, {ms / pass_ms[1]:.2f} times one token's")

# %% [markdown]
# So if somebody *guessed* the next few tokens, one pass could check all the guesses together. Most
# words are easy to guess: after "once upon a" nobody needs a large model. A small, cheap **draft**
# (another thing than chapter 8's drafts of a reply) guesses, the model checks. That is **speculative decoding** (Leviathan et al. 2023; Chen et al.
# 2023).
#
# Our draft is chapter 02's idea on tokens: count what followed the last few. Where a longer context
# was seen, it corrects the guess of the shorter one.


# %% tags=["export"]
Draft = Callable[[Sequence[int]], Tensor]  # tokens so far -> logits [V] of the next


class TokenCounts:
    """A draft that costs almost nothing: what followed the last few tokens in some texts.

    A context seen n times takes n / (n + 1) of the guess, shorter ones share the rest.
    """

    def __init__(self, texts: Iterable[Sequence[int]], vocab_size: int, order: int = 4) -> None:
        alone_V = torch.ones(vocab_size)  # as if each token had been seen once
        self.after: dict[tuple[int, ...], dict[int, int]] = {}
        for text in texts:
            ids = torch.tensor(text, dtype=torch.long)
            alone_V += torch.bincount(ids, minlength=vocab_size)
            for place, token in enumerate(text):
                for length in range(1, min(order, place + 1)):
                    seen = self.after.setdefault(tuple(text[place - length : place]), {})
                    seen[token] = seen.get(token, 0) + 1
        self.alone_V, self.order = alone_V / alone_V.sum(), order

    def __call__(self, ids: Sequence[int]) -> Tensor:
        p_V = self.alone_V.clone()
        for length in range(1, min(self.order, len(ids) + 1)):
            seen = self.after.get(tuple(ids[len(ids) - length :]))
            if seen is None:
                break
            times = sum(seen.values())
            p_V *= 1 / (times + 1)
            p_V[list(seen)] += torch.tensor(list(seen.values())) / (times + 1)
        return p_V.log()


# %%
read = [doc.text for doc in [*stories(), *explanations()] if split_of(doc.id) == "train"]
rows = tokenizer.encode_batch(read[:30] if FAST else read)
begin = time.perf_counter()
draft = TokenCounts(([tokenizer.bos_id, *row] for row in rows), tokenizer.vocab_size)
print(f"counted {sum(map(len, rows)):,} tokens in {time.perf_counter() - begin:.1f} s")
for text in ("Once upon a", "The little"):
    best = draft(tokenizer.encode(text)).softmax(-1).topk(3)
    print(
        f"{text} ...", *(f"{tokenizer.piece(int(i))} {p:.0%}" for p, i in zip(*best, strict=True))
    )

# %% [markdown]
# ### Exactly the same dice
#
# Checking is easy for greedy decoding: a guess stands if it is the model's own best token. With
# dice it isn't. The naive rule "draw from the model, and keep the guess if it is the same" is right
# but wasteful. Here is the clever one. The draft drew a token with probability $q$; the model gives
# it $p$.
#
# - If $p \ge q$: keep it.
# - If not: keep it with probability $p / q$. Otherwise throw it away and draw from what the draft
#   left over, in proportion to $\max(0, p - q)$.
#
# Why is that exact? Think of two hills of sand over the tokens, $q$ and $p$. Where $q$ is too high,
# you carry sand away, just down to $p$. Where it is too low, you pour that sand, just up to $p$.
# What stands there in the end is $p$. **Whatever the draft says**: a bad one costs time, never
# quality.


# %% tags=["export"]
def _draw(weights_V: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(weights_V, 1, generator=generator))


def keep_or_replace(p_V: Tensor, q_V: Tensor, token: int, generator: torch.Generator) -> int:
    """Turn a token that was drawn from q into one that is drawn from p (Leviathan et al. 2023)."""
    kept = min(1.0, float(p_V[token] / q_V[token]))
    if _draw(p_V.new_tensor([1 - kept, kept]), generator):
        return token
    left_V = (p_V - q_V).clamp(min=0)
    # Where p and q differ in the last bit only, there may be nothing left to draw from.
    return _draw(left_V, generator) if float(left_V.sum()) > 0 else token


# %% tags=["test"]
p_V, q_V = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.7, 0.1])
kept_V = torch.minimum(p_V, q_V)  # q times min(1, p / q)
left_V = (p_V - q_V).clamp(min=0)
torch.testing.assert_close(kept_V + (1 - kept_V.sum()) * left_V / left_V.sum(), p_V)
# And with the real dice:
some_dice = make_generator(0, torch.device("cpu"))
tries = [
    keep_or_replace(p_V, q_V, _draw(q_V, some_dice), some_dice)
    for _ in range(500 if FAST else 4000)
]
seen_V = torch.bincount(torch.tensor(tries), minlength=3)
chi_squared = float(((seen_V - len(tries) * p_V) ** 2 / (len(tries) * p_V)).sum())
assert chi_squared < 13.8, "with two degrees of freedom, luck goes beyond that once in a thousand"

# %% [markdown]
# The loop. Follow the numbers in the code. When all guesses stand, the pass has told one more
# thing: the probabilities *after* the last guess. So a pass gives at least one token and at most
# one more than were guessed. The cache forgets the guesses that fell.


# %% tags=["export"]
@torch.inference_mode()
def speculate(
    model: GPT,
    draft: Draft,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    guesses: int = 4,
    stop: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[list[int]]:
    """Yield the new tokens of each pass of `model`: together, a reply as `generate` would draw it.

    The draft only changes how many passes it takes. A penalty for repeating would change the
    distribution from one guess to the next, and drafts to choose from are several replies: both are
    refused with ConfigError.
    """
    if sampling.repetition_penalty != 1:
        raise ConfigError("Speculation can't repeat a repetition penalty exactly; set it to 1.")
    if sampling.side_by_side != 1:
        raise ConfigError(
            f"Speculation writes one reply and can't choose among {sampling.drafts} drafts; "
            "set drafts to 1."
        )
    if not ids or guesses < 1:
        raise ConfigError(f"{len(ids)} tokens and {guesses} guesses; give at least one of each.")
    text = list(ids)
    cache = model.new_cache(1, len(text) + sampling.max_tokens)
    end = cache.capacity
    if end <= len(text):
        raise ConfigError(f"The prompt has {len(text)} tokens, the model reads {end}; shorten it.")
    generator = generator or make_generator(sampling.seed, model.device)
    while len(text) < end:
        # 1. the draft guesses, one token after another
        asked: list[int] = []
        q_NV: list[Tensor] = []
        for _ in range(min(guesses, end - len(text) - 1)):
            logits_V = draft(text + asked).to(model.device)
            q_NV.append(filter_logits(logits_V[None], sampling)[0].softmax(-1))
            asked.append(_draw(q_NV[-1], generator))
        # 2. the model reads what is new and all guesses, in one pass
        unread = torch.tensor([(text + asked)[cache.length :]], device=model.device)
        h_ND = model.hidden(unread, cache=cache)[0, -len(asked) - 1 :]
        logits_NV = F.linear(h_ND, model.embed.weight).float()
        p_NV = filter_logits(logits_NV, sampling).softmax(-1)
        # 3. the guesses stand until the first one that falls; the pass always adds one of its own
        new: list[int] = []
        for p_V, q_V, token in zip(p_NV[:-1], q_NV, asked, strict=True):
            new.append(keep_or_replace(p_V, q_V, token, generator))
            if new[-1] != token:
                break
        else:
            new.append(_draw(p_NV[-1], generator))
        # 4. hand over what comes before a stop token, and forget the guesses that fell
        before = list(itertools.takewhile(lambda token: token not in stop, new))
        if before:
            yield before
        if before != new:
            return
        text += new
        cache.truncate(len(text) - 1)


# %% [markdown]
# Does it give the same, and is it faster? Greedy first, where every token can be compared, then
# with dice. The **acceptance** is the share of checked guesses that stand: how far the two hills
# overlap. Greedy makes each hill a needle, and needles overlap wholly or not at all.

# %%
GUESSES = 4


def quickest(
    run: Callable[[], list[Any]], tries: int = 1 if FAST else 2
) -> tuple[list[Any], float]:
    """What a run gives, and its best time in this thread: other programs' time doesn't count."""
    seconds = []
    for _ in range(tries):
        begin = time.thread_time()
        result = run()
        seconds.append(time.thread_time() - begin)
    return result, max(1e-6, min(seconds))


def plainly() -> list[list[int]]:
    return [list(generate(base, ids, settings)) for ids in openings]


def with_guesses() -> list[list[list[int]]]:
    return [list(speculate(base, draft, ids, settings, guesses=GUESSES)) for ids in openings]


openings = [
    [tokenizer.bos_id, *tokenizer.encode(text)[:12]]
    for text in [doc.text for doc in unseen_texts(2)["stories"]]
]
openings = openings[: 1 if FAST else 2]
length = 16 if FAST else 48
raced = {}
for temperature in (0.0, 0.5, 1.0):
    settings = Sampling(temperature=temperature, top_p=1.0, max_tokens=length, seed=0)
    one_by_one, seconds_plain = quickest(plainly)
    passes, seconds = quickest(with_guesses)
    tokens = sum(len(new) for run in passes for new in run)
    whole = [new for run in passes for new in run[:-1]]  # a last pass may be cut short
    stood, fell = sum(len(new) - 1 for new in whole), sum(len(new) <= GUESSES for new in whole)
    share, rate = stood / max(1, stood + fell), tokens / sum(map(len, passes))
    raced[temperature] = (share, seconds_plain / seconds)
    print(f"temperature {temperature}: acceptance {share:.0%}, {rate:.2f} tokens a pass,", end=" ")
    print(f"{raced[temperature][1]:.2f} times as fast")
    if not temperature:
        joined = [[token for new in run for token in new] for run in passes]
        same = sum(a == b for a, b in zip(joined, one_by_one, strict=True))
        print(f"  {same} of {len(openings)} greedy texts are the same, token for token")

# %% [markdown]
# (As in chapter 08: sums in another order round differently in the last bit, and where two tokens
# are almost equally good, that bit can decide. With dice, the texts differ as two throws differ;
# the *chances* are the same. `tests/test_beyond.py` adds up every possible course of the dice on a
# tiny vocabulary and compares the two distributions exactly.)
#
# ### When does it pay?
#
# If each guess stands with chance $\alpha$, independent of the others, then $k$ guesses give
#
# $$E = 1 + \alpha + \alpha^2 + \dots + \alpha^k = \frac{1 - \alpha^{k+1}}{1 - \alpha}$$
#
# tokens a pass. One by one they would take $E$ passes. Speculation takes $k$ guesses of the draft
# at the cost $c$ each, and one pass that costs $v$, both measured in passes for a single token.


# %%
def speed_up(acceptance: float, guesses: int, draft_cost: float, pass_cost: float = 1.0) -> float:
    """How many times faster speculation is (Leviathan et al. 2023, theorem 3.8).

    Costs are in passes of the model for one token: of one guess, and of a pass that checks all.
    """
    expected = sum(acceptance**number for number in range(guesses + 1))
    return expected / (guesses * draft_cost + pass_cost)


# %%
some = story[:50]
_, seconds = quickest(
    lambda: [filter_logits(draft(some[:n])[None], settings).softmax(-1) for n in range(20, 40)]
)
draft_cost = seconds / 20 * 1000 / pass_ms[1]
pass_cost = pass_ms[GUESSES + 1] / pass_ms[1]
print(f"here: a guess costs {draft_cost:.2f}, a pass that checks {GUESSES} of them {pass_cost:.2f}")
for temperature, (share, measured) in raced.items():
    by_formula = speed_up(share, GUESSES, draft_cost, pass_cost)
    print(f"temperature {temperature}: formula {by_formula:.2f}, measured {measured:.2f} times")
pays = next(
    (a / 100 for a in range(101) if speed_up(a / 100, GUESSES, draft_cost, pass_cost) > 1), None
)
if pays is None:
    print("at these costs it can't pay, whatever the draft")
else:
    print(f"on this machine {GUESSES} guesses pay from an acceptance of {pays:.0%} on")
print("for a large model on a GPU, where a pass costs 1 and a guess 0.05: from", end=" ")
print(f"{next(a for a in range(101) if speed_up(a / 100, GUESSES, 0.05) > 1)}% on")


# %%
# alt: Speed-up against acceptance: steep for free passes, flatter at this machine's cost; our runs.
def draw_speed(plt):
    figure, axis = plt.subplots(figsize=(7, 3.5))
    shares = [number / 100 for number in range(96)]
    for k, line in ((2, ":"), (4, "-"), (8, "--")):
        values = [speed_up(share, k, 0.05) for share in shares]
        axis.plot(shares, values, line, color="C0", label=f"{k} guesses, large model on a GPU")
    here = [speed_up(share, GUESSES, draft_cost, pass_cost) for share in shares]
    axis.plot(shares, here, color="C1", label=f"{GUESSES} guesses at this machine's cost")
    axis.plot(*zip(*raced.values(), strict=True), "o", color="C1", label="measured above")
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set(xlabel="acceptance", ylabel="times as fast", ylim=(0, 6))
    axis.legend(fontsize=8)
    return figure


picture("14_speed", draw_speed)

# %% tags=["test"]
assert speed_up(0, 4, 0) == 1 and speed_up(1, 4, 0) == 5, "nothing accepted, everything accepted"
assert abs(speed_up(0.8, 4, 0.1) - (1 - 0.8**5) / 0.2 / 1.4) < 1e-12

# %% [markdown]
# If your dots lie below the grey line, speculation made this model *slower*, and there is no shame
# in it. The target is small and runs on a few cores, where five tokens cost clearly more than one;
# and counting is a weak draft. A model of seventy billion weights on a GPU is the other extreme.
# There a pass for five tokens costs hardly more than one, a much smaller GPT makes a good draft,
# and two to three times the speed is what the two papers report.
#
# ## Where to go from here
#
# **A bigger model, more data.** Everything in this book scales, and chapter 07 shows how the loss
# will follow. `tinychat train base --preset small --minutes 30` wants a GPU. The small model's
# weaknesses that you met in this chapter are mostly weaknesses of size.
#
# **DPO.** Chapter 12 trained a reward model and then a policy against it. Rafailov et al. (2023)
# showed that, for the same goal (reward minus $\beta$ times the KL distance), the best policy can
# be written down, and the reward model can be read off the policy. So the pairs of chapter 11 train
# the policy directly, with better reply $y_w$, worse reply $y_l$ and reference model
# $\pi_\text{ref}$:
#
# $$\ell = -\log \sigma\left(\beta \log \frac{\pi(y_w)}{\pi_\text{ref}(y_w)} - \beta \log \frac{\pi(y_l)}{\pi_\text{ref}(y_l)}\right)$$
#
# It is chapter 11's loss with a policy in the place of the reward model. No rollouts, no value
# head. What it gives up: it learns only from replies that somebody else wrote, and never finds out
# what its own new ones are worth. Exercise 4 of chapter 12 builds it.
#
# **Agents.** The loop around the calculator, with more tools and more rounds: search, read, write a
# file, run the tests, look at the result, go on. All that you learned about strangers' text counts
# double there: the model reads pages that may tell it to misuse its tools.
#
# **Pictures and sound.** Cut a picture into patches, turn each into a vector by a small network,
# and put the vectors where token vectors stand. The rest of the GPT doesn't mind (Dosovitskiy et
# al. 2021 for the patches; Liu et al. 2023 for the joining).
#
# **Longer texts, more experts, other losses.** You can read those papers now. That was the point.
#
# ## What we left out
#
# - **Passages and rerankers.** A real search cuts pages into passages, fetches a hundred, and lets
#   a second model order them by reading question and passage together.
# - **Prompts that get attacked.** Retrieval and tools bring strangers' text into the prompt.
#   Keeping data and orders apart there is an open problem.
# - **Training with rounding** in the loop, and formats with uneven steps such as NF4.
# - **Draft heads and trees**: a model that guesses its own next tokens (Medusa, EAGLE), with
#   several guesses at each place.
#
# ## Where this is in the package
#
# Everything tagged `export` here is `tinychat/beyond.py`. The chat itself doesn't use it: the
# shipped model has not learned to call, and on one core it is quick enough. It is there for you to
# build with. Checkpoints are rounded to int8 by `tinychat/runtime/checkpoint.py`.
#
# ## Exercises
#
# **1. How deep can it think?** A single swap is easy at once. Write `cups_at_once(rounds)`, train
# the student who answers at once on one swap, on two, four and eight, and find where two layers
# give up. Guessing gets a third.


# %% tags=["solution"]
def cups_at_once(rounds: int) -> Callable[[random.Random], list[Part]]:
    def exercise(dice: random.Random) -> list[Part]:
        place = dice.randrange(3)
        asked = "abc"[place]
        for swap in dice.choices("xyz", k=rounds):
            one, other = SWAPS[swap]
            place = {one: other, other: one}.get(place, place)
            asked += swap
        return [(asked, False), (f"={'abc'[place]}", True)]

    return exercise


reached = {}
for rounds in (1, 2) if FAST else (1, 2, 4, 8):
    student = practise(cup_words, cups_at_once(rounds), steps=5 if FAST else 120, batch=32)
    dice = random.Random(4)
    puzzles = [cups_at_once(rounds)(dice) for _ in range(100)]
    replies = written(student, cup_words, [puzzle[0][0] for puzzle in puzzles])
    reached[rounds] = sum(a == p[1][0] for a, p in zip(replies, puzzles, strict=True))
    print(f"{rounds} swaps at once: {reached[rounds]} of 100 right")
assert FAST or reached[1] > 90 > reached[8]

# %% [markdown]
# **2. Two in a byte.** `Quantized.bytes` counts half a byte for a four-bit step, but `steps` is
# int8. Write `pack4(steps)` and `unpack4(packed, columns)` that really put two steps into one byte.


# %% tags=["solution"]
def pack4(steps: Tensor) -> Tensor:
    raised = (steps.flatten() + 8).to(torch.uint8)  # -7 ... 7 becomes 1 ... 15
    return raised[0::2] | (raised[1::2] << 4)


def unpack4(packed: Tensor, columns: int) -> Tensor:
    pairs = torch.stack((packed & 15, packed >> 4), dim=1)
    return (pairs.flatten().to(torch.int8) - 8).view(-1, columns)


quantized = quantize(matrix, 4, 32)
packed = pack4(quantized.steps)
assert torch.equal(unpack4(packed, matrix.shape[1]), quantized.steps)
assert packed.numel() + 2 * quantized.scales.numel() == quantized.bytes
print(f"{4 * matrix.numel():,} bytes became {int(quantized.bytes):,}")


# %% [markdown]
# **3. Two lists, one answer.** Two searches need not fail on the same questions. Cormack et al.
# (2009) mix ranked lists without looking at scores: a page at rank r gets 1 / (60 + r) from each
# list. Write `fuse(lists)`. Does the mixture find more?


# %% tags=["solution"]
def fuse(lists: Sequence[Sequence[int]]) -> list[int]:
    points: dict[int, float] = defaultdict(float)
    for ranked in lists:
        for rank, number in enumerate(ranked, 1):
            points[number] += 1 / (60 + rank)
    return sorted(points, key=lambda number: -points[number])


assert fuse([[1, 2, 3], [3, 1, 4]])[:2] == [1, 3]
for kind, column in (("near", 1), ("far", 2)):
    for name in ("vectors", "BM25", "both"):
        hits = 0
        for entry in EXAM:
            used = ("vectors", "BM25") if name == "both" else (name,)
            found = fuse([SEARCHES[one](entry[column]) for one in used])
            hits += page_of[entry[0]] in found[:3]
        print(f"{kind:>4} words, {name:>7}: {hits} of {len(EXAM)} among the first three")
# Not here: BM25 alone is better than the mixture, since the vectors rank far more pages wrong. It pays
# where two searches are about equally good.

# %% [markdown]
# **4. The prompt as draft.** When a model repeats what stands in its prompt, as it does with a page
# to read, the best draft is the text so far: find the last place where the same two tokens stood,
# and guess what followed there (Saxena 2023). Write `lookup(ids)` as a `Draft`. How many tokens a
# pass do you get on a text that repeats itself?


# %% tags=["solution"]
def lookup(ids: Sequence[int]) -> Tensor:
    guess = ids[-1]
    for place in range(len(ids) - 1, 1, -1):
        if tuple(ids[place - 2 : place]) == tuple(ids[-2:]):
            guess = ids[place]
            break
    logits_V = torch.full((tokenizer.vocab_size,), -20.0)
    logits_V[guess] = 0.0
    return logits_V


sentence = tokenizer.encode(" The cat sat on the mat.")
ids = [tokenizer.bos_id, *sentence * 4]
settings = Sampling(temperature=0, max_tokens=16 if FAST else 60)
runs, seconds = quickest(lambda: list(speculate(base, lookup, ids, settings)))
one_by_one, seconds_plain = quickest(lambda: list(generate(base, ids, settings)))
joined = [token for new in runs for token in new]
print(f"{len(joined) / len(runs):.2f} tokens a pass, {seconds_plain / seconds:.2f} times as fast:")
print(f"  {tokenizer.decode(joined[:16])!r} ...")
assert lookup([5, 6, 7, 5, 6]).argmax() == 7 and lookup([1, 1, 2, 1, 1, 1]).argmax() == 1
assert joined == one_by_one, "a draft changes the speed and never the text"

# %% [markdown]
# ## Check yourself
#
# 1. With eight examples the right answer needs fewer bits, and yet the model chooses it less often.
#    How can that be?
# 2. Why did the dots not help, though they gave the model as many tokens as the steps?
# 3. Your chatbot with retrieval gives wrong answers. Which two numbers do you measure first?
# 4. Why does the calculator's result carry no loss in training?
# 5. A row of weights has one very large one. What happens to the others in four bits, and what do
#    groups change?
# 6. You replace the draft by one that guesses at random. What happens to the text, and to the
#    speed?
#
# <details markdown="1"><summary>Answers</summary>
#
# 1. The examples taught the form: *some* answer of this kind comes. All answers of this kind got
#    likelier, the wrong one perhaps more, because it stood just above.
# 2. A dot is the same whatever was found. Only what is written can be read again, so each step
#    needs a token that says something.
# 3. Recall of the search: is the right page among those that it brings? And the answers *given* the
#    right page. They are repaired in different places.
# 4. The calculator writes it. A model that learns to write it learns to guess, and one day it will
#    guess in place of calling.
# 5. The steps grow until the largest fits, and the small ones round to zero. Groups keep the damage
#    among few neighbours.
# 6. The text is drawn from the same distribution as before. The speed drops below that of plain
#    decoding: the guesses cost something and nearly all of them fall.
#
# </details>
#
# ## Sources
#
# - T. B. Brown et al.: [Language models are few-shot learners](https://arxiv.org/abs/2005.14165)
#   (2020).
# - T. Z. Zhao et al.: [Calibrate before use](https://arxiv.org/abs/2102.09690) (2021). A model's
#   liking for one answer.
# - S. Min et al.: [Rethinking the role of demonstrations](https://arxiv.org/abs/2202.12837) (2022).
# - J. Wei et al.: [Chain-of-thought prompting elicits reasoning in large language
#   models](https://arxiv.org/abs/2201.11903) (2022).
# - T. Kojima et al.: [Large language models are zero-shot
#   reasoners](https://arxiv.org/abs/2205.11916) (2022). "Let's think step by step".
# - W. Merrill, A. Sabharwal: [The expressive power of transformers with chain of
#   thought](https://arxiv.org/abs/2310.07923) (2024). What written steps add to a fixed depth.
# - B. Liu et al.: [Transformers learn shortcuts to automata](https://arxiv.org/abs/2210.10749)
#   (2023).
# - J. Pfau, W. Merrill, S. R. Bowman: [Let's think dot by dot](https://arxiv.org/abs/2404.15758)
#   (2024). When dots do help, and how hard that is to learn.
# - S. Robertson, H. Zaragoza: [The probabilistic relevance framework: BM25 and
#   beyond](https://doi.org/10.1561/1500000019) (2009).
# - P. Lewis et al.: [Retrieval-augmented generation](https://arxiv.org/abs/2005.11401) (2020).
# - V. Karpukhin et al.: [Dense passage retrieval](https://arxiv.org/abs/2004.04906) (2020).
# - G. V. Cormack, C. L. A. Clarke, S. Büttcher: [Reciprocal rank
#   fusion](https://doi.org/10.1145/1571941.1572114) (2009). Exercise 3.
# - K. Cobbe et al.: [Training verifiers to solve math word
#   problems](https://arxiv.org/abs/2110.14168) (2021). The calculator marks.
# - T. Schick et al.: [Toolformer](https://arxiv.org/abs/2302.04761) (2023).
# - T. Dettmers et al.: [LLM.int8()](https://arxiv.org/abs/2208.07339) (2022). Outliers.
# - E. Frantar et al.: [GPTQ](https://arxiv.org/abs/2210.17323) (2023); J. Lin et al.:
#   [AWQ](https://arxiv.org/abs/2306.00978) (2024).
# - Y. Leviathan, M. Kalman, Y. Matias: [Fast inference from transformers via speculative
#   decoding](https://arxiv.org/abs/2211.17192) (2023).
# - C. Chen et al.: [Accelerating large language model decoding with speculative
#   sampling](https://arxiv.org/abs/2302.01318) (2023).
# - A. Saxena: [Prompt lookup decoding](https://github.com/apoorvumang/prompt-lookup-decoding)
#   (2023). Exercise 4.
# - R. Rafailov et al.: [Direct preference optimization](https://arxiv.org/abs/2305.18290) (2023).
# - A. Dosovitskiy et al.: [An image is worth 16x16 words](https://arxiv.org/abs/2010.11929) (2021);
#   H. Liu et al.: [Visual instruction tuning](https://arxiv.org/abs/2304.08485) (2023).
