# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # How ChatGPT works
#
# Meet the finished model, watch it choose its next word, and see the map of the book.
#
# A chatbot looks like somebody who reads your question and thinks about an answer. Inside there is
# something much simpler, repeated very often. This chapter shows it to you on a model that was
# trained from random numbers with the code of this book, on an ordinary computer. It is small and it
# is often wrong. But it has the same parts as the large ones, and you can look at all of them.
#
# **You need** nothing but Python; no chapter comes before this one. **It takes** half an hour to
# read and seconds to run. **You build** nothing yet: this is the tour before the work. Names that
# you don't know are explained when their chapter comes. Read for the idea, not for the code.

# %%
import os
import textwrap

import torch

from tinychat.book.picture import picture
from tinychat.data.records import Message
from tinychat.dialogue import render_prompt
from tinychat.generation import Sampling, stream
from tinychat.gpt import GPT, load_model
from tinychat.runtime import checkpoint
from tinychat.runtime.checkpoint import CheckpointInfo
from tinychat.runtime.errors import CheckpointError
from tinychat.tokenizer import Tokenizer

FAST = os.environ.get("TINYCHAT_FAST") == "1"
found: dict[str, tuple[GPT, Tokenizer, CheckpointInfo]] = {}
for stage in ("base", "sft", "rlhf"):
    try:
        found[stage] = load_model(checkpoint.find(stage))
    except CheckpointError:
        print(f"no {stage} checkpoint here yet")
for stage, (_, _, about) in found.items():
    print(f"{stage:5} {about.parameters / 1e6:.1f} million weights, {about.bytes / 1e6:.1f} MB")

# %% [markdown]
# ## Talk to it
#
# Here is the finished chatbot. It gets a question that you could ask anyone, and it answers. (In a
# terminal, `tinychat chat` lets you do this for as long as you like. There it is more careful: it
# writes each sentence eight times and says the one that it is surest of. Here it says the first.)

# %%
chatbot, tokenizer, about_chatbot = next(
    found[stage] for stage in ("rlhf", "sft", "base") if stage in found
)


def ask(model: GPT, question: str, seed: int = 0, temperature: float = 0.7) -> str:
    """One answer; the same seed gives the same one."""
    prompt = render_prompt(
        [Message("user", question)], tokenizer, context=model.config.context, reserve=100
    )
    how = Sampling(temperature=temperature, top_p=0.9, max_tokens=30 if FAST else 80, seed=seed)
    return "".join(stream(model, tokenizer, prompt, how)).strip()


def quote(who: str, text: str) -> None:
    print(textwrap.fill(f"{who}: {text}", 90, subsequent_indent="    "))


for question in ("hi", "what is your name?", "tell me something about the moon"):
    quote("you", question)
    quote("tinychat", ask(chatbot, question))
    print()

# %% [markdown]
# Be strict with these answers. Does each make sense? Is it true? A model of this size has read a tiny
# part of what the large ones read, so expect friendly nonsense. The interesting question is another: how
# can a program that nobody told any answer produce a sentence at all?
#
# ## Fancy autocomplete
#
# Your phone suggests the next word while you type. A language model does exactly this, and only this:
# **given the text so far, it says how likely each possible next piece of text is.** The pieces are
# called *tokens*: short words, or parts of longer ones.
#
# What comes after "The cat jumped over the"? You would bet on *fence* or *wall*, hardly on *cheese*,
# and never on *of*. Ask the base model. It has only read, some conversations among the
# rest, and was never taught to take part in one.

# %%
base = found["base"][0] if "base" in found else chatbot


def next_token(model: GPT, text: str) -> torch.Tensor:
    """The probability of every token of the vocabulary to come next, [V]."""
    with torch.inference_mode():
        ids_1T = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]])
        return model(ids_1T)[0, -1].softmax(dim=-1)


BEGINNING = "The cat jumped over the"
probabilities_V = next_token(base, BEGINNING)
best, ids = probabilities_V.topk(10)
words = [tokenizer.decode([id]).strip() or repr(tokenizer.decode([id])) for id in ids.tolist()]
print(BEGINNING, "...")
for word, probability in zip(words, best.tolist(), strict=True):
    print(f"  {word:>12} {probability:6.1%} {'█' * max(1, round(200 * probability))}")
print(f"all {len(probabilities_V):,} tokens together: {float(probabilities_V.sum()):.0%}")

# %% tags=["test"]
assert abs(float(probabilities_V.sum()) - 1) < 1e-3
assert float(probabilities_V.min()) > 0, "nothing is impossible, only unlikely"

# %% [markdown]
# The same as a picture. Every token of the vocabulary has a bar; these are the ten longest.


# %%
# alt: bar chart of the ten likeliest next words after "The cat jumped over the", the longest on top
def draw_guesses(plt):
    figure, axes = plt.subplots(figsize=(6, 3.2))
    axes.barh(words[::-1], (100 * best).tolist()[::-1])
    axes.set_xlabel("probability in per cent")
    return figure


picture("00_next_word", draw_guesses)

# %% [markdown]
# ## One token after another
#
# How do you get a text out of a machine that only knows the next token? You take one, put it behind
# the text, and ask again. And again. The model reads everything anew each time; it has no plan and
# no memory besides the text itself.

# %%
text = BEGINNING
for _ in range(8):
    token = int(next_token(base, text).argmax())
    text += tokenizer.decode([token])
    print(text)

# %% [markdown]
# That loop is the whole trick behind every chatbot. Everything else in this book serves to make the
# guesses good, to make them useful, and to make them fast.
#
# ## Why it never says the same thing twice
#
# Always taking the most likely token gives the same text each time, and often a dull one that goes
# round in circles. So a chatbot throws dice: a token with a bar twice as long is chosen twice as
# often. How wild the dice are is called the **temperature**. Zero means no dice. One means the bars as
# they are. Above one, the small bars grow.

# %%
for temperature in (0.0, 0.8, 1.5):
    print(f"temperature {temperature}")
    for seed in range(3):
        how = Sampling(temperature=temperature, top_p=1.0, max_tokens=12, seed=seed)
        start = [tokenizer.bos_id, *tokenizer.encode(BEGINNING)]
        more = "".join(stream(base, tokenizer, start, how))
        print("   ", (BEGINNING + more).replace("\n", " "))

# %% tags=["test"]
greedy = Sampling(temperature=0, max_tokens=12)
start = [tokenizer.bos_id, *tokenizer.encode(BEGINNING)]
assert len({"".join(stream(base, tokenizer, start, greedy)) for _ in range(2)}) == 1
wild = [Sampling(temperature=1.5, top_p=1.0, max_tokens=12, seed=seed) for seed in range(6)]
assert len({"".join(stream(base, tokenizer, start, how)) for how in wild}) > 1

# %% [markdown]
# ## Autocomplete isn't an assistant yet
#
# The base model goes on with *text*. Give it a question in quotation marks, as it met them in stories,
# and the story goes on: somebody asked it, somebody else says something, and nobody answers *you*. To
# make an assistant of it takes two more steps, and each leaves a checkpoint, a file with all weights at
# that time:
#
# 1. **base**: read a lot and guess the next token. The result knows words, grammar, and some facts.
# 2. **sft** (supervised fine-tuning): show it many good conversations. The result answers instead of
#    rambling on.
# 3. **rlhf** (reinforcement learning from human feedback): let it answer, have the answers judged,
#    and make what was liked more likely. The result answers in the way that people prefer.
#
# The same question for each step that is finished:

# %%
QUESTION = "what do bees make?"
for stage, (model, _, _) in found.items():
    if stage == "base":
        how = Sampling(temperature=0.7, top_p=0.9, max_tokens=30 if FAST else 60, seed=0)
        start = [tokenizer.bos_id, *tokenizer.encode(f'"{QUESTION.capitalize()}"')]
        answer = "... " + "".join(stream(model, tokenizer, start, how))
    else:
        answer = ask(model, QUESTION)
    assert answer.strip(". \n"), "it said nothing"
    quote(stage, " ".join(answer.split()))
    print()

# %% [markdown]
# ## Three parts, and who builds them
#
# Everything that ChatGPT does rests on three ideas. This book builds all of them.
#
# | part | the idea | chapters |
# | --- | --- | --- |
# | **the transformer** | a network that reads all tokens at once and lets each look back at the others | 01 a first network, 02 what came before, 03 tokens, 04 embeddings, 05 attention, 06 GPT |
# | **pretraining** | guess the next token, millions of times; what you must know to guess well, you learn | 07 pretraining, 08 generation |
# | **alignment** | show it how to answer, then reward what people like | 09 dialogue, 10 fine-tuning, 11 reward model, 12 PPO |
#
# Think of somebody who grows up in a library. The transformer is the brain they were born with.
# Pretraining is reading every book. Alignment is learning to talk with visitors: what helps them, what
# is rude, when to say "I don't know". Then somebody has to measure whether it helped (chapter 13), and
# to ask what else can be done with such a model (chapter 14).
#
# ## What it cost
#
# Each checkpoint says of itself how it was made. Of all numbers below, only the two of GPT-3 are typed
# in by hand.

# %%
for stage, (_, _, about) in found.items():
    record = about.lineage
    machine = record["hardware"]
    engine = machine["gpus"][0]["name"] if machine["gpus"] else machine["cpu"]
    print(
        f"{stage:5} {record['tokens'] / 1e6:7.1f} million tokens read, {record['minutes']:.0f} "
        f"minutes on {machine['cores']} cores of {engine}"
    )
tokens_read = found["base"][2].lineage["tokens"] if "base" in found else 0
if tokens_read:
    # The figures of GPT-3: Brown et al. 2020, table 2.1 and section 2.2.
    print(f"GPT-3 has {175e9 / base.config.parameters:,.0f} times as many weights")
    print(f"and read {300e9 / tokens_read:,.0f} times as many tokens")

# %% [markdown]
# So don't compare this chatbot with ChatGPT by its answers. Compare the machinery: it is the same.
#
# ## What it doesn't do
#
# - **It doesn't look anything up.** There is no table of facts inside, only weights. When the likely
#   continuation of a sentence is wrong, it says the wrong thing in the same calm voice. People call
#   this *hallucination*; the model did what it always does.
# - **It doesn't remember you.** Each conversation is one text. When the text is gone, so is the memory.
# - **It doesn't want anything.** It was adjusted, number by number, until its guesses fitted.
#
# ## Exercises
#
# **1. Surprise.** Write a function that takes a text and returns how surprised the model is by each
# token: minus the logarithm, base 2, of the probability that it gave to the token that came. Which of
# "The cat jumped over the fence." and "The cat jumped over the senate." surprises it more at the end?
# (A word can be two tokens. Their surprises add up.)


# %% tags=["solution"]
def surprise(model: GPT, text: str) -> list[tuple[str, float]]:
    """Bits of surprise for each token of a text."""
    tokens = tokenizer.encode(text)
    with torch.inference_mode():
        logits_TV = model(torch.tensor([[tokenizer.bos_id, *tokens]]))[0]
    bits_T = -logits_TV[:-1].log_softmax(dim=-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
    pieces = [tokenizer.decode([token]) for token in tokens]
    return list(zip(pieces, (bits_T / torch.tensor(2.0).log()).tolist(), strict=True))


for ending in ("fence", "senate"):
    told = surprise(base, f"{BEGINNING} {ending}.")
    print(" ".join(f"{piece.strip()}:{bits:.1f}" for piece, bits in told))
common, rare = (
    sum(bits for _, bits in surprise(base, f"{BEGINNING} {word}")) for word in ("fence", "senate")
)
assert common < rare

# %% [markdown]
# **2. The dice.** Draw one token a thousand times from the chart above and count how often the
# likeliest one comes. How close is the share to its bar? (Hint: `torch.multinomial`.)

# %% tags=["solution"]
torch.manual_seed(0)
drawn = torch.multinomial(probabilities_V, 1000, replacement=True)
share = float((drawn == ids[0]).float().mean())
print(f"its bar says {float(best[0]):.1%}, it came in {share:.1%} of the draws")
assert abs(share - float(best[0])) < 0.05

# %% [markdown]
# ## Check yourself
#
# **What does a language model compute?** A probability for each token of its vocabulary to come next,
# given the text so far.
#
# **Where does the answer to your question come from, then?** From doing that again and again, each
# time with the chosen token added to the text.
#
# **Why do two people get different answers?** Because tokens are drawn with dice. With the same seed,
# or at temperature zero, they get the same one.
#
# **What does the base model lack?** The habit of answering. It learned how texts go on, and
# conversations were a part of them.
#
# ## What we left out
#
# Pictures, sound, tools, searching the web, and how thousands of computers train one model together.
# The principle doesn't change with any of them.
#
# ## Where this is in the package
#
# Nowhere: this chapter exports nothing, so it may use everything. `tinychat.gpt` is chapter 06,
# `tinychat.generation` chapter 08, `tinychat.dialogue` chapter 09.
#
# ## Sources
#
# - C. E. Shannon: [*Prediction and Entropy of Printed English*](https://archive.org/details/bstj30-1-50)
#   (1951). Guessing the next letter, with people as the model.
# - T. B. Brown et al.: [*Language Models are Few-Shot Learners*](https://arxiv.org/abs/2005.14165)
#   (2020). GPT-3.
# - L. Ouyang et al.: [*Training language models to follow instructions with human
#   feedback*](https://arxiv.org/abs/2203.02155) (2022). The three steps.
